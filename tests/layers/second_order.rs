//! Second derivatives: the gradient of a function of a layer's gradients is what central
//! differences of these give.
//!
//! candle keeps the graph of a backward pass only where the environment variable
//! `CANDLE_GRAD_DO_NOT_DETACH` is set, and reads it once per thread. So every test runs itself
//! again in a process of its own, with the variable set.

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, VarBuilder,
};
use candle_norm::weight_norm::{self, WeightNormOptions};
use candle_norm::{Cast, FrozenNorm, Path, batch_norm, ops, with_path};

use testkit::child;
use testkit::data::{Draw, tensor, values, variable};
use testkit::functions::FUNCTIONS;
use testkit::subjects::{Kind, Params, Subject};
use testkit::table::{Layer, shapes};

const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// Runs `body` of the test called `test` in a process of its own in which candle keeps graphs.
fn in_a_process_of_its_own(test: &str, body: impl FnOnce() -> Result<()>) {
    if std::env::var(SWITCH).is_ok_and(|v| v == "1") {
        return body().expect("tensors that fit");
    }
    run_again(test, Some("1"));
}

/// Runs one test of this file in another process, with the switch set or without it.
fn run_again(test: &str, switch: Option<&str>) {
    let name = child::name(module_path!(), test);
    let mut command = child::command(&name);
    match switch {
        Some(value) => command.env(SWITCH, value),
        None => command.env_remove(SWITCH),
    };
    child::assert_passes(&name, &mut command);
}

/// An input of a function: its numbers and its shape.
type Input = (Vec<f64>, Vec<usize>);

