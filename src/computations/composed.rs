//! The composed path: candle's tensor operations, on every device, differentiable to any order.
//!
//! Two shapes of work serve all layers. *Rows* `[rows, len]` are standardized one by one; then a
//! parameter per channel scales and shifts `[outer, channels, inner]`.
//!
//! candle adds up in the element's dtype and, off the last axis or without vector instructions, one
//! element after the other. A chain of a few thousand `f32` additions already costs more than the
//! tolerance of the contract. So an axis that is summed, here or in candle's own backward of a
//! broadcast, is first split into axes of about [`BLOCK`], which are summed, or broadcast, one at a
//! time.

use candle_core::{DType, Result, Tensor};

use super::Gradients;

/// The longest chain of additions, on axes of up to `BLOCK³`.
const BLOCK: usize = 32;

/// The dtype that sums and products are formed in: `f32` for half precision, else the input's.
pub(crate) fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        d => d,
    }
}

/// ε as the accumulator holds it: an ε that would round to zero there becomes its smallest normal
/// number, so that a constant row stays finite.
pub(crate) fn eps_in(dtype: DType, eps: f64) -> f64 {
    match dtype {
        DType::F64 => eps.max(f64::MIN_POSITIVE),
        _ => eps.max(f32::MIN_POSITIVE as f64),
    }
}

/// The most axes that one axis is split into: candle's tensors have eight at the most, and two axes
/// may be split at once.
const FACTORS: usize = 3;

/// `n` as a product of at most [`FACTORS`] factors of at most `block`, if it is one.
fn factors(n: usize, block: usize) -> Option<Vec<usize>> {
    let mut rest = n;
    let mut found = vec![];
    while rest > block {
        let d = (2..=block).rev().find(|d| rest.is_multiple_of(*d))?;
        found.push(d);
        rest /= d;
    }
    found.push(rest);
    found.reverse();
    (found.len() <= FACTORS).then_some(found)
}

/// The length of the first of the parts that an axis of `n` is cut into, and its factors: all of it
/// where `n` factors, else the longest part that does. Beyond 32³ the blocks grow, so that three
/// factors are enough.
fn first_part(n: usize) -> (usize, Vec<usize>) {
    let block = BLOCK.max((n as f64).cbrt().ceil() as usize);
    if let Some(factors) = factors(n, block) {
        return (n, factors);
    }
    if n < block * block {
        (n / block * block, vec![n / block, block])
    } else {
        let square = block * block;
        (n / square * square, vec![n / square, block, block])
    }
}

/// Broadcasts `t` to `dims` one axis at a time, outermost first, so that the backward sums one axis
/// at a time, innermost first.
fn broadcast_by_axis(t: &Tensor, dims: &[usize]) -> Result<Tensor> {
    let mut t = t.clone();
    for (axis, &size) in dims.iter().enumerate() {
        if t.dims()[axis] != size {
            let mut grown = t.dims().to_vec();
            grown[axis] = size;
            t = t.broadcast_as(grown)?;
        }
    }
    Ok(t)
}

/// A tensor `[rows, len]` cut along `len` into parts `[rows, f₁, …, fₖ]` of small factors.
pub(crate) struct Rows {
    parts: Vec<Tensor>,
    rows: usize,
    len: usize,
}

impl Rows {
    /// `x` is contiguous, of shape `[rows, len]`, without zero-sized axes.
    pub(crate) fn new(x: &Tensor) -> Result<Self> {
        let (rows, len) = x.dims2()?;
        let mut parts = vec![];
        let mut start = 0;
        while start < len {
            let (part, factors) = first_part(len - start);
            let mut dims = vec![rows];
            dims.extend(factors);
            parts.push(x.narrow(1, start, part)?.reshape(dims)?);
            start += part;
        }
        Ok(Self { parts, rows, len })
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let parts = self.parts.iter().map(f).collect::<Result<_>>()?;
        Ok(Self { parts, ..*self })
    }

