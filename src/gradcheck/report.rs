//! What a gradient check found.
use candle_core::{Error, Result};
use std::fmt;

/// Which part of the output a gradient belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
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
pub struct Comparison {
    /// Which input.
    pub input: usize,
    /// Which element of it, by its index along each axis.
    pub element: Vec<usize>,
    /// Which part of the output.
    pub direction: Direction,
    /// What `backward` gives; `None` where it has no gradient for this input, which counts as zero.
    pub analytic: Option<f64>,
    /// What central differences give.
    pub numeric: f64,
}

impl Comparison {
    /// The difference in units of the tolerance: the two agree up to 1. Infinite where either value is not finite.
    pub fn error(&self, atol: f64, rtol: f64) -> f64 {
        let difference = (self.analytic.unwrap_or(0.0) - self.numeric).abs();
        let error = difference / (atol + rtol * self.numeric.abs());
        match difference {
            0.0 => 0.0,
            d if d.is_finite() => error,
            _ => f64::INFINITY,
        }
    }
}

/// An input for which `backward` has no gradient at all.
#[derive(Debug, Clone, PartialEq)]
pub struct Unreached {
    /// Which input.
    pub input: usize,
    /// The largest derivative that central differences found for it; zero where the function does not depend on it, which
    /// is no fault.
    pub numeric: f64,
}

/// What [`GradCheck::check`](super::GradCheck::check) found.
///
/// Its text names the worst disagreement: the input and its element, the part of the output, both values, and the error
/// in units of the tolerance.
#[derive(Debug, Clone, PartialEq)]
#[must_use = "a report is a verdict only through `passed` or `into_result`"]
pub struct Report {
    /// How many derivatives were compared.
    pub compared: usize,
    /// How many of them disagree.
    pub failed: usize,
    /// The comparison with the largest error, whether it failed or not; `None` where nothing was compared.
    pub worst: Option<Comparison>,
    /// The inputs that no gradient reached.
    pub unreached: Vec<Unreached>,
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

    pub(super) fn compare(&mut self, comparison: Comparison) {
        let error = comparison.error(self.atol, self.rtol);
        self.compared += 1;
        self.failed += usize::from(error > 1.0);
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
