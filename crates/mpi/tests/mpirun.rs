//! Ranks over MPI: this program starts itself by `mpirun`, oversubscribed and each time under a
//! time limit, and the ranks run one of the [`SCENARIOS`].
//!
//! ```sh
//! cargo test -p candle-norm-mpi --test mpirun            # all
//! cargo test -p candle-norm-mpi --test mpirun -- killed  # those with this in their name
//! CANDLE_NORM_MPI_STEPS=2000 cargo test -p candle-norm-mpi --test mpirun -- many_steps  # a soak
//! ```

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{ModuleT, Optimizer, SGD, VarBuilder, VarMap};
use candle_norm::distributed::{
    Call, Collective, Threads, assert_same, at_step, broadcast_vars, shard, sum_gradients,
};
use candle_norm::{BatchNorm, batch_norm, trainable_vars};
use candle_norm_mpi::{Checks, Options, run_with};

/// The environment variable that makes a rank of this program.
const SCENARIO: &str = "CANDLE_NORM_MPI_SCENARIO";

/// The environment variable with the number of steps of `many_steps`, and that number without it.
const STEPS: &str = "CANDLE_NORM_MPI_STEPS";
const FEW_STEPS: usize = 500;

/// Longest time of a job, for `FEW_STEPS`.
const LIMIT: Duration = Duration::from_secs(90);

/// Longest time until a job with a fault ends.
const END: Duration = Duration::from_secs(30);

/// The page with the messages of faults.
const PAGE: &str = include_str!("../../../docs/distributed.md");

/// A job: the program of the ranks, their number, and the expected end.
struct Scenario {
    name: &'static str,
    ranks: &'static [usize],
    options: fn() -> Options,
    run: fn(&Arc<dyn Collective>) -> Result<()>,
    ends: Ends,
}

/// How a job ends.
enum Ends {
    Well,
    /// Not well, and its output has all of these.
    Saying(&'static [&'static str]),
}

fn usual() -> Options {
    Options {
        time_limit: Duration::from_secs(60),
        checks: Checks::Always,
    }
}

fn unchecked() -> Options {
    Options {
        checks: Checks::First(0),
        ..usual()
    }
}

fn impatient() -> Options {
    Options {
        time_limit: Duration::from_secs(1),
        ..usual()
    }
}

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "every_kind_of_call",
        ranks: &[1, 2, 4],
        options: usual,
        run: every_kind_of_call,
        ends: Ends::Well,
    },
    Scenario {
        name: "every_kind_of_call_unchecked",
        ranks: &[4],
        options: unchecked,
        run: every_kind_of_call,
        ends: Ends::Well,
    },
    Scenario {
        name: "batch_norm_is_that_of_the_whole_batch",
        ranks: &[1, 2, 4],
        options: usual,
        run: batch_norm_is_that_of_the_whole_batch,
        ends: Ends::Well,
    },
    Scenario {
        name: "training_is_that_of_one_rank",
        ranks: &[1, 2, 4],
        options: usual,
        run: training_is_that_of_one_rank,
        ends: Ends::Well,
    },
    Scenario {
        name: "many_steps",
        ranks: &[4, 8],
        options: unchecked,
        run: many_steps,
        ends: Ends::Well,
    },
    Scenario {
        name: "a_slow_rank_is_waited_for",
        ranks: &[4],
        options: usual,
        run: |group| {
            for step in 0..4 {
                if group.rank() == step {
                    sleep(Duration::from_millis(200));
                }
                sum(group, "slow", 2)?;
            }
            Ok(())
        },
        ends: Ends::Well,
    },
    Scenario {
        name: "different_lengths",
        ranks: &[2, 4],
        options: usual,
        run: |group| sum(group, "gradients", 3 + group.rank() / (group.size() - 1)),
        ends: Ends::Saying(&[
            "a sum of 3 f64 by gradients of step 0 on rank 0",
            "a sum of 4 f64 by gradients of step 0 on rank",
        ]),
    },
    Scenario {
        name: "a_skipped_step",
        ranks: &[4],
        options: usual,
        run: |group| {
            for step in 0..8 {
                if !(group.rank() == 2 && step == 5) {
                    at_step(step, || sum(group, "loss", 1))?;
                }
            }
            Ok(())
        },
        ends: Ends::Saying(&["loss of step 5 on rank 0", "loss of step 6 on rank 2"]),
    },
    Scenario {
        name: "an_early_return",
        ranks: &[4],
        options: usual,
        run: |group| match group.rank() {
            3 => Ok(()),
            _ => sum(group, "loss", 1),
        },
        ends: Ends::Saying(&[
            "by loss of step 0 on rank 0",
            "the end of the run on rank 3",
        ]),
    },
    Scenario {
        name: "an_error",
        ranks: &[4],
        options: usual,
        run: |group| {
            if group.rank() == 1 {
                bail!("no such file")
            }
            sum(group, "loss", 1)
        },
        ends: Ends::Saying(&["rank 1 of 4 ends the job: no such file"]),
    },
    Scenario {
        name: "a_panic",
        ranks: &[4],
        options: usual,
        run: |group| {
            assert_ne!(group.rank(), 1, "on purpose");
            sum(group, "loss", 1)
        },
        ends: Ends::Saying(&["rank 1 of 4 ends the job: panicked", "on purpose"]),
    },
    Scenario {
        name: "a_killed_rank",
        ranks: &[4],
        options: usual,
        run: |group| {
            sum(group, "before", 1)?;
            if group.rank() == 2 {
                let pid = std::process::id().to_string();
                Command::new("kill").args(["-9", &pid]).status()?;
            }
            sum(group, "after", 1)
        },
        ends: Ends::Saying(&["signal 9"]),
    },
    Scenario {
        name: "a_rank_that_does_not_come",
        ranks: &[4],
        options: impatient,
        run: |group| {
            if group.rank() == 1 {
                sleep(LIMIT);
            }
            sum(group, "loss", 1)
        },
        ends: Ends::Saying(&["ends the job: waited 1", "by loss of step 0"]),
    },
];

