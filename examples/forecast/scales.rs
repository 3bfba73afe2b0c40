//! The statistics that normalize the windows of each row, from data that are known at that row.

use candle_core::{Device, Result, Tensor};
use candle_norm::scaling::{
    AdaptiveScaler, DriftEvent, DriftOptions, EwmScaler, EwmScalerOptions, OnDrift, Scaler,
    SeriesStats, SlidingScaler, StandardScaler,
};

use crate::series::Series;

/// Rows that the scalers of series remember.
const MEMORY: usize = 60;

/// A normalization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scaling {
    /// None.
    Raw,
    /// Fitted to the rows that train, and kept.
    Static,
    /// Fitted to the rows that train, and again when the monitor fires.
    Adaptive,
    /// The last rows.
    Sliding,
    /// All rows, the older the less.
    Weighted,
    /// Each window by itself, in the network.
    Reversible,
}

/// A center and a scale for each row and series, one row after the other, and the alarms on the
/// way.
#[derive(Clone, Debug)]
pub(crate) struct Scales {
    pub(crate) center: Vec<f64>,
    pub(crate) scale: Vec<f64>,
    pub(crate) alarms: Vec<DriftEvent>,
}

impl Scaling {
    pub(crate) const ALL: [Self; 6] = [
        Self::Raw,
        Self::Static,
        Self::Adaptive,
        Self::Sliding,
        Self::Weighted,
        Self::Reversible,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "none",
            Self::Static => "static",
            Self::Adaptive => "static + refit",
            Self::Sliding => "sliding",
            Self::Weighted => "ewm",
            Self::Reversible => "RevIn",
        }
    }

    pub(crate) fn scales(self, series: &Series) -> Result<Scales> {
        let rows = series.tensor()?;
        let of = |stats: SeriesStats| Scales {
            center: stats.mean(),
            scale: stats.scale(),
            alarms: vec![],
        };
        match self {
            Self::Raw | Self::Reversible => Ok(Scales {
                center: vec![0.; series.values.len()],
                scale: vec![1.; series.values.len()],
                alarms: vec![],
            }),
            Self::Sliding => Ok(of(SlidingScaler::new(MEMORY)?.transform_series(&rows)?.1)),
            Self::Weighted => {
                let options = EwmScalerOptions::span(MEMORY as f64)?;
                Ok(of(EwmScaler::new(options)?.transform_series(&rows)?.1))
            }
            Self::Static => {
                let scaler = StandardScaler::default();
                scaler.fit(&rows.narrow(0, 0, series.train)?)?;
                let (center, scale) = now(&scaler, series.width())?;
                Ok(Scales {
                    center: center.repeat(series.rows()),
                    scale: scale.repeat(series.rows()),
                    alarms: vec![],
                })
            }
            Self::Adaptive => adaptive(series, &rows),
        }
    }
}

/// Center and scale of each feature, as a scaler subtracts and divides by them.
fn now(scaler: &dyn Scaler, width: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let at = |value: f64| {
        let y = Tensor::full(value, (1, width), &Device::Cpu)?;
        scaler
            .inverse_transform(&y)?
            .flatten_all()?
            .to_vec1::<f64>()
    };
    let (center, one) = (at(0.)?, at(1.)?);
    let scale = one.iter().zip(&center).map(|(one, zero)| one - zero);
    Ok((center.clone(), scale.collect()))
}

/// The scaler sees the rows of the test one by one, as they come.
fn adaptive(series: &Series, rows: &Tensor) -> Result<Scales> {
    let options = DriftOptions {
        window: 100,
        min_count: 100,
        cool_down: 100,
        ..Default::default()
    };
    let scaler = StandardScaler::default().with_names(series.names.clone())?;
    let scaler = AdaptiveScaler::new(scaler, options, OnDrift::Refit)?;
    scaler.fit(&rows.narrow(0, 0, series.train)?)?;
    let (center, scale) = now(&scaler, series.width())?;
    let mut scales = Scales {
        center: center.repeat(series.train),
        scale: scale.repeat(series.train),
        alarms: vec![],
    };
    for row in series.train..series.rows() {
        scales
            .alarms
            .extend(scaler.observe(&rows.narrow(0, row, 1)?)?);
        let (center, scale) = now(&scaler, series.width())?;
        scales.center.extend(center);
        scales.scale.extend(scale);
    }
    Ok(scales)
}
