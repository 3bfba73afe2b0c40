//! Layers other than batch norm that take statistics of a batch.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarMap};
use candle_norm::distributed::{Collective, Threads};
use candle_norm::{
    Affine, InstanceNormOptions, Norm, Path, SwitchNormOptions, instance_norm, switch_norm,
    with_path,
};
use proptest::prelude::*;
use testkit::compare::{assert_close, assert_near, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values};
use testkit::properties::config;
use testkit::vars::{set, vb};

use crate::shares::{Model, Shares, joined, summed};

const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];

type Group = Option<Arc<dyn Collective>>;

fn switch(
    options: SwitchNormOptions,
) -> impl Fn(&VarMap, Group, &Tensor) -> Result<Model> + Sync + Copy {
    move |vars, group, x| {
        let norm = switch_norm(x.dims()[1], options, vb(vars, x.dtype()))?;
        let mut draw = Draw::new(9);
        for (name, param) in norm.parameters() {
            let drawn = tensor(&draw.weight(param.elem_count()), param.dims(), DType::BF16)?;
            set(vars, name, &drawn.to_dtype(param.dtype())?)?;
        }
        let norm = match group {
            Some(group) => norm.synchronized(group),
            None => norm,
        };
        let y = norm.forward_t(x, true)?;
        Ok(Model {
            y,
            buffers: norm.buffers(),
        })
    }
}

fn instance(
    options: InstanceNormOptions,
) -> impl Fn(&VarMap, Group, &Tensor) -> Result<Model> + Sync + Copy {
    move |vars, group, x| {
        let norm = instance_norm(x.dims()[1], options, vb(vars, x.dtype()))?;
        let norm = match group {
            Some(group) => norm.synchronized(group),
            None => norm,
        };
        let y = norm.forward_t(x, true)?;
        Ok(Model {
            y,
            buffers: norm.buffers(),
        })
    }
}

