//! Statistics of channels over the batches of all ranks of a group: synchronized batch norm.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Result, Tensor};

use super::channels::Channels;
use super::{Args, Composed, Gradients, composed};
use crate::collective::{Call, Collective, VOTE, agreed, vote};
use candle_norm_support::host;

/// A tensor of sums over the ranks of a group, `[n]` in `f64` on the CPU: the first argument is
/// what this rank contributed, the second the sums. The gradient of the contribution is the sum
/// over all ranks of their gradients of the result.
pub(crate) type SumNode = fn(&Tensor, Vec<f64>, &RankSum) -> Result<Tensor>;

/// A sum over the ranks of a group, as a tensor of the graph.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SumNodes {
    /// That the host has formed.
    pub(crate) formed: SumNode,
    /// That the node forms itself, in the memory of the device, `[n]` in `f64` there: by the first
    /// name forward, by the second backward.
    pub(crate) in_place: fn(&Tensor, [&RankSum; 2]) -> Result<Tensor>,
}

/// A sum over the ranks of a group, by the name that its calls have.
#[derive(Debug, Clone)]
pub(crate) struct RankSum {
    pub(crate) group: Arc<dyn Collective>,
    pub(crate) name: &'static str,
}

impl RankSum {
    /// The sums of `values` over all ranks, element by element.
    pub(crate) fn of(&self, mut values: Vec<f64>) -> Result<Vec<f64>> {
        let call = Call::new(self.name);
        self.group.all_reduce_sum(&call, &mut values)?;
        Ok(values)
    }
}

/// The moments of a channel on one rank.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalMoments {
    /// Zero where the mean is not subtracted.
    pub(crate) mean: f64,
    /// Rounding error of the mean.
    pub(crate) mean_error: f64,
    /// Sum of the squared distances from the mean.
    pub(crate) m2: f64,
}

/// The mean and the biased variance of a channel over all ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JointMoments {
    pub(crate) mean: f64,
    /// Rounding error of the mean.
    pub(crate) mean_error: f64,
    pub(crate) var: f64,
}

/// The group whose ranks form the statistics of one forward together.
///
/// Two sums over ranks: first the number of values and Σ x, then Σ (x − mean)² about the mean that
/// follows, and Σ (x − mean), by which the mean is corrected. Without a mean, the first has Σ x²,
/// and there is no second. All ranks compute the statistics from the same sums, so that they have
/// the same bits. The backward has one sum, of Σ dy · x̂ and Σ dy.
#[derive(Debug)]
pub(crate) struct Synchronized {
    layer: &'static str,
    pub(crate) group: Arc<dyn Collective>,
    /// Subtract the mean.
    pub(crate) center: bool,
    nodes: SumNodes,
    /// The number of values of a channel on all ranks, from the first sum on.
    count: OnceLock<f64>,
}

impl Synchronized {
    pub(crate) fn new(
        layer: &'static str,
        group: Arc<dyn Collective>,
        center: bool,
        nodes: SumNodes,
    ) -> Self {
        Self {
            layer,
            group,
            center,
            nodes,
            count: OnceLock::new(),
        }
    }

    /// The number of values of a channel on all ranks; zero before the forward.
    pub(crate) fn count(&self) -> f64 {
        self.count.get().copied().unwrap_or(0.)
    }

    fn sum(&self, name: &'static str) -> RankSum {
        RankSum {
            group: self.group.clone(),
            name,
        }
    }

    /// The first sum: the number of values of a channel, and `sums` of `channels`. A rank that
    /// failed says so in it, and every rank returns an error.
    fn first(&self, failed: bool, count: f64, sums: Vec<f64>) -> Result<Vec<f64>> {
        let head = vote(self.group.rank(), failed);
        let mut values = head.to_vec();
        values.push(count);
        values.extend(sums);
        let all = self.sum("norm.sums").of(values)?;
        if let [failed, rank, count, sums @ ..] = all.as_slice() {
            agreed(self.layer, [*failed, *rank])?;
            let _ = self.count.set(*count);
            return Ok(sums.to_vec());
        }
        Ok(all[VOTE..].to_vec())
    }

    /// Says to the other ranks, which are in their first sum of the statistics of `x`, that this
    /// one failed.
    pub(crate) fn fail(&self, x: &Tensor, channels: usize) -> Result<()> {
        match self.is_in_place(x) {
            // The sums of the channels come after the votes.
            true => self.fail_on_host(0),
            false => self.fail_on_host(channels),
        }
    }

