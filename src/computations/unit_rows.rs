//! Rows over their lengths.

use candle_core::{Result, Tensor};

use super::composed;
use super::weight_rows::{WeightRows, row_scale};
use super::{Args, Composed, Computation, Gradients};

/// How `eps` keeps the length of a row from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum L2Form {
    /// `x / max(‖x‖, eps)`, as PyTorch's `normalize`. The default.
    #[default]
    Max,
    /// `x / √(Σ x² + eps)`, as the `l2norm` of linear attention.
    Inside,
}

/// Each row of `len` elements of the input over its length.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct UnitRows {
    /// The name that messages start with.
    pub(crate) layer: &'static str,
    pub(crate) len: usize,
    pub(crate) eps: f64,
    pub(crate) form: L2Form,
}

/// Rows as they are divided.
struct Divided {
    /// The rows over their lengths.
    units: Tensor,
    /// One over the lengths, `[rows, 1]`.
    inverse: Tensor,
    /// Where the length changes with the row, `[rows, 1]`, if it does not everywhere.
    own: Option<Tensor>,
}

impl UnitRows {
    /// The rows of `x`, contiguous, `[rows, len]`, in the accumulator's dtype.
    fn divided(&self, x: &Tensor) -> Result<Divided> {
        let by_row = |t: &Tensor| t.reshape(((), 1));
        let mut scale = row_scale(x)?;
        if self.form == L2Form::Inside {
            // Squares stay finite, and so does what ε adds to them.
            scale = scale.maximum(self.eps.sqrt())?;
        }
        let rows = composed::Rows::new(&x.broadcast_div(&scale)?)?;
        let (squares, scale) = (rows.sqr()?.sum()?, scale.flatten_all()?);
        let (inverse, short) = match self.form {
            L2Form::Inside => {
                let added = (scale.sqr()?.recip()? * self.eps)?;
                ((squares + added)?.sqrt()?.recip()?, None)
            }
            L2Form::Max => {
                let short = (squares.detach().sqrt()? * &scale)?.le(self.eps)?;
                let inverse = WeightRows::own_inverse(&squares)?;
                let fixed = (&scale / self.eps)?;
                (short.where_cond(&fixed, &inverse)?, Some(short))
            }
        };
        let own = short.map(|short| by_row(&short.eq(0u8)?.to_dtype(x.dtype())?));
        Ok(Divided {
            units: rows.times(&inverse)?.join()?,
            inverse: by_row(&(inverse / scale)?)?,
            own: own.transpose()?,
        })
    }
}

impl Computation for UnitRows {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let acc = composed::accumulator(args.x.dtype());
        let x = composed::unshared(args.x)?.to_dtype(acc)?;
        let y = self.divided(&x.reshape(((), self.len))?)?.units;
        Ok(y.to_dtype(args.x.dtype())?.reshape(args.x.shape())?.into())
    }

    /// With the length l, `dx = (dy − y · Σ dy · y) / l`, without the sum where l is fixed.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let by_row = |t: &Tensor| t.to_dtype(acc)?.contiguous()?.reshape(((), self.len));
        let dy = by_row(dy)?;
        let Divided {
            units,
            inverse,
            own,
        } = self.divided(&by_row(args.x)?)?;
        let mut along = (&dy * &units)?.sum_keepdim(1)?;
        if let Some(own) = own {
            along = (along * own)?;
        }
        Ok(Gradients {
            dx: (dy - units.broadcast_mul(&along)?)?.broadcast_mul(&inverse)?,
            dweight: None,
            dbias: None,
        })
    }
}
