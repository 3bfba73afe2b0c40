//! Softmax, gated RMS norm, and elements with activations on the emulator, against loops in f64, in
//! all orders of threads.
mod common;

use candle_norm_cuda_emulator::{Args, Order};
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::pointwise::{Function, Pointwise, TIMES_WEIGHT};
use candle_norm_cuda_kernels::geometry::slots::{BEFORE, Gated, Softmax};
use common::{Buffer, Elem, numbers, run};
use half::{bf16, f16};

fn types<T: Elem, P: Elem>() -> Types {
    Types::new(T::ELEMENT, P::ELEMENT).unwrap()
}

fn buffer<T: Elem>(len: usize, seed: u32, mean: f64) -> Buffer<T> {
    Buffer::new(&numbers::<T>(len, seed, mean), 0)
}

/// The first of results in all orders, which have the same bits.
fn same<const N: usize>(run: impl Fn(Order) -> [Vec<f64>; N]) -> [Vec<f64>; N] {
    let [first, others @ ..] = Order::ALL.map(run);
    let bits = |all: &[Vec<f64>; N]| {
        all.clone()
            .map(|v| v.into_iter().map(f64::to_bits).collect())
    };
    let want: [Vec<u64>; N] = bits(&first);
    for other in &others {
        assert!(bits(other) == want, "the order of threads shows");
    }
    first
}

#[track_caller]
fn close<T: Elem>(what: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(0f64, |a, v| a.max(v.abs()));
    let of_sums = if size_of::<T>() == 8 { 1e-13 } else { 2e-6 };
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        // Below its least usual number f16 has the digits of that.
        let most = of_sums * scale + 1.01 * T::ROUNDING * want.abs().max(6.2e-5);
        assert!((got - want).abs() <= most, "{what} {i}: {got} for {want}");
    }
}

fn softmax_of<T: Elem>(rows: usize, len: usize, log: bool) {
    let (x, dy) = (
        buffer::<T>(rows * len, 1, 3.),
        buffer::<T>(rows * len, 2, 0.1),
    );
    let shape = Softmax {
        types: types::<T, T>(),
        rows: rows as u64,
        len: len as u64,
    };
    let [y, dx] = same(|order| {
        let (mut y, mut dx) = (
            Buffer::<T>::empty(rows * len),
            Buffer::<T>::empty(rows * len),
        );
        let [mut largest, mut sum] = [0; 2].map(|_| Buffer::<T::Acc>::empty(rows));
        let args = Args::new().read(x.slice()).write(y.slice_mut());
        let args = args.write(largest.slice_mut()).write(sum.slice_mut());
        let args = run_sizes(args, [rows, len]);
        run(&shape.forward(), args.i32(i32::from(log)), order);
        let args = Args::new().read(x.slice()).read(dy.slice());
        let args = args.read(largest.slice()).read(sum.slice());
        let args = run_sizes(args.write(dx.slice_mut()), [rows, len]);
        run(&shape.backward(), args.i32(i32::from(log)), order);
        [y.to_f64(), dx.to_f64()]
    });
    let (x, dy) = (x.to_f64(), dy.to_f64());
    let (mut want, mut wants) = (vec![], vec![]);
    for (x, dy) in x.chunks(len).zip(dy.chunks(len)) {
        let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = x.iter().map(|x| (x - largest).exp()).sum();
        let units: Vec<f64> = x.iter().map(|x| (x - largest).exp() / sum).collect();
        let along: f64 = match log {
            true => dy.iter().sum(),
            false => dy.iter().zip(&units).map(|(d, y)| d * y).sum(),
        };
        for (i, y) in units.iter().enumerate() {
            want.push(if log { x[i] - largest - sum.ln() } else { *y });
            wants.push(if log {
                dy[i] - y * along
            } else {
                y * (dy[i] - along)
            });
        }
    }
    let what = format!("softmax of {rows} rows of {len}, {log}");
    close::<T>(&what, &y, &want);
    close::<T>(&format!("gradient of {what}"), &dx, &wants);
}

fn run_sizes<'a, const N: usize>(args: Args<'a>, sizes: [usize; N]) -> Args<'a> {
    sizes.into_iter().fold(args, |args, n| args.i64(n as i64))
}

