//! Loading what `VarMap::load` cannot: files of other frameworks, parts of a model, names that
//! differ, several files.
//!
//! [`load_into`] takes a file as it is, [`load_into_strict`] only one that has the whole model and
//! nothing else, and [`load_with`] one or several by [`LoadOptions`]. All of them read safetensors
//! and the files of `torch.save`, change all or nothing, and return a [`LoadReport`], which is the
//! place to look.
//!
//! # Fine-tuning with another head
//!
//! The checkpoint has 1000 classes, the new model 3. What fits is loaded, the head starts anew, and
//! the report says so:
//!
//! ```
//! use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
//! use candle_nn::{AdamW, Linear, Optimizer, VarBuilder, VarMap, loss};
//! use candle_norm::checkpoint::{self, LoadOptions, Rename};
//! use candle_norm::{BatchNorm, batch_norm, trainable_vars};
//!
//! struct Model {
//!     body: Linear,
//!     norm: BatchNorm,
//!     head: Linear,
//! }
//!
//! impl Model {
//!     fn new(classes: usize, vb: VarBuilder) -> Result<Self> {
//!         Ok(Self {
//!             body: candle_nn::linear(4, 8, vb.pp("body"))?,
//!             norm: batch_norm(8, 1e-5, vb.pp("norm"))?,
//!             head: candle_nn::linear(8, classes, vb.pp("head"))?,
//!         })
//!     }
//!
//!     fn forward(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
//!         let maps = self.norm.forward_t(&self.body.forward(xs)?, train)?;
//!         self.head.forward(&maps.relu()?)
//!     }
//! }
//!
//! fn main() -> Result<()> {
//!     // The checkpoint: its names begin with `module.`, as `DataParallel` writes them.
//!     let file = std::env::temp_dir().join("candle-norm-another-head.safetensors");
//!     let trained = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&trained, DType::F32, &Device::Cpu);
//!     Model::new(1000, vb.pp("module"))?;
//!     trained.save(&file)?;
//!
//!     // Build the model first: its variables are what is loaded into.
//!     let vars = VarMap::new();
//!     let model = Model::new(3, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
//!     let options = LoadOptions {
//!         skip_mismatched: true,
//!         rename: vec![Rename::strip_prefix("module.")],
//!         ..Default::default()
//!     };
//!     let report = checkpoint::load_with(&vars, [&file], &options)?;
//!     println!("{report}");
//!     let kept: Vec<&str> = report.mismatched.iter().map(|(name, _)| name.as_str()).collect();
//!     assert_eq!(kept, ["head.bias", "head.weight"]);
//!     assert_eq!(report.loaded.len(), 7);
//!     assert!(report.missing.is_empty() && report.unexpected.is_empty());
//!
//!     // And train on.
//!     let xs = Tensor::rand(-1f32, 1., (6, 4), &Device::Cpu)?;
//!     let labels = Tensor::new(&[0u32, 1, 2, 0, 1, 2], &Device::Cpu)?;
//!     let mut optimizer = AdamW::new_lr(trainable_vars(&vars), 1e-3)?;
//!     optimizer.backward_step(&loss::cross_entropy(&model.forward(&xs, true)?, &labels)?)?;
//!     # std::fs::remove_file(&file)?;
//!     Ok(())
//! }
//! ```
//!
//! # Files of PyTorch
//!
//! A file of `torch.save` is known by its bytes, in the zip format and in the one before PyTorch
//! 1.6. Nothing in it is run. The state dict may be the whole file or lie in it under a key,
//! `"model"` or `"state_dict"` say; if there are several, set [`LoadOptions::key`]. A pickled
//! module is an error: save its `state_dict()`.
//!
//! # Who owns a name
//!
//! A norm takes its tensors also under other names than PyTorch's: `gamma`, `beta`, `scale`,
//! `mean`, `var`, `moving_mean`,
//! `moving_variance`, `weight_g`, `weight_v`. These are names of files:
//! - a tensor of the file belongs to the variable of the same name, if there is one; only what
//!   nobody owns may stand for a tensor that the file lacks;
//! - a layer built from a `VarMap` has its variables under PyTorch's names, whatever else is there:
//!   a variable `gamma` of your own is never a norm's weight, in either order of construction.

mod assign;
mod pth;
mod rename;
mod report;
mod source;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Result, Tensor};
use candle_nn::VarMap;

pub use rename::Rename;
pub use report::LoadReport;

use source::Source;

/// Options of [`load_with`].
///
/// ```
/// use candle_norm::checkpoint::{LoadOptions, Rename};
///
/// let options = LoadOptions {
///     skip_mismatched: true,
///     rename: vec![Rename::strip_prefix("module.")],
///     ..Default::default()
/// };
/// assert!(!options.strict);
/// ```
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Whether a variable that is not loaded, and a tensor that no variable takes, is an error.
    /// Counters of batches may be absent, and tensors that [`rename`](Self::rename) leaves out, or
    /// that lie beside a state dict, are no error.
    pub strict: bool,
    /// Whether a variable whose tensor has another shape or kind is left as it is, and reported as
    /// [`mismatched`](LoadReport::mismatched); otherwise it is an error. What belongs together is
    /// left together: running mean, variance and counter, and the two parts of a weight norm. Where
    /// the file lacks one of these, the others are left and reported even without this; only the
    /// counter may be absent.
    pub skip_mismatched: bool,
    /// Rules for the names of the file, applied one after the other.
    pub rename: Vec<Rename>,
    /// The key of the state dict in a file of `torch.save` that has several.
    pub key: Option<String>,
}

