//! Claims of the guide about training, on digits: 25, 26, 27, 31.

use candle_core::backprop::GradStore;
use candle_core::{Result, Var};
use candle_nn::ModuleT;
use candle_nn::loss::cross_entropy;
use candle_norm::{BatchNormOptions, NormConfig, param_groups};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Reading, Trial};
use crate::nets::{Activation, Mlp, Net, Placed};
use crate::training::{Batches, Course, DigitSets, Learned, Optim, flat_digits, scalar};

const FIXED: &str = "two hidden layers of 64 with the norm (batch norm where none is named) and \
    ReLU on 1297 digits, tested on 500 by other writers, AdamW, 300 steps of 64 digits (of 32 \
    where they are divided into parts)";
pub(crate) const ACCURACY: &str = "accuracy";
pub(crate) const RATES: [f64; 4] = [1e-3, 3e-3, 1e-2, 3e-2];
pub(crate) const STEPS: usize = 300;

/// Accuracy in percent, a variant on each line.
pub(crate) const OF_VARIANTS: Plot = Plot {
    metric: ACCURACY,
    y: "test accuracy in percent",
    x: None,
    log_x: false,
    log_y: false,
};

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 25,
            title: "Weight decay on norms",
            version: 1,
            text: "Weight decay on the scales and shifts of norms costs accuracy.",
            varied: "decoupled decay on all parameters, or on the weights alone; the size of the \
                decay",
            fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on \
                500 by other writers, AdamW at 0.003, 300 steps, batches of 64",
            rule: "for each decay: with decay on the weights alone, the accuracy is higher in at \
                least four of five seeds",
            plot: Plot {
                x: Some("decay"),
                log_x: true,
                ..OF_VARIANTS
            },
            runs: [40, 16],
            run: decay,
            judge: |d| {
                let gain = |decay| {
                    d.gains_at(
                        ACCURACY,
                        ("weights alone", decay),
                        ("all parameters", decay),
                    )
                };
                let words = DECAYS.map(|decay| {
                    let scale = |variant| show(d.at("mean size of a scale", variant, decay));
                    format!(
                        "at {decay} {}, mean scale {} (decay on all) and {} (weights alone)",
                        spread(&gain(decay), "points"),
                        scale("all parameters"),
                        scale("weights alone")
                    )
                });
                let parts = DECAYS.map(|decay| mostly(&gain(decay), |d| d > 0.));
                let figure = format!(
                    "accuracy gained without decay on norms: {}",
                    words.join("; ")
                );
                Judgement::by("the decay", &DECAYS, &parts, figure)
            },
        },
        Claim {
            id: 26,
            title: "Running statistics in hand-written updates",
            version: 1,
            text: "A hand-written update of all variables of a model spoils its running \
                statistics.",
            varied: "the hand-written update after every step: a decay of 1 %, or clipping of \
                each variable to a norm of 4; of all variables, or of the trainable ones",
            fixed: FIXED,
            rule: "two parts, decay and clipping: with all variables, the accuracy is lower by 1 \
                point or more in at least four of five seeds",
            plot: OF_VARIANTS,
            runs: [68, 16],
            run: by_hand,
            judge: |d| {
                let loss = |update: &str| {
                    d.gains(
                        ACCURACY,
                        &format!("{update}, trainable"),
                        &format!("{update}, all"),
                    )
                };
                let losses = ["decay", "clipping"].map(loss);
                let count = |variant| show(d.median("elements", variant));
                let figure = format!(
                    "accuracy lost with all variables: {} (decay), {} (clipping); {} elements in \
                     all variables, {} in the trainable ones",
                    spread(&losses[0], "points"),
                    spread(&losses[1], "points"),
                    count("decay, all"),
                    count("decay, trainable")
                );
                Judgement::parts(
                    [
                        "decay of all variables costs accuracy",
                        "clipping all variables costs accuracy",
                    ],
                    losses.map(|l| mostly(&l, |d| d >= 1.)),
                    figure,
                )
            },
        },
        Claim {
            id: 27,
            title: "A batch of one",
            version: 1,
            text: "One batch with one value per channel ruins a BatchNorm that does not refuse it.",
            varied: "the last batch of an epoch, which has one digit: kept (BatchNorm of \
                candle-nn; LayerNorm), or left out",
            fixed: "two hidden layers of 64 with ReLU on 1297 digits, tested on 500 by other \
                writers, AdamW, batches of 16, two epochs",
            rule: "two parts: with the batch of one, the accuracy of candle-nn's BatchNorm is \
                below 20 % in at least four of five seeds; without that batch, or with LayerNorm, \
                it is above 80 % in at least four",
            plot: OF_VARIANTS,
            runs: [51, 12],
            run: batch_of_one,
            judge: |d| {
                let variants = ["candle-nn, kept", "left out", "LayerNorm, kept"];
                let values = variants.map(|variant| d.values(ACCURACY, variant));
                let figure = format!(
                    "{} % with the batch of one in candle-nn, {} % without it, {} % with \
                     LayerNorm; this crate refused {} batches of an epoch",
                    show(d.median(ACCURACY, variants[0])),
                    show(d.median(ACCURACY, variants[1])),
                    show(d.median(ACCURACY, variants[2])),
                    show(d.median("batches refused", "left out"))
                );
                let ruined = mostly(values[0], |a| a < 20.);
                let fine = values[1..].iter().all(|v| mostly(v, |a| a > 80.));
                Judgement::parts(
                    [
                        "candle-nn's BatchNorm is ruined",
                        "leaving the batch out, or LayerNorm, avoids it",
                    ],
                    [ruined, fine],
                    figure,
                )
            },
        },
        Claim {
            id: 31,
            title: "Accumulated gradients",
            version: 1,
            text: "Gradients accumulated over small batches are those of one large batch only if \
                the norm does not depend on the batch.",
            varied: "the number of parts that a batch of 32 is divided into; the norm",
            fixed: FIXED,
            rule: "two parts: for every size of parts, the accumulated gradient differs from that \
                of the whole batch by a tenth of its norm or more with batch norm, and by at most \
                1e-5 with group and layer norm; trained in parts of 2, batch norm loses accuracy \
                compared with batches of 32 in at least four of five seeds",
            plot: Plot {
                metric: "difference of gradients",
                y: "difference relative to the norm of the gradient",
                x: Some("digits in a part"),
                log_x: true,
                log_y: true,
            },
            runs: [122, 38],
            run: accumulated,
            judge: |d| {
                let apart = |norm| d.along("difference of gradients", norm);
                let least = |norm| apart(norm).iter().map(|(_, v)| *v).fold(f64::MAX, f64::min);
                let most = |norm| apart(norm).iter().map(|(_, v)| *v).fold(0., f64::max);
                let others = most("group:8").max(most("layer"));
                let loss = |norm| d.gains_at(ACCURACY, (norm, 32.), (norm, 2.));
                let figure = format!(
                    "the accumulated gradient differs by {} to {} of its norm with batch norm, by \
                     at most {} with group and layer norm; accuracy lost by training in parts of \
                     2 instead of 32 at once: {} with batch norm, {} with group norm, {} with \
                     layer norm",
                    show(least("batch")),
                    show(most("batch")),
                    show(others),
                    spread(&loss("batch"), "points"),
                    spread(&loss("group:8"), "points"),
                    spread(&loss("layer"), "points")
                );
                let parts = [
                    least("batch") >= 0.1 && others <= 1e-5,
                    mostly(&loss("batch"), |d| d > 0.),
                ];
                Judgement::parts(
                    [
                        "gradients differ with batch norm and with no other",
                        "training in parts of 2 costs batch norm accuracy",
                    ],
                    parts,
                    figure,
                )
            },
        },
    ]
}

