//! Groups of channels of a sample normalized by their own statistics: group and instance norm.

use candle_core::{Result, Tensor};

use super::activation::Activation;
use super::composed;
use super::spread::{Affine, AffineGradients, Spread};
use super::{Args, ChannelAxes, Composed, Computation, Gradients};

/// `y = (x − mean) / √(var + eps) · weight + bias` for each of `num_groups` groups of neighboring
/// channels of each sample, with weights and biases of any spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Groups {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    pub(crate) num_groups: usize,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
    /// Of weight and bias.
    pub(crate) spread: Spread,
    /// Follows weight and bias.
    pub(crate) activation: Option<Activation>,
}

impl Groups {
    /// `x` is `[N, C, *]`, and not empty.
    pub(crate) fn of(layer: &'static str, x: &Tensor, num_groups: usize, eps: f64) -> Self {
        Self {
            layer,
            axes: ChannelAxes::of(x),
            num_groups,
            eps: composed::eps_in(composed::accumulator(x.dtype()), eps),
            spread: Spread::Channel,
            activation: None,
        }
    }

    /// Weight, and bias, in the dtype that they are applied in.
    fn affine<'a>(&self, weight: Option<&'a Tensor>, bias: Option<&'a Tensor>) -> Affine<'a> {
        let (dims, along) = self.spread.along(self.axes);
        Affine {
            weight,
            bias,
            dims,
            along,
            activation: self.activation,
        }
    }

    /// The mean and `√(var + eps)` of each group of `x`, connected to the graph.
    pub(crate) fn mean_and_std(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        composed::mean_and_std(&self.by_group(&composed::unshared(x)?)?, self.eps)
    }

    /// One group of a sample in each row, in the accumulator's dtype.
    fn by_group(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(composed::accumulator(x.dtype()))?
            .reshape((self.axes.outer * self.num_groups, ()))
    }
}

impl Computation for Groups {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn backward_reads_bias(&self) -> bool {
        self.activation.is_some()
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let x = args.x;
        let groups = self.by_group(&composed::unshared(x)?)?;
        let standardized = composed::standardize(&groups, true, self.eps)?;
        let [weight, bias] = composed::parameters(args.weight, args.bias, groups.dtype())?;
        let affine = self.affine(weight.as_ref(), bias.as_ref());
        let y = affine.apply(&standardized.y)?;
        Ok(Composed {
            y: y.to_dtype(x.dtype())?.reshape(x.shape())?,
            statistics: Some(standardized.statistics),
        })
    }

    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let ChannelAxes {
            outer, channels, ..
        } = self.axes;
        let acc = composed::accumulator(args.x.dtype());
        let weight = args.weight.map(|w| w.to_dtype(acc)).transpose()?;
        let dy = dy.to_dtype(acc)?.contiguous()?;
        if self.spread != Spread::Channel || self.activation.is_some() {
            let bias = args.bias.map(|b| b.to_dtype(acc)).transpose()?;
            let groups = self.by_group(args.x)?.contiguous()?;
            let standardized = composed::standardize(&groups, true, self.eps)?;
            let AffineGradients { g, dweight, dbias } = self
                .affine(weight.as_ref(), bias.as_ref())
                .gradients(&standardized.y, &dy)?;
            return Ok(Gradients {
                dx: composed::through(&standardized, &g.reshape(groups.shape())?, true)?,
                dweight: Some(dweight),
                dbias: Some(dbias),
            });
        }
        composed::backward(
            &self.by_group(args.x)?,
            &dy.reshape((outer, channels, ()))?,
            weight.as_ref(),
            true,
            self.eps,
        )
    }
}
