//! Costs of sums over ranks: measured on this machine, fitted by a model, and what the model says
//! about a thousand ranks.
//!
//! ```text
//! cargo build --release -p candle-norm-mpi --examples
//! target/release/examples/costs measured     # all-reduce times, and the model's two numbers
//! target/release/examples/costs predicted    # steps of training, beside what the model says
//! target/release/examples/costs scaled       # ResNet-50 on 64, 1024 and 4096 ranks: no MPI needed
//! cargo test -p candle-norm-mpi --example costs
//! ```
//!
//! On a machine that does something else too, start the first two by `chrt -f 5`: a rank that waits
//! then yields to the other ranks alone.

mod measure;
mod model;
mod resnet;

use std::path::Path;
use std::process::ExitCode;

use candle_core::{Error, Result, bail};
use clap::{Parser, Subcommand};

use measure::{Job, STACK, calls_of_threads, command, measured, output};
use model::{Cluster, Link, all_reduce};
use resnet::{Forward, Step, backward_bytes, forward_bytes};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures sums over ranks, and says what they cost on others.
#[derive(Debug, Parser)]
struct Options {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
enum Part {
    /// All-reduce times of MPI and of threads on this machine
    Measured,
    /// Times of training steps, measured and by the model
    Predicted,
    /// A step of ResNet-50 on many ranks, by the model
    Scaled,
}

/// Ranks that are measured.
const RANKS: [usize; 3] = [1, 2, 4];

/// Largest difference of a prediction from what was measured.
const TOLERANCE: f64 = 0.3;

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How many ranks a processor has.
fn share_of_processors(ranks: usize) -> f64 {
    (ranks as f64 / processors() as f64).max(1.)
}

fn in_words(link: Link) -> String {
    format!(
        "α = {:.2} µs, β = {:.3} ns for a byte",
        1e6 * link.alpha,
        1e9 * link.beta
    )
}

fn measured_calls() -> Result<()> {
    println!(
        "Microseconds of an all-reduce, on {} processors:\n",
        processors()
    );
    let mut columns = vec![];
    for ranks in RANKS {
        columns.push((format!("MPI, {ranks}"), measured(Job::Calls, ranks, 1)?));
    }
    let checked = measured(Job::CheckedCalls, 2, 1)?;
    columns.push(("MPI, 2, compared".into(), checked));
    for ranks in RANKS {
        columns.push((format!("threads, {ranks}"), calls_of_threads(ranks)?));
    }
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    println!("| bytes | {} |", names.join(" | "));
    println!("| --- |{}", " --- |".repeat(columns.len()));
    for row in 0..columns[0].1.len() {
        let times = columns
            .iter()
            .map(|(_, times)| format!("{:.1}", 1e6 * times[row].1));
        let times: Vec<String> = times.collect();
        println!("| {} | {} |", columns[0].1[row].0, times.join(" | "));
    }
    println!();
    for (name, times) in columns {
        println!("{name}: {}", in_words(Link::fit(&times)));
    }
    Ok(())
}

/// Bytes of the calls of a step of `train_distributed`.
fn calls_of_training() -> Vec<f64> {
    let norms = [8, 16];
    let mut calls = vec![];
    for channels in norms {
        calls.extend(forward_bytes(Forward::TwoCalls, channels));
        calls.push(backward_bytes(channels));
    }
    // Of `sum_gradients`: whether a rank failed, a digest, whether it is the same, which gradients
    // there are, and the gradients.
    let parameters = 8 * 9 + 16 * 8 * 9 + 10 * 16 + 10 + 2 * (8 + 16);
    calls.extend([16., 16., 8., 64., 4. * parameters as f64]);
    // The loss.
    calls.push(8.);
    calls
}

/// Bytes of the calls of a step of the stack.
fn calls_of_stack() -> Vec<f64> {
    let layers = STACK.iter().flat_map(|channels| {
        let mut calls = forward_bytes(Forward::TwoCalls, *channels);
        calls.push(backward_bytes(*channels));
        calls
    });
    layers.collect()
}

/// Seconds of a step of `train_distributed`, started `times` times at once.
fn training(program: &Path, ranks: usize, batch: usize, times: usize) -> Result<f64> {
    let text = output(times, || {
        let mut command = command(program, ranks);
        command.args(["--batch", &batch.to_string()]);
        command
    })?;
    let milliseconds = text.split(" ms a step").next().and_then(|before| {
        let number = before.rsplit(' ').next()?;
        number.parse::<f64>().ok()
    });
    match milliseconds {
        Some(milliseconds) => Ok(1e-3 * milliseconds),
        None => Err(Error::msg(format!("train_distributed printed {text:?}"))),
    }
}

/// All-reduce times of this machine. Where ranks share processors, a round costs what the system
/// takes to switch between them, and the line is fitted at that number of ranks.
struct Here {
    /// Between two ranks.
    link: Link,
    /// Of whole calls, by the number of ranks.
    shared: Vec<(usize, Link)>,
}

impl Here {
    fn measured(job: Job) -> Result<Self> {
        let shared = RANKS.into_iter().filter(|ranks| *ranks > processors());
        let fit = |ranks| Ok((ranks, Link::fit(&measured(job, ranks, 1)?)));
        Ok(Self {
            link: Link::fit(&measured(job, 2, 1)?),
            shared: shared.map(fit).collect::<Result<_>>()?,
        })
    }

