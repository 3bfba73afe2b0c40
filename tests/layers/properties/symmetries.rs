//! Effects of a change of the input on the output: scale, shift and sign, and the order of elements
//! along each axis.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarBuilder;
use candle_norm::{BatchNormOptions, ops, weight_norm};
use proptest::prelude::*;

use super::{Case, cases, config, shapes};
use testkit::compare::{assert_near, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values, variable};
use testkit::subjects::{Kind, Numbers, Ran, Subject, backward, gradient};

fn scaled(v: &[f64], by: f64) -> Vec<f64> {
    v.iter().map(|v| v * by).collect()
}

fn run(case: &Case, numbers: &Numbers, dtype: DType) -> Ran {
    numbers.run(case.subject, &case.dims, dtype.into()).unwrap()
}

fn with_eps(case: &Case, eps: f64) -> Case {
    let subject = Subject {
        eps,
        ..case.subject
    };
    Case {
        subject,
        ..case.clone()
    }
}

fn for_scaled(case: &Case, scale: f64) -> Case {
    Case {
        subject: case.subject.scaled(scale),
        ..case.clone()
    }
}

proptest! {
    #![proptest_config(config(200))]

    /// With ε scaled along, the scale of the input does not reach the output. Powers of two change
    /// no rounding.
    #[test]
    fn scaling_by_a_power_of_two_changes_no_bit(
        case in cases(),
        dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        exponent in -20i32..20,
    ) {
        // A power of two, so that ε is as exact in f32 as it is in f64.
        let eps = 2f64.powi(-17);
        let scale = 2f64.powi(exponent);
        let n = case.numbers(1.);
        let large = Numbers { x: scaled(&n.x, scale), ..n.clone() };
        let a = run(&with_eps(&case, eps), &n, dtype);
        let b = run(&for_scaled(&with_eps(&case, eps), scale), &large, dtype);
        assert_same_bits("y", &b.y, &a.y);
        assert_same_bits("dx", &(&b.dx * scale).unwrap(), &a.dx);
        for (a, b) in [(a.dweight, b.dweight), (a.dbias, b.dbias)] {
            if let (Some(a), Some(b)) = (a, b) {
                assert_same_bits("a parameter's gradient", &b, &a);
            }
        }
    }

    /// A layer that takes the mean off does not see a constant that is added to its rows.
    #[test]
    fn shifting_and_scaling_change_nothing_but_roundings(
        case in cases(),
        shift in -1000f64..1000.,
        scale in 0.01f64..100.,
    ) {
        let centered = case.subject.oracle(&case.dims).is_centered();
        let shift = if centered { shift } else { 0. };
        let eps = 1e-3;
        let n = case.numbers(0.);
        let moved = n.x.iter().map(|x| scale * x + shift).collect();
        let moved = Numbers { x: moved, ..n.clone() };
        let a = run(&with_eps(&case, eps), &n, DType::F64);
        let b = run(&for_scaled(&with_eps(&case, eps), scale), &moved, DType::F64);

        // Each moved element is off by half a unit in its last place: in units of √(σ² + ε), at
        // most this. A gradient's terms are 1/√ε times those of a row of unit spread.
        let size = moved.x.iter().fold(0f64, |a, x| a.max(x.abs()));
        let off = 0.5 * f64::EPSILON * size / (scale * eps.sqrt());
        let tolerance = tolerance(DType::F64) + 10. * off;
        let y = values(&a.y).unwrap();
        assert_near("y", &values(&b.y).unwrap(), &y, &vec![0.; y.len()], tolerance);
        let dx = values(&a.dx).unwrap();
        let terms = vec![4. / eps.sqrt(); dx.len()];
        assert_near("dx", &scaled(&values(&b.dx).unwrap(), scale), &dx, &terms, tolerance);
    }

    /// Without a bias, layers are odd functions, and roundings are symmetric.
    #[test]
    fn the_sign_of_the_input_is_that_of_the_output(case in cases()) {
        let case = Case { affine: (case.affine.0, false), ..case };
        let n = case.numbers(1.);
        let negated = Numbers { x: scaled(&n.x, -1.), ..n.clone() };
        let a = run(&case, &n, DType::F32);
        let b = run(&case, &negated, DType::F32);
        let without_sign_of_zero = |t: &Tensor| (t + 0.).unwrap();
        let y = without_sign_of_zero(&b.y.neg().unwrap());
        assert_same_bits("y", &y, &without_sign_of_zero(&a.y));
        assert_same_bits("dx", &without_sign_of_zero(&b.dx), &without_sign_of_zero(&a.dx));
    }

    /// The direction's length does not matter, the magnitude's does, linearly.
    #[test]
    fn weight_norm_sees_the_direction_of_v_and_the_length_of_g(
        dims in shapes(),
        dim in proptest::option::of(0usize..2),
        exponents in (-60i32..60, -20i32..20),
        seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let g_dims: Vec<usize> = match dim {
            None => vec![],
            Some(d) => (0..dims.len()).map(|a| if a == d { dims[a] } else { 1 }).collect(),
        };
        let v = draw.normal(dims.iter().product());
        let g = draw.weight(g_dims.iter().product());
        let weight = |v: &[f64], g: &[f64]| {
            let v = tensor(v, &dims, DType::F32).unwrap();
            ops::weight_norm(&v, &tensor(g, &g_dims, DType::F32).unwrap(), dim).unwrap()
        };
        let (longer, larger) = (2f64.powi(exponents.0), 2f64.powi(exponents.1));
        let w = weight(&v, &g);
        assert_same_bits("longer v", &weight(&scaled(&v, longer), &g), &w);
        assert_same_bits("larger g", &weight(&v, &scaled(&g, larger)), &(w * larger).unwrap());
    }
}

