//! Computations as plain values: what is normalized, over which elements, by which statistics.
//!
//! A computation knows no device. A backend carries it out ([`backend`](crate::backend)), the graph
//! makes a node of it ([`graph`](crate::graph)), and its composed form, in candle's tensor
//! operations, serves every other device, derivatives of higher order, and tests.

mod activation;
mod channels;
pub(crate) mod composed;
mod cumulative;
mod dynamic;
mod gated;
mod groups;
mod lengths;
mod mixture;
mod modulate;
mod plane_moments;
mod rows;
mod scale_add;
mod scale_shift;
mod softmax;
mod spread;
mod synchronized;
mod transpose;
mod unit_rows;
mod weight_rows;

use std::fmt::Debug;

use candle_core::{DType, Result, Shape, Tensor};

use candle_norm_support::messages;

pub(crate) use activation::{Activation, activated};
pub(crate) use channels::{Channels, FixedStatistics, Source};
pub(crate) use cumulative::{Cumulative, Earlier};
pub(crate) use dynamic::Dynamic;
pub use dynamic::Squash;
pub use gated::Gate;
pub(crate) use gated::GatedRows;
pub(crate) use groups::Groups;
pub(crate) use lengths::Lengths;
pub(crate) use mixture::{Batch, Mixture, Planes, finite, softmax};
pub(crate) use modulate::Modulate;
pub(crate) use plane_moments::PlaneMoments;
pub use rows::Cast;
pub(crate) use rows::Rows;
pub(crate) use scale_add::{Places, ScaleAdd, Third};
pub(crate) use scale_shift::ScaleShift;
pub(crate) use softmax::Softmax;
pub(crate) use spread::Spread;
pub(crate) use synchronized::{
    First, JointMoments, Local, LocalMoments, LocalTensors, RankSum, SumNodes, Synchronized, wide,
};
pub(crate) use transpose::Transpose;
pub use unit_rows::L2Form;
pub(crate) use unit_rows::UnitRows;
pub(crate) use weight_rows::{WeightRows, norms_of_rows};

/// The arguments of a computation: the input, and the parameters that there are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Args<T> {
    pub(crate) x: T,
    pub(crate) weight: Option<T>,
    pub(crate) bias: Option<T>,
}

/// The gradients of the arguments, as far as anything asks for them.
#[derive(Debug)]
pub(crate) struct Gradients<T> {
    pub(crate) dx: T,
    pub(crate) dweight: Option<T>,
    pub(crate) dbias: Option<T>,
}

/// The result of a composed form.
#[derive(Debug)]
pub(crate) struct Composed {
    pub(crate) y: Tensor,
    /// Where the computation forms statistics that a layer asks for.
    pub(crate) statistics: Option<composed::Statistics>,
}

impl From<Tensor> for Composed {
    fn from(y: Tensor) -> Self {
        Self {
            y,
            statistics: None,
        }
    }
}

/// A computation with one output, of an input that is not empty and of at most two parameters.
pub(crate) trait Computation: Clone + Debug + Send + Sync + 'static {
    /// The name that messages begin with.
    fn layer(&self) -> &'static str;

    /// The shape and dtype of the output for an input of this shape and dtype.
    fn output(&self, x: &Shape, dtype: DType) -> (Shape, DType) {
        (x.clone(), dtype)
    }

    /// Whether the backward reads the input, which must then be what it was in the forward.
    fn backward_reads_input(&self) -> bool {
        true
    }

    /// Whether the backward reads the bias, as it must before an activation.
    fn backward_reads_bias(&self) -> bool {
        false
    }

    /// Whether the weight is a second input rather than a parameter: an optimizer steps over no
    /// result of an operation, so that only a variable itself is copied for the backward.
    fn weight_is_input(&self) -> bool {
        false
    }

    /// The output by tensor operations, with gradients by candle.
    fn composed(&self, args: Args<&Tensor>) -> Result<Composed>;

    /// The gradients by tensor operations, for derivatives of higher order: elements of each
    /// argument in its order, in any shape and any dtype that is wide enough.
    fn composed_gradients(&self, args: Args<&Tensor>, dy: &Tensor) -> Result<Gradients<Tensor>>;
}

/// A parameter that `computation` cannot do without.
pub(crate) fn argument<T>(computation: &impl Computation, value: Option<T>) -> Result<T> {
    match value {
        Some(value) => Ok(value),
        None => messages::internal(computation.layer(), "its parameter"),
    }
}

/// The axes of a contiguous tensor with channels, `[outer, channels, inner]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChannelAxes {
    pub(crate) outer: usize,
    pub(crate) channels: usize,
    pub(crate) inner: usize,
}

impl ChannelAxes {
    /// The axes of `x` `[N, C, *]`, which is not empty.
    pub(crate) fn of(x: &Tensor) -> Self {
        let (outer, channels) = (x.dims()[0], x.dims()[1]);
        Self {
            outer,
            channels,
            inner: x.elem_count() / (outer * channels),
        }
    }
}
