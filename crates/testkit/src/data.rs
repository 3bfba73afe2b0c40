//! Reproducible numbers, and tensors of them.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;

/// A seeded source of numbers: candle's own on the CPU cannot be seeded.
pub struct Draw(StdRng);

impl Draw {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    /// `n` values of mean 0 and variance 1.
    pub fn normal(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.0.sample(StandardNormal)).collect()
    }

    /// Weights as a trained layer has them: around 1, some of them negative.
    pub fn weight(&mut self, n: usize) -> Vec<f64> {
        self.normal(n).iter().map(|z| 1. + 0.6 * z).collect()
    }

    /// `n` values of `+size` or `-size`.
    pub fn signs(&mut self, n: usize, size: f64) -> Vec<f64> {
        let sign = |up| if up { size } else { -size };
        (0..n).map(|_| sign(self.0.random())).collect()
    }

    /// The numbers below `n` in a random order.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        order.shuffle(&mut self.0);
        order
    }
}

/// f64 values uniform in [-1, 1), the same for the same seed.
pub fn uniform(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.elem_count())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape holds")
}

/// Numbers that look random, of mean 0 and a variance near 1/2, the same on every run: the sine of
/// a phase that grows with the square of the element's index.
pub fn noise(shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    noise_by(shape, |i| i * i + 3 * i)?.to_dtype(dtype)
}

/// [`noise`] in f64 by another phase, a function of the element's index.
pub fn noise_by(shape: impl Into<Shape>, phase: impl Fn(usize) -> usize) -> Result<Tensor> {
    let shape = shape.into();
    let wave = |i: usize| (phase(i) as f64 * 0.7).sin();
    let values: Vec<f64> = (0..shape.elem_count()).map(wave).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// [`noise_by`] with zeros and equal numbers among them: multiples of a quarter, by a phase that
/// grows by `step` beside the square.
pub fn ties(shape: impl Into<Shape>, step: usize) -> Result<Tensor> {
    let x = noise_by(shape, |i| i * i + step * i)?;
    (x * 4.)?.round()? / 4.
}

/// `n` independent normal values, the same for the same seed.
pub fn normal(n: usize, seed: u64, mean: f64, std: f64) -> Vec<f64> {
    let z = Draw::new(seed).normal(n);
    z.iter().map(|z| mean + std * z).collect()
}

/// `values` in row-major order, rounded to `dtype`.
pub fn tensor(values: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
    Tensor::from_slice(values, dims, &Device::Cpu)?.to_dtype(dtype)
}

/// `values` in f64, along one axis.
pub fn column(values: &[f64]) -> Tensor {
    tensor(values, &[values.len()], DType::F64).expect("as many values as the shape holds")
}

/// [`tensor`], as a variable.
pub fn variable(values: &[f64], dims: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Var::from_tensor(&tensor(values, dims, dtype)?)?.into_inner())
}

/// Every element, in row-major order.
pub fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// The bits of every element, in logical order: equal for equal NaNs, different for the two zeros.
pub fn bits(t: &Tensor) -> Result<Vec<u64>> {
    Ok(values(t)?.into_iter().map(f64::to_bits).collect())
}

/// `values` as `dtype` holds them.
pub fn rounded(values: &[f64], dtype: DType) -> Result<Vec<f64>> {
    self::values(&tensor(values, &[values.len()], dtype)?)
}
