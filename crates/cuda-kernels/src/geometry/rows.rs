//! LayerNorm and RmsNorm: statistics over the rows of `[rows, cols]`. Kernels in `rows.cu`.
//!
//! x, residual, y, sums, dy, dsum and dx must begin at multiples of [`ALIGNMENT`] bytes; parameters
//! may begin anywhere.
//!
//! Weight and bias have a value for each column. They may also be `[samples, cols]`: the rows of a
//! sample, which follow each other, then share a row of weights. See
//! [`Rows::forward_by_sample`].
use crate::{Launch, Types};

/// Bytes that the first element of x, residual, dy, dsum and of all outputs is a multiple of.
pub const ALIGNMENT: usize = 16;

/// The bit of the kernels' `flags` by which RmsNorm rounds the normalized value to x's type before
/// it multiplies it by the weight.
pub const ROUND_FIRST: i32 = 1;

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Norm {
    /// The mean is subtracted: LayerNorm; else RmsNorm.
    pub center: bool,
    /// A residual is added first.
    pub add: bool,
}

impl Norm {
    /// All four.
    pub const ALL: [Norm; 4] = [
        Norm {
            center: true,
            add: false,
        },
        Norm {
            center: false,
            add: false,
        },
        Norm {
            center: true,
            add: true,
        },
        Norm {
            center: false,
            add: true,
        },
    ];

    fn name(self) -> &'static str {
        match (self.center, self.add) {
            (true, false) => "layer_norm",
            (false, false) => "rms_norm",
            (true, true) => "add_layer_norm",
            (false, true) => "add_rms_norm",
        }
    }

    /// Statistics of a row, in the accumulator's type: `[3, rows]` (mean, what it was rounded by,
    /// one over the standard deviation), or `[1, rows]` without a mean.
    pub fn stats(self) -> usize {
        if self.center { 3 } else { 1 }
    }
}

/// A shape and its types.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The norm.
    pub norm: Norm,
    /// The types of x and of the parameters.
    pub types: Types,
    /// Rows.
    pub rows: usize,
    /// Elements of a row.
    pub cols: usize,
    /// Weight and bias begin at multiples of [`ALIGNMENT`] bytes, or are not there.
    pub aligned: bool,
}

/// The most samples that may have weights of their own.
pub const MOST_SAMPLES: usize = 65_535;

/// The launches of a backward, in their order.
#[derive(Clone, Debug)]
pub struct Backward {
    /// `dx`, and partial sums unless [`Backward::columns`] makes them. Arguments: x, residual or
    /// null, weight or null, dy, dsum or null, stats, dx, then, unless there is `columns`, partial
    /// (null where no parameter's gradient is wanted), then rows, cols (`long long`), offset
    /// (`double`), and, unless there is `columns`, flags (`int`).
    pub dx: Launch,
    /// Partial sums of rows too long for the kernel of `dx`. Arguments: x, residual or null, dy,
    /// stats, partial, rows, cols, flags. Not launched where no parameter's gradient is wanted.
    pub columns: Option<Launch>,
    /// The gradients of the parameters. Arguments: partial, dweight or null, dbias or null, parts,
    /// cols (`long long`).
    pub finish: Launch,
    /// Partial sums of each column: `partial` is `[parts, 2, cols]` of the accumulator's type, or
    /// `[samples, parts, 2, cols]`.
    pub parts: usize,
}

/// The launches of sums over rows, in their order.
#[derive(Clone, Debug)]
pub struct Sums {
    /// As [`Backward::columns`].
    pub columns: Launch,
    /// As [`Backward::finish`].
    pub finish: Launch,
    /// As [`Backward::parts`].
    pub parts: usize,
}

/// Threads of a block of many teams.
const TEAMS: usize = 256;
/// Blocks are launched for as many multiprocessors, as many as their registers leave room for: they
/// take several rows each. On cards with others the last rows wait, and the results are the same.
const PROCESSORS: usize = 132;

