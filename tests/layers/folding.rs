//! A layer and the norms after it as one layer: what it computes, in f64, and what cannot be
//! folded.

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{
    Activation, Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, Module, ModuleT, PReLU, VarBuilder, VarMap,
};
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, Foldable, InstanceNormOptions, Norm, NormConfig,
    NormedLayer, batch_norm, fold, group_norm, instance_norm, layer_norm, rms_norm, switch_norm,
    trainable_vars,
};

use testkit::data::noise_by;
use testkit::errors::message;
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const AFFINE: [Affine; 4] = [
    Affine::None,
    Affine::Weight,
    Affine::Bias,
    Affine::WeightAndBias,
];

/// Numbers about 0.1 that look random, the same for the same seed.
fn shifted_noise(shape: impl Into<Shape>, seed: usize) -> Result<Tensor> {
    noise_by(shape, |i| i * i + (2 * seed + 3) * i + seed)? + 0.1
}

/// A batch norm whose channels differ in all that it has.
fn norm(channels: usize, affine: Affine, seed: usize) -> Result<BatchNorm> {
    let vars = VarMap::new();
    let options = BatchNormOptions {
        affine,
        ..Default::default()
    };
    let norm = batch_norm(channels, options, vb(&vars, DType::F64))?;
    for (i, var) in trainable_vars(&vars).iter().enumerate() {
        var.set(&shifted_noise(var.shape(), seed + i)?)?;
    }
    for i in 0..3 {
        norm.forward_t(&(shifted_noise((9, channels), seed + 5 + i)? * 3.)?, true)?;
    }
    Ok(norm)
}

#[track_caller]
fn assert_close(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let largest = |t: &Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
    let largest = |t: &Tensor| largest(t).to_scalar::<f64>().unwrap();
    let (error, size) = (largest(&(got - want).unwrap()), largest(want));
    assert!(size > 0.1, "{what}: nothing to compare");
    assert!(error <= 1e-13 * size, "{what}: {error:e} of {size}");
}

fn check<L: Foldable + Module>(what: &str, layer: &L, channels: usize, x: &Tensor) -> Result<()> {
    for affine in AFFINE {
        let norm = norm(channels, affine, 3)?;
        let want = norm.forward_t(&layer.forward(x)?, false)?;
        for (by, folded) in [
            ("fold_into", norm.fold_into(layer)?),
            ("frozen", norm.frozen()?.fold_into(layer)?),
            ("fold", fold(layer, &[&norm])?),
        ] {
            assert_eq!(folded.weight().dims(), layer.weight().dims());
            let y = folded.forward(x)?;
            assert!(!y.track_op(), "a folded layer leads back to parameters");
            assert_close(&format!("{what}, {affine:?}, {by}"), &y, &want);
        }
    }
    Ok(())
}

/// The bias of a layer, or none.
fn bias(has: bool, channels: usize) -> Result<Option<Tensor>> {
    has.then(|| shifted_noise(channels, 2)).transpose()
}

#[test]
fn a_norm_folds_into_every_layer_before_it() -> Result<()> {
    for own in [true, false] {
        let layer = Linear::new(shifted_noise((6, 4), 0)?, bias(own, 6)?);
        check("linear", &layer, 6, &shifted_noise((5, 4), 1)?)?;
        for groups in [1, 2] {
            let config = Conv1dConfig {
                padding: 1,
                stride: 2,
                groups,
                ..Default::default()
            };
            let layer = Conv1d::new(shifted_noise((6, 4 / groups, 3), 0)?, bias(own, 6)?, config);
            check("conv1d", &layer, 6, &shifted_noise((2, 4, 8), 1)?)?;
            let config = Conv2dConfig {
                padding: 1,
                groups,
                ..Default::default()
            };
            let layer = Conv2d::new(
                shifted_noise((6, 4 / groups, 3, 3), 0)?,
                bias(own, 6)?,
                config,
            );
            check("conv2d", &layer, 6, &shifted_noise((2, 4, 5, 5), 1)?)?;
        }
        // The weight has the inputs first: 4 of them, in 1, 2 or 4 groups, to 8 outputs.
        for groups in [1, 2, 4] {
            let config = ConvTranspose1dConfig {
                padding: 1,
                output_padding: 1,
                stride: 2,
                dilation: 1,
                groups,
            };
            let weight = shifted_noise((4, 8 / groups, 3), 0)?;
            let layer = ConvTranspose1d::new(weight, bias(own, 8)?, config);
            let what = format!("conv_transpose1d of {groups} groups");
            check(&what, &layer, 8, &shifted_noise((2, 4, 5), 1)?)?;
        }
        let config = ConvTranspose2dConfig {
            padding: 1,
            output_padding: 0,
            stride: 2,
            dilation: 1,
        };
        let layer = ConvTranspose2d::new(shifted_noise((4, 6, 3, 3), 0)?, bias(own, 6)?, config);
        check(
            "conv_transpose2d",
            &layer,
            6,
            &shifted_noise((2, 4, 3, 4), 1)?,
        )?;
    }
    Ok(())
}

