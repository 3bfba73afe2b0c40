//! Weight normalization around every layer that it takes, over the geometry of convolutions.
use super::case::{Case, check_all};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, Module, VarBuilder,
};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{ops, weight_norm};
use testkit::data::uniform;

/// A weight-normalized layer, with the magnitude and direction of a weight of the given shape.
fn weight_normed(
    name: &str,
    input: &[usize],
    weight: &[usize],
    dim: Option<usize>,
    bias: Option<usize>,
    forward: impl Fn(VarBuilder, &Tensor) -> Result<Tensor> + 'static,
) -> Case {
    let magnitude: Vec<usize> = match dim {
        None => vec![],
        Some(dim) => (weight.iter().enumerate())
            .map(|(axis, &size)| if axis == dim { size } else { 1 })
            .collect(),
    };
    let case = Case::new(format!("{name}, dim {dim:?}"), input, forward)
        .param("parametrizations.weight.original0", &magnitude)
        .param("parametrizations.weight.original1", weight);
    match bias {
        Some(outputs) => case.param("bias", &[outputs]),
        None => case,
    }
}

#[test]
fn linear() -> Result<()> {
    let mut cases = vec![];
    for dim in [Some(0), Some(1), None] {
        for input in [&[4, 3][..], &[3], &[2, 4, 3]] {
            cases.push(weight_normed(
                "linear",
                input,
                &[5, 3],
                dim,
                Some(5),
                move |vb, x| weight_norm::linear(3, 5, dim.into(), vb)?.forward(x),
            ));
            cases.push(weight_normed(
                "no bias",
                input,
                &[5, 3],
                dim,
                None,
                move |vb, x| weight_norm::linear_no_bias(3, 5, dim.into(), vb)?.forward(x),
            ));
        }
    }
    check_all(cases)
}

/// How a convolution moves.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Geometry {
    padding: usize,
    stride: usize,
    dilation: usize,
    groups: usize,
}

/// The geometries to check, each with the axes that keep their magnitudes: all of them on one
/// geometry, the first on the others.
fn geometries(rank: usize) -> Vec<(Geometry, Vec<Option<usize>>)> {
    let mut found = vec![];
    for padding in [0, 1] {
        for (stride, dilation) in [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)] {
            for groups in [1, 2] {
                let dims = match (padding, stride, dilation, groups) {
                    (1, 2, 1, 2) => (0..rank).map(Some).chain([None]).collect(),
                    _ => vec![Some(0)],
                };
                let geometry = Geometry {
                    padding,
                    stride,
                    dilation,
                    groups,
                };
                found.push((geometry, dims));
            }
        }
    }
    found
}

/// The output paddings that a transposed convolution takes: below its stride or its dilation.
fn output_paddings(geometry: Geometry) -> std::ops::Range<usize> {
    0..geometry.stride.max(geometry.dilation)
}

#[test]
fn conv1d() -> Result<()> {
    let mut cases = vec![];
    for (geometry, dims) in geometries(3) {
        let config = Conv1dConfig {
            padding: geometry.padding,
            stride: geometry.stride,
            dilation: geometry.dilation,
            groups: geometry.groups,
            ..Default::default()
        };
        let (name, weight) = (format!("{geometry:?}"), [4, 2 / geometry.groups, 3]);
        for dim in dims {
            let forward = move |vb: VarBuilder, x: &Tensor| {
                weight_norm::conv1d(2, 4, 3, config, dim.into(), vb)?.forward(x)
            };
            let case = weight_normed(&name, &[2, 2, 8], &weight, dim, Some(4), forward);
            cases.push(case.on_one_path());
        }
    }
    let no_bias = |vb: VarBuilder, x: &Tensor| {
        weight_norm::conv1d_no_bias(2, 4, 3, Default::default(), None.into(), vb)?.forward(x)
    };
    cases.push(weight_normed(
        "no bias",
        &[2, 2, 5],
        &[4, 2, 3],
        None,
        None,
        no_bias,
    ));
    check_all(cases)
}

#[test]
fn conv2d() -> Result<()> {
    let mut cases = vec![];
    for (geometry, dims) in geometries(4) {
        let config = Conv2dConfig {
            padding: geometry.padding,
            stride: geometry.stride,
            dilation: geometry.dilation,
            groups: geometry.groups,
            ..Default::default()
        };
        let (name, weight) = (format!("{geometry:?}"), [4, 2 / geometry.groups, 2, 2]);
        for dim in dims {
            let forward = move |vb: VarBuilder, x: &Tensor| {
                weight_norm::conv2d(2, 4, 2, config, dim.into(), vb)?.forward(x)
            };
            // At most strides the two axes leave unequal remainders.
            let case = weight_normed(&name, &[2, 2, 4, 5], &weight, dim, Some(4), forward);
            cases.push(case.on_one_path());
        }
    }
    let no_bias = |vb: VarBuilder, x: &Tensor| {
        weight_norm::conv2d_no_bias(2, 4, 2, Default::default(), None.into(), vb)?.forward(x)
    };
    cases.push(weight_normed(
        "no bias",
        &[2, 2, 3, 3],
        &[4, 2, 2, 2],
        None,
        None,
        no_bias,
    ));
    check_all(cases)
}

