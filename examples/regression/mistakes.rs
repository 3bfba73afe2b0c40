//! The usual mistakes, and what each of them costs in this example.

use crate::data::Split;
use crate::report::{Variant, median};
use crate::scheme::{BEST, Inputs, LEAK, Targets};
use crate::train::answer;
use candle_core::{DType, Result, Tensor};
use candle_norm::scaling::{Scaler, StandardScaler, StandardScalerOptions, half_precision};

/// Sentences with figures, from the runs of the table and one more of the leak.
pub(crate) fn mistakes(variants: &[Variant], leak: &Variant, cars: &Split) -> Result<Vec<String>> {
    let best = variants.iter().find(|variant| variant.scheme == BEST);
    let per_batch = variants.iter().find(|variant| {
        variant.scheme.inputs == Inputs::MinMaxOfBatch && variant.scheme.targets == Targets::ZScore
    });
    let mut found = vec![];
    if let Some(variant) = per_batch {
        found.push(format!(
            "Scaled per batch: RMSE ${:.0} on the {} test cars at once, ${:.0} when asked one car \
             at a time, with a spread of {:.3}: one car by itself is its own least and greatest, \
             so that all cars look alike.",
            variant.median(|r| r.together.rmse),
            cars.test.count(),
            variant.median(|r| r.alone.rmse),
            variant.median(|r| r.alone.spread),
        ));
    }
    if let Some(variant) = best {
        let forgotten = variant.runs.iter().map(|run| {
            let scaled = run.trained.scaled(&cars.test.inputs)?;
            Ok(answer(&scaled, &cars.test)?.rmse)
        });
        let forgotten = median(forgotten.collect::<Result<_>>()?);
        found.push(format!(
            "Forgotten inverse: RMSE ${:.0} instead of ${:.0}; the predictions are numbers \
             around 0.",
            forgotten,
            variant.median(|r| r.together.rmse),
        ));
        debug_assert_eq!(leak.scheme, LEAK);
        found.push(format!(
            "Fitted on all data: RMSE ${:.0} instead of ${:.0}, and it is not the error that new \
             cars will have.",
            leak.median(|r| r.together.rmse),
            variant.median(|r| r.together.rmse),
        ));
    }
    found.push(half(cars)?);
    Ok(found)
}

/// Prices in `f16`, as they are and scaled.
fn half(cars: &Split) -> Result<String> {
    let prices = &cars.train.prices;
    let as_they_are = StandardScaler::new(StandardScalerOptions {
        with_mean: false,
        with_std: false,
        ..Default::default()
    })?
    .with_names(["price"])?;
    as_they_are.fit(prices)?;
    let scaled = StandardScaler::default();
    scaled.fit(prices)?;
    let finding = match half_precision(&as_they_are, prices)?.first() {
        Some(finding) => finding.to_string(),
        None => "all fit".to_string(),
    };
    let error = |there: Tensor, back: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<f32> {
        let half = there.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
        let difference = (back(&half)? - prices)?.abs()?;
        difference.flatten_all()?.max(0)?.to_scalar::<f32>()
    };
    let raw = error(prices.clone(), &|t| Ok(t.clone()))?;
    let by_scaler = error(scaled.transform(prices)?, &|t| scaled.inverse_transform(t))?;
    let left = half_precision(&scaled, prices)?.len();
    let raw = match raw.is_finite() {
        true => format!("is off by up to ${raw:.2}"),
        false => "comes back infinite".to_string(),
    };
    Ok(format!(
        "Dollars in f16: {finding}. The worst price {raw}; scaled by the z-score, it is off by \
         ${by_scaler:.2}, with {left} findings."
    ))
}
