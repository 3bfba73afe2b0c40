//! Windows and exponential weights: the numbers of river, pandas and numpy, and what must hold of
//! them.

use candle_core::{DType, Result, Tensor, Var};
use candle_norm::gradcheck::gradcheck;
use candle_norm::scaling::{
    Causal, EwmScaler, EwmScalerOptions, Nan, Scaler, SeriesStats, SlidingScaler,
    SlidingScalerOptions,
};
use proptest::prelude::*;

use super::Fixture;
use testkit::compare::{assert_near, assert_same_bits};
use testkit::data::{Draw, column, tensor, values};

/// Both scalers by one signature.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Sliding(SlidingScalerOptions),
    Ewm(EwmScalerOptions),
}

pub(crate) enum Built {
    Sliding(SlidingScaler),
    Ewm(EwmScaler),
}

impl Kind {
    pub(crate) fn both(causal: Causal, nan: Nan) -> [Self; 2] {
        [
            Self::Sliding(SlidingScalerOptions {
                causal,
                nan,
                ..7.into()
            }),
            Self::Ewm(EwmScalerOptions {
                causal,
                nan,
                ..EwmScalerOptions::alpha(0.2).unwrap()
            }),
        ]
    }

    pub(crate) fn build(self) -> Built {
        match self {
            Self::Sliding(options) => Built::Sliding(SlidingScaler::new(options).unwrap()),
            Self::Ewm(options) => Built::Ewm(EwmScaler::new(options).unwrap()),
        }
    }
}

impl Built {
    pub(crate) fn scaler(&self) -> &dyn Scaler {
        match self {
            Self::Sliding(s) => s,
            Self::Ewm(s) => s,
        }
    }

    fn transform_series(&self, x: &Tensor) -> Result<(Tensor, SeriesStats)> {
        match self {
            Self::Sliding(s) => s.transform_series(x),
            Self::Ewm(s) => s.transform_series(x),
        }
    }

    fn restored(&self) -> Self {
        let state = self.scaler().state().unwrap();
        match self {
            Self::Sliding(_) => Self::Sliding(SlidingScaler::from_state(&state).unwrap()),
            Self::Ewm(_) => Self::Ewm(EwmScaler::from_state(&state).unwrap()),
        }
    }
}

/// A series of three features at levels and spreads that are far apart.
pub(crate) fn series(rows: usize, seed: u64) -> Tensor {
    let noise = Draw::new(seed).normal(3 * rows);
    let values: Vec<f64> = (noise.iter().enumerate())
        .map(|(i, z)| [0., 500., -3e4][i % 3] + [1., 5., 20.][i % 3] * z)
        .collect();
    tensor(&values, &[rows, 3], DType::F64).unwrap()
}

fn with_gaps(x: &Tensor, seed: u64) -> Tensor {
    let gap = Draw::new(seed).normal(x.elem_count());
    let mut v = values(x).unwrap();
    for (v, gap) in v.iter_mut().zip(gap).skip(3) {
        if gap > 0.8 {
            *v = f64::NAN;
        }
    }
    tensor(&v, x.dims(), DType::F64).unwrap()
}

/// Each feature of `[T, 3]` against the same, at its own scale.
#[track_caller]
fn assert_features(what: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for feature in 0..3 {
        let pick = |v: &[f64]| {
            v.iter()
                .copied()
                .skip(feature)
                .step_by(3)
                .collect::<Vec<_>>()
        };
        let (got, want) = (pick(got), pick(want));
        let known: Vec<usize> = (0..want.len()).filter(|&i| !want[i].is_nan()).collect();
        for i in 0..want.len() {
            assert_eq!(
                got[i].is_nan(),
                want[i].is_nan(),
                "{what}: row {i} of feature {feature}"
            );
        }
        let at = |v: &[f64]| known.iter().map(|&i| v[i]).collect::<Vec<_>>();
        let zeros = vec![0.; known.len()];
        assert_near(
            &format!("{what}, feature {feature}"),
            &at(&got),
            &at(&want),
            &zeros,
            tolerance,
        );
    }
}

