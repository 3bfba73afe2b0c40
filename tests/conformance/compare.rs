//! Comparing a tensor with what was expected.

use candle_core::{Device, Tensor};

use testkit::data;

use crate::case::{Outcome, one_line};

/// The element that is farthest from what was expected.
#[derive(Debug, Clone)]
pub(crate) struct Worst {
    pub(crate) index: Vec<usize>,
    pub(crate) got: f64,
    pub(crate) want: f64,
    /// In units of the tolerance: up to 1 passes.
    pub(crate) error: f64,
}

/// The worst element, or `None` of an empty tensor. Another shape is an error.
pub(crate) fn compare(
    got: &Tensor,
    want: &Tensor,
    rtol: f64,
    atol: f64,
    scale: Option<f64>,
) -> Outcome<Option<Worst>> {
    if got.dims() != want.dims() {
        return Err(format!(
            "got shape {:?}, want {:?}",
            got.dims(),
            want.dims()
        ));
    }
    let (got, dims) = (values(got)?, want.dims());
    let want = values(want)?;
    let atol = atol * scale.unwrap_or_else(|| natural_scale(&want));
    let mut worst: Option<(usize, f64)> = None;
    for (i, (&got, &want)) in got.iter().zip(&want).enumerate() {
        let error = error(got, want, atol + rtol * want.abs());
        if worst.is_none_or(|(_, largest)| error > largest) {
            worst = Some((i, error));
        }
    }
    Ok(worst.map(|(i, error)| Worst {
        index: index(i, dims),
        got: got[i],
        want: want[i],
        error,
    }))
}

/// The elements in row-major order, whatever the device.
fn values(t: &Tensor) -> Outcome<Vec<f64>> {
    let on_cpu = t.to_device(&Device::Cpu);
    on_cpu.and_then(|t| data::values(&t)).map_err(one_line)
}

/// How many tolerances lie between the two. NaN passes only against NaN, an infinity only against
/// itself.
fn error(got: f64, want: f64, tolerance: f64) -> f64 {
    let same = got == want || (got.is_nan() && want.is_nan());
    if same {
        0.
    } else if !got.is_finite() || !want.is_finite() || tolerance == 0. {
        f64::INFINITY
    } else {
        (got - want).abs() / tolerance
    }
}

/// The rms of the finite values, or 1 where that is 0 or nothing is finite.
fn natural_scale(values: &[f64]) -> f64 {
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let largest = finite().fold(0f64, |a, v| a.max(v.abs()));
    if largest == 0. {
        return 1.;
    }
    // Relative to the largest, so that no square overflows.
    let squares: f64 = finite().map(|v| (v / largest).powi(2)).sum();
    largest * (squares / finite().count() as f64).sqrt()
}

fn index(mut i: usize, dims: &[usize]) -> Vec<usize> {
    let mut index = vec![0; dims.len()];
    for (position, &dim) in index.iter_mut().zip(dims).rev() {
        *position = i % dim;
        i /= dim;
    }
    index
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    fn worst(got: &[f64], want: &[f64], scale: Option<f64>) -> Worst {
        let tensor = |v: &[f64]| Tensor::new(v, &Device::Cpu).unwrap();
        compare(&tensor(got), &tensor(want), 0.1, 0.01, scale)
            .unwrap()
            .unwrap()
    }

    #[test]
    fn the_tolerance_is_a_share_of_the_scale_and_of_the_value() {
        // 0.01·100 + 0.1·10 = 2.
        let w = worst(&[10., 11.], &[10., 10.], Some(100.));
        assert_eq!((w.index, w.got, w.want, w.error), (vec![1], 11., 10., 0.5));
        // Without a scale, the rms of the expected values: 0.01·5 + 0.1·5.
        assert!((worst(&[5., 5.], &[5., -5.], None).error - 10. / 0.55).abs() < 1e-12);
        // And 1 where that is 0.
        assert_eq!(worst(&[0.02], &[0.], None).error, 2.);
        // The largest values of float64 have a finite rms.
        assert_eq!(worst(&[1e300], &[1e300], None).error, 0.);
        assert!(worst(&[1.1e300], &[1e300], None).error < 1.);
    }

    #[test]
    fn what_is_not_finite_passes_only_against_itself() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        assert_eq!(worst(&[nan, inf, -inf], &[nan, inf, -inf], None).error, 0.);
        for (got, want) in [
            (nan, 1.),
            (1., nan),
            (inf, 1.),
            (1., inf),
            (inf, -inf),
            (nan, inf),
        ] {
            assert_eq!(
                worst(&[got], &[want], None).error,
                inf,
                "{got} against {want}"
            );
        }
        // A scale that an expected infinity made infinite would pass everything.
        assert!(worst(&[inf, 7.], &[inf, 5.], None).error > 1.);
    }

    #[test]
    fn shapes_must_agree_and_indices_count_like_the_tensor() {
        let a = Tensor::zeros((2, 3), DType::F64, &Device::Cpu).unwrap();
        let b = a.reshape((3, 2)).unwrap();
        assert!(compare(&a, &b, 1., 1., None).is_err());
        assert_eq!(index(5, &[2, 3]), [1, 2]);
        assert_eq!(index(0, &[]), Vec::<usize>::new());
    }
}
