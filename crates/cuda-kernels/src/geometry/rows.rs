//! LayerNorm and RmsNorm: statistics over the rows of `[rows, cols]`. Kernels in `rows.cu`.
//!
//! x, residual, y, sum, dy, dsum and dx must begin at multiples of [`ALIGNMENT`] bytes; parameters
//! may begin anywhere.
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
    /// Rows of `partial`, which is `[parts, 2, cols]` of the accumulator's type.
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

    fn launch(
        &self,
        what: &str,
        team: &str,
        grid: [usize; 2],
        block: [usize; 2],
    ) -> Option<Launch> {
        let odd = if team == "long" || self.is_even() {
            ""
        } else {
            "_odd"
        };
        let kernel = format!(
            "{}_{what}_{}_{team}{odd}",
            self.norm.name(),
            self.types.name()
        );
        Some(Launch {
            kernel,
            grid: [
                u32::try_from(grid[0]).ok()?,
                u32::try_from(grid[1]).ok()?,
                1,
            ],
            block: [block[0] as u32, block[1] as u32, 1],
            shared: 0,
        })
    }

    /// The forward's launch; none for an empty tensor. Arguments: x, residual or null, weight or
    /// null, bias or null, y, sum or null (the rounded sum of x and residual), stats or null, rows,
    /// cols (`long long`), eps, offset (`double`), flags (`int`). LayerNorm
    /// ignores offset and flags.
    pub fn forward(&self) -> Option<Launch> {
        if self.rows == 0 || self.cols == 0 {
            return None;
        }
        let vectors = self.vectors();
        let plain = self.types.x().size() == 8;
        let even = self.is_even();
        for (per, team) in [(1, "w1"), (2, "w2")] {
            if vectors <= 32 * per && !(plain && per > 1) {
                let lanes = vectors.div_ceil(per).next_power_of_two().max(4);
                let teams = TEAMS / lanes;
                let room = if !even { 2 } else { 5 - per };
                let blocks = self.rows.div_ceil(teams).min(PROCESSORS * room);
                return self.launch("forward", team, [blocks, 1], [lanes, teams]);
            }
        }
        // The most threads of a block, and those that a multiprocessor has room for.
        let (b2, b4) = match (even, self.norm.add) {
            (true, false) => ((512, 1024), (1024, 1024)),
            (true, true) => ((512, 512), (512, 512)),
            (false, _) => ((512, 512), (512, 512)),
        };
        for (per, team, (most, room)) in [(2, "b2", b2), (4, "b4", b4)] {
            if vectors <= per * most && !plain {
                let threads = whole_warps(vectors.div_ceil(per));
                let blocks = self.rows.min(self.blocks(room / threads));
                return self.launch("forward", team, [blocks, 1], [threads, 1]);
            }
        }
        let (team, threads) = if !plain && vectors <= 8 * 1024 && even && !self.norm.add {
            ("b8", whole_warps(vectors.div_ceil(8)))
        } else {
            ("long", 512)
        };
        self.launch("forward", team, [self.rows, 1], [threads, 1])
    }

    /// Blocks of one team each that are at work together.
    fn blocks(&self, room: usize) -> usize {
        let blocks = PROCESSORS * room;
        // All rows of a team begin at the same place of a vector if the teams are a multiple of its
        // elements.
        if self.is_even() {
            blocks
        } else {
            blocks / 8 * 8
        }
    }

    /// The backward's launches; none for an empty tensor, whose parameters' gradients are zero.
    pub fn backward(&self) -> Option<Backward> {
        if self.rows == 0 || self.cols == 0 {
            return None;
        }
        let vectors = self.vectors();
        let plain = self.types.x().size() == 8;
        for (per, team) in [(1, "w1"), (2, "w2")] {
            if vectors <= 32 * per && !(plain && per > 1) {
                let lanes = vectors.div_ceil(per).next_power_of_two().max(4);
                let teams = TEAMS / lanes;
                let room = if per == 1 && self.is_even() && !self.norm.add {
                    3
                } else {
                    2
                };
                let parts = self.rows.div_ceil(teams).min(PROCESSORS * room);
                let dx = self.launch("backward", team, [parts, 1], [lanes, teams])?;
                return self.with_finish(dx, None, parts);
            }
        }
        for (per, team) in [(2, "b2"), (4, "b4")] {
            if vectors <= per * 512 && !plain {
                let threads = whole_warps(vectors.div_ceil(per));
                let parts = self.rows.min(self.blocks(512 / threads));
                let dx = self.launch("backward", team, [parts, 1], [threads, 1])?;
                return self.with_finish(dx, None, parts);
            }
        }
        let dx = self.launch("backward", "long", [self.rows, 1], [512, 1])?;
        let tiles = vectors.div_ceil(TEAMS);
        let parts = self
            .rows
            .min((4 * PROCESSORS).div_ceil(tiles).next_multiple_of(8));
        let columns = Launch {
            kernel: format!("{}_columns_{}", self.norm.name(), self.types.name()),
            ..self.launch("", "long", [tiles, parts], [TEAMS, 1])?
        };
        self.with_finish(dx, Some(columns), parts)
    }

    fn with_finish(&self, dx: Launch, columns: Option<Launch>, parts: usize) -> Option<Backward> {
        let finish = Launch {
            kernel: format!("rows_finish_{}", self.types.name()),
            ..self.launch("", "long", [(2 * self.cols).div_ceil(32), 1], [32, 16])?
        };
        Some(Backward {
            dx,
            columns,
            finish,
            parts,
        })
    }
}

fn whole_warps(threads: usize) -> usize {
    threads.next_multiple_of(32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn within_limits(launch: &Launch) -> Result<(), TestCaseError> {
        let threads: u32 = launch.block.iter().product();
        prop_assert!(
            (32..=1024).contains(&threads) && threads.is_multiple_of(32),
            "{launch:?}"
        );
        prop_assert!(launch.shared <= 99 * 1024);
        prop_assert!(launch.grid.iter().all(|&n| n > 0), "{launch:?}");
        prop_assert!(
            launch.grid[0] <= i32::MAX as u32 && launch.grid[1] <= 65535,
            "{launch:?}"
        );
        Ok(())
    }

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
            let forward = rows.forward().unwrap();
            within_limits(&forward)?;
            let backward = rows.backward().unwrap();
            for launch in [&backward.dx, &backward.finish].into_iter().chain(&backward.columns) {
                within_limits(launch)?;
            }
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
