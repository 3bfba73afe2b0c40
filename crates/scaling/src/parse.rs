//! Texts of options that are none.

use std::error::Error;
use std::fmt;

/// A text that is none of the values of an option: of [`Nan`](super::Nan),
/// [`Causal`](super::Causal) or [`OnDrift`](super::OnDrift).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseOptionError {
    got: String,
    expected: &'static str,
}

impl ParseOptionError {
    pub(super) fn new(got: &str, expected: &'static str) -> Self {
        Self {
            got: got.to_string(),
            expected,
        }
    }

    /// The text.
    pub fn got(&self) -> &str {
        &self.got
    }
}

impl fmt::Display for ParseOptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is neither {}", self.got, self.expected)
    }
}

impl Error for ParseOptionError {}
