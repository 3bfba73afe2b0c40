//! Rows normalized by their own statistics: layer norm and RMS norm.

use candle_core::{DType, Result, Shape, Tensor};

use super::composed;
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
/// one weight and bias for each column.
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
    /// The dtype of the output, which a sum in the accumulator's dtype was not rounded to before.
    pub(crate) output: DType,
}

impl Computation for Rows {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn output(&self, x: &Shape, _: DType) -> (Shape, DType) {
        (x.clone(), self.output)
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let x = composed::unshared(args.x)?;
        let (rows, dtype) = (x.elem_count() / self.len, self.output);
        let acc = composed::accumulator(dtype);
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let weight = weight.map(|w| w.reshape(self.len)? + self.offset);
        let bias = bias.map(|b| b.reshape(self.len)).transpose()?;

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
        let y = y.reshape((rows, self.len, 1))?;
        let y = composed::scale_shift(&y, weight.transpose()?.as_ref(), bias.as_ref())?;
        Ok(y.to_dtype(dtype)?.reshape(x.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (x, len) = (args.x, self.len);
        let acc = composed::accumulator(x.dtype());
        let weight = args
            .weight
            .map(|w| w.to_dtype(acc)?.reshape(len)? + self.offset);
        composed::backward(
            &x.to_dtype(acc)?.reshape(((), len))?,
            &dy.to_dtype(acc)?.contiguous()?.reshape(((), len, 1))?,
            weight.transpose()?.as_ref(),
            self.center,
            self.eps,
        )
    }
}
