//! LayerNorm and RmsNorm on the emulator, against their formulas in f64.
mod common;

use candle_norm_cuda_emulator::Order;
use candle_norm_cuda_kernels::geometry::rows::{Norm, Rows};
use common::{Case, Elem, Options, Outputs, USUAL, case};
use half::{bf16, f16};

struct Right {
    y: Vec<f64>,
    sum: Vec<f64>,
    mean: Vec<f64>,
    rstd: Vec<f64>,
    dx: Vec<f64>,
    /// The largest that dx is a difference of.
    terms: f64,
    dweight: Vec<f64>,
    dbias: Vec<f64>,
}

fn right<T: Elem, P: Elem>(case: &Case<T, P>) -> Right {
    let Rows {
        norm, rows, cols, ..
    } = case.shape;
    let mut x = case.x.to_f64();
    if let Some(residual) = &case.residual {
        // The unrounded sum, as the accumulator holds it.
        for (x, r) in x.iter_mut().zip(residual.to_f64()) {
            *x = T::Acc::from_f64(*x + r).to_f64();
        }
    }
    let dy = case.dy.to_f64();
    let w = case.weight.as_ref().map(|w| w.to_f64());
    let params = case.samples * cols;
    let w: Vec<f64> = w.map_or(vec![1.; params], |w| {
        w.iter().map(|w| w + case.offset).collect()
    });
    let b = case.bias.as_ref().map_or(vec![0.; params], |b| b.to_f64());
    let dsum = case
        .dsum
        .as_ref()
        .map_or(vec![0.; rows * cols], |d| d.to_f64());
    let mut all = Right {
        y: vec![],
        sum: if norm.add { x.clone() } else { vec![] },
        mean: vec![],
        rstd: vec![],
        dx: vec![],
        terms: 0.,
        dweight: vec![0.; params],
        dbias: vec![0.; params],
    };
    let n = cols as f64;
    for r in 0..rows {
        let at = r * cols..(r + 1) * cols;
        let (x, dy, dsum) = (&x[at.clone()], &dy[at.clone()], &dsum[at]);
        let first = r / (rows / case.samples) * cols;
        let (w, b) = (&w[first..first + cols], &b[first..first + cols]);
        let mean = if norm.center {
            x.iter().sum::<f64>() / n
        } else {
            0.
        };
        // What the mean was rounded by matters to f64 itself.
        let far: Vec<f64> = x.iter().map(|x| x - mean).collect();
        let low = if norm.center {
            far.iter().sum::<f64>() / n
        } else {
            0.
        };
        let far: Vec<f64> = far.iter().map(|d| d - low).collect();
        let var = far.iter().map(|d| d * d).sum::<f64>() / n;
        let rstd = 1. / (var + case.eps).sqrt();
        let hat: Vec<f64> = far.iter().map(|d| d * rstd).collect();
        let taken: Vec<f64> = hat
            .iter()
            .map(|&h| {
                if case.round_first {
                    T::from_f64(h).to_f64()
                } else {
                    h
                }
            })
            .collect();
        let g: Vec<f64> = dy.iter().zip(w).map(|(d, w)| d * w).collect();
        let mean_g = if norm.center {
            g.iter().sum::<f64>() / n
        } else {
            0.
        };
        let mean_gh = g.iter().zip(&hat).map(|(g, h)| g * h).sum::<f64>() / n;
        for c in 0..cols {
            all.y.push(taken[c] * w[c] + b[c]);
            all.dx
                .push(rstd * (g[c] - mean_g - hat[c] * mean_gh) + dsum[c]);
            all.terms = all.terms.max((rstd * g[c]).abs());
            all.dweight[first + c] += dy[c] * taken[c];
            all.dbias[first + c] += dy[c];
        }
        all.mean.push(mean);
        all.rstd.push(rstd);
    }
    all
}

/// Within `scale` of the largest value of `right`, and half a unit of the last place.
fn close<E: Elem>(what: &str, got: &[E], right: &[f64], scale: f64, own: f64) {
    assert_eq!(got.len(), right.len(), "{what}");
    let largest = right.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    for (i, (got, right)) in got.iter().zip(right).enumerate() {
        let (got, bound) = (got.to_f64(), scale * largest + own * right.abs());
        let far = (got - right).abs();
        assert!(
            far <= bound,
            "{what}, {i}: {got} is not {right}: {far:e} > {bound:e}"
        );
    }
}

