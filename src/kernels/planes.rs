//! Batch norm of `[outer, channels, inner]`, where a channel is a plane of `inner` elements in each sample.
//!
//! A channel is taken from its first sample to its last, by a thread that then still has it in cache for the next pass. What the channels are
//! read from, [`readers`](super::readers) know. Planes too short for lanes go through [`columns`](super::columns).

use std::mem::MaybeUninit;
use std::ops::Range;

use super::buffer::filled;
use super::columns;
use super::moments::{Center, Moments};
use super::par;
use super::readers::{InPlace, MOST_CHANNELS, Reader, Run, Turned};
use super::rows::{Affine, Gradients, Stats};
use super::shared::Shared;
use super::simd::{Elem, Isa, Kernel, LANES, Lanes, Level, Real, splat, zero};
use super::span::{map, map2, run_sums2};

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
    pub(crate) fn plane(self, sample: usize, channel: usize) -> Range<usize> {
        let start = (sample * self.channels + channel) * self.inner;
        start..start + self.inner
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

/// How the elements of a batch lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// `[outer, channels, inner]`.
    ChannelsFirst,
    /// `[outer, inner, channels]`; for [planes](Shape::has_planes) only.
    ChannelsLast,
}

impl Shape {
    /// Whether a channel has as many neighbors in memory as there are lanes.
    pub(crate) fn has_planes(self) -> bool {
        self.inner >= LANES
    }

    /// How many neighboring channels a job takes, of which a reader takes so many together.
    fn channels_per_job(self, together: usize) -> usize {
        par::items_per_block(self.channels, self.outer * self.inner).next_multiple_of(together)
    }
}

/// The result has its channels first, whatever the order of `x`.
pub(crate) fn forward<E: Elem>(
    x: &[E],
    order: Order,
    shape: Shape,
    affine: Affine<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    assert_eq!(x.len(), shape.elements());
    assert!(affine.fits(shape.channels));
    assert!(order == Order::ChannelsFirst || shape.has_planes());
    match order {
        Order::ChannelsLast => forward_from(|| Turned::new(x, shape), shape, affine, statistics),
        Order::ChannelsFirst if shape.has_planes() => {
            forward_from(|| InPlace { x, shape }, shape, affine, statistics)
        }
        Order::ChannelsFirst => columns::forward(x, shape, affine, statistics),
    }
}

fn forward_from<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    shape: Shape,
    affine: Affine<E::Acc>,
    statistics: Statistics,
) -> (Vec<E>, Vec<Stats>)
where
    E::Acc: Elem<Acc = E::Acc>,
{
    let level = Level::current();
    let per_job = shape.channels_per_job(R::CHANNELS);
    let mut stats = vec![Stats::NONE; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in every sample.
    let y = unsafe {
        filled(shape.elements(), |y| {
            let y = Shared::new(y);
            let jobs = stats
                .chunks_mut(per_job)
                .enumerate()
                .map(|(job, stats)| Forward {
                    reader: reader(),
                    y,
                    shape,
                    first: job * per_job,
                    affine,
                    statistics,
                    stats,
                })
                .collect();
            par::run(jobs, shape.elements(), |job| level.run(job));
        })
    };
    (y, stats)
}

struct Forward<'a, E: Elem, R> {
    reader: R,
    y: Shared<'a, E>,
    shape: Shape,
    first: usize,
    affine: Affine<'a, E::Acc>,
    statistics: Statistics<'a>,
    stats: &'a mut [Stats],
}

