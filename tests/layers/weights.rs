//! Spectral norm and weight standardization around layers: values, state, files, threads.

use std::collections::HashMap;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{Conv2d, Conv2dConfig, ConvTranspose2d, Linear, VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{
    AveragedModel, Norm, Path, SpectralNorm, SpectralNormOptions, WeightStandardization,
    WeightStandardizationOptions, checkpoint, ops, param_groups, spectral_norm, trainable_vars,
    weight_standardization, with_path,
};

use testkit::compare::{assert_close, assert_same_bits};
use testkit::data::{noise, uniform, values};
use testkit::errors::assert_message;
use testkit::subjects::{backward, gradient};
use testkit::vars::{names, set, var, vb};

const CPU: Device = Device::Cpu;
const U: &str = "parametrizations.weight.0._u";
const V: &str = "parametrizations.weight.0._v";
const ORIGINAL: &str = "parametrizations.weight.original";
const DIGITS: f64 = 2e-9;

/// A builder of the tensors of a file.
fn file(tensors: &[(&str, Tensor)], dtype: DType) -> VarBuilder<'static> {
    let tensors = tensors.iter().map(|(n, t)| (n.to_string(), t.clone()));
    VarBuilder::from_tensors(tensors.collect(), dtype, &CPU)
}

/// W, u and v of the worked example.
fn example() -> Result<[Tensor; 3]> {
    Ok([
        Tensor::new(&[[1f64, 2., 0.], [0., 1., -1.]], &CPU)?,
        Tensor::new(&[0.6f64, 0.8], &CPU)?,
        Tensor::new(&[0f64, 1., 0.], &CPU)?,
    ])
}

fn example_layer(names: [&str; 3]) -> Result<SpectralNorm<Linear>> {
    let [w, u, v] = example()?;
    let w = Var::from_tensor(&w)?.into_inner();
    let tensors = [(names[0], w), (names[1], u), (names[2], v)];
    spectral_norm::linear_no_bias(3, 2, Default::default(), file(&tensors, DType::F64))
}

/// Output, gradients and vectors of the worked example, under the names of both hooks.
#[test]
fn spectral_norm_of_the_example() -> Result<()> {
    let x = Var::new(&[[1f64, 1., 2.]], &CPU)?;
    let dy = Tensor::new(&[[1f64, -2.]], &CPU)?;
    for names in [[ORIGINAL, U, V], ["weight_orig", "weight_u", "weight_v"]] {
        let layer = example_layer(names)?;
        let y = layer.forward_t(&x, false)?;
        assert_close("y", &y, &[1.5, -0.5], DIGITS);
        let grads = backward(&y, &dy)?;
        assert_close("dx", &gradient(&grads, &x), &[0.5, 0., 1.], DIGITS);
        let dw = gradient(&grads, layer.original());
        assert_close("dW", &dw, &[0.5, -0.25, 1., -1., -2., -2.], DIGITS);
        assert_eq!(values(&layer.vectors()?[0])?, [0.6, 0.8]);

        let y = layer.forward_t(&x, true)?;
        assert_close("y", &y, &[1.224744871, -0.4082482905], DIGITS);
        let [u, v] = layer.vectors()?;
        assert_close("u", &u, &[0.894427191, 0.4472135955], DIGITS);
        assert_close(
            "v",
            &v,
            &[0.3651483717, 0.9128709292, -0.1825741858],
            DIGITS,
        );
        // The backward is that of its own forward, whatever comes between.
        layer.forward_t(&x, true)?;
        let dw = gradient(&backward(&y, &dy)?, layer.original());
        let want = [
            0.1360827635,
            -0.272165527,
            0.9525793444,
            -0.9525793444,
            -1.15670349,
            -1.56495178,
        ];
        assert_close("dW", &dw, &want, DIGITS);
    }
    Ok(())
}

