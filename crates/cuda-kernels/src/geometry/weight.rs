//! Weight norm over the rows of a weight, rows over their lengths, and lengths. Kernels in
//! `weight.cu`.

use super::slots::by_team;
use crate::{Launch, Types};

/// Lower bound of the lengths of rows, by the number that kernels know it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Floor {
    /// `least` in place of the length of a row that is shorter.
    Below = 0,
    /// `least` in place of the length of a row that is not longer.
    UpTo = 1,
    /// `least` is added to the sum of the squares.
    Inside = 2,
}

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
    /// `weight_norm`. Arguments: `v, g?, w?, norm, scale` (each `[rows]`), `rows, len, floor: i32,
    /// least: f64, lengths?` (`[rows]`). Without `g` it is one.
    pub fn forward(self) -> Launch {
        self.launch(format!("weight_norm_{}", self.types.name()))
    }

    /// `weight_norm_grad`. Arguments: `v, dw, g?, norm, scale, dv, dg?, rows, len`.
    pub fn backward(self) -> Launch {
        self.launch(format!("weight_norm_grad_{}", self.types.name()))
    }

    fn launch(self, kernel: String) -> Launch {
        by_team(kernel, self.types, self.rows, self.len)
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
