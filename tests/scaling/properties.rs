//! Properties that must hold of every data set, tried on random ones.

use candle_core::{DType, Tensor};
use candle_norm::scaling::{Nan, Scaler, StandardScaler};
use proptest::prelude::*;

use super::kinds::{KINDS, each_built, rows};
use testkit::data::{Draw, values};
use testkit::properties::config;

/// Features of any center and spread, some of them constant.
fn data(n: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut draw = Draw::new(seed);
    let exponents = draw.normal(2 * width);
    let z = draw.normal(n * width);
    let value = |(i, z): (usize, &f64)| {
        let feature = i % width;
        let (center, spread) = (exponents[2 * feature], exponents[2 * feature + 1]);
        let spread = if spread > 1.2 {
            0.
        } else {
            100f64.powf(spread)
        };
        center * 10f64.powf(2. * center) + spread * z
    };
    z.iter().enumerate().map(value).collect()
}

/// The inverse of two points: center and scale of a scaler, in numbers that can be compared.
fn answers(scaler: &dyn Scaler, width: usize) -> Vec<f64> {
    let zero = scaler
        .inverse_transform(&rows(&vec![0.; width], width))
        .unwrap();
    let one = scaler
        .inverse_transform(&rows(&vec![1.; width], width))
        .unwrap();
    [values(&zero).unwrap(), values(&one).unwrap()].concat()
}

fn assert_same(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * want.abs(),
            "{what}: number {i} is {got:e}, should be {want:e}"
        );
    }
}

/// Cuts `0..n` at random places.
fn pieces(n: usize, cuts: &[usize]) -> Vec<(usize, usize)> {
    let mut ends: Vec<usize> = cuts.iter().map(|c| c % n).chain([0, n]).collect();
    ends.sort_unstable();
    ends.dedup();
    ends.windows(2).map(|w| (w[0], w[1] - w[0])).collect()
}

