//! Batch norm, and the planes that group and instance norm share with it.
//!
//! Two layouts of a tensor with channels: [`Planes`] are read along the `inner` neighbors that a
//! channel has in a sample, [`Columns`] down the rows of a matrix whose columns belong to channels.

use super::list;
use crate::{Element, Launch, Types};

/// Threads of a block, where a kernel does not say otherwise.
const THREADS: u64 = 256;
/// The slots of a thread in the forward kernel that keeps a channel in registers.
const FIT: u64 = 4;
/// The most threads of a block of it.
const MOST_FIT: u64 = 768;
/// The same in the backward, by the most threads of a block.
const GRAD_FIT: [(u64, u64); 2] = [(256, 4), (1024, 2)];
/// The least slots of a part: 8 for each thread.
const PART: u64 = 8 * THREADS;
/// How many blocks fill any device several times over.
const BLOCKS: u64 = 4096;
/// The longest list of parts that a warp merges.
const MOST_PARTS: u64 = 1024;

/// A tensor of `[outer, channels, inner]`, each channel by its own statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planes {
    /// The types of x and of the parameters.
    pub types: Types,
    /// Samples. One where a group of a sample is the channel.
    pub outer: u64,
    /// Channels.
    pub channels: u64,
    /// Neighbors of a channel in a sample.
    pub inner: u64,
}

/// The threads of a team that takes a channel alone, and how many teams a block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Team {
    threads: u64,
    teams: u64,
}

impl Team {
    /// A warp for few slots, so that several channels share a block; else a block of their own.
    fn of(slots: u64, per_thread: u64) -> Self {
        let threads = slots.div_ceil(per_thread).next_multiple_of(32).max(32);
        let teams = if threads == 32 { THREADS / 32 } else { 1 };
        Self { threads, teams }
    }

    fn launch(self, kernel: String, items: u64) -> Launch {
        Launch {
            kernel,
            grid: list(items.div_ceil(self.teams)),
            block: [self.threads as u32, self.teams as u32, 1],
            shared: 0,
        }
    }
}

impl Planes {
    /// The slots of a channel, as the kernels count them: a plane that begins within a slot can
    /// touch one more.
    pub fn slots(self) -> u64 {
        let elements = self.types.x().lanes() as u64;
        let of_plane = if self.inner.is_multiple_of(elements) {
            self.inner / elements
        } else {
            (self.inner + 2 * elements - 2) / elements
        };
        self.outer * of_plane
    }

    /// Whether planes are to be read along. [`Columns`] take those that are short, or end within
    /// 16 bytes so often that it shows.
    pub fn are_long(self) -> bool {
        let lanes = self.types.x().lanes() as u64;
        self.inner
            >= if self.inner.is_multiple_of(lanes) {
                2 * lanes
            } else {
                64 * lanes
            }
    }

    /// Into how many parts a channel is cut, one for a block. More than one also where a channel
    /// would fit into one block, if there are few channels.
    pub fn parts(self) -> u64 {
        let slots = self.slots();
        let wanted = BLOCKS.div_ceil(self.channels.max(1));
        slots.div_ceil(PART).min(wanted).clamp(1, MOST_PARTS)
    }

    /// Whether few channels with many slots each would leave most of a device idle.
    fn starves(self, slots: u64) -> bool {
        self.channels < 64 && slots > 1024
    }

    /// The forward in one launch, `planes_fit`, if a channel fits.
    ///
    /// Arguments: `x, weight?, bias?, y, mean, rest, inv_std, var` (each `[channels]`), `outer,
    /// channels, inner, span, period, eps: f64, center: i32`. A channel has one weight for each
    /// `span` elements of a plane; those of channel `c` begin at `c % period · inner / span`.
    pub fn fit(self) -> Option<Launch> {
        let slots = self.slots();
        if slots > MOST_FIT * FIT || self.starves(slots) {
            return None;
        }
        let team = Team::of(slots, FIT);
        let most = if team.threads > THREADS {
            MOST_FIT
        } else {
            THREADS
        };
        Some(team.launch(
            format!("planes_fit_{}_{most}", self.types.name()),
            self.channels,
        ))
    }

