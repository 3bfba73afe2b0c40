//! Used cars and their prices.

use candle_core::{Device, Error, Result, Tensor};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

/// Cars to train on, of 804.
pub(crate) const TRAIN: usize = 604;

/// Cars: what is known of them, `[N, 17]`, and what they cost, `[N, 1]`.
pub(crate) struct Cars {
    pub(crate) inputs: Tensor,
    pub(crate) prices: Tensor,
}

/// All cars, in two parts that share none.
pub(crate) struct Split {
    /// The names of the columns of the inputs.
    pub(crate) names: Vec<String>,
    pub(crate) train: Cars,
    pub(crate) test: Cars,
}

impl Split {
    /// The table that is embedded in the program, shuffled the same way on every run.
    pub(crate) fn load() -> Result<Self> {
        let mut table = csv::Reader::from_reader(include_str!("../data/car_prices.csv").as_bytes());
        let head = table.headers().map_err(Error::wrap)?;
        let names: Vec<String> = head.iter().skip(1).map(str::to_string).collect();
        let mut rows: Vec<Vec<f32>> = vec![];
        for row in table.deserialize() {
            rows.push(row.map_err(Error::wrap)?);
        }
        // The file is sorted by make: without a shuffle the test would be on makes that training
        // never saw.
        rows.shuffle(&mut StdRng::seed_from_u64(804));
        let (train, test) = rows.split_at(TRAIN);
        Ok(Self {
            names,
            train: Cars::new(train)?,
            test: Cars::new(test)?,
        })
    }

    /// The inputs of all cars, which nobody has while a model is trained.
    pub(crate) fn all_inputs(&self) -> Result<Tensor> {
        Tensor::cat(&[&self.train.inputs, &self.test.inputs], 0)
    }
}

impl Cars {
    fn new(rows: &[Vec<f32>]) -> Result<Self> {
        let table = Tensor::new(rows.to_vec(), &Device::Cpu)?;
        let width = table.dim(1)?;
        Ok(Self {
            inputs: table.narrow(1, 1, width - 1)?.contiguous()?,
            prices: table.narrow(1, 0, 1)?.contiguous()?,
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.inputs.dims()[0]
    }
}
