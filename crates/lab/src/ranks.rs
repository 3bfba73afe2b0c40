//! The claim of the guide about training on several ranks: 41.

use candle_core::{Result, Tensor, bail};
use candle_nn::loss::cross_entropy;
use candle_nn::{ModuleT, VarBuilder};
use candle_norm::batch_norm;
use candle_norm::distributed::{Threads, sum_gradients};

use crate::claim::{Claim, Judgement, Plot, mostly, show, spread};
use crate::lab::{Lab, Measure, Trial};
use crate::nets::{Net, Placed};
use crate::practice::{ACCURACY, OF_VARIANTS, RATES, STEPS, evaluated};
use crate::training::{Batches, DigitSets, Learned, Optim, flat_digits};

const BATCH: usize = 32;
/// Samples of a rank.
const SHARES: [usize; 4] = [2, 4, 8, 16];
const LOCAL: &str = "local";
const SYNCHRONIZED: &str = "synchronized";

pub(crate) fn claims() -> Vec<Claim> {
    vec![Claim {
        id: 44,
        title: "Batch norm on several ranks",
        version: 1,
        text: "Batch norm loses accuracy at 2 samples a rank unless its statistics are \
            synchronized.",
        varied: "the number of ranks that share a batch of 32, and so the samples of each; \
            statistics of each rank by itself, or of all ranks",
        fixed: "two hidden layers of 64 with batch norm and ReLU on 1297 digits, tested on 500 by \
            other writers with the running statistics of the first rank, gradients summed over \
            the ranks, AdamW, 300 steps",
        rule: "two parts: at 2 samples a rank, the accuracy with synchronized statistics is higher \
            in at least four of five seeds; at 16 samples a rank, it is so in fewer",
        plot: Plot {
            x: Some("samples of a rank"),
            log_x: true,
            ..OF_VARIANTS
        },
        runs: [136, 32],
        run: over_ranks,
        judge: |d| {
            let gain = |share| {
                d.gains_at(
                    ACCURACY,
                    (SYNCHRONIZED, share as f64),
                    (LOCAL, share as f64),
                )
            };
            let words = SHARES.map(|share| {
                let accuracy = |variant| show(d.at(ACCURACY, variant, share as f64));
                format!(
                    "at {share} samples {} % local, {} % synchronized, {}",
                    accuracy(LOCAL),
                    accuracy(SYNCHRONIZED),
                    spread(&gain(share), "points")
                )
            });
            let is_better = |share| mostly(&gain(share), |d| d > 0.);
            Judgement::parts(
                [
                    "synchronized statistics are better at 2 samples a rank",
                    "they are not at 16",
                ],
                [is_better(2), !is_better(16)],
                words.join("; "),
            )
        },
    }]
}

/// The first of the ranks that train on their shares of each batch, all with the same start.
fn train(
    (train, test): &DigitSets,
    share: usize,
    variant: &str,
    (rate, seed): (f64, u64),
    steps: usize,
) -> Result<Learned> {
    let ranks = BATCH / share;
    let learned = Threads::run(ranks, |group| {
        let net = Net::new(seed, |vb| {
            let norm = |vb: VarBuilder| {
                let norm = batch_norm(64, 1e-5, vb)?;
                Ok(match variant {
                    SYNCHRONIZED => norm.synchronized(group.clone()),
                    _ => norm,
                })
            };
            Placed::new(true, norm, vb)
        })?;
        let vars = net.trainable();
        let mut optimizer = Optim::adam(vars.clone(), rate)?;
        let mut batches = Batches::new(train.labels.dim(0)?, seed);
        for _ in 0..steps {
            let batch = batches.of(train, BATCH)?;
            let mine = |t: &Tensor| t.narrow(0, group.rank() * share, share);
            let logits = net.model.forward_t(&mine(&batch.images)?, true)?;
            let loss = cross_entropy(&logits, &mine(&batch.labels)?)?;
            // The sum over the share, by the number of samples of all ranks.
            let mut grads = (loss / ranks as f64)?.backward()?;
            sum_gradients(&*group, &vars, &mut grads)?;
            optimizer.follow(&grads)?;
        }
        match group.rank() {
            0 => evaluated(&net.model, test).map(Some),
            _ => Ok(None),
        }
    })?;
    match learned.into_iter().flatten().next() {
        Some(learned) => Ok(learned),
        None => bail!("no rank has learned"),
    }
}

fn over_ranks(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = flat_digits()?;
    let mut all = vec![];
    for variant in [LOCAL, SYNCHRONIZED] {
        for share in SHARES {
            all.extend(lab.tuned(variant, &RATES, &sets, |sets, rate, seed| {
                let learned = train(sets, share, variant, (rate, seed), lab.steps(STEPS))?;
                let reading = (ACCURACY, share as f64, learned.accuracy);
                Ok(Trial::new(learned.rank(), vec![reading]))
            })?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Synchronized, the number of ranks changes the sums' order alone.
    #[test]
    fn synchronized_training_does_not_depend_on_the_number_of_ranks() -> Result<()> {
        let sets = flat_digits()?.measured;
        let loss = |share, variant| -> Result<f64> {
            let learned = train(&sets, share, variant, (3e-3, 1), 3)?;
            Ok(learned.rank())
        };
        let whole = loss(32, LOCAL)?;
        let apart = |share, variant| Ok((loss(share, variant)? - whole).abs());
        let [synchronized, local]: [Result<f64>; 2] = [apart(8, SYNCHRONIZED), apart(2, LOCAL)];
        let (synchronized, local) = (synchronized?, local?);
        assert!(synchronized < 1e-5, "{synchronized}");
        assert!(local > 3. * synchronized, "{local} {synchronized}");
        Ok(())
    }
}
