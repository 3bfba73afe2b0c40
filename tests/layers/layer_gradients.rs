//! Every layer, in every mode and with every option, against central differences: the gradients of
//! its input and of all its parameters.
mod case;
mod weight_norm;

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};
use candle_nn::{Conv1dConfig, Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNormOptions, Cast, GroupNormOptions, InstanceNormOptions, LayerNormOptions,
    NormConfig, RmsNormOptions, ScaleNormOptions, SwitchNormOptions, batch_norm, group_norm,
    instance_norm, layer_norm, layer_norm_no_bias, rms_norm, scale_norm,
};
use case::{Case, check_all};
use testkit::table;
use testkit::vars::{state, vb};

const AFFINE: [Affine; 4] = [
    Affine::None,
    Affine::Weight,
    Affine::Bias,
    Affine::WeightAndBias,
];

/// Every form of the table, in training and in inference.
#[test]
fn forms_of_the_table() -> Result<()> {
    let mut cases = vec![];
    for (_, form) in table::forms() {
        for dims in [&[2, 4, 3][..], &[2, 4, 2, 3]] {
            // Its variables say what it finds in a checkpoint.
            let vars = VarMap::new();
            (form.build)(dims, vb(&vars, DType::F64))?;
            let (params, statistics): (Vec<_>, Vec<_>) = (state(&vars).into_iter())
                .partition(|(name, _)| !name.contains("running_") && !name.contains("num_batches"));
            let params: BTreeMap<_, _> = params.into_iter().collect();
            for train in [true, false] {
                let forward = move |vb: VarBuilder, x: &Tensor| {
                    let norm = (form.build)(x.dims(), vb)?;
                    norm.forward_t(x, train)
                };
                let mut case = Case::new(format!("{}, train {train}", form.name), dims, forward);
                for (name, stored) in &params {
                    case = case.param(name, &stored.dims);
                }
                for (name, stored) in &statistics {
                    if name == "running_mean" {
                        case = case.statistics_of(&stored.dims);
                    }
                }
                cases.push(case);
            }
        }
    }
    check_all(cases)
}

#[test]
fn batch_norms() -> Result<()> {
    let mut cases = vec![];
    let mut push = |name: &str, input: &[usize], train: bool, options: BatchNormOptions| {
        let forward =
            move |vb: VarBuilder, x: &Tensor| batch_norm(4, options, vb)?.forward_t(x, train);
        let name = format!("{name}, {}", if train { "training" } else { "inference" });
        let case = Case::new(name, input, forward).affine(options.affine, &[4]);
        cases.push(match options.track_running_stats {
            true => case.statistics(4),
            false => case,
        });
    };
    let default = BatchNormOptions::default();
    for train in [true, false] {
        push("rank 2", &[5, 4], train, default);
        push("rank 3", &[2, 4, 3], train, default);
        push("rank 4", &[2, 4, 2, 3], train, default);
        push("rank 5", &[2, 4, 1, 2, 2], train, default);
        for affine in AFFINE {
            let options = BatchNormOptions { affine, ..default };
            push(&format!("affine {affine:?}"), &[3, 4, 2], train, options);
            let untracked = BatchNormOptions {
                track_running_stats: false,
                ..options
            };
            push(
                &format!("untracked, affine {affine:?}"),
                &[3, 4, 2],
                train,
                untracked,
            );
            let uncentered = BatchNormOptions {
                remove_mean: false,
                ..options
            };
            push(
                &format!("not centered, affine {affine:?}"),
                &[3, 4, 2],
                train,
                uncentered,
            );
        }
        let neither = BatchNormOptions {
            track_running_stats: false,
            remove_mean: false,
            ..default
        };
        push("untracked and not centered", &[3, 4, 2], train, neither);
        push(
            "cumulative",
            &[3, 4, 2],
            train,
            BatchNormOptions {
                momentum: None,
                ..default
            },
        );
        push(
            "large eps",
            &[3, 4, 2],
            train,
            BatchNormOptions {
                eps: 0.5,
                ..default
            },
        );
        let careful = BatchNormOptions {
            refuse_non_finite: true,
            ..default
        };
        push("refusing NaN", &[3, 4, 2], train, careful);
    }
    check_all(cases)
}

#[test]
fn frozen_norms() -> Result<()> {
    let mut cases = vec![];
    for affine in AFFINE {
        let batch = BatchNormOptions {
            affine,
            ..Default::default()
        };
        let name = format!("batch norm, affine {affine:?}");
        let forward =
            move |vb: VarBuilder, x: &Tensor| batch_norm(4, batch, vb)?.frozen()?.forward(x);
        for input in [&[3, 4][..], &[2, 4, 3]] {
            cases.push(
                Case::new(&name, input, forward)
                    .affine(affine, &[4])
                    .statistics(4),
            );
        }
        let instance = InstanceNormOptions {
            affine,
            track_running_stats: true,
            ..Default::default()
        };
        let name = format!("instance norm, affine {affine:?}");
        let forward =
            move |vb: VarBuilder, x: &Tensor| instance_norm(4, instance, vb)?.frozen()?.forward(x);
        cases.push(
            Case::new(name, &[2, 4, 3], forward)
                .affine(affine, &[4])
                .statistics(4),
        );
    }
    check_all(cases)
}

