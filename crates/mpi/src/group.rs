//! The ranks of an MPI communicator as a group.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Result, bail};
use candle_norm::distributed::{Call, Collective};
use ferrompi::{Communicator, Mpi, MpiDatatype, ReduceOp, Request};

use crate::Options;
use crate::checks::{TEXT, fingerprint, packed, unpacked};

/// A communicator, and another of the same ranks for what they compare: a rank that makes another
/// call than the others then meets them in the comparison, and no message of one call is taken for
/// that of another.
pub(crate) struct Ranks {
    data: Communicator,
    control: Communicator,
    options: Options,
    /// Calls so far.
    calls: AtomicU64,
    /// This rank among all of the job, and their number, for messages.
    of_world: (i32, i32),
    /// How often a rank that waits looks again before it hands its processor to others.
    spins: u32,
}

/// The processors of this host, also where this process is bound to one of them.
fn processors() -> usize {
    let file = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let listed = file.lines().filter(|line| line.starts_with("processor"));
    match listed.count() {
        0 => thread::available_parallelism().map_or(1, usize::from),
        count => count,
    }
}

impl Ranks {
    pub(crate) fn world(mpi: &Mpi, options: Options) -> Result<Self> {
        let data = mpi.world();
        let of_world = (data.rank(), data.size());
        Self::of(data, options, of_world)
    }

    fn of(data: Communicator, options: Options, of_world: (i32, i32)) -> Result<Self> {
        Ok(Self {
            control: mpi("duplicate", data.duplicate())?,
            data,
            options,
            calls: AtomicU64::new(0),
            of_world,
            // Where ranks share a processor, the one that is waited for may need this one.
            spins: match of_world.1 as usize <= processors() {
                true => 100,
                false => 0,
            },
        })
    }

    /// Ends the job, on all hosts, with a message of this rank.
    pub(crate) fn abort(&self, text: &str) -> ! {
        // Without the backtrace, which candle appends.
        let line = text.lines().next().unwrap_or_default();
        let (rank, size) = self.of_world;
        // In one piece, since several ranks may write at once.
        let message = format!("rank {rank} of {size} ends the job: {line}\n");
        let _ = io::stderr().write_all(message.as_bytes());
        self.data.abort(1)
    }

    /// Meets the other ranks at the end: one that makes another call is told so.
    pub(crate) fn end(&self) -> Result<()> {
        match self
            .options
            .checks
            .includes(self.calls.load(Ordering::Relaxed))
        {
            true => self.check("the end of the run"),
            false => Ok(()),
        }
    }

    /// Waits for `request`, but not for ever: its buffers belong to MPI until it is done, and so
    /// the job ends where it is not.
    fn wait(&self, mut request: Request<'_>, call: &str) -> ferrompi::Result<()> {
        let start = Instant::now();
        let mut tries = 0u32;
        while request.test()?.is_none() {
            tries = tries.saturating_add(1);
            let waited = start.elapsed();
            if waited > self.options.time_limit {
                self.abort(&format!(
                    "waited {waited:.1?} for the other ranks in {call}; one of them was killed, \
                    cannot be reached, or makes no such call"
                ))
            }
            // Other ranks may need this processor.
            match (tries, waited.as_millis()) {
                (tries, _) if tries < self.spins => std::hint::spin_loop(),
                (_, ..5) => thread::yield_now(),
                _ => thread::sleep(Duration::from_micros(50)),
            }
        }
        Ok(())
    }

    /// Whether all ranks have this number.
    fn is_same(&self, number: i64, call: &str) -> Result<bool> {
        let mut both = [number, -number];
        let done = ferrompi::scope(|s| {
            let request = self
                .control
                .iallreduce_inplace(s, &mut both, ReduceOp::Max)?;
            self.wait(request, call)
        });
        mpi("compare", done)?;
        Ok(both[0] == -both[1])
    }

