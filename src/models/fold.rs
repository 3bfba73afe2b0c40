//! A layer and what follows it as one layer, for inference.

use candle_core::{Result, bail};
use candle_nn::{Activation, Dropout, PReLU};

use crate::layers::{Foldable, FrozenNorm, NONE, Norm};

const LAYER: &str = "fold";

/// Layers that may follow another in [`fold`]: [`BatchNorm`](crate::BatchNorm),
/// [`InstanceNorm`](crate::InstanceNorm), [`FrozenNorm`], a `Box<dyn Norm>`, and [`Dropout`], which
/// does nothing in inference. Other norms and activations may too, so that a sequence can be given
/// as it is; they are answered by an error.
pub trait Follower: sealed::Follows {}

impl<F: sealed::Follows + ?Sized> Follower for F {}

mod sealed {
    use super::{FrozenNorm, Result};

    #[diagnostic::on_unimplemented(
        message = "`fold` takes what it can tell: norms, `Box<dyn Norm>`, `Dropout`, `Activation` \
        and `PReLU`, and `{Self}` is none",
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
/// `s · (b − mean) + bias`: computed in `f32` (`f64` for an `f64` layer) and rounded once for each
/// norm. The new layer holds plain values: no gradient leads back. A norm folds where nothing
/// stands between it and the layer; what can be told of a sequence is checked, so give all of it.
///
/// # Errors
/// An activation before a norm, or at the end, which no linear layer or convolution computes; a
/// norm without running statistics, or for another number of channels, dtype or device.
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
                nothing_between(LAYER, bent.as_deref())?;
                folded = norm.fold_into(&folded)?;
            }
        }
    }
    nothing_at_the_end(LAYER, bent.as_deref())?;
    Ok(folded)
}

impl sealed::Follows for FrozenNorm {
    fn stage(&self) -> Result<Stage> {
        Ok(Stage::Norm(self.clone()))
    }
}

/// Norms whose statistics may be those of each input say so themselves.
impl<N: Norm> sealed::Follows for N {
    fn stage(&self) -> Result<Stage> {
        stage_of(self)
    }
}

impl sealed::Follows for Box<dyn Norm> {
    fn stage(&self) -> Result<Stage> {
        stage_of(&**self)
    }
}

fn stage_of(norm: &dyn Norm) -> Result<Stage> {
    match norm.kind() == NONE.name {
        true => Ok(Stage::Nothing),
        false => norm.frozen().map(Stage::Norm),
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

/// A norm that follows a layer with nothing between; `between` is what bends the layer's outputs
/// before the norm has them.
fn nothing_between(layer: &str, between: Option<&str>) -> Result<()> {
    match between {
        Some(between) => bail!(
            "{layer}: expected norms right after the layer, got {between} between the layer and a \
            norm; no linear layer or convolution does what {between} does, so folding would change \
            the outputs: keep this norm (frozen() makes it a Module), or train with the norm \
            before {between}"
        ),
        None => Ok(()),
    }
}

/// Norms alone after a layer; `last` is what bends the outputs after them.
fn nothing_at_the_end(layer: &str, last: Option<&str>) -> Result<()> {
    match last {
        Some(last) => bail!(
            "{layer}: expected norms alone after the layer, got {last} at the end; leave it out, \
            and apply it to what the folded layer returns"
        ),
        None => Ok(()),
    }
}
