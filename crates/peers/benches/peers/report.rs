//! The table, the rows for programs, and what they come to.

use std::io::Write;
use std::path::Path;

use candle_core::{Result, bail};
use serde_json::{Value, json};

use super::case::{Case, Op, Pass};

/// Everyone who takes turns with us, in the order of the table.
/// `norm alone` is this crate's norm without a modulation, activation or mask.
pub(crate) const PEERS: [&str; 7] = [
    "norm alone",
    "candle-nn",
    "composed",
    "copy",
    "engine",
    "pytorch",
    "pytorch-compile",
];

/// From here on a tensor is in no cache, and a pass is bound by memory.
const LARGE: usize = 64_000_000;

/// One pass of one case: times in milliseconds.
pub(crate) struct Row {
    pub(crate) case: Case,
    pub(crate) pass: Pass,
    pub(crate) ours: f64,
    /// In the order of [`PEERS`]; none where a peer does not have the pass, failed or was not
    /// asked.
    pub(crate) peers: [Option<f64>; 7],
}

impl Row {
    fn name(&self) -> String {
        format!("{} {}", self.case.name(), self.pass.name())
    }

    fn peer(&self, name: &str) -> Option<f64> {
        let index = PEERS.iter().position(|peer| *peer == name)?;
        self.peers[index]
    }

    /// How many times as fast as the peer we are.
    fn speedup(&self, peer: &str) -> Option<f64> {
        Some(self.peer(peer)? / self.ours)
    }
}

const CASE_WIDTH: usize = 41;

/// Prints the head of the table, which is also the head of a Markdown table.
pub(crate) fn print_head() {
    let mut head = format!(
        "| {:CASE_WIDTH$} | {:10} | {:>9} | {:>6} |",
        "case", "pass", "ours ms", "GB/s"
    );
    let mut rule = format!(
        "|{:-<CASE_WIDTH$}--|{:-<10}--|{:-<9}-:|{:-<6}-:|",
        "", "", "", ""
    );
    for peer in PEERS.iter().chain(&["less engine"]) {
        head += &format!(" {peer:>17} |");
        rule += &format!("{:-<17}-:|", "");
    }
    println!("{head}\n{rule}");
}

/// Prints one line of it: each peer's time, and how many times ours that is. The last column is our
/// train step without what the engine takes around an op that only copies.
pub(crate) fn print_row(row: &Row) {
    let gigabytes_per_second = row.case.bytes(row.pass) as f64 / row.ours / 1e6;
    let mut line = format!(
        "| {:CASE_WIDTH$} | {:10} | {:>9} | {gigabytes_per_second:>6.1} |",
        row.case.name(),
        row.pass.name(),
        milliseconds(row.ours),
    );
    for time in row.peers {
        let cell = match time {
            Some(time) => format!("{} ({:.2}x)", milliseconds(time), time / row.ours),
            None => String::new(),
        };
        line += &format!(" {cell:>17} |");
    }
    let less_engine = match row.peer("engine") {
        Some(engine) => milliseconds(row.ours - engine),
        None => String::new(),
    };
    println!("{line} {less_engine:>17} |");
}

/// Four significant digits.
fn milliseconds(ms: f64) -> String {
    let digits = match ms.abs() {
        ms if ms >= 1000. => 0,
        ms if ms >= 100. => 1,
        ms if ms >= 10. => 2,
        ms if ms >= 1. => 3,
        _ => 5,
    };
    format!("{ms:.digits$}")
}

pub(crate) fn write_json(rows: &[Row], path: &Path) -> Result<()> {
    let mut array: Vec<Value> = vec![];
    for row in rows {
        for (peer, time) in PEERS.iter().zip(row.peers) {
            if let Some(time) = time {
                array.push(json!({
                    "op": row.case.op.name(),
                    "shape": row.case.shape_name(),
                    "dtype": row.case.dtype.as_str(),
                    "pass": row.pass.name(),
                    "peer": peer,
                    "ours_ms": row.ours,
                    "peer_ms": time,
                    "bytes": row.case.bytes(row.pass),
                }));
            }
        }
    }
    let mut file = std::fs::File::create(path)?;
    match serde_json::to_writer_pretty(&mut file, &array) {
        Ok(()) => Ok(file.write_all(b"\n")?),
        Err(error) => bail!("{}: {error}", path.display()),
    }
}

/// The least that a set of ratios must reach.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Goal {
    /// Of the geometric mean.
    pub(crate) mean: Option<f64>,
    /// Of every single ratio.
    pub(crate) least: Option<f64>,
}

/// Prints mean, smallest and largest of ratios that should be large, and whether the goal is met.
pub(crate) fn print_aggregate(what: &str, ratios: &[(String, f64)], goal: Goal) {
    let Some(least) = ratios.iter().min_by(|a, b| a.1.total_cmp(&b.1)) else {
        return;
    };
    let mean = geometric_mean(ratios);
    let mut line = format!(
        "{what}: {mean:.2}x over {}, least {:.2}x ({})",
        ratios.len(),
        least.1,
        least.0
    );
    if let Some(goal) = goal.mean {
        line += &format!("; mean of {goal} {}", verdict(mean >= goal));
    }
    if let Some(goal) = goal.least {
        line += &format!("; least of {goal} {}", verdict(least.1 >= goal));
    }
    println!("{line}");
}

