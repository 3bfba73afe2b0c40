//! The handwritten digits: 1,797 images of 8 by 8 pixels, embedded in the program.

use candle_core::{Device, Error, Result, Tensor, bail};
use flate2::read::GzDecoder;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use std::io::Read;

/// Edge of an image in pixels.
pub(crate) const SIDE: usize = 8;
/// Digits 0 to 9.
pub(crate) const CLASSES: usize = 10;
/// Images held back for testing; all others are trained on.
pub(crate) const TEST_SIZE: usize = 500;
/// Images trained on.
pub(crate) const TRAIN_SIZE: usize = 1797 - TEST_SIZE;

const PIXELS: usize = SIDE * SIDE;
const DIGITS: &[u8] = include_bytes!("../data/digits.csv.gz");
/// The split is the same whatever is compared: which images are hard to tell apart is no part of
/// the experiment.
const SPLIT_SEED: u64 = 20;

/// Images (n, 1, 8, 8) and their classes (n).
#[derive(Clone, Debug)]
pub(crate) struct Labeled {
    pub(crate) images: Tensor,
    pub(crate) labels: Tensor,
}

impl Labeled {
    /// The images at these positions, in this order.
    pub(crate) fn select(&self, positions: &[u32]) -> Result<Self> {
        let index = Tensor::new(positions, self.labels.device())?;
        Ok(Self {
            images: self.images.index_select(&index, 0)?,
            labels: self.labels.index_select(&index, 0)?,
        })
    }
}

/// Images for training and images for testing.
#[derive(Debug)]
pub(crate) struct Digits {
    pub(crate) train: Labeled,
    pub(crate) test: Labeled,
}

impl Digits {
    pub(crate) fn load(device: &Device) -> Result<Self> {
        let (pixels, labels) = parse(GzDecoder::new(DIGITS))?;
        let count = labels.len();
        if count != TRAIN_SIZE + TEST_SIZE {
            bail!(
                "the embedded digits hold {count} images, expected {}",
                TRAIN_SIZE + TEST_SIZE
            )
        }
        let all = Labeled {
            images: Tensor::from_vec(pixels, (count, 1, SIDE, SIDE), device)?,
            labels: Tensor::from_vec(labels, count, device)?,
        };
        let order = shuffled(count, &mut StdRng::seed_from_u64(SPLIT_SEED));
        let (test, train) = order.split_at(TEST_SIZE);
        let (mut train, mut test) = (all.select(train)?, all.select(test)?);
        // The test images are scaled with the statistics of the training images, as images yet
        // unseen would be.
        let (mean, deviation) = mean_and_deviation(&train.images)?;
        for set in [&mut train, &mut test] {
            set.images = ((&set.images - mean)? / deviation)?;
        }
        Ok(Self { train, test })
    }
}

/// Mean and standard deviation of all pixels.
fn mean_and_deviation(images: &Tensor) -> Result<(f64, f64)> {
    let mean = f64::from(images.mean_all()?.to_scalar::<f32>()?);
    let variance = (images - mean)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
    Ok((mean, f64::from(variance).sqrt()))
}

/// 0..count in random order.
pub(crate) fn shuffled(count: usize, rng: &mut impl Rng) -> Vec<u32> {
    let mut order: Vec<u32> = (0..count as u32).collect();
    order.shuffle(rng);
    order
}

/// Reads rows of 64 pixels (0 to 16) and a class (0 to 9).
fn parse(source: impl Read) -> Result<(Vec<f32>, Vec<u32>)> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    let mut rows = csv::ReaderBuilder::new()
        .has_headers(false)
        .from_reader(source);
    for (row, values) in rows.deserialize().enumerate() {
        let values: Vec<u8> = values.map_err(Error::wrap)?;
        let Some((&label, image)) = values
            .split_last()
            .filter(|(_, image)| image.len() == PIXELS)
        else {
            bail!(
                "digits row {row}: expected {} values, got {}",
                PIXELS + 1,
                values.len()
            )
        };
        if usize::from(label) >= CLASSES || image.iter().any(|&pixel| pixel > 16) {
            bail!(
                "digits row {row}: expected pixels 0..=16 and a class 0..=9, got class {label}, \
                pixels {image:?}"
            )
        }
        pixels.extend(image.iter().map(|&pixel| f32::from(pixel)));
        labels.push(u32::from(label));
    }
    Ok((pixels, labels))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn row(pixel: u8, label: u8) -> String {
        format!("{}{label}\n", format!("{pixel},").repeat(PIXELS))
    }

    #[test]
    fn rows_become_pixels_and_classes() -> Result<()> {
        let (pixels, labels) = parse((row(16, 3) + &row(4, 9)).as_bytes())?;
        assert_eq!(labels, [3, 9]);
        assert_eq!(
            (pixels.len(), pixels[0], pixels[PIXELS]),
            (2 * PIXELS, 16., 4.)
        );
        Ok(())
    }

    #[test]
    fn malformed_rows_are_named() {
        for (text, want) in [
            ("1,2,3\n".to_string(), "row 0: expected 65 values, got 3"),
            (row(1, 1) + &row(17, 1), "row 1: expected pixels"),
            (row(1, 10), "row 0: expected pixels"),
        ] {
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn training_images_are_standardized() -> Result<()> {
        let (mean, deviation) = mean_and_deviation(&Digits::load(&Device::Cpu)?.train.images)?;
        assert!(
            mean.abs() < 1e-5 && (deviation - 1.).abs() < 1e-5,
            "{mean} {deviation}"
        );
        Ok(())
    }

    #[test]
    fn split_is_fixed_disjoint_and_holds_every_class() -> Result<()> {
        let digits = Digits::load(&Device::Cpu)?;
        assert_eq!(digits.train.images.dims(), [TRAIN_SIZE, 1, SIDE, SIDE]);
        assert_eq!(digits.test.images.dims(), [TEST_SIZE, 1, SIDE, SIDE]);
        let again = Digits::load(&Device::Cpu)?;
        let labels = digits.test.labels.to_vec1::<u32>()?;
        assert_eq!(labels, again.test.labels.to_vec1::<u32>()?);
        assert_eq!(labels.iter().collect::<HashSet<_>>().len(), CLASSES);
        let bits = |set: &Labeled| -> Result<HashSet<Vec<u32>>> {
            let rows = set.images.flatten_from(1)?.to_vec2::<f32>()?;
            Ok(rows
                .into_iter()
                .map(|row| row.into_iter().map(f32::to_bits).collect())
                .collect())
        };
        assert!(bits(&digits.train)?.is_disjoint(&bits(&digits.test)?));
        Ok(())
    }
}