#[test]
fn spectral_norm_finds_the_largest_singular_value() -> Result<()> {
    let [w, ..] = example()?;
    let layer = SpectralNorm::from_layer(&Linear::new(w.clone(), None), Default::default())?;
    for _ in 0..30 {
        layer.forward_t(&Tensor::zeros((1, 3), DType::F64, &CPU)?, true)?;
    }
    let ratio = (w / layer.weight()?)?.get(0)?.get(0)?.to_scalar::<f64>()?;
    assert!((ratio.abs() - 2.449489743).abs() < 1e-8, "{ratio}");
    let x = uniform((4, 3), 1);
    let baked: Linear = layer.bake()?;
    let (y, want) = (layer.forward_t(&x, false)?, baked.forward(&x)?);
    assert_close("baked", &y, &values(&want)?, 1e-12);
    Ok(())
}

#[test]
fn gradients_of_spectral_norm() -> Result<()> {
    for (dims, dim) in [(vec![3, 5], 0), (vec![4, 3, 2], 1), (vec![2, 3, 2, 2], 0)] {
        let rest = dims.iter().product::<usize>() / dims[dim];
        let (u, v) = (uniform(dims[dim], 2), uniform(rest, 3));
        for path in [Path::Auto, Path::Composed] {
            with_path(path, || {
                gradcheck(
                    |t| ops::spectral_norm(&t[0], &u, &v, dim),
                    &[uniform(dims.as_slice(), 1)],
                )
            })?;
        }
    }
    // Through the layers.
    let (vars, options) = (VarMap::new(), SpectralNormOptions::default());
    let layer = spectral_norm::conv_transpose2d(
        3,
        4,
        2,
        Default::default(),
        options,
        vb(&vars, DType::F64),
    )?;
    assert_eq!(layer.vectors()?.map(|t| t.elem_count()), [4, 12]);
    gradcheck(
        |t| layer.forward_t(&t[0], false),
        &[uniform((2, 3, 3, 3), 4)],
    )
}

/// Zeros have no singular value: the weight and all gradients are zero.
#[test]
fn spectral_norm_of_zeros() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let w = Var::zeros((2, 3), dtype, &CPU)?;
        let layer = spectral_norm::linear_no_bias(
            3,
            2,
            Default::default(),
            file(&[("weight", w.as_tensor().clone())], dtype),
        )?;
        for train in [false, true] {
            let y = layer.forward_t(&noise((2, 3), dtype)?, train)?;
            assert_eq!(values(&y)?, [0.; 4]);
            let dw = gradient(&backward(&y, &y.ones_like()?)?, layer.original());
            assert_eq!(values(&dw)?, [0.; 6]);
        }
    }
    Ok(())
}

/// Inference, failed forwards and empty inputs leave the vectors alone.
#[test]
fn only_training_changes_the_vectors() -> Result<()> {
    let vars = VarMap::new();
    let layer = spectral_norm::linear(3, 2, Default::default(), vb(&vars, DType::F32))?;
    assert_eq!(names(&vars), ["bias", U, V, ORIGINAL]);
    let buffers: Vec<_> = layer.buffers().into_iter().map(|(n, _)| n).collect();
    assert_eq!(buffers, [U, V]);
    // Far from the singular vectors.
    set(&vars, U, &Tensor::new(&[1f32, 0.], &CPU)?)?;
    set(&vars, V, &Tensor::new(&[1f32, 0., 0.], &CPU)?)?;
    let before = layer.vectors()?;
    let same = |what: &str| -> Result<()> {
        for (now, before) in layer.vectors()?.iter().zip(&before) {
            assert_same_bits(what, now, before);
        }
        Ok(())
    };
    let x = noise((4, 3), DType::F32)?;
    layer.forward_t(&x, false)?;
    same("inference")?;
    assert!(layer.forward_t(&noise((4, 5), DType::F32)?, true).is_err());
    assert!(layer.forward_t(&noise((4, 3), DType::F64)?, true).is_err());
    same("a failed forward")?;
    assert_eq!(layer.forward_t(&x.narrow(0, 0, 0)?, true)?.dims(), [0, 2]);
    same("an empty input")?;
    layer.forward_t(&x, true)?;
    assert!(values(&layer.vectors()?[0])? != values(&before[0])?);
    // No optimizer has them, and averages are copies.
    assert_eq!(trainable_vars(&vars).len(), 2);
    let groups = param_groups(&vars);
    let counts = (
        groups.decay.len(),
        groups.no_decay.len(),
        groups.statistics.len(),
    );
    assert_eq!(counts, (1, 1, 2));
    let mut averaged = AveragedModel::new(&vars, 0.9)?;
    layer.forward_t(&x, true)?;
    averaged.update()?;
    let inside = averaged.evaluate(|| layer.vectors())?;
    assert_same_bits("an average", &inside[0], &layer.vectors()?[0]);
    Ok(())
}

