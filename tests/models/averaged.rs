//! Averages of weights are those of PyTorch's `AveragedModel` and of timm's warm-up, go into the
//! model and out of it, and into files.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{
    Average, AveragedModel, AveragedModelOptions, BatchNorm, Decay, Warmup, batch_norm, checkpoint,
    recalibrate,
};

use testkit::vars::state;

const CPU: Device = Device::Cpu;

/// The model of the fixture: `Sequential(Linear(3, 4), BatchNorm1d(4))`.
fn model(dtype: DType) -> Result<(VarMap, BatchNorm)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &CPU);
    candle_nn::linear(3, 4, vb.pp("0"))?;
    let norm = batch_norm(4, 1e-5, vb.pp("1"))?;
    Ok((vars, norm))
}

const STATISTICS: [&str; 3] = ["1.num_batches_tracked", "1.running_mean", "1.running_var"];

fn set(vars: &VarMap, values: impl Fn(&str) -> Tensor) {
    for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
        let value = values(name).to_dtype(var.dtype()).expect("a dtype");
        var.set(&value).expect("the shape of the variable");
    }
}

/// All variables at one number.
fn fill(vars: &VarMap, number: f64) {
    let shapes: HashMap<_, _> = (vars.data().lock().expect("no thread panicked").iter())
        .map(|(name, var)| (name.clone(), var.shape().clone()))
        .collect();
    set(vars, |name| {
        Tensor::full(number, &shapes[name], &CPU).expect("a tensor")
    });
}

struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn read() -> Result<Self> {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
            .join("tests/fixtures/checkpoints/averaged.safetensors");
        Ok(Self(candle_core::safetensors::load(path, &CPU)?))
    }

    fn get(&self, kind: &str, step: usize, name: &str) -> Tensor {
        self.0[&format!("{kind}.{step}.{name}")].clone()
    }

    /// Asserts that `vars`, all of them but one, have what PyTorch has after a step.
    fn check(
        &self,
        kind: &str,
        step: usize,
        vars: &VarMap,
        but: &str,
        tolerance: f64,
    ) -> Result<()> {
        for (name, got) in state(vars).into_iter().filter(|(name, _)| name != but) {
            let want = self.get(kind, step, &name).flatten_all()?;
            let want = want.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            for (got, want) in got.values.iter().zip(&want) {
                assert!(
                    (got - want).abs() <= tolerance * want.abs().max(0.1),
                    "{kind}, step {step}, {name}: {got}, in PyTorch {want}"
                );
            }
        }
        Ok(())
    }
}

fn warmup() -> AveragedModelOptions {
    let decay = Decay {
        decay: 0.33,
        warmup: Some(Warmup {
            gamma: 3.,
            power: 0.5,
        }),
        min_decay: 0.25,
        update_after: 1,
    };
    AveragedModelOptions {
        average: Average::Exponential(decay),
        average_statistics: true,
    }
}

#[test]
fn averages_are_those_of_pytorch_and_timm() -> Result<()> {
    let fixture = Fixture::read()?;
    let statistics = AveragedModelOptions {
        average_statistics: true,
        ..0.75.into()
    };
    for (kind, options) in [
        ("swa", Average::Equal.into()),
        ("ema", 0.75.into()),
        ("ema_statistics", statistics),
        ("warmup", warmup()),
    ] {
        for dtype in [DType::F32, DType::F64] {
            let (vars, _norm) = model(dtype)?;
            let mut averaged = AveragedModel::new(&vars, options)?;
            for step in 1..=6 {
                set(&vars, |name| fixture.get("model", step, name));
                averaged.update()?;
                assert_eq!(averaged.num_updates(), step as u64);
                // PyTorch cuts counters that it averages down to whole numbers; here they are
                // copied.
                let counter = "1.num_batches_tracked";
                assert_eq!(state(averaged.vars())[counter].values, [step as f64]);
                let but = if kind == "ema_statistics" {
                    counter
                } else {
                    ""
                };
                fixture.check(kind, step, averaged.vars(), but, 2e-6)?;
                // Averaging leaves the model alone.
                fixture.check("model", step, &vars, "", 0.)?;
            }
        }
    }
    Ok(())
}

