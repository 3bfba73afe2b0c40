//! Batch norm of `[outer, channels, inner]`, where a channel is a plane of `inner` elements in each
//! sample.
//!
//! A channel is taken from its first sample to its last, by a thread that then still has it in
//! cache for the next pass. A [`Reader`] finds its elements.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::activation::{Activation, activate, through};
use super::affine::{AffinePair, ScaledNormal};
use super::buffer::{Scratch, fill_interleaved};
use super::grads::{Gradients, InputGrad, Wanted};
use super::loops::{map, map2, run_sums2};
use super::moments::{Center, Moments};
use super::par;
use super::readers::{MOST_CHANNELS, Reader};
use super::shape::{Run, Shape};
use super::shared::Shared;
use super::simd::{Elem, Isa, Kernel, Lanes, Real, splat};
use super::stats::{Statistics, Stats};

/// How many neighboring channels a job takes, of which a reader takes so many together.
fn channels_per_job(shape: Shape, together: usize) -> usize {
    par::items_per_block(shape.channels, shape.outer * shape.inner).next_multiple_of(together)
}

/// `y`, with its channels first, and what each channel was normalized by.
pub(crate) fn forward<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    shape: Shape,
    affine: AffinePair<E::Acc>,
    statistics: Statistics,
    activation: Option<Activation>,
) -> (Vec<E>, Vec<Stats>) {
    let per_job = channels_per_job(shape, R::CHANNELS);
    let mut stats = vec![Stats::NONE; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in
    // every sample.
    let y = unsafe {
        fill_interleaved(shape.elements(), |y| {
            let jobs = stats.chunks_mut(per_job).enumerate();
            let jobs = jobs.map(|(job, stats)| PlanesForward {
                reader: reader(),
                y,
                shape,
                first: job * per_job,
                affine,
                statistics,
                activation,
                stats,
            });
            par::run(shape.elements(), jobs);
        })
    };
    (y, stats)
}

/// The moments of each channel; about zero where they are not `center`ed.
pub(crate) fn moments<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    shape: Shape,
    center: bool,
) -> Vec<Moments> {
    let per_job = channels_per_job(shape, R::CHANNELS);
    let mut moments = vec![Moments::default(); shape.channels];
    let jobs = moments.chunks_mut(per_job).enumerate();
    let jobs = jobs.map(|(job, moments)| PlanesMoments {
        reader: reader(),
        shape,
        first: job * per_job,
        center,
        moments,
        elements: PhantomData,
    });
    par::run(shape.elements(), jobs);
    moments
}

struct PlanesMoments<'a, E, R> {
    reader: R,
    shape: Shape,
    first: usize,
    center: bool,
    moments: &'a mut [Moments],
    elements: PhantomData<E>,
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesMoments<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for (i, moments) in self.moments.chunks_mut(R::CHANNELS).enumerate() {
            let first = self.first + i * R::CHANNELS;
            let channels = first..first + moments.len();
            let all = few_moments(isa, &mut self.reader, self.shape, channels, self.center);
            moments.copy_from_slice(&all[..moments.len()]);
        }
    }
}

