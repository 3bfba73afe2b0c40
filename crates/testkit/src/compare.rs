//! Comparing numbers with what they should be.

use candle_core::{DType, Result, Tensor};

use crate::data::values;
use crate::oracle::{Gradient, rms};

/// The share of a tensor's scale, and of each value, that an element may be off by.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-11,
        DType::F32 => 2e-6,
        DType::F16 => 6e-4,
        DType::BF16 => 4.5e-3,
        other => panic!("no tolerance for {other:?}"),
    }
}

/// The largest finite number of a dtype, and the distance of its smallest ones.
fn range(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F16 => (65504., 2f64.powi(-24)),
        DType::BF16 => (f64::from(half::bf16::MAX), 2f64.powi(-133)),
        DType::F32 => (f64::from(f32::MAX), 2f64.powi(-149)),
        _ => (f64::MAX, 0.),
    }
}

/// Panics unless every element of `got` is within `tolerance · (scale + |want|)`, the scale being
/// the rms of `want`.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &[f64], tolerance: f64) {
    let zeros = vec![0.; want.len()];
    assert_in_dtype(what, got, want, &zeros, &zeros, tolerance);
}

/// [`assert_close`] with what each element may be off by beside its tolerance: the rounding of
/// terms that cancel.
#[track_caller]
pub fn assert_close_beside(
    what: &str,
    got: &Tensor,
    want: &[f64],
    rounding: &[f64],
    tolerance: f64,
) {
    let zeros = vec![0.; want.len()];
    assert_in_dtype(what, got, want, &zeros, rounding, tolerance);
}

/// Half the distance of neighboring numbers, relative to their size, in the precision that sums
/// over numbers of `dtype` have.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.,
        _ => f64::from(f32::EPSILON) / 2.,
    }
}

/// [`assert_close`], but where the terms of an element are more than twice the rms, and so cancel,
/// their size is its scale.
#[track_caller]
pub fn assert_gradient(what: &str, got: &Tensor, want: &Gradient, tolerance: f64) {
    let zeros = vec![0.; want.values.len()];
    assert_in_dtype(what, got, &want.values, &want.terms, &zeros, tolerance);
}

#[track_caller]
fn assert_in_dtype(
    what: &str,
    got: &Tensor,
    want: &[f64],
    terms: &[f64],
    rounding: &[f64],
    tolerance: f64,
) {
    let (largest, step) = range(got.dtype());
    let got = values(got).expect("a float tensor");
    // What is beyond the dtype's range is infinite in it, and its smallest numbers are as far apart
    // as they are.
    let out_of_range = |got: f64, want: f64| {
        got.is_infinite()
            && got.signum() == want.signum()
            && want.abs() >= largest * (1. - tolerance)
    };
    let got: Vec<f64> = (got.iter().zip(want).zip(rounding))
        .map(|((&got, &want), rounding)| match out_of_range(got, want) {
            true => want,
            false => {
                let off = step / 2. + rounding;
                got - (got - want).clamp(-off, off)
            }
        })
        .collect();
    assert_near(what, &got, want, terms, tolerance);
}

/// [`assert_gradient`] of numbers.
#[track_caller]
pub fn assert_near(what: &str, got: &[f64], want: &[f64], terms: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let rms = match rms(want) {
        0. => 1.,
        rms => rms,
    };
    let mut worst = (0., 0, 0.);
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let scale = match terms[i] > 2. * rms {
            true => terms[i],
            false => rms,
        };
        let error = match got == want || (got.is_nan() && want.is_nan()) {
            true => 0.,
            false if !(got - want).is_finite() => f64::INFINITY,
            false => (got - want).abs() / (tolerance * (scale + want.abs())),
        };
        if error > worst.0 {
            worst = (error, i, scale);
        }
    }
    let (error, i, scale) = worst;
    assert!(
        error <= 1.,
        "{what}: element {i} of {} is {:e}, should be {:e}: {error:.2} times the tolerance \
        {tolerance:e} at scale {scale:e}",
        got.len(),
        got[i],
        want[i],
    );
}

/// Panics unless every element of `got` has the ten digits that a worked example gives of `want`.
#[track_caller]
pub fn assert_digits(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(
            error <= 1e-9 * (1. + want.abs()),
            "{what} {i}: {got} for {want}"
        );
    }
}

/// The largest distance between elements of two tensors of one shape.
pub fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_dtype(DType::F64)?, b.to_dtype(DType::F64)?);
    assert_eq!(a.dims(), b.dims());
    (a - b)?.abs()?.max_all()?.to_scalar()
}

/// Panics unless both hold the same bits in the same shape.
#[track_caller]
pub fn assert_same_bits(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    assert_eq!(got.dtype(), want.dtype(), "{what}: dtype");
    let (got, want) = (values(got).unwrap(), values(want).unwrap());
    let differs = |(_, (a, b)): &(usize, (&f64, &f64))| a.to_bits() != b.to_bits();
    if let Some((i, (a, b))) = got.iter().zip(&want).enumerate().find(differs) {
        panic!(
            "{what}: element {i} of {} is {a:e}, should be {b:e} to the bit",
            got.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tensor;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    fn passes(got: f64, want: f64, terms: f64) -> bool {
        catch_unwind(|| assert_near("", &[got, 1.], &[want, 1.], &[terms, 0.], 0.01)).is_ok()
    }

    #[test]
    fn the_tolerance_is_a_share_of_the_scale_and_of_the_value() {
        assert!(passes(1.019, 1., 0.));
        assert!(!passes(1.021, 1., 0.));
        // Terms count only where they cancel.
        assert!(!passes(1.021, 1., 1.9));
        assert!(passes(1.021, 1., 2.1));
    }

    #[test]
    fn a_rounding_of_terms_comes_on_top() {
        let got = tensor(&[1.5, 1.], &[2], DType::F64).unwrap();
        let passes = |rounding: f64| {
            let check = || assert_close_beside("", &got, &[1., 1.], &[rounding, 0.], 0.01);
            catch_unwind(AssertUnwindSafe(check)).is_ok()
        };
        assert!(passes(0.49) && !passes(0.47));
    }

    #[test]
    fn what_is_not_finite_passes_only_against_itself() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert!(passes(nan, nan, 0.) && passes(inf, inf, 0.));
        for (got, want) in [
            (nan, 1.),
            (1., nan),
            (inf, 1.),
            (1., inf),
            (inf, -inf),
            (nan, inf),
        ] {
            assert!(!passes(got, want, 0.), "{got} against {want}");
        }
    }

    #[test]
    fn a_dtype_has_a_largest_and_a_smallest_number() {
        let passes = |got: f64, want: f64| {
            let check = || {
                let got = tensor(&[got, 1.], &[2], DType::F16).unwrap();
                assert_close("", &got, &[want, 1.], 6e-4)
            };
            catch_unwind(AssertUnwindSafe(check)).is_ok()
        };
        assert!(passes(f64::INFINITY, 1e5) && passes(f64::NEG_INFINITY, -65504.));
        assert!(!passes(f64::INFINITY, 6e4) && !passes(f64::NEG_INFINITY, 1e5));
        assert!(!passes(6e4, 7e4));
    }
}
