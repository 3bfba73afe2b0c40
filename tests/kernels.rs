//! The fused kernels against loops in float64: the same suite for every instruction set and dtype,
//! and for the CUDA kernels on the emulator.
//!
//! Tests that this processor cannot run are reported as ignored, by name:
//! `avx512::f32::layer_norm ... ignored`. The sizes are those at which a blocking has a remainder,
//! whatever the blocking is: lanes, rows that go together, runs, blocks, jobs.

// Its own tests are for the harness of the other programs.
#[allow(unused_imports)]
mod common;
#[path = "kernels/edges.rs"]
mod edges;
#[path = "kernels/layers.rs"]
mod layers;
#[path = "kernels/layouts.rs"]
mod layouts;
#[path = "kernels/long.rs"]
mod long;
#[path = "kernels/weight_norm.rs"]
mod weight_norm;

use candle_core::{DType, Result};
use candle_norm::internals::Level;
use candle_norm::{Path, with_path};
use libtest_mimic::{Arguments, Trial};

use common::compare::tolerance;
use common::data::Draw;
use common::subjects::{DTypes, Kind, Numbers, Subject};

/// Instruction set of the kernels, and the dtype that they work on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamp {
    kernels: Kernels,
    pub(crate) dtype: DType,
}

#[derive(Debug, Clone, Copy)]
enum Kernels {
    /// Those of the CPU for an instruction set.
    Cpu(Level),
    /// Those of NVIDIA GPUs.
    Emulated,
}

/// The most elements of one of many shapes on the emulator, which takes a microsecond for each.
const MOST_EMULATED: usize = 1_000;

/// The most elements of a shape on the emulator.
const LONGEST_EMULATED: usize = 60_000;

/// The parameters that a layer has: a weight, a bias.
const FORMS: [(bool, bool); 4] = [(true, true), (true, false), (false, true), (false, false)];

impl Stamp {
    /// Runs `f` on the kernels of this instruction set.
    pub(crate) fn run<T>(self, f: impl FnOnce() -> Result<T>) -> T {
        let ran = match self.kernels {
            Kernels::Cpu(level) => level.force(|| with_path(Path::Fused, f)),
            Kernels::Emulated => Some(with_path(Path::Emulated, f)),
        };
        match ran {
            Some(result) => result.expect("a call that the path serves"),
            None => panic!("this processor does not have {:?}", self.kernels),
        }
    }

    /// The most elements of one of many shapes, of which there are up to `most` on the CPU.
    pub(crate) fn limit(self, most: usize) -> usize {
        match self.kernels {
            Kernels::Cpu(_) => most,
            Kernels::Emulated => most.min(MOST_EMULATED),
        }
    }

    /// Whether a shape of as many elements is not too large.
    pub(crate) fn takes(self, elements: usize) -> bool {
        match self.kernels {
            Kernels::Cpu(_) => true,
            Kernels::Emulated => elements <= LONGEST_EMULATED,
        }
    }

    pub(crate) fn tolerance(self) -> f64 {
        tolerance(self.dtype)
    }

    /// The dtypes of one of many cases: half precision takes turns with parameters of its own and
    /// with those of `f32`.
    pub(crate) fn dtypes(self, case: usize) -> DTypes {
        let half = matches!(self.dtype, DType::F16 | DType::BF16);
        match half && case % 2 == 1 {
            true => DTypes {
                input: self.dtype,
                params: DType::F32,
            },
            false => self.dtype.into(),
        }
    }

    /// Compares `y`, `dx`, `dweight` and `dbias` of one of many cases, which take turns with the
    /// parameters that there are.
    pub(crate) fn check(self, case: usize, kind: Kind, dims: &[usize]) {
        if !self.takes(dims.iter().product()) {
            return;
        }
        let subject = Subject::new(kind, 1e-5);
        let numbers = numbers(subject, dims, FORMS[case % FORMS.len()], 0.5);
        self.check_numbers(&numbers, subject, dims, self.dtypes(case / FORMS.len()));
    }

    pub(crate) fn check_numbers(
        self,
        numbers: &Numbers,
        subject: Subject,
        dims: &[usize],
        dtypes: DTypes,
    ) {
        let ran = self.run(|| numbers.run(subject, dims, dtypes));
        numbers.check_against_oracle(&ran, subject, dims, dtypes, self.tolerance());
    }
}

/// Numbers of a mean and a spread of 1, and as many parameters as `form` says.
pub(crate) fn numbers(subject: Subject, dims: &[usize], form: (bool, bool), mean: f64) -> Numbers {
    let n = dims.iter().product();
    let params = subject.param_dims(dims).iter().product();
    let mut draw = Draw::new(n as u64);
    Numbers {
        x: draw.normal(n).into_iter().map(|z| mean + z).collect(),
        dy: draw.normal(n),
        weight: form.0.then(|| draw.weight(params)),
        bias: (form.1 && subject.kind.has_bias()).then(|| draw.normal(params)),
    }
}

type Check = (&'static str, fn(Stamp));

/// Stamps a suite of functions of a [`Stamp`] out by name.
macro_rules! suite {
    ($($module:ident: $($check:ident),+;)+) => {
        [$($((stringify!($check), $module::$check as fn(Stamp)),)+)+]
    };
}

/// The checks of a dtype.
fn suite(dtype: DType) -> Vec<Check> {
    let all = suite! {
        layers: layer_norm, layer_norm_of_axes, layer_norm_channels_first, layer_norm_without_mean,
            rms_norm, rms_norm_channels_first, rms_norm_cast_before_weight, scale_norm,
            scale_norm_of_short_rows, group_norm, instance_norm, batch_norm,
            batch_norm_without_mean, batch_norm_inference, batch_statistics, switch_norm;
        weight_norm: weight_norm, weight_norm_of_any_size;
        layouts: layouts_of_the_input, layouts_of_the_cotangent, layouts_of_a_direction;
        edges: large_means, what_is_not_finite_stays_in_its_row, constant_rows;
        long: few_long_rows;
    };
    let of_f32 = suite! { long: sixteen_million_elements; };
    match dtype {
        DType::F32 => [&all[..], &of_f32].concat(),
        _ => all.to_vec(),
    }
}

/// Every check of the suite for every instruction set and dtype, those ignored that this processor
/// cannot run.
fn trials() -> Vec<Trial> {
    let dtypes = [
        ("f32", DType::F32),
        ("f64", DType::F64),
        ("f16", DType::F16),
        ("bf16", DType::BF16),
    ];
    let levels = Level::ALL.map(|level| {
        let set = format!("{level:?}").to_lowercase();
        (set, Kernels::Cpu(level), level.is_available())
    });
    let emulated = ("emulated".to_string(), Kernels::Emulated, true);
    let mut trials = vec![];
    for (set, kernels, is_available) in levels.into_iter().chain([emulated]) {
        for (name, dtype) in dtypes {
            for (check, run) in suite(dtype) {
                let trial = Trial::test(format!("{set}::{name}::{check}"), move || {
                    run(Stamp { kernels, dtype });
                    Ok(())
                });
                trials.push(trial.with_ignored_flag(!is_available));
            }
        }
    }
    trials
}

fn main() {
    libtest_mimic::run(&Arguments::from_args(), trials()).exit();
}
