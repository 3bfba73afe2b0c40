//! The table of edges of the numerics contract: what a layer does with input at the limits, and
//! what it says.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Conv1dConfig, Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, Cast, GroupNorm, InstanceNormOptions, LayerNorm,
    LayerNormOptions, Norm, RmsNorm, RmsNormOptions, ScaleNorm, ScaleNormOptions,
    SwitchNormOptions, WeightNormOptions, batch_norm, group_norm, instance_norm, layer_norm, ops,
    rms_norm, scale_norm, switch_norm, weight_norm,
};

use testkit::data::{noise, values};
use testkit::errors::assert_message;
use testkit::subjects::Subject;
use testkit::table::{self, Form};
use testkit::tracked::{DEFAULTS, Settings};
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

/// A form of the table, built for an input of a shape, with its parameters in `vars`.
fn build(form: &Form, vars: &VarMap, dtype: DType, dims: &[usize]) -> Result<Box<dyn Norm>> {
    (form.build)(dims, vb(vars, dtype))
}

fn set(vars: &VarMap, name: &str, value: f64) -> Result<()> {
    let vars = vars.data().lock().unwrap();
    for (key, var) in vars.iter().filter(|(key, _)| key.ends_with(name)) {
        let value = Tensor::full(value, var.shape(), &CPU)?.to_dtype(var.dtype())?;
        var.set(&value).unwrap_or_else(|e| panic!("{key}: {e}"));
    }
    Ok(())
}

/// The statistics of a layer, to see that nothing changed them.
fn state(norm: &dyn Norm) -> Result<Vec<Vec<f64>>> {
    norm.buffers().iter().map(|(_, t)| values(t)).collect()
}

