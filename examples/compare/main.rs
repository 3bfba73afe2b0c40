//! Training one small classifier of handwritten digits with each kind of normalization.
//!
//!     cargo run --release --example compare
//!     cargo run --release --example compare -- --norm none,batch,group:4 --lr 0.05
//!     cargo run --release --features cuda --example compare -- --device cuda
//!
//! Every kind has the same initial weights and the same images in the same order, for several
//! seeds. The example prints a table. It writes a report with the curves of accuracy, loss and
//! gradient norms (HTML, and the numbers as CSV).
//!
//! To compare on your own data and network, change two files. `data.rs` loads the images.
//! `model.rs` is the network, whose layers are built through a `NormConfig`, so the norm is a
//! value. `train.rs` is the training loop.

#[path = "../common/axis.rs"]
mod axis;
#[path = "../common/mod.rs"]
mod common;
mod curves;
mod data;
#[path = "../common/device.rs"]
mod device;
mod figures;
mod files;
mod findings;
mod model;
mod options;
#[path = "../common/palette.rs"]
mod palette;
#[path = "../common/plot.rs"]
mod plot;
mod report;
mod summary;
mod train;

use clap::Parser;
use data::Digits;
use files::{Files, write_steps, write_summary};
use findings::{findings, table};
use options::Options;
use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use summary::{Summary, Variant};
use train::{Run, Settings, train};

/// Candle allocates the result of every operation: the allocator is a good part of a step's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || compare(&options))
}

fn compare(options: &Options) -> Result<(), Box<dyn Error>> {
    let files = Files::prepare(&options.out)?;
    let settings = options.settings();
    let norms = options.distinct_norms();
    device::print(&options.device);
    let cores = match options.device.is_cpu() {
        true => thread::available_parallelism().map_or(1, |cores| cores.get()),
        // A GPU takes one network after the other.
        false => 1,
    };
    let workers = cores.min(norms.len() * settings.seeds);
    let variants = train_all(&norms, &settings, workers, &options.device)?;
    let rows: Vec<_> = variants.iter().filter_map(Summary::of).collect();

    let page = report::html(
        &variants,
        &rows,
        &settings,
        &options.command(),
        options.quick,
        workers,
    )?;
    fs::write(&files.html, page)?;
    fs::write(&files.figure, figures::accuracy_file(&variants)?)?;
    write_summary(&files.summary, &rows)?;
    write_steps(&files.steps, &variants)?;

    let mut text = table(&rows) + "\n";
    for sentence in findings(&rows) {
        text += &format!("{sentence}\n");
    }
    text += &format!(
        "\nReport: {}\nAccuracy as a picture: {}\nThe same as CSV: {}, {}\n",
        files.html.display(),
        files.figure.display(),
        files.summary.display(),
        files.steps.display()
    );
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

/// Every norm with every seed, as many networks at a time as there are workers.
fn train_all(
    norms: &[candle_norm::NormConfig],
    settings: &Settings,
    workers: usize,
    device: &candle_core::Device,
) -> Result<Vec<Variant>, Box<dyn Error>> {
    let digits = Digits::load(device)?;
    // Norm by norm within a seed, so that a busy spell of the machine slows all norms alike.
    let jobs: Vec<_> = (0..settings.seeds as u64)
        .flat_map(|seed| (0..norms.len()).map(move |norm| (norm, seed)))
        .collect();
    let bar = common::progress_bar(jobs.len() * settings.steps());

    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<candle_core::Result<Run>>>> =
        Mutex::new(jobs.iter().map(|_| None).collect());
    let work = || {
        while let Some(&(norm, seed)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let index = seed as usize * norms.len() + norm;
            let run = train(&norms[norm], seed, &digits, settings, |steps| {
                bar.inc(steps)
            });
            if run.is_err() {
                next.store(jobs.len(), Ordering::Relaxed);
            }
            results
                .lock()
                .expect("no worker panics while it stores a result")[index] = Some(run);
        }
    };
    thread::scope(|scope| -> Result<(), rayon::ThreadPoolBuildError> {
        for _ in 0..workers {
            // Candle's convolutions use the pool that they are called in; without one, all workers
            // would share one.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
            scope.spawn(move || pool.install(work));
        }
        Ok(())
    })?;
    bar.finish_and_clear();

    let mut variants: Vec<_> = norms
        .iter()
        .map(|norm| Variant {
            norm: norm.to_string(),
            runs: Vec::new(),
        })
        .collect();
    let results = results
        .into_inner()
        .expect("no worker panics while it stores a result");
    for ((norm, _), result) in jobs.iter().zip(results) {
        if let Some(run) = result {
            variants[*norm].runs.push(run?);
        }
    }
    Ok(variants)
}