struct PlanesForward<'a, E: Elem, R> {
    reader: R,
    y: Shared<'a, E>,
    shape: Shape,
    first: usize,
    affine: AffinePair<'a, E::Acc>,
    statistics: Statistics<'a>,
    activation: Option<Activation>,
    stats: &'a mut [Stats],
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesForward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let shape = self.shape;
        let mut scratch = Scratch::new();
        for (i, stats) in self.stats.chunks_mut(R::CHANNELS).enumerate() {
            let first = self.first + i * R::CHANNELS;
            let channels = first..first + stats.len();
            match self.statistics {
                Statistics::Given(given) => stats.copy_from_slice(&given[channels.clone()]),
                Statistics::Own { center, eps } => {
                    let reader = &mut self.reader;
                    let moments = few_moments(isa, reader, shape, channels.clone(), center);
                    for (stats, moments) in stats.iter_mut().zip(moments) {
                        *stats = Stats::new(moments.mean, moments.var(), eps);
                    }
                }
            }
            for run in shape.runs() {
                self.reader.read(channels.clone(), &run);
                for (channel, stats) in channels.clone().zip(&*stats) {
                    let normal = ScaledNormal::<I, E::Acc>::new(isa, *stats, self.affine, channel);
                    let slices = self.reader.slices(channel, &run);
                    // SAFETY: this job alone has the channel, and takes each of its runs once.
                    let parts = unsafe { parts(self.y, shape, channel, &run) };
                    for (x, y) in slices.zip(parts) {
                        match self.activation {
                            None => normal.write(isa, x, y),
                            Some(activation) => activate(
                                isa,
                                activation,
                                &mut scratch,
                                y,
                                #[inline(always)]
                                |u| normal.write(isa, x, u),
                            ),
                        };
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
fn few_moments<E: Elem, I: Isa>(
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

/// The batch that a backward goes through.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a, E: Elem> {
    pub(crate) dy: &'a [E],
    pub(crate) shape: Shape,
    pub(crate) affine: AffinePair<'a, E::Acc>,
    pub(crate) stats: &'a [Stats],
    pub(crate) activation: Option<Activation>,
}

impl<'a, E: Elem> Batch<'a, E> {
    /// One job for every few channels, with their parts of both sums.
    fn jobs<R: Reader<E>>(
        self,
        reader: impl Fn() -> R,
        [along, sum]: [&'a mut [f64]; 2],
    ) -> impl Iterator<Item = (ChannelJob<'a, E, R>, [&'a mut [f64]; 2])> {
        let per_job = channels_per_job(self.shape, R::CHANNELS);
        let sums = along.chunks_mut(per_job).zip(sum.chunks_mut(per_job));
        sums.enumerate().map(move |(job, (along, sum))| {
            let job = ChannelJob {
                batch: self,
                reader: reader(),
                first: job * per_job,
                scratch: Scratch::new(),
                g: Scratch::new(),
            };
            (job, [along, sum])
        })
    }
}

/// The gradients of what `reader` gives, with the channels of `dx` first, and of weight and bias.
pub(crate) fn backward<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    batch: Batch<E>,
    wanted: Wanted,
) -> Gradients<E> {
    let shape = batch.shape;
    let mut dweight = vec![0f64; shape.channels];
    let mut dbias = vec![0f64; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in
    // every sample.
    let dx = unsafe {
        fill_interleaved(shape.elements(), |dx| {
            let jobs = batch.jobs(reader, [&mut dweight, &mut dbias]);
            let jobs = jobs.map(|(job, sums)| PlanesBackward {
                job,
                dx,
                sums,
                wanted,
            });
            par::run(shape.elements(), jobs);
        })
    };
    Gradients { dx, dweight, dbias }
}

/// The sums of `dy · x̂` and of `dy` of each channel.
pub(crate) fn grad_sums<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    batch: Batch<E>,
) -> [Vec<f64>; 2] {
    let channels = batch.shape.channels;
    let (mut along, mut sum) = (vec![0f64; channels], vec![0f64; channels]);
    let jobs = batch.jobs(reader, [&mut along, &mut sum]);
    let jobs = jobs.map(|(job, sums)| PlanesGradSums { job, sums });
    par::run(batch.shape.elements(), jobs);
    [along, sum]
}

/// `dx`, with its channels first, from the means of `dy · x̂` and of `dy` of each channel.
pub(crate) fn grad_input<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    batch: Batch<E>,
    means: &[[f64; 2]],
) -> Vec<E> {
    let shape = batch.shape;
    let per_job = channels_per_job(shape, R::CHANNELS);
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in
    // every sample.
    unsafe {
        fill_interleaved(shape.elements(), |dx| {
            let jobs = means.chunks(per_job).enumerate();
            let jobs = jobs.map(|(job, means)| PlanesInputGrad {
                job: ChannelJob {
                    batch,
                    reader: reader(),
                    first: job * per_job,
                    scratch: Scratch::new(),
                    g: Scratch::new(),
                },
                dx,
                means,
            });
            par::run(shape.elements(), jobs);
        })
    }
}

/// Some neighboring channels of a batch on their way backward.
struct ChannelJob<'a, E: Elem, R> {
    batch: Batch<'a, E>,
    reader: R,
    /// The first of them.
    first: usize,
    /// Values before the activation.
    scratch: Scratch<E::Acc>,
    /// The gradients of these.
    g: Scratch<E::Acc>,
}

/// The channels of a job that a reader with `R::CHANNELS` takes together, counted from its first.
#[inline(always)]
fn together<E: 'static, R: Reader<E>>(channels: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..channels).step_by(R::CHANNELS);
    starts.map(
        #[inline(always)]
        move |i| i..(i + R::CHANNELS).min(channels),
    )
}

