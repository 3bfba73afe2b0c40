//! Batch norm of `[outer, channels, inner]`, where a channel is a plane of `inner` elements in each
//! sample.
//!
//! A channel is taken from its first sample to its last, by a thread that then still has it in
//! cache for the next pass. A [`Reader`] finds its elements.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::affine::{AffinePair, ScaledNormal};
use super::buffer::fill_interleaved;
use super::grads::{Gradients, InputGrad, Wanted};
use super::loops::{map, map2, run_sums2};
use super::moments::{Center, Moments};
use super::par;
use super::readers::{MOST_CHANNELS, Reader};
use super::shape::{Run, Shape};
use super::shared::Shared;
use super::simd::{Elem, Isa, Kernel, Real, splat};
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
                stats,
            });
            par::run(shape.elements(), jobs);
        })
    };
    (y, stats)
}

struct PlanesForward<'a, E: Elem, R> {
    reader: R,
    y: Shared<'a, E>,
    shape: Shape,
    first: usize,
    affine: AffinePair<'a, E::Acc>,
    statistics: Statistics<'a>,
    stats: &'a mut [Stats],
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesForward<'_, E, R> {
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
                    let normal = ScaledNormal::<I, E::Acc>::new(isa, *stats, self.affine, channel);
                    let slices = self.reader.slices(channel, &run);
                    // SAFETY: this job alone has the channel, and takes each of its runs once.
                    let parts = unsafe { parts(self.y, shape, channel, &run) };
                    for (x, y) in slices.zip(parts) {
                        map(
                            isa,
                            x,
                            y,
                            #[inline(always)]
                            |_, x| normal.of(x),
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

/// The batch that a backward goes through.
#[derive(Clone, Copy)]
pub(crate) struct Batch<'a, E: Elem> {
    pub(crate) dy: &'a [E],
    pub(crate) shape: Shape,
    pub(crate) weight: Option<&'a [E::Acc]>,
    pub(crate) stats: &'a [Stats],
    pub(crate) wanted: Wanted,
}

/// The gradients of what `reader` gives, with the channels of `dx` first, and of weight and bias.
pub(crate) fn backward<E: Elem, R: Reader<E> + Send>(
    reader: impl Fn() -> R,
    batch: Batch<E>,
) -> Gradients<E> {
    let shape = batch.shape;
    let per_job = channels_per_job(shape, R::CHANNELS);
    let mut dweight = vec![0f64; shape.channels];
    let mut dbias = vec![0f64; shape.channels];
    // SAFETY: the jobs cover all channels, and a job writes the plane of each of its channels in
    // every sample.
    let dx = unsafe {
        fill_interleaved(shape.elements(), |dx| {
            let sums = dweight.chunks_mut(per_job).zip(dbias.chunks_mut(per_job));
            let jobs = sums
                .enumerate()
                .map(|(job, (dweight, dbias))| PlanesBackward {
                    batch,
                    reader: reader(),
                    dx,
                    first: job * per_job,
                    dweight,
                    dbias,
                });
            par::run(shape.elements(), jobs);
        })
    };
    Gradients { dx, dweight, dbias }
}

impl<E: Elem> Batch<'_, E> {
    #[inline(always)]
    fn weight_of(&self, channel: usize) -> f64 {
        self.weight.map_or(1., |w| w[channel].to_f64())
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

struct PlanesBackward<'a, E: Elem, R> {
    batch: Batch<'a, E>,
    reader: R,
    dx: Shared<'a, E>,
    first: usize,
    dweight: &'a mut [f64],
    dbias: &'a mut [f64],
}

impl<E: Elem, R: Reader<E>> Kernel for PlanesBackward<'_, E, R> {
    type Output = ();

    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        for i in (0..self.dweight.len()).step_by(R::CHANNELS) {
            let mine = i..(i + R::CHANNELS).min(self.dweight.len());
            match self.batch.wanted {
                Wanted {
                    own: Some(center), ..
                } => self.through_own(isa, mine, center),
                Wanted { own: None, params } => self.through_given(isa, mine, params),
            }
        }
    }
}

impl<E: Elem, R: Reader<E>> PlanesBackward<'_, E, R> {
    /// The channels `mine` of this job, whose statistics move with `x`: first the sums, then the
    /// gradient.
    #[inline(always)]
    fn through_own<I: Isa>(&mut self, isa: I, mine: Range<usize>, centered: bool) {
        let shape = self.batch.shape;
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
                let stats = self.batch.stats[channel];
                let center = Center::<I, E::Acc>::new(isa, stats.mean);
                let count = shape.per_channel();
                let mean = if centered { self.dbias[i] / count } else { 0. };
                let along = self.dweight[i] / count * stats.inv_std;
                let scale = stats.inv_std * self.batch.weight_of(channel);
                let grad = InputGrad {
                    mean: splat::<I, _>(isa, E::Acc::from_f64(mean)),
                    along: splat::<I, _>(isa, E::Acc::from_f64(along)),
                    scale: splat::<I, _>(isa, E::Acc::from_f64(scale)),
                };
                let pairs = self.reader.slices(channel, &run);
                let pairs = pairs.zip(shape.slices(self.batch.dy, channel, &run));
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(self.dx, shape, channel, &run) };
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
        }
    }

    /// The channels `mine` of this job, whose statistics stay: all in one sweep.
    #[inline(always)]
    fn through_given<I: Isa>(&mut self, isa: I, mine: Range<usize>, params: bool) {
        let shape = self.batch.shape;
        for run in shape.runs() {
            if params {
                self.read(mine.clone(), &run);
            }
            for i in mine.clone() {
                if params {
                    self.add_sums(isa, i, &run);
                }
                let channel = self.first + i;
                let scale = self.batch.stats[channel].inv_std * self.batch.weight_of(channel);
                let scale = splat::<I, _>(isa, E::Acc::from_f64(scale));
                // SAFETY: this job alone has the channel, and takes each of its runs once.
                let parts = unsafe { parts(self.dx, shape, channel, &run) };
                for (dy, dx) in shape.slices(self.batch.dy, channel, &run).zip(parts) {
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
        let [along, sum] = self.batch.sums(isa, &self.reader, self.first + i, run);
        self.dweight[i] += along;
        self.dbias[i] += sum;
    }
}