/// The mean and the variance after each row.
fn after_each_row(scaler: &Built, x: &Tensor) -> [Vec<f64>; 2] {
    let mut all = [vec![], vec![]];
    for row in 0..x.dims()[0] {
        scaler
            .scaler()
            .partial_fit(&x.narrow(0, row, 1).unwrap())
            .unwrap();
        let (mean, var) = match scaler {
            Built::Sliding(s) => (s.mean(), s.var()),
            Built::Ewm(s) => (s.mean(), s.var()),
        };
        all[0].extend(mean.unwrap());
        all[1].extend(var.unwrap());
    }
    all
}

#[test]
fn windows_of_river_and_numpy() -> Result<()> {
    let fixture = Fixture::load("sliding")?;
    let window = fixture.values("window")[0] as usize;
    for ddof in [0, 1] {
        let options = SlidingScalerOptions {
            ddof,
            ..window.into()
        };
        let [mean, var] = after_each_row(&Kind::Sliding(options).build(), &fixture.tensor("x"));
        assert_features("mean of river", &mean, &fixture.values("mean"), 1e-10);
        assert_features(
            "var of numpy",
            &var,
            &fixture.values(&format!("var_{ddof}")),
            1e-10,
        );
        // river has 0 for the unbiased variance of one value, which is none.
        let by_river = fixture.values(&format!("river_var_{ddof}"));
        assert_features(
            "var of river",
            &var[3 * ddof..],
            &by_river[3 * ddof..],
            1e-10,
        );
    }
    let options = SlidingScalerOptions {
        nan: Nan::Ignore,
        ..window.into()
    };
    let [mean, var] = after_each_row(&Kind::Sliding(options).build(), &fixture.tensor("gaps"));
    assert_features("mean with gaps", &mean, &fixture.values("gaps_mean"), 1e-10);
    assert_features("var with gaps", &var, &fixture.values("gaps_var"), 1e-10);
    Ok(())
}

#[test]
fn weights_of_pandas_and_river() -> Result<()> {
    let fixture = Fixture::load("ewm")?;
    let alpha = fixture.values("alpha")[0];
    for (data, nan) in [("x", Nan::Refuse), ("gaps", Nan::Ignore)] {
        for (adjust, word) in [(false, "plain"), (true, "adjust")] {
            for (ignore_na, age) in [(false, "age"), (true, "skip")] {
                for bias in [false, true] {
                    let options = EwmScalerOptions {
                        adjust,
                        ignore_na,
                        bias,
                        nan,
                        ..EwmScalerOptions::alpha(alpha)?
                    };
                    let x = fixture.tensor(data);
                    let [mean, var] = after_each_row(&Kind::Ewm(options).build(), &x);
                    let key = format!("{data}_{word}_{age}");
                    let biased = if bias { "_biased" } else { "" };
                    assert_features(&key, &mean, &fixture.values(&format!("{key}_mean")), 1e-10);
                    let want = fixture.values(&format!("{key}_var{biased}"));
                    assert_features(&key, &var, &want, 1e-10);
                    if data == "x" && !adjust && bias {
                        assert_features("river", &mean, &fixture.values("river_mean"), 1e-10);
                    }
                }
            }
        }
    }
    // river's variance is a difference of mean squares, which cancels where the level is far from
    // zero; feature 0 has none.
    let options = EwmScalerOptions {
        adjust: false,
        bias: true,
        ..EwmScalerOptions::alpha(alpha)?
    };
    let [_, var] = after_each_row(&Kind::Ewm(options).build(), &fixture.tensor("x"));
    let first = |v: &[f64]| v.iter().copied().step_by(3).collect::<Vec<_>>();
    let want = first(&fixture.values("river_var"));
    assert_near("river", &first(&var), &want, &vec![0.; want.len()], 1e-10);
    Ok(())
}

