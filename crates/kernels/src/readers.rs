//! Where batch norm finds the elements of a channel: in planes, or between those of all other
//! channels.

use std::iter::repeat_with;
use std::ops::Range;

use super::loops::RUN;
use super::shape::{Run, Shape};
use super::simd::{LANES, Plain, prefetch, tile, transpose_tile};

/// Gives the elements of some neighboring channels, run by run.
pub(crate) trait Reader<E: 'static> {
    /// The number of channels that are best read together.
    const CHANNELS: usize;

    /// Makes a run of these channels ready, at most [`CHANNELS`](Self::CHANNELS).
    fn read(&mut self, channels: Range<usize>, run: &Run);

    /// The run that was read last, of one of its channels: one slice for each sample.
    fn slices(&self, channel: usize, run: &Run) -> impl Iterator<Item = &[E]>;
}

/// Prefetch distance, in positions: processors do not foresee the next row by themselves.
const PREFETCH_DISTANCE: usize = 3 * LANES;

/// The most channels that any reader reads together.
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

/// A tensor whose channels are last, `[outer, inner, channels]` in memory.
///
/// A run of as many channels as a cache line has is transposed into a buffer, from where every sum
/// is formed in the same order as from planes.
pub(crate) struct Transposed<'a, E> {
    x: &'a [E],
    shape: Shape,
    /// The run of one channel after the other.
    buffer: Vec<E>,
    /// The channel whose run comes first.
    first: usize,
}

impl<'a, E: Plain + Default> Transposed<'a, E> {
    /// From one channel of the buffer to the next: not a power of two, which would send them all
    /// to the same place in the cache.
    const STRIDE: usize = RUN + LANES;

    pub(crate) fn new(x: &'a [E], shape: Shape) -> Self {
        Self {
            x,
            shape,
            buffer: vec![],
            first: 0,
        }
    }

    /// Transposes the positions `part` of a sample, `width` channels each, to `at` in the runs of
    /// these channels.
    #[inline(always)]
    fn transpose(&mut self, sample: usize, part: Range<usize>, width: usize, at: usize) {
        let (shape, first) = (self.shape, self.first);
        let start = (sample * shape.inner + part.start) * shape.channels;
        let rows = &self.x[start..][..part.len() * shape.channels];
        let whole = match width % LANES {
            0 => part.len() - part.len() % LANES,
            _ => 0,
        };
        for from in (0..whole).step_by(LANES) {
            for p in from..from + LANES {
                let ahead = start + (p + PREFETCH_DISTANCE) * shape.channels + first;
                for lane in (0..width).step_by(LANES) {
                    if let Some(v) = self.x.get(ahead + lane) {
                        prefetch(v);
                    }
                }
            }
            for lane in (0..width).step_by(LANES) {
                let tile = tile(
                    #[inline(always)]
                    |p| &rows[(from + p) * shape.channels + first + lane..],
                );
                let out = &mut self.buffer[lane * Self::STRIDE + at + from..];
                transpose_tile(tile, out, Self::STRIDE);
            }
        }
        for (p, row) in rows.chunks_exact(shape.channels).enumerate().skip(whole) {
            for (c, v) in row[first..first + width].iter().enumerate() {
                self.buffer[c * Self::STRIDE + at + p] = *v;
            }
        }
    }
}

impl<E: Plain + Default + 'static> Reader<E> for Transposed<'_, E> {
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
            self.transpose(sample, run.part.clone(), width, i * run.part.len());
        }
    }

    #[inline(always)]
    fn slices(&self, channel: usize, run: &Run) -> impl Iterator<Item = &[E]> {
        let start = (channel - self.first) * Self::STRIDE;
        let elements = &self.buffer[start..start + run.count()];
        elements.chunks_exact(run.part.len().max(1))
    }
}
