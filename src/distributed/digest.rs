//! Digests by which ranks compare what they hold.

use candle_core::{DType, Result, Tensor, bail};

use crate::collective::{Call, Collective};
use candle_norm_support::messages;

/// A digest of 64 bits (FNV-1a).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    fn word(&mut self, word: u64) {
        for byte in word.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(super) fn text(&mut self, text: &str) {
        for byte in text.bytes() {
            self.word(u64::from(byte));
        }
        // No text is the beginning of another.
        self.word(u64::MAX);
    }

    /// The bits of every element of `t`.
    pub(super) fn tensor(&mut self, layer: &str, t: &Tensor) -> Result<()> {
        for word in words(layer, t)? {
            self.word(word);
        }
        Ok(())
    }

    /// Halves, which `f64` holds exactly.
    pub(super) fn parts(self) -> [f64; 2] {
        halves(self.0)
    }
}

/// A word as two numbers that `f64` holds exactly.
pub(super) fn halves(word: u64) -> [f64; 2] {
    [(word >> 32) as f64, (word & u64::from(u32::MAX)) as f64]
}

/// The word of two [`halves`].
pub(super) fn word(halves: &[f64]) -> u64 {
    match halves {
        [high, low] => ((*high as u64) << 32) | *low as u64,
        _ => 0,
    }
}

/// The bits of every element of `t`, in a word each.
pub(super) fn words(layer: &str, t: &Tensor) -> Result<Vec<u64>> {
    let t = t.flatten_all()?;
    Ok(match t.dtype() {
        DType::F64 => t.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        // Every number of the narrower types is one of `f32`.
        DType::F32 | DType::F16 | DType::BF16 => {
            let values = t.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            values.into_iter().map(|v| u64::from(v.to_bits())).collect()
        }
        DType::I64 => t.to_vec1::<i64>()?.into_iter().map(|v| v as u64).collect(),
        DType::U32 => t.to_vec1::<u32>()?.into_iter().map(u64::from).collect(),
        DType::U8 => t.to_vec1::<u8>()?.into_iter().map(u64::from).collect(),
        _ => messages::internal(layer, "variables of F64, F32, F16, BF16, I64, U32 or U8")?,
    })
}

/// A tensor of the elements whose bits are `words`, in the dtype, shape and place of `like`.
pub(super) fn from_words(words: &[u64], like: &Tensor) -> Result<Tensor> {
    let (dims, device) = (like.dims(), like.device());
    let words = words.iter().copied();
    let tensor = match like.dtype() {
        DType::F64 => {
            Tensor::from_vec(words.map(f64::from_bits).collect::<Vec<_>>(), dims, device)?
        }
        DType::F32 | DType::F16 | DType::BF16 => {
            let values: Vec<f32> = words.map(|w| f32::from_bits(w as u32)).collect();
            Tensor::from_vec(values, dims, device)?
        }
        DType::I64 => Tensor::from_vec(words.map(|w| w as i64).collect::<Vec<_>>(), dims, device)?,
        DType::U8 => Tensor::from_vec(words.map(|w| w as u8).collect::<Vec<_>>(), dims, device)?,
        _ => Tensor::from_vec(words.map(|w| w as u32).collect::<Vec<_>>(), dims, device)?,
    };
    tensor.to_dtype(like.dtype())
}

/// An error on every rank unless all of them have this `digest` of their `what`.
pub(super) fn same_digest(
    group: &dyn Collective,
    layer: &'static str,
    what: &str,
    digest: Digest,
) -> Result<()> {
    let mut first = digest.parts();
    group.broadcast(&Call::new(format!("{layer}.{what}")), &mut first)?;
    let mut differ = [f64::from(u8::from(first != digest.parts()))];
    group.all_reduce_sum(&Call::new(format!("{layer}.{what}")), &mut differ)?;
    match differ {
        [0.] => Ok(()),
        [count] => bail!(
            "{layer}: expected the same {what} on every rank, got others than those of rank 0 on \
            {count} of {} ranks; build the same model on every rank",
            group.size()
        ),
    }
}
