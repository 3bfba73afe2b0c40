//! The handwritten digits that the examples learn: 1,797 images of 8 by 8 pixels, embedded in the program.

use std::io::Read;

use candle_core::{DType, Device, Error, IndexOp, Result, Tensor};

/// Images to train on, as many as `scripts/make_digits_cnn.py` does; the other 500, by other writers, are for testing.
const TRAIN: usize = 1297;

/// Images `[N, 1, 8, 8]` in `[0, 1]` and their classes `[N]`.
pub(crate) struct Digits {
    pub(crate) images: Tensor,
    pub(crate) labels: Tensor,
}

impl Digits {
    /// The digits to train on, and those to test on.
    pub(crate) fn load() -> Result<(Self, Self)> {
        let mut text = String::new();
        let file = include_bytes!("../data/digits.csv.gz");
        flate2::read::GzDecoder::new(&file[..]).read_to_string(&mut text)?;
        let numbers = text.split([',', '\n']).filter(|field| !field.is_empty());
        let numbers: Vec<f32> = numbers
            .map(|field| field.parse().map_err(Error::wrap))
            .collect::<Result<_>>()?;
        // A row is 64 pixels from 0 to 16 and the class.
        let rows = Tensor::from_vec(numbers, ((), 65), &Device::Cpu)?;
        Ok((Self::new(&rows.i(..TRAIN)?)?, Self::new(&rows.i(TRAIN..)?)?))
    }

    fn new(rows: &Tensor) -> Result<Self> {
        Ok(Self {
            images: (rows.i((.., ..64))?.reshape(((), 1, 8, 8))? / 16.)?,
            labels: rows.i((.., 64))?.to_dtype(DType::U32)?,
        })
    }

    /// The share of the images, in percent, whose class has the highest of the `logits` `[N, 10]`.
    pub(crate) fn accuracy(&self, logits: &Tensor) -> Result<f32> {
        let right = logits.argmax(1)?.eq(&self.labels)?;
        Ok(100. * right.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?)
    }
}