#[test]
fn decays_follow_their_schedules() {
    let at = |average: Average, updates: [u64; 5]| updates.map(|n| average.decay_at(n));
    let constant = Decay {
        decay: 0.9,
        ..Default::default()
    };
    assert_eq!(
        at(Average::Exponential(constant), [1, 2, 3, 100, u64::MAX]),
        [0., 0.9, 0.9, 0.9, 0.9]
    );
    let late = Decay {
        update_after: 10,
        ..constant
    };
    assert_eq!(
        at(Average::Exponential(late), [1, 10, 11, 12, 13]),
        [0., 0., 0., 0.9, 0.9]
    );
    assert_eq!(
        at(Average::Equal, [0, 1, 2, 4, 5]),
        [0., 0., 0.5, 0.75, 0.8]
    );
    // With a power of 1 the warm-up is the plain mean.
    let mean = Decay {
        decay: 1.,
        warmup: Some(Warmup {
            gamma: 1.,
            power: 1.,
        }),
        ..Default::default()
    };
    for n in 1..50 {
        let difference = mean.at(n) - Average::Equal.decay_at(n);
        assert!(difference.abs() < 1e-15, "{n}: {difference}");
    }
    // timm's ModelEmaV3(decay=0.9999, use_warmup=True).get_decay(step)
    let timm = Decay {
        decay: 0.9999,
        warmup: Some(Warmup::default()),
        ..Default::default()
    };
    for (step, want) in [
        (0, 0.),
        (1, 0.),
        (2, 0.3700394750525634),
        (3, 0.5192501432308638),
        (10, 0.7845565309968117),
        (1000, 0.99),
        (900_000, 0.9998927234017105),
        (1_100_000, 0.9999),
    ] {
        assert!(
            (timm.at(step) - want).abs() < 1e-15,
            "{step}: {}",
            timm.at(step)
        );
    }
}

#[test]
fn half_precision_is_averaged_in_f32() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let (vars, _norm) = model(dtype)?;
        fill(&vars, 1.);
        let mut averaged = AveragedModel::new(&vars, 0.999)?;
        averaged.update()?;
        fill(&vars, 2.);
        // Each step is far below what the dtype resolves at 1: in it, nothing would ever move.
        for _ in 0..100 {
            averaged.update()?;
        }
        let want = 2. - 0.999f64.powi(100);
        for (name, average) in state(averaged.vars()) {
            let values = average.values;
            if STATISTICS.contains(&name.as_str()) {
                assert_eq!(values[0], 2., "{name}");
                continue;
            }
            assert_eq!(average.dtype, DType::F32, "{name}");
            assert!(
                (values[0] - want).abs() < 1e-5,
                "{dtype:?} {name}: {}, not {want}",
                values[0]
            );
        }
        // In the model they have its dtype.
        let rounded = Tensor::new(want, &CPU)?
            .to_dtype(dtype)?
            .to_dtype(DType::F64)?;
        averaged.swap_in()?;
        let inside = &state(&vars)["0.weight"];
        assert_eq!(inside.dtype, dtype);
        let off = inside.values[0] - rounded.to_scalar::<f64>()?;
        assert!(off.abs() <= 0.008, "{off}");
        averaged.swap_out()?;
        assert_eq!(state(&vars)["0.weight"].values[0], 2.);
        // And no rounding went into the average.
        assert!((state(averaged.vars())["0.weight"].values[0] - want).abs() < 1e-5);
    }
    Ok(())
}

#[test]
fn what_does_not_change_stays_to_the_bit() -> Result<()> {
    let (vars, _norm) = model(DType::F32)?;
    let before = state(&vars);
    for options in [Average::Equal.into(), 0.999.into(), warmup()] {
        let mut averaged = AveragedModel::new(&vars, options)?;
        assert_eq!(state(averaged.vars()), before, "until the first update");
        for _ in 0..50 {
            averaged.update()?;
        }
        assert_eq!(state(averaged.vars()), before);
    }
    Ok(())
}

