//! Ranks as threads of one process.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{Result, bail};

use super::{Call, Collective};

/// Ranks in one process, one for each thread: for tests, and for training on the CPU where one
/// process is enough.
///
/// Sums are formed in the order of the ranks, so that they have the same bits on every run. A call
/// that not all ranks make within a time limit is an error that names those that are missing; so is
/// a call after a rank has returned, failed or panicked, at once. After that the group is of no
/// use. Where the ranks make different calls, each of them gets the error, and the group goes on.
///
/// Every rank has variables of its own, as processes have: ranks that train the same running
/// statistics would update them once each.
///
/// ```
/// use candle_norm::distributed::{Call, Threads};
///
/// let sums = Threads::run(4, |group| {
///     let mut values = [group.rank() as f64, 1.];
///     group.all_reduce_sum(&Call::new("example"), &mut values)?;
///     Ok(values)
/// })?;
/// assert_eq!(sums, [[6., 4.]; 4]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct Threads {
    hub: Arc<Hub>,
    rank: usize,
}

/// The time that a rank waits for the others, unless another is given.
const TIME_LIMIT: Duration = Duration::from_secs(60);

const LAYER: &str = "Threads";

impl Threads {
    /// The ranks of a group of `size`, in their order, to be moved to threads of your own. A rank
    /// waits for the others for `time_limit`; one that is dropped has left the group.
    ///
    /// # Errors
    /// A group without ranks.
    pub fn group(size: usize, time_limit: Duration) -> Result<Vec<Arc<dyn Collective>>> {
        let ranks = Self::ranks(size, time_limit)?.into_iter();
        Ok(ranks.map(|rank| Arc::new(rank) as _).collect())
    }

    fn ranks(size: usize, time_limit: Duration) -> Result<Vec<Self>> {
        let layer = LAYER;
        if size == 0 {
            bail!("{layer}: expected a group of at least one rank, got 0")
        }
        let hub = Hub::new((0..size).collect(), time_limit, Arc::default());
        let rank = |rank| Self {
            hub: hub.clone(),
            rank,
        };
        Ok((0..size).map(rank).collect())
    }

    /// Runs `f` on `size` threads, each with its rank of one group, and returns the results in the
    /// order of the ranks. A rank waits for the others for a minute.
    ///
    /// # Errors
    /// The error of the first rank that failed: an error of `f`, or a panic, with its message. The
    /// other ranks get an error at their next call.
    pub fn run<T, F>(size: usize, f: F) -> Result<Vec<T>>
    where
        T: Send,
        F: Fn(Arc<dyn Collective>) -> Result<T> + Sync,
    {
        Self::run_within(size, TIME_LIMIT, f)
    }

    /// [`run`](Self::run) with another time limit for each call.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn run_within<T, F>(size: usize, time_limit: Duration, f: F) -> Result<Vec<T>>
    where
        T: Send,
        F: Fn(Arc<dyn Collective>) -> Result<T> + Sync,
    {
        let ranks = Self::ranks(size, time_limit)?;
        let Some(world) = ranks.first().map(|rank| rank.hub.world.clone()) else {
            return Ok(vec![]);
        };
        let outcomes = thread::scope(|scope| {
            let running: Vec<_> = (ranks.into_iter())
                .map(|group| {
                    let (f, world, rank) = (&f, &world, group.rank);
                    // Kept until the others know why the rank leaves.
                    let group: Arc<dyn Collective> = Arc::new(group);
                    let body = move || world.rank_runs(rank, || f(group.clone()));
                    thread::Builder::new()
                        .name(format!("rank {rank}"))
                        .spawn_scoped(scope, body)
                })
                .collect();
            let join = |rank: std::io::Result<thread::ScopedJoinHandle<_>>| match rank {
                Ok(rank) => rank.join().unwrap_or_else(|payload| panicked(&*payload)),
                Err(e) => Err(e.into()),
            };
            running.into_iter().map(join).collect::<Vec<Result<T>>>()
        });
        let cause = world.state().cause();
        let (mut values, mut errors) = (vec![], vec![]);
        for (rank, outcome) in outcomes.into_iter().enumerate() {
            match outcome {
                Ok(value) => values.push(value),
                Err(e) => errors.push((rank, e)),
            }
        }
        let cause = errors.iter().position(|(rank, _)| cause == Some(*rank));
        match errors.is_empty() {
            true => Ok(values),
            false => Err(errors.swap_remove(cause.unwrap_or(0)).1),
        }
    }