fn check<M>(shares: &Shares, model: M, what: &str) -> Result<()>
where
    M: Fn(&VarMap, Group, &Tensor) -> Result<Model> + Sync + Copy,
{
    let what = format!("{what} {shares:?}");
    let ranks = shares.run(model)?;
    let want = shares.run_whole(model)?;
    let tolerance = 2. * tolerance(shares.dtype);
    assert_close(
        &what,
        &joined(&ranks, |r| &r.y)?,
        &values(&want.y)?,
        tolerance,
    );
    assert_close(
        &what,
        &joined(&ranks, |r| &r.dx)?,
        &values(&want.dx)?,
        tolerance,
    );
    for (got, (_, want)) in summed(&ranks)?.iter().zip(&want.gradients) {
        let what = format!("{} of {what}", got.name);
        // Gradients of mixing weights are sums over all elements, in which much cancels.
        let tolerance = 8. * tolerance;
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
    Ok(())
}

fn switch_options() -> Vec<SwitchNormOptions> {
    let options = SwitchNormOptions {
        eps: 1e-3,
        ..Default::default()
    };
    vec![
        options,
        SwitchNormOptions {
            unbiased: false,
            ..options
        },
        SwitchNormOptions {
            affine: Affine::None,
            ..options
        },
        SwitchNormOptions {
            spatial_dims: 0,
            ..options
        },
        SwitchNormOptions {
            spatial_dims: 0,
            unbiased: false,
            ..options
        },
        SwitchNormOptions {
            using_bn: false,
            ..options
        },
    ]
}

#[test]
fn switch_norm_mixes_in_the_batches_of_all_ranks() -> Result<()> {
    for path in PATHS {
        for options in switch_options() {
            for dtype in [DType::F64, DType::F32, DType::BF16] {
                for counts in [&[2, 3, 1][..], &[0, 4], &[1, 0, 0, 1]] {
                    let shares = Shares::new(&[3, 2, 3], counts, dtype, path);
                    check(&shares, switch(options), &format!("{options:?}"))?;
                }
            }
        }
        let mut shares = Shares::new(&[2, 9], &[5, 0, 4], DType::F32, path);
        shares.mean = 1e3;
        check(&shares, switch(switch_options()[0]), "a large mean")?;
    }
    Ok(())
}

#[test]
fn instance_norm_averages_over_the_samples_of_all_ranks() -> Result<()> {
    let options = InstanceNormOptions {
        track_running_stats: true,
        affine: Affine::WeightAndBias,
        ..Default::default()
    };
    for path in PATHS {
        for dtype in [DType::F64, DType::F32, DType::F16] {
            for counts in [&[2, 3, 1][..], &[0, 4], &[1, 0, 0, 1]] {
                let shares = Shares::new(&[3, 2, 6], counts, dtype, path);
                check(&shares, instance(options), "InstanceNorm")?;
            }
        }
    }
    Ok(())
}

/// Without running statistics an instance norm sends nothing: the ranks may do what they like.
#[test]
fn instance_norm_without_statistics_never_communicates() -> Result<()> {
    Threads::run(2, |group| {
        let (vars, rank) = (VarMap::new(), group.rank());
        let norm = instance_norm(2, 1e-5, vb(&vars, DType::F32))?.synchronized(group);
        for _ in 0..rank {
            norm.forward_t(&Tensor::randn(0f32, 1., (1, 2, 4), &Device::Cpu)?, true)?;
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn a_bad_input_on_one_rank_is_an_error_on_all() -> Result<()> {
    let said = |switch: bool, bad: Tensor, path: Path| {
        Threads::run(3, |group| {
            let (vars, rank) = (VarMap::new(), group.rank());
            let vb = vb(&vars, DType::F32);
            let norm: Box<dyn Norm> = match switch {
                true => Box::new(switch_norm(2, 1e-5, vb)?.synchronized(group)),
                false => {
                    let options = InstanceNormOptions {
                        track_running_stats: true,
                        ..Default::default()
                    };
                    Box::new(instance_norm(2, options, vb)?.synchronized(group))
                }
            };
            let good = Tensor::ones((1, 2, 4), DType::F32, &Device::Cpu)?;
            let x = if rank == 1 { &bad } else { &good };
            let error = with_path(path, || norm.forward_t(x, true)).expect_err("on all ranks");
            let stats = norm.running_stats().expect("tracked").snapshot()?;
            assert_eq!(stats.num_batches_tracked, 0);
            Ok(error.to_string())
        })
    };
    for path in PATHS {
        for switch in [true, false] {
            for bad in [(1, 3, 4), (1, 2, 1)] {
                let bad = Tensor::ones(bad, DType::F32, &Device::Cpu)?;
                let said = said(switch, bad, path)?;
                assert!(said[1].contains("expected"), "{said:?}");
                for said in [&said[0], &said[2]] {
                    assert!(said.contains("an error on rank 1"), "{said}");
                }
            }
        }
    }
    Ok(())
}

fn cases() -> impl Strategy<Value = (Shares, SwitchNormOptions)> {
    let counts = prop::collection::vec(prop_oneof![2 => 0usize..5, 1 => Just(0)], 2..=16);
    let dims = (1usize..5, 1usize..4, 2usize..4).prop_map(|(c, h, w)| vec![c, h, w]);
    let dtype = prop::sample::select(vec![DType::F64, DType::F32]);
    let path = prop::sample::select(PATHS.to_vec());
    let options = prop::sample::select(switch_options());
    (counts, dims, dtype, path, options, any::<u64>()).prop_filter_map(
        "samples",
        |(counts, dims, dtype, path, options, seed)| {
            let mut shares = Shares::new(&dims, &counts, dtype, path);
            shares.seed = seed;
            (counts.iter().sum::<usize>() > 1).then_some((shares, options))
        },
    )
}

proptest! {
    #![proptest_config(config(40, 18061077))]

    #[test]
    fn random_splits_agree_with_the_whole_batch((shares, options) in cases()) {
        check(&shares, switch(options), &format!("{options:?}")).unwrap();
        // The gradient of two values is a small difference unless eps is large.
        let options = InstanceNormOptions {
            track_running_stats: true,
            eps: 0.5,
            ..Default::default()
        };
        check(&shares, instance(options), "InstanceNorm").unwrap();
    }
}
