//! Layers of this crate in models of candle-transformers that have none of them from candle-nn:
//! with the same weights the outputs are the same, but where candle's are wrong.

#![cfg(converted)]

use candle_core::{DType, Device, IndexOp, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{condition_projection, layer_norm, Affine, ChunkOrder, LayerNormOptions};
use candle_norm_transformers::originals::{self, WithForward};
use candle_norm_transformers::{blocks, convnext, mamba2, model};

const CPU: Device = Device::Cpu;

/// Numbers from -1 to 1 that are the same on every run.
fn numbers(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 52) as f64 - 1.
    };
    (0..count).map(next).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Result<Tensor> {
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape, &CPU)
}

/// Draws all variables anew; weights of layers so that signals keep their size.
fn draw(vars: &VarMap) -> Result<()> {
    let vars = vars.data().lock().expect("no thread panicked");
    let mut named: Vec<_> = vars.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (seed, (_, var)) in named.into_iter().enumerate() {
        let inputs = var.elem_count() / var.dims()[0];
        let size = if var.rank() > 1 {
            (3. / inputs as f64).sqrt()
        } else {
            1.
        };
        let values = (tensor(var.dims(), seed as u64 + 1)? * size)?;
        var.set(&values.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

fn largest(x: &Tensor) -> Result<f64> {
    x.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar()
}

/// The outputs agree to the last digits of their dtype.
fn agree(what: &str, ours: &Tensor, candles: &Tensor) -> Result<()> {
    assert_eq!(ours.dims(), candles.dims(), "{what}");
    let size = largest(candles)?;
    let apart = largest(&(ours - candles)?)?;
    let near = if ours.dtype() == DType::F64 {
        1e-10
    } else {
        1e-4
    };
    assert!(
        size > 1e-3 && apart <= near * size,
        "{what}: {apart} apart of {size}"
    );
    Ok(())
}

/// A builder of variables, which are made by the first model that asks for them. candle's norms
/// have no f64 on contiguous inputs: models that have one are compared in f32.
fn variables(dtype: DType) -> (VarMap, VarBuilder<'static>) {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
    (vars, vb)
}

#[test]
fn convnext_v2() -> Result<()> {
    let (vars, vb) = variables(DType::F32);
    let candles =
        originals::convnext::convnext(&originals::convnext::Config::atto(), 5, vb.clone())?;
    draw(&vars)?;
    let ours = convnext::convnext(&convnext::Config::atto(), 5, vb)?;
    let images = tensor(&[2, 3, 64, 64], 9)?.to_dtype(DType::F32)?;
    agree("atto", &ours.forward(&images)?, &candles.forward(&images)?)
}

#[test]
fn global_response_norm_in_both_layouts_and_where_a_channel_is_dead() -> Result<()> {
    for (what, channels_last, shape, channels) in [
        ("channels last", true, [2, 3, 4, 5], 3),
        ("channels first", false, [2, 5, 3, 4], 1),
    ] {
        let (vars, vb) = variables(DType::F64);
        let candles = originals::convnext::convnext2_grn(5, channels_last, vb.clone())?;
        draw(&vars)?;
        let ours = convnext::convnext2_grn(5, channels_last, vb)?;
        let x = tensor(&shape, 7)?;
        agree(what, &ours.forward(&x)?, &candles.forward(&x)?)?;

        let gradient = |norm: &dyn Module, x: &Tensor| -> Result<Tensor> {
            let x = Var::from_tensor(x)?;
            let weighted = (norm.forward(&x)? * tensor(&shape, 8)?)?;
            let mut grads = weighted.sum_all()?.backward()?;
            Ok(grads.remove(&x).expect("a gradient"))
        };
        agree(what, &gradient(&ours, &x)?, &gradient(&candles, &x)?)?;

        // The root of zero has an infinite slope, by which candle multiplies zero.
        let mut alive = vec![1f64; 5];
        alive[2] = 0.;
        let mut wide = [1; 4];
        wide[channels] = 5;
        let dead = x.broadcast_mul(&Tensor::from_vec(alive, &wide, &CPU)?)?;
        agree(what, &ours.forward(&dead)?, &candles.forward(&dead)?)?;
        let wrong = gradient(&candles, &dead)?;
        let finite = |x: &Tensor| -> Result<bool> {
            Ok(x.flatten_all()?
                .to_vec1::<f64>()?
                .iter()
                .all(|v| v.is_finite()))
        };
        assert!(
            !finite(&wrong)?,
            "candle's gradient of a dead channel is finite: no fault left"
        );
        let right = gradient(&ours, &dead)?;
        assert!(finite(&right)?, "{what}");
        // Its response is zero, which leaves it the cotangent alone.
        let there = |x: &Tensor| x.narrow(channels, 2, 1)?.contiguous();
        agree(what, &there(&right)?, &there(&tensor(&shape, 8)?)?)?;
    }
    Ok(())
}

fn mamba2_of(ngroups: usize) -> (mamba2::Config, originals::mamba2::Config) {
    // All of one kind, in two modules.
    macro_rules! config {
        ($module:path) => {{
            use $module as m;
            m::Config {
                d_model: 8,
                n_layer: 2,
                vocab_size: 16,
                d_state: 4,
                expand: 2,
                headdim: 4,
                ngroups,
                pad_vocab_size_multiple: 16,
            }
        }};
    }
    (
        config!(candle_norm_transformers::mamba2),
        config!(candle_norm_transformers::originals::mamba2),
    )
}

/// The logits of this crate and of candle, of all tokens at once and of the last one by steps.
fn logits_of_mamba2(ngroups: usize) -> Result<[[Tensor; 2]; 2]> {
    let (config, original) = mamba2_of(ngroups);
    let (vars, vb) = variables(DType::F32);
    let candles = originals::mamba2::Model::new(&original, vb.clone())?;
    draw(&vars)?;
    let ours = mamba2::Model::new(&config, vb)?;
    let tokens = Tensor::new(&[[1u32, 5, 2, 9, 14, 3]], &CPU)?;
    let mut state = mamba2::State::new(1, &config, DType::F32, &CPU)?;
    let mut theirs = originals::mamba2::State::new(1, &original, DType::F32, &CPU)?;
    let at_once = [
        ours.forward_prefill(&tokens, &mut state, 3)?,
        candles.forward_prefill(&tokens, &mut theirs, 3)?,
    ];
    let next = Tensor::new(&[7u32], &CPU)?;
    let step = [
        ours.forward(&next, &mut state)?,
        candles.forward(&next, &mut theirs)?,
    ];
    Ok([at_once, step])
}

#[test]
fn gated_norm_of_mamba2() -> Result<()> {
    for [ours, candles] in logits_of_mamba2(1)? {
        agree("one group", &ours, &candles)?;
    }
    Ok(())
}

/// The norm of Mamba 2 is over each group; candle has one over all features.
#[test]
fn gated_norm_of_mamba2_with_groups_is_not_that_of_candle() -> Result<()> {
    for [ours, candles] in logits_of_mamba2(2)? {
        let apart = largest(&(&ours - &candles)?)? / largest(&candles)?;
        assert!(
            apart > 1e-3,
            "candle norms each group: no fault left ({apart})"
        );
    }
    let (x, gate, weight) = (tensor(&[3, 8], 1)?, tensor(&[3, 8], 2)?, tensor(&[8], 3)?);
    let options = candle_norm::GatedRmsNormOptions {
        eps: 1e-5,
        gate: candle_norm::Gate::Before,
        group_size: Some(4),
        ..Default::default()
    };
    let y = candle_norm::GatedRmsNorm::new(weight.clone(), options)?.forward(&x, Some(&gate))?;
    let gated = (x * gate.silu()?)?;
    let group = |i: usize| -> Result<Tensor> {
        let part = gated.narrow(1, 4 * i, 4)?;
        let root = (part.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
        part.broadcast_div(&root)?
            .broadcast_mul(&weight.narrow(0, 4 * i, 4)?)
    };
    agree(
        "by the formula",
        &y,
        &Tensor::cat(&[group(0)?, group(1)?], 1)?,
    )
}

#[test]
fn modulation_of_flux() -> Result<()> {
    macro_rules! built {
        ($($module:ident)::*, $vb:expr) => {
            $($module)::*::Flux::new(
                &$($module)::*::Config {
                    in_channels: 4,
                    vec_in_dim: 6,
                    context_in_dim: 5,
                    hidden_size: 16,
                    mlp_ratio: 2.,
                    num_heads: 2,
                    depth: 2,
                    depth_single_blocks: 2,
                    axes_dim: vec![4, 4],
                    theta: 10_000,
                    qkv_bias: true,
                    guidance_embed: true,
                },
                $vb,
            )?
        };
    }
    let (vars, vb) = variables(DType::F64);
    let candles = built!(originals::model, vb.clone());
    draw(&vars)?;
    let ours = built!(model, vb);
    let (img, txt) = (tensor(&[2, 6, 4], 1)?, tensor(&[2, 3, 5], 2)?);
    let (img_ids, txt_ids) = (tensor(&[2, 6, 2], 3)?, tensor(&[2, 3, 2], 4)?);
    let (times, y) = (tensor(&[2], 5)?, tensor(&[2, 6], 6)?);
    let run = |net: &dyn WithForward| {
        net.forward(&img, &img_ids, &txt, &txt_ids, &times, &y, Some(&times))
    };
    agree("flux", &run(&ours)?, &run(&candles)?)
}

#[test]
fn modulation_of_sd3() -> Result<()> {
    use blocks::JointBlock as _;
    use originals::blocks::JointBlock as _;
    let (context, x, c) = (
        tensor(&[2, 3, 16], 1)?,
        tensor(&[2, 5, 16], 2)?,
        tensor(&[2, 16], 3)?,
    );

    let (vars, vb) = variables(DType::F64);
    let candles = originals::blocks::MMDiTJointBlock::new(16, 2, false, vb.clone())?;
    draw(&vars)?;
    let ours = blocks::MMDiTJointBlock::new(16, 2, false, vb)?.forward(&context, &x, &c)?;
    let candles = candles.forward(&context, &x, &c)?;
    agree("joint, context", &ours.0, &candles.0)?;
    agree("joint, image", &ours.1, &candles.1)?;

    let (vars, vb) = variables(DType::F64);
    let candles = originals::blocks::MMDiTXJointBlock::new(16, 2, false, vb.clone())?;
    draw(&vars)?;
    let ours = blocks::MMDiTXJointBlock::new(16, 2, false, vb)?.forward(&context, &x, &c)?;
    let candles = candles.forward(&context, &x, &c)?;
    agree("with two attentions, context", &ours.0, &candles.0)?;
    agree("with two attentions, image", &ours.1, &candles.1)?;

    let (vars, vb) = variables(DType::F64);
    let candles = originals::blocks::ContextQkvOnlyJointBlock::new(16, 2, false, vb.clone())?;
    draw(&vars)?;
    let ours = blocks::ContextQkvOnlyJointBlock::new(16, 2, false, vb)?;
    agree(
        "last",
        &ours.forward(&context, &x, &c)?,
        &candles.forward(&context, &x, &c)?,
    )
}

/// The final layer by the projection of this crate, which finds the weights of candle's by their
/// names.
#[test]
fn condition_projection_of_sd3() -> Result<()> {
    let (x, c) = (tensor(&[2, 5, 16], 2)?, tensor(&[2, 16], 3)?);
    let (vars, vb) = variables(DType::F64);
    let candles = originals::blocks::FinalLayer::new(16, 2, 3, vb.clone())?;
    draw(&vars)?;
    let converted = blocks::FinalLayer::new(16, 2, 3, vb.clone())?;
    agree(
        "converted",
        &converted.forward(&x, &c)?,
        &candles.forward(&x, &c)?,
    )?;

    let options = LayerNormOptions {
        eps: 1e-6,
        affine: Affine::None,
        ..Default::default()
    };
    let norm = layer_norm(16, options, vb.pp("norm"))?;
    let projection = condition_projection(16, 16, ChunkOrder::DIT_FINAL, vb.clone())?;
    let linear = candle_nn::linear(16, 12, vb.pp("linear"))?;
    let count = vars.all_vars().len();
    let y = norm.forward_modulated_by(&x, &projection.forward(&c)?.modulation(0)?)?;
    agree("by hand", &y.apply(&linear)?, &candles.forward(&x, &c)?)?;
    // No variable of its own.
    assert_eq!(count, 4);
    assert_eq!(y.i((0, 0))?.dims(), [16]);
    Ok(())
}
