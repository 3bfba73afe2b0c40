//! Forecasts of a series whose level changes: one small network, trained with each of several
//! normalizations.
//!
//!     cargo run --release --example forecast
//!     cargo run --release --example forecast -- --model linear --quick
//!
//! The first half of each data set trains the network. Then the example walks through the second
//! half, row by row, and forecasts the next rows from the rows so far. Stock closes and CO2 leave
//! the range of the training data, and a drift monitor reports when.
//!
//! The example prints a table and writes a figure of each data set (SVG): the series with the
//! monitor's alarms, and the error over time.

#[path = "../common/axis.rs"]
mod axis;
#[path = "../common/mod.rs"]
mod common;
mod figure;
mod model;
mod options;
mod scales;
#[path = "../common/series.rs"]
mod series;
mod walk;

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;
use std::thread;

use candle_norm::scaling::DriftEvent;
use clap::Parser;
use indicatif::ProgressBar;

use options::Options;
use scales::Scaling;
use series::Series;
use walk::{Outcome, Walk};

/// Candle allocates the result of every operation: the allocator is a good part of a step's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}

/// Results on one data set.
struct Report {
    series: Series,
    outcomes: Vec<Outcome>,
    alarms: Vec<DriftEvent>,
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let cannot = |error| format!("--out: cannot write to {}: {error}", options.out.display());
    fs::create_dir_all(&options.out).map_err(cannot)?;
    let all = [Series::stocks()?, Series::co2()?];
    let jobs = all.len() * Scaling::ALL.len() * options.seeds();
    let bar = common::progress_bar(jobs * options.steps());
    let mut text = String::new();
    for series in all {
        let report = compare(series, options, &bar)?;
        text += &table(&report);
        text += &alarms(&report);
        let file = options.out.join(format!("{}.svg", report.series.name));
        fs::write(
            &file,
            figure::svg(&report.series, &report.outcomes, &report.alarms)?,
        )?;
        text += &format!("Figure: {}\n\n", file.display());
    }
    bar.finish_and_clear();
    match io::stdout().write_all(text.as_bytes()) {
        // Whoever reads has seen enough, as `head` does.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => Ok(written?),
    }
}

fn compare(series: Series, options: &Options, bar: &ProgressBar) -> Result<Report, Box<dyn Error>> {
    let mut outcomes = vec![];
    let mut alarms = vec![];
    for scaling in Scaling::ALL {
        let scales = scaling.scales(&series)?;
        let walk = Walk::new(&series, scaling, &scales);
        let run = &|seed| -> candle_core::Result<Vec<f64>> {
            let model = walk.train(options.model, options.steps(), seed, |steps| bar.inc(steps))?;
            walk.errors(&model)
        };
        // Networks this small train fastest side by side, each on one thread.
        let runs = thread::scope(|scope| {
            let runs: Vec<_> = (0..options.seeds() as u64)
                .map(|seed| scope.spawn(move || run(seed)))
                .collect();
            (runs.into_iter())
                .map(|run| run.join().expect("no network panics"))
                .collect::<candle_core::Result<Vec<_>>>()
        })?;
        outcomes.push(Outcome::of(scaling, &runs));
        if scaling == Scaling::Adaptive {
            alarms = scales.alarms;
        }
    }
    Ok(Report {
        series,
        outcomes,
        alarms,
    })
}

/// Errors over that of repeating the last value.
fn table(report: &Report) -> String {
    let Series {
        name, names, train, ..
    } = &report.series;
    let mut text = format!(
        "{name}: {}; {} rows to train, {} to test\n",
        names.join(", "),
        train,
        report.series.rows() - train
    );
    text += "mean absolute error over that of repeating the last value\n";
    text += &format!(
        "{:<14}  {:>18}  {:>10}  {:>11}\n",
        "normalization", "test", "first half", "second half"
    );
    for outcome in &report.outcomes {
        let Outcome {
            scaling,
            median,
            range,
            halves,
            ..
        } = outcome;
        let test = format!("{median:.2} ({:.2}–{:.2})", range[0], range[1]);
        text += &format!(
            "{:<14}  {test:>18}  {:>10.2}  {:>11.2}\n",
            scaling.name(),
            halves[0],
            halves[1]
        );
    }
    text
}

/// When the monitor fired, and the error with and without what the scaler did then.
fn alarms(report: &Report) -> String {
    let mut steps: Vec<u64> = report.alarms.iter().map(|event| event.step).collect();
    steps.dedup();
    let first = report
        .alarms
        .first()
        .map_or(String::new(), |event| format!("; the first: {event}"));
    let error = |wanted| {
        let found = report.outcomes.iter().find(|o| o.scaling == wanted);
        found.map_or(f64::NAN, |o| o.median)
    };
    format!(
        "The drift monitor fired at {} rows of the test{first}\nError without the refit {:.2}, \
        with it {:.2}\n",
        steps.len(),
        error(Scaling::Static),
        error(Scaling::Adaptive)
    )
}
