//! Linear layers and convolutions whose gradients are right on the CPU, out of candle's
//! two-dimensional ones.
//!
//! candle's `conv1d` has a wrong weight gradient, its `conv_transpose1d` no gradient at all, the
//! backward of its `conv2d` assumes that both axes leave the same number of trailing elements
//! unused, and its products of a transposed tensor with a broadcast one are wrong. Here every
//! product is one of two matrices, and every convolution a two-dimensional one over exactly the
//! elements that it uses, padded beforehand and trimmed afterwards.

use candle_core::{Result, Tensor, bail};

use super::check;
use crate::computations::composed;

/// The linear map that a weight and a bias apply to an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LinearMap {
    /// `x · weightᵀ` along the last axis.
    Dense,
    /// A sum over the elements under a moving kernel.
    Convolution(Geometry),
}

/// Geometry of a convolution, the same along every axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) transposed: bool,
    /// 1 for `[N, C, L]`, 2 for `[N, C, H, W]`.
    pub(crate) axes: usize,
    pub(crate) padding: usize,
    pub(crate) output_padding: usize,
    pub(crate) stride: usize,
    pub(crate) dilation: usize,
    pub(crate) groups: usize,
}

impl LinearMap {
    /// The shape of the weight, in PyTorch's and candle's order.
    pub(crate) fn weight_shape(
        self,
        layer: &str,
        inputs: usize,
        outputs: usize,
        kernel_size: usize,
    ) -> Result<Vec<usize>> {
        let g = match self {
            Self::Dense => {
                let shape = vec![outputs, inputs];
                check::countable(layer, "weight", &shape)?;
                return Ok(shape);
            }
            Self::Convolution(g) => g,
        };
        geometry(layer, &g)?;
        grouped_channels(layer, g.groups, inputs, outputs)?;
        let mut shape = match g.transposed {
            false => vec![outputs, inputs / g.groups],
            true => vec![inputs, outputs / g.groups],
        };
        shape.extend(std::iter::repeat_n(kernel_size, g.axes));
        check::countable(layer, "weight", &shape)?;
        // Where all outputs are groups of their own, the weight of a transposed convolution does
        // not have their axis.
        check::countable(layer, "bias", &[outputs])?;
        Ok(shape)
    }

    /// The axis of the weight that the outputs lie on, and how many there are.
    pub(crate) fn outputs(self, weight: &Tensor) -> (usize, usize) {
        match self {
            Self::Convolution(g) if g.transposed => (1, weight.dims()[1].saturating_mul(g.groups)),
            _ => (0, weight.dims()[0]),
        }
    }

    /// Number of outputs of a weight that anyone may have made. `name` is what a message calls it.
    pub(crate) fn checked_outputs(self, layer: &str, name: &str, weight: &Tensor) -> Result<usize> {
        let Self::Convolution(g) = self else {
            rank(layer, name, weight, 2)?;
            return Ok(self.outputs(weight).1);
        };
        geometry(layer, &g)?;
        rank(layer, name, weight, 2 + g.axes)?;
        let outputs = self.outputs(weight).1;
        if g.transposed {
            grouped_channels(layer, g.groups, weight.dims()[0], outputs)?;
        }
        Ok(outputs)
    }

    /// The weight, whose [outputs are checked](Self::checked_outputs), with the part of each output
    /// multiplied by its element of `scale` `[outputs]`.
    pub(crate) fn scaled(self, weight: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let dims = weight.dims();
        let mut line = vec![1; dims.len()];
        match self {
            Self::Convolution(g) if g.transposed => {
                // Axis 0 has the inputs of one group after the other, axis 1 the outputs of each.
                let mut by_group = vec![g.groups, dims[0] / g.groups];
                by_group.extend(&dims[1..]);
                (line[0], line[1]) = (g.groups, 1);
                line.insert(2, dims[1]);
                weight
                    .reshape(by_group)?
                    .broadcast_mul(&scale.reshape(line)?)?
                    .reshape(dims)
            }
            _ => {
                line[0] = dims[0];
                weight.broadcast_mul(&scale.reshape(line)?)
            }
        }
    }

