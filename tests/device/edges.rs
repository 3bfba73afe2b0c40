//! Inputs at the limits on the device give the bits of the emulator, whose edges are tested
//! everywhere.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use testkit::data::Draw;

use crate::sides::{Case, Lies, assert_none, device, forms_with_kernels, is_gpu};

const DTYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::F64];
const DIMS: [usize; 3] = [4, 6, 33];

/// Inputs of [`DIMS`] by name.
fn inputs(dtype: DType) -> Vec<(&'static str, Vec<f64>)> {
    let count = DIMS.iter().product();
    let numbers = Draw::new(3).normal(count);
    let with = |at: usize, value: f64| {
        let mut changed = numbers.clone();
        changed[at] = value;
        changed
    };
    let largest = match dtype {
        DType::F16 => 65504.,
        DType::F64 => 1e300,
        _ => 3e38,
    };
    let scaled = |by: f64, by_mean: f64| numbers.iter().map(|v| v * by + by_mean).collect();
    vec![
        ("zeros", vec![0.; count]),
        ("a constant", vec![3.; count]),
        ("NaN", with(40, f64::NAN)),
        ("infinity", with(40, f64::INFINITY)),
        ("minus infinity", with(count - 1, f64::NEG_INFINITY)),
        ("the largest number", vec![largest; count]),
        ("large numbers", scaled(largest / 64., 0.)),
        ("a large mean", scaled(1., 1000.)),
        ("small numbers", scaled(1e-5, 0.)),
    ]
}

#[test]
fn inputs_at_the_limits() -> Result<()> {
    let device = device()?;
    let (mut ran, mut faults) = (0, vec![]);
    for (_, form) in forms_with_kernels(true) {
        for dtype in DTYPES {
            for (name, x) in inputs(dtype) {
                let case = Case {
                    form,
                    dims: &DIMS,
                    dtype,
                    params: dtype,
                    lies: Lies(None),
                    x: &x,
                };
                ran += 1;
                let place = || format!("{}, {dtype:?}, {name}", form.name);
                match case.difference(&device) {
                    Ok(None) => {}
                    Ok(Some(found)) => faults.push(format!("{}: {found}", place())),
                    Err(error) => faults.push(format!("{}: {error}", place())),
                }
            }
        }
    }
    assert_none(ran, faults);
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_output_and_gradients() -> Result<()> {
    let device = device()?;
    let dims = [0, 6, 33];
    for with_kernels in [true, false] {
        for (_, form) in forms_with_kernels(with_kernels) {
            for dtype in DTYPES {
                let vb = VarBuilder::from_varmap(&VarMap::new(), dtype, &device);
                let norm = (form.build)(&dims, vb)?;
                let x = Var::zeros(&dims, dtype, &device)?;
                let y = norm.forward_t(&x, true)?;
                assert_eq!((y.dims(), y.dtype()), (&dims[..], dtype), "{}", form.name);
                let grads = y.sum_all()?.backward()?;
                let dx = grads.get(&x).map(Tensor::dims);
                assert_eq!(dx, Some(&dims[..]), "{}", form.name);
                assert_eq!(norm.forward_t(&x.detach(), false)?.dims(), dims);
            }
        }
    }
    Ok(())
}

#[test]
fn what_lies_on_another_device_is_refused_by_name() -> Result<()> {
    let device = device()?;
    if !is_gpu()? {
        return Ok(());
    }
    for (layer, form) in forms_with_kernels(true) {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &device);
        let norm = (form.build)(&DIMS, vb)?;
        let x = Tensor::zeros(&DIMS, DType::F32, &Device::Cpu)?;
        match norm.forward_t(&x, true) {
            Ok(_) => panic!("{}: an input of the CPU passed", form.name),
            Err(error) => assert!(error.to_string().contains(layer.title), "{error}"),
        }
    }
    Ok(())
}
