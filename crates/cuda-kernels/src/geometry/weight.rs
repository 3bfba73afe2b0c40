//! Weight norm over the rows of a weight. Kernels in `weight.cu`.

use super::list;
use crate::{Launch, Types};

/// A weight of `[rows, len]`, each row at a length of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The types of v and of g.
    pub types: Types,
    /// Rows.
    pub rows: u64,
    /// Elements of a row.
    pub len: u64,
}

impl Weight {
    /// `weight_norm`. Arguments: `v, g, w, norm, scale` (each `[rows]`), `rows, len`.
    pub fn forward(self) -> Launch {
        self.launch(format!("weight_norm_{}", self.types.name()))
    }

    /// `weight_norm_grad`. Arguments: `v, dw, g, norm, scale, dv, dg?, rows, len`.
    pub fn backward(self) -> Launch {
        self.launch(format!("weight_norm_grad_{}", self.types.name()))
    }

    /// A warp for a short row, 8 of them in a block; else a block of up to 256 threads.
    fn launch(self, kernel: String) -> Launch {
        let slots = self.len.div_ceil(self.types.x().lanes() as u64) + 1;
        let threads = slots.div_ceil(4).next_multiple_of(32).clamp(32, 256);
        let teams = if threads == 32 { 8 } else { 1 };
        Launch {
            kernel,
            grid: list(self.rows.div_ceil(teams)),
            block: [threads as u32, teams as u32, 1],
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
        fn no_weight_goes_beyond_the_limits((types, [rows, len]) in tensor::<2>()) {
            let weight = Weight { types, rows, len };
            for launch in [weight.forward(), weight.backward()] {
                check(&launch)?;
                let [x, y, _] = launch.block.map(u64::from);
                prop_assert!(x * y <= 256 && (x == 32 || y == 1), "{launch:?}");
                check_list(&launch, rows.div_ceil(y))?;
            }
        }
    }
}
