//! Handwritten digits on several ranks, with synchronized batch norm: the same training as on one
//! rank with the whole batch.
//!
//! ```text
//! scripts/run_ranks.sh 4                        # installs, builds, runs, compares
//! mpirun -n 4 target/release/examples/train_distributed --losses four.csv
//! target/release/examples/train_distributed --losses one.csv
//! target/release/examples/train_distributed --compare one.csv four.csv
//! ```
//!
//! Every rank has a copy of the network and an equal share of each batch of 32. `--norm local`
//! leaves the statistics of each rank by themselves: what the losses are without synchronization.
//! The progress bar is that of rank 0.
//!
//! `--checkpoint FILE` saves the variables and the number of the step every `--every` steps, and
//! goes on from there if the file exists: bit for bit as if nothing had happened. `--kill STEP`
//! kills the last rank in that step, to see how a job ends then.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Error, IndexOp, Module, ModuleT, Result, Tensor, Var, bail};
use candle_nn::{Conv2d, Conv2dConfig, Linear, Optimizer, SGD, VarBuilder, VarMap, loss};
use candle_norm::distributed::{
    Call, Collective, agree, assert_same, at_step, batches, broadcast_vars, shard, shuffled,
    sum_gradients,
};
use candle_norm::{BatchNorm, batch_norm, trainable_vars};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, StandardNormal};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Images to train on; the other 500, by other writers, are for testing.
const TRAIN: usize = 1297;

/// Trains a network on digits, on as many ranks as `mpirun` starts.
#[derive(Debug, Parser)]
struct Options {
    /// Statistics of batch norm
    #[arg(long, value_enum, default_value_t = Statistics::Synchronized)]
    norm: Statistics,
    /// Images in a step, of all ranks together
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Steps
    #[arg(long, default_value_t = 400)]
    steps: u64,
    #[arg(long, default_value_t = 0.2)]
    learning_rate: f64,
    /// Starts the network and the order of the images
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// File for the loss of every step
    #[arg(long)]
    losses: Option<PathBuf>,
    /// File to save the variables in, and to go on from
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Steps between two checkpoints, and between two comparisons of the ranks
    #[arg(long, default_value_t = 20)]
    every: u64,
    /// Kills the last rank in this step
    #[arg(long)]
    kill: Option<u64>,
    /// Seconds that a rank waits for the others
    #[arg(long, default_value_t = 300)]
    time_limit: u64,
    /// Compares two files of losses instead
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    compare: Option<Vec<PathBuf>>,
    /// Largest difference of two losses
    #[arg(long, default_value_t = 1e-6)]
    tolerance: f64,
    /// A few steps: a look within seconds
    #[arg(long)]
    quick: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Statistics {
    /// Of the batches of all ranks
    Synchronized,
    /// Of the batch of each rank
    Local,
}

/// Two convolutions with batch norms, and a linear layer on the means of the maps.
struct Net {
    convs: [Conv2d; 2],
    norms: [BatchNorm; 2],
    head: Linear,
}

impl Net {
    fn new(vb: VarBuilder, group: Option<&Arc<dyn Collective>>) -> Result<Self> {
        let conv = |name, inputs, outputs| {
            let config = Conv2dConfig {
                padding: 1,
                ..Default::default()
            };
            candle_nn::conv2d_no_bias(inputs, outputs, 3, config, vb.pp(name))
        };
        let norm = |name, channels| {
            let norm = batch_norm(channels, 1e-5, vb.pp(name))?;
            Result::Ok(match group {
                Some(group) => norm.synchronized(group.clone()),
                None => norm,
            })
        };
        Ok(Self {
            convs: [conv("conv1", 1, 8)?, conv("conv2", 8, 16)?],
            norms: [norm("norm1", 8)?, norm("norm2", 16)?],
            head: candle_nn::linear(16, 10, vb.pp("head"))?,
        })
    }
}

impl ModuleT for Net {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let [first, second] = &self.norms;
        // SiLU: at the kink of ReLU a difference in the last bit becomes one of the gradient.
        let maps = first.forward_t(&self.convs[0].forward(xs)?, train)?;
        let maps = maps.silu()?.avg_pool2d(2)?;
        let maps = second.forward_t(&self.convs[1].forward(&maps)?, train)?;
        self.head.forward(&maps.silu()?.mean((2, 3))?)
    }
}

