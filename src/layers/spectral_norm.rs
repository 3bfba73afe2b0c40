//! Spectral normalization around candle-nn's linear layers and convolutions.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use candle_core::{DType, Result, Tensor, TensorId, Var};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Init, Linear, ModuleT, VarBuilder,
};

use super::norm::Norm;
use super::params::{BIAS, LEFT_VECTOR, ORIGINAL, RIGHT_VECTOR, name_in, path, stored};
use super::weight_norm::check;
use super::weighted::{Weighted, initial};
use crate::ops;
use crate::ops::check as rules;
use crate::ops::linear_map::LinearMap;
use candle_norm_support::host;

const LAYER: &str = "SpectralNorm";

/// Configuration of [`SpectralNorm`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct SpectralNormOptions {
    /// Steps of the power iteration in each training forward. Default: 1.
    pub n_power_iterations: usize,
    /// ε, the least length that a vector of the iteration is divided by. Default: 1e-12.
    pub eps: f64,
    /// The axis of the weight that is the first of the matrix. Default: `None`, the axis of the
    /// outputs: 0, and 1 for transposed convolutions.
    pub dim: Option<usize>,
}

impl Default for SpectralNormOptions {
    fn default() -> Self {
        Self {
            n_power_iterations: 1,
            eps: 1e-12,
            dim: None,
        }
    }
}

/// Spectral normalization: a layer whose weight is divided by its largest singular value.
///
/// `w̄ = w / σ` with `σ = uᵀ · W · v`, and `y` is that of the layer `L` with the weight `w̄`.
///
/// Where:
/// - `W` is the weight as a matrix, the axis `dim` first, the others flattened;
/// - `u` and `v` are vectors of length 1. In training, a step of the power iteration comes before:
///   `u ← W v / ‖W v‖`, `v ← Wᵀ u / ‖Wᵀ u‖`. They are constants to the gradient;
/// - `L` is candle-nn's [`Linear`], [`Conv1d`], [`Conv2d`], [`ConvTranspose1d`] or
///   [`ConvTranspose2d`].
///
/// Miyato et al., 2018, <https://arxiv.org/abs/1802.05957>. Training changes `u` and `v`, and
/// inference uses them as they are, so the layer is a [`ModuleT`]. They are `f32` (`f64` in an
/// `f64` model), variables of the model that no optimizer changes
/// ([`trainable_vars`](crate::trainable_vars) leaves them out), and `Norm::buffers` has them.
/// Threads that train the layer lose no step. A discriminator that is called twice makes two.
///
/// A zero weight gives zeros, and gradients of zero. [`bake`](Self::bake) gives the plain layer
/// with the weight of now.
#[derive(Debug, Clone)]
pub struct SpectralNorm<L: Weighted> {
    weight: Tensor,
    vectors: Vectors,
    bias: Option<Tensor>,
    options: SpectralNormOptions,
    config: L::Config,
    dim: usize,
}

/// The singular vectors of a weight.
#[derive(Debug, Clone)]
struct Vectors {
    u: Var,
    v: Var,
    /// Held while both are read or written.
    lock: Arc<Mutex<()>>,
}

/// The locks in use, by the identity of `u`: layers of the same variables share one.
static LOCKS: LazyLock<Mutex<HashMap<TensorId, Weak<Mutex<()>>>>> = LazyLock::new(Default::default);

impl Vectors {
    fn new(u: &Tensor, v: &Tensor) -> Result<Self> {
        let (u, v) = (Var::from_tensor(u)?, Var::from_tensor(v)?);
        let mut locks = LOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        let known = locks.get(&u.id()).and_then(Weak::upgrade);
        let lock = known.unwrap_or_default();
        locks.insert(u.id(), Arc::downgrade(&lock));
        drop(locks);
        Ok(Self { u, v, lock })
    }

