//! The collective calls of training a ResNet-50, replayed under the model.

use crate::model::{Cluster, replay};

/// The channels of the batch norms of a ResNet-50, in the order of the forward.
pub(crate) fn batch_norms() -> Vec<usize> {
    let mut channels = vec![64];
    for (blocks, width) in [(3, 64), (4, 128), (6, 256), (3, 512)] {
        for block in 0..blocks {
            channels.extend([width, width, 4 * width]);
            if block == 0 {
                // That of the shortcut.
                channels.push(4 * width);
            }
        }
    }
    channels
}

/// Parameters of the network with its 1000 classes.
pub(crate) const PARAMETERS: usize = 25_557_032;

/// Values of a call of `sum_gradients`.
const BUCKET: usize = 1 << 20;

/// Sums over ranks in the forward of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forward {
    /// Statistics of each rank by itself.
    Local,
    /// Σ x, then Σ (x − mean)²: what this crate does.
    TwoCalls,
    /// Both about the running mean: a call less, and digits less where a batch is far from it.
    OneCall,
}

/// Bytes of the calls of one layer forward: a vote of two values and the count go with the first.
pub(crate) fn forward_bytes(forward: Forward, channels: usize) -> Vec<f64> {
    let bytes = |values: usize| 8. * values as f64;
    match forward {
        Forward::Local => vec![],
        Forward::TwoCalls => vec![bytes(3 + channels), bytes(2 * channels)],
        Forward::OneCall => vec![bytes(3 + 2 * channels)],
    }
}

/// Bytes of the call of one layer backward: Σ dy · x̂ and Σ dy.
pub(crate) fn backward_bytes(channels: usize) -> f64 {
    8. * 2. * channels as f64
}

/// A training step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Step {
    pub(crate) ranks: usize,
    pub(crate) forward: Forward,
    /// Ranks that share statistics.
    pub(crate) group: usize,
    /// Seconds that a rank computes, a third of them forward.
    pub(crate) compute: f64,
    /// Between two sums a rank is slower by up to this part, drawn anew each time.
    pub(crate) jitter: f64,
}

/// A number in [0, 1) for a rank and a moment of the step.
fn drawn(rank: usize, moment: usize) -> f64 {
    let mut x = (rank as u64) << 32 | moment as u64;
    // SplitMix64.
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// The seconds of a step, until the last rank has the sums of all gradients.
pub(crate) fn step(cluster: &Cluster, step: &Step) -> f64 {
    let layers = batch_norms();
    let mut clocks = vec![0.; step.ranks];
    let mut moment = 0;
    let mut compute = |clocks: &mut [f64], seconds: f64| {
        for (rank, clock) in clocks.iter_mut().enumerate() {
            *clock += seconds * (1. + step.jitter * drawn(rank, moment));
        }
        moment += 1;
    };
    let sum = |clocks: &mut [f64], group: usize, bytes: f64| {
        for (i, clocks) in clocks.chunks_mut(group).enumerate() {
            replay(cluster, i * group, clocks, bytes);
        }
    };
    let (forward, backward) = (step.compute / 3., step.compute * 2. / 3.);
    for channels in &layers {
        compute(&mut clocks, forward / layers.len() as f64);
        for bytes in forward_bytes(step.forward, *channels) {
            sum(&mut clocks, step.group, bytes);
        }
    }
    for channels in layers.iter().rev() {
        compute(&mut clocks, backward / layers.len() as f64);
        if step.forward != Forward::Local {
            sum(&mut clocks, step.group, backward_bytes(*channels));
        }
    }
    let mut rest = PARAMETERS;
    while rest > 0 {
        let values = rest.min(BUCKET);
        sum(&mut clocks, step.ranks, 4. * values as f64);
        rest -= values;
    }
    clocks.into_iter().fold(0., f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Link, all_reduce};

    const LINK: Link = Link {
        alpha: 25e-6,
        beta: 1e-9,
    };

    #[test]
    fn layers_of_the_network() {
        let layers = batch_norms();
        assert_eq!((layers.len(), layers.iter().sum::<usize>()), (53, 26_560));
        // Two calls forward and one backward.
        let calls = layers
            .iter()
            .map(|c| forward_bytes(Forward::TwoCalls, *c).len() + 1);
        assert_eq!(calls.sum::<usize>(), 159);
    }

    fn usual(ranks: usize, forward: Forward) -> Step {
        Step {
            ranks,
            forward,
            group: ranks,
            compute: 0.3,
            jitter: 0.,
        }
    }

    /// Ranks that are equally fast take the sum of the formulas.
    #[test]
    fn without_jitter_the_replay_is_the_formula() {
        let cluster = Cluster::flat(LINK);
        for ranks in [1, 2, 6, 64] {
            let local = step(&cluster, &usual(ranks, Forward::Local));
            for forward in [Forward::TwoCalls, Forward::OneCall] {
                let mut want = local;
                for channels in batch_norms() {
                    let bytes = forward_bytes(forward, channels);
                    for bytes in bytes.into_iter().chain([backward_bytes(channels)]) {
                        want += all_reduce(LINK, ranks, bytes);
                    }
                }
                let got = step(&cluster, &usual(ranks, forward));
                assert!(
                    (got - want).abs() < 1e-9,
                    "{ranks} {forward:?}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn options_cost_less_in_their_order() {
        let cluster = Cluster::flat(LINK);
        let seconds = |forward, group| {
            step(
                &cluster,
                &Step {
                    group,
                    jitter: 0.1,
                    ..usual(256, forward)
                },
            )
        };
        let all = seconds(Forward::TwoCalls, 256);
        let one = seconds(Forward::OneCall, 256);
        let groups = seconds(Forward::OneCall, 8);
        let local = seconds(Forward::Local, 256);
        assert!(all > one && one > groups && groups > local);
    }
}