/// Sets the variables of `vars` to the tensors of the file at `path`, safetensors or PyTorch's.
///
/// Unlike `VarMap::load`, it takes
/// - a file without `num_batches_tracked`, such as one of candle-nn's BatchNorm: the counter is
///   then 0;
/// - other names: `gamma`, `beta`, `scale`, `mean`, `var`, `moving_mean`, `moving_variance`,
///   `weight_g`, `weight_v`;
/// - other floating-point dtypes than the variables': half-precision statistics become `f32`;
/// - tensors whose shape differs by axes of size 1 only, such as `[1, C, 1, 1]` for `[C]`;
/// - a file that lacks variables or has more, and says so in its report. A running mean without its
///   variance, or one part of a weight norm without the other, is left too.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{batch_norm, checkpoint};
///
/// // As candle-nn saves a BatchNorm, without a counter.
/// let file = std::env::temp_dir().join("candle-norm-load-into.safetensors");
/// let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
/// let names = ["weight", "bias", "running_mean", "running_var"];
/// let tensors = names.map(|name| (format!("bn.{name}"), ones.clone())).into_iter().collect();
/// candle_core::safetensors::save(&tensors, &file)?;
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = batch_norm(2, 1e-5, vb.pp("bn"))?;
/// let report = checkpoint::load_into(&vars, &file)?;
/// assert_eq!(report.counters_reset, ["bn.num_batches_tracked"]);
/// assert_eq!(bn.running_mean().to_vec1::<f32>()?, [1., 1.]);
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// A file that cannot be read, and what it is instead; not one variable that it has a tensor for; a
/// tensor of another shape or kind, a running variance that is negative, a statistic that is not
/// finite: the message names the tensor, and no variable is changed.
pub fn load_into(vars: &VarMap, path: impl AsRef<Path>) -> Result<LoadReport> {
    load_with(vars, [path], &LoadOptions::default())
}

/// [`load_into`] that takes only a file with all variables, counters apart, and nothing else.
///
/// # Errors
/// As [`load_into`]; also variables that the file lacks and tensors that no variable takes: how
/// many, and the first of them. No variable is changed then.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{checkpoint, layer_norm};
///
/// let file = std::env::temp_dir().join("candle-norm-load-into-strict.safetensors");
/// let weight = Tensor::ones(2, DType::F32, &Device::Cpu)?;
/// candle_core::safetensors::save(&[("weight", weight)].into(), &file)?;
///
/// let vars = VarMap::new();
/// layer_norm(2, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let error = checkpoint::load_into_strict(&vars, &file).unwrap_err();
/// assert!(error.to_string().contains(r#"missing: ["bias"]"#));
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn load_into_strict(vars: &VarMap, path: impl AsRef<Path>) -> Result<LoadReport> {
    load_with(vars, [path], &whole())
}

/// Sets the variables of `vars` to the tensors of the files at `paths`, as [`load_into`] does, by
/// `options`.
///
/// Several files count as one, in any order: the shards of a large model. The [module](self) has
/// the example of another head.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::checkpoint::{self, LoadOptions, Rename};
/// use candle_norm::layer_norm;
///
/// let folder = std::env::temp_dir();
/// let shards = [1, 2].map(|n| folder.join(format!("candle-norm-shard-{n}.safetensors")));
/// for (name, shard) in ["weight", "bias"].into_iter().zip(&shards) {
///     let ones = Tensor::ones(2, DType::F32, &Device::Cpu)?;
///     candle_core::safetensors::save(&[(name, ones)].into(), shard)?;
/// }
///
/// // The files have a part of the model.
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let norm = layer_norm(2, 1e-5, vb.pp("encoder.norm"))?;
/// let options = LoadOptions {
///     strict: true,
///     rename: vec![Rename::add_prefix("encoder.norm.")],
///     ..Default::default()
/// };
/// let report = checkpoint::load_with(&vars, &shards, &options)?;
/// assert_eq!(report.loaded, ["encoder.norm.bias", "encoder.norm.weight"]);
/// # for shard in &shards { std::fs::remove_file(shard)?; }
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # Errors
/// As [`load_into`]; also two tensors of one name, in two files or by `rename`. No variable is
/// changed then.
pub fn load_with<P: AsRef<Path>>(
    vars: &VarMap,
    paths: impl IntoIterator<Item = P>,
    options: &LoadOptions,
) -> Result<LoadReport> {
    load(vars, paths, options, None)
}

/// [`load_with`] for a caller that has no [`LoadOptions`], whose `remedy` messages have then.
fn load<P: AsRef<Path>>(
    vars: &VarMap,
    paths: impl IntoIterator<Item = P>,
    options: &LoadOptions,
    remedy: Option<&str>,
) -> Result<LoadReport> {
    let source = Source::read(paths, options.key.as_deref(), &options.rename)?;
    assign::something(vars, &source, remedy)?;
    assign::assign(vars, source, options, remedy)
}

/// Body of [`load_into_strict`]. `remedy` is what a caller can do about a file of another model.
pub(crate) fn load_whole(vars: &VarMap, path: &Path, remedy: &str) -> Result<()> {
    load(vars, [path], &whole(), Some(remedy)).map(|_| ())
}

fn whole() -> LoadOptions {
    LoadOptions {
        strict: true,
        ..Default::default()
    }
}

/// Sets all variables to `tensors`, which must be all of them and nothing else, as
/// [`load_into_strict`] does. `source` is what a message calls
/// the tensors, and `remedy` what a caller can do about those of another model.
pub(crate) fn set_all(
    vars: &VarMap,
    tensors: &HashMap<String, Tensor>,
    source: &str,
    remedy: &str,
) -> Result<()> {
    let source = Source::of(tensors, source);
    assign::assign(vars, source, &whole(), Some(remedy)).map(|_| ())
}
