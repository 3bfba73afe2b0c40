//! The options of a layer as one row of a table: its names, and how it is built by value.

use candle_core::Result;
use candle_nn::VarBuilder;

use super::names::Names;
use super::norm::{Norm, OnLastAxis};

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
