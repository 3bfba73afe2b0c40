//! Columns of a tensor as slices of numbers.

use candle_core::{DType, Device, Result, Tensor};

/// How many elements are brought to the host at a time.
const BLOCK: usize = 1 << 20;

/// Calls `f(column, values)` for the columns of `x`, `[N, *]`, in `f64`: with blocks of rows in
/// their order, and for each with every column. A scalar has no columns.
///
/// # Errors
/// Those of `f`, and those of candle.
pub fn columns(x: &Tensor, mut f: impl FnMut(usize, &[f64]) -> Result<()>) -> Result<()> {
    let Some((&rows, axes)) = x.dims().split_first() else {
        return Ok(());
    };
    let width = axes.iter().product::<usize>();
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
