//! A model of all-reduce: messages that take α + β · bytes, in rounds.

/// A way between two ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Link {
    /// Seconds for an empty message.
    pub(crate) alpha: f64,
    /// Seconds for a byte more.
    pub(crate) beta: f64,
}

impl Link {
    pub(crate) fn message(&self, bytes: f64) -> f64 {
        self.alpha + self.beta * bytes
    }

    /// The link whose messages take `times`, pairs of bytes and seconds: least squares of the
    /// relative errors, so that short messages count like long ones.
    pub(crate) fn fit(times: &[(f64, f64)]) -> Self {
        let mut sums = [0.; 5];
        for (bytes, seconds) in times {
            let weight = 1. / (seconds * seconds);
            let terms = [1., *bytes, bytes * bytes, *seconds, bytes * seconds];
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum += weight * term;
            }
        }
        let [w, x, xx, y, xy] = sums;
        let beta = ((w * xy - x * y) / (w * xx - x * x)).max(0.);
        Self {
            alpha: (y - beta * x) / w,
            beta,
        }
    }
}

/// Hosts with some ranks each, numbered host by host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cluster {
    pub(crate) ranks_per_host: usize,
    /// Between two ranks of one host.
    pub(crate) inside: Link,
    /// Between two hosts.
    pub(crate) between: Link,
}

impl Cluster {
    /// One kind of link.
    #[cfg(test)]
    pub(crate) fn flat(link: Link) -> Self {
        Self {
            ranks_per_host: 1,
            inside: link,
            between: link,
        }
    }

    fn link(&self, a: usize, b: usize) -> Link {
        match a / self.ranks_per_host == b / self.ranks_per_host {
            true => self.inside,
            false => self.between,
        }
    }
}

/// An exchange of all ranks of a group with a partner.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Round {
    /// Ranks whose numbers differ in this bit send each other so many bytes.
    Exchange { bit: usize, bytes: f64 },
    /// The ranks beyond the largest power of two send all bytes to one of the others each.
    FoldIn { bytes: f64 },
    /// And get the result.
    FoldOut { bytes: f64 },
}

/// Exchanges whose distance doubles: recursive doubling.
fn doubling(ranks: usize, bytes: f64) -> Vec<Round> {
    let bits = ranks.ilog2() as usize;
    folded(
        ranks,
        bytes,
        (0..bits)
            .map(|bit| Round::Exchange { bit, bytes })
            .collect(),
    )
}

/// Exchanges of halves, quarters, .. whose sums are collected the same way back: Rabenseifner's
/// algorithm. For many bytes.
fn halving(ranks: usize, bytes: f64) -> Vec<Round> {
    let bits = ranks.ilog2() as usize;
    let there: Vec<Round> = (0..bits)
        .map(|bit| Round::Exchange {
            bit,
            bytes: bytes / (2usize << bit) as f64,
        })
        .collect();
    let back: Vec<Round> = there.iter().rev().copied().collect();
    folded(ranks, bytes, [there, back].concat())
}

fn folded(ranks: usize, bytes: f64, rounds: Vec<Round>) -> Vec<Round> {
    match ranks.is_power_of_two() {
        true => rounds,
        false => [
            vec![Round::FoldIn { bytes }],
            rounds,
            vec![Round::FoldOut { bytes }],
        ]
        .concat(),
    }
}

/// The seconds of an all-reduce over ranks that start together and are `link`s apart: rounds of
/// recursive doubling, ⌈log₂ p⌉ · (α + β n), or of halving, 2 log₂ p · α + 2 (1 − 1/p) · β n, where
/// that is less.
pub(crate) fn all_reduce(link: Link, ranks: usize, bytes: f64) -> f64 {
    let seconds = |rounds: Vec<Round>| -> f64 {
        rounds
            .iter()
            .map(|round| match round {
                Round::Exchange { bytes, .. }
                | Round::FoldIn { bytes }
                | Round::FoldOut { bytes } => link.message(*bytes),
            })
            .sum()
    };
    seconds(doubling(ranks, bytes)).min(seconds(halving(ranks, bytes)))
}