    fn guard(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies that no later step reaches, by the proof that the lock is held.
    fn copies(&self, _: &MutexGuard<()>) -> Result<[Tensor; 2]> {
        let copy = |t: &Var| t.as_detached_tensor().copy();
        Ok([copy(&self.u)?, copy(&self.v)?])
    }

    fn put(&self, _: &MutexGuard<()>, [u, v]: &[Tensor; 2]) -> Result<()> {
        self.u.set(&u.copy()?)?;
        self.v.set(&v.copy()?)
    }

    fn set(&self, vectors: &[Tensor; 2]) -> Result<()> {
        self.put(&self.guard(), vectors)
    }

    /// The vectors before `step`, if no other thread has made a step since.
    fn take_back(&self, step: &[Tensor; 2], before: &[Tensor; 2]) -> Result<()> {
        let guard = self.guard();
        let [now, _] = self.copies(&guard)?;
        let values = |t: &Tensor| host::vector::<f64>(&t.to_dtype(DType::F64)?);
        match values(&now)? == values(&step[0])? {
            true => self.put(&guard, before),
            false => Ok(()),
        }
    }
}

/// The dtype of the vectors in a model.
fn dtype_in(model: DType) -> DType {
    match model {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

impl<L: Weighted> SpectralNorm<L> {
    fn build(
        (inputs, outputs, kernel_size): (usize, usize, usize),
        config: L::Config,
        with_bias: bool,
        options: SpectralNormOptions,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let map = L::map(&config);
        let shape = map.weight_shape(LAYER, inputs, outputs, kernel_size)?;
        let dim = checked(map, &shape, &options)?;
        if !with_bias {
            check::no_stored_bias(LAYER, stored(vb, &outputs.into(), BIAS))?;
        }
        let (weight_init, bias_init) = initial(map, inputs, outputs, kernel_size);
        let bias = with_bias
            .then(|| vb.get_with_hints(outputs, name_in(vb, BIAS), bias_init))
            .transpose()?;
        let name = name_in(vb, ORIGINAL);
        let mut plain = None;
        if name == ORIGINAL[2] || (!vb.contains_tensor(name) && vb.contains_tensor("weight")) {
            let weight = vb.get(shape.as_slice(), "weight")?;
            // The tensors of a checkpoint become variables here; a VarMap makes its own below.
            if !weight.is_variable() || name == ORIGINAL[2] {
                let vectors = vectors_of_big_gan(&weight, dim, options.eps, vb)?;
                return Self::of_values(&weight, bias.as_ref(), vectors, config, options, dim);
            }
            plain = Some(weight.detach().copy()?);
        }
        let name = if plain.is_some() { ORIGINAL[0] } else { name };
        let weight = vb.get_with_hints(shape, name, weight_init)?;
        if let Some(plain) = plain {
            Var::from_tensor(&weight)?.set(&plain)?;
        }
        let vectors = vectors_in(&weight, dim, options.eps, vb)?;
        Ok(Self {
            weight,
            vectors,
            bias,
            options,
            config,
            dim,
        })
    }

    fn of_values(
        weight: &Tensor,
        bias: Option<&Tensor>,
        vectors: Option<[Tensor; 2]>,
        config: L::Config,
        options: SpectralNormOptions,
        dim: usize,
    ) -> Result<Self> {
        let weight = weight.detach().contiguous()?.copy()?;
        let [u, v] = match vectors {
            Some(vectors) => vectors,
            None => ops::fresh_vectors(&weight, dim, dtype_in(weight.dtype()), options.eps)?,
        };
        let var = |t: &Tensor| Ok::<_, candle_core::Error>(Var::from_tensor(t)?.into_inner());
        Ok(Self {
            vectors: Vectors::new(&u, &v)?,
            weight: var(&weight)?,
            bias: bias.map(|b| var(&b.detach().copy()?)).transpose()?,
            options,
            config,
            dim,
        })
    }

    /// A layer of the weight and bias of `layer`, whose values it takes over as new variables, with
    /// vectors of 15 steps from a random start.
    ///
    /// # Errors
    /// Options out of range, a weight of integers.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{Linear, ModuleT};
    /// use candle_norm::SpectralNorm;
    ///
    /// let trained = Linear::new(Tensor::new(&[[3f64, 0.], [0., 0.5]], &Device::Cpu)?, None);
    /// let layer = SpectralNorm::from_layer(&trained, Default::default())?;
    /// let y = layer.forward_t(&Tensor::ones((1, 2), DType::F64, &Device::Cpu)?, false)?;
    /// assert!((y.to_vec2::<f64>()?[0][0] - 1.).abs() < 1e-9);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_layer(layer: &L, options: SpectralNormOptions) -> Result<Self> {
        let (weight, config) = (layer.weight(), layer.config());
        check::float(LAYER, "weight", weight)?;
        let dim = checked(L::map(&config), weight.dims(), &options)?;
        Self::of_values(weight, layer.bias(), None, config, options, dim)
    }

    /// The weight that inference multiplies by, by the vectors of now.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn weight(&self) -> Result<Tensor> {
        let [u, v] = self.vectors.copies(&self.vectors.guard())?;
        ops::spectral_norm(&self.weight, &u, &v, self.dim)
    }

    /// The weight as it is learned.
    pub fn original(&self) -> &Tensor {
        &self.weight
    }

    /// Copies of `u` and `v`, both from between two steps.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn vectors(&self) -> Result<[Tensor; 2]> {
        self.vectors.copies(&self.vectors.guard())
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The configuration.
    pub fn options(&self) -> &SpectralNormOptions {
        &self.options
    }

    /// The configuration of the layer inside.
    pub fn config(&self) -> L::Config {
        self.config
    }

    /// The plain candle-nn layer with the weight of now, for inference.
    ///
    /// # Errors
    /// Only those of the device.
    pub fn bake(&self) -> Result<L> {
        let bias = self.bias.as_ref().map(Tensor::detach);
        Ok(L::from_parts(self.weight()?.detach(), bias, self.config))
    }

    fn apply(&self, xs: &Tensor, [u, v]: &[Tensor; 2]) -> Result<Tensor> {
        let weight = ops::spectral_norm(&self.weight, u, v, self.dim)?;
        L::map(&self.config).apply(LAYER, xs, &weight, self.bias())
    }

    /// The vectors before and after the steps of a training forward.
    fn step(&self) -> Result<[[Tensor; 2]; 2]> {
        let guard = self.vectors.guard();
        let before = self.vectors.copies(&guard)?;
        let SpectralNormOptions {
            n_power_iterations,
            eps,
            ..
        } = self.options;
        let [u, v] = &before;
        let after = ops::power_iteration(&self.weight, [u, v], self.dim, n_power_iterations, eps)?;
        self.vectors.put(&guard, &after)?;
        Ok([before, after])
    }
}

/// Checks options, and finds the axis of the weight that comes first.
fn checked(map: LinearMap, weight: &[usize], options: &SpectralNormOptions) -> Result<usize> {
    rules::eps(LAYER, options.eps)?;
    check::dim(LAYER, options.dim, weight)?;
    let outputs = match map {
        LinearMap::Convolution(g) if g.transposed => 1,
        _ => 0,
    };
    Ok(options.dim.unwrap_or(outputs))
}

/// The vectors that BigGAN's file has beside a weight, if it does: its `u0`, and one step from
/// there.
fn vectors_of_big_gan(
    weight: &Tensor,
    dim: usize,
    eps: f64,
    vb: &VarBuilder,
) -> Result<Option<[Tensor; 2]>> {
    const U: &str = "u0";
    if !vb.contains_tensor(U) {
        return Ok(None);
    }
    let (outputs, _) = ops::sizes(weight.dims(), dim);
    let dtype = dtype_in(weight.dtype());
    let u = vb.get_with_hints_dtype((1, outputs), U, Init::Const(0.), dtype)?;
    rules::statistic(LAYER, &path(vb, U), &u, false)?;
    ops::vectors_of_u(weight, &u.flatten_all()?, dim, eps).map(Some)
}

/// The vectors of `vb`, or fresh ones, which become variables of a `VarMap`.
fn vectors_in(weight: &Tensor, dim: usize, eps: f64, vb: &VarBuilder) -> Result<Vectors> {
    let dtype = dtype_in(vb.dtype());
    let (outputs, rest) = ops::sizes(weight.dims(), dim);
    let names = [name_in(vb, LEFT_VECTOR), name_in(vb, RIGHT_VECTOR)];
    let there = names.iter().all(|name| vb.contains_tensor(name));
    let get = |name: &str, size: usize| -> Result<Tensor> {
        let value = vb.get_with_hints_dtype(size, name, Init::Const(0.), dtype)?;
        rules::statistic(LAYER, &path(vb, name), &value, false)?;
        Ok(value)
    };
    if there {
        return Vectors::new(&get(names[0], outputs)?, &get(names[1], rest)?);
    }
    let fresh = ops::fresh_vectors(weight, dim, dtype, eps)?;
    let made = [get(LEFT_VECTOR[0], outputs), get(RIGHT_VECTOR[0], rest)];
    match made {
        [Ok(u), Ok(v)] if u.is_variable() && v.is_variable() => {
            let vectors = Vectors::new(&u, &v)?;
            vectors.set(&fresh)?;
            Ok(vectors)
        }
        // A file that has none.
        _ => Vectors::new(&fresh[0], &fresh[1]),
    }
}

impl<L: Weighted> ModuleT for SpectralNorm<L> {
    /// The layer `L` on `xs`, with the normalized weight; in training after steps of the power
    /// iteration, unless `xs` is empty.
    ///
    /// # Shapes
    /// Those of `L`; the output is contiguous.
    ///
    /// # Errors
    /// An input that does not fit `L` in rank, channels, size, dtype or device. No error changes
    /// the vectors.
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        if !train || xs.elem_count() == 0 {
            return self.apply(xs, &self.vectors()?);
        }
        let [before, after] = self.step()?;
        let y = self.apply(xs, &after);
        if y.is_err() {
            self.vectors.take_back(&after, &before)?;
        }
        y
    }
}

