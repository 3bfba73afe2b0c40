//! The passes by themselves: against loops in float64, against the single jobs to the bit, and with
//! the same bits for every number of threads and every instruction set.

use candle_norm_kernels::{
    AffinePair, Float, Frame, GroupSpec, Level, Mean, Moments, NormalizedBy, Order, RowSpec, Shape,
    Spread, Statistics, Stats, Wanted,
};
use half::{bf16, f16};

const EPS: f64 = 1e-5;

/// Sizes of planes that lanes and runs do not divide.
const INNER: [usize; 6] = [1, 15, 16, 17, 33, 1000];

const SPREADS: [Spread; 6] = [
    Spread::Column,
    Spread::Channel,
    Spread::SampleAndChannel,
    Spread::SampleAndColumn,
    Spread::Element,
    Spread::SampleAndElement,
];

/// A number with its conversions and the precision of results.
trait Value: Copy + PartialEq + std::fmt::Debug {
    const TOLERANCE: f64;
    fn of(v: f64) -> Self;
    fn wide(self) -> f64;
}

/// An element whose accumulator is a number too.
trait Number: Value + Float<Acc = <Self as Number>::Wide> {
    type Wide: Value + Float<Acc = Self::Wide>;
}

macro_rules! number {
    ($t:ident in $wide:ident, $tolerance:expr, $of:expr) => {
        impl Number for $t {
            type Wide = $wide;
        }

        impl Value for $t {
            const TOLERANCE: f64 = $tolerance;
            fn of(v: f64) -> Self {
                $of(v)
            }
            fn wide(self) -> f64 {
                self.into()
            }
        }
    };
}
number!(f32 in f32, 2e-6, |v| v as f32);
number!(f64 in f64, 1e-13, |v| v);
number!(f16 in f32, 6e-4, f16::from_f64);
number!(bf16 in f32, 4.5e-3, bf16::from_f64);

/// Numbers about `mean`, within one of it.
fn uniform_about<T: Value>(len: usize, seed: u64, mean: f64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        T::of(mean + (state >> 11) as f64 / (1u64 << 52) as f64 - 1.)
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn wide<T: Value>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.wide()).collect()
}

/// A sum, and the sum of the sizes of its terms, which its rounding is measured by.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    fn add(&mut self, v: f64) {
        self.value += v;
        self.size += v.abs();
    }
}

#[track_caller]
fn assert_sums<A: Value>(what: &str, got: &[f64], want: &[Sum]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let tolerance = A::TOLERANCE * (want.size + 1.);
        let error = (got - want.value).abs();
        assert!(error <= tolerance, "{what} {i}: {got} for {}", want.value);
    }
}

#[track_caller]
fn assert_values<T: Value>(what: &str, got: &[T], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{what}");
    let scale = want.iter().fold(1f64, |scale, v| scale.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got.wide() - want).abs();
        assert!(
            error <= T::TOLERANCE * scale,
            "{what} {i}: {got:?} for {want}"
        );
    }
}

#[derive(Debug, Clone, Copy)]
enum By {
    Nothing,
    Channels,
    /// So many groups a sample.
    Groups(usize),
}

impl By {
    fn count(self, shape: Shape) -> usize {
        match self {
            By::Nothing => 0,
            By::Channels => shape.channels,
            By::Groups(groups) => shape.outer * groups,
        }
    }

    fn set(self, shape: Shape, sample: usize, channel: usize) -> usize {
        match self {
            By::Nothing => 0,
            By::Channels => channel,
            By::Groups(groups) => sample * groups + channel / (shape.channels / groups),
        }
    }

    fn with(self, stats: &[Stats]) -> NormalizedBy<'_> {
        match self {
            By::Nothing => NormalizedBy::Nothing,
            By::Channels => NormalizedBy::Channels(stats),
            By::Groups(_) => NormalizedBy::Groups(stats),
        }
    }
}

fn slot(spread: Spread, shape: Shape, [sample, channel, place]: [usize; 3]) -> usize {
    match spread {
        Spread::Column => place,
        Spread::Channel => channel,
        Spread::SampleAndChannel => sample * shape.channels + channel,
        Spread::SampleAndColumn => sample * shape.inner + place,
        Spread::Element => channel * shape.inner + place,
        Spread::SampleAndElement => (sample * shape.channels + channel) * shape.inner + place,
    }
}

