//! Rows that a second input gates, normalized by their root mean square: gated RMS norm.

use candle_core::{DType, Result, Tensor};

use super::activation::Activation;
use super::composed::{self, Along};
use super::rows::Cast;
use super::spread::{Affine, AffineGradients};
use super::{Args, Composed, Computation, Gradients};

/// Place of the gate in a gated RMS norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Gate {
    /// `y = rms(x · act(gate)) · weight`: Mamba 2 and its relatives.
    Before,
    /// `y = rms(x) · weight · act(gate)`: Qwen 3 Next, Kimi Linear.
    #[default]
    After,
}

/// Gated RMS norm of rows of `len` elements, each group of `group` neighboring columns by its own
/// mean square.
///
/// The weight of the arguments is the gate, of the shape of `x`, and their bias the weight, one for
/// each column: either may be absent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct GatedRows {
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
    pub(crate) group: usize,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
    pub(crate) gate: Gate,
    pub(crate) activation: Activation,
    pub(crate) cast: Cast,
}

/// The arguments in the accumulator's dtype.
struct Wide {
    x: Tensor,
    gate: Option<Tensor>,
    weight: Option<Tensor>,
}

impl GatedRows {
    fn wide(&self, args: Args<&Tensor>) -> Result<Wide> {
        let acc = composed::accumulator(args.x.dtype());
        let wide = |t: &Tensor| t.contiguous()?.to_dtype(acc)?.reshape(((), self.group));
        let weight = args.bias.map(|w| w.flatten_all()?.to_dtype(acc));
        Ok(Wide {
            x: wide(args.x)?,
            gate: args.weight.map(wide).transpose()?,
            weight: weight.transpose()?,
        })
    }

    /// The weight of each column of `rows` groups.
    fn affine<'a>(&self, rows: usize, weight: Option<&'a Tensor>) -> Affine<'a> {
        Affine {
            weight,
            bias: None,
            dims: [rows / (self.len / self.group), self.len, 1],
            along: Along::Middle,
            activation: None,
        }
    }

    /// The value that the weight is multiplied by: rounded to `dtype`, with a gradient that is not
    /// rounded on its way back.
    fn rounded(&self, normal: Tensor, dtype: DType) -> Result<Tensor> {
        if self.cast != Cast::BeforeWeight {
            return Ok(normal);
        }
        let detached = normal.detach();
        let rounded = detached.to_dtype(dtype)?.to_dtype(normal.dtype())?;
        normal + (rounded - detached)?
    }
}

impl Computation for GatedRows {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn backward_reads_bias(&self) -> bool {
        true
    }

    fn weight_is_input(&self) -> bool {
        true
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let x = composed::unshared(args.x)?;
        let gate = args.weight.map(composed::unshared).transpose()?;
        let weight = args.bias.map(composed::kept).transpose()?;
        let (gate, weight) = (gate.as_ref(), weight.as_ref());
        let wide = self.wide(Args {
            x: &x,
            weight: gate,
            bias: weight,
        })?;
        let opened = wide.gate.map(|gate| self.activation.value(&gate));
        let opened = opened.transpose()?;
        let h = match (self.gate, &opened) {
            (Gate::Before, Some(opened)) => (&wide.x * opened)?,
            _ => wide.x,
        };
        let normal = composed::standardize(&h.contiguous()?, false, self.eps)?.y;
        let normal = self.rounded(normal, x.dtype())?;
        let affine = self.affine(normal.dims()[0], wide.weight.as_ref());
        let y = affine.apply(&normal)?;
        let y = match (self.gate, &opened) {
            (Gate::After, Some(opened)) => (y.reshape(opened.shape())? * opened)?,
            _ => y,
        };
        Ok(y.to_dtype(x.dtype())?.reshape(x.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let Wide { x, gate, weight } = self.wide(args)?;
        let dy = dy.contiguous()?.to_dtype(x.dtype())?.reshape(x.shape())?;
        let opened = gate.as_ref().map(|gate| self.activation.value(gate));
        let opened = opened.transpose()?;
        let (h, dy_of_norm) = match (self.gate, &opened) {
            (_, None) => (x.clone(), dy.clone()),
            (Gate::Before, Some(opened)) => ((&x * opened)?, dy.clone()),
            (Gate::After, Some(opened)) => (x.clone(), (&dy * opened)?),
        };
        let standardized = composed::standardize(&h.contiguous()?, false, self.eps)?;
        let affine = self.affine(h.dims()[0], weight.as_ref());
        let AffineGradients { g, dweight, .. } = affine.gradients(&standardized.y, &dy_of_norm)?;
        let dh = composed::through(&standardized, &g.reshape(x.shape())?, false)?;
        let (dx, dgate) = match (gate, opened) {
            (Some(gate), Some(opened)) => {
                let slope = self.activation.slope(&gate)?;
                match self.gate {
                    Gate::Before => ((&dh * opened)?, Some(((dh * x)? * slope)?)),
                    Gate::After => {
                        let y = affine.apply(&standardized.y)?.reshape(x.shape())?;
                        (dh, Some(((dy * y)? * slope)?))
                    }
                }
            }
            _ => (dh, None),
        };
        Ok(Gradients {
            dx,
            dweight: dgate,
            dbias: Some(dweight),
        })
    }
}
