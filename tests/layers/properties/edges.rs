//! Inputs at the edge of what layers take: nothing, one value, constants, the largest and smallest
//! numbers, NaN and infinity.

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, VarBuilder, VarMap,
};
use candle_norm::{BatchNormOptions, InstanceNormOptions, ops, weight_norm};
use proptest::prelude::*;

use super::{FLOATS, cases, config, dtypes};
use testkit::compare::{assert_close, assert_gradient, tolerance};
use testkit::data::{Draw, rounded, tensor, values, variable};
use testkit::oracle;
use testkit::subjects::{Kind, Numbers, Params, Subject, backward, gradient};
use testkit::table::{LAYERS, kinds};

/// The largest and smallest magnitudes that the contract names, and those between.
fn sizes(dtype: DType) -> Vec<f64> {
    match dtype {
        DType::F16 => vec![6e-5, 1e-2, 1e2, 1e4],
        _ => vec![1e-15, 1e-10, 1e-5, 1e5, 1e10, 1e14],
    }
}

proptest! {
    #![proptest_config(config(300))]

    /// Rows of any size, with an ε that matters, one that does not, and gradients that fit the
    /// dtype.
    #[test]
    fn values_of_any_size(
        case in cases(),
        dtypes in dtypes(),
        size in any::<prop::sample::Index>(),
        eps in prop::sample::select(vec![1e-5, 1e-2, 1.]),
    ) {
        let sizes = sizes(dtypes.input);
        let size = size.get(&sizes);
        let mut numbers = case.numbers(0.3);
        numbers.x.iter_mut().for_each(|x| *x *= size);
        let subject = Subject { eps, ..case.subject };
        numbers.check(subject, &case.dims, dtypes, tolerance(dtypes.input));
    }

    /// A constant row is its bias, whatever the constant, and every gradient is finite.
    #[test]
    fn constant_rows_give_the_bias(
        case in cases(),
        dtypes in dtypes(),
        constant in prop::sample::select(vec![0., 1., -0.1, 1e-3, 65504., 3e4, 1e15]),
    ) {
        let subject = Subject { eps: 1e-5, ..case.subject };
        prop_assume!(subject.oracle(&case.dims).is_centered());
        prop_assume!(dtypes.input != DType::F16 || constant <= 65504.);
        let mut numbers = case.numbers(0.);
        numbers.x.fill(constant);
        let ran = numbers.run(subject, &case.dims, dtypes).unwrap();
        let y = values(&ran.y).unwrap();
        let oracle = subject.oracle(&case.dims);
        let n = numbers.rounded(dtypes).unwrap();
        let want = oracle.forward(&n.x, n.weight.as_deref(), n.bias.as_deref()).y;
        // A bias is f32 at most where the input is not f64, and from f64 `half` rounds as if the
        // last 32 bits were zeros.
        let through = if dtypes.input == DType::F64 { DType::F64 } else { DType::F32 };
        let want = tensor(&want, &[want.len()], through).unwrap();
        let want = values(&want.to_dtype(dtypes.input).unwrap()).unwrap();
        prop_assert_eq!(y, want, "the bias exactly");
        for (name, t) in ran.named() {
            let finite = values(t).unwrap().iter().all(|v| v.is_finite());
            prop_assert!(finite, "{} of a constant {} is not finite", name, constant);
        }
        let back = oracle.backward(&n.x, n.weight.as_deref(), &n.dy);
        assert_gradient("dx", &ran.dx, &back.dx, tolerance(dtypes.input));
    }

    /// A value that is not finite reaches its own row and no other, forward and backward.
    #[test]
    fn what_is_not_finite_stays_in_its_row(
        case in cases(),
        dtypes in dtypes(),
        bad in prop::sample::select(vec![f64::NAN, f64::INFINITY, f64::NEG_INFINITY]),
        at in any::<prop::sample::Index>(),
    ) {
        let subject = Subject { eps: 1e-3, ..case.subject };
        let mut numbers = case.numbers(0.5);
        let clean = numbers.run(subject, &case.dims, dtypes).unwrap();
        let at = at.index(numbers.x.len());
        numbers.x[at] = bad;
        let ran = numbers.run(subject, &case.dims, dtypes).unwrap();
        let n = numbers.rounded(dtypes).unwrap();
        let oracle = subject.oracle(&case.dims);
        let want = oracle.forward(&n.x, n.weight.as_deref(), n.bias.as_deref()).y;
        let (y, clean_y) = (values(&ran.y).unwrap(), values(&clean.y).unwrap());
        let (dx, clean_dx) = (values(&ran.dx).unwrap(), values(&clean.dx).unwrap());
        for i in 0..y.len() {
            if oracle.row(i) == oracle.row(at) {
                let (got, want) = (y[i], want[i]);
                prop_assert_eq!(got.is_nan(), want.is_nan(), "y {} is {}, not {}", i, got, want);
            } else {
                prop_assert_eq!(y[i], clean_y[i], "y {} is in another row", i);
                prop_assert_eq!(dx[i], clean_dx[i], "dx {} is in another row", i);
            }
        }
    }

    /// An axis of size zero, any of them: an empty output and gradients of zero.
    #[test]
    fn nothing_in_nothing_out(
        mut dims in prop::collection::vec(0usize..4, 2..=5),
        zero in any::<prop::sample::Index>(),
        kind in any::<prop::sample::Index>(),
        affine in (any::<bool>(), any::<bool>()),
        dtypes in dtypes(),
    ) {
        let rank = dims.len();
        dims[zero.index(rank)] = 0;
        // Which layers take a shape does not depend on its sizes, but for the groups that divide
        // the channels.
        let like: Vec<usize> = dims.iter().map(|d| if *d == 0 { 2 } else { *d }).collect();
        let kind = *kind.get(&kinds(&like));
        let kind = match kind {
            Kind::Group { .. } if dims[1] == 0 => Kind::Group { groups: 1 },
            kind => kind,
        };
        let subject = Subject::new(kind, 1e-5);
        let params = subject.param_dims(&dims).iter().product();
        let numbers = Numbers {
            x: vec![],
            dy: vec![],
            weight: affine.0.then(|| vec![2.; params]),
            bias: (affine.1 && kind.has_bias()).then(|| vec![3.; params]),
        };
        let ran = numbers.run(subject, &dims, dtypes).unwrap();
        prop_assert_eq!(ran.y.dims(), &dims[..]);
        prop_assert_eq!(ran.y.dtype(), dtypes.input);
        prop_assert_eq!(ran.dx.dims(), &dims[..]);
        for t in [ran.dweight, ran.dbias].into_iter().flatten() {
            prop_assert_eq!(values(&t).unwrap(), vec![0.; params]);
        }
    }
}

