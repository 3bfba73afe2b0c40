//! State that all layers of the same running statistics share, beside the statistics themselves.

use std::collections::HashMap;
use std::sync::{
    Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use candle_core::{TensorId, Var};

/// The state of one set of variables. Layers hold its lock while they write these variables, or
/// read several of them. Whoever has the variables themselves, such as a `VarMap` that is saved or
/// loaded or whose averages are swapped in, holds none.
pub(super) struct Shared {
    running_mean: TensorId,
    state: RwLock<State>,
}

pub(super) struct State {
    pub(super) num_batches_tracked: Var,
    /// Whether a model saves that counter: then no other takes its place.
    counter_of_model: bool,
    /// Momentum of `set_momentum`, in place of the momentum of each layer.
    pub(super) momentum: Option<Option<f64>>,
    /// While statistics are recalibrated, the cumulative average replaces any momentum.
    pub(super) recalibrations: usize,
    /// Whether one of the layers refuses batches that are not finite.
    pub(super) refuse_non_finite: bool,
}

/// The states in use, by the identity of the running mean.
static STATES: LazyLock<Mutex<HashMap<TensorId, Weak<Shared>>>> = LazyLock::new(Default::default);

fn states() -> MutexGuard<'static, HashMap<TensorId, Weak<Shared>>> {
    STATES.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// The state of the variables that `running_mean` is one of; a new one, with this counter, if
    /// no layer has them yet. `of_model` says whether a model saves the counter.
    pub(super) fn of(running_mean: &Var, num_batches_tracked: Var, of_model: bool) -> Arc<Self> {
        let id = running_mean.id();
        let mut states = states();
        if let Some(shared) = states.get(&id).and_then(Weak::upgrade) {
            drop(states);
            let mut state = shared.write();
            if of_model && !state.counter_of_model {
                state.num_batches_tracked = num_batches_tracked;
                state.counter_of_model = true;
            }
            drop(state);
            return shared;
        }
        let shared = Arc::new(Self {
            running_mean: id,
            state: RwLock::new(State {
                num_batches_tracked,
                counter_of_model: of_model,
                momentum: None,
                recalibrations: 0,
                refuse_non_finite: false,
            }),
        });
        states.insert(id, Arc::downgrade(&shared));
        shared
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    /// Leaves an entry that another layer of these variables has made in the meantime.
    fn drop(&mut self) {
        let mut states = states();
        let dead = states.get(&self.running_mean);
        if dead.is_some_and(|state| state.strong_count() == 0) {
            states.remove(&self.running_mean);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device, Result};

    fn counter() -> Result<Var> {
        Var::zeros((), DType::I64, &Device::Cpu)
    }

    #[test]
    fn a_state_lasts_as_long_as_a_layer_of_its_variables() -> Result<()> {
        let mean = Var::zeros(2, DType::F32, &Device::Cpu)?;
        let known = || states().contains_key(&mean.id());
        assert!(!known());
        let first = Shared::of(&mean, counter()?, false);
        let second = Shared::of(&mean, counter()?, false);
        assert!(Arc::ptr_eq(&first, &second));
        drop(first);
        assert!(known());
        drop(second);
        assert!(!known());
        Ok(())
    }

    #[test]
    fn the_counter_of_a_model_takes_the_place_of_one_that_nobody_saves() -> Result<()> {
        let mean = Var::zeros(2, DType::F32, &Device::Cpu)?;
        let id = |shared: &Shared| shared.read().num_batches_tracked.id();
        let private = Shared::of(&mean, counter()?, false);
        let (first, second) = (counter()?, counter()?);
        let shared = Shared::of(&mean, first.clone(), true);
        assert_eq!((id(&private), id(&shared)), (first.id(), first.id()));
        Shared::of(&mean, second, true);
        Shared::of(&mean, counter()?, false);
        assert_eq!(id(&private), first.id());
        Ok(())
    }
}