impl Rows {
    /// The vectors that a row can touch.
    fn vectors(&self) -> usize {
        let v = self.types.x().lanes();
        if self.cols.is_multiple_of(v) {
            self.cols / v
        } else {
            // A row may begin at the last place of its first vector.
            (self.cols + 2 * v - 2) / v
        }
    }

    fn is_even(&self) -> bool {
        self.aligned && self.cols.is_multiple_of(self.types.x().lanes())
    }

    /// The rows of one sample.
    fn sample(&self, samples: usize) -> Option<Self> {
        let divides = (1..=MOST_SAMPLES).contains(&samples) && self.rows.is_multiple_of(samples);
        divides.then(|| Self {
            rows: self.rows / samples,
            ..*self
        })
    }

    /// The forward's launch; none for an empty tensor.
    ///
    /// Arguments: x, residual or null, weight or null, bias or null, y or null (for the statistics
    /// alone), sum or null (the rounded sum of x and residual), stats or null, rows, cols
    /// (`long long`), eps, offset (`double`), flags (`int`). Where a residual is added, one more:
    /// the unrounded sum, of the accumulator's type, or null. LayerNorm ignores offset and flags.
    pub fn forward(&self) -> Option<Launch> {
        self.forward_by_sample(1)
    }

    /// The forward's launch where weight and bias are `[samples, cols]`, with the same arguments;
    /// none if `samples` does not divide the rows, or is more than [`MOST_SAMPLES`].
    pub fn forward_by_sample(&self, samples: usize) -> Option<Launch> {
        let team = Team {
            norm: self.norm.name(),
            shape: self.sample(samples)?,
            samples,
        };
        team.forward()
    }

    /// The backward's launches; none for an empty tensor, whose parameters' gradients are zero.
    pub fn backward(&self) -> Option<Backward> {
        self.backward_by_sample(1)
    }

    /// The backward's launches where weight and bias are `[samples, cols]`, as their gradients are
    /// then; none as for [`forward_by_sample`](Self::forward_by_sample).
    pub fn backward_by_sample(&self, samples: usize) -> Option<Backward> {
        let team = Team {
            norm: self.norm.name(),
            shape: self.sample(samples)?,
            samples,
        };
        team.backward(self.norm.add)
    }

    /// The sums over the rows of each sample of `dy · x` and of `dy`, in two launches with the
    /// arguments of [`Backward::columns`] and [`Backward::finish`]: `stats` are then ones, and
    /// `flags` zero. None as for [`forward_by_sample`](Self::forward_by_sample).
    pub fn sums_by_sample(&self, samples: usize) -> Option<Sums> {
        let team = Team {
            norm: "rms_norm",
            shape: self.sample(samples)?,
            samples,
        };
        team.sums()
    }

    /// The backward's launches where x is an unrounded sum: x and dx are of the accumulator's type,
    /// dy is of the type of y. The arguments are those of [`backward`](Self::backward) without
    /// residual and `dsum`; the norm is the same with a residual or without.
    pub fn backward_of_sum(&self) -> Option<Backward> {
        let norm = Norm {
            add: false,
            ..self.norm
        };
        let is_half = self.types.x().size() == 2;
        let team = Team {
            norm: match (is_half, norm.center) {
                (false, _) => norm.name(),
                (true, true) => "sum_layer_norm",
                (true, false) => "sum_rms_norm",
            },
            shape: Self { norm, ..*self },
            samples: 1,
        };
        team.backward(is_half)
    }
}

/// How the rows of each of some samples are given to teams of threads.
struct Team {
    /// The name of the norm in those of its kernels.
    norm: &'static str,
    /// The rows of one sample.
    shape: Rows,
    samples: usize,
}

impl Team {
    fn launch(
        &self,
        what: &str,
        team: &str,
        grid: [usize; 2],
        block: [usize; 2],
    ) -> Option<Launch> {
        let odd = if team == "long" || self.shape.is_even() {
            ""
        } else {
            "_odd"
        };
        let kernel = format!(
            "{}_{what}_{}_{team}{odd}",
            self.norm,
            self.shape.types.name()
        );
        Some(Launch {
            kernel,
            grid: [
                u32::try_from(grid[0]).ok()?,
                u32::try_from(grid[1]).ok()?,
                u32::try_from(self.samples).ok()?,
            ],
            block: [block[0] as u32, block[1] as u32, 1],
            shared: 0,
        })
    }

