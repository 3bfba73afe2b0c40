//! Every layer against loops in float64: output, gradients, running statistics.

use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{Module, VarBuilder, VarMap};
use candle_norm::{
    Affine, BatchNormOptions, Cast, InstanceNormOptions, Path, RmsNormOptions, ops, with_path,
};
use proptest::prelude::*;

use super::{FLOATS, RAGGED, cases, config, dtypes, shapes};
use testkit::compare::{assert_close, assert_gradient, assert_near, tolerance, unit_roundoff};
use testkit::data::{Draw, rounded, tensor, values, variable};
use testkit::emulated;
use testkit::oracle::{self, along};
use testkit::subjects::{DTypes, Kind, Numbers, Subject, backward, gradient};

/// The paths that serve every input.
const PATHS: [Path; 2] = [Path::Auto, Path::Composed];

proptest! {
    #![proptest_config(config(600))]

    #[test]
    fn random_layers_give_what_the_oracle_gives(
        case in cases(),
        dtypes in dtypes(),
        mean in prop::sample::select(vec![0., 1., -30., 3000.]),
    ) {
        let mut case = case;
        if dtypes.input == DType::F16 {
            // The slope of a constant row, 1/√ε, times dy · w stays below 65 504.
            case.subject.eps = case.subject.eps.max(1e-5);
        }
        let numbers = case.numbers(mean);
        for path in PATHS {
            let ran = with_path(path, || numbers.run(case.subject, &case.dims, dtypes)).unwrap();
            let tolerance = tolerance(dtypes.input);
            numbers.check_against_oracle(&ran, case.subject, &case.dims, dtypes, tolerance);
        }
    }
}

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn random_weights_are_normalized_as_the_oracle_does(
        dims in prop_oneof![
            shapes(),
            prop::collection::vec(1usize..50, 1..=2),
        ],
        dim in proptest::option::of(any::<proptest::sample::Index>()),
        dtypes in dtypes(),
        size in prop::sample::select(vec![1., 1e-3, 100.]),
        seed in any::<u64>(),
    ) {
        let dim = dim.map(|d| d.index(dims.len()));
        let rows = along(&dims, &Vec::from_iter(dim));
        let g_dims: Vec<usize> = match dim {
            None => vec![],
            Some(d) => (0..dims.len()).map(|a| if a == d { dims[a] } else { 1 }).collect(),
        };
        let n = rows.len();
        let mut draw = Draw::new(seed);
        let round = |v: Vec<f64>, dtype| rounded(&v, dtype).unwrap();
        let v = draw.normal(n).into_iter().map(|z| size * z).collect();
        let v = round(v, dtypes.input);
        let dw = round(draw.normal(n), dtypes.input);
        let g = round(draw.weight(g_dims.iter().product()), dtypes.params);

        let vt = variable(&v, &dims, dtypes.input).unwrap();
        let gt = variable(&g, &g_dims, dtypes.params).unwrap();
        let w = ops::weight_norm(&vt, &gt, dim).unwrap();
        let grads = backward(&w, &tensor(&dw, &dims, dtypes.input).unwrap()).unwrap();
        let (dv, dg) = (gradient(&grads, &vt), gradient(&grads, &gt));
        let (dv_want, dg_want) = oracle::weight_norm_backward(&v, &g, &rows, &dw);
        let tolerance = tolerance(dtypes.input);
        prop_assert!(w.is_contiguous() && dv.is_contiguous() && dg.is_contiguous());
        assert_close("w", &w, &oracle::weight_norm(&v, &g, &rows), tolerance);
        assert_gradient("dv", &dv, &dv_want, tolerance);
        assert_gradient("dg", &dg, &dg_want, tolerance);
    }
}

