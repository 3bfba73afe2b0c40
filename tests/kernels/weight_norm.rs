//! Weight norm at ragged sizes, over every axis and over the whole.

use candle_core::{DType, Result};
use candle_norm::ops;

use crate::Stamp;
use crate::common::compare::{assert_close, assert_gradient};
use crate::common::data::{Draw, rounded, tensor, variable};
use crate::common::oracle::{self, along};
use crate::common::subjects::{backward, gradient};
use crate::layers::WIDTHS;

pub(crate) fn weight_norm(stamp: Stamp) {
    let mut case = 0;
    let mut check = |dims: &[usize], dim: Option<usize>| {
        check(stamp, case, dims, dim, 1.).expect("tensors that fit");
        case += 1;
    };
    for width in WIDTHS {
        for count in [1, 2, 3, 5, 9, 33, 65, 257, 1031] {
            if width * count > 70_000 {
                continue;
            }
            check(&[count, width], Some(0));
            if width * count < 20_000 {
                check(&[count, width], Some(1));
                check(&[count, width], None);
            }
        }
        check(&[width], Some(0));
        check(&[width], None);
    }
    for dims in [vec![5, 3, 7], vec![4, 17, 3, 3], vec![33, 2, 5, 1, 3]] {
        for dim in 0..dims.len() {
            check(&dims, Some(dim));
        }
        check(&dims, None);
    }
}

/// Rows whose squares over- or underflow have directions too.
pub(crate) fn weight_norm_of_any_size(stamp: Stamp) {
    let sizes: &[f64] = match stamp.dtype {
        DType::F64 => &[1e-200, 1e-160, 1e-20, 1e20, 1e160, 1e200],
        DType::F16 => &[6e-5, 1e-3, 1e3, 1e4],
        _ => &[1e-36, 1e-25, 1e-15, 1e15, 1e25, 1e36],
    };
    for (case, &size) in sizes.iter().enumerate() {
        for dims in [[5, 1], [3, 17], [9, 100], [2, 4099]] {
            check(stamp, case, &dims, Some(0), size).expect("tensors that fit");
        }
    }
}

fn check(stamp: Stamp, case: usize, dims: &[usize], dim: Option<usize>, size: f64) -> Result<()> {
    let dtypes = stamp.dtypes(case);
    let rows = along(dims, &Vec::from_iter(dim));
    let one_on_others = |d: usize| (0..dims.len()).map(move |a| if a == d { dims[a] } else { 1 });
    let g_dims: Vec<usize> = dim.map_or(vec![], |d| one_on_others(d).collect());
    let mut draw = Draw::new(case as u64);
    let v = draw.normal(rows.len()).into_iter().map(|z| size * z);
    let v = rounded(&v.collect::<Vec<_>>(), dtypes.input)?;
    let dw = rounded(&draw.normal(rows.len()), dtypes.input)?;
    // The gradient of v is as many times larger as v is smaller, and has to stay in range: the
    // magnitude makes up for it.
    let g = draw.weight(g_dims.iter().product()).into_iter();
    let g: Vec<f64> = g.map(|g| g * size.clamp(1e-30, 1e30)).collect();
    let g = rounded(&g, dtypes.params)?;

    let vt = variable(&v, dims, dtypes.input)?;
    let gt = variable(&g, &g_dims, dtypes.params)?;
    let dwt = tensor(&dw, dims, dtypes.input)?;
    let (w, grads) = stamp.run(|| {
        let w = ops::weight_norm(&vt, &gt, dim)?;
        let grads = backward(&w, &dwt)?;
        Ok((w, grads))
    });
    let (dv, dg) = (gradient(&grads, &vt), gradient(&grads, &gt));
    // The oracle squares what it is given.
    let unit: Vec<f64> = v.iter().map(|v| v / size).collect();
    let (mut dv_want, dg_want) = oracle::weight_norm_backward(&unit, &g, &rows, &dw);
    for v in dv_want.values.iter_mut().chain(&mut dv_want.terms) {
        *v /= size;
    }
    let what =
        |name: &str| format!("{name} of {dims:?} along {dim:?} in {dtypes:?}, size {size:e}");
    let tolerance = stamp.tolerance();
    for t in [&w, &dv, &dg] {
        assert!(t.is_contiguous(), "{}", what("layout"));
    }
    assert_close(
        &what("w"),
        &w,
        &oracle::weight_norm(&unit, &g, &rows),
        tolerance,
    );
    assert_gradient(&what("dv"), &dv, &dv_want, tolerance);
    assert_gradient(&what("dg"), &dg, &dg_want, tolerance);
    Ok(())
}
