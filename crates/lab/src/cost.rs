//! Costs of layers: claim 20, and the timer for claim 17.

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap};
use candle_norm::{BatchNorm, LayerNorm, RmsNorm, batch_norm, layer_norm, rms_norm};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::claim::{Claim, Judgement, Plot, mostly, show};
use crate::lab::{Lab, Reading, median};

const TIME: &str = "time";
/// Images of C × H × W, 32 of them.
const SIZES: [[usize; 3]; 4] = [[16, 8, 8], [32, 16, 16], [64, 16, 16], [64, 32, 32]];

pub(crate) fn claims() -> Vec<Claim> {
    vec![Claim {
        id: 20,
        title: "Time of layer norm and batch norm",
        version: 2,
        text: "Layer norm costs more than batch norm.",
        varied: "the size of the input: 32 images of C × H × W; the layer",
        fixed: "forward in training mode and backward, f32, one thread, layers timed alternately; \
            the median over rounds, and over seeds for the input",
        rule: "for each size: layer norm over C × H × W takes at least 1.05 times as long as \
            batch norm in at least four of five seeds",
        plot: Plot {
            metric: TIME,
            y: "time of forward and backward, in ms",
            x: Some("elements of the input"),
            log_x: true,
            log_y: true,
        },
        runs: [5, 2],
        run: |lab| lab.timed(|seed| layer_and_batch(lab, seed)),
        judge: |d| {
            let sizes: Vec<f64> = d.along(TIME, "layer").iter().map(|(x, _)| *x).collect();
            let ratios = |x: &f64| d.ratios_at(TIME, "layer", "batch", *x);
            let words = sizes
                .iter()
                .map(|x| format!("×{} at {x}", show(median(&ratios(x)))));
            let words = words.collect::<Vec<_>>().join(", ");
            let parts: Vec<bool> = sizes
                .iter()
                .map(|x| mostly(&ratios(x), |r| r >= 1.05))
                .collect();
            Judgement::by(
                "the size",
                &sizes,
                &parts,
                format!("time of layer norm relative to batch norm: {words}"),
            )
        },
    }]
}

/// Anything that is timed.
pub(crate) struct Timed {
    pub(crate) variant: &'static str,
    pub(crate) layer: Box<dyn ModuleT>,
}

/// The median time of forward and backward of each of `layers` on `x`, in milliseconds, by turns.
pub(crate) fn by_turns(layers: &[Timed], x: &Var, rounds: usize) -> Result<Vec<f64>> {
    let mut times = vec![vec![]; layers.len()];
    // The first round only warms up.
    for round in 0..=rounds {
        for i in 0..layers.len() {
            // Who comes first changes, so that nobody always finds the caches as the same one
            // leaves them.
            let i = (i + round) % layers.len();
            let start = Instant::now();
            let y = layers[i].layer.forward_t(x, true)?;
            let gradients = y.sum_all()?.backward()?;
            let time = start.elapsed().as_secs_f64() * 1e3;
            drop(gradients);
            if round > 0 {
                times[i].push(time);
            }
        }
    }
    let median = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok(times.into_iter().map(median).collect())
}

pub(crate) fn drawn(dims: &[usize], seed: u64) -> Result<Var> {
    let mut rng = StdRng::seed_from_u64(seed);
    let values = (0..dims.iter().product()).map(|_| rng.random_range(-1f32..1.));
    Var::from_tensor(&Tensor::from_vec(values.collect(), dims, &Device::Cpu)?)
}

fn vb() -> VarBuilder<'static> {
    VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu)
}

/// As many rounds as take about a third of a second, at least 15.
pub(crate) fn rounds(lab: &Lab, elements: usize) -> usize {
    lab.steps((40_000_000 / elements).clamp(30, 300)).max(15)
}

fn layer_and_batch(lab: &Lab, seed: u64) -> Result<Vec<(String, Reading)>> {
    let mut found = vec![];
    for [c, h, w] in SIZES {
        let x = drawn(&[32, c, h, w], seed)?;
        let layer: LayerNorm = layer_norm((c, h, w), 1e-5, vb())?;
        let batch: BatchNorm = batch_norm(c, 1e-5, vb())?;
        let layers = [
            Timed {
                variant: "layer",
                layer: Box::new(layer),
            },
            Timed {
                variant: "batch",
                layer: Box::new(batch),
            },
        ];
        let elements = x.elem_count();
        let times = by_turns(&layers, &x, rounds(lab, elements))?;
        for (timed, time) in layers.iter().zip(times) {
            found.push((timed.variant.to_string(), (TIME, elements as f64, time)));
        }
    }
    Ok(found)
}

/// LayerNorm and RmsNorm of `[rows, len]`.
pub(crate) fn layer_and_rms(
    lab: &Lab,
    seed: u64,
    sizes: &[[usize; 2]],
) -> Result<Vec<(String, Reading)>> {
    let mut found = vec![];
    for [rows, len] in sizes {
        let x = drawn(&[*rows, *len], seed)?;
        let layer: LayerNorm = layer_norm(*len, 1e-5, vb())?;
        let rms: RmsNorm = rms_norm(*len, 1e-6, vb())?;
        let layers = [
            Timed {
                variant: "layer",
                layer: Box::new(layer),
            },
            Timed {
                variant: "rms",
                layer: Box::new(rms),
            },
        ];
        let times = by_turns(&layers, &x, rounds(lab, x.elem_count()))?;
        for (timed, time) in layers.iter().zip(times) {
            found.push((timed.variant.to_string(), (TIME, *len as f64, time)));
        }
    }
    Ok(found)
}
