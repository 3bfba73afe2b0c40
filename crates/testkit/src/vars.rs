//! Variables of a model.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

use crate::data::values;

/// A builder of variables in `vars`, on the CPU.
pub fn vb(vars: &VarMap, dtype: DType) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, dtype, &Device::Cpu)
}

/// A builder in `f32` of variables that nothing else refers to.
pub fn fresh_vb() -> VarBuilder<'static> {
    vb(&VarMap::new(), DType::F32)
}

/// One variable, as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Element type of the variable.
    pub dtype: DType,
    /// Shape of the variable.
    pub dims: Vec<usize>,
    /// Elements in row-major order.
    pub values: Vec<f64>,
}

/// Every variable, by name.
pub fn state(vars: &VarMap) -> HashMap<String, Stored> {
    let vars = vars.data().lock().expect("no thread panicked");
    let stored = |t: &Tensor| Stored {
        dtype: t.dtype(),
        dims: t.dims().to_vec(),
        values: values(t).expect("numbers"),
    };
    (vars.iter())
        .map(|(name, var)| (name.clone(), stored(var)))
        .collect()
}

/// Names of all variables, sorted.
pub fn names(vars: &VarMap) -> Vec<String> {
    let vars = vars.data().lock().expect("no thread panicked");
    let mut names: Vec<_> = vars.keys().cloned().collect();
    names.sort();
    names
}

/// The variable of a name.
#[track_caller]
pub fn var(vars: &VarMap, name: &str) -> Tensor {
    let vars = vars.data().lock().expect("no thread panicked");
    let found = vars.get(name).unwrap_or_else(|| panic!("no {name}"));
    found.as_tensor().clone()
}

/// The elements of the variable of a name, in row-major order.
#[track_caller]
pub fn values_of(vars: &VarMap, name: &str) -> Vec<f64> {
    values(&var(vars, name)).expect("numbers")
}

/// Sets the variable of a name.
pub fn set(vars: &VarMap, name: &str, value: &Tensor) -> Result<()> {
    vars.data().lock().expect("no thread panicked")[name].set(value)
}
