//! Claims about norms in a convolutional network, on handwritten digits: 10, 11, 14, 16, 19.

use candle_core::Result;
use candle_nn::ModuleT;

use crate::claim::{Claim, Data, Judgement, Plot, mostly, place, show, spread, steps};
use crate::lab::{Lab, Measure, Trial, median};
use crate::nets::{Cnn, Net, Start};
use crate::training::{Course, DigitSets, Learned, Optim, digits};

const FIXED: &str = "three convolutions of 8, 16 and 16 channels and a linear head, trained on \
    1297 digits and tested on 500 by other writers, SGD without momentum, initial weights and \
    batches of each seed";
const ACCURACY: &str = "accuracy";
const RATES: [f64; 5] = [0.03, 0.1, 0.3, 1., 3.];

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 10,
            title: "Speed of batch norm, and learning rates",
            version: 1,
            text: "Batch norm converges faster and tolerates higher learning rates.",
            varied: "the norm; the learning rate",
            fixed: FIXED,
            rule: "two parts, compared with no norm: at the tuned rate, batch norm takes fewer \
                steps to 95 %; of the rates 0.03, 0.1, … 10, the largest that leads to an \
                accuracy of 80 % or more is higher",
            plot: Plot {
                metric: "accuracy by rate",
                y: "accuracy after 200 steps, in percent",
                x: Some("learning rate"),
                log_x: true,
                log_y: false,
            },
            runs: [210, 72],
            run: rates,
            judge: |d| {
                let to_goal = |norm| d.median("steps to 95 %", norm);
                let largest = |norm: &str| {
                    let trained = d
                        .along("accuracy by rate", norm)
                        .into_iter()
                        .filter(|(_, a)| *a >= 80.);
                    trained.map(|(rate, _)| rate).fold(0., f64::max)
                };
                let figure = format!(
                    "steps to 95 %: {} (batch), {} (none), {} (group), {} (layer); largest rate \
                     that trains: {}, {}, {}, {}",
                    steps(to_goal("batch")),
                    steps(to_goal("none")),
                    steps(to_goal("group:4")),
                    steps(to_goal("layer")),
                    place(largest("batch")),
                    place(largest("none")),
                    place(largest("group:4")),
                    place(largest("layer"))
                );
                Judgement::parts(
                    [
                        "batch norm needs fewer steps",
                        "a higher learning rate works",
                    ],
                    [
                        to_goal("batch") < to_goal("none"),
                        largest("batch") > largest("none"),
                    ],
                    figure,
                )
            },
        },
        Claim {
            id: 11,
            title: "Initialization with and without norms",
            version: 1,
            text: "Batch norm makes training less sensitive to initialization.",
            varied: "a factor of 0.01 to 10 on the He-normal weights; the norm",
            fixed: FIXED,
            rule: "confirmed if the accuracy after 200 steps, at a rate tuned for each factor, \
                varies across the factors at most half as much as without a norm; otherwise not \
                confirmed",
            plot: Plot {
                metric: ACCURACY,
                y: "accuracy after 200 steps, in percent",
                x: Some("factor on the weights"),
                log_x: true,
                log_y: false,
            },
            runs: [120, 60],
            run: scales,
            judge: |d| {
                let range = |norm| {
                    let medians: Vec<f64> = d
                        .along(ACCURACY, norm)
                        .into_iter()
                        .map(|(_, a)| a)
                        .collect();
                    medians.iter().copied().fold(0., f64::max)
                        - medians.iter().copied().fold(100., f64::min)
                };
                let [none, batch, layer] = ["none", "batch", "layer"].map(range);
                let figure = format!(
                    "the accuracy varies by {} points (none), {} (batch), {} (layer)",
                    show(none),
                    show(batch),
                    show(layer)
                );
                Judgement::of(&[batch <= none / 2.], "", figure)
            },
        },
        Claim {
            id: 14,
            title: "Small batches",
            version: 1,
            text: "Batch norm suffers at small batches, where group and layer norm do not.",
            varied: "the batch size, for the same number of images; the norm",
            fixed: FIXED,
            rule: "two parts: from batches of 32 to batches of 2, batch norm loses accuracy in at \
                least four of five seeds, 2 points or more in the median; in at least four of \
                five it loses more than group norm, and more than layer norm",
            plot: Plot {
                metric: ACCURACY,
                y: "accuracy after 5120 images, in percent",
                x: Some("batch size"),
                log_x: true,
                log_y: false,
            },
            runs: [150, 45],
            run: batches,
            judge: |d| {
                let loss = |norm| d.gains_at(ACCURACY, (norm, 32.), (norm, 2.));
                let [batch, layer, group] = ["batch", "layer", "group:4"].map(loss);
                let figure = format!(
                    "accuracy lost from batches of 32 to batches of 2: batch {}, layer {}, group \
                     {}",
                    spread(&batch, "points"),
                    spread(&layer, "points"),
                    spread(&group, "points")
                );
                let more = |other: &[f64]| {
                    let pairs = batch.iter().zip(other);
                    mostly(&pairs.map(|(a, b)| a - b).collect::<Vec<_>>(), |d| d > 0.)
                };
                let parts = [
                    mostly(&batch, |d| d > 0.) && median(&batch) >= 2.,
                    more(&group) && more(&layer),
                ];
                Judgement::parts(
                    [
                        "batch norm loses accuracy at batches of 2",
                        "batch norm loses more than group and layer norm at batches of 2",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 16,
            title: "Contrast and brightness under instance norm",
            version: 1,
            text: "Instance norm removes style (contrast, brightness).",
            varied: "the norm; the contrast (halved) and the brightness (raised by 0.3) of test \
                images",
            fixed: FIXED,
            rule: "two parts, contrast and brightness: batch norm loses more than a point of \
                accuracy, and instance norm at most half as much",
            plot: Plot {
                metric: "points lost",
                y: "points of accuracy lost",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [40, 20],
            run: style,
            judge: |d| {
                let lost = |metric, norm| d.median("as they are", norm) - d.median(metric, norm);
                let both = |metric| (lost(metric, "instance"), lost(metric, "batch"));
                let (contrast, brightness) = (both("half the contrast"), both("more brightness"));
                let figure = format!(
                    "points of accuracy lost by instance and batch norm: {} and {} at half the \
                     contrast, {} and {} at more brightness",
                    show(contrast.0),
                    show(contrast.1),
                    show(brightness.0),
                    show(brightness.1)
                );
                let holds = |(instance, batch): (f64, f64)| batch > 1. && instance <= batch / 2.;
                Judgement::of(
                    &[holds(contrast), holds(brightness)],
                    "the kind of shift",
                    figure,
                )
            },
        },
        Claim {
            id: 19,
            title: "Batch and layer norm combined",
            version: 1,
            text: "Batch norm and layer norm can be combined to advantage.",
            varied: "the norm: batch, layer, instance, or all three with learned mixing weights \
                (switchable)",
            fixed: FIXED,
            rule: "confirmed if switchable norm is more accurate than batch norm and than layer \
                norm in at least four of five seeds; not confirmed if its median gain over the \
                better of them is not positive; otherwise it depends on the seed",
            plot: Plot {
                metric: ACCURACY,
                y: "accuracy after 200 steps, in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [40, 20],
            run: combined,
            judge: |d: &Data| {
                let of = |norm| show(d.median(ACCURACY, norm));
                let gains = ["batch", "layer"].map(|norm| d.gains(ACCURACY, "switch", norm));
                let figure = format!(
                    "{} % switchable, {} % batch, {} % layer, {} % instance; switchable compared \
                     with batch {}, compared with layer {}",
                    of("switch"),
                    of("batch"),
                    of("layer"),
                    of("instance"),
                    spread(&gains[0], "points"),
                    spread(&gains[1], "points")
                );
                let above = gains.iter().all(|g| median(g) > 0.);
                let mostly_above = gains.iter().all(|g| mostly(g, |d| d > 0.));
                Judgement::of(&[above, mostly_above], "the seed", figure)
            },
        },
    ]
}

struct Arm<'a> {
    norm: &'a str,
    factor: f64,
    batch: usize,
    steps: usize,
}

impl Arm<'_> {
    /// After `every` so many steps the test digits are evaluated.
    fn train_looking(
        &self,
        every: usize,
        sets: &DigitSets,
        rate: f64,
        seed: u64,
    ) -> Result<(Net<Cnn>, Learned)> {
        let net = Net::started(Start::He(self.factor), seed, |vb| Cnn::new(self.norm, vb))?;
        let course = Course {
            steps: self.steps,
            batch: self.batch,
            every,
            goal: 95.,
            seed,
        };
        let learned = course.run(&net.model, Optim::sgd(net.trainable(), rate)?, sets)?;
        Ok((net, learned))
    }

    fn train(&self, sets: &DigitSets, rate: f64, seed: u64) -> Result<(Net<Cnn>, Learned)> {
        self.train_looking(self.steps, sets, rate, seed)
    }
}

fn rates(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = digits()?;
    let mut all = vec![];
    for norm in ["none", "batch", "layer", "group:4", "instance", "weight"] {
        if lab.quick && ["instance", "weight"].contains(&norm) {
            continue;
        }
        let variant = Arm {
            norm,
            factor: 1.,
            batch: 64,
            steps: lab.steps(200),
        };
        all.extend(lab.tuned(norm, &RATES, &sets, |sets, rate, seed| {
            let (_, learned) = variant.train_looking(10, sets, rate, seed)?;
            Ok(Trial::new(
                learned.score(variant.steps),
                vec![("steps to 95 %", 0., learned.reached)],
            ))
        })?);
        for rate in [0.03, 0.1, 0.3, 1., 3., 10.] {
            if lab.quick && [0.1, 1.].contains(&rate) {
                continue;
            }
            all.extend(lab.seeded(norm, |seed| {
                let (_, learned) = variant.train(&sets.measured, rate, seed)?;
                Ok(vec![("accuracy by rate", rate, learned.accuracy)])
            })?);
        }
    }
    Ok(all)
}

fn scales(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = digits()?;
    let mut all = vec![];
    for norm in ["none", "batch", "layer"] {
        for factor in [0.01, 0.1, 1., 10.] {
            let variant = Arm {
                norm,
                factor,
                batch: 64,
                steps: lab.steps(200),
            };
            all.extend(lab.tuned(norm, &RATES, &sets, |sets, rate, seed| {
                let (_, learned) = variant.train(sets, rate, seed)?;
                Ok(Trial::new(
                    learned.rank(),
                    vec![(ACCURACY, factor, learned.accuracy)],
                ))
            })?);
        }
    }
    Ok(all)
}

fn batches(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = digits()?;
    let mut all = vec![];
    for norm in ["batch", "layer", "group:4"] {
        for batch in [2, 4, 8, 32, 128] {
            if lab.quick && ![2, 32].contains(&batch) {
                continue;
            }
            let variant = Arm {
                norm,
                factor: 1.,
                batch,
                steps: lab.steps(5120 / batch),
            };
            all.extend(lab.tuned(norm, &RATES, &sets, |sets, rate, seed| {
                let (_, learned) = variant.train(sets, rate, seed)?;
                Ok(Trial::new(
                    learned.rank(),
                    vec![(ACCURACY, batch as f64, learned.accuracy)],
                ))
            })?);
        }
    }
    Ok(all)
}

fn style(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = digits()?;
    let mut all = vec![];
    for norm in ["none", "batch", "layer", "instance"] {
        let variant = Arm {
            norm,
            factor: 1.,
            batch: 64,
            steps: lab.steps(200),
        };
        all.extend(lab.tuned(norm, &RATES, &sets, |sets, rate, seed| {
            let (net, learned) = variant.train(sets, rate, seed)?;
            let on = |images: &candle_core::Tensor| -> Result<f64> {
                Ok(f64::from(
                    sets.1.accuracy(&net.model.forward_t(images, false)?)?,
                ))
            };
            let contrast = on(&(&sets.1.images * 0.5)?)?;
            let brightness = on(&(&sets.1.images + 0.3)?)?;
            let both = on(&((&sets.1.images * 0.5)? + 0.3)?)?;
            let readings = vec![
                ("points lost", 0., learned.accuracy - both),
                ("as they are", 0., learned.accuracy),
                ("half the contrast", 0., contrast),
                ("more brightness", 0., brightness),
            ];
            Ok(Trial::new(learned.rank(), readings))
        })?);
    }
    Ok(all)
}

fn combined(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = digits()?;
    let mut all = vec![];
    for norm in ["batch", "layer", "instance", "switch"] {
        let variant = Arm {
            norm,
            factor: 1.,
            batch: 64,
            steps: lab.steps(200),
        };
        all.extend(lab.tuned(norm, &RATES, &sets, |sets, rate, seed| {
            let (_, learned) = variant.train_looking(10, sets, rate, seed)?;
            let readings = vec![
                (ACCURACY, 0., learned.accuracy),
                ("steps to 95 %", 0., learned.reached),
            ];
            Ok(Trial::new(learned.rank(), readings))
        })?);
    }
    Ok(all)
}
