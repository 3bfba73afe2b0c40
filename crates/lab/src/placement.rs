//! Claims of the guide about the place of a norm in a network, on digits: 29, 30, 38, 39, 40.

use candle_core::{Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{Linear, Module, ModuleT, VarBuilder, linear};
use candle_norm::{BatchNorm, Norm, NormConfig, batch_norm};

use crate::claim::{Claim, Judgement, Plot, mostly, place, show, spread};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Trial};
use crate::nets::{Activation, Mlp, Net, Placed};
use crate::practice::{ACCURACY, OF_VARIANTS, RATES};
use crate::small_sets::masked;
use crate::statistics::recomputed;
use crate::training::{Batches, Course, Learned, Optim, flat_digits, scalar};

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 29,
            title: "Before or after the activation",
            version: 1,
            text: "A norm belongs between a layer and its activation.",
            varied: "the norm before or after ReLU; batch and layer norm; the learning rate",
            fixed: "two hidden layers of 64 on 1297 digits, tested on 500 by other writers, \
                AdamW, 300 steps, batches of 64",
            rule: "for each norm and rate: with the norm before the activation, the accuracy is \
                higher in at least four of five seeds",
            plot: Plot {
                x: Some("learning rate"),
                log_x: true,
                ..OF_VARIANTS
            },
            runs: [80, 32],
            run: before_or_after,
            judge: |d| {
                let variant = |norm, place| format!("{norm}, {place} ReLU");
                let gain = |norm, rate| {
                    let [before, after] = ["before", "after"].map(|place| variant(norm, place));
                    d.gains_at(ACCURACY, (&before, rate), (&after, rate))
                };
                let (mut labels, mut parts, mut words) = (vec![], vec![], vec![]);
                for norm in ["batch", "layer"] {
                    for rate in RATES {
                        let of = |place| show(d.at(ACCURACY, &variant(norm, place), rate));
                        let gain = gain(norm, rate);
                        words.push(format!(
                            "{norm} at {rate}: {} % before, {} % after, {}",
                            of("before"),
                            of("after"),
                            spread(&gain, "points")
                        ));
                        labels.push(format!("{norm} at {rate}"));
                        parts.push(mostly(&gain, |d| d > 0.));
                    }
                }
                Judgement::by("norm and rate", &labels, &parts, words.join("; "))
            },
        },
        Claim {
            id: 30,
            title: "Folding across an activation",
            version: 1,
            text: "A norm can be folded into the layer before it only if nothing is between the \
                two.",
            varied: "batch norm directly after each linear layer, or after the ReLU that follows \
                it; folded into the layer in both cases",
            fixed: "two hidden layers of 64 on 1297 digits, tested on 500 by other writers, AdamW \
                at 0.01, 300 steps, batches of 64",
            rule: "two parts, in at least four of five seeds each: directly after the layer, no \
                output changes by more than 1e-3; after ReLU, folding costs 5 points of accuracy \
                or more",
            plot: Plot {
                metric: "points lost by folding",
                y: "points of accuracy lost by folding",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [10, 4],
            run: folded,
            judge: |d| {
                let moved = |variant| show(d.median("largest change of an output", variant));
                let lost = |variant| show(d.median("points lost by folding", variant));
                let figure = format!(
                    "outputs change by {} directly after the layer, by {} after ReLU, where {} \
                     points are lost",
                    moved("directly after"),
                    moved("after ReLU"),
                    lost("after ReLU")
                );
                let parts = [
                    mostly(
                        d.values("largest change of an output", "directly after"),
                        |d| d <= 1e-3,
                    ),
                    mostly(d.values("points lost by folding", "after ReLU"), |d| {
                        d >= 5.
                    }),
                ];
                Judgement::parts(
                    [
                        "folding directly after the layer changes nothing",
                        "folding across ReLU costs accuracy",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 38,
            title: "Pre-norm, post-norm and warm-up",
            version: 1,
            text: "A norm after the residual sum needs a warm-up of the learning rate; a norm at \
                the start of the branch does not.",
            varied: "layer norm at the start of each branch (pre), after each sum (post), or \
                none; a warm-up of 100 steps; the learning rate",
            fixed: "12 residual branches of two linear layers, 64 wide, on 1297 digits, tested on \
                500 by other writers, AdamW, 300 steps, batches of 64",
            rule: "a network counts as trained if its accuracy is 80 % or more. Two parts: the \
                largest rate at which it trains is higher with pre than with post; with a \
                warm-up, post trains at a higher rate than without, and pre does not",
            plot: Plot {
                x: Some("learning rate"),
                log_x: true,
                ..OF_VARIANTS
            },
            runs: [150, 36],
            run: residual,
            judge: |d| {
                let largest = |variant| {
                    let trained = d
                        .along(ACCURACY, variant)
                        .into_iter()
                        .filter(|(_, a)| *a >= 80.);
                    trained.map(|(rate, _)| rate).fold(0., f64::max)
                };
                let [pre, pre_warm, post, post_warm, none] =
                    ["pre", "pre, warm-up", "post", "post, warm-up", "none"].map(largest);
                let figure = format!(
                    "the largest rate at which the network trains: {} pre, {} with a warm-up; {} \
                     post, {} with a warm-up; {} without a norm",
                    place(pre),
                    place(pre_warm),
                    place(post),
                    place(post_warm),
                    place(none)
                );
                Judgement::parts(
                    [
                        "pre-norm trains at higher rates",
                        "only post-norm gains from a warm-up",
                    ],
                    [pre > post, post_warm > post && pre_warm <= pre],
                    figure,
                )
            },
        },
        Claim {
            id: 39,
            title: "Dropout before batch norm",
            version: 1,
            text: "Batch norm after dropout learns a variance that inference does not have.",
            varied: "dropout (half of the values) directly before each batch norm, or after the \
                activation that follows it; running statistics as training left them, or \
                recomputed without dropout",
            fixed: "two hidden layers of 64 on 1297 digits, tested on 500 by other writers, \
                AdamW, 300 steps, batches of 64",
            rule: "two parts, in at least four of five seeds each: with dropout before the norm, \
                the accuracy is lower than with dropout after the activation; statistics \
                recomputed without dropout raise it",
            plot: OF_VARIANTS,
            runs: [51, 12],
            run: dropout,
            judge: |d| {
                let of = |variant| show(d.median(ACCURACY, variant));
                let gains = [
                    d.gains(ACCURACY, "after the activation", "before the norm"),
                    d.gains(ACCURACY, "before the norm, recomputed", "before the norm"),
                ];
                let figure = format!(
                    "{} % with dropout before the norm, {} % after the activation, {}; {} % \
                     before the norm with recomputed statistics, {}",
                    of("before the norm"),
                    of("after the activation"),
                    spread(&gains[0], "points"),
                    of("before the norm, recomputed"),
                    spread(&gains[1], "points")
                );
                Judgement::parts(
                    [
                        "dropout before the norm costs accuracy",
                        "recomputed statistics recover some of it",
                    ],
                    gains.map(|g| mostly(&g, |d| d > 0.)),
                    figure,
                )
            },
        },
        Claim {
            id: 40,
            title: "Gradients that a norm removes",
            version: 2,
            text: "What a norm removes gets no gradient: a bias before batch norm, and the input \
                of a norm under a plain sum.",
            varied: "the norm after a linear layer of 64 with a bias",
            fixed: "128 digits, before the first step; the gradient of the bias relative to that \
                of the weight; the gradient of the input of the norm under the sum of its \
                outputs, relative to that under a weighted sum",
            rule: "two parts: the gradient of the bias before batch norm, whose mean is over \
                samples, is at most 1e-5 of that of the weight; under a plain sum the gradient of \
                the input of batch, layer and group norm is at most 1e-3 of that under a weighted \
                one",
            plot: Plot {
                metric: "input under a plain sum",
                y: "gradient of the input, plain relative to weighted sum",
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [20, 8],
            run: nothing_left,
            judge: |d| {
                let most = |metric, norms: &[&str]| {
                    let medians = norms.iter().map(|norm| d.median(metric, norm));
                    medians.fold(0., f64::max)
                };
                let bias = most("bias relative to weight", &["batch"]);
                let input = most("input under a plain sum", &["batch", "layer", "group:8"]);
                let figure = format!(
                    "the gradient of the bias relative to that of the weight is {} before batch \
                     norm, {} before layer norm, {} before group norm, {} before RMS norm; the \
                     gradient of the input under a plain sum relative to that under a weighted \
                     sum is at most {} with batch, layer and group norm, {} with RMS norm",
                    show(bias),
                    show(most("bias relative to weight", &["layer"])),
                    show(most("bias relative to weight", &["group:8"])),
                    show(most("bias relative to weight", &["rms"])),
                    show(input),
                    show(most("input under a plain sum", &["rms"]))
                );
                Judgement::parts(
                    [
                        "a bias before batch norm gets no gradient",
                        "the input under a plain sum gets no gradient",
                    ],
                    [bias <= 1e-5, input <= 1e-3],
                    figure,
                )
            },
        },
    ]
}

fn course(lab: &Lab, seed: u64) -> Course {
    Course {
        steps: lab.steps(300),
        batch: 64,
        every: lab.steps(300),
        goal: 90.,
        seed,
    }
}

fn before_or_after(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?.measured;
    let mut all = vec![];
    for name in ["batch", "layer"] {
        let norm: NormConfig = name.parse()?;
        for (place, before) in [("before", true), ("after", false)] {
            for rate in RATES {
                all.extend(lab.seeded(&format!("{name}, {place} ReLU"), |seed| {
                    let net = Net::new(seed, |vb| {
                        Placed::new(before, |vb| norm.features(64, vb), vb)
                    })?;
                    let optimizer = Optim::adam(net.trainable(), rate)?;
                    let learned = course(lab, seed).run(&net.model, optimizer, &sets)?;
                    Ok(vec![(ACCURACY, rate, learned.accuracy)])
                })?);
            }
        }
    }
    Ok(all)
}

/// The logits of `net` with each norm folded into the layer before it, wherever it stands.
fn logits_folded(net: &Placed<BatchNorm>, x: &Tensor) -> Result<Tensor> {
    let mut x = x.clone();
    for (layer, norm) in &net.hidden {
        x = norm.fold_into(layer)?.forward(&x)?.relu()?;
    }
    net.head.forward(&x)
}

fn folded(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?.measured;
    let mut all = vec![];
    for (variant, direct) in [("directly after", true), ("after ReLU", false)] {
        all.extend(lab.seeded(variant, |seed| {
            let net = Net::new(seed, |vb| {
                Placed::new(direct, |vb| batch_norm(64, 1e-5, vb), vb)
            })?;
            let optimizer = Optim::adam(net.trainable(), 0.01)?;
            let learned = course(lab, seed).run(&net.model, optimizer, &sets)?;
            let test = &sets.1;
            let logits = net.model.forward_t(&test.images, false)?;
            let folded = logits_folded(&net.model, &test.images)?;
            let moved = scalar(&(&logits - &folded)?.abs()?.max_all()?)?;
            let lost = learned.accuracy - f64::from(test.accuracy(&folded)?);
            Ok(vec![
                ("points lost by folding", 0., lost),
                ("largest change of an output", 0., moved),
            ])
        })?);
    }
    Ok(all)
}

#[derive(Clone, Copy, PartialEq)]
enum Branches {
    Pre,
    Post,
    Plain,
}

/// Residual branches of two linear layers.
struct Residual {
    embed: Linear,
    branches: Vec<(Linear, Linear, Box<dyn Norm>)>,
    last: Box<dyn Norm>,
    head: Linear,
    kind: Branches,
}

const WIDTH: usize = 64;
const BRANCHES: usize = 12;

impl Residual {
    fn new(kind: Branches, vb: VarBuilder) -> Result<Self> {
        let norm: NormConfig = if kind == Branches::Plain {
            "none"
        } else {
            "layer"
        }
        .parse()?;
        let branch = |i| {
            let vb = vb.pp(format!("branch{i:02}"));
            Ok((
                linear(WIDTH, WIDTH, vb.pp("up"))?,
                linear(WIDTH, WIDTH, vb.pp("down"))?,
                norm.features(WIDTH, vb.pp("norm"))?,
            ))
        };
        // Behind each sum there is one already.
        let last = if kind == Branches::Pre {
            norm
        } else {
            NormConfig::None
        };
        Ok(Self {
            embed: linear(64, WIDTH, vb.pp("embed"))?,
            branches: (0..BRANCHES).map(branch).collect::<Result<_>>()?,
            last: last.features(WIDTH, vb.pp("last_norm"))?,
            head: linear(WIDTH, 10, vb.pp("head"))?,
            kind,
        })
    }
}

impl ModuleT for Residual {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let mut x = self.embed.forward(x)?;
        for (up, down, norm) in &self.branches {
            let branch = |x: &Tensor| down.forward(&up.forward(x)?.relu()?);
            x = match self.kind {
                Branches::Pre => (&x + branch(&norm.forward_t(&x, train)?)?)?,
                _ => norm.forward_t(&(&x + branch(&x)?)?, train)?,
            };
        }
        self.head.forward(&self.last.forward_t(&x, train)?)
    }
}

fn residual(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, test) = flat_digits()?.measured;
    let mut all = vec![];
    for (variant, kind, warm_up) in [
        ("pre", Branches::Pre, 0),
        ("pre, warm-up", Branches::Pre, 100),
        ("post", Branches::Post, 0),
        ("post, warm-up", Branches::Post, 100),
        ("none", Branches::Plain, 0),
    ] {
        for rate in [1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3] {
            if lab.quick && [1e-3, 1e-2, 0.1].contains(&rate) {
                continue;
            }
            all.extend(lab.seeded(variant, |seed| {
                let net = Net::new(seed, |vb| Residual::new(kind, vb))?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.labels.dim(0)?, seed);
                let warm_up = lab.steps(warm_up);
                for step in 1..=lab.steps(300) {
                    let warm = (step as f64 / warm_up.max(1) as f64).min(1.);
                    optimizer.set_rate(rate * warm);
                    let batch = batches.of(&train, 64)?;
                    let logits = net.model.forward_t(&batch.images, true)?;
                    optimizer.step(&cross_entropy(&logits, &batch.labels)?)?;
                }
                let right = test.accuracy(&net.model.forward_t(&test.images, false)?)?;
                Ok(vec![(ACCURACY, rate, f64::from(right))])
            })?);
        }
    }
    Ok(all)
}