    /// The outcome of the round in which all ranks post.
    fn exchange(&self, call: &Call, values: Values) -> Result<Outcome> {
        let post = Post {
            call: call.clone(),
            values,
        };
        match self.hub.exchange(self.rank, post) {
            Ok(outcome) => Ok(outcome),
            Err(fault) => {
                if let Fault::Left { .. } = &fault {
                    let hub = &*self.hub;
                    hub.world.state().told.push(hub.members[self.rank]);
                }
                fault.raise()
            }
        }
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads")
            .field("rank", &self.rank)
            .field("size", &self.hub.members.len())
            .finish()
    }
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.hub.members.len()
    }

    fn all_reduce_sum(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        if let Outcome::F64(sums) = self.exchange(call, Values::Sum64(values.to_vec()))? {
            values.copy_from_slice(&sums);
        }
        Ok(())
    }

    fn all_reduce_sum_f32(&self, call: &Call, values: &mut [f32]) -> Result<()> {
        if let Outcome::F32(sums) = self.exchange(call, Values::Sum32(values.to_vec()))? {
            values.copy_from_slice(&sums);
        }
        Ok(())
    }

    fn broadcast(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        if let Outcome::F64(first) = self.exchange(call, Values::Broadcast(values.to_vec()))? {
            values.copy_from_slice(&first);
        }
        Ok(())
    }

    fn split(&self, color: usize) -> Result<Arc<dyn Collective>> {
        let outcome = self.exchange(&Call::new("split"), Values::Split(color))?;
        let part = match &outcome {
            Outcome::Parts(parts) => parts.get(self.rank),
            _ => None,
        };
        match part {
            Some((hub, rank)) => Ok(Arc::new(Self {
                hub: hub.clone(),
                rank: *rank,
            })),
            None => candle_norm_support::messages::internal(LAYER, "a part for each rank"),
        }
    }
}

impl Drop for Threads {
    /// A rank that is dropped makes no more calls in this group, and may go on in others.
    fn drop(&mut self) {
        let hub = &*self.hub;
        hub.leave(hub.members[self.rank], &Why::Dropped);
    }
}

/// State that the groups of one [`Threads::group`] have in common.
#[derive(Debug, Default)]
struct World(Mutex<WorldState>);

#[derive(Debug, Default)]
struct WorldState {
    hubs: Vec<Weak<Hub>>,
    /// Ranks that failed, in the order of time.
    failed: Vec<usize>,
    /// Ranks that were told of one that had left, which may be why they failed.
    told: Vec<usize>,
}

impl WorldState {
    /// The rank that failed first, if possible by itself.
    fn cause(&self) -> Option<usize> {
        let by_itself = self.failed.iter().find(|rank| !self.told.contains(rank));
        by_itself.or(self.failed.first()).copied()
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, WorldState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The outcome of `f` on `rank`, which then has left all of its groups.
    fn rank_runs<T>(&self, rank: usize, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let outcome = catch_unwind(AssertUnwindSafe(f));
        let (outcome, why) = match outcome {
            Ok(Ok(value)) => (Ok(value), Why::Returned),
            Ok(Err(e)) => {
                // Without the backtrace, which candle appends.
                let text = e.to_string();
                let why = Why::Failed(text.lines().next().unwrap_or_default().to_string());
                (Err(e), why)
            }
            Err(payload) => {
                let why = Why::Panicked(message(&*payload));
                (panicked(&*payload), why)
            }
        };
        let hubs = {
            let mut state = self.state();
            if outcome.is_err() {
                state.failed.push(rank);
            }
            state.hubs.clone()
        };
        for hub in hubs.iter().filter_map(Weak::upgrade) {
            hub.leave(rank, &why);
        }
        outcome
    }
}

/// The message of a panic.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "without a message".to_string())
}

fn panicked<T>(payload: &(dyn Any + Send)) -> Result<T> {
    let layer = LAYER;
    bail!(
        "{layer}: expected every rank to return, got a panic: {}",
        message(payload)
    )
}

/// Reason for which a rank makes no more calls.
#[derive(Debug, Clone)]
enum Why {
    Returned,
    Dropped,
    Failed(String),
    Panicked(String),
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Why::Returned => write!(f, "returned"),
            Why::Dropped => write!(f, "dropped the group"),
            Why::Failed(error) => write!(f, "failed: {error}"),
            Why::Panicked(message) => write!(f, "panicked: {message}"),
        }
    }
}

