//! Reversible instance normalization.

use candle_core::{DType, Result, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder};

use super::params::Affine;
use crate::ops::{self, check};
use candle_norm_support::host;

const LAYER: &str = "RevIn";

/// Names of the parameters, those of the authors' implementation.
const WEIGHT: &str = "affine_weight";
const BIAS: &str = "affine_bias";

/// Configuration of [`RevIn`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct RevInOptions {
    /// Added to the variance, inside the root. Default: 1e-5.
    pub eps: f64,
    /// Learned parameters of each series. Default: a scale and a shift.
    pub affine: Affine,
    /// Subtract the last value of a window in place of its mean. Default: false.
    pub subtract_last: bool,
    /// Take NaN for values that are missing, as [`normalize_masked`](RevIn::normalize_masked) takes
    /// a mask: they are no part of the statistics, and come out as the center. Without, NaN makes
    /// the whole window of its series NaN. Default: false.
    pub ignore_nan: bool,
}

impl Default for RevInOptions {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            affine: Affine::WeightAndBias,
            subtract_last: false,
            ignore_nan: false,
        }
    }
}

impl From<f64> for RevInOptions {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

/// Reversible instance normalization: each window of each series by its own statistics, which the
/// forecast is restored by.
///
/// ```text
/// y = (x − c) / s · w + b          normalize
/// x̂ = (ŷ − b) / w · s + c          denormalize
/// ```
///
/// Where:
/// - `c` is the mean of the window over time, or its last value with `subtract_last`;
/// - `s = √(σ² + ε)`, with σ² the biased variance of the window over time;
/// - `w` and `b` are `affine_weight` and `affine_bias`, one value a series, as far as `affine` has
///   them.
///
/// Kim et al., 2022, "Reversible Instance Normalization for Accurate Time-Series Forecasting
/// against Distribution Shift",
/// <https://openreview.net/forum?id=cGDAkQo1C0p>. Formulas, defaults and names of parameters are
/// those of the authors' implementation, but for two things: it divides by `w + ε²` on the way
/// back, and so does not quite return; and it cuts `c` and `s` off the graph, so that a layer
/// before the normalization gets only a part of its gradient. Here both ways are the inverse of
/// each other, and every gradient is whole; the parameters, and a model of data that have no
/// gradient, get the same from both.
///
/// The layer remembers no window. [`normalize`](Self::normalize) returns the statistics as a value,
/// which [`denormalize`](Self::denormalize) takes: threads may share one layer, and windows may be
/// restored in any order. Training and inference do the same.
#[derive(Debug, Clone)]
pub struct RevIn {
    num_features: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    options: RevInOptions,
}

/// Statistics that a batch of windows was normalized by.
#[derive(Debug, Clone)]
pub struct RevInStats {
    center: Tensor,
    std: Tensor,
}

impl RevInStats {
    /// Subtracted centers, `[N, C]`: the means over time, or the last values.
    pub fn center(&self) -> &Tensor {
        &self.center
    }

    /// Divisors, `[N, C]`: `√(σ² + ε)`.
    pub fn std(&self) -> &Tensor {
        &self.std
    }
}

/// A [`RevIn`] of `num_features` series, its parameters `affine_weight` and `affine_bias` taken
/// from `vb`.
///
/// # Errors
/// `eps` that is not positive and finite, tensors of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::scaling::{RevInOptions, rev_in};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let rev_in = rev_in(1, RevInOptions::default(), vb)?;
///
/// // Two windows of four steps: the same shape at other levels.
/// let windows = [[[1f64], [2.], [3.], [4.]], [[110.], [120.], [130.], [140.]]];
/// let windows = Tensor::new(&windows, &Device::Cpu)?;
/// let (normal, stats) = rev_in.normalize(&windows)?;
///
/// // A model that repeats the last value forecasts in the units of each window.
/// let forecast = rev_in.denormalize(&normal.narrow(1, 3, 1)?, &stats)?;
/// let forecast = forecast.flatten_all()?.to_vec1::<f64>()?;
/// assert!((forecast[0] - 4.).abs() < 1e-12 && (forecast[1] - 140.).abs() < 1e-12);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rev_in(
    num_features: usize,
    options: impl Into<RevInOptions>,
    vb: VarBuilder,
) -> Result<RevIn> {
    let options = options.into();
    check::eps(LAYER, options.eps)?;
    let param = |is_there: bool, name, initial| {
        let param = || vb.get_with_hints(num_features, name, Init::Const(initial));
        is_there.then(param).transpose()
    };
    Ok(RevIn {
        num_features,
        weight: param(options.affine.has_weight(), WEIGHT, 1.)?,
        bias: param(options.affine.has_bias(), BIAS, 0.)?,
        options,
    })
}