    /// The map on `x`, with gradients for all arguments.
    pub(crate) fn apply(
        self,
        layer: &str,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        check::float(layer, "input", x)?;
        // candle has no half-precision conv2d on the CPU, and adds up its products in half
        // precision elsewhere.
        let acc = composed::accumulator(x.dtype());
        let parameter = |name, value: &Tensor| {
            check::param_dtype(layer, name, value, x)?;
            check::same_device(layer, name, value, x.device())?;
            value.to_dtype(acc)
        };
        let weight = parameter("weight", weight)?;
        let bias = bias.map(|b| parameter("bias", b)).transpose()?;
        if let Some(bias) = &bias {
            check::shape(layer, "bias", bias, &[self.outputs(&weight).1])?;
        }
        let (dtype, x) = (x.dtype(), x.to_dtype(acc)?);
        let y = match self {
            Self::Dense => dense(layer, &x, &weight, bias.as_ref()),
            Self::Convolution(g) => g.convolve(layer, &x, &weight, bias.as_ref()),
        };
        y?.to_dtype(dtype)
    }
}

fn dense(layer: &str, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    rank(layer, "weight", weight, 2)?;
    let (outputs, inputs) = weight.dims2()?;
    check::features(layer, x, inputs)?;
    let mut dims = x.dims().to_vec();
    dims[x.rank() - 1] = outputs;
    check::countable(layer, "an output", &dims)?;
    if x.elem_count() == 0 || outputs == 0 {
        return empty(&dims, dims.len() - 1, x, weight, bias);
    }
    let y = x
        .contiguous()?
        .reshape(((), inputs))?
        .matmul(&weight.t()?)?;
    let rows = y.dims()[0];
    composed::scale_shift(&y.reshape((rows, outputs, 1))?, None, bias)?.reshape(dims)
}

impl Geometry {
    fn convolve(
        self,
        layer: &str,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        geometry(layer, &self)?;
        rank(layer, "weight", weight, 2 + self.axes)?;
        rank(layer, "input", x, 2 + self.axes)?;
        let inputs = match self.transposed {
            false => weight.dims()[1].saturating_mul(self.groups),
            true => weight.dims()[0],
        };
        let outputs = LinearMap::Convolution(self).outputs(weight).1;
        grouped_channels(layer, self.groups, inputs, outputs)?;
        check::channels(layer, x, inputs)?;
        let mut dims = vec![x.dims()[0], outputs];
        let mut padded = vec![x.dims()[0], inputs.max(outputs)];
        for axis in 2..x.rank() {
            let (size, kernel) = (x.dims()[axis], weight.dims()[axis]);
            let output = self.output_size(size, kernel);
            dims.push(kernel_fits(layer, output, x, weight, &self)?);
            padded.extend(self.padded_size(size, kernel));
        }
        check::countable(layer, "a padded tensor", &padded)?;
        check::countable(layer, "an output", &dims)?;
        if dims.contains(&0) || x.elem_count() == 0 || weight.elem_count() == 0 {
            return empty(&dims, 1, x, weight, bias);
        }
        // One axis becomes the second of two.
        let (mut planes, mut kernel) = (x.clone(), weight.clone());
        if self.axes == 1 {
            planes = planes.unsqueeze(2)?;
            kernel = kernel.unsqueeze(2)?;
        }
        let y = match self.transposed {
            false => self.direct(&planes, &kernel, 4 - self.axes)?,
            true => self.transpose(&planes, &kernel, 4 - self.axes)?,
        };
        let y = y.contiguous()?.reshape((dims[0], outputs, ()))?;
        composed::scale_shift(&y, None, bias)?.reshape(dims)
    }

    fn span(self, kernel: usize) -> Option<usize> {
        kernel
            .checked_sub(1)?
            .checked_mul(self.dilation)?
            .checked_add(1)
    }

    /// The size of an axis with its padding: of the input, or, transposed, of the output that it is
    /// taken off from.
    fn padded_size(self, size: usize, kernel: usize) -> Option<usize> {
        if self.transposed {
            let moved = size.checked_sub(1)?.checked_mul(self.stride)?;
            let full = moved.checked_add(self.span(kernel)?)?;
            full.checked_add(self.output_padding)
        } else {
            size.checked_add(self.padding.checked_mul(2)?)
        }
    }

