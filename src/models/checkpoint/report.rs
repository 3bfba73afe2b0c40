//! Report of a load, in full and in short.

use std::fmt;

/// Report of a load: names that were loaded, and names that were not, with the reason.
///
/// Its `Display` has the counts and the first names of each list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[must_use = "a variable that the file lacks keeps its value"]
#[non_exhaustive]
pub struct LoadReport {
    /// The variables that were set.
    pub loaded: Vec<String>,
    /// Those loaded from another name: the variable's, the file's.
    pub renamed: Vec<(String, String)>,
    /// Those whose tensor has other axes of size 1 in the file.
    pub reshaped: Vec<String>,
    /// Counters of batches that the file lacks beside its statistics, set to 0.
    pub counters_reset: Vec<String>,
    /// Variables that were left as they were because the file's tensor does not fit, and why: only
    /// with [`skip_mismatched`](super::LoadOptions::skip_mismatched). Also those that mean nothing
    /// without a variable that was left, or that the file lacks: a running mean without its
    /// variance, a counter without both, one part of a weight norm without the other.
    pub mismatched: Vec<(String, String)>,
    /// Variables that the file lacks, left as they were.
    pub missing: Vec<String>,
    /// Tensors of the file that no variable took.
    pub unexpected: Vec<String>,
    /// Tensors of the file that a [`Rename`](super::Rename) left out, and, of a PyTorch file, those
    /// that lie beside the state dict: of
    /// another one, of an optimizer. These have the keys that lead to them, joined by dots.
    pub skipped: Vec<String>,
    /// The key of a PyTorch file that the tensors were found under.
    pub key: Option<String>,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.loaded.len() {
            1 => write!(f, "1 variable loaded")?,
            n => write!(f, "{n} variables loaded")?,
        }
        if let Some(key) = &self.key {
            write!(f, " from {key:?}")?;
        }
        let pairs = |pairs: &[(String, String)], between: &str| -> Vec<String> {
            let text = |(a, b): &(String, String)| format!("{a}{between}{b}");
            pairs.iter().map(text).collect()
        };
        for (what, names) in [
            ("renamed", &pairs(&self.renamed, " from ")),
            ("reshaped", &self.reshaped),
            ("counters set to 0", &self.counters_reset),
            ("mismatched", &pairs(&self.mismatched, " ")),
            ("missing in the file", &self.missing),
            ("unexpected in the file", &self.unexpected),
            ("left out of the file", &self.skipped),
        ] {
            if !names.is_empty() {
                write!(f, "; {what}{}: {}", count(names), few(names))?;
            }
        }
        Ok(())
    }
}

/// A list of at most this many names is written whole.
const WHOLE: usize = 8;
/// Number of names shown of a longer list.
const FIRST: usize = 5;

/// Number of names, where [`few`] leaves some out.
pub(super) fn count(names: &[impl AsRef<str>]) -> String {
    match names.len() {
        0..=WHOLE => String::new(),
        n => format!(" ({n})"),
    }
}

/// The first names of a long list, and how many follow.
pub(super) fn few(names: &[impl AsRef<str>]) -> String {
    let shown: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.len() {
        0..=WHOLE => shown.join(", "),
        n => format!("{} and {} more", shown[..FIRST].join(", "), n - FIRST),
    }
}

/// [`few`], quoted and in brackets.
pub(super) fn quoted(names: &[impl AsRef<str>]) -> String {
    let quoted: Vec<String> = names.iter().map(|n| format!("{:?}", n.as_ref())).collect();
    match names.len() {
        0..=WHOLE => format!("[{}]", quoted.join(", ")),
        n => format!("[{}] and {} more", quoted[..FIRST].join(", "), n - FIRST),
    }
}