    /// The same, where the host forms the sums.
    pub(crate) fn fail_on_host(&self, channels: usize) -> Result<()> {
        self.first(true, 0., vec![0.; channels]).map(drop)
    }

    /// The statistics over all ranks, from the moments of the `count` values of each channel here.
    pub(crate) fn joint(&self, count: f64, local: &[LocalMoments]) -> Result<Vec<JointMoments>> {
        let of_values = |value: f64| if count == 0. { 0. } else { value };
        let sum = |m: &LocalMoments| match self.center {
            true => of_values(count * (m.mean + m.mean_error)),
            false => of_values(m.m2),
        };
        let sums = self.first(false, count, local.iter().map(sum).collect())?;
        let total = self.count();
        if !self.center || total == 0. {
            let joint = sums.into_iter().map(|m2| JointMoments {
                mean: 0.,
                mean_error: 0.,
                var: if total == 0. { 0. } else { m2 / total },
            });
            return Ok(joint.collect());
        }
        let means: Vec<f64> = sums.into_iter().map(|sum| sum / total).collect();
        let (mut away, mut squares) = (vec![], vec![]);
        for (m, mean) in local.iter().zip(&means) {
            let distance = (m.mean - mean) + m.mean_error;
            away.push(of_values(count * distance));
            squares.push(of_values(m.m2 + count * distance * distance));
        }
        let both = self.sum("norm.squares").of([away, squares].concat())?;
        let (away, squares) = both.split_at(means.len());
        let joint = means.iter().zip(away).zip(squares);
        Ok(joint
            .map(|((mean, away), squares)| corrected(*mean, *away, *squares, total))
            .collect())
    }

    /// The means over all values of all ranks of Σ dy · x̂ and Σ dy; the second is zero where the
    /// mean is not subtracted.
    pub(crate) fn means(&self, along: &[f64], sum: &[f64]) -> Result<Vec<[f64; 2]>> {
        let both = self.sum("norm.backward").of([along, sum].concat())?;
        let (along, sum) = both.split_at(along.len());
        let total = self.count().max(1.);
        let mean = |sum: f64| if self.center { sum / total } else { 0. };
        let means = along.iter().zip(sum);
        Ok(means.map(|(a, s)| [a / total, mean(*s)]).collect())
    }

    /// Whether the group forms sums in the memory of devices.
    #[cfg_attr(not(any(feature = "cuda", feature = "internals")), allow(dead_code))]
    pub(crate) fn sums_on_devices(&self) -> bool {
        self.group.device_sums().is_some()
    }

    /// Whether sums are formed where the values of `x` are.
    fn is_in_place(&self, x: &Tensor) -> bool {
        let sums = self.group.device_sums();
        sums.is_some_and(|sums| sums.serves(x.device().location()))
    }

    /// In `f64`, where the sums are formed.
    fn wide(&self, t: &Tensor) -> Result<Tensor> {
        match self.is_in_place(t) {
            true => t.to_dtype(DType::F64),
            false => wide(t),
        }
    }

    /// The first sums of what this rank `contributed`: the host sums the votes and the counts.
    fn first_in_place(&self, contributed: &Tensor, count: f64, first: &First) -> Result<Tensor> {
        let name = match first {
            First::Forward => {
                self.first(false, count, vec![])?;
                "norm.sums"
            }
            First::Again => "norm.sums_again",
        };
        let names = [&self.sum(name), &self.sum("norm.sums_backward")];
        (self.nodes.in_place)(contributed, names)
    }

    /// The sums of `off`, as constants, and those of `squares`.
    fn second_in_place(&self, off: &Tensor, squares: &Tensor) -> Result<(Tensor, Tensor)> {
        let both = Tensor::cat(&[&off.detach(), squares], 0)?;
        let both = {
            let names = [
                &self.sum("norm.squares"),
                &self.sum("norm.squares_backward"),
            ];
            (self.nodes.in_place)(&both, names)?
        };
        let channels = off.elem_count();
        let sums = both.narrow(0, 0, channels)?.detach();
        Ok((sums, both.narrow(0, channels, channels)?))
    }

