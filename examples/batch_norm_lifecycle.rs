//! The life of a BatchNorm: train, save, load, freeze, fine-tune and fold.
//!
//! A network learns the digits. A copy of it receives images with a quarter of the contrast, and is
//! adapted to them in batches of 4. Batches of 4 are too small for statistics of their own.
//! Therefore the statistics stay fixed, and only the scales and shifts of the norms are trained. At
//! the end, the norms are folded into the layers before them.
//!
//! ```text
//! cargo run --release --example batch_norm_lifecycle
//! ```
//!
//! Change `CONTRAST`, or fine-tune before freezing, to see what batches of 4 do to running
//! statistics.

mod common;

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var, bail};
use candle_nn::ops::Identity;
use candle_nn::{Conv2d, Linear, VarBuilder, VarMap};
use candle_norm::{BatchNorm, Norm, batch_norm, checkpoint, trainable_vars};
use common::{Digits, initialize, largest_difference};

const CONTRAST: f64 = 0.25;

/// Its norms are batch norms, frozen ones, or nothing.
struct Net<N>(Conv2d, N, Linear, N, Linear);

fn new(vars: &VarMap) -> Result<Net<BatchNorm>> {
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    Ok(Net(
        candle_nn::conv2d_no_bias(1, 16, 3, Default::default(), vb.pp("conv"))?,
        batch_norm(16, 1e-5, vb.pp("norm1"))?,
        candle_nn::linear_no_bias(16 * 3 * 3, 64, vb.pp("hidden"))?,
        batch_norm(64, 1e-5, vb.pp("norm2"))?,
        candle_nn::linear(64, 10, vb.pp("head"))?,
    ))
}

impl<N: ModuleT> ModuleT for Net<N> {
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.1.forward_t(&images.apply(&self.0)?, train)?;
        let xs = xs.relu()?.avg_pool2d(2)?.flatten_from(1)?;
        let xs = self.3.forward_t(&xs.apply(&self.2)?, train)?;
        xs.relu()?.apply(&self.4)
    }
}

/// Prints the accuracy in inference and the shortest time of 10 passes; returns the outputs.
fn evaluate(stage: &str, net: &impl ModuleT, test: &Digits) -> Result<Tensor> {
    let evaluation = test.evaluate(net, 10)?;
    println!("{stage:34}{evaluation}");
    Ok(evaluation.logits)
}

fn main() -> Result<()> {
    println!("                         test digits right, time for all 500");
    let (mut digits, mut test) = Digits::load()?;
    let vars = VarMap::new();
    let net = new(&vars)?;
    initialize(&vars, 1)?;
    // The running statistics are variables too, but not for an optimizer.
    digits.train(&net, trainable_vars(&vars), 32, 3)?;
    let trained = evaluate("trained", &net, &test)?;

    let file = tempfile::NamedTempFile::new()?;
    vars.save(file.path())?;
    let vars = VarMap::new();
    let net = new(&vars)?;
    let report = checkpoint::load_into_strict(&vars, file.path())?;
    let loaded = evaluate("saved and loaded", &net, &test)?;

    for part in [&mut digits, &mut test] {
        part.images = (&part.images * CONTRAST)?;
    }
    let affine = [&net.1, &net.3].map(Norm::parameters).concat();
    let affine: Result<_> = affine.iter().map(|(_, p)| Var::from_tensor(p)).collect();
    let net = Net(net.0, net.1.frozen()?, net.2, net.3.frozen()?, net.4);
    evaluate("frozen, on images of low contrast", &net, &test)?;
    digits.train(&net, affine?, 4, 3)?;
    let tuned = evaluate("scales and shifts fine-tuned", &net, &test)?;

    let (conv, hidden) = (net.1.fold_into(&net.0)?, net.3.fold_into(&net.2)?);
    let net = Net(conv, Identity, hidden, Identity, net.4);
    let folded = evaluate("folded into the layers before", &net, &test)?;

    let by_loading = largest_difference(&trained, &loaded)?;
    let by_folding = largest_difference(&tuned, &folded)?;
    println!("Outputs changed by loading: {by_loading} ({report}), by folding: {by_folding:.0e}");
    if by_loading > 0. || by_folding > 1e-4 || test.accuracy(&folded)? < 90. {
        bail!("expected the same outputs, and 90 % of the digits right")
    }
    Ok(())
}