    /// `f` on every part and on a value per row `[rows]`, broadcast to the part.
    fn with_row_value(
        &self,
        value: &Tensor,
        f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        self.map(|part| {
            let mut column = vec![1; part.rank()];
            column[0] = self.rows;
            f(
                part,
                &broadcast_by_axis(&value.reshape(column)?, part.dims())?,
            )
        })
    }

    pub(crate) fn minus(&self, value: &Tensor) -> Result<Self> {
        self.with_row_value(value, |part, v| part - v)
    }

    pub(crate) fn times(&self, value: &Tensor) -> Result<Self> {
        self.with_row_value(value, |part, v| part * v)
    }

    pub(crate) fn sqr(&self) -> Result<Self> {
        self.map(Tensor::sqr)
    }

    /// `f` on every part of both.
    fn with(&self, other: &Self, f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let pairs = self.parts.iter().zip(&other.parts);
        let parts = pairs.map(|(a, b)| f(a, b)).collect::<Result<_>>()?;
        Ok(Self { parts, ..*self })
    }

    /// The sum of each row, `[rows]`.
    pub(crate) fn sum(&self) -> Result<Tensor> {
        let sum = |part: &Tensor| -> Result<Tensor> {
            let mut sum = part.clone();
            while sum.rank() > 1 {
                sum = sum.sum(sum.rank() - 1)?;
            }
            Ok(sum)
        };
        let (first, rest) = (sum(&self.parts[0])?, &self.parts[1..]);
        rest.iter()
            .try_fold(first, |total, part| total + sum(part)?)
    }

    /// The mean of each row, `[rows]`.
    pub(crate) fn mean(&self) -> Result<Tensor> {
        self.sum()? / self.len as f64
    }

    /// Back to one tensor `[rows, len]`.
    pub(crate) fn join(&self) -> Result<Tensor> {
        let flat = self
            .parts
            .iter()
            .map(|part| part.reshape((self.rows, ())))
            .collect::<Result<Vec<_>>>()?;
        match flat.as_slice() {
            [whole] => Ok(whole.clone()),
            _ => Tensor::cat(&flat, 1),
        }
    }

    /// The rows less their means, and the means `[rows]` as two parts, of which the second is what
    /// the first was rounded by.
    ///
    /// A mean of 3000 σ rounded to `f32` is wrong by 2·10⁻⁴ σ. So the rows are shifted by a first
    /// mean, which is exact for values near it, and what is left of the mean is taken off after
    /// that. The first mean is itself formed from differences to the row's first element: a
    /// constant row is then exactly zero.
    fn centered(&self, x: &Tensor) -> Result<(Self, [Tensor; 2])> {
        let first = x.detach().narrow(1, 0, 1)?.flatten_all()?;
        let detached = self.map(|part| Ok(part.detach()))?;
        let shift = (&first + detached.minus(&first)?.mean()?)?;
        let shifted = self.minus(&shift)?;
        let rest = shifted.mean()?;
        Ok((shifted.minus(&rest)?, [shift, rest]))
    }
}

/// The statistics of rows, connected to the graph, `[rows]` each.
#[derive(Debug, Clone)]
pub(crate) struct Statistics {
    /// Zero where rows are not centered.
    pub(crate) mean: Tensor,
    /// Biased; the mean square where rows are not centered.
    pub(crate) var: Tensor,
    /// `√(var + eps)`.
    pub(crate) std: Tensor,
}

/// Rows of mean 0 and variance 1, and the statistics that they were divided by.
pub(crate) struct Standardized {
    /// `[rows, len]`.
    pub(crate) y: Tensor,
    pub(crate) statistics: Statistics,
    /// `[rows]`
    inv_std: Tensor,
}

