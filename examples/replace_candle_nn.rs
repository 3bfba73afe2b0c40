//! Replacing candle-nn's norms by changing one import.
//!
//! The same model, written once, is compiled with the norms of `candle_nn` and with those of
//! `candle_norm`. Both start from the same values and give the same outputs. But candle-nn's
//! `LayerNorm` and `RmsNorm` pass no gradient back, and report no error. They and all layers before
//! them keep their initial values, and only the head learns. The example prints the table of the
//! README.
//!
//! ```text
//! cargo run --release --example replace_candle_nn
//! ```
//!
//! In a model of your own, change `use candle_nn::{LayerNorm, layer_norm}` to
//! `use candle_norm::{LayerNorm, layer_norm}`. Do the same for `RmsNorm`, `BatchNorm` and
//! `GroupNorm`. Here, change `EPOCHS`, or the layers of `model`.

mod common;

use std::collections::HashMap;

use candle_core::{DType, Device, Module, Result, Tensor, Var, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{Activation, Sequential, VarBuilder, VarMap, linear, seq};
use common::{Digits, initialize, largest_difference};

const EPOCHS: usize = 10;

macro_rules! models {
    ($model:ident, $residual:ident, $norms:ident) => {
        pub(crate) fn $model(vb: VarBuilder) -> Result<Sequential> {
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

        /// Two branches, each with its norm at the start and a residual around it.
        pub(crate) fn $residual(vb: VarBuilder) -> Result<Sequential> {
            use $norms::{layer_norm, rms_norm};

            let first = layer_norm(16, 1e-5, vb.pp("2.layer_norm"))?;
            let hidden = linear(16, 16, vb.pp("3.hidden"))?;
            let second = rms_norm(16, 1e-6, vb.pp("4.rms_norm"))?;
            let output = linear(16, 16, vb.pp("5.output"))?;
            Ok(seq()
                .add_fn(|images| images.flatten_from(1))
                .add(linear(64, 16, vb.pp("1.embedding"))?)
                .add_fn(move |xs| xs + xs.apply(&first)?.apply(&hidden)?.gelu()?)
                .add_fn(move |xs| xs + xs.apply(&second)?.apply(&output)?.gelu()?)
                .add(linear(16, 10, vb.pp("6.head"))?))
        }
    };
}

models!(before, before_residual, candle_nn);
models!(after, after_residual, candle_norm);

pub(crate) type Model = fn(VarBuilder) -> Result<Sequential>;

/// The largest difference of a gradient in the first step of two models, by the length of the
/// second, in percent.
pub(crate) fn error(old: Model, new: Model) -> Result<f32> {
    let (digits, _) = Digits::load()?;
    let gradients = |new: Model| {
        let vars = VarMap::new();
        let model = new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
        initialize(&vars, 1)?;
        let grads = cross_entropy(&model.forward(&digits.images)?, &digits.labels)?.backward()?;
        let vars = vars.data().lock().expect("no thread panicked");
        let of = |(name, var): (&String, &Var)| Some((name.clone(), grads.get(var)?.clone()));
        Result::Ok(vars.iter().filter_map(of).collect::<HashMap<_, _>>())
    };
    let length = |g: &Tensor| g.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    let (old, new) = (gradients(old)?, gradients(new)?);
    let mut largest = 0f32;
    // What candle-nn drops is absent, and not counted here.
    for (name, gradient) in &old {
        let right = &new[name];
        largest = largest.max(length(&(gradient - right)?)? / length(right)?);
    }
    Ok(100. * largest)
}

/// Results of training over one crate's norms.
pub(crate) struct Outcome {
    /// The norm of each variable's gradient in the first step, by the name of the variable.
    gradients: Vec<(String, Option<f32>)>,
    /// Of the test digits, before training.
    outputs: Tensor,
    /// On the test digits after training, in percent.
    accuracy: f32,
}

pub(crate) fn train(new: Model) -> Result<Outcome> {
    let (digits, test) = Digits::load()?;
    let vars = VarMap::new();
    let model = new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    initialize(&vars, 1)?;
    let outputs = model.forward(&test.images)?;
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
    Ok(Outcome {
        gradients,
        outputs,
        accuracy,
    })
}

/// The table of the README.
pub(crate) fn table(old: &Outcome, new: &Outcome) -> String {
    let mut text = "| norm of the gradient of | candle-nn | candle-norm |\n".to_string();
    text += "| --- | --- | --- |\n";
    let show = |norm: Option<f32>| norm.map_or("**none**".into(), |norm| format!("{norm:.3}"));
    for ((name, old), (_, new)) in old.gradients.iter().zip(&new.gradients) {
        text += &format!("| `{name}` | {} | {} |\n", show(*old), show(*new));
    }
    text += &format!(
        "| test digits right after {EPOCHS} epochs | {:.1} % | {:.1} % |\n",
        old.accuracy, new.accuracy
    );
    text
}

fn main() -> Result<()> {
    let (old, new) = (train(before)?, train(after)?);
    let difference = largest_difference(&old.outputs, &new.outputs)?;
    print!("{}", table(&old, &new));
    let wrong = error(before_residual, after_residual)?;
    println!(
        "With a residual around each norm, gradients of candle-nn are wrong by up to {wrong:.0} %."
    );
    println!("Largest difference of the outputs before training: {difference:.0e}");
    let dropped = |outcome: &Outcome| outcome.gradients.iter().any(|g| g.1.is_none());
    let replaced = !dropped(&new) && dropped(&old) && wrong > 1.;
    if !replaced || difference > 1e-4 || new.accuracy < old.accuracy {
        bail!("expected equal outputs, and gradients that candle_nn drops and candle_norm does not")
    }
    Ok(())
}
