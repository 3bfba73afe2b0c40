//! A thread that trains a layer and one that sets its variables never wait for each other for ever.
//!
//! candle keeps a lock around each storage. Who holds it for reading and asks for it a second time,
//! while another thread waits to write, may wait for ever: so may an op whose arguments share a
//! storage, if it takes the lock the wrong way.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::{Path, ops, with_path};

use testkit::data::{Draw, tensor, values};
use testkit::subjects::{Params, Subject, backward, gradient};
use testkit::table::{Layer, shapes};
use testkit::watch::ends_within;

/// Time of a step of training: some microseconds, so that this is thousands of times as long as
/// it should.
const LIMIT: Duration = Duration::from_secs(60);

/// A step of training: the output and the gradients of variables are looked at by [`race`].
type Step = Box<dyn Fn() -> Result<Vec<Tensor>> + Send>;

/// Runs `step` on one thread, at least `steps` times, while another sets `vars` as many times, to
/// numbers of the same kind.
fn race(what: String, steps: usize, vars: Vec<Var>, step: Step) {
    ends_within(LIMIT, move || {
        let (done, sets) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut draw = Draw::new(1);
                let others: Vec<Tensor> = (vars.iter())
                    .map(|var| {
                        let numbers = draw.weight(var.elem_count());
                        tensor(&numbers, var.dims(), var.dtype()).expect("a tensor")
                    })
                    .collect();
                while !done.load(Ordering::Relaxed) {
                    for (var, other) in vars.iter().zip(&others) {
                        var.set(other).expect("a tensor that fits");
                        sets.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
            let _end = Wait(&done);
            while sets.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            let before = sets.load(Ordering::Relaxed);
            let mut step_count = 0;
            // A training during which nothing is set shows nothing.
            while step_count < steps || sets.load(Ordering::Relaxed) < before + steps {
                match with_path(Path::Fused, &step) {
                    Ok(found) => {
                        for t in found {
                            let finite = values(&t).expect("numbers").iter().all(|v| v.is_finite());
                            assert!(finite, "{what}");
                        }
                    }
                    // The input was set between forward and backward.
                    Err(e) => {
                        let told = e.to_string().contains("expected the input of the forward");
                        assert!(told, "{what}: {e}");
                    }
                }
                step_count += 1;
            }
        });
    });
}

/// Tells the other thread to end, also after a panic.
struct Wait<'a>(&'a AtomicBool);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn var(dims: &[usize], seed: u64) -> Var {
    let numbers = Draw::new(seed).weight(dims.iter().product());
    let made = tensor(&numbers, dims, DType::F32).and_then(|t| Var::from_tensor(&t));
    made.expect("a variable")
}

/// Forward and backward of `forward` on `leaves`; what comes out is finite or the layer read half
/// of something.
fn trained(
    leaves: &[Tensor],
    variables: &[Tensor],
    forward: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let y = forward(leaves)?;
    let dy = Tensor::ones(y.dims(), y.dtype(), &Device::Cpu)?;
    let grads = backward(&y, &(dy * 0.5)?)?;
    let of = |v: &Tensor| gradient(&grads, v);
    Ok(variables.iter().map(of).chain([y.clone()]).collect())
}

/// Trains `forward` of tensors of these shapes, in which each is a variable, and in which all are
/// parts of one.
fn check(
    what: &str,
    shapes: &[Vec<usize>],
    steps: usize,
    forward: impl Fn(&[Tensor]) -> Result<Tensor> + Send + Sync + 'static,
) {
    let forward = Arc::new(forward);
    let vars: Vec<Var> = (0..).zip(shapes).map(|(i, dims)| var(dims, i)).collect();
    let leaves: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let step = {
        let forward = forward.clone();
        Box::new(move || trained(&leaves, &leaves, &*forward))
    };
    race(format!("{what}, variables"), steps, vars, step);

    let sizes: Vec<usize> = shapes.iter().map(|dims| dims.iter().product()).collect();
    let base = var(&[sizes.iter().sum()], 9);
    let mut parts = vec![];
    let mut start = 0;
    for (dims, size) in shapes.iter().zip(sizes) {
        let part = base
            .narrow(0, start, size)
            .and_then(|t| t.reshape(&dims[..]));
        parts.push(part.expect("a part of the variable"));
        start += size;
    }
    let whole = [base.as_tensor().clone()];
    let step = Box::new(move || trained(&parts, &whole, &*forward));
    race(format!("{what}, one storage"), steps, vec![base], step);
}

