//! Statistics that the rows of a series were scaled by.

use candle_core::{Device, Result, Tensor};

use super::affine::{Map, Maps};
use super::{Features, check};

/// Statistics that each row of a series was scaled by.
#[derive(Debug, Clone)]
pub struct SeriesStats {
    layer: &'static str,
    /// The rows as features of one sample.
    features: Features,
    affine: Maps,
    /// NaN where nothing was known of a feature, else 0; none where all was.
    unknown: Option<Vec<f64>>,
}

impl SeriesStats {
    /// Statistics of the rows `x`, whose dtype must hold the numbers of the maps.
    pub(super) fn new(layer: &'static str, x: &Tensor, maps: Vec<Option<Map>>) -> Result<Self> {
        let nothing = |map: &Option<Map>| if map.is_none() { f64::NAN } else { 0. };
        let unknown = maps.iter().any(Option::is_none);
        let unknown = unknown.then(|| maps.iter().map(nothing).collect());
        let neutral = Map {
            center: [0.; 2],
            scale: 1.,
            offset: 0.,
        };
        let maps = maps.into_iter().map(|m| m.unwrap_or(neutral)).collect();
        let features = Features::default().of(layer, &x.unsqueeze(0)?)?;
        let affine = Maps { maps, clip: None };
        affine.check(layer, &features, x.dtype())?;
        Ok(Self {
            layer,
            features,
            affine,
            unknown,
        })
    }

    /// Subtracted centers: of one row after the other, each feature; NaN where nothing was known.
    pub fn mean(&self) -> Vec<f64> {
        self.each(|map| map.center[0])
    }

    /// Divisors, in the same order.
    pub fn scale(&self) -> Vec<f64> {
        self.each(|map| map.scale)
    }

    fn each(&self, of: fn(&Map) -> f64) -> Vec<f64> {
        let mut values: Vec<f64> = self.affine.maps.iter().map(of).collect();
        for (value, nothing) in values.iter_mut().zip(self.unknown.iter().flatten()) {
            *value += nothing;
        }
        values
    }

    /// Other values of the same rows, each scaled as its row was: of the shape and dtype of `x`, on
    /// its device, and differentiable.
    ///
    /// # Errors
    /// Another shape than that of the series.
    pub fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.where_known(x)?.unsqueeze(0)?;
        let y = self.affine.transform(self.layer, &self.features, &x)?;
        y.squeeze(0)
    }

    /// Values in units of the scaled rows, such as forecasts made at each of them, back in their
    /// own units.
    ///
    /// # Errors
    /// Another shape than that of the series.
    pub fn inverse_transform(&self, y: &Tensor) -> Result<Tensor> {
        let y = self.where_known(y)?.unsqueeze(0)?;
        let x = self.affine.inverse(self.layer, &self.features, &y)?;
        x.squeeze(0)
    }

    /// `x`, and NaN where nothing is known.
    fn where_known(&self, x: &Tensor) -> Result<Tensor> {
        let axes = self.features.axes().unwrap_or_default();
        check::shape(self.layer, "values of the series", x, axes)?;
        check::float(self.layer, "values of the series", x)?;
        match &self.unknown {
            Some(unknown) => {
                let unknown = Tensor::from_slice(unknown, x.dims(), &Device::Cpu)?;
                x + unknown.to_dtype(x.dtype())?.to_device(x.device())?
            }
            None => Ok(x.clone()),
        }
    }
}
