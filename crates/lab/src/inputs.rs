//! Claims about the scale of inputs: 5, 8, 22.

use candle_core::{DType, Device, Result, Tensor};
use candle_norm::scaling::{MinMaxScaler, RobustScaler, Scaler, StandardScaler};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::cars::Split;
use crate::claim::{Claim, Judgement, Plot, mostly, show};
use crate::lab::{Lab, Measure, Trial, median};
use crate::nets::{Activation, Mlp, Net};
use crate::series::Series;
use crate::training::{Optim, Prices, Regression, cars, scalar};

const RATES: [f64; 5] = [1e-3, 3e-3, 1e-2, 3e-2, 0.1];
const SCALERS: [&str; 4] = ["none", "min-max", "z-score", "robust"];

fn scaler(name: &str) -> Option<Box<dyn Scaler>> {
    match name {
        "min-max" => Some(Box::new(MinMaxScaler::default())),
        "z-score" => Some(Box::new(StandardScaler::default())),
        "robust" => Some(Box::new(RobustScaler::default())),
        _ => None,
    }
}

/// Both, scaled by what the first alone says.
fn scaled(name: &str, train: &Tensor, test: &Tensor) -> Result<[Tensor; 2]> {
    match scaler(name) {
        Some(scaler) => {
            scaler.fit(train)?;
            Ok([scaler.transform(train)?, scaler.transform(test)?])
        }
        None => Ok([train.clone(), test.clone()]),
    }
}