/// Takes the ranks whose times are `clocks`, of numbers from `first` on in the cluster, through an
/// all-reduce: in each round a rank waits for its partner.
pub(crate) fn replay(cluster: &Cluster, first: usize, clocks: &mut [f64], bytes: f64) {
    let ranks = clocks.len();
    let apart = cluster.between;
    let short = all_reduce(apart, ranks, bytes);
    let by_doubling: f64 = doubling(ranks, bytes).len() as f64 * apart.message(bytes);
    let rounds = match by_doubling <= short * (1. + 1e-12) {
        true => doubling(ranks, bytes),
        false => halving(ranks, bytes),
    };
    let core = 1usize << ranks.ilog2();
    for round in rounds {
        match round {
            Round::Exchange { bit, bytes } => {
                for a in (0..core).filter(|a| a & (1 << bit) == 0) {
                    let b = a | (1 << bit);
                    let link = cluster.link(first + a, first + b);
                    let done = clocks[a].max(clocks[b]) + link.message(bytes);
                    (clocks[a], clocks[b]) = (done, done);
                }
            }
            Round::FoldIn { bytes } => {
                for extra in core..ranks {
                    let to = extra - core;
                    let sent =
                        clocks[extra] + cluster.link(first + extra, first + to).message(bytes);
                    clocks[to] = clocks[to].max(sent);
                }
            }
            Round::FoldOut { bytes } => {
                for extra in core..ranks {
                    let from = extra - core;
                    clocks[extra] =
                        clocks[from] + cluster.link(first + extra, first + from).message(bytes);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        alpha: 2e-6,
        beta: 1e-10,
    };

    #[test]
    fn a_fit_finds_the_line() {
        let times: Vec<_> = [16., 1e3, 3e4, 1e6].map(|n| (n, LINK.message(n))).to_vec();
        let found = Link::fit(&times);
        assert!((found.alpha / LINK.alpha - 1.).abs() < 1e-9, "{found:?}");
        assert!((found.beta / LINK.beta - 1.).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn formulas() {
        let message = LINK.message(100.);
        let close = |got: f64, want: f64| assert!((got / want - 1.).abs() < 1e-12, "{got} {want}");
        close(all_reduce(LINK, 2, 100.), message);
        close(all_reduce(LINK, 1024, 100.), 10. * message);
        close(all_reduce(LINK, 6, 100.), 4. * message);
        let large = 1e8;
        let want = 20. * LINK.alpha + 2. * (1. - 1. / 1024.) * LINK.beta * large;
        close(all_reduce(LINK, 1024, large), want);
        assert_eq!(all_reduce(LINK, 1, 100.), 0.);
    }

    #[test]
    fn ranks_that_start_together_take_what_the_formula_says() {
        for ranks in [1, 2, 3, 6, 8, 100, 1024] {
            for bytes in [16., 3e4, 1e7] {
                let mut clocks = vec![1.; ranks];
                replay(&Cluster::flat(LINK), 0, &mut clocks, bytes);
                let want = 1. + all_reduce(LINK, ranks, bytes);
                let last = clocks.iter().fold(0f64, |a, b| a.max(*b));
                assert!((last - want).abs() < 1e-9, "{ranks} {bytes}: {last} {want}");
            }
        }
    }

    #[test]
    fn a_late_rank_delays_all() {
        for ranks in [2, 5, 16] {
            for late in 0..ranks {
                let mut clocks = vec![0.; ranks];
                clocks[late] = 1.;
                replay(&Cluster::flat(LINK), 0, &mut clocks, 800.);
                assert!(clocks.iter().all(|t| *t > 1.), "{clocks:?}");
            }
        }
    }

    /// Rounds inside of a host cost what its links do.
    #[test]
    fn hosts() {
        let slow = Link {
            alpha: 1e-3,
            beta: 0.,
        };
        let fast = Link {
            alpha: 1e-6,
            beta: 0.,
        };
        let cluster = Cluster {
            ranks_per_host: 8,
            inside: fast,
            between: slow,
        };
        let mut clocks = vec![0.; 64];
        replay(&cluster, 0, &mut clocks, 8.);
        assert!((clocks[63] - 3. * 1e-3 - 3. * 1e-6).abs() < 1e-12);
        let mut clocks = vec![0.; 8];
        replay(&cluster, 8, &mut clocks, 8.);
        assert!((clocks[7] - 3. * 1e-6).abs() < 1e-12);
    }
}