#[test]
fn averages_are_in_the_model_for_as_long_as_a_function_runs() -> Result<()> {
    let (vars, _norm) = model(DType::F32)?;
    fill(&vars, 1.);
    let mut averaged = AveragedModel::new(&vars, 0.75)?;
    averaged.update()?;
    fill(&vars, 5.);
    averaged.update()?;
    let own = state(&vars);
    let inside = averaged.evaluate(|| Ok(state(&vars)))?;
    assert_eq!(inside["0.weight"].values[0], 2.);
    assert_eq!(inside["1.running_mean"].values[0], 5.);
    assert_eq!(state(&vars), own);

    let failed: Result<()> = averaged.evaluate(|| candle_core::bail!("no data"));
    let text = failed.expect_err("an error").to_string();
    assert!(text.starts_with("no data"), "{text}");
    assert_eq!(state(&vars), own, "after an error");
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        averaged.evaluate(|| -> Result<()> { panic!("of the user's own") })
    }));
    assert!(panicked.is_err());
    assert_eq!(state(&vars), own, "after a panic");
    averaged.update()?;
    assert_eq!(state(averaged.vars())["0.weight"].values[0], 2.75);
    Ok(())
}

#[test]
fn a_model_built_from_the_averages_follows_them() -> Result<()> {
    let (vars, _norm) = model(DType::F32)?;
    let mut averaged = AveragedModel::new(&vars, 0.5)?;
    let vb = VarBuilder::from_varmap(averaged.vars(), DType::F32, &CPU);
    let norm = batch_norm(4, 1e-5, vb.pp("1"))?;
    fill(&vars, 3.);
    averaged.update()?;
    assert_eq!(norm.running_mean().to_vec1::<f32>()?, [3.; 4]);
    assert_eq!(averaged.vars().all_vars().len(), vars.all_vars().len());
    Ok(())
}

#[test]
fn statistics_computed_for_the_averages_stay_with_them() -> Result<()> {
    for average_statistics in [false, true] {
        let (vars, norm) = model(DType::F32)?;
        let options = AveragedModelOptions {
            average_statistics,
            ..Average::Equal.into()
        };
        let mut averaged = AveragedModel::new(&vars, options)?;
        averaged.update()?;
        let own = state(&vars);
        let batch = Tensor::new(&[[1f32, 2., 3., 4.], [3., 4., 5., 6.]], &CPU)?;
        averaged.evaluate(|| recalibrate(&[&norm], [batch], |x| norm.forward_t(x, true)))?;
        assert_eq!(state(&vars), own);
        let kept = state(averaged.vars());
        assert_eq!(kept["1.running_mean"].values, [2., 3., 4., 5.]);
        assert_eq!(kept["1.running_var"].values, [2.; 4]);
        assert_eq!(kept["1.num_batches_tracked"].values, [1.]);
        for (name, value) in &own {
            assert!(
                STATISTICS.contains(&name.as_str()) || kept[name] == *value,
                "{name}"
            );
        }
    }
    Ok(())
}

#[test]
fn a_file_goes_on_where_it_was_saved_and_loads_as_a_model() -> Result<()> {
    let fixture = Fixture::read()?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("averaged.safetensors");
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for options in [Average::Equal.into(), 0.75.into(), warmup()] {
            let (vars, _norm) = model(dtype)?;
            let mut straight = AveragedModel::new(&vars, options)?;
            let mut first = AveragedModel::new(&vars, options)?;
            for step in 1..=3 {
                set(&vars, |name| fixture.get("model", step, name));
                straight.update()?;
                first.update()?;
            }
            first.save(&path)?;
            let (again, _norm) = model(dtype)?;
            let mut second = AveragedModel::new(&again, options)?;
            second.load(&path)?;
            assert_eq!(second.num_updates(), 3);
            assert_eq!(state(second.vars()), state(straight.vars()));
            for step in 4..=6 {
                set(&vars, |name| fixture.get("model", step, name));
                set(&again, |name| fixture.get("model", step, name));
                straight.update()?;
                second.update()?;
            }
            assert_eq!(
                state(second.vars()),
                state(straight.vars()),
                "{dtype:?} {options:?}"
            );

            // As a model, of any dtype.
            let (plain, _norm) = model(dtype)?;
            let _ = checkpoint::load_into_strict(&plain, &path)?;
            first.swap_in()?;
            assert_eq!(state(&plain), state(&vars));
            first.swap_out()?;
        }
    }
    assert_eq!(
        std::fs::read_dir(folder.path())?.count(),
        1,
        "nothing unfinished is left"
    );
    Ok(())
}