/// Prints the same for multiples that should be small, each against a limit of its own.
fn print_multiples(what: &str, multiples: &[(String, f64, f64)]) {
    let Some(worst) = multiples
        .iter()
        .max_by(|a, b| (a.1 / a.2).total_cmp(&(b.1 / b.2)))
    else {
        return;
    };
    let ratios: Vec<(String, f64)> = multiples.iter().map(|m| (m.0.clone(), m.1)).collect();
    println!(
        "{what}: {:.2}x over {}, worst {:.2}x ({}); limit of {} {}",
        geometric_mean(&ratios),
        multiples.len(),
        worst.1,
        worst.0,
        worst.2,
        verdict(worst.1 <= worst.2)
    );
}

fn geometric_mean(ratios: &[(String, f64)]) -> f64 {
    let logs: f64 = ratios.iter().map(|(_, ratio)| ratio.ln()).sum();
    (logs / ratios.len() as f64).exp()
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

/// Prints what the rows come to.
pub(crate) fn print_summary(rows: &[Row]) {
    println!("\nSpeed, as geometric means of peer time / our time:");
    let speedups = |peer: &str, passes: &[Pass]| -> Vec<(String, f64)> {
        rows.iter()
            .filter(|row| passes.contains(&row.pass))
            .filter_map(|row| Some((row.name(), row.speedup(peer)?)))
            .collect()
    };
    let own = [Pass::Forward, Pass::Backward];
    print_aggregate(
        "PyTorch eager, forward and backward",
        &speedups("pytorch", &own),
        Goal {
            mean: Some(1.5),
            least: Some(0.95),
        },
    );
    let better_of_both: Vec<(String, f64)> = rows
        .iter()
        .filter(|row| row.case.op == Op::RmsNorm && own.contains(&row.pass))
        .filter_map(|row| {
            let (eager, compiled) = (row.speedup("pytorch")?, row.speedup("pytorch-compile")?);
            Some((row.name(), eager.min(compiled)))
        })
        .collect();
    print_aggregate(
        "the better of PyTorch eager and compiled, RmsNorm forward and backward",
        &better_of_both,
        Goal::default(),
    );
    for (what, peer, passes, goal) in [
        (
            "torch.compile, forward and backward",
            "pytorch-compile",
            &own[..],
            Goal::default(),
        ),
        (
            "PyTorch eager, train step",
            "pytorch",
            &[Pass::TrainStep],
            Goal::default(),
        ),
        (
            "candle-nn, forward",
            "candle-nn",
            &[Pass::Forward],
            Goal {
                mean: Some(3.),
                least: Some(1.),
            },
        ),
        (
            "candle-nn, train step",
            "candle-nn",
            &[Pass::TrainStep],
            Goal {
                mean: Some(6.),
                least: None,
            },
        ),
        (
            "composed, forward",
            "composed",
            &[Pass::Forward],
            Goal::default(),
        ),
        (
            "composed, train step",
            "composed",
            &[Pass::TrainStep],
            Goal::default(),
        ),
        (
            "engine around a copy, train step",
            "engine",
            &[Pass::TrainStep],
            Goal::default(),
        ),
    ] {
        print_aggregate(what, &speedups(peer, passes), goal);
    }
    for pass in [Pass::Forward, Pass::Backward, Pass::TrainStep] {
        let multiples: Vec<(String, f64, f64)> = rows
            .iter()
            .filter(|row| row.pass == pass && row.case.tensor_bytes() >= LARGE)
            .filter_map(|row| {
                let (_, limit) = row.case.op.norm_alone()?;
                Some((row.name(), row.ours / row.peer("norm alone")?, limit))
            })
            .collect();
        let what = format!(
            "our time / the norm alone, tensors of 64 MB and more, {}",
            pass.name()
        );
        print_multiples(&what, &multiples);
    }
    let against_pytorch: Vec<(String, f64)> = rows
        .iter()
        .filter(|row| own.contains(&row.pass))
        .filter_map(|row| {
            let least = row.case.op.least_against_pytorch()?;
            Some((row.name(), row.speedup("pytorch")? / least))
        })
        .collect();
    print_aggregate(
        "PyTorch eager over the limit of 1.5 (activations) or 2 (gated RMS norm)",
        &against_pytorch,
        Goal {
            mean: None,
            least: Some(1.),
        },
    );
    for pass in own {
        let multiples: Vec<(String, f64, f64)> = rows
            .iter()
            .filter(|row| row.pass == pass && row.case.tensor_bytes() >= LARGE)
            .filter_map(|row| {
                let limit = match (pass, row.case.op) {
                    (Pass::Forward, Op::BatchNorm) => 2.,
                    (Pass::Forward, _) => 1.5,
                    (_, Op::BatchNorm) => 3.2,
                    _ => 2.2,
                };
                Some((row.name(), row.ours / row.peer("copy")?, limit))
            })
            .collect();
        let what = format!(
            "our time / copy, tensors of 64 MB and more, {}",
            pass.name()
        );
        print_multiples(&what, &multiples);
    }
}
