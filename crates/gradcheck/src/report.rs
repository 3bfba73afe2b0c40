//! Findings of a gradient check.
use candle_core::{Error, Result};
use std::fmt;

/// Part of the output that a gradient belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Direction {
    /// One element of the output, by its index along each axis.
    Element(Vec<usize>),
    /// A random combination of all output elements, by its number.
    Projection(usize),
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Element(index) => write!(f, "output element {index:?}"),
            Self::Projection(number) => write!(f, "projection {number} of the output"),
        }
    }
}

/// One derivative, as `backward` gives it and as central differences do.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Comparison {
    /// Index of the input.
    pub input: usize,
    /// Index of the element along each axis.
    pub element: Vec<usize>,
    /// Part of the output.
    pub direction: Direction,
    /// Value from `backward`; `None` where it has no gradient for this input, which counts as zero.
    pub analytic: Option<f64>,
    /// Value from central differences.
    pub numeric: f64,
    /// The slope to the left alone, from the lower point to the input.
    pub left: f64,
    /// The slope to the right alone, from the input to the upper point.
    pub right: f64,
}

impl Comparison {
    /// The difference in units of the tolerance: the two agree up to 1. Infinite where either value
    /// is not finite.
    pub fn error(&self, atol: f64, rtol: f64) -> f64 {
        let difference = (self.analytic.unwrap_or(0.0) - self.numeric).abs();
        let error = difference / (atol + rtol * self.numeric.abs());
        match difference {
            0.0 => 0.0,
            d if d.is_finite() => error,
            _ => f64::INFINITY,
        }
    }

    /// Whether the two sides have slopes of their own, and `backward` gives one of them or
    /// something between, as candle does where a function
    /// has a kink. A smooth function that bends may look the same: [`stays`](Self::stays) tells.
    pub(super) fn may_be_kink(&self, atol: f64, rtol: f64) -> bool {
        let (low, high) = (self.left.min(self.right), self.left.max(self.right));
        let tolerance = atol + rtol * low.abs().max(high.abs());
        let between = |a| (low - tolerance..=high + tolerance).contains(&a);
        let jump = high - low;
        jump.is_finite() && jump > tolerance && self.analytic.is_some_and(between)
    }

    /// Whether `closer`, the same with a step that is many times as small, shows a kink too: the
    /// slopes are still as far apart, or the kink is now outside and `backward` is right. In a
    /// smooth function the slopes have come together, and a wrong backward is as wrong as before.
    pub(super) fn stays(&self, closer: &Self, atol: f64, rtol: f64) -> bool {
        let jump = |c: &Self| (c.right - c.left).abs();
        jump(closer) > jump(self) / 2.0 || closer.error(atol, rtol) <= 1.0
    }

    /// Whether the function has a value on one side at most.
    fn at_edge(&self) -> bool {
        !(self.left.is_finite() && self.right.is_finite())
    }
}

/// Cause of a disagreement other than a wrong backward, told by its signs.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Suspicion {
    /// So many disagreements lie where the slope to the left is not that to the right, and
    /// `backward` is between the two: a kink, or a jump.
    Kink(usize),
    /// So many disagreements lie where the function is not finite a step away.
    Edge(usize),
    /// Every output is a number of `f32`, also where an input was moved by a step that `f32` does
    /// not hold.
    SinglePrecision,
    /// The worst disagreement is no larger than what rounding does to the difference of values as
    /// large as these: the error of a derivative by it.
    Rounding(f64),
}

impl fmt::Display for Suspicion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kink(count) => write!(
                f,
                "a kink? at {count} of them the slopes to the left and to the right differ, as \
                 those of relu at 0, and analytic is one of the two or between: move the point \
                 away, or choose a smaller eps if the function only bends sharply there"
            ),
            Self::Edge(count) => write!(
                f,
                "the edge of where the function is defined? at {count} of them it is not finite a \
                step away, as sqrt at 0: move the point inside, by more than eps"
            ),
            Self::SinglePrecision => write!(
                f,
                "f32 inside? every output is a number of f32, which is too coarse for differences: \
                compute in f64 throughout"
            ),
            Self::Rounding(noise) => write!(
                f,
                "rounding? outputs as large as these have differences with an error of {noise:.1e} \
                at this eps: choose a larger eps, or divide the output by its size"
            ),
        }
    }
}

/// An input for which `backward` has no gradient at all.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Unreached {
    /// Index of the input.
    pub input: usize,
    /// The largest derivative that central differences found for it; zero where the function does
    /// not depend on it, which is no fault.
    pub numeric: f64,
}

/// Properties that the values of the function at the moved inputs share.
pub(super) struct Outputs {
    /// All are numbers of `f32`.
    single: bool,
    /// One at least is no whole number.
    fraction: bool,
    largest: f64,
}

impl Outputs {
    pub(super) fn new() -> Self {
        Self {
            single: true,
            fraction: false,
            largest: 0.0,
        }
    }

    pub(super) fn see(&mut self, values: &[f64]) {
        for value in values.iter().filter(|v| v.is_finite()) {
            self.single &= f64::from(*value as f32) == *value;
            self.fraction |= value.fract() != 0.0;
            self.largest = self.largest.max(value.abs());
        }
    }
}