impl RevIn {
    /// The scale of each series, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// The shift of each series, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The number of series on the last axis.
    pub fn num_features(&self) -> usize {
        self.num_features
    }

    /// The configuration.
    pub fn options(&self) -> &RevInOptions {
        &self.options
    }

    /// Sets the parameters that are variables back to a scale of 1 and a shift of 0.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn reset(&self) -> Result<()> {
        for (param, initial) in [(self.weight(), 1.), (self.bias(), 0.)] {
            if let Some(param) = param.filter(|p| p.is_variable()) {
                let start = Tensor::full(initial, param.shape(), param.device())?;
                Var::from_tensor(param)?.set(&start.to_dtype(param.dtype())?)?;
            }
        }
        Ok(())
    }

    /// Windows `xs`, each series of each normalized over time, and what they were normalized by.
    ///
    /// # Shapes
    /// `xs`: `[N, T, num_features]` with `T` at least 2; the output is contiguous, of the same
    /// shape and dtype. The statistics are `f32`, or `f64` for `f64`.
    ///
    /// # Errors
    /// An input of another rank, number of series, dtype or device, or of one step.
    pub fn normalize(&self, xs: &Tensor) -> Result<(Tensor, RevInStats)> {
        self.check(xs)?;
        if self.options.ignore_nan {
            // Only NaN differs from itself.
            return self.normalize_observed(xs, &xs.eq(xs)?);
        }
        self.normalize_whole(xs)
    }

    /// [`normalize`](Self::normalize) of windows with values that are missing: where `observed`
    /// is 0.
    ///
    /// The statistics are those of the values that are there, with
    /// [`subtract_last`](RevInOptions::subtract_last) of the last of them. A value that is missing,
    /// whatever `xs` has in its place, comes out as the center does, as the shift `b`, and gets no
    /// gradient. A series of which a window has no value at all is `b` throughout; its statistics
    /// are NaN, and so is its forecast.
    ///
    /// # Shapes
    /// `observed`: `[N, T, num_features]`, or `[N, T, 1]` for all series alike; of any dtype.
    ///
    /// # Errors
    /// As [`normalize`](Self::normalize); a mask of another shape or device.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_norm::scaling::{RevInOptions, rev_in};
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    /// let rev_in = rev_in(1, RevInOptions::default(), vb)?;
    /// let window = Tensor::new(&[[[2f64], [-1.], [4.], [6.]]], &Device::Cpu)?;
    /// let observed = Tensor::new(&[[[1u8], [0], [1], [1]]], &Device::Cpu)?;
    /// let (y, stats) = rev_in.normalize_masked(&window, &observed)?;
    /// // The mean of 2, 4 and 6.
    /// assert_eq!(stats.center().to_vec2::<f64>()?, [[4.]]);
    /// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?[1], 0.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn normalize_masked(&self, xs: &Tensor, observed: &Tensor) -> Result<(Tensor, RevInStats)> {
        self.check(xs)?;
        mask(LAYER, observed, xs)?;
        check::same_device(LAYER, "the mask", observed, xs.device())?;
        let observed = observed.ne(&observed.zeros_like()?)?;
        let observed = observed.broadcast_as(xs.shape())?.contiguous()?;
        match self.options.ignore_nan {
            true => self.normalize_observed(xs, &(observed * xs.eq(xs)?)?),
            false => self.normalize_observed(xs, &observed),
        }
    }

    fn check(&self, xs: &Tensor) -> Result<()> {
        windows(LAYER, xs, self.num_features)?;
        more_than_one_step(LAYER, xs)?;
        check::input(LAYER, xs, &self.params())
    }

    /// Normalizes by the values where `observed`, of the shape of `xs` in `u8`, is 1.
    fn normalize_observed(&self, xs: &Tensor, observed: &Tensor) -> Result<(Tensor, RevInStats)> {
        if xs.elem_count() == 0 {
            return self.normalize_whole(xs);
        }
        let (wide, eps) = match xs.dtype() {
            DType::F64 => (DType::F64, self.options.eps),
            _ => (
                DType::F32,
                self.options.eps.max(f64::from(f32::MIN_POSITIVE)),
            ),
        };
        let there = observed.to_dtype(wide)?;
        let xs_wide = xs.to_dtype(wide)?;
        // Not a product, in which NaN would stay.
        let x = observed.where_cond(&xs_wide, &xs_wide.zeros_like()?)?;
        let count = there.sum_keepdim(1)?;
        let divisor = count.maximum(&count.ones_like()?)?;
        let mean = |t: &Tensor| t.sum_keepdim(1)?.div(&divisor);
        let about = |center: &Tensor| x.broadcast_sub(center)?.mul(&there);
        // In two steps, as a mean of one number would leave what it was rounded by in every
        // distance.
        let high = mean(&x)?;
        let about_high = about(&high)?;
        let low = mean(&about_high)?;
        let center = (high + &low)?;
        let distances = about_high.broadcast_sub(&low)?.mul(&there)?;
        let std = (mean(&distances.sqr()?)? + eps)?.sqrt()?;
        let (center, distances) = match self.options.subtract_last {
            true => {
                let last = (&x * last_of(observed)?.to_dtype(wide)?)?.sum_keepdim(1)?;
                let distances = about(&last)?;
                (last, distances)
            }
            false => (center, distances),
        };
        let ys = self.scaled(distances.broadcast_div(&std)?)?;
        let unknown = count.eq(0.)?.where_cond(
            &Tensor::full(f64::NAN, count.shape(), xs.device())?.to_dtype(wide)?,
            &count.zeros_like()?,
        )?;
        let stats = RevInStats {
            center: (center + &unknown)?.squeeze(1)?,
            std: (std + &unknown)?.squeeze(1)?,
        };
        Ok((ys.to_dtype(xs.dtype())?, stats))
    }

    fn normalize_whole(&self, xs: &Tensor) -> Result<(Tensor, RevInStats)> {
        let by_series = xs.transpose(1, 2)?.contiguous()?;
        let (mut weight, mut bias) = (self.weight(), self.bias());
        if self.options.subtract_last {
            // It is applied after the other center.
            (weight, bias) = (None, None);
        }
        let (normal, [mean, std]) =
            ops::instance_norm_by(LAYER, &by_series, weight, bias, self.options.eps)?;
        if !self.options.subtract_last || xs.elem_count() == 0 {
            let stats = RevInStats { center: mean, std };
            return Ok((normal.transpose(1, 2)?.contiguous()?, stats));
        }
        let wide = xs.to_dtype(std.dtype())?;
        let center = wide.narrow(1, wide.dims()[1] - 1, 1)?.squeeze(1)?;
        let ys = (wide.broadcast_sub(&center.unsqueeze(1)?)?).broadcast_div(&std.unsqueeze(1)?)?;
        let ys = self.scaled(ys)?.to_dtype(xs.dtype())?;
        Ok((ys, RevInStats { center, std }))
    }

    /// `ys · weight + bias`, in the dtype of `ys`.
    fn scaled(&self, mut ys: Tensor) -> Result<Tensor> {
        if let Some(weight) = &self.weight {
            ys = ys.broadcast_mul(&weight.to_dtype(ys.dtype())?)?;
        }
        if let Some(bias) = &self.bias {
            ys = ys.broadcast_add(&bias.to_dtype(ys.dtype())?)?;
        }
        Ok(ys)
    }

    /// Forecasts `ys` of normalized windows, back in the units of the windows that `stats` are of.
    ///
    /// # Shapes
    /// `ys`: `[N, H, num_features]`, the horizon `H` of any length; the output is contiguous, of
    /// the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of series, dtype or device; statistics of other windows
    /// than `[N, num_features]`, or of another dtype than windows of the dtype of `ys` have; on the
    /// CPU, a weight of 0.
    pub fn denormalize(&self, ys: &Tensor, stats: &RevInStats) -> Result<Tensor> {
        windows(LAYER, ys, self.num_features)?;
        check::input(LAYER, ys, &self.params())?;
        same_windows(LAYER, ys.dims()[0], stats.center.dims()[0])?;
        let of_windows = [ys.dims()[0], self.num_features];
        check::shape(LAYER, "statistics", &stats.center, &of_windows)?;
        let wide = match ys.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        check::dtype(LAYER, "statistics", &stats.center, wide)?;
        check::same_device(LAYER, "statistics", &stats.center, ys.device())?;
        let mut xs = ys.to_dtype(stats.std.dtype())?;
        if let Some(bias) = &self.bias {
            xs = xs.broadcast_sub(&bias.to_dtype(xs.dtype())?)?;
        }
        if let Some(weight) = &self.weight {
            // Elsewhere the check would wait for the device at every step.
            if host::has(weight) {
                invertible(LAYER, WEIGHT, weight)?;
            }
            xs = xs.broadcast_div(&weight.to_dtype(xs.dtype())?)?;
        }
        xs.broadcast_mul(&stats.std.unsqueeze(1)?)?
            .broadcast_add(&stats.center.unsqueeze(1)?)?
            .to_dtype(ys.dtype())?
            .contiguous()
    }

    fn params(&self) -> Vec<check::Param<'_>> {
        let named = [(WEIGHT, self.weight()), (BIAS, self.bias())];
        let shape = std::slice::from_ref(&self.num_features);
        let param =
            |(name, value): (_, Option<_>)| value.map(|value| check::Param { name, value, shape });
        named.into_iter().filter_map(param).collect()
    }
}