impl<E: Elem, R: Reader<E>> Kernel for Forward<'_, E, R>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let shape = self.shape;
        for (i, stats) in self.stats.chunks_mut(R::CHANNELS).enumerate() {
            let first = self.first + i * R::CHANNELS;
            let channels = first..first + stats.len();
            match self.statistics {
                Statistics::Given(given) => stats.copy_from_slice(&given[channels.clone()]),
                Statistics::Own { center, eps } => {
                    let reader = &mut self.reader;
                    let moments = moments(isa, reader, shape, channels.clone(), center);
                    for (stats, moments) in stats.iter_mut().zip(moments) {
                        *stats = Stats::new(moments.mean, moments.var(), eps);
                    }
                }
            }
            for run in shape.runs() {
                self.reader.read(channels.clone(), &run);
                for (channel, stats) in channels.clone().zip(&*stats) {
                    let normal = Affined::<I, E::Acc>::new(isa, *stats, self.affine, channel);
                    let slices = self.reader.slices(channel, &run);
                    // SAFETY: this job alone has the channel, and takes each of its runs once.
                    let parts = unsafe { parts(self.y, shape, channel, &run) };
                    for (x, y) in slices.zip(parts) {
                        map(
                            isa,
                            x,
                            y,
                            #[inline(always)]
                            |_, v| normal.of(v),
                        );
                    }
                }
            }
        }
    }
}

/// The parts of a buffer of planes that a run covers.
///
/// # Safety
/// No other part that overlaps them may be in use.
#[inline(always)]
unsafe fn parts<'a, E>(
    buffer: Shared<'a, E>,
    shape: Shape,
    channel: usize,
    run: &Run,
) -> impl Iterator<Item = &'a mut [MaybeUninit<E>]> {
    let part = run.part.clone();
    run.samples.clone().map(
        #[inline(always)]
        move |sample| {
            let start = shape.plane(sample, channel).start;
            // SAFETY: as the caller promises; the planes of different samples do not overlap.
            unsafe { buffer.part(start + part.start..start + part.end) }
        },
    )
}

/// The moments of each of a few channels; about zero where they are not centered.
#[inline(always)]
fn moments<E: Elem, I: Isa>(
    isa: I,
    reader: &mut impl Reader<E>,
    shape: Shape,
    channels: Range<usize>,
    center: bool,
) -> [Moments; MOST_CHANNELS] {
    let mut all = [Moments::default(); MOST_CHANNELS];
    for run in shape.runs() {
        reader.read(channels.clone(), &run);
        for (channel, all) in channels.clone().zip(&mut all) {
            let slices = || reader.slices(channel, &run);
            let moments = match center {
                true => Moments::of_run(isa, run.count(), slices),
                false => Moments::about_zero(isa, run.count(), slices()),
            };
            *all = all.merge(moments);
        }
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

/// What flows back into `x`, whatever its order, from `dy`: both gradients have their channels first.
pub(crate) fn backward<E: Elem>(
    (x, order): (&[E], Order),
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
    assert!(order == Order::ChannelsFirst || shape.has_planes());
    let back = Channels {
        dy,
        shape,
        weight,
        stats,
        wanted,
    };
    match order {
        Order::ChannelsLast => back.run(|| Turned::new(x, shape)),
        Order::ChannelsFirst if shape.has_planes() => back.run(|| InPlace { x, shape }),
        Order::ChannelsFirst => columns::backward(x, dy, shape, weight, stats, wanted),
    }
}

/// What all jobs of a backward share.
#[derive(Clone, Copy)]
struct Channels<'a, E: Elem> {
    dy: &'a [E],
    shape: Shape,
    weight: Option<&'a [E::Acc]>,
    stats: &'a [Stats],
    wanted: Wanted,
}

impl<E: Elem> Channels<'_, E>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    fn run<R: Reader<E> + Send>(self, reader: impl Fn() -> R) -> Gradients<E> {
        let shape = self.shape;
        let level = Level::current();
        let per_job = shape.channels_per_job(R::CHANNELS);
        let mut dweight = vec![0f64; shape.channels];
        let mut dbias = vec![0f64; shape.channels];
        // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in every sample.
        let dx = unsafe {
            filled(shape.elements(), |dx| {
                let dx = Shared::new(dx);
                let jobs = dweight
                    .chunks_mut(per_job)
                    .zip(dbias.chunks_mut(per_job))
                    .enumerate()
                    .map(|(job, (dweight, dbias))| Backward {
                        all: self,
                        reader: reader(),
                        dx,
                        first: job * per_job,
                        dweight,
                        dbias,
                    })
                    .collect();
                par::run(jobs, shape.elements(), |job| level.run(job));
            })
        };
        Gradients { dx, dweight, dbias }
    }

    #[inline(always)]
    fn weight_of(&self, channel: usize) -> f64 {
        self.weight.map_or(1., |w| w[channel].wide())
    }

    /// The sums of `dy · x̂` and of `dy` over a run.
    #[inline(always)]
    fn sums<I: Isa>(&self, isa: I, reader: &impl Reader<E>, channel: usize, run: &Run) -> [f64; 2] {
        let stats = self.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let dy = self.shape.slices(self.dy, channel, run);
        let [along, sum] = run_sums2(
            isa,
            reader.slices(channel, run).zip(dy),
            0,
            #[inline(always)]
            |_, x, dy| [dy * center.distance_from_high(x), dy],
        );
        [stats.along::<E::Acc>([along, sum]), sum]
    }
}

