//! Branches that are scaled before they join a residual.

use candle_core::{Result, Tensor};

use super::add_norm::check_residual;
use super::check;
use crate::computations::{ChannelAxes, Places, ScaleAdd, Third, composed};
use crate::graph;

/// Options of [`layer_scale`] and [`gated_residual`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct GateOptions {
    /// Channels are on axis 1 of `[N, C, *]`, and not on the last axis. Default: false.
    pub channels_first: bool,
    /// Multiply by the hyperbolic tangent of the gate, as Z-Image does. Default: false.
    pub tanh: bool,
}

impl GateOptions {
    /// The same with another `channels_first`.
    pub fn with_channels_first(self, channels_first: bool) -> Self {
        Self {
            channels_first,
            ..self
        }
    }

    /// The same with another `tanh`.
    pub fn with_tanh(self, tanh: bool) -> Self {
        Self { tanh, ..self }
    }
}

/// LayerScale: a branch with a factor for each channel.
///
/// `y = x · gamma + shift` (Touvron et al., 2021, <https://arxiv.org/abs/2103.17239>).
///
/// # Shapes
/// `x`: `[*, C]`, or `[N, C, *]` with `channels_first`; `gamma`, and `shift` if there is one:
/// `[C]`, or one for each sample, `[N, C]`, where `x` has more axes than these. The result has the
/// shape and dtype of `x` and is contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs
/// also take `f32` parameters, and are computed in `f32`.
///
/// # Errors
/// An input of lower rank, parameters that do not fit it.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, GateOptions};
///
/// let x = Tensor::new(&[[3f64, -1.]], &Device::Cpu)?;
/// let gamma = Tensor::new(&[0.5f64, 2.], &Device::Cpu)?;
/// let y = ops::layer_scale(&x, &gamma, None, GateOptions::default())?;
/// assert_eq!(y.to_vec2::<f64>()?, [[1.5, -2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_scale(
    x: &Tensor,
    gamma: &Tensor,
    shift: Option<&Tensor>,
    options: GateOptions,
) -> Result<Tensor> {
    scaled("layer_scale", x, gamma, shift, None, options)
}

/// A residual, and a branch that joins it through a gate: one pass over memory on the CPU.
///
/// `y = residual + x · gate + shift`, as in AdaLN-Zero, whose gate is one for each sample (Peebles
/// and Xie, 2022, <https://arxiv.org/abs/2212.09748>). In half precision the sum is rounded once.
///
/// # Shapes
/// `residual`: as `x`, and of its dtype; else those of [`layer_scale`].
///
/// # Errors
/// A residual of another shape or dtype; those of [`layer_scale`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, GateOptions};
///
/// let residual = Tensor::new(&[[1f64, 2.]], &Device::Cpu)?;
/// let x = Tensor::new(&[[3f64, -1.]], &Device::Cpu)?;
/// let gate = Tensor::new(&[0.5f64, 2.], &Device::Cpu)?;
/// let y = ops::gated_residual(&residual, &x, &gate, None, GateOptions::default())?;
/// assert_eq!(y.to_vec2::<f64>()?, [[2.5, 0.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gated_residual(
    residual: &Tensor,
    x: &Tensor,
    gate: &Tensor,
    shift: Option<&Tensor>,
    options: GateOptions,
) -> Result<Tensor> {
    scaled("gated_residual", x, gate, shift, Some(residual), options)
}

/// Both, by the name of `layer`.
fn scaled(
    layer: &'static str,
    x: &Tensor,
    gate: &Tensor,
    shift: Option<&Tensor>,
    residual: Option<&Tensor>,
    options: GateOptions,
) -> Result<Tensor> {
    let first = options.channels_first;
    let (least, form) = if first {
        (2, "[N, C, ...]")
    } else {
        (1, "[..., C]")
    };
    check::rank_at_least(layer, x, least, form)?;
    let dims = x.dims();
    let c = dims[if first { 1 } else { dims.len() - 1 }];
    // Where both fit, the last axis alone is the one of channels.
    let by_sample = [dims[0], c];
    let shape = |t: &Tensor| match t.rank() == 2 && dims.len() > 2 {
        true => by_sample.to_vec(),
        false => vec![c],
    };
    let shapes = [Some(gate), shift].map(|t| t.map_or(vec![], &shape));
    let named = [("the gate", Some(gate)), ("the shift", shift)]
        .into_iter()
        .zip(&shapes);
    let named = named.filter_map(|((name, value), shape)| {
        value.map(|value| check::Param { name, value, shape })
    });
    check::input(layer, x, &named.collect::<Vec<_>>())?;
    if let Some(residual) = residual {
        check_residual(layer, residual, x)?;
    }
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &[Some(gate), shift, residual]);
    }
    let acc = composed::accumulator(x.dtype());
    let gate = match options.tanh {
        true => composed::kept(gate)?.to_dtype(acc)?.tanh()?,
        false => gate.clone(),
    };
    // Both for the same places.
    let (gate, shift) = match shift {
        Some(shift) if shift.rank() != gate.rank() => {
            let all = |t: &Tensor| t.broadcast_as(&by_sample)?.contiguous();
            (all(&gate)?, Some(all(shift)?))
        }
        _ => (gate, shift.cloned()),
    };
    let outer = dims[0];
    let axes = match first {
        true => ChannelAxes {
            outer,
            channels: c,
            inner: x.elem_count() / (outer * c),
        },
        false => ChannelAxes {
            outer,
            channels: x.elem_count() / (outer * c),
            inner: c,
        },
    };
    let axes = match dims.len() {
        1 => ChannelAxes {
            outer: 1,
            channels: 1,
            inner: c,
        },
        _ => axes,
    };
    let computation = ScaleAdd {
        layer,
        axes,
        places: match (first, gate.rank() == 2) {
            (true, false) => Places::Channel,
            (true, true) => Places::SampleAndChannel,
            (false, false) => Places::Column,
            (false, true) => Places::SampleAndColumn,
        },
        third: Third::Shift,
    };
    match (residual, shift) {
        (None, shift) => graph::apply(computation, x, Some(&gate), shift.as_ref()),
        (Some(residual), None) => {
            let third = Third::Residual;
            let computation = ScaleAdd {
                third,
                ..computation
            };
            graph::apply(computation, x, Some(&gate), Some(residual))
        }
        (Some(residual), Some(shift)) => {
            // Two steps, rounded once.
            let (wide, residual) = (x.to_dtype(acc)?, residual.to_dtype(acc)?);
            let y = graph::apply(computation, &wide, Some(&gate), Some(&shift))?;
            (residual + y)?.to_dtype(x.dtype())?.contiguous()
        }
    }
}
