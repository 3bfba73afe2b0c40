//! Groups of ranks over MPI, for [`candle_norm::distributed`].
//!
//! [`run`] starts MPI, hands the group of all ranks to a function, and ends MPI after it. A rank
//! that fails or panics ends the job with its message, on all hosts, where it would otherwise leave
//! the others waiting for ever.
//!
//! ```no_run
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use candle_norm::{batch_norm, distributed::broadcast_vars};
//!
//! fn main() -> Result<()> {
//!     candle_norm_mpi::run(|group| {
//!         let vars = VarMap::new();
//!         let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//!         let norm = batch_norm(3, 1e-5, vb)?.synchronized(group.clone());
//!         broadcast_vars(&*group, &vars)?;
//!         let x = Tensor::randn(0f32, 1., (8, 3, 16, 16), &Device::Cpu)?;
//!         norm.forward_train(&x)?;
//!         Ok(())
//!     })
//! }
//! ```
//!
//! ```sh
//! mpirun -n 4 target/release/program
//! ```
//!
//! Started without `mpirun`, the program is one rank.
//!
//! # Faults
//! - **A rank that does not come**: each call has a [time limit](Options::time_limit), after which
//!   the rank that waits ends the job and says in which call it was.
//! - **Different calls**: before a call the ranks compare its name, length, dtype and step number,
//!   and all of them get an error that says what each of them called ([`Checks`]). Without that,
//!   MPI may sum numbers that do not belong together.
//! - **Different sums**: MPI recommends that a sum has the same bits on every rank, and does not
//!   promise it. Calls that are checked compare the results too.
//! - **A rank that is killed**: `mpirun` ends the others and says so.

mod checks;
mod group;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use candle_core::{Result, bail};
use candle_norm::distributed::Collective;
use ferrompi::{Mpi, ThreadLevel};

pub use checks::Checks;
use group::Ranks;

/// How the ranks of a [`run_with`] wait and check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The longest that a rank waits for the others in one call. What ranks do between two calls
    /// counts too: loading data, evaluating, or saving a checkpoint on one of them. Default: five
    /// minutes.
    pub time_limit: Duration,
    /// Calls that are compared. Default: every call in a debug build, else the first 10 000.
    pub checks: Checks,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            time_limit: Duration::from_secs(300),
            checks: Checks::default(),
        }
    }
}

/// Runs `f` with the group of all ranks that `mpirun` started, and returns its result.
///
/// An error of `f`, and a panic, end the job: the message is on stderr, and the exit status of
/// `mpirun` is not zero. So this returns only where `f` succeeds on this rank. MPI starts once in
/// a process.
///
/// # Errors
/// MPI that does not start, or that has been started before.
pub fn run<T>(f: impl FnOnce(Arc<dyn Collective>) -> Result<T>) -> Result<T> {
    run_with(Options::default(), f)
}

/// [`run`] with other options.
///
/// # Errors
/// As [`run`].
pub fn run_with<T>(
    options: Options,
    f: impl FnOnce(Arc<dyn Collective>) -> Result<T>,
) -> Result<T> {
    let mpi = match Mpi::init_thread(ThreadLevel::Serialized) {
        Ok(mpi) => mpi,
        Err(e) => {
            let layer = "run";
            bail!("{layer}: expected MPI to start, got: {e}; it starts once in a process")
        }
    };
    let world = Arc::new(Ranks::world(&mpi, options)?);
    let group: Arc<dyn Collective> = world.clone();
    match catch_unwind(AssertUnwindSafe(|| f(group))) {
        Ok(Ok(value)) => {
            if let Err(e) = world.end() {
                world.abort(&e.to_string())
            }
            drop(world);
            drop(mpi);
            Ok(value)
        }
        Ok(Err(e)) => world.abort(&e.to_string()),
        Err(payload) => world.abort(&format!("panicked: {}", message(&*payload))),
    }
}

/// The message of a panic.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "without a message".to_string())
}
