//! Normalization of each row by its own statistics: layer norm and RMS norm.

use std::borrow::Cow;
use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Result, Shape, Tensor, WithDType};

use super::fused::{self, Accumulator, Arg, FusedOp, Native, Params, Slot, elements, with_native};
use super::turn::swapped;
use super::{Route, check, composed, route};
use crate::kernels::{AffinePair, Gradients, RowSpec, Stats};

/// Where RMS norm rounds half-precision values; in `f32` and `f64` both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Cast {
    /// Multiply by the weight in `f32`, then round once: PyTorch's `RMSNorm`, Gemma.
    #[default]
    AfterWeight,
    /// Round the normalized value to the input's dtype, then multiply and round again: Llama and its kin.
    BeforeWeight,
}

/// What layer norm and RMS norm are special cases of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RowNorm {
    /// The name that messages start with.
    pub(crate) layer: &'static str,
    /// The name that a configuration has for it.
    pub(crate) kind: &'static str,
    /// Subtract the mean (layer norm) or not (RMS norm).
    pub(crate) center: bool,
    /// `None` is the machine epsilon of the dtype that the statistics are formed in.
    pub(crate) eps: Option<f64>,
    /// Added to the weight.
    pub(crate) offset: f64,
    pub(crate) cast: Cast,
    /// The rows run along axis 1 instead of the trailing axes.
    pub(crate) channels_first: bool,
}

impl RowNorm {
    pub(crate) fn layer_norm(eps: f64) -> Self {
        Self {
            layer: "LayerNorm",
            kind: "layer",
            center: true,
            eps: Some(eps),
            offset: 0.,
            cast: Cast::AfterWeight,
            channels_first: false,
        }
    }

    pub(crate) fn rms_norm(eps: Option<f64>) -> Self {
        Self {
            layer: "RmsNorm",
            kind: "rms",
            center: false,
            eps,
            ..Self::layer_norm(1.)
        }
    }

    /// ε for statistics formed for an input of dtype `dtype`.
    pub(crate) fn eps_for(&self, dtype: DType) -> f64 {
        self.eps.unwrap_or(match dtype {
            DType::F64 => f64::EPSILON,
            _ => f32::EPSILON as f64,
        })
    }
}

/// Normalizes the rows of `x` as `norm` says.
pub(crate) fn row_norm(
    x: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<Tensor> {
    let route = checked(x, normalized_shape, weight, bias, norm)?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[weight, bias]);
    }
    let rows = RowsOf::new(x, normalized_shape, norm);
    let y = match route {
        Route::Fused => fused_rows(&rows.of(x)?, rows.len, weight, bias, norm)?,
        Route::Composed => {
            let own = rows.of(&composed::unshared(x)?)?;
            normalize_rows(&own, (rows.len, x.dtype()), weight, bias, norm)?
        }
    };
    rows.back(&y)
}

/// Whether everything fits, and the route to take.
pub(super) fn checked(
    x: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<Route> {
    let layer = norm.layer;
    let eps = norm.eps_for(x.dtype());
    check::eps(layer, eps)?;
    check::finite(layer, "offset", norm.offset)?;
    if norm.channels_first {
        let channels = check::one_axis(layer, normalized_shape)?;
        check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
        check::channels(layer, x, channels)?;
    } else {
        check::trailing(layer, x, normalized_shape)?;
    }
    check::input(
        layer,
        x,
        &check::Param::affine(weight, bias, normalized_shape),
    )?;
    route(layer, x)
}

/// A tensor as the rows that are normalized.
pub(super) struct RowsOf<'a> {
    dims: &'a [usize],
    pub(super) len: usize,
    channels_first: bool,
}

impl<'a> RowsOf<'a> {
    pub(super) fn new(x: &'a Tensor, normalized_shape: &[usize], norm: &RowNorm) -> Self {
        Self {
            dims: x.dims(),
            len: normalized_shape.iter().product(),
            channels_first: norm.channels_first,
        }
    }

    /// `x` with its rows one after the other in memory: every position of a map is one, if the channels come first.
    pub(super) fn of(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.contiguous()?;
        if !self.channels_first {
            return Ok(x);
        }
        swapped(&x.reshape((self.dims[0], self.len, ()))?)?.reshape(((), self.len))
    }

