//! Speedup by a second thread.

use candle_core::Result;

use super::case::{Case, Inputs, Pass};
use super::our_step;
use super::report::{Goal, print_aggregate};
use super::timing::{Entrant, Plan, Threads, measure};

/// From here on a pass has enough to do for two.
const LEAST_BYTES: usize = 4 << 20;

/// Times our forward and backward on one thread and on two, in turn, for the large cases that fit
/// the last cache: past it both wait for the same memory. The train step is not among them, since
/// candle's engine is serial.
pub(crate) fn run(work: &[(Case, Vec<Pass>)], plan: &Plan) -> Result<()> {
    let cache = last_cache();
    println!(
        "passes that move between {} and {} MiB\n",
        LEAST_BYTES >> 20,
        cache >> 20
    );
    println!(
        "| {:41} | {:10} | 1 thread ms | 2 threads ms | {:>6} |",
        "case", "pass", "ratio"
    );
    println!(
        "|{:-<43}|{:-<12}|------------:|-------------:|-------:|",
        "", ""
    );
    let pools = [Threads::pool(1)?, Threads::pool(2)?];
    let mut ratios = vec![];
    for (case, passes) in work {
        let passes = passes.iter().filter(|pass| **pass != Pass::TrainStep);
        for &pass in passes.filter(|pass| (LEAST_BYTES..=cache).contains(&case.bytes(**pass))) {
            let inputs = Inputs::new(case)?;
            let mut entrants = vec![];
            for threads in &pools {
                let step = our_step(case, pass, &inputs)?;
                entrants.push(Entrant::local("ours", threads, step));
            }
            let times: Vec<f64> = measure(&mut entrants, plan)
                .into_iter()
                .collect::<Result<_>>()?;
            let ratio = times[0] / times[1];
            println!(
                "| {:41} | {:10} | {:11.4} | {:12.4} | {ratio:5.2}x |",
                case.name(),
                pass.name(),
                times[0],
                times[1]
            );
            ratios.push((format!("{} {}", case.name(), pass.name()), ratio));
        }
    }
    println!();
    let goal = Goal {
        mean: None,
        least: Some(1.7),
    };
    print_aggregate("Two threads over one", &ratios, goal);
    Ok(())
}

/// The size of the last cache in bytes, where the system tells.
fn last_cache() -> usize {
    let size = |level| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{level}/size");
        let text = std::fs::read_to_string(path).ok()?;
        let kib: usize = text.trim().strip_suffix('K')?.parse().ok()?;
        Some(kib << 10)
    };
    size(3).or_else(|| size(2)).unwrap_or(16 << 20)
}
