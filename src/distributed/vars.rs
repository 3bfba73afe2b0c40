//! Variables that are equal on all ranks.

use std::sync::PoisonError;

use candle_core::{Result, Var, bail};
use candle_nn::VarMap;

use super::agree;
use super::digest::{Digest, from_words, halves, same_digest, word, words};
use crate::collective::{Call, Collective};

/// Elements that are sent in one call.
const BUCKET: usize = 1 << 19;

/// The variables of `vars`, statistics and counters among them, in the order of their names.
fn named(vars: &VarMap) -> Vec<(String, Var)> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut named: Vec<_> = vars.iter().map(|(n, v)| (n.clone(), v.clone())).collect();
    named.sort_by(|a, b| a.0.cmp(&b.0));
    named
}

/// An error on every rank unless all have variables of the same names, dtypes and shapes.
fn same_names(group: &dyn Collective, layer: &'static str, named: &[(String, Var)]) -> Result<()> {
    let mut digest = Digest::default();
    for (name, var) in named {
        digest.text(&format!("{name} {:?} {:?}", var.dtype(), var.dims()));
    }
    same_digest(group, layer, "variables", digest)
}

/// Sets all variables of `vars`, parameters and statistics, to those of rank 0, bit for bit.
///
/// Once before training, and after a checkpoint was loaded: gradients that are summed keep equal
/// what starts out equal.
///
/// # Errors
/// Variables of other names, dtypes or shapes on another rank, and what [`Collective`] returns; on
/// every rank.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap, linear};
/// use candle_norm::distributed::{Threads, assert_same, broadcast_vars};
///
/// Threads::run(2, |group| {
///     let vars = VarMap::new();
///     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
///     // Drawn on each rank by itself.
///     linear(4, 4, vb)?;
///     assert!(assert_same(&*group, &vars).is_err());
///     broadcast_vars(&*group, &vars)?;
///     assert_same(&*group, &vars)
/// })?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn broadcast_vars(group: &dyn Collective, vars: &VarMap) -> Result<()> {
    let layer = "broadcast_vars";
    if group.size() == 1 {
        return Ok(());
    }
    let named = named(vars);
    same_names(group, layer, &named)?;
    for (_, var) in &named {
        let bits = agree(group, layer, words(layer, var))?;
        let mut received = Vec::with_capacity(bits.len());
        for bits in bits.chunks(BUCKET) {
            let mut values: Vec<f64> = bits.iter().flat_map(|bits| halves(*bits)).collect();
            group.broadcast(&Call::new(layer), &mut values)?;
            received.extend(values.chunks(2).map(word));
        }
        if group.rank() > 0 {
            var.set(&from_words(&received, var)?)?;
        }
    }
    Ok(())
}

/// An error on every rank unless all variables of `vars`, parameters and statistics, have the same
/// bits on all of them. The message names the first one that differs, and the number of ranks.
///
/// It reads every variable, and sends 64 bits of each: cheap every hundred steps, and worth its
/// time in the first ones.
///
/// # Errors
/// As said, and as for [`broadcast_vars`].
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{batch_norm, distributed::{Threads, assert_same}};
///
/// let outcome = Threads::run(2, |group| {
///     let vars = VarMap::new();
///     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
///     let norm = batch_norm(2, 1e-5, vb)?;
///     for step in 0..100 {
///         // Training, and then:
///         if step % 50 == 0 {
///             assert_same(&*group, &vars)?;
///         }
///     }
///     // Rank 1 goes astray.
///     if group.rank() == 1 {
///         norm.running_stats().unwrap().set_momentum(Some(0.5))?;
///     }
///     norm.forward_train(&candle_core::Tensor::new(&[[1f32, 2.], [3., 5.]], &Device::Cpu)?)?;
///     assert_same(&*group, &vars)
/// });
/// assert!(outcome.unwrap_err().to_string().contains("running_mean"));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn assert_same(group: &dyn Collective, vars: &VarMap) -> Result<()> {
    let layer = "assert_same";
    if group.size() == 1 {
        return Ok(());
    }
    let named = named(vars);
    same_names(group, layer, &named)?;
    let digests = named.iter().map(|(_, var)| {
        let mut digest = Digest::default();
        digest.tensor(layer, var)?;
        Ok(digest.parts())
    });
    let own = agree(group, layer, digests.collect::<Result<Vec<_>>>())?;
    let mut first = own.concat();
    group.broadcast(&Call::new(layer), &mut first)?;
    let differs = own
        .iter()
        .zip(first.chunks(2))
        .map(|(own, first)| own != first);
    let mut differ: Vec<f64> = differs.map(|d| f64::from(u8::from(d))).collect();
    group.all_reduce_sum(&Call::new(layer), &mut differ)?;
    let found = differ.iter().zip(&named).find(|(count, _)| **count > 0.);
    if let Some((count, (name, _))) = found {
        let all = differ.iter().filter(|count| **count > 0.).count();
        bail!(
            "{layer}: expected variables with the same bits on every rank, got others than those \
            of rank 0 on {count} of {} ranks in {name}, the first of {all} variables that differ; \
            call broadcast_vars before training, sum_gradients in every step, and give all ranks \
            the same learning rate",
            group.size()
        )
    }
    Ok(())
}
