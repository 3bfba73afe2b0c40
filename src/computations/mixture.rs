//! The learned mixture of the moments of instances, layers and batches: switchable norm.

use candle_core::{DType, Result, Shape, Tensor};

use super::composed;
use super::synchronized::wide;
use super::{Args, ChannelAxes, Composed, Computation, Gradients, argument};

/// The statistics of a batch that are mixed in.
#[derive(Debug, Clone)]
pub(crate) enum Batch {
    /// None.
    Absent,
    /// Those of the planes.
    Own,
    /// The caller's: the mean and the variance of each channel, `[C]` each, contiguous and in
    /// memory that nothing else writes to.
    Given { mean: Tensor, var: Tensor },
    /// Those of the planes of all ranks of a group, as tensors of the graph, `[C]` each in `f64`
    /// on the CPU: for the composed form alone.
    Joint { mean: Tensor, var: Tensor },
}

/// The coefficients of [`ScaleShift`](super::ScaleShift), `[3, N · C]`, that normalize the planes
/// of `[N, C, *]` by the mixture of their moments.
///
/// The input holds the moments of the planes, `[2, N · C]` in `f64`. The weight has one factor for
/// each channel. In place of a bias there are the mixing weights before their softmax, those of the
/// means and then those of the variances, each in the order of instance, layer and batch.
#[derive(Debug, Clone)]
pub(crate) struct Mixture {
    pub(crate) layer: &'static str,
    pub(crate) axes: ChannelAxes,
    /// Whether the statistics of instances are among them.
    pub(crate) instance: bool,
    pub(crate) batch: Batch,
    /// Divide the variance of a plane by n − 1 in place of n; without instances, those of layers
    /// and batches.
    pub(crate) unbiased: bool,
    /// As the accumulator holds it.
    pub(crate) eps: f64,
}

/// Factors of biased variances.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factors {
    pub(crate) plane: f64,
    pub(crate) layer: f64,
    pub(crate) batch: f64,
}

impl Mixture {
    /// The number of statistics that are mixed.
    pub(crate) fn sources(&self) -> usize {
        let batch = !matches!(self.batch, Batch::Absent);
        1 + usize::from(self.instance) + usize::from(batch)
    }

    pub(crate) fn factors(&self) -> Factors {
        let ChannelAxes {
            outer,
            channels,
            inner,
        } = self.axes;
        let factor = |count: usize, applies: bool| match applies && self.unbiased {
            true => count as f64 / (count - 1) as f64,
            false => 1.,
        };
        Factors {
            plane: factor(inner, self.instance),
            layer: factor(channels * inner, !self.instance),
            batch: factor(outer * inner, !self.instance),
        }
    }

    /// Whether samples do not see each other.
    pub(crate) fn samples_are_apart(&self) -> bool {
        !matches!(self.batch, Batch::Own)
    }

    /// A value near the means of the data, whose differences then have all their digits: that of
    /// equal means is zero. It comes from nothing that the result does not depend on anyway: the
    /// first of `values` `[N, …]`, or of each sample where samples do not see each other. Running
    /// means say nothing of where these data are.
    pub(crate) fn offset(&self, values: &Tensor) -> Result<Tensor> {
        let first = values.detach().narrow(1, 0, 1)?;
        finite(match self.samples_are_apart() {
            true => first,
            false => first.narrow(0, 0, 1)?,
        })
    }

    fn dims(&self) -> (usize, usize) {
        (self.axes.outer, self.axes.channels)
    }

    /// The mean of each plane, whole, and its variance times its factor, `[N, C]` each in `f64` on
    /// the CPU.
    pub(crate) fn whole(&self, planes: &Planes) -> Result<[Tensor; 2]> {
        let add = |mean: Tensor, offset| mean.broadcast_add(&wide(offset)?);
        let mean = planes
            .offsets
            .iter()
            .rev()
            .try_fold(wide(&planes.mean)?, add)?;
        Ok([mean, (wide(&planes.var)? * self.factors().plane)?])
    }

    /// The planes of an input `[2, N · C]`.
    pub(crate) fn planes(&self, moments: &Tensor) -> Result<Planes> {
        let [mean, var] = [0, 1].map(|i| moments.narrow(0, i, 1)?.reshape(self.dims()));
        let mean = mean?;
        let offset = self.offset(&mean)?;
        Ok(Planes {
            about: mean.detach(),
            mean: mean.broadcast_sub(&offset)?,
            offsets: vec![offset],
            var: var?,
        })
    }