#[test]
fn a_file_saved_while_the_averages_are_in_the_model_has_their_statistics() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("averaged.safetensors");
    let (vars, norm) = model(DType::F32)?;
    let mut averaged = AveragedModel::new(&vars, Average::Equal)?;
    averaged.update()?;
    averaged.swap_in()?;
    let batch = Tensor::new(&[[1f32, 2., 3., 4.], [3., 4., 5., 6.]], &CPU)?;
    recalibrate(&[&norm], [batch], |x| norm.forward_t(x, true))?;
    averaged.save(&path)?;
    let saved = candle_core::safetensors::load(&path, &CPU)?;
    assert_eq!(saved["1.running_mean"].to_vec1::<f32>()?, [2., 3., 4., 5.]);
    Ok(())
}

/// Asserts that `call` fails with `says`, and that neither the model nor the averages change.
#[track_caller]
fn refused(
    averaged: &mut AveragedModel,
    vars: &VarMap,
    says: &[&str],
    call: impl FnOnce(&mut AveragedModel) -> Result<()>,
) {
    let before = (state(vars), state(averaged.vars()), averaged.num_updates());
    let text = call(averaged).expect_err("a refusal").to_string();
    for part in says {
        assert!(text.contains(part), "{text:?} should say {part:?}");
    }
    let after = (state(vars), state(averaged.vars()), averaged.num_updates());
    assert_eq!(before, after, "nothing changes");
}

#[test]
fn calls_out_of_order_are_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("averaged.safetensors");
    let (vars, _norm) = model(DType::F32)?;
    let mut averaged = AveragedModel::new(&vars, 0.5)?;
    averaged.update()?;
    fill(&vars, 4.);
    averaged.save(&path)?;
    refused(&mut averaged, &vars, &["swap_out after swap_in"], |a| {
        a.swap_out()
    });
    averaged.swap_in()?;
    let says = ["AveragedModel: expected", "swap_out first"];
    refused(&mut averaged, &vars, &says, |a| a.swap_in());
    refused(&mut averaged, &vars, &says, |a| a.update());
    refused(&mut averaged, &vars, &says, |a| a.load(&path));
    refused(&mut averaged, &vars, &says, |a| a.evaluate(|| Ok(())));
    averaged.swap_out()?;
    assert_eq!(state(&vars)["0.weight"].values[0], 4.);
    refused(
        &mut averaged,
        &vars,
        &["decay between 0 and 1", "1.5"],
        |a| a.update_with(1.5),
    );
    refused(&mut averaged, &vars, &["got NaN"], |a| {
        a.update_with(f64::NAN)
    });
    averaged.update_with(1.)?;
    Ok(())
}

