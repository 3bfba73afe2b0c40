//! Threads that train one layer: no update of its statistics is lost, and nobody sees half of one.

use std::thread;

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{BatchNorm, BatchNormOptions, batch_norm};

fn layer(vars: &VarMap, momentum: Option<f64>) -> Result<BatchNorm> {
    let options = BatchNormOptions {
        momentum,
        ..Default::default()
    };
    let vb = VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu);
    batch_norm(1, options, vb)
}

/// A batch of the given mean and unbiased variance.
fn batch(mean: f32, var: f32) -> Result<Tensor> {
    let distance = (var / 2.).sqrt();
    Tensor::new(&[[mean - distance], [mean + distance]], &Device::Cpu)
}

#[test]
fn no_update_is_lost() -> Result<()> {
    const THREADS: usize = 4;
    const STEPS: usize = 200;
    let vars = VarMap::new();
    let built = layer(&vars, None)?;
    // A clone, and a layer that is built again from the same variables, have the same statistics.
    let layers = [built.clone(), layer(&vars, None)?];
    thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let layer = &layers[thread % layers.len()];
                scope.spawn(move || -> Result<()> {
                    let x = batch(thread as f32, 2.)?;
                    (0..STEPS).try_for_each(|_| layer.forward_t(&x, true).map(|_| ()))
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().expect("no worker panics"))
    })?;
    let statistics = built
        .running_stats()
        .expect("tracked by default")
        .snapshot()?;
    assert_eq!(statistics.num_batches_tracked, (THREADS * STEPS) as i64);
    // The cumulative average of 0, 1, 2 and 3, each as often, in whatever order.
    let mean = statistics.mean.to_vec1::<f32>()?[0];
    assert!((mean - 1.5).abs() < 1e-4, "{mean}");
    let var = statistics.var.to_vec1::<f32>()?[0];
    assert!((var - 2.).abs() < 1e-4, "{var}");
    Ok(())
}

#[test]
fn nobody_sees_half_an_update() -> Result<()> {
    const STEPS: usize = 500;
    let vars = VarMap::new();
    // With a momentum of 1 the statistics are those of the last batch.
    let layer = layer(&vars, Some(1.))?;
    let batches = [batch(0., 1.)?, batch(8., 9.)?];
    layer.forward_t(&batches[0], true)?;
    let is_whole = |mean: f32, var: f32| {
        let near = |a: f32, b: f32| (a - b).abs() < 1e-3;
        (near(mean, 0.) && near(var, 1.)) || (near(mean, 8.) && near(var, 9.))
    };
    thread::scope(|scope| -> Result<()> {
        let trainer = scope.spawn(|| -> Result<()> {
            (0..STEPS).try_for_each(|i| layer.forward_t(&batches[i % 2], true).map(|_| ()))
        });
        let statistics = layer.running_stats().expect("tracked by default");
        while !trainer.is_finished() {
            let seen = statistics.snapshot()?;
            let (mean, var) = (
                seen.mean.to_vec1::<f32>()?[0],
                seen.var.to_vec1::<f32>()?[0],
            );
            assert!(is_whole(mean, var), "mean {mean}, variance {var}");
            // Inference of 20 is (20 − 0) / 1 or (20 − 8) / 3.
            let y = layer.forward_t(&Tensor::new(&[[20f32]], &Device::Cpu)?, false)?;
            let y = y.to_vec2::<f32>()?[0][0];
            assert!((y - 20.).abs() < 1e-2 || (y - 4.).abs() < 1e-2, "{y}");
        }
        trainer.join().expect("the trainer does not panic")
    })
}