    /// The moments that are mixed, those of the planes among them or not.
    fn terms(&self, planes: &Planes) -> Result<Terms> {
        let factors = self.factors();
        let var = (&planes.var * factors.plane)?;
        // The moments of a union of planes of equal size, along axis 1 of `mean` and `var`.
        let union = |mean: &Tensor, var: &Tensor| -> Result<[Tensor; 2]> {
            let whole = composed::Rows::new(mean)?.mean()?.unsqueeze(1)?;
            let inner = (var + mean.broadcast_sub(&whole)?.sqr()?)?;
            let inner = composed::Rows::new(&inner)?.mean()?.unsqueeze(1)?;
            Ok([whole, inner])
        };
        let plane = [planes.mean.clone(), var];
        let [mean, var] = union(&plane[0], &plane[1])?;
        let layer = [mean, (var * factors.layer)?];
        let channels = self.axes.channels;
        let batch = match &self.batch {
            Batch::Absent => None,
            Batch::Own => {
                let by_channel = |t: &Tensor| t.t()?.contiguous();
                let [mean, var] = union(&by_channel(&plane[0])?, &by_channel(&plane[1])?)?;
                Some([mean.t()?, (var * factors.batch)?.t()?])
            }
            Batch::Given { mean, var } => {
                let row = |t: &Tensor| t.to_dtype(planes.mean.dtype())?.reshape((1, channels));
                let subtract = |mean: Tensor, offset| mean.broadcast_sub(offset);
                let mean = planes.offsets.iter().try_fold(row(mean)?, subtract)?;
                Some([mean, row(var)?])
            }
            Batch::Joint { mean, var } => {
                let device = planes.mean.device();
                let row = |t: &Tensor| t.reshape((1, channels));
                let near = |t: Tensor| t.to_dtype(planes.mean.dtype())?.to_device(device);
                let subtract = |mean: Tensor, offset| mean.broadcast_sub(&wide(offset)?);
                let mean = planes.offsets.iter().try_fold(row(mean)?, subtract)?;
                Some([near(mean)?, near(row(var)?)?])
            }
        };
        Ok(Terms {
            plane,
            layer,
            batch,
        })
    }

    /// The terms among `terms` that have a share, in the order of the mixing weights.
    fn mixed_terms<'t>(&self, terms: &'t Terms) -> Vec<&'t [Tensor; 2]> {
        let plane = self.instance.then_some(&terms.plane);
        let all = [plane, Some(&terms.layer), terms.batch.as_ref()];
        all.into_iter().flatten().collect()
    }

    /// The mixed mean and variance, `[N, C]` each, and both sets of mixing weights.
    fn mixed(&self, terms: &Terms, logits: &Tensor) -> Result<([Tensor; 2], [Tensor; 2])> {
        let (sources, wide) = (self.sources(), terms.layer[0].dtype());
        let logits = logits.to_dtype(wide)?;
        let set = |i: usize| -> Result<(Tensor, Tensor)> {
            let mixing_weights = softmax(&logits.narrow(0, i * sources, sources)?)?;
            let mut sum = Tensor::zeros(self.dims(), wide, logits.device())?;
            for (k, term) in self.mixed_terms(terms).into_iter().enumerate() {
                let share = mixing_weights.narrow(0, k, 1)?.unsqueeze(0)?;
                sum = sum.broadcast_add(&term[i].broadcast_mul(&share)?)?;
            }
            Ok((sum, mixing_weights))
        };
        let ((mean, of_means), (var, of_vars)) = (set(0)?, set(1)?);
        Ok(([mean, var], [of_means, of_vars]))
    }

    /// The distances of the means of the planes, as constants, from their mixtures, `[N, C]`.
    ///
    /// The mixing weights add up to 1. Therefore the distance from a mixture is the mixture of the
    /// distances, of which those from the plane's own mean are zero and take no digits.
    fn distance(&self, planes: &Planes, terms: &Terms, mixing_weights: &Tensor) -> Result<Tensor> {
        let mean = planes.mean.detach();
        let mut sum = mean.zeros_like()?;
        for (k, term) in self.mixed_terms(terms).into_iter().enumerate() {
            let share = mixing_weights.narrow(0, k, 1)?.unsqueeze(0)?;
            let away = mean.broadcast_sub(&term[0])?;
            sum = sum.broadcast_add(&away.broadcast_mul(&share)?)?;
        }
        Ok(sum)
    }

    /// The coefficients that normalize `planes`, in their dtype; and the mean and variance of the
    /// batch, `[C]` each, where they are its own.
    pub(crate) fn of_planes(
        &self,
        planes: &Planes,
        weight: Option<&Tensor>,
        logits: &Tensor,
    ) -> Result<(Tensor, Option<[Tensor; 2]>)> {
        let terms = self.terms(planes)?;
        let ([_, var], [of_means, _]) = self.mixed(&terms, logits)?;
        let mut scale = (var + self.eps)?.sqrt()?.recip()?;
        if let Some(weight) = weight {
            scale = scale.broadcast_mul(&self.row(weight, scale.dtype())?)?;
        }
        // About the mean of its own plane, which cancels: large means cost no digits.
        let shift = (self.distance(planes, &terms, &of_means)? * &scale)?;
        let flat = |t: Tensor| t.reshape(self.axes.outer * self.axes.channels);
        let rows = [flat(scale)?, flat(shift)?, flat(planes.about.clone())?];
        let batch = match (&self.batch, terms.batch) {
            (Batch::Own, Some([mean, var])) => {
                let add = |mean: Tensor, offset| mean.broadcast_add(offset);
                let stored = planes.offsets.iter().rev().try_fold(mean.detach(), add)?;
                let channels = self.axes.channels;
                Some([stored.reshape(channels)?, var.detach().reshape(channels)?])
            }
            _ => None,
        };
        Ok((Tensor::stack(&rows, 0)?, batch))
    }

    /// A value for each channel, to be broadcast over samples.
    fn row(&self, values: &Tensor, dtype: DType) -> Result<Tensor> {
        values.to_dtype(dtype)?.reshape((1, self.axes.channels))
    }
}