/// Worked by hand: two groups of one input and one output, whose norms halve and double.
#[test]
fn groups_of_a_transposed_convolution_have_their_own_channels() -> Result<()> {
    let weight = Tensor::new(&[[[3f64]], [[5.]]], &CPU)?;
    let config = ConvTranspose1dConfig {
        padding: 0,
        output_padding: 0,
        stride: 1,
        dilation: 1,
        groups: 2,
    };
    let layer = ConvTranspose1d::new(weight, None, config);
    let (mean, var) = ([1f64, 2.], [4f64, 0.25]);
    let (mean, var) = (Tensor::new(&mean, &CPU)?, Tensor::new(&var, &CPU)?);
    let norm = BatchNorm::new_no_bias(2, mean, var, 1e-300)?;
    let folded = norm.fold_into(&layer)?;
    assert_eq!(folded.weight().flatten_all()?.to_vec1::<f64>()?, [1.5, 10.]);
    let bias = folded.bias().expect("the mean").to_vec1::<f64>()?;
    assert_eq!(bias, [-0.5, -4.]);
    Ok(())
}

#[test]
fn a_sequence_folds_at_once() -> Result<()> {
    let layer = Conv2d::new(
        shifted_noise((6, 4, 3, 3), 0)?,
        None,
        Conv2dConfig::default(),
    );
    let x = shifted_noise((2, 4, 5, 5), 1)?;
    let (first, second) = (
        norm(6, Affine::WeightAndBias, 3)?,
        norm(6, Affine::Bias, 7)?,
    );
    let y = layer.forward(&x)?;
    let want = second.forward_t(&first.forward_t(&y, false)?, false)?;
    let folded = fold(&layer, &[&first, &second])?;
    assert_close("two norms", &folded.forward(&x)?, &want);
    let frozen = second.frozen()?;
    let boxed: Box<dyn Norm> = Box::new(first);
    let none = "none"
        .parse::<NormConfig>()?
        .channels(6, vb(&VarMap::new(), DType::F64))?;
    let folded = fold(&layer, &[&none, &boxed, &none, &frozen])?;
    assert_close("boxed and frozen", &folded.forward(&x)?, &want);
    let same = fold(&layer, &[&none])?;
    assert_close("no norm", &same.forward(&x)?, &y);
    assert_eq!(fold(&layer, &[])?.bias().is_some(), layer.bias().is_some());

    let vars = VarMap::new();
    let options = InstanceNormOptions {
        affine: Affine::Bias,
        track_running_stats: true,
        ..Default::default()
    };
    let tracked = instance_norm(6, options, vb(&vars, DType::F64))?;
    tracked.forward_t(&y, true)?;
    let folded = fold(&layer, &[&tracked])?;
    let want = tracked.forward_t(&y, false)?;
    assert_close("instance norm", &folded.forward(&x)?, &want);
    Ok(())
}

#[test]
fn an_activation_between_a_layer_and_its_norm_is_told() -> Result<()> {
    let layer = Linear::new(shifted_noise((6, 4), 0)?, None);
    let norm = norm(6, Affine::WeightAndBias, 3)?;
    let prelu = PReLU::new(shifted_noise(1, 0)?, true);
    let between = [
        message(fold(&layer, &[&Activation::Relu, &norm])),
        message(fold(&layer, &[&norm, &Activation::Relu, &norm])),
    ];
    for text in between {
        let parts = [
            "fold: expected norms right after the layer, got Relu between the layer and a norm",
            "folding would change the outputs",
            "frozen()",
            "the norm before Relu",
        ];
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
    let text = message(fold(&layer, &[&prelu, &norm]));
    assert!(text.contains("got PReLU between"), "{text}");
    let text = message(fold(&layer, &[&norm, &Activation::Silu]));
    let parts = ["got Silu at the end", "leave it out", "apply it to"];
    assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    // As the message says: the rest by itself.
    let x = shifted_noise((3, 4), 1)?;
    let whole = norm.forward_t(&layer.forward(&x)?, false)?;
    let y = Activation::Silu.forward(&fold(&layer, &[&norm])?.forward(&x)?)?;
    assert_close("activated", &y, &Activation::Silu.forward(&whole)?);
    Ok(())
}

#[test]
fn norms_of_each_input_are_no_part_of_a_layer() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F64);
    let layer = Linear::new(shifted_noise((6, 4), 0)?, None);
    let norms = [
        (
            "group",
            message(fold(&layer, &[&group_norm(2, 6, 1e-5, vb.pp("g"))?])),
        ),
        (
            "layer",
            message(fold(&layer, &[&layer_norm(6, 1e-5, vb.pp("l"))?])),
        ),
        (
            "rms",
            message(fold(&layer, &[&rms_norm(6, 1e-5, vb.pp("r"))?])),
        ),
        (
            "switch",
            message(fold(&layer, &[&switch_norm(6, 1e-5, vb.pp("s"))?])),
        ),
    ];
    for (kind, text) in norms {
        let start = format!("{kind} norm: expected statistics that stay the same");
        assert!(text.starts_with(&start), "{text}");
        assert!(text.contains("only these can be frozen"), "{text}");
    }
    let untracked = instance_norm(6, 1e-5, vb.pp("i"))?;
    let text = message(fold(&layer, &[&untracked]));
    assert!(
        text.contains("InstanceNorm") && text.contains("track_running_stats"),
        "{text}"
    );
    Ok(())
}

