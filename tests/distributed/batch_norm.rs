//! Synchronized batch norm against batch norm on the whole batch.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarMap};
use candle_norm::distributed::{Collective, Threads};
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, Norm, Path, batch_norm, pool_updates, recalibrate,
    with_path, without_updates,
};
use proptest::prelude::*;
use testkit::compare::{assert_close, assert_near, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values};
use testkit::properties::config;
use testkit::vars::{set, vb};

use crate::shares::{Model, Shares, Trained, joined, summed};

const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];

type Group = Option<Arc<dyn Collective>>;

/// A layer with drawn parameters, of the dtype of its input.
fn layer(
    options: BatchNormOptions,
    vars: &VarMap,
    group: Group,
    channels: usize,
    dtype: DType,
) -> Result<BatchNorm> {
    let norm = batch_norm(channels, options, vb(vars, dtype))?;
    let mut draw = Draw::new(7);
    for (name, value) in [
        ("weight", draw.weight(channels)),
        ("bias", draw.normal(channels)),
    ] {
        if norm.parameters().iter().any(|(found, _)| *found == name) {
            set(
                vars,
                name,
                &tensor(&value, &[channels], DType::BF16)?.to_dtype(dtype)?,
            )?;
        }
    }
    Ok(match group {
        Some(group) => norm.synchronized(group),
        None => norm,
    })
}

fn model(
    options: BatchNormOptions,
) -> impl Fn(&VarMap, Group, &Tensor) -> Result<Model> + Sync + Copy {
    move |vars, group, x| {
        let norm = layer(options, vars, group, x.dims()[1], x.dtype())?;
        let y = norm.forward_t(x, true)?;
        Ok(Model {
            y,
            buffers: norm.buffers(),
        })
    }
}

/// Compares the ranks with the whole batch in float64, and with each other.
fn check(shares: &Shares, options: BatchNormOptions) -> Result<()> {
    let what = format!("{shares:?} {options:?}");
    let ranks = shares.run(model(options))?;
    let want = shares.run_whole(model(options))?;
    let tolerance = tolerance(shares.dtype);
    let close = |name: &str, got: &Tensor, want: &Tensor| -> Result<()> {
        assert_close(&format!("{name} of {what}"), got, &values(want)?, tolerance);
        Ok(())
    };
    close("y", &joined(&ranks, |r| &r.y)?, &want.y)?;
    close("dx", &joined(&ranks, |r| &r.dx)?, &want.dx)?;
    let sums = summed(&ranks)?;
    assert_eq!(sums.len(), want.gradients.len());
    for (got, (_, want)) in sums.iter().zip(&want.gradients) {
        let what = format!("{} of {what}", got.name);
        assert_near(&what, &got.values, &values(want)?, &got.terms, tolerance);
    }
    for rank in &ranks {
        let buffers = rank
            .buffers
            .iter()
            .zip(&ranks[0].buffers)
            .zip(&want.buffers);
        for (((name, got), (_, first)), (_, want)) in buffers {
            assert_same_bits(name, got, first);
            assert_close(&format!("{name} of {what}"), got, &values(want)?, 1e-6);
        }
    }
    for (rank, count) in ranks.iter().zip(&shares.counts) {
        assert_eq!((rank.y.dims()[0], rank.dx.dims()[0]), (*count, *count));
        for (name, gradient) in &rank.gradients {
            if *count == 0 {
                assert!(
                    values(gradient)?.iter().all(|v| *v == 0.),
                    "{name} of {what}"
                );
            }
        }
    }
    Ok(())
}

const SPLITS: [&[usize]; 6] = [
    &[8, 8, 8, 8],
    &[1, 2, 3, 26],
    &[0, 5, 7],
    &[4, 0],
    &[1, 1],
    &[0, 0, 3, 0],
];

