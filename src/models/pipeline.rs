//! A model with its scalers: data in, predictions in their own units out, one file.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{ModuleT, VarBuilder, VarMap};

use super::checkpoint;
use candle_norm_scaling::{Archive, Scaler, State, TargetScaler, from_state};

const KIND: &str = "Pipeline";
const VERSION: u32 = 1;

/// The parts of the file.
const SELF: &str = "pipeline";
const INPUTS: &str = "pipeline_inputs";
const TARGETS: &str = "pipeline_targets";

/// Scaler → model → inverse.
///
/// ```text
/// prediction = targets⁻¹( model( inputs(x) ) )
/// ```
///
/// A pipeline is saved as one safetensors file: the variables of the model under their own names,
/// so that `VarMap::load` and other readers find them, and the scalers beside them.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Linear, VarBuilder, VarMap};
/// use candle_norm::scaling::{Pipeline, Scaler, StandardScaler, TargetScaler};
///
/// let model = |vb: VarBuilder| candle_nn::linear(1, 1, vb.pp("model"));
/// let vars = VarMap::new();
/// let model_of_vars = model(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let (miles, prices) = (StandardScaler::default(), StandardScaler::default());
/// miles.fit(&Tensor::new(&[[10_000f32], [30_000.]], &Device::Cpu)?)?;
/// prices.fit(&Tensor::new(&[[20_000f32], [10_000.]], &Device::Cpu)?)?;
/// let pipeline = Pipeline::new(model_of_vars, vars)
///     .with_inputs(miles)
///     .with_targets(TargetScaler::new(prices));
///
/// let file = std::env::temp_dir().join("candle-norm-pipeline.safetensors");
/// pipeline.save(&file)?;
/// let restored: Pipeline<Linear> = Pipeline::load(&file, DType::F32, &Device::Cpu, model)?;
/// let car = Tensor::new(&[[15_000f32]], &Device::Cpu)?;
/// assert_eq!(
///     restored.predict(&car)?.to_vec2::<f32>()?,
///     pipeline.predict(&car)?.to_vec2::<f32>()?
/// );
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// A model with batch norm has two modes, and is a [`ModuleT`]. It trains by
/// [`predict_scaled`](Self::predict_scaled) with `true`; [`predict`](Self::predict) is inference.
/// The running statistics are saved and loaded with the other variables:
///
/// ```
/// use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
/// use candle_nn::{AdamW, Linear, Optimizer, VarBuilder, VarMap, loss};
/// use candle_norm::scaling::{Pipeline, Scaler, StandardScaler, TargetScaler};
/// use candle_norm::{BatchNorm, batch_norm, trainable_vars};
///
/// struct Net {
///     hidden: Linear,
///     norm: BatchNorm,
///     out: Linear,
/// }
///
/// impl Net {
///     fn new(vb: VarBuilder) -> Result<Self> {
///         Ok(Self {
///             hidden: candle_nn::linear(2, 8, vb.pp("hidden"))?,
///             norm: batch_norm(8, 1e-5, vb.pp("norm"))?,
///             out: candle_nn::linear(8, 1, vb.pp("out"))?,
///         })
///     }
/// }
///
/// impl ModuleT for Net {
///     fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
///         let hidden = self.norm.forward_t(&self.hidden.forward(x)?, train)?;
///         self.out.forward(&hidden.relu()?)
///     }
/// }
///
/// let cars = [[20_000f32, 4.], [40_000., 2.], [30_000., 4.], [5_000., 2.]];
/// let cars = Tensor::new(&cars, &Device::Cpu)?;
/// let prices = Tensor::new(&[[21_000f32], [9_000.], [15_000.], [24_000.]], &Device::Cpu)?;
/// let (inputs, targets) = (StandardScaler::default(), StandardScaler::default());
/// inputs.fit(&cars)?;
/// targets.fit(&prices)?;
/// let vars = VarMap::new();
/// let net = Net::new(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let pipeline = Pipeline::new(net, vars)
///     .with_inputs(inputs)
///     .with_targets(TargetScaler::new(targets));
///
/// let scaled = pipeline.targets().unwrap().scale(&prices)?;
/// // The running statistics are variables of the model, and none of the optimizer's.
/// let mut optimizer = AdamW::new_lr(trainable_vars(pipeline.vars()), 0.01)?;
/// for _ in 0..20 {
///     let prediction = pipeline.predict_scaled(&cars, true)?;
///     optimizer.backward_step(&loss::mse(&prediction, &scaled)?)?;
/// }
///
/// let file = std::env::temp_dir().join("candle-norm-pipeline-batch-norm.safetensors");
/// pipeline.save(&file)?;
/// let restored: Pipeline<Net> = Pipeline::load(&file, DType::F32, &Device::Cpu, Net::new)?;
/// // One car at a time is what it is among others.
/// let car = cars.narrow(0, 1, 1)?;
/// assert_eq!(
///     restored.predict(&car)?.to_vec2::<f32>()?,
///     pipeline.predict(&car)?.to_vec2::<f32>()?
/// );
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Pipeline<M> {
    model: M,
    vars: Variables,
    inputs: Option<Box<dyn Scaler>>,
    targets: Option<TargetScaler>,
}

