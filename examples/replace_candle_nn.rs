//! Replacing candle-nn's norms by changing one import.
//!
//! The same model, written once, is compiled over the norms of `candle_nn` and over those of `candle_norm`. Both start from the
//! same values and give the same outputs. But candle-nn's `LayerNorm` and `RmsNorm` pass no gradient on, without an error:
//! they and all that lies below them stay as they were drawn, and the head learns alone.
//!
//! ```text
//! cargo run --release --example replace_candle_nn
//! ```
//!
//! In a model of your own, change `use candle_nn::{LayerNorm, layer_norm}` to `use candle_norm::{LayerNorm, layer_norm}`, and
//! likewise for `RmsNorm`, `BatchNorm` and `GroupNorm`. Here, change `EPOCHS`, or the layers of `model`.

mod common;

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{Activation, Sequential, VarBuilder, VarMap, linear, seq};
use common::{Digits, initialize, largest_difference};

const EPOCHS: usize = 10;

macro_rules! model {
    ($model:ident, $norms:ident) => {
        fn $model(vb: VarBuilder) -> Result<Sequential> {
            use $norms::{layer_norm, rms_norm};

            Ok(seq()
                .add_fn(|images| images.flatten_from(1))
                .add(linear(64, 16, vb.pp("1.embedding"))?)
                .add(layer_norm(16, 1e-5, vb.pp("2.layer_norm"))?)
                .add(linear(16, 16, vb.pp("3.hidden"))?)
                .add(Activation::Gelu)
                .add(rms_norm(16, 1e-6, vb.pp("4.rms_norm"))?)
                .add(linear(16, 10, vb.pp("5.head"))?))
        }
    };
}

model!(before, candle_nn);
model!(after, candle_norm);

/// The norm of each variable's gradient in the first step, the outputs before training, the accuracy after it.
type Outcome = (Vec<(String, Option<f32>)>, Tensor, f32);

fn train(new: fn(VarBuilder) -> Result<Sequential>) -> Result<Outcome> {
    let (digits, test) = Digits::load()?;
    let vars = VarMap::new();
    let model = new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    initialize(&vars, 1)?;
    let untrained = model.forward(&test.images)?;
    let loss = cross_entropy(&model.forward(&digits.images)?, &digits.labels)?;
    let grads = loss.backward()?;
    let norm = |g: &Tensor| g.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    let mut gradients = vec![];
    for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
        gradients.push((name.clone(), grads.get(var).map(norm).transpose()?));
    }
    gradients.sort_by(|a, b| a.0.cmp(&b.0));
    digits.train(&model, vars.all_vars(), 32, EPOCHS)?;
    let accuracy = test.accuracy(&model.forward(&test.images)?)?;
    Ok((gradients, untrained, accuracy))
}

fn main() -> Result<()> {
    let (old, old_outputs, old_accuracy) = train(before)?;
    let (new, new_outputs, new_accuracy) = train(after)?;
    let difference = largest_difference(&old_outputs, &new_outputs)?;
    println!("Norm of the gradient     candle_nn  candle_norm");
    let show = |norm: Option<f32>| norm.map_or("none".into(), |norm| format!("{norm:.4}"));
    for ((name, old), (_, new)) in old.iter().zip(&new) {
        println!("{name:22} {:>11}  {:>11}", show(*old), show(*new));
    }
    println!(
        "Test digits right {old_accuracy:>14.1} % {new_accuracy:>10.1} %  after {EPOCHS} epochs"
    );
    println!("Largest difference of the outputs before training: {difference:.0e}");
    let dropped = |gradients: &[(_, Option<f32>)]| gradients.iter().any(|g| g.1.is_none());
    if dropped(&new) || !dropped(&old) || difference > 1e-4 || new_accuracy < old_accuracy {
        bail!("expected equal outputs, and gradients that candle_nn drops and candle_norm does not")
    }
    Ok(())
}