    /// The backward in one launch, `planes_grad_fit`, if a channel fits. One weight a channel.
    ///
    /// Arguments: `x, dy, weight?, mean, rest, inv_std, dx, dweight?, dbias?, partial?, outer,
    /// channels, inner, period, center: i32`; `partial` is `[channels, 2]`.
    pub fn grad_fit(self) -> Option<Launch> {
        let slots = self.slots();
        let (most, per_thread) = GRAD_FIT.into_iter().find(|(t, per)| slots <= t * per)?;
        if self.starves(slots) {
            return None;
        }
        let kernel = format!("planes_grad_fit_{}_{most}", self.types.name());
        Some(Team::of(slots, per_thread).launch(kernel, self.channels))
    }

    /// The elements of the scratch of [`moments`](Self::moments): count, mean, rest and m2.
    pub fn moments_scratch(self) -> u64 {
        4 * self.channels * self.parts()
    }

    /// `planes_moments`. Arguments: `x, partial, outer, channels, inner, parts: i32, center: i32`.
    pub fn moments(self) -> Launch {
        self.by_part(format!("planes_moments_{}", self.types.x().name()))
    }

    /// `planes_merge`. Arguments: `partial, mean, rest, inv_std, var, channels, parts: i32, eps`.
    pub fn merge(self) -> Launch {
        self.by_warp(format!(
            "planes_merge_{}",
            self.types.x().accumulator().name()
        ))
    }

    /// `planes_normalize`, by own or by given statistics.
    ///
    /// Arguments: `x, weight?, bias?, mean, rest?, third, y, outer, channels, inner, span, period,
    /// parts: i32, of_var: i32, eps`; `third` is 1/σ, or the variance where `of_var` is 1.
    pub fn normalize(self) -> Launch {
        self.by_part(format!("planes_normalize_{}", self.types.name()))
    }

    /// The elements of the scratch of [`grad_sums`](Self::grad_sums).
    pub fn grad_scratch(self) -> u64 {
        2 * self.channels * self.parts()
    }

    /// `planes_grad_sums`. Arguments: `x, dy, mean, partial, outer, channels, inner, per_mean,
    /// parts: i32`: one mean for each `per_mean` channels.
    pub fn grad_sums(self) -> Launch {
        let (slots, parts) = (self.slots(), self.parts());
        let team = Team::of(slots.div_ceil(parts).min(4 * THREADS), 4);
        team.launch(
            format!("planes_grad_sums_{}", self.types.x().name()),
            self.channels * parts,
        )
    }

    /// `planes_grad_merge`. Arguments: `partial, weight?, mean, rest?, third, dweight?, dbias?,
    /// back_mean?, back_along?, channels, parts: i32, count: f64, of_var: i32, eps, center: i32`.
    pub fn grad_merge(self) -> Launch {
        self.by_warp(format!("planes_grad_merge_{}", self.types.name()))
    }

    /// `planes_grad_input`. Arguments: `x, dy, weight?, mean, rest?, third, back_mean?,
    /// back_along?, dx, outer, channels, inner, span, period, parts: i32, of_var: i32, eps`.
    /// Without `back_mean` and `back_along` the statistics do not depend on x.
    pub fn grad_input(self) -> Launch {
        self.by_part(format!("planes_grad_input_{}", self.types.name()))
    }

    /// The planes of all samples as channels of one sample, with weights of each channel of each
    /// sample, `[outer, channels]`.
    ///
    /// Scale and shift and its backward are those of these planes. Batch norm takes the statistics
    /// of [`moments`](Self::moments) and [`merge`](Self::merge), puts them beside each plane by
    /// [`spread`](Self::spread), and then normalizes these planes; its backward is `grad_sums` of
    /// these planes, [`grad_merge_by_sample`](Self::grad_merge_by_sample), and `grad_input` of
    /// these planes.
    pub fn by_sample(self) -> Self {
        Self {
            outer: 1,
            channels: self.outer * self.channels,
            ..self
        }
    }