/// Two hidden layers on rows of 64 pixels.
pub(crate) fn mlp(norm: NormConfig, seed: u64) -> Result<Net<Mlp>> {
    Net::new(seed, |vb| {
        Mlp::with(norm, &[64, 64, 64], 10, Activation::Relu, vb)
    })
}

pub(crate) fn batch_norm() -> NormConfig {
    NormConfig::Batch(BatchNormOptions::default())
}

/// Training in batches of `batch`.
pub(crate) fn learn(
    net: &Net<Mlp>,
    optimizer: Optim,
    (steps, batch): (usize, usize),
    sets: &DigitSets,
    seed: u64,
) -> Result<Learned> {
    let course = Course {
        steps,
        batch,
        every: steps,
        goal: 100.,
        seed,
    };
    course.run(&net.model, optimizer, sets)
}

pub(crate) fn evaluated(net: &impl ModuleT, test: &Digits) -> Result<Learned> {
    Learned::of(&net.forward_t(&test.images, false)?, test)
}

const DECAYS: [f64; 4] = [0.01, 0.1, 1., 3.];

fn decay(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["all parameters", "weights alone"] {
        for decay in DECAYS {
            all.extend(lab.seeded(variant, |seed| {
                let net = mlp(batch_norm(), seed)?;
                let groups = param_groups(&net.vars);
                let of_norms = if variant == "all parameters" {
                    decay
                } else {
                    0.
                };
                let groups = [(groups.decay, decay), (groups.no_decay, of_norms)];
                let optimizer = Optim::adam_with(groups, 3e-3)?;
                let learned = learn(&net, optimizer, (lab.steps(STEPS), 64), &sets, seed)?;
                let mut sizes = vec![];
                for (name, var) in net.vars.data().lock().expect("no thread panicked").iter() {
                    // The weights of linear layers have two axes.
                    if name.ends_with("weight") && var.rank() == 1 {
                        sizes.push(scalar(&var.abs()?.mean_all()?)?);
                    }
                }
                let size = sizes.iter().sum::<f64>() / sizes.len() as f64;
                Ok(vec![
                    (ACCURACY, decay, learned.accuracy),
                    ("mean size of a scale", decay, size),
                ])
            })?);
        }
    }
    Ok(all)
}