/// The largest finite numbers, in the signs that add up worst.
#[test]
fn the_largest_values() {
    for (dtype, size) in [
        (DType::F16, 65504.),
        (DType::BF16, 1e15),
        (DType::F32, 1e15),
        (DType::F64, 1e100),
    ] {
        for dims in [[3, 2, 37], [2, 1, 4096]] {
            for kind in kinds(&dims) {
                let n = dims.iter().product();
                let mut draw = Draw::new(13);
                let numbers = Numbers {
                    x: draw.signs(n, size),
                    dy: draw.normal(n),
                    weight: None,
                    bias: None,
                };
                numbers.check(
                    Subject::new(kind, 1e-5),
                    &dims,
                    dtype.into(),
                    tolerance(dtype),
                );
            }
        }
    }
}

/// In Llama's order the product of the cotangent and the weight may leave the range of f16 that the
/// gradient is in.
#[test]
fn gradients_of_products_out_of_range() -> Result<()> {
    let (x, dy) = ([1e4, -1e4, 2e4], [1000., 500., 10.]);
    let weight = [100.; 3];
    let oracle = oracle::Norm::layer(&[1, 3], 1, 1e-6).without_mean();
    let want = oracle.backward(&x, Some(&weight), &dy);
    for cast in [ops::Cast::AfterWeight, ops::Cast::BeforeWeight] {
        let xt = variable(&x, &[1, 3], DType::F16)?;
        let weight = tensor(&weight, &[3], DType::F16)?;
        let y = ops::rms_norm(
            &xt,
            3,
            Some(&weight),
            ops::RmsOptions {
                eps: Some(1e-6),
                offset: 0.,
                cast,
            },
        )?;
        let grads = backward(&y, &tensor(&dy, &[1, 3], DType::F16)?)?;
        let tolerance = 2. * tolerance(DType::F16);
        assert_gradient(
            &format!("dx, {cast:?}"),
            &gradient(&grads, &xt),
            &want.dx,
            tolerance,
        );
    }
    Ok(())
}