/// The rows of `x`, contiguous, `[rows, len]`, in the accumulator's dtype, less their means; the
/// means, and the biased variances, both `[rows]` and connected to the graph. Without `center`, the
/// means are 0 and the variances mean squares.
fn moments(x: &Tensor, center: bool) -> Result<(Rows, Tensor, Tensor)> {
    let rows = Rows::new(x)?;
    let (centered, mean) = if center {
        let (centered, [shift, rest]) = rows.centered(x)?;
        (centered, (shift + rest)?)
    } else {
        let zero = Tensor::zeros(rows.rows, x.dtype(), x.device())?;
        (rows, zero)
    };
    let var = centered.sqr()?.mean()?;
    Ok((centered, mean, var))
}

/// The rows of `x`, contiguous, `[rows, len]`, in the accumulator's dtype, less their means, and
/// the two parts of the means; without `center` the rows as they are, and no parts.
pub(crate) fn centered(x: &Tensor, center: bool) -> Result<(Rows, Vec<Tensor>)> {
    let rows = Rows::new(x)?;
    if !center {
        return Ok((rows, vec![]));
    }
    let (centered, parts) = rows.centered(x)?;
    Ok((centered, parts.to_vec()))
}

fn std(var: &Tensor, eps: f64) -> Result<Tensor> {
    (var + eps_in(var.dtype(), eps))?.sqrt()
}

/// μ and σ², biased, of each row of `x`, contiguous, `[rows, len]`, connected to the graph:
/// `[rows]` each.
pub(crate) fn mean_and_var(x: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, mean, var) = moments(x, true)?;
    Ok((mean, var))
}

/// μ and `√(σ² + ε)` of each row of `x`, as [`standardize`] has them, connected to the graph:
/// `[rows]` each.
pub(crate) fn mean_and_std(x: &Tensor, eps: f64) -> Result<[Tensor; 2]> {
    let (_, mean, var) = moments(x, true)?;
    Ok([mean, std(&var, eps)?])
}

/// `(x − μ) / √(σ² + ε)` for each row of `x`, contiguous, `[rows, len]`, in the accumulator's
/// dtype; without `center`, μ is 0 and σ² the mean square.
pub(crate) fn standardize(x: &Tensor, center: bool, eps: f64) -> Result<Standardized> {
    let (centered, mean, var) = moments(x, center)?;
    let std = std(&var, eps)?;
    let inv_std = std.recip()?;
    Ok(Standardized {
        y: centered.times(&inv_std)?.join()?,
        statistics: Statistics { mean, var, std },
        inv_std,
    })
}

/// `x · weight + bias` with one value of each per channel; `x` is contiguous, `[outer, channels,
/// inner]`, the parameters `[channels]` in the dtype of `x`.
pub(crate) fn scale_shift(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if weight.is_none() && bias.is_none() {
        return Ok(x.clone());
    }
    let (outer, channels, inner) = x.dims3()?;
    let (outer_part, outer_factors) = first_part(outer);
    let (inner_part, inner_factors) = first_part(inner);
    for (axis, size, part) in [(0, outer, outer_part), (2, inner, inner_part)] {
        if part < size {
            let head = x.narrow(axis, 0, part)?.contiguous()?;
            let tail = x.narrow(axis, part, size - part)?.contiguous()?;
            let parts = [
                scale_shift(&head, weight, bias)?,
                scale_shift(&tail, weight, bias)?,
            ];
            return Tensor::cat(&parts, axis);
        }
    }
    let dims = [&outer_factors[..], &[channels], &inner_factors[..]].concat();
    let mut line = vec![1; dims.len()];
    line[outer_factors.len()] = channels;
    let expand = |p: &Tensor| broadcast_by_axis(&p.reshape(line.as_slice())?, &dims);
    let mut y = x.reshape(dims.as_slice())?;
    if let Some(weight) = weight {
        y = (y * expand(weight)?)?;
    }
    if let Some(bias) = bias {
        y = (y + expand(bias)?)?;
    }
    y.reshape((outer, channels, inner))
}