pub(crate) fn claims() -> Vec<Claim> {
    vec![
        Claim {
            id: 5,
            title: "Scalers and outliers",
            version: 1,
            text: "Outliers spoil min-max scaling; z-scores are more robust.",
            varied: "the scaler of the inputs; one training row, another for each seed, has its \
                mileage multiplied by 1000",
            fixed: "prices as z-scores, two hidden layers of 32, 400 steps of AdamW, batches of \
                64; the learning rate is tuned with that row and without it",
            rule: "two parts, in at least four of five seeds each: the corrupted row raises the \
                error of min-max scaling by 10 % or more; it raises the error of z-scores by a \
                smaller factor",
            plot: Plot {
                metric: "RMSE",
                y: "RMSE of prices, in standard deviations",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [60, 30],
            run: outlier,
            judge: |d| {
                let variants =
                    |name: &str| [format!("{name}, clean"), format!("{name}, one outlier")];
                let ratios = |name| {
                    let [clean, spoiled] = variants(name);
                    d.ratios_at("RMSE", &spoiled, &clean, 0.)
                };
                let words = SCALERS[1..].iter().map(|name| {
                    let [clean, spoiled] =
                        variants(name).map(|variant| show(d.median("RMSE", &variant)));
                    let factor = show(median(&ratios(name)));
                    format!("{name} ×{factor}, from {clean} to {spoiled}")
                });
                let figure = format!(
                    "the error with one outlier: {}",
                    words.collect::<Vec<_>>().join("; ")
                );
                let (minmax, z) = (ratios("min-max"), ratios("z-score"));
                let steadier: Vec<f64> = minmax.iter().zip(&z).map(|(m, z)| m - z).collect();
                let parts = [mostly(&minmax, |r| r >= 1.1), mostly(&steadier, |d| d > 0.)];
                Judgement::parts(
                    [
                        "one outlier spoils min-max scaling",
                        "an outlier spoils z-scores less",
                    ],
                    parts,
                    figure,
                )
            },
        },
        Claim {
            id: 8,
            title: "Half precision and scaling",
            version: 2,
            text: "f16 needs values within ±65 504, and good scaling reduces the quantization \
                error by three orders of magnitude.",
            varied: "the quantity (dates as numbers such as 19580329), and its scale: as it is, \
                or its z-score",
            fixed: "400 rows drawn for each seed; conversion to f16 and back; mean absolute error \
                in the unit of the quantity",
            rule: "two parts: values above 65 504 become infinite without scaling, and stay \
                finite with it; the error of mileage, DAX and CO2, which f16 can represent, \
                shrinks by a factor of 300 or more",
            plot: Plot {
                metric: "factor of reduction",
                y: "factor by which scaling reduces the error",
                x: None,
                log_x: false,
                log_y: true,
            },
            runs: [25, 10],
            run: round_trip,
            judge: |d| {
                let cut = |variant| d.median("factor of reduction", variant);
                let [mileage, dax, co2] = ["mileage", "DAX", "CO2"].map(cut);
                let beyond = d.median("error without scaling", "date").is_infinite()
                    && d.median("error with scaling", "date").is_finite();
                let figure = format!(
                    "dates as numbers: {}; error reduced by a factor of {} (mileage), {} (DAX), \
                     {} (CO2)",
                    if beyond {
                        "infinite without scaling, finite with it"
                    } else {
                        "not as claimed"
                    },
                    show(mileage),
                    show(dax),
                    show(co2)
                );
                let all = [mileage, dax, co2].iter().all(|cut| *cut >= 300.);
                Judgement::parts(
                    [
                        "large values are finite only if they are scaled",
                        "scaling reduces the error by a factor of 300",
                    ],
                    [beyond, all],
                    figure,
                )
            },
        },
        Claim {
            id: 22,
            title: "Distances on unscaled features",
            version: 1,
            text: "Distance methods (nearest neighbors, k-means) need scaled features.",
            varied: "the scaler of the inputs",
            fixed: "nearest neighbors: the mean price of the 5 nearest of 604 cars as the \
                prediction for 200 others, with another split for each seed; k-means with 6 \
                clusters, started at 6 cars drawn by the seed: the fraction of the variance of \
                prices that is within clusters",
            rule: "two parts: with every scaler, the error of nearest neighbors is at most 0.9 of \
                that without scaling; so is the variance within clusters",
            plot: Plot {
                metric: "RMSE of nearest neighbors",
                y: "RMSE with the 5 nearest neighbors, in dollars",
                x: None,
                log_x: false,
                log_y: false,
            },
            runs: [20, 8],
            run: distances,
            judge: |d| {
                let ratios = |metric| {
                    SCALERS[1..]
                        .iter()
                        .map(|s| d.median(metric, s) / d.median(metric, "none"))
                        .collect::<Vec<_>>()
                };
                let (near, groups) = (
                    ratios("RMSE of nearest neighbors"),
                    ratios("variance within clusters"),
                );
                let list = |r: &[f64]| r.iter().map(|v| show(*v)).collect::<Vec<_>>().join(", ");
                let figure = format!(
                    "relative to unscaled (min-max, z-score, robust): error of nearest neighbors \
                     ×{}; variance within clusters ×{}",
                    list(&near),
                    list(&groups)
                );
                let parts = [
                    near.iter().all(|r| *r <= 0.9),
                    groups.iter().all(|r| *r <= 0.9),
                ];
                Judgement::of(&parts, "the method", figure)
            },
        },
    ]
}

fn outlier(lab: &Lab) -> Result<Vec<Measure>> {
    let sets = cars()?.map(|split| {
        Ok((
            split.train.inputs.to_vec2::<f32>()?,
            split.test.inputs.clone(),
            Prices::new(split)?,
        ))
    })?;
    let mut all = vec![];
    for name in &SCALERS[1..] {
        for corrupted in [false, true] {
            let variant = format!(
                "{name}, {}",
                if corrupted { "one outlier" } else { "clean" }
            );
            all.extend(
                lab.tuned(&variant, &RATES, &sets, |(rows, test, cars), rate, seed| {
                    let mut rows = rows.clone();
                    if corrupted {
                        let row = StdRng::seed_from_u64(seed).random_range(0..rows.len());
                        rows[row][0] *= 1000.;
                    }
                    let [train, test] = scaled(name, &Tensor::new(rows, &Device::Cpu)?, test)?;
                    let net = Net::new(seed, |vb| {
                        Mlp::new("none", &[17, 32, 32], 1, Activation::Relu, vb)
                    })?;
                    let y = [&cars.scores[0], &cars.scores[1]];
                    let course = Regression {
                        x: [&train, &test],
                        y,
                        steps: lab.steps(400),
                        goal: f64::INFINITY,
                        seed,
                    };
                    let (_, r2) = course.run(&net.model, Optim::adam(net.trainable(), rate)?)?;
                    let spread = scalar(&cars.scores[1].flatten_all()?.var(0)?)?;
                    let rmse = ((1. - r2) * spread).sqrt();
                    Ok(Trial::new(rmse, vec![("RMSE", 0., rmse)]))
                })?,
            );
        }
    }
    Ok(all)
}

fn round_trip(lab: &Lab) -> Result<Vec<Measure>> {
    let (split, stocks, co2) = (Split::load()?, Series::stocks()?, Series::co2()?);
    let column = |x: &Tensor, i: usize| x.narrow(1, i, 1)?.contiguous()?.to_dtype(DType::F64);
    // 20011229 stands for a day: what a column of dates is where nobody looked.
    let dates = include_str!("../../../examples/data/co2.csv")
        .lines()
        .skip(1);
    let dates = dates.filter_map(|line| line.split(',').next()?.parse().ok());
    let dates: Vec<f64> = dates.collect();
    let weeks = dates.len();
    let quantities = [
        ("price", column(&split.train.prices, 0)?),
        ("mileage", column(&split.train.inputs, 0)?),
        ("DAX", column(&stocks.tensor()?, 0)?),
        ("CO2", column(&co2.tensor()?, 0)?),
        ("date", Tensor::from_vec(dates, (weeks, 1), &Device::Cpu)?),
    ];
    let mut all = vec![];
    for (variant, values) in quantities {
        all.extend(lab.seeded(variant, |seed| {
            let mut order: Vec<u32> = (0..values.dim(0)? as u32).collect();
            order.shuffle(&mut StdRng::seed_from_u64(seed));
            let drawn = values.index_select(&Tensor::new(&order[..400], &Device::Cpu)?, 0)?;
            let scaler = StandardScaler::default();
            scaler.fit(&drawn)?;
            let halved = |x: &Tensor| x.to_dtype(DType::F16)?.to_dtype(DType::F64);
            let error = |back: &Tensor| scalar(&(back - &drawn)?.abs()?.mean_all()?);
            let plain = error(&halved(&drawn)?)?;
            let scaled = error(&scaler.inverse_transform(&halved(&scaler.transform(&drawn)?)?)?)?;
            Ok(vec![
                ("factor of reduction", 0., plain / scaled),
                ("error without scaling", 0., plain),
                ("error with scaling", 0., scaled),
            ])
        })?);
    }
    Ok(all)
}

fn distances(lab: &Lab) -> Result<Vec<Measure>> {
    let split = Split::load()?;
    let inputs = split.all_inputs()?;
    let prices = Tensor::cat(&[&split.train.prices, &split.test.prices], 0)?;
    let mut all = vec![];
    for name in SCALERS {
        all.extend(lab.seeded(name, |seed| {
            let mut order: Vec<u32> = (0..inputs.dim(0)? as u32).collect();
            order.shuffle(&mut StdRng::seed_from_u64(seed));
            let part = |x: &Tensor, from: usize, to: usize| {
                x.index_select(&Tensor::new(&order[from..to], &Device::Cpu)?, 0)
            };
            let [train, test] = scaled(name, &part(&inputs, 0, 604)?, &part(&inputs, 604, 804)?)?;
            let (train, test) = (train.to_vec2::<f32>()?, test.to_vec2::<f32>()?);
            let known = part(&prices, 0, 604)?.flatten_all()?.to_vec1::<f32>()?;
            let wanted = part(&prices, 604, 804)?.flatten_all()?.to_vec1::<f32>()?;
            let readings = [
                neighbors(&train, &known, &test, &wanted),
                groups(&train, &known),
            ];
            Ok(vec![
                ("RMSE of nearest neighbors", 0., readings[0]),
                ("variance within clusters", 0., readings[1]),
            ])
        })?);
    }
    Ok(all)
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

fn neighbors(train: &[Vec<f32>], known: &[f32], test: &[Vec<f32>], wanted: &[f32]) -> f64 {
    let mut square = 0.;
    for (x, price) in test.iter().zip(wanted) {
        let mut near: Vec<(f64, f32)> = train
            .iter()
            .map(|t| distance(t, x))
            .zip(known.iter().copied())
            .collect();
        near.sort_by(|a, b| a.0.total_cmp(&b.0));
        let guess = near[..5]
            .iter()
            .map(|(_, price)| f64::from(*price))
            .sum::<f64>()
            / 5.;
        square += (guess - f64::from(*price)).powi(2);
    }
    (square / test.len() as f64).sqrt()
}

/// k-means, and the share of the variance of prices that its groups leave.
fn groups(rows: &[Vec<f32>], prices: &[f32]) -> f64 {
    const K: usize = 6;
    let mut centers: Vec<Vec<f32>> = rows[..K].to_vec();
    let mut member = vec![0; rows.len()];
    for _ in 0..30 {
        for (m, row) in member.iter_mut().zip(rows) {
            let nearest = |a: &usize, b: &usize| {
                distance(row, &centers[*a]).total_cmp(&distance(row, &centers[*b]))
            };
            *m = (0..K).min_by(nearest).unwrap_or(0);
        }
        for (k, center) in centers.iter_mut().enumerate() {
            let mine: Vec<&Vec<f32>> = rows
                .iter()
                .zip(&member)
                .filter(|(_, m)| **m == k)
                .map(|(row, _)| row)
                .collect();
            if !mine.is_empty() {
                let mean =
                    |i: usize| mine.iter().map(|row| row[i]).sum::<f32>() / mine.len() as f32;
                *center = (0..center.len()).map(mean).collect();
            }
        }
    }
    let square = |prices: &[f64]| {
        let mean = prices.iter().sum::<f64>() / prices.len().max(1) as f64;
        prices.iter().map(|p| (p - mean).powi(2)).sum::<f64>()
    };
    let of = |k: usize| {
        prices
            .iter()
            .zip(&member)
            .filter(|(_, m)| **m == k)
            .map(|(p, _)| f64::from(*p))
            .collect::<Vec<_>>()
    };
    let within: f64 = (0..K).map(|k| square(&of(k))).sum();
    within / square(&prices.iter().map(|p| f64::from(*p)).collect::<Vec<_>>())
}
