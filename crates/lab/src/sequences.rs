//! Claims about norms in networks for sequences: 15, 17. A digit is read as a sequence of its eight
//! rows.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::softmax;
use candle_nn::{Linear, Module, ModuleT, VarBuilder, linear};
use candle_norm::{Norm, NormConfig};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::common::Digits;
use crate::cost::layer_and_rms;
use crate::lab::{Lab, Measure, Trial, median};
use crate::nets::Net;
use crate::training::{Batches, Course, Optim, digits, scalar};

const WIDTH: usize = 32;
const ACCURACY: &str = "accuracy";
const APART: &str = "difference from the batch";
/// Rows and their length.
const SIZES: [[usize; 2]; 4] = [[4096, 64], [1024, 256], [512, 1024], [256, 4096]];

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 15,
            title: "Layer norm, sequences and the batch",
            version: 1,
            text: "Layer norm suits sequences of any length and does not depend on the batch.",
            varied: "the norm (batch, layer) in a recurrent network and in a transformer of one \
                block; the length of the sequence: the first 2, 4 and 8 rows of a digit",
            fixed: "width 32; the outputs of two sequences by themselves are compared with those \
                in a batch of 32, untrained and in training mode; the accuracy is that after 300 \
                steps of AdamW on whole digits",
            rule: "two parts, for both networks and each length: with layer norm, the outputs of \
                the two differ from those in the batch by at most 1e-4; with batch norm, they \
                differ by 0.01 or more",
            plot: Plot {
                metric: APART,
                y: "largest difference from the outputs in the batch",
                x: Some("rows in the sequence"),
                log_x: true,
                log_y: true,
            },
            runs: [60, 28],
            run: alone,
            judge: |d| {
                let worst = |norm: &str| {
                    NETS.map(|net| d.along(APART, &format!("{net}, {norm}")))
                        .concat()
                };
                let layer = worst("layer").iter().map(|(_, v)| *v).fold(0., f64::max);
                let batch = worst("batch")
                    .iter()
                    .map(|(_, v)| *v)
                    .fold(f64::INFINITY, f64::min);
                let accuracy = |net: &str, norm: &str| {
                    show(d.median(ACCURACY, &format!("{net}, {norm}, whole digits")))
                };
                let figure = format!(
                    "difference from the outputs in a batch at most {} with layer norm, at least \
                     {} with batch norm; accuracy on whole digits {} % and {} % (recurrent), {} % \
                     and {} % (transformer)",
                    show(layer),
                    show(batch),
                    accuracy("recurrent", "layer"),
                    accuracy("recurrent", "batch"),
                    accuracy("transformer", "layer"),
                    accuracy("transformer", "batch")
                );
                Judgement::parts(
                    ["layer norm does not depend on the batch", "batch norm does"],
                    [layer <= 1e-4, batch >= 0.01],
                    figure,
                )
            },
        },
        Claim {
            id: 17,
            title: "RMS norm or layer norm",
            version: 2,
            text: "RMS norm needs only the scale, and is cheaper than layer norm.",
            varied: "the norm of a transformer; for the time of the layer alone, the length of \
                rows",
            fixed: "a transformer of one block and width 32 on digits, 300 steps of AdamW; time \
                of forward and backward in f32 on one thread, layers timed alternately, medians",
            rule: "two parts: the accuracy with RMS norm is at most 1 point below that with layer \
                norm (the median of the differences of each seed); at every length RMS norm takes \
                at most 0.95 of the time of layer norm in at least four of five seeds",
            plot: Plot {
                metric: "time",
                y: "time of forward and backward, in ms",
                x: Some("length of a row"),
                log_x: true,
                log_y: true,
            },
            runs: [25, 12],
            run: rms,
            judge: |d| {
                let lost = d.gains(ACCURACY, "transformer, layer", "transformer, rms");
                let sizes: Vec<f64> = d.along("time", "layer").iter().map(|(x, _)| *x).collect();
                let ratios = |x: &f64| d.ratios_at("time", "rms", "layer", *x);
                let words: Vec<String> = sizes
                    .iter()
                    .map(|x| format!("×{} at {x}", show(median(&ratios(x)))))
                    .collect();
                let figure = format!(
                    "accuracy {} % with RMS norm, {} % with layer norm, which is {} higher; time \
                     relative to layer norm: {}",
                    show(d.median(ACCURACY, "transformer, rms")),
                    show(d.median(ACCURACY, "transformer, layer")),
                    spread(&lost, "points"),
                    words.join(", ")
                );
                let cheaper = sizes.iter().all(|x| mostly(&ratios(x), |r| r <= 0.95));
                Judgement::parts(
                    ["RMS norm is as accurate", "RMS norm is cheaper"],
                    [median(&lost) <= 1., cheaper && !sizes.is_empty()],
                    figure,
                )
            },
        },
    ]
}

const NETS: [&str; 2] = ["recurrent", "transformer"];

/// `h ← tanh(norm(W x + U h))` over the rows; the last state is classified.
struct Recurrent {
    input: Linear,
    state: Linear,
    norm: Box<dyn Norm>,
    head: Linear,
}

/// One block of attention and a feed-forward layer, each after a norm, on rows with learned
/// positions; the mean is classified.
struct Transformer {
    embed: Linear,
    qkv: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    norms: [Box<dyn Norm>; 3],
    positions: Tensor,
    head: Linear,
}

enum Sequences {
    Recurrent(Recurrent),
    Transformer(Transformer),
}