/// Effect on a layer of a permutation along one axis of the input.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moves {
    /// The output moves along; the parameters stay.
    Input,
    /// The output moves along if the parameters do.
    InputAndParams,
}

/// How a layer follows a permutation of `axis`; none where it does not.
fn follows(kind: Kind, axis: usize, rank: usize) -> Option<Moves> {
    match kind {
        Kind::Layer { axes } | Kind::Rms { axes, .. } if axis >= rank - axes => {
            Some(Moves::InputAndParams)
        }
        Kind::LayerNoMean if axis == rank - 1 => Some(Moves::InputAndParams),
        Kind::Layer { .. } | Kind::Rms { .. } | Kind::LayerNoMean => Some(Moves::Input),
        Kind::Group { .. } if axis == 1 => None,
        _ if axis == 1 => Some(Moves::InputAndParams),
        _ => Some(Moves::Input),
    }
}

fn reordered(t: &Tensor, axis: usize, order: &[usize]) -> Tensor {
    let order: Vec<u32> = order.iter().map(|&i| i as u32).collect();
    let order = Tensor::new(order, &Device::Cpu).unwrap();
    t.index_select(&order, axis).unwrap()
}

fn reordered_values(v: &[f64], dims: &[usize], axis: usize, order: &[usize]) -> Vec<f64> {
    values(&reordered(
        &tensor(v, dims, DType::F64).unwrap(),
        axis,
        order,
    ))
    .unwrap()
}

/// Runs the layer before and after a permutation of `axis`, and compares.
fn check_permutation(case: &Case, axis: usize, order: &[usize], params_axis: Option<usize>) {
    let dims = &case.dims;
    let param_dims = case.subject.param_dims(dims);
    let n = case.numbers(1.);
    let moved_param = |p: &Option<Vec<f64>>| match (p, params_axis) {
        (Some(p), Some(axis)) => Some(reordered_values(p, param_dims, axis, order)),
        (p, _) => p.clone(),
    };
    let moved = Numbers {
        x: reordered_values(&n.x, dims, axis, order),
        dy: reordered_values(&n.dy, dims, axis, order),
        weight: moved_param(&n.weight),
        bias: moved_param(&n.bias),
    };
    let a = run(case, &n, DType::F64);
    let b = run(case, &moved, DType::F64);
    let oracle = case
        .subject
        .oracle(dims)
        .backward(&n.x, n.weight.as_deref(), &n.dy);
    for ((name, a), (_, b)) in a.named().into_iter().zip(b.named()) {
        let (axis, terms) = match name {
            "y" => (Some(axis), vec![0.; n.x.len()]),
            "dx" => (Some(axis), oracle.dx.terms.clone()),
            "dweight" => (params_axis, oracle.dweight.terms.clone()),
            _ => (params_axis, oracle.dbias.terms.clone()),
        };
        let permuted = |v: &[f64], dims: &[usize]| match axis {
            Some(axis) => reordered_values(v, dims, axis, order),
            None => v.to_vec(),
        };
        let want = permuted(&values(a).unwrap(), a.dims());
        let terms = permuted(&terms, a.dims());
        let what = format!("{name} of {:?}, axis {axis:?}", case.subject.kind);
        assert_near(
            &what,
            &values(b).unwrap(),
            &want,
            &terms,
            tolerance(DType::F64),
        );
    }
}