    /// The same, formed by the host.
    fn second(&self, off: &Tensor, squares: &Tensor) -> Result<(Tensor, Tensor)> {
        let host = |t: &Tensor| host::vector::<f64>(&t.detach());
        let mut both = self
            .sum("norm.squares")
            .of([host(off)?, host(squares)?].concat())?;
        let squares_of_all = both.split_off(off.elem_count());
        let backward = self.sum("norm.squares_backward");
        let squares = (self.nodes.formed)(squares, squares_of_all, &backward)?;
        Ok((Tensor::new(both, &Device::Cpu)?, squares))
    }

    /// [`joint`](Self::joint) of the mean, what it was rounded by, and the biased variance of each
    /// channel here, as tensors of any device outside of the graph: the same of all ranks, and `1 /
    /// √(var + eps)`, in `f64` on that device.
    #[cfg_attr(not(any(feature = "cuda", feature = "internals")), allow(dead_code))]
    pub(crate) fn joint_tensors(
        &self,
        count: f64,
        local: [&Tensor; 3],
        eps: f64,
    ) -> Result<[Tensor; 4]> {
        let device = local[0].device();
        let [means, errors, vars] = local.map(|t| host::vector::<f64>(&wide(t)?));
        let moments = means?.into_iter().zip(errors?).zip(vars?);
        let moments = moments.map(|((mean, mean_error), var)| LocalMoments {
            mean,
            mean_error,
            m2: var * count,
        });
        let joint = self.joint(count, &moments.collect::<Vec<_>>())?;
        let column = |of: fn(&JointMoments, f64) -> f64| {
            let values: Vec<f64> = joint.iter().map(|m| of(m, eps)).collect();
            Tensor::new(values, device)
        };
        Ok([
            column(|m, _| m.mean)?,
            column(|m, _| m.mean_error)?,
            column(|m, _| m.var)?,
            column(|m, eps| 1. / (m.var + eps).sqrt())?,
        ])
    }

    /// [`means`](Self::means) of tensors of any device outside of the graph, in `f64` on that
    /// device.
    #[cfg_attr(not(any(feature = "cuda", feature = "internals")), allow(dead_code))]
    pub(crate) fn mean_tensors(&self, along: &Tensor, sum: &Tensor) -> Result<[Tensor; 2]> {
        let [of_along, of_sum] = [along, sum].map(|t| host::vector::<f64>(&wide(t)?));
        let means = self.means(&of_along?, &of_sum?)?;
        let column = |i: usize| {
            let values: Vec<f64> = means.iter().map(|m| m[i]).collect();
            Tensor::new(values, along.device())
        };
        Ok([column(0)?, column(1)?])
    }

    /// The input by channel, and the statistics of all ranks, as tensors of the graph.
    fn normalized(&self, channels: &Channels, x: &Tensor, first: First) -> Result<Normalized> {
        let count = channels.values_per_channel();
        let (mut rows, mut local) = (None, None);
        if count > 0. {
            let by_channel = channels.by_channel(x)?;
            let (centered, parts) = composed::centered(&by_channel, self.center)?;
            let mean = match parts.as_slice() {
                [shift, rest] => Some([self.wide(shift)?, self.wide(rest)?]),
                _ => None,
            };
            let m2 = (self.wide(&centered.sqr()?.mean()?)? * count)?;
            local = Some(LocalTensors { mean, m2 });
            rows = Some(centered);
        }
        let shape = Local {
            count,
            channels: channels.axes.channels,
            x,
            in_place: self.is_in_place(x),
        };
        let joint = self.over_ranks(shape, local, first)?;
        Ok(Normalized { x: rows, joint })
    }