/// Images `[N, 1, 8, 8]` in `[0, 1]`, and their classes.
fn digits() -> Result<(Tensor, Tensor)> {
    let mut text = String::new();
    let file = include_bytes!("../../../examples/data/digits.csv.gz");
    flate2::read::GzDecoder::new(&file[..]).read_to_string(&mut text)?;
    let numbers = text.split([',', '\n']).filter(|field| !field.is_empty());
    let numbers: Vec<f32> = numbers
        .map(|field| field.parse().map_err(Error::wrap))
        .collect::<Result<_>>()?;
    // A row is 64 pixels from 0 to 16, and the class.
    let rows = Tensor::from_vec(numbers, ((), 65), &Device::Cpu)?;
    let images = (rows.i((.., ..64))?.reshape(((), 1, 8, 8))? / 16.)?;
    Ok((images, rows.i((.., 64))?.to_dtype(DType::U32)?))
}

/// The variables in the order of their names.
fn named(vars: &VarMap) -> Result<Vec<(String, Var)>> {
    let data = vars.data().lock().map_err(|e| Error::msg(e.to_string()))?;
    let mut named: Vec<_> = data.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(named)
}

/// Draws the weights of the layers: candle's generator on the CPU cannot be seeded.
fn initialize(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    for (name, var) in named(vars)? {
        if var.rank() > 1 {
            let inputs: usize = var.dims()[1..].iter().product();
            let spread = (2. / inputs as f32).sqrt();
            let draw = |_| {
                let value: f32 = StandardNormal.sample(&mut rng);
                spread * value
            };
            let values: Vec<f32> = (0..var.elem_count()).map(draw).collect();
            var.set(&Tensor::from_vec(values, var.dims(), &Device::Cpu)?)?;
        } else if name == "head.bias" {
            var.set(&var.zeros_like()?)?;
        }
    }
    Ok(())
}

/// A digest of the bits of all variables.
fn digest(vars: &VarMap) -> Result<u64> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (_, var) in named(vars)? {
        let values = var.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        for byte in values.into_iter().flat_map(f64::to_le_bytes) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
    Ok(hash)
}

/// The name of the number of steps in a checkpoint.
const STEP: &str = "step";

/// Saves the variables, their step, and nothing half.
fn save(vars: &VarMap, step: u64, file: &Path) -> Result<()> {
    let mut tensors: std::collections::HashMap<String, Tensor> = named(vars)?
        .into_iter()
        .map(|(name, var)| (name, var.as_tensor().clone()))
        .collect();
    tensors.insert(STEP.into(), Tensor::new(step as i64, &Device::Cpu)?);
    let whole = file.with_extension("part");
    candle_core::safetensors::save(&tensors, &whole)?;
    Ok(fs::rename(whole, file)?)
}

/// The step to go on with, where there is a checkpoint.
fn load(vars: &VarMap, file: &Path) -> Result<u64> {
    if !file.exists() {
        return Ok(0);
    }
    let tensors = candle_core::safetensors::load(file, &Device::Cpu)?;
    for (name, var) in named(vars)? {
        match tensors.get(&name) {
            Some(value) => var.set(value)?,
            None => bail!("{}: no variable {name}", file.display()),
        }
    }
    match tensors.get(STEP) {
        Some(step) => Ok(step.to_scalar::<i64>()? as u64),
        None => bail!("{}: no number of steps", file.display()),
    }
}

/// Sum of a number over the ranks.
fn total(group: &dyn Collective, name: &'static str, value: f64) -> Result<f64> {
    let mut values = [value];
    group.all_reduce_sum(&Call::new(name), &mut values)?;
    Ok(values[0])
}

