//! Every layer at ragged sizes.

use candle_core::{DType, Result};
use candle_norm::ops::{self, Cast};

use crate::common::compare::{assert_close, assert_gradient, tolerance};
use crate::common::data::{Draw, rounded, tensor, values, variable};
use crate::common::oracle::Norm;
use crate::common::subjects::{Kind, Subject, backward, gradient};
use crate::{FORMS, Stamp, numbers};

/// Lengths that lanes and runs do not divide.
pub(crate) const WIDTHS: [usize; 16] = [
    1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 49, 100, 196, 768, 1031, 4099,
];

/// Numbers of rows, samples or channels that blocks do not divide.
const COUNTS: [usize; 12] = [1, 2, 3, 4, 5, 9, 33, 65, 257, 1031, 4099, 16391];

/// The most elements of a shape: enough that the largest have several blocks on several threads.
const LIMIT: usize = 100_000;

/// Every width with every count, up to about `limit` elements, numbered so that both meet every
/// form of parameters.
fn sizes(limit: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    let all = WIDTHS.iter().enumerate().flat_map(|(i, &width)| {
        let counts = COUNTS.iter().enumerate();
        counts.map(move |(j, &count)| (i + j, count, width))
    });
    // The longest rows are there in small numbers whatever the limit.
    all.filter(move |(_, count, width)| count * width <= limit || *count <= 2)
}

pub(crate) fn layer_norm(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(LIMIT)) {
        stamp.check(case, Kind::Layer { axes: 1 }, &[rows, len]);
    }
}

pub(crate) fn layer_norm_of_axes(stamp: Stamp) {
    for (case, dims, axes) in [
        (0, vec![3, 5, 7], 2),
        (1, vec![2, 3, 5, 31], 3),
        (2, vec![9, 17], 1),
        (3, vec![5, 4, 33], 1),
        (4, vec![1, 1, 49], 2),
        (5, vec![33, 3, 196], 2),
    ] {
        stamp.check(case, Kind::Layer { axes }, &dims);
        stamp.check(case + 1, Kind::Rms { axes, offset: 1. }, &dims);
    }
}

/// `C` channels of maps of `space` positions.
fn maps(stamp: Stamp) -> impl Iterator<Item = (usize, Vec<usize>)> {
    sizes(stamp.limit(20_000)).map(|(case, space, channels)| {
        let samples = 1 + case % 3;
        (case, vec![samples, channels, space])
    })
}

pub(crate) fn layer_norm_channels_first(stamp: Stamp) {
    for (case, dims) in maps(stamp) {
        stamp.check(case, Kind::LayerChannelsFirst, &dims);
    }
}

pub(crate) fn layer_norm_without_mean(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(20_000)) {
        stamp.check(case, Kind::LayerNoMean, &[rows, len]);
    }
}

pub(crate) fn rms_norm(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(LIMIT)) {
        let offset = if case % 2 == 0 { 0. } else { 1. };
        stamp.check(case, Kind::Rms { axes: 1, offset }, &[rows, len]);
    }
}

pub(crate) fn rms_norm_channels_first(stamp: Stamp) {
    for (case, dims) in maps(stamp) {
        stamp.check(case, Kind::RmsChannelsFirst, &dims);
    }
}

pub(crate) fn scale_norm(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(LIMIT)) {
        stamp.check(case, Kind::Scale, &[rows, len]);
    }
}

/// An ε between the lengths of short rows and of long ones.
pub(crate) fn scale_norm_of_short_rows(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(20_000)) {
        let (dims, subject) = ([rows, len], Subject::new(Kind::Scale, 8.));
        let numbers = numbers(subject, &dims, (case % 2 == 0, false), 0.5);
        stamp.check_numbers(&numbers, subject, &dims, stamp.dtypes(case));
    }
}