fn places(shape: Shape) -> impl Iterator<Item = (usize, [usize; 3])> {
    let elements = shape.outer * shape.channels * shape.inner;
    (0..elements).map(move |i| {
        let plane = i / shape.inner;
        (
            i,
            [
                plane / shape.channels,
                plane % shape.channels,
                i % shape.inner,
            ],
        )
    })
}

/// The statistics of `x`, formed in float64.
fn stats_of(x: &[f64], shape: Shape, by: By) -> Vec<Stats> {
    let mut parts = vec![vec![]; by.count(shape)];
    for (i, [sample, channel, _]) in places(shape) {
        if let Some(part) = parts.get_mut(by.set(shape, sample, channel)) {
            part.push(x[i]);
        }
    }
    let stats = parts.iter().map(|values| {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        Stats::new(Mean::from(mean), var, EPS)
    });
    stats.collect()
}

struct Oracle {
    y: Vec<f64>,
    dweight: Vec<Sum>,
    dbias: Vec<Sum>,
    along: Vec<Sum>,
    sum: Vec<Sum>,
    /// With statistics that move with `x`.
    dx: Vec<f64>,
    /// With statistics that do not.
    dx_given: Vec<f64>,
}

fn oracle(
    [x, dy]: [&[f64]; 2],
    shape: Shape,
    (by, stats): (By, &[Stats]),
    spread: Spread,
    [weight, bias]: [Option<&[f64]>; 2],
) -> Oracle {
    let none = Stats::new(Mean::from(0.), 1. - EPS, EPS);
    let slots = spread.count(shape);
    let mut o = Oracle {
        y: vec![],
        dweight: vec![Sum::default(); slots],
        dbias: vec![Sum::default(); slots],
        along: vec![Sum::default(); stats.len()],
        sum: vec![Sum::default(); stats.len()],
        dx: vec![],
        dx_given: vec![],
    };
    let mut counts = vec![0f64; stats.len()];
    let mut elements = vec![];
    for (i, place @ [sample, channel, _]) in places(shape) {
        let (set, slot) = (by.set(shape, sample, channel), slot(spread, shape, place));
        let stats = stats.get(set).copied().unwrap_or(none);
        let normal = (x[i] - stats.mean.high) * stats.inv_std;
        let w = weight.map_or(1., |w| w[slot]);
        let g = dy[i] * w;
        o.y.push(normal * w + bias.map_or(0., |b| b[slot]));
        o.dweight[slot].add(dy[i] * normal);
        o.dbias[slot].add(dy[i]);
        if set < counts.len() {
            o.along[set].add(g * normal);
            o.sum[set].add(g);
            counts[set] += 1.;
        }
        elements.push((set, normal, g, stats.inv_std));
    }
    for (set, normal, g, inv_std) in elements {
        o.dx_given.push(g * inv_std);
        o.dx.push(match counts.get(set) {
            Some(n) => (g - o.sum[set].value / n - normal * o.along[set].value / n) * inv_std,
            None => g * inv_std,
        });
    }
    o
}

/// The shapes of all tests, each with the numbers of groups that divide its channels.
fn shapes() -> impl Iterator<Item = Shape> {
    INNER.into_iter().flat_map(|inner| {
        [(1, 1), (3, 4), (2, 6), (33, 2)].map(|(outer, channels)| Shape {
            outer,
            channels,
            inner,
        })
    })
}

/// Shapes of which rows, groups or channels are divided among threads.
fn divided() -> impl Iterator<Item = Shape> {
    [
        (1, 2, 70_001),
        (2, 3, 50_001),
        (3, 1, 65_549),
        (700, 2, 130),
        (9, 2, 33_000),
    ]
    .into_iter()
    .map(|(outer, channels, inner)| Shape {
        outer,
        channels,
        inner,
    })
}

fn ways(shape: Shape) -> Vec<By> {
    let groups = (1..=shape.channels).filter(|groups| shape.channels.is_multiple_of(*groups));
    let groups = groups.map(By::Groups);
    [By::Nothing, By::Channels]
        .into_iter()
        .chain(groups)
        .collect()
}

/// The parameters that there are: a weight, a bias.
const FORMS: [[bool; 2]; 4] = [[true, true], [true, false], [false, true], [false, false]];

