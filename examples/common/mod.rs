//! What the examples share: the digits, how they are learned, and a start that is the same on every run.
#![allow(dead_code)] // Each example uses some of it.

use std::env;
use std::io::Read;
use std::process::{Command, ExitCode};

use candle_core::{DType, Device, Error, IndexOp, ModuleT, Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer, VarMap, loss::cross_entropy};
use rand::SeedableRng;
use rand_distr::{Distribution, Normal};

/// Images to train on, as many as `scripts/make_digits_cnn.py` does; the other 500, by other writers, are for testing.
const TRAIN: usize = 1297;

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

    /// The share of the images, in percent, whose class has the highest of the `logits` `[N, 10]`.
    pub(crate) fn accuracy(&self, logits: &Tensor) -> Result<f32> {
        let right = logits.argmax(1)?.eq(&self.labels)?;
        Ok(100. * right.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?)
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

/// Draws weights of two axes or more from a normal distribution, He-scaled, in the order of their names, and zeroes biases; the
/// weights of norms stay the ones that they are. candle's own generator cannot be seeded on the CPU.
pub(crate) fn initialize(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let vars = vars.data().lock().expect("no thread panicked");
    let mut named: Vec<_> = vars.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (name, var) in named {
        if name.ends_with("bias") {
            var.set(&var.zeros_like()?.detach())?;
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
    Ok(())
}

/// The largest absolute difference of two tensors; infinite where one of them is NaN.
pub(crate) fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let differences = (a - b)?.abs()?.flatten_all()?.to_vec1::<f32>()?;
    let or_infinite = |d: f32| if d.is_nan() { f32::INFINITY } else { d };
    Ok(differences.into_iter().map(or_infinite).fold(0., f32::max))
}

/// Runs this program again with candle's own threads switched off, unless that was done or decided before.
///
/// Networks this small train fastest on one thread each. Candle reads the number of its threads from the
/// environment; with more than one they wait for each other by spinning, and every matrix product looks the number of
/// cores up anew, which together multiplies the time of a step on a busy machine.
pub(crate) fn in_single_threaded_candle() -> Option<ExitCode> {
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
