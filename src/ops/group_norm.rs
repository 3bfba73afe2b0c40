//! Normalization of each group of channels of a sample by its own statistics.

use std::sync::OnceLock;

use candle_core::{CpuStorage, Result, Tensor};

use super::fused::{self, Arg, FusedOp, Native, Params, elements, with_native};
use super::{Route, check, composed, route};
use crate::kernels::{AffinePair, GroupSpec, Shape, Stats};

/// Group normalization of `x` over `num_groups` groups of channels on axis 1.
///
/// `y = (x − mean) / √(var + eps) · weight + bias`, the statistics taken for each sample over the `C / num_groups`
/// channels of a group and all of space, the variance biased; `weight` and `bias` are per channel (Wu and He,
/// 2018, <https://arxiv.org/abs/1803.08494>).
///
/// # Shapes
/// `x`: `[N, C, *]`; `weight`, `bias`: `[C]`; the result has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// An input of rank below 2, `num_groups` that does not divide `C`, parameters that do not fit, `eps` that is
/// not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f64, 3., 10., 30.]], &Device::Cpu)?;
/// let y = candle_norm::ops::group_norm(&x, 2, None, None, 1e-9)?;
/// assert!((y.to_vec2::<f64>()?[0][3] - 1.).abs() < 1e-8);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn group_norm(
    x: &Tensor,
    num_groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let layer = "GroupNorm";
    check::eps(layer, eps)?;
    check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
    let (n, c) = (x.dims()[0], x.dims()[1]);
    check::groups(layer, num_groups, c)?;
    check::input(layer, x, &check::Param::affine(weight, bias, &[c]))?;
    let route = route(layer, x)?;
    if x.elem_count() == 0 {
        return composed::empty(x, &[weight, bias]);
    }
    if route == Route::Fused {
        let op = Groups::new(layer, x, num_groups, weight, bias, eps);
        return Ok(fused::apply(op, x, &[weight, bias])?.0);
    }
    let acc = composed::accumulator(x.dtype());
    let groups = composed::unshared(x)?
        .to_dtype(acc)?
        .reshape((n * num_groups, ()))?;
    let y = composed::standardize(&groups, true, eps)?.y;
    let [weight, bias] = composed::parameters(weight, bias, acc)?;
    composed::scale_shift(&y.reshape((n, c, ()))?, weight.as_ref(), bias.as_ref())?
        .to_dtype(x.dtype())?
        .reshape(x.shape())
}

/// Group or instance norm as a node of the graph.
pub(super) struct Groups {
    layer: &'static str,
    spec: GroupSpec,
    params: Params,
    stats: OnceLock<Vec<Stats>>,
}

impl Groups {
    /// `x` is `[N, C, *]`, and not empty.
    pub(super) fn new(
        layer: &'static str,
        x: &Tensor,
        num_groups: usize,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> Self {
        Self {
            layer,
            spec: GroupSpec {
                shape: shape_of(x),
                num_groups,
                eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
            },
            params: Params::of(weight, bias),
            stats: OnceLock::new(),
        }
    }

    /// What each group was normalized by, sample by sample.
    pub(super) fn stats(&self) -> Result<&[Stats]> {
        fused::saved(self.layer, &self.stats).map(Vec::as_slice)
    }

    fn forward_of<T: Native>(&self, args: &[Arg]) -> Result<CpuStorage> {
        let (weight, bias) = (
            self.params.weight(&args[1..])?,
            self.params.bias(&args[1..])?,
        );
        let affine = AffinePair {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
        };
        let (y, stats) = T::groups_forward(elements(args[0])?, affine, self.spec);
        let _ = self.stats.set(stats);
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward_of<T: Native>(&self, args: &[Arg]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        let weight = self.params.weight(&args[2..])?;
        let (x, dy) = (elements(args[0])?, elements(args[1])?);
        let stats = self.stats()?;
        let grads = T::groups_backward(x, dy, weight.as_deref(), stats, self.spec);
        let dparams = self.params.pick(grads.dweight, grads.dbias);
        Ok((T::to_cpu_storage_owned(grads.dx), dparams))
    }
}

/// The axes of `x` `[N, C, *]`, not empty, as the kernels see them.
pub(super) fn shape_of(x: &Tensor) -> Shape {
    let (outer, channels) = (x.dims()[0], x.dims()[1]);
    Shape {
        outer,
        channels,
        inner: x.elem_count() / (outer * channels),
    }
}

impl FusedOp for Groups {
    fn name(&self) -> &'static str {
        self.layer
    }

    fn forward(&self, args: &[Arg]) -> Result<CpuStorage> {
        with_native!(fused::dtype(&args[0]), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, args: &[Arg], _: &[bool]) -> Result<(CpuStorage, Vec<Vec<f64>>)> {
        with_native!(fused::dtype(&args[0]), self.layer, T => self.backward_of::<T>(args))
    }

    fn backward_composed(&self, args: &[&Tensor], dy: &Tensor) -> Result<Vec<Tensor>> {
        let Shape {
            outer, channels, ..
        } = self.spec.shape;
        let x = args[0];
        let acc = composed::accumulator(x.dtype());
        let weight = args.get(1).filter(|_| self.params.weight);
        let weight = weight.map(|w| w.to_dtype(acc)).transpose()?;
        let grads = composed::backward(
            &x.to_dtype(acc)?
                .reshape((outer * self.spec.num_groups, ()))?,
            &dy.to_dtype(acc)?
                .contiguous()?
                .reshape((outer, channels, ()))?,
            weight.as_ref(),
            true,
            self.spec.eps,
        )?;
        fused::shaped(args, self.params, grads)
    }
}
