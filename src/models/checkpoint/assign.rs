//! Assignment of the tensors of a file to variables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::PoisonError;

use candle_core::{DType, Result, Tensor, Var, bail};
use candle_nn::VarMap;

use super::report::{count, few, quoted};
use super::source::{Entry, Source};
use super::{LoadOptions, LoadReport, rename};
use crate::layers::params::{
    ALIASES, DIRECTION, LEFT_VECTOR, MAGNITUDE, NUM_BATCHES_TRACKED, RIGHT_VECTOR, RUNNING_MEAN,
    RUNNING_VAR, same_axes,
};
use crate::ops::check;

type Vars = HashMap<String, Var>;
type Entries = BTreeMap<String, Entry>;

/// Outcome of a load for one variable.
enum Fate {
    /// It takes the tensor that the file has under this name.
    Set {
        name: String,
        fitted: Fitted,
    },
    /// The file has a tensor for it that does not fit, and why.
    Mismatched {
        name: String,
        reason: String,
    },
    /// A counter whose statistics the file has.
    Reset,
    Missing,
}

/// A tensor as a variable holds it.
struct Fitted {
    value: Tensor,
    reshaped: bool,
}

/// Checks that at least one variable has a tensor in `source`. `other` is the remedy of a caller
/// that has no [`LoadOptions`].
pub(super) fn something(vars: &VarMap, source: &Source, other: Option<&str>) -> Result<()> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let label = &source.label;
    if vars.is_empty() {
        bail!(
            "{label}: expected a VarMap with the variables of a model, got an empty one; build the \
            model before loading"
        )
    }
    if vars
        .keys()
        .any(|name| find(name, &source.entries, &vars).is_some())
    {
        return Ok(());
    }
    let file: Vec<&str> = source.entries.keys().map(String::as_str).collect();
    if file.is_empty() {
        bail!("{label}: expected tensors for the model, got none")
    }
    let model: Vec<&str> = sorted(&vars).iter().map(|(n, _)| n.as_str()).collect();
    let remedy = match (other, rename::suggestion(&model, &file)) {
        (Some(other), _) => other.to_string(),
        (_, Some(rule)) => {
            format!("call checkpoint::load_with with {rule} in `rename` of LoadOptions")
        }
        _ => {
            "call checkpoint::load_with with a Rename::with in `rename` of LoadOptions".to_string()
        }
    };
    bail!(
        "{label}: expected the names of the model, {}, got none of them but {}; {remedy}",
        few(&model),
        few(&file)
    )
}

/// Sets the variables that have a tensor in `source`, all or none. `other` is the remedy of a
/// caller that has no [`LoadOptions`].
pub(super) fn assign(
    vars: &VarMap,
    source: Source,
    options: &LoadOptions,
    other: Option<&str>,
) -> Result<LoadReport> {
    let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let Source {
        label,
        entries,
        skipped,
        key,
    } = source;
    let vars_by_name = sorted(&vars);
    let mut unexpected: BTreeSet<&String> = entries.values().map(|e| &e.name).collect();
    let mut fates = vec![];
    for (name, var) in &vars_by_name {
        let fate = fate(name, var, &entries, &vars)?;
        if let Fate::Set { name, .. } | Fate::Mismatched { name, .. } = &fate {
            unexpected.remove(name);
        }
        fates.push(fate);
    }
    let mut report = LoadReport {
        unexpected: unexpected.into_iter().cloned().collect(),
        skipped,
        key,
        ..Default::default()
    };
    let mismatched: Vec<String> = vars_by_name
        .iter()
        .zip(&fates)
        .filter_map(|((name, _), fate)| match fate {
            Fate::Mismatched { reason, .. } => Some(format!("{name}: {reason}")),
            _ => None,
        })
        .collect();
    if !mismatched.is_empty() && !options.skip_mismatched {
        let remedy = other.unwrap_or(
            "to leave such variables as they are, call checkpoint::load_with with \
            `skip_mismatched` of LoadOptions",
        );
        bail!(
            "{label}: expected tensors that fit the model{}; {}; {remedy}",
            count(&mismatched),
            few(&mismatched)
        )
    }
    // What is left beside others is no misfit.
    let misfits: Vec<String> = vars_by_name
        .iter()
        .zip(&fates)
        .filter(|(_, fate)| matches!(fate, Fate::Mismatched { .. }))
        .map(|((name, _), _)| name.to_string())
        .collect();
    leave_together(&vars_by_name, &mut fates);
    let mut values = vec![];
    for ((name, var), fate) in vars_by_name.into_iter().zip(fates) {
        match fate {
            Fate::Set {
                name: found,
                fitted,
            } => {
                if *name != found {
                    report.renamed.push((name.clone(), found));
                }
                if fitted.reshaped {
                    report.reshaped.push(name.clone());
                }
                report.loaded.push(name.clone());
                values.push((var, fitted.value));
            }
            Fate::Mismatched { reason, .. } => report.mismatched.push((name.clone(), reason)),
            Fate::Reset => {
                report.counters_reset.push(name.clone());
                values.push((var, var.zeros_like()?.detach()));
            }
            Fate::Missing => report.missing.push(name.clone()),
        }
    }
    if options.strict {
        whole(&label, &report, &misfits, other)?;
    } else if report.loaded.is_empty() && !report.mismatched.is_empty() {
        let left = report.mismatched.iter();
        let left: Vec<String> = left.map(|(name, why)| format!("{name}: {why}")).collect();
        bail!(
            "{label}: expected a tensor that fits the model, got none; {}",
            few(&left)
        )
    }
    for (var, value) in values {
        var.set(&value)?;
    }
    Ok(report)
}

