//! Elements with weights of any spread, a residual or an activation, which the kernels of a layout
//! do not have.

use candle_core::Result;
use candle_core::backend::BackendStorage;
use candle_norm_cuda_kernels::geometry::channels::Planes;
use candle_norm_cuda_kernels::geometry::pointwise::{self, Function, TIMES_WEIGHT};
use candle_norm_cuda_kernels::geometry::rows::MOST_SAMPLES;
use candle_norm_cuda_kernels::{Launch, Types};

use super::launches::{Affine, By, Form, Wanted, grads, sums_by_sample};
use super::operands::dtype;
use super::{Call, Device, Launcher, Operand, View};
use crate::computations::composed::Along;
use crate::computations::{Activation, ChannelAxes, Gradients, Spread};

/// The number and the slope of an activation, as kernels know it.
pub(super) fn function(activation: Option<Activation>) -> (i32, f64) {
    let (function, slope) = match activation {
        None => (Function::Identity, 0.),
        Some(Activation::Relu) => (Function::Relu, 0.),
        Some(Activation::Relu6) => (Function::Relu6, 0.),
        Some(Activation::LeakyRelu(slope)) => (Function::LeakyRelu, slope),
        Some(Activation::Silu) => (Function::Silu, 0.),
        Some(Activation::Gelu) => (Function::Gelu, 0.),
        Some(Activation::GeluTanh) => (Function::GeluTanh, 0.),
        Some(Activation::HardSwish) => (Function::HardSwish, 0.),
        Some(Activation::Sigmoid) => (Function::Sigmoid, 0.),
        Some(Activation::Mish) => (Function::Mish, 0.),
    };
    (function as i32, slope)
}

impl Spread {
    /// Places of weights along `[outer, channels, inner]`.
    pub(super) fn places(self, axes: ChannelAxes) -> [u64; 3] {
        let (channels, inner) = (axes.channels as u64, axes.inner as u64);
        match self {
            Self::Channel => [0, 1, 0],
            Self::SampleAndChannel => [channels, 1, 0],
            Self::Element => [channels * inner, inner, 1],
        }
    }
}

/// `act(x̂ · (weight + offset) + bias)` of each element.
pub(super) struct Elements<'a, S> {
    pub(super) shape: pointwise::Pointwise,
    pub(super) affine: Affine<'a, S>,
    pub(super) by: By<'a, S>,
    pub(super) offset: f64,
    pub(super) flags: i32,
    pub(super) activation: Option<Activation>,
}

/// The gradients that a backward of elements is asked for.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    /// `dx` of statistics that do not depend on x.
    dx: bool,
    /// The gradient behind the weight, or before it.
    grad: Option<Behind>,
    /// Gradients of weights and biases that have one element each.
    params: bool,
}

/// A place in the computation of an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behind {
    /// After weight and bias.
    Affine,
    /// After the normalization.
    Normalization,
}

/// Gradients of elements.
struct Found<S> {
    dx: Option<S>,
    grad: Option<S>,
    wide: Option<S>,
    params: [Option<S>; 2],
}

/// The input and a gradient in the accumulator's dtype, and those of weights and biases that have
/// one element each.
pub(super) struct Through<'a, S> {
    pub(super) x: Operand<'a, S>,
    pub(super) grad: Operand<'a, S>,
    pub(super) params: [Option<S>; 2],
}

/// Arguments of the backward of a normalization alone, in the accumulator's dtype.
pub(super) struct Wide<'a, S> {
    pub(super) types: Types,
    pub(super) x: Operand<'a, S>,
    pub(super) grad: Operand<'a, S>,
    pub(super) weight: Option<Operand<'a, S>>,
    /// Whether the gradients of weight and bias are left to it.
    pub(super) params: bool,
}