impl Sequences {
    fn new(net: &str, norm: &str, vb: VarBuilder) -> Result<Self> {
        let norm: NormConfig = norm.parse()?;
        let features = |name: &str| norm.features(WIDTH, vb.pp(name));
        let head = linear(WIDTH, 10, vb.pp("head"))?;
        Ok(match net {
            "recurrent" => Self::Recurrent(Recurrent {
                input: linear(8, WIDTH, vb.pp("input"))?,
                state: linear(WIDTH, WIDTH, vb.pp("state"))?,
                norm: features("norm")?,
                head,
            }),
            _ => Self::Transformer(Transformer {
                embed: linear(8, WIDTH, vb.pp("embed"))?,
                qkv: linear(WIDTH, 3 * WIDTH, vb.pp("qkv"))?,
                out: linear(WIDTH, WIDTH, vb.pp("out"))?,
                up: linear(WIDTH, 2 * WIDTH, vb.pp("up"))?,
                down: linear(2 * WIDTH, WIDTH, vb.pp("down"))?,
                norms: [features("norm1")?, features("norm2")?, features("norm3")?],
                positions: vb.get((8, WIDTH), "positions")?,
                head,
            }),
        })
    }
}

impl ModuleT for Sequences {
    /// `[N, 1, rows, 8]` to logits `[N, 10]`.
    fn forward_t(&self, images: &Tensor, train: bool) -> Result<Tensor> {
        let x = images.squeeze(1)?;
        let (n, rows, _) = x.dims3()?;
        match self {
            Self::Recurrent(net) => {
                let mut h = Tensor::zeros((n, WIDTH), DType::F32, &Device::Cpu)?;
                for row in 0..rows {
                    let x = x.narrow(1, row, 1)?.squeeze(1)?.contiguous()?;
                    let sum = (net.input.forward(&x)? + net.state.forward(&h)?)?;
                    h = net.norm.forward_t(&sum, train)?.tanh()?;
                }
                net.head.forward(&h)
            }
            Self::Transformer(net) => {
                let [first, second, last] = &net.norms;
                let positions = net.positions.narrow(0, 0, rows)?;
                let mut h = net
                    .embed
                    .forward(&x.contiguous()?)?
                    .broadcast_add(&positions)?;
                let qkv = net.qkv.forward(&first.forward_t(&h, train)?)?;
                let part = |i: usize| qkv.narrow(2, i * WIDTH, WIDTH)?.contiguous();
                let (q, k, v) = (part(0)?, part(1)?, part(2)?);
                let scores =
                    (q.matmul(&k.transpose(1, 2)?.contiguous()?)? / (WIDTH as f64).sqrt())?;
                h = (h + net.out.forward(&softmax(&scores, 2)?.matmul(&v)?)?)?;
                let up = net.up.forward(&second.forward_t(&h, train)?)?.relu()?;
                h = (h + net.down.forward(&up)?)?;
                net.head.forward(&last.forward_t(&h, train)?.mean(1)?)
            }
        }
    }
}

const RATES: [f64; 5] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1];

/// Accuracy of one of [`NETS`] with a norm, at the best of the rates.
pub(crate) fn trained(lab: &Lab, net: &str, norm: &str, variant: &str) -> Result<Vec<Measure>> {
    lab.tuned(variant, &RATES, &digits()?, |sets, rate, seed| {
        let net = Net::new(seed, |vb| Sequences::new(net, norm, vb))?;
        let course = Course {
            steps: lab.steps(300),
            batch: 64,
            every: lab.steps(300),
            goal: 95.,
            seed,
        };
        let learned = course.run(&net.model, Optim::adam(net.trainable(), rate)?, sets)?;
        Ok(Trial::new(
            learned.rank(),
            vec![(ACCURACY, 0., learned.accuracy)],
        ))
    })
}

fn alone(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, _) = Digits::load()?;
    let mut all = vec![];
    for net in NETS {
        for norm in ["batch", "layer"] {
            all.extend(lab.seeded(&format!("{net}, {norm}"), |seed| {
                let net = Net::new(seed, |vb| Sequences::new(net, norm, vb))?;
                let rows = Batches::new(train.labels.dim(0)?, seed).next(32)?;
                let batch = train.images.index_select(&rows, 0)?;
                let mut readings = vec![];
                for length in [2, 4, 8] {
                    let batch = batch.narrow(2, 0, length)?.contiguous()?;
                    let together = net.model.forward_t(&batch, true)?.narrow(0, 0, 2)?;
                    // Two of them: batch norm refuses a single row in the recurrent network.
                    let apart = net
                        .model
                        .forward_t(&batch.narrow(0, 0, 2)?.contiguous()?, true)?;
                    let difference = scalar(&(together - apart)?.abs()?.max_all()?)?;
                    readings.push((APART, length as f64, difference.max(1e-9)));
                }
                Ok(readings)
            })?);
            all.extend(trained(
                lab,
                net,
                norm,
                &format!("{net}, {norm}, whole digits"),
            )?);
        }
    }
    Ok(all)
}

fn rms(lab: &Lab) -> Result<Vec<Measure>> {
    let mut all = vec![];
    for norm in ["layer", "rms"] {
        all.extend(trained(
            lab,
            "transformer",
            norm,
            &format!("transformer, {norm}"),
        )?);
    }
    all.extend(lab.timed(|seed| layer_and_rms(lab, seed, &SIZES))?);
    Ok(all)
}
