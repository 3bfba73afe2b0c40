//! Effects of scaling on a regression: one network on the prices of used cars, scaled in eight
//! ways.
//!
//!     cargo run --release --example regression
//!     cargo run --release --example regression -- --steps 4000 --lr 0.001
//!
//! Inputs are raw, scaled by the min-max of each batch, by a fitted min-max, or by a fitted
//! z-score. Prices are in dollars or z-scored. Every way has the same initial weights and the same
//! cars in the same order. The example prints a table, and what the usual mistakes cost. It draws
//! the error over the steps. It saves the best way as one file, and a second process loads this
//! file and predicts from it.

#[path = "../common/axis.rs"]
mod axis;
#[path = "../common/mod.rs"]
mod common;
mod data;
mod mistakes;
#[path = "../common/palette.rs"]
mod palette;
#[path = "../common/plot.rs"]
mod plot;
mod report;
mod scheme;
mod train;

use candle_core::{DType, Device, Tensor};
use candle_norm::scaling::Pipeline;
use clap::Parser;
use data::Split;
use report::Variant;
use scheme::{BEST, LEAK, SCHEMES, Scheme};
use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use train::{Settings, Trained, network, train};

/// Candle allocates the result of every operation: the allocator is a good part of a step's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Trains the same network on car prices that are scaled in eight ways, and compares.
#[derive(Clone, Debug, Parser)]
#[command(name = "regression", version)]
struct Options {
    /// Training steps of each network [default: 2000, quick: 300]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    steps: Option<u32>,

    /// Networks of each way, each with its own initial weights and order of the cars
    /// [default: 3, quick: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    seeds: Option<u32>,

    /// Learning rate of AdamW, the same for all ways
    #[arg(long, value_name = "RATE", default_value_t = 0.003, value_parser = rate)]
    lr: f64,

    /// Directory that the figure and the pipeline are written to; it is created where it is missing
    #[arg(long, value_name = "DIR", default_value = "target/regression")]
    out: PathBuf,

    /// Few steps and one seed: a look within seconds, with figures that are rough
    #[arg(long)]
    quick: bool,

    /// Loads a pipeline and prints the bits of its predictions for the test cars: the second
    /// process
    #[arg(long, hide = true, value_name = "FILE")]
    predict: Option<PathBuf>,
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0. && rate.is_finite() => Ok(rate),
        _ => Err("allowed: a number above 0".to_string()),
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || match &options.predict {
        Some(file) => print_predictions(file),
        None => compare(&options),
    })
}

fn compare(options: &Options) -> Result<(), Box<dyn Error>> {
    let (steps, seeds) = if options.quick { (300, 1) } else { (2000, 3) };
    let settings = Settings {
        steps: options.steps.unwrap_or(steps) as usize,
        seeds: u64::from(options.seeds.unwrap_or(seeds)),
        lr: options.lr,
    };
    fs::create_dir_all(&options.out)
        .map_err(|e| format!("--out: cannot write to {}: {e}", options.out.display()))?;
    let cars = Split::load()?;
    let schemes: Vec<Scheme> = SCHEMES.into_iter().chain([LEAK]).collect();
    let mut variants = train_all(&schemes, &cars, settings)?;
    let leak = variants.pop().ok_or("no runs")?;

    println!(
        "{} cars to train on, {} to test on; {} features. Medians over {} seeds.\n",
        cars.train.count(),
        cars.test.count(),
        cars.names.len(),
        settings.seeds
    );
    print!("{}", report::table(&variants, settings));
    let std = f64::from(cars.test.prices.var(0)?.sqrt()?.to_vec1::<f32>()?[0]);
    println!("\n{}\n\nMistakes:", report::goal(std));
    for mistake in mistakes::mistakes(&variants, &leak, &cars)? {
        println!("- {mistake}");
    }

    let figure = options.out.join("regression.svg");
    fs::write(&figure, report::chart(&variants, settings, std)?)?;
    println!("\nFigure: {}", figure.display());
    let best = variants.into_iter().find(|variant| variant.scheme == BEST);
    let best = best
        .and_then(|mut variant| variant.runs.pop())
        .ok_or("no run")?;
    reload(
        best.trained,
        &cars,
        &options.out.join("pipeline.safetensors"),
    )?;
    Ok(())
}

fn train_all(
    schemes: &[Scheme],
    cars: &Split,
    settings: Settings,
) -> Result<Vec<Variant>, Box<dyn Error>> {
    let bar = common::progress_bar(schemes.len() * settings.seeds as usize * settings.steps);
    let mut variants = vec![];
    for &scheme in schemes {
        let run = |seed| train(scheme, cars, seed, settings, || bar.inc(1));
        let runs = (0..settings.seeds).map(run).collect::<Result<_, _>>()?;
        variants.push(Variant { scheme, runs });
    }
    bar.finish_and_clear();
    Ok(variants)
}

/// Saves the scalers and the network as one file, and asks a second process, which has nothing but
/// the file, for the same prices.
fn reload(trained: Trained, cars: &Split, file: &Path) -> Result<(), Box<dyn Error>> {
    let mut pipeline = Pipeline::new(trained.model, trained.vars);
    if let Some(inputs) = trained.inputs {
        pipeline = pipeline.with_boxed_inputs(inputs);
    }
    if let Some(targets) = trained.targets {
        pipeline = pipeline.with_targets(targets);
    }
    pipeline.save(file)?;
    let mine = bits(&pipeline.predict(&cars.test.inputs)?)?;
    let second = Command::new(env::current_exe()?)
        .arg("--predict")
        .arg(file)
        .output()?;
    let theirs = String::from_utf8(second.stdout)?;
    let theirs: Vec<&str> = theirs.lines().collect();
    if theirs != mine {
        let why = String::from_utf8_lossy(&second.stderr);
        return Err(format!(
            "a second process predicts otherwise from {}: {why}",
            file.display()
        )
        .into());
    }
    let size = fs::metadata(file)?.len();
    println!(
        "Pipeline: {} ({size} bytes). A second process loaded it and gave the same {} prices, to \
        the bit.",
        file.display(),
        mine.len()
    );
    Ok(())
}

fn print_predictions(file: &Path) -> Result<(), Box<dyn Error>> {
    let cars = Split::load()?;
    let features = cars.names.len();
    let pipeline = Pipeline::load(file, DType::F32, &Device::Cpu, |vb| network(vb, features))?;
    for bits in bits(&pipeline.predict(&cars.test.inputs)?)? {
        println!("{bits}");
    }
    Ok(())
}

/// The bits of every number, which text of fewer digits would not show to be the same.
fn bits(prices: &Tensor) -> candle_core::Result<Vec<String>> {
    let prices = prices.flatten_all()?.to_vec1::<f32>()?;
    Ok(prices
        .iter()
        .map(|p| format!("{:08x}", p.to_bits()))
        .collect())
}
