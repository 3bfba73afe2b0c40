//! A copy of `[outer, rows, columns]` as `[outer, columns, rows]`. Kernels in `transpose.cu`.

use crate::{Element, Launch};

/// `transpose`. Arguments: `x, y, outer, rows, columns`.
pub fn transpose(element: Element, outer: u64, rows: u64, columns: u64) -> Launch {
    let tiles = outer * rows.div_ceil(32) * columns.div_ceil(32);
    Launch {
        kernel: format!("transpose_{}", 8 * element.size()),
        grid: [tiles.min(1 << 30) as u32, 1, 1],
        block: [32, 8, 1],
        shared: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::{check, tensor};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn no_transposition_goes_beyond_the_limits(
            (types, [outer, rows, columns]) in tensor::<3>(),
        ) {
            let launch = transpose(types.x(), outer, rows, columns);
            check(&launch)?;
            prop_assert_eq!(launch.block, [32, 8, 1]);
        }
    }
}
