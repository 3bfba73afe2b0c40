//! Rows normalized by their own statistics: layer norm and RMS norm.

use candle_core::{DType, Result, Shape, Tensor};

use super::activation::Activation;
use super::composed::{self, Along};
use super::spread::{Affine, AffineGradients};
use super::{Args, Composed, Computation, Gradients};

/// Where RMS norm rounds half-precision values; in `f32` and `f64` both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Cast {
    /// Multiply by the weight in `f32`, then round once: PyTorch's `RMSNorm`, Gemma.
    #[default]
    AfterWeight,
    /// Round the normalized value to the input's dtype, then multiply and round again: Llama and
    /// its relatives.
    BeforeWeight,
}

/// `y = (x − mean) / √(var + eps) · (offset + weight) + bias` for each row of `len` elements, with
/// one weight and bias for each column, of all rows or of each run of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Rows {
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
    /// Subtract the mean; without it, the variance is the mean square.
    pub(crate) center: bool,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
    /// Added to the weight.
    pub(crate) offset: f64,
    pub(crate) cast: Cast,
    /// How many weights and biases of `len` elements there are: each serves a run of neighboring
    /// rows, all of them equally many.
    pub(crate) pairs: usize,
    /// Follows weight and bias.
    pub(crate) activation: Option<Activation>,
    /// The dtype of the output, which a sum in the accumulator's dtype was not rounded to before.
    pub(crate) output: DType,
}

impl Rows {
    /// The axes of `rows` rows, and how weights lie along them.
    pub(crate) fn along(&self, rows: usize) -> ([usize; 3], Along) {
        match self.pairs {
            1 => ([rows, self.len, 1], Along::Middle),
            pairs => ([pairs, rows / pairs, self.len], Along::Ends),
        }
    }

    /// Weight, and bias, of `rows` rows in the dtype that they are applied in.
    fn affine<'a>(
        &self,
        rows: usize,
        weight: Option<&'a Tensor>,
        bias: Option<&'a Tensor>,
    ) -> Affine<'a> {
        let (dims, along) = self.along(rows);
        Affine {
            weight,
            bias,
            dims,
            along,
            activation: self.activation,
        }
    }
}

impl Computation for Rows {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn output(&self, x: &Shape, _: DType) -> (Shape, DType) {
        (x.clone(), self.output)
    }

    fn backward_reads_bias(&self) -> bool {
        self.activation.is_some()
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let x = composed::unshared(args.x)?;
        let (rows, dtype) = (x.elem_count() / self.len, self.output);
        let acc = composed::accumulator(dtype);
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let weight = weight.map(|w| w.flatten_all()? + self.offset).transpose()?;
        let bias = bias.map(|b| b.flatten_all()).transpose()?;

        let x_rows = x.reshape((rows, self.len))?.to_dtype(acc)?;
        let y = composed::standardize(&x_rows, self.center, self.eps)?.y;
        let y = match self.cast {
            Cast::AfterWeight => y,
            // The rounded values, with a gradient that is not rounded on its way back.
            Cast::BeforeWeight => {
                let detached = y.detach();
                let rounded = detached.to_dtype(dtype)?.to_dtype(acc)?;
                (y + (rounded - detached)?)?
            }
        };
        let y = self
            .affine(rows, weight.as_ref(), bias.as_ref())
            .apply(&y)?;
        Ok(y.to_dtype(dtype)?.reshape(x.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (x, len) = (args.x, self.len);
        let acc = composed::accumulator(x.dtype());
        let weight = args
            .weight
            .map(|w| w.to_dtype(acc)?.flatten_all()? + self.offset);
        if self.pairs > 1 || self.activation.is_some() {
            let weight = weight.transpose()?;
            let bias = args
                .bias
                .map(|b| b.to_dtype(acc)?.flatten_all())
                .transpose()?;
            let rows = x.to_dtype(acc)?.contiguous()?.reshape(((), len))?;
            let affine = self.affine(rows.dims()[0], weight.as_ref(), bias.as_ref());
            let standardized = composed::standardize(&rows, self.center, self.eps)?;
            let AffineGradients { g, dweight, dbias } =
                affine.gradients(&standardized.y, &dy.to_dtype(acc)?)?;
            return Ok(Gradients {
                dx: composed::through(&standardized, &g.reshape(((), len))?, self.center)?,
                dweight: Some(dweight),
                dbias: Some(dbias),
            });
        }
        composed::backward(
            &x.to_dtype(acc)?.reshape(((), len))?,
            &dy.to_dtype(acc)?.contiguous()?.reshape(((), len, 1))?,
            weight.transpose()?.as_ref(),
            self.center,
            self.eps,
        )
    }
}