/// Each of many steps on several threads counts, and they are those of one thread.
#[test]
fn threads_lose_no_step() -> Result<()> {
    let weight = noise((5, 7), DType::F32)?;
    let start = |vars: &VarMap| -> Result<SpectralNorm<Linear>> {
        let layer = spectral_norm::linear_no_bias(7, 5, Default::default(), vb(vars, DType::F32))?;
        set(vars, ORIGINAL, &weight)?;
        set(vars, U, &Tensor::new(&[1f32, 0., 0., 0., 0.], &CPU)?)?;
        set(
            vars,
            V,
            &Tensor::new(&[0f32, 0., 0., 0., 0., 0., 1.], &CPU)?,
        )?;
        Ok(layer)
    };
    let x = noise((2, 7), DType::F32)?;
    let (alone, shared) = (VarMap::new(), VarMap::new());
    let (one, many) = (start(&alone)?, start(&shared)?);
    for _ in 0..12 {
        one.forward_t(&x, true)?;
    }
    // A layer of the same variables.
    let other = spectral_norm::linear_no_bias(7, 5, Default::default(), vb(&shared, DType::F32))?;
    std::thread::scope(|scope| {
        for i in 0..4 {
            let layer = if i % 2 == 0 { &many } else { &other };
            let x = &x;
            scope.spawn(move || {
                for _ in 0..3 {
                    layer.forward_t(x, true).expect("an input that fits");
                }
            });
        }
    });
    for (got, want) in many.vectors()?.iter().zip(&one.vectors()?) {
        assert_same_bits("vectors", got, want);
    }
    Ok(())
}

#[test]
fn files_of_spectral_norm() -> Result<()> {
    let [w, u, v] = example()?;
    // BigGAN: v from u0, then u.
    let big_gan = [("weight", w.clone()), ("u0", u.reshape((1, 2))?)];
    let layer =
        spectral_norm::linear_no_bias(3, 2, Default::default(), file(&big_gan, DType::F64))?;
    let [got, _] = layer.vectors()?;
    assert_close("u", &got, &[0.8541985556, 0.5199469469], DIGITS);
    let y = layer.forward_t(&Tensor::new(&[[1f64, 1., 2.]], &CPU)?, false)?;
    assert_close("y", &y, &[1.245682198, -0.4152273993], DIGITS);
    // A plain layer starts anew.
    let plain = [("weight", w.clone())];
    let layer = spectral_norm::linear_no_bias(3, 2, Default::default(), file(&plain, DType::F64))?;
    let [u0, v0] = layer.vectors()?;
    for vector in [u0, v0] {
        let length: f64 = values(&vector)?.iter().map(|v| v * v).sum();
        assert!((length - 1.).abs() < 1e-12);
    }
    // What is not finite is refused by its name.
    let bad = Tensor::new(&[f64::NAN, 0.], &CPU)?;
    let tensors = [(ORIGINAL, w.clone()), (U, bad), (V, v.clone())];
    assert_message(
        spectral_norm::linear_no_bias(3, 2, Default::default(), file(&tensors, DType::F64)),
        &["SpectralNorm", U],
    );
    // Into variables, by the names of the older hook.
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("old.safetensors");
    let wide = |t: &Tensor| t.to_dtype(DType::F32);
    let tensors = HashMap::from([
        ("d.weight_orig".to_string(), wide(&w)?),
        ("d.weight_u".to_string(), wide(&u)?),
        ("d.weight_v".to_string(), wide(&v)?),
    ]);
    candle_core::safetensors::save(&tensors, &path)?;
    let vars = VarMap::new();
    let layer =
        spectral_norm::linear_no_bias(3, 2, Default::default(), vb(&vars, DType::F32).pp("d"))?;
    let report = checkpoint::load_into_strict(&vars, &path)?;
    assert_eq!(report.loaded.len(), 3);
    assert_eq!(values(&var(&vars, &format!("d.{U}")))?, values(&wide(&u)?)?);
    let y = layer.forward_t(&Tensor::new(&[[1f32, 1., 2.]], &CPU)?, false)?;
    assert_close("y", &y, &[1.5, -0.5], 1e-6);
    layer.reset()?;
    assert!(values(&layer.vectors()?[0])? != values(&wide(&u)?)?);
    Ok(())
}