fn every_spread<T: Number>() {
    for (case, shape) in shapes().chain(divided().take(3)).enumerate() {
        let n = shape.outer * shape.channels * shape.inner;
        let (x, dy) = (uniform_about::<T>(n, 1, 0.5), uniform_about::<T>(n, 2, 0.));
        let (x64, dy64) = (wide(&x), wide(&dy));
        for by in ways(shape) {
            let stats = stats_of(&x64, shape, by);
            for (i, spread) in SPREADS.into_iter().enumerate() {
                let slots = spread.count(shape);
                let [w, b] = FORMS[(case + i) % FORMS.len()];
                let w = w.then(|| uniform_about::<T::Acc>(slots, 3, 1.));
                let b = b.then(|| uniform_about::<T::Acc>(slots, 4, 0.));
                let (w64, b64) = (w.as_deref().map(wide), b.as_deref().map(wide));
                let params = [w64.as_deref(), b64.as_deref()];
                let want = oracle([&x64, &dy64], shape, (by, &stats), spread, params);
                let what = format!("{by:?} {spread:?} {shape:?}");
                let frame = Frame {
                    shape,
                    by: by.with(&stats),
                    spread,
                };
                let (weight, bias) = (w.as_deref(), b.as_deref());
                let y = T::normalize(&x, frame, AffinePair { weight, bias });
                assert_values(&format!("y {what}"), &y, &want.y);
                let sums = T::grad_sums(&x, &dy, frame, weight, true);
                assert_sums::<T::Acc>(&format!("dweight {what}"), &sums.dweight, &want.dweight);
                assert_sums::<T::Acc>(&format!("dbias {what}"), &sums.dbias, &want.dbias);
                let [along, sum] =
                    [0, 1].map(|i| -> Vec<f64> { sums.sets.iter().map(|set| set[i]).collect() });
                assert_sums::<T::Acc>(&format!("along {what}"), &along, &want.along);
                assert_sums::<T::Acc>(&format!("sum {what}"), &sum, &want.sum);
                let without = T::grad_sums(&x, &dy, frame, weight, false);
                assert!(without.dweight.is_empty() && without.dbias.is_empty());
                assert_eq!(without.sets, sums.sets, "{what}");
                let count = n as f64 / stats.len().max(1) as f64;
                let means: Vec<_> = sums.sets.iter().map(|set| set.map(|v| v / count)).collect();
                let dx = T::grad_input(&x, &dy, frame, weight, Some(&means));
                assert_values(&format!("dx {what}"), &dx, &want.dx);
                let dx = T::grad_input(&x, &dy, frame, weight, None);
                assert_values(&format!("dx given {what}"), &dx, &want.dx_given);
            }
        }
    }
}

#[test]
fn every_spread_is_that_of_float64() {
    every_spread::<f32>();
    every_spread::<f64>();
    every_spread::<f16>();
    every_spread::<bf16>();
}

fn scale_and_shift<T: Number>() {
    for (case, shape) in shapes().chain(divided().take(3)).enumerate() {
        let n = shape.outer * shape.channels * shape.inner;
        let (x, dy) = (uniform_about::<T>(n, 1, 0.5), uniform_about::<T>(n, 2, 0.));
        for (i, spread) in SPREADS.into_iter().enumerate() {
            let slots = spread.count(shape);
            let [w, b] = FORMS[(case + i) % FORMS.len()];
            let w = w.then(|| uniform_about::<T::Acc>(slots, 3, 1.));
            let b = b.then(|| uniform_about::<T::Acc>(slots, 4, 0.));
            let what = format!("{spread:?} {shape:?}");
            let slots: Vec<_> = places(shape)
                .map(|(_, at)| slot(spread, shape, at))
                .collect();
            let w_at = |i: usize| w.as_ref().map_or(1., |w| w[slots[i]].wide());
            let b_at = |i: usize| b.as_ref().map_or(0., |b| b[slots[i]].wide());
            let want: Vec<_> = (0..n).map(|i| x[i].wide() * w_at(i) + b_at(i)).collect();
            let affine = AffinePair {
                weight: w.as_deref(),
                bias: b.as_deref(),
            };
            let y = T::scale_shift(&x, shape, affine, spread);
            assert_values(&format!("y {what}"), &y, &want);

            let grads = T::scale_shift_backward(&x, &dy, shape, affine.weight, spread, true);
            let want: Vec<_> = (0..n).map(|i| dy[i].wide() * w_at(i)).collect();
            assert_values(&format!("dx {what}"), &grads.dx, &want);
            let mut dweight = vec![Sum::default(); spread.count(shape)];
            let mut dbias = dweight.clone();
            for i in 0..n {
                dweight[slots[i]].add(dy[i].wide() * x[i].wide());
                dbias[slots[i]].add(dy[i].wide());
            }
            assert_sums::<T::Acc>(&format!("dweight {what}"), &grads.dweight, &dweight);
            assert_sums::<T::Acc>(&format!("dbias {what}"), &grads.dbias, &dbias);
            let grads = T::scale_shift_backward(&x, &dy, shape, affine.weight, spread, false);
            assert!(grads.dweight.is_empty() && grads.dbias.is_empty());
        }
    }
}