/// The moments of planes, one for each channel of each sample, as tensors of the graph.
pub(crate) struct Planes {
    /// The mean of each plane less `offsets`, `[N, C]`.
    pub(crate) mean: Tensor,
    /// Values subtracted from the mean, one after the other: their sum would be rounded. `[N, 1]`
    /// or `[1, 1]`.
    pub(crate) offsets: Vec<Tensor>,
    /// The biased variance, `[N, C]`.
    pub(crate) var: Tensor,
    /// Numbers by which values are centered before they are scaled: their means, which no gradient
    /// reaches.
    pub(crate) about: Tensor,
}

/// Means and variances of planes `[N, C]`, layers `[N, 1]` and the batch `[1, C]` or `[N, C]`.
struct Terms {
    plane: [Tensor; 2],
    layer: [Tensor; 2],
    batch: Option<[Tensor; 2]>,
}

impl Computation for Mixture {
    fn layer(&self) -> &'static str {
        self.layer
    }

    fn output(&self, _: &Shape, dtype: DType) -> (Shape, DType) {
        let planes = self.axes.outer * self.axes.channels;
        (Shape::from((3, planes)), dtype)
    }

    /// The forward saves them as it mixes them.
    fn backward_reads_input(&self) -> bool {
        false
    }

    fn composed(&self, args: Args<&Tensor>) -> Result<Composed> {
        let (planes, logits) = (self.planes(args.x)?, argument(self, args.bias)?);
        let (y, batch) = self.of_planes(&planes, args.weight, logits)?;
        let statistics = match batch {
            Some([mean, var]) => Some(composed::Statistics {
                std: (&var + self.eps)?.sqrt()?,
                mean,
                var,
            }),
            None => None,
        };
        Ok(Composed { y, statistics })
    }

    /// As `docs/math.md` derives them.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>> {
        let (planes, logits) = (self.planes(args.x)?, argument(self, args.bias)?);
        let terms = self.terms(&planes)?;
        let (mixed, mixing_weights) = self.mixed(&terms, logits)?;
        let [dscale, dshift] = [0, 1].map(|i| dy.narrow(0, i, 1)?.reshape(self.dims()));
        let dshift = dshift?;
        let inv_std = (&mixed[1] + self.eps)?.sqrt()?.recip()?;
        let dscale =
            (dscale? + (&dshift * self.distance(&planes, &terms, &mixing_weights[0])?)?)?;
        let (mut scale, mut dinv_std) = (inv_std.clone(), dscale.clone());
        if let Some(weight) = args.weight {
            let weight = self.row(weight, scale.dtype())?;
            scale = scale.broadcast_mul(&weight)?;
            dinv_std = dinv_std.broadcast_mul(&weight)?;
        }
        let cubed = (inv_std.sqr()? * &inv_std)?;
        let grads = [(dshift * scale)?.neg()?, ((dinv_std * cubed)? * -0.5)?];
        let mixed_terms = self.mixed_terms(&terms);
        let mut dlogits = vec![];
        for i in [0, 1] {
            for (k, term) in mixed_terms.iter().enumerate() {
                let away = term[i].broadcast_sub(&mixed[i])?;
                let along = (&grads[i] * away)?.sum_all()?;
                dlogits.push(mixing_weights[i].narrow(0, k, 1)?.broadcast_mul(&along)?);
            }
        }
        // The gradients of the mean and the variance of the term at `place`, on the planes of a
        // union along `axis`.
        let factors = self.factors();
        let through = |place: usize, axis: usize, term: &[Tensor; 2], factor: f64| {
            let count = grads[0].dims()[axis] as f64;
            let sum = |i: usize| {
                let share = mixing_weights[i].narrow(0, place, 1)?.unsqueeze(0)?;
                grads[i].sum_keepdim(axis)?.broadcast_mul(&share)? / count
            };
            let (dmean, dvar) = (sum(0)?, (sum(1)? * factor)?);
            let away = planes.mean.broadcast_sub(&term[0])?;
            let dmean = (away * 2.)?.broadcast_mul(&dvar)?.broadcast_add(&dmean)?;
            Ok::<_, candle_core::Error>([dmean, dvar.broadcast_as(self.dims())?])
        };
        let layer = usize::from(self.instance);
        let [mut dmean, mut dvar] = through(layer, 1, &terms.layer, factors.layer)?;
        if let (Batch::Own, Some(batch)) = (&self.batch, &terms.batch) {
            let [m, v] = through(layer + 1, 0, batch, factors.batch)?;
            (dmean, dvar) = ((dmean + m)?, (dvar + v)?);
        }
        if self.instance {
            let own = |i: usize| {
                let share = mixing_weights[i].narrow(0, 0, 1)?.unsqueeze(0)?;
                grads[i].broadcast_mul(&share)
            };
            (dmean, dvar) = ((dmean + own(0)?)?, (dvar + own(1)?)?);
        }
        Ok(Gradients {
            dx: Tensor::stack(&[dmean, (dvar * factors.plane)?], 0)?,
            dweight: Some((dscale * inv_std)?.sum(0)?),
            dbias: Some(Tensor::cat(&dlogits, 0)?),
        })
    }
}

