//! Loading a network that PyTorch trained.
//!
//! `scripts/make_digits_cnn.py` trains a network with BatchNorm2d, GroupNorm, LayerNorm and
//! weight_norm on the digits. It saves the state dict, and PyTorch's logits for the test images.
//! This example builds the same network with candle and this crate, with the same names. It loads
//! the network in two ways, and both give PyTorch's logits.
//!
//! ```text
//! cargo run --release --example pytorch_checkpoint
//! ```
//!
//! For a model of your own, save with `safetensors.torch.save_file(model.state_dict(), path)`, and
//! call `pp` with the names of its modules. Change a name in `Net::new` to see how each way reports
//! a missing tensor.

mod common;

use candle_core::{DType, Device, ModuleT, Result, Tensor, bail};
use candle_nn::{Conv2d, Conv2dConfig, Linear, VarBuilder, VarMap, conv2d_no_bias, linear};
use candle_norm::{BatchNorm, GroupNorm, LayerNorm, WeightNorm, WeightNormOptions};
use candle_norm::{batch_norm, checkpoint, group_norm, layer_norm, weight_norm};
use common::{Digits, largest_difference};

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits_cnn");

struct Net {
    conv1: Conv2d,
    bn: BatchNorm,
    conv2: WeightNorm<Conv2d>,
    gn: GroupNorm,
    fc: Linear,
    ln: LayerNorm,
    head: Linear,
}

impl Net {
    fn new(vb: VarBuilder) -> Result<Self> {
        let padded = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let options = WeightNormOptions::default();
        Ok(Self {
            conv1: conv2d_no_bias(1, 12, 3, padded, vb.pp("conv1"))?,
            bn: batch_norm(12, 1e-5, vb.pp("bn"))?,
            conv2: weight_norm::conv2d(12, 24, 3, padded, options, vb.pp("conv2"))?,
            gn: group_norm(4, 24, 1e-5, vb.pp("gn"))?,
            fc: linear(24 * 4 * 4, 16, vb.pp("fc"))?,
            ln: layer_norm(16, 1e-5, vb.pp("ln"))?,
            head: linear(16, 10, vb.pp("head"))?,
        })
    }
}

impl ModuleT for Net {
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let xs = self.bn.forward_t(&images.apply(&self.conv1)?, train)?;
        let xs = xs.relu()?.avg_pool2d(2)?.apply(&self.conv2)?;
        let xs = xs.apply(&self.gn)?.relu()?.flatten_from(1)?;
        let xs = xs.apply(&self.fc)?.apply(&self.ln)?.relu()?;
        xs.apply(&self.head)
    }
}

fn main() -> Result<()> {
    let (_, test) = Digits::load()?;
    let [state, logits] = ["", ".logits"].map(|part| format!("{FILES}{part}.safetensors"));
    let theirs = &candle_core::safetensors::load(logits, &Device::Cpu)?["logits"];

    // Plain tensors, for inference.
    let bytes = std::fs::read(&state)?;
    let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?;
    let inferred = Net::new(vb)?.forward_t(&test.images, false)?;
    // Variables, to train on.
    let vars = VarMap::new();
    let net = Net::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    println!("load_into: {}\n", checkpoint::load_into(&vars, &state)?);
    let loaded = net.forward_t(&test.images, false)?;

    println!("           test digits right, largest difference to PyTorch's logits");
    for (way, logits) in [
        ("PyTorch", theirs),
        ("VarBuilder", &inferred),
        ("load_into", &loaded),
    ] {
        let (accuracy, difference) = (test.accuracy(logits)?, largest_difference(logits, theirs)?);
        println!("{way:11} {accuracy:14.1} % {difference:12.0e}");
        if difference > 1e-4 {
            bail!("expected the logits of PyTorch")
        }
    }
    Ok(())
}
