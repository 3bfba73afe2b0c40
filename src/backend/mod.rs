//! Backends: computations carried out on the storage of one device.
//!
//! A backend implements [`On`] for every computation, one file each. A new device is a new backend
//! and one more arm where [`graph`](crate::graph) picks between them; no layer and no op changes.

pub(crate) mod cpu;
#[cfg(feature = "internals")]
pub(crate) mod reference;

use candle_core::{Layout, Result, Tensor};

use crate::computations::{Args, Computation, Gradients};

/// A kind of storage, and who computes on it.
pub(crate) trait Backend {
    /// candle's storage of the device.
    type Storage;
}

/// A tensor as a backend sees it.
#[derive(Debug)]
pub(crate) struct View<'a, S> {
    pub(crate) storage: &'a S,
    pub(crate) layout: &'a Layout,
}

impl<S> Clone for View<'_, S> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<S> Copy for View<'_, S> {}

/// A forward that ran.
pub(crate) struct Forward<S, Saved> {
    pub(crate) y: S,
    pub(crate) saved: Saved,
}

/// Arguments of a backward.
pub(crate) struct Backward<'a, S, Saved> {
    pub(crate) x: View<'a, S>,
    pub(crate) weight: Option<View<'a, S>>,
    /// Where the computation [reads it](Computation::backward_reads_bias).
    pub(crate) bias: Option<View<'a, S>>,
    /// The gradient of the output, contiguous.
    pub(crate) dy: View<'a, S>,
    pub(crate) saved: &'a Saved,
    /// Whether anything asks for the gradients of the parameters.
    pub(crate) params: bool,
}

/// A computation on the backend `B`.
pub(crate) trait On<B: Backend>: Computation {
    /// State that the backward needs of the forward, in storage of the backend.
    type Saved: Send + Sync + 'static;

    /// Whether the input may lie in memory like this; it is made contiguous otherwise.
    fn takes(&self, x: &Layout) -> bool {
        x.is_contiguous()
    }

    /// The statistics among what was saved, where a layer may ask for them.
    fn statistics(_: &Self::Saved) -> Option<&dyn Statistics> {
        None
    }

    fn forward(&self, args: Args<View<B::Storage>>) -> Result<Forward<B::Storage, Self::Saved>>;

    /// The output alone, where no backward follows.
    fn inference(&self, args: Args<View<B::Storage>>) -> Result<B::Storage> {
        Ok(self.forward(args)?.y)
    }

    /// The gradients: of the input in its dtype, of the parameters in any that is wide enough.
    fn backward(&self, from: Backward<B::Storage, Self::Saved>) -> Result<Gradients<B::Storage>>;
}

/// A sum and what it was normalized to.
pub(crate) struct Added<S, Saved> {
    /// In the accumulator's dtype.
    pub(crate) sum: S,
    /// In the dtype of the input, where that is another.
    pub(crate) rounded: Option<S>,
    pub(crate) normalized: Forward<S, Saved>,
}

/// Rows of a sum: two inputs are added and the sum is normalized in one pass.
pub(crate) trait AddOn<B: Backend>: On<B> {
    fn add_forward(
        &self,
        args: Args<View<B::Storage>>,
        residual: View<B::Storage>,
    ) -> Result<Added<B::Storage, Self::Saved>>;
}

/// Statistics that a forward formed, as tensors outside of the graph: one value for each row,
/// group or channel, in `f64`.
pub(crate) trait Statistics {
    fn mean(&self) -> Result<Tensor>;

    /// Biased.
    fn var(&self) -> Result<Tensor>;

    /// `√(var + eps)`.
    fn std(&self) -> Result<Tensor>;

    /// The mean and the variance of each channel, averaged over the samples.
    fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]>;
}
