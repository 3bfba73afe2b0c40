//! Digests by which a backward sees that its input is that of the forward.

use candle_core::CpuStorage;

use crate::backend::View;

/// A digest of some elements: of all of a small tensor, and of a large one of as many as cost
/// nothing beside the rest. The statistics that go with the input were formed of the same elements.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Fingerprint(u64);

impl Fingerprint {
    const MOST: usize = 64;

    /// Of an input that fills its part of the storage, in whatever order.
    pub(super) fn of(x: View<CpuStorage>) -> Self {
        let (start, len) = (x.layout.start_offset(), x.layout.shape().elem_count());
        let count = len.min(Self::MOST);
        let places = (0..count).map(|i| start + i * (len - 1) / (count - 1).max(1));
        match x.storage {
            CpuStorage::F16(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::BF16(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::F32(v) => Self::mixed(places.map(|i| u64::from(v[i].to_bits()))),
            CpuStorage::F64(v) => Self::mixed(places.map(|i| v[i].to_bits())),
            _ => Self(0),
        }
    }

    fn mixed(bits: impl Iterator<Item = u64>) -> Self {
        Self(bits.fold(0, |sum, bits| {
            let mixed = (sum ^ bits).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            mixed ^ (mixed >> 32)
        }))
    }
}