/// Checks that nothing was left out on either side.
fn whole(label: &str, report: &LoadReport, misfits: &[String], other: Option<&str>) -> Result<()> {
    let sides = [
        ("missing", report.missing.as_slice()),
        ("unexpected", &report.unexpected),
        ("mismatched", misfits),
    ];
    if sides.iter().all(|(_, names)| names.is_empty()) {
        return Ok(());
    }
    let sides: Vec<String> = sides
        .into_iter()
        .filter(|(what, names)| !names.is_empty() || *what != "mismatched")
        .map(|(what, names)| format!("{what}{}: {}", count(names), quoted(names)))
        .collect();
    let remedy = other
        .unwrap_or("to load a part, call checkpoint::load_with without `strict` of LoadOptions");
    bail!(
        "{label}: expected exactly the tensors of the model; {}; {remedy}",
        sides.join(", ")
    )
}

/// The variables in the order of their names, so that reports and messages do not depend on the
/// map.
fn sorted(vars: &Vars) -> Vec<(&String, &Var)> {
    let mut sorted: Vec<_> = vars.iter().collect();
    sorted.sort_by_key(|(name, _)| *name);
    sorted
}

fn fate(name: &str, var: &Var, entries: &Entries, vars: &Vars) -> Result<Fate> {
    let Some(entry) = find(name, entries, vars) else {
        let reset = last_part(name) == NUM_BATCHES_TRACKED && has_statistics(name, entries, vars);
        return Ok(if reset { Fate::Reset } else { Fate::Missing });
    };
    let found = entry.name.clone();
    let fitted = match &entry.tensor {
        Ok(tensor) => fit(name, var, tensor)?,
        Err(reason) => Err(reason.clone()),
    };
    let fitted = match fitted {
        Ok(fitted) => fitted,
        Err(reason) => {
            let reason = match name == found {
                true => reason,
                false => format!("{reason} in {found}"),
            };
            return Ok(Fate::Mismatched {
                name: found,
                reason,
            });
        }
    };
    let value = &fitted.value;
    // As the variable holds it: what is finite in f64 need not be so in f32.
    let variance = last_part(name) == RUNNING_VAR[0];
    let mut vectors = [LEFT_VECTOR[0], RIGHT_VECTOR[0]].into_iter();
    let vector = vectors.any(|end| before(name, end).is_some());
    if variance || vector || last_part(name) == RUNNING_MEAN[0] {
        check::statistic("checkpoint", &found, value, variance)?;
    }
    let value = value.to_device(var.device())?;
    Ok(Fate::Set {
        name: found,
        fitted: Fitted { value, ..fitted },
    })
}