#[test]
fn one_value_per_channel_in_training_is_refused_and_changes_nothing() -> Result<()> {
    for dtype in DTYPES {
        let vars = VarMap::new();
        let batch = batch_norm(8, 1e-5, vb(&vars, dtype).pp("b"))?;
        let before = state(&batch)?;
        let x = noise(&[1, 8], dtype)?;
        assert_message(
            batch.forward_t(&x, true),
            &[
                "BatchNorm",
                "expected more than 1 value per channel when training, got input size [1, 8]",
            ],
        );
        assert_eq!(state(&batch)?, before);
        assert_eq!(batch.forward_t(&x, false)?.dims(), [1, 8]);

        let options = InstanceNormOptions {
            track_running_stats: true,
            ..Default::default()
        };
        let instance = instance_norm(3, options, vb(&vars, dtype).pp("i"))?;
        let before = state(&instance)?;
        let x = noise(&[2, 3, 1], dtype)?;
        assert_message(
            instance.forward_t(&x, true),
            &[
                "InstanceNorm",
                "expected more than 1 value per channel when training, got input size [2, 3, 1]",
            ],
        );
        assert_eq!(state(&instance)?, before);
        assert_eq!(instance.forward_t(&x, false)?.dims(), [2, 3, 1]);
    }
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_output_and_zero_gradients() -> Result<()> {
    for dtype in DTYPES {
        for dims in [
            [0, 4, 3, 3],
            [2, 4, 0, 3],
            [2, 4, 3, 0],
            [0, 4, 0, 0],
            [2, 0, 3, 3],
        ] {
            for train in [true, false] {
                for (_, form) in table::forms() {
                    let name = form.name;
                    let norm = build(form, &VarMap::new(), dtype, &dims)?;
                    let x = Var::from_tensor(&Tensor::zeros(&dims, dtype, &CPU)?)?;
                    let before = state(&*norm)?;
                    let y = norm.forward_t(&x, train)?;
                    assert_eq!((y.dims(), y.dtype()), (&dims[..], dtype), "{name}");
                    assert_eq!(state(&*norm)?, before, "{name}");
                    let grads = y.sum_all()?.backward()?;
                    for (param, value) in norm.parameters() {
                        let grad = grads.get(&value);
                        let grad = grad
                            .unwrap_or_else(|| panic!("{name} {dims:?}: no gradient for {param}"));
                        assert_eq!(grad.dims(), value.dims());
                        assert!(values(grad)?.iter().all(|g| *g == 0.), "{name} {param}");
                    }
                    assert_eq!(
                        grads.get(&x).map(|g| g.dims().to_vec()),
                        Some(dims.to_vec()),
                        "{name}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn weight_norm_takes_an_empty_batch() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let options = WeightNormOptions::default();
    let linear = weight_norm::linear(3, 4, options, vb.pp("linear"))?;
    let conv = weight_norm::conv1d(3, 4, 2, Conv1dConfig::default(), options, vb.pp("conv"))?;
    for (y, dims) in [
        (
            linear.forward(&Tensor::zeros((0, 3), DType::F32, &CPU)?)?,
            vec![0, 4],
        ),
        (
            conv.forward(&Tensor::zeros((0, 3, 5), DType::F32, &CPU)?)?,
            vec![0, 4, 4],
        ),
    ] {
        assert_eq!(y.dims(), dims);
        let grads = y.sum_all()?.backward()?;
        let layer = vars.data().lock().unwrap();
        let prefix = if dims.len() == 2 { "linear" } else { "conv" };
        for (name, var) in layer.iter().filter(|(name, _)| name.starts_with(prefix)) {
            let grad = grads
                .get(var)
                .unwrap_or_else(|| panic!("no gradient for {name}"));
            assert!(values(grad)?.iter().all(|g| *g == 0.), "{name}");
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let batch = batch_norm(4, 1e-5, vb.pp("batch"))?;
    let layer = layer_norm((2, 4), 1e-5, vb.pp("layer"))?;
    let rms = rms_norm(4, 1e-5, vb.pp("rms"))?;
    let group = group_norm(2, 4, 1e-5, vb.pp("group"))?;
    let instance = instance_norm(4, 1e-5, vb.pp("instance"))?;
    let switch = switch_norm(4, 1e-5, vb.pp("switch"))?;
    let weight = weight_norm::linear(4, 3, WeightNormOptions::default(), vb.pp("weight"))?;
    let x = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &CPU);
    let f32 = DType::F32;

    let rank = "expected an input of rank at least";
    assert_message(
        batch.forward_t(&x(&[4], f32)?, true),
        &["BatchNorm", rank, "2", "[4]"],
    );
    assert_message(
        batch.forward_t(&x(&[], f32)?, false),
        &["BatchNorm", rank, "[]"],
    );
    assert_message(
        group.forward(&x(&[4], f32)?),
        &["GroupNorm", rank, "2", "[4]"],
    );
    assert_message(
        instance.forward_t(&x(&[2, 4], f32)?, true),
        &["InstanceNorm", rank, "3", "[2, 4]"],
    );
    assert_message(
        switch.forward_t(&x(&[2, 4], f32)?, false),
        &["SwitchNorm", rank, "3", "[2, 4]"],
    );

    let channels = "expected 4 channels on axis 1, got 5 in input size [2, 5, 3]";
    let wrong = x(&[2, 5, 3], f32)?;
    for train in [true, false] {
        assert_message(batch.forward_t(&wrong, train), &["BatchNorm", channels]);
        assert_message(
            instance.forward_t(&wrong, train),
            &["InstanceNorm", channels],
        );
        assert_message(switch.forward_t(&wrong, train), &["SwitchNorm", channels]);
    }
    assert_message(group.forward(&wrong), &["GroupNorm", channels]);
    assert_message(batch.frozen()?.forward(&wrong), &["BatchNorm", channels]);
    assert_message(
        layer.forward(&x(&[3, 4], f32)?),
        &["LayerNorm", "ends in normalized_shape [2, 4]", "got [3, 4]"],
    );
    assert_message(
        rms.forward(&x(&[2, 3], f32)?),
        &["RmsNorm", "ends in normalized_shape [4]", "got [2, 3]"],
    );
    assert_message(
        weight.forward(&x(&[2, 5], f32)?),
        &[
            "WeightNorm",
            "expected 4 features on the last axis",
            "[2, 5]",
        ],
    );

    for dtype in [DType::U8, DType::U32, DType::I64] {
        let expected = "expected input with dtype F16, BF16, F32 or F64, got";
        let ints = x(&[2, 2, 4], dtype)?;
        assert_message(layer.forward(&ints), &["LayerNorm", expected]);
        assert_message(rms.forward(&ints), &["RmsNorm", expected]);
        let ints = x(&[2, 4, 2], dtype)?;
        assert_message(batch.forward_t(&ints, true), &["BatchNorm", expected]);
        assert_message(batch.forward_t(&ints, false), &["BatchNorm", expected]);
        assert_message(group.forward(&ints), &["GroupNorm", expected]);
        assert_message(instance.forward_t(&ints, true), &["InstanceNorm", expected]);
        assert_message(switch.forward_t(&ints, true), &["SwitchNorm", expected]);
        assert_message(switch.forward_t(&ints, false), &["SwitchNorm", expected]);
        assert_message(
            weight.forward(&ints.transpose(1, 2)?),
            &["WeightNorm", expected],
        );
    }
    // f32 parameters serve half inputs, nothing else.
    let expected = "expected weight with the input's dtype F64, got F32";
    assert_message(
        layer.forward(&x(&[2, 2, 4], DType::F64)?),
        &["LayerNorm", expected],
    );
    assert_message(
        batch.forward_t(&x(&[2, 4], DType::F64)?, true),
        &["BatchNorm", expected],
    );
    assert_message(
        switch.forward_t(&x(&[2, 4, 2], DType::F64)?, true),
        &["SwitchNorm", expected],
    );
    assert_message(
        group.forward(&x(&[2, 4], DType::F64)?),
        &["GroupNorm", expected],
    );
    assert_eq!(
        layer.forward(&x(&[2, 2, 4], DType::BF16)?)?.dtype(),
        DType::BF16
    );
    let half = LayerNorm::new(
        Tensor::ones(4, DType::F16, &CPU)?,
        Tensor::zeros(4, DType::F16, &CPU)?,
        1e-5,
    );
    assert_message(
        half.forward(&x(&[2, 4], f32)?),
        &[
            "LayerNorm",
            "expected weight with the input's dtype F32, got F16",
        ],
    );
    Ok(())
}

/// Channels that lie elsewhere are pointed at, with what brings them to where the layer takes them.
#[test]
fn channels_on_another_axis_are_pointed_at() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let batch = batch_norm(8, 1e-5, vb.pp("batch"))?;
    let group = group_norm(2, 8, 1e-5, vb.pp("group"))?;
    let instance = instance_norm(8, 1e-5, vb.pp("instance"))?;
    let switch = switch_norm(8, 1e-5, vb.pp("switch"))?;
    let options = WeightNormOptions::default();
    let config = Conv1dConfig::default();
    let conv = weight_norm::conv1d(8, 3, 1, config, options, vb.pp("conv"))?;
    let x = |dims: &[usize]| noise(dims, DType::F32);

    let last = x(&[4, 5, 5, 8])?;
    let expected = "expected 8 channels on axis 1, got 5 in input size [4, 5, 5, 8]";
    let remedy = "the last axis has 8: if channels are last, bring them to axis 1 with \
        permute((0, 3, 1, 2))";
    for train in [true, false] {
        assert_message(
            batch.forward_t(&last, train),
            &["BatchNorm", expected, remedy],
        );
        assert_message(
            instance.forward_t(&last, train),
            &["InstanceNorm", expected, remedy],
        );
        assert_message(
            switch.forward_t(&last, train),
            &["SwitchNorm", expected, remedy],
        );
    }
    assert_message(group.forward(&last), &["GroupNorm", expected, remedy]);
    assert_message(
        batch.frozen()?.forward(&last),
        &["BatchNorm", expected, remedy],
    );
    batch.forward_t(&last.permute((0, 3, 1, 2))?, true)?;
    for (dims, remedy) in [
        (&[4, 5, 8][..], "transpose(1, 2)"),
        (&[2, 3, 3, 3, 8], "permute((0, 4, 1, 2, 3))"),
    ] {
        assert_message(batch.forward_t(&x(dims)?, true), &[remedy]);
    }
    assert_message(
        conv.forward(&x(&[4, 5, 8])?),
        &["WeightNorm", "the last axis has 8", "transpose(1, 2)"],
    );

    // Without a batch axis.
    let missing = "if the batch axis is missing, add it with unsqueeze(0)";
    let unbatched = x(&[8, 4, 4])?;
    let expected = "expected 8 channels on axis 1, got 4 in input size [8, 4, 4]; axis 0 has 8";
    assert_message(
        instance.forward_t(&unbatched, true),
        &["InstanceNorm", expected, missing],
    );
    assert_message(group.forward(&unbatched), &["GroupNorm", expected, missing]);
    instance.forward_t(&unbatched.unsqueeze(0)?, true)?;
    assert_message(
        instance.forward_t(&x(&[8, 4])?, true),
        &["InstanceNorm", "rank at least 3", "got [8, 4]", missing],
    );
    assert_message(
        batch.forward_t(&x(&[8])?, false),
        &["BatchNorm", "rank at least 2", "got [8]", missing],
    );
    assert_message(
        conv.forward(&x(&[8, 5])?),
        &["WeightNorm", "input of rank 3", "[8, 5]", missing],
    );
    // Nothing is guessed where nothing has the size.
    let error = instance.forward_t(&x(&[2, 5, 3])?, true).unwrap_err();
    let text = error.to_string();
    assert!(
        !text.contains("axis 0 has") && !text.contains("the last axis has"),
        "{text}"
    );
    Ok(())
}

#[test]
fn rows_on_another_axis_are_pointed_at() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let options = LayerNormOptions {
        channels_first: true,
        ..Default::default()
    };
    let rms_options = RmsNormOptions {
        channels_first: true,
        ..Default::default()
    };
    let layer = layer_norm(32, 1e-5, vb.pp("layer"))?;
    let rms = rms_norm(32, 1e-5, vb.pp("rms"))?;
    let layer_first = layer_norm(32, options, vb.pp("layer_first"))?;
    let rms_first = rms_norm(32, rms_options, vb.pp("rms_first"))?;
    let maps = noise(&[2, 32, 8, 8], DType::F32)?;
    let expected = "ends in normalized_shape [32], got [2, 32, 8, 8]; axis 1 has 32";
    let remedy = "set channels_first in the options, or use NormConfig::channels";
    assert_message(layer.forward(&maps), &["LayerNorm", expected, remedy]);
    assert_message(rms.forward(&maps), &["RmsNorm", expected, remedy]);
    layer_first.forward(&maps)?;
    rms_first.forward(&maps)?;
    // The same, with the batch axis forgotten, and the other way round.
    let unbatched = noise(&[32, 8, 8], DType::F32)?;
    let parts = ["axis 0 has 32", "channels_first", "unsqueeze(0)"];
    assert_message(layer.forward(&unbatched), &parts);
    let last = noise(&[2, 8, 8, 32], DType::F32)?;
    let expected = "expected 32 channels on axis 1, got 8 in input size [2, 8, 8, 32]";
    let remedy = "if channels are last, leave out channels_first";
    assert_message(layer_first.forward(&last), &["LayerNorm", expected, remedy]);
    assert_message(rms_first.forward(&last), &["RmsNorm", expected, remedy]);
    layer.forward(&last)?;
    // Several axes may lie anywhere.
    let error = layer_norm((3, 8), 1e-5, vb.pp("two"))?.forward(&maps);
    let text = error.unwrap_err().to_string();
    assert!(!text.contains("channels_first"), "{text}");
    Ok(())
}

/// The mean of one position is that position, however many samples there are.
#[test]
fn one_position_is_not_helped_by_a_larger_batch() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let instance = instance_norm(8, 1e-5, vb.pp("i"))?;
    let x = noise(&[64, 8, 1, 1], DType::F32)?;
    for train in [true, false] {
        assert_message(
            instance.forward_t(&x, train),
            &[
                "InstanceNorm: expected more than 1 value per channel when training, got input \
                size [64, 8, 1, 1]",
                "a larger batch does not help",
                "larger maps",
                "LayerNorm over the channels",
                "GroupNorm with several channels in a group",
            ],
        );
    }
    let options = LayerNormOptions {
        channels_first: true,
        ..Default::default()
    };
    layer_norm(8, options, vb.pp("l"))?.forward(&x)?;
    group_norm(2, 8, 1e-5, vb.pp("g"))?.forward(&x)?;
    // Where it does help, it is still the advice.
    assert_message(
        batch_norm(8, 1e-5, vb.pp("b"))?.forward_t(&x.narrow(0, 0, 1)?, true),
        &["BatchNorm", "use a larger batch"],
    );
    Ok(())
}

#[test]
fn groups_that_divide_the_channels_are_named() -> Result<()> {
    let vars = VarMap::new();
    let made = |groups, channels| group_norm(groups, channels, 1e-5, vb(&vars, DType::F32));
    let expected = "expected num_groups (3) to divide num_channels (8)";
    assert_message(made(3, 8), &["GroupNorm", expected, "; 1, 2, 4, 8 do"]);
    assert_message(made(0, 8), &["; 1, 2, 4, 8 do"]);
    assert_message(made(2, 7), &["; 1, 7 do"]);
    // Of many, the nearest.
    let nearest = "; 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 24 do";
    assert_message(made(17, 720_720), &[nearest]);
    assert_message(
        made(5, (1 << 40) + 1),
        &["to divide num_channels (1099511627777)", " do"],
    );
    // The arguments of the function and of candle's constructor are in different orders.
    let order = "are the two numbers in their order?";
    assert_message(made(32, 8), &["num_groups (32)", order]);
    let ones = Tensor::ones(4, DType::F32, &CPU)?;
    let swapped = GroupNorm::new(ones.clone(), ones, 4, 8, 1e-5);
    assert_message(swapped, &[order]);
    let text = made(3, 8).unwrap_err().to_string();
    assert!(!text.contains(order), "{text}");
    let x = noise(&[2, 8, 3], DType::F32)?;
    let none = ops::group_norm(&x, 3, None, None, 1e-5);
    assert_message(none, &["; 1, 2, 4, 8 do"]);
    Ok(())
}

/// A half-precision layer on wider input: both what to do with the input, and how to hold the
/// parameters.
#[test]
fn parameters_of_another_dtype_say_how_to_hold_them() -> Result<()> {
    let vars = VarMap::new();
    let half = vb(&vars, DType::BF16);
    let parts = |got: DType, input: DType, hold: DType| {
        [
            format!("input's dtype {input:?}"),
            format!("got {got:?}; convert the input with to_dtype"),
            format!("vb.set_dtype(DType::{hold:?})"),
        ]
    };
    let (bf16, f32, f64) = (DType::BF16, DType::F32, DType::F64);
    for (params, input, hold) in [
        (bf16, f32, f32),
        (bf16, f64, f64),
        (f32, f64, f64),
        (f64, bf16, f32),
    ] {
        let norm = layer_norm(4, 1e-5, vb(&VarMap::new(), params))?;
        let parts = parts(params, input, hold);
        let parts = parts.each_ref().map(String::as_str);
        assert_message(norm.forward(&noise(&[2, 4], input)?), &parts);
        let norm = layer_norm(4, 1e-5, vb(&VarMap::new(), params).set_dtype(hold))?;
        norm.forward(&noise(&[2, 4], input)?)?;
    }
    let x = noise(&[2, 4, 3, 3], f32)?;
    let parts = parts(bf16, f32, f32);
    let parts = parts.each_ref().map(String::as_str);
    let batch = batch_norm(4, 1e-5, half.pp("b"))?;
    assert_message(batch.forward_t(&x, true), &parts);
    assert_message(batch.forward_t(&x, false), &parts);
    assert_message(group_norm(2, 4, 1e-5, half.pp("g"))?.forward(&x), &parts);
    assert_message(rms_norm(3, 1e-5, half.pp("r"))?.forward(&x), &parts);
    assert_message(
        switch_norm(4, 1e-5, half.pp("s"))?.forward_t(&x, true),
        &parts,
    );
    let linear = weight_norm::linear(3, 4, WeightNormOptions::default(), half.pp("w"))?;
    assert_message(linear.forward(&x), &parts);
    // As the message says: parameters in f32 serve both.
    let held = batch_norm(4, 1e-5, half.pp("held").set_dtype(f32))?;
    held.forward_t(&x, true)?;
    held.forward_t(&x.to_dtype(bf16)?, true)?;
    Ok(())
}

#[test]
fn options_out_of_range_are_refused() -> Result<()> {
    let vars = VarMap::new();
    let vb = || vb(&vars, DType::F32);
    for eps in [0., -1e-5, f64::NAN, f64::INFINITY] {
        let expected = "expected eps > 0 and finite";
        assert_message(batch_norm(4, eps, vb()), &["BatchNorm", expected]);
        assert_message(layer_norm(4, eps, vb()), &["LayerNorm", expected]);
        assert_message(rms_norm(4, eps, vb()), &["RmsNorm", expected]);
        assert_message(group_norm(2, 4, eps, vb()), &["GroupNorm", expected]);
        assert_message(instance_norm(4, eps, vb()), &["InstanceNorm", expected]);
        assert_message(switch_norm(4, eps, vb()), &["SwitchNorm", expected]);
        assert_message(scale_norm(4, eps, vb()), &["ScaleNorm", expected]);
        // Constructors without a Result are refused at the first forward.
        let ones = Tensor::ones(4, DType::F32, &CPU)?;
        let x = noise(&[2, 4], DType::F32)?;
        let layer = LayerNorm::new(ones.clone(), ones.clone(), eps);
        assert_message(layer.forward(&x), &["LayerNorm", expected]);
        let rms = RmsNorm::new(ones.clone(), eps);
        assert_message(rms.forward(&x), &["RmsNorm", expected]);
        let scale = ScaleNorm::new(4, Tensor::ones(1, DType::F32, &CPU)?, eps);
        assert_message(scale.forward(&x), &["ScaleNorm", expected]);
        assert_message(
            ops::layer_norm(&x, 4, None, None, eps),
            &["LayerNorm", expected],
        );
        assert_message(
            ops::batch_norm(&x, None, None, eps),
            &["BatchNorm", expected],
        );
    }
    for momentum in [-0.1, 1.1, f64::NAN] {
        let options = BatchNormOptions {
            momentum: Some(momentum),
            ..Default::default()
        };
        assert_message(
            batch_norm(4, options, vb()),
            &["BatchNorm", "expected a momentum between 0 and 1"],
        );
        let options = InstanceNormOptions {
            momentum: Some(momentum),
            ..Default::default()
        };
        assert_message(
            instance_norm(4, options, vb()),
            &["InstanceNorm", "expected a momentum between 0 and 1"],
        );
        let options = SwitchNormOptions {
            momentum: Some(momentum),
            ..Default::default()
        };
        assert_message(
            switch_norm(4, options, vb()),
            &["SwitchNorm", "expected a momentum between 0 and 1"],
        );
    }
    for num_groups in [0, 3, 5] {
        let expected = "to divide num_channels (4)";
        assert_message(
            group_norm(num_groups, 4, 1e-5, vb()),
            &["GroupNorm", expected],
        );
        let ones = Tensor::ones(4, DType::F32, &CPU)?;
        let made = GroupNorm::new(ones.clone(), ones, 4, num_groups, 1e-5);
        assert_message(made, &["GroupNorm", expected]);
    }
    let empty: &[usize] = &[];
    assert_message(
        layer_norm(empty, 1e-5, vb().pp("e")),
        &["LayerNorm", "at least one axis"],
    );
    let channels_first = LayerNormOptions {
        channels_first: true,
        ..Default::default()
    };
    assert_message(
        layer_norm((2, 3), channels_first, vb().pp("c")),
        &["LayerNorm", "channels_first", "[2, 3]"],
    );
    let offset = RmsNormOptions {
        offset: f64::NAN,
        ..Default::default()
    };
    assert_message(rms_norm(4, offset, vb()), &["RmsNorm", "finite offset"]);
    assert_message(
        weight_norm::linear(3, 4, Some(2).into(), vb().pp("w")),
        &["WeightNorm", "dim", "2"],
    );
    let strideless = Conv1dConfig {
        stride: 0,
        ..Default::default()
    };
    let options = WeightNormOptions::default();
    assert_message(
        weight_norm::conv1d(3, 4, 2, strideless, options, vb().pp("w1")),
        &["WeightNorm", "stride"],
    );
    let grouped = Conv1dConfig {
        groups: 2,
        ..Default::default()
    };
    assert_message(
        weight_norm::conv1d(3, 4, 2, grouped, options, vb().pp("w2")),
        &["WeightNorm", "groups (2)"],
    );
    let conv = weight_norm::conv1d(3, 4, 2, Conv1dConfig::default(), options, vb().pp("w3"))?;
    let short = Tensor::zeros((2, 3, 1), DType::F32, &CPU)?;
    assert_message(
        conv.forward(&short),
        &["WeightNorm", "kernel fits", "[2, 3, 1]"],
    );
    Ok(())
}

#[test]
fn statistics_that_no_training_leaves_are_refused_by_name() -> Result<()> {
    let one = |v: f32| Tensor::new(&[1f32, v], &CPU);
    let ok = one(1.)?;
    for bad in [f32::NAN, f32::INFINITY] {
        let made = BatchNorm::new_no_bias(2, one(bad)?, ok.clone(), 1e-5);
        assert_message(made, &["BatchNorm", "running_mean", "finite", "channel 1"]);
    }
    let made = BatchNorm::new_no_bias(2, ok.clone(), one(-0.5)?, 1e-5);
    assert_message(
        made,
        &[
            "BatchNorm",
            "running_var",
            "at least 0",
            "-0.5",
            "channel 1",
        ],
    );

    let tensors = [("running_mean", ok.clone()), ("running_var", one(-1.)?)];
    let tensors = tensors
        .map(|(name, t)| (format!("net.bn.{name}"), t))
        .into_iter()
        .collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &CPU);
    let options = BatchNormOptions {
        affine: Affine::None,
        ..Default::default()
    };
    let made = batch_norm(2, options, vb.pp("net").pp("bn"));
    assert_message(made, &["net.bn.running_var", "at least 0", "-1"]);

    // Written past every check, straight into the variable.
    let vars = VarMap::new();
    let bn = batch_norm(2, 1e-5, self::vb(&vars, DType::F32))?;
    set(&vars, "running_var", -1.)?;
    assert_message(
        bn.forward_t(&noise(&[3, 2], DType::F32)?, false),
        &["BatchNorm", "running_var"],
    );
    Ok(())
}

#[test]
fn a_constant_row_is_the_bias_exactly() -> Result<()> {
    let dims = [3, 4, 5, 7];
    for dtype in DTYPES {
        let largest = if dtype == DType::F16 { 65504. } else { 1e15 };
        for constant in [0., 1., 0.1, -3.7, 1e-4, largest, -largest] {
            for (_, form) in table::forms() {
                let oracle = Subject::new((form.kind)(&dims), 1e-5).oracle(&dims);
                if !oracle.is_centered() {
                    continue;
                }
                let vars = VarMap::new();
                let (name, norm) = (form.name, build(form, &vars, dtype, &dims)?);
                set(&vars, "weight", 1.5)?;
                set(&vars, "bias", 0.25)?;
                let bias = match form.affine {
                    Affine::Bias | Affine::WeightAndBias => 0.25,
                    Affine::None | Affine::Weight => 0.,
                };
                let x = Var::from_tensor(&Tensor::full(constant, &dims, &CPU)?.to_dtype(dtype)?)?;
                let y = norm.forward_t(&x, true)?;
                let exact = values(&y)?.iter().all(|y| *y == bias);
                assert!(
                    exact,
                    "{name} {dtype:?}: {constant} gives {:?}",
                    &values(&y)?[..4]
                );
                let dy = noise(&dims, dtype)?;
                let grads = (y * dy)?.to_dtype(DType::F64)?.sum_all()?.backward()?;
                for t in norm
                    .parameters()
                    .iter()
                    .map(|(_, p)| p)
                    .chain([x.as_tensor()])
                {
                    let grad = values(grads.get(t).expect("a gradient"))?;
                    assert!(
                        grad.iter().all(|g| g.is_finite()),
                        "{name} {dtype:?}: {constant}"
                    );
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_of_zeros_stay_zero_under_rms_and_weight_norm() -> Result<()> {
    for dtype in DTYPES {
        for cast in [Cast::AfterWeight, Cast::BeforeWeight] {
            let x = Var::zeros((2, 5), dtype, &CPU)?;
            let w = Var::ones(5, dtype, &CPU)?;
            let y = ops::rms_norm(
                &x,
                5,
                Some(&w),
                ops::RmsOptions {
                    eps: Some(1e-6),
                    offset: 0.,
                    cast,
                },
            )?;
            assert!(values(&y)?.iter().all(|y| *y == 0.));
            let grads = y.sum_all()?.backward()?;
            for t in [&x, &w] {
                assert!(values(grads.get(t).unwrap())?.iter().all(|g| g.is_finite()));
            }
        }
        for dim in [Some(0), Some(1), None] {
            let v = Var::zeros((2, 5), dtype, &CPU)?;
            let g = match dim {
                Some(0) => Var::ones((2, 1), dtype, &CPU)?,
                Some(_) => Var::ones((1, 5), dtype, &CPU)?,
                None => Var::ones((), dtype, &CPU)?,
            };
            let w = ops::weight_norm(&v, &g, dim)?;
            let grads = w.sum_all()?.backward()?;
            for t in [&w, grads.get(&v).unwrap(), grads.get(&g).unwrap()] {
                assert!(values(t)?.iter().all(|v| *v == 0.), "{dtype:?} dim {dim:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn scale_norm_refuses_what_does_not_fit() -> Result<()> {
    let x = noise(&[2, 3], DType::F32)?;
    let norm = scale_norm(4, 1e-5, vb(&VarMap::new(), DType::F32))?;
    assert_message(
        norm.forward(&x),
        &["ScaleNorm", "ends in normalized_shape [4]", "got [2, 3]"],
    );
    let options = ScaleNormOptions {
        channels_first: true,
        ..Default::default()
    };
    let first = scale_norm(3, options, vb(&VarMap::new(), DType::F32))?;
    assert_message(
        first.forward(&noise(&[2, 5, 3], DType::F32)?),
        &[
            "ScaleNorm",
            "expected 3 channels on axis 1",
            "channels_first",
        ],
    );
    assert_message(
        scale_norm((2, 3), options, vb(&VarMap::new(), DType::F32)),
        &["ScaleNorm", "channels_first", "[2, 3]"],
    );
    let empty: &[usize] = &[];
    assert_message(
        scale_norm(empty, 1e-5, vb(&VarMap::new(), DType::F32)),
        &["ScaleNorm", "at least one axis"],
    );
    // One number, not one for each element.
    let weight = Tensor::ones(3, DType::F32, &CPU)?;
    assert_message(
        ScaleNorm::new(3, weight.clone(), 1e-5).forward(&x),
        &["ScaleNorm", "weight", "[1]", "[3]"],
    );
    assert_message(
        ops::scale_norm(&x, 3, &weight.narrow(0, 0, 1)?, -1.),
        &["ScaleNorm", "eps"],
    );
    Ok(())
}

/// Rows that are shorter than ε are divided by it, forward and backward; zeros stay zero.
#[test]
fn short_rows_under_scale_norm_are_divided_by_eps() -> Result<()> {
    let eps = 2f64.powi(-10);
    for dtype in DTYPES {
        for path in [candle_norm::Path::Auto, candle_norm::Path::Composed] {
            let rows = [[0., 0.], [0.75 * eps, 0.5 * eps], [3., 4.]];
            let x = Tensor::new(&rows, &CPU)?.to_dtype(dtype)?;
            let x = Var::from_tensor(&x)?;
            let weight = Var::from_tensor(&Tensor::new(&[2f64], &CPU)?.to_dtype(dtype)?)?;
            let (y, grads) = candle_norm::with_path(path, || -> Result<_> {
                let y = ops::scale_norm(&x, 2, &weight, eps)?;
                let smaller = ops::scale_norm(&x, 2, &weight, 1e-12)?;
                let longer = |y: &Tensor| Ok::<_, candle_core::Error>(values(y)?[4..].to_vec());
                assert_eq!(longer(&smaller)?, longer(&y)?, "{dtype:?} {path:?}");
                let dy = Tensor::new(&[[1f64, 2.]; 3], &CPU)?.to_dtype(dtype)?;
                let grads = (&y * dy)?.sum_all()?.backward()?;
                Ok((y, grads))
            })?;
            let y = values(&y)?;
            assert_eq!(y[..4], [0., 0., 1.5, 1.], "{dtype:?} {path:?}");
            let dx = values(grads.get(&x).expect("a gradient"))?;
            let slope = 2. / eps;
            let want = [slope, 2. * slope, slope, 2. * slope];
            assert_eq!(dx[..4], want, "{dtype:?} {path:?}");
            // The gradient of a row's length is that of its direction: 0, 0.75 + 1, 0.6 + 1.6.
            let dweight = values(grads.get(&weight).expect("a gradient"))?[0];
            assert!(
                (dweight - 3.95).abs() < 0.02,
                "{dtype:?} {path:?}: {dweight}"
            );
        }
    }
    Ok(())
}

/// One value of `x` is not finite: which elements of the output may be affected.
#[test]
fn what_is_not_finite_stays_in_its_row_group_or_channel() -> Result<()> {
    let dims = [3, 4, 2, 5];
    // Sample 1, channel 2, position 3.
    let at = (4 + 2) * 10 + 3;
    for dtype in DTYPES {
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let mut data = values(&noise(&dims, dtype)?)?;
            data[at] = bad;
            let x = Tensor::from_vec(data, &dims, &CPU)?.to_dtype(dtype)?;
            for (_, form) in table::forms() {
                let oracle = Subject::new((form.kind)(&dims), 1e-5).oracle(&dims);
                let norm = build(form, &VarMap::new(), dtype, &dims)?;
                let x = Var::from_tensor(&x)?;
                let y = norm.forward_t(&x, true)?;
                let grads = (&y * noise(&dims, dtype)?)?.sum_all()?.backward()?;
                let dx = values(grads.get(&x).unwrap())?;
                for (i, (y, dx)) in values(&y)?.into_iter().zip(dx).enumerate() {
                    let what = format!("{} {dtype:?} {bad} at {i}: {y}, dx {dx}", form.name);
                    let reached = oracle.reaches(at, i);
                    if oracle.is_mixture() {
                        // The rows of one partition cross those of another, so that the mixture
                        // carries the gradient everywhere.
                        assert!(dx.is_nan(), "{what}");
                    } else if !reached {
                        assert!(dx.is_finite(), "{what}");
                    }
                    if !reached {
                        assert!(y.is_finite(), "{what}");
                    } else if !oracle.is_centered() && bad.is_infinite() {
                        // x / inf is 0, inf / inf is not a number.
                        assert!(if i == at { y.is_nan() } else { y == 0. }, "{what}");
                    } else {
                        assert!(y.is_nan(), "{what}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_batch_that_is_not_finite_can_be_refused() -> Result<()> {
    let settings = Settings {
        refuse_non_finite: true,
        ..DEFAULTS
    };
    for which in table::tracked() {
        let norm = which.build(2, settings, vb(&VarMap::new(), DType::F32))?;
        norm.forward_t(&noise(&[2, 2, 3], DType::F32)?, true)?;
        let before = state(&*norm)?;
        for bad in [f32::NAN, f32::INFINITY] {
            let mut data = vec![1f32; 12];
            data[7] = bad;
            let x = Tensor::from_vec(data, (2, 2, 3), &CPU)?;
            assert_message(
                norm.forward_t(&x, true),
                &["refuse_non_finite", "channel 0", "[2, 2, 3]"],
            );
            assert_eq!(state(&*norm)?, before);
        }
    }
    Ok(())
}

#[test]
fn the_largest_values_are_finite_and_right() -> Result<()> {
    let dims = [3, 4, 5, 7];
    for (dtype, scale, tolerance) in [
        (DType::F32, 1e15, 2e-6),
        (DType::F16, 65504., 6e-4),
        (DType::BF16, 1e15, 4.5e-3),
        (DType::F64, 1e100, 1e-11),
    ] {
        let x = (noise(&dims, DType::F64)? * scale)?.to_dtype(dtype)?;
        for (_, form) in table::forms() {
            let norm = build(form, &VarMap::new(), dtype, &dims)?;
            let exact = build(form, &VarMap::new(), DType::F64, &dims)?;
            let name = form.name;
            let want = exact.forward_t(&x.to_dtype(DType::F64)?, true)?;
            let x = Var::from_tensor(&x)?;
            let y = norm.forward_t(&x, true)?;
            for (got, want) in values(&y)?.into_iter().zip(values(&want)?) {
                let bound = tolerance * (1. + want.abs());
                assert!(
                    (got - want).abs() <= bound,
                    "{name} {dtype:?}: {got} for {want}"
                );
            }
            let grads = (y * noise(&dims, dtype)?)?.sum_all()?.backward()?;
            assert!(
                values(grads.get(&x).unwrap())?
                    .iter()
                    .all(|g| g.is_finite()),
                "{name} {dtype:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn any_layout_gives_the_values_of_its_contiguous_copy() -> Result<()> {
    let dims = [3, 4, 5, 7];
    for dtype in DTYPES {
        let views = [
            ("transposed", noise(&[3, 4, 7, 5], dtype)?.transpose(2, 3)?),
            (
                "channels last",
                noise(&[3, 5, 7, 4], dtype)?.permute((0, 3, 1, 2))?,
            ),
            (
                "sliced",
                noise(&[5, 6, 9, 9], dtype)?
                    .narrow(0, 1, 3)?
                    .narrow(1, 2, 4)?
                    .narrow(2, 3, 5)?
                    .narrow(3, 1, 7)?,
            ),
            (
                "broadcast",
                noise(&[1, 4, 1, 7], dtype)?.broadcast_as(&dims)?,
            ),
            (
                "batch broadcast",
                noise(&[4, 5, 7], dtype)?.broadcast_as(&dims)?,
            ),
        ];
        for (view, x) in views {
            assert!(!x.is_contiguous() || view == "sliced");
            for (_, form) in table::forms() {
                let name = form.name;
                let norm = build(form, &VarMap::new(), dtype, &dims)?;
                let copy = build(form, &VarMap::new(), dtype, &dims)?;
                for train in [true, false] {
                    let y = norm.forward_t(&x, train)?;
                    assert!(y.is_contiguous(), "{name}");
                    let want = copy.forward_t(&x.force_contiguous()?, train)?;
                    assert_eq!(values(&y)?, values(&want)?, "{name} {view} {dtype:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_eps_below_the_accumulators_range_keeps_constant_rows_finite() -> Result<()> {
    for dtype in DTYPES {
        let x = Var::from_tensor(&Tensor::full(3f32, (2, 5), &CPU)?.to_dtype(dtype)?)?;
        let y = ops::layer_norm(&x, 5, None, None, 1e-300)?;
        assert!(values(&y)?.iter().all(|y| *y == 0.));
        let y = ops::layer_norm(&x, 5, None, None, 1e-60)?;
        assert!(values(&y)?.iter().all(|y| *y == 0.));
    }
    Ok(())
}