/// A row of one value under layers that take it: the mean is the value, the spread zero.
#[test]
fn rows_of_one_value() {
    for dtype in FLOATS {
        for (kind, dims) in [
            (Kind::Layer { axes: 1 }, vec![4, 1]),
            (Kind::Layer { axes: 2 }, vec![4, 1, 1]),
            (Kind::LayerChannelsFirst, vec![2, 1, 3]),
            (
                Kind::Rms {
                    axes: 1,
                    offset: 0.,
                },
                vec![4, 1],
            ),
            (Kind::Group { groups: 3 }, vec![2, 3]),
            (Kind::Switch, vec![2, 3, 1]),
            (Kind::Switch, vec![1, 1, 1]),
            (Kind::Switch, vec![1, 1]),
        ] {
            let n = dims.iter().product();
            let subject = Subject::new(kind, 1e-3);
            let params = subject.param_dims(&dims).iter().product();
            let mut draw = Draw::new(14);
            let numbers = Numbers {
                x: draw.normal(n),
                dy: draw.normal(n),
                weight: Some(draw.weight(params)),
                bias: Some(draw.normal(params)),
            };
            numbers.check(subject, &dims, dtype.into(), tolerance(dtype));
        }
    }
}

/// One value has no variance to learn from: an error that says so, and no change of the statistics.
#[test]
fn one_value_per_channel_is_an_error_in_training() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let batch = candle_norm::batch_norm(8, BatchNormOptions::default(), vb.pp("batch"))?;
    let options = InstanceNormOptions {
        track_running_stats: true,
        ..Default::default()
    };
    let instance = candle_norm::instance_norm(8, options, vb.pp("instance"))?;
    let cases: [(&dyn ModuleT, &[usize]); 3] = [
        (&batch, &[1, 8]),
        (&batch, &[1, 8, 1, 1]),
        (&instance, &[5, 8, 1]),
    ];
    for (layer, dims) in cases {
        let x = Tensor::ones(dims, DType::F32, &Device::Cpu)?;
        let error = layer.forward_t(&x, true).unwrap_err().to_string();
        let want = format!(
            "expected more than 1 value per channel when training, got input size {dims:?}"
        );
        assert!(error.contains(&want), "{error}");
        layer.forward_t(&x, false)?;
    }
    for stats in [batch.running_stats(), instance.running_stats()] {
        let s = stats.expect("tracked").snapshot()?;
        assert_eq!(s.num_batches_tracked, 0);
        assert_eq!(values(&s.mean)?, [0.; 8]);
        assert_eq!(values(&s.var)?, [1.; 8]);
    }
    Ok(())
}

/// An empty batch leaves running statistics as they were, in both modes.
#[test]
fn an_empty_batch_changes_no_statistics() -> Result<()> {
    for dims in [[0, 3, 4], [2, 3, 0]] {
        for train in [true, false] {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
            let batch = candle_norm::batch_norm(3, 1e-5, vb.pp("batch"))?;
            let options = InstanceNormOptions {
                track_running_stats: true,
                ..Default::default()
            };
            let instance = candle_norm::instance_norm(3, options, vb.pp("instance"))?;
            let x = Tensor::zeros(&dims, DType::F32, &Device::Cpu)?;
            for (y, stats) in [
                (batch.forward_t(&x, train)?, batch.running_stats()),
                (instance.forward_t(&x, train)?, instance.running_stats()),
            ] {
                assert_eq!(y.dims(), dims);
                let s = stats.expect("tracked").snapshot()?;
                assert_eq!(s.num_batches_tracked, 0);
                assert_eq!(
                    (values(&s.mean)?, values(&s.var)?),
                    (vec![0.; 3], vec![1.; 3])
                );
            }
        }
    }
    Ok(())
}

