//! Claims about time series: 6, 7, 9.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module, ModuleT, VarBuilder, linear};
use candle_norm::scaling::{RevIn, RevInOptions, rev_in};
use candle_norm::{LayerNorm, layer_norm};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

use crate::claim::{Claim, Data, Judgement, Plot, mostly, show};
use crate::lab::{Lab, Measure, Sets, Trial};
use crate::nets::{Activation, Mlp, Net};
use crate::scales::Scaling;
use crate::series::Series;
use crate::training::{Batches, Optim, scalar};

/// Rows that a forecast is made from.
const WINDOW: usize = 30;
/// Rows ahead that is forecast.
const AHEAD: usize = 5;

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 6,
            title: "Normalizing each window of a series",
            version: 1,
            text: "For time series, normalizing each window by itself beats a static scaler by \
                about 18 %.",
            varied: "the normalization of windows: static, sliding (60 rows), exponentially \
                weighted (span 60), reversible instance normalization",
            fixed: "prediction of the value 5 rows ahead from the last 30, a network of 32 hidden \
                units, trained on the first half and tested on the second; 600 steps of AdamW",
            rule: "four parts, two each for stocks and CO2: reversible instance normalization, \
                which takes the statistics of each window, beats the static scaler in at least \
                four of five seeds; it does so by 9 to 27 %",
            plot: Plot {
                metric: "error",
                y: "mean absolute error relative to predicting the last value",
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [80, 40],
            run: windows,
            judge: |d| {
                let cut = |series: &str| {
                    let of = |name: &str| d.median("error", &format!("{series}, {name}"));
                    100. * (1. - of("RevIn") / of("static"))
                };
                let beaten = |series: &str| {
                    let variant = |name: &str| format!("{series}, {name}");
                    mostly(
                        &d.gains("error", &variant("static"), &variant("RevIn")),
                        |d| d > 0.,
                    )
                };
                let of = |variant: &str| show(d.median("error", variant));
                let figure = format!(
                    "RevIn has {} % less error than a static scaler on stocks, {} % on CO2; error \
                     relative to predicting the last value: static {} and {}, RevIn {} and {}",
                    show(cut("stocks")),
                    show(cut("co2")),
                    of("stocks, static"),
                    of("co2, static"),
                    of("stocks, RevIn"),
                    of("co2, RevIn")
                );
                let by_18 = |series| (9. ..=27.).contains(&cut(series));
                let parts = [
                    beaten("stocks"),
                    beaten("co2"),
                    by_18("stocks"),
                    by_18("co2"),
                ];
                Judgement::parts(
                    [
                        "RevIn beats a static scaler on stocks",
                        "RevIn beats a static scaler on CO2",
                        "the gain on stocks is 9 to 27 %",
                        "the gain on CO2 is 9 to 27 %",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 7,
            title: "Raw prices in a recurrent network",
            version: 1,
            text: "Unnormalized closing prices make a recurrent network's gradient explode.",
            varied: "closing prices as they are, or z-scored; the cell with and without LayerNorm",
            fixed: "a tanh cell of 32 units over 30 closing prices of four markets, predicting \
                the close 5 days ahead; Xavier weights; the first step, a batch of 64",
            rule: "two parts: without LayerNorm, the gradient of the parameters is 100 times \
                larger for raw prices; in backpropagation through time it grows from the last \
                state to the first, and more for raw prices than for z-scores",
            plot: Plot {
                metric: "gradient norm",
                y: "norm of the gradient of all parameters",
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [20, 8],
            run: recurrent,
            judge: |d| {
                let m = |metric, variant| d.median(metric, variant);
                let ratio = m("gradient norm", "raw") / m("gradient norm", "z-score");
                let normed =
                    m("gradient norm", "raw, LayerNorm") / m("gradient norm", "z-score, LayerNorm");
                let through = m("ratio of first to last state", "raw");
                let figure = format!(
                    "gradient ×{} (×{} with LayerNorm in the cell); ratio of the gradients of \
                     first and last state: {} raw, {} z-scored",
                    show(ratio),
                    show(normed),
                    show(through),
                    show(m("ratio of first to last state", "z-score"))
                );
                let grows = through > 1. && through > m("ratio of first to last state", "z-score");
                Judgement::parts(
                    [
                        "the gradient is 100 times larger",
                        "the gradient grows in backpropagation through time",
                    ],
                    [ratio >= 100., grows],
                    figure,
                )
            },
        },
        Claim {
            id: 9,
            title: "Drift and refitting a scaler",
            version: 2,
            text: "Drift of mean and variance should be monitored, and should trigger an update \
                of the scaler.",
            varied: "the scaler: fitted once, or fitted again at each alarm of the monitor",
            fixed: "the four stock closes and the experiment of claim 6",
            rule: "two parts: in the second half the monitor raises at least five times as many \
                alarms as on the same rows in random order; refitting reduces the error by 5 % or \
                more, and does so in at least four of five seeds",
            plot: Plot {
                metric: "error",
                y: "mean absolute error relative to predicting the last value",
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [20, 10],
            run: drift,
            judge: |d: &Data| {
                let m = |metric, variant| d.median(metric, variant);
                let cut = 100.
                    * (1. - m("error", "stocks, static + refit") / m("error", "stocks, static"));
                let alarms = m("alarms", "stocks, static + refit");
                let shuffled = m("alarms", "stocks in random order");
                let first = m("row of the first alarm", "stocks, static + refit");
                let figure = format!(
                    "{} alarms, the first {} rows after the start of the second half (the window \
                     of the monitor has 100 rows); {} alarms on the rows in random order; \
                     refitting reduces the error by {} %",
                    show(alarms),
                    show(first),
                    show(shuffled),
                    show(cut)
                );
                let gains = d.gains("error", "stocks, static", "stocks, static + refit");
                let parts = [
                    alarms >= 1. && alarms >= 5. * shuffled,
                    cut >= 5. && mostly(&gains, |d| d > 0.),
                ];
                Judgement::parts(
                    ["drift raises the alarm", "refitting reduces the error"],
                    parts,
                    figure,
                )
            },
        },
    ]
}

/// A window of each origin, and what followed, both scaled by what was known then.
struct Windows {
    x: Tensor,
    y: Tensor,
    /// Size of a unit of `y` in the unit of the series.
    unit: Tensor,
}

/// The windows of one series after the other that end between `from` and `to`.
fn cut(series: &Series, scaling: Scaling, from: usize, to: usize) -> Result<Windows> {
    let scales = scaling.scales(series)?;
    let width = series.width();
    let (mut x, mut y, mut unit) = (vec![], vec![], vec![]);
    for s in 0..width {
        for origin in from..to {
            let at = origin * width + s;
            let (center, scale) = (scales.center[at], scales.scale[at]);
            let value = |row: usize| ((series.values[row * width + s] - center) / scale) as f32;
            x.extend((origin + 1 - WINDOW..=origin).map(value));
            y.push(value(origin + AHEAD));
            unit.push(scale as f32);
        }
    }
    let n = y.len();
    Ok(Windows {
        x: Tensor::from_vec(x, (n, WINDOW), &Device::Cpu)?,
        y: Tensor::from_vec(y, (n, 1), &Device::Cpu)?,
        unit: Tensor::from_vec(unit, (n, 1), &Device::Cpu)?,
    })
}

/// The value ahead of a window, which is normalized in the network or before it.
struct Forecaster {
    rev_in: Option<RevIn>,
    body: Mlp,
}

impl ModuleT for Forecaster {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match &self.rev_in {
            None => self.body.forward_t(x, train),
            Some(rev_in) => {
                let (x, stats) = rev_in.normalize(&x.unsqueeze(2)?)?;
                let y = self.body.forward_t(&x.squeeze(2)?, train)?;
                rev_in.denormalize(&y.unsqueeze(2)?, &stats)?.squeeze(2)
            }
        }
    }
}

/// Training and test data of a forecaster, under one scaling.
struct Walk {
    train: Windows,
    test: Windows,
    /// The error of the last value as the forecast.
    naive: f64,
    alarms: usize,
    /// The row of the first of them.
    first: f64,
}

fn last(w: &Windows) -> Result<Tensor> {
    w.x.narrow(1, WINDOW - 1, 1)
}

/// The mean absolute error in the unit of the series.
fn absolute(w: &Windows, y: &Tensor) -> Result<f64> {
    scalar(&((y - &w.y)?.abs()? * &w.unit)?.mean_all()?)
}

impl Walk {
    fn new(series: &Series, scaling: Scaling) -> Result<Self> {
        // Reversible normalization is in the network, on top of values of a common size.
        let before = match scaling {
            Scaling::Reversible => Scaling::Static,
            other => other,
        };
        let test = cut(series, before, series.train + WINDOW, series.rows() - AHEAD)?;
        let alarms = scaling.scales(series)?.alarms;
        let steps = alarms.iter().map(|alarm| alarm.step as f64);
        Ok(Self {
            train: cut(series, before, WINDOW, series.train - AHEAD)?,
            naive: absolute(&test, &last(&test)?)?,
            test,
            alarms: alarms.len(),
            first: steps.fold(f64::INFINITY, f64::min),
        })
    }
}

/// The series, and its training half by itself, of whose rows three quarters train.
fn parts(series: &Series) -> Sets<Series> {
    let tuning = Series {
        values: series.values[..series.train * series.width()].to_vec(),
        train: 3 * series.train / 4,
        ..series.clone()
    };
    Sets {
        tuning,
        measured: series.clone(),
    }
}

fn forecasts(lab: &Lab, series: &Series, scaling: Scaling) -> Result<Vec<Measure>> {
    let variant = format!("{}, {}", series.name, scaling.name());
    let walks = parts(series).map(|series| Walk::new(series, scaling))?;
    lab.tuned(
        &variant,
        &[3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
        &walks,
        |walk, rate, seed| {
            let net = Net::new(seed, |vb| {
                let rev_in = match scaling {
                    Scaling::Reversible => {
                        Some(rev_in(1, RevInOptions::default(), vb.pp("rev_in_norm"))?)
                    }
                    _ => None,
                };
                Ok(Forecaster {
                    rev_in,
                    body: Mlp::new("none", &[WINDOW, 32], 1, Activation::Relu, vb)?,
                })
            })?;
            let mut optimizer = Optim::adam(net.trainable(), rate)?;
            let Walk { train, test, .. } = walk;
            let mut batches = Batches::new(train.y.dim(0)?, seed);
            for _ in 0..lab.steps(600) {
                let rows = batches.next(64)?;
                let y = net
                    .model
                    .forward_t(&train.x.index_select(&rows, 0)?, true)?;
                optimizer.step(&(y - train.y.index_select(&rows, 0)?)?.sqr()?.mean_all()?)?;
            }
            let relative = absolute(test, &net.model.forward_t(&test.x, false)?)? / walk.naive;
            Ok(Trial::new(
                relative,
                vec![
                    ("error", 0., relative),
                    ("alarms", 0., walk.alarms as f64),
                    ("row of the first alarm", 0., walk.first),
                ],
            ))
        },
    )
}

fn windows(lab: &Lab) -> Result<Vec<Measure>> {
    let mut all = vec![];
    for series in [Series::stocks()?, Series::co2()?] {
        for scaling in [
            Scaling::Static,
            Scaling::Sliding,
            Scaling::Weighted,
            Scaling::Reversible,
        ] {
            let measures = forecasts(lab, &series, scaling)?;
            all.extend(measures.into_iter().filter(|m| m.metric == "error"));
        }
    }
    Ok(all)
}

fn drift(lab: &Lab) -> Result<Vec<Measure>> {
    let stocks = Series::stocks()?;
    let mut all = forecasts(lab, &stocks, Scaling::Static)?;
    all.retain(|m| m.metric == "error");
    all.extend(forecasts(lab, &stocks, Scaling::Adaptive)?);
    // Rows without an order have no drift: what fires on them fires without cause.
    all.extend(lab.seeded("stocks in random order", |seed| {
        let mut rows: Vec<&[f64]> = stocks.values.chunks(stocks.width()).collect();
        rows.shuffle(&mut StdRng::seed_from_u64(seed));
        let shuffled = Series {
            values: rows.concat(),
            ..stocks.clone()
        };
        let alarms = Scaling::Adaptive.scales(&shuffled)?.alarms.len();
        Ok(vec![("alarms", 0., alarms as f64)])
    })?);
    Ok(all)
}

/// `h ← tanh(norm(W x + U h))`.
struct Cell {
    input: Linear,
    state: Linear,
    norm: Option<LayerNorm>,
    head: Linear,
}

const HIDDEN: usize = 32;

impl Cell {
    fn new(normed: bool, vb: VarBuilder) -> Result<Self> {
        Ok(Self {
            input: linear(1, HIDDEN, vb.pp("input"))?,
            state: linear(HIDDEN, HIDDEN, vb.pp("state"))?,
            norm: match normed {
                true => Some(layer_norm(HIDDEN, 1e-5, vb.pp("norm"))?),
                false => None,
            },
            head: linear(HIDDEN, 1, vb.pp("head"))?,
        })
    }
}

fn recurrent(lab: &Lab) -> Result<Vec<Measure>> {
    let stocks = Series::stocks()?;
    let mut all = vec![];
    for (name, scaling) in [("raw", Scaling::Raw), ("z-score", Scaling::Static)] {
        let windows = cut(&stocks, scaling, WINDOW, stocks.train - AHEAD)?;
        for normed in [false, true] {
            let variant = format!("{name}{}", if normed { ", LayerNorm" } else { "" });
            all.extend(lab.seeded(&variant, |seed| {
                let net =
                    Net::started(crate::nets::Start::Xavier, seed, |vb| Cell::new(normed, vb))?;
                let cell = &net.model;
                let rows = Batches::new(stocks.train - WINDOW - AHEAD, seed).next(64)?;
                let (x, y) = (
                    windows.x.index_select(&rows, 0)?,
                    windows.y.index_select(&rows, 0)?,
                );
                // Zeros to have the gradient of the first and the last state: candle keeps only
                // those of variables.
                let [first, last] =
                    [(); 2].map(|_| Var::zeros((64, HIDDEN), DType::F32, &Device::Cpu));
                let (first, last) = (first?, last?);
                let mut state = first.as_tensor().clone();
                for t in 0..WINDOW {
                    let mut h =
                        (cell.input.forward(&x.narrow(1, t, 1)?)? + cell.state.forward(&state)?)?;
                    if let Some(norm) = &cell.norm {
                        h = norm.forward(&h)?;
                    }
                    state = h.tanh()?;
                }
                let loss = (cell.head.forward(&(state + last.as_tensor())?)? - y)?
                    .sqr()?
                    .mean_all()?;
                let gradients = loss.backward()?;
                let norm = |t: &Tensor| match gradients.get(t) {
                    Some(g) => scalar(&g.sqr()?.sum_all()?),
                    None => Ok(0.),
                };
                let mut square = 0.;
                for var in net.trainable() {
                    square += norm(&var)?;
                }
                let through = (norm(&first)? / norm(&last)?).sqrt();
                Ok(vec![
                    ("gradient norm", 0., square.sqrt()),
                    ("ratio of first to last state", 0., through),
                ])
            })?);
        }
    }
    Ok(all)
}
