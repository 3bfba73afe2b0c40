//! Claims of the guide about half precision and eps, on digits: 32, 33, 34.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{ModuleT, VarBuilder};
use candle_norm::{BatchNorm, LayerNorm, NormConfig, batch_norm, layer_norm};

use crate::claim::{Claim, Judgement, Plot, mostly, place, show, spread};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Trial};
use crate::nets::{Net, Placed, Start};
use crate::training::{Batches, Course, DigitSets, Learned, Optim, flat_digits, scalar};

const ACCURACY: &str = "accuracy";
const MOVED: &str = "scales that changed, %";
const VANISHED: &str = "vanished, %";
const APART: &str = "largest change of an output";
const FIXED: &str = "two hidden layers of 64 with ReLU on 1297 digits, tested on 500 by other \
    writers, AdamW, 300 steps, batches of 64";

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 32,
            title: "Norms in bf16",
            version: 1,
            text: "Scales of norms in half precision stop changing.",
            varied: "the dtype of the parameters: all in bf16, those of layer norm in f32, all in \
                f32; the learning rate",
            fixed: FIXED,
            rule: "for each rate: in bf16, fewer than half of the scales differ from 1, their \
                initial value, in at least four of five seeds",
            plot: Plot {
                metric: MOVED,
                y: "scales that changed, in percent",
                x: Some("learning rate"),
                log_x: true,
                log_y: false,
            },
            runs: [60, 24],
            run: scales,
            judge: |d| {
                let moved = |rate| d.values_at(MOVED, "all in bf16", rate);
                let words = STEPS.map(|rate| {
                    let of = |metric, variant| show(d.at(metric, variant, rate));
                    format!(
                        "at {rate} {} % changed in bf16, {} % in f32, accuracy {} % in bf16, {} % \
                         with norms in f32, {} % in f32",
                        of(MOVED, "all in bf16"),
                        of(MOVED, "norms in f32"),
                        of(ACCURACY, "all in bf16"),
                        of(ACCURACY, "norms in f32"),
                        of(ACCURACY, "all in f32")
                    )
                });
                let parts = STEPS.map(|rate| mostly(moved(rate), |v| v < 50.));
                Judgement::by("the rate", &STEPS, &parts, words.join("; "))
            },
        },
        Claim {
            id: 33,
            title: "Scaling the loss in f16",
            version: 1,
            text: "In f16, small gradients vanish unless the loss is scaled up.",
            varied: "the factor on the loss, by which gradients are divided in f32 before the step",
            fixed: "the network of claim 32, computed in f16 with weights and norms in f32; the \
                elements of the gradient of the first layer that are zero, out of those that are \
                not zero in f32, after 300 steps",
            rule: "three parts, in at least four of five seeds each: without a factor, 5 % of the \
                elements or more vanish; with a factor of 1024, at most half as many; with this \
                factor, the accuracy is higher than without",
            plot: Plot {
                metric: VANISHED,
                y: "elements that vanished, in percent",
                x: Some("factor on the loss"),
                log_x: true,
                log_y: false,
            },
            runs: [72, 20],
            run: loss_scale,
            judge: |d| {
                let share = |factor| d.values_at(VANISHED, ARM_F16, factor);
                let gain = d.gains_at(ACCURACY, (ARM_F16, 1024.), (ARM_F16, 1.));
                let fewer = d.gains_at(VANISHED, (ARM_F16, 1.), (ARM_F16, 1024.));
                let halved: Vec<f64> = fewer.iter().zip(share(1.)).map(|(d, v)| d / v).collect();
                let words = FACTORS.map(|factor| {
                    format!(
                        "{} % at {}",
                        show(d.at(VANISHED, ARM_F16, factor)),
                        place(factor)
                    )
                });
                let figure = format!(
                    "elements that vanished: {}; accuracy {} % at 1, {} % at 1024, {}, {} % at \
                     65536, {} % in f32",
                    words.join(", "),
                    show(d.at(ACCURACY, ARM_F16, 1.)),
                    show(d.at(ACCURACY, ARM_F16, 1024.)),
                    spread(&gain, "points"),
                    show(d.at(ACCURACY, ARM_F16, 65536.)),
                    show(d.median(ACCURACY, "f32"))
                );
                let parts = [
                    mostly(share(1.), |v| v >= 5.),
                    mostly(share(1.), |v| v >= 5.) && mostly(&halved, |share| share >= 0.5),
                    mostly(&gain, |d| d > 0.),
                ];
                Judgement::parts(
                    [
                        "gradients vanish without a factor",
                        "a factor of 1024 halves the number of elements that vanish",
                        "that factor raises the accuracy",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 34,
            title: "Another eps",
            version: 1,
            text: "The eps of another framework changes the outputs.",
            varied: "the eps at inference of a network that was trained with 1e-5; batch norm, \
                layer norm, batch norm also on the pixels, some of which are always 0",
            fixed: "two hidden layers of 64 with ReLU on 1297 digits, tested on 500 by other \
                writers, AdamW at 0.003, 300 steps, batches of 64",
            rule: "for each network: with 1e-3, the default of Keras, some output changes by 0.01 \
                or more in at least four of five seeds",
            plot: Plot {
                metric: APART,
                y: APART,
                x: Some("eps"),
                log_x: true,
                log_y: true,
            },
            runs: [15, 6],
            run: other_eps,
            judge: |d| {
                let words = NORMS.map(|variant| {
                    let lost = d.gains_at(ACCURACY, (variant, 1e-5), (variant, 1e-3));
                    format!(
                        "{variant}: {} at 1e-12, {} at 1e-6, {} at 1e-3, {} at 0.1; accuracy lost \
                         at 1e-3 {}",
                        show(d.at(APART, variant, 1e-12)),
                        show(d.at(APART, variant, 1e-6)),
                        show(d.at(APART, variant, 1e-3)),
                        show(d.at(APART, variant, 0.1)),
                        spread(&lost, "points")
                    )
                });
                let parts =
                    NORMS.map(|variant| mostly(d.values_at(APART, variant, 1e-3), |v| v >= 0.01));
                Judgement::of(&parts, "the network", words.join("; "))
            },
        },
    ]
}

fn layered(dtype: DType, norms: DType, seed: u64) -> Result<Net<Placed<LayerNorm>>> {
    Net::typed(dtype, Start::He(1.), seed, |vb| {
        Placed::new(true, |vb| layer_norm(64, 1e-5, vb.set_dtype(norms)), vb)
    })
}

fn scales(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, test) = flat_digits()?.measured;
    let mut all = vec![];
    for (variant, dtype, norms) in [
        ("all in bf16", DType::BF16, DType::BF16),
        ("norms in f32", DType::BF16, DType::F32),
        ("all in f32", DType::F32, DType::F32),
    ] {
        for rate in STEPS {
            all.extend(lab.seeded(variant, |seed| {
                let net = layered(dtype, norms, seed)?;
                let mut optimizer = Optim::adam(net.trainable(), rate)?;
                let mut batches = Batches::new(train.labels.dim(0)?, seed);
                let logits = |images: &Tensor, train| {
                    let y = net.model.forward_t(&images.to_dtype(dtype)?, train)?;
                    y.to_dtype(DType::F32)
                };
                for _ in 0..lab.steps(300) {
                    let batch = batches.of(&train, 64)?;
                    let loss = cross_entropy(&logits(&batch.images, true)?, &batch.labels)?;
                    optimizer.step(&loss)?;
                }
                let (mut moved, mut count) = (0., 0.);
                for (_, norm) in &net.model.hidden {
                    let scale = norm.weight();
                    moved += scalar(&scale.ne(1f64)?.to_dtype(DType::F32)?.sum_all()?)?;
                    count += scale.elem_count() as f64;
                }
                let right = test.accuracy(&logits(&test.images, false)?)?;
                Ok(vec![
                    (MOVED, rate, 100. * moved / count),
                    (ACCURACY, rate, f64::from(right)),
                ])
            })?);
        }
    }
    Ok(all)
}

