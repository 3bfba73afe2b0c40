//! The reference: every computation as plain loops over `f64`, on one thread and without vectors.
//!
//! It is written to be read beside the formulas, and the other backends are tested against it. Sums
//! are compensated, so that their own rounding does not count.

mod activation;
mod channels;
mod cumulative;
mod dynamic;
mod gated;
mod groups;
mod lengths;
mod mixture;
mod modulate;
mod normalization;
mod plane_moments;
mod rows;
mod scale_add;
mod scale_shift;
mod softmax;
mod synchronized;
mod transpose;
mod unit_rows;
mod weight_rows;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result};
use half::{bf16, f16};

use super::{Backend, View};
use candle_norm_support::messages;

/// Plain loops on the CPU.
pub(crate) struct Reference;

impl Backend for Reference {
    type Storage = CpuStorage;
}

type Arg<'a> = View<'a, CpuStorage>;

/// The elements of a contiguous argument.
fn values(arg: Arg) -> Result<Vec<f64>> {
    let Some((start, end)) = arg.layout.contiguous_offsets() else {
        return messages::internal("reference", "a contiguous tensor");
    };
    let places = start..end;
    Ok(match arg.storage {
        CpuStorage::F16(v) => v[places].iter().map(|v| v.to_f64()).collect(),
        CpuStorage::BF16(v) => v[places].iter().map(|v| v.to_f64()).collect(),
        CpuStorage::F32(v) => v[places].iter().map(|v| f64::from(*v)).collect(),
        CpuStorage::F64(v) => v[places].to_vec(),
        _ => messages::internal("reference", "a dtype of floating point")?,
    })
}

/// The elements of a parameter that there may be.
fn parameter(arg: Option<Arg>) -> Result<Option<Vec<f64>>> {
    arg.map(values).transpose()
}

/// The values, each rounded once to `dtype`.
fn stored(values: Vec<f64>, dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F16 => CpuStorage::F16(
            values
                .into_iter()
                .map(|v| f16::from_f32(to_odd(v)))
                .collect(),
        ),
        DType::BF16 => CpuStorage::BF16(
            values
                .into_iter()
                .map(|v| bf16::from_f32(to_odd(v)))
                .collect(),
        ),
        DType::F32 => CpuStorage::F32(values.into_iter().map(|v| v as f32).collect()),
        DType::F64 => CpuStorage::F64(values),
        _ => messages::internal("reference", "a dtype of floating point")?,
    })
}

/// `v` in `f32`, with an odd last bit where it is not exact, so that a rounding to half precision
/// after it is the only one (Boldo and Melquiond, 2008). `half` rounds an `f64` as if its last 32
/// bits were zeros.
fn to_odd(v: f64) -> f32 {
    let nearest = v as f32;
    if f64::from(nearest) == v || !nearest.is_finite() {
        return nearest;
    }
    let is_beyond = f64::from(nearest).abs() > v.abs();
    f32::from_bits((nearest.to_bits() - u32::from(is_beyond)) | 1)
}

/// `v` rounded to `dtype`.
fn rounded(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::from_f32(to_odd(v)).to_f64(),
        DType::BF16 => bf16::from_f32(to_odd(v)).to_f64(),
        DType::F32 => f64::from(v as f32),
        _ => v,
    }
}

fn dtype(arg: Arg) -> DType {
    arg.storage.dtype()
}

/// A compensated sum (Neumaier, 1974).
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    total: f64,
    lost: f64,
}

impl Sum {
    fn add(&mut self, v: f64) {
        let total = self.total + v;
        self.lost += if self.total.abs() >= v.abs() {
            (self.total - total) + v
        } else {
            (v - total) + self.total
        };
        self.total = total;
    }

    fn value(self) -> f64 {
        match self.total.is_finite() {
            true => self.total + self.lost,
            false => self.total,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_is_rounded_once() {
        // Just above the middle of two numbers, by a bit that `f32` has, and by one that it lacks.
        for above in [2f64.powi(-23), 2f64.powi(-40)] {
            for sign in [1., -1.] {
                let of = |v: f64, dtype| rounded(sign * v, dtype) * sign;
                assert_eq!(
                    of(1. + 2f64.powi(-8) + above, DType::BF16),
                    1. + 2f64.powi(-7)
                );
                assert_eq!(of(1. + 2f64.powi(-8), DType::BF16), 1.);
                assert_eq!(
                    of(1. + 2f64.powi(-11) + above, DType::F16),
                    1. + 2f64.powi(-10)
                );
                assert_eq!(of(1. + 2f64.powi(-11), DType::F16), 1.);
                assert_eq!(of(1. + 2f64.powi(-8) - above, DType::BF16), 1.);
            }
        }
        assert!(rounded(f64::NAN, DType::F16).is_nan());
        assert_eq!(rounded(1e300, DType::BF16), f64::INFINITY);
    }
}
