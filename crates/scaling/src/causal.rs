//! The rows that a row of a series is scaled by.

use std::fmt;
use std::str::FromStr;

use super::ParseOptionError;

/// Rows whose statistics a row of a series is scaled by. Neither choice looks ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Causal {
    /// The rows before it. A value far from all others keeps its whole distance.
    Before,
    /// The rows before it and itself.
    #[default]
    Through,
}

impl fmt::Display for Causal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Before => "before",
            Self::Through => "through",
        })
    }
}

impl FromStr for Causal {
    type Err = ParseOptionError;

    fn from_str(text: &str) -> std::result::Result<Self, ParseOptionError> {
        match text {
            "before" => Ok(Self::Before),
            "through" => Ok(Self::Through),
            _ => Err(ParseOptionError::new(text, "before nor through")),
        }
    }
}
