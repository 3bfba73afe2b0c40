//! Parts that the examples have in common: the digits, training on them, initial values that are
//! the same on every run, and the output of a run.
#![allow(dead_code)] // Each example uses some of it.

use std::env;
use std::fmt::{self, Display, Formatter};
use std::io::{self, Read, Write};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Error, IndexOp, ModuleT, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW, VarMap, loss::cross_entropy};
use candle_norm::{NormConfig, param_groups};
use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};

/// Images to train on, as many as `scripts/make_digits_cnn.py` does; the other 500, by other
/// writers, are for testing.
const TRAIN: usize = 1297;

/// How the names of the two parameters of a weight norm end.
const LENGTH: &str = "original0";
const DIRECTION: &str = "original1";

/// Handwritten digits: images `[N, 1, 8, 8]` in `[0, 1]` and their classes `[N]`.
pub(crate) struct Digits {
    pub(crate) images: Tensor,
    pub(crate) labels: Tensor,
}

impl Digits {
    /// The digits to train on, and those to test on; they are embedded in the program.
    pub(crate) fn load() -> Result<(Self, Self)> {
        let mut text = String::new();
        let file = include_bytes!("../data/digits.csv.gz");
        flate2::read::GzDecoder::new(&file[..]).read_to_string(&mut text)?;
        let numbers: Vec<f32> = text
            .split([',', '\n'])
            .filter(|field| !field.is_empty())
            .map(|field| field.parse().map_err(Error::wrap))
            .collect::<Result<_>>()?;
        // A row is 64 pixels from 0 to 16, and the class.
        let rows = Tensor::from_vec(numbers, ((), 65), &Device::Cpu)?;
        Ok((Self::new(&rows.i(..TRAIN)?)?, Self::new(&rows.i(TRAIN..)?)?))
    }

