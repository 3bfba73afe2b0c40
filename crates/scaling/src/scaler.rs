//! The trait of all scalers, and what follows from it: files, and scalers of a program's own.

use std::fmt::Debug;
use std::path::Path;

use candle_core::{Result, Tensor};

use super::{Archive, Features, Nan, Seen, State, check};

/// The prefix under which [`save`](crate::StandardScaler::save) puts a scaler into a file.
pub const PREFIX: &str = "scaler";

/// A transformation of data that is fitted to data, and has an inverse.
///
/// Data are `[N, features...]`: the first axis counts samples, and every element of the others is a
/// feature. Every method takes `&self`: one thread may feed a scaler while others transform by it,
/// and each of them sees it as it was before or after, never between. An error leaves the scaler as
/// it was.
///
/// # A scaler of your own
///
/// A type that implements it goes wherever the scalers here go: into a [`TargetScaler`], a
/// [`Pipeline`], an [`Archive`], [`half_precision`]. Only [`load`], [`from_state`] and the loading
/// of a pipeline know no kinds but those of this crate.
///
/// ```
/// use std::sync::Mutex;
///
/// use candle_core::{Device, Result, Tensor};
/// use candle_norm::scaling::{Features, Nan, Scaler, Seen, State};
///
/// /// The logarithm, which has nothing to fit but the features.
/// #[derive(Debug, Default)]
/// struct Log(Mutex<Features>);
///
/// impl Log {
///     fn set(&self, next: impl FnOnce(&Features) -> Result<Features>) -> Result<()> {
///         let mut features = self.0.lock().unwrap();
///         *features = next(&features)?;
///         Ok(())
///     }
/// }
///
/// impl Scaler for Log {
///     fn kind(&self) -> &'static str {
///         "Log"
///     }
///     fn nan(&self) -> Nan {
///         Nan::Ignore
///     }
///     fn features(&self) -> Features {
///         self.0.lock().unwrap().clone()
///     }
///     fn seen(&self) -> Vec<Seen> {
///         vec![Seen::default(); self.features().count()]
///     }
///     fn fit(&self, x: &Tensor) -> Result<()> {
///         self.set(|features| features.without_axes().of("Log", x))
///     }
///     fn partial_fit(&self, x: &Tensor) -> Result<()> {
///         self.set(|features| features.of("Log", x))
///     }
///     fn merge(&self, other: &dyn Scaler) -> Result<()> {
///         self.set(|features| features.joined("Log", &other.features()))
///     }
///     fn transform(&self, x: &Tensor) -> Result<Tensor> {
///         self.features().of("Log", x)?;
///         x.log()
///     }
///     fn inverse_transform(&self, x: &Tensor) -> Result<Tensor> {
///         self.features().of("Log", x)?;
///         x.exp()
///     }
///     fn reset(&self) {
///         let _ = self.set(|features| Ok(features.without_axes()));
///     }
///     fn snapshot(&self) -> Box<dyn Scaler> {
///         Box::new(Log(Mutex::new(self.features())))
///     }
///     fn state(&self) -> Result<State> {
///         Ok(State::new("Log", 1).with_features(self.features(), self.seen()))
///     }
///     fn restore(&self, state: &State) -> Result<()> {
///         state.require("Log", 1)?;
///         self.set(|features| features.joined("Log", state.features()))
///     }
/// }
///
/// let prices = Tensor::new(&[[1f64], [10.], [100.]], &Device::Cpu)?;
/// let scaler = Log::default();
/// scaler.fit(&prices)?;
/// let back = scaler.inverse_transform(&scaler.transform(&prices)?)?;
/// assert!((back.to_vec2::<f64>()?[2][0] - 100.).abs() < 1e-12);
/// assert!(scaler.transform(&prices.t()?).is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// [`TargetScaler`]: crate::TargetScaler
/// [`Pipeline`]: https://docs.rs/candle-norm/latest/candle_norm/scaling/struct.Pipeline.html
/// [`half_precision`]: crate::half_precision
/// [`load`]: crate::load
/// [`from_state`]: crate::from_state
pub trait Scaler: Send + Sync + Debug {
    /// The name of the type, which messages and files have.
    fn kind(&self) -> &'static str;

    /// Treatment of NaN in data that it is fitted to.
    fn nan(&self) -> Nan;

    /// The features, as far as they are known.
    fn features(&self) -> Features;

    /// Counts of each feature; empty before any data.
    fn seen(&self) -> Vec<Seen>;

