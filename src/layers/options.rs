//! The options of a layer as one row of a table: its names, and how it is built by value.

use candle_core::Result;
use candle_nn::VarBuilder;

use super::norm::{Norm, OnLastAxis};

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

/// Options of a layer that a configuration can name. A layer that implements it for its options
/// becomes a variant of [`NormConfig`](crate::NormConfig) by one line of the macro there.
pub(crate) trait NormOptions: Sized + 'static {
    const NAMES: Names;

    /// Options of the text after the name and a colon; the others are the default ones.
    fn parse(argument: Option<&str>) -> Option<Self>;

    /// The text after the name and a colon.
    fn argument(&self) -> Option<String> {
        None
    }

    /// Whether the layer has a shift of its own, so that a bias before it would do nothing more.
    fn has_bias(&self) -> bool;

    /// The layer for channels on axis 1 of `[N, num_channels, *]`.
    fn channels(&self, num_channels: usize, vb: VarBuilder) -> Result<Box<dyn Norm>>;

    /// The layer for features on the last axis of `[*, num_features]`.
    fn features(&self, num_features: usize, vb: VarBuilder) -> Result<Box<dyn Norm>> {
        Ok(Box::new(OnLastAxis {
            norm: self.channels(num_features, vb)?,
            num_features,
        }))
    }
}