struct PlanesBackward<'a, E: Elem, R> {
    job: ChannelJob<'a, E, R>,
    dx: Shared<'a, E>,
    sums: [&'a mut [f64]; 2],
    wanted: Wanted,
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesBackward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let count = self.job.batch.shape.per_channel();
        for mine in together::<E, R>(self.sums[0].len()) {
            match self.wanted {
                Wanted {
                    own: Some(center), ..
                } => {
                    self.job.add_sums(isa, mine.clone(), &mut self.sums);
                    let [along, sum] = &self.sums;
                    self.job.write_input_grad(
                        isa,
                        mine,
                        self.dx,
                        #[inline(always)]
                        |i| [along[i] / count, if center { sum[i] / count } else { 0. }],
                    );
                }
                Wanted { own: None, params } => {
                    let sums = params.then_some(&mut self.sums);
                    self.job.through_given(isa, mine, self.dx, sums);
                }
            }
        }
    }
}

struct PlanesGradSums<'a, E: Elem, R> {
    job: ChannelJob<'a, E, R>,
    sums: [&'a mut [f64]; 2],
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesGradSums<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for mine in together::<E, R>(self.sums[0].len()) {
            self.job.add_sums(isa, mine, &mut self.sums);
        }
    }
}

struct PlanesInputGrad<'a, E: Elem, R> {
    job: ChannelJob<'a, E, R>,
    dx: Shared<'a, E>,
    means: &'a [[f64; 2]],
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesInputGrad<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for mine in together::<E, R>(self.means.len()) {
            self.job.write_input_grad(
                isa,
                mine,
                self.dx,
                #[inline(always)]
                |i| self.means[i],
            );
        }
    }
}

impl<E: Elem, R: Reader<E>> ChannelJob<'_, E, R> {
    /// Adds the sums of `dy · x̂` and of `dy` of the channels `mine` to those of the job.
    #[inline(always)]
    fn add_sums<I: Isa>(&mut self, isa: I, mine: Range<usize>, sums: &mut [&mut [f64]; 2]) {
        for run in self.batch.shape.runs() {
            self.read(mine.clone(), &run);
            for i in mine.clone() {
                self.add_run(isa, i, &run, sums);
            }
        }
    }

    /// Writes `dx` of the channels `mine` from the means of `dy · x̂` and of `dy` of each.
    #[inline(always)]
    fn write_input_grad<I: Isa>(
        &mut self,
        isa: I,
        mine: Range<usize>,
        dx: Shared<E>,
        means: impl Fn(usize) -> [f64; 2],
    ) {
        let shape = self.batch.shape;
        for run in shape.runs() {
            self.read(mine.clone(), &run);
            for i in mine.clone() {
                let channel = self.first + i;
                let stats = self.batch.stats[channel];
                let center = Center::<I, E::Acc>::new(isa, stats.mean);
                let [along, mean] = means(i);
                let grad = InputGrad {
                    mean: splat::<I, _>(isa, E::Acc::from_f64(mean)),
                    along: splat::<I, _>(isa, E::Acc::from_f64(along * stats.inv_std)),
                    scale: splat::<I, _>(isa, E::Acc::from_f64(self.scale(channel))),
                };
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(dx, shape, channel, &run) };
                if self.has_through(isa, channel, &run) {
                    let g = self.g.get().chunks_exact(run.part.len().max(1));
                    let pairs = self.reader.slices(channel, &run).zip(g);
                    write_each(isa, center, grad, pairs, parts);
                } else {
                    let dy = shape.slices(self.batch.dy, channel, &run);
                    let pairs = self.reader.slices(channel, &run).zip(dy);
                    write_each(isa, center, grad, pairs, parts);
                }
            }
        }
    }

    /// Writes `dx` of the channels `mine`, whose statistics do not move with `x`, and adds their
    /// sums in the same sweep.
    #[inline(always)]
    fn through_given<I: Isa>(
        &mut self,
        isa: I,
        mine: Range<usize>,
        dx: Shared<E>,
        mut sums: Option<&mut [&mut [f64]; 2]>,
    ) {
        let shape = self.batch.shape;
        for run in shape.runs() {
            if sums.is_some() || self.batch.activation.is_some() {
                self.read(mine.clone(), &run);
            }
            for i in mine.clone() {
                if let Some(sums) = &mut sums {
                    self.add_run(isa, i, &run, sums);
                }
                let channel = self.first + i;
                let scale = splat::<I, _>(isa, E::Acc::from_f64(self.scale(channel)));
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(dx, shape, channel, &run) };
                if self.has_through(isa, channel, &run) {
                    let g = self.g.get().chunks_exact(run.part.len().max(1));
                    scale_each(isa, scale, g, parts);
                } else {
                    scale_each(
                        isa,
                        scale,
                        shape.slices(self.batch.dy, channel, &run),
                        parts,
                    );
                }
            }
        }
    }

    /// Factor of `dy` of a channel.
    #[inline(always)]
    fn scale(&self, channel: usize) -> f64 {
        let weight = self.batch.affine.weight;
        let weight = weight.map_or(1., |w| w[channel].to_f64());
        self.batch.stats[channel].inv_std * weight
    }

    #[inline(always)]
    fn read(&mut self, mine: Range<usize>, run: &Run) {
        let channels = self.first + mine.start..self.first + mine.end;
        self.reader.read(channels, run);
    }

    /// Puts `dy · act′(u)` of a run of a channel that was read into `g`, if there is an activation.
    #[inline(always)]
    fn has_through<I: Isa>(&mut self, isa: I, channel: usize, run: &Run) -> bool {
        let Some(activation) = self.batch.activation else {
            return false;
        };
        let (stats, affine) = (self.batch.stats[channel], self.batch.affine);
        let normal = ScaledNormal::<I, E::Acc>::new(isa, stats, affine, channel);
        let dy = self.batch.shape.slices(self.batch.dy, channel, run);
        self.g.clear();
        for (x, dy) in self.reader.slices(channel, run).zip(dy) {
            through(
                isa,
                activation,
                dy,
                &mut self.scratch,
                &mut self.g,
                #[inline(always)]
                |u| normal.write(isa, x, u),
            );
        }
        true
    }

    /// Adds the sums of `dy · x̂` and of `dy` over a run of channel `i`.
    #[inline(always)]
    fn add_run<I: Isa>(&mut self, isa: I, i: usize, run: &Run, sums: &mut [&mut [f64]; 2]) {
        let channel = self.first + i;
        let stats = self.batch.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let [along, sum] = if self.has_through(isa, channel, run) {
            let g = self.g.get().chunks_exact(run.part.len().max(1));
            sums_of_run(isa, center, self.reader.slices(channel, run).zip(g))
        } else {
            let dy = self.batch.shape.slices(self.batch.dy, channel, run);
            sums_of_run(isa, center, self.reader.slices(channel, run).zip(dy))
        };
        sums[0][i] += stats.along::<E::Acc>([along, sum]);
        sums[1][i] += sum;
    }
}

