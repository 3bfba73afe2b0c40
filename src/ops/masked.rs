//! Valid positions of padded batches.

use candle_core::{DType, Device, Result, Tensor, bail};

use super::{BatchStatistics, check};
use crate::computations::composed;
use crate::graph;
use candle_norm_support::host;

/// A mask of the valid positions of padded sequences: 1 up to each length, 0 after it.
///
/// # Shapes
/// `lengths`: `[N]`, whole numbers; the result is `[N, size]`, `u8`.
///
/// # Errors
/// Lengths that are not on one axis, floats, a length that is negative or beyond `size`.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let lengths = Tensor::new(&[2u32, 3, 0], &Device::Cpu)?;
/// let mask = candle_norm::ops::mask_of_lengths(&lengths, 3)?;
/// assert_eq!(mask.to_vec2::<u8>()?, [[1, 1, 0], [1, 1, 1], [0, 0, 0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn mask_of_lengths(lengths: &Tensor, size: usize) -> Result<Tensor> {
    let layer = "mask_of_lengths";
    if lengths.rank() != 1 || !lengths.dtype().is_int() {
        bail!(
            "{layer}: expected whole numbers of shape [N], got {:?} of shape {:?}",
            lengths.dtype(),
            lengths.dims()
        )
    }
    check::countable(layer, "a mask", &[lengths.elem_count(), size])?;
    let found = host::vector::<i64>(&lengths.to_dtype(DType::I64)?)?;
    let mut mask = Vec::with_capacity(found.len() * size);
    for length in &found {
        let Some(length) = usize::try_from(*length).ok().filter(|l| *l <= size) else {
            bail!("{layer}: expected lengths from 0 to {size}, got {length}")
        };
        mask.extend((0..size).map(|at| u8::from(at < length)));
    }
    host::tensor(mask, (found.len(), size), lengths.device())
}

/// The positions of an input `[N, C, *]` that are valid.
pub(crate) struct Mask {
    /// For each sample, the indices of its valid positions.
    valid: Vec<Vec<u32>>,
    space: usize,
}

impl Mask {
    /// The mask of `x`, checked: of its shape without the channels, whole numbers or floats; what
    /// is not zero is valid.
    pub(crate) fn of(layer: &str, x: &Tensor, mask: &Tensor) -> Result<Self> {
        check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
        let mut dims = x.dims().to_vec();
        dims.remove(1);
        if mask.dims() != dims {
            bail!(
                "{layer}: expected a mask of the input's shape without its channels, {dims:?}, got \
                {:?}",
                mask.dims()
            )
        }
        let space = dims[1..].iter().product();
        let valid = match mask.elem_count() {
            0 => vec![vec![]; dims[0]],
            _ => {
                let mask = mask.flatten_all()?.to_dtype(DType::F32)?;
                let values = host::vector::<f32>(&mask)?;
                let samples = values.chunks(space).map(|sample| {
                    let places = (0u32..).zip(sample).filter(|(_, v)| **v != 0.);
                    places.map(|(place, _)| place).collect()
                });
                samples.collect()
            }
        };
        Ok(Self { valid, space })
    }

    /// The numbers of valid positions, sample by sample.
    pub(crate) fn counts(&self) -> impl Iterator<Item = usize> {
        self.valid.iter().map(Vec::len)
    }

    /// `f` of the valid positions of `x` as rows, `[valid, C]`, and zeros elsewhere. `params` are
    /// those that `f` has.
    pub(crate) fn over_batch(
        &self,
        layer: &str,
        x: &Tensor,
        params: &[Option<&Tensor>],
        f: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (dims, space) = (x.dims(), self.space);
        let count: usize = self.counts().sum();
        if count == 0 || x.elem_count() == 0 {
            return zeros(layer, x, params);
        }
        let starts = (0..).step_by(space);
        let places = self
            .valid
            .iter()
            .zip(starts)
            .flat_map(|(valid, start)| valid.iter().map(move |place| start + *place as usize));
        let places: Vec<usize> = places.collect();
        let (n, c) = (dims[0], dims[1]);
        // Channels last, so that a position is a row.
        let rows = match space {
            1 => x.contiguous()?.reshape((n, c))?,
            _ => {
                let transposed_x = graph::transposed(&x.contiguous()?.reshape((n, c, space))?)?;
                transposed_x.reshape((n * space, c))?
            }
        };
        let y = f(&picked(&rows, &places, 0)?)?;
        let y = scattered(&y, &places, n * space, 0)?;
        match space {
            1 => y.reshape(dims),
            _ => graph::transposed(&y.reshape((n, space, c))?)?.reshape(dims),
        }
    }