/// Error that all ranks get.
#[derive(Debug, Clone)]
enum Fault {
    /// Different calls, of rank 0 and of another rank.
    Differ {
        call: String,
        other: String,
        rank: usize,
    },
    /// Ranks that did not come in time.
    Missing {
        call: String,
        ranks: Vec<usize>,
        after: Duration,
    },
    /// A rank that will not come.
    Left { call: String, rank: usize, why: Why },
}

impl Fault {
    fn raise<T>(&self) -> Result<T> {
        let layer = LAYER;
        match self {
            Fault::Differ { call, other, rank } => bail!(
                "{layer}: expected the same call on every rank, got {call} on rank 0 and {other} \
                on rank {rank}; do all ranks have the same model and take the same steps?"
            ),
            Fault::Missing { call, ranks, after } => bail!(
                "{layer}: expected every rank in {call} within {after:?}, got none from \
                ranks {ranks:?}; the group cannot be used any more"
            ),
            Fault::Left { call, rank, why } => bail!(
                "{layer}: expected every rank in {call}, but rank {rank} {why}; the group cannot \
                be used any more"
            ),
        }
    }
}

/// Values that a rank brings to a call.
#[derive(Debug)]
enum Values {
    Sum64(Vec<f64>),
    Sum32(Vec<f32>),
    Broadcast(Vec<f64>),
    Split(usize),
}

#[derive(Debug)]
struct Post {
    call: Call,
    values: Values,
}

impl Post {
    /// Whether both are of the same call.
    fn fits(&self, other: &Self) -> bool {
        let lengths_fit = match (&self.values, &other.values) {
            (Values::Sum64(a), Values::Sum64(b)) => a.len() == b.len(),
            (Values::Sum32(a), Values::Sum32(b)) => a.len() == b.len(),
            (Values::Broadcast(a), Values::Broadcast(b)) => a.len() == b.len(),
            (Values::Split(_), Values::Split(_)) => true,
            _ => false,
        };
        lengths_fit && self.call == other.call
    }
}

impl std::fmt::Display for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.values {
            Values::Sum64(v) => write!(f, "a sum of {} f64", v.len())?,
            Values::Sum32(v) => write!(f, "a sum of {} f32", v.len())?,
            Values::Broadcast(v) => write!(f, "a broadcast of {} f64", v.len())?,
            Values::Split(_) => {}
        }
        let by = match self.values {
            Values::Split(_) => "",
            _ => " by ",
        };
        write!(f, "{by}{}", self.call)
    }
}

/// The result on all ranks.
#[derive(Debug, Clone)]
enum Outcome {
    F64(Arc<Vec<f64>>),
    F32(Arc<Vec<f32>>),
    /// The group of each rank, and its rank there.
    Parts(Arc<Vec<(Arc<Hub>, usize)>>),
}

/// The meeting place of a group.
#[derive(Debug)]
struct Hub {
    /// The ranks of the members in the whole group.
    members: Vec<usize>,
    time_limit: Duration,
    world: Arc<World>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Posts of the round, by rank.
    posts: Vec<Option<Post>>,
    /// The outcome of the round, until all ranks have taken it.
    outcome: Option<std::result::Result<Outcome, Fault>>,
    taken: usize,
    left: Vec<Option<Why>>,
    /// A fault after which no round begins.
    broken: Option<Fault>,
}

