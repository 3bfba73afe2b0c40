//! Normalization of each position of a sequence by those up to it.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use super::check;
use super::masked::wide_params;
use super::modulation::{Modulation, modulate_in};
use super::moments::{Moments, moments};
use crate::computations::{ChannelAxes, Cumulative, Earlier, Places, ScaleAdd, Third, composed};
use crate::graph;

const LAYER: &str = "CumulativeLayerNorm";

/// State of cumulative layer normalization between the parts of a stream: how many values each
/// sample had, their mean and their squared distances from it, in `f64`.
///
/// A new one is a stream that has not begun.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CumulativeState(Option<Vec<Moments>>);

impl CumulativeState {
    /// A stream that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// The moments of all values so far, sample by sample; none before the first part.
    pub fn moments(&self) -> Option<&[Moments]> {
        self.0.as_deref()
    }

    /// A stream that goes on after these moments of each sample.
    ///
    /// # Errors
    /// Samples with different numbers of values, or with none.
    pub fn of_moments(moments: Vec<Moments>) -> Result<Self> {
        let count = moments.first().map_or(0., |m| m.count());
        if moments.iter().any(|m| m.count() != count) || count < 1. {
            bail!(
                "{LAYER}: expected moments of as many values for each sample, got {:?}",
                moments.iter().map(|m| m.count()).collect::<Vec<_>>()
            )
        }
        Ok(Self(Some(moments)))
    }
}

/// Cumulative layer normalization: each position of a sequence by the statistics of all channels up
/// to it.
///
/// `y_t = (x_t − μ_t) / √(σ²_t + eps) · weight + bias`, μ and σ² (biased) taken over all channels
/// of the positions 0 to t of a sample (Luo and Mesgarani, 2018,
/// <https://arxiv.org/abs/1809.07454>). No position depends on a later one. Means and squared
/// distances are merged position by position, so that a large mean costs no digits.
///
/// # Shapes
/// `x`: `[N, C, T]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is
/// contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take `f32` parameters, and
/// are computed in `f32`.
///
/// # Errors
/// An input of another rank, parameters that do not fit it, `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[[1f64, 3., 2.], [2., 0., 5.]]], &Device::Cpu)?;
/// let y = candle_norm::ops::cumulative_layer_norm(&x, None, None, 1e-8)?;
/// // The first position: 1 and 2.
/// assert!((y.to_vec3::<f64>()?[0][0][0] + 0.99999998).abs() < 1e-9);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cumulative_layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    normalized(x, weight, bias, eps, None)
}

/// [`cumulative_layer_norm`] with a modulation after it, in the accumulator's dtype up to the end,
/// so that the result is rounded once.
pub(crate) fn modulated_cumulative_layer_norm(
    x: &Tensor,
    params: [Option<&Tensor>; 2],
    eps: f64,
    modulation: &Modulation,
) -> Result<Tensor> {
    check::input(LAYER, x, &[])?;
    let acc = composed::accumulator(x.dtype());
    let wide = |t: Option<&Tensor>| t.map(|t| t.to_dtype(acc)).transpose();
    let [weight, bias] = wide_params(x, params)?;
    let (scale, shift) = (wide(modulation.scale)?, wide(modulation.shift)?);
    let modulation = Modulation {
        scale: scale.as_ref(),
        shift: shift.as_ref(),
        ..*modulation
    };
    let y = cumulative_layer_norm(&x.to_dtype(acc)?, weight.as_ref(), bias.as_ref(), eps)?;
    modulate_in(LAYER, &y, &modulation, None)?.to_dtype(x.dtype())
}

/// [`cumulative_layer_norm`] of the part `x` of a stream, and the state after it. No gradient leads
/// into an earlier part.
pub(crate) fn cumulative_layer_norm_from(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    state: &CumulativeState,
) -> Result<(Tensor, CumulativeState)> {
    check::rank_at_least(LAYER, x, 1, "[N, C, T]")?;
    if let Some(before) = state.moments()
        && before.len() != x.dims()[0]
    {
        bail!(
            "{LAYER}: expected the {} samples of the stream, got input size {:?}; begin another \
            stream with a new state",
            before.len(),
            x.dims()
        )
    }
    let y = normalized(x, weight, bias, eps, state.moments())?;
    if x.elem_count() == 0 {
        return Ok((y, state.clone()));
    }
    let by_sample = x.detach().reshape((x.dims()[0], ()))?.t()?;
    let here = moments(&by_sample.contiguous()?)?;
    let all = match state.moments() {
        Some(before) => before.iter().zip(here).map(|(a, b)| a.merge(b)).collect(),
        None => here,
    };
    Ok((y, CumulativeState(Some(all))))
}

fn normalized(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
    before: Option<&[Moments]>,
) -> Result<Tensor> {
    check::eps(LAYER, eps)?;
    if x.rank() != 3 {
        bail!(
            "{LAYER}: expected an input [N, C, T], got size {:?}",
            x.dims()
        )
    }
    let c = x.dims()[1];
    check::input(LAYER, x, &check::Param::affine(weight, bias, &[c]))?;
    if x.elem_count() == 0 {
        return graph::empty(LAYER, x, &[weight, bias]);
    }
    let acc = composed::accumulator(x.dtype());
    let axes = ChannelAxes::of(x);
    let earlier = |m: &Moments| Earlier {
        count: m.count(),
        mean: m.mean(),
        mean_error: m.mean_error(),
        m2: m.m2(),
    };
    let computation = Cumulative {
        layer: LAYER,
        axes,
        eps: composed::eps_in(acc, eps),
        before: before.map(|before| Arc::new(before.iter().map(earlier).collect())),
    };
    // In the accumulator's dtype up to the end, so that the result is rounded once.
    let y = graph::apply(computation, &x.to_dtype(acc)?.contiguous()?, None, None)?;
    let y = match wide_params(x, [weight, bias])? {
        [None, None] => y,
        [weight, bias] => {
            let weight = match weight {
                Some(weight) => weight,
                None => Tensor::ones(c, acc, x.device())?,
            };
            let scaled = ScaleAdd {
                layer: LAYER,
                axes,
                places: Places::Channel,
                third: Third::Shift,
            };
            graph::apply(scaled, &y, Some(&weight), bias.as_ref())?
        }
    };
    y.to_dtype(x.dtype())?.contiguous()
}
