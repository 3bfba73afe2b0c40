//! Checks a gradient against central differences.
//!
//! Candle builds a gradient from the backward rules of the operations in a graph. A rule that is
//! wrong, or absent, is silent: training goes on, to a worse place. [`gradcheck`] compares what
//! `backward` returns with what the function itself says when each input element is moved a little
//! to both sides:
//!
//! ```text
//! dy_j/dx_i  ≈  (y_j(x + ε·e_i) − y_j(x − ε·e_i)) / 2ε
//! ```
//!
//! Where:
//! - `x` are the inputs, `y` the output of the function, `e_i` the i-th unit vector;
//! - `ε` is [`GradCheck::eps`]; the divisor is the distance between the two points that floating
//!   point really reached.
//!
//! The analytic value comes from `backward` of `(y · c).sum_all()`, for cotangents `c` that are
//! either every unit vector (the full Jacobian) or a few random vectors
//! ([`GradCheck::projections`]). A loss of `y.sum_all()` is never used: the gradient of a
//! normalization's sum is zero, and a backward that is wrong in any way that sums to zero would
//! pass.
//!
//! Choose a point where the function is smooth: at the kink of relu at 0 or of a maximum of equal
//! values there is no derivative, and the two
//! disagree. A report says where that is what it looks like ([`Suspicion`]).
//!
//! An analytic value `a` agrees with the numeric value `n` when `|a − n| ≤ atol + rtol · |n|`, and
//! NaN or infinity agree with nothing. The inputs must be f64: in f32 a difference has about three
//! correct digits left.
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
//!
//! # A layer, a model
//! Tensors that the function captures are not checked, so it builds the layer from its arguments; a
//! model of many parameters by `VarBuilder::from_tensors`:
//! ```
//! use candle_core::{DType, Device, Result, Tensor};
//! use candle_nn::{Module, VarBuilder};
//! use candle_norm::gradcheck::gradcheck;
//!
//! fn model(xs: &Tensor, vb: VarBuilder) -> Result<Tensor> {
//!     let linear = candle_nn::linear(3, 4, vb.pp("linear"))?;
//!     candle_norm::layer_norm(4, 1e-5, vb.pp("norm"))?.forward(&linear.forward(xs)?.relu()?)
//! }
//!
//! # fn main() -> Result<()> {
//! let names = ["linear.weight", "linear.bias", "norm.weight", "norm.bias"].map(str::to_string);
//! let values = |count: i64| Tensor::arange(0, count, &Device::Cpu)?.to_dtype(DType::F64)?.sin();
//! let (x, weight) = (values(15)?.reshape((5, 3))?, values(12)?.reshape((4, 3))?);
//! let inputs = [x, weight, values(4)?, (values(4)? + 1.)?, values(4)?];
//! let on_arguments = |v: &[Tensor]| {
//!     let named = names.iter().cloned().zip(v[1..].iter().cloned());
//!     model(&v[0], VarBuilder::from_tensors(named.collect(), DType::F64, &Device::Cpu))
//! };
//! gradcheck(on_arguments, &inputs)?;
//!
//! // relu has a kink at 0, where no gradient is right: the report says so, and what to do.
//! let at_kink = gradcheck(|v| v[0].relu(), &[Tensor::new(&[0f64, 1.], &Device::Cpu)?]);
//! assert!(at_kink.unwrap_err().to_string().contains("move the point away"));
//! # Ok(()) }
//! ```
mod leaf;
mod report;
mod run;

pub use report::{Comparison, Direction, Report, Suspicion, Unreached};

use candle_core::{Result, Tensor, bail};
use leaf::Leaf;
use rand::{SeedableRng, rngs::StdRng};
use report::Outputs;
use run::{Cotangent, Evaluation, repeat, values_of};

/// Checks the gradient of `f` at `inputs` with the default settings, over the full Jacobian.
///
/// # Errors
/// Where an analytic and a numeric gradient disagree, with the text of the [`Report`]; and where
/// [`GradCheck::check`] fails.
pub fn gradcheck<F>(f: F, inputs: &[Tensor]) -> Result<()>
where
    F: Fn(&[Tensor]) -> Result<Tensor>,
{
    GradCheck::default().check(f, inputs)?.into_result()
}

