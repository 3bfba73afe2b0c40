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

/// Elements of a channel whose gradients before the activation are kept from one pass to the next:
/// so many stay in the second-level cache beside those of the channel.
const KEPT: usize = 1 << 17;

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
    per_sample: bool,
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
                per_sample,
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
    per_sample: bool,
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
                    let mut normal =
                        ScaledNormal::<I, E::Acc>::new(isa, *stats, self.affine, channel);
                    let slices = run.samples.clone().zip(self.reader.slices(channel, &run));
                    // SAFETY: this job alone has the channel, and takes each of its runs once.
                    let parts = unsafe { parts(self.y, shape, channel, &run) };
                    for ((sample, x), y) in slices.zip(parts) {
                        if self.per_sample {
                            let param = param(shape, true, sample, channel);
                            normal = ScaledNormal::new(isa, *stats, self.affine, param);
                        }
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
pub(crate) struct Batch<'a, E: Elem> {
    pub(crate) dy: &'a [E],
    pub(crate) shape: Shape,
    pub(crate) affine: AffinePair<'a, E::Acc>,
    pub(crate) stats: &'a [Stats],
    pub(crate) activation: Option<Activation>,
    /// Each channel of each sample has a weight and a bias of its own.
    pub(crate) per_sample: bool,
}

impl<E: Elem> Clone for Batch<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E: Elem> Copy for Batch<'_, E> {}

/// The weight and bias of a channel of a sample.
#[inline(always)]
fn param(shape: Shape, per_sample: bool, sample: usize, channel: usize) -> usize {
    match per_sample {
        true => sample * shape.channels + channel,
        false => channel,
    }
}

impl<'a, E: Elem> Batch<'a, E> {
    #[inline(always)]
    fn param(self, sample: usize, channel: usize) -> usize {
        param(self.shape, self.per_sample, sample, channel)
    }

    /// Normalization, weight and bias of a channel of a sample.
    #[inline(always)]
    fn normal<I: Isa>(self, isa: I, sample: usize, channel: usize) -> ScaledNormal<I, E::Acc> {
        let param = self.param(sample, channel);
        ScaledNormal::new(isa, self.stats[channel], self.affine, param)
    }

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
                taken: 0,
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

/// [`backward`] where each channel of each sample has a weight and a bias of its own.
pub(crate) fn sampled_backward<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    batch: Batch<E>,
    wanted: Wanted,
) -> Gradients<E> {
    let (shape, samples) = (batch.shape, batch.shape.outer);
    let per_job = channels_per_job(shape, R::CHANNELS);
    // Channel by channel, each with its samples.
    let mut along = vec![0f64; shape.channels * samples];
    let mut sum = along.clone();
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in
    // every sample.
    let dx = unsafe {
        fill_interleaved(shape.elements(), |dx| {
            let size = per_job * samples;
            let sums = along.chunks_mut(size).zip(sum.chunks_mut(size));
            let jobs = sums.enumerate().map(|(job, (along, sum))| SampledBackward {
                job: ChannelJob {
                    batch,
                    reader: reader(),
                    first: job * per_job,
                    scratch: Scratch::new(),
                    g: Scratch::new(),
                    taken: 0,
                },
                dx,
                sums: [along, sum],
                wanted,
            });
            par::run(shape.elements(), jobs);
        })
    };
    let by_sample = |sums: &[f64]| -> Vec<f64> {
        let planes = (0..samples).flat_map(|n| (0..shape.channels).map(move |c| c * samples + n));
        planes.map(|i| sums[i]).collect()
    };
    Gradients {
        dx,
        dweight: by_sample(&along),
        dbias: by_sample(&sum),
    }
}

struct SampledBackward<'a, E: Elem, R> {
    job: ChannelJob<'a, E, R>,
    dx: Shared<'a, E>,
    /// Of each channel of the job, the sums of each sample.
    sums: [&'a mut [f64]; 2],
    wanted: Wanted,
}