/// The sums of `dy · (x − high)` and of `dy` over a run.
#[inline(always)]
fn sums_of_run<'a, I: Isa, E: Elem, D: Elem<Acc = E::Acc>>(
    isa: I,
    center: Center<I, E::Acc>,
    pairs: impl Iterator<Item = (&'a [E], &'a [D])>,
) -> [f64; 2] {
    run_sums2(
        isa,
        pairs,
        0,
        #[inline(always)]
        |_, x, dy| [dy * center.distance_from_high(x), dy],
    )
}

/// Writes `dx` of a run, part by part.
#[inline(always)]
fn write_each<'a, 'o, I: Isa, E: Elem, D: Elem<Acc = E::Acc>>(
    isa: I,
    center: Center<I, E::Acc>,
    grad: InputGrad<Lanes<I, E::Acc>>,
    pairs: impl Iterator<Item = (&'a [E], &'a [D])>,
    parts: impl Iterator<Item = &'o mut [MaybeUninit<E>]>,
) {
    for ((x, dy), dx) in pairs.zip(parts) {
        map2(
            isa,
            x,
            dy,
            dx,
            #[inline(always)]
            |_, x, dy| grad.of(center.distance(x), dy),
        );
    }
}

/// Writes `dy` times a factor, part by part.
#[inline(always)]
fn scale_each<'a, 'o, I: Isa, E: Elem, D: Elem<Acc = E::Acc>>(
    isa: I,
    scale: Lanes<I, E::Acc>,
    dys: impl Iterator<Item = &'a [D]>,
    parts: impl Iterator<Item = &'o mut [MaybeUninit<E>]>,
) {
    for (dy, dx) in dys.zip(parts) {
        map(
            isa,
            dy,
            dx,
            #[inline(always)]
            |_, dy| dy * scale,
        );
    }
}
