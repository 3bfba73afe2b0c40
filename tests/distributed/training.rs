//! Data-parallel training: gradients, variables and shares of all ranks.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{Module, ModuleT, Optimizer, SGD, VarBuilder, VarMap, linear};
use candle_norm::distributed::{
    Call, Collective, Threads, assert_same, at_step, batches, broadcast_vars, clip_gradients,
    shard, shuffled, sum_gradients,
};
use candle_norm::{BatchNorm, batch_norm, trainable_vars};
use proptest::prelude::*;
use testkit::compare::{assert_near, assert_same_bits};
use testkit::data::{Draw, tensor, values};
use testkit::properties::config;
use testkit::vars::{names, set, var, vb};

/// Two linear layers with a batch norm between them, equal on all ranks.
struct Net {
    first: candle_nn::Linear,
    norm: BatchNorm,
    last: candle_nn::Linear,
}

impl Net {
    fn new(vars: &VarMap, dtype: DType, group: Option<&Arc<dyn Collective>>) -> Result<Self> {
        let vb: VarBuilder = vb(vars, dtype);
        let first = linear(4, 6, vb.pp("first"))?;
        let norm = batch_norm(6, 1e-5, vb.pp("norm"))?;
        let last = linear(6, 3, vb.pp("last"))?;
        let mut draw = Draw::new(3);
        for name in names(vars) {
            let var = var(vars, &name);
            if name.ends_with("weight") || name.ends_with("bias") {
                let drawn = tensor(&draw.normal(var.elem_count()), var.dims(), dtype)?;
                set(vars, &name, &(drawn * 0.5)?)?;
            }
        }
        let norm = match group {
            Some(group) => norm.synchronized(group.clone()),
            None => norm,
        };
        Ok(Self { first, norm, last })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = self.norm.forward_t(&self.first.forward(x)?, true)?;
        self.last.forward(&hidden.tanh()?)
    }
}

/// Losses of every step, and the variables after the last, by name.
type Run = (Vec<f64>, Vec<(String, Tensor)>);

const SAMPLES: usize = 36;

/// Training of a network on `ranks` ranks with global batches of `batch`.
fn run(ranks: usize, batch: usize, steps: usize, dtype: DType) -> Result<Vec<Run>> {
    let data = Draw::new(5).normal(7 * SAMPLES);
    Threads::run(ranks, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, dtype, Some(&group))?;
        broadcast_vars(&*group, &vars)?;
        let trained = trainable_vars(&vars);
        let mut optimizer = SGD::new(trained.clone(), 0.05)?;
        let mut losses = vec![];
        'training: for epoch in 0.. {
            let order = shuffled(SAMPLES, 11, epoch);
            for batch in batches(&order, batch, ranks)? {
                let step = losses.len() as u64;
                if losses.len() == steps {
                    break 'training;
                }
                let loss = at_step(step, || -> Result<f64> {
                    let mine = shard(batch, group.rank(), ranks)?;
                    let columns = |from: usize, width: usize| {
                        let rows = mine.iter().flat_map(|i| &data[7 * i + from..][..width]);
                        let rows: Vec<f64> = rows.copied().collect();
                        tensor(&rows, &[mine.len(), width], dtype)
                    };
                    let away = (net.forward(&columns(0, 4)?)? - columns(4, 3)?)?;
                    let loss = (away.sqr()?.sum_all()? / batch.len() as f64)?;
                    let mut grads = loss.backward()?;
                    sum_gradients(&*group, &trained, &mut grads)?;
                    clip_gradients(&trained, &mut grads, 5.)?;
                    optimizer.step(&grads)?;
                    let mut loss = [loss.to_dtype(DType::F64)?.to_scalar::<f64>()?];
                    group.all_reduce_sum(&Call::new("loss"), &mut loss)?;
                    Ok(loss[0])
                })?;
                losses.push(loss);
            }
        }
        assert_same(&*group, &vars)?;
        let named = |name: String| {
            let value = var(&vars, &name);
            (name, value)
        };
        Ok((losses, names(&vars).into_iter().map(named).collect()))
    })
}