/// Tensors that have no meaning without each other: a mean of the file with a variance of the
/// model, and a count of neither. The counter alone may be absent.
fn leave_together(vars: &[(&String, &Var)], fates: &mut [Fate]) {
    let broken: BTreeMap<String, String> = vars
        .iter()
        .zip(fates.iter())
        .filter_map(|((name, _), fate)| {
            let why = match fate {
                Fate::Mismatched { .. } => format!("left beside {name}"),
                Fate::Missing if last_part(name) != NUM_BATCHES_TRACKED => {
                    format!("left beside {name}, which the file lacks")
                }
                _ => return None,
            };
            Some((group(name)?, why))
        })
        .collect();
    for ((name, _), fate) in vars.iter().zip(fates) {
        let Some(why) = group(name).and_then(|group| broken.get(&group)) else {
            continue;
        };
        *fate = match std::mem::replace(fate, Fate::Missing) {
            Fate::Set { name, .. } => Fate::Mismatched {
                name,
                reason: why.clone(),
            },
            Fate::Reset => Fate::Missing,
            other => other,
        };
    }
}

/// Group of variables that `name` is loaded with, if it has no meaning by itself.
fn group(name: &str) -> Option<String> {
    let statistics = [RUNNING_MEAN[0], RUNNING_VAR[0], NUM_BATCHES_TRACKED];
    [&statistics[..], &[MAGNITUDE[0], DIRECTION[0]]]
        .iter()
        .find_map(|members| {
            let prefix = members.iter().find_map(|end| before(name, end))?;
            Some(format!("{prefix}{}", members[0]))
        })
}

/// Prefix of `name` before its last parts `end`.
fn before<'a>(name: &'a str, end: &str) -> Option<&'a str> {
    let prefix = name.strip_suffix(end)?;
    (prefix.is_empty() || prefix.ends_with('.')).then_some(prefix)
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The tensor for the variable `name`: under that name, or under another name of its last part in
/// the same place, if that is no variable's own.
fn find<'a>(name: &str, entries: &'a Entries, vars: &Vars) -> Option<&'a Entry> {
    if let Some(exact) = entries.get(name) {
        return Some(exact);
    }
    ALIASES.iter().find_map(|names| {
        let prefix = before(name, names[0])?;
        names[1..].iter().find_map(|alias| {
            let alias = format!("{prefix}{alias}");
            entries.get(&alias).filter(|_| !vars.contains_key(&alias))
        })
    })
}

/// Whether the file has the statistics that the counter `name` belongs to: without them it says
/// nothing about its batches.
fn has_statistics(name: &str, entries: &Entries, vars: &Vars) -> bool {
    let prefix = name.strip_suffix(NUM_BATCHES_TRACKED).unwrap_or(name);
    [RUNNING_MEAN[0], RUNNING_VAR[0]]
        .iter()
        .any(|statistic| find(&format!("{prefix}{statistic}"), entries, vars).is_some())
}

/// `tensor` in the shape and dtype of the variable, or why it does not fit.
fn fit(name: &str, var: &Var, tensor: &Tensor) -> Result<std::result::Result<Fitted, String>> {
    let counter = last_part(name) == NUM_BATCHES_TRACKED;
    if !same_axes(tensor.dims(), var.dims()) {
        return Ok(Err(format!(
            "expected shape {:?}, got {:?}",
            var.dims(),
            tensor.dims()
        )));
    }
    if !counter && tensor.dtype().is_int() != var.dtype().is_int() {
        return Ok(Err(format!(
            "expected dtype {:?}, got {:?}",
            var.dtype(),
            tensor.dtype()
        )));
    }
    let reshaped = tensor.dims() != var.dims();
    let tensor = match tensor.dtype() {
        // candle 0.11.1 never comes back from converting these to f64.
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?,
        DType::F8E8M0 | DType::F6E2M3 | DType::F6E3M2 | DType::F4 => {
            return Ok(Err(format!(
                "expected dtype {:?}, got {:?}, which candle cannot convert",
                var.dtype(),
                tensor.dtype()
            )));
        }
        _ => tensor.clone(),
    };
    let tensor = tensor.reshape(var.shape())?;
    if counter {
        check::counter("checkpoint", name, &tensor)?;
    }
    let value = tensor.to_dtype(var.dtype())?;
    // A counter of one element is what some write for a number.
    let reshaped = reshaped && !counter;
    Ok(Ok(Fitted { value, reshaped }))
}
