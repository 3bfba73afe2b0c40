//! Scale and shift alone, of any spread, without a normalization.

use candle_core::{Result, Tensor};

use super::composed::{self, Along};
use super::spread::{Affine, AffineGradients};
use super::{Args, Composed, Computation, Gradients};

/// `y = x · weight + bias` for `x` as `[outer, middle, inner]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Modulate {
    pub(crate) layer: &'static str,
    pub(crate) dims: [usize; 3],
    /// How weight and bias lie along these axes.
    pub(crate) along: Along,
}

impl Modulate {
    fn affine<'a>(&self, weight: Option<&'a Tensor>, bias: Option<&'a Tensor>) -> Affine<'a> {
        Affine {
            weight,
            bias,
            dims: self.dims,
            along: self.along,
            activation: None,
        }
    }
}

impl Computation for Modulate {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let (x, acc) = (args.x, composed::accumulator(args.x.dtype()));
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let affine = self.affine(weight.as_ref(), bias.as_ref());
        let y = affine.apply(&composed::unshared(x)?.to_dtype(acc)?)?;
        Ok(y.to_dtype(x.dtype())?.reshape(x.shape())?.into())
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let acc = composed::accumulator(args.x.dtype());
        let weight = args.weight.map(|w| w.to_dtype(acc)).transpose()?;
        let (x, dy) = (args.x.to_dtype(acc)?, dy.to_dtype(acc)?);
        let AffineGradients { g, dweight, dbias } =
            self.affine(weight.as_ref(), None).gradients(&x, &dy)?;
        Ok(Gradients {
            dx: g,
            dweight: Some(dweight),
            dbias: Some(dbias),
        })
    }
}
