//! A residual connection and the norm after it in one sweep.
//!
//! A candle op has one output, and here are two: the sum and the normalized sum. One pass computes both. The node of the sum runs it and leaves
//! the rest in a slot, from where the node of the norm takes it; each has a backward of its own, and candle adds up what reaches
//! the sum.
//!
//! In half precision the node of the sum is in `f32`, and a third node rounds it: what reaches the sum is then added up in `f32` too.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::fused::{self, Accumulator, Native, Params, Slot, elements, with_native};
use super::row_norm::{Cast, RowNorm, Rows, RowsOf, checked, normalize_rows};
use super::{Route, check, composed};
use crate::kernels::{AffinePair, RowSpec, Stats};

/// The rows of `x + residual`, normalized as `norm` says, and the sum.
pub(crate) fn add_row_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: &[usize],
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<(Tensor, Tensor)> {
    let route = checked(x, normalized_shape, weight, bias, norm)?;
    check::residual(norm.layer, residual, x)?;
    if x.elem_count() == 0 {
        let sum = composed::anchored(&x.contiguous()?, &[residual])?;
        return Ok((composed::empty(&sum, &[weight, bias])?, sum));
    }
    let rows = RowsOf::new(x, normalized_shape, norm);
    let (y, sum) = match route {
        Route::Fused => with_native!(x.dtype(), norm.layer, T => {
            let inputs = [rows.of(x)?, rows.of(residual)?];
            fused_rows::<T>(inputs, rows.len, weight, bias, norm)
        })?,
        Route::Composed => {
            let acc = composed::accumulator(x.dtype());
            let sum = (x.to_dtype(acc)? + residual.to_dtype(acc)?)?;
            let y = normalize_rows(&rows.of(&sum)?, (rows.len, x.dtype()), weight, bias, norm)?;
            return Ok((rows.back(&y)?, sum.to_dtype(x.dtype())?.contiguous()?));
        }
    };
    Ok((rows.back(&y)?, rows.back(&sum)?))
}

/// Both inputs have rows of `len` elements and are not empty.
fn fused_rows<T: Native>(
    [x, residual]: [Tensor; 2],
    len: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    norm: &RowNorm,
) -> Result<(Tensor, Tensor)> {
    let op = Rows::new(norm, x.dtype(), len, Params::of(weight, bias));
    let rest = Arc::new(Slot::new(None));
    let add = Add::<T> {
        layer: norm.layer,
        spec: op.spec,
        weight: weight.map(|w| copied(w, norm.offset)).transpose()?,
        bias: bias.map(|b| copied(b, 0.)).transpose()?,
        rest: rest.clone(),
    };
    let sum = x.apply_op2(&residual, add)?;
    let Some(rest) = rest.take() else {
        return check::internal(norm.layer, "the sum to have been computed");
    };
    let op = op.ready(T::to_cpu_storage_owned(rest.y), rest.stats);
    let (y, _) = fused::apply(op, &sum, &[weight, bias])?;
    if sum.dtype() == x.dtype() {
        return Ok((y, sum));
    }
    let rounded = T::to_cpu_storage_owned(rest.rounded);
    let round = Round {
        layer: norm.layer,
        dtype: x.dtype(),
        ready: Slot::new(Some(rounded)),
    };
    Ok((y, sum.apply_op1(round)?))
}

/// The elements of a parameter plus `offset`, in the precision that it is multiplied in: the node of the sum has no argument left for it.
fn copied<A: Accumulator>(param: &Tensor, offset: f64) -> Result<Vec<A>> {
    let wide = param.detach().to_dtype(A::DTYPE)?.flatten_all()?;
    let mut values = wide.to_vec1::<A>()?;
    if offset != 0. {
        let offset = A::from_f64(offset);
        for v in &mut values {
            *v += offset;
        }
    }
    Ok(values)
}

/// What the node of the sum computes beside it.
struct Rest<T> {
    rounded: Vec<T>,
    y: Vec<T>,
    stats: Vec<Stats>,
}

/// `x + residual` as a node of the graph, in the precision of the accumulator, which normalizes the sum while it is at it.
struct Add<T: Native> {
    layer: &'static str,
    spec: RowSpec,
    weight: Option<Vec<T::Acc>>,
    bias: Option<Vec<T::Acc>>,
    rest: Arc<Slot<Rest<T>>>,
}