/// candle's constructors take any tensor as a weight.
#[test]
fn weights_of_no_layer_are_refused() -> Result<()> {
    let norm = norm(6, Affine::None, 3)?;
    let one = ConvTranspose1dConfig {
        padding: 0,
        output_padding: 0,
        stride: 1,
        dilation: 1,
        groups: 1,
    };
    let up = |weight: &[usize], groups: usize| -> Result<_> {
        let config = ConvTranspose1dConfig { groups, ..one };
        norm.fold_into(&ConvTranspose1d::new(
            shifted_noise(weight, 0)?,
            None,
            config,
        ))
    };
    for (text, parts) in [
        (
            message(up(&[4, 5, 3], 1)),
            ["6 output channels", "got 5 of weight shape [4, 5, 3]"],
        ),
        (message(up(&[4, 6, 3], 2)), ["6 output channels", "got 12"]),
        (
            message(up(&[4, 2, 3], 3)),
            ["groups (3) to divide", "4 in and 6 out"],
        ),
        (
            message(up(&[4, 6, 3], 0)),
            ["groups of at least 1", "got 0"],
        ),
        (
            message(up(&[4], 1)),
            ["the weight to fold into of rank 3", "[4]"],
        ),
        (
            message(up(&[], 1)),
            ["the weight to fold into of rank 3", "[]"],
        ),
        (
            message(norm.fold_into(&Linear::new(shifted_noise((5, 4), 0)?, None))),
            ["6 output channels", "got 5 of weight shape [5, 4]"],
        ),
        (
            message(norm.fold_into(&Linear::new(shifted_noise((), 0)?, None))),
            ["the weight to fold into of rank 2", "[]"],
        ),
    ] {
        assert!(text.contains("BatchNorm: expected"), "{text}");
        assert!(parts.iter().all(|p| text.contains(p)), "{text}");
    }
    Ok(())
}

type Build = fn(&NormConfig, VarBuilder) -> Result<NormedLayer>;

/// Each from 4 inputs to 6 outputs, and an input.
const BLOCKS: [(Build, &[usize]); 5] = [
    (|norm, vb| norm.linear(4, 6, vb), &[3, 5, 4]),
    (
        |norm, vb| norm.conv1d(4, 6, 3, Default::default(), vb),
        &[2, 4, 8],
    ),
    (
        |norm, vb| norm.conv2d(4, 6, 3, Default::default(), vb),
        &[2, 4, 5, 5],
    ),
    (
        |norm, vb| {
            // Right at batch 2 without padding too, where candle's own is not.
            let config = ConvTranspose1dConfig {
                padding: 0,
                output_padding: 0,
                stride: 2,
                dilation: 1,
                groups: 2,
            };
            norm.conv_transpose1d(4, 6, 3, config, vb)
        },
        &[2, 4, 5],
    ),
    (
        |norm, vb| norm.conv_transpose2d(4, 6, 2, Default::default(), vb),
        &[2, 4, 3, 3],
    ),
];

#[test]
fn blocks_fold_by_themselves() -> Result<()> {
    let tracked = InstanceNormOptions {
        affine: Affine::Weight,
        track_running_stats: true,
        ..Default::default()
    };
    let shifted = BatchNormOptions {
        affine: Affine::Bias,
        ..Default::default()
    };
    let configs = [
        "none".parse()?,
        "batch".parse()?,
        "weight".parse()?,
        NormConfig::Batch(shifted),
        NormConfig::Instance(tracked),
    ];
    for (build, input) in BLOCKS {
        for config in &configs {
            let vars = VarMap::new();
            let block = build(config, vb(&vars, DType::F64))?;
            for (i, var) in trainable_vars(&vars).iter().enumerate() {
                var.set(&shifted_noise(var.shape(), i)?)?;
            }
            for seed in 0..2 {
                block.forward_t(&shifted_noise(input, seed)?, true)?;
            }
            let x = shifted_noise(input, 5)?;
            let want = block.forward_t(&x, false)?;
            let folded = block.fold()?;
            assert_eq!(folded.norm().kind(), "none");
            for train in [true, false] {
                let y = folded.forward_t(&x, train)?;
                assert!(!y.track_op(), "a folded block leads back to parameters");
                assert_close(&format!("{config:?} of {input:?}"), &y, &want);
            }
        }
        for name in ["layer", "rms", "group:2", "switch"] {
            let block = build(&name.parse()?, vb(&VarMap::new(), DType::F64))?;
            let text = message(block.fold());
            assert!(
                text.contains("expected statistics that stay the same"),
                "{text}"
            );
        }
    }
    Ok(())
}