fn by_hand(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for update in ["decay", "clipping"] {
        for over in ["all", "trainable"] {
            let variant = format!("{update}, {over}");
            all.extend(
                lab.tuned(&variant, &RATES, &sets, |(train, test), rate, seed| {
                    let net = mlp(batch_norm(), seed)?;
                    let mut vars = match over {
                        "all" => net.vars.all_vars(),
                        _ => net.trainable(),
                    };
                    // candle panics on the square of an integer, such as the count of batches.
                    vars.retain(|var| var.dtype().is_float());
                    let mut optimizer = Optim::adam(net.trainable(), rate)?;
                    let mut batches = Batches::new(train.labels.dim(0)?, seed);
                    for _ in 0..lab.steps(STEPS) {
                        let batch = batches.of(train, 64)?;
                        let logits = net.model.forward_t(&batch.images, true)?;
                        optimizer.step(&cross_entropy(&logits, &batch.labels)?)?;
                        for var in &vars {
                            let length = scalar(&var.sqr()?.sum_all()?)?.sqrt();
                            let factor = match update {
                                "decay" => 0.99,
                                _ => (4. / length).min(1.),
                            };
                            var.set(&(var.as_tensor() * factor)?.detach())?;
                        }
                    }
                    let learned = evaluated(&net.model, test)?;
                    let counted = vars.iter().map(|v| v.elem_count()).sum::<usize>();
                    let readings = vec![
                        (ACCURACY, 0., learned.accuracy),
                        ("elements", 0., counted as f64),
                    ];
                    Ok(Trial::new(learned.rank(), readings))
                })?,
            );
        }
    }
    Ok(all)
}

/// Two epochs in batches of 16, the last of them with what is left; a batch that is refused is left
/// out. How many were, and the accuracy.
fn two_epochs(
    net: &impl ModuleT,
    mut optimizer: Optim,
    (train, test): &DigitSets,
    seed: u64,
) -> Result<(f64, Learned)> {
    let rows = train.labels.dim(0)?;
    let mut refused = 0;
    for epoch in 0..2 {
        let order = Batches::new(rows, 2 * seed + epoch).next(rows)?;
        for start in (0..rows).step_by(16) {
            let batch = order.narrow(0, start, 16.min(rows - start))?;
            let images = train.images.index_select(&batch, 0)?;
            let Ok(logits) = net.forward_t(&images, true) else {
                refused += 1;
                continue;
            };
            let labels = train.labels.index_select(&batch, 0)?;
            optimizer.step(&cross_entropy(&logits, &labels)?)?;
        }
    }
    Ok((f64::from(refused), evaluated(net, test)?))
}