/// A row of zeros has no direction: weight and gradients are zero, and the other rows are what they
/// are without it.
#[test]
fn zero_rows_of_a_weight() -> Result<()> {
    for dtype in FLOATS {
        for dim in [Some(0), Some(1), None] {
            let mut draw = Draw::new(15);
            let mut v = draw.normal(12);
            match dim {
                Some(0) => v[4..8].fill(0.),
                Some(_) => (1..12).step_by(4).for_each(|i| v[i] = 0.),
                None => v.fill(0.),
            }
            let g_dims: &[usize] = match dim {
                Some(0) => &[3, 1],
                Some(_) => &[1, 4],
                None => &[],
            };
            let rows = oracle::along(&[3, 4], &Vec::from_iter(dim));
            let v = rounded(&v, dtype)?;
            let g = rounded(&draw.weight(g_dims.iter().product()), dtype)?;
            let dw = rounded(&draw.normal(12), dtype)?;
            let (vt, gt) = (variable(&v, &[3, 4], dtype)?, variable(&g, g_dims, dtype)?);
            let w = ops::weight_norm(&vt, &gt, dim)?;
            let grads = backward(&w, &tensor(&dw, &[3, 4], dtype)?)?;
            let (dv, dg) = oracle::weight_norm_backward(&v, &g, &rows, &dw);
            let want = oracle::weight_norm(&v, &g, &rows);
            assert_close("w", &w, &want, tolerance(dtype));
            let (got_dv, got_dg) = (gradient(&grads, &vt), gradient(&grads, &gt));
            assert_close("dv", &got_dv, &dv.values, tolerance(dtype));
            assert_close("dg", &got_dg, &dg.values, tolerance(dtype));
            for (i, row) in rows.iter().enumerate() {
                let zero = (0..12).all(|j| rows[j] != *row || v[j] == 0.);
                if zero {
                    assert_eq!(
                        (values(&w)?[i], values(&got_dv)?[i]),
                        (0., 0.),
                        "{dtype:?} {dim:?}"
                    );
                    assert_eq!(values(&got_dg)?[*row], 0.);
                }
            }
        }
    }
    Ok(())
}

/// Norms whose squares are too large or too small for the dtype.
#[test]
fn weights_of_any_size() -> Result<()> {
    for (dtype, sizes) in [
        (DType::F64, vec![1e-300, 1e-160, 1e160, 1e300]),
        (DType::F32, vec![1e-37, 1e-25, 1e25, 1e37]),
        (DType::BF16, vec![1e-37, 1e-25, 1e25, 1e37]),
        (DType::F16, vec![6e-5, 1e-3, 3e4]),
    ] {
        for size in sizes {
            let mut draw = Draw::new(16);
            let v: Vec<f64> = draw.normal(12).iter().map(|z| z / 2. * size).collect();
            let v = rounded(&v, dtype)?;
            let g = rounded(&[1.5, -2., 0.3], dtype)?;
            let rows = oracle::along(&[3, 4], &[0]);
            let w = ops::weight_norm(
                &tensor(&v, &[3, 4], dtype)?,
                &tensor(&g, &[3, 1], dtype)?,
                Some(0),
            )?;
            let scaled: Vec<f64> = v.iter().map(|v| v / size).collect();
            let want = oracle::weight_norm(&scaled, &g, &rows);
            assert_close(
                &format!("{dtype:?} at {size:e}"),
                &w,
                &want,
                tolerance(dtype),
            );
        }
    }
    Ok(())
}

