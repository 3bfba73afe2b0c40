//! Statistics of valid positions.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, GroupNorm, InstanceNormOptions, Path, batch_norm,
    group_norm, instance_norm, ops, with_path,
};

use testkit::compare::{assert_close, assert_same_bits};
use testkit::data::{noise, uniform, values};
use testkit::errors::assert_message;
use testkit::subjects::{backward, gradient};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;

fn mask(lengths: &[u32], size: usize) -> Result<Tensor> {
    ops::mask_of_lengths(&Tensor::new(lengths, &CPU)?, size)
}

/// Parameters of four channels.
fn parameters(dtype: DType) -> Result<VarBuilder<'static>> {
    let tensors = [("weight", noise(4, dtype)?), ("bias", noise(4, dtype)?)];
    let tensors = tensors
        .map(|(n, t)| (n.to_string(), t))
        .into_iter()
        .collect();
    Ok(VarBuilder::from_tensors(tensors, dtype, &CPU))
}

/// A sample has the same outputs and gradients alone and padded with anything, to the bit.
#[test]
fn padding_changes_nothing() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        for path in [Path::Fused, Path::Composed] {
            with_path(path, || -> Result<()> {
                let alone = noise((1, 4, 5), dtype)?;
                let others = noise((2, 4, 9), dtype)?;
                let hidden = Tensor::full(f32::NAN, (1, 4, 4), &CPU)?.to_dtype(dtype)?;
                let padded = Tensor::cat(&[&alone, &hidden], 2)?;
                let batch = Var::from_tensor(&Tensor::cat(&[&others, &padded], 0)?)?;
                let alone = Var::from_tensor(&alone)?;
                let mask = mask(&[9, 3, 5], 9)?;
                let instance = InstanceNormOptions {
                    affine: Affine::WeightAndBias,
                    ..Default::default()
                };
                let instance = instance_norm(4, instance, parameters(dtype)?)?;
                let group = group_norm(2, 4, 1e-5, parameters(dtype)?)?;
                let fixed = batch_norm(4, 1e-5, vb(&VarMap::new(), dtype))?;
                let run = |x: &Tensor, mask: &Tensor| -> Result<[Tensor; 3]> {
                    Ok([
                        instance.forward_masked_t(x, mask, true)?,
                        group.forward_masked(x, mask)?,
                        fixed.forward_masked_t(x, mask, false)?,
                    ])
                };
                let whole = self::mask(&[5], 5)?;
                for (got, want) in run(&batch, &mask)?.iter().zip(&run(&alone, &whole)?) {
                    let what = format!("{dtype:?}, {path:?}");
                    let sample = got.narrow(0, 2, 1)?;
                    assert_same_bits(&what, &sample.narrow(2, 0, 5)?.contiguous()?, want);
                    assert!(values(&sample.narrow(2, 5, 4)?)?.iter().all(|v| *v == 0.));
                    let dy = noise((1, 4, 5), dtype)?;
                    let pad = Tensor::ones((1, 4, 4), dtype, &CPU)?;
                    let padded = Tensor::cat(&[&dy, &pad], 2)?;
                    let dys = Tensor::cat(&[&others, &padded], 0)?;
                    let dx = gradient(&backward(got, &dys)?, &batch).narrow(0, 2, 1)?;
                    let dwant = gradient(&backward(want, &dy)?, &alone);
                    assert_same_bits(&what, &dx.narrow(2, 0, 5)?.contiguous()?, &dwant);
                    assert!(values(&dx.narrow(2, 5, 4)?)?.iter().all(|v| *v == 0.));
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn gradients_of_masked_norms() -> Result<()> {
    let x = uniform((3, 4, 5), 1);
    let mask = mask(&[5, 1, 3], 5)?;
    let params = [uniform(4, 2), uniform(4, 3)];
    let [weight, bias] = params.clone();
    let builder = |t: &[Tensor]| {
        let tensors = [("weight", &t[1]), ("bias", &t[2])];
        let tensors = tensors.map(|(n, t)| (n.to_string(), t.clone()));
        VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F64, &CPU)
    };
    for path in [Path::Auto, Path::Composed] {
        with_path(path, || -> Result<()> {
            let inputs = [x.clone(), weight.clone(), bias.clone()];
            let options = BatchNormOptions {
                track_running_stats: false,
                ..1e-2.into()
            };
            gradcheck(
                |t| batch_norm(4, options, builder(t))?.forward_masked_t(&t[0], &mask, true),
                &inputs,
            )?;
            let options = InstanceNormOptions {
                affine: Affine::WeightAndBias,
                ..1e-2.into()
            };
            gradcheck(
                |t| instance_norm(4, options, builder(t))?.forward_masked_t(&t[0], &mask, true),
                &inputs,
            )?;
            gradcheck(
                |t| {
                    let norm = GroupNorm::new(t[1].clone(), t[2].clone(), 4, 2, 1e-2)?;
                    norm.forward_masked(&t[0], &mask)
                },
                &inputs,
            )
        })?;
    }
    Ok(())
}

/// All valid is no mask, and masks are of any dtype.
#[test]
fn a_mask_of_ones_is_none() -> Result<()> {
    let x = noise((3, 4, 5), DType::F32)?;
    let build = || batch_norm(4, 1e-5, vb(&VarMap::new(), DType::F32));
    let (masked, plain) = (build()?, build()?);
    for dtype in [DType::U8, DType::U32, DType::I64, DType::F32, DType::F16] {
        let ones = Tensor::ones((3, 5), dtype, &CPU)?;
        let y = masked.forward_masked_t(&x, &ones, true)?;
        let want = candle_core::ModuleT::forward_t(&plain, &x, true)?;
        assert_close("y", &y, &values(&want)?, 1e-6);
    }
    let [a, b] = [&masked, &plain].map(|n| n.running_stats().map(|s| s.snapshot()));
    let [a, b] = [a.expect("statistics")?, b.expect("statistics")?];
    assert_close("variance", &a.var, &values(&b.var)?, 1e-6);
    assert_eq!(a.num_batches_tracked, b.num_batches_tracked);
    Ok(())
}

/// No valid position: zeros, gradients of zero, and statistics as they were.
#[test]
fn nothing_valid_is_as_an_empty_batch() -> Result<()> {
    let vars = VarMap::new();
    let norm: BatchNorm = batch_norm(4, 1e-5, vb(&vars, DType::F32))?;
    let x = Var::from_tensor(&Tensor::full(f32::NAN, (2, 4, 3), &CPU)?)?;
    let y = norm.forward_masked_t(&x, &mask(&[0, 0], 3)?, true)?;
    assert_eq!(values(&y)?, [0.; 24]);
    let grads = backward(&y, &y.ones_like()?)?;
    assert_eq!(values(&gradient(&grads, &x))?, [0.; 24]);
    let weight = norm.weight().expect("a weight");
    assert_eq!(values(&gradient(&grads, weight))?, [0.; 4]);
    let after = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(
        (values(&after.mean)?, after.num_batches_tracked),
        (vec![0.; 4], 0)
    );
    // One is the usual error, and changes nothing.
    let one = norm.forward_masked_t(&x, &mask(&[1, 0], 3)?, true);
    assert_message(one, &["BatchNorm", "more than 1 value per channel"]);
    assert_eq!(
        norm.running_stats()
            .expect("statistics")
            .snapshot()?
            .num_batches_tracked,
        0
    );
    Ok(())
}

#[test]
fn mistakes_with_masks_are_named() -> Result<()> {
    let x = noise((2, 4, 3), DType::F32)?;
    let norm = batch_norm(4, 1e-5, vb(&VarMap::new(), DType::F32))?;
    let wrong = Tensor::ones((2, 4, 3), DType::U8, &CPU)?;
    assert_message(
        norm.forward_masked_t(&x, &wrong, true),
        &["BatchNorm", "mask", "[2, 3]", "[2, 4, 3]"],
    );
    let group = group_norm(2, 6, 1e-5, vb(&VarMap::new(), DType::F32))?;
    assert_message(
        group.forward_masked(&x, &mask(&[3, 3], 3)?),
        &["GroupNorm", "6 channels"],
    );
    assert_message(mask(&[4], 3), &["mask_of_lengths", "0 to 3", "got 4"]);
    let floats = Tensor::new(&[1f32], &CPU)?;
    assert_message(
        ops::mask_of_lengths(&floats, 3),
        &["mask_of_lengths", "whole numbers"],
    );
    Ok(())
}