impl<L: Weighted> Norm for SpectralNorm<L> {
    fn kind(&self) -> &'static str {
        "spectral"
    }

    fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let mut named = vec![(ORIGINAL[0], self.weight.clone())];
        named.extend(self.bias.iter().map(|b| (BIAS[0], b.clone())));
        named
    }

    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        vec![
            (LEFT_VECTOR[0], self.vectors.u.as_tensor().clone()),
            (RIGHT_VECTOR[0], self.vectors.v.as_tensor().clone()),
        ]
    }

    /// New vectors for the weight of now: 15 steps from a random start.
    fn reset(&self) -> Result<()> {
        let (weight, dtype) = (self.weight.detach(), self.vectors.u.dtype());
        let fresh = ops::fresh_vectors(&weight, self.dim, dtype, self.options.eps)?;
        self.vectors.set(&fresh)
    }
}

/// A [`Linear`] with a bias, its weight over its spectral norm, its parameters taken from `vb`.
///
/// Names: `parametrizations.weight.original` (also found as `weight_orig`), `bias`, and the vectors
/// `parametrizations.weight.0._u` and `.._v` (also found as `weight_u` and `weight_v`). A
/// checkpoint that has the plain `weight` starts from it, with fresh vectors, or with those of
/// BigGAN's `u0`.
///
/// # Errors
/// Options out of range, tensors of another shape, vectors that are not finite.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{spectral_norm, trainable_vars};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let layer = spectral_norm::linear(8, 4, Default::default(), vb)?;
/// let y = layer.forward_t(&Tensor::randn(0f32, 1., (2, 8), &Device::Cpu)?, true)?;
/// assert_eq!(y.dims(), [2, 4]);
/// assert_eq!((vars.all_vars().len(), trainable_vars(&vars).len()), (4, 2));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear(
    in_dim: usize,
    out_dim: usize,
    options: SpectralNormOptions,
    vb: VarBuilder,
) -> Result<SpectralNorm<Linear>> {
    SpectralNorm::build((in_dim, out_dim, 1), (), true, options, &vb)
}

