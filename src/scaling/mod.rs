//! Scalers for data and targets, which are fitted once, saved with the model, and watched.

mod adaptive;
mod affine;
mod archive;
mod balancer;
mod data;
mod drift;
mod ewm;
mod extremes;
mod features;
mod fitted;
mod follow;
mod half;
mod max_abs;
mod min_max;
mod pipeline;
mod registry;
mod rev_in;
mod robust;
mod sliding;
mod standard;
mod state;
mod target;
mod two_samples;
mod watch;
mod window;

use std::fmt::Debug;
use std::path::Path;

use candle_core::{Result, Tensor};

pub use crate::ops::Moments;
pub use adaptive::{AdaptiveScaler, OnDrift};
pub use archive::Archive;
pub use balancer::{LossBalancer, LossBalancerOptions};
pub use data::Nan;
pub use drift::{DriftEvent, DriftMetric, DriftMonitor, DriftOptions, DriftReport};
pub use ewm::{EwmScaler, EwmScalerOptions};
pub use features::Features;
pub use follow::{Causal, SeriesStats};
pub use half::{HalfFinding, HalfProblem, half_precision};
pub use max_abs::{MaxAbsScaler, MaxAbsScalerOptions};
pub use min_max::{MinMaxScaler, MinMaxScalerOptions};
pub use pipeline::Pipeline;
pub use registry::{from_state, load};
pub use rev_in::{RevIn, RevInOptions, RevInStats, rev_in};
pub use robust::{RobustScaler, RobustScalerOptions};
pub use sliding::{SlidingScaler, SlidingScalerOptions};
pub use standard::{StandardScaler, StandardScalerOptions};
pub use state::{Seen, State};
pub use target::{Deviation, TargetError, TargetScaler};

/// The prefix under which [`Scaler::save`] puts a scaler into a file.
pub const PREFIX: &str = "scaler";

/// A transformation of data that is fitted to data, and has an inverse.
///
/// Data are `[N, features...]`: the first axis counts samples, and every element of the others is a feature. Every method takes `&self`: one
/// thread may feed a scaler while others transform by it, and each of them sees it as it was before or after, never between. An error leaves
/// the scaler as it was.
pub trait Scaler: Send + Sync + Debug {
    /// The name of the type, which messages and files have.
    fn kind(&self) -> &'static str;

    /// The features, as far as they are known.
    fn features(&self) -> Features;

    /// What was seen of each feature; empty before any data.
    fn seen(&self) -> Vec<Seen>;

    /// Forgets all data and fits `x`, `[N, features...]`. Names of features stay.
    ///
    /// # Errors
    /// Data that are empty, not of floating point, infinite, NaN where that is refused, or of other features than the names say.
    fn fit(&self, x: &Tensor) -> Result<()>;

    /// Takes in more data: the result is that of [`fit`](Self::fit) to all of them.
    ///
    /// # Errors
    /// As [`fit`](Self::fit); also other features than before.
    fn partial_fit(&self, x: &Tensor) -> Result<()>;

    /// Takes in all that another scaler of the same kind has seen.
    ///
    /// # Errors
    /// A scaler of another kind or of other features.
    fn merge(&self, other: &dyn Scaler) -> Result<()>;

    /// The data scaled: of the shape and dtype of `x`, on its device, and differentiable.
    ///
    /// # Errors
    /// A scaler without data; other features than it was fitted to.
    fn transform(&self, x: &Tensor) -> Result<Tensor>;

    /// What [`transform`](Self::transform) would make `x` of: data in their own units.
    ///
    /// # Errors
    /// As [`transform`](Self::transform).
    fn inverse_transform(&self, x: &Tensor) -> Result<Tensor>;

    /// Forgets all data. Options and names of features stay.
    fn reset(&self);

    /// All that this scaler knows, at one moment.
    ///
    /// # Errors
    /// Only those of candle.
    fn state(&self) -> Result<State>;

    /// Becomes the scaler that `state` is of, options included.
    ///
    /// # Errors
    /// A state of another kind, version or set of features, or one that is damaged.
    fn restore(&self, state: &State) -> Result<()>;

    /// Whether there is anything to transform by.
    fn is_fitted(&self) -> bool {
        !self.seen().is_empty()
    }

    /// Whether `names` are those of the features, in their order; scalers without names take any of the right number.
    ///
    /// # Errors
    /// The first that differs.
    fn check_names(&self, names: &[&str]) -> Result<()> {
        self.features().check_names(self.kind(), names)
    }

    /// Writes this scaler to a file of its own. [`Archive`] puts it into a file with others, and with a model.
    ///
    /// # Errors
    /// Those of the file system.
    fn save(&self, path: &Path) -> Result<()> {
        let mut archive = Archive::default();
        archive.put(PREFIX, &self.state()?)?;
        archive.write(path)
    }

    /// [`restore`](Self::restore)s this scaler from a file that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// A file that is not whole, or of another kind, version or set of features.
    fn load(&self, path: &Path) -> Result<()> {
        self.restore(&Archive::read(path)?.state(PREFIX)?)
    }
}