impl<S: BackendStorage> Elements<'_, S> {
    /// The arguments of both kernels that follow the outputs.
    fn rest<'b, L: Launcher<Storage = S>>(&'b self, call: Call<'b, L>, flags: i32) -> Call<'b, L> {
        let (function, slope) = function(self.activation);
        call.maybe_read(self.affine.weight.as_ref())
            .maybe_read(self.affine.bias.as_ref())
            .by(&self.by)
            .sizes(self.shape.sizes())
            .flag(self.by.of_var)
            .float(self.by.eps)
            .float(self.offset)
            .int(self.flags | flags)
            .int(function)
            .float(slope)
    }

    /// The output; a residual takes the place of the bias.
    pub(super) fn forward<L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        x: &Operand<S>,
        residual: Option<&Operand<S>>,
    ) -> Result<S> {
        let mut y = device.alloc(x.dtype(), x.len())?;
        let launch: Launch = self.shape.forward();
        let call = device.call(&launch).read(x).maybe_read(residual);
        self.rest(call.write(&mut y), 0).run()?;
        Ok(y)
    }

    fn backward<L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        [x, dy]: [&Operand<S>; 2],
        asked: Asked,
    ) -> Result<Found<S>> {
        let types = self.shape.types;
        let acc = dtype(types.x().accumulator());
        let alloc = |wanted: bool, dtype| {
            let alloc = || device.alloc(dtype, x.len());
            wanted.then(alloc).transpose()
        };
        let of_params = dtype(types.param());
        let mut found = Found {
            dx: alloc(asked.dx, x.dtype())?,
            grad: alloc(asked.grad.is_some(), acc)?,
            wide: alloc(asked.grad.is_some() && acc != x.dtype(), acc)?,
            params: [
                alloc(asked.params, of_params)?,
                alloc(asked.params, of_params)?,
            ],
        };
        let [dweight, dbias] = &mut found.params;
        let flags = match asked.grad {
            Some(Behind::Normalization) => TIMES_WEIGHT,
            Some(Behind::Affine) | None => 0,
        };
        let launch = self.shape.backward();
        let call = device
            .call(&launch)
            .read(x)
            .read(dy)
            .maybe_write(found.grad.as_mut())
            .maybe_write(found.wide.as_mut())
            .maybe_write(found.dx.as_mut())
            .maybe_write(dweight.as_mut())
            .maybe_write(dbias.as_mut());
        self.rest(call, flags).run()?;
        Ok(found)
    }

    /// The gradients of a normalization with this after it: through this first, and then through
    /// the `normalization` alone.
    pub(super) fn gradients<'b, L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        both: [&'b Operand<S>; 2],
        weight: Option<View<'b, S>>,
        by_element: bool,
        params: bool,
        normalization: impl FnOnce(Wide<'b, S>) -> Result<Gradients<S>>,
    ) -> Result<Gradients<S>> {
        let behind = match by_element {
            true => Behind::Normalization,
            false => Behind::Affine,
        };
        let through = self.through(device, both, behind, params && by_element)?;
        let Through {
            x,
            grad,
            params: own,
        } = through;
        let weight = weight.filter(|_| !by_element);
        let grads = normalization(Wide {
            types: device.types(x.dtype(), [])?,
            weight: device.maybe_param(weight, x.dtype())?,
            params: params && !by_element,
            x,
            grad,
        })?;
        let [dweight, dbias] = own;
        Ok(Gradients {
            dx: grads.dx,
            dweight: dweight.or(grads.dweight),
            dbias: dbias.or(grads.dbias),
        })
    }

    /// The gradient at a place behind which nothing is left to go through.
    pub(super) fn through<'b, L: Launcher<Storage = S>>(
        &self,
        device: Device<L>,
        [x, dy]: [&'b Operand<S>; 2],
        behind: Behind,
        params: bool,
    ) -> Result<Through<'b, S>> {
        let asked = Asked {
            dx: false,
            grad: Some(behind),
            params,
        };
        let found = self.backward(device, [x, dy], asked)?;
        let grad = device.launch(found.grad)?;
        Ok(Through {
            x: match found.wide {
                Some(wide) => Operand::whole(wide, x.len()),
                None => x.borrowed(),
            },
            grad: Operand::whole(grad, x.len()),
            params: found.params,
        })
    }
}

/// Whether kernels take weights along these axes.
pub(super) fn takes(dims: [usize; 3], along: Along) -> bool {
    along != Along::Ends || dims[0] <= MOST_SAMPLES
}

/// `x · weight + bias`, of `x` as `[outer, middle, inner]`, with weights along these axes.
pub(super) fn scaled<'a, S: BackendStorage>(
    types: Types,
    dims: [usize; 3],
    along: Along,
    affine: Affine<'a, S>,
) -> Elements<'a, S> {
    let dims = dims.map(|n| n as u64);
    let [_, middle, inner] = dims;
    Elements {
        shape: pointwise::Pointwise {
            types,
            dims,
            weights: match along {
                Along::Middle => [0, 1, 0],
                Along::Ends => [inner, 0, 1],
                Along::All => [middle * inner, inner, 1],
            },
            stats: [0, 0, 1],
        },
        affine,
        by: By::none(),
        offset: 0.,
        flags: 0,
        activation: None,
    }
}

/// The gradients of [`scaled`].
pub(super) fn grads_of_scaled<L: Launcher>(
    device: Device<L>,
    types: Types,
    (dims, along): ([usize; 3], Along),
    both: [&Operand<L::Storage>; 2],
    weight: Option<Operand<L::Storage>>,
    params: bool,
) -> Result<Gradients<L::Storage>> {
    let [outer, channels, inner] = dims.map(|n| n as u64);
    if along == Along::Middle {
        let planes = Planes {
            types,
            outer,
            channels,
            inner,
        };
        let wanted = Wanted { own: None, params };
        let (form, by) = (Form::of(planes), By::none());
        return grads(device, form, both, weight.as_ref(), &by, wanted);
    }
    let affine = Affine { weight, bias: None };
    let asked = Asked {
        dx: true,
        grad: None,
        params: params && along == Along::All,
    };
    let found = scaled(types, dims, along, affine).backward(device, both, asked)?;
    let [dweight, dbias] = match along == Along::Ends && params {
        true => sums_by_sample(device, types, both, dims)?.map(Some),
        false => found.params,
    };
    Ok(Gradients {
        dx: device.launch(found.dx)?,
        dweight,
        dbias,
    })
}