    /// `samples_spread`, statistics of channels beside each plane. Arguments: `mean, rest?, third,
    /// out, outer, channels`; `out` is `[3, outer, channels]`.
    pub fn spread(self) -> Launch {
        Launch {
            kernel: format!("samples_spread_{}", self.types.x().accumulator().name()),
            grid: list((self.outer * self.channels).div_ceil(THREADS)),
            block: [THREADS as u32, 1, 1],
            shared: 0,
        }
    }

    /// `samples_grad_merge`. Arguments: `partial, weight?, mean, rest?, third, dweight?, dbias?,
    /// back_mean?, back_along?, outer, channels, parts: i32, count: f64, of_var: i32, eps, center:
    /// i32`: statistics of channels; weight, gradients and the two means `[outer, channels]`;
    /// `parts` those of the planes [`by_sample`](Self::by_sample).
    pub fn grad_merge_by_sample(self) -> Launch {
        self.by_warp(format!("samples_grad_merge_{}", self.types.name()))
    }

    fn by_part(self, kernel: String) -> Launch {
        Launch {
            kernel,
            grid: list(self.channels * self.parts()),
            block: [THREADS as u32, 1, 1],
            shared: 0,
        }
    }

    fn by_warp(self, kernel: String) -> Launch {
        Launch {
            kernel,
            grid: list(self.channels.div_ceil(THREADS / 32)),
            block: [32, (THREADS / 32) as u32, 1],
            shared: 0,
        }
    }
}

/// A tensor of `[rows, channels · inner]` as a matrix whose columns belong to channels: channels
/// last, `[N, C]`, or planes too short to be read along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// Elements of the tensor.
    pub elements: u64,
    /// Columns of the matrix: some rows of the tensor after each other.
    pub width: u64,
    /// Rows of the matrix; the last may be cut off.
    pub rows: u64,
    /// `channels · inner`.
    pub period: u64,
    /// Neighboring columns of one channel.
    pub inner: u64,
    /// Slots that a block is wide.
    pub across: u64,
    /// Parts that the rows are cut into.
    pub parts: u64,
    /// The types of x and of the parameters.
    pub types: Types,
}

impl Columns {
    /// The matrix of `rows` rows with `channels` channels of `inner` columns each.
    pub fn new(types: Types, rows: u64, channels: u64, inner: u64) -> Self {
        let per_slot = types.x().lanes() as u64;
        let period = channels * inner;
        let elements = rows * period;
        // As many rows together as make up whole slots, and some width.
        let mut together = per_slot / gcd(per_slot, period.max(1));
        while together * period < 32 * per_slot && together * period < elements {
            together *= 2;
        }
        let width = together * period;
        let rows = elements.div_ceil(width.max(1));
        let slots = width / per_slot;
        let blocks = slots.div_ceil(32).max(1);
        let across = slots.div_ceil(blocks).max(1);
        let lines = THREADS / across;
        // At least 16 rows for each thread.
        let most = rows.div_ceil(16 * lines).max(1);
        let parts = (BLOCKS / 4).div_ceil(blocks).min(most).min(MOST_PARTS);
        Self {
            elements,
            width,
            rows,
            period,
            inner,
            across,
            parts,
            types,
        }
    }

    fn channels(self) -> u64 {
        self.period / self.inner.max(1)
    }

    /// The elements of the scratch of [`moments`](Self::moments).
    pub fn moments_scratch(self) -> u64 {
        3 * self.width * self.parts
    }

    /// `columns_moments`. Arguments: `x, partial`, the matrix (`elements, width, rows, period,
    /// inner`), `across: i32, center: i32`.
    pub fn moments(self) -> Launch {
        self.by_part(format!("columns_moments_{}", self.types.x().name()))
    }

