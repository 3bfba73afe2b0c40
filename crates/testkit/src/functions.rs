//! The table of functions beside the plain norms: modulated, with an activation, gated, masked, and
//! those that normalize no rows, groups or channels.
//!
//! Gradients of first and second order, determinism and edges go over it, as they go over the
//! [table of layers](crate::table).

use candle_core::{D, Result, Tensor};
use candle_nn::Activation;
use candle_norm::ops::{self, GateOptions, L2Form, Modulation};
use candle_norm::{Gate, GatedRmsNormOptions, GroupNorm};

/// A function of an input and of parameters.
pub struct Function {
    /// Name in the messages of tests.
    pub name: &'static str,
    /// Shapes of the arguments after the input, for an input of a shape.
    pub params: fn(&[usize]) -> Vec<Vec<usize>>,
    /// Calls it with the input and its parameters.
    pub call: fn(&[Tensor]) -> Result<Tensor>,
    /// Small shapes of inputs.
    pub tiny: &'static [&'static [usize]],
    /// Shapes of inputs that several threads work on, and ragged ones.
    pub ragged: &'static [&'static [usize]],
    /// It has derivatives where the input is zero.
    pub smooth_at_zero: bool,
}

fn none(_: &[usize]) -> Vec<Vec<usize>> {
    vec![]
}

fn last(dims: &[usize]) -> usize {
    dims[dims.len() - 1]
}

const ROWS: &[&[usize]] = &[&[3, 17], &[1031, 49], &[5, 10_007]];
const MAPS: &[&[usize]] = &[&[2, 5, 7], &[3, 33, 201], &[257, 6, 7], &[2, 3, 10_007]];

