//! What all layers have in common.
use crate::layers::RunningStats;
use candle_core::{Result, Tensor};
use candle_nn::ModuleT;

/// A normalization layer, whichever it is.
pub trait Norm: ModuleT + Send + Sync + std::fmt::Debug {
    /// The name of the layer as [`NormConfig`](crate::NormConfig) writes it.
    fn kind(&self) -> &'static str;

    /// The parameters that training changes, by the names that a checkpoint holds them under.
    fn parameters(&self) -> Vec<(&'static str, Tensor)>;

    /// The running statistics, if the layer tracks any.
    fn running_stats(&self) -> Option<&RunningStats> {
        None
    }

    /// The statistics by the names that a checkpoint holds them under.
    fn buffers(&self) -> Vec<(&'static str, Tensor)> {
        self.running_stats()
            .map(RunningStats::buffers)
            .unwrap_or_default()
    }

    /// Parameters that are variables and statistics, back to what they start from.
    ///
    /// # Errors
    /// Only those of the device.
    fn reset(&self) -> Result<()>;
}