    /// `columns_merge`. Arguments: `partial, mean, rest, inv_std, var`, the matrix, `parts: i32,
    /// eps`.
    pub fn merge(self) -> Launch {
        self.by_channel(format!(
            "columns_merge_{}",
            self.types.x().accumulator().name()
        ))
    }

    /// `columns_normalize`. Arguments: `x, weight?, bias?, mean, rest?, third, y`, the matrix,
    /// `across: i32, of_var: i32, eps`.
    pub fn normalize(self) -> Launch {
        self.by_part(format!("columns_normalize_{}", self.types.name()))
    }

    /// The elements of the scratch of [`grad_sums`](Self::grad_sums).
    pub fn grad_scratch(self) -> u64 {
        2 * self.width * self.parts
    }

    /// `columns_grad_sums`. Arguments: `x, dy, mean, partial`, the matrix, `across: i32`.
    pub fn grad_sums(self) -> Launch {
        self.by_part(format!("columns_grad_sums_{}", self.types.x().name()))
    }

    /// `columns_grad_merge`. Arguments: `partial, weight?, mean, rest?, third, dweight?, dbias?,
    /// back_mean?, back_along?`, the matrix, `parts: i32, count: f64, of_var: i32, eps, center:
    /// i32`.
    pub fn grad_merge(self) -> Launch {
        self.by_channel(format!("columns_grad_merge_{}", self.types.name()))
    }

    /// `columns_grad_input`. Arguments: `x, dy, weight?, mean, rest?, third, back_mean?,
    /// back_along?, dx`, the matrix, `across: i32, of_var: i32, eps`.
    pub fn grad_input(self) -> Launch {
        self.by_part(format!("columns_grad_input_{}", self.types.name()))
    }

    fn by_part(self, kernel: String) -> Launch {
        let slots = self.width / self.types.x().lanes() as u64;
        let [x, z, _] = list(slots.div_ceil(self.across));
        Launch {
            kernel,
            grid: [x, self.parts as u32, z],
            block: [THREADS as u32, 1, 1],
            shared: 0,
        }
    }

    /// Few channels take many threads each, many share a block.
    fn by_channel(self, kernel: String) -> Launch {
        let together = match self.channels() {
            ..512 => 1,
            512..2048 => 4,
            _ => 8,
        };
        Launch {
            kernel,
            grid: list(self.channels().div_ceil(together)),
            block: [512 / together as u32, together as u32, 1],
            shared: 0,
        }
    }
}