    /// Whether kernels of `per` vectors a thread take these samples: those of many vectors have no
    /// register for it.
    fn takes(&self, per: usize) -> bool {
        per <= 2 || self.samples == 1
    }

    /// Blocks for a sample, where a multiprocessor has room for `room` at a time.
    fn at_work(&self, room: usize) -> usize {
        (PROCESSORS * room).div_ceil(self.samples)
    }

    /// The same, of one team each.
    fn blocks(&self, room: usize) -> usize {
        // All rows of a team begin at the same place of a vector if the teams are a multiple of its
        // elements.
        if self.shape.is_even() {
            self.at_work(room)
        } else if self.samples == 1 {
            self.at_work(room) / 8 * 8
        } else {
            self.at_work(room).next_multiple_of(8)
        }
    }

    fn forward(&self) -> Option<Launch> {
        let Rows {
            rows,
            cols,
            norm,
            types,
            ..
        } = self.shape;
        if rows == 0 || cols == 0 {
            return None;
        }
        let vectors = self.shape.vectors();
        let plain = types.x().size() == 8;
        let even = self.shape.is_even();
        for (per, team) in [(1, "w1"), (2, "w2")] {
            if vectors <= 32 * per && !(plain && per > 1) {
                let lanes = vectors.div_ceil(per).next_power_of_two().max(4);
                let teams = TEAMS / lanes;
                let room = match (even, norm.add) {
                    (false, _) => 2,
                    (true, true) if per == 2 => 2,
                    (true, _) => 5 - per,
                };
                let blocks = rows.div_ceil(teams).min(self.at_work(room));
                return self.launch("forward", team, [blocks, 1], [lanes, teams]);
            }
        }
        // The most threads of a block, and those that a multiprocessor has room for.
        let (b2, b4) = match (even, norm.add) {
            (true, false) => ((512, 1024), (1024, 1024)),
            (true, true) => ((512, 512), (512, 512)),
            (false, _) => ((512, 512), (512, 512)),
        };
        for (per, team, (most, room)) in [(2, "b2", b2), (4, "b4", b4)] {
            if vectors <= per * most && !plain && self.takes(per) {
                let threads = whole_warps(vectors.div_ceil(per));
                let blocks = rows.min(self.blocks(room / threads));
                return self.launch("forward", team, [blocks, 1], [threads, 1]);
            }
        }
        let fits = vectors <= 8 * 1024 && self.takes(8);
        let (team, threads) = if !plain && fits && even && !norm.add {
            ("b8", whole_warps(vectors.div_ceil(8)))
        } else {
            ("long", 512)
        };
        self.launch("forward", team, [rows, 1], [threads, 1])
    }

    /// `reads_three`: a third tensor beside x and dy, or x in two vectors.
    fn backward(&self, reads_three: bool) -> Option<Backward> {
        let Rows {
            rows, cols, types, ..
        } = self.shape;
        if rows == 0 || cols == 0 {
            return None;
        }
        let vectors = self.shape.vectors();
        let plain = types.x().size() == 8;
        for (per, team) in [(1, "w1"), (2, "w2")] {
            if vectors <= 32 * per && !(plain && per > 1) {
                let lanes = vectors.div_ceil(per).next_power_of_two().max(4);
                let teams = TEAMS / lanes;
                let room = if per == 1 && self.shape.is_even() && !reads_three {
                    3
                } else {
                    2
                };
                let parts = rows.div_ceil(teams).min(self.at_work(room));
                let dx = self.launch("backward", team, [parts, 1], [lanes, teams])?;
                return self.with_finish(dx, None, parts);
            }
        }
        for (per, team) in [(2, "b2"), (4, "b4")] {
            if vectors <= per * 512 && !plain && self.takes(per) {
                let threads = whole_warps(vectors.div_ceil(per));
                let parts = rows.min(self.blocks(512 / threads));
                let dx = self.launch("backward", team, [parts, 1], [threads, 1])?;
                return self.with_finish(dx, None, parts);
            }
        }
        let dx = self.launch("backward", "long", [rows, 1], [512, 1])?;
        let sums = self.sums()?;
        self.with_finish(dx, Some(sums.columns), sums.parts)
    }

