//! Sizes that no machine counts to or holds: errors that name the layer, never an overflow.

use std::fmt::Debug;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig};
use candle_norm::{
    InstanceNormOptions, NormConfig, SwitchNormOptions, batch_norm, group_norm, instance_norm,
    layer_norm, ops, rms_norm, switch_norm, weight_norm,
};

use testkit::table;
use testkit::vars::fresh_vb;

const SIZES: [usize; 4] = [usize::MAX, usize::MAX / 2, usize::MAX / 2 + 1, 1 << 61];

#[track_caller]
fn refused<T: Debug>(layer: &str, result: Result<T>) {
    let message = result.expect_err("an error").to_string();
    let parts = [layer, "expected", "got"];
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

#[test]
fn no_layer_has_more_parameters_than_memory_has_addresses() {
    let tracked = InstanceNormOptions {
        track_running_stats: true,
        ..Default::default()
    };
    let without_batch = SwitchNormOptions {
        using_bn: false,
        ..Default::default()
    };
    let dim = Some(0);
    for n in SIZES {
        for (layer, form) in table::forms() {
            // Channels that two groups divide.
            refused(layer.title, (form.build)(&[1, n & !1, n], fresh_vb()));
        }
        refused("SwitchNorm", switch_norm(n, 1e-5, fresh_vb()));
        refused("SwitchNorm", switch_norm(n, without_batch, fresh_vb()));
        refused("BatchNorm", batch_norm(n, 1e-5, fresh_vb()));
        refused("InstanceNorm", instance_norm(n, 1e-5, fresh_vb()));
        refused("InstanceNorm", instance_norm(n, tracked, fresh_vb()));
        refused("GroupNorm", group_norm(1, n, 1e-5, fresh_vb()));
        refused("LayerNorm", layer_norm(n, 1e-5, fresh_vb()));
        refused("LayerNorm", layer_norm((n, n), 1e-5, fresh_vb()));
        refused("RmsNorm", rms_norm((2, n), 1e-5, fresh_vb()));
        refused(
            "WeightNorm",
            weight_norm::linear(n, 3, dim.into(), fresh_vb()),
        );
        refused(
            "WeightNorm",
            weight_norm::linear(3, n, dim.into(), fresh_vb()),
        );
        let config = Conv2dConfig::default();
        refused(
            "WeightNorm",
            weight_norm::conv2d(3, 4, n, config, dim.into(), fresh_vb()),
        );
        refused(
            "WeightNorm",
            weight_norm::conv2d(n, 4, 3, config, dim.into(), fresh_vb()),
        );
        let config = ConvTranspose2dConfig::default();
        let up = weight_norm::conv_transpose2d(3, n, 3, config, dim.into(), fresh_vb());
        refused("WeightNorm", up);
    }
}

/// A tensor without elements has neighbors that have some: magnitudes, biases, outputs. They are
/// counted too.
#[test]
fn sizes_beside_an_axis_without_elements_are_counted() -> Result<()> {
    let shapes = [vec![0], vec![0, 0]];
    for n in SIZES.into_iter().chain([1 << 60]) {
        for dim in [None, Some(0), Some(1)] {
            for size in [0, 1] {
                let wn = "WeightNorm";
                refused(wn, weight_norm::linear(size, n, dim.into(), fresh_vb()));
                refused(
                    wn,
                    weight_norm::linear_no_bias(size, n, dim.into(), fresh_vb()),
                );
                refused(wn, weight_norm::linear(n, size, dim.into(), fresh_vb()));
                let config = Conv1dConfig::default();
                refused(
                    wn,
                    weight_norm::conv1d(0, n, size, config, dim.into(), fresh_vb()),
                );
                refused(
                    wn,
                    weight_norm::conv1d(n, 0, size, config, dim.into(), fresh_vb()),
                );
                let config = Conv2dConfig::default();
                refused(
                    wn,
                    weight_norm::conv2d(0, n, size, config, dim.into(), fresh_vb()),
                );
                refused(
                    wn,
                    weight_norm::conv2d(n, n, 0, config, dim.into(), fresh_vb()),
                );
                let config = ConvTranspose1dConfig::default();
                let up = weight_norm::conv_transpose1d(size, n, 0, config, dim.into(), fresh_vb());
                refused(wn, up);
                let config = ConvTranspose1dConfig {
                    groups: n,
                    ..config
                };
                let up = weight_norm::conv_transpose1d(0, n, 1, config, dim.into(), fresh_vb());
                refused(wn, up);
                let config = ConvTranspose2dConfig::default();
                let up = weight_norm::conv_transpose2d(n, 0, size, config, dim.into(), fresh_vb());
                refused(wn, up);
            }
        }
        for shape in &shapes {
            let shape = [&shape[..], &[n], &[n][..shape.len() - 1]].concat();
            refused("LayerNorm", layer_norm(shape.as_slice(), 1e-5, fresh_vb()));
            refused("RmsNorm", rms_norm(shape.as_slice(), 1e-5, fresh_vb()));
        }
        for name in ["none", "batch", "layer", "weight", "switch"] {
            let config: NormConfig = name.parse()?;
            let layer = match name {
                "weight" => "WeightNorm",
                _ => "NormedLayer",
            };
            refused(layer, config.linear(0, n, fresh_vb()));
            refused(layer, config.linear(n, 0, fresh_vb()));
            refused(
                layer,
                config.conv1d(0, n, 0, Default::default(), fresh_vb()),
            );
        }
    }
    // Sizes that there are: nothing is made of them but empty tensors.
    for (inputs, outputs) in [(0, 3), (3, 0), (0, 0)] {
        let layer = weight_norm::linear(inputs, outputs, Some(0).into(), fresh_vb())?;
        let x = Tensor::zeros((2, inputs), DType::F32, &Device::Cpu)?;
        assert_eq!(layer.forward(&x)?.dims(), [2, outputs]);
    }
    Ok(())
}

/// An input without elements asks for outputs, or statistics, of any number.
#[test]
fn inputs_without_elements_are_counted_too() -> Result<()> {
    let empty = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let linear = weight_norm::linear_no_bias(0, 8, Some(0).into(), fresh_vb())?;
    refused("WeightNorm", linear.forward(&empty(&[1 << 61, 0])?));
    let conv = weight_norm::conv1d(0, 8, 1, Conv1dConfig::default(), Some(0).into(), fresh_vb())?;
    refused("WeightNorm", conv.forward(&empty(&[1 << 58, 0, 8])?));
    let config = Conv1dConfig {
        padding: 1 << 62,
        ..Default::default()
    };
    let conv = weight_norm::conv1d(3, 8, 1, config, Some(0).into(), fresh_vb())?;
    refused("WeightNorm", conv.forward(&empty(&[0, 3, 8])?));
    refused("moments", ops::moments(&empty(&[0, 1 << 61])?));
    refused("moments", ops::moments(&empty(&[0, 1 << 59])?));
    assert!(ops::moments(&empty(&[5, 0])?)?.is_empty());
    Ok(())
}

/// Every number of a convolution, one at a time; what is left after an input of 8 elements may be a
/// result.
#[test]
fn geometries_are_counted_without_overflow() -> Result<()> {
    let x = Tensor::ones((2, 3, 8), DType::F32, &Device::Cpu)?;
    let direct = |config: Conv1dConfig, kernel: usize| {
        weight_norm::conv1d(3, 4, kernel, config, Some(0).into(), fresh_vb())?.forward(&x)
    };
    let transposed = |config: ConvTranspose1dConfig, kernel: usize| {
        weight_norm::conv_transpose1d(3, 4, kernel, config, Some(0).into(), fresh_vb())?.forward(&x)
    };
    for n in SIZES {
        let (one, up) = (Conv1dConfig::default(), ConvTranspose1dConfig::default());
        refused("WeightNorm", direct(Conv1dConfig { padding: n, ..one }, 2));
        refused("WeightNorm", direct(Conv1dConfig { dilation: n, ..one }, 2));
        refused("WeightNorm", direct(Conv1dConfig { groups: n, ..one }, 2));
        let wide = Conv1dConfig {
            padding: n,
            stride: n,
            ..one
        };
        refused("WeightNorm", direct(wide, 2));
        let padded = ConvTranspose1dConfig { padding: n, ..up };
        refused("WeightNorm", transposed(padded, 2));
        let strided = ConvTranspose1dConfig { stride: n, ..up };
        refused("WeightNorm", transposed(strided, 2));
        let dilated = ConvTranspose1dConfig { dilation: n, ..up };
        refused("WeightNorm", transposed(dilated, 2));
        let extended = ConvTranspose1dConfig {
            output_padding: n - 1,
            stride: n,
            ..up
        };
        refused("WeightNorm", transposed(extended, 2));

        // A kernel of one element moves at no distance, and a stride beyond the input stays at its
        // start.
        assert_eq!(
            direct(Conv1dConfig { dilation: n, ..one }, 1)?.dims(),
            [2, 4, 8]
        );
        assert_eq!(
            direct(Conv1dConfig { stride: n, ..one }, 2)?.dims(),
            [2, 4, 1]
        );
    }
    Ok(())
}
