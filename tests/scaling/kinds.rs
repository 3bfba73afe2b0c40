//! Every kind of scaler, so that what must hold of all is asked of all.

use candle_core::{DType, Result, Tensor};
use candle_norm::scaling::{
    AdaptiveScaler, DriftOptions, EwmScaler, EwmScalerOptions, MaxAbsScaler, MaxAbsScalerOptions,
    MinMaxScaler, MinMaxScalerOptions, Nan, OnDrift, RobustScaler, RobustScalerOptions, Scaler,
    SlidingScaler, SlidingScalerOptions, StandardScaler, StandardScalerOptions,
};

use testkit::data::tensor;

/// How a kind is built without data.
pub(crate) type Build = fn(Nan) -> Box<dyn Scaler>;

/// Those to which the order of data matters, and which cannot be merged.
pub(crate) const OF_SERIES: [(&str, Build); 3] = [
    ("SlidingScaler", |nan| {
        let options = SlidingScalerOptions { nan, ..7.into() };
        Box::new(SlidingScaler::new(options).unwrap())
    }),
    ("EwmScaler", |nan| {
        let options = EwmScalerOptions {
            nan,
            ..EwmScalerOptions::alpha(0.2).unwrap()
        };
        Box::new(EwmScaler::new(options).unwrap())
    }),
    ("AdaptiveScaler", |nan| {
        let scaler = StandardScalerOptions {
            nan,
            ..Default::default()
        };
        let options = DriftOptions {
            window: 8,
            min_count: 4,
            check_every: 1,
            cool_down: 4,
            bins: 3,
            nan,
            ..Default::default()
        };
        let scaler = StandardScaler::new(scaler).unwrap();
        Box::new(AdaptiveScaler::new(scaler, options, OnDrift::Refit).unwrap())
    }),
];

pub(crate) const KINDS: [(&str, Build); 4] = [
    ("StandardScaler", |nan| {
        let options = StandardScalerOptions {
            nan,
            ..Default::default()
        };
        Box::new(StandardScaler::new(options).unwrap())
    }),
    ("MinMaxScaler", |nan| {
        let options = MinMaxScalerOptions {
            feature_range: (-1., 1.),
            nan,
            ..Default::default()
        };
        Box::new(MinMaxScaler::new(options).unwrap())
    }),
    ("MaxAbsScaler", |nan| {
        Box::new(MaxAbsScaler::new(MaxAbsScalerOptions { clip: false, nan }).unwrap())
    }),
    ("RobustScaler", |nan| {
        let options = RobustScalerOptions {
            nan,
            ..Default::default()
        };
        Box::new(RobustScaler::new(options).unwrap())
    }),
];

/// Runs `f` on a scaler of each kind that refuses NaN.
pub(crate) fn each(mut f: impl FnMut(&str, &dyn Scaler)) {
    for (kind, build) in KINDS {
        f(kind, &*build(Nan::Refuse));
    }
}

pub(crate) fn each_built(mut f: impl FnMut(&str, Build)) {
    for (kind, build) in KINDS {
        f(kind, build);
    }
}

/// Those of series too.
pub(crate) fn each_of_all(mut f: impl FnMut(&str, Build)) {
    for (kind, build) in KINDS.into_iter().chain(OF_SERIES) {
        f(kind, build);
    }
}

/// `[N, width]` in `f64`.
pub(crate) fn rows(values: &[f64], width: usize) -> Tensor {
    tensor(values, &[values.len() / width, width], DType::F64).unwrap()
}

/// All that a scaler knows, as text, to the bit.
pub(crate) fn everything(scaler: &dyn Scaler) -> Result<String> {
    let probe = rows(&[-3., 0.5, 1e6, 7.], 2);
    let y = match scaler.features().count() == 2 {
        true => format!(
            "{:?}",
            scaler
                .transform(&probe)
                .map(|y| y.to_vec2::<f64>().unwrap())
        ),
        false => String::new(),
    };
    let (features, seen, state) = (scaler.features(), scaler.seen(), scaler.state()?);
    Ok(format!("{features:?} {seen:?} {state:?} {y}"))
}
