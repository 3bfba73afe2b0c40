//! That all peers compute the same thing, so that their times can be compared.

use candle_core::{DType, Result, Tensor};

use super::case::{Case, Pass};
use super::step::quantities;

/// How many values of each result are looked at.
pub(crate) const SAMPLES: usize = 1024;

/// Values of each result, evenly spaced.
pub(crate) fn samples(results: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    let of_one = |result: &Tensor| {
        let flat = result.detach().flatten_all()?;
        let len = flat.elem_count();
        let count = len.min(SAMPLES);
        let index: Vec<u32> = (0..count).map(|i| (i * len / count) as u32).collect();
        let index = Tensor::from_vec(index, count, flat.device())?;
        flat.index_select(&index, 0)?
            .to_dtype(DType::F64)?
            .to_vec1()
    };
    results.iter().map(of_one).collect()
}

/// Where `theirs` are not `ours`. The tolerance is loose: it tells another computation from another
/// rounding.
pub(crate) fn disagreement(
    case: &Case,
    pass: Pass,
    ours: &[Vec<f64>],
    theirs: &[Vec<f64>],
) -> Option<String> {
    if ours.len() != theirs.len() {
        return Some(format!("{} results, ours {}", theirs.len(), ours.len()));
    }
    let tolerance = match case.dtype {
        DType::BF16 => 5e-2,
        DType::F16 => 1e-2,
        DType::F32 => 1e-3,
        _ => 1e-9,
    };
    let summed = case.elements_per_param() as f64;
    for ((name, ours), theirs) in quantities(pass).iter().zip(ours).zip(theirs) {
        if ours.len() != theirs.len() {
            return Some(format!("{name} of another size"));
        }
        // An output gradient of ones makes many a gradient vanish; what is left of it is rounding,
        // to be held against the terms that cancelled.
        let least_scale = match (*name, pass) {
            ("dweight" | "dbias", Pass::TrainStep) => summed,
            ("dweight" | "dbias", _) => summed.sqrt(),
            ("dx", Pass::TrainStep) => 1.,
            _ => 0.,
        };
        let largest = |values: &[f64]| values.iter().fold(0f64, |m, v| m.max(v.abs()));
        let scale = largest(ours).max(least_scale).max(f64::MIN_POSITIVE);
        let error = ours
            .iter()
            .zip(theirs)
            .map(|(a, b)| (a - b).abs())
            // Unlike f64::max, keeps NaN.
            .fold(0f64, |m, e| if m >= e { m } else { e });
        if error.is_nan() || error > tolerance * scale {
            let relative = error / scale;
            return Some(format!(
                "{name} differs from ours by {relative:.1e} of its scale"
            ));
        }
    }
    None
}
