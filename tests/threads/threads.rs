//! Running statistics under threads, optimizers, failures and pending gradients.
//!
//! Threads that train one layer lose no update, and nobody sees a mean of one update with a
//! variance of another.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, SGD, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNormOptions, InstanceNormOptions, Path, RunningStats, Snapshot, SwitchNormOptions,
    batch_norm, instance_norm, ops, recalibrate, switch_norm, with_path,
};

use testkit::child;
use testkit::compare::assert_same_bits;
use testkit::data::{Draw, bits, tensor, values, variable};
use testkit::subjects::{Kind, Numbers, Subject, backward, gradient};
use testkit::table::{self, LAYERS, shapes};
use testkit::tracked::{self, DEFAULTS, Settings, Shared, Tracked};
use testkit::watch::without_deadlock;

const THREADS: usize = 8;

/// A layer that keeps statistics, and all of its clones.
struct Layer {
    norm: Box<dyn Shared>,
    freezes: bool,
}

impl Clone for Layer {
    fn clone(&self) -> Self {
        Self {
            norm: self.norm.share(),
            freezes: self.freezes,
        }
    }
}

/// The layers whose statistics are what the tests here compute.
fn tracked() -> impl Iterator<Item = &'static Tracked> {
    table::tracked().filter(|which| which.moments)
}

impl Layer {
    /// A mixture of statistics takes those of the batch almost alone.
    fn build(
        which: &Tracked,
        channels: usize,
        momentum: Option<f64>,
        vb: VarBuilder,
    ) -> Result<Self> {
        let settings = Settings {
            eps: 1e-12,
            momentum,
            ..DEFAULTS
        };
        let norm = which.build(channels, settings, vb)?;
        for (name, share) in norm.parameters() {
            if ["mean_weight", "var_weight"].contains(&name) {
                let batch = tensor(&[-20., -20., 20.], &[3], share.dtype())?;
                Var::from_tensor(&share)?.set(&batch)?;
            }
        }
        Ok(Self {
            norm,
            freezes: which.freezes,
        })
    }

    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.norm.forward_t(x, train)
    }

    fn stats(&self) -> &RunningStats {
        let stats = self.norm.running_stats();
        stats.expect("statistics are tracked")
    }

    fn snapshot(&self) -> Snapshot {
        self.stats().snapshot().expect("statistics that are sound")
    }

    /// With the statistics of now, where the layer has such a form.
    fn frozen(&self) -> Option<candle_norm::FrozenNorm> {
        let frozen = || self.norm.frozen().expect("statistics that are sound");
        self.freezes.then(frozen)
    }
}

const CHANNELS: usize = 96;

/// A batch in which every channel holds 0 and 2k: its mean is k and its unbiased variance 2k², both
/// exact.
fn batch_of(k: f64, dtype: DType) -> Result<Tensor> {
    tensor(&[0., 2. * k].repeat(CHANNELS), &[1, CHANNELS, 2], dtype)
}

fn model(which: &Tracked, momentum: Option<f64>, dtype: DType) -> Result<(Layer, VarMap)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    Ok((Layer::build(which, CHANNELS, momentum, vb)?, vars))
}

/// Trains on `batches` from `THREADS` threads at once, each of which calls the layer that
/// `layer_of` gives it.
fn train_in_parallel(batches: &[f64], dtype: DType, layer_of: impl Fn(usize) -> Layer) {
    let next = AtomicUsize::new(0);
    let start = Barrier::new(THREADS);
    thread::scope(|scope| {
        for t in 0..THREADS {
            let layer = layer_of(t);
            let (next, start) = (&next, &start);
            scope.spawn(move || {
                start.wait();
                while let Some(k) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
                    layer
                        .forward_t(&batch_of(*k, dtype).unwrap(), true)
                        .unwrap();
                }
            });
        }
    });
}

fn numbers_up_to(n: usize) -> Vec<f64> {
    (1..=n).map(|k| k as f64).collect()
}