#[test]
fn weights_are_worth_a_number_of_rows() -> Result<()> {
    let x = column(&Draw::new(1).normal(500));
    for adjust in [false, true] {
        let options = EwmScalerOptions {
            adjust,
            ..EwmScalerOptions::alpha(0.2)?
        };
        let scaler = EwmScaler::new(options)?;
        scaler.partial_fit(&x.narrow(0, 0, 1)?)?;
        assert_eq!(scaler.effective_count()?, [1.]);
        // In the end (2 − α) / α.
        scaler.partial_fit(&x)?;
        assert!((scaler.effective_count()?[0] - 9.).abs() < 1e-12);
    }
    Ok(())
}

#[test]
fn a_decay_may_be_said_in_four_ways() -> Result<()> {
    let by_pandas = Fixture::load("ewm")?.values("decays");
    let ours = [
        EwmScalerOptions::alpha(0.3)?,
        EwmScalerOptions::com(4.)?,
        EwmScalerOptions::span(9.)?,
        EwmScalerOptions::halflife(2.5)?,
    ];
    for (options, mean) in ours.iter().zip(by_pandas) {
        assert!(
            (1. / (2. - options.alpha) - mean).abs() < 1e-15,
            "{options:?}"
        );
    }
    Ok(())
}

/// A million rows at a mean of 10⁹ standard deviations: every so often the window is compared with
/// its own two passes.
#[test]
fn a_million_rows_far_from_zero() -> Result<()> {
    const ROWS: usize = 1_000_000;
    const WINDOW: usize = 1000;
    let x: Vec<f64> = Draw::new(11).normal(ROWS).iter().map(|z| 1e9 + z).collect();
    let sliding = SlidingScaler::new(WINDOW)?;
    let alpha = 2. / (WINDOW as f64 + 1.);
    let ewm = EwmScaler::new(EwmScalerOptions::alpha(alpha)?)?;
    let mut worst = [0f64; 4];
    for end in (10_000..=ROWS).step_by(10_000) {
        let rows = tensor(&x[end - 10_000..end], &[10_000], DType::F64)?;
        sliding.partial_fit(&rows)?;
        ewm.partial_fit(&rows)?;
        // In distances from 10⁹, which are exact.
        let recent: Vec<f64> = x[end - WINDOW..end].iter().map(|v| v - 1e9).collect();
        let mean = recent.iter().sum::<f64>() / WINDOW as f64;
        let var = recent.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / WINDOW as f64;
        // What is older than 40 windows has a weight below 10⁻³⁴.
        let (mut weight, mut sums) = (1., [0.; 4]);
        for v in x[..end].iter().rev().take(40 * WINDOW).map(|v| v - 1e9) {
            let terms = [weight, weight * v, weight * v * v, weight * weight];
            sums.iter_mut()
                .zip(terms)
                .for_each(|(sum, term)| *sum += term);
            weight *= 1. - alpha;
        }
        let ewm_mean = sums[1] / sums[0];
        let all = sums[0] * sums[0];
        let ewm_var = (sums[2] / sums[0] - ewm_mean * ewm_mean) * all / (all - sums[3]);
        let errors = [
            (sliding.mean()?[0] - 1e9) - mean,
            sliding.var()?[0] / var - 1.,
            (ewm.mean()?[0] - 1e9) - ewm_mean,
            ewm.var()?[0] / ewm_var - 1.,
        ];
        for (worst, error) in worst.iter_mut().zip(errors) {
            *worst = worst.max(error.abs());
        }
    }
    println!("mean and variance of the window, and by weights, off by at most {worst:?}");
    // A mean near 10⁹ is a multiple of 1.2·10⁻⁷.
    assert!(worst[0] < 1.3e-7 && worst[2] < 1.3e-7, "{worst:?}");
    assert!(worst[1] < 1e-12 && worst[3] < 1e-12, "{worst:?}");
    Ok(())
}

