//! Batch norm of `[outer, channels, inner]`, where a channel is a plane of `inner` elements in each sample.
//!
//! A channel is taken from its first sample to its last, by a thread that then still has it in cache for the next pass. Planes too short for
//! lanes go through [`columns`](super::columns).

use std::mem::MaybeUninit;
use std::ops::Range;

use super::buffer::filled;
use super::columns;
use super::moments::{Center, Moments};
use super::par;
use super::rows::{Affine, Gradients, Stats};
use super::shared::Shared;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, splat, zero};
use super::span::{RUN, map, map2, run_sums2, slices_per_run};

/// The three axes of a contiguous tensor with channels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) outer: usize,
    pub(crate) channels: usize,
    pub(crate) inner: usize,
}

impl Shape {
    pub(crate) fn elements(self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// How many elements a channel has.
    pub(crate) fn per_channel(self) -> f64 {
        (self.outer * self.inner) as f64
    }

    #[inline(always)]
    fn plane(self, sample: usize, channel: usize) -> Range<usize> {
        let start = (sample * self.channels + channel) * self.inner;
        start..start + self.inner
    }

    /// The parts of a channel that are added up in one go: ranges of samples, each with a range of every one of their planes.
    #[inline(always)]
    fn runs(self) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
        let samples = slices_per_run(self.inner);
        (0..self.outer).step_by(samples).flat_map(move |first| {
            let samples = first..(first + samples).min(self.outer);
            (0..self.inner)
                .step_by(RUN)
                .map(move |from| (samples.clone(), from..(from + RUN).min(self.inner)))
        })
    }

    /// The slices of one of [`runs`](Self::runs).
    #[inline(always)]
    fn slices<E>(
        self,
        x: &[E],
        channel: usize,
        (samples, part): (Range<usize>, Range<usize>),
    ) -> impl Iterator<Item = &[E]> {
        samples.map(move |sample| &x[self.plane(sample, channel)][part.clone()])
    }
}

/// What a batch is normalized by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Statistics<'a> {
    /// Its own, those of each channel, about their means or about zero.
    Own { center: bool, eps: f64 },
    /// These, one for each channel.
    Given(&'a [Stats]),
}

/// How many neighboring channels a job takes.
fn channels_per_job(shape: Shape) -> usize {
    par::items_per_block(shape.channels, shape.outer * shape.inner)
}

pub(crate) fn forward<E: Elem>(
    x: &[E],
    shape: Shape,
    affine: Affine<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(shape.channels));
    if shape.inner < LANES {
        return columns::forward(x, shape, affine, statistics);
    }
    let level = Level::current();
    let per_job = channels_per_job(shape);
    let mut stats = vec![Stats::NONE; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in every sample.
    let y = unsafe {
        filled(x.len(), |y| {
            let y = Shared::new(y);
            let jobs = stats
                .chunks_mut(per_job)
                .enumerate()
                .map(|(job, stats)| Forward {
                    x,
                    y,
                    shape,
                    first: job * per_job,
                    affine,
                    statistics,
                    stats,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    (y, stats)
}

struct Forward<'a, E: Elem> {
    x: &'a [E],
    y: Shared<'a, E>,
    shape: Shape,
    first: usize,
    affine: Affine<'a, E::Acc>,
    statistics: Statistics<'a>,
    stats: &'a mut [Stats],
}

impl<E: Elem> Kernel for Forward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let shape = self.shape;
        for (i, stats) in self.stats.iter_mut().enumerate() {
            let channel = self.first + i;
            *stats = match self.statistics {
                Statistics::Given(given) => given[channel],
                Statistics::Own { center, eps } => {
                    let moments = channel_moments(isa, self.x, shape, channel, center);
                    Stats::new(moments.mean, moments.var(), eps)
                }
            };
            let normal = Affined::<I, E::Acc>::new(isa, *stats, self.affine, channel);
            for sample in 0..shape.outer {
                let plane = shape.plane(sample, channel);
                // SAFETY: this job alone has the channel, and takes each of its planes once.
                let y = unsafe { self.y.part(plane.clone()) };
                map(
                    isa,
                    &self.x[plane],
                    y,
                    #[inline(always)]
                    |_, v| normal.of(v),
                );
            }
        }
    }
}

/// The moments of a channel; about zero where it is not centered.
#[inline(always)]
fn channel_moments<E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    shape: Shape,
    channel: usize,
    center: bool,
) -> Moments {
    let mut all = Moments::default();
    for run in shape.runs() {
        let count = run.0.len() * run.1.len();
        let slices = || shape.slices(x, channel, run.clone());
        let moments = match center {
            true => Moments::of_run(isa, count, slices),
            false => Moments::about_zero(isa, count, slices()),
        };
        all = all.merge(moments);
    }
    all
}

/// `(v − mean) · inv_std · weight + bias` with one value of each.
#[derive(Clone, Copy)]
pub(crate) struct Affined<I: Isa, T: Real> {
    center: Center<I, T>,
    scale: Lanes<I, T>,
    bias: Lanes<I, T>,
}

impl<I: Isa, T: Real> Affined<I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, stats: Stats, affine: Affine<T>, channel: usize) -> Self {
        let weight = affine.weight.map_or(1., |w| w[channel].wide());
        Self {
            center: Center::new(isa, stats.mean),
            scale: splat::<I, _>(isa, T::from_wide(stats.inv_std * weight)),
            bias: affine
                .bias
                .map_or(zero::<I, T>(isa), |b| splat::<I, _>(isa, b[channel])),
        }
    }

    #[inline(always)]
    pub(crate) fn of(self, v: Lanes<I, T>) -> Lanes<I, T> {
        self.center.distance(v) * self.scale + self.bias
    }
}