/// The median; of nothing, NaN.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The bar of the run, on rank 0 alone.
fn progress_bar(group: &dyn Collective, steps: u64) -> ProgressBar {
    if group.rank() > 0 {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn train(options: &Options, group: Arc<dyn Collective>) -> Result<()> {
    let (rank, ranks) = (group.rank(), group.size());
    let steps = if options.quick { 60 } else { options.steps };
    let (images, labels) = digits()?;
    let vars = VarMap::new();
    let of_norms = (options.norm == Statistics::Synchronized).then_some(&group);
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let net = Net::new(vb, of_norms)?;
    initialize(&vars, options.seed)?;
    // Rank 0 reads, and the others get what it read.
    let start = match (&options.checkpoint, rank) {
        (Some(file), 0) => load(&vars, file),
        _ => Ok(0),
    };
    let start = total(&*group, "start", agree(&*group, "load", start)? as f64)? as u64;
    broadcast_vars(&*group, &vars)?;

    let trained = trainable_vars(&vars);
    let mut optimizer = SGD::new(trained.clone(), options.learning_rate)?;
    let bar = progress_bar(&*group, steps);
    bar.set_position(start);
    let mut losses = vec![];
    let mut times = vec![];
    let per_epoch = batches(&shuffled(TRAIN, 0, 0), options.batch, ranks)?.count() as u64;
    for step in start..steps {
        let order = shuffled(TRAIN, options.seed, step / per_epoch);
        let mut epoch = batches(&order, options.batch, ranks)?;
        let Some(batch) = epoch.nth((step % per_epoch) as usize) else {
            bail!("no batch for step {step}")
        };
        let begun = Instant::now();
        let loss = at_step(step, || -> Result<f64> {
            let mine = shard(batch, rank, ranks)?;
            let index: Vec<u32> = mine.iter().map(|i| *i as u32).collect();
            let index = Tensor::new(index, &Device::Cpu)?;
            let logits = net.forward_t(&images.index_select(&index, 0)?, true)?;
            if options.kill == Some(step) && rank == ranks - 1 {
                let pid = std::process::id().to_string();
                Command::new("kill").args(["-9", &pid]).status()?;
            }
            // The mean over the share, as a part of the mean over the batch.
            let share = mine.len() as f64 / batch.len() as f64;
            let loss = loss::cross_entropy(&logits, &labels.index_select(&index, 0)?)?;
            let loss = (loss * share)?;
            let mut grads = loss.backward()?;
            sum_gradients(&*group, &trained, &mut grads)?;
            optimizer.step(&grads)?;
            total(&*group, "loss", f64::from(loss.to_scalar::<f32>()?))
        })?;
        losses.push((step, loss));
        times.push(begun.elapsed().as_secs_f64());
        bar.set_message(format!("loss {loss:.4}"));
        bar.inc(1);
        if (step + 1) % options.every == 0 || step + 1 == steps {
            if options.norm == Statistics::Synchronized {
                assert_same(&*group, &vars)?;
            }
            let saved = match (&options.checkpoint, rank) {
                (Some(file), 0) => save(&vars, step + 1, file),
                _ => Ok(()),
            };
            agree(&*group, "save", saved)?;
        }
    }
    bar.finish_and_clear();
    if rank > 0 {
        return Ok(());
    }
    let test = net.forward_t(&images.i(TRAIN..)?, false)?;
    let right = test.argmax(1)?.eq(&labels.i(TRAIN..)?)?;
    let right = right.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
    let last = losses.last().map_or(f64::NAN, |(_, loss)| *loss);
    let statistics = match options.norm {
        Statistics::Synchronized => "synchronized",
        Statistics::Local => "local",
    };
    println!(
        "{ranks} ranks, {statistics} statistics: loss {last:.6} after {steps} steps, {:.1} % of \
        the test digits, {:.3} ms a step, variables {:016x}",
        100. * right,
        1e3 * median(times),
        digest(&vars)?
    );
    if let Some(file) = &options.losses {
        let mut text = String::new();
        for (step, loss) in losses {
            text += &format!("{step},{loss:?}\n");
        }
        fs::write(file, text)?;
    }
    Ok(())
}

/// Losses by their steps.
fn read(file: &Path) -> Result<Vec<(u64, f64)>> {
    let line = |line: &str| {
        let (step, loss) = line.split_once(',')?;
        Some((step.parse().ok()?, loss.parse().ok()?))
    };
    let lines: Option<_> = fs::read_to_string(file)?.lines().map(line).collect();
    match lines {
        Some(losses) => Ok(losses),
        None => bail!("{}: expected lines of a step and a loss", file.display()),
    }
}

/// Compares the losses of the steps that both files have.
fn compare(files: &[PathBuf], tolerance: f64) -> Result<()> {
    let (a, b) = (read(&files[0])?, read(&files[1])?);
    let (mut common, mut worst) = (0, (0., 0));
    for (step, loss) in &a {
        if let Some((_, other)) = b.iter().find(|(s, _)| s == step) {
            common += 1;
            let difference = (loss - other).abs();
            if difference.is_nan() || difference > worst.0 {
                worst = (difference, *step);
            }
        }
    }
    let (difference, step) = worst;
    println!("{common} losses differ by at most {difference:.1e}, in step {step}");
    if common == 0 || difference.is_nan() || difference > tolerance {
        bail!("expected losses that differ by at most {tolerance:e}")
    }
    Ok(())
}

fn main() -> ExitCode {
    let options = Options::parse();
    let done = match &options.compare {
        Some(files) => compare(files, options.tolerance),
        None => {
            let waits = candle_norm_mpi::Options {
                time_limit: Duration::from_secs(options.time_limit),
                ..Default::default()
            };
            candle_norm_mpi::run_with(waits, |group| train(&options, group))
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
