//! Measurements of a rank, in jobs that this program starts of itself by `mpirun`.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Error, Result, Tensor, Var, bail};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::distributed::{Call, Collective, Threads};
use candle_norm::{BatchNorm, batch_norm};
use candle_norm_mpi::{Checks, Options, run_with};

/// The environment variable that makes a rank of this program.
pub(crate) const JOB: &str = "CANDLE_NORM_MPI_COSTS";

/// Values of the sums: what batch norms of 1 to 2048 channels send, and a bucket of gradients.
pub(crate) const VALUES: [usize; 7] = [2, 64, 256, 1024, 4096, 16_384, 131_072];

/// Channels of the batch norms of a stack, one after the other, on inputs of
/// `[BATCH, channels, SIDE, SIDE]`.
pub(crate) const STACK: [usize; 8] = [64, 64, 128, 128, 256, 256, 512, 512];
const BATCH: usize = 4;
const SIDE: usize = 7;

/// A thing to measure, by its name in [`JOB`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Job {
    /// Pairs of bytes and seconds of an all-reduce.
    Calls,
    /// The same, compared between the ranks as the first calls of a run are.
    CheckedCalls,
    /// Seconds of a step of the stack, synchronized.
    Stack,
    /// The same without a group.
    LocalStack,
}

impl Job {
    const ALL: [(&str, Self); 4] = [
        ("calls", Self::Calls),
        ("checked_calls", Self::CheckedCalls),
        ("stack", Self::Stack),
        ("local_stack", Self::LocalStack),
    ];

    fn name(self) -> &'static str {
        let found = Self::ALL.iter().find(|(_, job)| *job == self);
        found.map_or("", |(name, _)| name)
    }

    /// A rank of the job named `name`: rank 0 prints what it measured.
    pub(crate) fn run(name: &str) -> Result<()> {
        let Some((_, job)) = Self::ALL.iter().find(|(found, _)| *found == name) else {
            bail!("no job has the name {name}")
        };
        let options = Options {
            checks: match job {
                Self::CheckedCalls => Checks::Always,
                _ => Checks::First(0),
            },
            ..Default::default()
        };
        run_with(options, |group| {
            let times = match job {
                Self::Calls | Self::CheckedCalls => calls(&group)?,
                Self::Stack => vec![(0., stack(&group, true)?)],
                Self::LocalStack => vec![(0., stack(&group, false)?)],
            };
            if group.rank() == 0 {
                for (bytes, seconds) in times {
                    println!("{bytes} {seconds}");
                }
            }
            Ok(())
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Bytes and seconds of sums, each the median of many.
fn calls(group: &Arc<dyn Collective>) -> Result<Vec<(f64, f64)>> {
    let mut times = vec![];
    for values in VALUES {
        let mut numbers = vec![1.; values];
        let repeats = if values > 10_000 { 100 } else { 1000 };
        let mut seconds = vec![];
        for repeat in 0..repeats + repeats / 10 {
            numbers.fill(1.);
            let start = Instant::now();
            group.all_reduce_sum(&Call::new("cost"), &mut numbers)?;
            if repeat >= repeats / 10 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        times.push((8. * values as f64, median(seconds)));
    }
    Ok(times)
}

/// [`calls`] of ranks that are threads.
pub(crate) fn calls_of_threads(ranks: usize) -> Result<Vec<(f64, f64)>> {
    Ok(Threads::run(ranks, |group| calls(&group))?.swap_remove(0))
}

/// The median seconds of forward and backward of the stack.
fn stack(group: &Arc<dyn Collective>, is_synchronized: bool) -> Result<f64> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let layers = STACK.iter().enumerate().map(|(i, channels)| {
        let norm = batch_norm(*channels, 1e-5, vb.pp(i))?;
        let dims = (BATCH, *channels, SIDE, SIDE);
        let x = Var::from_tensor(&Tensor::randn(0f32, 1., dims, &Device::Cpu)?)?;
        let norm = match is_synchronized {
            true => norm.synchronized(group.clone()),
            false => norm,
        };
        Ok((norm, x))
    });
    let layers: Vec<(BatchNorm, Var)> = layers.collect::<Result<_>>()?;
    let mut seconds = vec![];
    for step in 0..220 {
        let start = Instant::now();
        // Each layer has an input of its own: they have different numbers of channels.
        let mut loss = Tensor::new(0f32, &Device::Cpu)?;
        for (norm, x) in &layers {
            loss = (loss + (norm.forward_train(x)? * x.as_tensor())?.mean_all()?)?;
        }
        loss.backward()?;
        if step >= 20 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(median(seconds))
}

/// A command of one rank, or of several by `mpirun`, with one thread each. Ranks that wait leave
/// the processor to others.
pub(crate) fn command(program: &Path, ranks: usize) -> Command {
    let mut command = match ranks {
        1 => Command::new(program),
        _ => {
            let mut mpirun = Command::new("mpirun");
            mpirun
                .args(["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"])
                .args(["-n", &ranks.to_string()])
                .arg(program);
            mpirun
        }
    };
    command
        .env("RAYON_NUM_THREADS", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT", "1")
        .env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    command
}

/// The output of `program`, started `times` times at once: that of the first.
pub(crate) fn output(times: usize, mut command: impl FnMut() -> Command) -> Result<String> {
    let started: Vec<Child> = (0..times)
        .map(|_| Ok(command().spawn()?))
        .collect::<Result<_>>()?;
    let mut texts = vec![];
    for child in started {
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("a job failed: {:?} ended with {}", command(), output.status)
        }
        texts.push(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Ok(texts.swap_remove(0))
}

/// Measurements of a job of so many ranks, started `times` times at once.
pub(crate) fn measured(job: Job, ranks: usize, times: usize) -> Result<Vec<(f64, f64)>> {
    let program = std::env::current_exe()?;
    let text = output(times, || {
        let mut command = command(&program, ranks);
        command.env(JOB, job.name());
        command
    })?;
    let pair = |line: &str| {
        let (bytes, seconds) = line.split_once(' ')?;
        Some((bytes.parse().ok()?, seconds.parse().ok()?))
    };
    let pairs: Option<Vec<_>> = text.lines().map(pair).collect();
    pairs.ok_or_else(|| Error::msg(format!("{job:?} printed {text:?}")))
}
