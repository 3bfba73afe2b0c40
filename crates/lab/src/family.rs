//! Claims of the guide about spectral norm, masked statistics and AdaLN-Zero, on digits: 41, 42,
//! 43.

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{Linear, Module, ModuleT, VarBuilder, VarMap, linear};
use candle_norm::ops::{GateOptions, gated_residual, mask_of_lengths};
use candle_norm::{
    Affine, BatchNorm, ChunkOrder, ConditionProjection, LayerNorm, LayerNormOptions, SpectralNorm,
    batch_norm, condition_projection, layer_norm, spectral_norm, trainable_vars,
};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::common::{Digits, initialize};
use crate::lab::{Lab, Measure};
use crate::slopes::{largest_singular_values, steepest};
use crate::training::{Batches, Optim, flat_digits, scalar};

const ACCURACY: &str = "accuracy";
const SLOPE: &str = "largest slope found";
const BOUND: &str = "product of the norms";
const SETTLED: &str = "product of the norms, 20 steps later";
const CHANGE: &str = "largest change of a logit";
const MOVED: &str = "change of the stream by the blocks";
const LEARNED: &str = "gradient of the gates";

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 41,
            title: "Spectral norm and the slope",
            version: 1,
            text: "Spectral norm bounds the slope of a network by 1.",
            varied: "the weights of all layers: as they are learned, or over their spectral norm \
                (one step of the power iteration in each step of training)",
            fixed: "two hidden layers of 64 with ReLU on 1297 digits, tested on 500 by other \
                writers, AdamW at 0.003, 600 steps, batches of 64, logits times 16, without which \
                a slope of 1 cannot tell digits apart; the largest slope that a search from the \
                test digits finds, without that factor; the product of the norms of all weights \
                after training and after 20 more steps of the power iteration on the same weights",
            rule: "four parts, in at least four of five seeds each: with spectral norm no slope \
                above 1.01 is found; without it one is; the product of the norms, which is the \
                proof, is at most 1.01 at the end of training; it is after 20 more steps of the \
                power iteration",
            plot: Plot {
                metric: SLOPE,
                y: SLOPE,
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [10, 4],
            run: slopes,
            judge: |d| {
                let of = |metric, variant| show(d.median(metric, variant));
                let gain = d.gains(ACCURACY, "spectral", "none");
                let figure = format!(
                    "slopes of {} are found with spectral norm and of {} without, where the \
                     products of the norms are {} and {}; with spectral norm that is {} after 20 \
                     more steps; accuracy {} and {} %, {}",
                    of(SLOPE, "spectral"),
                    of(SLOPE, "none"),
                    of(BOUND, "spectral"),
                    of(BOUND, "none"),
                    of(SETTLED, "spectral"),
                    of(ACCURACY, "spectral"),
                    of(ACCURACY, "none"),
                    spread(&gain, "points")
                );
                let parts = [
                    mostly(d.values(SLOPE, "spectral"), |slope| slope <= 1.01),
                    mostly(d.values(SLOPE, "none"), |slope| slope > 1.01),
                    mostly(d.values(BOUND, "spectral"), |bound| bound <= 1.01),
                    mostly(d.values(SETTLED, "spectral"), |bound| bound <= 1.01),
                ];
                Judgement::parts(
                    [
                        "no slope above 1 is found",
                        "one is found without spectral norm",
                        "the norms at the end of training prove it",
                        "the norms 20 steps later prove it",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 42,
            title: "Padding and masked statistics",
            version: 1,
            text: "Masked statistics make padding invisible.",
            varied: "the statistics of batch norm: of all positions, or of the valid ones",
            fixed: "the rows of 1297 digits as sequences of one to eight pixels, padded to eight; \
                a layer of 16 for each pixel with batch norm and ReLU, their mean over the valid \
                pixels of each row, a layer of 64, a head; tested on 500 digits by other writers, \
                AdamW at 0.003, 300 steps, batches of 64; the change of the logits of the test \
                digits in training mode when their padding is of ones and not of zeros",
            rule: "two parts, in at least four of five seeds each: with masked statistics no logit \
                changes by more than 1e-4; with plain ones some logit changes by more than 0.1",
            plot: Plot {
                metric: CHANGE,
                y: CHANGE,
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [10, 4],
            run: padding,
            judge: |d| {
                let of = |metric, variant| show(d.median(metric, variant));
                let gain = d.gains(ACCURACY, "masked", "plain");
                let figure = format!(
                    "a logit changes by at most {} with masked and {} with plain statistics; \
                     accuracy {} and {} %, {}",
                    of(CHANGE, "masked"),
                    of(CHANGE, "plain"),
                    of(ACCURACY, "masked"),
                    of(ACCURACY, "plain"),
                    spread(&gain, "points")
                );
                let parts = [
                    mostly(d.values(CHANGE, "masked"), |change| change <= 1e-4),
                    mostly(d.values(CHANGE, "plain"), |change| change > 0.1),
                ];
                Judgement::parts(
                    [
                        "padding is invisible to masked statistics",
                        "plain ones see it",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 43,
            title: "The start of AdaLN-Zero",
            version: 1,
            text: "Blocks with AdaLN-Zero start as the identity, and learn from there.",
            varied: "the start of the projection to shifts, scales and gates: zero, or drawn",
            fixed: "eight blocks of a norm without parameters, modulated by the condition, and a \
                perceptron behind a gate, 64 wide, on 1297 digits, whose brightness is the \
                condition; tested on 500 by other writers; AdamW at 0.003, 300 steps, batches of \
                64; the change of the stream and the gradient of the projections before the first \
                step",
            rule: "three parts, in at least four of five seeds each: with the start from zero the \
                stream leaves the blocks as it came, to the bit; the gradient of the projections \
                is not zero; the accuracy is that of the drawn start or higher",
            plot: Plot {
                metric: ACCURACY,
                y: "accuracy in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [10, 4],
            run: starts,
            judge: |d| {
                let of = |metric, variant| show(d.median(metric, variant));
                let gain = d.gains(ACCURACY, "zero", "drawn");
                let figure = format!(
                    "the stream changes by {} from zero and by {} from a drawn start; the gradient \
                     of the projections is {} and {}; accuracy {} and {} %, {}",
                    of(MOVED, "zero"),
                    of(MOVED, "drawn"),
                    of(LEARNED, "zero"),
                    of(LEARNED, "drawn"),
                    of(ACCURACY, "zero"),
                    of(ACCURACY, "drawn"),
                    spread(&gain, "points")
                );
                let parts = [
                    mostly(d.values(MOVED, "zero"), |change| change == 0.),
                    mostly(d.values(LEARNED, "zero"), |gradient| gradient > 0.),
                    mostly(&gain, |d| d >= 0.),
                ];
                Judgement::parts(
                    [
                        "the blocks start as the identity",
                        "their projections have gradients",
                        "they reach the accuracy of a drawn start",
                    ],
                    parts,
                    figure,
                )
            },
        },
    ]
}

/// Variables by which `build` makes a network, drawn by the seed.
fn built<N>(seed: u64, build: impl Fn(VarBuilder) -> Result<N>) -> Result<(N, VarMap)> {
    let vars = VarMap::new();
    let net = build(VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    initialize(&vars, seed)?;
    Ok((net, vars))
}

/// Steps of AdamW at 0.003 along the loss of batches of 64.
fn train(
    steps: usize,
    vars: &VarMap,
    digits: &Digits,
    seed: u64,
    logits: impl Fn(&Digits) -> Result<Tensor>,
) -> Result<()> {
    let mut optimizer = Optim::adam(trainable_vars(vars), 3e-3)?;
    let mut batches = Batches::new(digits.labels.dim(0)?, seed);
    for _ in 0..steps {
        let batch = batches.of(digits, 64)?;
        optimizer.step(&cross_entropy(&logits(&batch)?, &batch.labels)?)?;
    }
    Ok(())
}

/// The layers of a classifier, with or without spectral norm.
enum Layers {
    Plain(Vec<Linear>),
    Spectral(Vec<SpectralNorm<Linear>>),
}

impl Layers {
    fn new(variant: &str, vb: VarBuilder) -> Result<Self> {
        let sizes = [(64, 64), (64, 64), (64, 10)];
        let named = |i: usize| vb.pp(format!("layer{i}"));
        let layers = sizes.iter().enumerate();
        Ok(match variant {
            "spectral" => {
                let layer = |(i, &(inputs, outputs)): (usize, &(usize, usize))| {
                    spectral_norm::linear(inputs, outputs, Default::default(), named(i))
                };
                Self::Spectral(layers.map(layer).collect::<Result<_>>()?)
            }
            _ => {
                let layer = |(i, &(inputs, outputs)): (usize, &(usize, usize))| {
                    linear(inputs, outputs, named(i))
                };
                Self::Plain(layers.map(layer).collect::<Result<_>>()?)
            }
        })
    }

    fn apply(&self, at: usize, x: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Self::Plain(layers) => layers[at].forward(x),
            Self::Spectral(layers) => layers[at].forward_t(x, train),
        }
    }

    fn forward(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let x = self.apply(0, x, train)?.relu()?;
        let x = self.apply(1, &x, train)?.relu()?;
        self.apply(2, &x, train)
    }

    /// The product of the largest singular values of the weights.
    fn bound(&self) -> Result<f64> {
        let weights: Vec<Tensor> = match self {
            Self::Plain(layers) => layers.iter().map(|l| l.weight().clone()).collect(),
            Self::Spectral(layers) => {
                let weights = layers.iter().map(SpectralNorm::weight);
                weights.collect::<Result<_>>()?
            }
        };
        let norm =
            |weight: &Tensor| scalar(&largest_singular_values(&weight.unsqueeze(0)?)?.squeeze(0)?);
        weights.iter().map(norm).product()
    }
}

fn slopes(lab: &Lab) -> Result<Vec<Measure>> {
    let (digits, test) = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["none", "spectral"] {
        all.extend(lab.seeded(variant, |seed| {
            let (net, vars) = built(seed, |vb| Layers::new(variant, vb))?;
            if let Layers::Spectral(layers) = &net {
                for layer in layers {
                    candle_norm::Norm::reset(layer)?;
                }
            }
            train(lab.steps(600), &vars, &digits, seed, |batch| {
                net.forward(&batch.images, true)? * 16.
            })?;
            let logits = |x: &Tensor| net.forward(x, false);
            let right = test.accuracy(&logits(&test.images)?)?;
            let slope = steepest(logits, &test.images, lab.steps(50))?;
            let bound = net.bound()?;
            for _ in 0..20 {
                net.forward(&test.images.narrow(0, 0, 1)?, true)?;
            }
            Ok(vec![
                (SLOPE, 0., f64::from(slope)),
                (BOUND, 0., bound),
                (SETTLED, 0., net.bound()?),
                (ACCURACY, 0., f64::from(right)),
            ])
        })?);
    }
    Ok(all)
}

/// The beginnings of the eight rows of digits as sequences `[8 N, 1, 8]` of these lengths, and
/// `padding` behind them.
fn padded(images: &Tensor, padding: f64) -> Result<(Tensor, Tensor)> {
    let n = images.dim(0)?;
    let rows = images.reshape((8 * n, 1, 8))?;
    let lengths = Tensor::from_iter((0..8 * n as u32).map(|i| 1 + i * 5 % 8), &Device::Cpu)?;
    let mask = mask_of_lengths(&lengths, 8)?;
    let other = Tensor::full(padding as f32, rows.shape(), &Device::Cpu)?;
    Ok((mask.unsqueeze(1)?.where_cond(&rows, &other)?, mask))
}

/// A layer for each pixel, whose mean over each row goes on.
struct Rows {
    pixels: Linear,
    norm: BatchNorm,
    rows: Linear,
    head: Linear,
    masked: bool,
}

impl Rows {
    fn new(masked: bool, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            pixels: linear(1 + 8, 16, vb.pp("pixels"))?,
            norm: batch_norm(16, 1e-5, vb.pp("norm"))?,
            rows: linear(8 * 16, 64, vb.pp("rows"))?,
            head: linear(64, 10, vb.pp("head"))?,
            masked,
        })
    }

    /// The logits of digits of which rows are known as far as `padded` says.
    fn forward(&self, (rows, mask): &(Tensor, Tensor), train: bool) -> Result<Tensor> {
        let n = rows.dim(0)?;
        let places = Tensor::eye(8, DType::F32, &Device::Cpu)?.unsqueeze(0)?;
        let places = places.broadcast_as((n, 8, 8))?;
        let pixels = Tensor::cat(&[&rows.transpose(1, 2)?, &places], 2)?;
        let xs = pixels.apply(&self.pixels)?.transpose(1, 2)?.contiguous()?;
        let xs = match self.masked {
            true => self.norm.forward_masked_t(&xs, mask, train)?,
            false => self.norm.forward_t(&xs, train)?,
        };
        let wide = mask.unsqueeze(1)?.to_dtype(DType::F32)?;
        let valid = wide.broadcast_as(xs.shape())?;
        let sums = (xs.relu()? * valid)?.sum(2)?;
        let means = sums.broadcast_div(&wide.sum(2)?)?;
        let digits = means.reshape((n / 8, 8 * 16))?;
        digits.apply(&self.rows)?.relu()?.apply(&self.head)
    }
}

fn padding(lab: &Lab) -> Result<Vec<Measure>> {
    let (digits, test) = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["plain", "masked"] {
        all.extend(lab.seeded(variant, |seed| {
            let (net, vars) = built(seed, |vb| Rows::new(variant == "masked", vb))?;
            train(lab.steps(300), &vars, &digits, seed, |batch| {
                net.forward(&padded(&batch.images, 0.)?, true)
            })?;
            let right = test.accuracy(&net.forward(&padded(&test.images, 0.)?, false)?)?;
            // The statistics of the batch see what stands in it.
            let logits = |padding| net.forward(&padded(&test.images, padding)?, true);
            let change = (logits(1.)? - logits(0.)?)?.abs()?.max_all()?;
            Ok(vec![
                (CHANGE, 0., scalar(&change)?),
                (ACCURACY, 0., f64::from(right)),
            ])
        })?);
    }
    Ok(all)
}

/// Blocks that a condition modulates.
struct Conditioned {
    first: Linear,
    blocks: Vec<(ConditionProjection, LayerNorm, Linear, Linear)>,
    head: Linear,
}

const CONDITION: usize = 8;

impl Conditioned {
    fn new(vb: VarBuilder) -> Result<Self> {
        let order = ChunkOrder {
            key: "modulation",
            ..ChunkOrder::FLUX_SINGLE
        };
        let options = LayerNormOptions {
            eps: 1e-6,
            affine: Affine::None,
            ..Default::default()
        };
        let block = |i| {
            let vb = vb.pp(format!("block{i}"));
            Ok((
                condition_projection(CONDITION, 64, order, vb.clone())?,
                layer_norm(64, options, vb.pp("norm"))?,
                linear(64, 128, vb.pp("up"))?,
                linear(128, 64, vb.pp("down"))?,
            ))
        };
        Ok(Self {
            first: linear(64, 64, vb.pp("first"))?,
            blocks: (0..8).map(block).collect::<Result<_>>()?,
            head: linear(64, 10, vb.pp("head"))?,
        })
    }

    /// The stream before the blocks and after them.
    fn streams(&self, images: &Tensor) -> Result<[Tensor; 2]> {
        // The mean of the pixels, in waves of several lengths.
        let waves = Tensor::from_iter((1..=CONDITION).map(|i| i as f32), &Device::Cpu)?;
        let bright = images.mean_keepdim(1)?;
        let condition = bright.broadcast_mul(&waves)?.cos()?;
        let before = images.apply(&self.first)?;
        let mut xs = before.clone();
        for (projection, norm, up, down) in &self.blocks {
            let chunks = projection.forward(&condition)?;
            // A digit is a row of one token.
            let rows = xs.unsqueeze(1)?;
            let update = norm.forward_modulated_by(&rows, &chunks.modulation(0)?)?;
            let update = update.apply(up)?.relu()?.apply(down)?;
            let options = GateOptions::default();
            xs = gated_residual(&rows, &update, chunks.gate(0)?, None, options)?.squeeze(1)?;
        }
        Ok([before, xs])
    }

    fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let [_, xs] = self.streams(images)?;
        xs.apply(&self.head)
    }
}

fn starts(lab: &Lab) -> Result<Vec<Measure>> {
    let (digits, test) = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["zero", "drawn"] {
        all.extend(lab.seeded(variant, |seed| {
            let (net, vars) = built(seed, Conditioned::new)?;
            if variant == "zero" {
                for (name, var) in vars.data().lock().expect("no thread panicked").iter() {
                    if name.contains("modulation") {
                        var.set(&var.zeros_like()?.detach())?;
                    }
                }
            }
            let images = test.images.narrow(0, 0, 128)?;
            let [before, after] = net.streams(&images)?;
            let moved = scalar(&(after - before)?.abs()?.max_all()?)?;
            let labels = test.labels.narrow(0, 0, 128)?;
            let grads = cross_entropy(&net.forward(&images)?, &labels)?.backward()?;
            let mut squares = 0.;
            for (projection, ..) in &net.blocks {
                let Some(grad) = grads.get(projection.linear().weight()) else {
                    bail!("expected a gradient of the projection")
                };
                squares += scalar(&grad.sqr()?.sum_all()?)?;
            }
            train(lab.steps(300), &vars, &digits, seed, |batch| {
                net.forward(&batch.images)
            })?;
            let right = test.accuracy(&net.forward(&test.images)?)?;
            Ok(vec![
                (MOVED, 0., moved),
                (LEARNED, 0., squares.sqrt()),
                (ACCURACY, 0., f64::from(right)),
            ])
        })?);
    }
    Ok(all)
}
