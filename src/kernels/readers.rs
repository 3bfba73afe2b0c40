//! Where batch norm finds the elements of a channel: in planes, or between those of all other channels.

use std::array::from_fn;
use std::iter::repeat_with;
use std::ops::Range;

use super::planes::Shape;
use super::simd::{LANES, prefetch, turn};
use super::span::{RUN, slices_per_run};

/// A part of a channel that is added up in one go: some samples, and of each the same part of its plane.
#[derive(Debug, Clone)]
pub(crate) struct Run {
    pub(crate) samples: Range<usize>,
    pub(crate) part: Range<usize>,
}

impl Run {
    /// How many elements of a channel it has.
    #[inline(always)]
    pub(crate) fn count(&self) -> usize {
        self.samples.len() * self.part.len()
    }
}

impl Shape {
    /// All of a channel, by runs of at most [`RUN`] elements.
    #[inline(always)]
    pub(crate) fn runs(self) -> impl Iterator<Item = Run> {
        let samples = slices_per_run(self.inner);
        (0..self.outer).step_by(samples).flat_map(move |first| {
            let samples = first..(first + samples).min(self.outer);
            (0..self.inner).step_by(RUN).map(move |from| Run {
                samples: samples.clone(),
                part: from..(from + RUN).min(self.inner),
            })
        })
    }

    /// The slices of a run in a tensor whose channels are planes.
    #[inline(always)]
    pub(crate) fn slices<'a, E>(
        self,
        x: &'a [E],
        channel: usize,
        run: &Run,
    ) -> impl Iterator<Item = &'a [E]> + use<'a, E> {
        let part = run.part.clone();
        run.samples
            .clone()
            .map(move |sample| &x[self.plane(sample, channel)][part.clone()])
    }
}

/// Gives the elements of some neighboring channels, run by run.
pub(crate) trait Reader<E: 'static> {
    /// How many channels it is best asked for together.
    const CHANNELS: usize;

    /// Makes a run of these channels ready, at most [`CHANNELS`](Self::CHANNELS).
    fn read(&mut self, channels: Range<usize>, run: &Run);

    /// The run that was read last, of one of its channels: one slice for each sample.
    fn slices(&self, channel: usize, run: &Run) -> impl Iterator<Item = &[E]>;
}

/// So many positions before its turn, a row is called for: processors do not see by themselves what comes next.
const AHEAD: usize = 3 * LANES;

/// The most channels that any reader is asked for together.
pub(crate) const MOST_CHANNELS: usize = 2 * LANES;

/// A contiguous tensor, whose channels are planes: nothing to be made ready.
pub(crate) struct InPlace<'a, E> {
    pub(crate) x: &'a [E],
    pub(crate) shape: Shape,
}

impl<E: 'static> Reader<E> for InPlace<'_, E> {
    const CHANNELS: usize = 1;

    #[inline(always)]
    fn read(&mut self, _: Range<usize>, _: &Run) {}

    #[inline(always)]
    fn slices(&self, channel: usize, run: &Run) -> impl Iterator<Item = &[E]> {
        self.shape.slices(self.x, channel, run)
    }
}

/// A tensor whose channels are last, `[outer, inner, channels]` in memory: a run of as many channels as a cache line has is turned into a
/// buffer, from where every sum is formed in the same order as from planes.
pub(crate) struct Turned<'a, E> {
    x: &'a [E],
    shape: Shape,
    /// The run of one channel after the other.
    buffer: Vec<E>,
    /// The channel whose run comes first.
    first: usize,
}

impl<'a, E: Copy + Default> Turned<'a, E> {
    /// From one channel of the buffer to the next: not a power of two, which would send them all to the same place in the cache.
    const STRIDE: usize = RUN + LANES;

    pub(crate) fn new(x: &'a [E], shape: Shape) -> Self {
        Self {
            x,
            shape,
            buffer: vec![],
            first: 0,
        }
    }

    /// Turns the positions `part` of a sample, `width` channels each, to `at` in the runs of these channels.
    #[inline(always)]
    fn turn(&mut self, sample: usize, part: Range<usize>, width: usize, at: usize) {
        let (shape, first) = (self.shape, self.first);
        let start = (sample * shape.inner + part.start) * shape.channels;
        let rows = &self.x[start..][..part.len() * shape.channels];
        let whole = match width % LANES {
            0 => part.len() - part.len() % LANES,
            _ => 0,
        };
        for from in (0..whole).step_by(LANES) {
            for p in from..from + LANES {
                for lane in (0..width).step_by(LANES) {
                    if let Some(v) = self
                        .x
                        .get(start + (p + AHEAD) * shape.channels + first + lane)
                    {
                        prefetch(v);
                    }
                }
            }
            for lane in (0..width).step_by(LANES) {
                let tile =
                    from_fn(|p| rows[(from + p) * shape.channels + first + lane..].first_chunk());
                if let Some(tile) = all(tile) {
                    turn(
                        tile,
                        &mut self.buffer[lane * Self::STRIDE + at + from..],
                        Self::STRIDE,
                    );
                }
            }
        }
        for (p, row) in rows.chunks_exact(shape.channels).enumerate().skip(whole) {
            for (c, v) in row[first..first + width].iter().enumerate() {
                self.buffer[c * Self::STRIDE + at + p] = *v;
            }
        }
    }
}

/// What all of these are, if there is one that is not none.
#[inline(always)]
pub(crate) fn all<T: Copy, const N: usize>(items: [Option<T>; N]) -> Option<[T; N]> {
    let first = items[0]?;
    let mut all = [first; N];
    for i in 0..N {
        all[i] = items[i]?;
    }
    Some(all)
}

impl<E: Copy + Default + 'static> Reader<E> for Turned<'_, E> {
    const CHANNELS: usize = if size_of::<E>() < 4 { 2 * LANES } else { LANES };

    #[inline(always)]
    fn read(&mut self, channels: Range<usize>, run: &Run) {
        let width = <Self as Reader<E>>::CHANNELS.min(self.shape.channels);
        if self.buffer.is_empty() {
            self.buffer = repeat_with(E::default).take(width * Self::STRIDE).collect();
        }
        // The last channels are read with their neighbors before them, so that a tile is full.
        self.first = channels.start.min(self.shape.channels - width);
        for (i, sample) in run.samples.clone().enumerate() {
            self.turn(sample, run.part.clone(), width, i * run.part.len());
        }
    }

    #[inline(always)]
    fn slices(&self, channel: usize, run: &Run) -> impl Iterator<Item = &[E]> {
        let start = (channel - self.first) * Self::STRIDE;
        let elements = &self.buffer[start..start + run.count()];
        elements.chunks_exact(run.part.len().max(1))
    }
}
