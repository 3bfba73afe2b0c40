//! Checks that the properties of all launches share.

use crate::{Launch, Types};
use proptest::prelude::*;

/// Bytes of the largest tensor, more than a device has.
const MOST_BYTES: u64 = 1 << 38;

/// The limits of compute capability 8.0, and 99 KB of dynamic shared memory as on 8.6.
pub(super) fn check(launch: &Launch) -> Result<(), TestCaseError> {
    let threads: u32 = launch.block.iter().product();
    prop_assert!((32..=1024).contains(&threads), "{launch:?}");
    prop_assert!(threads.is_multiple_of(32), "{launch:?}");
    prop_assert!(launch.block[2] <= 64, "{launch:?}");
    prop_assert!(launch.shared <= 99 * 1024, "{launch:?}");
    // No kernel asks for more than it has without asking.
    prop_assert!(launch.shared <= 48 * 1024, "{launch:?}");
    let [x, y, z] = launch.grid;
    prop_assert!((1..=i32::MAX as u32).contains(&x), "{launch:?}");
    prop_assert!((1..=65_535).contains(&y), "{launch:?}");
    prop_assert!((1..=65_535).contains(&z), "{launch:?}");
    Ok(())
}

/// Blocks of a grid.
pub(super) fn blocks(launch: &Launch) -> u64 {
    launch.grid.iter().map(|&n| u64::from(n)).product()
}

/// The list of a launch has `blocks` blocks, and less than one line more.
pub(super) fn check_list(launch: &Launch, wanted: u64) -> Result<(), TestCaseError> {
    let (there, lines) = (blocks(launch), u64::from(launch.grid[1]));
    prop_assert!(
        there >= wanted && there < wanted + lines,
        "{launch:?}, {wanted}"
    );
    Ok(())
}

/// Types, and sizes of the axes of a tensor: usual ones, and one that is as large as memory lets
/// it be, in any place.
pub(super) fn tensor<const N: usize>() -> impl Strategy<Value = (Types, [u64; N])> {
    let usual = prop_oneof![1..=64u64, 1..=5000u64, 1..=1u64 << 20];
    let sizes = proptest::collection::vec(usual, N);
    (0..Types::ALL.len(), sizes, 0..=N, 0u64..1000).prop_map(|(types, sizes, large, less)| {
        let types = Types::ALL[types];
        let mut sizes: [u64; N] = sizes.try_into().expect("as many");
        let mut most = MOST_BYTES / types.x().size() as u64;
        for size in &mut sizes {
            *size = (*size).min(most);
            most /= *size;
        }
        if let Some(size) = sizes.get_mut(large) {
            // Some of the others are one, so that it can be very large.
            *size = (*size * most).saturating_sub(less * *size).max(1);
        }
        (types, sizes)
    })
}
