//! Weight normalization around candle-nn's linear layers and convolutions.

mod build;
pub(super) mod check;

use candle_core::{Result, Tensor, Var};
use candle_nn::{Module, VarBuilder};

use super::names::Names;
use super::norm::Norm;
use super::options::NormOptions;
use super::params::{BIAS, DIRECTION, MAGNITUDE, get, name_in, stored};
pub(crate) use super::weighted::Plain;
pub use super::weighted::Weighted;
use super::weighted::initial;
use crate::ops;
use crate::ops::linear_map::LinearMap;
pub use build::*;

const LAYER: &str = "WeightNorm";

/// Configuration of [`WeightNorm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct WeightNormOptions {
    /// The axis of the weight that keeps a magnitude for each index; `None` has one for the whole
    /// weight. Default: axis 0, the outputs of linear layers and convolutions, and, as in PyTorch,
    /// the inputs of transposed convolutions.
    pub dim: Option<usize>,
}

impl Default for WeightNormOptions {
    fn default() -> Self {
        Self { dim: Some(0) }
    }
}

impl From<Option<usize>> for WeightNormOptions {
    fn from(dim: Option<usize>) -> Self {
        Self { dim }
    }
}

impl NormOptions for WeightNormOptions {
    const NAMES: Names = Names::new(&["weight"], &["wn"], false);

    fn parse(argument: Option<&str>) -> Option<Self> {
        argument.is_none().then(Self::default)
    }

    fn has_bias(&self) -> bool {
        false
    }

    fn channels(&self, _: usize, _: VarBuilder) -> Result<Box<dyn Norm>> {
        check::goes_around("NormConfig")
    }

    fn features(&self, _: usize, _: VarBuilder) -> Result<Box<dyn Norm>> {
        check::goes_around("NormConfig")
    }
}

/// Weight normalization: a layer whose weight is learned as a magnitude and a direction.
///
/// `w = g · v / ‖v‖`, and `y` is that of the layer `L` with the weight `w`.
///
/// Where:
/// - `v` is the direction, of the weight's shape; its norm is taken over all axes but `dim`, or
///   over all of them;
/// - `g` is the magnitude, of size 1 on all axes but `dim`, or a scalar;
/// - `L` is candle-nn's [`Linear`](candle_nn::Linear), [`Conv1d`](candle_nn::Conv1d),
///   [`Conv2d`](candle_nn::Conv2d), [`ConvTranspose1d`](candle_nn::ConvTranspose1d) or
///   [`ConvTranspose2d`](candle_nn::ConvTranspose2d).
///
/// Salimans and Kingma, 2016, <https://arxiv.org/abs/1602.07868>. It sees neither batch nor mode,
/// so it is a [`Module`]. A row of zeros in `v` gives a weight and gradients of zero.
///
/// Every gradient is right on the CPU too, where candle's own `Conv1d` and `ConvTranspose1d` are
/// not: convolutions run through candle's two-dimensional ones. [`bake`](Self::bake) hands out the
/// plain candle-nn layer, with candle's own behavior.
#[derive(Debug, Clone)]
pub struct WeightNorm<L: Weighted> {
    g: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
    options: WeightNormOptions,
    config: L::Config,
}

impl<L: Weighted> WeightNorm<L> {
    /// Takes `g` and `v`, or the plain `weight` of a checkpoint without them, from `vb`.
    pub(crate) fn new(
        inputs: usize,
        outputs: usize,
        kernel_size: usize,
        config: L::Config,
        with_bias: bool,
        options: WeightNormOptions,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let map = L::map(&config);
        let shape = map.weight_shape(LAYER, inputs, outputs, kernel_size)?;
        let dim = options.dim;
        check::dim(LAYER, dim, &shape)?;
        if !with_bias {
            check::no_stored_bias(LAYER, stored(vb, &outputs.into(), BIAS))?;
        }
        let (weight_init, bias_init) = initial(map, inputs, outputs, kernel_size);
        let bias = with_bias
            .then(|| vb.get_with_hints(outputs, name_in(vb, BIAS), bias_init))
            .transpose()?;
        let (g_name, v_name) = (name_in(vb, MAGNITUDE), name_in(vb, DIRECTION));
        let mut plain = None;
        if !vb.contains_tensor(v_name) && vb.contains_tensor("weight") {
            let weight = vb.get(shape.as_slice(), "weight")?;
            // A checkpoint holds plain tensors, which become variables here; a VarMap makes its own
            // below.
            if !weight.is_variable() {
                return Self::from_weight(&weight, bias.as_ref(), config, options);
            }
            plain = Some(weight.detach().copy()?);
        }
        let fresh = !vb.contains_tensor(g_name);
        let g_shape = ops::magnitude_shape(&shape, dim);
        let v = vb.get_with_hints(shape, v_name, weight_init)?;
        let g = get(vb, g_shape, MAGNITUDE, 1.)?;
        if let Some(plain) = plain {
            Var::from_tensor(&v)?.set(&plain)?;
        }
        if fresh && g.is_variable() {
            Var::from_tensor(&g)?.set(&ops::norms(&v.detach(), dim)?)?;
        }
        Ok(Self {
            g,
            v,
            bias,
            options,
            config,
        })
    }