#[test]
fn another_model_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("file.safetensors");
    let (vars, _norm) = model(DType::F32)?;
    let mut averaged = AveragedModel::new(&vars, 0.5)?;
    // A checkpoint without a number of updates, a file of another model, and none.
    vars.save(&path)?;
    refused(
        &mut averaged,
        &vars,
        &["file.safetensors", "AveragedModel::new"],
        |a| a.load(&path),
    );
    let other = VarMap::new();
    VarBuilder::from_varmap(&other, DType::F32, &CPU).get(2, "other")?;
    AveragedModel::new(&other, 0.5)?.save(&path)?;
    refused(&mut averaged, &vars, &["file.safetensors", "other"], |a| {
        a.load(&path)
    });
    let absent = folder.path().join("absent.safetensors");
    refused(&mut averaged, &vars, &["absent.safetensors"], |a| {
        a.load(&absent)
    });
    std::fs::write(&path, b"no such file")?;
    refused(&mut averaged, &vars, &["file.safetensors"], |a| {
        a.load(&path)
    });

    // A layer that is built later.
    VarBuilder::from_varmap(&vars, DType::F32, &CPU).get(2, "late.weight")?;
    let says = ["late.weight", "before AveragedModel::new"];
    refused(&mut averaged, &vars, &says, |a| a.update());
    refused(&mut averaged, &vars, &says, |a| a.swap_in());
    vars.data()
        .lock()
        .expect("no thread panicked")
        .remove("late.weight");
    averaged.update()?;
    vars.data()
        .lock()
        .expect("no thread panicked")
        .remove("0.bias");
    refused(&mut averaged, &vars, &["0.bias"], |a| a.update());
    Ok(())
}

/// Options of load_with cannot be set here.
#[test]
fn the_remedy_for_a_file_of_another_model_is_its_own() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("file.safetensors");
    let (vars, _norm) = model(DType::F32)?;
    let mut averaged = AveragedModel::new(&vars, 0.5)?;
    for (outputs, name) in [(5, "0"), (4, "module.0")] {
        let other = VarMap::new();
        let vb = VarBuilder::from_varmap(&other, DType::F32, &CPU);
        candle_nn::linear(3, outputs, vb.pp(name))?;
        AveragedModel::new(&other, 0.5)?.save(&path)?;
        let before = state(averaged.vars());
        let text = averaged.load(&path).expect_err("a refusal").to_string();
        assert!(
            text.contains("make the AveragedModel of the model"),
            "{text}"
        );
        assert!(!text.contains("LoadOptions"), "{text}");
        assert_eq!(state(averaged.vars()), before);
    }
    Ok(())
}

/// As Archive writes: each writer has a file of its own until it is whole.
#[test]
fn threads_may_save_to_one_path() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("averaged.safetensors");
    let (vars, _norm) = model(DType::F32)?;
    let averaged = AveragedModel::new(&vars, 0.5)?;
    std::thread::scope(|scope| {
        let save = || (0..25).try_for_each(|_| averaged.save(&path));
        let writers: Vec<_> = (0..4).map(|_| scope.spawn(save)).collect();
        for writer in writers {
            let outcome = writer.join().expect("no panic");
            outcome.unwrap_or_else(|e| panic!("{e}"));
        }
    });
    AveragedModel::new(&vars, 0.5)?.load(&path)?;
    assert_eq!(std::fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}

#[test]
fn a_swap_that_fails_changes_nothing_and_can_be_made_again() -> Result<()> {
    let replace = |vars: &VarMap, name: &str, var: Var| -> Var {
        let mut vars = vars.data().lock().expect("no thread panicked");
        vars.insert(name.to_string(), var).expect("a variable")
    };
    let (vars, _norm) = model(DType::F32)?;
    fill(&vars, 1.);
    let mut averaged = AveragedModel::new(&vars, 0.5)?;
    averaged.update()?;
    fill(&vars, 2.);
    let own = state(&vars);
    let names: Vec<String> = own.keys().cloned().collect();
    for name in &names {
        // candle sets no variable to itself.
        let average = averaged.vars().data().lock().expect("no panic")[name].clone();
        let var = replace(&vars, name, average);
        let shared = state(&vars);
        let averages = state(averaged.vars());
        averaged.swap_in().expect_err("a refusal");
        assert_eq!(state(&vars), shared, "{name}");
        assert_eq!(state(averaged.vars()), averages, "{name}");
        replace(&vars, name, var);
        averaged.update_with(1.)?;
    }
    assert_eq!(state(&vars), own);

    averaged.swap_in()?;
    let (inside, averages) = (state(&vars), state(averaged.vars()));
    for name in &names {
        for other in [
            Tensor::zeros((7, 7), DType::F32, &CPU)?,
            Tensor::zeros(own[name].values.len(), DType::U8, &CPU)?,
        ] {
            let var = replace(&vars, name, Var::from_tensor(&other)?);
            let text = averaged.swap_out().expect_err("a refusal").to_string();
            assert!(text.contains(name), "{text}");
            replace(&vars, name, var);
            assert_eq!(state(&vars), inside, "{name}");
            assert_eq!(state(averaged.vars()), averages, "{name}");
        }
    }
    averaged.swap_out()?;
    assert_eq!(state(&vars), own);
    assert_eq!(state(averaged.vars()), averages);
    Ok(())
}