fn sum(group: &Arc<dyn Collective>, name: &'static str, len: usize) -> Result<()> {
    let mut values = vec![1.; len];
    group.all_reduce_sum(&Call::new(name), &mut values)?;
    assert_eq!(values, vec![group.size() as f64; len]);
    Ok(())
}

fn every_kind_of_call(group: &Arc<dyn Collective>) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    for len in [0, 1, 5, 1000, 100_000] {
        let mut values: Vec<f64> = (0..len).map(|i| (i * (rank + 1)) as f64).collect();
        group.all_reduce_sum(&Call::new("f64"), &mut values)?;
        let ranks = size * (size + 1) / 2;
        assert!(
            values
                .iter()
                .enumerate()
                .all(|(i, v)| *v == (i * ranks) as f64)
        );
        let mut values = vec![rank as f32 + 0.5; len];
        group.all_reduce_sum_f32(&Call::new("f32"), &mut values)?;
        let total = (size * size) as f32 / 2.;
        assert!(values.iter().all(|v| *v == total), "{values:?}");
        let mut values = vec![f64::from_bits(7 + rank as u64); len];
        group.broadcast(&Call::new("first"), &mut values)?;
        assert!(values.iter().all(|v| v.to_bits() == 7));
    }
    let part = group.split(rank % 2)?;
    assert_eq!(
        (part.rank(), part.size()),
        (rank / 2, (size + 1 - rank % 2) / 2)
    );
    let mut ranks = [rank as f64];
    part.all_reduce_sum(&Call::new("part"), &mut ranks)?;
    let want: usize = (rank % 2..size).step_by(2).sum();
    assert_eq!(ranks, [want as f64]);
    sum(group, "whole", 3)
}

fn builder(vars: &VarMap, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, dtype, &Device::Cpu)
}