impl<T: Native> CustomOp2 for Add<T> {
    fn name(&self) -> &'static str {
        self.layer
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let affine = AffinePair {
            weight: self.weight.as_deref(),
            bias: self.bias.as_deref(),
        };
        let (x, residual) = ((x, x_layout), (residual, residual_layout));
        let added = T::rows_add_forward(elements(x)?, elements(residual)?, affine, self.spec);
        self.rest.put(Rest {
            rounded: added.rounded,
            y: added.y,
            stats: added.stats,
        });
        let sum = <T::Acc as candle_core::WithDType>::to_cpu_storage_owned(added.sum);
        Ok((sum, x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        sum: &Tensor,
        dsum: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let what = "the gradient of the sum";
        check::shape(self.layer, what, dsum, sum.dims())?;
        check::dtype(self.layer, what, dsum, sum.dtype())?;
        let dsum = dsum.to_dtype(x.dtype())?;
        let wanted = |t: &Tensor| t.track_op().then(|| dsum.clone());
        Ok((wanted(x), wanted(residual)))
    }
}

/// The sum in half precision as a node of the graph.
struct Round {
    layer: &'static str,
    dtype: DType,
    ready: Slot<CpuStorage>,
}

impl CustomOp1 for Round {
    fn name(&self) -> &'static str {
        self.layer
    }

    fn cpu_fwd(&self, _: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match self.ready.take() {
            Some(rounded) => Ok((rounded, layout.shape().clone())),
            None => check::internal(self.layer, "the sum to have been rounded"),
        }
    }

    fn bwd(&self, sum: &Tensor, _: &Tensor, dsum: &Tensor) -> Result<Option<Tensor>> {
        let what = "the gradient of the sum";
        check::shape(self.layer, what, dsum, sum.dims())?;
        check::dtype(self.layer, what, dsum, self.dtype)?;
        dsum.to_dtype(sum.dtype()).map(Some)
    }
}

/// [`layer_norm`](super::layer_norm) of `x + residual`, and the sum itself: `(normalized, sum)`.
///
/// `sum = x + residual`, rounded to the dtype once; `normalized` is the layer norm of the sum before it is rounded, and is rounded once as well. In `f32` and
/// `f64` both are what adding first and normalizing then gives; in half precision `normalized` is closer to the mathematics. The sum is the residual of the next block. On the CPU one pass over memory computes both, but each is a node of
/// its own: gradients flow through either or both.
///
/// # Shapes
/// `x`, `residual`: `[*, normalized_shape]`, the same; `weight`, `bias`: `normalized_shape`; both results have the shape and dtype of `x` and
/// are contiguous. `f16`, `bf16`, `f32`, `f64`; half-precision inputs also take `f32` parameters.
///
/// # Errors
/// Those of [`layer_norm`](super::layer_norm); a residual of another shape, dtype or device than `x`.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[1f64, 1.]], &Device::Cpu)?;
/// let (y, sum) = candle_norm::ops::add_layer_norm(&x, &residual, 2, None, None, 1e-9)?;
/// assert_eq!(sum.to_vec2::<f64>()?, [[2., 4.]]);
/// assert!((y.to_vec2::<f64>()?[0][1] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let (shape, norm) = (normalized_shape.into(), RowNorm::layer_norm(eps));
    add_row_norm(x, residual, shape.dims(), weight, bias, &norm)
}

/// [`rms_norm`](super::rms_norm) of `x + residual`, and the sum itself: `(normalized, sum)`.
///
/// `sum = x + residual`, rounded to the dtype once; `normalized` is the RMS norm of the sum before it is rounded, and is rounded once as well. In `f32` and
/// `f64` both are what adding first and normalizing then gives; in half precision `normalized` is closer to the mathematics. The sum is the residual of the next block. On the CPU one pass over memory computes both, but each is a node of
/// its own: gradients flow through either or both.
///
/// # Shapes
/// `x`, `residual`: `[*, normalized_shape]`, the same; `weight`: `normalized_shape`; both results have the shape and dtype of `x` and are
/// contiguous.
///
/// # Errors
/// Those of [`rms_norm`](super::rms_norm); a residual of another shape, dtype or device than `x`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Cast};
///
/// let x = Tensor::new(&[[1f64, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[2f64, 1.]], &Device::Cpu)?;
/// let (y, sum) = ops::add_rms_norm(&x, &residual, 2, None, Some(1e-9), 0., Cast::AfterWeight)?;
/// assert_eq!(sum.to_vec2::<f64>()?, [[3., 4.]]);
/// assert!((y.to_vec2::<f64>()?[0][0] - 3. / 12.5f64.sqrt()).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    normalized_shape: impl Into<Shape>,
    weight: Option<&Tensor>,
    eps: Option<f64>,
    offset: f64,
    cast: Cast,
) -> Result<(Tensor, Tensor)> {
    let shape = normalized_shape.into();
    let norm = RowNorm {
        offset,
        cast,
        ..RowNorm::rms_norm(eps)
    };
    add_row_norm(x, residual, shape.dims(), weight, None, &norm)
}