    /// The size of an output axis; none where the kernel does not fit.
    fn output_size(self, size: usize, kernel: usize) -> Option<usize> {
        let padded = self.padded_size(size, kernel)?;
        if self.transposed {
            padded.checked_sub(self.padding.checked_mul(2)?)
        } else {
            Some(padded.checked_sub(self.span(kernel)?)? / self.stride + 1)
        }
    }

    /// Axes from `first` on move.
    fn direct(self, x: &Tensor, weight: &Tensor, first: usize) -> Result<Tensor> {
        let mut x = x.clone();
        for axis in first..4 {
            if self.padding > 0 {
                x = x.pad_with_zeros(axis, self.padding, self.padding)?;
            }
            let span = self.span(weight.dims()[axis]).unwrap_or(0);
            let used = (x.dims()[axis] - span) / self.stride * self.stride + span;
            x = x.narrow(axis, 0, used)?;
        }
        x.contiguous()?.conv2d(
            &weight.contiguous()?,
            0,
            self.stride,
            self.dilation,
            self.groups,
        )
    }

    fn transpose(self, x: &Tensor, weight: &Tensor, first: usize) -> Result<Tensor> {
        let outputs = x
            .chunk(self.groups, 1)?
            .iter()
            .zip(weight.chunk(self.groups, 0)?)
            .map(|(x, w)| {
                let (x, w) = (x.contiguous()?, w.contiguous()?);
                x.conv_transpose2d(&w, 0, 0, self.stride, self.dilation)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut y = Tensor::cat(&outputs, 1)?;
        // Padding takes off both ends of the full output; output padding gives back at the far one.
        for axis in first..4 {
            if self.output_padding > self.padding {
                y = y.pad_with_zeros(axis, 0, self.output_padding - self.padding)?;
            }
            let full = y.dims()[axis] + self.output_padding.min(self.padding);
            y = y.narrow(axis, self.padding, full - 2 * self.padding)?;
        }
        Ok(y)
    }
}

/// A result that no element of the input reaches: the bias where there are outputs, with gradients
/// of zero for the rest.
fn empty(
    dims: &[usize],
    channel_axis: usize,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let mut line = vec![1; dims.len()];
    line[channel_axis] = dims[channel_axis];
    let y = Tensor::zeros(dims, x.dtype(), x.device())?;
    let y = match bias {
        Some(bias) if y.elem_count() > 0 => y.broadcast_add(&bias.reshape(line)?)?,
        _ => y,
    };
    let reached: Vec<&Tensor> = [Some(x), Some(weight), bias]
        .into_iter()
        .flatten()
        .collect();
    composed::anchored(&y, &reached)
}

fn geometry(layer: &str, g: &Geometry) -> Result<()> {
    for (name, value) in [
        ("stride", g.stride),
        ("dilation", g.dilation),
        ("groups", g.groups),
    ] {
        if value == 0 {
            bail!("{layer}: expected {name} of at least 1, got 0")
        }
    }
    if g.output_padding > 0 && g.output_padding >= g.stride.max(g.dilation) {
        bail!(
            "{layer}: expected output_padding below the stride or the dilation, got {} for stride \
            {} and dilation {}",
            g.output_padding,
            g.stride,
            g.dilation
        )
    }
    Ok(())
}

fn rank(layer: &str, name: &str, x: &Tensor, expected: usize) -> Result<()> {
    if x.rank() != expected {
        let hint = match name == "input" && x.rank() + 1 == expected {
            true => check::NO_BATCH_AXIS,
            false => "",
        };
        bail!(
            "{layer}: expected {name} of rank {expected}, got shape {:?}{hint}",
            x.dims()
        )
    }
    Ok(())
}

fn grouped_channels(layer: &str, groups: usize, inputs: usize, outputs: usize) -> Result<()> {
    if !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
        bail!(
            "{layer}: expected groups ({groups}) to divide the channels, got {inputs} in and \
            {outputs} out"
        )
    }
    Ok(())
}

/// The size of an output axis, if there is one.
fn kernel_fits(
    layer: &str,
    output: Option<usize>,
    x: &Tensor,
    weight: &Tensor,
    g: &Geometry,
) -> Result<usize> {
    match output {
        Some(size) => Ok(size),
        None => bail!(
            "{layer}: expected an input that the kernel fits, got size {:?} for weight shape {:?}, \
            padding {}, dilation {}",
            x.dims(),
            weight.dims(),
            g.padding,
            g.dilation
        ),
    }
}
