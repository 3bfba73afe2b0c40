//! Batch and instance normalization with fixed statistics, and their folding into the layer before.

use candle_core::{Result, Tensor};
use candle_nn::{Conv1d, Conv2d, Linear, Module};

use super::params::AffineParams;
use super::running_stats::Snapshot;
use crate::ops::{self, check, composed};

/// A [`BatchNorm`](crate::BatchNorm) or [`InstanceNorm`](crate::InstanceNorm) whose statistics no longer change.
///
/// `y = (x − mean) / √(var + ε) · weight + bias`, with the statistics as they were when [`frozen`](crate::BatchNorm::frozen) was
/// called. The affine parameters are those of the layer itself: they go on training. Fine-tuning at small batches and object
/// detection train this way. There is no second mode, so it is a [`Module`].
#[derive(Debug, Clone)]
pub struct FrozenNorm {
    layer: &'static str,
    min_rank: usize,
    mean: Tensor,
    var: Tensor,
    params: AffineParams,
    eps: f64,
}

impl FrozenNorm {
    pub(super) fn new(
        layer: &'static str,
        min_rank: usize,
        statistics: Snapshot,
        params: AffineParams,
        eps: f64,
    ) -> Self {
        Self {
            layer,
            min_rank,
            mean: statistics.mean,
            var: statistics.var,
            params,
            eps,
        }
    }

    /// The fixed mean of each channel.
    pub fn running_mean(&self) -> &Tensor {
        &self.mean
    }

    /// The fixed variance of each channel.
    pub fn running_var(&self) -> &Tensor {
        &self.var
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

    /// `layer` followed by this normalization, as one layer.
    ///
    /// With `s = weight / √(var + ε)`, the folded weight is `s · W` and the folded bias `s · (b − mean) + bias`: computed in `f32`
    /// (`f64` for an `f64` layer) and rounded once. The new layer holds plain values, for inference: no gradient leads back.
    ///
    /// # Errors
    /// A layer with another number of output channels, dtype or device.
    pub fn fold_into<L: Foldable>(&self, layer: &L) -> Result<L> {
        let weight = layer.weight().detach();
        let c = self.mean.elem_count();
        check::output_channels(self.layer, &weight, c)?;
        check::float(self.layer, "the weight to fold into", &weight)?;
        check::same_device(
            self.layer,
            "the weight to fold into",
            &weight,
            self.mean.device(),
        )?;
        if let Some(bias) = layer.bias() {
            check::shape(self.layer, "the bias to fold into", bias, &[c])?;
            check::float(self.layer, "the bias to fold into", bias)?;
        }
        let dtype = weight.dtype();
        let acc = composed::accumulator(dtype);
        let wide = |t: &Tensor| t.detach().to_dtype(acc);
        let std = (wide(&self.var)? + composed::eps_in(acc, self.eps))?.sqrt()?;
        let scale = match self.weight() {
            Some(w) => (wide(w)? / std)?,
            None => std.recip()?,
        };
        let shift = match layer.bias() {
            Some(b) => (wide(b)? - wide(&self.mean)?)?,
            None => wide(&self.mean)?.neg()?,
        };
        let shift = (shift * &scale)?;
        let bias = match self.bias() {
            Some(b) => (shift + wide(b)?)?,
            None => shift,
        };
        let mut per_output = vec![1; weight.rank()];
        per_output[0] = c;
        let folded = wide(&weight)?.broadcast_mul(&scale.reshape(per_output)?)?;
        Ok(layer.with(folded.to_dtype(dtype)?, bias.to_dtype(dtype)?))
    }
}

impl Module for FrozenNorm {
    /// Normalizes each channel of `xs` by the fixed statistics.
    ///
    /// # Shapes
    /// `[N, C, *]`; the output is contiguous, of the same shape and dtype.
    ///
    /// # Errors
    /// An input of another rank, number of channels, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        check::rank_at_least(self.layer, xs, self.min_rank, "[N, C, ...]")?;
        check::channels(self.layer, xs, self.mean.elem_count())?;
        let statistics = (&self.mean, &self.var);
        let (weight, bias) = (self.weight(), self.bias());
        ops::normalize_with(
            self.layer,
            self.min_rank,
            xs,
            statistics,
            weight,
            bias,
            self.eps,
        )
    }
}

/// candle-nn's layers that a normalization of their output channels can be folded into.
pub trait Foldable: sealed::Sealed {
    /// The weight, output channels first.
    fn weight(&self) -> &Tensor;
    /// The bias, if there is one.
    fn bias(&self) -> Option<&Tensor>;
    /// The same layer with other values.
    fn with(&self, weight: Tensor, bias: Tensor) -> Self;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for candle_nn::Linear {}
    impl Sealed for candle_nn::Conv1d {}
    impl Sealed for candle_nn::Conv2d {}
}

impl Foldable for Linear {
    fn weight(&self) -> &Tensor {
        self.weight()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.bias()
    }
    fn with(&self, weight: Tensor, bias: Tensor) -> Self {
        Self::new(weight, Some(bias))
    }
}

impl Foldable for Conv1d {
    fn weight(&self) -> &Tensor {
        self.weight()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.bias()
    }
    fn with(&self, weight: Tensor, bias: Tensor) -> Self {
        Self::new(weight, Some(bias), *self.config())
    }
}

impl Foldable for Conv2d {
    fn weight(&self) -> &Tensor {
        self.weight()
    }
    fn bias(&self) -> Option<&Tensor> {
        self.bias()
    }
    fn with(&self, weight: Tensor, bias: Tensor) -> Self {
        Self::new(weight, Some(bias), *self.config())
    }
}
