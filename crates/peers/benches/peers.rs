//! Every layer against its peers: candle-nn, candle's tensor operations, PyTorch, a copy of the
//! tensor.
//!
//! `cargo bench --bench peers -- --torch python3`; `--help` lists the options, docs/performance.md
//! says how to read the result. All take turns on the same inputs and the same number of threads,
//! warm, and the medians are compared. A call includes the allocation of its results and their
//! release, here as in PyTorch.

#[path = "peers/bounds.rs"]
mod bounds;
#[path = "peers/candle.rs"]
mod candle;
#[path = "peers/case.rs"]
mod case;
#[path = "peers/check.rs"]
mod check;
#[path = "peers/list.rs"]
mod list;
#[path = "peers/ours.rs"]
mod ours;
#[path = "peers/report.rs"]
mod report;
#[path = "peers/scaling.rs"]
mod scaling;
#[path = "peers/step.rs"]
mod step;
#[path = "peers/timing.rs"]
mod timing;
#[path = "peers/torch.rs"]
mod torch;

use std::cell::RefCell;
use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

use candle_core::{DType, Result};
use clap::Parser;

use case::{Case, Inputs, Op, Pass};
use report::{PEERS, Row};
use step::Step;
use timing::{Entrant, Plan, Threads, measure};
use torch::Torch;

/// candle allocates every result: `alloc_*.rs` measure the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Times every layer against its peers.
#[derive(Debug, Parser)]
struct Args {
    /// Also run PyTorch, with this Python
    #[arg(long, value_name = "PYTHON")]
    torch: Option<PathBuf>,
    /// Write the rows to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only cases whose "op shape dtype pass" contains this, or any of several
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Only these peers
    #[arg(long, value_name = "PEER", value_delimiter = ',', value_parser = PEERS)]
    peers: Vec<String>,
    /// Small cases, few rounds: whether it works, not how fast it is
    #[arg(long)]
    quick: bool,
    /// Threads of everyone [default: all cores]
    #[arg(long)]
    threads: Option<usize>,
    /// Call from the main thread instead of from within the thread pool
    #[arg(long)]
    main_thread: bool,
    /// Compare our one thread with our two instead, where the tensors fit the cache
    #[arg(long)]
    scaling: bool,
    /// Argument that cargo gives to every bench; `cargo test` does not give it
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn asks_for(&self, peer: &str) -> bool {
        self.peers.is_empty() || self.peers.iter().any(|asked| asked == peer)
    }

    fn threads(&self) -> usize {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.unwrap_or_else(cores)
    }

    /// The passes that are asked for, by case.
    fn work(&self) -> Vec<(Case, Vec<Pass>)> {
        let asked = |case: &Case, pass: &Pass| {
            let name = format!("{} {}", case.name(), pass.name());
            let quick =
                case.elements() <= 1 << 21 && matches!(case.dtype, DType::F32 | DType::BF16);
            (self.filter.is_empty() || self.filter.iter().any(|text| name.contains(text.as_str())))
                && (quick || !self.quick)
        };
        let with_passes = |case: Case| {
            let passes = case.op.passes().iter().copied();
            let passes: Vec<Pass> = passes.filter(|p| asked(&case, p)).collect();
            (case, passes)
        };
        let all = list::cases().into_iter().map(with_passes);
        all.filter(|(_, passes)| !passes.is_empty()).collect()
    }

    fn plan(&self) -> Plan {
        if self.quick {
            Plan::quick()
        } else {
            Plan::full()
        }
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if !args.bench {
        println!("not run: `cargo bench --bench peers` measures");
        return Ok(ExitCode::SUCCESS);
    }
    // cargo starts a bench in the folder of its package; paths of the command line are from the
    // top.
    env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))?;
    let threads = args.threads();
    if args.scaling {
        println!("{}, mimalloc", processor());
        scaling::run(&args.work(), &args.plan())?;
        return Ok(ExitCode::SUCCESS);
    }
    let torch = args.torch.as_deref().map(Torch::start).transpose()?;
    let version = match &torch {
        Some(torch) => format!(", PyTorch {}", torch.version()),
        None => String::new(),
    };
    println!(
        "{threads} threads, {}, candle-nn 0.11{version}, mimalloc; times in milliseconds, in \
        brackets as a multiple of ours\n",
        processor()
    );
    let mut bench = Bench {
        threads: if args.main_thread {
            Threads::global(threads)?
        } else {
            Threads::pool(threads)?
        },
        torch: torch.map(RefCell::new),
        args,
        notes: vec![],
        wrong: false,
    };
    bench.run()
}