/// [`linear`] without a bias.
///
/// # Errors
/// As [`linear`]; a checkpoint that holds a bias, which would be dropped unseen.
pub fn linear_no_bias(
    in_dim: usize,
    out_dim: usize,
    options: SpectralNormOptions,
    vb: VarBuilder,
) -> Result<SpectralNorm<Linear>> {
    SpectralNorm::build((in_dim, out_dim, 1), (), false, options, &vb)
}

/// The free function of a convolution, with or without a bias.
macro_rules! convolution {
    (
        $name:ident, $layer:ident, $config:ident, bias: $bias:literal,
        $input:literal => $output:literal, $doc:literal
    ) => {
        #[doc = $doc]
        ///
        /// Names as for [`linear`]; initial values are drawn as candle-nn draws them.
        ///
        /// # Errors
        /// A stride or dilation of zero, groups that do not divide the channels, those of
        /// [`linear`]; without a bias, a checkpoint that holds one.
        ///
        /// ```
        /// use candle_core::{DType, Device, Tensor};
        /// use candle_nn::{ModuleT, VarBuilder, VarMap};
        /// use candle_norm::spectral_norm;
        ///
        /// let vars = VarMap::new();
        /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        /// let (config, options) = (Default::default(), Default::default());
        #[doc = concat!("let layer = spectral_norm::", stringify!($name), "(3, 4, 2, config, \
        options, vb)?;")]
        #[doc = concat!("let x = Tensor::zeros(", $input, ", DType::F32, &Device::Cpu)?;")]
        #[doc = concat!("assert_eq!(layer.forward_t(&x, true)?.dims(), ", $output, ");")]
        /// # Ok::<(), candle_core::Error>(())
        /// ```
        pub fn $name(
            in_channels: usize,
            out_channels: usize,
            kernel_size: usize,
            config: $config,
            options: SpectralNormOptions,
            vb: VarBuilder,
        ) -> Result<SpectralNorm<$layer>> {
            let sizes = (in_channels, out_channels, kernel_size);
            SpectralNorm::build(sizes, config, $bias, options, &vb)
        }
    };
}

