//! Checkpoints of timm, transformers, diffusers and PyTorch load into the layers that these
//! packages have beside the plain norms, and give the outputs that the packages gave.
//!
//! `scripts/make_family_checkpoints.py` writes the files.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{Activation, Conv2dConfig, ConvTranspose2dConfig, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNormOptions, Cast, ChunkOrder, Gate, GatedRmsNormOptions,
    GlobalResponseNormOptions, GroupNormOptions, LayerNormOptions, LayerScaleOptions,
    WeightStandardizationOptions, checkpoint, condition_projection, spectral_norm,
    weight_standardization,
};

use testkit::data::values;

/// The tensors of an io file by name.
type Io = HashMap<String, Tensor>;

/// The outputs of a layer for the inputs of an io file.
type Call = Box<dyn Fn(&Io) -> Result<Vec<Tensor>>>;

struct Checkpoint {
    name: &'static str,
    build: fn(VarBuilder) -> Result<Call>,
}

const fn checkpoint(name: &'static str, build: fn(VarBuilder) -> Result<Call>) -> Checkpoint {
    Checkpoint { name, build }
}

const CHECKPOINTS: [Checkpoint; 25] = [
    checkpoint("timm_grn", |vb| {
        module(candle_norm::global_response_norm(6, 1e-6, vb)?)
    }),
    checkpoint("timm_grn_channels_first", |vb| {
        let options = GlobalResponseNormOptions {
            channels_first: true,
            ..Default::default()
        };
        module(candle_norm::global_response_norm(6, options, vb)?)
    }),
    checkpoint("transformers_grn", |vb| {
        module(candle_norm::global_response_norm(6, 1e-6, vb)?)
    }),
    checkpoint("timm_layer_scale", |vb| {
        module(candle_norm::layer_scale(6, 1e-5, vb)?)
    }),
    checkpoint("timm_layer_scale_2d", |vb| {
        let options = LayerScaleOptions {
            channels_first: true,
            ..Default::default()
        };
        module(candle_norm::layer_scale(6, options, vb)?)
    }),
    checkpoint("transformers_layer_scale", |vb| {
        module(candle_norm::layer_scale(6, 1., vb)?)
    }),
    checkpoint("transformers_mamba2_gated", |vb| {
        gated(Gate::Before, Some(4), Cast::BeforeWeight, vb)
    }),
    checkpoint("transformers_zamba2_gated", |vb| {
        gated(Gate::Before, Some(4), Cast::BeforeWeight, vb)
    }),
    checkpoint("transformers_qwen3_next_gated", |vb| {
        gated(Gate::After, None, Cast::BeforeWeight, vb)
    }),
    checkpoint("timm_batch_norm_relu", |vb| {
        let options = BatchNormOptions {
            activation: Some(Activation::Relu),
            ..Default::default()
        };
        in_evaluation(candle_norm::batch_norm(6, options, vb)?)
    }),
    checkpoint("timm_group_norm_silu", |vb| {
        let options = GroupNormOptions {
            activation: Some(Activation::Silu),
            ..Default::default()
        };
        module(candle_norm::group_norm(3, 6, options, vb)?)
    }),
    checkpoint("timm_layer_norm_gelu", |vb| {
        let options = LayerNormOptions {
            activation: Some(Activation::Gelu),
            ..Default::default()
        };
        module(candle_norm::layer_norm(6, options, vb)?)
    }),
    checkpoint("timm_std_conv2d", |vb| {
        let options = WeightStandardizationOptions::default();
        let layer = weight_standardization::conv2d_no_bias(3, 4, 3, padded(), options, vb)?;
        module(layer)
    }),
    checkpoint("timm_scaled_std_conv2d", |vb| {
        let options = WeightStandardizationOptions {
            gamma: Some(1.),
            ..Default::default()
        };
        module(weight_standardization::conv2d(
            3,
            4,
            3,
            padded(),
            options,
            vb,
        )?)
    }),
    checkpoint("spectral_norm_linear", |vb| {
        in_evaluation(spectral_norm::linear(5, 4, Default::default(), vb)?)
    }),
    checkpoint("spectral_norm_conv2d", |vb| {
        let options = Default::default();
        in_evaluation(spectral_norm::conv2d(2, 3, 3, padded(), options, vb)?)
    }),
    checkpoint("spectral_norm_conv_transpose2d", |vb| {
        let (config, options) = (ConvTranspose2dConfig::default(), Default::default());
        in_evaluation(spectral_norm::conv_transpose2d(
            2, 3, 3, config, options, vb,
        )?)
    }),
    checkpoint("spectral_norm_old", |vb| {
        in_evaluation(spectral_norm::linear(5, 4, Default::default(), vb)?)
    }),
    checkpoint("diffusers_ada_zero", |vb| {
        ada_zero(ChunkOrder::DIFFUSERS_ZERO, vb)
    }),
    checkpoint("diffusers_ada_zero_single", |vb| {
        ada_zero(ChunkOrder::DIFFUSERS_ZERO_SINGLE, vb)
    }),
    checkpoint("diffusers_sd35", |vb| {
        ada_zero(ChunkOrder::DIFFUSERS_SD35, vb)
    }),
    checkpoint("diffusers_ada_continuous", |vb| {
        continuous(Affine::None, 1e-6, vb)
    }),
    checkpoint("diffusers_ada_continuous_affine", |vb| {
        continuous(Affine::WeightAndBias, 1e-5, vb)
    }),
    checkpoint("diffusers_ada_group", |vb| {
        let options = GroupNormOptions {
            affine: Affine::None,
            ..Default::default()
        };
        let norm = candle_norm::group_norm(2, 8, options, vb.pp("norm"))?;
        let project = condition_projection(6, 8, ChunkOrder::DIFFUSERS_GROUP, vb)?;
        Ok(Box::new(move |io| {
            let chunks = project.forward(&io["condition"])?;
            Ok(vec![norm.forward_modulated_by(
                &io["input"],
                &chunks.modulation(0)?,
            )?])
        }))
    }),
    checkpoint("diffusers_lumina", |vb| {
        let norm = candle_norm::rms_norm(8, 1e-5, vb.pp("norm"))?;
        let project = condition_projection(8, 8, ChunkOrder::LUMINA, vb)?;
        Ok(Box::new(move |io| {
            let chunks = project.forward(&io["condition"])?;
            let y = norm.forward_modulated_by(&io["input"], &chunks.modulation(0)?)?;
            // The output, then what the block has left to use.
            let rest = chunks.iter().skip(1).map(|(_, t)| t.clone());
            Ok([y].into_iter().chain(rest).collect())
        }))
    }),
];