/// The processor's name, where the system tells.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == "model name").then(|| value.trim().to_string())
    });
    name.unwrap_or_else(|| std::env::consts::ARCH.to_string())
}

struct Bench {
    args: Args,
    threads: Threads,
    torch: Option<RefCell<Torch>>,
    /// Remarks below the table: which peers failed, and which have other results.
    notes: Vec<String>,
    /// A peer that should know computes something else than we do.
    wrong: bool,
}

impl Bench {
    fn run(&mut self) -> Result<ExitCode> {
        report::print_head();
        let mut rows = vec![];
        for (case, passes) in self.args.work() {
            let inputs = Inputs::new(&case)?;
            if let Some(torch) = &self.torch {
                torch.borrow_mut().write(&inputs)?;
            }
            for pass in passes {
                let row = self.row(&case, pass, &inputs)?;
                report::print_row(&row);
                rows.push(row);
                // After each row, so that a run that is cut short leaves what it has.
                if let Some(path) = &self.args.json {
                    report::write_json(&rows, path)?;
                }
            }
        }
        for note in &self.notes {
            println!("{note}");
        }
        report::print_summary(&rows);
        if self.wrong {
            println!("\nThe results differ: these times do not compare the same thing.");
            return Ok(ExitCode::FAILURE);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn row(&mut self, case: &Case, pass: Pass, inputs: &Inputs) -> Result<Row> {
        let ours = our_step(case, pass, inputs)?;
        let expected = check::samples(&self.threads.run(&ours)?)?;
        let mut results: Vec<(&'static str, torch::Outcome)> = vec![];

        let mut steps: Vec<(&'static str, Step)> = vec![];
        for (peer, step) in candle_steps(case, pass, inputs) {
            if !self.args.asks_for(peer) {
                continue;
            }
            let outcome = step.and_then(|step| {
                let samples = check::samples(&self.threads.run(&step)?)?;
                Ok((step, samples))
            });
            match outcome {
                // The engine's peer is right in copying.
                Ok((step, _)) if peer == "engine" => steps.push((peer, step)),
                Ok((step, samples)) => {
                    results.push((peer, Ok(samples)));
                    steps.push((peer, step));
                }
                Err(error) => results.push((peer, Err(error.to_string()))),
            }
        }
        if self.args.asks_for("norm alone")
            && let Some((alone, inputs)) = ours::norm_alone(case, inputs)
        {
            match our_step(&alone, pass, &inputs) {
                Ok(step) => steps.push(("norm alone", step)),
                // A mask is a graph of its own; its backward is compared in the train step.
                Err(error) => results.push(("norm alone", Err(error.to_string()))),
            }
        }
        if pass == Pass::Backward && self.args.asks_for("composed") {
            // It has no such pass to time, but knows what it must come to.
            let gradients = step::gradients(case, inputs, ours::composed)?;
            results.push(("composed", Ok(check::samples(&gradients)?)));
        }
        let mut remote = vec![];
        if let Some(torch) = &self.torch {
            let asked: Vec<&'static str> = ["pytorch", "pytorch-compile"]
                .into_iter()
                .filter(|peer| self.args.asks_for(peer))
                .collect();
            let threads = self.args.threads();
            match torch.borrow_mut().load(case, pass, threads, &asked) {
                Ok(outcomes) => {
                    let ready = |peer: &&str| outcomes[peer].is_ok();
                    remote = asked.into_iter().filter(ready).collect();
                    results.extend(outcomes);
                }
                Err(error) => results.push(("pytorch", Err(error.to_string()))),
            }
        }
        for (peer, outcome) in results {
            self.judge(case, pass, peer, &expected, outcome);
        }

        let threads = &self.threads;
        let mut entrants = vec![Entrant::local("ours", threads, ours)];
        if self.args.asks_for("copy") {
            let (tensor, same) = (inputs.x.clone(), inputs.x.clone());
            entrants.push(Entrant::local("copy", threads, move || tensor.copy()));
            entrants.push(Entrant::local("copy", threads, move || {
                bounds::threaded_copy(&same)
            }));
        }
        for (peer, step) in steps {
            entrants.push(Entrant::local(peer, threads, step));
        }
        if let Some(torch) = &self.torch {
            for peer in remote {
                entrants.push(Entrant::remote(peer, move |warm, iterations| {
                    torch.borrow_mut().run(peer, warm, iterations)
                }));
            }
        }
        let times = measure(&mut entrants, &self.args.plan());
        let names: Vec<&'static str> = entrants.iter().map(|entrant| entrant.name).collect();
        drop(entrants);
        if let Some(torch) = &self.torch {
            torch.borrow_mut().done()?;
        }

        let mut row = Row {
            case: case.clone(),
            pass,
            ours: f64::NAN,
            peers: [None; 7],
        };
        for (name, time) in names.into_iter().zip(times) {
            match (PEERS.iter().position(|peer| *peer == name), time) {
                (None, time) => row.ours = time?,
                // The faster of the two copies: which one that is depends on the size.
                (Some(i), Ok(time)) => {
                    row.peers[i] = Some(row.peers[i].map_or(time, |other| time.min(other)));
                }
                (Some(_), Err(error)) => self.note(case, pass, name, &error.to_string()),
            }
        }
        Ok(row)
    }

    /// Notes a peer that failed or computed something else.
    fn judge(
        &mut self,
        case: &Case,
        pass: Pass,
        peer: &str,
        expected: &[Vec<f64>],
        outcome: torch::Outcome,
    ) {
        match outcome {
            Err(error) => self.note(case, pass, peer, &error),
            Ok(samples) => {
                if let Some(how) = check::disagreement(case, pass, expected, &samples) {
                    self.wrong |= !sums_in_half_precision(case, pass, peer);
                    self.note(case, pass, peer, &how);
                }
            }
        }
    }

    fn note(&mut self, case: &Case, pass: Pass, peer: &str, what: &str) {
        let what = what.lines().next().unwrap_or_default();
        let note = format!("{peer}, {} {}: {what}", case.name(), pass.name());
        self.notes.push(note);
    }
}

/// Whether the peer is known to form sums in half precision here, and so to go astray: candle-nn
/// everywhere, PyTorch in LayerNorm's gradients of weight and bias, which in `bf16` are off by a
/// quarter of their size at 4096 rows.
fn sums_in_half_precision(case: &Case, pass: Pass, peer: &str) -> bool {
    let half = matches!(case.dtype, DType::F16 | DType::BF16);
    peer == "candle-nn"
        || (peer == "pytorch" && half && case.op == Op::LayerNorm && pass != Pass::Forward)
}

/// A pass of ours.
fn our_step(case: &Case, pass: Pass, inputs: &Inputs) -> Result<Step> {
    match pass {
        Pass::Forward => step::forward(case, inputs, ours::layer),
        Pass::Backward => ours::backward(case, inputs),
        Pass::TrainStep => step::train_step(case, inputs, ours::layer),
    }
}

/// The peers that are built on candle. They have no backward without the engine.
fn candle_steps(case: &Case, pass: Pass, inputs: &Inputs) -> Vec<(&'static str, Result<Step>)> {
    match pass {
        Pass::Forward => vec![
            ("candle-nn", step::forward(case, inputs, candle::layer)),
            ("composed", step::forward(case, inputs, ours::composed)),
        ],
        Pass::Backward => vec![],
        Pass::TrainStep => vec![
            (
                "candle-nn",
                step::train_step(case, inputs, candle::differentiable),
            ),
            ("composed", step::train_step(case, inputs, ours::composed)),
            ("engine", step::train_step(case, inputs, bounds::engine)),
        ],
    }
}
