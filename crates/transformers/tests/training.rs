//! Small models of candle-transformers learn, and every parameter has a gradient: with candle-nn's
//! norms and softmax, all that comes before the last of them has none.

#![cfg(converted)]

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{loss, AdamW, Optimizer, VarBuilder, VarMap};
use candle_norm::trainable_vars;
use candle_norm_transformers::{llama, vit};

const CPU: Device = Device::Cpu;

/// Every variable has a gradient that is not zero, and steps along them lower the loss.
fn learns(what: &str, vars: &VarMap, loss: impl Fn() -> Result<Tensor>) -> Result<()> {
    let first = loss()?;
    let grads = first.backward()?;
    for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
        let grad = grads
            .get(var)
            .unwrap_or_else(|| panic!("{what}: {name} has no gradient"));
        let size = grad.abs()?.max_all()?.to_scalar::<f32>()?;
        // A bias of keys moves all scores of a row alike.
        let is_key_bias = name.ends_with("key.bias");
        assert!(
            size.is_finite() && (size > 0. || is_key_bias),
            "{what}: {name}: {size}"
        );
    }
    let mut optimizer = AdamW::new_lr(trainable_vars(vars), 0.01)?;
    for _ in 0..30 {
        optimizer.backward_step(&loss()?)?;
    }
    let [first, last] = [first, loss()?].map(|loss| loss.to_scalar::<f32>());
    let (first, last) = (first?, last?);
    assert!(last < 0.5 * first, "{what}: {first} to {last}");
    Ok(())
}

#[test]
fn llama_learns() -> Result<()> {
    let config = llama::Config {
        hidden_size: 16,
        intermediate_size: 32,
        vocab_size: 11,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        ..llama::Config::config_7b_v2(false)
    };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let model = llama::Llama::load(vb, &config)?;
    // The last of eight tokens says which comes next.
    let tokens = Tensor::arange(0u32, 11 * 8, &CPU)?.reshape((11, 8))?;
    let tokens = (tokens.to_dtype(DType::F32)? * 7.)?;
    let tokens = (&tokens - ((&tokens / 11.)?.floor()? * 11.)?)?.to_dtype(DType::U32)?;
    let next = tokens.narrow(1, 7, 1)?.squeeze(1)?.contiguous()?;
    learns("llama", &vars, || {
        let mut cache = llama::Cache::new(false, DType::F32, &config, &CPU)?;
        loss::cross_entropy(&model.forward(&tokens, 0, &mut cache)?, &next)
    })
}

#[test]
fn vit_learns() -> Result<()> {
    let config = vit::Config {
        hidden_size: 16,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        intermediate_size: 32,
        image_size: 8,
        patch_size: 4,
        num_channels: 1,
        ..vit::Config::vit_base_patch16_224()
    };
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &CPU);
    let model = vit::Model::new(&config, 2, vb)?;
    // Two kinds of images: those of class 1 are brighter at the top.
    let labels = Tensor::arange(0u32, 8, &CPU)?;
    let labels = (labels.to_dtype(DType::F32)? / 4.)?.floor()?;
    let noise = Tensor::rand(-1f32, 1., (8, 1, 8, 8), &CPU)?;
    let top = Tensor::cat(
        &[
            Tensor::ones((1, 1, 4, 8), DType::F32, &CPU)?,
            Tensor::zeros((1, 1, 4, 8), DType::F32, &CPU)?,
        ],
        2,
    )?;
    let bright = labels.reshape((8, 1, 1, 1))?.broadcast_mul(&top)?;
    let images = (noise + (bright * 2.)?)?;
    let labels = labels.to_dtype(DType::U32)?;
    learns("vit", &vars, || {
        loss::cross_entropy(&model.forward(&images)?, &labels)
    })
}