/// Values that look random, the same on every rank.
fn noise(dims: &[usize], dtype: DType) -> Result<Tensor> {
    let n: usize = dims.iter().product();
    let values: Vec<f64> = (0..n)
        .map(|i| ((i * i + 3 * i) as f64 * 0.7).sin())
        .collect();
    Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    if a.elem_count() == 0 {
        return Ok(0.);
    }
    (a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?
        .abs()?
        .max_all()?
        .to_scalar()
}

/// Uneven shares: the last rank has none, if there are several.
fn batch_norm_is_that_of_the_whole_batch(group: &Arc<dyn Collective>) -> Result<()> {
    let (rank, size) = (group.rank(), group.size());
    let bounds = |rank: usize| match size {
        1 => 13 * rank,
        _ => 13 * rank.min(size - 1) / (size - 1),
    };
    let (start, end) = (bounds(rank), bounds(rank + 1));
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 2e-6)] {
        let (x, dy) = (noise(&[13, 3, 5], dtype)?, noise(&[13, 3, 5], dtype)?);
        let train = |norm: &BatchNorm, x: &Tensor, dy: &Tensor| -> Result<(Tensor, Tensor)> {
            let x = Var::from_tensor(&x.force_contiguous()?)?;
            let y = norm.forward_t(&x, true)?;
            let grads = (&y * dy.sqr()?)?.sum_all()?.backward()?;
            let dx = grads.get(&x).cloned();
            Ok((y.detach(), dx.map_or(x.zeros_like(), Ok)?))
        };
        let (own, whole) = (VarMap::new(), VarMap::new());
        let norm = batch_norm(3, 1e-5, builder(&own, dtype))?.synchronized(group.clone());
        let plain = batch_norm(3, 1e-5, builder(&whole, dtype))?;
        let share = |t: &Tensor| t.narrow(0, start, end - start);
        let (y, dx) = train(&norm, &share(&x)?, &share(&dy)?)?;
        let (want_y, want_dx) = train(&plain, &x, &dy)?;
        assert!(difference(&y, &share(&want_y)?)? < tolerance);
        assert!(difference(&dx, &share(&want_dx)?)? < tolerance);
        assert!(difference(norm.running_mean(), plain.running_mean())? < tolerance);
        assert!(difference(norm.running_var(), plain.running_var())? < tolerance);
        assert_same(&**group, &own)?;
    }
    Ok(())
}

/// Losses of a linear layer and a batch norm, in `steps` steps of batches of 16.
fn losses(group: &Arc<dyn Collective>, steps: usize) -> Result<Vec<f64>> {
    let vars = VarMap::new();
    let vb = builder(&vars, DType::F64);
    let layer = candle_nn::linear(4, 3, vb.pp("layer"))?;
    let norm = batch_norm(3, 1e-5, vb.pp("norm"))?.synchronized(group.clone());
    for name in ["layer.weight", "layer.bias"] {
        let var = vars.data().lock().unwrap()[name].clone();
        var.set(&noise(var.dims(), DType::F64)?)?;
    }
    broadcast_vars(&**group, &vars)?;
    let trained = trainable_vars(&vars);
    let mut optimizer = SGD::new(trained.clone(), 0.1)?;
    let (x, target) = (noise(&[48, 4], DType::F64)?, noise(&[48, 3], DType::F64)?);
    let mut losses = vec![];
    for step in 0..steps {
        let loss = at_step(step as u64, || -> Result<f64> {
            let batch: Vec<u32> = (0..16).map(|i| ((16 * step + i) % 48) as u32).collect();
            let mine = shard(&batch, group.rank(), group.size())?;
            let mine = Tensor::new(mine, &Device::Cpu)?;
            let y = candle_nn::Module::forward(&layer, &x.index_select(&mine, 0)?)?;
            let away = (norm.forward_train(&y)? - target.index_select(&mine, 0)?)?;
            let loss = (away.sqr()?.sum_all()? / batch.len() as f64)?;
            let mut grads = loss.backward()?;
            sum_gradients(&**group, &trained, &mut grads)?;
            optimizer.step(&grads)?;
            let mut loss = [loss.to_scalar::<f64>()?];
            group.all_reduce_sum(&Call::new("loss"), &mut loss)?;
            Ok(loss[0])
        })?;
        losses.push(loss);
    }
    assert_same(&**group, &vars)?;
    Ok(losses)
}