    fn from_weight(
        weight: &Tensor,
        bias: Option<&Tensor>,
        config: L::Config,
        options: WeightNormOptions,
    ) -> Result<Self> {
        let dim = options.dim;
        check::float(LAYER, "weight", weight)?;
        check::dim(LAYER, dim, weight.dims())?;
        let weight = weight.detach().contiguous()?.copy()?;
        let var = |t: &Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(t)?.into_inner());
        Ok(Self {
            g: var(&ops::norms(&weight, dim)?)?,
            v: var(&weight)?,
            bias: bias.map(|b| var(&b.detach().copy()?)).transpose()?,
            options,
            config,
        })
    }

    /// A layer that starts as `layer`: `v` is its weight, `g` the norms of it. Its parameters are
    /// new variables, which [`parameters`](Norm::parameters) hands to an optimizer.
    ///
    /// # Errors
    /// A `dim` that the weight does not have, a weight of integers.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Linear, Module};
    /// use candle_norm::{WeightNorm, WeightNormOptions};
    ///
    /// let trained = Linear::new(Tensor::new(&[[3f64, 4.]], &Device::Cpu)?, None);
    /// let layer = WeightNorm::from_layer(&trained, WeightNormOptions::default())?;
    /// assert_eq!(layer.g().to_vec2::<f64>()?, [[5.]]);
    /// let x = Tensor::ones((1, 2), DType::F64, &Device::Cpu)?;
    /// assert!((layer.forward(&x)?.to_vec2::<f64>()?[0][0] - 7.).abs() < 1e-12);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_layer(layer: &L, options: WeightNormOptions) -> Result<Self> {
        Self::from_weight(layer.weight(), layer.bias(), layer.config(), options)
    }

    /// Sets the variables of this layer so that it computes what `layer` does.
    ///
    /// # Errors
    /// A weight or bias of another shape, or of integers; parameters that are not variables.
    /// Nothing is changed then.
    pub fn copy_from(&self, layer: &L) -> Result<()> {
        let weight = layer.weight().detach();
        check::shape(LAYER, "weight", &weight, self.v.dims())?;
        check::float(LAYER, "weight", &weight)?;
        let g = ops::norms(&weight, self.options.dim)?;
        let mut values = vec![(&self.v, weight), (&self.g, g)];
        match (&self.bias, layer.bias()) {
            (Some(mine), Some(theirs)) => {
                check::shape(LAYER, "bias", theirs, mine.dims())?;
                check::float(LAYER, "bias", theirs)?;
                values.push((mine, theirs.detach()));
            }
            (Some(mine), None) => values.push((mine, mine.zeros_like()?.detach())),
            (None, theirs) => check::no_bias(LAYER, theirs)?,
        }
        assign(values)
    }

    /// The weight that the layer multiplies by: `g · v / ‖v‖`.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn weight(&self) -> Result<Tensor> {
        ops::weight_norm(&self.v, &self.g, self.options.dim)
    }

    /// The magnitude.
    pub fn g(&self) -> &Tensor {
        &self.g
    }

    /// The direction, up to its length.
    pub fn v(&self) -> &Tensor {
        &self.v
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The axis that keeps a magnitude for each index.
    pub fn dim(&self) -> Option<usize> {
        self.options.dim
    }

    /// The configuration.
    pub fn options(&self) -> &WeightNormOptions {
        &self.options
    }

    /// The configuration of the layer inside.
    pub fn config(&self) -> L::Config {
        self.config
    }

    /// The plain candle-nn layer with the weight of now, for inference.
    ///
    /// That layer runs candle's own code: on the CPU a [`Conv1d`](candle_nn::Conv1d) has a wrong
    /// weight gradient, and a [`ConvTranspose1d`](candle_nn::ConvTranspose1d) has none and is wrong
    /// without padding at batch 2 and more. This crate's [`Conv1d`](crate::Conv1d) and
    /// [`ConvTranspose1d`](crate::ConvTranspose1d) are made of them by `from`, and are right.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn bake(&self) -> Result<L> {
        let bias = self.bias.as_ref().map(Tensor::detach);
        Ok(L::from_parts(self.weight()?.detach(), bias, self.config))
    }

    /// Sets `g` and the bias so that the outputs for `xs` have mean 0 and variance 1 in each
    /// channel, as Salimans and Kingma initialize from a first batch. Returns these outputs.
    ///
    /// # Errors
    /// A layer without bias; a `dim` that is not the axis of the outputs (0, for transposed
    /// convolutions 1); an output that is the same over the whole batch; parameters that are not
    /// variables. Nothing is changed then.
    pub fn init_from_batch(&self, xs: &Tensor) -> Result<Tensor> {
        let map = L::map(&self.config);
        let (axis, outputs) = map.outputs(&self.v);
        check::magnitude_per_output(
            LAYER,
            self.options.dim,
            self.g.elem_count(),
            (axis, outputs),
        )?;
        let bias = check::bias(LAYER, self.bias())?;
        let ones = self.g.ones_like()?.detach();
        let unit = ops::weight_norm(&self.v.detach(), &ones, self.options.dim)?;
        let t = map.apply(LAYER, &xs.detach(), &unit, None)?;
        let filled = (t.elem_count() > 0).then_some(());
        check::not_empty(LAYER, filled, xs)?;
        // Batch normalization sees channels on axis 1.
        let t = match map {
            LinearMap::Dense => t.reshape(((), outputs))?,
            LinearMap::Convolution(_) => t,
        };
        let count = t.elem_count() / outputs;
        check::more_than_one_output(LAYER, count, xs)?;
        let (_, statistics) = ops::batch_norm(&t, None, None, f64::MIN_POSITIVE)?;
        let statistics = check::not_empty(LAYER, statistics, xs)?;
        let count = count as f64;
        let biased = (statistics.var * ((count - 1.) / count))?;
        check::varying(LAYER, &biased)?;
        let g = biased.sqrt()?.recip()?;
        let b = (statistics.mean.neg()? * &g)?;
        let g = g.to_dtype(self.g.dtype())?.reshape(self.g.shape())?;
        assign(vec![(&self.g, g), (bias, b.to_dtype(bias.dtype())?)])?;
        self.forward(xs)
    }
}