#[test]
fn softmax() {
    for (rows, len) in [(3, 1), (9, 7), (2, 33), (3, 1100), (1, 5001)] {
        for log in [false, true] {
            softmax_of::<f32>(rows, len, log);
            softmax_of::<f16>(rows, len, log);
            softmax_of::<bf16>(rows, len, log);
            softmax_of::<f64>(rows, len, log);
        }
    }
}

/// `σ(u)`.
fn logistic(u: f64) -> f64 {
    1. / (1. + (-u).exp())
}

/// The value and the slope of `u · σ(u)`.
fn silu(u: f64) -> [f64; 2] {
    let s = logistic(u);
    [u * s, s * (1. + u * (1. - s))]
}

fn gated_of<T: Elem, G: Elem>(rows: usize, [len, group]: [usize; 2], before: bool) {
    let n = rows * len;
    let (x, gate, dy) = (
        buffer::<T>(n, 1, 0.2),
        buffer::<G>(n, 2, 0.),
        buffer::<T>(n, 3, 0.1),
    );
    let weight = buffer::<T::Acc>(len, 4, 1.);
    let groups = n / group;
    let shape = Gated {
        types: types::<T, G>(),
        groups: groups as u64,
        group: group as u64,
    };
    let (flags, function, eps) = (if before { BEFORE } else { 0 }, Function::Silu as i32, 1e-5);
    let [y, dx, dgate, products] = same(|order| {
        let [mut y, mut dx] = [0; 2].map(|_| Buffer::<T>::empty(n));
        let (mut dgate, mut products) = (Buffer::<G>::empty(n), Buffer::<T::Acc>::empty(n));
        let mut rstd = Buffer::<T::Acc>::empty(groups);
        let args = Args::new().read(x.slice()).read(gate.slice());
        let args = args.read(weight.slice()).write(y.slice_mut());
        let args = run_sizes(args.write(rstd.slice_mut()), [groups, len, group]);
        let args = args.f64(eps).i32(flags).i32(function).f64(0.);
        run(&shape.forward(), args, order);
        let args = Args::new().read(x.slice()).read(gate.slice());
        let args = args.read(weight.slice()).read(dy.slice());
        let args = args.read(rstd.slice()).write(dx.slice_mut());
        let args = args.write(dgate.slice_mut()).write(products.slice_mut());
        let args = run_sizes(args, [groups, len, group]);
        let args = args.i32(flags).i32(function).f64(0.);
        run(&shape.backward(), args, order);
        [y.to_f64(), dx.to_f64(), dgate.to_f64(), products.to_f64()]
    });
    let (x, z, d, w) = (x.to_f64(), gate.to_f64(), dy.to_f64(), weight.to_f64());
    let [mut want_y, mut want_dx, mut want_dgate, mut want_products] = [0; 4].map(|_| vec![]);
    for start in (0..n).step_by(group) {
        let all = start..start + group;
        let opened: Vec<[f64; 2]> = all.clone().map(|i| silu(z[i])).collect();
        let h = |i: usize| {
            if before {
                x[i] * opened[i - start][0]
            } else {
                x[i]
            }
        };
        let g = |i: usize| {
            if before {
                d[i]
            } else {
                d[i] * opened[i - start][0]
            }
        };
        let square: f64 = all.clone().map(|i| h(i) * h(i)).sum();
        let inv = 1. / (square / group as f64 + eps).sqrt();
        let along: f64 = all.clone().map(|i| g(i) * w[i % len] * h(i) * inv).sum();
        for i in all {
            let (normal, [a, slope]) = (h(i) * inv, opened[i - start]);
            let dh = (g(i) * w[i % len] - normal * along / group as f64) * inv;
            let u = normal * w[i % len];
            want_y.push(if before { u } else { u * a });
            want_dx.push(if before { dh * a } else { dh });
            want_dgate.push(slope * if before { dh * x[i] } else { d[i] * u });
            want_products.push(g(i) * normal);
        }
    }
    let what = format!("{rows} rows of {len} in groups of {group}, {before}");
    close::<T>(&format!("y of {what}"), &y, &want_y);
    close::<T>(&format!("dx of {what}"), &dx, &want_dx);
    close::<G>(&format!("dgate of {what}"), &dgate, &want_dgate);
    close::<T::Acc>(&format!("products of {what}"), &products, &want_products);
}