struct Backward<'a, E: Elem, R> {
    all: Channels<'a, E>,
    reader: R,
    dx: Shared<'a, E>,
    first: usize,
    dweight: &'a mut [f64],
    dbias: &'a mut [f64],
}

impl<E: Elem, R: Reader<E>> Kernel for Backward<'_, E, R>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for i in (0..self.dweight.len()).step_by(R::CHANNELS) {
            let mine = i..(i + R::CHANNELS).min(self.dweight.len());
            match self.all.wanted {
                Wanted {
                    own: Some(center), ..
                } => self.through_own(isa, mine, center),
                Wanted { own: None, params } => self.through_given(isa, mine, params),
            }
        }
    }
}

impl<E: Elem, R: Reader<E>> Backward<'_, E, R>
where
    E::Acc: Elem<Acc = E::Acc>,
{
    /// The channels `mine` of this job, whose statistics move with `x`: first the sums, then the gradient.
    #[inline(always)]
    fn through_own<I: Isa>(&mut self, isa: I, mine: Range<usize>, centered: bool) {
        let shape = self.all.shape;
        for run in shape.runs() {
            self.read(mine.clone(), &run);
            for i in mine.clone() {
                self.add_sums(isa, i, &run);
            }
        }
        for run in shape.runs() {
            self.read(mine.clone(), &run);
            for i in mine.clone() {
                let channel = self.first + i;
                let back = Back::<I, E::Acc>::new(
                    isa,
                    self.all.stats[channel],
                    self.all.weight_of(channel),
                    [self.dweight[i], if centered { self.dbias[i] } else { 0. }],
                    shape.per_channel(),
                );
                let pairs = self.reader.slices(channel, &run);
                let pairs = pairs.zip(shape.slices(self.all.dy, channel, &run));
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(self.dx, shape, channel, &run) };
                for ((x, dy), dx) in pairs.zip(parts) {
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
        }
    }

    /// The channels `mine` of this job, whose statistics stay: all in one sweep.
    #[inline(always)]
    fn through_given<I: Isa>(&mut self, isa: I, mine: Range<usize>, params: bool) {
        let shape = self.all.shape;
        for run in shape.runs() {
            if params {
                self.read(mine.clone(), &run);
            }
            for i in mine.clone() {
                if params {
                    self.add_sums(isa, i, &run);
                }
                let channel = self.first + i;
                let scale = self.all.stats[channel].inv_std * self.all.weight_of(channel);
                let scale = splat::<I, _>(isa, E::Acc::from_wide(scale));
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(self.dx, shape, channel, &run) };
                for (dy, dx) in shape.slices(self.all.dy, channel, &run).zip(parts) {
                    map(
                        isa,
                        dy,
                        dx,
                        #[inline(always)]
                        |_, dy| dy * scale,
                    );
                }
            }
        }
    }

    #[inline(always)]
    fn read(&mut self, mine: Range<usize>, run: &Run) {
        let channels = self.first + mine.start..self.first + mine.end;
        self.reader.read(channels, run);
    }

    #[inline(always)]
    fn add_sums<I: Isa>(&mut self, isa: I, i: usize, run: &Run) {
        let [along, sum] = self.all.sums(isa, &self.reader, self.first + i, run);
        self.dweight[i] += along;
        self.dbias[i] += sum;
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
