//! Claims about variants of batch norm, and about what takes the place of layer norm, on
//! handwritten digits: 45, 46, 47.

use candle_core::Result;
use candle_nn::ModuleT;
use candle_norm::{BatchNormOptions, BatchRenormOptions, NormConfig};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::lab::{Lab, Measure, Trial, median};
use crate::nets::{Activation, Mlp, Net};
use crate::sequences::trained;
use crate::training::{Course, DigitSets, Learned, Optim, flat_digits};

const ACCURACY: &str = "accuracy";
const GAP: &str = "gap";
const RATES: [f64; 5] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1];
/// Images that every network sees, whatever the size of its batches.
const IMAGES: usize = 5120;
const LARGE: usize = 512;
const WHOLE: &str = "whole batch";

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 45,
            title: "Dynamic tanh in place of layer norm",
            version: 1,
            text: "DyT replaces LayerNorm in a transformer.",
            varied: "the norms of a transformer: layer norm, dynamic tanh, none",
            fixed: "a transformer of one block and width 32 on digits, 300 steps of AdamW; alpha \
                starts from 0.5",
            rule: "two parts: the accuracy with DyT is at most 1 point below that with layer norm \
                (the median of the differences of each seed); without a norm it is lower than \
                with DyT in at least four of five seeds",
            plot: Plot {
                metric: ACCURACY,
                y: "test accuracy in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [60, 30],
            run: |lab| {
                let mut all = vec![];
                for norm in ["layer", "dyt", "none"] {
                    all.extend(trained(lab, "transformer", norm, norm)?);
                }
                Ok(all)
            },
            judge: |d| {
                let lost = d.gains(ACCURACY, "layer", "dyt");
                let gained = d.gains(ACCURACY, "dyt", "none");
                let of = |norm| show(d.median(ACCURACY, norm));
                let figure = format!(
                    "{} % with layer norm, {} % with DyT, {} % without; layer norm compared with \
                     DyT {}, DyT compared with none {}",
                    of("layer"),
                    of("dyt"),
                    of("none"),
                    spread(&lost, "points"),
                    spread(&gained, "points")
                );
                Judgement::parts(
                    [
                        "DyT is as accurate as layer norm",
                        "DyT is better than no norm",
                    ],
                    [median(&lost) <= 1., mostly(&gained, |g| g > 0.)],
                    figure,
                )
            },
        },
        Claim {
            id: 46,
            title: "Ghost batches",
            version: 1,
            text: "Statistics of small parts of a large batch regularize.",
            varied: "the samples that share statistics: all 512 of a batch, or parts of 64 and of \
                16",
            fixed: "two hidden layers of 64 with batch norm on 1297 digits, tested on 500 by \
                other writers, 150 steps of AdamW in batches of 512",
            rule: "two parts, for parts of 16 compared with whole batches: the test accuracy is \
                higher in at least four of five seeds; the gap between training and test accuracy \
                is smaller in at least four of five",
            plot: Plot {
                metric: ACCURACY,
                y: "test accuracy in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [60, 30],
            run: ghosts,
            judge: |d| {
                let gain = d.gains(ACCURACY, "parts of 16", WHOLE);
                let gap = d.gains(GAP, WHOLE, "parts of 16");
                let of = |variant| show(d.median(ACCURACY, variant));
                let figure = format!(
                    "{} % by whole batches, {} % by parts of 64, {} % by parts of 16; parts of 16 \
                     raise the accuracy by {}, and narrow the gap by {}",
                    of(WHOLE),
                    of("parts of 64"),
                    of("parts of 16"),
                    spread(&gain, "points"),
                    spread(&gap, "points")
                );
                Judgement::parts(
                    [
                        "ghost batches raise the test accuracy",
                        "ghost batches narrow the gap to the training accuracy",
                    ],
                    [mostly(&gain, |g| g > 0.), mostly(&gap, |g| g > 0.)],
                    figure,
                )
            },
        },
        Claim {
            id: 47,
            title: "Batch renormalization",
            version: 1,
            text: "Batch renormalization rescues small batches.",
            varied: "the batch size, for the same number of images; batch norm, or batch \
                renormalization after a tenth of the steps",
            fixed: "two hidden layers of 64 on 1297 digits, tested on 500 by other writers, AdamW, \
                5120 images; a momentum of 0.05 for both",
            rule: "two parts: at batches of 2, renormalization is more accurate in at least four \
                of five seeds, by 1 point or more in the median; at batches of 32, it loses at \
                most 1 point in the median",
            plot: Plot {
                metric: ACCURACY,
                y: "test accuracy in percent",
                x: Some("batch size"),
                log_x: true,
                log_y: false,
            },
            runs: [160, 80],
            run: renorms,
            judge: |d| {
                let gain = |size| d.gains_at(ACCURACY, ("renorm", size), ("batch", size));
                let words = [2., 4., 8., 32.].map(|size| {
                    format!(
                        "{} and {} % at {size}, {}",
                        show(d.at(ACCURACY, "batch", size)),
                        show(d.at(ACCURACY, "renorm", size)),
                        spread(&gain(size), "points")
                    )
                });
                let figure = format!(
                    "accuracy with batch norm and with renormalization: {}",
                    words.join("; ")
                );
                let small = gain(2.);
                Judgement::parts(
                    [
                        "renormalization is better at batches of 2",
                        "renormalization loses nothing at batches of 32",
                    ],
                    [
                        mostly(&small, |g| g > 0.) && median(&small) >= 1.,
                        median(&gain(32.)) >= -1.,
                    ],
                    figure,
                )
            },
        },
    ]
}