/// How weights lie along a tensor `[a, b, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Along {
    /// `[b]`.
    Middle,
    /// `[a, c]`.
    Ends,
    /// `[a, b, c]`.
    All,
}

#[cfg(feature = "internals")]
impl Along {
    /// How many weights there are.
    pub(crate) fn count(self, [a, b, c]: [usize; 3]) -> usize {
        match self {
            Self::Middle => b,
            Self::Ends => a * c,
            Self::All => a * b * c,
        }
    }

    /// Index of the weight of an element.
    pub(crate) fn of(self, [_, b, c]: [usize; 3], element: usize) -> usize {
        match self {
            Self::Middle => element / c % b,
            Self::Ends => element / (b * c) * c + element % c,
            Self::All => element,
        }
    }
}

/// `x · weight + bias`; `x` is contiguous, `[a, b, c]`, the parameters lie along it in the dtype of
/// `x`.
pub(crate) fn affine(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    along: Along,
) -> Result<Tensor> {
    let (a, b, c) = x.dims3()?;
    if along == Along::Middle {
        return scale_shift(x, weight, bias);
    }
    let (part, factors) = first_part(b);
    if along == Along::Ends && part < b {
        let cut = |from, len| -> Result<Tensor> {
            let x = x.narrow(1, from, len)?.contiguous()?;
            affine(&x, weight, bias, along)
        };
        return Tensor::cat(&[cut(0, part)?, cut(part, b - part)?], 1);
    }
    let (dims, lines) = match along {
        Along::Ends => {
            let ones = vec![1; factors.len()];
            (
                [&[a], &factors[..], &[c]].concat(),
                [&[a], &ones[..], &[c]].concat(),
            )
        }
        _ => (vec![a, b, c], vec![a, b, c]),
    };
    let expand = |p: &Tensor| broadcast_by_axis(&p.reshape(lines.as_slice())?, &dims);
    let mut y = x.reshape(dims.as_slice())?;
    if let Some(weight) = weight {
        y = (y * expand(weight)?)?;
    }
    if let Some(bias) = bias {
        y = (y + expand(bias)?)?;
    }
    y.reshape((a, b, c))
}

/// The sums of `x` `[a, b, c]` over what weights are broadcast along.
pub(crate) fn summed(x: Tensor, along: Along) -> Result<Tensor> {
    match along {
        Along::Middle => x.sum(2)?.sum(0),
        Along::Ends => x.sum(1),
        Along::All => Ok(x),
    }
}

/// The softmax of each row of `x`, contiguous, `[rows, len]`, in the accumulator's dtype.
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    // What is taken off from every element of a row changes nothing, so that no gradient goes
    // through it.
    let highest = x.detach().max(1)?;
    let exp = Rows::new(x)?.minus(&highest)?.map(Tensor::exp)?;
    exp.times(&exp.sum()?.recip()?)?.join()
}

/// The logarithm of [`softmax`].
pub(crate) fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let highest = x.detach().max(1)?;
    let rows = Rows::new(x)?.minus(&highest)?;
    let sum = rows.map(Tensor::exp)?.sum()?.log()?;
    rows.minus(&sum)?.join()
}

/// The gradients of [`standardize`] and [`scale_shift`] together: of the rows `x` `[rows, len]`,
/// and of one weight and bias for each channel of `dy` `[outer, channels, inner]`, the same
/// elements in the same order.
pub(crate) fn backward(
    x: &Tensor,
    dy: &Tensor,
    weight: Option<&Tensor>,
    center: bool,
    eps: f64,
) -> Result<Gradients<Tensor>> {
    let standardized = standardize(&x.contiguous()?, center, eps)?;
    let y = &standardized.y;
    let per_channel = |t: Tensor| t.sum(2)?.sum(0);
    let dbias = per_channel(dy.clone())?;
    let dweight = per_channel((dy * y.reshape(dy.shape())?)?)?;
    let g = scale_shift(&dy.contiguous()?, weight, None)?.reshape(x.shape())?;
    Ok(Gradients {
        dx: through(&standardized, &g, center)?,
        dweight: Some(dweight),
        dbias: Some(dbias),
    })
}