    /// The statistics of all ranks from those of this one, if it has values, as tensors of the
    /// graph.
    pub(crate) fn over_ranks(
        &self,
        shape: Local,
        local: Option<LocalTensors>,
        first: First,
    ) -> Result<JointTensors> {
        let Local {
            count,
            channels,
            x,
            in_place,
        } = shape;
        let none = || {
            let x = match in_place {
                true => x.to_dtype(DType::F64)?,
                false => wide(x)?,
            };
            let zero = Tensor::zeros(channels, DType::F64, x.device())?;
            composed::anchored(&zero, &[&x])
        };
        let contributed = match &local {
            Some(LocalTensors {
                mean: Some([high, low]),
                ..
            }) => ((high + low)? * count)?,
            Some(LocalTensors { mean: None, m2 }) => m2.clone(),
            None => none()?,
        };
        let sums = match in_place {
            true => self.first_in_place(&contributed, count, &first)?,
            false => {
                let sums = host::vector::<f64>(&contributed.detach())?;
                let sums = match first {
                    First::Forward => self.first(false, count, sums)?,
                    First::Again => self.sum("norm.sums_again").of(sums)?,
                };
                (self.nodes.formed)(&contributed, sums, &self.sum("norm.sums_backward"))?
            }
        };
        let total = self.count();
        if !self.center || total == 0. {
            let var = (sums / total.max(1.))?;
            return Ok(JointTensors {
                away: None,
                mean: var.zeros_like()?,
                var,
            });
        }
        let first_mean = (sums / total)?;
        let mut away = None;
        let (off, squares) = match &local {
            Some(LocalTensors {
                mean: Some([high, low]),
                m2,
            }) => {
                let distance = ((high - &first_mean)? + low)?;
                let squares = (m2 + (distance.sqr()? * count)?)?;
                let off = (&distance * count)?;
                away = Some(distance);
                (off, squares)
            }
            // Connected to the first sum, so that the backward of both comes in one order.
            _ => {
                let none = composed::anchored(&none()?, &[&first_mean])?;
                (none.clone(), none)
            }
        };
        let (off, squares) = match in_place {
            true => self.second_in_place(&off, &squares)?,
            false => self.second(&off, &squares)?,
        };
        // What the first mean was rounded by, which is no function of anything.
        let error = (off / total)?;
        let var = ((squares - (error.sqr()? * total)?)? / total)?;
        Ok(JointTensors {
            away: away.map(|away| away - &error).transpose()?,
            mean: (first_mean + error)?,
            var: var.lt(0.)?.where_cond(&var.zeros_like()?, &var)?,
        })
    }

    /// The composed form of the channels that these are the statistics of.
    pub(super) fn composed(&self, channels: &Channels, args: Args<&Tensor>) -> Result<Composed> {
        let x = composed::unshared(args.x)?;
        let acc = composed::accumulator(x.dtype());
        let [weight, bias] = composed::parameters(args.weight, args.bias, acc)?;
        let normalized = self.normalized(channels, &x, First::Forward)?;
        let (rows, inv_std) = normalized.rows(channels.eps, acc, x.device())?;
        let back = |t: &Tensor| t.to_dtype(acc)?.to_device(x.device());
        let (mean, var) = (back(&normalized.joint.mean)?, back(&normalized.joint.var)?);
        let y = match rows {
            Some(rows) => {
                let y = rows.join()?.unsqueeze(0)?;
                let y = composed::scale_shift(&y, weight.as_ref(), bias.as_ref())?;
                channels.in_order(&y.to_dtype(x.dtype())?)?
            }
            None => {
                let params = [Some(&mean), Some(&inv_std), weight.as_ref(), bias.as_ref()];
                let params: Vec<&Tensor> = params.into_iter().flatten().collect();
                composed::anchored(&x, &params)?
            }
        };
        let statistics = composed::Statistics {
            mean,
            std: inv_std.recip()?,
            var,
        };
        Ok(Composed {
            y: y.reshape(args.x.shape())?,
            statistics: Some(statistics),
        })
    }