/// The cumulative average ends at the grand mean, in whichever order the batches came.
fn assert_grand_mean(layer: &Layer, batches: &[f64], tolerance: f64) {
    let n = batches.len() as f64;
    let mean = batches.iter().sum::<f64>() / n;
    let var = batches.iter().map(|k| 2. * k * k).sum::<f64>() / n;
    let s = layer.snapshot();
    assert_eq!(s.num_batches_tracked, batches.len() as i64);
    for (got, want) in [(s.mean, mean), (s.var, var)] {
        for got in values(&got).unwrap() {
            assert!(
                (got - want).abs() <= tolerance * want,
                "{got}, should be {want}"
            );
        }
    }
}

#[test]
fn threads_lose_no_update() {
    without_deadlock(|| {
        for which in tracked() {
            for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-5), (DType::F16, 1e-5)]
            {
                let (layer, _vars) = model(which, None, dtype).unwrap();
                let batches = numbers_up_to(400);
                train_in_parallel(&batches, dtype, |_| layer.clone());
                assert_grand_mean(&layer, &batches, tolerance);
            }
        }
    })
}

/// Layers that are built from the same variables are one layer, wherever they were built.
#[test]
fn layers_of_the_same_variables_share_statistics() {
    without_deadlock(|| {
        for which in tracked() {
            let vars = VarMap::new();
            let build = || {
                let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu)
                    .pp("block")
                    .pp("norm");
                Layer::build(which, CHANNELS, None, vb).unwrap()
            };
            let layers: Vec<Layer> = (0..THREADS).map(|_| build()).collect();
            let batches = numbers_up_to(400);
            train_in_parallel(&batches, DType::F64, |t| layers[t].clone());
            for layer in layers {
                assert_grand_mean(&layer, &batches, 1e-12);
            }
            // Another layer of the same model is not touched.
            let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu).pp("other");
            let other = Layer::build(which, CHANNELS, None, vb).unwrap();
            assert_eq!(other.snapshot().num_batches_tracked, 0);
        }
    })
}

/// Panics unless the pair is that of one batch: the same k in every channel, the variance 2k².
fn assert_whole(mean: &Tensor, var: &Tensor) {
    let (mean, var) = (values(mean).unwrap(), values(var).unwrap());
    let k = mean[0];
    assert!(mean.iter().all(|m| *m == k), "half a mean: {mean:?}");
    assert!(
        var.iter().all(|v| *v == 2. * k * k),
        "mean {k} with variances {var:?}"
    );
}

/// Reads statistics in every way that there is, until told to stop, and counts how many different
/// ones it sees.
fn read_statistics(layer: &Layer, stop: &AtomicBool, seen: &AtomicUsize) {
    let zeros = Tensor::zeros((1, CHANNELS, 2), DType::F64, &Device::Cpu).unwrap();
    // (0 − k) / √(2k²), whatever k is.
    let assert_inferred = |y: Tensor| {
        for y in values(&y).unwrap() {
            assert!(
                (y + 0.5f64.sqrt()).abs() < 1e-9,
                "inference with half an update: {y}"
            );
        }
    };
    let (mut last, mut newest) = (0., 0);
    while !stop.load(Ordering::Relaxed) {
        let s = layer.snapshot();
        assert_whole(&s.mean, &s.var);
        assert!(
            s.num_batches_tracked >= newest,
            "the counter runs backwards"
        );
        newest = s.num_batches_tracked;
        assert_inferred(layer.forward_t(&zeros, false).unwrap());
        if let Some(frozen) = layer.frozen() {
            assert_whole(frozen.running_mean(), frozen.running_var());
            assert_inferred(frozen.forward(&zeros).unwrap());
        }
        let k = values(&s.mean).unwrap()[0];
        seen.fetch_add(usize::from(k != last), Ordering::Relaxed);
        last = k;
    }
}

