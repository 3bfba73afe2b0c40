//! Claims of the guide about running statistics, on digits: 28, 35, 36, 37.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ModuleT;
use candle_nn::loss::cross_entropy;
use candle_norm::{BatchNormOptions, NormConfig, recalibrate};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::common::Digits;
use crate::lab::{Lab, Measure, Trial};
use crate::nets::Mlp;
use crate::practice::{ACCURACY, OF_VARIANTS, RATES, STEPS, batch_norm, evaluated, learn, mlp};
use crate::training::{Batches, Optim, flat_digits};

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 28,
            title: "Inference in training mode",
            version: 2,
            text: "Inference in training mode makes a prediction depend on its batch, and changes \
                the running statistics.",
            varied: "how many of 480 digits are evaluated at once; the mode; whether 500 digits \
                of another brightness (0.3 more) were validated in training mode before",
            fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on \
                500 by other writers, AdamW, 300 steps, batches of 64",
            rule: "three parts: evaluated two at a time in training mode, the accuracy is lower \
                by 5 points or more than in inference in at least four of five seeds; in \
                inference it is the same for every number; after the validation it is lower in \
                inference in at least four",
            plot: Plot {
                x: Some("digits evaluated at once"),
                log_x: true,
                ..OF_VARIANTS
            },
            runs: [51, 12],
            run: modes,
            judge: |d| {
                let lost = d.gains_at(ACCURACY, ("inference", 2.), ("training mode", 2.));
                let moved = d.gains_at(ACCURACY, ("inference", 2.), ("inference, validated", 2.));
                let evaluated = d.along(ACCURACY, "inference");
                let alike = evaluated.iter().all(|(_, a)| *a == evaluated[0].1);
                let words: Vec<String> = d
                    .along(ACCURACY, "training mode")
                    .iter()
                    .map(|(n, a)| format!("{} % at {n}", show(*a)))
                    .collect();
                let figure = format!(
                    "in training mode {}; {} % in inference, for every number; {} % in inference \
                     after 500 brighter digits were validated in training mode",
                    words.join(", "),
                    show(d.at(ACCURACY, "inference", 2.)),
                    show(d.at(ACCURACY, "inference, validated", 2.))
                );
                let parts = [
                    mostly(&lost, |d| d >= 5.),
                    !evaluated.is_empty() && alike,
                    mostly(&moved, |d| d > 0.),
                ];
                Judgement::parts(
                    [
                        "training mode is worse two at a time",
                        "inference does not depend on the number",
                        "validating in training mode spoils inference",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 35,
            title: "Momentum by the opposite convention",
            version: 1,
            text: "A momentum by the opposite convention makes the running statistics those of \
                the last batch.",
            varied: "the momentum, the weight of the new batch: 0.01 to 0.99; the batch size; the \
                average of all batches (`None`)",
            fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on \
                500 by other writers, AdamW, 300 steps",
            rule: "for each batch size: with 0.99, the accuracy in inference is lower than with \
                0.1 in at least four of five seeds",
            plot: Plot {
                x: Some("momentum"),
                log_x: false,
                ..OF_VARIANTS
            },
            runs: [204, 48],
            run: momenta,
            judge: |d| {
                let loss = |variant: &str| d.gains_at(ACCURACY, (variant, 0.1), (variant, 0.99));
                let words = SIZES.map(|(variant, _)| {
                    let at = |m| show(d.at(ACCURACY, variant, m));
                    format!(
                        "{variant}: {} % at 0.01, {} % at 0.1, {} % at 0.9, {} % at 0.99, {} % \
                         with the average of all",
                        at(0.01),
                        at(0.1),
                        at(0.9),
                        at(0.99),
                        show(d.median("accuracy, average of all", variant))
                    )
                });
                let parts = SIZES.map(|(variant, _)| mostly(&loss(variant), |d| d > 0.));
                Judgement::by(
                    "the size",
                    &SIZES.map(|(variant, _)| variant),
                    &parts,
                    words.join("; "),
                )
            },
        },
        Claim {
            id: 36,
            title: "Statistics of averaged weights",
            version: 1,
            text: "Averaged weights need running statistics of their own.",
            varied: "the weights: the last ones, or the average of the second half of training; \
                the statistics: as training left them, or recomputed (`recalibrate`)",
            fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on \
                500 by other writers, AdamW at 0.03, 400 steps, batches of 64",
            rule: "confirmed if averaged weights are more accurate with recomputed statistics \
                than with the old ones in at least four of five seeds; otherwise not confirmed",
            plot: OF_VARIANTS,
            runs: [15, 6],
            run: averages,
            judge: |d| {
                let of = |variant| show(d.median(ACCURACY, variant));
                let gain = d.gains(ACCURACY, "averaged, recomputed", "averaged");
                let figure = format!(
                    "{} % with the last weights, {} % averaged with the old statistics, {} % with \
                     recomputed ones, {}",
                    of("last"),
                    of("averaged"),
                    of("averaged, recomputed"),
                    spread(&gain, "points")
                );
                Judgement::of(&[mostly(&gain, |d| d > 0.)], "", figure)
            },
        },
        Claim {
            id: 37,
            title: "One batch with a NaN",
            version: 1,
            text: "One batch with a NaN spoils every later inference, even if no step is taken on \
                it.",
            varied: "the treatment of a batch with one NaN pixel in training mode: none; an error \
                that changes nothing (`refuse_non_finite`); `recalibrate`",
            fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on \
                500 by other writers, AdamW at 0.003, 300 steps, batches of 64",
            rule: "three parts, in at least four of five seeds each: after the batch, the \
                accuracy is below 20 %; if the batch is refused, it is that before the batch; \
                after recalibration, it is within 2 points of that",
            plot: OF_VARIANTS,
            runs: [15, 6],
            run: not_a_number,
            judge: |d| {
                let of = |variant| show(d.median(ACCURACY, variant));
                let gain = |variant| d.gains(ACCURACY, variant, "before");
                let parts = [
                    mostly(d.values(ACCURACY, "after"), |a| a < 20.),
                    mostly(&gain("refused"), |d| d == 0.),
                    mostly(&gain("recalibrated"), |d| d.abs() <= 2.),
                ];
                let figure = format!(
                    "{} % before the batch, {} % after it, {} % if it is refused, {} % after \
                     recalibration",
                    of("before"),
                    of("after"),
                    of("refused"),
                    of("recalibrated")
                );
                Judgement::parts(
                    [
                        "the batch spoils inference",
                        "refusing the batch avoids that",
                        "recalibration repairs the statistics",
                    ],
                    parts,
                    figure,
                )
            },
        },
    ]
}

