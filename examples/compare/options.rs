//! The command line.

use crate::data::TRAIN_SIZE;
use crate::device;
use crate::model::CHANNELS;
use crate::train::Settings;
use candle_core::Device;
use candle_norm::NormConfig;
use clap::Parser;
use std::path::PathBuf;

const DEFAULT_NORMS: [&str; 7] = [
    "none", "batch", "layer", "group", "instance", "rms", "weight",
];
const DEFAULT_GROUPS: usize = 8;

/// Trains the same small convolutional network on handwritten digits once per kind of
/// normalization, and compares.
#[derive(Clone, Debug, Parser)]
#[command(name = "compare", version)]
pub(crate) struct Options {
    /// Kinds to compare, separated by commas or given repeatedly: none, batch, layer, group,
    /// group:N (N groups), instance, rms, weight
    #[arg(long = "norm", value_name = "KIND", value_delimiter = ',', value_parser = parse_norm,
          default_values = DEFAULT_NORMS, hide_default_value = true)]
    pub(crate) norms: Vec<NormConfig>,

    /// Times that each network sees the training images [default: 10, quick: 4]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count(1_000))]
    epochs: Option<usize>,

    /// Images in a step
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        value_parser = count(TRAIN_SIZE),
        default_value_t = 64
    )]
    batch_size: usize,

    /// Learning rate of the first step of stochastic gradient descent, the same for all kinds; it
    /// falls to zero
    #[arg(
        long,
        value_name = "RATE",
        allow_negative_numbers = true,
        value_parser = parse_rate,
        default_value_t = 0.3
    )]
    lr: f64,

    /// Networks of each kind, each with its own initial weights and order of the images
    /// [default: 5, quick: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = count(1_000))]
    seeds: Option<usize>,

    /// Where the networks are trained: cpu, or cuda for the first NVIDIA GPU
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = device::parse)]
    pub(crate) device: Device,

    /// Directory that the report is written to; it is created where it is missing
    #[arg(long, value_name = "DIR", default_value = "target/compare")]
    pub(crate) out: PathBuf,

    /// Few steps and one seed: a look at the report within seconds, with figures that are rough
    #[arg(long)]
    pub(crate) quick: bool,
}

impl Options {
    pub(crate) fn settings(&self) -> Settings {
        let (epochs, seeds) = if self.quick { (4, 1) } else { (10, 5) };
        Settings {
            epochs: self.epochs.unwrap_or(epochs),
            batch_size: self.batch_size,
            lr: self.lr,
            seeds: self.seeds.unwrap_or(seeds),
        }
    }

    /// The command that repeats this run, without the directory that is written to.
    pub(crate) fn command(&self) -> String {
        let Settings {
            epochs,
            batch_size,
            lr,
            seeds,
        } = self.settings();
        let norms: Vec<_> = self
            .distinct_norms()
            .iter()
            .map(ToString::to_string)
            .collect();
        let (feature, device) = match self.device.is_cpu() {
            true => ("", ""),
            false => (" --features cuda", " --device cuda"),
        };
        format!(
            "cargo run --release{feature} --example compare -- --norm {} --epochs {epochs} \
            --batch-size {batch_size} --lr {lr} --seeds {seeds}{device}",
            norms.join(",")
        )
    }

    /// The kinds in the order given, each once.
    pub(crate) fn distinct_norms(&self) -> Vec<NormConfig> {
        let mut distinct = Vec::new();
        for norm in &self.norms {
            if !distinct.contains(norm) {
                distinct.push(*norm);
            }
        }
        distinct
    }
}

/// Parses a whole number from 1 to `most`.
fn count(most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone + Send + Sync {
    move |text| match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => Err(format!("allowed: a whole number from 1 to {most}")),
    }
}

fn parse_norm(text: &str) -> Result<NormConfig, String> {
    let full = if text == "group" {
        format!("group:{DEFAULT_GROUPS}")
    } else {
        text.to_string()
    };
    let norm = full.parse().map_err(|_| {
        "allowed: none, batch, layer, group, group:N, instance, rms, weight".to_string()
    })?;
    if let NormConfig::Group { num_groups, .. } = norm {
        let outputs = &CHANNELS[1..];
        let fits = |groups: &usize| outputs.iter().all(|channels| channels % groups == 0);
        if !fits(&num_groups) {
            let most = outputs.iter().copied().max().unwrap_or(1);
            let allowed: Vec<_> = (1..=most)
                .filter(fits)
                .map(|groups| groups.to_string())
                .collect();
            return Err(format!(
                "the layers have {outputs:?} channels, which N must divide; allowed for N: {}",
                allowed.join(", ")
            ));
        }
    }
    Ok(norm)
}

fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0. && f64::is_finite(rate) => Ok(rate),
        _ => Err("allowed: a finite number above 0, such as 0.1".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, String> {
        Options::try_parse_from([&["compare"], arguments].concat())
            .map_err(|error| error.to_string())
    }

    fn names(options: &Options) -> Vec<String> {
        options
            .distinct_norms()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn defaults_compare_every_kind() {
        let options = parse(&[]).unwrap();
        assert_eq!(
            names(&options),
            [
                "none", "batch", "layer", "group:8", "instance", "rms", "weight"
            ]
        );
        let Settings {
            epochs,
            batch_size,
            lr,
            seeds,
        } = options.settings();
        assert_eq!((epochs, batch_size, lr, seeds), (10, 64, 0.3, 5));
    }

    #[test]
    fn kinds_are_separated_or_repeated_and_counted_once() {
        let options =
            parse(&["--norm", "rms,group", "--norm", "group:8", "--norm=group:2"]).unwrap();
        assert_eq!(names(&options), ["rms", "group:8", "group:2"]);
    }

    #[test]
    fn quick_gives_way_to_what_is_asked_for() {
        let settings = parse(&["--quick", "--epochs", "7"]).unwrap().settings();
        assert_eq!((settings.epochs, settings.seeds), (7, 1));
    }

    #[test]
    fn a_bad_option_is_told_what_is_allowed() {
        for (option, value, want) in [
            (
                "--norm",
                "bogus",
                "allowed: none, batch, layer, group, group:N, instance, rms, weight",
            ),
            ("--norm", "none,", "allowed: none"),
            ("--norm", "group:0", "allowed: none"),
            ("--norm", "group:3", "allowed for N: 1, 2, 4, 8, 16"),
            ("--lr", "0", "a finite number above 0"),
            ("--lr", "-0.1", "a finite number above 0"),
            ("--lr", "NaN", "a finite number above 0"),
            ("--lr", "inf", "a finite number above 0"),
            ("--lr", "fast", "a finite number above 0"),
            ("--batch-size", "0", "a whole number from 1 to 1297"),
            ("--batch-size", "1298", "a whole number from 1 to 1297"),
            ("--device", "tpu", "allowed: cpu, cuda"),
            ("--epochs", "0", "a whole number from 1 to 1000"),
            ("--seeds", "-1", "a whole number from 1 to 1000"),
            ("--seeds", "two", "a whole number from 1 to 1000"),
        ] {
            let error = parse(&[option, value]).unwrap_err();
            assert!(
                error.contains(option) && error.contains(want),
                "{option}={value}: {error}"
            );
        }
    }
}