#[test]
fn readers_see_no_half_update() {
    without_deadlock(|| {
        for which in tracked() {
            // Every batch replaces the statistics.
            let (layer, _vars) = model(which, Some(1.), DType::F64).unwrap();
            layer
                .forward_t(&batch_of(1., DType::F64).unwrap(), true)
                .unwrap();
            let stop = AtomicBool::new(false);
            let seen = [(); 4].map(|()| AtomicUsize::new(0));
            let mut rounds = 0;
            thread::scope(|scope| {
                let read = |seen| read_statistics(&layer, &stop, seen);
                let readers = (seen.each_ref()).map(|seen| scope.spawn(move || read(seen)));
                // A reader that saw no update shows nothing.
                while rounds == 0 || seen.iter().any(|seen| seen.load(Ordering::Relaxed) < 2) {
                    train_in_parallel(&numbers_up_to(3000), DType::F64, |_| layer.clone());
                    rounds += 1;
                    if readers.iter().any(|reader| reader.is_finished()) {
                        break;
                    }
                }
                stop.store(true, Ordering::Relaxed);
                for reader in readers {
                    reader.join().unwrap();
                }
            });
            let batches = 1 + 3000 * rounds;
            assert_eq!(layer.snapshot().num_batches_tracked, batches);
        }
    })
}

/// The relation that readers check is broken by a pair that is torn.
#[test]
#[should_panic(expected = "with variances")]
fn a_torn_pair_is_seen() {
    let (layer, vars) = model(&tracked::BATCH, Some(1.), DType::F64).unwrap();
    layer
        .forward_t(&batch_of(3., DType::F64).unwrap(), true)
        .unwrap();
    let var = vars.data().lock().unwrap()["running_var"].clone();
    var.set(&Tensor::full(2f64, CHANNELS, &Device::Cpu).unwrap())
        .unwrap();
    let s = layer.snapshot();
    assert_whole(&s.mean, &s.var);
}

/// Resets, snapshots and training from all sides: every lock is given back.
#[test]
fn resets_among_training_and_reading() {
    without_deadlock(|| {
        let (layer, _vars) = model(&tracked::BATCH, Some(1.), DType::F64).unwrap();
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let s = layer.snapshot();
                    let (mean, var) = (values(&s.mean).unwrap(), values(&s.var).unwrap());
                    let fresh = s.num_batches_tracked == 0;
                    let k = mean[0];
                    let want = if fresh { 1. } else { 2. * k * k };
                    assert_eq!(
                        fresh,
                        k == 0.,
                        "counter {} at mean {k}",
                        s.num_batches_tracked
                    );
                    assert!(mean.iter().all(|m| *m == k) && var.iter().all(|v| *v == want));
                }
            });
            let resetter = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    layer.stats().reset().unwrap();
                    thread::yield_now();
                }
            });
            train_in_parallel(&numbers_up_to(1500), DType::F64, |_| layer.clone());
            stop.store(true, Ordering::Relaxed);
            reader.join().unwrap();
            resetter.join().unwrap();
        });
    })
}

/// A panic in one thread does not lock the others out.
#[test]
fn a_panic_elsewhere_leaves_the_layer_usable() {
    without_deadlock(|| {
        let (layer, _vars) = model(&tracked::BATCH, None, DType::F64).unwrap();
        let shared = Arc::new(layer.clone());
        let in_thread = Arc::clone(&shared);
        let panicked = thread::spawn(move || {
            let norms: [&dyn candle_norm::Norm; 1] = [&*in_thread.norm];
            let batches = [batch_of(1., DType::F64).unwrap()];
            let _ = recalibrate(&norms, batches, |_| panic!("a model that fails"));
        });
        assert!(panicked.join().is_err());
        layer
            .forward_t(&batch_of(2., DType::F64).unwrap(), true)
            .unwrap();
        assert_eq!(layer.snapshot().num_batches_tracked, 1);
    })
}

/// All variables of a model that are statistics, by name, as they are now.
fn statistics(vars: &VarMap) -> Vec<(String, Tensor)> {
    let data = vars.data().lock().unwrap();
    let mut found: Vec<(String, Tensor)> = data
        .iter()
        .filter(|(name, _)| name.contains("running_") || name.contains("num_batches"))
        .map(|(name, var)| (name.clone(), var.as_detached_tensor().copy().unwrap()))
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!found.is_empty() && found.len().is_multiple_of(3));
    found
}

fn assert_unchanged(vars: &VarMap, before: &[(String, Tensor)]) {
    for ((name, now), (_, before)) in statistics(vars).iter().zip(before) {
        assert_same_bits(name, now, before);
    }
}