fn padded() -> Conv2dConfig {
    Conv2dConfig {
        padding: 1,
        ..Default::default()
    }
}

fn module(layer: impl Module + 'static) -> Result<Call> {
    Ok(Box::new(move |io| Ok(vec![layer.forward(&io["input"])?])))
}

fn in_evaluation(layer: impl ModuleT + 'static) -> Result<Call> {
    Ok(Box::new(move |io| {
        Ok(vec![layer.forward_t(&io["input"], false)?])
    }))
}

fn gated(gate: Gate, group_size: Option<usize>, cast: Cast, vb: VarBuilder) -> Result<Call> {
    let options = GatedRmsNormOptions {
        gate,
        group_size,
        cast,
        ..Default::default()
    };
    let norm = candle_norm::gated_rms_norm(8, options, vb)?;
    Ok(Box::new(move |io| {
        Ok(vec![norm.forward(&io["input"], Some(&io["gate"]))?])
    }))
}

fn plain_layer_norm() -> LayerNormOptions {
    LayerNormOptions {
        eps: 1e-6,
        affine: Affine::None,
        ..Default::default()
    }
}

/// The modules of AdaLN-Zero return the modulated input and the chunks that the block uses later;
/// that of SD 3.5 modulates a second time.
fn ada_zero(order: ChunkOrder<'static>, vb: VarBuilder) -> Result<Call> {
    let norm = candle_norm::layer_norm(8, plain_layer_norm(), vb.pp("norm"))?;
    let project = condition_projection(8, 8, order, vb)?;
    Ok(Box::new(move |io| {
        let chunks = project.forward(&io["condition"])?;
        let modulated = |index| norm.forward_modulated_by(&io["input"], &chunks.modulation(index)?);
        let all: Vec<Tensor> = chunks.iter().map(|(_, t)| t.clone()).collect();
        let mut outputs = vec![modulated(0)?];
        outputs.extend_from_slice(&all[2..all.len().min(6)]);
        if all.len() == 9 {
            outputs.push(modulated(2)?);
            outputs.push(chunks.gate(2)?.clone());
        }
        Ok(outputs)
    }))
}

