//! Batch and instance normalization with fixed statistics.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};
use candle_nn::{Activation, Module};

use super::foldable::Foldable;
use super::params::AffineParams;
use super::running_stats::RunningStats;
use super::weighted::Plain;
use crate::computations::{FixedStatistics, composed};
use crate::ops::linear_map::LinearMap;
use crate::ops::{self, Modulation, Scaling, check};

/// A [`BatchNorm`](crate::BatchNorm) or [`InstanceNorm`](crate::InstanceNorm) whose statistics no
/// longer change.
///
/// `y = (x − mean) / √(var + ε) · weight + bias`, with the statistics as they were when
/// [`frozen`](crate::BatchNorm::frozen) was called. The affine parameters are those of the layer
/// itself: they go on training. Fine-tuning at small batches and object detection train this way.
/// There is no second mode, so it is a [`Module`].
#[derive(Debug, Clone)]
pub struct FrozenNorm {
    layer: &'static str,
    min_rank: usize,
    /// Channels are features on the last axis.
    last_axis: bool,
    statistics: Arc<FixedStatistics>,
    params: AffineParams,
    eps: f64,
    activation: Option<Activation>,
}

impl FrozenNorm {
    /// Normalization of channels on axis 1 by the statistics as they are now: what a norm of your
    /// own can return from [`Norm::frozen`](crate::Norm::frozen).
    ///
    /// # Errors
    /// Parameters of another shape than the statistics, `eps` out of range.
    pub fn of(
        stats: &RunningStats,
        weight: Option<Tensor>,
        bias: Option<Tensor>,
        eps: f64,
    ) -> Result<Self> {
        let layer = stats.layer();
        check::eps(layer, eps)?;
        for (name, param) in [("weight", &weight), ("bias", &bias)] {
            if let Some(param) = param {
                check::shape(layer, name, param, stats.mean().dims())?;
            }
        }
        Self::new(layer, 2, Some(stats), &AffineParams { weight, bias }, eps)
    }

    pub(super) fn new(
        layer: &'static str,
        min_rank: usize,
        stats: Option<&RunningStats>,
        params: &AffineParams,
        eps: f64,
    ) -> Result<Self> {
        let statistics = tracked(layer, stats)?.snapshot()?;
        Ok(Self {
            layer,
            min_rank,
            last_axis: false,
            statistics: Arc::new(FixedStatistics::new([statistics.mean, statistics.var])),
            params: params.clone(),
            eps,
            activation: None,
        })
    }

    /// The same with an activation after it.
    pub(super) fn with_activation(self, activation: Option<Activation>) -> Self {
        Self { activation, ..self }
    }

    /// The same for features on the last axis.
    pub(crate) fn on_last_axis(self) -> Self {
        Self {
            last_axis: true,
            ..self
        }
    }

    /// The fixed mean of each channel.
    pub fn running_mean(&self) -> &Tensor {
        self.statistics.mean()
    }

    /// The fixed variance of each channel.
    pub fn running_var(&self) -> &Tensor {
        self.statistics.var()
    }

    /// The scale of each channel, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.params.weight()
    }

    /// The shift of each channel, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.params.bias()
    }

    /// ε, added to the variance.
    pub fn eps(&self) -> f64 {
        self.eps
    }

    /// The activation after it, that of the layer.
    pub fn activation(&self) -> Option<Activation> {
        self.activation
    }

    /// `layer` followed by this normalization, as one layer; [`fold`](crate::fold) does it for a
    /// whole sequence.
    ///
    /// With `s = weight / √(var + ε)`, the folded weight is `s · W` and the folded bias
    /// `s · (b − mean) + bias`: computed in `f32` (`f64` for an `f64` layer) and rounded once. The
    /// new layer holds plain values, for inference: no gradient leads back.
    ///
    /// # Errors
    /// A layer with another number of output channels, dtype or device; a norm with an activation.
    pub fn fold_into<L: Foldable>(&self, layer: &L) -> Result<L> {
        let (weight, bias) = self.folded(layer.map(), layer.weight(), layer.bias())?;
        Ok(layer.with(weight, bias))
    }

    /// `layer` followed by this normalization, as one layer.
    pub(crate) fn folded_into(&self, layer: &Plain) -> Result<Plain> {
        let (weight, bias) = self.folded(layer.map(), layer.weight(), layer.bias())?;
        Ok(Plain::of_values(layer.map(), &weight, Some(&bias)))
    }

    /// The weight and the bias of `map` followed by this normalization.
    fn folded(
        &self,
        map: LinearMap,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<(Tensor, Tensor)> {
        if let Some(activation) = self.activation {
            let layer = self.layer;
            bail!(
                "{layer}: expected a norm without an activation to fold, got one with \
                {activation:?}; build the norm without it, and call the activation after the \
                folded layer"
            )
        }
        let (name, weight, c) = (
            "the weight to fold into",
            weight.detach(),
            self.running_mean().elem_count(),
        );
        let outputs = map.checked_outputs(self.layer, name, &weight)?;
        output_channels(self.layer, &weight, outputs, c)?;
        check::float(self.layer, name, &weight)?;
        check::same_device(self.layer, name, &weight, self.running_mean().device())?;
        if let Some(bias) = bias {
            check::shape(self.layer, "the bias to fold into", bias, &[c])?;
            check::float(self.layer, "the bias to fold into", bias)?;
        }
        let dtype = weight.dtype();
        let acc = composed::accumulator(dtype);
        let wide = |t: &Tensor| t.detach().to_dtype(acc);
        let std = (wide(self.running_var())? + composed::eps_in(acc, self.eps))?.sqrt()?;
        let scale = match self.weight() {
            Some(w) => (wide(w)? / std)?,
            None => std.recip()?,
        };
        let shift = match bias {
            Some(b) => (wide(b)? - wide(self.running_mean())?)?,
            None => wide(self.running_mean())?.neg()?,
        };
        let shift = (shift * &scale)?;
        let bias = match self.bias() {
            Some(b) => (shift + wide(b)?)?,
            None => shift,
        };
        let folded = map.scaled(&wide(&weight)?, &scale)?;
        Ok((folded.to_dtype(dtype)?, bias.to_dtype(dtype)?))
    }
}

