//! Checks a gradient against central differences.
//!
//! Candle builds a gradient from the backward rules of the operations in a graph. A rule that is wrong, or absent, is
//! silent: training goes on, to a worse place. [`gradcheck`] compares what `backward` returns with what the function
//! itself says when each input element is moved a little to both sides:
//!
//! ```text
//! dy_j/dx_i  ≈  (y_j(x + ε·e_i) − y_j(x − ε·e_i)) / 2ε
//! ```
//!
//! Where:
//! - `x` are the inputs, `y` the output of the function, `e_i` the i-th unit vector;
//! - `ε` is [`GradCheck::eps`]; the divisor is the distance between the two points that floating point really reached.
//!
//! The analytic value comes from `backward` of `(y · c).sum_all()`, for cotangents `c` that are either every unit vector
//! (the full Jacobian) or a few random vectors ([`GradCheck::projections`]). A loss of `y.sum_all()` is never used: the
//! gradient of a normalization's sum is zero, and a backward that is wrong in any way that sums to zero would pass.
//!
//! An analytic value `a` agrees with the numeric value `n` when `|a − n| ≤ atol + rtol · |n|`, and NaN or infinity agree
//! with nothing. The inputs must be f64: in f32 a difference has about three correct digits left.
//!
//! # Example
//! ```
//! use candle_core::{Device, Result, Tensor};
//! use candle_norm::gradcheck::{GradCheck, gradcheck};
//!
//! # fn main() -> Result<()> {
//! let x = Tensor::new(&[[0.5f64, -1.0, 2.0], [0.1, 0.7, -0.3]], &Device::Cpu)?;
//! let w = Tensor::new(&[1.0f64, 0.5, -2.0], &Device::Cpu)?;
//!
//! // Every input is checked, the weight included.
//! gradcheck(|v| v[0].sqr()?.broadcast_mul(&v[1]), &[x.clone(), w.clone()])?;
//!
//! // A detach cuts the graph: the value still depends on the weight, and no gradient says so.
//! let cut = gradcheck(|v| v[0].sqr()?.broadcast_mul(&v[1].detach()), &[x.clone(), w.clone()]);
//! assert!(cut.unwrap_err().to_string().contains("no gradient reached input 1"));
//!
//! // A large function is checked along random directions of its output.
//! let check = GradCheck { projections: Some(4), ..Default::default() };
//! let report = check.check(|v| v[0].broadcast_mul(&v[1])?.tanh(), &[x, w])?;
//! assert!(report.passed(), "{report}");
//! # Ok(()) }
//! ```
mod leaf;
mod report;
mod run;

pub use report::{Comparison, Direction, Report, Unreached};

use candle_core::{Result, Tensor, bail};
use leaf::Leaf;
use rand::{SeedableRng, rngs::StdRng};
use run::{Cotangent, Run, repeat, values_of};

/// Checks the gradient of `f` at `inputs` with the default settings, over the full Jacobian.
///
/// # Errors
/// Where an analytic and a numeric gradient disagree, with the text of the [`Report`]; and where [`GradCheck::check`]
/// fails.
pub fn gradcheck<F>(f: F, inputs: &[Tensor]) -> Result<()>
where
    F: Fn(&[Tensor]) -> Result<Tensor>,
{
    GradCheck::default().check(f, inputs)?.into_result()
}

/// Settings of a gradient check.
///
/// The defaults are tighter than those of PyTorch's `gradcheck` (`atol` 1e-5, `rtol` 1e-3), which leave room for single
/// precision: with `eps` 1e-6 a central difference in f64 is off by about 1e-10 times the size of the output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradCheck {
    /// How far an input element is moved to either side. Default 1e-6.
    pub eps: f64,
    /// Absolute tolerance. Default 1e-7.
    pub atol: f64,
    /// Tolerance relative to the numeric gradient. Default 1e-5.
    pub rtol: f64,
    /// `None` (the default) compares the full Jacobian, with one backward pass for each output element. `Some(k)` compares
    /// `k` random projections of the output, with `k` backward passes. Either way the function is evaluated twice for
    /// each input element.
    pub projections: Option<usize>,
    /// Seed of the random cotangents. Default 0.
    pub seed: u64,
}

impl Default for GradCheck {
    fn default() -> Self {
        Self {
            eps: 1e-6,
            atol: 1e-7,
            rtol: 1e-5,
            projections: None,
            seed: 0,
        }
    }
}

