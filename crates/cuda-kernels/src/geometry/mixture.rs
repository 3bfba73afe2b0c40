//! The mixture of switchable norm, in `double`. Kernels in `mixture.cu`.

use super::list;
use crate::Launch;

/// The bit of `flags` that says that the moments of planes are mixed in.
pub const INSTANCE: i32 = 1;
/// Those of channels, formed of the planes.
pub const OWN: i32 = 2;
/// Those of channels, the caller's.
pub const GIVEN: i32 = 4;
/// The logits that a sample may add to, in the scratch of [`Mixture::sums`].
pub const LOGITS: u64 = 6;

/// Planes of `[samples, channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mixture {
    /// Samples.
    pub samples: u64,
    /// Channels.
    pub channels: u64,
}

impl Mixture {
    /// `mixture_unions`. Arguments: `moments` (`[2, samples, channels]`), `layers` (`[2,
    /// samples]`), `batch` (`[2, channels]`), `mean, rest, inv_std, var` (each `[channels]`),
    /// `samples, channels, plane_factor: f64, layer_factor: f64, batch_factor: f64, eps: f64,
    /// flags: i32`. The last five buffers only with [`OWN`].
    pub fn unions(self) -> Launch {
        self.by_warp("mixture_unions")
    }

    /// `mixture_forward`. Arguments: `moments, weight?, logits, layers, batch?, y` (`[3, samples,
    /// channels]`), `normal` (the same), `samples, channels, plane_factor: f64, eps: f64, flags:
    /// i32`.
    pub fn forward(self) -> Launch {
        self.by_thread("mixture_forward", self.samples * self.channels)
    }

    /// `mixture_sums`. Arguments: `moments, weight?, layers, batch?, normal, dy, by_sample` (`[2,
    /// samples]`), `by_channel` (`[2, channels]`), `dweight, partial` (`[samples, 6]`), `samples,
    /// channels, plane_factor: f64, flags: i32`.
    pub fn sums(self) -> Launch {
        self.by_warp("mixture_sums")
    }

    /// `mixture_backward`. Arguments: `moments, weight?, logits, layers, batch?, normal, dy,
    /// by_sample, by_channel, partial, dx` (`[2, samples, channels]`), `dlogits, samples, channels,
    /// plane_factor: f64, layer_factor: f64, batch_factor: f64, flags: i32`.
    pub fn backward(self) -> Launch {
        // At least a thread for each logit.
        self.by_thread(
            "mixture_backward",
            (self.samples * self.channels).max(LOGITS),
        )
    }

    /// A warp for each sample, then for each channel.
    fn by_warp(self, kernel: &str) -> Launch {
        Launch {
            kernel: kernel.to_string(),
            grid: list((self.samples + self.channels).div_ceil(8)),
            block: [32, 8, 1],
            shared: 0,
        }
    }

    fn by_thread(self, kernel: &str, threads: u64) -> Launch {
        Launch {
            kernel: kernel.to_string(),
            grid: list(threads.div_ceil(256)),
            block: [256, 1, 1],
            shared: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{check, check_list, tensor};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_mixture_goes_beyond_the_limits((_, [samples, channels]) in tensor::<2>()) {
            let mixture = Mixture { samples, channels };
            for launch in [mixture.unions(), mixture.sums()] {
                check(&launch)?;
                check_list(&launch, (samples + channels).div_ceil(8))?;
            }
            for launch in [mixture.forward(), mixture.backward()] {
                check(&launch)?;
                check_list(&launch, (samples * channels).div_ceil(256))?;
            }
        }
    }
}