#[test]
fn layer_norms() -> Result<()> {
    let mut cases = vec![];
    for affine in AFFINE {
        for remove_mean in [true, false] {
            let options = LayerNormOptions {
                affine,
                remove_mean,
                ..Default::default()
            };
            let name = format!("affine {affine:?}, remove_mean {remove_mean}");
            let last = move |vb: VarBuilder, x: &Tensor| layer_norm(5, options, vb)?.forward(x);
            for input in [&[5][..], &[3, 5], &[2, 3, 5]] {
                cases.push(Case::new(&name, input, last).affine(affine, &[5]));
            }
            let two = move |vb: VarBuilder, x: &Tensor| layer_norm((2, 3), options, vb)?.forward(x);
            cases.push(
                Case::new(format!("{name}, two axes"), &[3, 2, 3], two).affine(affine, &[2, 3]),
            );
            let options = LayerNormOptions {
                channels_first: true,
                ..options
            };
            let first = move |vb: VarBuilder, x: &Tensor| layer_norm(5, options, vb)?.forward(x);
            for input in [&[3, 5][..], &[2, 5, 3], &[2, 5, 2, 2]] {
                let case = Case::new(format!("{name}, channels first"), input, first);
                cases.push(case.affine(affine, &[5]));
            }
        }
    }
    let no_bias = |vb: VarBuilder, x: &Tensor| layer_norm_no_bias(5, 1e-5, vb)?.forward(x);
    cases.push(Case::new("no bias", &[3, 5], no_bias).affine(Affine::Weight, &[5]));
    // Longer than the blocks that sums are formed in, and of no small factors.
    let long = |vb: VarBuilder, x: &Tensor| layer_norm(67, 1e-5, vb)?.forward(x);
    cases.push(Case::new("a long row", &[2, 67], long).affine(Affine::WeightAndBias, &[67]));
    check_all(cases)
}

#[test]
fn rms_norms() -> Result<()> {
    let mut cases = vec![];
    for affine in AFFINE {
        for offset in [0.0, 1.0] {
            for cast in [Cast::AfterWeight, Cast::BeforeWeight] {
                let options = RmsNormOptions {
                    affine,
                    offset,
                    cast,
                    ..Default::default()
                };
                let name = format!("affine {affine:?}, offset {offset}, cast {cast:?}");
                let last = move |vb: VarBuilder, x: &Tensor| rms_norm(5, options, vb)?.forward(x);
                for input in [&[5][..], &[3, 5]] {
                    cases.push(Case::new(&name, input, last).affine(affine, &[5]));
                }
                let two =
                    move |vb: VarBuilder, x: &Tensor| rms_norm((2, 3), options, vb)?.forward(x);
                let case = Case::new(format!("{name}, two axes"), &[3, 2, 3], two);
                cases.push(case.affine(affine, &[2, 3]));
                let options = RmsNormOptions {
                    channels_first: true,
                    ..options
                };
                let first = move |vb: VarBuilder, x: &Tensor| rms_norm(5, options, vb)?.forward(x);
                let case = Case::new(format!("{name}, channels first"), &[2, 5, 3], first);
                cases.push(case.affine(affine, &[5]));
            }
        }
        let options = RmsNormOptions {
            eps: None,
            affine,
            ..Default::default()
        };
        let smallest = move |vb: VarBuilder, x: &Tensor| rms_norm(5, options, vb)?.forward(x);
        let case = Case::new(
            format!("eps of the dtype, affine {affine:?}"),
            &[3, 5],
            smallest,
        );
        cases.push(case.affine(affine, &[5]).not_at_zero());
    }
    let forward_diff = |vb: VarBuilder, x: &Tensor| rms_norm(5, 1e-6, vb)?.forward_diff(x);
    cases.push(Case::new("forward_diff", &[3, 5], forward_diff).affine(Affine::Weight, &[5]));
    check_all(cases)
}

#[test]
fn scale_norms() -> Result<()> {
    let mut cases = vec![];
    // Rows of the check are longer than the first, and shorter than the last.
    for eps in [1e-5, 100.] {
        for (channels_first, input) in [
            (false, &[5][..]),
            (false, &[3, 5]),
            (true, &[4, 5]),
            (true, &[2, 5, 3]),
        ] {
            let options = ScaleNormOptions {
                eps,
                channels_first,
            };
            let one = move |vb: VarBuilder, x: &Tensor| scale_norm(5, options, vb)?.forward(x);
            let name = format!("eps {eps}, channels first {channels_first}");
            cases.push(Case::new(name, input, one).param("weight", &[1]));
        }
        let two = move |vb: VarBuilder, x: &Tensor| scale_norm((2, 3), eps, vb)?.forward(x);
        let case = Case::new(format!("eps {eps}, two axes"), &[3, 2, 3], two);
        cases.push(case.param("weight", &[1]));
    }
    check_all(cases)
}