#[test]
fn a_schedule_converts_into_options() -> Result<()> {
    let decay = Decay {
        decay: 0.5,
        update_after: 2,
        ..Default::default()
    };
    let options = AveragedModelOptions::from(decay);
    assert_eq!(options, Average::Exponential(decay).into());
    let (vars, _norm) = model(DType::F32)?;
    AveragedModel::new(&vars, decay)?.update()
}

/// A misspelt option would be a default that nobody asked for.
#[cfg(feature = "serde")]
#[test]
fn unknown_options_are_refused() {
    let read = serde_json::from_str::<AveragedModelOptions>;
    let options = concat!(
        r#"{"average":{"exponential":{"decay":0.9,"warmup":{"gamma":2.0}}},"#,
        r#""average_statistics":true}"#
    );
    let options = read(options).expect("options");
    assert!(options.average_statistics);
    assert_eq!(read("{}").expect("options"), Default::default());
    for (text, field) in [
        (r#"{"average_statistic":true}"#, "average_statistic"),
        (r#"{"average":{"exponential":{"dcay":0.9}}}"#, "dcay"),
        (
            r#"{"average":{"exponential":{"warmup":{"gama":2.0}}}}"#,
            "gama",
        ),
        (r#"{"average":{"equally":null}}"#, "equally"),
    ] {
        let error = read(text).expect_err("a refusal").to_string();
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn options_out_of_range_are_refused() -> Result<()> {
    let (vars, _norm) = model(DType::F32)?;
    // A least decay above the decay is what neither says.
    for warmup in [None, Some(Warmup::default())] {
        let options = Decay {
            decay: 0.9,
            warmup,
            min_decay: 0.95,
            ..Default::default()
        };
        let error = AveragedModel::new(&vars, options).expect_err("a refusal");
        let error = error.to_string();
        for part in ["AveragedModel: expected min_decay", "decay, 0.9", "0.95"] {
            assert!(error.contains(part), "{error}");
        }
        let equal = Decay {
            min_decay: 0.9,
            ..options
        };
        AveragedModel::new(&vars, equal)?;
    }
    for decay in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let error = AveragedModel::new(&vars, decay).expect_err("a refusal");
        assert!(
            error.to_string().contains("decay between 0 and 1"),
            "{error}"
        );
        let options = Decay {
            min_decay: decay,
            ..Default::default()
        };
        let error =
            AveragedModel::new(&vars, Average::Exponential(options)).expect_err("a refusal");
        assert!(
            error.to_string().contains("min_decay between 0 and 1"),
            "{error}"
        );
    }
    for warmup in [
        Warmup {
            gamma: 0.,
            ..Default::default()
        },
        Warmup {
            gamma: f64::NAN,
            ..Default::default()
        },
        Warmup {
            power: -1.,
            ..Default::default()
        },
    ] {
        let options = Decay {
            warmup: Some(warmup),
            ..Default::default()
        };
        let error =
            AveragedModel::new(&vars, Average::Exponential(options)).expect_err("a refusal");
        assert!(error.to_string().contains("warm-up"), "{error}");
    }
    let error = AveragedModel::new(&VarMap::new(), 0.5).expect_err("a refusal");
    assert!(
        error.to_string().contains("build the model first"),
        "{error}"
    );
    Ok(())
}