impl Hub {
    fn new(members: Vec<usize>, time_limit: Duration, world: Arc<World>) -> Arc<Self> {
        let size = members.len();
        let hub = Arc::new(Self {
            members,
            time_limit,
            world,
            state: Mutex::new(State {
                posts: (0..size).map(|_| None).collect(),
                left: vec![None; size],
                ..State::default()
            }),
            changed: Condvar::new(),
        });
        hub.world.state().hubs.push(Arc::downgrade(&hub));
        hub
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The member with this rank of the whole group makes no more calls here.
    fn leave(&self, of_world: usize, why: &Why) {
        let Some(rank) = self.members.iter().position(|m| *m == of_world) else {
            return;
        };
        let mut state = self.lock();
        state.left[rank].get_or_insert_with(|| why.clone());
        self.changed.notify_all();
    }

    fn exchange(&self, rank: usize, post: Post) -> std::result::Result<Outcome, Fault> {
        let deadline = Instant::now() + self.time_limit;
        let mut state = self.lock();
        // Ranks that are still to take the outcome of the round before wait for nothing.
        while state.outcome.is_some() && state.broken.is_none() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(fault) = &state.broken {
            return Err(fault.clone());
        }
        state.posts[rank] = Some(post);
        if state.posts.iter().all(Option::is_some) {
            let posts = state.posts.iter_mut().filter_map(Option::take).collect();
            state.outcome = Some(self.outcome(posts));
            self.changed.notify_all();
        }
        let outcome = loop {
            if let Some(outcome) = &state.outcome {
                break outcome.clone();
            }
            if let Some(fault) = &state.broken {
                return Err(fault.clone());
            }
            let now = Instant::now();
            if let Some(fault) = state.hopeless(rank, now >= deadline, self.time_limit) {
                state.broken = Some(fault);
                self.changed.notify_all();
                continue;
            }
            let wait = self.changed.wait_timeout(state, deadline - now);
            state = wait.unwrap_or_else(PoisonError::into_inner).0;
        };
        state.taken += 1;
        if state.taken == self.members.len() {
            state.taken = 0;
            state.outcome = None;
            self.changed.notify_all();
        }
        outcome
    }

    /// The outcome of a round, by the posts in the order of the ranks.
    fn outcome(&self, posts: Vec<Post>) -> std::result::Result<Outcome, Fault> {
        if let Some(first) = posts.first()
            && let Some(rank) = posts.iter().position(|post| !post.fits(first))
        {
            return Err(Fault::Differ {
                call: first.to_string(),
                other: posts[rank].to_string(),
                rank,
            });
        }
        let (mut sum64, mut sum32, mut colors) = (vec![], vec![], vec![]);
        for (rank, post) in posts.into_iter().enumerate() {
            match post.values {
                Values::Sum64(values) => add(&mut sum64, values, rank),
                Values::Sum32(values) => add(&mut sum32, values, rank),
                Values::Broadcast(values) if rank == 0 => sum64 = values,
                Values::Broadcast(_) => {}
                Values::Split(color) => colors.push(color),
            }
        }
        if !colors.is_empty() {
            return Ok(Outcome::Parts(Arc::new(self.parts(&colors))));
        }
        Ok(match sum32.is_empty() {
            true => Outcome::F64(Arc::new(sum64)),
            false => Outcome::F32(Arc::new(sum32)),
        })
    }

    /// For each rank the group of its color, and its rank there.
    fn parts(&self, colors: &[usize]) -> Vec<(Arc<Hub>, usize)> {
        let mut members = BTreeMap::<usize, Vec<usize>>::new();
        for (member, color) in self.members.iter().zip(colors) {
            members.entry(*color).or_default().push(*member);
        }
        let hubs: BTreeMap<usize, Arc<Hub>> = members
            .into_iter()
            .map(|(color, members)| {
                (
                    color,
                    Hub::new(members, self.time_limit, self.world.clone()),
                )
            })
            .collect();
        let mut next = BTreeMap::<usize, usize>::new();
        let part = |color: &usize| {
            let next = next.entry(*color).or_default();
            *next += 1;
            hubs.get(color).map(|hub| (hub.clone(), *next - 1))
        };
        colors.iter().filter_map(part).collect()
    }
}

impl State {
    /// The fault of a round that will not be complete, if that is certain, as `rank` sees it, which
    /// waits for the others.
    fn hopeless(&self, rank: usize, is_late: bool, time_limit: Duration) -> Option<Fault> {
        let call = || self.posts[rank].as_ref().map(Post::to_string);
        let missing = self.posts.iter().enumerate();
        let missing: Vec<usize> = (missing.filter(|(_, post)| post.is_none()))
            .map(|(rank, _)| rank)
            .collect();
        let gone = |rank: &usize| Some((*rank, self.left[*rank].clone()?));
        if let Some((rank, why)) = missing.iter().find_map(gone) {
            let call = call().unwrap_or_default();
            return Some(Fault::Left { call, rank, why });
        }
        is_late.then(|| Fault::Missing {
            call: call().unwrap_or_default(),
            ranks: missing,
            after: time_limit,
        })
    }
}

/// Adds the values of a rank, whose number of them was compared.
fn add<T: Copy + std::ops::AddAssign>(sum: &mut Vec<T>, values: Vec<T>, rank: usize) {
    match rank {
        0 => *sum = values,
        _ => {
            for (sum, value) in sum.iter_mut().zip(values) {
                *sum += value;
            }
        }
    }
}