fn check<T: Elem, P: Elem>(norm: Norm, rows: usize, cols: usize, o: &Options) {
    let case = case::<T, P>(norm, rows, cols, o);
    let what = format!("{norm:?} {:?} {rows}x{cols}", case.shape.types);
    // Long rows run in two orders, for the time.
    let orders = if rows * cols > 8192 {
        &Order::ALL[..2]
    } else {
        &Order::ALL
    };
    let outputs: Vec<Outputs<T, P>> = orders.iter().map(|&order| case.run(order)).collect();
    for other in &outputs[1..] {
        assert!(
            other.bytes() == outputs[0].bytes(),
            "{what}: the order of threads is seen"
        );
    }
    let (got, right) = (&outputs[0], right(&case));
    let scale = if T::ELEMENT.size() == 8 { 2e-14 } else { 2e-6 };
    // A rounded normalized value may fall on the other side of a tie.
    let own = if o.round_first {
        4. * T::ROUNDING
    } else {
        T::ROUNDING
    };
    close(&format!("{what} y"), got.y.slice(), &right.y, scale, own);
    close(
        &format!("{what} sum"),
        got.sum.slice(),
        &right.sum,
        0.,
        T::ROUNDING,
    );
    let largest = right.dx.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    let terms = scale * (right.terms / largest).max(1.);
    close(
        &format!("{what} dx"),
        got.dx.slice(),
        &right.dx,
        terms,
        T::ROUNDING,
    );
    let some = if o.round_first { T::ROUNDING } else { 0. };
    let tie = scale + some;
    close(
        &format!("{what} dweight"),
        got.dweight.slice(),
        &right.dweight,
        tie,
        P::ROUNDING,
    );
    close(
        &format!("{what} dbias"),
        got.dbias.slice(),
        &right.dbias,
        scale,
        P::ROUNDING,
    );
    let stats = got.stats.to_f64();
    let rstd = &stats[(norm.stats() - 1) * rows..];
    close(&format!("{what} rstd"), rstd, &right.rstd, scale, 0.);
    if norm.center {
        // Of a deviation of 1, not of the mean.
        let mean: Vec<f64> = (0..rows).map(|r| stats[r] + stats[rows + r]).collect();
        let far = mean
            .iter()
            .zip(&right.mean)
            .map(|(a, b)| (a - b).abs())
            .fold(0., f64::max);
        assert!(far < scale, "{what}: the mean is off by {far:e}");
    }
}

/// Small, ragged, and around every change of kernel for some type. Where there are more rows than
/// eight, a team has several of them.
const WIDTHS: [(usize, usize); 22] = [
    (1, 1),
    (130, 1),
    (67, 2),
    (133, 3),
    (9, 7),
    (70, 8),
    (21, 31),
    (70, 32),
    (37, 49),
    (20, 64),
    (3, 100),
    (19, 128),
    (11, 129),
    (3, 255),
    (17, 256),
    (11, 257),
    (3, 500),
    (9, 512),
    (4, 769),
    (3, 1024),
    (2, 1000),
    (1, 2049),
];

fn all_widths<T: Elem, P: Elem>() {
    for norm in Norm::ALL {
        for (rows, cols) in WIDTHS {
            check::<T, P>(
                norm,
                rows,
                cols,
                &Options {
                    few_blocks: rows > 8,
                    ..USUAL
                },
            );
        }
    }
}

#[test]
fn f32_of_all_widths() {
    all_widths::<f32, f32>();
}

#[test]
fn f16_of_all_widths() {
    all_widths::<f16, f16>();
}

#[test]
fn bf16_of_all_widths() {
    all_widths::<bf16, bf16>();
}

#[test]
fn f16_with_f32_parameters_of_all_widths() {
    all_widths::<f16, f32>();
}

#[test]
fn bf16_with_f32_parameters_of_all_widths() {
    all_widths::<bf16, f32>();
}

#[test]
fn f64_of_all_widths() {
    all_widths::<f64, f64>();
}

#[test]
fn long_rows() {
    let several = Options {
        few_blocks: true,
        ..USUAL
    };
    for norm in [Norm::ALL[0], Norm::ALL[3]] {
        check::<bf16, bf16>(norm, 1, 8192, &USUAL);
        check::<bf16, f32>(norm, 9, 2305, &several);
        check::<f32, f32>(norm, 9, 2048, &several);
        check::<f16, f16>(norm, 1, 16_387, &USUAL);
        check::<f32, f32>(norm, 1, 4100, &USUAL);
        check::<f32, f32>(norm, 1, 16_384, &USUAL);
        check::<bf16, bf16>(norm, 1, 16_384, &USUAL);
        check::<f64, f64>(norm, 9, 301, &several);
    }
    check::<f32, f32>(Norm::ALL[0], 2, 8192, &USUAL);
    check::<f32, f32>(Norm::ALL[0], 1, 20_000, &USUAL);
    check::<f32, f32>(Norm::ALL[0], 1, 40_001, &USUAL);
}