/// A layer with all its parameters, on inputs for one thread and on inputs for several.
fn check_layer(layer: &'static Layer) {
    let short = shapes(layer.short).map(|input| (input, 100));
    let long = shapes(layer.long).map(|input| (input, 15));
    for ((kind, dims), steps) in short.chain(long) {
        let subject = Subject::new(kind, 1e-3);
        let param = subject.param_dims(dims).to_vec();
        let mut shapes = vec![dims.to_vec()];
        shapes.extend(vec![param; kind.num_params()]);
        check(&format!("{kind:?} of {dims:?}"), &shapes, steps, move |t| {
            subject.forward(&t[0], &Params::new(&t[1..]))
        });
    }
}

testkit::each_layer!(check_layer);

/// The input and the residual share a storage, and the parameters are read before.
#[test]
fn add_norm() {
    for (dims, steps) in [([4, 33], 100), ([65, 1031], 15)] {
        let (rows, row) = (dims.to_vec(), vec![dims[1]]);
        let shapes = [rows.clone(), rows, row.clone(), row];
        check(
            &format!("add and norm of {dims:?}"),
            &shapes,
            steps,
            move |t| {
                let params = (Some(&t[2]), Some(&t[3]));
                let (y, sum) =
                    ops::add_layer_norm(&t[0], &t[1], dims[1], [params.0, params.1], 1e-3)?;
                y + sum
            },
        );
    }
}

/// The shares are variables too, and parts of the storage of the input.
#[test]
fn shares_of_switch_norm() {
    for (dims, steps) in [(vec![2, 4, 9], 100), (vec![9, 6, 1031], 15)] {
        let channels = vec![dims[1]];
        let shapes = [dims, channels.clone(), channels, vec![3], vec![3]];
        check("shares", &shapes, steps, |t| {
            let options = ops::SwitchOptions {
                instance: true,
                batch: ops::SwitchBatch::Own,
                unbiased: true,
                eps: 1e-3,
            };
            let (weight, bias, shares) = (Some(&t[1]), Some(&t[2]), [&t[3], &t[4]]);
            Ok(ops::switch_norm(&t[0], weight, bias, shares, options)?.0)
        });
    }
}

/// The statistics are set too.
#[test]
fn batch_norm_inference() {
    for (dims, steps) in [(vec![4, 3, 17], 100), (vec![1031, 33], 15)] {
        let channels = vec![dims[1]];
        let shapes = [dims, channels.clone(), channels.clone()];
        let statistics = [var(&channels, 1), var(&channels, 2)];
        let given = statistics.clone();
        let infer = move |x: &Tensor, w: &Tensor, b: &Tensor, s: &[Tensor]| {
            // What a variable holds may be negative.
            let var = s[1].sqr()?;
            ops::batch_norm_inference(x, [&s[0], &var], Some(w), Some(b), 1e-3)
        };
        check("inference", &shapes, steps, move |t| {
            let s = given.each_ref().map(|s| s.as_tensor().clone());
            infer(&t[0], &t[1], &t[2], &s)
        });
        // The mean is the weight, and the variance is made of the bias.
        check(
            "inference by its own parameters",
            &shapes,
            steps,
            move |t| infer(&t[0], &t[1], &t[2], &t[1..]),
        );
    }
}

#[test]
fn weight_norm() {
    for (dims, steps) in [(vec![4, 33], 100), (vec![65, 1031], 15)] {
        for dim in [Some(0), Some(1), None] {
            let mut magnitudes = vec![1; if dim.is_some() { 2 } else { 0 }];
            if let Some(dim) = dim {
                magnitudes[dim] = dims[dim];
            }
            let shapes = [dims.clone(), magnitudes];
            check(
                &format!("weight norm along {dim:?}"),
                &shapes,
                steps,
                move |t| ops::weight_norm(&t[0], &t[1], dim),
            );
        }
    }
}

/// One variable as the input and as the weight and bias of its only row.
#[test]
fn one_variable_in_all_places() {
    for (len, steps) in [(33, 100), (20_011, 15)] {
        check("one variable", &[vec![1, len]], steps, move |t| {
            let param = t[0].flatten_all()?;
            ops::layer_norm(&t[0], len, Some(&param), Some(&param), 1e-3)
        });
        check(
            "one direction and magnitude",
            &[vec![len, 1]],
            steps,
            move |t| ops::weight_norm(&t[0], &t[0], Some(0)),
        );
    }
}
