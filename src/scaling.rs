//! Scalers for data and targets, which are fitted once, saved with the model, and watched.
//!
//! A network's first and last normalization is that of its data and of its targets. A [`Scaler`]
//! has scikit-learn's `fit`, `partial_fit`, `transform` and `inverse_transform` over candle tensors
//! `[N, features...]`: statistics in `f64` whatever the dtype, transformations by tensor operations
//! that gradients pass through, on any device.
//!
//! | scaler | `y` | when |
//! | --- | --- | --- |
//! | [`StandardScaler`] | `(x − mean) / std` | most data and most targets |
//! | [`MinMaxScaler`] | `(x − min) / (max − min)` | bounded data, such as pixels |
//! | [`MaxAbsScaler`] | `x / max abs x` | sparse data: zeros stay zeros |
//! | [`RobustScaler`] | `(x − median) / (q75 − q25)` | data with outliers |
//! | [`SlidingScaler`] | `(x − mean) / std` of the last rows | series whose level moves |
//! | [`EwmScaler`] | the same, newer rows weighing more | series whose level moves |
//! | [`AdaptiveScaler`] | what it wraps, fitted again after drift | data that change now and then |
//!
//! [`RevIn`] normalizes each window of a series inside a model, and brings the forecast back;
//! [`DriftMonitor`] says when data are no longer those of the past.
//!
//! Around them: [`TargetScaler`] for what a model predicts, with errors in both units; [`Pipeline`]
//! for scaler, model and inverse in one file; [`Archive`] for any number of scalers beside a model;
//! [`half_precision`] for what `f16` would lose; [`LossBalancer`] for several losses.
//!
//! # Example
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_norm::scaling::{Scaler, StandardScaler};
//!
//! let train = Tensor::new(&[[20_000f32, 4.], [40_000., 2.], [30_000., 4.]], &Device::Cpu)?;
//! let scaler = StandardScaler::default().with_names(["mileage", "doors"])?;
//! scaler.fit(&train)?;
//!
//! // Saved once, beside the model; loaded where the model runs.
//! let file = std::env::temp_dir().join("candle-norm-scaling.safetensors");
//! scaler.save(&file)?;
//! let scaler = candle_norm::scaling::load(&file)?;
//! let car = scaler.transform(&Tensor::new(&[[30_000f32, 4.]], &Device::Cpu)?)?;
//! assert_eq!(car.to_vec2::<f32>()?[0][0], 0.);
//!
//! // More data, later: the same as a fit to all of them.
//! scaler.partial_fit(&Tensor::new(&[[70_000f32, 2.]], &Device::Cpu)?)?;
//! assert_eq!(scaler.seen()[0].values, 4);
//! # std::fs::remove_file(&file)?;
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Edges
//!
//! As scikit-learn has them: a feature that does not vary is divided by 1; NaN is refused or, by
//! [`Nan::Ignore`], left out and counted, and stays NaN in what is transformed. A feature that is
//! NaN throughout becomes NaN, and the others are scaled. Infinite data, no samples, other features
//! or names are an error that names the feature, and change nothing.
//!
//! `docs/scaling.md` says which scaler when, and what the usual mistakes cost.

pub use crate::layers::{RevIn, RevInOptions, RevInStats, rev_in};
pub use crate::models::Pipeline;
#[doc(inline)]
pub use candle_norm_scaling::*;