/// `update_running`: running statistics move towards those of a batch.
///
/// Arguments: `mean, rest, var` (each `[samples, channels]`), `running_mean, running_var, tracked?,
/// channels, samples, momentum: f64, unbiased: f64`, the last being n / (n − 1). `samples` is 1 for
/// batch norm; instance norm takes the mean over the samples. `tracked` is an `i64`, one more
/// afterwards, and needs `counted`; a negative momentum then stands for one over it. `acc` is the
/// type of all statistics.
pub fn update_running(channels: u64, counted: bool, acc: Element) -> Launch {
    // The counter is read by all threads before one writes it: they must be in one block.
    let (threads, blocks) = match counted {
        true => (1024, 1),
        false => (THREADS, channels.div_ceil(THREADS)),
    };
    Launch {
        kernel: format!("update_running_{}", acc.name()),
        grid: [blocks as u32, 1, 1],
        block: [threads as u32, 1, 1],
        shared: 0,
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{blocks, check, check_list, tensor};
    use super::*;
    use proptest::prelude::*;

    fn most_of(launch: &Launch) -> u64 {
        let most = launch.kernel.rsplit('_').next().expect("a name");
        most.parse().expect("the most threads of a block")
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_planes_go_beyond_the_limits((types, [outer, channels, inner]) in tensor::<3>()) {
            let p = Planes { types, outer, channels, inner };
            let parts = p.parts();
            prop_assert!((1..=MOST_PARTS).contains(&parts));
            for launch in [p.moments(), p.normalize(), p.grad_input()] {
                check(&launch)?;
                check_list(&launch, channels * parts)?;
            }
            let spread = p.spread();
            check(&spread)?;
            check_list(&spread, (outer * channels).div_ceil(u64::from(spread.block[0])))?;
            prop_assert_eq!(p.by_sample().channels, outer * channels);
            for launch in [p.merge(), p.grad_merge(), p.grad_merge_by_sample()] {
                check(&launch)?;
                check_list(&launch, channels.div_ceil(u64::from(launch.block[1])))?;
            }
            let sums = p.grad_sums();
            check(&sums)?;
            check_list(&sums, (channels * parts).div_ceil(u64::from(sums.block[1])))?;
            // A team is a warp, or a block has no other.
            prop_assert!(sums.block[0] == 32 || sums.block[1] == 1);
            // Count, mean, rest and m2, then two sums, of each part.
            prop_assert!(p.moments_scratch() == 4 * channels * parts);
            prop_assert!(p.grad_scratch() == 2 * channels * parts);
            // A part is counted in 32 bits.
            prop_assert!(p.slots().div_ceil(parts) <= 1 << 40);
        }

        #[test]
        fn a_channel_in_registers_has_a_place_for_each_slot(
            (types, [outer, channels, inner]) in tensor::<3>(),
        ) {
            let p = Planes { types, outer, channels, inner };
            // The slots that a plane touches at most, wherever it begins.
            let lanes = types.x().lanes() as u64;
            let starts = if inner.is_multiple_of(lanes) { 1 } else { lanes };
            let touched = (0..starts).map(|first| (first + inner).div_ceil(lanes)).max();
            prop_assert!(p.slots() >= outer * touched.expect("a start"));
            for (launch, per) in [
                (p.fit(), FIT),
                (p.grad_fit(), if p.slots() <= 1024 { 4 } else { 2 }),
            ] {
                let Some(launch) = launch else { continue };
                check(&launch)?;
                let [x, y, _] = launch.block.map(u64::from);
                prop_assert!(x * per >= p.slots(), "{launch:?}");
                prop_assert!(x * y <= most_of(&launch), "{launch:?}");
                prop_assert!(x == 32 || y == 1);
                check_list(&launch, channels.div_ceil(y))?;
            }
        }

        #[test]
        fn no_columns_go_beyond_the_limits((types, [rows, channels, inner]) in tensor::<3>()) {
            let m = Columns::new(types, rows, channels, inner);
            let lanes = types.x().lanes() as u64;
            prop_assert!(m.width.is_multiple_of(lanes) && m.width.is_multiple_of(m.period));
            prop_assert!(m.rows * m.width >= m.elements);
            prop_assert!((m.rows - 1) * m.width < m.elements);
            prop_assert!((1..=32).contains(&m.across));
            prop_assert!((1..=MOST_PARTS).contains(&m.parts));
            for launch in [m.moments(), m.normalize(), m.grad_sums(), m.grad_input()] {
                check(&launch)?;
                let [x, y, z] = launch.grid.map(u64::from);
                prop_assert!(x * z * m.across * lanes >= m.width);
                prop_assert_eq!(y, m.parts);
                // Static shared memory has a place for each element of 256 slots.
                prop_assert!(THREADS / m.across * m.across <= u64::from(launch.block[0]));
            }
            for launch in [m.merge(), m.grad_merge()] {
                check(&launch)?;
                let [x, y, _] = launch.block.map(u64::from);
                // Halves are added up.
                prop_assert!(x.is_power_of_two() && x * y <= 512);
                check_list(&launch, channels.div_ceil(y))?;
            }
            prop_assert!(m.moments_scratch() == 3 * m.width * m.parts);
            prop_assert!(m.grad_scratch() == 2 * m.width * m.parts);
        }

        #[test]
        fn running_statistics_stay_within_the_limits(
            channels in 1u64..1 << 36, counted: bool, f64: bool,
        ) {
            let acc = if f64 { Element::F64 } else { Element::F32 };
            let launch = update_running(channels, counted, acc);
            check(&launch)?;
            prop_assert!(!counted || blocks(&launch) == 1);
        }
    }
}