#[test]
fn mistakes_with_spectral_norm_are_named() -> Result<()> {
    let [w, u, v] = example()?;
    assert_message(
        ops::spectral_norm(&w, &v, &v, 0),
        &["SpectralNorm", "u", "[2]", "[3]"],
    );
    assert_message(ops::spectral_norm(&w, &u, &v, 2), &["SpectralNorm", "dim"]);
    assert_message(
        ops::power_iteration(&w, [&u, &v], 0, 1, 0.),
        &["SpectralNorm", "eps"],
    );
    let build = |options| spectral_norm::linear(3, 2, options, vb(&VarMap::new(), DType::F32));
    let options = SpectralNormOptions {
        dim: Some(3),
        ..Default::default()
    };
    assert_message(build(options), &["SpectralNorm", "dim"]);
    let options = SpectralNormOptions {
        eps: f64::NAN,
        ..Default::default()
    };
    assert_message(build(options), &["SpectralNorm", "eps"]);
    Ok(())
}

/// Outputs and gradients of the worked examples, through a convolution.
#[test]
fn standardized_convolutions_of_the_examples() -> Result<()> {
    let numbers = [1f64, 2., 3., 6., 2., 2., 2., 2.];
    let weight = Var::from_tensor(&Tensor::new(&numbers, &CPU)?.reshape((2, 2, 1, 2))?)?;
    let x = Var::from_tensor(&Tensor::new(&[1f64, 2., -1., 1.], &CPU)?.reshape((1, 2, 1, 2))?)?;
    let dy = Tensor::new(&[1f64, 2.], &CPU)?.reshape((1, 2, 1, 1))?;
    let layer = WeightStandardization::<Conv2d>::from_layer(
        &Conv2d::new(weight.as_tensor().clone(), None, Conv2dConfig::default()),
        Default::default(),
    )?;
    let y = layer.forward(&x)?;
    assert_close("y", &y, &[-0.5345224075, 0.], DIGITS);
    let grads = backward(&y, &dy)?;
    let want = [-1.069044815, -0.5345224075, 0., 1.603567222];
    assert_close("dx", &gradient(&grads, &x), &want, DIGITS);
    let dw = values(&gradient(&grads, layer.original()))?;
    let want = [0.05727027976, 0.6299728483, -0.9354142131, 0.248171085];
    for (got, want) in dw
        .iter()
        .zip(want.into_iter().chain([500., 2500., -3500., 500.]))
    {
        assert!(
            (got - want).abs() < 1e-8 * want.abs().max(1.),
            "{got}, {want}"
        );
    }

    let gain = Var::from_tensor(&Tensor::new(&[2f64, 1.], &CPU)?.reshape((2, 1, 1, 1))?)?;
    let gamma = WeightStandardizationOptions::GAMMA_RELU;
    let scaled = ops::weight_standardization(&weight, Some((&gain, gamma)), 1e-5)?;
    let y = (x
        .broadcast_mul(&scaled)?
        .sum_keepdim((1, 2, 3))?
        .reshape((1, 2, 1, 1))?
        + Tensor::new(&[0.5f64, -1.], &CPU)?.reshape((1, 2, 1, 1))?)?;
    assert_close("y", &y, &[-0.4161482379, -1.], DIGITS);
    let grads = backward(&y, &dy)?;
    let want = [-1.832296476, -0.9161482379, 0., 2.748444714];
    assert_close("dx", &gradient(&grads, &x), &want, DIGITS);
    let dgain = values(&gradient(&grads, &gain))?;
    assert!(
        (dgain[0] + 0.458074119).abs() < 1e-9 && dgain[1] == 0.,
        "{dgain:?}"
    );
    let dw = values(&gradient(&grads, &weight))?;
    let want = [0.09815911372, 1.079746325, -1.603259416, 0.4253539781];
    for (got, want) in dw.iter().zip(want) {
        assert!((got - want).abs() < 1e-8, "{got}, {want}");
    }
    Ok(())
}