/// A model of the layers with statistics, and one training input for it.
fn small_model(dtype: DType) -> Result<([Layer; 3], VarMap, Tensor)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
    let layers = [
        Layer::build(&tracked::BATCH, 3, Some(0.1), vb.pp("batch"))?,
        Layer::build(&tracked::INSTANCE, 3, Some(0.1), vb.pp("instance"))?,
        Layer::build(&tracked::SWITCH, 3, Some(0.1), vb.pp("switch"))?,
    ];
    let x = Draw::new(1)
        .normal(60)
        .iter()
        .map(|z| 3. + 2. * z)
        .collect::<Vec<_>>();
    Ok((layers, vars, tensor(&x, &[4, 3, 5], dtype)?))
}

fn through(layers: &[Layer], x: &Tensor, train: bool) -> Result<Tensor> {
    let step = |x: Tensor, layer: &Layer| layer.forward_t(&x, train);
    layers.iter().try_fold(x.clone(), step)
}

/// An optimizer over every variable of a model, as careless code makes it, with weight decay.
#[test]
fn no_optimizer_changes_a_statistic() -> Result<()> {
    for dtype in [DType::F32, DType::F64, DType::F16] {
        for train in [true, false] {
            let (layers, vars, x) = small_model(dtype)?;
            through(&layers, &x, true)?;
            let decay = ParamsAdamW {
                lr: 0.05,
                weight_decay: 0.1,
                ..Default::default()
            };
            let mut adam = AdamW::new(vars.all_vars(), decay)?;
            let mut sgd = SGD::new(vars.all_vars(), 0.05)?;
            for _ in 0..3 {
                let y = through(&layers, &x, train)?;
                let after_forward = statistics(&vars);
                let loss = (y.sqr()? * 0.01)?.sum_all()?;
                let grads = loss.backward()?;
                for (name, var) in vars.data().lock().expect("no panic").iter() {
                    let statistic = name.contains("running_") || name.contains("num_batches");
                    assert_eq!(grads.get(var).is_none(), statistic, "{name}");
                }
                let weight = vars.data().lock().expect("no panic")["batch.weight"].clone();
                let before = values(&weight)?;
                adam.step(&grads)?;
                sgd.step(&grads)?;
                assert_ne!(
                    values(&weight)?,
                    before,
                    "a step that changes nothing shows nothing"
                );
                assert_unchanged(&vars, &after_forward);
            }
        }
    }
    Ok(())
}

/// The statistics that a layer shows are live, but lead no gradient to anything.
#[test]
fn statistics_are_in_no_graph() -> Result<()> {
    let (layers, vars, x) = small_model(DType::F32)?;
    let y = through(&layers, &x, true)?;
    for layer in &layers {
        let s = layer.snapshot();
        assert!(!s.mean.track_op() && !s.var.track_op());
        if let Some(frozen) = layer.frozen() {
            assert!(!frozen.running_mean().track_op() && !frozen.running_var().track_op());
        }
    }
    // The input of a constant model tracks nothing, so nothing but the parameters does.
    let grads = y.sqr()?.sum_all()?.backward()?;
    let reached = vars
        .data()
        .lock()
        .expect("no panic")
        .values()
        .filter(|v| grads.get(v).is_some())
        .count();
    assert_eq!(reached, 8);

    // Nor by the function, when a caller hands it variables.
    let mean = variable(&[1.; 3], &[3], DType::F32)?;
    let var = variable(&[2.; 3], &[3], DType::F32)?;
    let weight = variable(&[3.; 3], &[3], DType::F32)?;
    let y = ops::batch_norm_inference(&x, [&mean, &var], Some(&weight), None, 1e-5)?;
    let grads = y.sqr()?.sum_all()?.backward()?;
    assert!(grads.get(&weight).is_some());
    assert!(grads.get(&mean).is_none() && grads.get(&var).is_none());
    Ok(())
}