#[test]
fn a_mean_of_a_thousand_deviations() {
    let shifted = Options {
        mean: 1000.,
        ..USUAL
    };
    for norm in [Norm::ALL[0], Norm::ALL[2]] {
        for (rows, cols) in [
            (5, 49),
            (3, 100),
            (3, 1024),
            (1, 4096),
            (1, 4097),
            (1, 10_001),
        ] {
            check::<f32, f32>(norm, rows, cols, &shifted);
            check::<f64, f64>(norm, rows, cols.min(301), &shifted);
        }
        check::<f16, f32>(norm, 4, 1000, &shifted);
    }
}

#[test]
fn parameters_that_begin_anywhere() {
    for norm in Norm::ALL {
        for at in [1, 2, 4, 7] {
            for cols in [16, 137] {
                let o = Options { at, ..USUAL };
                check::<bf16, bf16>(norm, 3, cols, &o);
                check::<bf16, f32>(norm, 3, cols, &o);
                check::<f32, f32>(norm, 3, cols, &o);
            }
        }
    }
}

#[test]
fn without_weight_or_bias_or_gradient_of_the_sum() {
    for norm in Norm::ALL {
        for (weight, bias, dsum) in [
            (false, false, false),
            (true, false, true),
            (false, true, true),
        ] {
            let offset = if norm.center { 0. } else { 1. };
            let o = Options {
                weight,
                bias,
                dsum,
                offset,
                ..USUAL
            };
            check::<f32, f32>(norm, 5, 72, &o);
            check::<f16, f32>(norm, 5, 73, &o);
            check::<f32, f32>(norm, 1, 9000, &o);
        }
    }
}

#[test]
fn the_offset_of_the_weight() {
    let o = Options {
        offset: 1.,
        bias: false,
        ..USUAL
    };
    for norm in [Norm::ALL[1], Norm::ALL[3]] {
        check::<bf16, bf16>(norm, 6, 256, &o);
        check::<bf16, f32>(norm, 6, 300, &o);
        check::<f32, f32>(norm, 6, 2000, &o);
    }
}

#[test]
fn rounding_before_the_weight() {
    let o = Options {
        round_first: true,
        bias: false,
        ..USUAL
    };
    for (rows, cols) in [(6, 256), (3, 301), (1, 4096), (1, 16_385)] {
        check::<bf16, bf16>(Norm::ALL[1], rows, cols, &o);
        check::<f16, f16>(Norm::ALL[1], rows, cols, &o);
    }
    // Two roundings: nearly everywhere those of the formula, and often not those of one rounding.
    let case = case::<bf16, bf16>(Norm::ALL[1], 4, 1024, &o);
    let (got, two) = (case.run(Order::Ascending), right(&case));
    let one = right(&Case {
        round_first: false,
        ..case
    });
    let same = |right: &Right| {
        let right = right.y.iter().map(|&v| bf16::from_f64(v));
        got.y
            .slice()
            .iter()
            .zip(right)
            .filter(|(a, b)| **a == *b)
            .count()
    };
    assert!(same(&two) > 4080, "{}", same(&two));
    assert!(same(&one) < 3600, "{}", same(&one));
}

#[test]
fn a_constant_row_is_the_bias() {
    for cols in [64, 77, 3000] {
        let mut case = case::<f32, f32>(Norm::ALL[0], 3, cols, &USUAL);
        // Of which no sum is exact.
        case.x.slice_mut().fill(1234.567);
        let got = case.run(Order::Ascending);
        for row in got.y.slice().chunks(cols) {
            assert_eq!(row, case.bias.as_ref().unwrap().slice());
        }
        assert!(got.dx.slice().iter().all(|v| v.is_finite()));
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for cols in [60, 61, 3001] {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut case = case::<f16, f16>(Norm::ALL[0], 5, cols, &USUAL);
            case.x.slice_mut()[2 * cols] = f16::from_f64(bad);
            case.x.slice_mut()[3 * cols - 1] = f16::from_f64(bad);
            let got = case.run(Order::Ascending);
            for (r, (y, dx)) in got
                .y
                .slice()
                .chunks(cols)
                .zip(got.dx.slice().chunks(cols))
                .enumerate()
            {
                let finite = y.iter().chain(dx).all(|v| v.is_finite());
                assert_eq!(finite, r != 2, "row {r} of {cols} columns");
            }
        }
    }
}