/// `t` with zeros in place of what is not finite.
pub(crate) fn finite(t: Tensor) -> Result<Tensor> {
    let finite = t.abs()?.lt(f64::INFINITY)?;
    finite.where_cond(&t, &t.zeros_like()?)
}

/// The softmax of all elements of a vector.
pub(crate) fn softmax(t: &Tensor) -> Result<Tensor> {
    let e = t.broadcast_sub(&t.detach().max(0)?)?.exp()?;
    e.broadcast_div(&e.sum_all()?)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::computations::ScaleShift;

    const AXES: ChannelAxes = ChannelAxes {
        outer: 3,
        channels: 4,
        inner: 5,
    };
    const PLANES: usize = 12;

    fn random(dims: &[usize]) -> Result<Var> {
        Var::rand(0.5, 2., dims, &Device::Cpu)
    }

    /// Checks the gradients of a computation against those of candle through its composed form.
    fn check(computation: &impl Computation, vars: [&Var; 3], dy: &Tensor) -> Result<()> {
        let args = Args {
            x: vars[0].as_tensor(),
            weight: Some(vars[1].as_tensor()),
            bias: Some(vars[2].as_tensor()),
        };
        let y = computation.composed(args)?.y;
        assert_eq!(y.shape(), &computation.output(args.x.shape(), DType::F64).0);
        let grads = (y * dy)?.sum_all()?.backward()?;
        let got = computation.composed_gradients(args, dy)?;
        let got = [Some(got.dx), got.dweight, got.dbias];
        for (var, got) in vars.into_iter().zip(got) {
            let want = grads.get(var).expect("a gradient");
            let got = got.expect("a gradient").reshape(want.shape())?;
            let off = (got - want)?.abs()?.max_all()?.to_scalar::<f64>()?;
            let scale = want.abs()?.max_all()?.to_scalar::<f64>()?;
            assert!(off <= 1e-13 * (1. + scale), "{computation:?}: {off:e}");
        }
        Ok(())
    }

    #[test]
    fn gradients_of_mixtures_are_those_of_the_composed_form() -> Result<()> {
        let given = || -> Result<Batch> {
            Ok(Batch::Given {
                mean: random(&[4])?.as_detached_tensor(),
                var: random(&[4])?.as_detached_tensor(),
            })
        };
        for (instance, unbiased) in [(true, true), (true, false), (false, true), (false, false)] {
            for batch in [Batch::Absent, Batch::Own, given()?] {
                let mixture = Mixture {
                    layer: "test",
                    axes: AXES,
                    instance,
                    batch,
                    unbiased,
                    eps: 0.1,
                };
                let logits = random(&[2 * mixture.sources()])?;
                let vars = [&random(&[2, PLANES])?, &random(&[4])?, &logits];
                // No gradient reaches the third row.
                let dy = random(&[3, PLANES])?.as_detached_tensor();
                check(&mixture, vars, &dy)?;
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_of_scale_and_shift_are_those_of_the_composed_form() -> Result<()> {
        let scale_shift = ScaleShift {
            layer: "test",
            axes: AXES,
        };
        let vars = [&random(&[3, 4, 5])?, &random(&[3, PLANES])?, &random(&[4])?];
        let dy = random(&[3, 4, 5])?.as_detached_tensor();
        check(&scale_shift, vars, &dy)
    }
}