/// What a backward is to account for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    /// Whether the statistics are the batch's own, which move with `x`, and then whether the mean is among them.
    pub(crate) own: Option<bool>,
    /// Whether anybody wants the gradients of weight or bias; statistics of the batch need these sums anyway.
    pub(crate) params: bool,
}

/// What flows back into `x` from `dy`.
pub(crate) fn backward<E: Elem>(
    x: &[E],
    dy: &[E],
    shape: Shape,
    weight: Option<&[E::Acc]>,
    stats: &[Stats],
    wanted: Wanted,
) -> Gradients<E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    assert_eq!(x.len(), shape.elements());
    assert_eq!(x.len(), dy.len());
    assert_eq!(stats.len(), shape.channels);
    assert!(weight.is_none_or(|w| w.len() == shape.channels));
    if shape.inner < LANES {
        return columns::backward(x, dy, shape, weight, stats, wanted);
    }
    let level = Level::current();
    let per_job = channels_per_job(shape);
    let mut dweight = vec![0f64; shape.channels];
    let mut dbias = vec![0f64; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in every sample.
    let dx = unsafe {
        filled(x.len(), |dx| {
            let dx = Shared::new(dx);
            let jobs = dweight
                .chunks_mut(per_job)
                .zip(dbias.chunks_mut(per_job))
                .enumerate()
                .map(|(job, (dweight, dbias))| Backward {
                    x,
                    dy,
                    dx,
                    shape,
                    first: job * per_job,
                    weight,
                    stats,
                    wanted,
                    dweight,
                    dbias,
                })
                .collect();
            par::run(jobs, x.len(), |job| level.run(job));
        })
    };
    Gradients { dx, dweight, dbias }
}

struct Backward<'a, E: Elem> {
    x: &'a [E],
    dy: &'a [E],
    dx: Shared<'a, E>,
    shape: Shape,
    first: usize,
    weight: Option<&'a [E::Acc]>,
    stats: &'a [Stats],
    wanted: Wanted,
    dweight: &'a mut [f64],
    dbias: &'a mut [f64],
}

impl<E: Elem> Kernel for Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for i in 0..self.dweight.len() {
            match self.wanted {
                Wanted {
                    own: Some(center), ..
                } => self.through_own(isa, i, center),
                Wanted { own: None, params } => self.through_given(isa, i, params),
            }
        }
    }
}