#[test]
fn group_norms() -> Result<()> {
    let mut cases = vec![];
    for affine in AFFINE {
        for groups in [1, 2, 4] {
            let options = GroupNormOptions {
                affine,
                ..Default::default()
            };
            let name = format!("{groups} groups, affine {affine:?}");
            let forward =
                move |vb: VarBuilder, x: &Tensor| group_norm(groups, 4, options, vb)?.forward(x);
            for input in [&[3, 4][..], &[2, 4, 3], &[2, 4, 2, 2]] {
                // A group of one value has an output, and a gradient, of zero.
                cases.push(Case::new(&name, input, forward).affine(affine, &[4]));
            }
        }
    }
    check_all(cases)
}

#[test]
fn instance_norms() -> Result<()> {
    let mut cases = vec![];
    for affine in AFFINE {
        for train in [true, false] {
            for track_running_stats in [true, false] {
                for momentum in [Some(0.1), None] {
                    let options = InstanceNormOptions {
                        affine,
                        track_running_stats,
                        momentum,
                        ..Default::default()
                    };
                    let name = format!("{options:?}, train {train}");
                    let forward = move |vb: VarBuilder, x: &Tensor| {
                        instance_norm(4, options, vb)?.forward_t(x, train)
                    };
                    for input in [&[2, 4, 3][..], &[2, 4, 2, 2]] {
                        let case = Case::new(&name, input, forward).affine(affine, &[4]);
                        cases.push(match track_running_stats {
                            true => case.statistics(4),
                            false => case,
                        });
                    }
                }
            }
        }
    }
    check_all(cases)
}

#[test]
fn switch_norms() -> Result<()> {
    let mut cases = vec![];
    for (using_bn, unbiased, train) in [
        (true, true, true),
        (true, true, false),
        (true, false, true),
        (false, true, true),
        (false, false, false),
    ] {
        for (input, spatial_dims, affine) in [
            (&[3, 4, 2, 2][..], 2, Affine::WeightAndBias),
            (&[2, 4, 3], 2, Affine::Bias),
            (&[3, 4], 0, Affine::Weight),
            (&[3, 4], 0, Affine::Bias),
            (&[2, 4, 3], 0, Affine::None),
            (&[2, 4, 3], 0, Affine::WeightAndBias),
        ] {
            let options = SwitchNormOptions {
                affine,
                using_bn,
                unbiased,
                spatial_dims,
                ..Default::default()
            };
            let forward = move |vb: VarBuilder, x: &Tensor| {
                candle_norm::switch_norm(4, options, vb)?.forward_t(x, train)
            };
            let shape: &[usize] = if spatial_dims == 0 {
                &[1, 4]
            } else {
                &[1, 4, 1, 1]
            };
            let sources = 1 + usize::from(spatial_dims > 0) + usize::from(using_bn);
            let case = Case::new(format!("{options:?}, train {train}"), input, forward)
                .affine(affine, shape)
                .param("mean_weight", &[sources])
                .param("var_weight", &[sources]);
            cases.push(match using_bn {
                true => case.statistics_of(&shape[..shape.len().min(3)]),
                false => case,
            });
        }
    }
    check_all(cases)
}

/// Norms that are built by their name, alone and together with the layer before them.
#[test]
fn norms_by_name() -> Result<()> {
    let mut cases = vec![];
    for name in ["batch", "layer", "group:2", "instance", "rms"] {
        let config: NormConfig = name.parse()?;
        let params = |case: Case, prefix: [&'static str; 2]| match name {
            "instance" => case,
            "rms" => case.param(prefix[0], &[4]),
            _ => case.param(prefix[0], &[4]).param(prefix[1], &[4]),
        };
        let alone = ["weight", "bias"];
        for train in [true, false] {
            let case = Case::new(format!("{name} on axis 1"), &[2, 4, 3], move |vb, x| {
                config.channels(4, vb)?.forward_t(x, train)
            });
            cases.push(params(case, alone).statistics(4));
            let case = Case::new(
                format!("{name} on the last axis"),
                &[2, 3, 4],
                move |vb, x| config.features(4, vb)?.forward_t(x, train),
            );
            cases.push(params(case, alone).statistics(4));
        }
        let after = ["norm.weight", "norm.bias"];
        let case = Case::new(format!("linear, then {name}"), &[2, 2, 3], move |vb, x| {
            config.linear(3, 4, vb)?.forward_t(x, true)
        });
        let case = params(case.param("layer.weight", &[4, 3]), after).statistics(4);
        cases.push(match name {
            "instance" | "rms" => case.param("layer.bias", &[4]),
            _ => case,
        });
        let case = Case::new(format!("conv1d, then {name}"), &[2, 3, 4], move |vb, x| {
            config
                .conv1d(3, 4, 2, Conv1dConfig::default(), vb)?
                .forward_t(x, true)
        });
        let case = params(case.param("layer.weight", &[4, 3, 2]), after).statistics(4);
        cases.push(match name {
            "instance" | "rms" => case.param("layer.bias", &[4]),
            _ => case,
        });
    }
    check_all(cases)
}