fn modes(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for variant in ["training mode", "inference", "inference, validated"] {
        all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
            let net = mlp(batch_norm(), seed)?;
            let optimizer = Optim::adam(net.trainable(), rate)?;
            let learned = learn(&net, optimizer, (lab.steps(STEPS), 64), sets, seed)?;
            let test = &sets.1;
            if variant == "inference, validated" {
                for image in test.images.chunk(10, 0)? {
                    net.model.forward_t(&(image + 0.3)?, true)?;
                }
            }
            let mut readings = vec![];
            // As many as make whole batches of each size.
            let count = test.labels.dim(0)? / 160 * 160;
            for size in [2, 8, 32, 160] {
                let parts = (0..count / size).map(|i| {
                    let images = test.images.narrow(0, i * size, size)?;
                    net.model.forward_t(&images, variant == "training mode")
                });
                let logits = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
                let those = test.select(&(0..count as u32).collect::<Vec<_>>())?;
                let share = f64::from(those.accuracy(&logits)?);
                readings.push((ACCURACY, size as f64, share));
            }
            Ok(Trial::new(learned.rank(), readings))
        })?);
    }
    Ok(all)
}

const SIZES: [(&str, usize); 2] = [("batches of 8", 8), ("batches of 64", 64)];

fn momenta(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for (variant, batch) in SIZES {
        for momentum in [
            Some(0.01),
            Some(0.1),
            Some(0.5),
            Some(0.9),
            Some(0.99),
            None,
        ] {
            all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
                let options = BatchNormOptions {
                    momentum,
                    ..Default::default()
                };
                let net = mlp(NormConfig::Batch(options), seed)?;
                let optimizer = Optim::adam(net.trainable(), rate)?;
                let learned = learn(&net, optimizer, (lab.steps(STEPS), batch), sets, seed)?;
                let right = learned.accuracy;
                let reading = match momentum {
                    Some(momentum) => (ACCURACY, momentum, right),
                    None => ("accuracy, average of all", 0., right),
                };
                Ok(Trial::new(learned.rank(), vec![reading]))
            })?);
        }
    }
    Ok(all)
}