    /// Sums over rows by kernels of their own.
    fn sums(&self) -> Option<Sums> {
        let Rows {
            rows, cols, types, ..
        } = self.shape;
        if rows == 0 || cols == 0 {
            return None;
        }
        let tiles = self.shape.vectors().div_ceil(TEAMS);
        let wanted = (4 * PROCESSORS).div_ceil(tiles).div_ceil(self.samples);
        let parts = rows.min(wanted.next_multiple_of(8));
        Some(Sums {
            columns: Launch {
                kernel: format!("{}_columns_{}", self.norm, types.name()),
                ..self.launch("", "long", [tiles, parts], [TEAMS, 1])?
            },
            finish: self.finish()?,
            parts,
        })
    }

    fn with_finish(&self, dx: Launch, columns: Option<Launch>, parts: usize) -> Option<Backward> {
        Some(Backward {
            dx,
            columns,
            finish: self.finish()?,
            parts,
        })
    }

    fn finish(&self) -> Option<Launch> {
        Some(Launch {
            kernel: format!("rows_finish_{}", self.shape.types.name()),
            ..self.launch(
                "",
                "long",
                [(2 * self.shape.cols).div_ceil(32), 1],
                [32, 16],
            )?
        })
    }
}

fn whole_warps(threads: usize) -> usize {
    threads.next_multiple_of(32)
}

#[cfg(test)]
mod tests {
    use super::super::limits::check;
    use super::*;
    use proptest::prelude::*;

