//! Times that can be compared: all entrants take turns, so that a slow minute of the machine
//! strikes each of them.

use std::hint::black_box;
use std::thread::sleep;
use std::time::{Duration, Instant};

use candle_core::{Error, Result};

/// How long PyTorch's threads are given to fall asleep. After a parallel region they spin for some
/// milliseconds, on cores that the next entrant needs.
const SPIN: Duration = Duration::from_millis(15);

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// How many turns an entrant has at most.
    pub(crate) rounds: usize,
    /// How long a turn lasts at least.
    pub(crate) turn: Duration,
    /// An entrant that has used this up and had [`Plan::FEWEST`] turns sits the rest out.
    pub(crate) budget: Duration,
}

impl Plan {
    /// The median of fewer would be noise.
    const FEWEST: usize = 5;
    /// Warming up ends here, steady or not.
    const WARM_UP: Duration = Duration::from_millis(300);

    pub(crate) fn full() -> Self {
        Self {
            rounds: 21,
            turn: Duration::from_millis(5),
            budget: Duration::from_secs(3),
        }
    }

    pub(crate) fn quick() -> Self {
        Self {
            rounds: Self::FEWEST,
            turn: Duration::from_millis(2),
            budget: Duration::ZERO,
        }
    }
}

/// The threads that everything in this process runs on.
pub(crate) enum Threads {
    /// A pool of its own, entered once a turn.
    Pool(rayon::ThreadPool),
    /// The global pool, called from the main thread as an ordinary program does; waking it is part
    /// of each call.
    Global,
}

impl Threads {
    pub(crate) fn pool(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        Ok(Self::Pool(pool.build().map_err(Error::wrap)?))
    }

    pub(crate) fn global(threads: usize) -> Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(Error::wrap)?;
        Ok(Self::Global)
    }

    pub(crate) fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match self {
            Self::Pool(pool) => pool.install(f),
            Self::Global => f(),
        }
    }
}

/// The time of `iterations` calls after `warm` others that do not count. A call allocates its
/// results, and drops them when it is done.
type Timer<'a> = Box<dyn FnMut(usize, usize) -> Result<Duration> + 'a>;

/// One who takes turns.
pub(crate) struct Entrant<'a> {
    pub(crate) name: &'static str,
    timer: Timer<'a>,
    settle: Duration,
}

impl<'a> Entrant<'a> {
    /// `step` on `threads`.
    pub(crate) fn local<T>(
        name: &'static str,
        threads: &'a Threads,
        step: impl Fn() -> Result<T> + Send + Sync + 'a,
    ) -> Self {
        let timer = move |warm, iterations| {
            threads.run(|| {
                for _ in 0..warm {
                    black_box(step()?);
                }
                let start = Instant::now();
                for _ in 0..iterations {
                    black_box(step()?);
                }
                Ok(start.elapsed())
            })
        };
        Self {
            name,
            timer: Box::new(timer),
            settle: Duration::ZERO,
        }
    }

    /// One that is timed in another process.
    pub(crate) fn remote(
        name: &'static str,
        timer: impl FnMut(usize, usize) -> Result<Duration> + 'a,
    ) -> Self {
        Self {
            name,
            timer: Box::new(timer),
            settle: SPIN,
        }
    }

    fn turn(&mut self, warm: usize, iterations: usize) -> Result<Duration> {
        let time = (self.timer)(warm, iterations);
        sleep(self.settle);
        time
    }

    /// Runs until two turns of full length agree, and says how many iterations such a turn has and
    /// how many should go before it.
    fn warm_up(&mut self, plan: &Plan) -> Result<(usize, usize)> {
        let start = Instant::now();
        let mut iterations = 1;
        let mut last = Duration::MAX;
        loop {
            let time = self.turn(0, iterations)?;
            let each = time / iterations as u32;
            let long_enough = time >= plan.turn;
            let steady = last.abs_diff(each) < each / 20;
            if long_enough && (steady || start.elapsed() > Plan::WARM_UP) {
                // The entrant before will have filled the caches and the allocator with its own,
                // which a call of more than a tenth of a second does not notice.
                let slow = each > Duration::from_millis(100);
                return Ok((iterations, if slow { 0 } else { iterations.div_ceil(5) }));
            }
            if !long_enough {
                // A little more than what is missing, and never more than ten times as much on the
                // word of one call.
                let grow = plan.turn.as_secs_f64() / time.as_secs_f64().max(1e-9) * 1.1;
                iterations = (iterations as f64 * grow.clamp(1.2, 10.)).ceil() as usize;
            }
            last = each;
        }
    }
}

/// The median time of one call of each entrant in milliseconds, or why there is none.
pub(crate) fn measure(entrants: &mut [Entrant], plan: &Plan) -> Vec<Result<f64>> {
    struct Record {
        iterations: usize,
        warm: usize,
        times: Vec<f64>,
        spent: Duration,
    }
    let warmed_up = entrants.iter_mut().map(|entrant| {
        entrant.warm_up(plan).map(|(iterations, warm)| Record {
            iterations,
            warm,
            times: vec![],
            spent: Duration::ZERO,
        })
    });
    let mut records: Vec<Result<Record>> = warmed_up.collect();
    for _ in 0..plan.rounds {
        for (entrant, slot) in entrants.iter_mut().zip(&mut records) {
            let Ok(record) = slot else { continue };
            if record.times.len() >= Plan::FEWEST && record.spent > plan.budget {
                continue;
            }
            let start = Instant::now();
            match entrant.turn(record.warm, record.iterations) {
                Ok(time) => {
                    let each = time.as_secs_f64() * 1e3 / record.iterations as f64;
                    record.times.push(each);
                    record.spent += start.elapsed();
                }
                Err(error) => *slot = Err(error),
            }
        }
    }
    let median = |record: Record| {
        let mut times = record.times;
        times.sort_by(f64::total_cmp);
        let middle = times.len() / 2;
        match times.len() % 2 {
            0 => (times[middle - 1] + times[middle]) / 2.,
            _ => times[middle],
        }
    };
    records.into_iter().map(|r| r.map(median)).collect()
}