    fn print(&self, what: &str) {
        println!("{what}, between 2 ranks: {}", in_words(self.link));
        for (ranks, link) in &self.shared {
            println!("{what}, of {ranks} ranks: {}", in_words(*link));
        }
    }

    /// The seconds of calls of so many bytes.
    fn calls(&self, ranks: usize, bytes: &[f64]) -> f64 {
        let shared = self.shared.iter().find(|(of, _)| *of == ranks);
        let call = |bytes: &f64| match shared {
            Some((_, link)) => link.message(*bytes),
            None => all_reduce(self.link, ranks, *bytes),
        };
        bytes
            .iter()
            .map(call)
            .fold(0., |sum, seconds| sum + seconds)
    }
}

fn predicted_steps() -> Result<()> {
    let plain = Here::measured(Job::Calls)?;
    let compared = Here::measured(Job::CheckedCalls)?;
    plain.print("All-reduce");
    compared.print("All-reduce that is compared");
    println!();
    let program = std::env::current_exe()?.with_file_name("train_distributed");
    if !program.exists() {
        bail!("{}: build it first, with --examples", program.display())
    }
    println!("| run | ranks | alone, ms | calls, ms | predicted, ms | measured, ms | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut worst = 0f64;
    let mut row = |run: &str, ranks: usize, alone: f64, calls: f64, measured: f64| {
        let predicted = share_of_processors(ranks) * alone + calls;
        let ratio = predicted / measured;
        worst = worst.max((ratio - 1.).abs());
        println!(
            "| {run} | {ranks} | {:.3} | {:.3} | {:.3} | {:.3} | {ratio:.2} |",
            1e3 * alone,
            1e3 * calls,
            1e3 * predicted,
            1e3 * measured
        );
    };
    for ranks in RANKS {
        // As many at once as there are processors, as in the run: they share caches and memory.
        let at_once = ranks.min(processors());
        let alone = training(&program, 1, 32 / ranks, at_once)?;
        let measured = training(&program, ranks, 32, 1)?;
        let calls = compared.calls(ranks, &calls_of_training());
        row("train_distributed", ranks, alone, calls, measured);
    }
    for ranks in RANKS {
        let at_once = ranks.min(processors());
        let alone = measured(Job::LocalStack, 1, at_once)?[0].1;
        let synchronized = measured(Job::Stack, ranks, 1)?[0].1;
        let calls = plain.calls(ranks, &calls_of_stack());
        row("stack", ranks, alone, calls, synchronized);
    }
    if worst > TOLERANCE {
        bail!("a prediction differs by {:.0} %", 100. * worst)
    }
    Ok(())
}

/// Networks that a cluster may have.
fn clusters() -> [(&'static str, Cluster); 2] {
    // Between the ranks of a host, through its memory.
    let inside = Link {
        alpha: 1e-6,
        beta: 1e-10,
    };
    let cluster = |alpha, gigabytes: f64| Cluster {
        ranks_per_host: 8,
        inside,
        between: Link {
            alpha,
            beta: 1e-9 / gigabytes,
        },
    };
    [
        ("2 µs, 12.5 GB/s", cluster(2e-6, 12.5)),
        ("25 µs, 1.25 GB/s", cluster(25e-6, 1.25)),
    ]
}

fn scaled() {
    for (jitter, how) in [(0., "alike"), (0.05, "up to 5 % slower between two sums")] {
        println!(
            "Milliseconds that synchronized statistics add to a step of ResNet-50, 300 ms a rank, \
            8 ranks on a host; the ranks are {how}:\n"
        );
        println!(
            "| between hosts | ranks | step without, ms | two calls | one call | two calls, groups \
            of 32 | two calls, groups of 8 | one call, groups of 8 |"
        );
        println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
        for (name, cluster) in clusters() {
            for ranks in [64, 1024, 4096] {
                scaled_row(name, &cluster, ranks, jitter);
            }
        }
        println!();
    }
}

fn scaled_row(name: &str, cluster: &Cluster, ranks: usize, jitter: f64) {
    let seconds = |forward, group| {
        let step = Step {
            ranks,
            forward,
            group,
            compute: 0.3,
            jitter,
        };
        resnet::step(cluster, &step)
    };
    let without = seconds(Forward::Local, ranks);
    let added = [
        (Forward::TwoCalls, ranks),
        (Forward::OneCall, ranks),
        (Forward::TwoCalls, 32),
        (Forward::TwoCalls, 8),
        (Forward::OneCall, 8),
    ]
    .map(|(forward, group)| format!("{:.1}", 1e3 * (seconds(forward, group) - without)));
    println!(
        "| {name} | {ranks} | {:.0} | {} |",
        1e3 * without,
        added.join(" | ")
    );
}

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(measure::JOB) {
        return ExitCode::from(u8::from(Job::run(&name).is_err()));
    }
    let done = match Options::parse().part {
        Part::Measured => measured_calls(),
        Part::Predicted => predicted_steps(),
        Part::Scaled => {
            scaled();
            Ok(())
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{}", e.to_string().lines().next().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
