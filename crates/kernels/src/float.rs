//! Every kernel for every element type.
//!
//! The methods of a concrete type are no generic code, so that this crate compiles the kernels, and
//! no crate that calls them does so again.

use half::{bf16, f16};

use super::affine::AffinePair;
use super::channels::Following;
use super::dynamic::{DynamicGradients, DynamicParams, DynamicSpec};
use super::gated::{GatedGradients, GatedSpec};
use super::grads::{Gradients, Wanted};
use super::groups::GroupSpec;
use super::moments::Moments;
use super::rows::{Added, RowSpec};
use super::shape::{Order, Shape};
use super::simd::Elem;
use super::softmax::ExpSum;
use super::spread::{Frame, GradSums, Spread};
use super::stats::{Statistics, Stats};
use super::weight::{Floor, Length};
use super::{
    channels, dynamic, gated, groups, rows, scale_add, slice_moments, softmax, spread, transpose,
    weight,
};

mod sealed {
    pub trait Sealed {}
}

macro_rules! kernels {
    ($(
        $(#[$doc:meta])*
        fn $name:ident($($arg:ident: $type:ty),+ $(,)?) -> $output:ty = $kernel:expr;
    )+) => {
        /// The element types of tensors, with the kernels on slices of them: `f16`, `bf16`, `f32`
        /// and `f64`.
        ///
        /// # Panics
        /// Every kernel panics if lengths do not fit each other.
        pub trait Float: sealed::Sealed + Copy + Default + Send + Sync + 'static {
            /// Type that sums and products are formed in: `f32` or `f64`.
            type Acc: Float<Acc = Self::Acc>;

            $(
                $(#[$doc])*
                fn $name($($arg: $type),+) -> $output;
            )+
        }

        kernels!(@impl f16 in f32 { $(fn $name($($arg: $type),+) -> $output = $kernel;)+ });
        kernels!(@impl bf16 in f32 { $(fn $name($($arg: $type),+) -> $output = $kernel;)+ });
        kernels!(@impl f32 in f32 { $(fn $name($($arg: $type),+) -> $output = $kernel;)+ });
        kernels!(@impl f64 in f64 { $(fn $name($($arg: $type),+) -> $output = $kernel;)+ });
    };
    (@impl $t:ident in $acc:ident {
        $(fn $name:ident($($arg:ident: $type:ty),+) -> $output:ty = $kernel:expr;)+
    }) => {
        impl sealed::Sealed for $t {}

        impl Float for $t {
            type Acc = $acc;

            $(
                #[inline(never)]
                fn $name($($arg: $type),+) -> $output {
                    $kernel($($arg),+)
                }
            )+
        }
    };
}

kernels! {
    /// Layer norm or RMS norm of each row: `y`, and what each row was normalized by.
    fn rows_forward(
        x: &[Self],
        affine: AffinePair<Self::Acc>,
        spec: RowSpec,
    ) -> (Vec<Self>, Vec<Stats>) = rows::forward::<Self>;

    /// [`rows_forward`](Self::rows_forward) that keeps no statistics.
    fn rows_inference(x: &[Self], affine: AffinePair<Self::Acc>, spec: RowSpec) -> Vec<Self>
        = rows::inference::<Self>;

    /// [`rows_forward`](Self::rows_forward) of `x + residual`, and the sum.
    fn rows_add_forward(
        x: &[Self],
        residual: &[Self],
        affine: AffinePair<Self::Acc>,
        spec: RowSpec,
    ) -> Added<Self, Self::Acc> = rows::add_forward::<Self>;

    /// The gradients of [`rows_forward`](Self::rows_forward); those of weight and bias are empty
    /// unless `params` are wanted.
    fn rows_backward(
        x: &[Self],
        dy: &[Self],
        affine: AffinePair<Self::Acc>,
        stats: &[Stats],
        spec: RowSpec,
        params: bool,
    ) -> Gradients<Self> = rows::backward::<Self, Self>;

    /// [`rows_backward`](Self::rows_backward) for rows that were not rounded to the element, as the
    /// [sums](Added::sum) are.
    fn rows_backward_unrounded(
        x: &[Self::Acc],
        dy: &[Self],
        affine: AffinePair<Self::Acc>,
        stats: &[Stats],
        spec: RowSpec,
        params: bool,
    ) -> Gradients<Self::Acc> = rows::backward::<<Self as Elem>::Acc, Self>;

    /// Group norm: `y`, and what each group was normalized by, sample by sample.
    fn groups_forward(
        x: &[Self],
        affine: AffinePair<Self::Acc>,
        spec: GroupSpec,
    ) -> (Vec<Self>, Vec<Stats>) = groups::forward::<Self>;

    /// The gradients of [`groups_forward`](Self::groups_forward).
    fn groups_backward(
        x: &[Self],
        dy: &[Self],
        affine: AffinePair<Self::Acc>,
        stats: &[Stats],
        spec: GroupSpec,
    ) -> Gradients<Self> = groups::backward::<Self>;

    /// Batch norm: `y`, with its channels first whatever the order of `x`, and what each channel
    /// was normalized by.
    fn channels_forward(
        x: &[Self],
        order: Order,
        shape: Shape,
        affine: AffinePair<Self::Acc>,
        statistics: Statistics,
    ) -> (Vec<Self>, Vec<Stats>) = channels::forward::<Self>;

    /// The gradients of [`channels_forward`](Self::channels_forward). `dx` and `dy` have their
    /// channels first.
    fn channels_backward(
        x: &[Self],
        order: Order,
        dy: &[Self],
        shape: Shape,
        weight: Option<&[Self::Acc]>,
        stats: &[Stats],
        wanted: Wanted,
    ) -> Gradients<Self> = channels::backward::<Self>;

    /// [`channels_forward`](Self::channels_forward) with weights and biases of any spread, and an
    /// activation.
    fn spread_channels_forward(
        x: &[Self],
        order: Order,
        shape: Shape,
        following: Following<Self::Acc>,
        statistics: Statistics,
    ) -> (Vec<Self>, Vec<Stats>) = channels::spread_forward::<Self>;

    /// The gradients of [`spread_channels_forward`](Self::spread_channels_forward); those of weight
    /// and bias are empty unless they are wanted.
    #[allow(clippy::too_many_arguments)] // Those of the plain one, and a spread.
    fn spread_channels_backward(
        x: &[Self],
        order: Order,
        dy: &[Self],
        shape: Shape,
        following: Following<Self::Acc>,
        stats: &[Stats],
        wanted: Wanted,
    ) -> Gradients<Self> = channels::spread_backward::<Self>;

    /// The moments of each channel, for statistics that are merged with those of others; about zero
    /// where they are not `center`ed.
    fn channel_moments(x: &[Self], order: Order, shape: Shape, center: bool) -> Vec<Moments>
        = channels::moments::<Self>;

    /// The sums of `dy · x̂` and of `dy` of each channel: the gradients of weight and bias, and
    /// what [`channel_grad_input`](Self::channel_grad_input) takes the means of.
    fn channel_grad_sums(
        x: &[Self],
        order: Order,
        dy: &[Self],
        shape: Shape,
        stats: &[Stats],
    ) -> [Vec<f64>; 2] = channels::grad_sums::<Self>;

    /// `dx`, with its channels first, from the `means` of `dy · x̂` and of `dy` of each channel
    /// over all elements that its statistics were formed of; the second is zero where the mean is
    /// not subtracted.
    fn channel_grad_input(
        x: &[Self],
        order: Order,
        dy: &[Self],
        shape: Shape,
        weight: Option<&[Self::Acc]>,
        stats: &[Stats],
        means: &[[f64; 2]],
    ) -> Vec<Self> = channels::grad_input::<Self>;

    /// Weight norm, `g · v / max(‖v‖, least)` for each row of `len` elements of `v`: the weight,
    /// and the lengths of the rows.
    fn weight_forward(
        v: &[Self],
        g: &[Self::Acc],
        len: usize,
        least: f64,
    ) -> (Vec<Self>, Vec<Length>) = weight::forward::<Self>;

    /// The gradients of `v` and, in `f64`, of `g`, from that of the weight.
    fn weight_backward(
        v: &[Self],
        dw: &[Self],
        g: &[Self::Acc],
        lengths: &[Length],
        len: usize,
    ) -> (Vec<Self>, Vec<f64>) = weight::backward::<Self>;

    /// Each row of `len` elements over its length, which `floor` keeps from zero, and the lengths.
    fn unit_forward(v: &[Self], len: usize, floor: Floor) -> (Vec<Self>, Vec<Length>)
        = weight::unit_forward::<Self>;

    /// The gradient of [`unit_forward`](Self::unit_forward).
    fn unit_backward(v: &[Self], dy: &[Self], lengths: &[Length], len: usize) -> Vec<Self>
        = weight::unit_backward::<Self>;

    /// The lengths of the rows of `len` elements.
    fn row_lengths(v: &[Self], len: usize) -> Vec<Length> = weight::lengths::<Self>;

    /// The gradient of [`row_lengths`](Self::row_lengths), zero for a row of zeros.
    fn row_lengths_backward(
        v: &[Self],
        dlengths: &[f64],
        lengths: &[Length],
        len: usize,
    ) -> Vec<Self> = weight::lengths_backward::<Self>;

    /// Softmax of each row of `len` elements, or its logarithm, and the sums it was divided by.
    fn softmax_forward(x: &[Self], len: usize, log: bool) -> (Vec<Self>, Vec<ExpSum>)
        = softmax::forward::<Self>;

    /// The gradient of [`softmax_forward`](Self::softmax_forward).
    fn softmax_backward(
        x: &[Self],
        dy: &[Self],
        sums: &[ExpSum],
        len: usize,
        log: bool,
    ) -> Vec<Self> = softmax::backward::<Self>;

    /// `y = residual + x · weight`, in planes of `inner` elements of `shape`.
    fn scale_add(
        x: &[Self],
        residual: &[Self],
        shape: Shape,
        weight: &[Self::Acc],
        spread: Spread,
    ) -> Vec<Self> = scale_add::forward::<Self>;

    /// Dynamic tanh or erf: `y = weight · f(alpha · x + shift) + bias`.
    fn dynamic_forward(
        x: &[Self],
        params: DynamicParams<Self::Acc>,
        spec: DynamicSpec,
    ) -> Vec<Self> = dynamic::forward::<Self>;

    /// The gradients of [`dynamic_forward`](Self::dynamic_forward); those of the parameters only
    /// where they are `wanted`.
    fn dynamic_backward(
        x: &[Self],
        dy: &[Self],
        params: DynamicParams<Self::Acc>,
        spec: DynamicSpec,
        wanted: bool,
    ) -> DynamicGradients<Self> = dynamic::backward::<Self>;

    /// Gated RMS norm: `y`, and what each group of each row was normalized by.
    fn gated_forward(
        x: &[Self],
        gate: Option<&[Self]>,
        weight: Option<&[Self::Acc]>,
        spec: GatedSpec,
    ) -> (Vec<Self>, Vec<Stats>) = gated::forward::<Self, Self>;

    /// The gradients of [`gated_forward`](Self::gated_forward); that of the weight is empty unless
    /// `params` are wanted.
    fn gated_backward(
        x: &[Self],
        gate: Option<&[Self]>,
        dy: &[Self],
        weight: Option<&[Self::Acc]>,
        stats: &[Stats],
        spec: GatedSpec,
        params: bool,
    ) -> GatedGradients<Self, Self> = gated::backward::<Self, Self>;

    /// [`gated_forward`](Self::gated_forward) by a gate in the accumulator's precision.
    fn gated_wide_forward(
        x: &[Self],
        gate: Option<&[Self::Acc]>,
        weight: Option<&[Self::Acc]>,
        spec: GatedSpec,
    ) -> (Vec<Self>, Vec<Stats>) = gated::forward::<Self, <Self as Elem>::Acc>;

    /// The gradients of [`gated_wide_forward`](Self::gated_wide_forward).
    fn gated_wide_backward(
        x: &[Self],
        gate: Option<&[Self::Acc]>,
        dy: &[Self],
        weight: Option<&[Self::Acc]>,
        stats: &[Stats],
        spec: GatedSpec,
        params: bool,
    ) -> GatedGradients<Self, Self::Acc> = gated::backward::<Self, <Self as Elem>::Acc>;

    /// The moments of each row of `len` elements; about zero where they are not `center`ed.
    fn row_moments(x: &[Self], len: usize, center: bool) -> Vec<Moments>
        = slice_moments::of_rows::<Self>;

    /// Scale and shift: `y = x · weight + bias`.
    fn scale_shift(
        x: &[Self],
        shape: Shape,
        affine: AffinePair<Self::Acc>,
        spread: Spread,
    ) -> Vec<Self> = spread::scale_shift::<Self>;

    /// The gradients of [`scale_shift`](Self::scale_shift); those of weight and bias are empty
    /// unless `params` are wanted.
    fn scale_shift_backward(
        x: &[Self],
        dy: &[Self],
        shape: Shape,
        weight: Option<&[Self::Acc]>,
        spread: Spread,
        params: bool,
    ) -> Gradients<Self> = spread::scale_shift_backward::<Self>;

    /// `y = x̂ · weight + bias`, by given statistics, or by none.
    fn normalize(x: &[Self], frame: Frame, affine: AffinePair<Self::Acc>) -> Vec<Self>
        = |x, frame, affine| spread::normalize::<Self, Self>(x, frame, affine, false, None);

    /// The gradients of weight and bias of [`normalize`](Self::normalize), if `params` are wanted,
    /// and the sums that [`grad_input`](Self::grad_input) takes the means of.
    fn grad_sums(
        x: &[Self],
        dy: &[Self],
        frame: Frame,
        weight: Option<&[Self::Acc]>,
        params: bool,
    ) -> GradSums = |x, dy, frame, weight, params| {
        spread::grad_sums::<Self, Self, Self>(x, dy, frame, weight, params, false)
    };

    /// The gradient of the input of [`normalize`](Self::normalize).
    ///
    /// Where the statistics move with `x`, `means` has those of the sums of each
    /// [set](GradSums::sets), over all elements that the statistics were formed of; the second is
    /// zero where the mean is not subtracted.
    fn grad_input(
        x: &[Self],
        dy: &[Self],
        frame: Frame,
        weight: Option<&[Self::Acc]>,
        means: Option<&[[f64; 2]]>,
    ) -> Vec<Self> = spread::grad_input::<Self, Self>;

    /// `x`, which is `[outer, rows, columns]`, as `[outer, columns, rows]`.
    fn transposed(x: &[Self], dims: [usize; 3]) -> Vec<Self> = transpose::transposed::<Self>;
}