#[test]
fn conv_transpose1d() -> Result<()> {
    let mut cases = vec![];
    for (geometry, dims) in geometries(3) {
        for output_padding in output_paddings(geometry) {
            let config = ConvTranspose1dConfig {
                padding: geometry.padding,
                output_padding,
                stride: geometry.stride,
                dilation: geometry.dilation,
                groups: geometry.groups,
            };
            let name = format!("{geometry:?}, output padding {output_padding}");
            let weight = [4, 2 / geometry.groups, 3];
            for &dim in &dims {
                let forward = move |vb: VarBuilder, x: &Tensor| {
                    weight_norm::conv_transpose1d(4, 2, 3, config, dim.into(), vb)?.forward(x)
                };
                let case = weight_normed(&name, &[2, 4, 3], &weight, dim, Some(2), forward);
                cases.push(case.on_one_path());
            }
        }
    }
    let no_bias = |vb: VarBuilder, x: &Tensor| {
        weight_norm::conv_transpose1d_no_bias(4, 2, 3, Default::default(), None.into(), vb)?
            .forward(x)
    };
    cases.push(weight_normed(
        "no bias",
        &[2, 4, 1],
        &[4, 2, 3],
        None,
        None,
        no_bias,
    ));
    check_all(cases)
}

#[test]
fn conv_transpose2d() -> Result<()> {
    let mut cases = vec![];
    for (geometry, dims) in geometries(4) {
        // candle's two-dimensional transposed convolution has no groups: they only name the
        // geometry of all dims.
        if geometry.groups > 1 && dims.len() == 1 {
            continue;
        }
        for output_padding in output_paddings(geometry) {
            let config = ConvTranspose2dConfig {
                padding: geometry.padding,
                output_padding,
                stride: geometry.stride,
                dilation: geometry.dilation,
            };
            let name = format!("{geometry:?}, output padding {output_padding}");
            for &dim in &dims {
                let forward = move |vb: VarBuilder, x: &Tensor| {
                    weight_norm::conv_transpose2d(2, 3, 2, config, dim.into(), vb)?.forward(x)
                };
                let case =
                    weight_normed(&name, &[2, 2, 2, 3], &[2, 3, 2, 2], dim, Some(3), forward);
                cases.push(case.on_one_path());
            }
        }
    }
    let no_bias = |vb: VarBuilder, x: &Tensor| {
        weight_norm::conv_transpose2d_no_bias(2, 3, 2, Default::default(), None.into(), vb)?
            .forward(x)
    };
    cases.push(weight_normed(
        "no bias",
        &[1, 2, 3, 2],
        &[2, 3, 2, 2],
        None,
        None,
        no_bias,
    ));
    check_all(cases)
}

#[test]
fn a_row_of_zeros() -> Result<()> {
    let rest = uniform((2, 3), 1);
    let zeros = rest.narrow(0, 0, 1)?.zeros_like()?;
    let v = Var::from_tensor(&Tensor::cat(&[&rest, &zeros], 0)?)?;
    let g = Var::from_tensor(&uniform((3, 1), 2))?;
    let w = ops::weight_norm(&v, &g, Some(0))?;
    assert_eq!(w.narrow(0, 2, 1)?.to_vec2::<f64>()?, [[0.0; 3]]);
    let gradients = (w * uniform((3, 3), 3))?.sum_all()?.backward()?;
    for variable in [&v, &g] {
        let gradient = gradients.get(variable).expect("it is a variable");
        for row in gradient.narrow(0, 2, 1)?.to_vec2::<f64>()? {
            assert!(row.iter().all(|value| *value == 0.0), "{gradient}");
        }
    }
    // The other rows do not see it.
    let beside_zeros = |inputs: &[Tensor]| {
        let v = Tensor::cat(&[&inputs[0], &zeros], 0)?;
        ops::weight_norm(&v, &inputs[1], Some(0))
    };
    gradcheck(beside_zeros, &[rest, g.into_inner()])?;

    // A whole weight of zeros, with its one magnitude.
    let v = Var::zeros((2, 3), DType::F64, &Device::Cpu)?;
    let g = Var::ones((), DType::F64, &Device::Cpu)?;
    let gradients = ops::weight_norm(&v, &g, None)?.sum_all()?.backward()?;
    for variable in [&v, &g] {
        let gradient = gradients.get(variable).expect("it is a variable");
        assert_eq!(gradient.abs()?.sum_all()?.to_scalar::<f64>()?, 0.0);
    }
    Ok(())
}