impl GradCheck {
    /// Compares the gradient of `f` at `inputs` with central differences.
    ///
    /// `f` gets fresh variables with the values and the memory layout of `inputs`: a transposed or sliced input arrives
    /// transposed or sliced, since an operation may take another path for it. A broadcast input arrives as its contiguous
    /// copy, since its elements cannot be moved one by one. Only what `f` takes from its argument is checked, not
    /// tensors that it captures.
    ///
    /// A report is a verdict only through [`Report::passed`] or [`Report::into_result`].
    ///
    /// # Errors
    /// - A setting is not usable: `eps` not positive and finite, a tolerance negative or not finite, zero projections.
    /// - There is no input, an input or the output is not f64, or one of their elements is NaN or infinite.
    /// - `f` or the backward pass fails, or gives other bits (or another shape) when it is run again.
    /// - An input element is so large that `eps` does not move it.
    pub fn check<F>(&self, f: F, inputs: &[Tensor]) -> Result<Report>
    where
        F: Fn(&[Tensor]) -> Result<Tensor>,
    {
        self.validate()?;
        if inputs.is_empty() {
            bail!("gradcheck: expected at least one input, got none")
        }
        let leaves = (inputs.iter().enumerate())
            .map(|(index, input)| Leaf::new(index, input))
            .collect::<Result<Vec<_>>>()?;

        let run = Run::new(&f, &leaves)?;
        let cotangents = self.cotangents(run.len());
        let analytic = (cotangents.iter())
            .map(|cotangent| run.gradients(cotangent))
            .collect::<Result<Vec<_>>>()?;
        repeat(&f, &leaves, &run, self.seed)?;

        let mut report = Report::new(self.atol, self.rtol);
        let mut point: Vec<Tensor> = (leaves.iter())
            .map(|leaf| leaf.tensor(leaf.values()))
            .collect::<Result<_>>()?;
        for (input, leaf) in leaves.iter().enumerate() {
            if analytic.iter().all(|gradients| gradients[input].is_none()) {
                report.unreached(input);
            }
            for element in 0..leaf.values().len() {
                let slope = self.slope(&f, &leaves, &mut point, (input, element), run.dims())?;
                for (row, cotangent) in cotangents.iter().enumerate() {
                    report.compare(Comparison {
                        input,
                        element: multi_index(element, leaf.dims()),
                        direction: cotangent.direction(row, run.dims()),
                        analytic: analytic[row][input].as_ref().map(|g| g[element]),
                        numeric: cotangent.project(&slope),
                    });
                }
            }
        }
        Ok(report)
    }

    /// The derivative of every output element by one input element. `point` holds the inputs, and does so again
    /// afterwards.
    fn slope<F>(
        &self,
        f: &F,
        leaves: &[Leaf],
        point: &mut [Tensor],
        (input, element): (usize, usize),
        dims: &[usize],
    ) -> Result<Vec<f64>>
    where
        F: Fn(&[Tensor]) -> Result<Tensor>,
    {
        let leaf = &leaves[input];
        let here = leaf.values()[element];
        let (right, left) = (here + self.eps, here - self.eps);
        if right <= here || left >= here {
            bail!(
                "gradcheck: eps {} does not move element {:?} of input {input}, which is {here}; choose a larger eps or a smaller input",
                self.eps,
                multi_index(element, leaf.dims()),
            )
        }
        let mut values = leaf.values().to_vec();
        let mut side = |to: f64| {
            values[element] = to;
            point[input] = leaf.tensor(&values)?;
            f(point)
        };
        let (plus, minus) = (side(right)?, side(left)?);
        point[input] = leaf.tensor(leaf.values())?;
        Ok((values_of(&plus, dims)?.iter())
            .zip(&values_of(&minus, dims)?)
            .map(|(plus, minus)| (plus - minus) / (right - left))
            .collect())
    }

    fn validate(&self) -> Result<()> {
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            bail!(
                "gradcheck: expected a positive finite eps, got {}",
                self.eps
            )
        }
        for (name, tolerance) in [("atol", self.atol), ("rtol", self.rtol)] {
            if !(tolerance >= 0.0 && tolerance.is_finite()) {
                bail!("gradcheck: expected a finite {name} of at least 0, got {tolerance}")
            }
        }
        if self.projections == Some(0) {
            bail!(
                "gradcheck: zero projections compare nothing; expected Some(k) with k of at least 1, or None for the full Jacobian"
            )
        }
        Ok(())
    }

    /// Never empty: an empty output still goes through one backward pass.
    fn cotangents(&self, len: usize) -> Vec<Cotangent> {
        match self.projections {
            None if len > 0 => (0..len).map(Cotangent::Unit).collect(),
            k => {
                let mut rng = StdRng::seed_from_u64(self.seed);
                (0..k.unwrap_or(1))
                    .map(|_| Cotangent::random(len, &mut rng))
                    .collect()
            }
        }
    }
}

fn multi_index(mut flat: usize, dims: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = (dims.iter().rev())
        .map(|&len| {
            let at = flat % len;
            flat /= len;
            at
        })
        .collect();
    index.reverse();
    index
}