proptest! {
    #![proptest_config(testkit::properties::config(64, 20261))]

    /// Every window of a random series, with gaps, is that of two passes over its rows.
    #[test]
    fn a_window_is_its_rows(window in 1usize..12, rows in 1usize..80, seed in 0u64..1000) {
        let x = with_gaps(&series(rows, seed), seed + 1);
        let v = values(&x).unwrap();
        let options = SlidingScalerOptions { nan: Nan::Ignore, ..window.into() };
        let [mean, var] = after_each_row(&Kind::Sliding(options).build(), &x);
        for row in 0..rows {
            for feature in 0..3 {
                let start = (row + 1usize).saturating_sub(window);
                let numbers: Vec<f64> = (start..=row)
                    .map(|r| v[3 * r + feature])
                    .filter(|v| !v.is_nan())
                    .collect();
                let n = numbers.len() as f64;
                let i = 3 * row + feature;
                if n == 0. {
                    prop_assert!(mean[i].is_nan() && var[i].is_nan());
                    continue;
                }
                let m = numbers.iter().sum::<f64>() / n;
                let s = numbers.iter().map(|v| (v - m).powi(2)).sum::<f64>() / n;
                prop_assert!((mean[i] - m).abs() <= 1e-12 * (1. + m.abs()));
                prop_assert!((var[i] - s).abs() <= 1e-9 * (1. + s), "{} {}", var[i], s);
            }
        }
    }

    /// However the rows of a series are cut into calls, and wherever the scaler is saved and
    /// restored, the same bits come out.
    #[test]
    fn calls_and_files_do_not_show(
        cuts in prop::collection::vec(1usize..20, 1..8),
        seed in 0u64..1000,
    ) {
        let rows: usize = cuts.iter().sum();
        let x = with_gaps(&series(rows, seed), seed + 1);
        for causal in [Causal::Before, Causal::Through] {
            for kind in Kind::both(causal, Nan::Ignore) {
                let (whole, _) = kind.build().transform_series(&x).unwrap();
                let mut scaler = kind.build();
                let mut parts = vec![];
                let mut start = 0;
                for cut in &cuts {
                    let rows = x.narrow(0, start, *cut).unwrap();
                    parts.push(scaler.transform_series(&rows).unwrap().0);
                    scaler = scaler.restored();
                    start += cut;
                }
                assert_same_bits("rows", &Tensor::cat(&parts, 0).unwrap(), &whole);
            }
        }
    }

    /// No row shows what comes after it.
    #[test]
    fn nothing_looks_ahead(rows in 2usize..40, change in 0.0f64..1.0, seed in 0u64..1000) {
        let x = series(rows, seed);
        let kept = ((rows as f64 * change) as usize).max(1);
        let before = |x: &Tensor| x.narrow(0, 0, kept).unwrap();
        let after = (series(rows - kept, seed + 7) * 1e3).unwrap();
        let other = Tensor::cat(&[before(&x), after], 0).unwrap();
        for causal in [Causal::Before, Causal::Through] {
            for kind in Kind::both(causal, Nan::Refuse) {
                let past = |x: &Tensor| before(&kind.build().transform_series(x).unwrap().0);
                assert_same_bits("the past", &past(&other), &past(&x));
            }
        }
    }
}