/// A norm that goes around a layer of any kind.
pub(crate) trait Around: Norm {
    /// The layer with the weight of now, of plain values.
    fn baked(&self) -> Result<Plain>;
}

impl<L: Weighted> Around for WeightNorm<L> {
    fn baked(&self) -> Result<Plain> {
        let map = L::map(&self.config);
        Ok(Plain::of_values(map, &self.weight()?, self.bias()))
    }
}

/// Sets variables to values of their shape, all or none.
fn assign(values: Vec<(&Tensor, Tensor)>) -> Result<()> {
    let mut vars = vec![];
    for (param, value) in values {
        check::variable(LAYER, param)?;
        check::same_device(LAYER, "the new value", &value, param.device())?;
        vars.push((
            Var::from_tensor(param)?,
            value.to_dtype(param.dtype())?.copy()?,
        ));
    }
    for (var, value) in vars {
        var.set(&value)?;
    }
    Ok(())
}

impl<L: Weighted> Module for WeightNorm<L> {
    /// The layer `L` on `xs`, with the normalized weight.
    ///
    /// # Shapes
    /// Those of `L`; the output is contiguous.
    ///
    /// # Errors
    /// An input that does not fit `L` in rank, channels, size, dtype or device.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        L::map(&self.config).apply(LAYER, xs, &self.weight()?, self.bias())
    }
}

impl<L: Weighted> Norm for WeightNorm<L> {
    fn kind(&self) -> &'static str {
        WeightNormOptions::NAMES.name
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut named = vec![
            (MAGNITUDE[0], self.g.clone()),
            (DIRECTION[0], self.v.clone()),
        ];
        named.extend(self.bias.iter().map(|b| (BIAS[0], b.clone())));
        named
    }

    /// Sets `g` to the norms of `v`, so that the weight is `v`.
    fn reset(&self) -> Result<()> {
        let norms = ops::norms(&self.v.detach(), self.options.dim)?;
        if self.g.is_variable() {
            assign(vec![(&self.g, norms)])?;
        }
        Ok(())
    }
}
