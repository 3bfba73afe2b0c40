//! Where a weight-normalized layer starts from: a first batch, as Salimans and Kingma (2016,
//! section 3) have it, a plain layer, or a checkpoint that knows of no weight norm.

use std::fmt::Debug;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2dConfig, Linear, VarBuilder, VarMap,
};
use candle_norm::{Norm, WeightNorm, Weighted, weight_norm};
use testkit::data::uniform;
use testkit::data::{bits, tensor, values};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;

/// The bits of all parameters, to see that nothing changed them.
fn state(layer: &dyn Norm) -> Result<Vec<Vec<u64>>> {
    layer.parameters().iter().map(|(_, p)| bits(p)).collect()
}

#[track_caller]
fn refused<T: Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.expect_err("an error").to_string();
    for part in [&["WeightNorm", "expected", "got"], parts].concat() {
        assert!(message.contains(part), "expected {part:?} in: {message}");
    }
}

/// The mean and the biased variance of each channel, with channels on `axis`.
fn moments(y: &Tensor, axis: usize) -> Result<Vec<(f64, f64)>> {
    let channels = y.dims()[axis];
    let inner: usize = y.dims()[axis + 1..].iter().product();
    let y = values(y)?;
    let of_channel = |c: usize| -> Vec<f64> {
        let indexed = y.iter().enumerate();
        indexed
            .filter(|(i, _)| i / inner % channels == c)
            .map(|(_, v)| *v)
            .collect()
    };
    Ok((0..channels)
        .map(of_channel)
        .map(|v| {
            let n = v.len() as f64;
            let mean = v.iter().sum::<f64>() / n;
            (mean, v.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n)
        })
        .collect())
}

/// Initializes `layer` from a batch, far from mean 0 and variance 1, and asserts what must hold of
/// its outputs.
fn check_first_batch<L: Weighted>(
    layer: &WeightNorm<L>,
    dims: &[usize],
    axis: usize,
) -> Result<()> {
    let dtype = layer.v().dtype();
    let what = format!("{layer:?} {dtype:?}");
    let x = (uniform(dims, 5) * 7.)?.affine(1., 3.)?.to_dtype(dtype)?;
    let v = bits(layer.v())?;
    let y = layer.init_from_batch(&x)?;
    // A half-precision g and b are rounded once each: to 2⁻¹¹ and 2⁻⁸ of themselves.
    let tolerance = match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    };
    for (channel, (mean, var)) in moments(&y, axis)?.into_iter().enumerate() {
        assert!(
            mean.abs() <= tolerance,
            "{what}: mean {mean} of channel {channel}"
        );
        assert!(
            (var - 1.).abs() <= tolerance,
            "{what}: variance {var} of channel {channel}"
        );
    }
    assert_eq!(bits(layer.v())?, v, "{what}: the direction moved");
    assert_eq!(
        bits(&layer.forward(&x)?)?,
        bits(&y)?,
        "{what}: returns other outputs"
    );
    Ok(())
}

#[test]
fn outputs_of_a_first_batch_have_mean_0_and_variance_1() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let vars = VarMap::new();
        let vb = vb(&vars, dtype);
        check_first_batch(
            &weight_norm::linear(5, 4, Some(0).into(), vb.pp("a"))?,
            &[32, 5],
            1,
        )?;
        check_first_batch(
            &weight_norm::linear(5, 4, Some(0).into(), vb.pp("b"))?,
            &[4, 9, 5],
            2,
        )?;
        for groups in [1, 2] {
            let vb = vb.pp(groups);
            let config = Conv1dConfig {
                groups,
                padding: 1,
                ..Default::default()
            };
            let layer = weight_norm::conv1d(4, 6, 3, config, Some(0).into(), vb.pp("c"))?;
            check_first_batch(&layer, &[5, 4, 9], 1)?;
            let config = Conv2dConfig {
                groups,
                stride: 2,
                ..Default::default()
            };
            let layer = weight_norm::conv2d(4, 6, 3, config, Some(0).into(), vb.pp("d"))?;
            check_first_batch(&layer, &[5, 4, 7, 8], 1)?;
        }
        // Outputs of transposed convolutions lie on axis 1 of their weight.
        let layer = weight_norm::conv_transpose1d(
            4,
            6,
            3,
            ConvTranspose1dConfig::default(),
            Some(1).into(),
            vb.pp("e"),
        )?;
        check_first_batch(&layer, &[5, 4, 9], 1)?;
        let layer = weight_norm::conv_transpose2d(
            4,
            6,
            3,
            ConvTranspose2dConfig::default(),
            Some(1).into(),
            vb.pp("f"),
        )?;
        check_first_batch(&layer, &[5, 4, 5, 6], 1)?;
    }
    Ok(())
}