#[test]
fn training_on_several_ranks_is_training_on_one() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-5)] {
        let whole = run(1, 12, 20, dtype)?.remove(0);
        for ranks in [2, 3, 5, 8, 12] {
            let all = run(ranks, 12, 20, dtype)?;
            for (losses, vars) in &all {
                assert_near("losses", losses, &whole.0, &[0.; 20], tolerance);
                for ((name, got), (_, first)) in vars.iter().zip(&all[0].1) {
                    assert_same_bits(name, got, first);
                }
                for ((name, got), (_, want)) in vars.iter().zip(&whole.1) {
                    let (got, want) = (values(got)?, values(want)?);
                    // Values near zero, such as a bias before batch norm, are sums of others.
                    assert_near(name, &got, &want, &vec![1.; want.len()], tolerance);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_summed_in_their_own_dtype() -> Result<()> {
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let sums = Threads::run(3, |group| {
            let vars: Vec<Var> = (1..=3)
                .map(|n| Var::ones((n, 2), dtype, &Device::Cpu))
                .collect::<Result<_>>()?;
            let factor = 1. + group.rank() as f64;
            // The second has a gradient on rank 1 alone, the third on none.
            let mut loss = (vars[0].as_tensor() * factor)?.sum_all()?;
            if group.rank() == 1 {
                loss = (loss + vars[1].sum_all()?)?;
            }
            let mut grads = loss.backward()?;
            sum_gradients(&*group, &vars, &mut grads)?;
            let sums: Vec<_> = vars.iter().map(|v| grads.get(v).cloned()).collect();
            Ok(sums)
        })?;
        for rank in sums {
            let [Some(first), Some(second), None] = rank.as_slice() else {
                panic!("{rank:?}")
            };
            assert_eq!((first.dtype(), first.dims()), (dtype, &[1, 2][..]));
            assert_eq!(values(first)?, [6.; 2]);
            assert_eq!((second.dtype(), second.dims()), (dtype, &[2, 2][..]));
            assert_eq!(values(second)?, [1.; 4]);
        }
    }
    Ok(())
}

/// More than one bucket, one of them a single gradient that fills several.
#[test]
fn large_gradients_are_summed_whole() -> Result<()> {
    let sizes = [700_000, 500_000, 3_000_000, 7, 1];
    Threads::run(2, |group| {
        let vars: Vec<Var> = sizes
            .iter()
            .map(|n| Var::zeros(*n, DType::F32, &Device::Cpu))
            .collect::<Result<_>>()?;
        let mut loss = Tensor::new(0f32, &Device::Cpu)?;
        for var in &vars {
            let n = var.elem_count();
            let slope = Tensor::arange(0u32, n as u32, &Device::Cpu)?.to_dtype(DType::F32)?;
            let part = (var.as_tensor() * (slope + group.rank() as f64)?)?.sum_all()?;
            loss = (loss + part)?;
        }
        let mut grads = loss.backward()?;
        sum_gradients(&*group, &vars, &mut grads)?;
        for var in &vars {
            let sum = grads.get(var).expect("a gradient").to_vec1::<f32>()?;
            assert!(
                sum.iter()
                    .enumerate()
                    .all(|(i, v)| *v == (2 * i + 1) as f32)
            );
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn other_variables_on_a_rank_are_an_error_on_all() -> Result<()> {
    for dims in [vec![2, 3], vec![6], vec![3, 2, 1]] {
        let said = Threads::run(3, |group| {
            let dims = if group.rank() == 1 {
                dims.clone()
            } else {
                vec![3, 2]
            };
            let w = Var::zeros(dims, DType::F32, &Device::Cpu)?;
            let mut grads = w.sum_all()?.backward()?;
            let outcome = sum_gradients(&*group, &[w], &mut grads);
            Ok(outcome.expect_err("on every rank").to_string())
        })?;
        for said in said {
            assert!(
                said.contains("expected the same variables on every rank"),
                "{said}"
            );
        }
    }
    Ok(())
}

#[test]
fn clipping_keeps_the_direction_and_refuses_what_is_not_finite() -> Result<()> {
    let vars = [
        Var::new(&[3f32, 0.], &Device::Cpu)?,
        Var::new(&[[4f32]], &Device::Cpu)?,
        Var::new(&[1f32], &Device::Cpu)?,
    ];
    let squares = |v: &Var| v.sqr()?.sum_all()? * 0.5;
    let loss = (squares(&vars[0])? + squares(&vars[1])?)?;
    let mut grads = loss.backward()?;
    assert_eq!(clip_gradients(&vars, &mut grads, 10.)?, 5.);
    assert_eq!(values(grads.get(&vars[0]).expect("one"))?, [3., 0.]);
    assert_eq!(clip_gradients(&vars, &mut grads, 2.5)?, 5.);
    assert_eq!(values(grads.get(&vars[0]).expect("one"))?, [1.5, 0.]);
    assert_eq!(values(grads.get(&vars[1]).expect("one"))?, [2.]);
    for bad in [0., -1., f64::NAN, f64::INFINITY] {
        assert!(clip_gradients(&vars, &mut grads, bad).is_err());
    }
    grads.insert(&vars[1], Tensor::new(&[[f32::NAN]], &Device::Cpu)?);
    let error = clip_gradients(&vars, &mut grads, 1.)
        .unwrap_err()
        .to_string();
    assert!(error.contains("finite length"), "{error}");
    assert_eq!(values(grads.get(&vars[0]).expect("one"))?, [1.5, 0.]);
    Ok(())
}

#[test]
fn variables_of_every_dtype_are_broadcast_to_the_bit() -> Result<()> {
    let of_rank = |rank: usize| -> Result<VarMap> {
        let vars = VarMap::new();
        let mut data = vars.data().lock().expect("no thread panicked");
        for (name, dtype) in [
            ("f64", DType::F64),
            ("f32", DType::F32),
            ("f16", DType::F16),
            ("bf16", DType::BF16),
            ("i64", DType::I64),
            ("u32", DType::U32),
            ("u8", DType::U8),
        ] {
            let value = match dtype {
                DType::I64 => Tensor::new(&[i64::MAX - rank as i64, -1, i64::MIN], &Device::Cpu)?,
                DType::F64 => Tensor::new(&[f64::MIN_POSITIVE, 0.1, rank as f64], &Device::Cpu)?,
                _ => Tensor::new(&[1f32, 3., 7. - rank as f32], &Device::Cpu)?.to_dtype(dtype)?,
            };
            data.insert(name.to_string(), Var::from_tensor(&value)?);
        }
        drop(data);
        Ok(vars)
    };
    Threads::run(3, |group| {
        let vars = of_rank(group.rank())?;
        let error = assert_same(&*group, &vars)
            .expect_err("they differ")
            .to_string();
        assert!(
            error.contains("2 of 3 ranks in bf16, the first of 7"),
            "{error}"
        );
        broadcast_vars(&*group, &vars)?;
        assert_same(&*group, &vars)?;
        let (want, numbers) = (of_rank(0)?, var(&vars, "i64").to_vec1::<i64>()?);
        assert_eq!(numbers, [i64::MAX, -1, i64::MIN]);
        for name in names(&vars) {
            if name != "i64" {
                assert_same_bits(&name, &var(&vars, &name), &var(&want, &name));
            }
        }
        Ok(())
    })?;
    Ok(())
}

#[test]
fn models_that_differ_are_an_error_on_all_ranks() -> Result<()> {
    let said = Threads::run(2, |group| {
        let vars = VarMap::new();
        let name = ["norm", "bn"][group.rank()];
        batch_norm(2, 1e-5, vb(&vars, DType::F32).pp(name))?;
        let errors = [broadcast_vars(&*group, &vars), assert_same(&*group, &vars)];
        Ok(errors.map(|e| e.expect_err("on every rank").to_string()))
    })?;
    for said in said.iter().flatten() {
        assert!(said.contains("expected the same variables"), "{said}");
    }
    Ok(())
}

/// Loss times zero is no way to skip a backward; an error names who does not come.
#[test]
fn a_rank_that_skips_its_backward_is_named() -> Result<()> {
    let limit = Duration::from_millis(500);
    let said = Threads::run_within(2, limit, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, DType::F64, Some(&group))?;
        let y = net.forward(&Tensor::ones(
            (2 + group.rank(), 4),
            DType::F64,
            &Device::Cpu,
        )?)?;
        let mut loss = y.sum_all()?;
        if group.rank() == 1 {
            loss = (loss * 0.)?;
        }
        let outcome = loss.backward();
        if group.rank() == 1 {
            outcome?;
            thread::sleep(4 * limit);
            return Ok(None);
        }
        Ok(Some(outcome.map(drop).unwrap_err().to_string()))
    })?;
    let said = said[0].as_ref().expect("of rank 0");
    assert!(
        said.contains("norm.backward of step 0") && said.contains("ranks [1]"),
        "{said}"
    );
    Ok(())
}

#[test]
fn a_skipped_step_is_noticed_at_the_next() {
    let outcome = Threads::run(4, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, DType::F32, Some(&group))?;
        for step in 0..6 {
            if group.rank() == 2 && step == 3 {
                continue;
            }
            at_step(step, || {
                net.forward(&Tensor::ones((2, 4), DType::F32, &Device::Cpu)?)
            })?;
        }
        Ok(())
    });
    let said = outcome.unwrap_err().to_string();
    assert!(
        said.contains("of step 3 on rank 0") && said.contains("of step 4 on rank 2"),
        "{said}"
    );
}

#[test]
fn a_slow_rank_is_waited_for() -> Result<()> {
    let all = Threads::run(3, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, DType::F64, Some(&group))?;
        let mut last = 0.;
        for step in 0..5 {
            if group.rank() == step % 3 {
                thread::sleep(Duration::from_millis(30));
            }
            let x = tensor(&Draw::new(step as u64).normal(8), &[2, 4], DType::F64)?;
            last = values(&net.forward(&x)?)?[0];
        }
        Ok(last.to_bits())
    })?;
    // All ranks have the same batch.
    assert_eq!(all, [all[0]; 3]);
    Ok(())
}

#[test]
fn a_rank_that_fails_between_forward_and_backward_ends_the_run() {
    let outcome = Threads::run(3, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, DType::F64, Some(&group))?;
        let y = net.forward(&Tensor::ones((2, 4), DType::F64, &Device::Cpu)?)?;
        if group.rank() == 1 {
            bail!("out of data")
        }
        y.sum_all()?.backward()?;
        Ok(())
    });
    assert!(outcome.unwrap_err().to_string().starts_with("out of data"));
}