#[test]
fn standardized_layers() -> Result<()> {
    let vars = VarMap::new();
    let options = WeightStandardizationOptions {
        gamma: Some(WeightStandardizationOptions::GAMMA_SILU),
        ..Default::default()
    };
    let layer = weight_standardization::conv2d(
        3,
        4,
        3,
        Default::default(),
        options,
        vb(&vars, DType::F64),
    )?;
    assert_eq!(names(&vars), ["bias", "gain", "weight"]);
    let groups = param_groups(&vars);
    assert_eq!((groups.decay.len(), groups.no_decay.len()), (1, 2));
    let x = uniform((2, 3, 5, 5), 1);
    let baked: Conv2d = layer.bake()?;
    assert_close(
        "baked",
        &layer.forward(&x)?,
        &values(&baked.forward(&x)?)?,
        1e-12,
    );
    gradcheck(|t| layer.forward(&t[0]), &[uniform((1, 3, 4, 4), 2)])?;
    let kept: Vec<_> = layer.parameters().into_iter().map(|(n, _)| n).collect();
    assert_eq!(kept, ["weight", "gain", "bias"]);
    set(
        &vars,
        "gain",
        &Tensor::zeros((4, 1, 1, 1), DType::F64, &CPU)?,
    )?;
    layer.reset()?;
    assert_eq!(values(&var(&vars, "gain"))?, [1.; 4]);
    // The file of a plain layer, whose gains have no axes of size 1.
    let tensors = [
        ("weight", uniform((2, 3, 2, 2), 3)),
        ("bias", uniform(2, 4)),
        ("gain", uniform(2, 5)),
    ];
    let read = weight_standardization::conv2d(
        3,
        2,
        2,
        Default::default(),
        options,
        file(&tensors, DType::F64),
    )?;
    assert_eq!(read.gain().expect("gains").dims(), [2, 1, 1, 1]);

    let build = |kernel, options| {
        let config = Conv2dConfig::default();
        weight_standardization::conv2d(
            1,
            4,
            kernel,
            config,
            options,
            vb(&VarMap::new(), DType::F32),
        )
    };
    assert_message(
        build(1, Default::default()),
        &["WeightStandardization", "more than 1 element"],
    );
    assert_message(build(3, 0f64.into()), &["WeightStandardization", "eps"]);
    let infinite = WeightStandardizationOptions {
        gamma: Some(f64::INFINITY),
        ..Default::default()
    };
    assert_message(build(3, infinite), &["WeightStandardization", "gamma"]);
    let transposed = ConvTranspose2d::new(uniform((2, 3, 2, 2), 1), None, Default::default());
    assert_message(
        WeightStandardization::from_layer(&transposed, Default::default()),
        &["WeightStandardization", "transposed"],
    );
    Ok(())
}
