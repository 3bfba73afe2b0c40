//! Numbers that are hard on statistics: large means, constants, NaN and infinity.

use crate::common::data::{rounded, values};
use crate::common::subjects::{Kind, Subject};
use crate::{FORMS, Stamp, numbers};

/// Every layer on rows of `len` values, `rows` of them, by the shape of its input.
fn of_rows(rows: usize, len: usize) -> Vec<(Kind, Vec<usize>)> {
    let rms = Kind::Rms {
        axes: 1,
        offset: 0.,
    };
    vec![
        (Kind::Layer { axes: 1 }, vec![rows, len]),
        (Kind::LayerNoMean, vec![rows, len]),
        (rms, vec![rows, len]),
        (Kind::LayerChannelsFirst, vec![1, len, rows]),
        (Kind::RmsChannelsFirst, vec![rows, len, 1]),
        (Kind::Group { groups: 1 }, vec![rows, len]),
        (Kind::Group { groups: 1 }, vec![rows, 1, len]),
        (Kind::Group { groups: rows }, vec![1, rows, len]),
        (Kind::Instance, vec![1, rows, len]),
        (Kind::Batch, vec![len, rows]),
        (Kind::Batch, vec![1, rows, len]),
        (Kind::BatchNoMean, vec![1, rows, len]),
        (Kind::BatchNoMean, vec![len, rows]),
        (Kind::Switch, vec![1, rows, len]),
    ]
}

/// Means of up to thousands of standard deviations, where a mean in one `f32` would be too coarse.
pub(crate) fn large_means(stamp: Stamp) {
    for mean in [30., -300., 3000.] {
        for len in [2, 3, 17, 100, 768, 4099] {
            for (case, (kind, dims)) in of_rows(5, len).into_iter().enumerate() {
                let subject = Subject::new(kind, 1e-5);
                let numbers = numbers(subject, &dims, FORMS[case % FORMS.len()], mean);
                stamp.check_numbers(&numbers, subject, &dims, stamp.dtypes(len));
            }
        }
    }
}

/// A row of one value is its bias to the bit, and its gradients are finite.
pub(crate) fn constant_rows(stamp: Stamp) {
    for constant in [0., -0.1, 3e4] {
        for len in [2, 17, 1031, 4099] {
            for (case, (kind, dims)) in of_rows(5, len).into_iter().enumerate() {
                let uncentered = matches!(
                    kind,
                    Kind::LayerNoMean
                        | Kind::Rms { .. }
                        | Kind::RmsChannelsFirst
                        | Kind::BatchNoMean
                );
                if uncentered {
                    continue;
                }
                let subject = Subject::new(kind, 1e-5);
                let dtypes = stamp.dtypes(case);
                let mut numbers = numbers(subject, &dims, (true, true), 0.);
                numbers.x.fill(constant);
                let ran = stamp.run(|| numbers.run(subject, &dims, dtypes));
                let n = numbers.rounded(dtypes).expect("numbers");
                let (w, b) = (n.weight.as_deref(), n.bias.as_deref());
                let bias = subject.oracle(&dims).forward(&n.x, w, b).y;
                let bias = rounded(&bias, dtypes.input).expect("numbers");
                assert_eq!(
                    values(&ran.y).expect("numbers"),
                    bias,
                    "{kind:?} of {dims:?}"
                );
                for (name, t) in ran.named() {
                    let finite = values(t).expect("numbers").iter().all(|v| v.is_finite());
                    assert!(finite, "{name} of {kind:?} of {dims:?}");
                }
            }
        }
    }
}

pub(crate) fn what_is_not_finite_stays_in_its_row(stamp: Stamp) {
    for len in [2, 17, 100, 4099] {
        for (kind, dims) in of_rows(5, len) {
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let n: usize = dims.iter().product();
                for at in [0, n / 2, n - 1] {
                    check_confined(stamp, kind, &dims, bad, at);
                }
            }
        }
    }
}

/// Other rows have the bits that they had, and so have gradients of parameters that the row has no
/// part in.
fn check_confined(stamp: Stamp, kind: Kind, dims: &[usize], bad: f64, at: usize) {
    let (subject, dtypes) = (Subject::new(kind, 1e-3), stamp.dtypes(at));
    let mut numbers = numbers(subject, dims, (true, true), 0.5);
    let clean = stamp.run(|| numbers.run(subject, dims, dtypes));
    numbers.x[at] = bad;
    let ran = stamp.run(|| numbers.run(subject, dims, dtypes));
    let n = numbers.rounded(dtypes).expect("numbers");
    let oracle = subject.oracle(dims);
    let want = oracle
        .forward(&n.x, n.weight.as_deref(), n.bias.as_deref())
        .y;
    let what = |name: &str| format!("{name} of {kind:?} of {dims:?}, {bad} at {at}");

    let mut reached = vec![false; clean.dweight.as_ref().expect("a weight").elem_count()];
    for (name, got, clean) in [("y", &ran.y, &clean.y), ("dx", &ran.dx, &clean.dx)] {
        let (got, clean) = (
            values(got).expect("numbers"),
            values(clean).expect("numbers"),
        );
        for i in 0..got.len() {
            if oracle.row(i) != oracle.row(at) {
                assert_eq!(got[i], clean[i], "{}: element {i}", what(name));
                continue;
            }
            reached[oracle.slot(i)] = true;
            if name == "y" {
                assert_eq!(
                    got[i].is_nan(),
                    want[i].is_nan(),
                    "{}: element {i}",
                    what(name)
                );
            }
        }
    }
    let params = [(&ran.dweight, &clean.dweight), (&ran.dbias, &clean.dbias)];
    for (which, (got, clean)) in params.into_iter().enumerate() {
        let of = |t: &Option<_>| values(t.as_ref().expect("a gradient")).expect("numbers");
        let (got, clean) = (of(got), of(clean));
        for slot in 0..got.len() {
            // dbias has nothing of x.
            let same = which == 1 || !reached[slot];
            assert!(
                !same || got[slot] == clean[slot],
                "{}: slot {slot}",
                what("parameters")
            );
            let spoiled = same || !bad.is_nan() || got[slot].is_nan();
            assert!(spoiled, "{}: slot {slot}", what("dweight"));
        }
    }
}