fn training_is_that_of_one_rank(group: &Arc<dyn Collective>) -> Result<()> {
    let own = losses(group, 12)?;
    let whole = Threads::run(1, |alone| losses(&alone, 12))?.remove(0);
    for (own, whole) in own.iter().zip(&whole) {
        assert!((own - whole).abs() < 1e-12, "{own} {whole}");
    }
    assert!(own[11] < own[0]);
    Ok(())
}

fn steps() -> usize {
    let given = std::env::var(STEPS).ok().and_then(|text| text.parse().ok());
    given.unwrap_or(FEW_STEPS)
}

fn many_steps(group: &Arc<dyn Collective>) -> Result<()> {
    let own = losses(group, steps())?;
    let whole = Threads::run(1, |alone| losses(&alone, steps()))?.remove(0);
    for (own, whole) in own.iter().zip(&whole) {
        assert!((own - whole).abs() < 1e-9, "{own} {whole}");
    }
    Ok(())
}

/// The output of a job on `ranks` ranks, and whether it ended well.
fn job(scenario: &Scenario, ranks: usize) -> std::io::Result<(bool, String)> {
    let folder = std::env::temp_dir().join(format!("candle-norm-mpi-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let file = folder.join("output");
    let output = std::fs::File::create(&file)?;
    let mut job = Command::new("mpirun")
        .args(["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"])
        .args(["-n", &ranks.to_string()])
        .arg(std::env::current_exe()?)
        .env(SCENARIO, scenario.name)
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .env("RAYON_NUM_THREADS", "1")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()?;
    let limit = LIMIT * steps().div_ceil(FEW_STEPS) as u32;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = job.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > limit {
            job.kill()?;
            job.wait()?;
            break None;
        }
        sleep(Duration::from_millis(20));
    };
    let mut text = std::fs::read_to_string(&file)?;
    std::fs::remove_dir_all(&folder)?;
    if status.is_none() {
        text += &format!("\nnot done after {limit:?}");
    }
    Ok((status.is_some_and(|s| s.success()), text))
}

/// The difference between the end of a job and the expected one.
fn wrong(scenario: &Scenario, ended_well: bool, text: &str, time: Duration) -> Option<String> {
    match (&scenario.ends, ended_well) {
        (Ends::Saying(_), _) if time > END => Some(format!("it took {time:.1?} to end")),
        (Ends::Well, true) => None,
        (Ends::Well, false) => Some("it failed".into()),
        (Ends::Saying(_), true) => Some("it ended well".into()),
        (Ends::Saying(parts), false) => (parts.iter().find(|part| !text.contains(*part)))
            .map(|part| format!("no {part:?} in its output")),
    }
}

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(SCENARIO) {
        let Some(scenario) = SCENARIOS.iter().find(|s| s.name == name) else {
            return ExitCode::FAILURE;
        };
        let done = run_with((scenario.options)(), |group| (scenario.run)(&group));
        return ExitCode::from(u8::from(done.is_err()));
    }
    let filters: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let mut failures = 0;
    for scenario in SCENARIOS {
        let Ends::Saying(parts) = scenario.ends else {
            continue;
        };
        for part in parts.iter().filter(|part| !PAGE.contains(*part)) {
            failures += 1;
            println!(
                "test {} ... FAILED: docs/distributed.md lacks {part:?}",
                scenario.name
            );
        }
    }
    for scenario in SCENARIOS {
        if !filters.is_empty() && !filters.iter().any(|f| scenario.name.contains(f.as_str())) {
            continue;
        }
        for ranks in scenario.ranks {
            let start = Instant::now();
            let job = job(scenario, *ranks);
            let time = start.elapsed();
            let fault = match job {
                Ok((ended_well, text)) => {
                    wrong(scenario, ended_well, &text, time).map(|w| (w, text))
                }
                Err(e) => Some((format!("mpirun did not start ({e})"), String::new())),
            };
            match fault {
                None => println!(
                    "test {} on {ranks} ranks ... ok ({time:.1?})",
                    scenario.name
                ),
                Some((wrong, text)) => {
                    failures += 1;
                    println!(
                        "test {} on {ranks} ranks ... FAILED: {wrong}",
                        scenario.name
                    );
                    println!("{text}");
                }
            }
        }
    }
    println!("\n{failures} failed");
    ExitCode::from(u8::from(failures > 0))
}
