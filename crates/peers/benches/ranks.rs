//! Synchronized batch norm beside the plain one, where nothing is sent.
//!
//! ```text
//! cargo bench --bench ranks
//! cargo bench --bench ranks -- --quick     # whether it runs; the figures mean nothing
//! ```
//!
//! `one rank` is the layer in a group of one, as a program runs without `mpirun`. `two, alone` has
//! a group of two whose sums are those of this rank: the passes apart from each other, as several
//! ranks need them, without the time of a network. Columns are multiples of the plain layer's time,
//! the medians of turns that alternate. The bench fails where one rank costs more than 1.1.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap};
use candle_norm::distributed::{Call, Collective, Threads};
use candle_norm::{BatchNorm, batch_norm, internals};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SHAPES: [&[usize]; 6] = [
    &[32, 64, 56, 56],
    &[32, 256, 14, 14],
    &[8, 64, 16, 16],
    &[2, 512, 7, 7],
    &[8192, 256],
    &[64, 1024],
];
const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Largest time of one rank, as a multiple of the plain layer's.
const LIMIT: f64 = 1.1;

/// A group that says it has two ranks, and has one.
#[derive(Debug)]
struct Pretended;

impl Collective for Pretended {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        2
    }
    fn all_reduce_sum(&self, _: &Call, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn all_reduce_sum_f32(&self, _: &Call, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
    fn broadcast(&self, _: &Call, _: &mut [f64]) -> Result<()> {
        Ok(())
    }
    fn split(&self, _: usize) -> Result<Arc<dyn Collective>> {
        Ok(Arc::new(Self))
    }
}

/// A call that is timed.
type Step<'a> = Box<dyn Fn() -> Result<()> + 'a>;

/// Forward, and backward by itself, of a layer.
fn passes<'a>(norm: &'a BatchNorm, x: &'a Var, dy: &'a Tensor) -> Result<[Step<'a>; 2]> {
    let constant = x.as_tensor().detach();
    let saved = internals::recorded(|| norm.forward_t(x, true))?;
    Ok([
        Box::new(move || norm.forward_t(&constant, true).map(drop)),
        Box::new(move || saved.backward(dy).map(drop)),
    ])
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Median seconds of a call of each, in turns.
fn times(steps: &[&Step], turns: usize, turn: f64) -> Result<Vec<f64>> {
    let mut seconds = vec![vec![]; steps.len()];
    for count in 0..turns + 1 {
        for (step, seconds) in steps.iter().zip(&mut seconds) {
            step()?;
            let (start, mut calls) = (Instant::now(), 0);
            while calls == 0 || start.elapsed().as_secs_f64() < turn {
                step()?;
                calls += 1;
            }
            // The first turn warms up.
            if count > 0 {
                seconds.push(start.elapsed().as_secs_f64() / f64::from(calls));
            }
        }
    }
    Ok(seconds.into_iter().map(median).collect())
}

fn main() -> Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        println!("not run: `cargo bench --bench ranks` measures");
        return Ok(ExitCode::SUCCESS);
    }
    let is_quick = args.iter().any(|arg| arg == "--quick");
    let (turns, turn) = if is_quick { (3, 1e-3) } else { (21, 5e-3) };
    let alone = Threads::group(1, std::time::Duration::from_secs(60))?.remove(0);
    let mut worst = 0f64;
    println!("| shape | dtype | pass | plain, ms | one rank | two, alone |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for dims in SHAPES {
        for dtype in DTYPES {
            let random = || Tensor::randn(0f32, 1., dims, &Device::Cpu)?.to_dtype(dtype);
            let (x, dy) = (Var::from_tensor(&random()?)?, random()?);
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
            let plain = batch_norm(dims[1], 1e-5, vb)?;
            let layers = [
                plain.clone(),
                plain.clone().synchronized(alone.clone()),
                plain.synchronized(Arc::new(Pretended)),
            ];
            let all: Vec<[Step; 2]> = layers
                .iter()
                .map(|norm| passes(norm, &x, &dy))
                .collect::<Result<_>>()?;
            for (pass, name) in ["forward", "backward"].into_iter().enumerate() {
                let steps: Vec<&Step> = all.iter().map(|steps| &steps[pass]).collect();
                let times = times(&steps, turns, turn)?;
                let (one, two) = (times[1] / times[0], times[2] / times[0]);
                worst = worst.max(one);
                println!(
                    "| {dims:?} | {} | {name} | {:.3} | {one:.2} | {two:.2} |",
                    dtype.as_str(),
                    1e3 * times[0]
                );
            }
        }
    }
    println!("\nOne rank costs at most {worst:.2} of the plain layer.");
    Ok(match is_quick || worst <= LIMIT {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
