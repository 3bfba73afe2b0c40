//! Rows of any length that a team of threads takes a slot at a time: softmax, and gated RMS norm.
//! Kernels in `softmax.cu` and `gated.cu`.

use super::list;
use crate::{Launch, Types};

/// The bit of the flags of [`Gated`] by which the normalized value is rounded before it meets the
/// weight.
pub const ROUND_FIRST: i32 = 1;
/// The bit by which the gate acts before the normalization.
pub const BEFORE: i32 = 2;

/// A launch of teams for `rows` rows of `len` elements: a warp for a short row, 8 of them in a
/// block; else a block of up to 256 threads.
pub(super) fn by_team(kernel: String, types: Types, rows: u64, len: u64) -> Launch {
    let slots = len.div_ceil(types.x().lanes() as u64) + 1;
    let threads = slots.div_ceil(4).next_multiple_of(32).clamp(32, 256);
    let teams = if threads == 32 { 8 } else { 1 };
    Launch {
        kernel,
        grid: list(rows.div_ceil(teams)),
        block: [threads as u32, teams as u32, 1],
        shared: 0,
    }
}

/// Softmax of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Softmax {
    /// The type of x; that of parameters does not matter.
    pub types: Types,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub len: u64,
}

impl Softmax {
    /// `softmax`. Arguments: `x, y, largest, sum` (each `[rows]`), `rows, len, log: i32`.
    pub fn forward(self) -> Launch {
        self.launch("softmax")
    }

    /// `softmax_grad`. Arguments: `x, dy, largest, sum, dx, rows, len, log: i32`.
    pub fn backward(self) -> Launch {
        self.launch("softmax_grad")
    }

    fn launch(self, what: &str) -> Launch {
        let kernel = format!("{what}_{}", self.types.x().name());
        by_team(kernel, self.types, self.rows, self.len)
    }
}

/// Gated RMS norm of groups of neighboring columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gated {
    /// The types of x and of the gate. The weight is of the accumulator's.
    pub types: Types,
    /// Groups of all rows.
    pub groups: u64,
    /// Columns of a group.
    pub group: u64,
}

impl Gated {
    /// `gated`. Arguments: `x, gate?, weight?, y, rstd?, groups, len, group, eps: f64, flags: i32,
    /// function: i32, slope: f64`, `len` being the elements of a row, and `rstd` `[groups]`.
    pub fn forward(self) -> Launch {
        self.launch("gated")
    }

    /// `gated_grad`. Arguments: `x, gate?, weight?, dy, rstd, dx, dgate?, products?, groups, len,
    /// group, flags: i32, function: i32, slope: f64`. The gradients of the weights are the sums of
    /// `products` over rows, which are of the shape of x and the accumulator's type.
    pub fn backward(self) -> Launch {
        self.launch("gated_grad")
    }

    fn launch(self, what: &str) -> Launch {
        let kernel = format!("{what}_{}", self.types.name());
        by_team(kernel, self.types, self.groups, self.group)
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
        fn no_rows_go_beyond_the_limits((types, [rows, len]) in tensor::<2>()) {
            let softmax = Softmax { types, rows, len };
            let gated = Gated { types, groups: rows, group: len };
            let softmax = [softmax.forward(), softmax.backward()];
            for launch in softmax.into_iter().chain([gated.forward(), gated.backward()]) {
                check(&launch)?;
                let [x, y, _] = launch.block.map(u64::from);
                prop_assert!(x * y <= 256 && (x == 32 || y == 1), "{launch:?}");
                check_list(&launch, rows.div_ceil(y))?;
            }
        }
    }
}
