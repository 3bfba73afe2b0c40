//! Claims about a small training set and about targets of a generator, on digits: 13, 24.

use candle_core::{Result, Tensor};
use candle_nn::ops::log_softmax;
use candle_nn::{ModuleT, loss::cross_entropy};
use candle_norm::param_groups;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Sets, Trial};
use crate::nets::{Activation, Mlp, Net};
use crate::training::{Batches, Learned, Optim, flat_digits, scalar};

const GAP: &str = "gap";
const RATES: [f64; 5] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1];
const TEST: &str = "test accuracy";
const MEANS: [&str; 6] = [
    "nothing",
    "dropout",
    "L2",
    "L1",
    "label smoothing",
    "early stopping",
];

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 13,
            title: "Batch norm as a regularizer",
            version: 1,
            text: "Batch norm regularizes, as dropout, L1 and L2 penalties, label smoothing and \
                early stopping do.",
            varied: "the regularizer, each alone and together with batch norm",
            fixed: "200 digits for training and 500 for testing, two hidden layers of 64, 300 \
                steps of AdamW in batches of 32; dropout of 0.2 of the pixels, L2 as a decoupled \
                decay of 0.1 on the weights, L1 1e-4, smoothing 0.1; early stopping on 100 \
                further digits",
            rule: "three parts: batch norm alone raises the test accuracy in at least four of \
                five seeds; with it, the gap between training and test accuracy shrinks in at \
                least four of five; at least three of the five other regularizers raise the test \
                accuracy in at least four of five",
            plot: Plot {
                metric: TEST,
                y: "test accuracy in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [120, 60],
            run: regularizers,
            judge: |d| {
                let gain = |variant: &str| d.gains(TEST, variant, "nothing");
                let gap = d.gains(GAP, "nothing", "nothing, batch norm");
                let others = MEANS[1..]
                    .iter()
                    .map(|means| format!("{means} {}", spread(&gain(means), "")));
                let batch = gain("nothing, batch norm");
                let figure = format!(
                    "batch norm alone raises the test accuracy by {}, and narrows the gap to the \
                     training accuracy by {}; gains of the others: {}",
                    spread(&batch, "points"),
                    spread(&gap, "points"),
                    others.collect::<Vec<_>>().join(", ")
                );
                let raised = MEANS[1..].iter().filter(|m| mostly(&gain(m), |d| d > 0.));
                let parts = [
                    mostly(&batch, |d| d > 0.),
                    mostly(&gap, |d| d > 0.),
                    raised.count() >= 3,
                ];
                Judgement::parts(
                    [
                        "batch norm raises the test accuracy",
                        "batch norm narrows the gap to the training accuracy",
                        "most other regularizers raise the test accuracy",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 24,
            title: "Targets of a network that ends in tanh",
            version: 1,
            text: "A generator with tanh output needs targets in [−1, 1].",
            varied: "the range of pixels as targets: 0 to 16, 0 to 1, −1 to 1",
            fixed: "an autoencoder 64-32-8-32-64 with tanh, also at its output, 600 steps of \
                AdamW in batches of 64; inputs in [−1, 1]",
            rule: "two parts, in at least four of five seeds each: the error in units of the \
                range, with targets in [−1, 1], is below that in [0, 16]; and below that in [0, \
                1]",
            plot: Plot {
                metric: "error",
                y: "RMSE relative to the range of the target",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [30, 15],
            run: generator,
            judge: |d| {
                let error = |variant| show(d.median("error", variant));
                let figure = format!(
                    "error {} in [0, 16], {} in [0, 1], {} in [−1, 1]",
                    error("0 to 16"),
                    error("0 to 1"),
                    error("−1 to 1")
                );
                let lower = |than| mostly(&d.gains("error", than, "−1 to 1"), |d| d > 0.);
                Judgement::of(
                    &["0 to 16", "0 to 1"].map(lower),
                    "the range (values that tanh cannot reach are lost)",
                    figure,
                )
            },
        },
    ]
}

/// Cross entropy with a tenth of each target spread over all classes.
fn smoothed(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let uniform = log_softmax(logits, 1)?.mean_all()?.neg()?;
    (cross_entropy(logits, labels)? * 0.9)? + (uniform * 0.1)?
}

/// Few digits to train on, as many again as half of them to stop by, and others to test on.
struct Few {
    train: Digits,
    held: Digits,
    test: Digits,
}

fn few() -> Result<Sets<Few>> {
    flat_digits()?.map(|(train, test)| {
        Ok(Few {
            train: part(train, 0, 200)?,
            held: part(train, 200, 100)?,
            test: part(test, 0, test.labels.dim(0)?)?,
        })
    })
}

fn part(digits: &Digits, from: usize, len: usize) -> Result<Digits> {
    Ok(Digits {
        images: digits.images.narrow(0, from, len)?,
        labels: digits.labels.narrow(0, from, len)?,
    })
}

fn regularizers(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = few()?;
    let mut all = vec![];
    for norm in ["none", "batch"] {
        for means in MEANS {
            let variant = format!(
                "{means}{}",
                if norm == "batch" { ", batch norm" } else { "" }
            );
            all.extend(lab.tuned(
                &variant,
                &RATES,
                &sets,
                |Few { train, held, test }, rate, seed| {
                    let net = Net::new(seed, |vb| {
                        Mlp::new(norm, &[64, 64, 64], 10, Activation::Relu, vb)
                    })?;
                    let decay = if means == "L2" { 0.1 } else { 0. };
                    // Decay is for weights, not for the parameters of norms.
                    let groups = param_groups(&net.vars);
                    let groups = [(groups.decay, decay), (groups.no_decay, 0.)];
                    let mut optimizer = Optim::adam_with(groups, rate)?;
                    let weights: Vec<_> = net
                        .trainable()
                        .into_iter()
                        .filter(|v| v.rank() == 2)
                        .collect();
                    let mut batches = Batches::new(200, seed);
                    let accuracy = |set: &Digits| -> Result<f64> {
                        Ok(f64::from(
                            set.accuracy(&net.model.forward_t(&set.images, false)?)?,
                        ))
                    };
                    let measure = || -> Result<(f64, Learned)> {
                        let logits = net.model.forward_t(&test.images, false)?;
                        Ok((accuracy(train)?, Learned::of(&logits, test)?))
                    };
                    let (mut best, mut kept) = (0., None);
                    for step in 1..=lab.steps(300) {
                        let rows = batches.next(32)?;
                        let mut x = train.images.index_select(&rows, 0)?;
                        if means == "dropout" {
                            x = masked(&x, 0.2, seed, step)?;
                        }
                        let (logits, labels) = (
                            net.model.forward_t(&x, true)?,
                            train.labels.index_select(&rows, 0)?,
                        );
                        let mut loss = match means {
                            "label smoothing" => smoothed(&logits, &labels)?,
                            _ => cross_entropy(&logits, &labels)?,
                        };
                        if means == "L1" {
                            for weight in &weights {
                                loss = (loss + (weight.abs()?.sum_all()? * 1e-4)?)?;
                            }
                        }
                        optimizer.step(&loss)?;
                        if means == "early stopping" && step % 10 == 0 {
                            let now = accuracy(held)?;
                            if now > best {
                                (best, kept) = (now, Some(measure()?));
                            }
                        }
                    }
                    let (taught, learned) = match kept {
                        Some(kept) => kept,
                        None => measure()?,
                    };
                    let evaluated = learned.accuracy;
                    Ok(Trial::new(
                        learned.rank(),
                        vec![(TEST, 0., evaluated), (GAP, 0., taught - evaluated)],
                    ))
                },
            )?);
        }
    }
    Ok(all)
}

/// A share of the values set to zero, the others made up for it. candle's own dropout cannot be
/// seeded.
pub(crate) fn masked(x: &Tensor, share: f64, seed: u64, step: usize) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(seed << 32 | step as u64);
    let kept = (1. / (1. - share)) as f32;
    let mask = (0..x.elem_count()).map(|_| {
        if rng.random_bool(1. - share) {
            kept
        } else {
            0.
        }
    });
    x * Tensor::from_vec(mask.collect(), x.shape(), x.device())?
}

fn generator(lab: &Lab) -> Result<Vec<Measure>> {
    let signed = |d: &Digits| (&d.images * 2.)? - 1.;
    let sets = flat_digits()?.map(|(train, test)| Ok([signed(train)?, signed(test)?]))?;
    let mut all = vec![];
    for (variant, low, range) in [
        ("0 to 16", 0., 16.),
        ("0 to 1", 0., 1.),
        ("−1 to 1", -1., 2.),
    ] {
        let target = |x: &Tensor| ((x + 1.)? * (range / 2.))? + low;
        all.extend(
            lab.tuned(variant, &RATES, &sets, |[train, unseen], rate, seed| {
                let net = Net::new(seed, |vb| {
                    Mlp::new("none", &[64, 32, 8, 32], 64, Activation::Tanh, vb)
                })?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.dim(0)?, seed);
                let square = |x: &Tensor, train| {
                    (net.model.forward_t(x, train)?.tanh()? - target(x)?)?
                        .sqr()?
                        .mean_all()
                };
                for _ in 0..lab.steps(600) {
                    let x = train.index_select(&batches.next(64)?, 0)?;
                    optimizer.step(&square(&x, true)?)?;
                }
                let error = scalar(&square(unseen, false)?)?.sqrt() / range;
                Ok(Trial::new(error, vec![("error", 0., error)]))
            })?,
        );
    }
    Ok(all)
}