/// Batch norm in two hidden layers, with dropout before it or after the activation.
struct Dropped {
    net: Mlp,
    before: bool,
    /// Of the masks: candle's own dropout cannot be seeded.
    seed: u64,
}

impl Dropped {
    /// The step tells masks apart; without one nothing is dropped.
    fn forward(&self, x: &Tensor, step: Option<usize>, train: bool) -> Result<Tensor> {
        let dropped = |x: Tensor, layer: usize| match step {
            Some(step) => masked(&x, 0.5, self.seed, 2 * step + layer),
            None => Ok(x),
        };
        let mut x = x.clone();
        for (i, layer) in self.net.hidden.iter().enumerate() {
            let Some(weight) = layer.weight() else {
                bail!("expected a linear layer")
            };
            x = x.matmul(&weight.t()?)?;
            if self.before {
                x = dropped(x, i)?;
            }
            x = layer.norm().forward_t(&x, train)?.relu()?;
            if !self.before {
                x = dropped(x, i)?;
            }
        }
        self.net.head.forward(&x)
    }
}

fn dropout(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for variant in [
        "after the activation",
        "before the norm",
        "before the norm, recomputed",
    ] {
        all.extend(
            lab.tuned(variant, &RATES, &sets, |(train, test), rate, seed| {
                let net = Net::new(seed, |vb| {
                    Ok(Dropped {
                        net: Mlp::new("batch", &[64, 64, 64], 10, Activation::Relu, vb)?,
                        before: variant != "after the activation",
                        seed,
                    })
                })?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.labels.dim(0)?, seed);
                for step in 0..lab.steps(300) {
                    let batch = batches.of(train, 64)?;
                    let logits = net.model.forward(&batch.images, Some(step), true)?;
                    optimizer.step(&cross_entropy(&logits, &batch.labels)?)?;
                }
                if variant == "before the norm, recomputed" {
                    recomputed(&net.model.net, train, |x| net.model.forward(x, None, true))?;
                }
                let learned = Learned::of(&net.model.forward(&test.images, None, false)?, test)?;
                let reading = (ACCURACY, 0., learned.accuracy);
                Ok(Trial::new(learned.rank(), vec![reading]))
            })?,
        );
    }
    Ok(all)
}

