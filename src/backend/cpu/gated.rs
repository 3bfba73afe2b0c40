//! Gated RMS norm.

use candle_core::{CpuStorage, Result, WithDType};

use super::{Arg, Cpu, Native, elements, parameter, with_native};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, Cast, Gate, GatedRows, Gradients};
use candle_norm_kernels::{GatedGradients, GatedSpec, Stats};

impl GatedRows {
    fn spec(&self) -> GatedSpec {
        GatedSpec {
            len: self.len,
            group: self.group,
            eps: self.eps,
            round_first: self.cast == Cast::BeforeWeight,
            gate: match self.gate {
                Gate::Before => candle_norm_kernels::Gate::Before,
                Gate::After => candle_norm_kernels::Gate::After,
            },
            activation: self.activation.into(),
        }
    }

    fn forward_of<T: Native>(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        let (x, weight) = (elements::<T>(args.x)?, parameter(args.bias)?);
        let (weight, spec) = (weight.as_deref(), self.spec());
        let (y, saved) = match args.weight {
            None => T::gated_forward(x, None, weight, spec),
            Some(gate) if gate.dtype() == T::DTYPE => {
                T::gated_forward(x, Some(elements(gate)?), weight, spec)
            }
            Some(gate) => {
                let gate = parameter(Some(gate))?;
                T::gated_wide_forward(x, gate.as_deref(), weight, spec)
            }
        };
        Ok(Forward {
            y: T::to_cpu_storage_owned(y),
            saved,
        })
    }

    fn backward_of<T: Native>(
        &self,
        from: Backward<CpuStorage, Vec<Stats>>,
    ) -> Result<Gradients<CpuStorage>> {
        let (x, dy, weight) = (
            elements::<T>(from.x)?,
            elements::<T>(from.dy)?,
            parameter(from.bias)?,
        );
        let (weight, spec, saved) = (weight.as_deref(), self.spec(), from.saved);
        Ok(match from.weight {
            None => stored(T::gated_backward(
                x,
                None,
                dy,
                weight,
                saved,
                spec,
                from.params,
            )),
            Some(gate) if gate.dtype() == T::DTYPE => {
                let gate = Some(elements(gate)?);
                stored(T::gated_backward(
                    x,
                    gate,
                    dy,
                    weight,
                    saved,
                    spec,
                    from.params,
                ))
            }
            Some(gate) => {
                let gate = parameter(Some(gate))?;
                let gate = gate.as_deref();
                stored(T::gated_wide_backward(
                    x,
                    gate,
                    dy,
                    weight,
                    saved,
                    spec,
                    from.params,
                ))
            }
        })
    }
}

/// The gradients as storages; where nobody wants that of the weight, it is empty and not looked at.
fn stored<T: WithDType, G: WithDType>(grads: GatedGradients<T, G>) -> Gradients<CpuStorage> {
    let stored = |is_empty: bool, grad: CpuStorage| (!is_empty).then_some(grad);
    let (no_gate, no_weight) = (grads.dgate.is_empty(), grads.dweight.is_empty());
    Gradients {
        dx: T::to_cpu_storage_owned(grads.dx),
        dweight: stored(no_gate, G::to_cpu_storage_owned(grads.dgate)),
        dbias: stored(no_weight, CpuStorage::F64(grads.dweight)),
    }
}

impl On<Cpu> for GatedRows {
    type Saved = Vec<Stats>;

    fn forward(&self, args: Args<Arg>) -> Result<Forward<CpuStorage, Vec<Stats>>> {
        with_native!(args.x.dtype(), self.layer, T => self.forward_of::<T>(args))
    }

    fn backward(&self, from: Backward<CpuStorage, Vec<Stats>>) -> Result<Gradients<CpuStorage>> {
        with_native!(from.x.dtype(), self.layer, T => self.backward_of::<T>(from))
    }
}
