//! The ways of scaling that are compared.

use crate::data::Split;
use candle_core::{Result, Tensor};
use candle_norm::scaling::{MinMaxScaler, Scaler, StandardScaler, TargetScaler};

/// Scaling of the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Inputs {
    Raw,
    /// By the least and the greatest of each batch: what training and inference then see differs.
    MinMaxOfBatch,
    MinMax,
    ZScore,
    /// Fitted to the cars that the model is tested on too.
    ZScoreOfAll,
}

/// Scaling of the prices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Targets {
    Dollars,
    ZScore,
}

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scheme {
    pub(crate) inputs: Inputs,
    pub(crate) targets: Targets,
}

/// The ways of the table.
pub(crate) const SCHEMES: [Scheme; 8] = {
    const fn scheme(inputs: Inputs, targets: Targets) -> Scheme {
        Scheme { inputs, targets }
    }
    [
        scheme(Inputs::Raw, Targets::Dollars),
        scheme(Inputs::MinMaxOfBatch, Targets::Dollars),
        scheme(Inputs::MinMax, Targets::Dollars),
        scheme(Inputs::ZScore, Targets::Dollars),
        scheme(Inputs::Raw, Targets::ZScore),
        scheme(Inputs::MinMaxOfBatch, Targets::ZScore),
        scheme(Inputs::MinMax, Targets::ZScore),
        scheme(Inputs::ZScore, Targets::ZScore),
    ]
};

/// The way that is saved, and its leak.
pub(crate) const BEST: Scheme = SCHEMES[7];
pub(crate) const LEAK: Scheme = Scheme {
    inputs: Inputs::ZScoreOfAll,
    targets: Targets::ZScore,
};

impl Scheme {
    pub(crate) fn inputs(self) -> &'static str {
        match self.inputs {
            Inputs::Raw => "raw",
            Inputs::MinMaxOfBatch => "min-max of batch",
            Inputs::MinMax => "min-max",
            Inputs::ZScore => "z-score",
            Inputs::ZScoreOfAll => "z-score of all",
        }
    }

    pub(crate) fn targets(self) -> &'static str {
        match self.targets {
            Targets::Dollars => "dollars",
            Targets::ZScore => "z-score",
        }
    }

    /// The scaler of the inputs, where it is the same for all batches.
    pub(crate) fn input_scaler(self, cars: &Split) -> Result<Option<Box<dyn Scaler>>> {
        let scaler: Box<dyn Scaler> = match self.inputs {
            Inputs::Raw | Inputs::MinMaxOfBatch => return Ok(None),
            Inputs::MinMax => Box::new(MinMaxScaler::default().with_names(&cars.names)?),
            Inputs::ZScore | Inputs::ZScoreOfAll => {
                Box::new(StandardScaler::default().with_names(&cars.names)?)
            }
        };
        match self.inputs {
            Inputs::ZScoreOfAll => scaler.fit(&cars.all_inputs()?)?,
            _ => scaler.fit(&cars.train.inputs)?,
        }
        Ok(Some(scaler))
    }

    pub(crate) fn target_scaler(self, cars: &Split) -> Result<Option<TargetScaler>> {
        if self.targets == Targets::Dollars {
            return Ok(None);
        }
        let targets = TargetScaler::new(StandardScaler::default().with_names(["price"])?);
        targets.fit(&cars.train.prices)?;
        Ok(Some(targets))
    }

    /// A batch as the model gets it.
    pub(crate) fn prepared(self, scaler: Option<&dyn Scaler>, batch: &Tensor) -> Result<Tensor> {
        match (scaler, self.inputs) {
            (Some(scaler), _) => scaler.transform(batch),
            (None, Inputs::MinMaxOfBatch) => {
                let of_batch = MinMaxScaler::default();
                of_batch.fit(batch)?;
                of_batch.transform(batch)
            }
            (None, _) => Ok(batch.clone()),
        }
    }
}
