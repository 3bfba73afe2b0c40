//! A model with its scalers: data in, predictions in their own units out, one file.

use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{ModuleT, VarBuilder, VarMap};

use super::{Archive, Scaler, State, TargetScaler, from_state};
use crate::checkpoint;

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
/// A pipeline is saved as one safetensors file: the variables of the model under their own names, so that `VarMap::load` and other readers
/// find them, and the scalers beside them.
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
    /// A variable whose name begins with that of a part: `pipeline.`, `pipeline_inputs.` or `pipeline_targets.`.
    pub fn archive(&self) -> Result<Archive> {
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
    /// A file that is not whole or not that of a pipeline; scalers of a kind or version that this crate does not know; variables that
    /// the file lacks, has too many of, or has in another shape; what `build` returns.
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
        checkpoint::set_all(&vars, &archive.others(), KIND)?;
        Ok(Self {
            model,
            vars: Variables(vars),
            inputs,
            targets,
        })
    }
}

impl<M: ModuleT> Pipeline<M> {
    /// What the model predicts, in the units of the targets.
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

    /// What the model predicts of scaled data, in the units of the loss; `train` is the mode of the model.
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
