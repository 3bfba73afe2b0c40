//! The axes of a tensor with channels, their order in memory, and how a channel is walked.

use std::ops::Range;

use super::loops::{RUN, slices_per_run};
use super::simd::LANES;

/// The three axes of a contiguous tensor with channels.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Samples.
    pub outer: usize,
    /// Channels of a sample.
    pub channels: usize,
    /// Elements of a channel of a sample, its plane.
    pub inner: usize,
}

/// How the elements of a batch lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// `[outer, channels, inner]`.
    ChannelsFirst,
    /// `[outer, inner, channels]`; for [planes](Shape::has_planes) only.
    ChannelsLast,
}

/// A part of a channel that is added up in one go: some samples, and of each the same part of its
/// plane.
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
    pub(crate) fn elements(self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// How many elements a channel has.
    pub(crate) fn per_channel(self) -> f64 {
        (self.outer * self.inner) as f64
    }

    /// Whether a channel has as many neighbors in memory as there are lanes.
    pub fn has_planes(self) -> bool {
        self.inner >= LANES
    }

    /// Where the plane of a channel of a sample lies.
    #[inline(always)]
    pub(crate) fn plane(self, sample: usize, channel: usize) -> Range<usize> {
        let start = (sample * self.channels + channel) * self.inner;
        start..start + self.inner
    }

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
