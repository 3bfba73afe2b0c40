//! Reproducible numbers, and tensors of them.

use candle_core::{DType, Device, Result, Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// A seeded source of numbers: candle's own on the CPU cannot be seeded.
pub(crate) struct Draw(StdRng);

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    pub(crate) fn normal(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.0.sample(StandardNormal)).collect()
    }

    /// Weights as a trained layer has them: around 1, some of them negative.
    pub(crate) fn weight(&mut self, n: usize) -> Vec<f64> {
        self.normal(n).iter().map(|z| 1. + 0.6 * z).collect()
    }

    /// `n` values of `+size` or `-size`.
    pub(crate) fn signs(&mut self, n: usize, size: f64) -> Vec<f64> {
        let sign = |up| if up { size } else { -size };
        (0..n).map(|_| sign(self.0.random())).collect()
    }

    pub(crate) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut self.0);
        order
    }
}

pub(crate) fn tensor(values: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, dims, &Device::Cpu)?.to_dtype(dtype)
}

pub(crate) fn variable(values: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Var::from_tensor(&tensor(values, dims, dtype)?)?.into_inner())
}

pub(crate) fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The bits of every element, in logical order: equal for equal NaNs, different for the two zeros.
pub(crate) fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(values(t)?.into_iter().map(f64::to_bits).collect())
}

/// `values` as `dtype` holds them.
pub(crate) fn rounded(values: &[f64], dtype: DType) -> Result<Vec<f64>> {
    self::values(&tensor(values, &[values.len()], dtype)?)
}