/// A network of two hidden layers, trained.
fn learned(
    norm: NormConfig,
    (steps, batch): (usize, usize),
    sets: &DigitSets,
    (rate, seed): (f64, u64),
) -> Result<(Net<Mlp>, Learned)> {
    let widths = [64, 64, 64];
    let net = Net::new(seed, |vb| {
        Mlp::with(norm, &widths, 10, Activation::Relu, vb)
    })?;
    let course = Course {
        steps,
        batch,
        every: steps,
        goal: 95.,
        seed,
    };
    let learned = course.run(&net.model, Optim::adam(net.trainable(), rate)?, sets)?;
    Ok((net, learned))
}

fn ghosts(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for (variant, virtual_batch_size) in [
        (WHOLE, None),
        ("parts of 64", Some(64)),
        ("parts of 16", Some(16)),
    ] {
        let norm = NormConfig::Batch(BatchNormOptions {
            virtual_batch_size,
            ..Default::default()
        });
        let size = (lab.steps(150), LARGE);
        all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
            let (net, learned) = learned(norm, size, sets, (rate, seed))?;
            let logits = net.model.forward_t(&sets.0.images, false)?;
            let taught = f64::from(sets.0.accuracy(&logits)?);
            let readings = vec![
                (ACCURACY, 0., learned.accuracy),
                (GAP, 0., taught - learned.accuracy),
            ];
            Ok(Trial::new(learned.rank(), readings))
        })?);
    }
    Ok(all)
}

fn renorms(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for variant in ["batch", "renorm"] {
        for batch in [2, 4, 8, 32] {
            let steps = lab.steps(IMAGES / batch);
            let momentum = Some(0.05);
            let norm = match variant {
                "batch" => NormConfig::Batch(BatchNormOptions {
                    momentum,
                    ..1e-3.into()
                }),
                _ => NormConfig::BatchRenorm(BatchRenormOptions {
                    momentum,
                    warmup_steps: (steps / 10) as u64,
                    ..1e-3.into()
                }),
            };
            all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
                let (_, learned) = learned(norm, (steps, batch), sets, (rate, seed))?;
                Ok(Trial::new(
                    learned.rank(),
                    vec![(ACCURACY, batch as f64, learned.accuracy)],
                ))
            })?);
        }
    }
    Ok(all)
}