/// Learning rates.
const STEPS: [f64; 4] = [3e-4, 1e-3, 3e-3, 1e-2];
const FACTORS: [f64; 5] = [1., 32., 1024., 8192., 65536.];
const ARM_F16: &str = "f16";

/// The logits in f32, computed in `dtype` from the parameters of `net`, which are in f32.
fn logits_in(dtype: DType, net: &Placed<LayerNorm>, images: &Tensor) -> Result<Tensor> {
    let apply = |x: &Tensor, layer: &candle_nn::Linear| {
        let Some(bias) = layer.bias() else {
            bail!("expected a bias")
        };
        let y = x.matmul(&layer.weight().to_dtype(dtype)?.t()?)?;
        y.broadcast_add(&bias.to_dtype(dtype)?)
    };
    let mut x = images.to_dtype(dtype)?;
    for (layer, norm) in &net.hidden {
        x = norm.forward_t(&apply(&x, layer)?, true)?.relu()?;
    }
    apply(&x, &net.head)?.to_dtype(DType::F32)
}

/// The gradient of the loss, multiplied on its way and divided at its end.
fn gradient(
    dtype: DType,
    factor: f64,
    net: &Net<Placed<LayerNorm>>,
    batch: &Digits,
) -> Result<GradStore> {
    let logits = logits_in(dtype, &net.model, &batch.images)?;
    let mut gradients = (cross_entropy(&logits, &batch.labels)? * factor)?.backward()?;
    for var in net.trainable() {
        if let Some(gradient) = gradients.get(&var) {
            let divided = (gradient / factor)?;
            gradients.insert(&var, divided);
        }
    }
    Ok(gradients)
}