/// Recomputes the statistics of `net` over all of `train`, in batches of 64 that `forward` takes
/// through it.
pub(crate) fn recomputed(
    net: &Mlp,
    train: &Digits,
    forward: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let batches = (0..train.labels.dim(0)? / 64)
        .map(|i| train.images.narrow(0, 64 * i, 64))
        .collect::<Result<Vec<_>>>()?;
    recalibrate(&net.norms(), batches, forward)?;
    Ok(())
}

fn averages(lab: &Lab) -> Result<Vec<Measure>> {
    let (train, test) = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["last", "averaged", "averaged, recomputed"] {
        all.extend(lab.seeded(variant, |seed| {
            let net = mlp(batch_norm(), seed)?;
            let vars = net.trainable();
            let mut optimizer = Optim::adam(vars.clone(), 0.03)?;
            let mut batches = Batches::new(train.labels.dim(0)?, seed);
            let steps = lab.steps(400);
            let mut sums: Vec<Tensor> =
                vars.iter().map(|v| v.zeros_like()).collect::<Result<_>>()?;
            for step in 0..steps {
                let batch = batches.of(&train, 64)?;
                let logits = net.model.forward_t(&batch.images, true)?;
                optimizer.step(&cross_entropy(&logits, &batch.labels)?)?;
                if step >= steps / 2 {
                    for (sum, var) in sums.iter_mut().zip(&vars) {
                        *sum = (&*sum + var.as_tensor())?.detach();
                    }
                }
            }
            if variant != "last" {
                for (sum, var) in sums.iter().zip(&vars) {
                    var.set(&(sum / (steps - steps / 2) as f64)?)?;
                }
            }
            if variant == "averaged, recomputed" {
                recomputed(&net.model, &train, |x| net.model.forward_t(x, true))?;
            }
            Ok(vec![(ACCURACY, 0., evaluated(&net.model, &test)?.accuracy)])
        })?);
    }
    Ok(all)
}

fn not_a_number(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?.measured;
    let mut all = vec![];
    for variant in ["before", "after", "refused", "recalibrated"] {
        all.extend(lab.seeded(variant, |seed| {
            let options = BatchNormOptions {
                refuse_non_finite: variant == "refused",
                ..Default::default()
            };
            let net = mlp(NormConfig::Batch(options), seed)?;
            let optimizer = Optim::adam(net.trainable(), 3e-3)?;
            learn(&net, optimizer, (lab.steps(STEPS), 64), &sets, seed)?;
            if variant != "before" {
                let mut pixels = sets.0.images.narrow(0, 0, 64)?.to_vec2::<f32>()?;
                pixels[seed as usize][20] = f32::NAN;
                let batch = Tensor::new(pixels, &Device::Cpu)?.to_dtype(DType::F32)?;
                let refused = net.model.forward_t(&batch, true).is_err();
                if refused != (variant == "refused") {
                    candle_core::bail!("{variant}: expected the batch to be refused only there")
                }
            }
            if variant == "recalibrated" {
                recomputed(&net.model, &sets.0, |x| net.model.forward_t(x, true))?;
            }
            Ok(vec![(
                ACCURACY,
                0.,
                evaluated(&net.model, &sets.1)?.accuracy,
            )])
        })?);
    }
    Ok(all)
}
