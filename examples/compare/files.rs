//! The files of the report, and its numbers as CSV.

use crate::model::LAYERS;
use crate::summary::{Summary, Variant};
use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Where the report goes.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) html: PathBuf,
    pub(crate) summary: PathBuf,
    pub(crate) steps: PathBuf,
    /// Curves of accuracy, as a picture of their own.
    pub(crate) figure: PathBuf,
}

impl Files {
    /// Makes the directory and sees that all files can be written: better to fail before the
    /// training than after it.
    pub(crate) fn prepare(directory: &Path) -> Result<Self, String> {
        let files = Self {
            html: directory.join("report.html"),
            summary: directory.join("summary.csv"),
            steps: directory.join("steps.csv"),
            figure: directory.join("accuracy.svg"),
        };
        let cannot = |path: &Path, error: io::Error| {
            format!("--out: cannot write to {}: {error}", path.display())
        };
        fs::create_dir_all(directory).map_err(|error| cannot(directory, error))?;
        for path in [&files.html, &files.summary, &files.steps, &files.figure] {
            OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .map_err(|error| cannot(path, error))?;
        }
        Ok(files)
    }
}

/// One row a kind.
pub(crate) fn write_summary(path: &Path, rows: &[Summary]) -> Result<(), Box<dyn Error>> {
    let mut csv = csv::Writer::from_path(path)?;
    csv.write_record([
        "norm",
        "seeds",
        "seeds_that_reached_95_percent",
        "seeds_that_diverged",
        "steps_to_95_percent_median",
        "steps_to_95_percent_min",
        "steps_to_95_percent_max",
        "test_accuracy_median",
        "test_accuracy_min",
        "test_accuracy_max",
        "largest_gradient_norm",
        "milliseconds_per_step",
    ])?;
    for row in rows {
        let counts = [row.seeds, row.reached, row.diverged].map(|count| count.to_string());
        let steps = [row.steps.median, row.steps.min, row.steps.max]
            .map(|steps| number(steps.is_finite().then_some(steps)));
        let accuracy = [row.accuracy.median, row.accuracy.min, row.accuracy.max]
            .map(|share| format!("{share:.4}"));
        let rest = [
            number(row.largest_gradient),
            format!("{:.3}", row.milliseconds),
        ];
        let cells = counts.iter().chain(&steps).chain(&accuracy).chain(&rest);
        csv.write_record([&row.norm].into_iter().chain(cells))?;
    }
    Ok(csv.flush()?)
}

/// One row a step. The accuracy is empty where it was not measured.
pub(crate) fn write_steps(path: &Path, variants: &[Variant]) -> Result<(), Box<dyn Error>> {
    let mut csv = csv::Writer::from_path(path)?;
    let layers = LAYERS.map(|layer| format!("gradient_norm_{layer}"));
    let head = [
        "norm",
        "seed",
        "step",
        "train_loss",
        "test_accuracy",
        "milliseconds",
        "gradient_norm",
    ];
    csv.write_record(head.into_iter().chain(layers.iter().map(String::as_str)))?;
    for (variant, run) in variants
        .iter()
        .flat_map(|variant| variant.runs.iter().map(move |run| (variant, run)))
    {
        for step in &run.steps {
            let first = [
                variant.norm.clone(),
                run.seed.to_string(),
                step.step.to_string(),
                step.loss.to_string(),
            ];
            let accuracy = step
                .accuracy
                .map_or(String::new(), |share| format!("{share:.4}"));
            let second = [
                accuracy,
                format!("{:.3}", step.milliseconds),
                step.gradient().to_string(),
            ];
            let layers = step.layer_gradients.map(|norm| norm.to_string());
            csv.write_record(first.iter().chain(&second).chain(&layers))?;
        }
    }
    Ok(csv.flush()?)
}

fn number(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}
