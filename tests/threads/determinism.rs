//! The same inputs give the same bits: on any number of threads and on every instruction set of
//! this processor, and by the CUDA kernels in any order of their threads.
//!
//! Sizes are ragged, and lie on both sides of the border from which work goes to threads.

use std::sync::LazyLock;

use candle_core::{DType, Result, Tensor};
use candle_norm::internals::Level;
use candle_norm::ops::{self, Cast};
use candle_norm::{Path, with_path};
use rayon::{ThreadPool, ThreadPoolBuilder};

use testkit::data::{Draw, bits, tensor, variable};
use testkit::emulated::{Order, with_order};
use testkit::functions::FUNCTIONS;
use testkit::subjects::{DTypes, Kind, Numbers, Subject, backward, gradient};
use testkit::table::{Layer, RAGGED_ROWS};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Every number of threads that is tried.
static POOLS: LazyLock<Vec<ThreadPool>> = LazyLock::new(|| {
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build();
    let pools = [1, 2, 3, 7].map(|threads| pool(threads).expect("threads"));
    pools.into()
});

/// Bits of tensors, by name.
type Bits = Vec<(&'static str, Vec<u64>)>;

fn bits_of(named: &[(&'static str, &Tensor)]) -> Result<Bits> {
    let of = |(name, t): &(&'static str, &Tensor)| Ok((*name, bits(t)?));
    named.iter().map(of).collect()
}

/// The most elements of a tensor on the emulator, which takes a microsecond for each.
const MOST_EMULATED: usize = 20_000;

/// Runs `f` on every number of threads and every instruction set, and on the CUDA kernels in every
/// order of their threads, and compares what each of both gives.
#[track_caller]
fn assert_same(what: &str, f: impl Fn() -> Result<Bits> + Sync) {
    let run = |pool: &ThreadPool, level: Level| {
        let on_path = || with_path(Path::Fused, &f);
        let ran = pool.install(|| level.force(on_path));
        ran.map(|ran| ran.expect("tensors that fit"))
    };
    let want = run(&POOLS[0], Level::Baseline).expect("what every processor has");
    for pool in &*POOLS {
        for level in Level::ALL {
            let Some(got) = run(pool, level) else {
                continue;
            };
            let threads = pool.current_num_threads();
            let on = || format!("{what}, on {threads} threads with {level:?}");
            assert_equal(on, &got, &want);
        }
    }
    if want.iter().any(|(_, bits)| bits.len() > MOST_EMULATED) {
        return;
    }
    let [want, others @ ..] = Order::ALL.map(|order| {
        let ran = with_order(order, || with_path(Path::Emulated, &f));
        ran.expect("tensors that fit")
    });
    for got in others {
        assert_equal(|| format!("{what}, in other orders"), &got, &want);
    }
}

#[track_caller]
fn assert_equal(what: impl Fn() -> String, got: &Bits, want: &Bits) {
    for ((name, got), (_, want)) in got.iter().zip(want) {
        let differs = got.iter().zip(want).position(|(a, b)| a != b);
        assert!(
            got.len() == want.len() && differs.is_none(),
            "{}: {name} differs at element {differs:?} of {}",
            what(),
            want.len(),
        );
    }
}

/// Numbers of many magnitudes, so that another order of additions is another sum.
fn spread(draw: &mut Draw, n: usize) -> Vec<f64> {
    let wide = |z: f64| z * (2. * z).exp().min(50.);
    draw.normal(n).into_iter().map(wide).collect()
}

/// A layer on its fused path, forward and backward, in every dtype; the dtypes take turns with the
/// parameters that there are.
fn check(case: usize, kind: Kind, dims: &[usize]) {
    for (turn, dtype) in DTYPES.into_iter().enumerate() {
        let half = matches!(dtype, DType::F16 | DType::BF16);
        let dtypes = DTypes {
            input: dtype,
            params: if half && case.is_multiple_of(2) {
                DType::F32
            } else {
                dtype
            },
        };
        let subject = Subject::new(kind, 1e-5);
        let n = dims.iter().product();
        let params = subject.param_dims(dims).iter().product();
        let (weight, bias) =
            [(true, true), (true, false), (false, false), (false, true)][(case + turn) % 4];
        let mut draw = Draw::new(case as u64);
        let numbers = Numbers {
            x: spread(&mut draw, n),
            dy: spread(&mut draw, n),
            weight: weight.then(|| draw.weight(params)),
            bias: (bias && kind.has_bias()).then(|| draw.normal(params)),
        };
        let what = format!("{kind:?} of {dims:?} in {dtypes:?}");
        assert_same(&what, || {
            bits_of(&numbers.run(subject, dims, dtypes)?.named())
        });
    }
}

/// Every kind of a layer at its ragged shapes.
fn check_layer(layer: &'static Layer) {
    for (kind, shapes) in layer.ragged {
        for (case, dims) in shapes.iter().enumerate() {
            check(case, *kind, dims);
        }
    }
}

testkit::each_layer!(check_layer);

/// Both outputs, and the gradients through both.
#[test]
fn add_norm() {
    for (case, dims) in RAGGED_ROWS.iter().enumerate() {
        let n = dims.iter().product();
        for dtype in DTYPES {
            let mut draw = Draw::new(case as u64);
            let numbers = [(); 4].map(|()| spread(&mut draw, n));
            let weight = draw.weight(dims[1]);
            assert_same(&format!("add and norm of {dims:?} in {dtype:?}"), || {
                let leaf = |numbers: &[f64]| variable(numbers, dims, dtype);
                let (x, residual) = (leaf(&numbers[0])?, leaf(&numbers[1])?);
                let weight = variable(&weight, &dims[1..], dtype)?;
                let (y, sum) = match case % 2 {
                    0 => ops::add_layer_norm(&x, &residual, dims[1], [Some(&weight), None], 1e-5),
                    _ => {
                        let cast = Cast::AfterWeight;
                        let weight = Some(&weight);
                        ops::add_rms_norm(
                            &x,
                            &residual,
                            dims[1],
                            weight,
                            ops::RmsOptions {
                                eps: None,
                                offset: 0.,
                                cast,
                            },
                        )
                    }
                }?;
                let [dy, dsum] = [2, 3].map(|i| tensor(&numbers[i], dims, dtype));
                // One output that both have a part in.
                let both = Tensor::cat(&[&y, &sum], 0)?;
                let grads = backward(&both, &Tensor::cat(&[dy?, dsum?], 0)?)?;
                bits_of(&[
                    ("y", &y),
                    ("sum", &sum),
                    ("dx", &gradient(&grads, &x)),
                    ("dresidual", &gradient(&grads, &residual)),
                    ("dweight", &gradient(&grads, &weight)),
                ])
            });
        }
    }
}

/// The gradients of what is mixed by, and what running statistics take.
#[test]
fn shares_of_switch_norm() {
    for dims in [[3, 5, 1031], [33, 17, 49]] {
        let n = dims.iter().product();
        for dtype in DTYPES {
            let mut draw = Draw::new(8);
            let numbers = [(); 2].map(|()| spread(&mut draw, n));
            let shares = [(); 2].map(|()| draw.normal(3));
            assert_same(&format!("shares of {dims:?} in {dtype:?}"), || {
                let x = variable(&numbers[0], &dims, dtype)?;
                let [mean, var] = shares.each_ref().map(|s| variable(s, &[3], dtype));
                let (mean, var) = (mean?, var?);
                let options = ops::SwitchOptions {
                    instance: true,
                    batch: ops::SwitchBatch::Own,
                    unbiased: true,
                    eps: 1e-5,
                };
                let (y, statistics) = ops::switch_norm(&x, None, None, [&mean, &var], options)?;
                let statistics = statistics.expect("values");
                let grads = backward(&y, &tensor(&numbers[1], &dims, dtype)?)?;
                bits_of(&[
                    ("y", &y),
                    ("dx", &gradient(&grads, &x)),
                    ("dmean_weight", &gradient(&grads, &mean)),
                    ("dvar_weight", &gradient(&grads, &var)),
                    ("mean", &statistics.mean),
                    ("var", &statistics.var),
                ])
            });
        }
    }
}

/// Statistics of a batch, as running statistics take them.
#[test]
fn batch_statistics() {
    for dims in [vec![4099, 17], vec![33, 7, 35], vec![2, 3, 10_007]] {
        for dtype in DTYPES {
            let x = spread(&mut Draw::new(1), dims.iter().product());
            let x = tensor(&x, &dims, dtype).expect("a tensor");
            assert_same(&format!("batch norm of {dims:?} in {dtype:?}"), || {
                let s = ops::batch_norm(&x, None, None, 1e-5)?.1.expect("values");
                bits_of(&[("mean", &s.mean), ("var", &s.var)])
            });
            if dims.len() > 2 {
                assert_same(&format!("instance norm of {dims:?} in {dtype:?}"), || {
                    let s = ops::instance_norm(&x, None, None, 1e-5)?.1.expect("values");
                    bits_of(&[("mean", &s.mean), ("var", &s.var)])
                });
            }
        }
    }
}

/// An op of `x` and a parameter of shape `param_dims`, forward and backward, in every dtype.
fn check_op(
    what: &str,
    dims: &[usize],
    param_dims: &[usize],
    op: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Sync,
) {
    let mut draw = Draw::new(2);
    let n = dims.iter().product();
    let (x, dy) = (spread(&mut draw, n), spread(&mut draw, n));
    let param = draw.weight(param_dims.iter().product());
    for dtype in DTYPES {
        assert_same(&format!("{what} of {dims:?} in {dtype:?}"), || {
            let x = variable(&x, dims, dtype)?;
            let param = variable(&param, param_dims, dtype)?;
            let y = op(&x, &param)?;
            let grads = backward(&y, &tensor(&dy, dims, dtype)?)?;
            let (dx, dparam) = (gradient(&grads, &x), gradient(&grads, &param));
            bits_of(&[
                ("y", &y),
                ("dx", &dx),
                ("gradient of the parameter", &dparam),
            ])
        });
    }
}

#[test]
fn batch_norm_inference() {
    for dims in [vec![33, 7, 35], vec![4099, 17], vec![5, 3, 5, 1031]] {
        let c = dims[1];
        let mean = tensor(&Draw::new(3).normal(c), &[c], DType::F32).expect("a tensor");
        let var = mean.sqr().expect("a tensor");
        check_op("inference", &dims, &[c], |x, weight| {
            ops::batch_norm_inference(x, [&mean, &var], Some(weight), None, 1e-3)
        });
    }
}

#[test]
fn rms_norm_cast_before_weight() {
    for dims in [[9, 1031], [1031, 49]] {
        check_op("RMS norm", &dims, &dims[1..], |x, weight| {
            ops::rms_norm(
                x,
                dims[1],
                Some(weight),
                ops::RmsOptions {
                    eps: None,
                    offset: 0.,
                    cast: Cast::BeforeWeight,
                },
            )
        });
    }
}

#[test]
fn weight_norm() {
    let shapes: [&[usize]; 6] = [
        &[9, 17],
        &[127, 129],
        &[257, 129],
        &[33, 5, 7, 49],
        &[1, 50_021],
        &[3, 10_007],
    ];
    for dims in shapes {
        for dim in [Some(0), Some(1), None] {
            let mut magnitudes = vec![1; if dim.is_some() { dims.len() } else { 0 }];
            if let Some(dim) = dim {
                magnitudes[dim] = dims[dim];
            }
            check_op(
                &format!("weight norm along {dim:?}"),
                dims,
                &magnitudes,
                |v, g| ops::weight_norm(v, g, dim),
            );
        }
    }
}

/// The numbers that are drawn here add up to something else in another order: a sum by halves would
/// show.
#[test]
fn another_order_is_another_sum() {
    let x = spread(&mut Draw::new(0), 4096);
    let forward: f32 = x.iter().map(|v| *v as f32).sum();
    let backward: f32 = x.iter().rev().map(|v| *v as f32).sum();
    assert_ne!(forward.to_bits(), backward.to_bits());
}

/// The functions of the other table, at their ragged shapes.
#[test]
fn functions() {
    for function in FUNCTIONS {
        for (case, dims) in function.ragged.iter().enumerate() {
            for dtype in DTYPES {
                let mut draw = Draw::new(case as u64);
                let mut shapes = vec![dims.to_vec()];
                shapes.extend((function.params)(dims));
                let count = |dims: &[usize]| dims.iter().product::<usize>();
                let made = shapes.iter().map(|dims| spread(&mut draw, count(dims)));
                let numbers: Vec<_> = made.collect();
                let dy = spread(&mut draw, count(dims));
                let what = format!("{} of {dims:?} in {dtype:?}", function.name);
                assert_same(&what, || {
                    let pairs = numbers.iter().zip(&shapes);
                    let leaves = pairs.map(|(numbers, dims)| variable(numbers, dims, dtype));
                    let leaves: Vec<Tensor> = leaves.collect::<Result<_>>()?;
                    let y = (function.call)(&leaves)?;
                    let grads = backward(&y, &tensor(&dy, y.dims(), dtype)?)?;
                    let mut all = vec![("y", bits(&y)?)];
                    for leaf in &leaves {
                        all.push(("a gradient", bits(&gradient(&grads, leaf))?));
                    }
                    Ok(all)
                });
            }
        }
    }
}

/// Norms with scale and shift from outside, with an activation, and with a gate.
#[test]
fn modulated_activated_and_gated() {
    use candle_nn::Activation;
    use candle_norm::ops::{Gate, GatedRmsNormOptions, Modulation};

    const ACTIVATIONS: [Activation; 9] = [
        Activation::Relu,
        Activation::Relu6,
        Activation::LeakyRelu(0.1),
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluPytorchTanh,
        Activation::HardSwish,
        Activation::Sigmoid,
        Activation::Mish,
    ];
    let shapes: [&[usize]; 5] = [
        &[3, 4, 17],
        &[5, 200, 49],
        &[7, 6, 33, 31],
        &[2, 4, 100],
        &[70, 6],
    ];
    for (case, dims) in shapes.iter().enumerate() {
        let n: usize = dims.iter().product();
        let (samples, channels, last) = (dims[0], dims[1], dims[dims.len() - 1]);
        for (turn, dtype) in DTYPES.into_iter().enumerate() {
            let mut draw = Draw::new(case as u64);
            let (x, dy) = (spread(&mut draw, n), spread(&mut draw, n));
            let (scale, gate) = (draw.normal(n), draw.normal(n));
            let activation = ACTIVATIONS[(4 * case + turn) % ACTIVATIONS.len()];
            let leaf = |numbers: &[f64], dims: &[usize]| {
                variable(&numbers[..dims.iter().product()], dims, dtype)
            };
            let finish = |y: Tensor, leaves: &[(&'static str, &Tensor)]| {
                let grads = backward(&y, &tensor(&dy, dims, dtype)?)?;
                let found: Vec<_> = leaves
                    .iter()
                    .map(|(n, t)| (*n, gradient(&grads, t)))
                    .collect();
                let mut named = vec![("y", &y)];
                named.extend(found.iter().map(|(name, t)| (*name, t)));
                bits_of(&named)
            };
            let what = format!("{dims:?} in {dtype:?}");
            assert_same(&format!("modulated rows of {what}"), || {
                let (x, scale) = (leaf(&x, dims)?, leaf(&scale, &[samples, last])?);
                let modulation = Modulation::new(Some(&scale), Some(&scale));
                let y = ops::modulated_layer_norm(&x, last, [None, None], 1e-5, &modulation)?;
                finish(y, &[("dx", &x), ("dscale", &scale)])
            });
            assert_same(&format!("modulated groups of {what}"), || {
                let (x, scale) = (leaf(&x, dims)?, leaf(&scale, &[samples, channels])?);
                let modulation = Modulation::new(Some(&scale), Some(&scale));
                let y = ops::modulated_group_norm(&x, 2, [None, None], 1e-5, &modulation)?;
                finish(y, &[("dx", &x), ("dscale", &scale)])
            });
            assert_same(&format!("modulated channels of {what}"), || {
                let scale = match turn % 2 {
                    0 => leaf(&scale, &[samples, channels])?,
                    _ => leaf(&scale, dims)?,
                };
                let x = leaf(&x, dims)?;
                let modulation = Modulation::new(Some(&scale), Some(&scale));
                let (y, _) = ops::modulated_batch_norm(&x, None, None, 1e-5, &modulation)?;
                finish(y, &[("dx", &x), ("dscale", &scale)])
            });
            assert_same(&format!("{activation:?} after rows of {what}"), || {
                let (x, w) = (leaf(&x, dims)?, leaf(&scale, &[last])?);
                let (weight, bias) = (Some(&w), Some(&w));
                let y = ops::layer_norm_act(&x, last, [weight, bias], 1e-5, activation)?;
                finish(y, &[("dx", &x), ("dw", &w)])
            });
            assert_same(&format!("{activation:?} after groups of {what}"), || {
                let (x, w) = (leaf(&x, dims)?, leaf(&scale, &[channels])?);
                let y = ops::group_norm_act(&x, 2, [Some(&w), Some(&w)], 1e-5, activation)?;
                finish(y, &[("dx", &x), ("dw", &w)])
            });
            assert_same(&format!("{activation:?} after channels of {what}"), || {
                let (x, w) = (leaf(&x, dims)?, leaf(&scale, &[channels])?);
                let (y, _) = ops::batch_norm_act(&x, Some(&w), Some(&w), 1e-5, activation)?;
                finish(y, &[("dx", &x), ("dw", &w)])
            });
            assert_same(&format!("{activation:?} as a gate of {what}"), || {
                let (x, z) = (leaf(&x, dims)?, leaf(&gate, dims)?);
                let w = leaf(&scale, &[last])?;
                let options = GatedRmsNormOptions {
                    gate: [Gate::Before, Gate::After][turn % 2],
                    activation,
                    ..Default::default()
                };
                let y = ops::gated_rms_norm(&x, Some(&z), Some(&w), options)?;
                finish(y, &[("dx", &x), ("dz", &z), ("dw", &w)])
            });
        }
    }
}