/// Axes of size zero under weight-normalized layers.
#[test]
fn weight_normalized_layers_of_nothing() -> Result<()> {
    let options = weight_norm::WeightNormOptions::default();
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let linear = weight_norm::linear(3, 2, options, vb.pp("linear"))?;
    let conv1d = weight_norm::conv1d(3, 2, 2, Conv1dConfig::default(), options, vb.pp("conv1d"))?;
    let conv2d = weight_norm::conv2d(3, 2, 2, Conv2dConfig::default(), options, vb.pp("conv2d"))?;
    let config = ConvTranspose1dConfig::default();
    let up1d = weight_norm::conv_transpose1d(3, 2, 2, config, options, vb.pp("up1d"))?;
    let config = ConvTranspose2dConfig::default();
    let up2d = weight_norm::conv_transpose2d(3, 2, 2, config, options, vb.pp("up2d"))?;
    let cases: [(&dyn ModuleT, &[usize], &[usize]); 6] = [
        (&linear, &[0, 3], &[0, 2]),
        (&linear, &[4, 0, 3], &[4, 0, 2]),
        (&conv1d, &[0, 3, 5], &[0, 2, 4]),
        (&conv2d, &[0, 3, 5, 6], &[0, 2, 4, 5]),
        (&up1d, &[0, 3, 5], &[0, 2, 6]),
        (&up2d, &[0, 3, 5, 6], &[0, 2, 6, 7]),
    ];
    for (layer, dims, want) in cases {
        let x = variable(&[], dims, DType::F32)?;
        let y = layer.forward_t(&x, true)?;
        assert_eq!(y.dims(), want);
        let grads = y.sum_all()?.backward()?;
        assert_eq!(gradient(&grads, &x).dims(), dims);
    }
    // Parameters of the layers that ran, all of them with a gradient of zero.
    let x = Tensor::zeros((0, 3), DType::F32, &Device::Cpu)?;
    let grads = linear.forward_t(&x, true)?.sum_all()?.backward()?;
    for param in [linear.g(), linear.v(), linear.bias().expect("a bias")] {
        assert!(values(&gradient(&grads, param))?.iter().all(|g| *g == 0.));
    }
    // No inputs: the bias. No outputs: nothing.
    let zeros = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    let none_in = weight_norm::linear(0, 2, options, zeros())?;
    let y = none_in.forward_t(&Tensor::zeros((4, 0), DType::F32, &Device::Cpu)?, true)?;
    assert_eq!(y.dims(), [4, 2]);
    assert_eq!(values(&y)?, [0.; 8]);
    let none_out = weight_norm::linear(3, 0, options, zeros())?;
    let y = none_out.forward_t(&Tensor::zeros((4, 3), DType::F32, &Device::Cpu)?, true)?;
    assert_eq!(y.dims(), [4, 0]);
    Ok(())
}