/// The normalized value is rounded before the weight, and so twice: `dweight` sees what was
/// multiplied.
pub(crate) fn rms_norm_cast_before_weight(stamp: Stamp) {
    for (case, rows, len) in sizes(stamp.limit(20_000)) {
        let (dims, offset) = ([rows, len], [0., 1.][case % 2]);
        let kind = Kind::Rms { axes: 1, offset };
        let numbers = numbers(Subject::new(kind, 1e-5), &dims, (true, false), 0.5);
        let dtypes = stamp.dtypes(case);
        let n = numbers.rounded(dtypes).expect("numbers");
        let weight = n.weight.as_deref();
        let x = variable(&n.x, &dims, dtypes.input).expect("a variable");
        let w = variable(weight.expect("a weight"), &[len], dtypes.params).expect("a variable");
        let dy = tensor(&n.dy, &dims, dtypes.input).expect("a tensor");
        let (y, grads) = stamp.run(|| {
            let y = ops::rms_norm(
                &x,
                len,
                Some(&w),
                ops::RmsOptions {
                    eps: Some(1e-5),
                    offset,
                    cast: Cast::BeforeWeight,
                },
            )?;
            let grads = backward(&y, &dy)?;
            Ok((y, grads))
        });
        let norm = Norm::layer(&dims, 1, 1e-5).without_mean();
        let xhat = norm.forward(&n.x, None, None).y;
        let xhat = rounded(&xhat, dtypes.input).expect("numbers");
        let want: Vec<f64> = (xhat.iter().enumerate())
            .map(|(i, x)| x * (weight.expect("a weight")[i % len] + offset))
            .collect();
        let back = norm.with_offset(offset).backward(&n.x, weight, &n.dy);
        let twice = 2. * stamp.tolerance();
        let what = |name: &str| format!("{name} of {dims:?} in {dtypes:?}, offset {offset}");
        assert_close(&what("y"), &y, &want, twice);
        assert_gradient(&what("dx"), &gradient(&grads, &x), &back.dx, twice);
        let dweight = gradient(&grads, &w);
        assert_gradient(&what("dweight"), &dweight, &back.dweight, twice);
    }
}

/// Samples and channels, and numbers of groups that divide them.
const SAMPLES_CHANNELS_GROUPS: [(usize, usize, &[usize]); 12] = [
    (1, 1, &[1]),
    (1, 2, &[1, 2]),
    (3, 6, &[1, 2, 3, 6]),
    (5, 4, &[2]),
    (2, 33, &[3, 11]),
    (9, 15, &[5]),
    (2, 96, &[32]),
    (65, 2, &[1, 2]),
    (1, 130, &[65]),
    (257, 3, &[1, 3]),
    (33, 65, &[13, 65]),
    (1031, 4, &[2]),
];

pub(crate) fn group_norm(stamp: Stamp) {
    for (i, &space) in WIDTHS.iter().enumerate() {
        for (j, &(samples, channels, groups)) in SAMPLES_CHANNELS_GROUPS.iter().enumerate() {
            if samples * channels * space > stamp.limit(LIMIT / 2) {
                continue;
            }
            for (k, &groups) in groups.iter().enumerate() {
                let dims = [samples, channels, space];
                stamp.check(i + j + k, Kind::Group { groups }, &dims);
            }
        }
    }
}

pub(crate) fn instance_norm(stamp: Stamp) {
    for (i, &space) in WIDTHS.iter().enumerate().filter(|(_, space)| **space > 1) {
        for (j, &(samples, channels, _)) in SAMPLES_CHANNELS_GROUPS.iter().enumerate() {
            if samples * channels * space <= stamp.limit(LIMIT / 2) {
                stamp.check(i + j, Kind::Instance, &[samples, channels, space]);
            }
        }
    }
}

/// By planes longer and shorter than lanes, and by single values.
pub(crate) fn switch_norm(stamp: Stamp) {
    for (i, &space) in WIDTHS.iter().enumerate() {
        for (j, &(samples, channels, _)) in SAMPLES_CHANNELS_GROUPS.iter().enumerate() {
            if samples * channels * space <= stamp.limit(LIMIT / 5) {
                stamp.check(i + j, Kind::Switch, &[samples, channels, space]);
            }
        }
    }
    stamp.check(0, Kind::Switch, &[65, 33]);
}

/// Shapes of rank 2 to 5, some of them planes, some columns.
fn batches(limit: usize) -> Vec<(usize, Vec<usize>)> {
    let columns = sizes(limit)
        .filter(|(_, samples, _)| *samples > 1)
        .map(|(case, samples, channels)| (case, vec![samples, channels]));
    let planes = WIDTHS.iter().enumerate().flat_map(move |(i, &space)| {
        let shapes = SAMPLES_CHANNELS_GROUPS.iter().enumerate();
        shapes.filter_map(move |(j, &(samples, channels, _))| {
            let fits = samples * channels * space <= limit && samples * space > 1;
            fits.then(|| (i + j, vec![samples, channels, space]))
        })
    });
    let of_rank = [vec![3, 5, 7, 9], vec![2, 3, 3, 5, 4], vec![4, 17, 1, 3]];
    let of_rank = of_rank.into_iter().enumerate();
    columns.chain(planes).chain(of_rank).collect()
}

pub(crate) fn batch_norm(stamp: Stamp) {
    for (case, dims) in batches(stamp.limit(LIMIT)) {
        stamp.check(case, Kind::Batch, &dims);
    }
}

pub(crate) fn batch_norm_without_mean(stamp: Stamp) {
    for (case, dims) in batches(stamp.limit(10_000)) {
        stamp.check(case, Kind::BatchNoMean, &dims);
    }
}