/// Settings of a gradient check.
///
/// The defaults are tighter than those of PyTorch's `gradcheck` (`atol` 1e-5, `rtol` 1e-3), which
/// leave room for single precision: with `eps` 1e-6 a central difference in f64 is off by about
/// 1e-10 times the size of the output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradCheck {
    /// Distance by which an input element is moved to either side. Default 1e-6.
    pub eps: f64,
    /// Absolute tolerance. Default 1e-7.
    pub atol: f64,
    /// Tolerance relative to the numeric gradient. Default 1e-5.
    pub rtol: f64,
    /// `None` (the default) compares the full Jacobian, with one backward pass for each output
    /// element. `Some(k)` compares `k` random projections of the output, with `k` backward passes.
    /// Either way the function is evaluated twice for each input element.
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
    /// `f` gets fresh variables with the values and the memory layout of `inputs`: a transposed or
    /// sliced input arrives transposed or sliced, since an operation may take another path for it.
    /// A broadcast input arrives as its contiguous copy, since its elements cannot be moved one by
    /// one. Only what `f` takes from its argument is checked, not tensors that it captures.
    ///
    /// A report is a verdict only through [`Report::passed`] or [`Report::into_result`].
    ///
    /// # Errors
    /// - A setting is not usable: `eps` not positive and finite, a tolerance negative or not
    ///   finite, zero projections.
    /// - There is no input, an input or the output is not f64, or one of their elements is NaN or
    ///   infinite.
    /// - `f` or the backward pass fails, or gives other bits (or another shape) when it is run
    ///   again.
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

        let run = Evaluation::new(&f, &leaves)?;
        let cotangents = self.cotangents(run.len());
        let analytic = (cotangents.iter())
            .map(|cotangent| run.gradients(cotangent))
            .collect::<Result<Vec<_>>>()?;
        repeat(&f, &leaves, &run, self.seed)?;

        let mut report = Report::new(self.atol, self.rtol);
        let mut outputs = Outputs::new();
        let mut point: Vec<Tensor> = (leaves.iter())
            .map(|leaf| leaf.tensor(leaf.values()))
            .collect::<Result<_>>()?;
        for (input, leaf) in leaves.iter().enumerate() {
            if analytic.iter().all(|gradients| gradients[input].is_none()) {
                report.unreached(input);
            }
            for element in 0..leaf.values().len() {
                let at = (input, element);
                let sides = self.sides(&f, &leaves, &mut point, (at, self.eps), run.dims())?;
                outputs.see(&sides.plus);
                outputs.see(&sides.minus);
                let slopes = sides.slopes(run.values());
                let mut closer = None;
                for (row, cotangent) in cotangents.iter().enumerate() {
                    let compare = |[numeric, left, right]: &[Vec<f64>; 3]| Comparison {
                        input,
                        element: multi_index(element, leaf.dims()),
                        direction: cotangent.direction(row, run.dims()),
                        analytic: analytic[row][input].as_ref().map(|g| g[element]),
                        numeric: cotangent.project(numeric),
                        left: cotangent.project(left),
                        right: cotangent.project(right),
                    };
                    let comparison = compare(&slopes);
                    let disagree = comparison.error(self.atol, self.rtol) > 1.0;
                    let mut kink = disagree && comparison.may_be_kink(self.atol, self.rtol);
                    let step = self.eps / 16.0;
                    if kink && sides.here + step > sides.here && sides.here - step < sides.here {
                        if closer.is_none() {
                            let sides =
                                self.sides(&f, &leaves, &mut point, (at, step), run.dims())?;
                            closer = Some(sides.slopes(run.values()));
                        }
                        let same = |c| comparison.stays(&compare(c), self.atol, self.rtol);
                        kink = closer.as_ref().is_some_and(same);
                    }
                    report.compare(comparison, kink);
                }
            }
        }
        report.judge(&outputs, self.eps);
        Ok(report)
    }

    /// The output with one input element moved by `eps` to either side. `point` holds the inputs,
    /// and does so again afterwards.
    fn sides<F>(
        &self,
        f: &F,
        leaves: &[Leaf],
        point: &mut [Tensor],
        ((input, element), eps): ((usize, usize), f64),
        dims: &[usize],
    ) -> Result<Sides>
    where
        F: Fn(&[Tensor]) -> Result<Tensor>,
    {
        let leaf = &leaves[input];
        let here = leaf.values()[element];
        let (right, left) = (here + eps, here - eps);
        if right <= here || left >= here {
            bail!(
                "gradcheck: eps {eps} does not move element {:?} of input {input}, which is \
                {here}; choose a larger eps or a smaller input",
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
        Ok(Sides {
            here,
            right,
            left,
            plus: values_of(&plus, dims)?,
            minus: values_of(&minus, dims)?,
        })
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
                "gradcheck: zero projections compare nothing; expected Some(k) with k of at least \
                1, or None for the full Jacobian"
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

/// An input element, where it was moved to on the right and on the left, and the outputs there.
struct Sides {
    here: f64,
    right: f64,
    left: f64,
    plus: Vec<f64>,
    minus: Vec<f64>,
}

impl Sides {
    /// The derivative of every output element by central differences, and the slopes to the left
    /// and to the right alone. `values` is the output at the point itself.
    fn slopes(&self, values: &[f64]) -> [Vec<f64>; 3] {
        let slope = |upper: &[f64], lower: &[f64], distance: f64| {
            let pairs = upper.iter().zip(lower);
            pairs.map(|(u, l)| (u - l) / distance).collect()
        };
        [
            slope(&self.plus, &self.minus, self.right - self.left),
            slope(values, &self.minus, self.here - self.left),
            slope(&self.plus, values, self.right - self.here),
        ]
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

// The example of the README is a test too.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