    /// Forgets all data and fits `x`, `[N, features...]`. Names of features stay.
    ///
    /// # Errors
    /// Data that are empty, not of floating point, infinite, NaN where that is refused, or of other
    /// features than the names say.
    fn fit(&self, x: &Tensor) -> Result<()>;

    /// [`fit`](Self::fit) to samples that count by their weight, as scikit-learn's `sample_weight`:
    /// a sample of weight 2 is one that is there twice, and one of weight 0 is none.
    /// `sample_weight` is `[N]`; the count, the mean and the variance of [`StandardScaler`] are
    /// those of the weights, and the ranges of [`MinMaxScaler`] and [`MaxAbsScaler`] those of the
    /// samples that count.
    ///
    /// [`StandardScaler`]: crate::StandardScaler
    /// [`MinMaxScaler`]: crate::MinMaxScaler
    /// [`MaxAbsScaler`]: crate::MaxAbsScaler
    ///
    /// # Errors
    /// As [`fit`](Self::fit); weights that are negative or not finite, of other samples, or all 0;
    /// a scaler that has no use for weights, such as those of series and
    /// [`RobustScaler`](crate::RobustScaler).
    fn fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        let _ = (x, sample_weight);
        check::no_weights(self.kind(), "fit it without weights")
    }

    /// Takes in more data: the result is that of [`fit`](Self::fit) to all of them.
    ///
    /// # Errors
    /// As [`fit`](Self::fit); also other features than before.
    fn partial_fit(&self, x: &Tensor) -> Result<()>;

    /// [`partial_fit`](Self::partial_fit) to samples that count by their weight. Those of
    /// `partial_fit` count 1.
    ///
    /// # Errors
    /// As [`partial_fit`](Self::partial_fit) and [`fit_weighted`](Self::fit_weighted).
    fn partial_fit_weighted(&self, x: &Tensor, sample_weight: &Tensor) -> Result<()> {
        let _ = (x, sample_weight);
        check::no_weights(self.kind(), "fit it without weights")
    }

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

    /// Data in their own units: the inverse of [`transform`](Self::transform).
    ///
    /// # Errors
    /// As [`transform`](Self::transform).
    fn inverse_transform(&self, x: &Tensor) -> Result<Tensor>;

    /// Forgets all data. Options and names of features stay.
    fn reset(&self);

    /// A scaler of its own that is as this is now. What happens to the one does not reach the
    /// other: several calls to it are about one and the same scaler, whoever feeds this one
    /// meanwhile.
    fn snapshot(&self) -> Box<dyn Scaler>;

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

    /// Whether `names` are those of the features, in their order; scalers without names take any of
    /// the right number.
    ///
    /// # Errors
    /// The first that differs.
    fn check_names(&self, names: &[&str]) -> Result<()> {
        self.features().check_names(self.kind(), names)
    }
}

/// Files of scalers of any kind. Those of this crate have these methods themselves.
impl<'a> dyn Scaler + 'a {
    /// Writes this scaler to a file of its own, over the one that it wrote before. [`Archive`] puts
    /// it into a file with others, and with a model.
    ///
    /// # Errors
    /// A file that holds anything else, such as the variables of a model, which is then as it was;
    /// those of the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut archive = Archive::default();
        archive.put(PREFIX, &self.state()?)?;
        archive.write_over(path.as_ref())
    }

    /// [`restore`](Scaler::restore)s this scaler from a file that `save` wrote.
    ///
    /// # Errors
    /// A file that is not whole, or of another kind, version or set of features.
    pub fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        self.restore(&Archive::read(path)?.state(PREFIX)?)
    }
}

/// `save` and `load` of a scaler of this crate.
macro_rules! files {
    ($($header:tt)*) => {
        $($header)* {
            /// Writes this scaler to a file of its own, over the one that it wrote before.
            /// [`Archive`](crate::Archive) puts it into a file with others, and with a model.
            ///
            /// # Errors
            /// A file that holds anything else, such as the variables of a model, which is then as
            /// it was; those of the file system.
            pub fn save(&self, path: impl AsRef<std::path::Path>) -> candle_core::Result<()> {
                let scaler: &dyn $crate::Scaler = self;
                scaler.save(path)
            }

            /// [`restore`](crate::Scaler::restore)s this scaler from a file that
            /// [`save`](Self::save) wrote.
            ///
            /// # Errors
            /// A file that is not whole, or of another kind, version or set of features.
            pub fn load(&self, path: impl AsRef<std::path::Path>) -> candle_core::Result<()> {
                let scaler: &dyn $crate::Scaler = self;
                scaler.load(path)
            }
        }
    };
}
pub(super) use files;