/// 1 at the last step of each window and series where `observed`, `[N, T, C]`, is 1, and 0
/// elsewhere.
fn last_of(observed: &Tensor) -> Result<Tensor> {
    let (_, steps, series) = observed.dims3()?;
    let mut flags = host::vector::<u8>(&observed.flatten_all()?)?;
    for window in flags.chunks_mut(steps * series) {
        for one in 0..series {
            let mut found = false;
            for step in (0..steps).rev() {
                let flag = &mut window[step * series + one];
                *flag = u8::from(*flag != 0 && !found);
                found |= *flag != 0;
            }
        }
    }
    host::tensor(flags, observed.shape(), observed.device())
}

/// Windows of series, `[N, T, C]`.
fn windows(layer: &str, x: &Tensor, series: usize) -> Result<()> {
    match x.dims() {
        [_, _, c] if *c == series => Ok(()),
        dims => bail!(
            "{layer}: expected windows [N, T, {series}], the series on the last axis, got shape \
            {dims:?}"
        ),
    }
}

/// Mask of the values of windows that are there.
fn mask(layer: &str, mask: &Tensor, windows: &Tensor) -> Result<()> {
    let (n, t, c) = windows.dims3()?;
    match mask.dims() {
        [a, b, d] if (*a, *b) == (n, t) && [c, 1].contains(d) => Ok(()),
        dims => bail!(
            "{layer}: expected a mask [{n}, {t}, {c}] or [{n}, {t}, 1] of the windows, got shape \
            {dims:?}"
        ),
    }
}

/// Windows that have a variance.
fn more_than_one_step(layer: &str, x: &Tensor) -> Result<()> {
    if x.dims()[1] < 2 && x.elem_count() > 0 {
        bail!(
            "{layer}: expected windows of at least 2 steps, got shape {:?}; one step has no \
            variance",
            x.dims()
        )
    }
    Ok(())
}

/// Statistics of as many windows as there are forecasts.
fn same_windows(layer: &str, forecasts: usize, windows: usize) -> Result<()> {
    if forecasts != windows {
        bail!(
            "{layer}: expected forecasts of the {windows} windows that the statistics are of, got \
            {forecasts}"
        )
    }
    Ok(())
}

/// A weight that can be divided by.
fn invertible(layer: &str, name: &str, weight: &Tensor) -> Result<()> {
    let values = host::vector::<f64>(&weight.to_dtype(DType::F64)?)?;
    match values.iter().position(|v| *v == 0.) {
        Some(series) => bail!(
            "{layer}: expected {name} that can be divided by, got 0 for series {series}; a series \
            that is multiplied by 0 cannot be restored"
        ),
        None => Ok(()),
    }
}