/// An inference that has not been backpropagated yet does not notice that training goes on.
#[test]
fn a_later_update_does_not_reach_into_a_pending_gradient() -> Result<()> {
    for dtype in [DType::F32, DType::F16] {
        let gradients = |train_in_between: bool| -> Result<Vec<Tensor>> {
            let (layers, vars, numbers) = small_model(dtype)?;
            through(&layers, &numbers, true)?;
            let x = variable(&values(&numbers)?, &[4, 3, 5], dtype)?;
            let frozen: Vec<_> = layers.iter().filter_map(Layer::frozen).collect();
            let y = through(&layers, &x, false)?;
            let z = frozen[1].forward(&frozen[0].forward(&x)?)?;
            if train_in_between {
                let before = statistics(&vars);
                through(&layers, &(numbers * 3.)?, true)?;
                let moved = statistics(&vars);
                assert_ne!(values(&moved[0].1)?, values(&before[0].1)?);
            }
            let dy = tensor(&Draw::new(2).normal(60), &[4, 3, 5], dtype)?;
            let mut found = vec![y.clone(), z.clone()];
            let params = [
                "batch.weight",
                "batch.bias",
                "instance.weight",
                "instance.bias",
                "switch.weight",
                "switch.bias",
                "switch.mean_weight",
                "switch.var_weight",
            ];
            // The frozen layers are the first two.
            for (y, params) in [(&y, &params[..]), (&z, &params[..4])] {
                let grads = backward(y, &dy)?;
                found.push(gradient(&grads, &x));
                let data = vars.data().lock().expect("no panic");
                found.extend(params.iter().map(|name| gradient(&grads, &data[*name])));
            }
            Ok(found)
        };
        for (after, before) in gradients(true)?.iter().zip(&gradients(false)?) {
            assert_same_bits("a pending gradient", after, before);
        }
    }
    Ok(())
}

/// An error leaves mean, variance and counter as they were.
#[test]
fn a_failed_forward_changes_no_state() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let batch = BatchNormOptions {
        refuse_non_finite: true,
        ..Default::default()
    };
    let batch = batch_norm(3, batch, vb.pp("batch"))?;
    let instance = InstanceNormOptions {
        track_running_stats: true,
        affine: Affine::WeightAndBias,
        refuse_non_finite: true,
        ..Default::default()
    };
    let instance = instance_norm(3, instance, vb.pp("instance"))?;
    let good = tensor(&Draw::new(3).normal(60), &[4, 3, 5], DType::F32)?;
    let switch = SwitchNormOptions {
        refuse_non_finite: true,
        ..Default::default()
    };
    let switch = switch_norm(3, switch, vb.pp("switch"))?;
    let layers: [&dyn ModuleT; 3] = [&batch, &instance, &switch];
    for layer in layers {
        layer.forward_t(&good, true)?;
    }
    let before = statistics(&vars);

    let mut poisoned = values(&good)?;
    poisoned[7] = f64::NAN;
    let mut infinite = values(&good)?;
    infinite[7] = f64::INFINITY;
    let bad = [
        tensor(&poisoned, &[4, 3, 5], DType::F32)?,
        tensor(&infinite, &[4, 3, 5], DType::F32)?,
        Tensor::zeros((4, 2, 5), DType::F32, &Device::Cpu)?,
        Tensor::zeros(3, DType::F32, &Device::Cpu)?,
        Tensor::zeros((1, 3, 1), DType::F32, &Device::Cpu)?,
        Tensor::zeros((4, 3, 5), DType::F64, &Device::Cpu)?,
        Tensor::zeros((4, 3, 5), DType::U32, &Device::Cpu)?,
    ];
    for x in bad {
        for layer in layers {
            assert!(
                layer.forward_t(&x, true).is_err(),
                "{:?} {:?}",
                x.dtype(),
                x.dims()
            );
            assert_unchanged(&vars, &before);
        }
    }
    // No device serves this dtype on a path that does not exist.
    let integers = Tensor::zeros((4, 3, 5), DType::U32, &Device::Cpu)?;
    for layer in layers {
        assert!(with_path(Path::Fused, || layer.forward_t(&integers, true)).is_err());
        assert_unchanged(&vars, &before);
    }

    // A model that fails in the middle of a recalibration.
    let mut batches_run = 0;
    let failed = recalibrate(&[&batch, &instance], [good.clone(), good.clone()], |x| {
        batches_run += 1;
        let y = batch.forward_t(x, true)?;
        match batches_run {
            1 => instance.forward_t(&y, true),
            _ => batch.forward_t(&y.narrow(1, 0, 1)?, true),
        }
    });
    assert!(failed.is_err() && batches_run == 2);
    assert_unchanged(&vars, &before);
    Ok(())
}

