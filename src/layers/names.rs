//! Names that a norm is written and read by.

/// Names that a norm is written and read by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// The name that is written.
    pub(crate) name: &'static str,
    /// Words that stand alone, or before `norm` or `normalization`.
    pub(crate) stems: &'static [&'static str],
    /// Words that stand alone only, such as abbreviations.
    pub(crate) alone: &'static [&'static str],
    /// Whether there is a class for each number of axes somewhere (`BatchNorm2d`, ConvNeXt's
    /// `LayerNorm2d`).
    pub(crate) by_axes: bool,
    /// The number after the name and a colon, if the norm takes one.
    pub(crate) argument: Option<Argument>,
}

/// A number that stands after the name of a norm and a colon.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Argument {
    /// Placeholder with its meaning, after the name and the colon.
    pub(crate) form: &'static str,
    /// Description of the number in messages.
    pub(crate) expected: &'static str,
    /// Value of the example in messages.
    pub(crate) example: &'static str,
    /// Value that is suggested where a text has none.
    pub(crate) suggested: &'static str,
}

impl Names {
    /// Names of a norm that takes no number.
    pub(crate) const fn new(
        stems: &'static [&'static str],
        alone: &'static [&'static str],
        by_axes: bool,
    ) -> Self {
        Self {
            name: if stems.is_empty() { alone[0] } else { stems[0] },
            stems,
            alone,
            by_axes,
            argument: None,
        }
    }
}

/// Names of the layer that does nothing.
pub(crate) const NONE: Names = Names::new(&[], &["none", "identity"], false);
