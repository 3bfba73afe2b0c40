//! Claims about targets and losses, on the prices of used cars: 1, 2, 3, 4, 18, 21.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ModuleT;
use candle_nn::loss::cross_entropy;
use candle_norm::NormConfig;
use candle_norm::scaling::{
    LossBalancer, LossBalancerOptions, MinMaxScaler, Scaler, StandardScaler,
};
use indicatif::ProgressBar;

use crate::cars::{Cars, Split};
use crate::claim::{Claim, Data, Judgement, Plot, mostly, show, spread};
use crate::common::Training;
use crate::lab::{Lab, Measure, Sets, Trial, median};
use crate::nets::{Activation, Mlp, Net};
use crate::policy;
use crate::training::{Batches, Optim, Prices, Regression, cars, flat_digits, r2, scalar};

const WIDTHS: [usize; 3] = [17, 32, 32];
const STEPS: &str = "steps to R² 0.9";

fn mlp(norm: &str, seed: u64) -> Result<Net<Mlp>> {
    Net::new(seed, |vb| Mlp::new(norm, &WIDTHS, 1, Activation::Relu, vb))
}

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 1,
            title: "Targets in dollars or normalized",
            version: 2,
            text: "Training on targets that are not normalized takes 37 % more iterations to \
                reach the same accuracy.",
            varied: "the target: the price in dollars, or its z-score",
            fixed: "a network with two hidden layers of 32, z-scored inputs, batches of 64, AdamW \
                without decay, initial weights and batches of each seed",
            rule: "confirmed if dollars take 1.2 to 1.6 times as many steps as z-scores; \
                otherwise not confirmed",
            plot: Plot {
                metric: STEPS,
                y: STEPS,
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [28, 14],
            run: raw_targets,
            judge: |d| {
                let ratio = d.median(STEPS, "dollars") / d.median(STEPS, "z-score");
                let figure = match ratio.is_finite() {
                    true => format!("{} times as many steps to R² 0.9", show(ratio)),
                    false => "dollars do not reach R² 0.9 in 1000 steps".to_string(),
                };
                Judgement::of(&[(1.2..=1.6).contains(&ratio)], "", figure)
            },
        },
        Claim {
            id: 2,
            title: "The range of a target and its gradient",
            version: 1,
            text: "A target range 10 times larger makes the output layer's gradient 10 times \
                larger.",
            varied: "a factor k on the target: z-scores times k, or the range from 0 to k",
            fixed: "the network of claim 1 at initialization, the loss (mean squared error) on \
                all training cars",
            rule: "for both kinds of target, and for k from 1 to 10 and from 10 to 100: the \
                gradient grows by a factor of 9 to 11",
            plot: Plot {
                metric: "gradient norm",
                y: "norm of the output layer's gradient",
                x: Some("k"),
                log_x: true,
                log_y: true,
            },
            runs: [10, 4],
            run: |lab| at_start(lab, |gradient, _| ("gradient norm", gradient)),
            judge: |d| growth(d, "gradient norm", 9. ..=11., vec![]),
        },
        Claim {
            id: 3,
            title: "The range of a target and its loss",
            version: 1,
            text: "The mean squared error grows with k²; car prices left in dollars start with a \
                loss of 1e8.",
            varied: "a factor k on the target, and the target in dollars",
            fixed: "as in claim 2",
            rule: "for both kinds of target, and for k from 1 to 10 and from 10 to 100: the loss \
                grows by a factor of 90 to 110; and the loss in dollars is within a factor of 10 \
                of 1e8",
            plot: Plot {
                metric: "loss",
                y: "first loss",
                x: Some("k"),
                log_x: true,
                log_y: true,
            },
            runs: [10, 4],
            run: |lab| {
                let mut all = at_start(lab, |_, loss| ("loss", loss))?;
                all.extend(in_dollars(lab)?);
                Ok(all)
            },
            judge: |d| {
                let dollars = d.median("loss in dollars", "dollars");
                let more = (
                    "dollars".to_string(),
                    (1e7..=1e9).contains(&dollars),
                    format!("the first loss in dollars is {}", show(dollars)),
                );
                growth(d, "loss", 90. ..=110., vec![more])
            },
        },
        Claim {
            id: 4,
            title: "Scaling per batch or once",
            version: 3,
            text: "An unnormalized network can end up predicting the same value for every sample; \
                normalizing each batch by itself makes training and inference disagree; \
                parameters fitted once on the training set fix both.",
            varied: "min-max scaling of inputs and targets: none, of each batch by itself, or \
                fitted to the training set",
            fixed: "the network of claim 1, 1000 steps; the test set is evaluated at once, and \
                one car at a time",
            rule: "three parts: without normalization, the standard deviation of the predictions \
                is below 0.1 of that of the prices (the spread); with normalization per batch, \
                the error for one car at a time is over 1.5 times the error at once; with fitted \
                parameters, the two errors agree within 1 % and the spread is above 0.5",
            plot: Plot {
                metric: "RMSE, one at a time",
                y: "RMSE in dollars, one car at a time",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [30, 15],
            run: fitted_or_not,
            judge: |d| {
                let m = |metric, variant| d.median(metric, variant);
                let (once, single, spread) = ("RMSE", "RMSE, one at a time", "spread");
                let disagreement = m(single, "per batch") / m(once, "per batch");
                let fitted = m(single, "fitted") / m(once, "fitted");
                let parts = [
                    m(spread, "none") < 0.1,
                    disagreement > 1.5,
                    (fitted - 1.).abs() < 0.01 && m(spread, "fitted") > 0.5,
                ];
                let figure = format!(
                    "spread of the predictions {} (none), {} (fitted); error for one car at a \
                     time relative to all at once ×{} per batch, ×{} fitted",
                    show(m(spread, "none")),
                    show(m(spread, "fitted")),
                    show(disagreement),
                    show(fitted)
                );
                Judgement::parts(
                    [
                        "the network predicts nearly one value without normalization",
                        "training and inference disagree with normalization per batch",
                        "training and inference agree with fitted parameters",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 18,
            title: "Weight norm",
            version: 2,
            text: "Weight norm is independent of the batch and speeds up regression, generative \
                and reinforcement models.",
            varied: "the norm: none, batch, weight; the task: car prices (z-scores), an \
                autoencoder of digits, pole balancing (without batch norm, because an episode has \
                few states)",
            fixed: "two hidden layers of 32 and an autoencoder 64-32-8-32-64, batches of 64, \
                AdamW without decay; for the pole, updates are counted in place of steps, and \
                policy, value network and training are those of the example `cartpole`, for 60 \
                updates",
            rule: "four parts: evaluated two at a time in training mode, the outputs with weight \
                norm are those in a batch within 1e-4; to R² 0.9 on prices, to an error of 0.05 \
                on digits, and to a pole that stays up for 400 of 500 steps, weight norm takes at \
                most 0.9 times as many steps as no norm, and fewer in at least four of five seeds",
            plot: Plot {
                metric: "steps, prices",
                y: STEPS,
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [160, 38],
            run: weight_norm,
            judge: |d| {
                let ratio = |metric| d.median(metric, "weight") / d.median(metric, "none");
                let tasks = ["steps, prices", "steps, digits", "steps, pole"];
                let ratios = tasks.map(ratio);
                let alone = d.median("difference from the batch", "weight");
                let fewer = tasks.map(|task| d.gains(task, "none", "weight"));
                let words = ["prices", "digits", "the pole"]
                    .iter()
                    .zip(ratios)
                    .zip(&fewer);
                let words = words.map(|((task, ratio), fewer)| {
                    format!(
                        "×{} on {task}, steps saved {}",
                        show(ratio),
                        spread(fewer, "")
                    )
                });
                let figure = format!(
                    "difference from the outputs in a batch {} (weight), {} (batch); steps with \
                     weight norm relative to no norm: {}",
                    show(alone),
                    show(d.median("difference from the batch", "batch")),
                    words.collect::<Vec<_>>().join("; ")
                );
                let faster = |i: usize| ratios[i] <= 0.9 && mostly(&fewer[i], |d| d > 0.);
                let parts = [alone < 1e-4, faster(0), faster(1), faster(2)];
                Judgement::parts(
                    [
                        "weight norm is independent of the batch",
                        "weight norm is faster on prices",
                        "weight norm is faster on digits",
                        "weight norm is faster on the pole",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 21,
            title: "Losses of several terms",
            version: 1,
            text: "In a loss of several terms, the largest term dominates unless each is \
                normalized.",
            varied: "the sum of the losses of price and mileage (in thousands) and of the make: \
                plain, or each divided by its running size",
            fixed: "a network with two hidden layers of 32 and three outputs, 10 z-scored inputs \
                that contain neither mileage nor make, 600 steps of AdamW",
            rule: "confirmed if scaling raises the accuracy of the make, the smallest term, in at \
                least four of five seeds; not confirmed if the median gain is not positive; \
                otherwise it depends on the seed",
            plot: Plot {
                metric: "make, %",
                y: "accuracy of the make, in percent",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [20, 10],
            run: several_terms,
            judge: |d| {
                let m = |metric, variant| d.median(metric, variant);
                let gain = d.gains("make, %", "divided by running size", "plain sum");
                let both = |metric| {
                    let [scaled, plain] = ["divided by running size", "plain sum"]
                        .map(|variant| show(m(metric, variant)));
                    format!("{scaled} versus {plain}")
                };
                let figure = format!(
                    "scaled versus plain sum: make {} %, {}; R² of price {}, of mileage {}",
                    both("make, %"),
                    spread(&gain, "points"),
                    both("price, R²"),
                    both("mileage, R²")
                );
                let parts = [median(&gain) > 0., mostly(&gain, |d| d > 0.)];
                Judgement::of(&parts, "the seed", figure)
            },
        },
    ]
}

/// Quantities that grow with the target, over both intervals of k and for both kinds of target; and
/// other parts of the rule, each with its name and its figure.
fn growth(
    d: &Data,
    metric: &str,
    wanted: std::ops::RangeInclusive<f64>,
    more: Vec<(String, bool, String)>,
) -> Judgement {
    let mut parts = vec![];
    for variant in ["z-score", "0 to k"] {
        for (from, to) in [(1., 10.), (10., 100.)] {
            let ratio = d.at(metric, variant, to) / d.at(metric, variant, from);
            let name = format!("{variant} from {from} to {to}");
            let figure = format!("{name}: ×{}", show(ratio));
            parts.push((name, wanted.contains(&ratio), figure));
        }
    }
    parts.extend(more);
    let labels: Vec<&String> = parts.iter().map(|(name, ..)| name).collect();
    let held: Vec<bool> = parts.iter().map(|(_, held, _)| *held).collect();
    let figures: Vec<&str> = parts.iter().map(|(.., figure)| figure.as_str()).collect();
    let on = "the size of the target";
    Judgement::by(on, &labels, &held, figures.join("; "))
}

fn raw_targets(lab: &Lab) -> Result<Vec<Measure>> {
    // Two or three to a power of ten, over more powers than the other experiments have: a step of
    // the rate must not decide.
    const RATES: [f64; 13] = [
        1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1., 2., 5., 10.,
    ];
    let sets = cars()?.map(Prices::new)?;
    let mut all = vec![];
    for variant in ["dollars", "z-score"] {
        all.extend(lab.tuned(variant, &RATES, &sets, |cars, rate, seed| {
            let net = mlp("none", seed)?;
            let y = match variant {
                "dollars" => &cars.dollars,
                _ => &cars.scores,
            };
            let course = Regression {
                x: [&cars.train, &cars.test],
                y: [&y[0], &y[1]],
                steps: lab.steps(1000),
                goal: 0.9,
                seed,
            };
            let (reached, end) = course.run(&net.model, Optim::adam(net.trainable(), rate)?)?;
            Ok(Trial::new(
                reached.min(1e6) + (1. - end).min(1e6),
                vec![(STEPS, 0., reached), ("R² at the end", 0., end)],
            ))
        })?);
    }
    Ok(all)
}

/// The norm of the output layer's gradient, and the loss.
fn gradient_and_loss(net: &Mlp, x: &Tensor, target: &Tensor) -> Result<(f64, f64)> {
    let loss = (net.forward_t(x, true)? - target)?.sqr()?.mean_all()?;
    let gradients = loss.backward()?;
    let mut square = 0.;
    let parts = [Some(net.head.weight()), net.head.bias()];
    for part in parts.into_iter().flatten() {
        if let Some(gradient) = gradients.get(part) {
            square += scalar(&gradient.sqr()?.sum_all()?)?;
        }
    }
    Ok((square.sqrt(), scalar(&loss)?))
}

/// One of the two, of networks that were never trained.
fn at_start(lab: &Lab, pick: fn(f64, f64) -> (&'static str, f64)) -> Result<Vec<Measure>> {
    let cars = Prices::new(&Split::load()?)?;
    let ranged = min_max(&cars.dollars[0])?.transform(&cars.dollars[0])?;
    let mut all = vec![];
    for (variant, target) in [("z-score", &cars.scores[0]), ("0 to k", &ranged)] {
        all.extend(lab.seeded(variant, |seed| {
            let net = mlp("none", seed)?;
            let mut readings = vec![];
            for k in [1., 10., 100.] {
                let (gradient, loss) = gradient_and_loss(&net.model, &cars.train, &(target * k)?)?;
                let (metric, value) = pick(gradient, loss);
                readings.push((metric, k, value));
            }
            Ok(readings)
        })?);
    }
    Ok(all)
}

fn in_dollars(lab: &Lab) -> Result<Vec<Measure>> {
    let cars = Prices::new(&Split::load()?)?;
    lab.seeded("dollars", |seed| {
        let net = mlp("none", seed)?;
        let (_, loss) = gradient_and_loss(&net.model, &cars.train, &cars.dollars[0])?;
        Ok(vec![("loss in dollars", 0., loss)])
    })
}

/// A scaler of inputs or targets to the range from 0 to 1, and back.
fn min_max(x: &Tensor) -> Result<MinMaxScaler> {
    let scaler = MinMaxScaler::default();
    scaler.fit(x)?;
    Ok(scaler)
}

fn fitted_or_not(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = cars()?;
    let mut all = vec![];
    for variant in ["none", "per batch", "fitted"] {
        let scaled = |x: &Tensor, fitted: &MinMaxScaler| match variant {
            "none" => Ok(x.clone()),
            "fitted" => fitted.transform(x),
            _ => min_max(x)?.transform(x),
        };
        let rates = [1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.];
        all.extend(lab.tuned(variant, &rates, &sets, |split, rate, seed| {
            let (train, test) = (&split.train, &split.test);
            let (inputs, prices) = (min_max(&train.inputs)?, min_max(&train.prices)?);
            let net = mlp("none", seed)?;
            let mut optimizer = Optim::adam(net.trainable(), rate)?;
            let mut batches = Batches::new(train.count(), seed);
            for _ in 0..lab.steps(1000) {
                let rows = batches.next(64)?;
                let x = scaled(&train.inputs.index_select(&rows, 0)?, &inputs)?;
                let y = scaled(&train.prices.index_select(&rows, 0)?, &prices)?;
                let loss = (net.model.forward_t(&x, true)? - y)?.sqr()?.mean_all()?;
                optimizer.step(&loss)?;
            }
            // Prices of a batch are not known when it is asked for: those of the training set bring
            // predictions back.
            let ask = |x: &Tensor| -> Result<Tensor> {
                let y = net.model.forward_t(&scaled(x, &inputs)?, false)?;
                if variant == "none" {
                    Ok(y)
                } else {
                    prices.inverse_transform(&y)
                }
            };
            let once = ask(&test.inputs)?;
            let singles = (0..test.count()).map(|i| ask(&test.inputs.narrow(0, i, 1)?));
            let single = Tensor::cat(&singles.collect::<Result<Vec<_>>>()?, 0)?;
            let rmse = |y: &Tensor| {
                Ok::<_, candle_core::Error>(scalar(&(y - &test.prices)?.sqr()?.mean_all()?)?.sqrt())
            };
            let std =
                |y: &Tensor| Ok::<_, candle_core::Error>(scalar(&y.flatten_all()?.var(0)?)?.sqrt());
            let spread = std(&single)? / std(&test.prices)?;
            let (once, single) = (rmse(&once)?, rmse(&single)?);
            Ok(Trial::new(
                once,
                vec![
                    ("RMSE", 0., once),
                    ("RMSE, one at a time", 0., single),
                    ("spread", 0., spread),
                ],
            ))
        })?);
    }
    Ok(all)
}

fn weight_norm(lab: &Lab) -> Result<Vec<Measure>> {
    let (sets, images) = (cars()?.map(Prices::new)?, flat_digits()?);
    let rates = [1e-3, 3e-3, 1e-2, 3e-2, 0.1];
    let mut all = vec![];
    for norm in ["none", "batch", "weight"] {
        all.extend(lab.tuned(norm, &rates, &sets, |cars, rate, seed| {
            let net = mlp(norm, seed)?;
            let y = [&cars.scores[0], &cars.scores[1]];
            let steps = lab.steps(600);
            let course = Regression {
                x: [&cars.train, &cars.test],
                y,
                steps,
                goal: 0.9,
                seed,
            };
            let (reached, end) = course.run(&net.model, Optim::adam(net.trainable(), rate)?)?;
            let batch = net.model.forward_t(&cars.test, true)?.narrow(0, 0, 2)?;
            let alone = net.model.forward_t(&cars.test.narrow(0, 0, 2)?, true)?;
            let apart = scalar(&(batch - alone)?.abs()?.max_all()?)?;
            let score = reached.min(1e6) + (1. - end).min(1e6);
            Ok(Trial::new(
                score,
                vec![
                    ("steps, prices", 0., reached),
                    ("difference from the batch", 0., apart),
                ],
            ))
        })?);
        all.extend(
            lab.tuned(norm, &rates, &images, |(train, test), rate, seed| {
                let widths = [64, 32, 8, 32];
                let net = Net::new(seed, |vb| Mlp::new(norm, &widths, 64, Activation::Tanh, vb))?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.images.dim(0)?, seed);
                let error =
                    |x: &Tensor, train| (net.model.forward_t(x, train)? - x)?.sqr()?.mean_all();
                let (mut reached, mut last) = (f64::INFINITY, f64::INFINITY);
                for step in 1..=lab.steps(600) {
                    let x = train.images.index_select(&batches.next(64)?, 0)?;
                    optimizer.step(&error(&x, true)?)?;
                    if step % 5 == 0 {
                        last = scalar(&error(&test.images, false)?)?;
                        if reached.is_infinite() && last <= 0.05 {
                            reached = step as f64;
                        }
                    }
                }
                Ok(Trial::new(
                    reached.min(1e6) + last.min(1e6),
                    vec![("steps, digits", 0., reached)],
                ))
            })?,
        );
        if norm != "batch" {
            all.extend(pole(lab, norm)?);
        }
    }
    Ok(all)
}

fn pole(lab: &Lab, norm: &str) -> Result<Vec<Measure>> {
    let config: NormConfig = norm.parse()?;
    // Games have no data to keep back: the seeds do it.
    let games = Sets {
        tuning: (),
        measured: (),
    };
    lab.tuned(norm, &[2e-3, 5e-3, 1e-2, 2e-2], &games, |(), rate, seed| {
        let training = Training {
            steps: lab.steps(60),
            learning_rate: rate,
            weight_decay: 0.,
            warm_up: 0,
        };
        let (stands, good) = policy::train(config, &training, seed, &ProgressBar::hidden())?;
        let good = good.map_or(f64::INFINITY, |update| update as f64);
        let score = good.min(1e6) + f64::from(policy::STEPS as f32 - stands) / 1e3;
        Ok(Trial::new(score, vec![("steps, pole", 0., good)]))
    })
}

/// The columns of what a car is: mileage is a target here, and the makes are.
const KNOWN: [usize; 10] = [1, 2, 3, 4, 5, 12, 13, 14, 15, 16];

/// Inputs, and the three targets: price and mileage in thousands, and the make.
struct Terms {
    x: Tensor,
    y: [Tensor; 3],
}

/// Those to train on, and those to test on.
fn terms(split: &Split) -> Result<[Terms; 2]> {
    let known = Tensor::new(&KNOWN.map(|i| i as u32), &Device::Cpu)?;
    let inputs = StandardScaler::default();
    inputs.fit(&split.train.inputs.index_select(&known, 1)?)?;
    let of = |cars: &Cars| -> Result<Terms> {
        Ok(Terms {
            x: inputs.transform(&cars.inputs.index_select(&known, 1)?)?,
            y: [
                (&cars.prices / 1000.)?,
                (cars.inputs.narrow(1, 0, 1)? / 1000.)?,
                cars.inputs.narrow(1, 6, 6)?.contiguous()?.argmax(1)?,
            ],
        })
    };
    Ok([of(&split.train)?, of(&split.test)?])
}

fn several_terms(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = cars()?.map(terms)?;
    let mut all = vec![];
    for variant in ["plain sum", "divided by running size"] {
        all.extend(lab.tuned(
            variant,
            &[1e-3, 3e-3, 1e-2, 3e-2, 0.1],
            &sets,
            |[train, test], rate, seed| {
                let net = Net::new(seed, |vb| {
                    Mlp::new("none", &[KNOWN.len(), 32, 32], 8, Activation::Relu, vb)
                })?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let balancer = LossBalancer::new(
                    ["price", "mileage", "make"],
                    LossBalancerOptions::default(),
                )?;
                let mut batches = Batches::new(train.x.dim(0)?, seed);
                for _ in 0..lab.steps(600) {
                    let rows = batches.next(64)?;
                    let y = net
                        .model
                        .forward_t(&train.x.index_select(&rows, 0)?, true)?;
                    let square = |i: usize| {
                        (y.narrow(1, i, 1)? - train.y[i].index_select(&rows, 0)?)?
                            .sqr()?
                            .mean_all()
                    };
                    let make =
                        cross_entropy(&y.narrow(1, 2, 6)?, &train.y[2].index_select(&rows, 0)?)?;
                    let terms = [square(0)?, square(1)?, make];
                    let loss = match variant {
                        "plain sum" => ((&terms[0] + &terms[1])? + &terms[2])?,
                        _ => balancer.balance(&terms)?,
                    };
                    optimizer.step(&loss)?;
                }
                let y = net.model.forward_t(&test.x, false)?;
                let right = y.narrow(1, 2, 6)?.contiguous()?.argmax(1)?.eq(&test.y[2])?;
                let make = 100. * scalar(&right.to_dtype(DType::F32)?.mean_all()?)?;
                let (price, mileage) = (
                    r2(&y.narrow(1, 0, 1)?, &test.y[0])?,
                    r2(&y.narrow(1, 1, 1)?, &test.y[1])?,
                );
                // The three tasks weigh the same in the choice of the rate, whichever way they are
                // summed.
                let score = -(price.max(-1.) + mileage.max(-1.) + make / 100.);
                Ok(Trial::new(
                    score,
                    vec![
                        ("make, %", 0., make),
                        ("price, R²", 0., price),
                        ("mileage, R²", 0., mileage),
                    ],
                ))
            },
        )?);
    }
    Ok(all)
}