proptest! {
    #![proptest_config(config(250))]

    /// Every layer along every axis: the order of samples, channels, positions and features is no
    /// part of the function.
    #[test]
    fn layers_follow_permutations(case in cases()) {
        let rank = case.dims.len();
        let param_dims = case.subject.param_dims(&case.dims);
        let first_param = rank - param_dims.len();
        let one = param_dims.iter().product::<usize>() == 1;
        for axis in 0..rank {
            let order = Draw::new(case.seed ^ axis as u64).permutation(case.dims[axis]);
            let params_axis = match follows(case.subject.kind, axis, rank) {
                None => continue,
                Some(Moves::Input) => None,
                Some(Moves::InputAndParams) if one => None,
                Some(Moves::InputAndParams) if param_dims.len() > 1 => Some(axis - first_param),
                Some(Moves::InputAndParams) => Some(0),
            };
            check_permutation(&case, axis, &order, params_axis);
        }
    }

    /// Channels may change places within their group, and groups as wholes.
    #[test]
    fn group_norm_follows_permutations_within_and_of_groups(
        (groups, per_group) in (1usize..5, 1usize..5),
        (n, space) in (1usize..4, 1usize..9),
        seed in any::<u64>(),
    ) {
        let case = Case {
            subject: Subject::new(Kind::Group { groups }, 1e-5),
            dims: vec![n, groups * per_group, space],
            affine: (true, true),
            seed,
        };
        let mut draw = Draw::new(seed);
        let order: Vec<usize> = (draw.permutation(groups).into_iter())
            .flat_map(|g| draw.permutation(per_group).into_iter().map(move |c| g * per_group + c))
            .collect();
        check_permutation(&case, 1, &order, Some(0));
    }

    /// The rows of a weight, and the elements within them.
    #[test]
    fn weight_norm_follows_permutations(
        dims in shapes(),
        dim in 0usize..2,
        axis in 0usize..2,
        seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let g_dims: Vec<usize> =
            (0..dims.len()).map(|a| if a == dim { dims[a] } else { 1 }).collect();
        let order = draw.permutation(dims[axis]);
        let move_g = |t: &Tensor| if axis == dim { reordered(t, axis, &order) } else { t.clone() };
        let v = tensor(&draw.normal(dims.iter().product()), &dims, DType::F64).unwrap();
        let dw = tensor(&draw.normal(dims.iter().product()), &dims, DType::F64).unwrap();
        let g = tensor(&draw.weight(dims[dim]), &g_dims, DType::F64).unwrap();
        let results = |v: &Tensor, g: &Tensor, dw: &Tensor| {
            let v = variable(&values(v).unwrap(), &dims, DType::F64).unwrap();
            let g = variable(&values(g).unwrap(), &g_dims, DType::F64).unwrap();
            let w = ops::weight_norm(&v, &g, Some(dim)).unwrap();
            let grads = backward(&w, dw).unwrap();
            [w, gradient(&grads, &v), gradient(&grads, &g)]
        };
        let [w, dv, dg] = results(&v, &g, &dw);
        let moved = |t| reordered(t, axis, &order);
        let after = results(&moved(&v), &move_g(&g), &moved(&dw));
        for (after, before) in after.iter().zip([moved(&w), moved(&dv), move_g(&dg)]) {
            let before = values(&before).unwrap();
            // Rows of few elements divide by short norms.
            let terms = vec![0.; before.len()];
            assert_near("after", &values(after).unwrap(), &before, &terms, 1e-10);
        }
    }

    /// Inference by running statistics, which move with the channels.
    #[test]
    fn fixed_statistics_follow_permutations(
        dims in shapes(),
        axis in 0usize..2,
        seed in any::<u64>(),
    ) {
        let channels = dims[1];
        let mut draw = Draw::new(seed);
        let order = draw.permutation(dims[axis]);
        let x = tensor(&draw.normal(dims.iter().product()), &dims, DType::F32).unwrap();
        let line = |v: Vec<f64>| tensor(&v, &[channels], DType::F32).unwrap();
        let [mean, weight, bias] = [(); 3].map(|()| line(draw.normal(channels)));
        let var = line(draw.normal(channels).iter().map(|z| 0.1 + z * z).collect());
        let move_line = |t: &Tensor| if axis == 1 { reordered(t, 0, &order) } else { t.clone() };
        let infer = |x: &Tensor, [m, v, w, b]: [&Tensor; 4]| {
            ops::batch_norm_inference(x, [m, v], Some(w), Some(b), 1e-5).unwrap()
        };
        let y = infer(&x, [&mean, &var, &weight, &bias]);
        let moved = [&mean, &var, &weight, &bias].map(move_line);
        let after = infer(&reordered(&x, axis, &order), moved.each_ref());
        assert_same_bits("y", &after, &reordered(&y, axis, &order));
    }
}