    /// The tensor of these rows.
    pub(super) fn back(&self, rows: &Tensor) -> Result<Tensor> {
        if !self.channels_first {
            return Ok(rows.clone());
        }
        swapped(&rows.reshape((self.dims[0], (), self.len))?)?.reshape(self.dims)
    }
}

/// The rows of `len` elements of `x`, which is contiguous and not empty; the result has the dtype `dtype`.
pub(super) fn normalize_rows(
    x: &Tensor,
    (len, dtype): (usize, DType),
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<Tensor> {
    let rows = x.elem_count() / len;
    let acc = composed::accumulator(dtype);
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    let weight = weight.map(|w| w.reshape(len)? + norm.offset).transpose()?;
    let bias = bias.map(|b| b.reshape(len)).transpose()?;

    let x_rows = x.reshape((rows, len))?.to_dtype(acc)?;
    let y = composed::standardize(&x_rows, norm.center, norm.eps_for(dtype))?.y;
    let y = match norm.cast {
        Cast::AfterWeight => y,
        // The rounded values, with a gradient that is not rounded on its way back.
        Cast::BeforeWeight => {
            let detached = y.detach();
            let rounded = detached.to_dtype(dtype)?.to_dtype(acc)?;
            (y + (rounded - detached)?)?
        }
    };
    composed::scale_shift(&y.reshape((rows, len, 1))?, weight.as_ref(), bias.as_ref())?
        .to_dtype(dtype)?
        .reshape(x.shape())
}

/// `x` has rows of `len` elements and is not empty.
fn fused_rows(
    x: &Tensor,
    len: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<Tensor> {
    let op = Rows::new(norm, x.dtype(), len, Params::of(weight, bias));
    Ok(fused::apply(op, x, &[weight, bias])?.0)
}

/// Layer norm or RMS norm as a node of the graph.
pub(super) struct Rows {
    norm: RowNorm,
    pub(super) spec: RowSpec,
    params: Params,
    /// The dtype of the output, to which the input is not rounded before.
    output: DType,
    stats: OnceLock<Vec<Stats>>,
    /// The output, where it was computed before.
    ready: Slot<CpuStorage>,
}

impl Rows {
    pub(super) fn new(norm: &RowNorm, dtype: DType, len: usize, params: Params) -> Self {
        Self {
            norm: *norm,
            spec: RowSpec {
                len,
                center: norm.center,
                eps: composed::eps_in(composed::accumulator(dtype), norm.eps_for(dtype)),
                round_first: norm.cast == Cast::BeforeWeight,
            },
            params,
            output: dtype,
            stats: OnceLock::new(),
            ready: Slot::new(None),
        }
    }

    /// The same, with what its forward would compute.
    pub(super) fn ready(self, y: CpuStorage, stats: Vec<Stats>) -> Self {
        Self {
            stats: OnceLock::from(stats),
            ready: Slot::new(Some(y)),
            ..self
        }
    }

    /// The factor of each column.
    fn weight<'a, A: Accumulator>(&self, params: &[Arg<'a>]) -> Result<Option<Cow<'a, [A]>>> {
        let mut weight = self.params.weight::<A>(params)?;
        if let (Some(weight), true) = (&mut weight, self.norm.offset != 0.) {
            let offset = A::from_f64(self.norm.offset);
            for w in weight.to_mut() {
                *w += offset;
            }
        }
        Ok(weight)
    }

    fn forward_of<T: Native>(&self, args: &[Arg]) -> Result<CpuStorage> {
        let weight = self.weight(&args[1..])?;
        let bias = self.params.bias(&args[1..])?;
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (y, stats) = T::rows_forward(elements(args[0])?, affine, self.spec);
        let _ = self.stats.set(stats);
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward_of<T: Native>(
        &self,
        args: &[Arg],
        params: bool,
    ) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let weight = self.weight(&args[2..])?;
        let (weight, dy) = (weight.as_deref(), elements(args[1])?);
        let (spec, stats) = (self.spec, fused::saved(self.norm.layer, &self.stats)?);
        Ok(if fused::dtype(&args[0]) == self.output {
            let x = elements(args[0])?;
            self.storages(T::rows_backward(x, dy, weight, stats, spec, params))
        } else {
            let x = elements(args[0])?;
            self.storages(T::rows_backward_unrounded(
                x, dy, weight, stats, spec, params,
            ))
        })
    }

    fn storages<X: WithDType>(&self, grads: Gradients<X>) -> (CpuStorage, Vec<Vec<f64>>) {
        let dparams = self.params.pick(grads.dweight, grads.dbias);
        (X::to_cpu_storage_owned(grads.dx), dparams)
    }
}

