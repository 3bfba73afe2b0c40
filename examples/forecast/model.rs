//! The network: it predicts the next rows of a series from its last rows. It is the same for every
//! series.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::rnn::{GRU, GRUConfig, RNN, gru};
use candle_nn::{Linear, Module, VarBuilder, VarMap, linear};
use candle_norm::scaling::{RevIn, RevInOptions, rev_in};

use crate::common::initialize;

/// Rows that a forecast is made from.
pub(crate) const WINDOW: usize = 30;
/// Rows that are forecast.
pub(crate) const HORIZON: usize = 5;
const HIDDEN: usize = 16;

/// Architecture of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// A layer that weighs the rows of the window
    Linear,
    /// A gated recurrent unit that reads them in turn
    Gru,
}

#[derive(Debug)]
enum Body {
    Linear,
    Gru(GRU),
}

pub(crate) struct Model {
    rev_in: Option<RevIn>,
    body: Body,
    head: Linear,
    pub(crate) vars: VarMap,
}

impl Model {
    /// For `width` series; `reversible` normalizes each window in the network.
    pub(crate) fn new(kind: Kind, width: usize, reversible: bool, seed: u64) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (body, inputs) = match kind {
            Kind::Linear => (Body::Linear, WINDOW),
            Kind::Gru => (
                Body::Gru(gru(1, HIDDEN, GRUConfig::default(), vb.pp("gru"))?),
                HIDDEN,
            ),
        };
        let head = linear(inputs, HORIZON, vb.pp("head"))?;
        let rev_in = match reversible {
            true => Some(rev_in(width, RevInOptions::default(), vb.pp("rev_in"))?),
            false => None,
        };
        initialize(&vars, seed)?;
        Ok(Self {
            rev_in,
            body,
            head,
            vars,
        })
    }

    /// The next rows `[N, HORIZON, width]` after windows `[N, WINDOW, width]`, in their units.
    pub(crate) fn forward(&self, windows: &Tensor) -> Result<Tensor> {
        let Some(rev_in) = &self.rev_in else {
            return self.forecast(windows);
        };
        let (normal, stats) = rev_in.normalize(windows)?;
        rev_in.denormalize(&self.forecast(&normal)?, &stats)
    }

    fn forecast(&self, windows: &Tensor) -> Result<Tensor> {
        let (n, steps, width) = windows.dims3()?;
        let each = windows.transpose(1, 2)?.reshape((n * width, steps))?;
        let features = match &self.body {
            Body::Linear => each,
            Body::Gru(gru) => match gru.seq(&each.unsqueeze(2)?)?.pop() {
                Some(last) => last.h,
                None => candle_core::bail!("expected windows of at least one row"),
            },
        };
        let next = self.head.forward(&features)?.reshape((n, width, HORIZON))?;
        next.transpose(1, 2)?.contiguous()
    }
}
