//! Effect of the allocator on candle: the same steps as in the peers bench, under the allocator of
//! the bench that includes this.

#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/bounds.rs"]
mod bounds;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/candle.rs"]
mod candle;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/case.rs"]
mod case;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/ours.rs"]
mod ours;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/step.rs"]
mod step;
#[allow(dead_code, reason = "a part of what the peers bench uses")]
#[path = "../peers/timing.rs"]
mod timing;

use candle_core::{DType, Result};

use case::{Case, Inputs, Op};
use timing::{Entrant, Plan, Threads, measure};

/// A small, a middling and a large activation: under most allocators each is served in another way.
const SHAPES: [[usize; 2]; 3] = [[128, 768], [4096, 768], [16384, 1024]];

/// Prints the table of `allocator`, on all cores; `--quick` runs the smallest shape to see that it
/// works.
pub(crate) fn run(allocator: &str) -> Result<()> {
    let asked = |option: &str| std::env::args().any(|arg| arg == option);
    if !asked("--bench") {
        println!("not run: `cargo bench --bench alloc_{allocator}` measures");
        return Ok(());
    }
    let (shapes, plan) = match asked("--quick") {
        true => (&SHAPES[..1], Plan::quick()),
        false => (&SHAPES[..], Plan::full()),
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads::pool(cores)?;
    println!("LayerNorm, f32, {cores} threads, milliseconds\n");
    let columns = ["forward", "train step", "engine", "composed", "candle-nn"];
    let head = columns.map(|name| format!("{name:>10}")).join(" | ");
    println!("| allocator | shape      | {head} |");
    let rule = columns.map(|_| "-----------:").join("|");
    println!("|-----------|------------|{rule}|");
    for shape in shapes {
        let case = Case::new(Op::LayerNorm, shape, DType::F32);
        let inputs = Inputs::new(&case)?;
        let steps = [
            step::forward(&case, &inputs, ours::layer)?,
            step::train_step(&case, &inputs, ours::layer)?,
            step::train_step(&case, &inputs, bounds::engine)?,
            step::train_step(&case, &inputs, ours::composed)?,
            step::train_step(&case, &inputs, candle::differentiable)?,
        ];
        let mut entrants: Vec<Entrant> = steps
            .into_iter()
            .zip(columns)
            .map(|(step, name)| Entrant::local(name, &threads, step))
            .collect();
        let mut line = format!("| {allocator:9} | {:10} |", case.shape_name());
        for time in measure(&mut entrants, &plan) {
            line += &format!(" {:10.4} |", time?);
        }
        println!("{line}");
    }
    Ok(())
}