fn continuous(affine: Affine, eps: f64, vb: VarBuilder) -> Result<Call> {
    let options = LayerNormOptions {
        eps,
        affine,
        ..Default::default()
    };
    let norm = candle_norm::layer_norm(8, options, vb.pp("norm_out").pp("norm"))?;
    let project = condition_projection(6, 8, ChunkOrder::DIFFUSERS_CONTINUOUS, vb)?;
    Ok(Box::new(move |io| {
        let chunks = project.forward(&io["condition"])?;
        Ok(vec![norm.forward_modulated_by(
            &io["input"],
            &chunks.modulation(0)?,
        )?])
    }))
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .join("tests/fixtures/checkpoints/family")
        .join(format!("{name}.safetensors"))
}

/// Asserts that the layer gives what its package gave.
fn reproduces(name: &str, call: &Call, route: &str) -> Result<()> {
    let io = candle_core::safetensors::load(file(&format!("{name}.io")), &Device::Cpu)?;
    let outputs = call(&io)?;
    let named = io.keys().filter(|key| key.starts_with("output")).count();
    assert_eq!(outputs.len(), named, "{name}, {route}");
    for (i, got) in outputs.iter().enumerate() {
        let key = match i {
            0 => "output".to_string(),
            i => format!("output.{i}"),
        };
        let want = &io[&key];
        assert_eq!(got.dims(), want.dims(), "{name}, {route}, {key}");
        let (got, want) = (values(got)?, values(want)?);
        let rms = (want.iter().map(|w| w * w).sum::<f64>() / want.len() as f64).sqrt();
        for (at, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                (got - want).abs() <= 2e-6 * want.abs().max(rms),
                "{name}, {route}, {key}: element {at} is {got}, in the package {want}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_var_builder_of_the_file_reproduces_the_package() -> Result<()> {
    for c in &CHECKPOINTS {
        let bytes = std::fs::read(file(c.name))?;
        let vb = VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu)?;
        reproduces(c.name, &(c.build)(vb)?, "from_buffered_safetensors")?;
    }
    Ok(())
}

#[test]
fn load_into_reproduces_the_package() -> Result<()> {
    for c in &CHECKPOINTS {
        let vars = VarMap::new();
        let call = (c.build)(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
        let report = checkpoint::load_into(&vars, file(c.name))?;
        assert!(
            report.missing.is_empty() && report.unexpected.is_empty(),
            "{}: {report}",
            c.name
        );
        reproduces(c.name, &call, "load_into")?;
    }
    Ok(())
}

#[test]
fn every_file_has_a_layer() {
    let folder = file("x");
    let folder = folder.parent().expect("a folder");
    let names = std::fs::read_dir(folder).expect("the files").map(|entry| {
        let name = entry.expect("a file").file_name();
        name.to_string_lossy().into_owned()
    });
    for name in names.filter(|name| !name.contains(".io.")) {
        let stem = name.trim_end_matches(".safetensors");
        assert!(CHECKPOINTS.iter().any(|c| c.name == stem), "{name}");
    }
}
