//! Group and instance norm: the launches of [`Planes`] over groups, and what groups have alone.

use super::channels::Planes;
use super::list;
use crate::{Launch, Types};

/// A tensor of `[samples, channels, inner]`, each group of neighboring channels of a sample by its
/// own statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// The types of x and of the parameters.
    pub types: Types,
    /// Samples.
    pub samples: u64,
    /// Channels.
    pub channels: u64,
    /// Neighbors of a channel in a sample.
    pub inner: u64,
    /// Groups of a sample.
    pub num_groups: u64,
}

/// The most slots of a group whose backward is one launch.
const FIT: u64 = 8192;
/// The least slots of a run, 4 for each lane of a warp.
const RUN: u64 = 128;

impl Groups {
    /// The same tensor as one sample, with the channels and groups of all: weight and bias, and
    /// their gradients, are then `[samples, channels]`, a pair for each channel of each sample.
    pub fn by_sample(self) -> Self {
        Self {
            samples: 1,
            channels: self.samples * self.channels,
            num_groups: self.samples * self.num_groups,
            ..self
        }
    }

    /// Channels of a group.
    pub fn per_group(self) -> u64 {
        self.channels / self.num_groups
    }

    /// Groups as channels of one plane each: `fit`, or `moments`, `merge` and `normalize`, with
    /// `span = inner` and `period = num_groups`; `grad_input` the same way.
    pub fn as_planes(self) -> Planes {
        Planes {
            types: self.types,
            outer: 1,
            channels: self.samples * self.num_groups,
            inner: self.per_group() * self.inner,
        }
    }

    /// The channels of all samples: `grad_sums`, with `per_mean = per_group`.
    pub fn as_channels(self) -> Planes {
        Planes {
            types: self.types,
            outer: 1,
            channels: self.samples * self.channels,
            inner: self.inner,
        }
    }

    /// `groups_grad_merge` after `grad_sums`, or (`means` false: without `back_mean`) after a
    /// backward in one launch.
    ///
    /// Arguments: `partial, weight?, mean, rest, inv_std, dweight?, dbias?, back_mean?,
    /// back_along?, samples, channels, num_groups, parts: i32, count: f64`, the last being the
    /// elements of a group.
    pub fn grad_merge(self, means: bool) -> Launch {
        let groups = if means {
            self.samples * self.num_groups
        } else {
            0
        };
        Launch {
            kernel: format!("groups_grad_merge_{}", self.types.name()),
            grid: list(groups.div_ceil(8) + self.channels.div_ceil(8)),
            block: [32, 8, 1],
            shared: 0,
        }
    }

    /// The runs that each channel is cut into in [`grad_fit`](Self::grad_fit).
    pub fn runs(self) -> u64 {
        let slots = Planes {
            channels: 1,
            ..self.as_channels()
        }
        .slots();
        slots
            .div_ceil(RUN)
            .min(16u64.div_ceil(self.per_group()))
            .max(1)
    }

    /// `groups_grad_fit`, the backward of x in one launch, if a group is small; its `partial`,
    /// `[samples, channels, 2]`, is for [`grad_merge`](Self::grad_merge).
    ///
    /// Arguments: `x, dy, weight?, mean, rest, inv_std, dx, partial?, per_group, inner,
    /// num_groups, runs: i32`.
    pub fn grad_fit(self) -> Option<Launch> {
        let (planes, runs) = (self.as_planes(), self.runs());
        let slots = planes.slots();
        let acc = self.types.x().accumulator().size() as u64;
        let shared = 2 * self.per_group() * runs * acc;
        let starves = planes.channels < 64 && slots > 1024;
        if slots > FIT || shared > 32 << 10 || starves || planes.channels > i32::MAX as u64 {
            return None;
        }
        let threads = slots.div_ceil(4).next_multiple_of(32).clamp(64, 512);
        Some(Launch {
            kernel: format!("groups_grad_fit_{}", self.types.name()),
            grid: [planes.channels as u32, 1, 1],
            block: [threads as u32, 1, 1],
            shared: shared as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{blocks, check, check_list, tensor};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_groups_go_beyond_the_limits(
            (types, [samples, num_groups, per, inner]) in tensor::<4>(),
        ) {
            let channels = num_groups * per;
            let g = Groups { types, samples, channels, inner, num_groups };
            for g in [g, g.by_sample()] {
                let (groups, channels) = (samples * num_groups, g.channels);
                prop_assert_eq!(g.as_planes().channels, groups);
                prop_assert_eq!(g.as_channels().channels, samples * num_groups * per);
                prop_assert_eq!(g.per_group(), per);
                for (launch, groups) in [(g.grad_merge(true), groups), (g.grad_merge(false), 0)] {
                    check(&launch)?;
                    check_list(&launch, groups.div_ceil(8) + channels.div_ceil(8))?;
                }
                let (a, b) = (g.as_planes(), g.as_channels());
                for launch in [a.moments(), a.merge(), a.normalize(), b.grad_sums()] {
                    check(&launch)?;
                }
                if let Some(launch) = g.grad_fit() {
                    check(&launch)?;
                    prop_assert_eq!(blocks(&launch), groups);
                    // Two sums of each run, which cover the slots of a channel.
                    let acc = types.x().accumulator().size() as u64;
                    prop_assert!(u64::from(launch.shared) >= 2 * per * g.runs() * acc);
                    prop_assert!(g.runs() >= 1 && g.runs() <= i32::MAX as u64);
                    prop_assert!(launch.block[0] <= 512);
                    // The kernel counts runs and slots in 32 bits.
                    prop_assert!(per * g.runs() <= u64::from(u32::MAX));
                }
            }
        }
    }
}
