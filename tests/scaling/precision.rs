//! Numbers that a careless sum would lose.

use candle_core::{DType, Device, Tensor};
use candle_norm::ops::Moments;
use candle_norm::scaling::{RobustScaler, RobustScalerOptions, Scaler, StandardScaler};

use super::kinds::{each, rows};
use testkit::data::{Draw, tensor, values};

const MILLION: usize = 1_000_000;

/// Values at a mean of 10⁹ and a standard deviation of 1, and the variance of the values
/// themselves: by their distances from 10⁹, which are exact.
fn far_from_zero() -> (Vec<f64>, f64) {
    let values: Vec<f64> = Draw::new(1)
        .normal(MILLION)
        .iter()
        .map(|z| 1e9 + z)
        .collect();
    let near: Vec<f64> = values.iter().map(|v| v - 1e9).collect();
    let n = MILLION as f64;
    let mean = near.iter().sum::<f64>() / n;
    let var = near.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / n;
    (values, var)
}

#[test]
fn a_million_values_far_from_zero_keep_their_variance() {
    let (data, want) = far_from_zero();
    let x = tensor(&data, &[MILLION, 1], DType::F64).unwrap();
    let whole = StandardScaler::default();
    whole.fit(&x).unwrap();
    let parts = StandardScaler::default();
    for start in (0..MILLION).step_by(10_007) {
        let len = 10_007.min(MILLION - start);
        parts
            .partial_fit(&x.narrow(0, start, len).unwrap())
            .unwrap();
    }
    for scaler in [&whole, &parts] {
        let got = scaler.var().unwrap()[0];
        assert!((got / want - 1.).abs() < 1e-12, "{got}, should be {want}");
    }
    // The scaled values have mean 0 and variance 1, to the resolution of the values themselves.
    let y = Moments::of_values(&values(&whole.transform(&x).unwrap()).unwrap());
    assert!(
        y.mean().abs() < 1e-9 && (y.var() - 1.).abs() < 1e-6,
        "{y:?}"
    );
}

/// In `f32` the mean of 10⁶ has a rounding of 0.06, of which a standard deviation of 1 must not
/// show anything.
#[test]
fn f32_data_are_centered_by_more_than_an_f32() {
    let data: Vec<f64> = (0..1000).map(|i| 1e6 + f64::from(i % 17) * 0.25).collect();
    let x = tensor(&data, &[1000, 1], DType::F32).unwrap();
    let scaler = StandardScaler::default();
    scaler.fit(&x).unwrap();
    let exact = scaler.transform(&x.to_dtype(DType::F64).unwrap()).unwrap();
    let got = values(&scaler.transform(&x).unwrap()).unwrap();
    for (got, want) in got.iter().zip(values(&exact).unwrap()) {
        assert!((got - want).abs() < 1e-6, "{got}, should be {want}");
    }
}

/// Statistics are those of the numbers that the dtype holds, in `f64`.
#[test]
fn half_precision_data_are_summed_in_f64() {
    for dtype in [DType::F16, DType::BF16] {
        // 4096 ones and a two: in the dtype itself, the sum would stop at 2048 or 256.
        let mut data = vec![1.; 4096];
        data.push(2.);
        let scaler = StandardScaler::default();
        scaler
            .fit(&tensor(&data, &[4097, 1], dtype).unwrap())
            .unwrap();
        let (mean, var) = (scaler.mean().unwrap()[0], scaler.var().unwrap()[0]);
        let n = 4097.;
        assert!((mean - (1. + 1. / n)).abs() < 1e-15, "{dtype:?}: {mean}");
        let want = (n - 1.) / (n * n);
        assert!((var / want - 1.).abs() < 1e-12, "{dtype:?}: {var}");
    }
}

/// Half precision data go through a transform and its inverse with two roundings to their dtype,
/// and no more.
#[test]
fn half_precision_data_come_back_to_their_rounding() {
    let numbers: Vec<f64> = Draw::new(2)
        .normal(300)
        .iter()
        .map(|z| 40. + 9. * z)
        .collect();
    for (dtype, eps) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let x = rows(&numbers, 3).to_dtype(dtype).unwrap();
        each(|kind, scaler| {
            scaler.fit(&x).unwrap();
            let y = scaler.transform(&x).unwrap();
            let back = values(&scaler.inverse_transform(&y).unwrap()).unwrap();
            let exact = values(&x).unwrap();
            let largest = exact.iter().fold(0., |m: f64, v| m.max(v.abs()));
            for (got, want) in back.iter().zip(&exact) {
                assert!(
                    (got - want).abs() <= 2. * eps * largest,
                    "{kind} {dtype:?}: {got}, {want}"
                );
            }
        });
    }
}

