//! The command line.

use std::path::PathBuf;

use clap::Parser;

use crate::model::Kind;

/// Forecasts stock closes and CO2 by the same small network under several normalizations, and
/// compares.
#[derive(Clone, Debug, Parser)]
#[command(name = "forecast", version)]
pub(crate) struct Options {
    /// The network
    #[arg(long, value_enum, default_value_t = Kind::Gru)]
    pub(crate) model: Kind,

    /// Steps of training [default: 600, quick: 60]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,

    /// Networks of each normalization, each with its own initial weights and batches
    /// [default: 3, quick: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    seeds: Option<u32>,

    /// Directory that the figures are written to; it is created where it is missing
    #[arg(long, value_name = "DIR", default_value = "target/forecast")]
    pub(crate) out: PathBuf,

    /// Few steps and one seed: a look at the figures within seconds, with numbers that are rough
    #[arg(long)]
    pub(crate) quick: bool,
}

impl Options {
    pub(crate) fn steps(&self) -> usize {
        self.steps.unwrap_or(if self.quick { 60 } else { 600 }) as usize
    }

    pub(crate) fn seeds(&self) -> usize {
        self.seeds.unwrap_or(if self.quick { 1 } else { 3 }) as usize
    }
}