#[test]
fn scale_and_shift_is_that_of_float64() {
    scale_and_shift::<f32>();
    scale_and_shift::<f64>();
    scale_and_shift::<f16>();
    scale_and_shift::<bf16>();
}

/// `x` in both orders, its channels last where planes allow it.
fn orders<T: Number>(x: &[T], shape: Shape) -> Vec<(Order, Vec<T>)> {
    let mut orders = vec![(Order::ChannelsFirst, x.to_vec())];
    if shape.has_planes() {
        let last = T::transposed(x, [shape.outer, shape.channels, shape.inner]);
        orders.push((Order::ChannelsLast, last));
    }
    orders
}

fn channel_passes<T: Number>() {
    let large = Shape {
        outer: 3,
        channels: 37,
        inner: 211,
    };
    for shape in shapes().chain([large]).chain(divided()) {
        let n = shape.outer * shape.channels * shape.inner;
        let dy = uniform_about::<T>(n, 2, 0.);
        let weight = uniform_about::<T::Acc>(shape.channels, 3, 1.);
        let bias = uniform_about::<T::Acc>(shape.channels, 4, 0.);
        let (w, b) = (Some(&*weight), Some(&*bias));
        let affine = AffinePair { weight: w, bias: b };
        let first = uniform_about::<T>(n, 1, 30.);
        for (order, x) in orders(&first, shape) {
            for center in [true, false] {
                let what = format!("{shape:?} {order:?} {center}");
                let own = Statistics::Own { center, eps: EPS };
                let (y, stats) = T::channels_forward(&x, order, shape, affine, own);
                let moments = T::channel_moments(&x, order, shape, center);
                let formed: Vec<_> = moments
                    .iter()
                    .map(|m| {
                        let mean = Mean {
                            high: m.mean(),
                            low: m.mean_error(),
                        };
                        Stats::new(mean, m.var(), EPS)
                    })
                    .collect();
                for (formed, stats) in formed.iter().zip(&stats) {
                    assert_eq!(formed.mean, stats.mean, "{what}");
                    assert_eq!(formed.inv_std, stats.inv_std, "{what}");
                }
                let given = Statistics::Given(&formed);
                let (again, _) = T::channels_forward(&x, order, shape, affine, given);
                assert_eq!(again, y, "{what}");

                let wanted = Wanted {
                    own: Some(center),
                    params: true,
                };
                let want = T::channels_backward(&x, order, &dy, shape, w, &stats, wanted);
                let [along, sum] = T::channel_grad_sums(&x, order, &dy, shape, &stats);
                assert_eq!((&along, &sum), (&want.dweight, &want.dbias), "{what}");
                let count = (shape.outer * shape.inner) as f64;
                let pairs = along.iter().zip(&sum);
                let mean = |sum: &f64| if center { sum / count } else { 0. };
                let means: Vec<_> = pairs.map(|(a, s)| [a / count, mean(s)]).collect();
                let dx = T::channel_grad_input(&x, order, &dy, shape, w, &stats, &means);
                assert_eq!(dx, want.dx, "{what}");
            }
        }
    }
}

/// Passes with nothing between them give the single job.
#[test]
fn passes_over_channels_are_the_single_job_to_the_bit() {
    channel_passes::<f32>();
    channel_passes::<f64>();
    channel_passes::<f16>();
    channel_passes::<bf16>();
}