proptest! {
    #![proptest_config(config(60, 20260))]

    #[test]
    fn any_split_and_any_order_of_merging_is_the_fit_of_the_whole(
        n in 2usize..400,
        width in 1usize..6,
        seed in any::<u64>(),
        cuts in prop::collection::vec(any::<usize>(), 0..12),
    ) {
        let x = rows(&data(n, width, seed), width);
        let pieces = pieces(n, &cuts);
        let order = Draw::new(seed).permutation(pieces.len());
        each_built(|kind, build| {
            let whole = build(Nan::Refuse);
            whole.fit(&x).unwrap();
            let (parts, merged) = (build(Nan::Refuse), build(Nan::Refuse));
            for &(start, len) in &pieces {
                parts.partial_fit(&x.narrow(0, start, len).unwrap()).unwrap();
            }
            for &i in &order {
                let part = build(Nan::Refuse);
                part.fit(&x.narrow(0, pieces[i].0, pieces[i].1).unwrap()).unwrap();
                merged.merge(&*part).unwrap();
            }
            // And as a tree, two random ones at a time.
            let mut tree: Vec<_> = pieces
                .iter()
                .map(|&(start, len)| {
                    let part = build(Nan::Refuse);
                    part.fit(&x.narrow(0, start, len).unwrap()).unwrap();
                    part
                })
                .collect();
            let mut draw = Draw::new(seed ^ 1);
            while tree.len() > 1 {
                let last = draw.permutation(tree.len())[0];
                let from = tree.swap_remove(last);
                let into = draw.permutation(tree.len())[0];
                tree[into].merge(&*from).unwrap();
            }
            let want = answers(&*whole, width);
            assert_same(kind, &answers(&*tree[0], width), &want, 1e-12);
            assert_same(kind, &answers(&*parts, width), &want, 1e-12);
            assert_same(kind, &answers(&*merged, width), &want, 1e-12);
            assert_eq!((parts.seen(), merged.seen()), (whole.seen(), whole.seen()));
        });
    }

    #[test]
    fn statistics_of_any_split_agree_to_1e_12(
        n in 2usize..2000,
        seed in any::<u64>(),
        offset in prop::sample::select(vec![0., 1., 1e3, 1e6, 1e9]),
        cuts in prop::collection::vec(any::<usize>(), 0..40),
    ) {
        let numbers: Vec<f64> = Draw::new(seed).normal(n).iter().map(|z| offset + z).collect();
        let x = rows(&numbers, 1);
        let (whole, parts) = (StandardScaler::default(), StandardScaler::default());
        whole.fit(&x).unwrap();
        for (start, len) in pieces(n, &cuts) {
            parts.partial_fit(&x.narrow(0, start, len).unwrap()).unwrap();
        }
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
        prop_assert!(near(parts.var().unwrap()[0], whole.var().unwrap()[0]));
        let (a, b) = (parts.moments()[0], whole.moments()[0]);
        let distance = (a.mean() - b.mean()) + (a.mean_error() - b.mean_error());
        prop_assert!(distance.abs() <= 1e-12 * b.var().sqrt(), "{distance:e}");
    }

    #[test]
    fn the_inverse_of_a_transform_is_where_it_came_from(
        n in 1usize..100,
        width in 1usize..5,
        seed in any::<u64>(),
        dtype in prop::sample::select(vec![(DType::F64, 1e-14), (DType::F32, 1e-6)]),
    ) {
        let (dtype, tolerance) = dtype;
        let x = rows(&data(n, width, seed), width).to_dtype(dtype).unwrap();
        let numbers = values(&x).unwrap();
        // What is lost is lost to the largest number on the way: that of the feature, or the scale
        // of its center.
        let largest: Vec<f64> = (0..width)
            .map(|c| numbers.iter().skip(c).step_by(width).fold(0., |m: f64, v| m.max(v.abs())))
            .collect();
        each_built(|kind, build| {
            let scaler = build(Nan::Refuse);
            scaler.fit(&x).unwrap();
            let back = scaler.inverse_transform(&scaler.transform(&x).unwrap()).unwrap();
            for (i, (got, want)) in values(&back).unwrap().iter().zip(&numbers).enumerate() {
                let scale = largest[i % width];
                assert!(
                    (got - want).abs() <= tolerance * 4. * scale,
                    "{kind}: {got}, should be {want}"
                );
            }
        });
    }

    #[test]
    fn whatever_comes_is_an_error_or_a_result_and_no_panic(
        dims in prop::collection::vec(0usize..4, 0..4),
        other in prop::collection::vec(0usize..4, 0..4),
        numbers in prop::collection::vec(
            prop::sample::select(vec![
                0., -0., 1., -1., 1e-320, 1e308, -1e308, f64::NAN, f64::INFINITY,
            ]),
            64,
        ),
        ignore in any::<bool>(),
        dtype in prop::sample::select(vec![
            DType::F64, DType::F32, DType::F16, DType::BF16, DType::U8, DType::I64,
        ]),
    ) {
        let tensor = |dims: &[usize]| {
            let count = dims.iter().product::<usize>();
            let t = Tensor::from_slice(&numbers[..count.min(64)], dims, &candle_core::Device::Cpu)?;
            t.to_dtype(dtype)
        };
        let (Ok(x), Ok(z)) = (tensor(&dims), tensor(&other)) else { return Ok(()) };
        let nan = if ignore { Nan::Ignore } else { Nan::Refuse };
        for (_, build) in KINDS {
            let scaler = build(nan);
            let _ = scaler.fit(&x);
            let _ = scaler.partial_fit(&z);
            let _ = scaler.transform(&z);
            let _ = scaler.inverse_transform(&x);
            let _ = scaler.state().and_then(|state| scaler.restore(&state));
            let _ = candle_norm::scaling::half_precision(&*scaler, &x);
        }
    }
}