/// All of them.
pub static FUNCTIONS: &[Function] = &[
    Function {
        name: "gated_rms_norm, gate after",
        params: |dims| vec![dims.to_vec(), vec![last(dims)]],
        call: |t| ops::gated_rms_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-2),
        tiny: &[&[3, 5], &[2, 37], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "gated_rms_norm, gate before, in groups",
        params: |dims| vec![dims.to_vec(), vec![last(dims)]],
        call: |t| {
            let size = last(t[0].dims());
            let options = GatedRmsNormOptions {
                gate: Gate::Before,
                group_size: Some(if size.is_multiple_of(3) {
                    size / 3
                } else {
                    size
                }),
                ..1e-2.into()
            };
            ops::gated_rms_norm(&t[0], Some(&t[1]), Some(&t[2]), options)
        },
        tiny: &[&[3, 6], &[2, 39], &[2, 3, 4]],
        ragged: &[&[3, 51], &[1031, 48], &[5, 10_008]],
        smooth_at_zero: true,
    },
    Function {
        name: "modulated_layer_norm, by sample",
        params: |dims| vec![vec![dims[0], last(dims)]; 2],
        call: |t| {
            let modulation = Modulation::new(Some(&t[1]), Some(&t[2]));
            let size = last(t[0].dims());
            ops::modulated_layer_norm(&t[0], size, [None, None], 1e-2, &modulation)
        },
        tiny: &[&[2, 3, 4], &[2, 2, 2, 3]],
        ragged: &[&[3, 5, 17], &[7, 150, 49], &[2, 3, 10_007]],
        smooth_at_zero: true,
    },
    Function {
        name: "modulated_rms_norm, by token",
        params: |dims| vec![dims.to_vec()],
        call: |t| {
            let (size, modulation) = (last(t[0].dims()), Modulation::new(Some(&t[1]), None));
            ops::modulated_rms_norm(&t[0], size, None, 1e-2, &modulation)
        },
        tiny: &[&[2, 3, 4], &[2, 2, 2, 3]],
        ragged: &[&[3, 5, 17], &[7, 150, 49]],
        smooth_at_zero: true,
    },
    Function {
        name: "modulated_group_norm, by sample",
        params: |dims| vec![vec![dims[0], dims[1]]; 2],
        call: |t| {
            let modulation = Modulation::new(Some(&t[1]), Some(&t[2]));
            ops::modulated_group_norm(&t[0], 1, [None, None], 1e-2, &modulation)
        },
        tiny: &[&[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "layer_norm_act, gelu",
        params: |dims| vec![vec![last(dims)]; 2],
        call: |t| {
            let (size, params) = (last(t[0].dims()), [Some(&t[1]), Some(&t[2])]);
            ops::layer_norm_act(&t[0], size, params, 1e-2, Activation::Gelu)
        },
        tiny: &[&[3, 5], &[2, 37], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "rms_norm_act, hardswish",
        params: |dims| vec![vec![last(dims)]],
        call: |t| {
            let size = last(t[0].dims());
            ops::rms_norm_act(&t[0], size, Some(&t[1]), 1e-2, Activation::HardSwish)
        },
        tiny: &[&[3, 5], &[2, 37], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "group_norm_act, silu",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| {
            let params = [Some(&t[1]), Some(&t[2])];
            ops::group_norm_act(&t[0], 1, params, 1e-2, Activation::Silu)
        },
        tiny: &[&[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "instance_norm_act, mish",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| {
            let (weight, bias) = (Some(&t[1]), Some(&t[2]));
            Ok(ops::instance_norm_act(&t[0], weight, bias, 1e-2, Activation::Mish)?.0)
        },
        tiny: &[&[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "modulate",
        params: |dims| vec![vec![dims[0], last(dims)]; 2],
        call: |t| ops::modulate(&t[0], &Modulation::new(Some(&t[1]), Some(&t[2])), false),
        tiny: &[&[2, 3, 4], &[2, 2, 2, 3]],
        ragged: &[&[3, 5, 17], &[7, 150, 49], &[2, 3, 10_007]],
        smooth_at_zero: true,
    },
    Function {
        name: "l2_normalize, max",
        params: none,
        call: |t| ops::l2_normalize(&t[0], D::Minus1, 1e-12, L2Form::Max),
        tiny: &[&[3, 5], &[2, 37], &[5]],
        ragged: ROWS,
        smooth_at_zero: false,
    },
    Function {
        name: "l2_normalize, max, short vectors",
        params: none,
        call: |t| ops::l2_normalize(&t[0], D::Minus1, 2., L2Form::Max),
        tiny: &[&[6, 5], &[2, 3, 4]],
        ragged: &[&[3, 17], &[1031, 49]],
        smooth_at_zero: true,
    },
    Function {
        name: "l2_normalize, inside",
        params: none,
        call: |t| ops::l2_normalize(&t[0], D::Minus1, 1e-2, L2Form::Inside),
        tiny: &[&[3, 5], &[2, 37], &[5]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "l2_normalize, channels",
        params: none,
        call: |t| ops::l2_normalize(&t[0], 1, 1e-2, L2Form::Inside),
        tiny: &[&[2, 3, 4]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "softmax_last_dim",
        params: none,
        call: |t| ops::softmax_last_dim(&t[0]),
        tiny: &[&[3, 5], &[2, 37], &[2, 2, 3]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "log_softmax_last_dim",
        params: none,
        call: |t| ops::log_softmax_last_dim(&t[0]),
        tiny: &[&[3, 5], &[2, 37]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "layer_scale",
        params: |dims| vec![vec![last(dims)]],
        call: |t| ops::layer_scale(&t[0], &t[1], None, GateOptions::default()),
        tiny: &[&[3, 5], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "layer_scale, shift, channels first",
        params: |dims| vec![vec![dims[1]], vec![dims[1]]],
        call: |t| {
            let options = GateOptions::default().with_channels_first(true);
            ops::layer_scale(&t[0], &t[1], Some(&t[2]), options)
        },
        tiny: &[&[3, 5], &[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "layer_scale, tanh, by sample",
        params: |dims| vec![vec![dims[0], last(dims)]],
        call: |t| ops::layer_scale(&t[0], &t[1], None, GateOptions::default().with_tanh(true)),
        tiny: &[&[2, 3, 4]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "gated_residual",
        params: |dims| vec![dims.to_vec(), vec![last(dims)]],
        call: |t| ops::gated_residual(&t[1], &t[0], &t[2], None, GateOptions::default()),
        tiny: &[&[3, 5], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "gated_residual, by sample",
        params: |dims| vec![dims.to_vec(), vec![dims[0], last(dims)]],
        call: |t| ops::gated_residual(&t[1], &t[0], &t[2], None, GateOptions::default()),
        tiny: &[&[2, 3, 4]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "gated_residual, shift, tanh, channels first, by sample",
        params: |dims| {
            let by_sample = dims[..2].to_vec();
            vec![dims.to_vec(), by_sample, vec![dims[1]]]
        },
        call: |t| {
            let options = GateOptions::default()
                .with_channels_first(true)
                .with_tanh(true);
            ops::gated_residual(&t[1], &t[0], &t[2], Some(&t[3]), options)
        },
        tiny: &[&[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "global_response_norm",
        params: |dims| vec![vec![last(dims)]; 2],
        call: |t| ops::global_response_norm(&t[0], &t[1], &t[2], 1e-2, false),
        tiny: &[&[2, 3, 4], &[2, 2, 2, 3], &[2, 5]],
        ragged: MAPS,
        smooth_at_zero: false,
    },
    Function {
        name: "global_response_norm, channels first",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| ops::global_response_norm(&t[0], &t[1], &t[2], 1e-2, true),
        tiny: &[&[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: false,
    },
    Function {
        name: "weight_standardization",
        params: none,
        call: |t| ops::weight_standardization(&t[0], None, 1e-2),
        tiny: &[&[3, 5], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "weight_standardization, gain",
        params: |dims| vec![gain(dims)],
        call: |t| ops::weight_standardization(&t[0], Some((&t[1], 1.7)), 1e-2),
        tiny: &[&[3, 5], &[2, 3, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "dyt",
        params: |dims| vec![vec![1], vec![last(dims)], vec![last(dims)]],
        call: |t| ops::dyt(&t[0], &t[1], Some(&t[2]), Some(&t[3]), false),
        tiny: &[&[3, 5], &[2, 37], &[5]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "dyt, channels first, no parameters of channels",
        params: |_| vec![vec![1]],
        call: |t| ops::dyt(&t[0], &t[1], None, None, true),
        tiny: &[&[3, 5], &[2, 3, 4], &[2, 3, 17]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "derf",
        params: |dims| vec![vec![1], vec![1], vec![last(dims)]],
        call: |t| ops::derf(&t[0], &t[1], Some(&t[2]), Some(&t[3]), None, false),
        tiny: &[&[3, 5], &[2, 37], &[2, 3, 4]],
        ragged: ROWS,
        smooth_at_zero: true,
    },
    Function {
        name: "derf, channels first",
        params: |dims| vec![vec![1], vec![1], vec![dims[1]], vec![dims[1]]],
        call: |t| ops::derf(&t[0], &t[1], Some(&t[2]), Some(&t[3]), Some(&t[4]), true),
        tiny: &[&[2, 3, 4], &[2, 3, 17], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "cumulative_layer_norm",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| ops::cumulative_layer_norm(&t[0], Some(&t[1]), Some(&t[2]), 1e-2),
        tiny: &[&[2, 3, 4], &[1, 1, 7], &[2, 17, 3]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "cumulative_layer_norm, no parameters",
        params: none,
        call: |t| ops::cumulative_layer_norm(&t[0], None, None, 1e-2),
        tiny: &[&[2, 3, 4]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "ghost_batch_norm",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| Ok(ops::ghost_batch_norm(&t[0], 1, Some(&t[1]), Some(&t[2]), 1e-2)?.0),
        tiny: &[&[3, 2, 4], &[2, 3, 2, 2]],
        ragged: MAPS,
        smooth_at_zero: true,
    },
    Function {
        name: "group_norm, masked",
        params: |dims| vec![vec![dims[1]]; 2],
        call: |t| {
            let (weight, bias) = (t[1].clone(), t[2].clone());
            let norm = GroupNorm::new(weight, bias, t[0].dims()[1], 1, 1e-2)?;
            norm.forward_masked(&t[0], &mask(&t[0])?)
        },
        tiny: &[&[2, 4, 5], &[2, 2, 3, 2]],
        ragged: &[&[3, 33, 201], &[9, 5, 1031]],
        smooth_at_zero: true,
    },
];

/// One number for each index of axis 0.
fn gain(dims: &[usize]) -> Vec<usize> {
    let first = dims.iter().take(1);
    first.copied().chain(dims[1..].iter().map(|_| 1)).collect()
}

/// All positions of `[N, C, *]` but every fifth.
fn mask(x: &Tensor) -> Result<Tensor> {
    let mut dims = x.dims().to_vec();
    dims.remove(1);
    let count = dims.iter().product();
    let valid: Vec<u8> = (0..count).map(|i| u8::from(i % 5 != 4)).collect();
    Tensor::from_vec(valid, dims, x.device())
}
