//! `recalibrate`: running statistics anew, as the plain average over given batches.

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{
    BatchNormOptions, InstanceNormOptions, Norm, batch_norm, instance_norm, pool_updates,
    recalibrate, without_updates,
};
use testkit::data::{Draw, bits, tensor, values};

const DIMS: [usize; 3] = [4, 3, 5];

fn batches(count: usize) -> Result<Vec<Tensor>> {
    let mut draw = Draw::new(11);
    (0..count)
        .map(|i| (tensor(&draw.normal(60), &DIMS, DType::F64)? * 2.)? + i as f64)
        .collect()
}

/// The means over `batches` of each channel's mean and unbiased variance.
fn expected(batches: &[Tensor]) -> Result<[Vec<f64>; 2]> {
    let (mut mean, mut var) = (vec![0.; 3], vec![0.; 3]);
    for batch in batches {
        let x = values(batch)?;
        for c in 0..3 {
            let of_channel = || x.iter().enumerate().filter(move |(i, _)| i / 5 % 3 == c);
            let m = of_channel().map(|(_, v)| v).sum::<f64>() / 20.;
            let v = of_channel().map(|(_, v)| (v - m).powi(2)).sum::<f64>() / 19.;
            mean[c] += m / batches.len() as f64;
            var[c] += v / batches.len() as f64;
        }
    }
    Ok([mean, var])
}

fn assert_close(got: &Tensor, want: &[f64]) -> Result<()> {
    for (got, want) in values(got)?.iter().zip(want) {
        assert!(
            (got - want).abs() <= 1e-12 * (1. + want.abs()),
            "{got} for {want}"
        );
    }
    Ok(())
}

fn refused<T: std::fmt::Debug>(result: Result<T>, part: &str) {
    let message = result.expect_err("an error").to_string();
    let parts = ["recalibrate", "expected at least one", part];
    assert!(parts.iter().all(|p| message.contains(p)), "{message}");
}

/// The average, whatever the momentum and whatever was there before; then the momentum is in force
/// again.
#[test]
fn statistics_are_the_averages_over_the_batches() -> Result<()> {
    for momentum in [Some(0.1), Some(1.), Some(0.), None] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let options = BatchNormOptions {
            momentum,
            ..Default::default()
        };
        let norm = batch_norm(3, options, vb)?;
        norm.forward_t(&(&batches(1)?[0] * 100.)?, true)?;
        let given = batches(4)?;
        let [mean, var] = expected(&given)?;
        let count = recalibrate(&[&norm], given.clone(), |x| norm.forward_t(x, true))?;
        assert_eq!(count, 4);
        assert_close(norm.running_mean(), &mean)?;
        assert_close(norm.running_var(), &var)?;
        let tracked = norm.running_stats().expect("statistics").snapshot()?;
        assert_eq!(tracked.num_batches_tracked, 4);

        let m = momentum.unwrap_or(0.2);
        assert_eq!(norm.momentum(), m);
        let [next, _] = expected(&given[..1])?;
        norm.forward_t(&given[0], true)?;
        let blended: Vec<f64> = mean
            .iter()
            .zip(&next)
            .map(|(r, b)| (1. - m) * r + m * b)
            .collect();
        assert_close(norm.running_mean(), &blended)?;
    }
    Ok(())
}

/// The input of the second layer depends on the mode of the first, which is training.
#[test]
fn layers_of_a_model_are_recalibrated_together() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let options = InstanceNormOptions {
        track_running_stats: true,
        ..Default::default()
    };
    let first = batch_norm(3, 1e-5, vb.pp("first"))?;
    let second = instance_norm(3, options, vb.pp("second"))?;
    let untracked = instance_norm(3, 1e-5, vb.pp("third"))?;
    let norms: [&dyn Norm; 3] = [&first, &second, &untracked];
    let given = batches(3)?;
    let parameters = bits(first.weight().expect("a weight"))?;
    let count = recalibrate(&norms, given.clone(), |x| {
        second.forward_t(&first.forward_t(x, true)?, true)
    })?;
    assert_eq!(count, 3);
    assert_close(first.running_mean(), &expected(&given)?[0])?;
    let stats = second.running_stats().expect("statistics").snapshot()?;
    let mut mean = vec![0.; 3];
    for batch in &given {
        let [of_batch, _] = expected(&[first.forward_train(batch)?])?;
        mean.iter_mut()
            .zip(of_batch)
            .for_each(|(m, b)| *m += b / 3.);
    }
    assert_close(&stats.mean, &mean)?;
    assert_eq!(bits(first.weight().expect("a weight"))?, parameters);
    Ok(())
}