/// With t = v·x / ‖v‖ the paper has g = 1/σ[t] and b = −μ[t]/σ[t], whatever g and b were.
#[test]
fn magnitude_and_bias_are_those_of_the_paper() -> Result<()> {
    let vars = VarMap::new();
    let layer = weight_norm::linear(3, 2, Some(0).into(), vb(&vars, DType::F64))?;
    let x = [[1., 2., -1.], [0., 4., 3.], [5., -2., 0.5], [2., 2., 2.]];
    let v = values(layer.v())?;
    let (mut g, mut b) = (vec![], vec![]);
    for v in v.chunks(3) {
        let length = v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let t = x.map(|x| x.iter().zip(v).map(|(x, v)| x * v).sum::<f64>() / length);
        let mean = t.iter().sum::<f64>() / 4.;
        let deviation = (t.iter().map(|t| (t - mean).powi(2)).sum::<f64>() / 4.).sqrt();
        g.push(1. / deviation);
        b.push(-mean / deviation);
    }
    // A second time, from other values of g and b, it ends at the same.
    for _ in 0..2 {
        layer.init_from_batch(&tensor(&x.concat(), &[4, 3], DType::F64)?)?;
        let got = [values(layer.g())?, values(layer.bias().expect("a bias"))?].concat();
        for (got, want) in got.iter().zip([&g[..], &b[..]].concat()) {
            assert!((got - want).abs() <= 1e-12 * want.abs(), "{got} for {want}");
        }
    }
    Ok(())
}

#[test]
fn what_no_first_batch_can_do_is_refused_and_changes_nothing() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, &CPU);
    let varied = uniform((6, 3), 1).to_dtype(DType::F32)?;
    let layer = weight_norm::linear(3, 2, Some(0).into(), vb.pp("a"))?;
    let before = state(&layer)?;
    let nan = (&varied * f64::NAN)?;
    for (x, parts) in [
        (ones(&[6, 3])?, ["vary over the batch", "a variance of"]),
        (nan, ["vary over the batch", "NaN"]),
        (ones(&[1, 3])?, ["more than one output", "[1, 3]"]),
        (ones(&[0, 3])?, ["a batch with outputs", "[0, 3]"]),
        (ones(&[6, 4])?, ["3 features on the last axis", "[6, 4]"]),
        (ones(&[])?, ["3 features on the last axis", "[]"]),
        (ones(&[6, 3])?.to_dtype(DType::F64)?, ["dtype F64", "F32"]),
    ] {
        refused(layer.init_from_batch(&x), &parts);
        assert_eq!(state(&layer)?, before, "{parts:?}");
    }
    let conv = weight_norm::conv1d(3, 2, 8, Default::default(), Some(0).into(), vb.pp("b"))?;
    refused(
        conv.init_from_batch(&ones(&[1, 3, 8])?),
        &["more than one output", "[1, 3, 8]"],
    );

    let without = weight_norm::linear_no_bias(3, 2, Some(0).into(), vb.pp("c"))?;
    refused(without.init_from_batch(&varied), &["with a bias"]);
    for dim in [Some(1), None] {
        let other = weight_norm::linear(3, 2, dim.into(), vb.pp("d").pp(format!("{dim:?}")))?;
        refused(
            other.init_from_batch(&varied),
            &["dim 0", &format!("{dim:?}")],
        );
    }
    // The default of a transposed convolution has a length for each input, as in PyTorch.
    let config = ConvTranspose1dConfig::default();
    let up = weight_norm::conv_transpose1d(3, 2, 2, config, Some(0).into(), vb.pp("e"))?;
    refused(
        up.init_from_batch(&ones(&[2, 3, 4])?),
        &["dim 1", "Some(0)"],
    );

    let zeros = VarBuilder::zeros(DType::F32, &CPU);
    let fixed = weight_norm::linear(3, 2, Some(0).into(), zeros)?;
    refused(fixed.init_from_batch(&varied), &[]);
    Ok(())
}