/// A `VarMap`, which has no `Debug`.
struct Variables(VarMap);

impl std::fmt::Debug for Variables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VarMap of {}", self.0.all_vars().len())
    }
}

impl<M> Pipeline<M> {
    /// A model, and the variables that it is made of, without scalers.
    pub fn new(model: M, vars: VarMap) -> Self {
        Self {
            model,
            vars: Variables(vars),
            inputs: None,
            targets: None,
        }
    }

    /// This with a scaler for what goes into the model.
    pub fn with_inputs(self, scaler: impl Scaler + 'static) -> Self {
        self.with_boxed_inputs(Box::new(scaler))
    }

    /// [`with_inputs`](Self::with_inputs) for a scaler of any kind.
    pub fn with_boxed_inputs(self, scaler: Box<dyn Scaler>) -> Self {
        Self {
            inputs: Some(scaler),
            ..self
        }
    }

    /// This with a scaler for what the model predicts.
    pub fn with_targets(self, targets: TargetScaler) -> Self {
        Self {
            targets: Some(targets),
            ..self
        }
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The variables of the model.
    pub fn vars(&self) -> &VarMap {
        &self.vars.0
    }

    /// The scaler of the inputs.
    pub fn inputs(&self) -> Option<&dyn Scaler> {
        self.inputs.as_deref()
    }

    /// The scaler of the targets.
    pub fn targets(&self) -> Option<&TargetScaler> {
        self.targets.as_ref()
    }

    /// The contents of the file, to which more can be added before it is written.
    ///
    /// # Errors
    /// Inputs or targets that were never fitted; a variable whose name begins with that of a part:
    /// `pipeline.`, `pipeline_inputs.` or `pipeline_targets.`.
    pub fn archive(&self) -> Result<Archive> {
        let targets = self.targets.as_ref().map(TargetScaler::scaler);
        for (part, scaler) in [("inputs", self.inputs()), ("targets", targets)] {
            if let Some(scaler) = scaler {
                fitted_part(KIND, part, scaler.kind(), scaler.is_fitted())?;
            }
        }
        let mut archive = Archive::default();
        let state = State::new(KIND, VERSION)
            .with_option("inputs", self.inputs.is_some())
            .with_option("targets", self.targets.is_some());
        archive.put(SELF, &state)?;
        if let Some(inputs) = &self.inputs {
            archive.put(INPUTS, &inputs.state()?)?;
        }
        if let Some(targets) = &self.targets {
            archive.put(TARGETS, &targets.scaler().state()?)?;
        }
        archive.put_vars(&self.vars.0)?;
        Ok(archive)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// As [`archive`](Self::archive); those of the file system.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.archive()?.write(path)
    }

    /// The pipeline in a file, around the model that `build` makes.
    ///
    /// # Errors
    /// A file that is not whole or not that of a pipeline; scalers of a kind or version that this
    /// crate does not know; variables that the file lacks, has too many of, or has in another
    /// shape; what `build` returns.
    pub fn load(
        path: impl AsRef<Path>,
        dtype: DType,
        device: &Device,
        build: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<Self> {
        Self::from_archive(&Archive::read(path)?, dtype, device, build)
    }

    /// [`load`](Self::load) from a file that was read.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_archive(
        archive: &Archive,
        dtype: DType,
        device: &Device,
        build: impl FnOnce(VarBuilder) -> Result<M>,
    ) -> Result<Self> {
        let state = archive.state(SELF)?;
        state.require(KIND, VERSION)?;
        let scaler = |option: &str, prefix: &str| match state.option(option)? {
            true => from_state(&archive.state(prefix)?).map(Some),
            false => Ok(None),
        };
        let inputs = scaler("inputs", INPUTS)?;
        let targets = scaler("targets", TARGETS)?.map(TargetScaler::from_boxed);
        let vars = VarMap::new();
        let model = build(VarBuilder::from_varmap(&vars, dtype, device))?;
        let remedy = "let `build` make the model that was saved";
        checkpoint::set_all(&vars, &archive.others(), KIND, remedy)?;
        Ok(Self {
            model,
            vars: Variables(vars),
            inputs,
            targets,
        })
    }
}

impl<M: ModuleT> Pipeline<M> {
    /// Predictions of the model, in the units of the targets.
    ///
    /// # Errors
    /// As [`Scaler::transform`]; those of the model.
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.predict_scaled(x, false)?;
        match &self.targets {
            Some(targets) => targets.invert(&y),
            None => Ok(y),
        }
    }

    /// Predictions of the model from scaled data, in the units of the loss; `train` is the mode of
    /// the model.
    ///
    /// # Errors
    /// As [`predict`](Self::predict).
    pub fn predict_scaled(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match &self.inputs {
            Some(inputs) => self.model.forward_t(&inputs.transform(x)?, train),
            None => self.model.forward_t(x, train),
        }
    }
}

/// A part of a pipeline that has been fitted before it is saved.
fn fitted_part(layer: &str, part: &str, kind: &str, fitted: bool) -> Result<()> {
    if !fitted {
        bail!(
            "{layer}: expected fitted {part}, got a {kind} without data; fit it to the training \
            data before the pipeline is saved"
        )
    }
    Ok(())
}
