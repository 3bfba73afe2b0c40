//! A layer and what follows it as one layer, for inference.

use candle_core::{Result, Tensor};
use candle_nn::{
    Activation, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, Dropout, Linear, PReLU,
};

use super::batch_norm::BatchNorm;
use super::conv1d;
use super::frozen::FrozenNorm;
use super::group_norm::GroupNorm;
use super::instance_norm::InstanceNorm;
use super::layer_norm::LayerNorm;
use super::rms_norm::RmsNorm;
use super::switch_norm::SwitchNorm;
use super::weighted::sealed::Layer;
use crate::Norm;
use crate::ops::check;
use crate::ops::linear_map::LinearMap;

const LAYER: &str = "fold";

/// Layers that a normalization of their output channels can be folded into: candle-nn's [`Linear`],
/// [`Conv1d`], [`Conv2d`],
/// [`ConvTranspose1d`], [`ConvTranspose2d`], and the one-dimensional convolutions of this crate.
#[diagnostic::on_unimplemented(
    message = "a norm folds into the linear layer or convolution right before it, and `{Self}` is none",
    note = "with an activation between the two, or another layer, they are no single layer: keep the norm, as `frozen()` for a `Module`"
)]
pub trait Foldable: sealed::Mapped {
    /// The weight, output channels first; in transposed convolutions
    /// `[inputs, outputs / groups, ..]`.
    fn weight(&self) -> &Tensor;
    /// The bias, if there is one.
    fn bias(&self) -> Option<&Tensor>;
    /// The same layer with other values.
    fn with(&self, weight: Tensor, bias: Tensor) -> Self;
}

/// Layers that may follow another in [`fold`]: [`BatchNorm`], [`InstanceNorm`], [`FrozenNorm`], a
/// `Box<dyn Norm>`, and [`Dropout`], which does nothing in inference. Other norms and activations
/// may too, so
/// that a sequence can be given as it is; they are answered by an error.
pub trait Follower: sealed::Follows {}

impl<F: sealed::Follows + ?Sized> Follower for F {}

mod sealed {
    use super::{FrozenNorm, LinearMap, Result};

    pub trait Mapped {
        #[doc(hidden)]
        #[allow(private_interfaces)]
        fn map(&self) -> LinearMap;
        /// The same layer, of plain values.
        #[doc(hidden)]
        fn detached(&self) -> Self;
    }

    #[diagnostic::on_unimplemented(
        message = "`fold` takes what it can tell: norms, `Box<dyn Norm>`, `Dropout`, `Activation` and `PReLU`, and `{Self}` is none",
        note = "only norms that follow the layer with nothing between fold into it"
    )]
    pub trait Follows {
        #[doc(hidden)]
        fn stage(&self) -> Result<Stage>;
    }

    /// Effect of a follower on the outputs of a layer.
    pub enum Stage {
        Nothing,
        Norm(FrozenNorm),
        /// Something that is not linear, by its name.
        Bends(String),
    }
}

use sealed::Stage;

/// `layer` and the norms after it as one layer, for inference.
///
/// With `s = weight / √(var + ε)` of a norm, the folded weight is `s · W` and the folded bias
/// `s · (b − mean) + bias`: computed in `f32` (`f64` for an
/// `f64` layer) and rounded once for each norm. The new layer holds plain values: no gradient leads
/// back. A norm folds where nothing stands between it and the
/// layer; what can be told of a sequence is checked, so give all of it.
///
/// # Errors
/// An activation before a norm, or at the end, which no linear layer or convolution computes; a
/// norm without running statistics, or
/// for another number of channels, dtype or device.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Activation, Module, ModuleT, VarBuilder, VarMap};
/// use candle_norm::{batch_norm, fold};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
/// let up = candle_nn::conv_transpose2d(3, 4, 2, Default::default(), vb.pp("up"))?;
/// let norm = batch_norm(4, 1e-5, vb.pp("norm"))?;
/// let x = Tensor::randn(0f64, 1., (2, 3, 5, 5), &Device::Cpu)?;
/// norm.forward_t(&up.forward(&x)?, true)?;
///
/// let folded = fold(&up, &[&norm])?;
/// let both = norm.forward_t(&up.forward(&x)?, false)?;
/// let largest = (folded.forward(&x)? - both)?.abs()?.max_all()?.to_scalar::<f64>()?;
/// assert!(largest < 1e-12);
///
/// let apart = fold(&up, &[&Activation::Relu, &norm]).unwrap_err().to_string();
/// assert!(apart.contains("Relu between the layer and a norm"));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn fold<L: Foldable>(layer: &L, then: &[&dyn Follower]) -> Result<L> {
    let mut folded = layer.detached();
    let mut bent = None;
    for follower in then {
        match follower.stage()? {
            Stage::Nothing => {}
            Stage::Bends(name) => bent = bent.or(Some(name)),
            Stage::Norm(norm) => {
                check::nothing_between(LAYER, bent.as_deref())?;
                folded = norm.fold_into(&folded)?;
            }
        }
    }
    check::nothing_at_the_end(LAYER, bent.as_deref())?;
    Ok(folded)
}

macro_rules! foldable {
    ($($layer:ty),*) => {$(
        impl sealed::Mapped for $layer {
            #[allow(private_interfaces)]
            fn map(&self) -> LinearMap {
                <Self as Layer>::map(&Layer::config(self))
            }
            fn detached(&self) -> Self {
                let bias = Layer::bias(self).map(Tensor::detach);
                Layer::from_parts(Layer::weight(self).detach(), bias, Layer::config(self))
            }
        }

        impl Foldable for $layer {
            fn weight(&self) -> &Tensor {
                Layer::weight(self)
            }
            fn bias(&self) -> Option<&Tensor> {
                Layer::bias(self)
            }
            fn with(&self, weight: Tensor, bias: Tensor) -> Self {
                Layer::from_parts(weight, Some(bias), Layer::config(self))
            }
        }
    )*};
}

foldable!(Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d);
foldable!(conv1d::Conv1d, conv1d::ConvTranspose1d);

impl sealed::Follows for FrozenNorm {
    fn stage(&self) -> Result<Stage> {
        Ok(Stage::Norm(self.clone()))
    }
}

/// Norms whose statistics may be those of each input say so themselves.
macro_rules! follower {
    ($($norm:ty),*) => {$(
        impl sealed::Follows for $norm {
            fn stage(&self) -> Result<Stage> {
                Norm::frozen(self).map(Stage::Norm)
            }
        }
    )*};
}

follower!(
    BatchNorm,
    InstanceNorm,
    GroupNorm,
    LayerNorm,
    RmsNorm,
    SwitchNorm
);

impl sealed::Follows for Box<dyn Norm> {
    fn stage(&self) -> Result<Stage> {
        match self.kind() {
            "none" => Ok(Stage::Nothing),
            _ => Norm::frozen(&**self).map(Stage::Norm),
        }
    }
}

impl sealed::Follows for Dropout {
    /// In inference it does nothing.
    fn stage(&self) -> Result<Stage> {
        Ok(Stage::Nothing)
    }
}

impl sealed::Follows for Activation {
    fn stage(&self) -> Result<Stage> {
        Ok(Stage::Bends(format!("{self:?}")))
    }
}

impl sealed::Follows for PReLU {
    fn stage(&self) -> Result<Stage> {
        Ok(Stage::Bends("PReLU".to_string()))
    }
}