fn plain(bias: bool) -> Linear {
    let f32s = |t: Tensor| t.to_dtype(DType::F32).expect("a conversion");
    Linear::new(f32s(uniform((4, 5), 1)), bias.then(|| f32s(uniform(4, 2))))
}

/// Both compute the same up to the rounding of g · v / ‖v‖.
#[track_caller]
fn assert_same_outputs(a: &impl Module, b: &impl Module) -> Result<()> {
    let x = uniform((7, 5), 3).to_dtype(DType::F32)?;
    let (a, b) = (values(&a.forward(&x)?)?, values(&b.forward(&x)?)?);
    for (a, b) in a.iter().zip(&b) {
        assert!((a - b).abs() <= 2e-6 * (1. + b.abs()), "{a} for {b}");
    }
    Ok(())
}

#[test]
fn a_layer_starts_as_a_plain_one_with_variables_of_its_own() -> Result<()> {
    for bias in [true, false] {
        for dim in [Some(0), Some(1), None] {
            let plain = plain(bias);
            let layer = WeightNorm::from_layer(&plain, dim.into())?;
            assert_same_outputs(&layer, &plain)?;
            let x = uniform((7, 5), 3).to_dtype(DType::F32)?;
            let grads = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
            assert_eq!(layer.parameters().len(), if bias { 3 } else { 2 });
            for (name, param) in layer.parameters() {
                assert!(param.is_variable(), "{name}");
                assert!(grads.get(&param).is_some(), "no gradient for {name}");
            }
            assert!(grads.get(plain.weight()).is_none());
        }
    }
    refused(
        WeightNorm::from_layer(&plain(true), Some(2).into()),
        &["dim", "[4, 5]"],
    );
    Ok(())
}

#[test]
fn a_layer_takes_over_the_values_of_a_plain_one() -> Result<()> {
    for dim in [Some(0), Some(1), None] {
        let vars = VarMap::new();
        let layer = weight_norm::linear(5, 4, dim.into(), vb(&vars, DType::F32))?;
        for bias in [true, false] {
            layer.copy_from(&plain(bias))?;
            assert_same_outputs(&layer, &plain(bias))?;
        }
        // The variables of the model are the ones that changed.
        assert_eq!(
            bits(vars.data().lock().expect("one thread")["bias"].as_tensor())?,
            [0; 4]
        );
    }

    let vars = VarMap::new();
    let layer = weight_norm::linear(5, 4, Some(0).into(), vb(&vars, DType::F32))?;
    let without = weight_norm::linear_no_bias(5, 4, Some(0).into(), vb(&vars, DType::F32).pp("b"))?;
    let before = [state(&layer)?, state(&without)?];
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &CPU);
    let f32 = DType::F32;
    let other_shape = Linear::new(zeros(&[5, 4], f32)?, None);
    refused(
        layer.copy_from(&other_shape),
        &["weight", "[4, 5]", "[5, 4]"],
    );
    let other_bias = Linear::new(zeros(&[4, 5], f32)?, Some(zeros(&[5], f32)?));
    refused(layer.copy_from(&other_bias), &["bias", "[4]", "[5]"]);
    let integers = Linear::new(zeros(&[4, 5], DType::U8)?, None);
    refused(layer.copy_from(&integers), &["weight", "U8"]);
    let integers = Linear::new(zeros(&[4, 5], f32)?, Some(zeros(&[4], DType::I64)?));
    refused(layer.copy_from(&integers), &["bias", "I64"]);
    refused(without.copy_from(&plain(true)), &["without bias"]);
    assert_eq!([state(&layer)?, state(&without)?], before);

    let fixed = weight_norm::linear(5, 4, Some(0).into(), VarBuilder::zeros(f32, &CPU))?;
    refused(fixed.copy_from(&plain(true)), &["variables"]);
    Ok(())
}

