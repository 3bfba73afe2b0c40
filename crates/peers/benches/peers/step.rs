//! One call of a layer in a pass, the same for every implementation that is built on candle.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, bail};

use super::case::{Case, Inputs, Pass};

/// A layer with its parameters.
pub(crate) type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// A call, and its results in the order of [`quantities`].
pub(crate) type Step = Box<dyn Fn() -> Result<Vec<Tensor>> + Send + Sync>;

/// Names of the results of a pass; layers without a bias end one earlier.
pub(crate) fn quantities(pass: Pass) -> &'static [&'static str] {
    match pass {
        Pass::Forward => &["y"],
        Pass::Backward => &["dx", "dweight", "dbias"],
        Pass::TrainStep => &["y", "dx", "dweight", "dbias"],
    }
}

/// The output of the layer that `build` makes of the inputs.
pub(crate) fn forward(
    case: &Case,
    inputs: &Inputs,
    build: impl Fn(&Case, &Inputs) -> Result<Layer>,
) -> Result<Step> {
    let layer = build(case, inputs)?;
    let x = inputs.x.clone();
    Ok(Box::new(move || Ok(vec![layer(&x)?])))
}

/// The output of that layer, and the gradients of its input and parameters for an output gradient
/// of ones.
pub(crate) fn train_step(
    case: &Case,
    inputs: &Inputs,
    build: impl Fn(&Case, &Inputs) -> Result<Layer>,
) -> Result<Step> {
    let variables = inputs.tracked()?;
    let layer = build(case, &variables)?;
    Ok(Box::new(move || {
        let y = layer(&variables.x)?;
        let gradients = y.backward()?;
        let mut results = vec![y];
        results.extend(gradients_of(&variables, &gradients)?);
        Ok(results)
    }))
}

/// The gradients of that layer for the output gradient of the inputs, by candle's engine: what a
/// backward of its own must come to.
pub(crate) fn gradients(
    case: &Case,
    inputs: &Inputs,
    build: impl Fn(&Case, &Inputs) -> Result<Layer>,
) -> Result<Vec<Tensor>> {
    let variables = inputs.tracked()?;
    let y = build(case, &variables)?(&variables.x)?;
    let gradients = (y * &inputs.dy)?.backward()?;
    gradients_of(&variables, &gradients)
}

fn gradients_of(variables: &Inputs, gradients: &GradStore) -> Result<Vec<Tensor>> {
    [&variables.x]
        .into_iter()
        .chain(variables.has_weight.then_some(&variables.weight))
        .chain(&variables.bias)
        .map(|variable| match gradients.get(variable) {
            Some(gradient) => Ok(gradient.clone()),
            None => bail!("a gradient is missing"),
        })
        .collect()
}
