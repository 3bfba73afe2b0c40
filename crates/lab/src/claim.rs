//! A claim: its text, its experiment, and the rule for its verdict.

use candle_core::Result;

use crate::lab::{Lab, Measure, median};

/// One row of the table.
pub(crate) struct Claim {
    pub(crate) id: u32,
    /// The topic: what its section and its figure are called.
    pub(crate) title: &'static str,
    /// Raised when the experiment changes, so that what an older one measured is not taken for it.
    pub(crate) version: u32,
    pub(crate) text: &'static str,
    pub(crate) varied: &'static str,
    pub(crate) fixed: &'static str,
    /// The rule of `judge` in words.
    pub(crate) rule: &'static str,
    pub(crate) plot: Plot,
    /// How many runs it has, for the bar: with five seeds and all rates, and quick.
    pub(crate) runs: [u64; 2],
    pub(crate) run: fn(&Lab) -> Result<Vec<Measure>>,
    pub(crate) judge: fn(&Data) -> Judgement,
}

/// The part of the measurements that is drawn.
pub(crate) struct Plot {
    pub(crate) metric: &'static str,
    pub(crate) y: &'static str,
    /// The axis that is varied; without, variants are drawn one below the other.
    pub(crate) x: Option<&'static str>,
    pub(crate) log_x: bool,
    pub(crate) log_y: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Confirmed,
    NotConfirmed,
    Depends,
}

/// A verdict, what it depends on if it does, and the figure that it rests on.
pub(crate) struct Judgement {
    pub(crate) verdict: Verdict,
    /// In words, where neither all nor none of the parts hold.
    between: String,
    pub(crate) figure: String,
}

impl Judgement {
    /// Confirmed if all of `parts` hold, not if none does, else it depends on `on`.
    pub(crate) fn of(parts: &[bool], on: &'static str, figure: String) -> Self {
        let held = parts.iter().filter(|part| **part).count();
        let verdict = match held {
            0 => Verdict::NotConfirmed,
            n if n == parts.len() => Verdict::Confirmed,
            _ => Verdict::Depends,
        };
        Self {
            verdict,
            between: format!("depends on {on}"),
            figure,
        }
    }

    /// The same where each part stands for one value of what is varied, `labels`: where it depends,
    /// it says on which it holds.
    pub(crate) fn by(
        on: &'static str,
        labels: &[impl ToString],
        parts: &[bool],
        figure: String,
    ) -> Self {
        Self {
            between: format!("depends on {on} ({})", named(labels, parts)),
            ..Self::of(parts, on, figure)
        }
    }

    /// The same where the claim has `parts` that stand by themselves, each a statement that its
    /// label makes.
    pub(crate) fn parts<const N: usize>(
        labels: [&'static str; N],
        parts: [bool; N],
        figure: String,
    ) -> Self {
        Self {
            between: format!("confirmed in part ({})", named(&labels, &parts)),
            ..Self::of(&parts, "", figure)
        }
    }

    pub(crate) fn words(&self) -> String {
        match self.verdict {
            Verdict::Confirmed => "confirmed".to_string(),
            Verdict::NotConfirmed => "not confirmed".to_string(),
            Verdict::Depends => self.between.clone(),
        }
    }
}

/// Which of the parts hold, and which do not.
fn named(labels: &[impl ToString], parts: &[bool]) -> String {
    let named = |wanted: bool| {
        let pairs = labels.iter().zip(parts);
        let names = pairs.filter(|(_, part)| **part == wanted);
        names
            .map(|(l, _)| l.to_string())
            .collect::<Vec<_>>()
            .join(", ")
    };
    format!("yes: {}; no: {}", named(true), named(false))
}

/// The measurements of an experiment.
pub(crate) struct Data(pub(crate) Vec<Measure>);

impl Data {
    /// The median of `metric` of `variant` at `x`; not a number where it was not measured, so that
    /// no rule holds by accident.
    pub(crate) fn at(&self, metric: &str, variant: &str, x: f64) -> f64 {
        let mine = |m: &&Measure| m.metric == metric && m.variant == variant && m.x == x;
        self.0.iter().find(mine).map_or(f64::NAN, Measure::median)
    }

    pub(crate) fn median(&self, metric: &str, variant: &str) -> f64 {
        let mine = |m: &&Measure| m.metric == metric && m.variant == variant;
        self.0.iter().find(mine).map_or(f64::NAN, Measure::median)
    }

    /// Measurements of `metric` of `variant`, for each seed; none where it was not measured.
    pub(crate) fn values(&self, metric: &str, variant: &str) -> &[f64] {
        let mine = |m: &&Measure| m.metric == metric && m.variant == variant;
        self.0.iter().find(mine).map_or(&[], |m| &m.values)
    }

    /// The same at one place.
    pub(crate) fn values_at(&self, metric: &str, variant: &str, x: f64) -> &[f64] {
        let mine = |m: &&Measure| m.metric == metric && m.variant == variant && m.x == x;
        self.0.iter().find(mine).map_or(&[], |m| &m.values)
    }

    /// Differences of `metric` between `variant` and `other`, for each seed: both start alike and
    /// see the same batches.
    pub(crate) fn gains(&self, metric: &str, variant: &str, other: &str) -> Vec<f64> {
        differences(self.values(metric, variant), self.values(metric, other))
    }

    /// The same of a variant at one place and another at another.
    pub(crate) fn gains_at(
        &self,
        metric: &str,
        (variant, x): (&str, f64),
        (other, at): (&str, f64),
    ) -> Vec<f64> {
        differences(
            self.values_at(metric, variant, x),
            self.values_at(metric, other, at),
        )
    }