/// Training is blind to the order of samples, so running statistics are too.
#[test]
fn running_statistics_do_not_depend_on_the_order_of_samples() -> Result<()> {
    let dims = [6, 3, 4];
    let mut draw = Draw::new(8);
    let x = tensor(&draw.normal(72), &dims, DType::F64)?;
    let order = draw.permutation(6);
    let after = |x: &Tensor| {
        let vars = candle_nn::VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let layer = candle_norm::batch_norm(3, BatchNormOptions::default(), vb)?;
        layer.forward_train(x)?;
        let stats = layer.running_stats().expect("tracked").snapshot()?;
        Ok::<_, candle_core::Error>([values(&stats.mean)?, values(&stats.var)?])
    };
    for (a, b) in after(&x)?.iter().zip(after(&reordered(&x, 0, &order))?) {
        assert_near("statistics", &b, a, &[0.; 3], 1e-13);
    }
    Ok(())
}

/// A weight-normalized layer follows its inputs: features with the columns of `v`, samples as they
/// are.
#[test]
fn weight_normalized_layers_follow_permutations() -> Result<()> {
    let mut draw = Draw::new(10);
    let (x, v) = (draw.normal(12), draw.normal(8));
    let build = |v: &[f64]| {
        let tensors = [
            (
                "parametrizations.weight.original0",
                tensor(&[1., 2.], &[2, 1], DType::F64)?,
            ),
            (
                "parametrizations.weight.original1",
                tensor(v, &[2, 4], DType::F64)?,
            ),
            ("bias", tensor(&[0.5, -1.], &[2], DType::F64)?),
        ];
        let tensors = tensors
            .into_iter()
            .map(|(n, t)| (n.to_string(), t))
            .collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        weight_norm::linear(4, 2, weight_norm::WeightNormOptions::default(), vb)
    };
    let forward = |x: &[f64], v: &[f64]| build(v)?.forward(&tensor(x, &[3, 4], DType::F64)?);
    let y = forward(&x, &v)?;
    let (features, samples) = ([2, 0, 3, 1], [1, 2, 0]);
    let by_features = |x: &[f64], rows| reordered_values(x, &[rows, 4], 1, &features);
    let after = forward(&by_features(&x, 3), &by_features(&v, 2))?;
    assert_near("features", &values(&after)?, &values(&y)?, &[0.; 6], 1e-14);
    let after = forward(&reordered_values(&x, &[3, 4], 0, &samples), &v)?;
    assert_same_bits("samples", &after, &reordered(&y, 0, &samples));
    Ok(())
}