    /// The gradients of the channels that these are the statistics of, by tensor operations;
    /// `dy_rows` has one channel in each row.
    pub(super) fn composed_gradients(
        &self,
        channels: &Channels,
        args: Args<&Tensor>,
        dy_rows: &Tensor,
    ) -> Result<Gradients<Tensor>> {
        let (x, acc) = (args.x, composed::accumulator(args.x.dtype()));
        let num_channels = channels.axes.channels;
        let normalized = self.normalized(channels, x, First::Again)?;
        let (rows, inv_std) = normalized.rows(channels.eps, acc, x.device())?;
        let (dweight, dbias) = match &rows {
            Some(rows) => {
                let along = (dy_rows * rows.join()?)?;
                let sum = |rows: &Tensor| composed::Rows::new(rows)?.sum();
                (sum(&along)?, sum(dy_rows)?)
            }
            None => {
                let zero = Tensor::zeros(num_channels, acc, x.device())?;
                let zero = composed::anchored(&zero, &[&inv_std, dy_rows])?;
                (zero.clone(), zero)
            }
        };
        let local = self.wide(&Tensor::cat(&[&dweight, &dbias], 0)?)?;
        let sum = self.sum("norm.backward");
        let sums = match self.is_in_place(x) {
            true => {
                let backward = self.sum("norm.backward_backward");
                (self.nodes.in_place)(&local, [&sum, &backward])?
            }
            false => {
                let sums = sum.of(host::vector(&local.detach())?)?;
                (self.nodes.formed)(&local, sums, &self.sum("norm.backward_backward"))?
            }
        };
        let means = (sums / self.count().max(1.))?;
        let means = means.to_dtype(acc)?.to_device(x.device())?;
        let dx = match rows {
            Some(rows) => {
                let along = means.narrow(0, 0, num_channels)?;
                let mut dx = (dy_rows - rows.times(&along)?.join()?)?;
                if self.center {
                    let mean = means.narrow(0, num_channels, num_channels)?;
                    dx = composed::Rows::new(&dx)?.minus(&mean)?.join()?;
                }
                let scale = match args.weight {
                    Some(weight) => (inv_std * weight.to_dtype(acc)?)?,
                    None => inv_std,
                };
                channels.in_order(&composed::Rows::new(&dx)?.times(&scale)?.join()?)?
            }
            None => composed::anchored(&x.to_dtype(acc)?, &[&means])?,
        };
        Ok(Gradients {
            dx,
            dweight: Some(dweight),
            dbias: Some(dbias),
        })
    }
}

/// Whether a sum is the first of a forward, which has the votes of the ranks, or formed again.
pub(crate) enum First {
    Forward,
    Again,
}

/// Values of one rank.
pub(crate) struct Local<'a> {
    /// Values of a channel.
    pub(crate) count: f64,
    pub(crate) channels: usize,
    /// To which the result is connected where it is empty.
    pub(crate) x: &'a Tensor,
    /// Sums are formed where the values of `x` are, and so are the moments.
    pub(crate) in_place: bool,
}

/// The moments of the channels on one rank, `[C]` each in `f64`, where the sums are formed.
pub(crate) struct LocalTensors {
    /// The mean, and what it was rounded by; none where it is not subtracted.
    pub(crate) mean: Option<[Tensor; 2]>,
    /// Sums of squared distances from the mean.
    pub(crate) m2: Tensor,
}

/// The statistics of all ranks, `[C]` each in `f64`, where the sums were formed.
pub(crate) struct JointTensors {
    /// The means of this rank less those of all.
    pub(crate) away: Option<Tensor>,
    pub(crate) mean: Tensor,
    /// Biased.
    pub(crate) var: Tensor,
}

/// The input by channel about the means of this rank, and the statistics of all ranks.
struct Normalized {
    /// None where this rank has no values.
    x: Option<composed::Rows>,
    joint: JointTensors,
}

impl Normalized {
    /// `x̂`, and `1 / √(var + eps)`, in the accumulator's dtype on the device of the input.
    fn rows(
        &self,
        eps: f64,
        acc: DType,
        device: &Device,
    ) -> Result<(Option<composed::Rows>, Tensor)> {
        let back = |t: &Tensor| t.to_dtype(acc)?.to_device(device);
        let inv_std = back(&(&self.joint.var + eps)?.sqrt()?.recip()?)?;
        let Some(x) = &self.x else {
            return Ok((None, inv_std));
        };
        let rows = match &self.joint.away {
            Some(away) => x.minus(&back(&away.neg()?)?)?.times(&inv_std)?,
            None => x.times(&inv_std)?,
        };
        Ok((Some(rows), inv_std))
    }
}

/// The statistics of `total` values from a first mean, and their distances and squared distances
/// from it, added up.
fn corrected(mean: f64, away: f64, squares: f64, total: f64) -> JointMoments {
    let error = away / total;
    let high = mean + error;
    let var = (squares - error * away) / total;
    JointMoments {
        mean: high,
        mean_error: (mean - high) + error,
        // Not `max`, which would make 0 of a NaN.
        var: if var < 0. { 0. } else { var },
    }
}

/// In `f64` on the CPU.
pub(crate) fn wide(t: &Tensor) -> Result<Tensor> {
    host::moved(t)?.to_dtype(DType::F64)
}