    /// An error on every rank unless all of them make this `call`.
    fn check(&self, call: &str) -> Result<()> {
        if self.is_same(fingerprint(call.bytes()), call)? {
            return Ok(());
        }
        let own = packed(call);
        let mut all = vec![0u8; TEXT * self.size()];
        let done = ferrompi::scope(|s| {
            let request = self.control.iallgather(s, &own, &mut all)?;
            self.wait(request, call)
        });
        mpi("compare", done)?;
        let calls: Vec<String> = all.chunks(TEXT).map(unpacked).collect();
        let other = calls.iter().position(|other| *other != calls[0]);
        let other = other.unwrap_or_default();
        let layer = "MPI";
        bail!(
            "{layer}: expected the same call on every rank, got {} on rank 0 and {} on rank \
            {other}; do all ranks have the same model and take the same steps?",
            calls[0],
            calls[other]
        )
    }

    /// The sums of `values` over all ranks, with the same bits on each.
    fn sum<T>(&self, call: &Call, dtype: &str, values: &mut [T]) -> Result<()>
    where
        T: MpiDatatype + Copy,
        u64: Bits<T>,
    {
        let what = format!("a sum of {} {dtype} by {call}", values.len());
        let checked = self.is_checked();
        if checked {
            self.check(&what)?;
        }
        let done = ferrompi::scope(|s| {
            let request = self.data.iallreduce_inplace(s, values, ReduceOp::Sum)?;
            self.wait(request, &what)
        });
        mpi("all_reduce_sum", done)?;
        if !checked {
            return Ok(());
        }
        let bytes = values.iter().flat_map(|v| u64::bits(*v).to_le_bytes());
        if self.is_same(fingerprint(bytes), &what)? {
            return Ok(());
        }
        let layer = "MPI";
        bail!(
            "{layer}: expected the same bits of {what} on every rank, got others; choose an \
            algorithm of MPI that adds up in one order on all ranks (Open MPI: --mca \
            coll_tuned_use_dynamic_rules 1 --mca coll_tuned_allreduce_algorithm 2)"
        )
    }

    fn is_checked(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        self.options.checks.includes(call)
    }
}

/// The bits of an element.
trait Bits<T> {
    fn bits(value: T) -> u64;
}

impl Bits<f64> for u64 {
    fn bits(value: f64) -> u64 {
        value.to_bits()
    }
}

impl Bits<f32> for u64 {
    fn bits(value: f32) -> u64 {
        u64::from(value.to_bits())
    }
}

impl Collective for Ranks {
    fn rank(&self) -> usize {
        self.data.rank() as usize
    }

    fn size(&self) -> usize {
        self.data.size() as usize
    }

    fn all_reduce_sum(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        self.sum(call, "f64", values)
    }

    fn all_reduce_sum_f32(&self, call: &Call, values: &mut [f32]) -> Result<()> {
        self.sum(call, "f32", values)
    }

    fn broadcast(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        let what = format!("a broadcast of {} f64 by {call}", values.len());
        if self.is_checked() {
            self.check(&what)?;
        }
        let done = ferrompi::scope(|s| {
            let request = self.data.ibroadcast(s, values, 0)?;
            self.wait(request, &what)
        });
        mpi("broadcast", done)
    }

    fn split(&self, color: usize) -> Result<Arc<dyn Collective>> {
        // A color beyond the range of MPI's is one on every rank, or an error on every rank.
        let small = i32::try_from(color).ok();
        self.is_checked();
        self.check(match small {
            Some(_) => "a split",
            None => "a split by a color above 2147483647",
        })?;
        let part = mpi("split", self.data.split(small, self.data.rank()))?;
        match part {
            Some(part) => Ok(Arc::new(Self::of(part, self.options, self.of_world)?)),
            None => {
                let layer = "MPI";
                bail!("{layer}: expected a color of at most 2147483647, got {color}")
            }
        }
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ranks")
            .field("rank", &self.data.rank())
            .field("size", &self.data.size())
            .finish()
    }
}

/// A result of MPI.
fn mpi<T>(what: &str, result: ferrompi::Result<T>) -> Result<T> {
    match result {
        Ok(value) => Ok(value),
        Err(e) => {
            let layer = "MPI";
            bail!("{layer}: expected {what} to succeed, got: {e}")
        }
    }
}