/// A checkpoint that is loaded, or a variable that is set, is what the layer goes on from.
#[test]
fn statistics_are_the_variables_of_the_model() -> Result<()> {
    let (layers, vars, x) = small_model(DType::F32)?;
    let var: Var = vars.data().lock().expect("no panic")["batch.running_mean"].clone();
    var.set(&Tensor::new(&[10f32, 20., 30.], &Device::Cpu)?)?;
    assert_eq!(values(&layers[0].snapshot().mean)?, [10., 20., 30.]);
    layers[0].forward_t(&x, true)?;
    let moved = values(&var)?;
    assert!(moved[2] > 20. && moved[2] < 30., "{moved:?}");
    assert_eq!(values(&layers[0].snapshot().mean)?, moved);
    Ok(())
}

/// A digest of everything that the layers give on inputs large enough to be split among threads.
fn digest() -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let table = (LAYERS.iter()).flat_map(|layer| shapes(layer.long));
    let table = table.map(|(kind, dims)| (kind, dims.to_vec()));
    let larger = [
        (Kind::Layer { axes: 1 }, vec![300, 1031]),
        (Kind::LayerChannelsFirst, vec![20, 16, 1031]),
        (
            Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            vec![4099, 64],
        ),
        (Kind::Group { groups: 2 }, vec![20, 16, 1031]),
        (Kind::Instance, vec![20, 16, 1031]),
        (Kind::Switch, vec![20, 16, 1031]),
        (Kind::Batch, vec![20, 16, 1031]),
        (Kind::Batch, vec![4099, 64]),
    ];
    for (kind, dims) in table.chain(larger) {
        let subject = Subject::new(kind, 1e-5);
        let params = subject.param_dims(&dims).iter().product();
        let mut draw = Draw::new(4);
        let n = dims.iter().product();
        let numbers = Numbers {
            x: draw.normal(n),
            dy: draw.normal(n),
            weight: Some(draw.weight(params)),
            bias: kind.has_bias().then(|| draw.normal(params)),
        };
        for dtype in [DType::F32, DType::BF16] {
            for (_, t) in numbers.run(subject, &dims, dtype.into())?.named() {
                bits(t)?.hash(&mut hasher);
            }
        }
    }
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let norm = batch_norm(64, 1e-5, vb)?;
    norm.forward_train(&tensor(
        &Draw::new(5).normal(64 * 4099),
        &[4099, 64],
        DType::F32,
    )?)?;
    for statistic in [norm.running_mean(), norm.running_var()] {
        bits(statistic)?.hash(&mut hasher);
    }
    let v = tensor(&Draw::new(6).normal(300 * 1031), &[300, 1031], DType::F32)?;
    let g = tensor(&Draw::new(7).weight(300), &[300, 1], DType::F32)?;
    bits(&ops::weight_norm(&v, &g, Some(0))?)?.hash(&mut hasher);
    Ok(hasher.finish())
}

/// The same inputs give the same bits on every run and for every number of threads.
///
/// The number of threads of a process is fixed once it has started any, so each is tried in a
/// process of its own.
#[test]
fn bits_do_not_depend_on_the_number_of_threads() -> Result<()> {
    const THREADS: &str = "RAYON_NUM_THREADS";
    const ASKED: &str = "CANDLE_NORM_TEST_DIGEST";
    const ANSWER: &str = "digest of all bits: ";
    let mine = format!("{ANSWER}{:x}", digest()?);
    if std::env::var_os(ASKED).is_some() {
        println!("{mine}");
        return Ok(());
    }
    for threads in ["1", "2", "7"] {
        let name = child::name(
            module_path!(),
            "bits_do_not_depend_on_the_number_of_threads",
        );
        let mut command = child::command(&name);
        let output = command.env(THREADS, threads).env(ASKED, "1").output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        let theirs = said
            .lines()
            .find_map(|line| line.find(ANSWER).map(|at| &line[at..]));
        assert_eq!(theirs, Some(mine.as_str()), "{threads} threads");
    }
    Ok(())
}
