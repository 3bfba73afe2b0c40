//! Comparisons of what the ranks call, and of what they get.

/// Calls before which the ranks compare what they call, and after which they compare what they got.
///
/// A call that is checked takes two more calls, of two numbers each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Checks {
    /// Every call.
    Always,
    /// So many calls from the start. A training loop repeats itself: a model that differs between
    /// ranks shows in its first step.
    First(u64),
}

impl Default for Checks {
    fn default() -> Self {
        match cfg!(debug_assertions) {
            true => Checks::Always,
            false => Checks::First(10_000),
        }
    }
}

impl Checks {
    /// Whether the call of this number, from 0, is checked.
    pub(crate) fn includes(self, call: u64) -> bool {
        match self {
            Checks::Always => true,
            Checks::First(count) => call < count,
        }
    }
}

/// A number of 63 bits for some bytes (FNV-1a): with its negative, the largest over all ranks tells
/// whether all have the same.
pub(crate) fn fingerprint(bytes: impl IntoIterator<Item = u8>) -> i64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for byte in bytes {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    (hash >> 1) as i64
}

/// Bytes of a fixed number, in which a text of another rank is sent.
pub(crate) const TEXT: usize = 160;

/// The start of `text`, in [`TEXT`] bytes.
pub(crate) fn packed(text: &str) -> [u8; TEXT] {
    let mut bytes = [0; TEXT];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

/// The text of [`packed`] bytes.
pub(crate) fn unpacked(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim_end_matches('\0').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_back() {
        assert_eq!(unpacked(&packed("a sum of 3 f64")), "a sum of 3 f64");
        assert_eq!(unpacked(&packed(&"x".repeat(500))).len(), TEXT);
    }

    #[test]
    fn fingerprints_are_not_negative_and_tell_apart() {
        let texts = ["", "a", "b", "ab", "ba", "a sum of 3 f64", "a sum of 4 f64"];
        let all: Vec<i64> = texts.iter().map(|t| fingerprint(t.bytes())).collect();
        for (i, a) in all.iter().enumerate() {
            assert!(*a >= 0);
            assert!(all[..i].iter().all(|b| a != b));
        }
    }

    #[test]
    fn first_calls_are_counted_from_zero() {
        assert!(Checks::First(2).includes(1) && !Checks::First(2).includes(2));
        assert!(!Checks::First(0).includes(0) && Checks::Always.includes(u64::MAX));
    }
}