/// Two halves of a batch, as two devices have them, are normalized as the whole is.
#[test]
fn halves_of_a_batch_are_normalized_by_their_joint_moments() {
    for inner in INNER {
        let whole = Shape {
            outer: 6,
            channels: 5,
            inner,
        };
        let half = Shape { outer: 3, ..whole };
        let n = 6 * 5 * inner;
        let (x, dy) = (
            uniform_about::<f64>(n, 1, 10.),
            uniform_about::<f64>(n, 2, 0.),
        );
        let order = Order::ChannelsFirst;
        let own = Statistics::Own {
            center: true,
            eps: EPS,
        };
        let (y, stats) = f64::channels_forward(&x, order, whole, AffinePair::NONE, own);
        let wanted = Wanted {
            own: Some(true),
            params: true,
        };
        let want = f64::channels_backward(&x, order, &dy, whole, None, &stats, wanted);

        let halves = [0..n / 2, n / 2..n];
        let moments = halves
            .clone()
            .map(|h| f64::channel_moments(&x[h], order, half, true));
        let joint: Vec<Moments> = (0..5).map(|c| moments[0][c].merge(moments[1][c])).collect();
        let joint: Vec<_> = joint
            .iter()
            .map(|m| Stats::new(Mean::from(m.mean()), m.var(), EPS))
            .collect();
        let given = Statistics::Given(&joint);
        let ys = halves
            .clone()
            .map(|h| f64::channels_forward(&x[h], order, half, AffinePair::NONE, given).0);
        assert_values("y", &ys.concat(), &y);
        let sums = halves
            .clone()
            .map(|h| f64::channel_grad_sums(&x[h.clone()], order, &dy[h], half, &joint));
        let count = (6 * inner) as f64;
        let means: Vec<_> = (0..5)
            .map(|c| [0, 1].map(|i| (sums[0][i][c] + sums[1][i][c]) / count))
            .collect();
        let dxs = halves.map(|h| {
            let (x, dy) = (&x[h.clone()], &dy[h]);
            f64::channel_grad_input(x, order, dy, half, None, &joint, &means)
        });
        assert_values("dx", &dxs.concat(), &want.dx);
    }
}

fn row_and_group_passes<T: Number>() {
    for shape in shapes().chain(divided()) {
        let n = shape.outer * shape.channels * shape.inner;
        let (x, dy) = (uniform_about::<T>(n, 1, 30.), uniform_about::<T>(n, 2, 0.));

        for center in [true, false] {
            let len = shape.inner;
            let weight = uniform_about::<T::Acc>(len, 3, 1.);
            let bias = uniform_about::<T::Acc>(len, 4, 0.);
            let affine = AffinePair {
                weight: Some(&*weight),
                bias: Some(&*bias),
            };
            let spec = RowSpec {
                len,
                center,
                eps: EPS,
                round_first: false,
                pairs: 1,
                activation: None,
            };
            let what = format!("rows of {shape:?} {center}");
            let (y, stats) = T::rows_forward(&x, affine, spec);
            let moments = T::row_moments(&x, len, center);
            for (moments, stats) in moments.iter().zip(&stats) {
                assert_eq!(moments.mean(), stats.mean.high, "{what}");
                assert_eq!(moments.var(), stats.var, "{what}");
            }
            let frame = Frame {
                shape: Shape {
                    outer: n / len,
                    channels: 1,
                    inner: len,
                },
                by: NormalizedBy::Groups(&stats),
                spread: Spread::Column,
            };
            assert_eq!(T::normalize(&x, frame, affine), y, "{what}");
            let want = T::rows_backward(&x, &dy, affine, &stats, spec, true);
            let sums = T::grad_sums(&x, &dy, frame, Some(&weight), true);
            assert_eq!(sums.dweight, want.dweight, "{what}");
            assert_eq!(sums.dbias, want.dbias, "{what}");
            let mean = |sum: f64| if center { sum / len as f64 } else { 0. };
            let means = sums.sets.iter().map(|[a, s]| [a / len as f64, mean(*s)]);
            let means: Vec<_> = means.collect();
            let dx = T::grad_input(&x, &dy, frame, Some(&weight), Some(&means));
            assert_eq!(dx, want.dx, "{what}");
        }

        let weight = uniform_about::<T::Acc>(shape.channels, 3, 1.);
        let bias = uniform_about::<T::Acc>(shape.channels, 4, 0.);
        let affine = AffinePair {
            weight: Some(&*weight),
            bias: Some(&*bias),
        };
        for num_groups in [1, shape.channels] {
            let what = format!("{num_groups} groups of {shape:?}");
            let spec = GroupSpec {
                per_sample: false,
                activation: None,
                shape,
                num_groups,
                eps: EPS,
            };
            let (y, stats) = T::groups_forward(&x, affine, spec);
            let frame = Frame {
                shape,
                by: NormalizedBy::Groups(&stats),
                spread: Spread::Channel,
            };
            let got = T::normalize(&x, frame, affine);
            let want = T::groups_backward(&x, &dy, affine, &stats, spec);
            let sums = T::grad_sums(&x, &dy, frame, Some(&weight), true);
            let count = (n / stats.len()) as f64;
            let means: Vec<_> = sums.sets.iter().map(|set| set.map(|v| v / count)).collect();
            let dx = T::grad_input(&x, &dy, frame, Some(&weight), Some(&means));
            // Planes too short for lanes are added up in another order.
            if shape.inner >= 16 {
                assert_eq!(got, y, "{what}");
                assert_eq!(dx, want.dx, "{what}");
            } else {
                assert_values(&what, &got, &wide(&y));
                assert_values(&what, &dx, &wide(&want.dx));
            }
        }
    }
}

