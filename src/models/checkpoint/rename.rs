//! Rules that turn the names of a file into those of a model.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// A rule that turns the name of a tensor in a file into the name of a variable. See
/// [`LoadOptions::rename`](super::LoadOptions::rename).
///
/// ```
/// use candle_norm::checkpoint::Rename;
///
/// // A model in `DataParallel`, whose encoder has another name here; without the old head.
/// let rules = [
///     Rename::strip_prefix("module."),
///     Rename::with(|name| match name.strip_prefix("encoder.") {
///         Some(rest) => Some(format!("backbone.{rest}")),
///         None if name.starts_with("head.") => None,
///         None => Some(name.to_string()),
///     }),
/// ];
/// # let _ = rules;
/// ```
#[derive(Clone)]
pub struct Rename(Kind);

#[derive(Clone)]
enum Kind {
    Strip(String),
    Add(String),
    With(Arc<Renamer>),
}

type Renamer = dyn Fn(&str) -> Option<String> + Send + Sync;

impl Rename {
    /// Takes `prefix` off the names that begin with it, and leaves the others: `module.` of
    /// `DataParallel`, `_orig_mod.` of `torch.compile`, `model.` of a trainer.
    pub fn strip_prefix(prefix: impl Into<String>) -> Self {
        Self(Kind::Strip(prefix.into()))
    }

    /// Puts `prefix` before every name: the file has a part of the model.
    pub fn add_prefix(prefix: impl Into<String>) -> Self {
        Self(Kind::Add(prefix.into()))
    }

    /// Gives every name to a function. `None` leaves the tensor out; the report has it under
    /// [`skipped`](super::LoadReport::skipped).
    pub fn with(rename: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Kind::With(Arc::new(rename)))
    }

    /// The new name, or `None` if the tensor is left out.
    fn apply(&self, name: &str) -> Option<String> {
        match &self.0 {
            Kind::Strip(prefix) => Some(name.strip_prefix(prefix).unwrap_or(name).to_string()),
            Kind::Add(prefix) => Some(format!("{prefix}{name}")),
            Kind::With(rename) => rename(name),
        }
    }
}

impl fmt::Debug for Rename {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::Strip(prefix) => write!(f, "strip_prefix({prefix:?})"),
            Kind::Add(prefix) => write!(f, "add_prefix({prefix:?})"),
            Kind::With(_) => write!(f, "with(..)"),
        }
    }
}

/// `name` after all rules, in their order.
pub(super) fn renamed(name: &str, rules: &[Rename]) -> Option<String> {
    rules
        .iter()
        .try_fold(name.to_string(), |name, rule| rule.apply(&name))
}

/// The one rule that gives most names of `file` to variables: for a message that names it.
pub(super) fn suggestion(variables: &[&str], file: &[&str]) -> Option<String> {
    // A large model is known by a part of its names.
    const ENOUGH: usize = 500;
    let mut counts = BTreeMap::<(&str, &str), usize>::new();
    for variable in variables.iter().take(ENOUGH) {
        for name in file {
            let found = match (name.strip_suffix(variable), variable.strip_suffix(name)) {
                (Some(prefix), _) if prefix.ends_with('.') => ("strip", prefix),
                (_, Some(prefix)) if prefix.ends_with('.') => ("add", prefix),
                _ => continue,
            };
            *counts.entry(found).or_default() += 1;
        }
    }
    let ((how, prefix), _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    Some(format!("Rename::{how}_prefix({prefix:?})"))
}