#[test]
fn all_splits_dtypes_and_paths_agree_with_the_whole_batch() -> Result<()> {
    for path in PATHS {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for counts in SPLITS {
                for dims in [&[3][..], &[3, 5, 4], &[2, 37]] {
                    let values: usize = counts.iter().chain(&dims[1..]).sum();
                    // The gradient of two values is a small difference unless eps is large.
                    let eps = if values == 2 { 0.5 } else { 1e-5 };
                    let options = BatchNormOptions {
                        eps,
                        ..Default::default()
                    };
                    check(&Shares::new(dims, counts, dtype, path), options)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn options_hold_over_ranks() -> Result<()> {
    let options = BatchNormOptions::default();
    for path in PATHS {
        for options in [
            BatchNormOptions {
                affine: Affine::None,
                ..options
            },
            BatchNormOptions {
                affine: Affine::Weight,
                ..options
            },
            BatchNormOptions {
                remove_mean: false,
                ..options
            },
            BatchNormOptions {
                momentum: None,
                ..options
            },
            BatchNormOptions {
                track_running_stats: false,
                ..options
            },
            BatchNormOptions {
                refuse_non_finite: true,
                eps: 1e-3,
                ..options
            },
        ] {
            check(&Shares::new(&[3, 6], &[2, 0, 3], DType::F64, path), options)?;
            check(&Shares::new(&[3, 6], &[2, 0, 3], DType::F32, path), options)?;
        }
    }
    Ok(())
}

#[test]
fn a_large_mean_costs_no_digits() -> Result<()> {
    for path in PATHS {
        for (dtype, mean) in [(DType::F32, 1e3), (DType::F32, 3e3), (DType::F64, 1e6)] {
            let mut shares = Shares::new(&[2, 9], &[5, 1, 0, 4], dtype, path);
            shares.mean = mean;
            check(&shares, Default::default())?;
        }
    }
    Ok(())
}

/// A mean of equal values is that value, and what is left is the bias, to the bit.
#[test]
fn constant_channels_give_the_bias() -> Result<()> {
    for path in PATHS {
        for value in [0.1, 1e9 / 3., -7.] {
            let counts = [3usize, 0, 2, 8];
            let all = Threads::run(4, |group| {
                let vars = VarMap::new();
                let x = Tensor::full(value, (counts[group.rank()], 2), &Device::Cpu)?;
                with_path(path, || {
                    let norm = layer(Default::default(), &vars, Some(group), 2, DType::F64)?;
                    Ok((norm.forward_t(&x, true)?.to_vec2::<f64>()?, norm))
                })
            })?;
            for (y, norm) in &all {
                let bias = norm.bias().expect("a bias").to_vec1::<f64>()?;
                assert!(
                    y.iter().all(|row| *row == bias),
                    "{path:?} {value}: {y:?} {bias:?}"
                );
            }
        }
    }
    Ok(())
}

/// Three ranks with 1 2 6, -1 and nothing.
#[test]
fn the_worked_example() -> Result<()> {
    let x = [vec![1., 2., 6.], vec![-1.], vec![]];
    let dy = [vec![1., 0., -1.], vec![2.], vec![]];
    let y = [
        vec![-0.2844639371, 0.5, 3.637855748],
        vec![-1.853391811],
        vec![],
    ];
    let dx = [
        vec![0.06034389038, -0.3922319686, 0.1508564071],
        vec![0.1810316711],
        vec![],
    ];
    let [dweight, dbias] = [[-1.961159843, -2.353391811, 0.], [0., 2., 0.]];
    for path in PATHS {
        Threads::run(3, |group| {
            let rank = group.rank();
            let vars = VarMap::new();
            let norm = batch_norm(1, 1e-5, vb(&vars, DType::F64))?.synchronized(group);
            set(&vars, "weight", &Tensor::new(&[2.], &Device::Cpu)?)?;
            set(&vars, "bias", &Tensor::new(&[0.5], &Device::Cpu)?)?;
            let dims = [x[rank].len(), 1];
            let input = candle_core::Var::from_tensor(&tensor(&x[rank], &dims, DType::F64)?)?;
            let cotangent = tensor(&dy[rank], &dims, DType::F64)?;
            with_path(path, || {
                let out = norm.forward_train(&input)?;
                let grads = (&out * cotangent)?.sum_all()?.backward()?;
                let near = |name: &str, got: &Tensor, want: &[f64]| {
                    assert_close(name, got, want, 1e-9);
                };
                near("y", &out, &y[rank]);
                if rank < 2 {
                    near("dx", grads.get(&input).expect("dx"), &dx[rank]);
                }
                let param = |p: Option<&Tensor>| grads.get(p.expect("there")).expect("one").clone();
                near("dweight", &param(norm.weight()), &[dweight[rank]]);
                near("dbias", &param(norm.bias()), &[dbias[rank]]);
                near("mean", norm.running_mean(), &[0.2]);
                near("var", norm.running_var(), &[1.766666667]);
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// The errors of all ranks in training on `inputs`, whose statistics are as they were.
fn errors(options: BatchNormOptions, inputs: &[Tensor], path: Path) -> Result<Vec<String>> {
    Threads::run(inputs.len(), |group| {
        let vars = VarMap::new();
        let input = &inputs[group.rank()];
        with_path(path, || {
            let norm = layer(options, &vars, Some(group), 2, DType::F32)?;
            let error = norm
                .forward_t(input, true)
                .expect_err("an error on every rank");
            assert_eq!(norm.running_mean().to_vec1::<f32>()?, [0., 0.]);
            assert_eq!(norm.running_var().to_vec1::<f32>()?, [1., 1.]);
            let stats = norm.running_stats().expect("tracked").snapshot()?;
            assert_eq!(stats.num_batches_tracked, 0);
            Ok(error.to_string())
        })
    })
}

#[test]
fn one_value_per_channel_is_judged_by_all_ranks() -> Result<()> {
    let rows = |n: usize| Tensor::ones((n, 2), DType::F32, &Device::Cpu);
    for path in PATHS {
        let said = errors(Default::default(), &[rows(0)?, rows(1)?, rows(0)?], path)?;
        assert!(
            said.iter()
                .all(|s| s.contains("more than 1 value per channel")),
            "{said:?}"
        );
        // One on each of two ranks is two.
        check(
            &Shares::new(&[2], &[1, 0, 1], DType::F64, path),
            Default::default(),
        )?;
    }
    Ok(())
}

#[test]
fn a_bad_input_on_one_rank_is_an_error_on_all() -> Result<()> {
    let good = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
    for path in PATHS {
        for bad in [
            Tensor::ones((4, 3), DType::F32, &Device::Cpu)?,
            Tensor::ones(4, DType::F32, &Device::Cpu)?,
            Tensor::ones((4, 2), DType::U32, &Device::Cpu)?,
            Tensor::ones((4, 2), DType::F64, &Device::Cpu)?,
        ] {
            let said = errors(
                Default::default(),
                &[good.clone(), good.clone(), bad.clone()],
                path,
            )?;
            assert!(said[2].starts_with("BatchNorm: expected"), "{said:?}");
            for said in &said[..2] {
                assert!(said.contains("an error on rank 2"), "{said}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_batch_that_is_not_finite_is_refused_on_all_ranks() -> Result<()> {
    let options = BatchNormOptions {
        refuse_non_finite: true,
        ..Default::default()
    };
    let good = Tensor::ones((4, 2), DType::F32, &Device::Cpu)?;
    for path in PATHS {
        for poison in [f64::NAN, f64::INFINITY] {
            let bad = (&good * poison)?;
            let said = errors(options, &[good.clone(), bad], path)?;
            assert!(
                said.iter().all(|s| s.contains("refuse_non_finite is set")),
                "{said:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn ranks_without_any_value_change_nothing() -> Result<()> {
    for path in PATHS {
        Threads::run(3, |group| {
            let vars = VarMap::new();
            with_path(path, || {
                let norm = layer(Default::default(), &vars, Some(group), 2, DType::F32)?;
                let x = Tensor::zeros((0, 2, 3), DType::F32, &Device::Cpu)?;
                let y = norm.forward_t(&x, true)?;
                assert_eq!(y.dims(), [0, 2, 3]);
                let grads = y.sum_all()?.backward()?;
                let zero = grads.get(norm.weight().expect("one")).expect("a gradient");
                assert_eq!(zero.to_vec1::<f32>()?, [0., 0.]);
                let stats = norm.running_stats().expect("tracked").snapshot()?;
                assert_eq!(stats.num_batches_tracked, 0);
                Ok(())
            })
        })?;
    }
    Ok(())
}

/// Each rank may evaluate as often as it likes.
#[test]
fn inference_never_communicates() -> Result<()> {
    Threads::run(2, |group| {
        let (vars, rank) = (VarMap::new(), group.rank());
        for track_running_stats in [true, false] {
            let options = BatchNormOptions {
                track_running_stats,
                ..Default::default()
            };
            let norm = batch_norm(2, options, vb(&vars, DType::F32))?.synchronized(group.clone());
            let x = Tensor::randn(0f32, 1., (4, 2), &Device::Cpu)?;
            for _ in 0..rank * 3 {
                norm.forward_t(&x, false)?;
            }
            if track_running_stats {
                let frozen = norm.frozen()?;
                candle_nn::Module::forward(&frozen, &x)?;
            }
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn scopes_and_recalibration_are_alike_on_all_ranks() -> Result<()> {
    let x = |rank: usize, batch: usize| {
        let mut draw = Draw::new((10 * batch + rank) as u64);
        let count = [3, 0, 2][(rank + batch) % 3];
        tensor(&draw.normal(2 * count), &[count, 2], DType::F64)
    };
    let both = |batch: usize| -> Result<Tensor> {
        Tensor::cat(&[x(0, batch)?, x(1, batch)?, x(2, batch)?], 0)
    };
    let train = |norm: &BatchNorm, batch: &dyn Fn(usize) -> Result<Tensor>| -> Result<_> {
        without_updates(|| norm.forward_train(&batch(0)?))?;
        pool_updates(|| {
            norm.forward_train(&batch(0)?)?;
            norm.forward_train(&batch(1)?)
        })?;
        let pooled = norm.running_stats().expect("tracked").snapshot()?;
        let batches = [batch(2)?, batch(3)?];
        recalibrate(&[norm as &dyn Norm], batches, |x| norm.forward_train(x))?;
        let recalibrated = norm.running_stats().expect("tracked").snapshot()?;
        Ok([pooled, recalibrated])
    };
    let vars = VarMap::new();
    let want = train(&batch_norm(2, 1e-5, vb(&vars, DType::F64))?, &both)?;
    let got = Threads::run(3, |group| {
        let (vars, rank) = (VarMap::new(), group.rank());
        let norm = batch_norm(2, 1e-5, vb(&vars, DType::F64))?.synchronized(group);
        train(&norm, &|batch| x(rank, batch))
    })?;
    for rank in &got {
        for ((got, first), want) in rank.iter().zip(&got[0]).zip(&want) {
            assert_same_bits("mean", &got.mean, &first.mean);
            assert_same_bits("var", &got.var, &first.var);
            assert_close("mean", &got.mean, &values(&want.mean)?, 1e-12);
            assert_close("var", &got.var, &values(&want.var)?, 1e-12);
            assert_eq!(got.num_batches_tracked, want.num_batches_tracked);
        }
    }
    Ok(())
}

#[test]
fn a_group_of_one_is_the_plain_layer_to_the_bit() -> Result<()> {
    let shares = Shares::new(&[3, 7], &[6], DType::F32, Path::Auto);
    let [x, dy] = shares.whole()?;
    let run = |group: Group| -> Result<Trained> {
        let alone = |_: &VarMap, _: Group, x: &Tensor| -> Result<Model> {
            let vars = VarMap::new();
            let norm = layer(Default::default(), &vars, group.clone(), 3, DType::F32)?;
            assert!(norm.group().is_none());
            let y = norm.forward_t(x, true)?;
            Ok(Model {
                y,
                buffers: norm.buffers(),
            })
        };
        let x = candle_core::Var::from_tensor(&x)?;
        let Model { y, buffers } = alone(&VarMap::new(), None, &x)?;
        let grads = (&y * &dy)?.sum_all()?.backward()?;
        let dx = grads.get(&x).expect("dx").clone();
        Ok(Trained {
            y,
            dx,
            gradients: vec![],
            buffers,
        })
    };
    let plain = run(None)?;
    let alone = Threads::run(1, |group| run(Some(group)))?.remove(0);
    assert_same_bits("y", &alone.y, &plain.y);
    assert_same_bits("dx", &alone.dx, &plain.dx);
    for ((name, got), (_, want)) in alone.buffers.iter().zip(&plain.buffers) {
        assert_same_bits(name, got, want);
    }
    Ok(())
}

/// Channels that lie last in memory go through the kernels as they are.
#[test]
fn strided_inputs_are_read_in_their_order() -> Result<()> {
    let shares = Shares::new(&[3, 20], &[2, 3], DType::F32, Path::Fused);
    let swap = |vars: &VarMap, group: Group, x: &Tensor| {
        let norm = layer(Default::default(), vars, group, 3, x.dtype())?;
        let x = x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?;
        let y = norm.forward_t(&x, true)?;
        Ok(Model {
            y,
            buffers: norm.buffers(),
        })
    };
    let (plain, strided) = (shares.run(model(Default::default()))?, shares.run(swap)?);
    for (plain, strided) in plain.iter().zip(&strided) {
        assert_close("y", &strided.y, &values(&plain.y)?, 1e-6);
        assert_close("dx", &strided.dx, &values(&plain.dx)?, 2e-6);
    }
    Ok(())
}

fn cases() -> impl Strategy<Value = (Shares, BatchNormOptions)> {
    let counts = prop::collection::vec(prop_oneof![2 => 0usize..6, 1 => Just(0)], 2..=16);
    let dims = prop::collection::vec(1usize..6, 1..=3);
    let dtype = prop::sample::select(vec![DType::F64, DType::F32, DType::F16, DType::BF16]);
    let path = prop::sample::select(PATHS.to_vec());
    let mean = prop::sample::select(vec![0., 1., 100.]);
    (counts, dims, dtype, path, mean, any::<(u64, bool)>()).prop_filter_map(
        "more than one value",
        |(counts, dims, dtype, path, mean, (seed, remove_mean))| {
            let values = counts.iter().sum::<usize>() * dims[1..].iter().product::<usize>();
            let mut shares = Shares::new(&dims, &counts, dtype, path);
            (shares.seed, shares.mean) = (seed, mean);
            let options = BatchNormOptions {
                remove_mean,
                eps: 1e-3,
                ..Default::default()
            };
            (values > 2).then_some((shares, options))
        },
    )
}

proptest! {
    #![proptest_config(config(60, 20181123))]

    #[test]
    fn random_splits_agree_with_the_whole_batch((shares, options) in cases()) {
        check(&shares, options).unwrap();
    }
}
