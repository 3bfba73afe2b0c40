//! The transformation itself: a center, a scale and an offset for each feature, by tensor
//! operations.

use candle_core::{DType, Device, Result, Tensor};

use super::Features;
use super::check;

/// `y = (x − center) / scale + offset` of one feature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Map {
    /// Center in two numbers, the second of which is the rounding error of the first.
    pub(super) center: [f64; 2],
    pub(super) scale: f64,
    pub(super) offset: f64,
}

impl Map {
    /// Map of a feature without values: every input becomes NaN.
    pub(super) const UNKNOWN: Self = Self {
        center: [f64::NAN, 0.],
        scale: f64::NAN,
        offset: 0.,
    };

    pub(super) fn is_known(&self) -> bool {
        !self.center[0].is_nan()
    }
}

/// The standard deviation of a variance; 1 where it is below the resolution of an `f64` at the
/// mean. A variance that is not a number stays that, and is refused.
pub(super) fn scale_of(mean: f64, var: f64) -> f64 {
    let std = var.sqrt();
    match std <= f64::EPSILON * mean.abs() {
        true => 1.,
        false => std,
    }
}

/// A [`Map`] of each feature, and the range that the result is cut to, if it is.
#[derive(Debug, Clone)]
pub(super) struct Maps {
    pub(super) maps: Vec<Map>,
    pub(super) clip: Option<[f64; 2]>,
}

impl Maps {
    pub(super) fn transform(&self, layer: &str, features: &Features, x: &Tensor) -> Result<Tensor> {
        along_features(layer, features, x, |x| {
            let map = self.on(layer, features, &x)?;
            // Two steps: the first is exact for values near the center, of which the second number
            // may be lost.
            let mut y = x.broadcast_sub(&map.high)?;
            if let Some(low) = &map.low {
                y = y.broadcast_sub(low)?;
            }
            y = y.broadcast_div(&map.scale)?;
            if let Some(offset) = &map.offset {
                y = y.broadcast_add(offset)?;
            }
            match self.clip {
                Some(range) => cut(&y, range),
                None => Ok(y),
            }
        })
    }

    pub(super) fn inverse(&self, layer: &str, features: &Features, y: &Tensor) -> Result<Tensor> {
        along_features(layer, features, y, |y| {
            let map = self.on(layer, features, &y)?;
            let mut x = y;
            if let Some(offset) = &map.offset {
                x = x.broadcast_sub(offset)?;
            }
            x = x.broadcast_mul(&map.scale)?;
            if let Some(low) = &map.low {
                x = x.broadcast_add(low)?;
            }
            x.broadcast_add(&map.high)
        })
    }

    /// Whether a computation on data of this dtype can hold the numbers of all maps.
    pub(super) fn check(&self, layer: &str, features: &Features, dtype: DType) -> Result<()> {
        let dtype = wide(dtype);
        let round = |v: f64| rounded(v, dtype);
        let known = self.maps.iter().enumerate().filter(|(_, m)| m.is_known());
        for (i, map) in known {
            // A scale that is rounded to zero would divide by it.
            let held = match round(map.scale) {
                0. => f64::INFINITY,
                scale => round(map.center[0]) + scale + round(map.offset),
            };
            check::representable(layer, &features.label(i), held, dtype)?;
        }
        Ok(())
    }

    /// The numbers of all maps as tensors that go with `x`, `[N, features]`.
    fn on(&self, layer: &str, features: &Features, x: &Tensor) -> Result<Tensors> {
        let dtype = x.dtype();
        self.check(layer, features, dtype)?;
        let tensor = |of: &dyn Fn(&Map) -> f64| {
            let values: Vec<f64> = self.maps.iter().map(of).collect();
            let tensor = Tensor::from_vec(values, (1, self.maps.len()), &Device::Cpu)?;
            tensor.to_dtype(dtype)?.to_device(x.device())
        };
        let low = |m: &Map| (m.center[0] - rounded(m.center[0], dtype)) + m.center[1];
        let unless_zero = |of: &dyn Fn(&Map) -> f64| {
            let any = self.maps.iter().any(|m| of(m) != 0.);
            any.then(|| tensor(of)).transpose()
        };
        Ok(Tensors {
            high: tensor(&|m| m.center[0])?,
            low: unless_zero(&low)?,
            scale: tensor(&|m| m.scale)?,
            offset: unless_zero(&|m| m.offset)?,
        })
    }
}

/// `y` within a range. The gradient of what is cut is 0; that of the ends of the range, which are
/// not, is whole, and NaN stays NaN.
fn cut(y: &Tensor, [low, high]: [f64; 2]) -> Result<Tensor> {
    let zeros = y.zeros_like()?;
    let at_least = y.lt(low)?.where_cond(&(&zeros + low)?, y)?;
    y.gt(high)?.where_cond(&(&zeros + high)?, &at_least)
}

/// The dtype that data of a dtype are computed in.
fn wide(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// A number as `dtype`, one of those of [`wide`], holds it.
fn rounded(v: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => v,
        _ => f64::from(v as f32),
    }
}

struct Tensors {
    high: Tensor,
    low: Option<Tensor>,
    scale: Tensor,
    offset: Option<Tensor>,
}

/// Applies `f` to `x` as `[N, features]`, in `f64` for `f64` and else in `f32`; the result has the
/// shape and dtype of `x`.
pub(super) fn along_features(
    layer: &str,
    features: &Features,
    x: &Tensor,
    f: impl FnOnce(Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    check::float(layer, "data", x)?;
    features.of(layer, x)?;
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let rows = x.reshape((x.dims()[0], features.count()))?;
    f(rows.to_dtype(wide(x.dtype()))?)?
        .to_dtype(x.dtype())?
        .reshape(x.shape())
}