/// The share of the elements of the first layer's gradient that are zero, of those which are not in
/// f32.
fn vanished(factor: f64, net: &Net<Placed<LayerNorm>>, batch: &Digits) -> Result<f64> {
    let first: &Tensor = net.model.hidden[0].0.weight();
    let of = |dtype, factor| -> Result<Tensor> {
        match gradient(dtype, factor, net, batch)?.get(first) {
            Some(gradient) => gradient.ne(0f64)?.to_dtype(DType::F32),
            None => bail!("expected a gradient"),
        }
    };
    let there = of(DType::F32, 1.)?;
    let kept = (&there * of(DType::F16, factor)?)?;
    Ok(100. * (1. - scalar(&kept.sum_all()?)? / scalar(&there.sum_all()?)?))
}

fn trained_in(
    lab: &Lab,
    dtype: DType,
    factor: f64,
    (train, test): &DigitSets,
    (rate, seed): (f64, u64),
) -> Result<Trial> {
    let net = layered(DType::F32, DType::F32, seed)?;
    let mut optimizer = Optim::adam(net.trainable(), rate)?;
    let mut batches = Batches::new(train.labels.dim(0)?, seed);
    for _ in 0..lab.steps(300) {
        optimizer.follow(&gradient(dtype, factor, &net, &batches.of(train, 64)?)?)?;
    }
    let learned = Learned::of(&logits_in(dtype, &net.model, &test.images)?, test)?;
    let mut readings = vec![(ACCURACY, factor, learned.accuracy)];
    if dtype == DType::F16 {
        readings.push((
            VANISHED,
            factor,
            vanished(factor, &net, &batches.of(train, 64)?)?,
        ));
    }
    Ok(Trial::new(learned.rank(), readings))
}

fn loss_scale(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let rates = [1e-3, 3e-3, 1e-2];
    let mut all = lab.tuned("f32", &rates, &sets, |sets, rate, seed| {
        trained_in(lab, DType::F32, 1., sets, (rate, seed))
    })?;
    for factor in FACTORS {
        all.extend(lab.tuned(ARM_F16, &rates, &sets, |sets, rate, seed| {
            trained_in(lab, DType::F16, factor, sets, (rate, seed))
        })?);
    }
    Ok(all)
}

const NORMS: [&str; 3] = ["batch", "layer", "batch, also on the pixels"];

/// A network whose norms are all of one kind; one of them may be on its input.
struct OnPixels {
    first: Option<BatchNorm>,
    rest: Placed<Box<dyn candle_norm::Norm>>,
}

impl OnPixels {
    fn new(variant: &str, eps: f64, vb: VarBuilder) -> Result<Self> {
        let norm = match variant {
            "layer" => NormConfig::Layer(eps.into()),
            _ => NormConfig::Batch(eps.into()),
        };
        Ok(Self {
            first: match variant {
                "batch, also on the pixels" => Some(batch_norm(64, eps, vb.pp("pixels_norm"))?),
                _ => None,
            },
            rest: Placed::new(true, |vb| norm.features(64, vb), vb)?,
        })
    }
}

impl ModuleT for OnPixels {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match &self.first {
            Some(norm) => self.rest.forward_t(&norm.forward_t(x, train)?, train),
            None => self.rest.forward_t(x, train),
        }
    }
}

fn other_eps(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?.measured;
    let mut all = vec![];
    for variant in NORMS {
        all.extend(lab.seeded(variant, |seed| {
            let net = Net::new(seed, |vb| OnPixels::new(variant, 1e-5, vb))?;
            let course = Course {
                steps: lab.steps(300),
                batch: 64,
                every: lab.steps(300),
                goal: 100.,
                seed,
            };
            course.run(&net.model, Optim::adam(net.trainable(), 3e-3)?, &sets)?;
            let test = &sets.1;
            let own = net.model.forward_t(&test.images, false)?;
            let mut readings = vec![];
            for eps in [1e-12, 1e-6, 1e-5, 1e-3, 1e-2, 0.1] {
                let vb = VarBuilder::from_varmap(&net.vars, DType::F32, &Device::Cpu);
                let logits = OnPixels::new(variant, eps, vb)?.forward_t(&test.images, false)?;
                let apart = scalar(&(&logits - &own)?.abs()?.max_all()?)?;
                readings.push((APART, eps, apart.max(1e-9)));
                readings.push((ACCURACY, eps, f64::from(test.accuracy(&logits)?)));
            }
            Ok(readings)
        })?);
    }
    Ok(all)
}
