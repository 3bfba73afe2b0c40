//! Recomputed running statistics.

use candle_core::{Result, Tensor};

use crate::layers::{Norm, Recalibrating, RunningStats};
use crate::ops::check;

/// Recomputes running statistics as the plain average over `batches`, as PyTorch's `update_bn`
/// does.
///
/// For networks whose statistics no longer fit their weights: averaged weights, a changed data set,
/// training at small batches. `forward` runs the model in training mode; every batch should be
/// equally large. It may run other layers than those of `norms`, if they were built from the same
/// variables. The momentum is back in force afterwards. Returns the number of batches.
///
/// # Errors
/// Errors of `forward`; no batches, or a layer that `forward` did not run in training mode, or ran
/// in [`without_updates`](crate::without_updates); no statistics in `norms`. The statistics are
/// then what they were before.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{ModuleT, VarBuilder, VarMap};
/// use candle_norm::{batch_norm, recalibrate};
///
/// let vars = VarMap::new();
/// let norm = batch_norm(1, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let batches = [[[0f32], [2.]], [[4.], [6.]]].map(|b| Tensor::new(&b, &Device::Cpu).unwrap());
/// recalibrate(&[&norm], batches, |x| norm.forward_t(x, true))?;
/// assert_eq!(norm.running_mean().to_vec1::<f32>()?, [3.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn recalibrate(
    norms: &[&dyn Norm],
    batches: impl IntoIterator<Item = Tensor>,
    mut forward: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<usize> {
    let stats: Vec<&RunningStats> = norms.iter().filter_map(|n| n.running_stats()).collect();
    check::at_least_one("recalibrate", "layer with running statistics", stats.len())?;
    let before = stats
        .iter()
        .map(|s| s.snapshot())
        .collect::<Result<Vec<_>>>()?;
    let run = || {
        let _cumulative = Recalibrating::start(&stats);
        for s in &stats {
            s.reset()?;
        }
        let mut count = 0;
        for batch in batches {
            forward(&batch)?;
            count += 1;
        }
        for s in &stats {
            let updates = s.num_batches_tracked()?;
            check::at_least_one(
                "recalibrate",
                "batch that trains each layer (forward_t with train = true, outside of \
                without_updates)",
                updates as usize,
            )?;
        }
        Ok(count)
    };
    let outcome = run();
    if outcome.is_err() {
        for (s, snapshot) in stats.iter().zip(&before) {
            s.put(snapshot)?;
        }
    }
    outcome
}