#[test]
fn passes_over_rows_and_groups_are_the_single_job() {
    row_and_group_passes::<f32>();
    row_and_group_passes::<f64>();
    row_and_group_passes::<f16>();
    row_and_group_passes::<bf16>();
}

/// Everything that the passes give for a tensor, in `f64`.
fn everything<T: Number>(shape: Shape) -> Vec<f64> {
    let n = shape.outer * shape.channels * shape.inner;
    let (x, dy) = (uniform_about::<T>(n, 1, 0.5), uniform_about::<T>(n, 2, 0.));
    let mut all = vec![];
    for by in [
        By::Nothing,
        By::Channels,
        By::Groups(1),
        By::Groups(shape.channels),
    ] {
        let stats = stats_of(&wide(&x), shape, by);
        for spread in SPREADS {
            let weight = uniform_about::<T::Acc>(spread.count(shape), 3, 1.);
            let affine = AffinePair {
                weight: Some(&*weight),
                bias: Some(&*weight),
            };
            let frame = Frame {
                shape,
                by: by.with(&stats),
                spread,
            };
            all.extend(wide(&T::normalize(&x, frame, affine)));
            let sums = T::grad_sums(&x, &dy, frame, affine.weight, true);
            let means = Some(&*sums.sets);
            all.extend(wide(&T::grad_input(&x, &dy, frame, affine.weight, means)));
            all.extend(sums.dweight.into_iter().chain(sums.dbias));
            all.extend(sums.sets.into_iter().flatten());
        }
    }
    for (order, x) in orders(&x, shape) {
        let moments = T::channel_moments(&x, order, shape, true);
        all.extend(moments.iter().flat_map(|m| [m.mean(), m.m2()]));
        let stats = stats_of(&wide(&x), shape, By::Channels);
        let [along, sum] = T::channel_grad_sums(&x, order, &dy, shape, &stats);
        let means: Vec<_> = along.iter().zip(&sum).map(|(a, s)| [*a, *s]).collect();
        let dx = T::channel_grad_input(&x, order, &dy, shape, None, &stats, &means);
        all.extend(wide(&dx));
        all.extend(along.into_iter().chain(sum));
    }
    all.extend(
        T::row_moments(&x, shape.inner, false)
            .iter()
            .map(|m| m.m2()),
    );
    all
}

fn same_bits<T: Number>() {
    let pools = [1, 2, 3, 7].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().expect("threads")
    });
    let undivided = [(3, 4, 1), (257, 33, 5), (5, 37, 211), (2, 3, 9001)];
    let undivided = undivided.map(|(outer, channels, inner)| Shape {
        outer,
        channels,
        inner,
    });
    for shape in undivided.into_iter().chain(divided()) {
        let run = || everything::<T>(shape);
        let want = pools[0]
            .install(|| Level::Baseline.force(run))
            .expect("the baseline");
        for pool in &pools {
            for level in Level::ALL {
                let Some(got) = pool.install(|| level.force(run)) else {
                    continue;
                };
                let differs = want
                    .iter()
                    .zip(&got)
                    .position(|(a, b)| a.to_bits() != b.to_bits());
                let threads = pool.current_num_threads();
                assert!(
                    differs.is_none() && got.len() == want.len(),
                    "{shape:?} on {threads} threads with {level:?}: number {differs:?}"
                );
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_instruction_sets() {
    same_bits::<f32>();
    same_bits::<f64>();
    same_bits::<f16>();
    same_bits::<bf16>();
}