impl Module for FrozenNorm {
    /// Normalizes each channel of `xs` by the fixed statistics.
    ///
    /// # Shapes
    /// `[N, C, *]`, or `[*, C]` of a norm that was built for features; the output is contiguous, of
    /// the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.normalized(xs, None)
    }
}

impl FrozenNorm {
    /// The norm with scale and shift from outside, in one pass:
    /// `y = norm(x) · (1 + scale) + shift`.
    ///
    /// # Shapes
    /// `xs` as in `forward`; scale and shift as [`Modulation`] says.
    ///
    /// # Errors
    /// Those of `forward`; a scale or shift of another shape, dtype or device.
    pub fn forward_modulated(
        &self,
        xs: &Tensor,
        scale: Option<&Tensor>,
        shift: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.forward_modulated_by(xs, &Modulation::new(scale, shift))
    }

    /// [`forward_modulated`](Self::forward_modulated) with any offset of the scale.
    ///
    /// # Errors
    /// As [`forward_modulated`](Self::forward_modulated).
    pub fn forward_modulated_by(&self, xs: &Tensor, modulation: &Modulation) -> Result<Tensor> {
        self.normalized(xs, Some(*modulation))
    }

    fn normalized(&self, xs: &Tensor, modulation: Option<Modulation>) -> Result<Tensor> {
        if !self.last_axis || xs.rank() <= 2 {
            return self.along_channels(xs, modulation);
        }
        check::features(self.layer, xs, self.running_mean().elem_count())?;
        let last = xs.rank() - 1;
        // Axes as those of the input, as far as there are so many.
        let spread_to_rows = |value: Option<&Tensor>| match value {
            Some(value) if value.rank() > last => value.transpose(1, last).map(Some),
            value => Ok(value.cloned()),
        };
        let modulation = modulation.as_ref();
        let [scale, shift] = [
            spread_to_rows(modulation.and_then(|m| m.scale))?,
            spread_to_rows(modulation.and_then(|m| m.shift))?,
        ];
        let modulation = modulation.map(|m| Modulation {
            scale: scale.as_ref(),
            shift: shift.as_ref(),
            ..*m
        });
        self.along_channels(&xs.transpose(1, last)?, modulation)?
            .transpose(1, last)?
            .contiguous()
    }

    fn along_channels(&self, xs: &Tensor, modulation: Option<Modulation>) -> Result<Tensor> {
        check::rank_at_least(self.layer, xs, self.min_rank, "[N, C, ...]")?;
        check::channels(self.layer, xs, self.running_mean().elem_count())?;
        let scaling = Scaling {
            modulation,
            ..Scaling::new(self.weight(), self.bias()).activated(self.layer, self.activation)?
        };
        let (statistics, eps) = (&self.statistics, self.eps);
        ops::normalize_with(self.layer, self.min_rank, xs, statistics, scaling, eps)
    }
}

/// The layer that a normalization of `channels` channels is folded into.
fn output_channels(layer: &str, weight: &Tensor, outputs: usize, channels: usize) -> Result<()> {
    if outputs != channels {
        bail!(
            "{layer}: expected a layer with {channels} output channels to fold into, got {outputs} \
            of weight shape {:?}",
            weight.dims()
        )
    }
    Ok(())
}

/// Running statistics of a layer that may have none.
fn tracked<T>(layer: &str, statistics: Option<T>) -> Result<T> {
    match statistics {
        Some(s) => Ok(s),
        None => bail!(
            "{layer}: expected a layer with running statistics, got one without; set \
            track_running_stats"
        ),
    }
}