impl<E: Elem> Backward<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    /// Channel `i` of this job, whose statistics move with `x`: first the sums, then the gradient.
    #[inline(always)]
    fn through_own<I: Isa>(&mut self, isa: I, i: usize, centered: bool) {
        let (shape, channel) = (self.shape, self.first + i);
        let stats = self.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        for run in shape.runs() {
            let pairs = shape
                .slices(self.x, channel, run.clone())
                .zip(shape.slices(self.dy, channel, run));
            let [along, sum] = run_sums2(
                isa,
                pairs,
                0,
                #[inline(always)]
                |_, x, dy| [dy * center.distance_from_high(x), dy],
            );
            self.dweight[i] += stats.along::<E::Acc>([along, sum]);
            self.dbias[i] += sum;
        }
        let back = Back::<I, E::Acc>::new(
            isa,
            stats,
            self.weight_of(channel),
            [self.dweight[i], if centered { self.dbias[i] } else { 0. }],
            shape.per_channel(),
        );
        for sample in 0..shape.outer {
            let (x, dy, dx) = self.planes(sample, channel);
            map2(
                isa,
                x,
                dy,
                dx,
                #[inline(always)]
                |_, x, dy| back.of(x, dy),
            );
        }
    }

    /// Channel `i` of this job, whose statistics stay: all in one sweep.
    #[inline(always)]
    fn through_given<I: Isa>(&mut self, isa: I, i: usize, params: bool) {
        let (shape, channel) = (self.shape, self.first + i);
        let stats = self.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let scale = E::Acc::from_wide(stats.inv_std * self.weight_of(channel));
        let scale = splat::<I, _>(isa, scale);
        for run in shape.runs() {
            if params {
                let pairs = shape.slices(self.x, channel, run.clone()).zip(shape.slices(
                    self.dy,
                    channel,
                    run.clone(),
                ));
                let [along, sum] = run_sums2(
                    isa,
                    pairs,
                    0,
                    #[inline(always)]
                    |_, x, dy| [dy * center.distance_from_high(x), dy],
                );
                self.dweight[i] += stats.along::<E::Acc>([along, sum]);
                self.dbias[i] += sum;
            }
            let (samples, part) = run;
            for sample in samples {
                let (_, dy, dx) = self.planes(sample, channel);
                map(
                    isa,
                    &dy[part.clone()],
                    &mut dx[part.clone()],
                    #[inline(always)]
                    |_, dy| dy * scale,
                );
            }
        }
    }

    #[inline(always)]
    fn weight_of(&self, channel: usize) -> f64 {
        self.weight.map_or(1., |w| w[channel].wide())
    }

    #[inline(always)]
    fn planes(&mut self, sample: usize, channel: usize) -> (&[E], &[E], &mut [MaybeUninit<E>]) {
        let plane = self.shape.plane(sample, channel);
        // SAFETY: this job alone has the channel, and takes one of its planes at a time.
        let dx = unsafe { self.dx.part(plane.clone()) };
        (&self.x[plane.clone()], &self.dy[plane], dx)
    }
}

/// `dx = inv_std · weight · (dy − mean(dy) − x̂ · mean(dy · x̂))` with one value of each statistic.
#[derive(Clone, Copy)]
pub(crate) struct Back<I: Isa, T: Real> {
    center: Center<I, T>,
    scale: Lanes<I, T>,
    mean: Lanes<I, T>,
    along: Lanes<I, T>,
}

impl<I: Isa, T: Real> Back<I, T> {
    #[inline(always)]
    fn new(isa: I, stats: Stats, weight: f64, [along, sum]: [f64; 2], count: f64) -> Self {
        Self {
            center: Center::new(isa, stats.mean),
            scale: splat::<I, _>(isa, T::from_wide(stats.inv_std * weight)),
            mean: splat::<I, _>(isa, T::from_wide(sum / count)),
            along: splat::<I, _>(isa, T::from_wide(along / count * stats.inv_std)),
        }
    }

    #[inline(always)]
    fn of(self, x: Lanes<I, T>, dy: Lanes<I, T>) -> Lanes<I, T> {
        ((dy - self.mean) - self.center.distance(x) * self.along) * self.scale
    }
}