impl FusedOp for Rows {
    fn name(&self) -> &'static str {
        self.norm.layer
    }

    fn output(&self, _: DType) -> DType {
        self.output
    }

    fn forward(&self, args: &[Arg]) -> Result<CpuStorage> {
        if let Some(y) = self.ready.take() {
            return Ok(y);
        }
        with_native!(fused::dtype(&args[0]), self.norm.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, args: &[Arg], wanted: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let params = wanted[1..].contains(&true);
        with_native!(self.output, self.norm.layer, T => self.backward_of::<T>(args, params))
    }

    fn backward_composed(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let (x, len) = (args[0], self.spec.len);
        let acc = composed::accumulator(x.dtype());
        let weight = args.get(1).filter(|_| self.params.weight);
        let weight = weight.map(|w| w.to_dtype(acc)?.reshape(len)? + self.norm.offset);
        let grads = composed::backward(
            &x.to_dtype(acc)?.reshape(((), len))?,
            &dy.to_dtype(acc)?.contiguous()?.reshape(((), len, 1))?,
            weight.transpose()?.as_ref(),
            self.norm.center,
            self.spec.eps,
        )?;
        fused::shaped(args, self.params, grads)
    }
}

/// Layer normalization over the trailing axes `normalized_shape`.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken over `normalized_shape` for each row, the
/// variance biased (Ba, Kiros and Hinton, 2016, <https://arxiv.org/abs/1607.06450>).
///
/// # Shapes
/// `x`: `[*, normalized_shape]`; `weight`, `bias`: `normalized_shape`; the result has the shape and dtype of `x`
/// and is contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take `f32` parameters.
///
/// # Errors
/// An input that does not end in `normalized_shape`, parameters that do not fit it, `eps` that is not
/// positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3.], [-5., 5.]], &Device::Cpu)?;
/// let y = candle_norm::ops::layer_norm(&x, 2, None, None, 1e-9)?;
/// assert!((y.get(1)?.to_vec1::<f64>()?[0] + 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn layer_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    row_norm(x, shape.dims(), weight, bias, &RowNorm::layer_norm(eps))
}

/// Root-mean-square normalization over the trailing axes `normalized_shape`.
///
/// `y = x / √(mean(x²) + eps) · (offset + weight)` (Zhang and Sennrich, 2019,
/// <https://arxiv.org/abs/1910.07467>). `eps: None` is the machine epsilon of the dtype that the mean square is
/// formed in: 1.19e-7 for `f16`, `bf16` and `f32`, 2.2e-16 for `f64`, as in PyTorch.
///
/// # Shapes
/// `x`: `[*, normalized_shape]`; `weight`: `normalized_shape`; the result has the shape and dtype of `x` and is
/// contiguous.
///
/// # Errors
/// An input that does not end in `normalized_shape`, a weight that does not fit it, `eps` that is not positive
/// and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Cast};
///
/// let x = Tensor::new(&[[3f64, 4.]], &Device::Cpu)?;
/// let y = ops::rms_norm(&x, 2, None, Some(1e-9), 0., Cast::AfterWeight)?;
/// assert!((y.to_vec2::<f64>()?[0][0] - 3. / 12.5f64.sqrt()).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn rms_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    eps: Option<f64>,
    offset: f64,
    cast: Cast,
) -> Result<Tensor> {
    let shape = normalized_shape.into();
    let norm = RowNorm {
        offset,
        cast,
        ..RowNorm::rms_norm(eps)
    };
    row_norm(x, shape.dims(), weight, None, &norm)
}