convolution!(
    conv1d, Conv1d, Conv1dConfig, bias: true, "(2, 3, 8)" => "[2, 4, 7]",
    "A [`Conv1d`] over `[N, C, L]` with a bias, its weight over its spectral norm."
);
convolution!(
    conv1d_no_bias, Conv1d, Conv1dConfig, bias: false, "(2, 3, 8)" => "[2, 4, 7]",
    "[`conv1d`] without a bias."
);
convolution!(
    conv2d, Conv2d, Conv2dConfig, bias: true, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "A [`Conv2d`] over `[N, C, H, W]` with a bias, its weight over its spectral norm."
);
convolution!(
    conv2d_no_bias, Conv2d, Conv2dConfig, bias: false, "(2, 3, 8, 8)" => "[2, 4, 7, 7]",
    "[`conv2d`] without a bias."
);
convolution!(
    conv_transpose1d, ConvTranspose1d, ConvTranspose1dConfig, bias: true,
    "(2, 3, 8)" => "[2, 4, 9]",
    "A [`ConvTranspose1d`] over `[N, C, L]` with a bias, its weight over its spectral norm."
);
convolution!(
    conv_transpose1d_no_bias, ConvTranspose1d, ConvTranspose1dConfig, bias: false,
    "(2, 3, 8)" => "[2, 4, 9]",
    "[`conv_transpose1d`] without a bias."
);
convolution!(
    conv_transpose2d, ConvTranspose2d, ConvTranspose2dConfig, bias: true,
    "(2, 3, 8, 8)" => "[2, 4, 9, 9]",
    "A [`ConvTranspose2d`] over `[N, C, H, W]` with a bias, its weight over its spectral norm."
);
convolution!(
    conv_transpose2d_no_bias, ConvTranspose2d, ConvTranspose2dConfig, bias: false,
    "(2, 3, 8, 8)" => "[2, 4, 9, 9]",
    "[`conv_transpose2d`] without a bias."
);