    /// `f` of the valid positions of each sample of `x`, `[1, C, valid]`, and of its index; zeros
    /// elsewhere.
    pub(crate) fn over_samples(
        &self,
        layer: &str,
        x: &Tensor,
        params: &[Option<&Tensor>],
        mut f: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let dims = x.dims();
        if x.elem_count() == 0 || self.counts().all(|count| count == 0) {
            return zeros(layer, x, params);
        }
        let planes = x.contiguous()?.reshape((dims[0], dims[1], self.space))?;
        let mut samples = vec![];
        for (i, valid) in self.valid.iter().enumerate() {
            let sample = planes.narrow(0, i, 1)?;
            if valid.is_empty() {
                samples.push(zeros(layer, &sample, &[])?);
                continue;
            }
            let places: Vec<usize> = valid.iter().map(|place| *place as usize).collect();
            let y = f(i, &picked(&sample, &places, 2)?)?;
            samples.push(scattered(&y, &places, self.space, 2)?);
        }
        Tensor::cat(&samples, 0)?.reshape(dims)
    }
}

/// Zeros like `x`, in the graph, so that what goes into it gets gradients of zero.
fn zeros(layer: &str, x: &Tensor, params: &[Option<&Tensor>]) -> Result<Tensor> {
    graph::route(layer, x)?;
    let all: Vec<&Tensor> = [Some(x)].iter().chain(params).flatten().copied().collect();
    composed::anchored(&x.zeros_like()?.detach(), &all)
}

fn indices(places: impl Iterator<Item = usize>, device: &Device) -> Result<Tensor> {
    let places: Vec<i64> = places.map(|place| place as i64).collect();
    let len = places.len();
    host::tensor(places, len, device)
}

/// The elements at `places` of an axis.
fn picked(t: &Tensor, places: &[usize], axis: usize) -> Result<Tensor> {
    if places.len() == t.dims()[axis] {
        return Ok(t.clone());
    }
    t.contiguous()?
        .index_select(&indices(places.iter().copied(), t.device())?, axis)
}

/// The inverse of [`picked`] on an axis of `size` elements, with zeros elsewhere.
fn scattered(t: &Tensor, places: &[usize], size: usize, axis: usize) -> Result<Tensor> {
    if places.len() == size {
        return Ok(t.clone());
    }
    let mut dims = t.dims().to_vec();
    dims[axis] = 1;
    let none = Tensor::zeros(dims, t.dtype(), t.device())?;
    let with_zero = Tensor::cat(&[t, &none], axis)?.contiguous()?;
    let mut from = vec![places.len(); size];
    for (row, place) in places.iter().enumerate() {
        from[*place] = row;
    }
    with_zero.index_select(&indices(from.into_iter(), t.device())?, axis)
}

/// The affine pair for the parts of an input `x`, in its accumulator's dtype, so that the gradients
/// that the parts leave are rounded once.
pub(crate) fn wide_params(x: &Tensor, params: [Option<&Tensor>; 2]) -> Result<[Option<Tensor>; 2]> {
    let acc = composed::accumulator(x.dtype());
    let wide = |p: Option<&Tensor>| p.map(|p| p.to_dtype(acc)).transpose();
    Ok([wide(params[0])?, wide(params[1])?])
}

/// The mean of the statistics of several samples, if there are any.
pub(crate) fn averaged(samples: &[BatchStatistics]) -> Result<Option<BatchStatistics>> {
    if samples.is_empty() {
        return Ok(None);
    }
    let average = |of: fn(&BatchStatistics) -> &Tensor| {
        let all: Vec<&Tensor> = samples.iter().map(of).collect();
        Tensor::stack(&all, 0)?.mean(0)
    };
    Ok(Some(BatchStatistics {
        mean: average(|s| &s.mean)?,
        var: average(|s| &s.var)?,
    }))
}