/// Findings of [`GradCheck::check`](super::GradCheck::check).
///
/// Its text names the worst disagreement: the input and its element, the part of the output, both
/// values, and the error in units of the tolerance; then other possible causes than the backward.
#[derive(Debug, Clone, PartialEq)]
#[must_use = "a report is a verdict only through `passed` or `into_result`"]
#[non_exhaustive]
pub struct Report {
    /// Number of derivatives compared.
    pub compared: usize,
    /// Number of those that disagree.
    pub failed: usize,
    /// The comparison with the largest error, whether it failed or not; `None` where nothing was
    /// compared.
    pub worst: Option<Comparison>,
    /// The inputs that no gradient reached.
    pub unreached: Vec<Unreached>,
    /// Possible causes of the disagreements, if not the backward; empty where all agree.
    pub suspicions: Vec<Suspicion>,
    /// Absolute tolerance of the check.
    pub atol: f64,
    /// Relative tolerance of the check.
    pub rtol: f64,
}

impl Report {
    pub(super) fn new(atol: f64, rtol: f64) -> Self {
        Self {
            compared: 0,
            failed: 0,
            worst: None,
            unreached: vec![],
            suspicions: vec![],
            atol,
            rtol,
        }
    }

    pub(super) fn unreached(&mut self, input: usize) {
        self.unreached.push(Unreached {
            input,
            numeric: 0.0,
        });
    }

    /// Takes one comparison in; `kink` is whether it lies at one.
    pub(super) fn compare(&mut self, comparison: Comparison, kink: bool) {
        let error = comparison.error(self.atol, self.rtol);
        self.compared += 1;
        if error > 1.0 {
            self.failed += 1;
            if comparison.at_edge() {
                self.suspect(Suspicion::Edge(1));
            } else if kink {
                self.suspect(Suspicion::Kink(1));
            }
        }
        if let Some(unreached) = self.unreached.last_mut()
            && unreached.input == comparison.input
            && (comparison.numeric.is_nan() || comparison.numeric.abs() > unreached.numeric.abs())
        {
            unreached.numeric = comparison.numeric;
        }
        if self.worst.is_none() || error > self.worst_error() {
            self.worst = Some(comparison);
        }
    }

    /// Counts one more of a suspicion.
    fn suspect(&mut self, suspicion: Suspicion) {
        let known = self
            .suspicions
            .iter_mut()
            .find_map(|known| match (known, suspicion) {
                (Suspicion::Kink(count), Suspicion::Kink(_))
                | (Suspicion::Edge(count), Suspicion::Edge(_)) => Some(count),
                _ => None,
            });
        match known {
            Some(count) => *count += 1,
            None => self.suspicions.push(suspicion),
        }
    }

    /// Causes that all outputs together point to, after the last comparison.
    pub(super) fn judge(&mut self, outputs: &Outputs, eps: f64) {
        let Some(worst) = self.worst.as_ref().filter(|_| self.failed > 0) else {
            return;
        };
        let difference = (worst.analytic.unwrap_or(0.0) - worst.numeric).abs();
        // A function of many terms rounds a few dozen times.
        let noise = 32.0 * f64::EPSILON * outputs.largest / eps;
        let coarse = match outputs.single && outputs.fraction {
            true => Some(Suspicion::SinglePrecision),
            false => (difference <= noise).then_some(Suspicion::Rounding(noise)),
        };
        if let Some(coarse) = coarse {
            // Slopes to the left and to the right differ by rounding then.
            self.suspicions.retain(|s| !matches!(s, Suspicion::Kink(_)));
            self.suspicions.push(coarse);
        }
    }

    /// Whether every derivative agrees within the tolerance.
    pub fn passed(&self) -> bool {
        self.failed == 0
    }

    /// The largest error in units of the tolerance; 0 where nothing was compared.
    pub fn worst_error(&self) -> f64 {
        (self.worst.as_ref()).map_or(0.0, |worst| worst.error(self.atol, self.rtol))
    }

    /// `Ok` where every derivative agrees.
    ///
    /// # Errors
    /// The text of this report, where one disagrees.
    pub fn into_result(self) -> Result<()> {
        if self.passed() {
            return Ok(());
        }
        Err(Error::msg(self))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.passed() {
            true => write!(f, "gradcheck passed: {} derivatives agree", self.compared)?,
            false => write!(
                f,
                "gradcheck failed: {} of {} derivatives disagree",
                self.failed, self.compared
            )?,
        }
        write!(f, " (atol {:e}, rtol {:e})", self.atol, self.rtol)?;
        if let Some(worst) = &self.worst {
            write!(
                f,
                "\nworst: input {} at {:?}, {}: analytic ",
                worst.input, worst.element, worst.direction
            )?;
            match worst.analytic {
                Some(analytic) => write!(f, "{analytic:e}")?,
                None => write!(f, "none")?,
            }
            write!(
                f,
                ", numeric {:e}, error {:.3e} times the tolerance",
                worst.numeric,
                self.worst_error()
            )?;
            let kinks = self
                .suspicions
                .iter()
                .any(|s| matches!(s, Suspicion::Kink(_)));
            if kinks && worst.may_be_kink(self.atol, self.rtol) {
                let Comparison { left, right, .. } = worst;
                write!(f, "; {left:e} to the left, {right:e} to the right")?;
            }
        }
        for suspicion in &self.suspicions {
            write!(f, "\n{suspicion}")?;
        }
        for Unreached { input, numeric } in &self.unreached {
            write!(
                f,
                "\nno gradient reached input {input}, finite differences say {numeric:e}"
            )?;
        }
        Ok(())
    }
}