/// A linear layer with a bias, and a norm.
struct Biased {
    layer: Linear,
    norm: Box<dyn Norm>,
    head: Linear,
}

fn nothing_left(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, _): (Digits, Digits) = flat_digits()?.measured;
    let mut all = vec![];
    for norm in ["batch", "layer", "group:8", "rms"] {
        all.extend(lab.seeded(norm, |seed| {
            let net = Net::new(seed, |vb| {
                Ok(Biased {
                    layer: linear(64, 64, vb.pp("layer"))?,
                    norm: norm.parse::<NormConfig>()?.features(64, vb.pp("norm"))?,
                    head: linear(64, 10, vb.pp("head"))?,
                })
            })?;
            let batch = Batches::new(train.labels.dim(0)?, seed).of(&train, 128)?;
            let Biased { layer, norm, head } = &net.model;
            // Zeros to have the gradient of the norm's input: candle keeps only those of variables.
            let zeros =
                candle_core::Var::zeros((128, 64), batch.images.dtype(), batch.images.device())?;
            let normed =
                norm.forward_t(&(layer.forward(&batch.images)? + zeros.as_tensor())?, true)?;
            let loss = cross_entropy(&head.forward(&normed.relu()?)?, &batch.labels)?;
            let length = |loss: &Tensor, of: &Tensor| -> Result<f64> {
                match loss.backward()?.get(of) {
                    Some(gradient) => Ok(scalar(&gradient.sqr()?.sum_all()?)?.sqrt()),
                    None => Ok(0.),
                }
            };
            let Some(bias) = layer.bias() else {
                bail!("expected a bias")
            };
            // Other weights than ones, and not the same for all rows, which a sum over a batch
            // would take for ones.
            let weights = Tensor::arange(0f32, 128. * 64., batch.images.device())?;
            let weights = weights.sin()?.reshape((128, 64))?;
            let weighted = (&normed * weights)?.sum_all()?;
            let plain = length(&normed.sum_all()?, &zeros)? / length(&weighted, &zeros)?;
            Ok(vec![
                ("input under a plain sum", 0., plain.max(1e-12)),
                (
                    "bias relative to weight",
                    0.,
                    length(&loss, bias)? / length(&loss, layer.weight())?,
                ),
            ])
        })?);
    }
    Ok(all)
}
