//! Claims about deep stacks and their initialization, on digits: 12, 23.

use candle_core::Result;
use candle_nn::{ModuleT, loss::cross_entropy};

use crate::claim::{Claim, Judgement, Plot, show};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Trial};
use crate::nets::{Activation, Mlp, Net, Start};
use crate::training::{Batches, Course, Optim, flat_digits, scalar};

const RATIO: &str = "ratio of first to last";
const ACCURACY: &str = "accuracy";
const ACTIVATIONS: [(&str, Activation); 3] = [
    ("sigmoid", Activation::Sigmoid),
    ("tanh", Activation::Tanh),
    ("relu", Activation::Relu),
];
const STARTS: [(&str, Start); 3] = [
    ("fixed 0.05", Start::Fixed(0.05)),
    ("Xavier", Start::Xavier),
    ("He", Start::He(1.)),
];

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 12,
            title: "Gradients through deep stacks",
            version: 2,
            text: "Batch norm stops gradients from vanishing and exploding with depth.",
            varied: "5 to 50 hidden layers; sigmoid, tanh, ReLU; the norm: none, batch, layer",
            fixed: "layers of 32, Xavier weights, 128 digits, before the first step",
            rule: "for each activation: with batch norm, the gradient of the first hidden layer \
                at depth 50 is within a factor of 10 of that of the last, and closer to it than \
                without a norm",
            plot: Plot {
                metric: RATIO,
                y: "log10 of the ratio of first to last gradient",
                x: Some("hidden layers"),
                log_x: true,
                log_y: false,
            },
            runs: [180, 72],
            run: gradients,
            judge: |d| {
                let off = |activation: &str, norm: &str| {
                    d.at(RATIO, &format!("{activation}, {norm}"), 50.).abs()
                };
                let words = ACTIVATIONS.map(|(a, _)| {
                    let at = |norm| show(d.at(RATIO, &format!("{a}, {norm}"), 50.));
                    format!(
                        "{a}: {} without a norm, {} batch, {} layer",
                        at("none"),
                        at("batch"),
                        at("layer")
                    )
                });
                let parts = ACTIVATIONS
                    .map(|(a, _)| off(a, "batch") <= 1. && off(a, "batch") < off(a, "none"));
                Judgement::by(
                    "the activation",
                    &ACTIVATIONS.map(|(a, _)| a),
                    &parts,
                    format!(
                        "ratio of the gradients of first and last layer at depth 50, in powers of \
                         ten: {}",
                        words.join("; ")
                    ),
                )
            },
        },
        Claim {
            id: 23,
            title: "Initialization in place of a norm",
            version: 1,
            text: "Good initialization (Xavier, He) and normalization can replace each other.",
            varied: "4 or 16 hidden layers; weights of a fixed size, Xavier, He; the norm: none \
                or batch",
            fixed: "layers of 32 with ReLU, digits, 300 steps of SGD in batches of 64",
            rule: "a network counts as trained if its accuracy is 85 % or more; for each depth: \
                He without a norm trains, batch norm with weights of a fixed size trains, and \
                weights of that size without a norm do not",
            plot: Plot {
                metric: ACCURACY,
                y: "accuracy in percent",
                x: Some("hidden layers"),
                log_x: true,
                log_y: false,
            },
            runs: [120, 60],
            run: starts,
            judge: |d| {
                let of = |start: &str, norm: &str, depth| {
                    d.at(ACCURACY, &format!("{start}, {norm}"), depth)
                };
                let part = |depth| {
                    of("He", "none", depth) >= 85.
                        && of("fixed 0.05", "batch", depth) >= 85.
                        && of("fixed 0.05", "none", depth) < 85.
                };
                let words = [4., 16.].map(|depth| {
                    format!(
                        "at depth {depth}: {} % He alone, {} % batch norm alone, {} % neither, {} \
                         % both",
                        show(of("He", "none", depth)),
                        show(of("fixed 0.05", "batch", depth)),
                        show(of("fixed 0.05", "none", depth)),
                        show(of("He", "batch", depth))
                    )
                });
                Judgement::by(
                    "the depth",
                    &[4, 16],
                    &[part(4.), part(16.)],
                    words.join("; "),
                )
            },
        },
    ]
}

fn stack(depth: usize) -> Vec<usize> {
    let mut widths = vec![64];
    widths.extend(vec![32; depth]);
    widths
}

fn gradients(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, _) = Digits::load()?;
    let mut all = vec![];
    for (name, activation) in ACTIVATIONS {
        for norm in ["none", "batch", "layer"] {
            for depth in [5, 10, 20, 50] {
                all.extend(lab.seeded(&format!("{name}, {norm}"), |seed| {
                    let net = Net::started(Start::Xavier, seed, |vb| {
                        Mlp::new(norm, &stack(depth), 10, activation, vb)
                    })?;
                    let rows = Batches::new(train.labels.dim(0)?, seed).next(128)?;
                    let x = train.images.flatten_from(1)?.index_select(&rows, 0)?;
                    let logits = net.model.forward_t(&x, true)?;
                    let gradients = cross_entropy(&logits, &train.labels.index_select(&rows, 0)?)?
                        .backward()?;
                    let size = |layer: usize| -> Result<f64> {
                        let gradient = net.model.hidden[layer]
                            .weight()
                            .and_then(|w| gradients.get(w));
                        // Of an element: the first layer has more of them.
                        gradient.map_or(Ok(f64::NAN), |g| Ok(scalar(&g.sqr()?.mean_all()?)?.sqrt()))
                    };
                    // What vanished altogether still has a logarithm.
                    let ratio = (size(0)? / size(depth - 1)?).max(1e-30).log10();
                    Ok(vec![(RATIO, depth as f64, ratio)])
                })?);
            }
        }
    }
    Ok(all)
}

fn starts(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for (name, start) in STARTS {
        for norm in ["none", "batch"] {
            for depth in [4, 16] {
                all.extend(lab.tuned(
                    &format!("{name}, {norm}"),
                    &[0.01, 0.03, 0.1, 0.3, 1.],
                    &sets,
                    |sets, rate, seed| {
                        let net = Net::started(start, seed, |vb| {
                            Mlp::new(norm, &stack(depth), 10, Activation::Relu, vb)
                        })?;
                        let course = Course {
                            steps: lab.steps(300),
                            batch: 64,
                            every: lab.steps(300),
                            goal: 85.,
                            seed,
                        };
                        let learned =
                            course.run(&net.model, Optim::sgd(net.trainable(), rate)?, sets)?;
                        Ok(Trial::new(
                            learned.rank(),
                            vec![(ACCURACY, depth as f64, learned.accuracy)],
                        ))
                    },
                )?);
            }
        }
    }
    Ok(all)
}