fn batch_of_one(lab: &Lab) -> Result<Vec<Measure>> {
    // As many digits to tune on as leave one over too.
    let mut sets = flat_digits()?;
    sets.tuning.0 = sets.tuning.0.select(&(0..993).collect::<Vec<_>>())?;
    let mut all = vec![];
    for variant in ["candle-nn, kept", "left out", "LayerNorm, kept"] {
        all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
            let (refused, learned) = match variant {
                "candle-nn, kept" => {
                    let net = Net::new(seed, |vb| {
                        Placed::new(true, |vb| candle_nn::batch_norm(64, 1e-5, vb), vb)
                    })?;
                    let optimizer = Optim::adam(net.trainable(), rate)?;
                    two_epochs(&net.model, optimizer, sets, seed)?
                }
                _ => {
                    let norm = if variant == "left out" {
                        "batch"
                    } else {
                        "layer"
                    };
                    let net = mlp(norm.parse()?, seed)?;
                    let optimizer = Optim::adam(net.trainable(), rate)?;
                    two_epochs(&net.model, optimizer, sets, seed)?
                }
            };
            let readings = vec![
                (ACCURACY, 0., learned.accuracy),
                ("batches refused", 0., refused / 2.),
            ];
            Ok(Trial::new(learned.rank(), readings))
        })?);
    }
    Ok(all)
}

/// The mean gradient of `batch`, in parts of `size`.
fn gradient(net: &Net<Mlp>, batch: &Digits, size: usize) -> Result<GradStore> {
    let rows = batch.labels.dim(0)?;
    let loss = |start| {
        let logits = net
            .model
            .forward_t(&batch.images.narrow(0, start, size)?, true)?;
        cross_entropy(&logits, &batch.labels.narrow(0, start, size)?)? * (size as f64 / rows as f64)
    };
    let mut total = loss(0)?.backward()?;
    for start in (size..rows).step_by(size) {
        let part = loss(start)?.backward()?;
        for var in net.trainable() {
            if let (Some(sum), Some(more)) = (total.get(&var), part.get(&var)) {
                let sum = (sum + more)?;
                total.insert(&var, sum);
            }
        }
    }
    Ok(total)
}

/// The length of the difference of two gradients by that of the second.
fn difference(vars: &[Var], a: &GradStore, b: &GradStore) -> Result<f64> {
    let (mut apart, mut length) = (0., 0.);
    for var in vars {
        if let (Some(a), Some(b)) = (a.get(var), b.get(var)) {
            apart += scalar(&(a - b)?.sqr()?.sum_all()?)?;
            length += scalar(&b.sqr()?.sum_all()?)?;
        }
    }
    Ok((apart / length).sqrt())
}

fn accumulated(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for norm in ["batch", "group:8", "layer", "none"] {
        all.extend(lab.seeded(norm, |seed| {
            let train = &sets.measured.0;
            let net = mlp(norm.parse()?, seed)?;
            let batch = Batches::new(train.labels.dim(0)?, seed).of(train, 32)?;
            let whole = gradient(&net, &batch, 32)?;
            let apart = |size: usize| {
                let parts = gradient(&net, &batch, size)?;
                let apart = difference(&net.trainable(), &parts, &whole)?;
                // A difference of nothing has no place on a logarithmic axis.
                Ok(("difference of gradients", size as f64, apart.max(1e-9)))
            };
            [2, 4, 8, 16]
                .into_iter()
                .map(apart)
                .collect::<Result<Vec<Reading>>>()
        })?);
    }
    for norm in ["batch", "group:8", "layer"] {
        for size in [2, 32] {
            all.extend(lab.tuned(norm, &RATES, &sets, |(train, test), rate, seed| {
                let net = mlp(norm.parse()?, seed)?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.labels.dim(0)?, seed);
                for _ in 0..lab.steps(STEPS) {
                    optimizer.follow(&gradient(&net, &batches.of(train, 32)?, size)?)?;
                }
                let learned = evaluated(&net.model, test)?;
                let reading = (ACCURACY, size as f64, learned.accuracy);
                Ok(Trial::new(learned.rank(), vec![reading]))
            })?);
        }
    }
    Ok(all)
}
