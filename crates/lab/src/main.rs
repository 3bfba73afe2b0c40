//! Experiments for claims about normalization from articles, tutorials and the guide of this crate.
//!
//!     cargo run --release -p candle-norm-lab                 # all claims, into docs
//!     cargo run --release -p candle-norm-lab -- --claim 14   # one claim, into target/claims
//!     cargo run --release -p candle-norm-lab -- --quick      # all, roughly, into target/claims
//!     cargo run --release -p candle-norm-lab -- --redraw     # new figures from docs/claims.md
//!
//! The first command writes `docs/claims.md`, `docs/claims.html` and `docs/claims/`.
//!
//! A claim is a value. It has what is varied, what is held fixed, the experiment, and the rule for
//! its verdict. Results are kept in `target/claims/cache`. Therefore an interrupted run continues
//! where it stopped, and pages can be written again without new measurements.

#[path = "../../../examples/common/axis.rs"]
mod axis;
#[path = "../../../examples/regression/data.rs"]
#[allow(dead_code)]
mod cars;
mod claim;
#[path = "../../../examples/common/mod.rs"]
mod common;
mod cost;
mod depth;
mod digits;
mod family;
mod figure;
mod forecasts;
mod inputs;
mod lab;
mod nets;
#[path = "../../../examples/common/palette.rs"]
mod palette;
mod placement;
#[path = "../../../examples/common/plot.rs"]
mod plot;
#[path = "../../../examples/cartpole/policy.rs"]
#[allow(dead_code)]
mod policy;
mod practice;
mod precision;
mod ranks;
mod replacements;
mod report;
#[path = "../../../examples/forecast/scales.rs"]
#[allow(dead_code)]
mod scales;
mod sequences;
#[path = "../../../examples/common/series.rs"]
mod series;
#[path = "../../../examples/common/slopes.rs"]
mod slopes;
mod small_sets;
mod statistics;
mod targets;
mod training;

use std::error::Error;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use claim::{Claim, Data};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use lab::{Lab, Measure};
use report::Entry;
use serde_json::{Value, json};

/// Candle allocates the result of every operation: the allocator is a good part of a step's time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Sources of all experiments: where one of these changes, everything is measured anew.
const SHARED: [&str; 6] = [
    include_str!("lab.rs"),
    include_str!("nets.rs"),
    include_str!("training.rs"),
    include_str!("../../../examples/cartpole/policy.rs"),
    include_str!("../../../examples/common/mod.rs"),
    include_str!("../../../examples/forecast/scales.rs"),
];

fn version() -> u64 {
    let mut hasher = DefaultHasher::new();
    SHARED.hash(&mut hasher);
    hasher.finish()
}

/// Claims about normalization, measured on real data.
#[derive(Parser)]
struct Options {
    /// Only this claim; may be given several times
    #[arg(long)]
    claim: Vec<u32>,
    /// Fewer seeds, steps and learning rates: rough figures
    #[arg(long)]
    quick: bool,
    /// Where the pages go [default: docs for a full run, else target/claims]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Measure anew what is in the cache
    #[arg(long)]
    fresh: bool,
    /// Measure nothing: draw the figures anew from the tables of the pages in --out [default: docs]
    #[arg(long)]
    redraw: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    common::run(options.quick, || run(&options))
}

/// All claims, in order.
fn claims() -> Vec<Claim> {
    let rooms = [
        targets::claims(),
        inputs::claims(),
        forecasts::claims(),
        digits::claims(),
        small_sets::claims(),
        depth::claims(),
        sequences::claims(),
        cost::claims(),
        practice::claims(),
        statistics::claims(),
        placement::claims(),
        precision::claims(),
        family::claims(),
        ranks::claims(),
        replacements::claims(),
    ];
    let mut all: Vec<Claim> = rooms.into_iter().flatten().collect();
    all.sort_by_key(|claim| claim.id);
    all
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let all = claims();
    if options.redraw {
        let folder = options.out.as_deref().unwrap_or(Path::new("docs"));
        return report::redraw(folder, &all);
    }
    if let Some(id) = options
        .claim
        .iter()
        .find(|id| all.iter().all(|c| c.id != **id))
    {
        return Err(format!("--claim: expected one of 1 to {}, got {id}", all.len()).into());
    }
    let wanted = |claim: &Claim| options.claim.is_empty() || options.claim.contains(&claim.id);
    let chosen: Vec<Claim> = all.into_iter().filter(wanted).collect();
    let scratch = Path::new("target").join("claims");
    let whole = options.claim.is_empty() && !options.quick;
    let folder = match &options.out {
        Some(out) => out.clone(),
        None if whole => PathBuf::from("docs"),
        None => scratch.clone(),
    };
    let cache = scratch.join("cache");
    fs::create_dir_all(&cache)?;
    let total = chosen
        .iter()
        .map(|c| c.runs[usize::from(options.quick)])
        .sum::<u64>();
    let bar = ProgressBar::new(total);
    bar.set_style(ProgressStyle::with_template(
        "{bar:30} {pos}/{len} runs, {elapsed} gone, {eta} left  {msg}",
    )?);
    let lab = Lab::new(options.quick, bar);
    let mut entries = vec![];
    let (mut done, mut length) = (0, total);
    for claim in chosen {
        lab.bar.set_message(format!("claim {}", claim.id));
        let data = measured(&claim, &lab, &cache, options.fresh)?;
        // Searches that went on have made the bar longer.
        let longer = lab.bar.length().unwrap_or(0) - length;
        length += longer;
        done += claim.runs[usize::from(options.quick)] + longer;
        lab.bar.set_position(done);
        entries.push(Entry { claim, data });
    }
    lab.bar.finish_and_clear();
    let seeds = [lab.seeds(), lab.tuning_seeds()];
    report::write(&folder, &entries, options.quick, seeds)?;
    for Entry { claim, data } in &entries {
        let judged = (claim.judge)(data);
        println!("{:2}  {}: {}", claim.id, judged.words(), judged.figure);
    }
    println!("Written: {}", folder.join("claims.md").display());
    Ok(())
}

/// Measurements of the experiment, from this run or an earlier one.
fn measured(claim: &Claim, lab: &Lab, cache: &Path, fresh: bool) -> Result<Data, Box<dyn Error>> {
    let name = if lab.quick { "quick" } else { "full" };
    let file = cache.join(format!("{name}-{:02}.json", claim.id));
    let key = json!([
        version(),
        claim.version,
        lab.seeds(),
        env!("CARGO_PKG_VERSION")
    ]);
    if let (false, Ok(text)) = (fresh, fs::read_to_string(&file))
        && let Ok(stored) = serde_json::from_str::<Value>(&text)
        && stored["key"] == key
        && let Some(measures) = stored["measures"].as_array()
        && let Some(measures) = measures.iter().map(Measure::from_json).collect()
    {
        return Ok(Data(measures));
    }
    let measures = (claim.run)(lab).map_err(|e| format!("claim {}: {e}", claim.id))?;
    let stored = json!({
        "key": key,
        "measures": measures.iter().map(Measure::to_json).collect::<Vec<_>>(),
    });
    // Whole or not at all: a run may be interrupted here too.
    let partial = file.with_extension("partial");
    fs::write(&partial, serde_json::to_string_pretty(&stored)?)?;
    fs::rename(partial, file)?;
    Ok(Data(measures))
}
