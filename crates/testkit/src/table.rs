//! The table of layers that tests go over.
//!
//! Edges, sizes, gradients of first and second order, determinism, deadlocks, gradient flow,
//! properties, threads and checkpoints take their subjects from [`LAYERS`]: a layer that enters it
//! is tested by all of them. [`each_layer`](crate::each_layer) makes a test of each layer.

use candle_core::Result;
use candle_nn::VarBuilder;
use candle_norm::{
    Affine, BatchNormOptions, BatchRenormOptions, Cast, GroupNormOptions, InstanceNormOptions,
    LayerNormOptions, Norm, RmsNormOptions, ScaleNormOptions,
};

use crate::subjects::Kind;
use crate::tracked::{self, Tracked};

/// A layer, with all that tests need to know of it.
pub struct Layer {
    /// Name of its function, and of the tests that [`each_layer`](crate::each_layer) makes.
    pub name: &'static str,
    /// Name of the layer in messages.
    pub title: &'static str,
    /// Options that it is built with.
    pub forms: &'static [Form],
    /// Forms that keep statistics, with settings.
    pub tracked: &'static [Tracked],
    /// Every [`Kind`] of the layer that takes an input of a shape of rank 2 or more.
    pub kinds: fn(&[usize]) -> Vec<Kind>,
    /// Inputs for central differences of second order.
    pub tiny: &'static [Inputs],
    /// Inputs that one thread works on.
    pub short: &'static [Inputs],
    /// Inputs that several threads work on.
    pub long: &'static [Inputs],
    /// Inputs on both sides of the border from which work goes to threads, whose sizes neither
    /// divide nor are divided by what an axis may be cut into.
    pub ragged: &'static [Inputs],
}

/// A [`Kind`], and shapes of inputs that it takes.
pub type Inputs = (Kind, &'static [&'static [usize]]);

/// A function that builds a layer for inputs of a shape, with variables.
pub type Build = fn(&[usize], VarBuilder) -> Result<Box<dyn Norm>>;

/// A layer with some of its options, for inputs `[N, C, *]` of rank 3 or more and C an even number.
pub struct Form {
    /// Name in the messages of tests.
    pub name: &'static str,
    /// Builds the layer for inputs of a shape, with variables.
    pub build: Build,
    /// Elements that share statistics in training, and whether these are about the mean.
    pub kind: fn(&[usize]) -> Kind,
    /// Parameters that the layer has.
    pub affine: Affine,
    /// The layer keeps running statistics, and normalizes by them in inference.
    pub statistics: bool,
}

/// Pairs of all shapes of `inputs` with their kinds.
pub fn shapes(inputs: &'static [Inputs]) -> impl Iterator<Item = (Kind, &'static [usize])> {
    let pairs = |(kind, shapes): &'static Inputs| shapes.iter().map(|dims| (*kind, *dims));
    inputs.iter().flat_map(pairs)
}

/// Every form of every layer, with the layer.
pub fn forms() -> impl Iterator<Item = (&'static Layer, &'static Form)> {
    let forms = |layer: &&'static Layer| {
        let layer = *layer;
        layer.forms.iter().map(move |form| (layer, form))
    };
    LAYERS.iter().flat_map(forms)
}

/// Every form that keeps statistics, with settings.
pub fn tracked() -> impl Iterator<Item = &'static Tracked> {
    LAYERS.iter().flat_map(|layer| layer.tracked)
}

/// Every kind of every layer that takes an input of a shape.
pub fn kinds(dims: &[usize]) -> Vec<Kind> {
    LAYERS
        .iter()
        .flat_map(|layer| (layer.kinds)(dims))
        .collect()
}

macro_rules! table {
    ($($name:ident: $layer:ident),+ $(,)?) => {
        /// All layers that normalize an input.
        pub static LAYERS: [&Layer; [$(stringify!($name)),+].len()] = [$(&$layer),+];

        /// Makes a test of each layer of [`table::LAYERS`](crate::table::LAYERS), by its name,
        /// which calls a function of the [`Layer`](crate::table::Layer).
        #[macro_export]
        macro_rules! each_layer {
            ($check:path) => {
                $(#[test]
                fn $name() {
                    $check(&$crate::table::$layer)
                })+
            };
        }
    };
}

table! {
    layer_norm: LAYER_NORM,
    rms_norm: RMS_NORM,
    scale_norm: SCALE_NORM,
    group_norm: GROUP_NORM,
    instance_norm: INSTANCE_NORM,
    batch_norm: BATCH_NORM,
    switch_norm: SWITCH_NORM,
    batch_renorm: BATCH_RENORM,
}