pub(crate) fn batch_norm_inference(stamp: Stamp) {
    for (case, dims) in batches(stamp.limit(30_000)) {
        check_inference(stamp, case, &dims).expect("tensors that fit");
    }
}

fn check_inference(stamp: Stamp, case: usize, dims: &[usize]) -> Result<()> {
    let (eps, channels) = (1e-3, dims[1]);
    let (form, dtypes) = (FORMS[case % FORMS.len()], stamp.dtypes(case / FORMS.len()));
    let numbers = numbers(Subject::new(Kind::Batch, eps), dims, form, 0.5).rounded(dtypes)?;
    let statistics = match dtypes.input {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let mut draw = Draw::new(1);
    let mean = rounded(&draw.normal(channels), statistics)?;
    let var: Vec<f64> = draw.normal(channels).iter().map(|z| z * z).collect();
    let var = rounded(&var, statistics)?;
    let [mean_t, var_t] = [&mean, &var].map(|s| tensor(s, &[channels], statistics));
    let (mean_t, var_t) = (mean_t?, var_t?);

    let x = variable(&numbers.x, dims, dtypes.input)?;
    let param = |v: &Option<Vec<f64>>| {
        let v = v.as_ref();
        v.map(|v| variable(v, &[channels], dtypes.params))
            .transpose()
    };
    let (w, b) = (param(&numbers.weight)?, param(&numbers.bias)?);
    let dy = tensor(&numbers.dy, dims, dtypes.input)?;
    let (y, grads) = stamp.run(|| {
        let y = ops::batch_norm_inference(&x, [&mean_t, &var_t], w.as_ref(), b.as_ref(), eps)?;
        let grads = backward(&y, &dy)?;
        Ok((y, grads))
    });
    let (norm, fixed) = (Norm::batch(dims, eps), (&mean[..], &var[..]));
    let weight = numbers.weight.as_deref();
    let want = norm.forward_fixed(&numbers.x, fixed, weight, numbers.bias.as_deref());
    let back = norm.backward_fixed(&numbers.x, fixed, weight, &numbers.dy);
    let what = |name: &str| format!("{name} of {dims:?} in {dtypes:?}");
    let tolerance = stamp.tolerance();
    assert_close(&what("y"), &y, &want, tolerance);
    assert_gradient(&what("dx"), &gradient(&grads, &x), &back.dx, tolerance);
    for (name, param, want) in [("dweight", w, back.dweight), ("dbias", b, back.dbias)] {
        if let Some(param) = param {
            assert_gradient(&what(name), &gradient(&grads, &param), &want, tolerance);
        }
    }
    Ok(())
}

/// Statistics of a batch as running statistics take them: the mean, and the unbiased variance, of
/// each channel, in the accumulator's precision.
pub(crate) fn batch_statistics(stamp: Stamp) {
    for (_, dims) in batches(stamp.limit(30_000)) {
        check_statistics(stamp, &dims, false).expect("tensors that fit");
        if dims.len() > 2 && dims[2..].iter().product::<usize>() > 1 {
            check_statistics(stamp, &dims, true).expect("tensors that fit");
        }
    }
}

fn check_statistics(stamp: Stamp, dims: &[usize], instance: bool) -> Result<()> {
    let (samples, channels) = (dims[0], dims[1]);
    let kind = if instance {
        Kind::Instance
    } else {
        Kind::Batch
    };
    let numbers = numbers(Subject::new(kind, 1e-5), dims, (false, false), 3.);
    let numbers = numbers.rounded(stamp.dtype.into())?;
    let x = tensor(&numbers.x, dims, stamp.dtype)?;
    let (_, statistics) = stamp.run(|| match instance {
        true => ops::instance_norm(&x, None, None, 1e-5),
        false => ops::batch_norm(&x, None, None, 1e-5),
    });
    let statistics = statistics.expect("the statistics of a batch that is not empty");

    let forward = Subject::new(kind, 1e-5)
        .oracle(dims)
        .forward(&numbers.x, None, None);
    // The rows of instance norm are the channels of each sample.
    let rows_per_channel = if instance { samples } else { 1 };
    let (mut mean, mut var) = (vec![0.; channels], vec![0.; channels]);
    for row in 0..forward.mean.len() {
        let (channel, count) = (row % channels, forward.count[row]);
        mean[channel] += forward.mean[row] / rows_per_channel as f64;
        var[channel] += forward.var[row] * count / (count - 1.) / rows_per_channel as f64;
    }
    let tolerance = tolerance(statistics.mean.dtype());
    let what = |name: &str| format!("{name} of {dims:?}, instance norm: {instance}");
    assert_close(&what("mean"), &statistics.mean, &mean, tolerance);
    assert_close(&what("var"), &statistics.var, &var, tolerance);
    assert_eq!(values(&statistics.mean)?.len(), channels);
    Ok(())
}