#[test]
fn gated_rows() {
    for (rows, sizes) in [(3, [6, 3]), (2, [33, 33]), (2, [2200, 1100]), (1, [10, 5])] {
        for before in [false, true] {
            gated_of::<f32, f32>(rows, sizes, before);
            gated_of::<f16, f16>(rows, sizes, before);
            gated_of::<bf16, f32>(rows, sizes, before);
            gated_of::<f64, f64>(rows, sizes, before);
        }
    }
}

/// The arguments that follow the statistics.
fn rest(shape: Pointwise, args: Args<'_>, flags: i32) -> Args<'_> {
    let args = run_sizes(args, shape.sizes().map(|n| n as usize));
    let args = args.i32(0).f64(0.).f64(0.).i32(flags);
    args.i32(Function::Silu as i32).f64(0.)
}

/// Groups of two channels with weights of each element, before `u · σ(u)`.
fn elements_of<T: Elem, P: Elem>([outer, middle, inner]: [usize; 3]) {
    let n = outer * middle * inner;
    let units = outer * middle / 2;
    let (x, dy) = (buffer::<T>(n, 1, 0.3), buffer::<T>(n, 2, 0.1));
    let (weight, bias) = (buffer::<P>(n, 3, 1.), buffer::<P>(n, 4, 0.));
    let [mean, third] = [(5, 0.2), (6, 3.)].map(|(seed, m)| buffer::<T::Acc>(units, seed, m));
    let shape = Pointwise {
        types: types::<T, P>(),
        dims: [outer, middle, inner].map(|n| n as u64),
        weights: [(middle * inner) as u64, inner as u64, 1],
        stats: [middle as u64, 1, 2],
    };
    let [y, grad, dweight, dbias] = same(|order| {
        let mut y = Buffer::<T>::empty(n);
        let [mut grad, mut wide] = [0; 2].map(|_| Buffer::<T::Acc>::empty(n));
        let [mut dweight, mut dbias] = [0; 2].map(|_| Buffer::<P>::empty(n));
        let args = Args::new().read(x.slice()).null().write(y.slice_mut());
        let args = args.read(weight.slice()).read(bias.slice());
        let args = args.read(mean.slice()).null().read(third.slice());
        run(&shape.forward(), rest(shape, args, 0), order);
        let args = Args::new().read(x.slice()).read(dy.slice());
        let args = args.write(grad.slice_mut()).write(wide.slice_mut()).null();
        let args = args.write(dweight.slice_mut()).write(dbias.slice_mut());
        let args = args.read(weight.slice()).read(bias.slice());
        let args = args.read(mean.slice()).null().read(third.slice());
        run(&shape.backward(), rest(shape, args, TIMES_WEIGHT), order);
        assert_eq!(wide.to_f64(), x.to_f64());
        [y.to_f64(), grad.to_f64(), dweight.to_f64(), dbias.to_f64()]
    });
    let (x, d, w, b) = (x.to_f64(), dy.to_f64(), weight.to_f64(), bias.to_f64());
    let (mean, third) = (mean.to_f64(), third.to_f64());
    let hat = |i: usize| (x[i] - mean[i / inner / 2]) * third[i / inner / 2];
    let through = |i: usize| silu(hat(i) * w[i] + b[i]);
    let all = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<_>>();
    let what = format!("{outer} × {middle} × {inner}");
    close::<T>(&format!("y of {what}"), &y, &all(&|i| through(i)[0]));
    let dbiases = all(&|i| d[i] * through(i)[1]);
    close::<P>(&format!("dbias of {what}"), &dbias, &dbiases);
    let dweights = all(&|i| dbiases[i] * hat(i));
    close::<P>(&format!("dweight of {what}"), &dweight, &dweights);
    let grads = all(&|i| dbiases[i] * w[i]);
    close::<T::Acc>(&format!("gradient of {what}"), &grad, &grads);
}

#[test]
fn elements() {
    for dims in [[1, 2, 1], [3, 4, 1], [2, 6, 5], [3, 2, 64], [2, 2, 701]] {
        elements_of::<f32, f32>(dims);
        elements_of::<f16, f16>(dims);
        elements_of::<bf16, f32>(dims);
        elements_of::<f64, f64>(dims);
    }
}