/// Two thousand steps on eight ranks, with shares that change from step to step.
#[test]
fn a_soak_keeps_all_ranks_equal() -> Result<()> {
    const STEPS: u64 = 2000;
    Threads::run(8, |group| {
        let vars = VarMap::new();
        let net = Net::new(&vars, DType::F32, Some(&group))?;
        let trained = trainable_vars(&vars);
        let mut optimizer = SGD::new(trained.clone(), 0.01)?;
        for step in 0..STEPS {
            at_step(step, || {
                let count = ((step + group.rank() as u64 * 5) % 4) as usize;
                let x = Draw::new(step * 8 + group.rank() as u64).normal(4 * count);
                let x = tensor(&x, &[count, 4], DType::F32)?;
                let loss = (net.forward(&x)?.sqr()?.sum_all()? / 12.)?;
                let mut grads = loss.backward()?;
                sum_gradients(&*group, &trained, &mut grads)?;
                optimizer.step(&grads)?;
                match step % 250 == 249 {
                    true => assert_same(&*group, &vars),
                    false => Ok(()),
                }
            })?;
        }
        let stats = net.norm.running_stats().expect("tracked").snapshot()?;
        assert_eq!(stats.num_batches_tracked, STEPS as i64);
        Ok(())
    })?;
    Ok(())
}

proptest! {
    #![proptest_config(config(200, 1906))]

    #[test]
    fn shares_are_a_partition_without_empty_ones(
        samples in 1usize..200,
        batch in 1usize..50,
        ranks in 1usize..17,
        seed in any::<u64>(),
        epoch in 0u64..5,
    ) {
        let order = shuffled(samples, seed, epoch);
        if batch < ranks || samples < ranks {
            prop_assert!(batches(&order, batch, ranks).is_err());
            return Ok(());
        }
        let mut seen: Vec<usize> = vec![];
        for batch in batches(&order, batch, ranks).unwrap() {
            let sizes: Vec<usize> = (0..ranks).map(|rank| {
                let share = shard(batch, rank, ranks).unwrap();
                seen.extend(share);
                share.len()
            }).collect();
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            prop_assert!(*least > 0 && most - least <= 1, "{sizes:?}");
        }
        prop_assert_eq!(&seen, &order);
        seen.sort();
        prop_assert_eq!(seen, (0..samples).collect::<Vec<_>>());
        prop_assert!(shard(&order[..ranks - 1], 0, ranks).is_err());
        prop_assert!(shard(&order, ranks, ranks).is_err());
    }
}
