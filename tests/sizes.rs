//! Sizes that no machine counts to or holds: errors that name the layer, never an overflow.

use std::fmt::Debug;

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, VarBuilder, VarMap,
};
use candle_norm::{
    InstanceNormOptions, SwitchNormOptions, batch_norm, group_norm, instance_norm, layer_norm,
    rms_norm, switch_norm, weight_norm,
};

const SIZES: [usize; 4] = [usize::MAX, usize::MAX / 2, usize::MAX / 2 + 1, 1 << 61];

fn vb() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)
}

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
        refused("SwitchNorm", switch_norm(n, 1e-5, vb()));
        refused("SwitchNorm", switch_norm(n, without_batch, vb()));
        refused("BatchNorm", batch_norm(n, 1e-5, vb()));
        refused("InstanceNorm", instance_norm(n, 1e-5, vb()));
        refused("InstanceNorm", instance_norm(n, tracked, vb()));
        refused("GroupNorm", group_norm(1, n, 1e-5, vb()));
        refused("LayerNorm", layer_norm(n, 1e-5, vb()));
        refused("LayerNorm", layer_norm((n, n), 1e-5, vb()));
        refused("RmsNorm", rms_norm((2, n), 1e-5, vb()));
        refused("WeightNorm", weight_norm::linear(n, 3, dim.into(), vb()));
        refused("WeightNorm", weight_norm::linear(3, n, dim.into(), vb()));
        let config = Conv2dConfig::default();
        refused(
            "WeightNorm",
            weight_norm::conv2d(3, 4, n, config, dim.into(), vb()),
        );
        refused(
            "WeightNorm",
            weight_norm::conv2d(n, 4, 3, config, dim.into(), vb()),
        );
        let config = ConvTranspose2dConfig::default();
        let up = weight_norm::conv_transpose2d(3, n, 3, config, dim.into(), vb());
        refused("WeightNorm", up);
    }
}

/// Every number of a convolution, one at a time; what is left after an input of 8 elements may be a result.
#[test]
fn geometries_are_counted_without_overflow() -> Result<()> {
    let x = Tensor::ones((2, 3, 8), DType::F32, &Device::Cpu)?;
    let direct = |config: Conv1dConfig, kernel: usize| {
        weight_norm::conv1d(3, 4, kernel, config, Some(0).into(), vb())?.forward(&x)
    };
    let transposed = |config: ConvTranspose1dConfig, kernel: usize| {
        weight_norm::conv_transpose1d(3, 4, kernel, config, Some(0).into(), vb())?.forward(&x)
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

        // A kernel of one element moves at no distance, and a stride beyond the input stays at its start.
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
