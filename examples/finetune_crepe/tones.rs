//! Tones that miss their lowest harmonics, in noise.

use std::f32::consts::TAU;

use candle_core::{D, Device, ModuleT, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::StandardNormal;

use crate::network::BINS;

/// Samples of a frame, and a second of them.
const FRAME: usize = 1024;
const SAMPLE_RATE: f32 = 16_000.;

/// Frames `[N, 1024]` and their pitches in cents above 10 Hz.
pub(crate) struct Tones {
    pub(crate) frames: Tensor,
    cents: Vec<f32>,
}

impl Tones {
    /// Harmonics 3 to 8 of frequencies from 80 to 600 Hz, in noise of the same power.
    pub(crate) fn draw(count: usize, rng: &mut StdRng) -> Result<Self> {
        let (mut frames, mut cents) = (vec![], vec![]);
        for _ in 0..count {
            let frequency = 80. * 7.5f32.powf(rng.random());
            let phases: [f32; 6] = rng.random();
            frames.extend((0..FRAME).map(|i| {
                let turns =
                    |k: usize| (k + 3) as f32 * frequency * i as f32 / SAMPLE_RATE + phases[k];
                let tone: f32 = (0..6).map(|k| (turns(k) * TAU).sin()).sum();
                tone / 3f32.sqrt() + rng.sample::<f32, _>(StandardNormal)
            }));
            cents.push(1200. * (frequency / 10.).log2());
        }
        let frames = Tensor::from_vec(frames, (count, FRAME), &Device::Cpu)?;
        let centered = frames.broadcast_sub(&frames.mean_keepdim(1)?)?;
        let frames = centered.broadcast_div(&centered.var_keepdim(1)?.sqrt()?)?;
        Ok(Self { frames, cents })
    }

    /// Where each bin is within a bell of 25 cents around the pitch, `[N, 360]`.
    pub(crate) fn targets(&self) -> Result<Tensor> {
        let near = |pitch: f32, bin| (-((cents(bin) - pitch) / 25.).powi(2) / 2.).exp();
        let of = |&pitch| (0..BINS).map(move |bin| near(pitch, bin));
        let values: Vec<f32> = self.cents.iter().flat_map(of).collect();
        Tensor::from_vec(values, (self.cents.len(), BINS), &Device::Cpu)
    }

    /// The share of tones, in percent, whose highest logit is within half a semitone of the pitch.
    pub(crate) fn accuracy(&self, net: &impl ModuleT) -> Result<f32> {
        let heard = net
            .forward_t(&self.frames, false)?
            .argmax(D::Minus1)?
            .to_vec1::<u32>()?;
        let pairs = heard.iter().zip(&self.cents);
        let right = pairs.filter(|(bin, pitch)| (cents(**bin as usize) - **pitch).abs() < 50.);
        Ok(100. * right.count() as f32 / self.cents.len() as f32)
    }
}

fn cents(bin: usize) -> f32 {
    20. * bin as f32 + 1_997.379_4
}