/// candle makes such layers too; they fail where they first compute.
#[test]
fn a_plain_layer_that_cannot_be_is_refused_by_name() -> Result<()> {
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, &CPU);
    let grouped = |groups: usize, outputs: usize| -> Result<Tensor> {
        let config = Conv1dConfig {
            groups,
            ..Default::default()
        };
        let plain = Conv1d::new(ones(&[outputs, 3, 1])?, None, config);
        WeightNorm::from_layer(&plain, Some(0).into())?.forward(&ones(&[1, 9, 4])?)
    };
    assert_eq!(grouped(3, 6)?.dims(), [1, 6, 4]);
    refused(grouped(3, 4), &["groups (3)", "9 in and 4 out"]);
    refused(grouped(0, 4), &["groups of at least 1"]);
    refused(grouped(usize::MAX, 4), &["groups", "4 out"]);
    let up = |groups: usize| -> Result<Tensor> {
        let config = ConvTranspose1dConfig {
            groups,
            ..Default::default()
        };
        let plain = ConvTranspose1d::new(ones(&[4, 3, 1])?, None, config);
        WeightNorm::from_layer(&plain, Some(0).into())?.forward(&ones(&[1, 4, 5])?)
    };
    assert_eq!(up(2)?.dims(), [1, 6, 5]);
    refused(up(3), &["groups (3)", "4 in and 9 out"]);
    refused(up(usize::MAX), &["groups", "4 in"]);

    let scalar = Linear::new(ones(&[])?, None);
    refused(
        WeightNorm::from_layer(&scalar, Some(0).into()),
        &["dim", "[]"],
    );
    let scalar = WeightNorm::from_layer(&scalar, None.into())?;
    refused(scalar.forward(&ones(&[2, 3])?), &["rank 2", "[]"]);
    let none = weight_norm::linear(3, 0, Some(0).into(), vb(&VarMap::new(), DType::F32))?;
    refused(
        none.init_from_batch(&ones(&[4, 3])?),
        &["a batch with outputs"],
    );
    Ok(())
}

/// A plain layer's `weight`, read from a file or found in the map that the plain layer was built
/// from.
#[test]
fn a_checkpoint_of_a_plain_layer_is_a_start() -> Result<()> {
    let conv = Conv1dConfig {
        padding: 1,
        ..Default::default()
    };
    for from_map in [false, true] {
        let vars = VarMap::new();
        let weight = vb(&vars, DType::F64).get((3, 2, 3), "weight")?;
        let bias = vb(&vars, DType::F64).get(3, "bias")?;
        for (name, seed) in [("weight", 7), ("bias", 8)] {
            let var = vars.data().lock().expect("one thread")[name].clone();
            var.set(&uniform(var.shape(), seed))?;
        }
        let tensors = [("weight", &weight), ("bias", &bias)];
        let tensors =
            tensors.map(|(name, t)| (name.to_string(), t.detach().copy().expect("a copy")));
        let source = match from_map {
            true => vb(&vars, DType::F64),
            false => VarBuilder::from_tensors(tensors.into(), DType::F64, &CPU),
        };
        let layer = weight_norm::conv1d(2, 3, 3, conv, Some(0).into(), source)?;
        let x = uniform((1, 2, 6), 9);
        let (y, want) = (
            layer.forward(&x)?,
            Conv1d::new(weight, Some(bias), conv).forward(&x)?,
        );
        for (y, want) in values(&y)?.iter().zip(values(&want)?) {
            assert!(
                (y - want).abs() <= 1e-12,
                "from_map {from_map}: {y} for {want}"
            );
        }
        assert!(layer.parameters().iter().all(|(_, p)| p.is_variable()));
        let names: Vec<_> = {
            let data = vars.data().lock().expect("one thread");
            let mut names: Vec<_> = data.keys().cloned().collect();
            names.sort();
            names
        };
        let own = [
            "parametrizations.weight.original0",
            "parametrizations.weight.original1",
        ];
        let expected = match from_map {
            true => [&["bias"], &own[..], &["weight"]].concat(),
            false => vec!["bias", "weight"],
        };
        assert_eq!(names, expected);
    }
    Ok(())
}