    /// The places of `metric` of `variant`, in order, with their medians.
    pub(crate) fn along(&self, metric: &str, variant: &str) -> Vec<(f64, f64)> {
        let mine = self
            .0
            .iter()
            .filter(|m| m.metric == metric && m.variant == variant);
        mine.map(|m| (m.x, m.median())).collect()
    }
}

impl Data {
    /// The quotients of what was measured of two variants at one place, for each seed.
    pub(crate) fn ratios_at(&self, metric: &str, variant: &str, other: &str, x: f64) -> Vec<f64> {
        let pairs = self.values_at(metric, variant, x).iter();
        let pairs = pairs.zip(self.values_at(metric, other, x));
        pairs.map(|(a, b)| a / b).collect()
    }
}

fn differences(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// Whether `holds` in at least four of five seeds; a difference that is not a number does not.
pub(crate) fn mostly(differences: &[f64], holds: impl Fn(f64) -> bool) -> bool {
    let held = differences.iter().filter(|d| holds(**d)).count();
    !differences.is_empty() && 5 * held >= 4 * differences.len()
}

/// A difference between two variants over the seeds: its median in `unit`, and in how many it has
/// the sign of the median.
pub(crate) fn spread(differences: &[f64], unit: &str) -> String {
    let middle = median(differences);
    let alike = differences.iter().filter(|d| **d * middle > 0.).count();
    let sign = if middle > 0. { "+" } else { "" };
    let unit = if unit.is_empty() { "" } else { " " }.to_string() + unit;
    format!(
        "{sign}{}{unit} ({alike} of {} seeds)",
        show(middle),
        differences.len()
    )
}

/// Three significant digits.
pub(crate) fn show(value: f64) -> String {
    if value.is_nan() {
        return "—".to_string();
    }
    if value.is_infinite() {
        return if value > 0. { "∞" } else { "−∞" }.to_string();
    }
    let size = value.abs();
    let text = if size == 0. {
        "0".to_string()
    } else if !(1e-3..1e6).contains(&size) {
        format!("{value:.1e}")
    } else {
        let digits = (2 - size.log10().floor() as i32).max(0) as usize;
        format!("{value:.digits$}")
    };
    text.replace('-', "−")
}

/// The same of steps to a goal, with a word for what was never reached.
pub(crate) fn steps(value: f64) -> String {
    match value.is_infinite() {
        true => "never".to_string(),
        false => show(value),
    }
}

/// A place on an axis: 32 and 0.5, where a measurement would be 32.0 and 0.500.
pub(crate) fn place(value: f64) -> String {
    let shown = show(value);
    match shown.split_once('.') {
        Some((_, digits)) if digits.bytes().all(|b| b.is_ascii_digit()) => shown
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_string(),
        _ => shown.replace(".0e", "e"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_follows_from_the_parts_of_its_rule() {
        let words = |parts: &[bool]| Judgement::of(parts, "the size", String::new()).words();
        assert_eq!(words(&[true, true]), "confirmed");
        assert_eq!(words(&[true, false]), "depends on the size");
        assert_eq!(words(&[false]), "not confirmed");
        let by = |parts: &[bool]| Judgement::by("the size", &[1, 8, 64], parts, String::new());
        assert_eq!(
            by(&[true, false, true]).words(),
            "depends on the size (yes: 1, 64; no: 8)"
        );
        assert_eq!(by(&[true; 3]).words(), "confirmed");
        let labels = ["it trains", "it is faster", "it is smaller"];
        let parts = |parts| Judgement::parts(labels, parts, String::new()).words();
        assert_eq!(
            parts([true, false, true]),
            "confirmed in part (yes: it trains, it is smaller; no: it is faster)"
        );
        assert_eq!(parts([false; 3]), "not confirmed");
    }

    #[test]
    fn figures_have_three_digits() {
        let shown = [0., 0.01234, -1.5, 123.4, 45_678., 1.23e8, f64::INFINITY].map(show);
        assert_eq!(
            shown,
            ["0", "0.0123", "−1.50", "123", "45678", "1.2e8", "∞"]
        );
        assert_eq!([40., f64::INFINITY].map(steps), ["40.0", "never"]);
        let places = [0.5, 32., 100., 0., 1e-4, 2.5e6, -10.].map(place);
        assert_eq!(places, ["0.5", "32", "100", "0", "1e−4", "2.5e6", "−10"]);
    }

    #[test]
    fn arms_are_compared_seed_by_seed() {
        let measure = |variant: &str, values: [f64; 5]| Measure {
            metric: "steps".to_string(),
            variant: variant.to_string(),
            x: 0.,
            values: values.to_vec(),
            rate: None,
        };
        let never = f64::INFINITY;
        let data = Data(vec![
            measure("a", [1., 2., 3., 4., never]),
            measure("b", [2., 4., 4., 8., never]),
        ]);
        let gains = data.gains("steps", "b", "a");
        assert_eq!(gains[..4], [1., 2., 1., 4.]);
        assert!(mostly(&gains, |d| d > 0.) && !mostly(&gains, |d| d > 1.));
        assert!(!mostly(&data.gains("steps", "b", "c"), |_| true));
        assert_eq!(spread(&gains, ""), "+2.00 (4 of 5 seeds)");
        assert_eq!(
            spread(&[-1., -2., 3.], "points"),
            "−1.00 points (2 of 3 seeds)"
        );
    }

    #[test]
    fn what_was_not_measured_holds_no_rule() {
        let data = Data(vec![]);
        assert!(data.median("a", "b").is_nan() && data.at("a", "b", 0.).is_nan());
    }
}
