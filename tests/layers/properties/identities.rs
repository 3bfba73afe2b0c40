//! Layers that are the same function by mathematics give the same, output and gradients.
//!
//! One layer may be written as the other, so each side is also held against float64.

use candle_core::{D, DType, Device, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{Affine, InstanceNormOptions, LayerNormOptions, NormConfig, ops};
use proptest::prelude::*;

use super::{config, dtypes};
use testkit::compare::{assert_close, assert_near, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values, variable};
use testkit::subjects::{DTypes, Kind, Numbers, Ran, Subject, backward, gradient};

const EPS: f64 = 1e-5;

/// `[N, C, *]` with space, and more than one element of it.
fn maps() -> impl Strategy<Value = Vec<usize>> {
    let space = prop::collection::vec(1usize..7, 1..=3);
    (1usize..5, 1usize..7, space).prop_map(|(n, c, mut space)| {
        space[0] += 1;
        [&[n, c], &space[..]].concat()
    })
}

fn numbers(dims: &[usize], params: usize, affine: bool, seed: u64) -> Numbers {
    let mut draw = Draw::new(seed);
    let n = dims.iter().product();
    Numbers {
        x: draw.normal(n).iter().map(|z| 1.5 + 2. * z).collect(),
        dy: draw.normal(n),
        weight: affine.then(|| draw.weight(params)),
        bias: affine.then(|| draw.normal(params)),
    }
}

/// Results of a layer, and the terms of its gradients.
struct Side {
    ran: Ran,
    terms: [Vec<f64>; 3],
}

/// Runs a layer and holds it against float64.
fn run(numbers: &Numbers, kind: Kind, dims: &[usize], dtypes: DTypes) -> Side {
    let subject = Subject::new(kind, EPS);
    let ran = numbers.run(subject, dims, dtypes).unwrap();
    numbers.check_against_oracle(&ran, subject, dims, dtypes, tolerance(dtypes.input));
    let n = numbers.rounded(dtypes).unwrap();
    let back = subject
        .oracle(dims)
        .backward(&n.x, n.weight.as_deref(), &n.dy);
    let terms = [back.dx.terms, back.dweight.terms, back.dbias.terms];
    Side { ran, terms }
}

/// Both are within the tolerance of float64, so they are within twice that of each other.
fn assert_same(a: &Side, b: &Side, dtypes: DTypes) {
    let no_terms = vec![0.; a.ran.y.elem_count()];
    let terms = [&no_terms].into_iter().chain(&a.terms);
    for (((name, a), (_, b)), terms) in a.ran.named().into_iter().zip(b.ran.named()).zip(terms) {
        let (a, b) = (values(a).unwrap(), values(b).unwrap());
        assert_near(name, &b, &a, terms, 2. * tolerance(dtypes.input));
    }
}

proptest! {
    #![proptest_config(config(150))]

    #[test]
    fn group_norm_of_one_group_is_layer_norm_over_channels_and_space(
        dims in maps(),
        dtypes in dtypes(),
        seed in any::<u64>(),
    ) {
        let n = numbers(&dims, 0, false, seed);
        let group = run(&n, Kind::Group { groups: 1 }, &dims, dtypes);
        let layer = run(&n, Kind::Layer { axes: dims.len() - 1 }, &dims, dtypes);
        assert_same(&group, &layer, dtypes);
    }

    /// Their affine parameters differ in shape: they coincide where those of layer norm are
    /// constant over space.
    #[test]
    fn group_norm_of_one_group_is_layer_norm_with_weights_of_channels(
        dims in maps(),
        seed in any::<u64>(),
    ) {
        let dtype = DTypes::from(DType::F64);
        let (channels, space) = (dims[1], dims[2..].iter().product::<usize>());
        let per_channel = numbers(&dims, channels, true, seed);
        let spread = |v: &Option<Vec<f64>>| {
            v.as_ref().map(|v| v.iter().flat_map(|&v| vec![v; space]).collect())
        };
        let per_element = Numbers {
            weight: spread(&per_channel.weight),
            bias: spread(&per_channel.bias),
            ..per_channel.clone()
        };
        let group = run(&per_channel, Kind::Group { groups: 1 }, &dims, dtype);
        let mut layer = run(&per_element, Kind::Layer { axes: dims.len() - 1 }, &dims, dtype);
        let over_space = |t: Option<Tensor>| {
            t.map(|t| t.reshape((channels, space)).unwrap().sum(1).unwrap())
        };
        layer.ran.dweight = over_space(layer.ran.dweight);
        layer.ran.dbias = over_space(layer.ran.dbias);
        assert_same(&group, &layer, dtype);
    }

    #[test]
    fn group_norm_of_as_many_groups_as_channels_is_instance_norm(
        dims in maps(),
        dtypes in dtypes(),
        affine in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let n = numbers(&dims, dims[1], affine, seed);
        let group = run(&n, Kind::Group { groups: dims[1] }, &dims, dtypes);
        let instance = run(&n, Kind::Instance, &dims, dtypes);
        assert_same(&group, &instance, dtypes);
    }

    #[test]
    fn batch_norm_of_one_sample_is_instance_norm(
        dims in maps(),
        dtypes in dtypes(),
        affine in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let dims = [&[1], &dims[1..]].concat();
        let n = numbers(&dims, dims[1], affine, seed);
        let batch = run(&n, Kind::Batch, &dims, dtypes);
        let instance = run(&n, Kind::Instance, &dims, dtypes);
        assert_same(&batch, &instance, dtypes);

        // So are what they add to running statistics.
        let x = tensor(&n.x, &dims, dtypes.input).unwrap();
        let of_batch = ops::batch_norm(&x, None, None, EPS).unwrap().1.unwrap();
        let of_instance = ops::instance_norm(&x, None, None, EPS).unwrap().1.unwrap();
        let stored = values(&of_batch.mean).unwrap();
        assert_near("mean", &values(&of_instance.mean).unwrap(), &stored, &vec![2.; dims[1]], 4e-6);
        assert_close("var", &of_instance.var, &values(&of_batch.var).unwrap(), 4e-6);
    }

    #[test]
    fn layer_norm_that_keeps_the_mean_is_rms_norm(
        dims in maps(),
        dtypes in dtypes(),
        affine in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let n = numbers(&dims, dims[dims.len() - 1], affine, seed);
        let layer = run(&n, Kind::LayerNoMean, &dims, dtypes);
        let rms = run(&n, Kind::Rms { axes: 1, offset: 0. }, &dims, dtypes);
        assert_same(&layer, &rms, dtypes);
    }

    /// An offset is added to the weight: Gemma's norms are PyTorch's with weights of one more.
    #[test]
    fn an_offset_is_a_larger_weight(dims in maps(), seed in any::<u64>()) {
        let dtype = DTypes::from(DType::F64);
        let around_zero = numbers(&dims, dims[dims.len() - 1], true, seed);
        let around_one = Numbers {
            weight: around_zero.weight.as_ref().map(|w| w.iter().map(|w| w + 1.).collect()),
            ..around_zero.clone()
        };
        let gemma = run(&around_zero, Kind::Rms { axes: 1, offset: 1. }, &dims, dtype);
        let torch = run(&around_one, Kind::Rms { axes: 1, offset: 0. }, &dims, dtype);
        assert_same(&gemma, &torch, dtype);
    }

    /// Statistics over the batch are statistics over rows of the transposed input.
    #[test]
    fn batch_norm_is_layer_norm_of_the_transpose(
        (n, c) in (2usize..40, 1usize..40),
        seed in any::<u64>(),
    ) {
        let dtype = DTypes::from(DType::F64);
        let n_by_c = numbers(&[n, c], 0, false, seed);
        let transposed = |v: &[f64]| (0..n * c).map(|i| v[i % n * c + i / n]).collect::<Vec<_>>();
        let c_by_n = Numbers {
            x: transposed(&n_by_c.x),
            dy: transposed(&n_by_c.dy),
            weight: None,
            bias: None,
        };
        let batch = run(&n_by_c, Kind::Batch, &[n, c], dtype);
        let mut layer = run(&c_by_n, Kind::Layer { axes: 1 }, &[c, n], dtype);
        layer.ran.y = layer.ran.y.t().unwrap();
        layer.ran.dx = layer.ran.dx.t().unwrap();
        assert_same(&batch, &layer, dtype);
    }

    /// Channels first is the last axis of the permuted input.
    #[test]
    fn layer_norm_channels_first_is_layer_norm_channels_last(
        dims in maps(),
        center in any::<bool>(),
        dtypes in dtypes(),
        seed in any::<u64>(),
    ) {
        let n = numbers(&dims, dims[1], true, seed);
        let (kind, last) = match center {
            true => (Kind::LayerChannelsFirst, Kind::Layer { axes: 1 }),
            false => (Kind::RmsChannelsFirst, Kind::Rms { axes: 1, offset: 0. }),
        };
        let first = run(&n, kind, &dims, dtypes);

        let to_last = |v: &[f64]| {
            let t = tensor(v, &dims, DType::F64).unwrap();
            values(&t.transpose(1, D::Minus1).unwrap().contiguous().unwrap()).unwrap()
        };
        let mut last_dims = dims.clone();
        last_dims.swap(1, dims.len() - 1);
        let permuted = Numbers { x: to_last(&n.x), dy: to_last(&n.dy), ..n };
        let mut last = run(&permuted, last, &last_dims, dtypes);
        last.ran.y = last.ran.y.transpose(1, D::Minus1).unwrap();
        last.ran.dx = last.ran.dx.transpose(1, D::Minus1).unwrap();
        assert_same(&first, &last, dtypes);
    }

    /// A weight of one row has one norm.
    #[test]
    fn weight_norm_of_one_row_is_that_of_the_whole(len in 1usize..300, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let v = draw.normal(len);
        let g = draw.weight(1);
        let dw = tensor(&draw.normal(len), &[1, len], DType::F64).unwrap();
        let results = [Some(0), None].map(|dim| {
            let v = variable(&v, &[1, len], DType::F64).unwrap();
            let g_dims: &[usize] = if dim.is_some() { &[1, 1] } else { &[] };
            let g = variable(&g, g_dims, DType::F64).unwrap();
            let w = ops::weight_norm(&v, &g, dim).unwrap();
            let grads = backward(&w, &dw).unwrap();
            (w, gradient(&grads, &v), gradient(&grads, &g).reshape(1).unwrap())
        });
        let [a, b] = results;
        assert_same_bits("w", &a.0, &b.0);
        assert_same_bits("dv", &a.1, &b.1);
        assert_same_bits("dg", &a.2, &b.2);
    }
}

/// `features` is `channels` on the permuted input, for every norm that has both.
#[test]
fn features_are_channels_on_the_last_axis() -> Result<()> {
    let dims = [3, 4, 5, 6];
    for name in ["none", "batch", "layer", "group:3", "instance", "rms"] {
        let config: NormConfig = name.parse()?;
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let features = config.features(6, vb.pp("a"))?;
        let channels = config.channels(6, vb.pp("b"))?;
        let x = tensor(&Draw::new(3).normal(360), &dims, DType::F64)?;
        for train in [true, false] {
            let y = features.forward_t(&x, train)?;
            let moved = channels
                .forward_t(&x.transpose(1, 3)?, train)?
                .transpose(1, 3)?;
            assert!(y.is_contiguous());
            assert_close(name, &y, &values(&moved)?, 1e-11);
        }
    }
    Ok(())
}

/// Instance norm without tracked statistics has one mode; so has batch norm.
#[test]
fn without_running_statistics_both_modes_are_the_same() -> Result<()> {
    let x = tensor(&Draw::new(5).normal(120), &[2, 3, 4, 5], DType::F32)?;
    let vb = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    let batch = candle_norm::BatchNormOptions {
        affine: Affine::None,
        track_running_stats: false,
        ..Default::default()
    };
    let layers: [Box<dyn ModuleT>; 2] = [
        Box::new(candle_norm::instance_norm(
            3,
            InstanceNormOptions::default(),
            vb(),
        )?),
        Box::new(candle_norm::batch_norm(3, batch, vb())?),
    ];
    for layer in layers {
        let (train, eval) = (layer.forward_t(&x, true)?, layer.forward_t(&x, false)?);
        assert_same_bits("evaluation", &eval, &train);
    }
    Ok(())
}

/// A layer without affine parameters is one whose weight is 1 and whose bias is 0.
#[test]
fn no_parameters_are_ones_and_zeros() -> Result<()> {
    let x = tensor(&Draw::new(6).normal(60), &[5, 12], DType::F32)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let fresh = candle_norm::layer_norm(12, 1e-5, vb.clone())?;
    let options = LayerNormOptions {
        affine: Affine::None,
        ..Default::default()
    };
    let plain = candle_norm::layer_norm(12, options, vb)?;
    assert_same_bits(
        "y",
        &fresh.forward_t(&x, true)?,
        &plain.forward_t(&x, true)?,
    );
    Ok(())
}

/// A scale norm starts from the length that makes the mean square of each row 1.
#[test]
fn a_new_scale_norm_is_rms_norm() -> Result<()> {
    for len in [1, 2, 33, 1031] {
        let x = tensor(
            &Draw::new(len as u64).normal(3 * len),
            &[3, len],
            DType::F64,
        )?;
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
        let y = candle_norm::scale_norm(len, EPS, vb)?.forward_t(&x, true)?;
        let want = ops::rms_norm(&x, len, None, 1e-300)?;
        assert_close("y", &y, &values(&want)?, tolerance(DType::F64));
    }
    Ok(())
}