#[test]
fn large_values_stay_finite() {
    for cols in [64, 1001] {
        let mut case = case::<f32, f32>(Norm::ALL[0], 3, cols, &USUAL);
        for v in case.x.slice_mut() {
            *v *= 5e14;
        }
        let (got, right) = (case.run(Order::Ascending), right(&case));
        close("y", got.y.slice(), &right.y, 2e-6, 6e-8);
        let mut case = common_f16(cols);
        for v in case.x.slice_mut() {
            *v = f16::from_f64(if v.to_f64() < 0. { -65504. } else { 65504. });
        }
        let (got, right) = (case.run(Order::Ascending), self::right(&case));
        close("y of f16", got.y.slice(), &right.y, 2e-6, f16::ROUNDING);
    }
}

fn common_f16(cols: usize) -> Case<f16, f16> {
    case::<f16, f16>(Norm::ALL[1], 3, cols, &USUAL)
}

/// The backward of a sum that was not rounded, in two launches.
fn check_of_sum<T: Elem, P: Elem>(norm: Norm, rows: usize, cols: usize, o: &Options) {
    let case = case::<T, P>(norm, rows, cols, &Options { dsum: false, ..*o });
    let what = format!("{norm:?} {:?} {rows}x{cols}, of a sum", case.shape.types);
    let outputs = Order::ALL.map(|order| case.run_of_sum(order));
    let (sum, got) = &outputs[0];
    for (_, other) in &outputs[1..] {
        assert!(
            other.dx.slice() == got.dx.slice()
                && other.dweight.slice() == got.dweight.slice()
                && other.dbias.slice() == got.dbias.slice(),
            "{what}: the order of threads is seen"
        );
    }
    let right = right(&case);
    assert_eq!(sum.to_f64(), right.sum, "{what}");
    let largest = right.dx.iter().fold(0., |m: f64, v| m.max(v.abs()));
    let terms = 2e-6 * (right.terms / largest).max(1.);
    close(&format!("{what} dx"), got.dx.slice(), &right.dx, terms, 0.);
    // A rounded normalized value may fall on the other side of a tie.
    let tie = if o.round_first { T::ROUNDING } else { 0. };
    for (name, got, right, scale) in [
        ("dweight", &got.dweight, &right.dweight, 2e-6 + tie),
        ("dbias", &got.dbias, &right.dbias, 2e-6),
    ] {
        let name = format!("{what} {name}");
        close(&name, got.slice(), right, scale, P::ROUNDING);
    }
}

#[test]
fn a_sum_that_is_not_rounded() {
    for norm in &Norm::ALL[2..] {
        for (rows, cols) in WIDTHS {
            let o = Options {
                few_blocks: rows > 8,
                round_first: !norm.center && cols % 2 == 1,
                offset: if norm.center { 0. } else { 1. },
                at: cols % 3,
                ..USUAL
            };
            check_of_sum::<bf16, bf16>(*norm, rows, cols, &o);
            check_of_sum::<f16, f32>(*norm, rows, cols, &o);
        }
        let several = Options {
            few_blocks: true,
            ..USUAL
        };
        check_of_sum::<f16, f16>(*norm, 9, 2305, &several);
        check_of_sum::<bf16, f32>(*norm, 1, 8192, &USUAL);
        check_of_sum::<bf16, bf16>(*norm, 2, 16_387, &USUAL);
        check_of_sum::<f32, f32>(*norm, 5, 100, &USUAL);
        check_of_sum::<f64, f64>(*norm, 5, 100, &USUAL);
    }
}

#[test]
fn weights_of_each_sample() {
    for norm in Norm::ALL {
        // Samples, rows of each, columns.
        for (samples, rows, cols) in [
            (1, 7, 33),
            (2, 1, 1),
            (3, 20, 24),
            (7, 3, 33),
            (2, 9, 129),
            (2, 19, 256),
            (3, 9, 513),
            (2, 2, 769),
            (2, 9, 2056),
        ] {
            let o = Options {
                samples,
                few_blocks: rows > 8,
                offset: if norm.center { 0. } else { 1. },
                at: cols % 3,
                ..USUAL
            };
            check::<f32, f32>(norm, samples * rows, cols, &o);
            check::<bf16, bf16>(norm, samples * rows, cols, &o);
            check::<f16, f32>(norm, samples * rows, cols, &o);
            check::<f64, f64>(norm, samples * rows, cols.min(301), &o);
        }
        let o = Options {
            samples: 2,
            ..USUAL
        };
        check::<bf16, bf16>(norm, 4, 16_387, &o);
    }
}