#[test]
fn what_gives_no_statistics_is_refused_and_changes_nothing() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let norm = batch_norm(3, 1e-5, vb.pp("a"))?;
    let other = batch_norm(3, 1e-5, vb.pp("b"))?;
    let plain = instance_norm(3, 1e-5, vb.pp("c"))?;
    for layer in [&norm, &other] {
        layer.forward_t(&batches(1)?[0], true)?;
    }
    let state = || -> Result<Vec<Vec<u64>>> {
        let buffers = [norm.buffers(), other.buffers()].concat();
        buffers.iter().map(|(_, t)| bits(t)).collect()
    };
    let before = state()?;

    let train = |x: &Tensor| norm.forward_t(x, true);
    refused(recalibrate(&[&norm], [], train), "batch");
    refused(
        recalibrate(&[], batches(2)?, train),
        "layer with running statistics",
    );
    refused(
        recalibrate(&[&plain], batches(2)?, train),
        "layer with running statistics",
    );
    // A layer that the model does not run, and a model in inference.
    refused(
        recalibrate(&[&norm, &other], batches(2)?, train),
        "batch that trains each layer",
    );
    refused(
        recalibrate(&[&norm], batches(2)?, |x| norm.forward_t(x, false)),
        "batch that trains each layer",
    );
    assert_eq!(state()?, before);
    assert_eq!(norm.momentum(), 0.1);
    Ok(())
}

/// The layer that trains need not be the one that is listed: they are the same variables.
#[test]
fn layers_of_the_same_variables_are_recalibrated_through_each_other() -> Result<()> {
    let vars = VarMap::new();
    let build = || {
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu).pp("bn");
        batch_norm(1, 1e-5, vb)
    };
    let (train, eval) = (build()?, build()?);
    let given =
        (0..10).map(|k| Tensor::new(&[[100f32 + k as f32], [102. + k as f32]], &Device::Cpu));
    let given = given.collect::<Result<Vec<_>>>()?;
    for listed in [vec![&eval as &dyn Norm], vec![&train, &eval]] {
        let count = recalibrate(&listed, given.clone(), |x| train.forward_t(x, true))?;
        assert_eq!(count, 10);
        for layer in [&train, &eval] {
            let s = layer.running_stats().expect("statistics").snapshot()?;
            let found = (values(&s.mean)?, values(&s.var)?, s.num_batches_tracked);
            assert_eq!((found.0.len(), found.2), (1, 10));
            assert!((found.0[0] - 105.5).abs() < 1e-4, "{found:?}");
            assert!((found.1[0] - 2.).abs() < 1e-5, "{found:?}");
            assert_eq!(layer.momentum(), 0.1);
        }
    }
    Ok(())
}

/// The end of one recalibration does not end another, and each is by the average.
#[test]
fn a_recalibration_within_another_leaves_it_in_force() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let norm = batch_norm(3, 1e-5, vb)?;
    let given = batches(4)?;
    let mut first = true;
    recalibrate(&[&norm], given.clone(), |x| {
        if std::mem::take(&mut first) {
            recalibrate(&[&norm], given[..1].to_vec(), |x| norm.forward_t(x, true))?;
            norm.running_stats().expect("statistics").reset()?;
        }
        norm.forward_t(x, true)
    })?;
    let [mean, var] = expected(&given)?;
    assert_close(norm.running_mean(), &mean)?;
    assert_close(norm.running_var(), &var)?;
    assert_eq!(norm.momentum(), 0.1);
    Ok(())
}

/// Statistics that a scope leaves alone cannot be averaged by a recalibration.
#[test]
fn scopes_around_a_recalibration() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let norm = batch_norm(3, 1e-5, vb)?;
    norm.forward_t(&batches(1)?[0], true)?;
    let before = bits(norm.running_mean())?;
    let run = || recalibrate(&[&norm], batches(4)?, |x| norm.forward_t(x, true));
    refused(without_updates(run), "batch that trains each layer");
    assert_eq!(bits(norm.running_mean())?, before);

    // Batches of a recalibration are taken one by one, and leave what the scope around it pools.
    let given = batches(4)?;
    let [mean, var] = expected(&given)?;
    pool_updates(|| {
        norm.forward_t(&(&given[0] * 10.)?, true)?;
        assert_eq!(run()?, 4);
        assert_close(norm.running_mean(), &mean)?;
        assert_close(norm.running_var(), &var)
    })?;
    let [pooled, _] = expected(&[(&given[0] * 10.)?])?;
    let blended: Vec<f64> = mean
        .iter()
        .zip(pooled)
        .map(|(r, b)| 0.9 * r + 0.1 * b)
        .collect();
    assert_close(norm.running_mean(), &blended)?;

    // And a batch of a recalibration may be made of several.
    let mut pairs = given.chunks(2);
    recalibrate(&[&norm], batches(2)?, |x| {
        let pair = pairs.next().expect("a pair");
        pool_updates(|| {
            norm.forward_t(&pair[0], true)
                .and(norm.forward_t(&pair[1], true))
        })?;
        Ok(x.clone())
    })?;
    assert_close(norm.running_mean(), &mean)?;
    let stats = norm.running_stats().expect("statistics").snapshot()?;
    assert_eq!(stats.num_batches_tracked, 2);
    Ok(())
}
