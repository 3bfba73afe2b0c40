//! Layers on the device give the bits of the emulator: a table of shapes, dtypes and layouts.

use candle_core::{DType, Result};
use testkit::data::Draw;

use crate::sides::{Case, Lies, assert_none, device, forms_with_kernels};

/// Dtypes of inputs and parameters.
const DTYPES: [(DType, DType); 6] = [
    (DType::F32, DType::F32),
    (DType::F16, DType::F16),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F32),
    (DType::BF16, DType::F32),
    (DType::F64, DType::F64),
];

/// `[N, C, *]` with short and long rows, odd sizes, and channels of one and of several blocks.
const SHAPES: [&[usize]; 8] = [
    &[2, 4, 3],
    &[3, 6, 49],
    &[5, 2, 2],
    &[2, 32, 16, 16],
    &[1, 4, 1001],
    &[2, 2, 4099],
    &[64, 4, 8],
    &[4, 2, 7, 129],
];

fn check(shapes: &[&[usize]], layouts: fn(usize) -> Vec<Lies>) -> Result<()> {
    let device = device()?;
    let (mut ran, mut faults) = (0, vec![]);
    for (_, form) in forms_with_kernels(true) {
        for dims in shapes {
            for (dtype, params) in DTYPES {
                for lies in layouts(dims.len()) {
                    let elements = lies.stored(dims).iter().product();
                    let x = Draw::new(elements as u64).normal(elements);
                    let case = Case {
                        form,
                        dims,
                        dtype,
                        params,
                        lies,
                        x: &x,
                    };
                    ran += 1;
                    let place = || format!("{} of {dims:?} {dtype:?} {lies:?}", form.name);
                    match case.difference(&device) {
                        Ok(None) => {}
                        Ok(Some(found)) => faults.push(format!("{}: {found}", place())),
                        Err(error) => faults.push(format!("{}: {error}", place())),
                    }
                }
            }
        }
    }
    assert_none(ran, faults);
    Ok(())
}

#[test]
fn contiguous_inputs_of_every_shape_and_dtype() -> Result<()> {
    check(&SHAPES, |_| vec![Lies(None)])
}

#[test]
fn every_layout() -> Result<()> {
    check(&[&[2, 4, 3, 5]], Lies::all)
}