/// All of them take data in which a feature is a few axes, and those of any layout.
#[test]
fn features_are_the_trailing_axes_as_they_are_shaped() {
    let flat = rows(&Draw::new(3).normal(5 * 6), 6);
    each(|kind, scaler| {
        scaler.fit(&flat).unwrap();
        let want = values(&scaler.transform(&flat).unwrap()).unwrap();
        let deep = flat.reshape((5, 2, 3)).unwrap();
        // The same values in another order in memory.
        let strided = flat.t().unwrap().contiguous().unwrap().t().unwrap();
        for x in [deep, strided] {
            scaler.reset();
            scaler.fit(&x).unwrap();
            assert_eq!(scaler.features().axes(), Some(&x.dims()[1..]), "{kind}");
            let y = scaler.transform(&x).unwrap();
            assert_eq!(y.dims(), x.dims(), "{kind}");
            assert_eq!(values(&y).unwrap(), want, "{kind}");
        }
    });
}

#[test]
fn one_axis_is_one_feature() {
    each(|kind, scaler| {
        let x = Tensor::new(&[1f64, 2., 4.], &Device::Cpu).unwrap();
        scaler.fit(&x).unwrap();
        assert_eq!(scaler.features().count(), 1, "{kind}");
        let y = scaler.transform(&x).unwrap();
        assert_eq!(y.dims(), [3], "{kind}");
    });
}

/// Beyond the size of the sketch a quantile is that of a rank within the stated bound.
#[test]
fn quantiles_of_a_stream_are_within_their_bound() {
    let data = Draw::new(5).normal(200_000);
    let mut sorted = data.clone();
    sorted.sort_by(f64::total_cmp);
    let options = RobustScalerOptions {
        sketch_size: 1024,
        ..Default::default()
    };
    let x = rows(&data, 1);
    let fitted = |x: &Tensor| {
        let scaler = RobustScaler::new(options).unwrap();
        scaler.fit(x).unwrap();
        scaler
    };
    let mut scalers = vec![];
    for _ in 0..10 {
        let mut parts: Vec<_> = (0..data.len())
            .step_by(25_000)
            .map(|start| fitted(&x.narrow(0, start, 25_000).unwrap()))
            .collect();
        // A tree of merges.
        while parts.len() > 1 {
            let (left, right) = parts.split_at(parts.len() / 2);
            for (a, b) in left.iter().zip(right) {
                a.merge(b).unwrap();
            }
            parts.truncate(parts.len() / 2);
        }
        scalers.extend(parts);
        scalers.push(fitted(&x));
    }
    let mut outside = 0;
    for scaler in scalers {
        let bound = scaler.rank_error();
        assert!((0.001..0.004).contains(&bound), "{bound}");
        let errors = [1., 25., 50., 75., 99.].map(|percent| {
            let got = scaler.quantile(percent).unwrap()[0];
            let rank = sorted.partition_point(|v| *v < got) as f64 / data.len() as f64;
            (rank - percent / 100.).abs() / bound
        });
        // 99 % are 2.58 standard deviations: twice that is beyond chance.
        assert!(errors.iter().all(|e| *e < 2.), "{errors:?}");
        outside += usize::from(errors.iter().any(|e| *e > 1.));
    }
    // Each quantile has a confidence of 99 %, and so all five of a sketch at least 95 %. Of 20
    // sketches 8 are outside with a probability below 4e-6.
    assert!(outside < 8, "{outside} of 20 sketches");
}

#[test]
fn quantiles_are_exact_up_to_the_size_of_the_sketch() {
    let mut data = Draw::new(6).normal(4096);
    let scaler = RobustScaler::default();
    for part in data.chunks(100) {
        scaler.partial_fit(&rows(part, 1)).unwrap();
    }
    assert_eq!(scaler.rank_error(), 0.);
    data.sort_by(f64::total_cmp);
    for (percent, low) in [(0., 0), (25., 1023), (50., 2047), (75., 3071), (100., 4095)] {
        let got = scaler.quantile(percent).unwrap()[0];
        let high = data[(low + 1).min(4095)];
        assert!((data[low]..=high).contains(&got), "{percent}: {got}");
    }
}