impl<E: Elem, R: Reader<E>> Kernel for SampledBackward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        let batch = self.job.batch;
        let (shape, samples) = (batch.shape, batch.shape.outer);
        let count = shape.per_channel();
        for mine in together::<E, R>(self.sums[0].len() / samples) {
            self.job.start();
            if self.wanted.own.is_some() || self.wanted.params {
                for run in shape.runs() {
                    self.job.read(mine.clone(), &run);
                    for i in mine.clone() {
                        self.job.add_sampled(isa, i, &run, &mut self.sums);
                    }
                }
            }
            let mut means = [[0f64; 2]; MOST_CHANNELS];
            if let Some(center) = self.wanted.own {
                for (i, [along, mean]) in mine.clone().zip(&mut means) {
                    for sample in 0..samples {
                        let weight = self.job.weight(sample, i);
                        let at = i * samples + sample;
                        *along += self.sums[0][at] * weight / count;
                        if center {
                            *mean += self.sums[1][at] * weight / count;
                        }
                    }
                }
            }
            let own = self.wanted.own.is_some();
            for run in shape.runs() {
                self.job.read(mine.clone(), &run);
                for (i, means) in mine.clone().zip(means) {
                    self.job
                        .write_sampled(isa, i, &run, self.dx, own.then_some(means));
                }
            }
        }
    }
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
                    taken: 0,
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
    /// How many of the gradients a later pass has taken.
    taken: usize,
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
            self.job.start();
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
                if let Some(span) = self.through(isa, channel, &run, true) {
                    let g = self.g.get()[span].chunks_exact(run.part.len().max(1));
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
                if let Some(span) = self.through(isa, channel, &run, true) {
                    let g = self.g.get()[span].chunks_exact(run.part.len().max(1));
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

    /// The weight of channel `i` of a sample.
    #[inline(always)]
    fn weight(&self, sample: usize, i: usize) -> f64 {
        let param = self.batch.param(sample, self.first + i);
        self.batch.affine.weight.map_or(1., |w| w[param].to_f64())
    }

    /// Adds the sums of `dy · x̂` and of `dy` over a run of channel `i` to those of its samples.
    #[inline(always)]
    fn add_sampled<I: Isa>(&mut self, isa: I, i: usize, run: &Run, sums: &mut [&mut [f64]; 2]) {
        let (channel, shape) = (self.first + i, self.batch.shape);
        let stats = self.batch.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let span = self.through(isa, channel, run, false);
        let len = run.part.len();
        let xs = run.samples.clone().zip(self.reader.slices(channel, run));
        for (k, (sample, x)) in xs.enumerate() {
            let [along, sum] = match &span {
                Some(span) => {
                    let g = &self.g.get()[span.start + k * len..][..len];
                    sums_of_run(isa, center, std::iter::once((x, g)))
                }
                None => {
                    let dy = &self.batch.dy[shape.plane(sample, channel)][run.part.clone()];
                    sums_of_run(isa, center, std::iter::once((x, dy)))
                }
            };
            sums[0][i * shape.outer + sample] += stats.along::<E::Acc>([along, sum]);
            sums[1][i * shape.outer + sample] += sum;
        }
    }

    /// Writes `dx` of a run of channel `i`; without means, its statistics do not move with `x`.
    #[inline(always)]
    fn write_sampled<I: Isa>(
        &mut self,
        isa: I,
        i: usize,
        run: &Run,
        dx: Shared<E>,
        means: Option<[f64; 2]>,
    ) {
        let (channel, shape) = (self.first + i, self.batch.shape);
        let stats = self.batch.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let [along, mean] = means.unwrap_or_default();
        let number = |v: f64| splat::<I, _>(isa, E::Acc::from_f64(v));
        let grad = InputGrad {
            mean: number(mean),
            along: number(along * stats.inv_std),
            scale: number(stats.inv_std),
        };
        let span = self.through(isa, channel, run, true);
        let len = run.part.len();
        // SAFETY: this job alone has the channel, and takes each of its runs once.
        let parts = unsafe { parts(dx, shape, channel, run) };
        let xs = run.samples.clone().zip(self.reader.slices(channel, run));
        for (k, ((sample, x), dx)) in xs.zip(parts).enumerate() {
            let weight = self.weight(sample, i);
            let (factor, scale) = (number(weight), number(stats.inv_std * weight));
            let dy = &self.batch.dy[shape.plane(sample, channel)][run.part.clone()];
            match &span {
                Some(span) => {
                    let g = &self.g.get()[span.start + k * len..][..len];
                    write_part(
                        isa,
                        center,
                        grad,
                        means.is_some(),
                        [factor, scale],
                        (x, g, dx),
                    );
                }
                None => {
                    write_part(
                        isa,
                        center,
                        grad,
                        means.is_some(),
                        [factor, scale],
                        (x, dy, dx),
                    );
                }
            }
        }
    }

    /// Forgets the gradients of the channels before.
    #[inline(always)]
    fn start(&mut self) {
        self.g.clear();
        self.taken = 0;
    }

    /// Whether `dy · act′(u)` of a whole channel is kept from one pass to the next.
    #[inline(always)]
    fn keeps(&self) -> bool {
        R::CHANNELS == 1 && self.batch.shape.per_channel() <= KEPT as f64
    }

    /// Where `dy · act′(u)` of a run of a channel that was read is in `g`, if there is an
    /// activation; `again` in a pass after the first.
    #[inline(always)]
    fn through<I: Isa>(
        &mut self,
        isa: I,
        channel: usize,
        run: &Run,
        again: bool,
    ) -> Option<Range<usize>> {
        let activation = self.batch.activation?;
        let keeps = self.keeps();
        if keeps && again && self.taken + run.count() <= self.g.get().len() {
            let start = self.taken;
            self.taken += run.count();
            return Some(start..self.taken);
        }
        if !keeps {
            self.g.clear();
        }
        let start = self.g.get().len();
        let batch = self.batch;
        let dy = batch.shape.slices(batch.dy, channel, run);
        let pairs = self.reader.slices(channel, run).zip(dy);
        for (sample, (x, dy)) in run.samples.clone().zip(pairs) {
            let normal = batch.normal(isa, sample, channel);
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
        if again {
            self.taken = start + run.count();
        }
        Some(start..start + run.count())
    }

    /// Adds the sums of `dy · x̂` and of `dy` over a run of channel `i`.
    #[inline(always)]
    fn add_run<I: Isa>(&mut self, isa: I, i: usize, run: &Run, sums: &mut [&mut [f64]; 2]) {
        let channel = self.first + i;
        let stats = self.batch.stats[channel];
        let center = Center::<I, E::Acc>::new(isa, stats.mean);
        let [along, sum] = if let Some(span) = self.through(isa, channel, run, false) {
            let g = self.g.get()[span].chunks_exact(run.part.len().max(1));
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

/// Writes `dx` of a plane whose `dy` is multiplied by a factor of its own; where the statistics are
/// not the batch's `own`, it is `dy` times the scale.
#[inline(always)]
fn write_part<I: Isa, E: Elem, D: Elem<Acc = E::Acc>>(
    isa: I,
    center: Center<I, E::Acc>,
    grad: InputGrad<Lanes<I, E::Acc>>,
    own: bool,
    [factor, scale]: [Lanes<I, E::Acc>; 2],
    (x, dy, dx): (&[E], &[D], &mut [MaybeUninit<E>]),
) {
    match own {
        true => map2(
            isa,
            x,
            dy,
            dx,
            #[inline(always)]
            |_, x, dy| grad.of(center.distance(x), dy * factor),
        ),
        false => map(
            isa,
            dy,
            dx,
            #[inline(always)]
            |_, dy| dy * scale,
        ),
    };
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