    fn shape() -> impl Strategy<Value = (usize, usize)> {
        prop_oneof![
            (1usize..=1 << 20, 1usize..=40_000),
            (1usize..=1 << 33, 1usize..=64),
            (1usize..=4, 1usize..=1 << 33),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_shape_goes_beyond_the_limits(
            (rows, cols) in shape(), norm in 0usize..4, types in 0usize..6, aligned: bool,
        ) {
            let (norm, types) = (Norm::ALL[norm], Types::ALL[types]);
            let rows = Rows { norm, types, rows, cols, aligned };
            check(&rows.forward().unwrap())?;
            for backward in [rows.backward().unwrap(), rows.backward_of_sum().unwrap()] {
                let Backward { dx, columns, finish, .. } = &backward;
                for launch in [dx, finish].into_iter().chain(columns) {
                    check(launch)?;
                }
            }
        }

        #[test]
        fn no_samples_go_beyond_the_limits(
            samples in prop_oneof![1usize..=64, 1usize..=MOST_SAMPLES], rows in 1usize..=5000,
            cols in 1usize..=40_000, norm in 0usize..4, types in 0usize..6, aligned: bool,
        ) {
            let (norm, types) = (Norm::ALL[norm], Types::ALL[types]);
            let shape = Rows { norm, types, rows: samples * rows, cols, aligned };
            let forward = shape.forward_by_sample(samples).unwrap();
            check(&forward)?;
            let backward = shape.backward_by_sample(samples).unwrap();
            let Backward { dx, columns, finish, parts } = &backward;
            for launch in [dx, finish].into_iter().chain(columns) {
                check(launch)?;
                prop_assert_eq!(launch.grid[2] as usize, samples);
            }
            let sums = shape.sums_by_sample(samples).unwrap();
            for launch in [&sums.columns, &sums.finish] {
                check(launch)?;
                prop_assert_eq!(launch.grid[2] as usize, samples);
            }
            let lines = sums.columns.grid[1] as usize;
            prop_assert_eq!(lines, sums.parts);
            prop_assert!(lines >= rows || lines.is_multiple_of(types.x().lanes()));
            // All rows of a team begin at the same place of a vector, or it has one row.
            let lanes = types.x().lanes();
            let summing = columns.as_ref().unwrap_or(dx);
            let blocks = if columns.is_some() { summing.grid[1] } else { summing.grid[0] };
            prop_assert_eq!(blocks as usize, *parts);
            for (launch, blocks) in [(&forward, forward.grid[0]), (summing, blocks)] {
                let teams = if launch.kernel.contains("columns") { 1 } else { launch.block[1] };
                let slots = (blocks * teams) as usize;
                let same = cols.is_multiple_of(lanes) || slots.is_multiple_of(lanes);
                prop_assert!(slots >= rows || same, "{launch:?}");
            }
            prop_assert!(shape.forward_by_sample(0).is_none());
            prop_assert!(shape.forward_by_sample(samples * rows + 1).is_none());
            let too_many = Rows { rows: MOST_SAMPLES + 1, ..shape };
            prop_assert!(too_many.forward_by_sample(MOST_SAMPLES + 1).is_none());
        }

        #[test]
        fn every_element_has_a_thread_and_every_block_its_partial(
            (rows, cols) in shape(), norm in 0usize..4, types in 0usize..6, aligned: bool,
        ) {
            let (norm, types) = (Norm::ALL[norm], Types::ALL[types]);
            let shape = Rows { norm, types, rows, cols, aligned };
            let v = types.x().lanes();
            // Whatever place of a vector the row begins at.
            let touched = (0..v).map(|a| (a + cols).div_ceil(v)).max().unwrap();
            let touched = if cols.is_multiple_of(v) { cols / v } else { touched };
            let per = |launch: &Launch| {
                let team = launch.kernel.trim_end_matches("_odd").rsplit('_').next().unwrap();
                team[1..].parse::<usize>().ok()
            };
            let forward = shape.forward().unwrap();
            if let Some(per) = per(&forward) {
                prop_assert!(forward.block[0] as usize * per >= touched, "{forward:?}");
            }
            let slots = forward.grid[0] as usize * forward.block[1] as usize;
            match per(&forward) {
                Some(1..=4) => {
                    let same = cols.is_multiple_of(v) || slots.is_multiple_of(v);
                    prop_assert!(rows <= slots || same);
                }
                _ => prop_assert_eq!(rows, slots),
            }
            let backward = shape.backward().unwrap();
            let dx = &backward.dx;
            if let Some(per) = per(dx) {
                prop_assert!(dx.block[0] as usize * per >= touched, "{dx:?}");
                prop_assert_eq!(dx.grid[0] as usize, backward.parts);
                let teams = dx.block[1] as usize;
                // A team with more than one row finds all of them at the same place of a vector.
                let slots = backward.parts * teams;
                prop_assert!(rows <= slots || cols.is_multiple_of(v) || slots.is_multiple_of(v));
                if teams > 1 {
                    // The columns' sums of all teams fit into the shared memory of the kernel.
                    prop_assert!(teams * cols * 2 <= 256 * per * v * 2);
                    prop_assert!(256 * per * v * 2 * types.x().accumulator().size() <= 48 * 1024);
                    // Every block has a row.
                    prop_assert!((backward.parts - 1) * teams < rows);
                }
            } else {
                let columns = backward.columns.as_ref().unwrap();
                prop_assert!(columns.grid[0] as usize * 256 >= touched);
                prop_assert_eq!(columns.grid[1] as usize, backward.parts);
                prop_assert!(backward.parts >= rows || backward.parts.is_multiple_of(v));
            }
        }
    }

    #[test]
    fn an_empty_tensor_launches_nothing() {
        for (rows, cols) in [(0, 8), (8, 0)] {
            let (norm, types) = (Norm::ALL[0], Types::ALL[0]);
            let rows = Rows {
                norm,
                types,
                rows,
                cols,
                aligned: true,
            };
            assert!(rows.forward().is_none() && rows.backward().is_none());
        }
    }
}
