//! Count, mean and squared distances: the statistics that batch norm takes of a batch and scalers
//! take of a data set.

use candle_core::{DType, Device, Result, Tensor};

use super::check;
pub use candle_norm_kernels::Moments;

/// The moments of each feature of `x`, in `f64` whatever the dtype.
///
/// Count, mean and sum of squared distances, in two passes over blocks, which are merged (Chan,
/// Golub and LeVeque, 1979).
///
/// # Shapes
/// `x`: `[N, *]`; the result has one entry for each element of the trailing axes, in their order.
///
/// # Errors
/// An input of rank 0, or of a dtype that is not one of floating point; more features than memory
/// has addresses for.
///
/// ```
/// use candle_core::{Device, Tensor};
///
/// let x = Tensor::new(&[[1f32, 10.], [3., 10.]], &Device::Cpu)?;
/// let moments = candle_norm::ops::moments(&x)?;
/// assert_eq!((moments[0].mean(), moments[0].var()), (2., 1.));
/// assert_eq!((moments[1].mean(), moments[1].var()), (10., 0.));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn moments(x: &Tensor) -> Result<Vec<Moments>> {
    check::rank_at_least("moments", x, 1, "[N, ...]")?;
    check::float("moments", "input", x)?;
    let parts = size_of::<Moments>() / size_of::<f64>();
    check::countable("moments", "features", &[&x.dims()[1..], &[parts]].concat())?;
    let mut all = vec![Moments::default(); x.dims()[1..].iter().product()];
    columns(x, |column, values| {
        all[column] = all[column].merge(Moments::of_values(values));
        Ok(())
    })?;
    Ok(all)
}

/// How many elements are brought to the host at a time.
const BLOCK: usize = 1 << 20;

/// Calls `f(column, values)` for the columns of `x`, `[N, *]`, in `f64`: with blocks of rows in
/// their order, and for each with every column.
pub(crate) fn columns(x: &Tensor, mut f: impl FnMut(usize, &[f64]) -> Result<()>) -> Result<()> {
    let (rows, width) = (x.dims()[0], x.dims()[1..].iter().product::<usize>());
    if rows == 0 || width == 0 {
        return Ok(());
    }
    let x = x.detach().reshape((rows, width))?;
    let per_block = (BLOCK / width).max(1);
    let mut column = Vec::with_capacity(per_block.min(rows));
    for start in (0..rows).step_by(per_block) {
        let block = x.narrow(0, start, per_block.min(rows - start))?;
        let values = block
            .to_device(&Device::Cpu)?
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        for c in 0..width {
            column.clear();
            column.extend(values.iter().skip(c).step_by(width));
            f(c, &column)?;
        }
    }
    Ok(())
}