/// Every layer that normalizes rows of `len` values, `rows` of them, with the shape of its input.
fn of_rows(rows: usize, len: usize) -> Vec<(Kind, Vec<usize>)> {
    vec![
        (Kind::Layer { axes: 1 }, vec![rows, len]),
        (Kind::LayerNoMean, vec![rows, len]),
        (
            Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            vec![rows, len],
        ),
        (Kind::LayerChannelsFirst, vec![1, len, rows]),
        (Kind::RmsChannelsFirst, vec![rows, len, 1]),
        (Kind::Group { groups: 1 }, vec![rows, 1, len]),
        (Kind::Group { groups: rows }, vec![1, rows, len]),
        (Kind::Instance, vec![1, rows, len]),
        (Kind::Batch, vec![len, rows]),
        (Kind::BatchNoMean, vec![1, rows, len]),
        (Kind::Switch, vec![1, rows, len]),
    ]
}

fn params_of(kind: Kind, dims: &[usize]) -> usize {
    let subject = Subject::new(kind, 1e-5);
    subject.param_dims(dims).iter().product()
}

/// Affine layers of rows of every awkward length, on rows that `draw_x` fills.
fn check_rows(dtype: DType, lengths: &[usize], draw_x: impl Fn(&mut Draw, usize) -> Vec<f64>) {
    for &len in lengths {
        for (kind, dims) in of_rows(3, len) {
            let mut draw = Draw::new(len as u64);
            let params = params_of(kind, &dims);
            let numbers = Numbers {
                x: draw_x(&mut draw, 3 * len),
                dy: draw.normal(3 * len),
                weight: Some(draw.weight(params)),
                bias: Some(draw.normal(params)),
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

#[test]
fn rows_of_any_length() {
    let short: Vec<usize> = (2..=70).collect();
    for dtype in FLOATS {
        check_rows(dtype, &short, Draw::normal);
        check_rows(dtype, &RAGGED, Draw::normal);
    }
}

#[test]
fn means_of_thousands_of_sigmas() {
    for dtype in [DType::F32, DType::F64] {
        for sigma in [1., 1e-3, 1e3] {
            for mean in [3000., -3000.] {
                check_rows(dtype, &[2, 3, 33, 257, 1031, 4096], |draw, n| {
                    draw.normal(n).iter().map(|z| sigma * (mean + z)).collect()
                });
            }
        }
    }
}

/// Every square is the same: additions of a constant round in one direction.
#[test]
fn rows_of_one_magnitude() {
    for dtype in FLOATS {
        for size in [0.1, 1., 7.3] {
            check_rows(dtype, &[2, 3, 31, 32, 33, 1031, 4096], |draw, n| {
                draw.signs(n, size)
            });
        }
    }
}

/// A difference of two terms, all of whose digits cancel in a naive variance.
#[test]
fn one_outlier_in_a_long_row() {
    check_rows(DType::F32, &[33, 1031, 4096], |draw, n| {
        let mut x = draw.normal(n);
        x[n / 2] = 1e4;
        x
    });
}

#[test]
fn parameter_gradients_over_many_rows() {
    for dtype in FLOATS {
        for (kind, dims) in [
            (Kind::Layer { axes: 1 }, [16384, 3, 2]),
            (Kind::LayerNoMean, [16384, 3, 2]),
            (
                Kind::Rms {
                    axes: 1,
                    offset: 1.,
                },
                [16384, 1, 5],
            ),
            (Kind::LayerChannelsFirst, [128, 3, 128]),
            (Kind::RmsChannelsFirst, [1, 3, 16384]),
            (Kind::Group { groups: 1 }, [16384, 2, 1]),
            (Kind::Group { groups: 2 }, [127, 2, 129]),
            (Kind::Instance, [4096, 2, 4]),
            (Kind::Batch, [16384, 2, 1]),
            (Kind::BatchNoMean, [4099, 2, 4]),
            (Kind::Switch, [4099, 2, 4]),
        ] {
            let mut draw = Draw::new(7);
            let n = dims.iter().product();
            let params = params_of(kind, &dims);
            let numbers = Numbers {
                x: draw.normal(n).iter().map(|z| 2. + z).collect(),
                dy: draw.normal(n).iter().map(|z| 0.5 + z).collect(),
                weight: Some(draw.weight(params)),
                bias: Some(draw.normal(params)),
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

/// A million additions of the same number to one `f32` end off by a thousandth.
#[test]
fn bias_gradients_of_a_constant_over_a_million_rows() -> Result<()> {
    let rows = match emulated::is_chosen() {
        true => 50_000,
        false => 1_000_000,
    };
    for (kind, dims) in [
        (Kind::Layer { axes: 1 }, vec![rows, 2]),
        (
            Kind::Rms {
                axes: 1,
                offset: 0.,
            },
            vec![rows, 2],
        ),
        (Kind::LayerChannelsFirst, vec![rows / 1000, 2, 1000]),
        (Kind::Group { groups: 1 }, vec![rows, 2]),
        (Kind::Instance, vec![1, 2, rows]),
        (Kind::Batch, vec![rows, 2]),
        (Kind::Switch, vec![1, 2, rows]),
    ] {
        let mut draw = Draw::new(3);
        let n = dims.iter().product();
        let numbers = Numbers {
            x: draw.normal(n),
            dy: vec![0.1; n],
            weight: Some(vec![1.; 2]),
            bias: Some(vec![0.; 2]),
        };
        let ran = numbers.run(Subject::new(kind, 1e-5), &dims, DType::F32.into())?;
        let want = rounded(&[0.1], DType::F32)?[0] * rows as f64;
        let dbias = ran.dbias.expect("a bias");
        assert_close(
            &format!("{kind:?}"),
            &dbias,
            &[want; 2],
            tolerance(DType::F32),
        );
    }
    Ok(())
}

/// The bias of a weight-normalized layer is a parameter like any other. (candle has no bf16 product
/// on the CPU.)
#[test]
fn bias_gradients_of_weight_norm_over_many_rows() -> Result<()> {
    for (dtype, rows) in [
        (DType::F64, 4099),
        (DType::F32, 1_000_000),
        (DType::F16, 4096),
    ] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
        let layer = candle_norm::weight_norm::linear(2, 1, None.into(), vb)?;
        let x = tensor(&Draw::new(1).normal(2 * rows), &[rows, 2], dtype)?;
        let dy = tensor(&vec![0.1; rows], &[rows, 1], dtype)?;
        let grads = backward(&layer.forward(&x)?, &dy)?;
        let dbias = gradient(&grads, layer.bias().expect("a bias"));
        let want = rounded(&[0.1], dtype)?[0] * rows as f64;
        assert_close(
            &format!("dbias in {dtype:?}"),
            &dbias,
            &[want],
            tolerance(dtype),
        );
    }
    Ok(())
}

/// Llama's order rounds the normalized value before it multiplies: twice the roundings, twice the
/// tolerance.
#[test]
fn casting_before_the_weight_rounds_twice() -> Result<()> {
    let dims = [5, 257];
    for dtype in FLOATS {
        let mut draw = Draw::new(11);
        let numbers = Numbers {
            x: draw.normal(5 * 257),
            dy: draw.normal(5 * 257),
            weight: Some(draw.weight(257)),
            bias: None,
        };
        let n = numbers.rounded(dtype.into())?;
        let options = RmsNormOptions {
            cast: Cast::BeforeWeight,
            ..Default::default()
        };
        let w = variable(n.weight.as_ref().expect("a weight"), &[257], dtype)?;
        let tensors = [("weight".to_string(), w.clone())].into_iter().collect();
        let vb = VarBuilder::from_tensors(tensors, dtype, &Device::Cpu);
        let x = variable(&n.x, &dims, dtype)?;
        let y = candle_norm::rms_norm(257, options, vb)?.forward(&x)?;

        // To the bit: both roundings are where the option says.
        let xhat = oracle::Norm::layer(&dims, 1, 1e-6).without_mean();
        let xhat = rounded(&xhat.forward(&n.x, None, None).y, dtype)?;
        let weight = values(&w)?;
        let product: Vec<f64> = xhat
            .iter()
            .zip(weight.iter().cycle())
            .map(|(x, w)| x * w)
            .collect();
        let twice = rounded(&product, dtype)?;
        let off = values(&y)?
            .iter()
            .zip(&twice)
            .filter(|(a, b)| a != b)
            .count();
        if dtype == DType::F16 || dtype == DType::BF16 {
            // An f32 that lies next to the middle of two half-precision numbers may go either way.
            assert!(
                off <= twice.len() / 200,
                "{off} of {} differ in {dtype:?}",
                twice.len()
            );
        }

        let grads = backward(&y, &tensor(&n.dy, &dims, dtype)?)?;
        let norm = oracle::Norm::layer(&dims, 1, 1e-6).without_mean();
        let back = norm.backward(&n.x, n.weight.as_deref(), &n.dy);
        let tolerance = 2. * tolerance(dtype);
        assert_close("y", &y, &twice, tolerance);
        assert_gradient("dx", &gradient(&grads, &x), &back.dx, tolerance);
        assert_gradient("dweight", &gradient(&grads, &w), &back.dweight, tolerance);
    }
    Ok(())
}

/// The epsilon of the dtype that statistics are formed in.
#[test]
fn rms_norm_without_eps_takes_that_of_the_accumulator() -> Result<()> {
    for (dtype, eps, size) in [
        (DType::F64, f64::EPSILON, 1e-8),
        (DType::F32, f32::EPSILON as f64, 1e-4),
        (DType::F16, f32::EPSILON as f64, 1e-3),
        (DType::BF16, f32::EPSILON as f64, 1e-4),
    ] {
        let x: Vec<f64> = Draw::new(2).normal(90).iter().map(|z| size * z).collect();
        let x = rounded(&x, dtype)?;
        let y = ops::rms_norm(
            &tensor(&x, &[3, 30], dtype)?,
            30,
            None,
            ops::RmsOptions::default(),
        )?;
        let want = oracle::Norm::layer(&[3, 30], 1, eps).without_mean();
        let want = want.forward(&x, None, None).y;
        assert_close(&format!("{dtype:?}"), &y, &want, tolerance(dtype));
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(150))]

    /// Training moves the statistics as the formula says; inference then normalizes by them, with
    /// its own gradients.
    #[test]
    fn running_statistics_follow_the_formula(
        dims in shapes(),
        instance in any::<bool>(),
        momentum in prop::sample::select(vec![None, Some(0.), Some(0.1), Some(1.)]),
        dtypes in dtypes(),
        mean in prop::sample::select(vec![0., 5.]),
        seed in any::<u64>(),
    ) {
        let n: usize = dims.iter().product();
        let channels = dims[1];
        let values_of = if instance { n / (dims[0] * channels) } else { n / channels };
        prop_assume!(values_of > 1 && (!instance || dims.len() > 2));
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtypes.params, &Device::Cpu);
        let affine = Affine::WeightAndBias;
        let (layer, stats): (Box<dyn ModuleT>, _) = if instance {
            let options = InstanceNormOptions {
                momentum,
                affine,
                track_running_stats: true,
                ..Default::default()
            };
            let layer = candle_norm::instance_norm(channels, options, vb).unwrap();
            let stats = layer.running_stats().cloned();
            (Box::new(layer), stats)
        } else {
            let options = BatchNormOptions { momentum, affine, ..Default::default() };
            let layer = candle_norm::batch_norm(channels, options, vb).unwrap();
            let stats = layer.running_stats().cloned();
            (Box::new(layer), stats)
        };
        let stats = stats.expect("statistics are tracked");
        let subject = Subject::new(if instance { Kind::Instance } else { Kind::Batch }, 1e-5);
        let oracle = subject.oracle(&dims);
        let mut draw = Draw::new(seed);
        let (mut running_mean, mut running_var) = (vec![0.; channels], vec![1.; channels]);
        let mut rounded_alike = vec![0.; channels];
        for batch in 1..=3 {
            let x: Vec<f64> = draw.normal(n).iter().map(|z| mean + z * batch as f64).collect();
            let x = rounded(&x, dtypes.input).unwrap();
            layer.forward_t(&tensor(&x, &dims, dtypes.input).unwrap(), true).unwrap();
            let forward = oracle.forward(&x, None, None);
            let m = momentum.unwrap_or(1. / batch as f64);
            let samples = forward.mean.len() / channels;
            for c in 0..channels {
                // Of the samples, one after the other: rows are sample by sample, channel by
                // channel.
                let (mut mean, mut var) = (0., 0.);
                for row in (c..forward.mean.len()).step_by(channels) {
                    let count = forward.count[row];
                    mean += forward.mean[row] / samples as f64;
                    var += forward.var[row] * count / (count - 1.) / samples as f64;
                }
                running_mean[c] += m * (mean - running_mean[c]);
                running_var[c] += m * (var - running_var[c]);
                // A mean in f32 is the mean of distances, each rounded by at most half an ulp.
                // Those of f32 inputs are rounded up as often as down. The numbers of a half dtype
                // lie on so coarse a grid that all distances of one binade are rounded by the same
                // amount, and nothing of it averages out.
                let unit = match dtypes.input {
                    DType::F16 | DType::BF16 => unit_roundoff(dtypes.input),
                    _ => 0.,
                };
                let distance = mean_distance(&x, &dims, &forward.mean, c);
                rounded_alike[c] += m * (unit * distance - rounded_alike[c]);
            }
            // Statistics are f32 also where the model is in half precision.
            let stored = if dtypes.params == DType::F64 { DType::F64 } else { DType::F32 };
            let now = stats.snapshot().unwrap();
            prop_assert_eq!(now.num_batches_tracked, batch);
            prop_assert_eq!((now.mean.dtype(), now.var.dtype()), (stored, stored));
            // A mean is a sum of terms of either sign, of the size of the spread over the root of
            // their number.
            let terms = mean + 3. / (n as f64 / channels as f64).sqrt();
            let got: Vec<f64> = (values(&now.mean).unwrap().iter().zip(&running_mean))
                .zip(&rounded_alike)
                .map(|((got, want), off)| got - (got - want).clamp(-off, *off))
                .collect();
            let terms = vec![terms; channels];
            assert_near("running_mean", &got, &running_mean, &terms, tolerance(stored));
            assert_close("running_var", &now.var, &running_var, tolerance(stored));
        }

        let fixed = stats.snapshot().unwrap();
        let fixed = (&values(&fixed.mean).unwrap()[..], &values(&fixed.var).unwrap()[..]);
        let data = vars.data().lock().unwrap();
        let (wt, bt) = (data["weight"].clone(), data["bias"].clone());
        let (w, b) = (draw.weight(channels), draw.normal(channels));
        let (w, b) = (rounded(&w, dtypes.params).unwrap(), rounded(&b, dtypes.params).unwrap());
        wt.set(&tensor(&w, &[channels], dtypes.params).unwrap()).unwrap();
        bt.set(&tensor(&b, &[channels], dtypes.params).unwrap()).unwrap();
        let x = rounded(&draw.normal(n), dtypes.input).unwrap();
        let dy = rounded(&draw.normal(n), dtypes.input).unwrap();
        let xt = variable(&x, &dims, dtypes.input).unwrap();
        let y = layer.forward_t(&xt, false).unwrap();
        let grads = backward(&y, &tensor(&dy, &dims, dtypes.input).unwrap()).unwrap();
        let tolerance = tolerance(dtypes.input);
        let want = oracle.forward_fixed(&x, fixed, Some(&w), Some(&b));
        let back = oracle.backward_fixed(&x, fixed, Some(&w), &dy);
        assert_close("y", &y, &want, tolerance);
        assert_gradient("dx", &gradient(&grads, &xt), &back.dx, tolerance);
        assert_gradient("dweight", &gradient(&grads, &wt), &back.dweight, tolerance);
        assert_gradient("dbias", &gradient(&grads, &bt), &back.dbias, tolerance);
        for name in ["running_mean", "running_var", "num_batches_tracked"] {
            prop_assert!(grads.get(&data[name]).is_none(), "{} has a gradient", name);
        }
    }
}

/// The mean of `|x − mean|` over channel `channel` of `x`: `means` has one of each channel, or of
/// each sample and channel.
fn mean_distance(x: &[f64], dims: &[usize], means: &[f64], channel: usize) -> f64 {
    let (channels, inner) = (dims[1], dims[2..].iter().product::<usize>());
    let planes = x.chunks(inner).enumerate().skip(channel).step_by(channels);
    let distances = planes.flat_map(|(plane, x)| {
        let mean = means[plane % means.len()];
        x.iter().map(move |x| (x - mean).abs())
    });
    distances.sum::<f64>() / (dims[0] * inner) as f64
}

#[test]
fn functions_give_what_layers_give() -> Result<()> {
    use testkit::compare::assert_same_bits;
    use testkit::subjects::Params;

    let dims = [3, 4, 5];
    let mut draw = Draw::new(4);
    let x = tensor(&draw.normal(60), &dims, DType::F32)?;
    let eps = 1e-5;
    for (kind, params) in [
        (Kind::Layer { axes: 2 }, vec![4, 5]),
        (
            Kind::Rms {
                axes: 1,
                offset: 1.,
            },
            vec![5],
        ),
        (Kind::Group { groups: 2 }, vec![4]),
        (Kind::Instance, vec![4]),
        (Kind::Batch, vec![4]),
    ] {
        let n = params.iter().product();
        let w = Some(tensor(&draw.weight(n), &params, DType::F32)?);
        let b = Some(tensor(&draw.normal(n), &params, DType::F32)?);
        let no_bias = matches!(kind, Kind::Rms { .. });
        let b = b.filter(|_| !no_bias);
        let layer = Subject::new(kind, eps);
        let y = layer.forward(
            &x,
            &Params {
                weight: w.clone(),
                bias: b.clone(),
            },
        )?;
        let (w, b) = (w.as_ref(), b.as_ref());
        let function = match kind {
            Kind::Layer { .. } => ops::layer_norm(&x, (4, 5), w, b, eps)?,
            Kind::Rms { .. } => ops::rms_norm(
                &x,
                5,
                w,
                ops::RmsOptions {
                    eps: Some(eps),
                    offset: 1.,
                    cast: Cast::AfterWeight,
                },
            )?,
            Kind::Group { groups } => ops::group_norm(&x, groups, w, b, eps)?,
            Kind::Instance => ops::instance_norm(&x, w, b, eps)?.0,
            _ => ops::batch_norm(&x, w, b, eps)?.0,
        };
        assert_same_bits(&format!("{kind:?}"), &function, &y);
    }
    let mean = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    let var = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    let function = ops::batch_norm_inference(&x, [&mean, &var], None, None, eps)?;
    let layer = Subject::new(Kind::Batch, eps).build(&x, &Params::default())?;
    assert_same_bits("inference", &function, &layer.forward_t(&x, false)?);
    Ok(())
}

/// Gradients of `f32` parameters of a half-precision input are not rounded to the input's dtype on
/// the way.
#[test]
fn gradients_of_wider_parameters_are_as_precise_as_these() -> Result<()> {
    for input in [DType::F16, DType::BF16] {
        let dtypes = DTypes {
            input,
            params: DType::F32,
        };
        let mut draw = Draw::new(9);
        let numbers = Numbers {
            x: draw.normal(64),
            dy: draw.normal(64),
            weight: Some(draw.weight(8)),
            bias: Some(draw.normal(8)),
        };
        let ran = numbers.run(Subject::new(Kind::Layer { axes: 1 }, 1e-5), &[8, 8], dtypes)?;
        let n = numbers.rounded(dtypes)?;
        let oracle = oracle::Norm::layer(&[8, 8], 1, 1e-5);
        let back = oracle.backward(&n.x, n.weight.as_deref(), &n.dy);
        let f32s = tolerance(DType::F32);
        assert_gradient("dweight", &ran.dweight.expect("one"), &back.dweight, f32s);
        assert_gradient("dbias", &ran.dbias.expect("one"), &back.dbias, f32s);
    }
    Ok(())
}