/// The gradient of the rows that were [standardized](standardize) from `g`, that of their values.
pub(crate) fn through(standardized: &Standardized, g: &Tensor, center: bool) -> Result<Tensor> {
    let Standardized { y, inv_std, .. } = standardized;
    let (g, y) = (Rows::new(g)?, Rows::new(y)?);
    let along = g.with(&y, |g, y| g * y)?.mean()?;
    let mut dx = g.with(&y.times(&along)?, |g, y| g - y)?;
    if center {
        dx = dx.minus(&g.mean()?)?;
    }
    dx.times(inv_std)?.join()
}

/// The affine pair as the arithmetic takes it: contiguous and in the accumulator's dtype.
pub(crate) fn parameters(
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    acc: DType,
) -> Result<[Option<Tensor>; 2]> {
    let prepare = |p: Option<&Tensor>| p.map(|p| kept(p)?.to_dtype(acc)).transpose();
    Ok([prepare(weight)?, prepare(bias)?])
}

/// The input `x`, contiguous, in memory that it does not share with a variable that may be set
/// before the backward.
pub(crate) fn unshared(x: &Tensor) -> Result<Tensor> {
    match x.is_variable() {
        true => x.force_contiguous(),
        false => x.contiguous(),
    }
}

/// A parameter, contiguous, as the backward is to find it: a step of an optimizer, in this thread
/// or another, may come before.
pub(crate) fn kept(param: &Tensor) -> Result<Tensor> {
    match param.track_op() {
        true => param.force_contiguous(),
        false => param.contiguous(),
    }
}

/// The result of any layer on an input without elements: as empty as the input.
pub(crate) fn empty(x: &Tensor, params: &[Option<&Tensor>]) -> Result<Tensor> {
    let params: Vec<&Tensor> = params.iter().flatten().copied().collect();
    anchored(&x.contiguous()?, &params)
}

/// `y`, connected to parameters that it does not depend on, so that they get gradients of zero.
///
/// candle leaves out of the graph what it computes on tensors without elements, and what it
/// multiplies by zero; joining and cutting off again is neither.
pub(crate) fn anchored(y: &Tensor, params: &[&Tensor]) -> Result<Tensor> {
    let mut line = vec![y.flatten_all()?];
    for param in params {
        line.push(param.flatten_all()?.to_dtype(y.dtype())?);
    }
    Tensor::cat(&line, 0)?
        .narrow(0, 0, y.elem_count())?
        .contiguous()?
        .reshape(y.shape())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn parts_cover_every_length_in_few_small_factors() {
        let ragged = [65_537, 588_245, 5_764_801, 1 << 24, (1 << 24) + 43, 1 << 30];
        for n in (1..5000).chain(ragged) {
            let block = BLOCK.max((n as f64).cbrt().ceil() as usize);
            let mut rest = n;
            let mut parts = 0;
            while rest > 0 {
                let (len, factors) = first_part(rest);
                assert!(len >= 1 && len <= rest, "{n}");
                assert_eq!(factors.iter().product::<usize>(), len, "{n}");
                assert!(factors.len() <= FACTORS, "{n}: {factors:?}");
                assert!(factors.iter().all(|&f| f <= block), "{n}: {factors:?}");
                rest -= len;
                parts += 1;
            }
            assert!(parts <= 6, "{n} needs {parts} parts");
        }
    }

    #[test]
    fn rows_join_to_what_they_were_cut_from() -> Result<()> {
        for len in [1, 2, 31, 32, 33, 37, 49, 100, 1031, 4099] {
            let x = Tensor::arange(0f32, 3. * len as f32, &Device::Cpu)?.reshape((3, len))?;
            let back = Rows::new(&x)?.join()?;
            assert_eq!(back.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
        }
        Ok(())
    }
}