/// Wrong inputs are errors that name the layer, what it expected and what it got; none panics.
#[test]
fn wrong_inputs_are_errors_that_say_so() -> Result<()> {
    let dims = [3, 4, 5];
    let titled = LAYERS.iter().flat_map(|layer| {
        let kinds = (layer.kinds)(&dims).into_iter();
        kinds.map(|kind| (kind, layer.title))
    });
    for (kind, title) in titled {
        let subject = Subject::new(kind, 1e-5);
        let x = Tensor::ones(&dims, DType::F32, &Device::Cpu)?;
        let weight = Tensor::ones(subject.param_dims(&dims), DType::F32, &Device::Cpu)?;
        let params = Params {
            weight: Some(weight),
            bias: None,
        };
        let layer = subject.build(&x, &params)?;
        let wrong_dtype = [DType::F64, DType::U32, DType::I64, DType::U8];
        let wrong_dims: [&[usize]; 6] = [&[], &[7], &[7, 9], &[3, 9, 9], &[5, 9, 3, 2], &[0]];
        let inputs = wrong_dtype
            .into_iter()
            .map(|dtype| x.to_dtype(dtype))
            .chain(
                wrong_dims
                    .into_iter()
                    .map(|d| Tensor::zeros(d, DType::F32, &Device::Cpu)),
            );
        for input in inputs {
            let input = input?;
            for train in [true, false] {
                match layer.forward_t(&input, train) {
                    Ok(_) => panic!("{kind:?} takes {:?} {:?}", input.dtype(), input.dims()),
                    Err(e) => {
                        let e = e.to_string();
                        assert!(
                            e.contains(title) && e.contains("expected") && e.contains("got"),
                            "{e}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

/// A strided empty tensor, a scalar of a group, sizes that no index counts to: nothing a caller
/// passes panics.
#[test]
fn odd_shapes_do_not_panic() -> Result<()> {
    let x = Tensor::zeros((2, 0, 3), DType::F32, &Device::Cpu)?;
    for (a, b) in [(0, 1), (1, 2), (0, 2)] {
        let view = x.transpose(a, b)?;
        assert_eq!(
            ops::layer_norm(&view, view.dims()[2], None, None, 1e-5)?.dims(),
            view.dims()
        );
        assert_eq!(
            ops::batch_norm(&view, None, None, 1e-5)?.0.dims(),
            view.dims()
        );
    }
    let one = Tensor::ones((1, 1, 1), DType::F32, &Device::Cpu)?;
    assert_eq!(
        ops::group_norm(&one, 1, None, None, 1e-5)?.dims(),
        [1, 1, 1]
    );
    assert!(ops::group_norm(&one, 0, None, None, 1e-5).is_err());
    assert!(ops::group_norm(&one, 2, None, None, 1e-5).is_err());
    assert!(ops::layer_norm(&one, (), None, None, 1e-5).is_err());
    for eps in [0., -1., f64::NAN, f64::INFINITY] {
        assert!(ops::layer_norm(&one, 1, None, None, eps).is_err());
        assert!(ops::rms_norm(&one, 1, None, eps).is_err());
        assert!(ops::group_norm(&one, 1, None, None, eps).is_err());
        assert!(ops::instance_norm(&one, None, None, eps).is_err());
        assert!(ops::batch_norm(&one, None, None, eps).is_err());
    }
    // An ε below what f32 holds still keeps a constant row finite.
    let constant = Tensor::full(3f32, (2, 4), &Device::Cpu)?;
    for eps in [1e-46, 1e-300, f64::MIN_POSITIVE] {
        assert_eq!(
            values(&ops::layer_norm(&constant, 4, None, None, eps)?)?,
            [0.; 8]
        );
    }
    // As many axes as candle multiplies.
    let dims = vec![1; 8];
    for kind in kinds(&dims) {
        let numbers = Numbers {
            x: vec![1.],
            dy: vec![1.],
            weight: Some(vec![2.]),
            bias: kind.has_bias().then(|| vec![3.]),
        };
        numbers.check(Subject::new(kind, 1e-5), &dims, DType::F32.into(), 1e-6);
    }
    Ok(())
}

/// Sizes with as many small factors as they can have, on every axis that a layer sums over.
#[test]
fn sizes_of_many_factors() {
    let sevens = 7usize.pow(7);
    for (kind, dims) in [
        (Kind::Layer { axes: 1 }, vec![sevens, 1]),
        (Kind::Layer { axes: 1 }, vec![1, sevens]),
        (Kind::Group { groups: 1 }, vec![1715, 1, 1715]),
        (Kind::Instance, vec![12005, 1, 245]),
        (Kind::Switch, vec![245, 49, 49]),
    ] {
        let subject = Subject::new(kind, 1e-5);
        let params = subject.param_dims(&dims).iter().product();
        let n = dims.iter().product();
        let mut draw = Draw::new(17);
        let numbers = Numbers {
            x: draw.normal(n),
            dy: draw.normal(n),
            weight: Some(draw.weight(params)),
            bias: Some(draw.normal(params)),
        };
        numbers.check(subject, &dims, DType::F32.into(), tolerance(DType::F32));
    }
}