    fn new(rows: &Tensor) -> Result<Self> {
        Ok(Self {
            images: (rows.i((.., ..64))?.reshape(((), 1, 8, 8))? / 16.)?,
            labels: rows.i((.., 64))?.to_dtype(DType::U32)?,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.labels.dims()[0]
    }

    /// The images at these positions, in this order.
    pub(crate) fn select(&self, positions: &[u32]) -> Result<Self> {
        let index = Tensor::new(positions, &Device::Cpu)?;
        Ok(Self {
            images: self.images.index_select(&index, 0)?,
            labels: self.labels.index_select(&index, 0)?,
        })
    }

    /// The share of the images, in percent, whose class has the highest of the `logits` `[N, 10]`.
    pub(crate) fn accuracy(&self, logits: &Tensor) -> Result<f32> {
        let right = logits.argmax(1)?.eq(&self.labels)?;
        Ok(100. * right.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?)
    }

    /// Asks `net` for its answers, in inference; as often as `passes`, to see how fast it can be.
    pub(crate) fn evaluate(&self, net: &impl ModuleT, passes: usize) -> Result<Evaluation> {
        let (mut logits, mut fastest) = (self.images.clone(), Duration::MAX);
        for _ in 0..passes {
            let start = Instant::now();
            logits = net.forward_t(&self.images, false)?;
            fastest = fastest.min(start.elapsed());
        }
        Ok(Evaluation {
            accuracy: self.accuracy(&logits)?,
            logits,
            fastest,
        })
    }

    /// Trains the variables `vars` of `net` on batches of `size`, in order, with AdamW.
    pub(crate) fn train(
        &self,
        net: &impl ModuleT,
        vars: Vec<Var>,
        size: usize,
        epochs: usize,
    ) -> Result<()> {
        let mut optimizer = AdamW::new_lr(vars, 5e-3)?;
        let batches = self.images.dim(0)? / size;
        for start in (0..epochs * batches).map(|step| step % batches * size) {
            let logits = net.forward_t(&self.images.narrow(0, start, size)?, true)?;
            let loss = cross_entropy(&logits, &self.labels.narrow(0, start, size)?)?;
            optimizer.backward_step(&loss)?;
        }
        Ok(())
    }
}

/// Answers of a network to some digits.
pub(crate) struct Evaluation {
    pub(crate) logits: Tensor,
    /// In percent.
    pub(crate) accuracy: f32,
    /// The time of the fastest pass.
    pub(crate) fastest: Duration,
}

impl Display for Evaluation {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        write!(f, "{:6.1} %  {:.1?}", self.accuracy, self.fastest)
    }
}

/// How the models learn: AdamW, its learning rate rising for `warm_up` steps and falling to zero at
/// the last.
pub(crate) struct Training {
    pub(crate) steps: usize,
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f64,
    pub(crate) warm_up: usize,
}

impl Training {
    /// Takes the steps, each down the gradient of the `loss` of its number, and shows a bar.
    pub(crate) fn run(
        &self,
        vars: &VarMap,
        loss: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<()> {
        self.run_with(vars, &progress_bar(self.steps), loss)
    }

    /// The same with a bar of the caller's.
    pub(crate) fn run_with(
        &self,
        vars: &VarMap,
        bar: &ProgressBar,
        mut loss: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<()> {
        let mut optimizers = adamw(vars, self.weight_decay)?;
        for step in 0..self.steps {
            let grads = loss(step)?.backward()?;
            let warm = (step + 1) as f64 / self.warm_up as f64;
            let left = 1. - step as f64 / self.steps as f64;
            for optimizer in &mut optimizers {
                optimizer.set_learning_rate(self.learning_rate * warm.min(left));
                optimizer.step(&grads)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(())
    }
}

/// AdamW for the weights, and one without decay for the rest: decay would pull the scales of norms
/// to zero.
fn adamw(vars: &VarMap, weight_decay: f64) -> Result<[AdamW; 2]> {
    let groups = param_groups(vars);
    let new = |vars, weight_decay| {
        let params = ParamsAdamW {
            weight_decay,
            ..Default::default()
        };
        AdamW::new(vars, params)
    };
    Ok([new(groups.decay, weight_decay)?, new(groups.no_decay, 0.)?])
}

/// The positions of `count` samples in batches of `size`, each epoch in another order; what is left
/// over waits for another epoch.
pub(crate) fn batches(
    count: usize,
    size: usize,
    epochs: usize,
    rng: &mut impl Rng,
) -> Vec<Vec<u32>> {
    let mut batches = vec![];
    for _ in 0..epochs {
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.shuffle(rng);
        batches.extend(order.chunks_exact(size).map(<[u32]>::to_vec));
    }
    batches
}

/// A norm by its name; "group" alone is of 8 groups.
pub(crate) fn norm(name: &str) -> Result<NormConfig> {
    if name == "group" { "group:8" } else { name }.parse()
}

/// Draws weights of two axes or more from a normal distribution, He-scaled, in the order of their
/// names, and zeroes biases; the weights of norms stay the ones that they are, and a weight norm
/// gets the length of what was drawn. candle's own generator cannot be seeded on the CPU.
pub(crate) fn initialize(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let vars = vars.data().lock().expect("no thread panicked");
    let mut named: Vec<_> = vars.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (name, var) in named {
        if name.ends_with("bias") {
            var.set(&var.zeros_like()?.detach())?;
        } else if name.ends_with(LENGTH) {
            // Of a direction that is not drawn yet.
        } else if var.rank() >= 2 {
            let fan_in = var.elem_count() / var.dims()[0];
            let normal = Normal::new(0f32, (2. / fan_in as f32).sqrt()).map_err(Error::wrap)?;
            let values = normal.sample_iter(&mut rng).take(var.elem_count());
            var.set(&Tensor::from_vec(
                values.collect(),
                var.shape(),
                &Device::Cpu,
            )?)?;
        }
    }
    for (name, length) in vars.iter() {
        if let Some(direction) = name.strip_suffix(LENGTH) {
            let drawn = vars[&format!("{direction}{DIRECTION}")].flatten_from(1)?;
            length.set(&drawn.sqr()?.sum(1)?.sqrt()?.reshape(length.shape())?)?;
        }
    }
    Ok(())
}

/// The largest absolute difference of two tensors; infinite where one of them is NaN.
pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let differences = (a - b)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    let or_infinite = |d: f32| if d.is_nan() { f32::INFINITY } else { d };
    Ok(differences.into_iter().map(or_infinite).fold(0., f32::max))
}

/// A bar of `steps` with the time that is left. It draws on the terminal, and nothing where
/// standard error is none.
pub(crate) fn progress_bar(steps: usize) -> ProgressBar {
    let style = "{bar:40} {percent:>3}\u{a0}%  {pos}/{len} steps  {elapsed} so far, {eta} to go";
    let style = ProgressStyle::with_template(style).expect("a template that indicatif reads");
    ProgressBar::new(steps as u64).with_style(style)
}

/// Images `[H, W]` of gray from 0 to 1, side by side, a pixel two characters wide.
pub(crate) fn picture(images: &[Tensor]) -> Result<String> {
    const INKS: [&str; 5] = [
        "  ",
        "\u{2591}\u{2591}",
        "\u{2592}\u{2592}",
        "\u{2593}\u{2593}",
        "\u{2588}\u{2588}",
    ];
    let mut lines: Vec<String> = vec![];
    for image in images {
        for (y, row) in image.to_vec2::<f32>()?.into_iter().enumerate() {
            let level = |gray: f32| (gray.clamp(0., 1.) * (INKS.len() - 1) as f32).round();
            let row: String = row
                .into_iter()
                .map(|gray| INKS[level(gray) as usize])
                .collect();
            match lines.get_mut(y) {
                Some(line) => *line += &format!("  {row}"),
                None => lines.push(row),
            }
        }
    }
    Ok(lines.join("\n"))
}

/// Warning of every run with `--quick`, on the terminal and in reports.
pub(crate) const ROUGH: &str =
    "These figures are rough: a run with --quick takes a few steps only.";

/// Prints [`ROUGH`] after a quick run.
pub(crate) fn warn_if_quick(quick: bool) {
    if quick {
        // A reader that has seen enough, such as `head`, is no failure of the example.
        let _ = writeln!(io::stdout(), "{ROUGH}");
    }
}

/// Runs an example in [single-threaded candle](in_single_threaded_candle), says what went wrong,
/// and warns that the figures of a
/// `quick` run are rough.
pub(crate) fn run<E: Display>(
    quick: bool,
    example: impl FnOnce() -> std::result::Result<(), E>,
) -> ExitCode {
    if let Some(code) = in_single_threaded_candle() {
        return code;
    }
    match example() {
        Ok(()) => {
            warn_if_quick(quick);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs this program again with candle's own threads switched off, unless that was done or decided
/// before.
///
/// Networks this small train fastest on one thread each. Candle reads the number of its threads
/// from the environment; with more than one they wait for each other by spinning, and every matrix
/// product looks the number of cores up anew, which together multiplies the time of a step on a
/// busy machine.
fn in_single_threaded_candle() -> Option<ExitCode> {
    let unset: Vec<_> = ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"]
        .into_iter()
        .filter(|name| env::var_os(name).is_none())
        .collect();
    if unset.is_empty() {
        return None;
    }
    let mut program = Command::new(env::current_exe().ok()?);
    program
        .args(env::args_os().skip(1))
        .envs(unset.into_iter().map(|name| (name, "1")));
    let code = program.status().ok()?.code();
    Some(
        code.and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from),
    )
}
