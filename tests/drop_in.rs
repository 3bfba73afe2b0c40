//! Code written for candle-nn's norms compiles with this crate's names instead, and computes the same.
mod common;

use candle_core::{DType, Result, Tensor};
use common::uniform;

macro_rules! with_the_norms_of {
    ($module:ident, $origin:ident) => {
        mod $module {
            use candle_core::{DType, Device, Result, Tensor, Var};
            use candle_nn::{Module, ModuleT, Optimizer, SGD, VarBuilder, VarMap, seq};
            use $origin::{
                BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, LayerNormConfig, RmsNorm,
                batch_norm, group_norm, layer_norm, layer_norm_no_bias, rms_norm,
            };

            include!("drop_in/source.rs");
        }
    };
}

with_the_norms_of!(theirs, candle_nn);
with_the_norms_of!(ours, candle_norm);

type Run<R> = fn(&[Tensor]) -> Result<R>;

/// Runs both on the same inputs, three batches each of moderate mean, where candle's fused variance is accurate, and compares
/// all that they return.
fn same_results(
    theirs: Run<theirs::Results>,
    ours: Run<ours::Results>,
    shapes: &[&[usize]],
) -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
        for shape in shapes {
            let batches = (1..4)
                .map(|seed| {
                    (uniform(*shape, seed) * 2.0)?
                        .affine(1.0, 0.5)?
                        .to_dtype(dtype)
                })
                .collect::<Result<Vec<_>>>()?;
            let (theirs, ours) = (theirs(&batches)?, ours(&batches)?);
            assert_eq!(theirs.len(), ours.len());
            for ((name, theirs), (same_name, ours)) in theirs.iter().zip(&ours) {
                let what = format!("{name} at {shape:?} in {dtype:?}");
                assert_eq!(name, same_name);
                assert_eq!(theirs.dims(), ours.dims(), "{what}");
                assert_eq!(theirs.dtype(), ours.dtype(), "{what}");
                let (theirs, ours) = (theirs.to_dtype(DType::F64)?, ours.to_dtype(DType::F64)?);
                let largest = |t: Tensor| t.abs()?.max_all()?.to_scalar::<f64>();
                let error = largest((&theirs - ours)?)?;
                assert!(
                    error <= tolerance * largest(theirs)?,
                    "{what}: off by {error}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn batch_norm() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[8, 4], &[5, 4, 3], &[3, 4, 5, 2]];
    same_results(theirs::batch_norms, ours::batch_norms, &shapes)
}

#[test]
fn layer_norm_and_rms_norm() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[3, 7], &[2, 3, 7], &[2, 3, 2, 16]];
    same_results(theirs::row_norms, ours::row_norms, &shapes)
}

#[test]
fn group_norm() -> Result<()> {
    let shapes: [&[usize]; 2] = [&[2, 4, 5], &[2, 6, 3, 2]];
    same_results(theirs::group_norms, ours::group_norms, &shapes)
}

#[test]
fn a_model_of_all() -> Result<()> {
    let shapes: [&[usize]; 2] = [&[4, 4, 6], &[2, 4, 3, 5]];
    same_results(theirs::model, ours::model, &shapes)
}