/// A number made of the gradients of `f`, which is itself differentiable: with L = Σ c·y + ½ Σ
/// d·y², the sum over all inputs of r · (∂L/∂input)².
///
/// The square in L makes its gradient depend on every input, a bias too.
fn of_gradients(f: &impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<Tensor> {
    let y = f(inputs)?;
    let mut draw = Draw::new(1);
    let mut like = |t: &Tensor| tensor(&draw.normal(t.elem_count()), t.dims(), DType::F64);
    let (c, d) = (like(&y)?, like(&y)?);
    let loss = ((&y * c)? + (y.sqr()? * (d * 0.5)?)?)?.sum_all()?;
    let grads = loss.backward()?;
    let mut sum = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for input in inputs {
        let gradient = grads
            .get(input)
            .expect("a gradient that reaches every input");
        sum = (sum + (gradient.sqr()? * like(input)?)?.sum_all()?)?;
    }
    Ok(sum)
}

/// Compares the second derivatives of `f` with central differences of its first.
#[track_caller]
fn check(what: &str, inputs: &[Input], f: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<()> {
    const STEP: f64 = 1e-5;
    let variables = |inputs: &[Input]| {
        let made = inputs.iter().map(|(v, dims)| variable(v, dims, DType::F64));
        made.collect::<Result<Vec<_>>>()
    };
    let leaves = variables(inputs)?;
    let grads = of_gradients(&f, &leaves)?.backward()?;
    for (i, leaf) in leaves.iter().enumerate() {
        let got = grads
            .get(leaf)
            .unwrap_or_else(|| panic!("{what}: no second derivative reaches input {i}"));
        let got = values(got)?;
        let mut want = vec![];
        for element in 0..got.len() {
            let moved = |by: f64| {
                let mut inputs = inputs.to_vec();
                inputs[i].0[element] += by;
                of_gradients(&f, &variables(&inputs)?)?.to_scalar::<f64>()
            };
            want.push((moved(STEP)? - moved(-STEP)?) / (2. * STEP));
        }
        let size = want.iter().fold(0f64, |a, v| a.max(v.abs()));
        assert!(
            size > 1e-3,
            "{what}: input {i} has no second derivative to compare"
        );
        for (element, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                (got - want).abs() <= 1e-6 * size,
                "{what}: input {i}, element {element}: {got}, should be {want}"
            );
        }
    }
    Ok(())
}

fn normal(draw: &mut Draw, dims: &[usize]) -> Input {
    (draw.normal(dims.iter().product()), dims.to_vec())
}

/// Of a sum, through both outputs.
#[test]
fn add_norm() {
    in_a_process_of_its_own("add_norm", || {
        for dims in [[3, 5], [2, 37]] {
            let mut draw = Draw::new(4);
            let mut inputs = vec![normal(&mut draw, &dims), normal(&mut draw, &dims)];
            inputs.extend([(); 2].map(|()| normal(&mut draw, &dims[1..])));
            for path in [Path::Fused, Path::Composed] {
                let layer = |t: &[Tensor]| {
                    let (y, sum) = ops::add_layer_norm(
                        &t[0],
                        &t[1],
                        dims[1],
                        [Some(&t[2]), Some(&t[3])],
                        1e-2,
                    )?;
                    Tensor::cat(&[y, sum], 0)
                };
                let rms = |t: &[Tensor]| {
                    let (weight, eps) = (Some(&t[2]), Some(1e-2));
                    let cast = Cast::AfterWeight;
                    let (y, sum) = ops::add_rms_norm(
                        &t[0],
                        &t[1],
                        dims[1],
                        weight,
                        ops::RmsOptions {
                            eps,
                            offset: 1.,
                            cast,
                        },
                    )?;
                    Tensor::cat(&[y, sum], 0)
                };
                let what = format!("{dims:?}, {path:?}");
                with_path(path, || {
                    check(&format!("add and layer norm of {what}"), &inputs, layer)?;
                    check(&format!("add and RMS norm of {what}"), &inputs[..3], rms)
                })?;
            }
        }
        Ok(())
    })
}

/// The layer, in training, by its input and all its parameters, and with a bias alone.
fn check_kind(kind: Kind, dims: &[usize]) -> Result<()> {
    let subject = Subject::new(kind, 1e-2);
    let param_dims = subject.param_dims(dims);
    let mut draw = Draw::new(2);
    let mut inputs = vec![normal(&mut draw, dims)];
    inputs.extend((0..kind.num_params()).map(|_| normal(&mut draw, param_dims)));
    let forward = |t: &[Tensor]| subject.forward(&t[0], &Params::new(&t[1..]));
    let shifted = |t: &[Tensor]| {
        let params = Params {
            weight: None,
            bias: Some(t[1].clone()),
        };
        subject.forward(&t[0], &params)
    };
    for path in [Path::Fused, Path::Composed] {
        let what = format!("{kind:?} of {dims:?}, {path:?}");
        with_path(path, || {
            check(&what, &inputs, forward)?;
            if !kind.has_bias() {
                return Ok(());
            }
            check(&format!("{what}, a bias alone"), &inputs[..2], shifted)
        })?;
    }
    Ok(())
}

/// Every kind of a layer.
fn check_layer(layer: &'static Layer) {
    in_a_process_of_its_own(&format!("each::{}", layer.name), || {
        for (kind, dims) in shapes(layer.tiny) {
            check_kind(kind, dims)?;
        }
        Ok(())
    })
}

mod each {
    testkit::each_layer!(super::check_layer);
}

/// With the shares as inputs, and the statistics of the batch from elsewhere.
#[test]
fn switch_norm() {
    in_a_process_of_its_own("switch_norm", || {
        let mut draw = Draw::new(11);
        let inputs = [
            normal(&mut draw, &[3, 2, 5]),
            normal(&mut draw, &[2]),
            normal(&mut draw, &[2]),
            normal(&mut draw, &[3]),
            normal(&mut draw, &[3]),
        ];
        let mean = Tensor::new(&[0.3, -0.5], &Device::Cpu)?;
        let var = Tensor::new(&[0.7, 1.5], &Device::Cpu)?;
        let batches = [
            ops::SwitchBatch::Own,
            ops::SwitchBatch::Given(&mean, &var),
            ops::SwitchBatch::Absent,
        ];
        for path in [Path::Fused, Path::Composed] {
            for (batch, instance) in [(0, true), (0, false), (1, true), (2, true)] {
                let options = ops::SwitchOptions {
                    instance,
                    batch: batches[batch],
                    unbiased: batch == 0,
                    eps: 0.1,
                };
                let count = 1 + usize::from(instance) + usize::from(batch < 2);
                let f = |v: &[Tensor]| {
                    let (mean, var) = (v[3].narrow(0, 0, count)?, v[4].narrow(0, 0, count)?);
                    let shares = [&mean, &var];
                    let norm =
                        || ops::switch_norm(&v[0], Some(&v[1]), Some(&v[2]), shares, options);
                    Ok(with_path(path, norm)?.0)
                };
                check(&format!("switch norm, {path:?}, {options:?}"), &inputs, f)?;
            }
        }
        Ok(())
    })
}

/// With fixed statistics, `y` is linear in `x` and in the parameters, and their products are what
/// is left.
#[test]
fn batch_norm_with_fixed_statistics() {
    in_a_process_of_its_own("batch_norm_with_fixed_statistics", || {
        let mut draw = Draw::new(3);
        let inputs = [
            normal(&mut draw, &[2, 3, 4]),
            normal(&mut draw, &[3]),
            normal(&mut draw, &[3]),
        ];
        let build = |t: &[Tensor]| {
            let params = Params {
                weight: Some(t[1].clone()),
                bias: Some(t[2].clone()),
            };
            batch_norm(3, 1e-2, params.builder(3, DType::F64)?)
        };
        check("inference", &inputs, |t| build(t)?.forward_t(&t[0], false))?;
        check("frozen", &inputs, |t| {
            let frozen: FrozenNorm = build(t)?.frozen()?;
            frozen.forward(&t[0])
        })
    })
}

#[test]
fn weight_norm_of_a_weight() {
    in_a_process_of_its_own("weight_norm_of_a_weight", || {
        for (dim, g_dims) in [
            (Some(0), vec![3, 1, 1]),
            (Some(1), vec![1, 4, 1]),
            (None, vec![]),
        ] {
            let mut draw = Draw::new(4);
            let inputs = [normal(&mut draw, &[3, 4, 2]), normal(&mut draw, &g_dims)];
            check(&format!("dim {dim:?}"), &inputs, |t| {
                ops::weight_norm(&t[0], &t[1], dim)
            })?;
        }
        Ok(())
    })
}

/// A weight-normalized layer by its input, magnitude, direction and bias.
fn check_weight_norm<M: Module>(
    x: &[usize],
    v: &[usize],
    outputs: usize,
    build: impl Fn(VarBuilder) -> Result<M>,
) -> Result<()> {
    let mut g = vec![1; v.len()];
    g[0] = v[0];
    let mut draw = Draw::new(5);
    let inputs = [x, &g, v, &[outputs]].map(|dims| normal(&mut draw, dims));
    check(&format!("weight {v:?}"), &inputs, |t| {
        let names = [
            "parametrizations.weight.original0",
            "parametrizations.weight.original1",
            "bias",
        ];
        let named = names.into_iter().zip(&t[1..]);
        let tensors = named.map(|(n, t)| (n.to_string(), t.clone())).collect();
        let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        build(vb)?.forward(&t[0])
    })
}

#[test]
fn weight_normalized_layers() {
    in_a_process_of_its_own("weight_normalized_layers", || {
        let options = WeightNormOptions::default();
        check_weight_norm(&[3, 4], &[2, 4], 2, |vb| {
            weight_norm::linear(4, 2, options, vb)
        })?;
        let config = Conv1dConfig {
            padding: 1,
            stride: 2,
            ..Default::default()
        };
        check_weight_norm(&[2, 2, 6], &[3, 2, 3], 3, |vb| {
            weight_norm::conv1d(2, 3, 3, config, options, vb)
        })?;
        let config = Conv2dConfig {
            groups: 2,
            ..Default::default()
        };
        check_weight_norm(&[1, 2, 3, 4], &[4, 1, 2, 2], 4, |vb| {
            weight_norm::conv2d(2, 4, 2, config, options, vb)
        })?;
        let config = ConvTranspose1dConfig {
            padding: 1,
            output_padding: 0,
            stride: 2,
            dilation: 1,
            groups: 1,
        };
        check_weight_norm(&[2, 2, 3], &[2, 3, 3], 3, |vb| {
            weight_norm::conv_transpose1d(2, 3, 3, config, options, vb)
        })?;
        let config = ConvTranspose2dConfig::default();
        check_weight_norm(&[1, 2, 2, 3], &[2, 2, 2, 2], 2, |vb| {
            weight_norm::conv_transpose2d(2, 2, 2, config, options, vb)
        })
    })
}

/// Without the switch there is no second derivative: what the other tests see is due to it.
#[test]
fn candle_detaches_unless_it_is_told_not_to() {
    if std::env::var_os(SWITCH).is_some() {
        return run_again("candle_detaches_unless_it_is_told_not_to", None);
    }
    let x = variable(&[1., 2., 4.], &[1, 3], DType::F64).unwrap();
    let forward = |t: &[Tensor]| ops::layer_norm(&t[0], 3, None, None, 1e-2);
    let sum = of_gradients(&forward, std::slice::from_ref(&x)).unwrap();
    assert!(sum.backward().unwrap().get(&x).is_none());
}

/// The functions of the other table.
#[test]
fn functions() {
    in_a_process_of_its_own("functions", || {
        for function in FUNCTIONS {
            for dims in function.tiny {
                let mut draw = Draw::new(11);
                let mut inputs = vec![normal(&mut draw, dims)];
                let params = (function.params)(dims);
                inputs.extend(params.iter().map(|dims| normal(&mut draw, dims)));
                for path in [Path::Fused, Path::Composed] {
                    let what = format!("{} of {dims:?}, {path:?}", function.name);
                    with_path(path, || check(&what, &inputs, function.call))?;
                }
            }
        }
        Ok(())
    })
}

/// Of a weight over its spectral norm, by constant vectors.
#[test]
fn spectral_norm() {
    in_a_process_of_its_own("spectral_norm", || {
        for (dims, dim) in [(&[3, 5][..], 0), (&[2, 3, 2], 1)] {
            let mut draw = Draw::new(12);
            let inputs = [normal(&mut draw, dims)];
            let rest = dims.iter().product::<usize>() / dims[dim];
            let u = tensor(&draw.normal(dims[dim]), &[dims[dim]], DType::F64)?;
            let v = tensor(&draw.normal(rest), &[rest], DType::F64)?;
            let f = |t: &[Tensor]| ops::spectral_norm(&t[0], &u, &v, dim);
            check(&format!("spectral norm of {dims:?}"), &inputs, f)?;
        }
        Ok(())
    })
}

/// Scale and shift from outside, at every spread.
#[test]
fn modulation() {
    in_a_process_of_its_own("modulation", || {
        let shapes: [(&[usize], &[usize]); 4] = [
            (&[2, 3], &[2, 4]),
            (&[3], &[4]),
            (&[2, 3, 4], &[2, 3, 4]),
            (&[1, 3], &[1, 4]),
        ];
        for (channels, features) in shapes {
            let mut draw = Draw::new(6);
            let mut inputs = |dims: &[usize]| {
                [
                    normal(&mut draw, &[2, 3, 4]),
                    normal(&mut draw, dims),
                    normal(&mut draw, dims),
                ]
            };
            let (of_rows, of_channels) = (inputs(features), inputs(channels));
            for path in [Path::Fused, Path::Composed] {
                let what = |norm: &str| format!("{norm} by {channels:?}, {path:?}");
                let with = |t: &[Tensor], f: &dyn Fn(&ops::Modulation) -> Result<Tensor>| {
                    let modulation = ops::Modulation::new(Some(&t[1]), Some(&t[2]));
                    with_path(path, || f(&modulation))
                };
                check(&what("rows"), &of_rows, |t| {
                    with(t, &|m| {
                        ops::modulated_layer_norm(&t[0], 4, [None, None], 1e-2, m)
                    })
                })?;
                check(&what("groups"), &of_channels, |t| {
                    with(t, &|m| {
                        ops::modulated_group_norm(&t[0], 1, [None, None], 1e-2, m)
                    })
                })?;
                check(&what("channels"), &of_channels, |t| {
                    with(t, &|m| {
                        Ok(ops::modulated_batch_norm(&t[0], None, None, 1e-2, m)?.0)
                    })
                })?;
                check(&what("nothing"), &of_channels, |t| {
                    with(t, &|m| ops::modulate(&t[0], m, true))
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn activations() {
    use candle_nn::Activation;

    in_a_process_of_its_own("activations", || {
        for activation in [
            Activation::Relu,
            Activation::LeakyRelu(0.1),
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluPytorchTanh,
            Activation::HardSwish,
            Activation::Sigmoid,
            Activation::Mish,
        ] {
            let mut draw = Draw::new(8);
            let x = normal(&mut draw, &[2, 3, 4]);
            let rows = [x.clone(), normal(&mut draw, &[4]), normal(&mut draw, &[4])];
            let channels = [x, normal(&mut draw, &[3]), normal(&mut draw, &[3])];
            for path in [Path::Fused, Path::Composed] {
                let what = format!("{activation:?}, {path:?}");
                with_path(path, || {
                    check(&format!("rows with {what}"), &rows, |t| {
                        ops::layer_norm_act(&t[0], 4, [Some(&t[1]), Some(&t[2])], 1e-2, activation)
                    })?;
                    check(&format!("groups with {what}"), &channels, |t| {
                        ops::group_norm_act(&t[0], 1, [Some(&t[1]), Some(&t[2])], 1e-2, activation)
                    })?;
                    check(&format!("channels with {what}"), &channels, |t| {
                        let (w, b) = (Some(&t[1]), Some(&t[2]));
                        Ok(ops::batch_norm_act(&t[0], w, b, 1e-2, activation)?.0)
                    })
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn gated_rms_norm() {
    in_a_process_of_its_own("gated_rms_norm", || {
        for gate in [ops::Gate::Before, ops::Gate::After] {
            let options = ops::GatedRmsNormOptions {
                gate,
                group_size: Some(3),
                ..1e-2.into()
            };
            let mut draw = Draw::new(9);
            let inputs = [
                normal(&mut draw, &[2, 6]),
                normal(&mut draw, &[2, 6]),
                normal(&mut draw, &[6]),
            ];
            for path in [Path::Fused, Path::Composed] {
                check(&format!("{gate:?}, {path:?}"), &inputs, |t| {
                    with_path(path, || {
                        ops::gated_rms_norm(&t[0], Some(&t[1]), Some(&t[2]), options)
                    })
                })?;
            }
        }
        Ok(())
    })
}