#[test]
fn a_row_is_scaled_by_the_rows_before_it_or_with_itself() -> Result<()> {
    let x = series(30, 3);
    for kind in
        [Causal::Before, Causal::Through].map(|causal| (causal, Kind::both(causal, Nan::Refuse)))
    {
        let (causal, kinds) = kind;
        for kind in kinds {
            let (y, stats) = kind.build().transform_series(&x)?;
            let stepwise = kind.build();
            for row in 0..30 {
                let one = x.narrow(0, row, 1)?;
                let want = match causal {
                    Causal::Before if row == 0 => {
                        stepwise.scaler().partial_fit(&one)?;
                        assert!(values(&y.narrow(0, 0, 1)?)?.iter().all(|v| v.is_nan()));
                        assert!(stats.mean()[..3].iter().all(|v| v.is_nan()));
                        continue;
                    }
                    Causal::Before => {
                        let want = stepwise.scaler().transform(&one)?;
                        stepwise.scaler().partial_fit(&one)?;
                        want
                    }
                    Causal::Through => {
                        stepwise.scaler().partial_fit(&one)?;
                        stepwise.scaler().transform(&one)?
                    }
                };
                assert_same_bits("row", &y.narrow(0, row, 1)?, &want);
            }
        }
    }
    Ok(())
}

#[test]
fn back_is_the_inverse_and_gradients_pass_both_ways() -> Result<()> {
    let x = series(12, 5);
    for kind in Kind::both(Causal::Through, Nan::Refuse) {
        let scaler = kind.build();
        let (y, stats) = scaler.transform_series(&x)?;
        assert_features(
            "back",
            &values(&stats.inverse_transform(&y)?)?,
            &values(&x)?,
            1e-13,
        );
        assert_features(
            "now",
            &values(
                &scaler
                    .scaler()
                    .inverse_transform(&scaler.scaler().transform(&x)?)?,
            )?,
            &values(&x)?,
            1e-13,
        );
        let small = x.narrow(0, 4, 8)?;
        let later = scaler.transform_series(&small)?.1;
        let inputs = [later.transform(&small)?];
        gradcheck(|v| later.transform(&v[0])?.tanh(), &inputs)?;
        gradcheck(|v| later.inverse_transform(&v[0]), &inputs)?;
        gradcheck(|v| scaler.scaler().transform(&v[0]), &inputs)?;
        gradcheck(|v| scaler.scaler().inverse_transform(&v[0]), &inputs)?;
        // A series that is part of a graph gets its gradient.
        let var = Var::from_tensor(&x)?;
        let gradients = kind
            .build()
            .transform_series(&var)?
            .0
            .sqr()?
            .sum_all()?
            .backward()?;
        assert!(gradients.get(&var).is_some());
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let (y, stats) = kind.build().transform_series(&x.to_dtype(dtype)?)?;
            assert_eq!(
                (y.dtype(), stats.inverse_transform(&y)?.dtype()),
                (dtype, dtype)
            );
        }
    }
    Ok(())
}

#[test]
fn gaps_stay_gaps_and_what_is_not_known_is_nan() -> Result<()> {
    let nan = f64::NAN;
    let x = column(&[nan, nan, 1., 3., nan, nan, nan, 5.]);
    let options = SlidingScalerOptions {
        nan: Nan::Ignore,
        ..3.into()
    };
    let scaler = SlidingScaler::new(options)?;
    let (y, stats) = scaler.transform_series(&x)?;
    let y = values(&y)?;
    let want = [nan, nan, 0., 1., nan, nan, nan, 0.];
    for (i, (y, want)) in y.iter().zip(want).enumerate() {
        assert!(*y == want || (y.is_nan() && want.is_nan()), "{i}: {y}");
    }
    let means = stats.mean();
    assert!(
        means[1].is_nan() && means[4] == 2. && means[6].is_nan(),
        "{means:?}"
    );
    let seen = scaler.seen();
    assert_eq!((seen[0].values, seen[0].nan), (3, 5));
    Ok(())
}

#[test]
fn a_constant_and_a_first_row_have_a_scale_of_one() -> Result<()> {
    for kind in Kind::both(Causal::Through, Nan::Refuse) {
        let scaler = kind.build();
        let x = tensor(&[1e9; 20], &[20], DType::F64)?;
        let (y, stats) = scaler.transform_series(&x)?;
        assert_eq!(values(&y)?, [0.; 20]);
        assert_eq!(stats.scale(), [1.; 20]);
    }
    Ok(())
}
