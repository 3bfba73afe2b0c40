//! Evaluations of the function under test, and their backward passes.
use super::leaf::Leaf;
use super::multi_index;
use super::report::Direction;
use candle_core::{DType, Result, Tensor, Var, bail};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Factors that the output is multiplied with before it is summed to a loss.
pub(super) enum Cotangent {
    Unit(usize),
    Random(Vec<f64>),
}

impl Cotangent {
    /// Magnitudes stay within [1/2, 1), so that a fault in one output element is not hidden by a
    /// coefficient near zero.
    pub(super) fn random(len: usize, rng: &mut StdRng) -> Self {
        let draw = |rng: &mut StdRng| {
            let magnitude = rng.random_range(0.5..1.0);
            if rng.random() { magnitude } else { -magnitude }
        };
        Self::Random((0..len).map(|_| draw(rng)).collect())
    }

    fn coefficients(&self, len: usize) -> Vec<f64> {
        match self {
            Self::Unit(at) => (0..len).map(|i| f64::from(u8::from(i == *at))).collect(),
            Self::Random(coefficients) => coefficients.clone(),
        }
    }

    pub(super) fn project(&self, values: &[f64]) -> f64 {
        match self {
            Self::Unit(at) => values[*at],
            Self::Random(coefficients) => coefficients.iter().zip(values).map(|(c, v)| c * v).sum(),
        }
    }

    pub(super) fn direction(&self, row: usize, dims: &[usize]) -> Direction {
        match self {
            Self::Unit(at) => Direction::Element(multi_index(*at, dims)),
            Self::Random(_) => Direction::Projection(row),
        }
    }
}

/// One evaluation of the function on variables, with the graph that leads back to them.
pub(super) struct Evaluation<'a> {
    leaves: &'a [Leaf],
    variables: Vec<Var>,
    output: Tensor,
    values: Vec<f64>,
}

impl<'a> Evaluation<'a> {
    pub(super) fn new<F>(f: &F, leaves: &'a [Leaf]) -> Result<Self>
    where
        F: Fn(&[Tensor]) -> Result<Tensor>,
    {
        let variables = (leaves.iter().map(Leaf::variable)).collect::<Result<Vec<_>>>()?;
        let inputs = (leaves.iter().zip(&variables))
            .map(|(leaf, variable)| leaf.view(variable))
            .collect::<Result<Vec<_>>>()?;
        let output = f(&inputs)?;
        let values = values_of(&output, output.dims())?;
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            bail!(
                "gradcheck: element {:?} of the function's output is {}; choose inputs where it is \
                finite",
                multi_index(at, output.dims()),
                values[at],
            )
        }
        Ok(Self {
            leaves,
            variables,
            output,
            values,
        })
    }

    /// The shape of the output.
    pub(super) fn dims(&self) -> &[usize] {
        self.output.dims()
    }

    /// The output, element by element.
    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }

    /// Number of elements of the output.
    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    /// The gradient of `(y · cotangent).sum()` for each input, `None` where backward has none.
    pub(super) fn gradients(&self, cotangent: &Cotangent) -> Result<Vec<Option<Vec<f64>>>> {
        let cotangent = Tensor::from_vec(
            cotangent.coefficients(self.values.len()),
            self.output.dims(),
            self.output.device(),
        )?;
        let loss = (&self.output * cotangent)?.sum_all()?;
        // Candle panics where an operation in the middle of a graph returns no gradient for its
        // argument.
        let gradients = match catch_unwind(AssertUnwindSafe(|| loss.backward())) {
            Ok(gradients) => gradients?,
            Err(panic) => bail!(
                "gradcheck: backward panicked with \"{}\"; candle does so, among other causes, \
                where an operation returns no gradient for an argument that tracks one",
                panic_text(panic.as_ref()),
            ),
        };
        (self.leaves.iter().zip(&self.variables).enumerate())
            .map(|(input, (leaf, variable))| {
                let Some(gradient) = gradients.get(variable) else {
                    return Ok(None);
                };
                if gradient.dims() != variable.dims() || gradient.dtype() != DType::F64 {
                    bail!(
                        "gradcheck: backward returned a gradient of shape {:?} and dtype {:?} for \
                        input {input}, expected {:?} and F64",
                        gradient.dims(),
                        gradient.dtype(),
                        variable.dims(),
                    )
                }
                Ok(Some(leaf.view(gradient)?.flatten_all()?.to_vec1()?))
            })
            .collect()
    }
}

/// Evaluates once more and refuses a function whose output or gradient has other bits than the
/// first time.
pub(super) fn repeat<F>(f: &F, leaves: &[Leaf], first: &Evaluation<'_>, seed: u64) -> Result<()>
where
    F: Fn(&[Tensor]) -> Result<Tensor>,
{
    let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let second = Evaluation::new(f, leaves)?;
    if first.dims() != second.dims() || bits(&first.values) != bits(&second.values) {
        bail!(
            "gradcheck: the function is not deterministic, a second evaluation on the same inputs \
            gave another output; fix its seed or take the random part out"
        )
    }
    // Not a unit vector, which would leave most of the backward out.
    let cotangent = Cotangent::random(first.len(), &mut StdRng::seed_from_u64(seed));
    let gradients = (first.gradients(&cotangent)?.into_iter()).zip(second.gradients(&cotangent)?);
    for (input, (a, b)) in gradients.enumerate() {
        if a.as_deref().map(bits) != b.as_deref().map(bits) {
            bail!(
                "gradcheck: backward is not deterministic, a second pass on the same inputs gave \
                another gradient for input {input}"
            )
        }
    }
    Ok(())
}

pub(super) fn values_of(output: &Tensor, dims: &[usize]) -> Result<Vec<f64>> {
    if output.dtype() != DType::F64 {
        bail!(
            "gradcheck: the function's output is {:?}, expected F64; compute in f64 throughout",
            output.dtype()
        )
    }
    if output.dims() != dims {
        bail!(
            "gradcheck: the function's output has shape {:?} after an input moved by eps, expected \
            {dims:?}",
            output.dims()
        )
    }
    output.flatten_all()?.to_vec1()
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    (panic.downcast_ref::<String>().map(String::as_str))
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}
