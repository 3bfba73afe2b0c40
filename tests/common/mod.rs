//! What several test programs share.

// Every test program compiles its own copy of this module and uses a part of it.
#![allow(dead_code)]

pub(crate) mod compare;
pub(crate) mod data;
pub(crate) mod oracle;
pub(crate) mod subjects;
pub(crate) mod view;
pub(crate) mod watch;

use candle_core::{Device, Shape, Tensor};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// f64 values uniform in [-1, 1), the same for the same seed: candle's own CPU generator cannot be seeded.
pub(crate) fn uniform(shape: impl Into<Shape>, seed: u64) -> Tensor {
    let shape = shape.into();
    let mut rng = StdRng::seed_from_u64(seed);
    let values: Vec<f64> = (0..shape.elem_count())
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape holds")
}