/// Rows and columns of less than 2^14 elements, of that many less and more one, and of several
/// blocks.
pub const RAGGED_ROWS: [&[usize]; 8] = [
    &[3, 17],
    &[9, 1031],
    &[127, 129],
    &[113, 145],
    &[1031, 49],
    &[4099, 17],
    &[5, 10_007],
    &[65, 769],
];

const RAGGED_FIRST: [&[usize]; 2] = [&[3, 17, 65], &[5, 33, 201]];

const EPS: f64 = 1e-5;

/// Number of elements for each channel.
fn per_channel(dims: &[usize]) -> usize {
    dims.iter().product::<usize>() / dims[1]
}

fn last(dims: &[usize]) -> usize {
    dims[dims.len() - 1]
}

/// All axes but the first.
fn all_axes(dims: &[usize]) -> usize {
    dims.len() - 1
}

fn boxed<N: Norm + 'static>(norm: Result<N>) -> Result<Box<dyn Norm>> {
    Ok(Box::new(norm?))
}

/// Layer normalization.
pub static LAYER_NORM: Layer = Layer {
    name: "layer_norm",
    title: "LayerNorm",
    forms: &[
        Form {
            name: "layer_norm",
            build: |dims, vb| boxed(candle_norm::layer_norm(last(dims), EPS, vb)),
            kind: |_| Kind::Layer { axes: 1 },
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        Form {
            name: "layer_norm over all axes",
            build: |dims, vb| boxed(candle_norm::layer_norm(&dims[1..], EPS, vb)),
            kind: |dims| Kind::Layer {
                axes: all_axes(dims),
            },
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        Form {
            name: "layer_norm_no_bias",
            build: |dims, vb| boxed(candle_norm::layer_norm_no_bias(last(dims), EPS, vb)),
            kind: |_| Kind::Layer { axes: 1 },
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "layer_norm, channels first",
            build: |dims, vb| {
                let options = LayerNormOptions {
                    channels_first: true,
                    ..EPS.into()
                };
                boxed(candle_norm::layer_norm(dims[1], options, vb))
            },
            kind: |_| Kind::LayerChannelsFirst,
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        Form {
            name: "layer_norm, not centered",
            build: |dims, vb| {
                let options = LayerNormOptions {
                    remove_mean: false,
                    ..EPS.into()
                };
                boxed(candle_norm::layer_norm(last(dims), options, vb))
            },
            kind: |_| Kind::LayerNoMean,
            affine: Affine::WeightAndBias,
            statistics: false,
        },
    ],
    tracked: &[],
    kinds: |dims| {
        let over_last = (1..dims.len()).map(|axes| Kind::Layer { axes });
        [Kind::LayerChannelsFirst, Kind::LayerNoMean]
            .into_iter()
            .chain(over_last)
            .collect()
    },
    tiny: &[
        (Kind::Layer { axes: 1 }, &[&[3, 5]]),
        (Kind::Layer { axes: 2 }, &[&[2, 3, 4]]),
        // Cut into parts.
        (Kind::Layer { axes: 1 }, &[&[2, 37]]),
        (Kind::LayerChannelsFirst, &[&[2, 3, 4]]),
        (Kind::LayerNoMean, &[&[3, 5]]),
    ],
    short: &[
        (Kind::Layer { axes: 1 }, &[&[4, 33]]),
        (Kind::LayerChannelsFirst, &[&[2, 7, 9]]),
        (Kind::LayerNoMean, &[&[4, 33]]),
    ],
    long: &[
        (Kind::Layer { axes: 1 }, &[&[65, 1031]]),
        (Kind::LayerChannelsFirst, &[&[2, 65, 257]]),
        (Kind::LayerNoMean, &[&[65, 1031]]),
    ],
    ragged: &[
        (Kind::Layer { axes: 1 }, &RAGGED_ROWS),
        (Kind::LayerNoMean, &RAGGED_ROWS),
        (Kind::Layer { axes: 2 }, &[&[33, 5, 7], &[129, 3, 49]]),
        (Kind::LayerChannelsFirst, &RAGGED_FIRST),
    ],
};

/// Root mean square normalization.
pub static RMS_NORM: Layer = Layer {
    name: "rms_norm",
    title: "RmsNorm",
    forms: &[
        Form {
            name: "rms_norm",
            build: |dims, vb| boxed(candle_norm::rms_norm(last(dims), EPS, vb)),
            kind: |_| Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "rms_norm over all axes",
            build: |dims, vb| boxed(candle_norm::rms_norm(&dims[1..], EPS, vb)),
            kind: |dims| Kind::Rms {
                axes: all_axes(dims),
                offset: 0.,
            },
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "rms_norm, offset",
            build: |dims, vb| {
                let options = RmsNormOptions {
                    offset: 1.,
                    ..EPS.into()
                };
                boxed(candle_norm::rms_norm(last(dims), options, vb))
            },
            kind: |_| Kind::Rms {
                axes: 1,
                offset: 1.,
            },
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "rms_norm, cast before the weight",
            build: |dims, vb| {
                let options = RmsNormOptions {
                    cast: Cast::BeforeWeight,
                    ..EPS.into()
                };
                boxed(candle_norm::rms_norm(last(dims), options, vb))
            },
            kind: |_| Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "rms_norm, channels first",
            build: |dims, vb| {
                let options = RmsNormOptions {
                    channels_first: true,
                    ..EPS.into()
                };
                boxed(candle_norm::rms_norm(dims[1], options, vb))
            },
            kind: |_| Kind::RmsChannelsFirst,
            affine: Affine::Weight,
            statistics: false,
        },
    ],
    tracked: &[],
    kinds: |dims| {
        let over_last = (1..dims.len()).map(|axes| Kind::Rms {
            axes,
            offset: if axes == 1 { 0. } else { 1. },
        });
        [Kind::RmsChannelsFirst]
            .into_iter()
            .chain(over_last)
            .collect()
    },
    tiny: &[
        (
            Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            &[&[3, 5]],
        ),
        (
            Kind::Rms {
                axes: 2,
                offset: 1.,
            },
            &[&[2, 3, 4]],
        ),
        (Kind::RmsChannelsFirst, &[&[2, 3, 4]]),
    ],
    short: &[
        (
            Kind::Rms {
                axes: 1,
                offset: 1.,
            },
            &[&[4, 33]],
        ),
        (Kind::RmsChannelsFirst, &[&[2, 7, 9]]),
    ],
    long: &[
        (
            Kind::Rms {
                axes: 1,
                offset: 1.,
            },
            &[&[65, 1031]],
        ),
        (Kind::RmsChannelsFirst, &[&[2, 65, 257]]),
    ],
    ragged: &[
        (
            Kind::Rms {
                axes: 1,
                offset: 1.,
            },
            &RAGGED_ROWS,
        ),
        (Kind::RmsChannelsFirst, &RAGGED_FIRST),
    ],
};

/// Scale normalization.
pub static SCALE_NORM: Layer = Layer {
    name: "scale_norm",
    title: "ScaleNorm",
    forms: &[
        Form {
            name: "scale_norm",
            build: |dims, vb| boxed(candle_norm::scale_norm(last(dims), EPS, vb)),
            kind: |_| Kind::Scale,
            affine: Affine::Weight,
            statistics: false,
        },
        Form {
            name: "scale_norm, channels first",
            build: |dims, vb| {
                let options = ScaleNormOptions {
                    channels_first: true,
                    ..EPS.into()
                };
                boxed(candle_norm::scale_norm(dims[1], options, vb))
            },
            kind: |_| Kind::ScaleChannelsFirst,
            affine: Affine::Weight,
            statistics: false,
        },
    ],
    tracked: &[],
    kinds: |_| vec![Kind::Scale, Kind::ScaleChannelsFirst],
    tiny: &[
        (Kind::Scale, &[&[3, 5], &[2, 37]]),
        (Kind::ScaleChannelsFirst, &[&[2, 3, 4]]),
    ],
    short: &[
        (Kind::Scale, &[&[4, 33]]),
        (Kind::ScaleChannelsFirst, &[&[2, 7, 9]]),
    ],
    long: &[
        (Kind::Scale, &[&[65, 1031]]),
        (Kind::ScaleChannelsFirst, &[&[2, 65, 257]]),
    ],
    ragged: &[
        (Kind::Scale, &RAGGED_ROWS),
        (Kind::ScaleChannelsFirst, &RAGGED_FIRST),
    ],
};

const RAGGED_GROUPS: [&[usize]; 6] = [
    &[3, 6, 100],
    &[33, 12, 49],
    &[257, 6, 7],
    &[4099, 6],
    &[1, 6, 10_007],
    &[3, 6, 2, 1031],
];

/// The same without the first two and the last.
const FEWER_GROUPS: [&[usize]; 3] = [RAGGED_GROUPS[2], RAGGED_GROUPS[3], RAGGED_GROUPS[4]];

/// Group normalization.
pub static GROUP_NORM: Layer = Layer {
    name: "group_norm",
    title: "GroupNorm",
    forms: &[
        Form {
            name: "group_norm",
            build: |dims, vb| boxed(candle_norm::group_norm(2, dims[1], EPS, vb)),
            kind: |_| Kind::Group { groups: 2 },
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        Form {
            name: "group_norm, weight only",
            build: |dims, vb| {
                let options = GroupNormOptions {
                    affine: Affine::Weight,
                    ..EPS.into()
                };
                boxed(candle_norm::group_norm(2, dims[1], options, vb))
            },
            kind: |_| Kind::Group { groups: 2 },
            affine: Affine::Weight,
            statistics: false,
        },
    ],
    tracked: &[],
    kinds: |dims| {
        let divide = |groups: &usize| dims[1].is_multiple_of(*groups);
        let groups = (1..=dims[1]).filter(divide);
        groups.map(|groups| Kind::Group { groups }).collect()
    },
    tiny: &[
        (Kind::Group { groups: 2 }, &[&[2, 4, 3]]),
        (Kind::Group { groups: 1 }, &[&[2, 4]]),
    ],
    short: &[(Kind::Group { groups: 2 }, &[&[2, 4, 9]])],
    long: &[(Kind::Group { groups: 2 }, &[&[9, 6, 1031]])],
    ragged: &[
        (Kind::Group { groups: 3 }, &RAGGED_GROUPS),
        (Kind::Group { groups: 1 }, &FEWER_GROUPS),
        (Kind::Group { groups: 6 }, &FEWER_GROUPS),
    ],
};

/// Instance normalization.
pub static INSTANCE_NORM: Layer = Layer {
    name: "instance_norm",
    title: "InstanceNorm",
    forms: &[
        Form {
            name: "instance_norm",
            build: |dims, vb| boxed(candle_norm::instance_norm(dims[1], EPS, vb)),
            kind: |_| Kind::Instance,
            affine: Affine::None,
            statistics: false,
        },
        Form {
            name: "instance_norm, affine",
            build: |dims, vb| {
                let options = InstanceNormOptions {
                    affine: Affine::WeightAndBias,
                    ..EPS.into()
                };
                boxed(candle_norm::instance_norm(dims[1], options, vb))
            },
            kind: |_| Kind::Instance,
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        Form {
            name: "instance_norm, tracked",
            build: |dims, vb| {
                let options = InstanceNormOptions {
                    track_running_stats: true,
                    ..EPS.into()
                };
                boxed(candle_norm::instance_norm(dims[1], options, vb))
            },
            kind: |_| Kind::Instance,
            affine: Affine::None,
            statistics: true,
        },
        Form {
            name: "instance_norm, affine and tracked",
            build: |dims, vb| {
                let options = InstanceNormOptions {
                    affine: Affine::WeightAndBias,
                    track_running_stats: true,
                    ..EPS.into()
                };
                boxed(candle_norm::instance_norm(dims[1], options, vb))
            },
            kind: |_| Kind::Instance,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
    ],
    tracked: &[tracked::INSTANCE],
    kinds: |dims| match dims.len() > 2 && per_channel(dims) > dims[0] {
        true => vec![Kind::Instance],
        false => vec![],
    },
    tiny: &[(Kind::Instance, &[&[2, 3, 5]])],
    short: &[(Kind::Instance, &[&[2, 4, 9]])],
    long: &[(Kind::Instance, &[&[9, 6, 1031]])],
    ragged: &[(
        Kind::Instance,
        &[
            &[3, 5, 1031],
            &[33, 17, 49],
            &[257, 3, 31],
            &[65, 65, 5],
            &[1, 1, 50_021],
            &[1, 3, 20_011],
        ],
    )],
};

fn batch_form(dims: &[usize], options: BatchNormOptions, vb: VarBuilder) -> Result<Box<dyn Norm>> {
    boxed(candle_norm::batch_norm(dims[1], options, vb))
}

const RAGGED_PLANES: [&[usize]; 8] = [
    &[9, 5, 7],
    &[33, 7, 5, 7],
    &[9, 33, 7, 9],
    &[5, 257, 17],
    &[50_021, 1],
    &[1, 1, 50_021],
    &[2, 3, 10_007],
    &[1031, 3, 2, 7],
];

/// The same without the first two and the last three.
const FEWER_PLANES: [&[usize]; 3] = [RAGGED_PLANES[2], RAGGED_PLANES[3], RAGGED_PLANES[4]];

/// Batch normalization.
pub static BATCH_NORM: Layer = Layer {
    name: "batch_norm",
    title: "BatchNorm",
    forms: &[
        Form {
            name: "batch_norm",
            build: |dims, vb| batch_form(dims, EPS.into(), vb),
            kind: |_| Kind::Batch,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
        Form {
            name: "batch_norm, cumulative",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    momentum: None,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
        Form {
            name: "batch_norm, weight only",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    affine: Affine::Weight,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::Weight,
            statistics: true,
        },
        Form {
            name: "batch_norm, bias only",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    affine: Affine::Bias,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::Bias,
            statistics: true,
        },
        Form {
            name: "batch_norm, no parameters",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    affine: Affine::None,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::None,
            statistics: true,
        },
        Form {
            name: "batch_norm, untracked",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    track_running_stats: false,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::WeightAndBias,
            statistics: false,
        },
        // One part of all samples.
        Form {
            name: "batch_norm, a ghost batch",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    virtual_batch_size: Some(1 << 20),
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::Batch,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
        Form {
            name: "batch_norm, not centered",
            build: |dims, vb| {
                let options = BatchNormOptions {
                    remove_mean: false,
                    ..EPS.into()
                };
                batch_form(dims, options, vb)
            },
            kind: |_| Kind::BatchNoMean,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
    ],
    tracked: &[tracked::BATCH, tracked::BATCH_NO_MEAN],
    kinds: |dims| match per_channel(dims) > 1 {
        true => vec![Kind::Batch, Kind::BatchNoMean],
        false => vec![],
    },
    tiny: &[
        (Kind::Batch, &[&[6, 3], &[2, 3, 4]]),
        (Kind::BatchNoMean, &[&[2, 3, 4]]),
    ],
    short: &[
        (Kind::Batch, &[&[4, 3, 17], &[9, 3]]),
        (Kind::BatchNoMean, &[&[4, 3, 17]]),
    ],
    long: &[
        (Kind::Batch, &[&[9, 6, 1031], &[1031, 33]]),
        (Kind::BatchNoMean, &[&[9, 6, 1031]]),
    ],
    ragged: &[
        (Kind::Batch, &RAGGED_ROWS),
        (Kind::Batch, &RAGGED_PLANES),
        (Kind::BatchNoMean, &FEWER_PLANES),
    ],
};

/// Switchable normalization.
pub static SWITCH_NORM: Layer = Layer {
    name: "switch_norm",
    title: "SwitchNorm",
    forms: &[Form {
        name: "switch_norm",
        build: |dims, vb| boxed(candle_norm::switch_norm(dims[1], EPS, vb)),
        kind: |_| Kind::Switch,
        affine: Affine::WeightAndBias,
        statistics: true,
    }],
    tracked: &[tracked::SWITCH, tracked::SWITCH_FLAT],
    kinds: |_| vec![Kind::Switch],
    tiny: &[(Kind::Switch, &[&[3, 2, 5], &[4, 3]])],
    short: &[(Kind::Switch, &[&[2, 4, 9], &[3, 4, 9], &[9, 3]])],
    long: &[(Kind::Switch, &[&[9, 6, 1031], &[1031, 33]])],
    ragged: &[(
        Kind::Switch,
        &[
            &[3, 5, 1031],
            &[33, 17, 49],
            &[65, 65, 5],
            &[1, 3, 20_011],
            &[1031, 49],
        ],
    )],
};

/// Batch renormalization, up to the end of its warm-up.
pub static BATCH_RENORM: Layer = Layer {
    name: "batch_renorm",
    title: "BatchRenorm",
    forms: &[
        Form {
            name: "batch_renorm",
            build: |dims, vb| boxed(candle_norm::batch_renorm(dims[1], EPS, vb)),
            kind: |_| Kind::BatchRenorm,
            affine: Affine::WeightAndBias,
            statistics: true,
        },
        Form {
            name: "batch_renorm, no parameters",
            build: |dims, vb| {
                let options = BatchRenormOptions {
                    affine: Affine::None,
                    ..EPS.into()
                };
                boxed(candle_norm::batch_renorm(dims[1], options, vb))
            },
            kind: |_| Kind::BatchRenorm,
            affine: Affine::None,
            statistics: true,
        },
    ],
    tracked: &[tracked::BATCH_RENORM],
    kinds: |dims| match per_channel(dims) > 1 {
        true => vec![Kind::BatchRenorm],
        false => vec![],
    },
    tiny: &[(Kind::BatchRenorm, &[&[6, 3], &[2, 3, 4]])],
    short: &[(Kind::BatchRenorm, &[&[4, 3, 17], &[9, 3]])],
    long: &[(Kind::BatchRenorm, &[&[9, 6, 1031], &[1031, 33]])],
    ragged: &[(Kind::BatchRenorm, &FEWER_PLANES)],
};
