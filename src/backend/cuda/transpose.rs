//! The copy with two axes transposed.

use candle_core::Result;
use candle_norm_cuda_kernels::geometry;

use super::{Cuda, Device, Launcher, Operand, View};
use crate::backend::{Backward, Forward, On};
use crate::computations::{Args, ChannelAxes, Computation, Gradients, Transpose};

fn copied<L: Launcher>(
    device: Device<L>,
    x: &Operand<L::Storage>,
    [outer, rows, columns]: [usize; 3],
) -> Result<L::Storage> {
    let sizes = [outer, rows, columns].map(|n| n as u64);
    let element = device.element(x.dtype())?;
    let mut y = device.alloc(x.dtype(), x.len())?;
    device
        .call(&geometry::transpose::transpose(
            element, sizes[0], sizes[1], sizes[2],
        ))
        .read(x)
        .write(&mut y)
        .sizes(sizes)
        .run()?;
    Ok(y)
}

/// The elements of `x` `[N, C, *]`, which lie as `[N, *, C]`, in logical order.
pub(super) fn from_channels_last<'a, L: Launcher>(
    device: Device<L>,
    x: View<L::Storage>,
    axes: ChannelAxes,
) -> Result<Operand<'a, L::Storage>> {
    let x = device.input(x)?;
    let y = copied(device, &x, [axes.outer, axes.inner, axes.channels])?;
    Ok(Operand::whole(y, x.len()))
}

fn transposed<L: Launcher>(x: View<L::Storage>) -> Result<L::Storage> {
    let device = Device::<L>::of(Transpose.layer(), x.storage);
    let (a, b, c) = x.layout.shape().dims3()?;
    copied(device, &device.input(x)?, [a, b, c])
}

impl<L: Launcher> On<Cuda<L>> for Transpose {
    type Saved = ();

    fn forward(&self, args: Args<View<L::Storage>>) -> Result<Forward<L::Storage, ()>> {
        let y = transposed::<L>(args.x)?;
        Ok(Forward { y, saved: () })
    }

    fn backward(&self, from: Backward<L::Storage, ()>) -> Result<Gradients<L::Storage>> {
        Ok(Gradients {
            dx: transposed::<L>(from.dy)?,
            dweight: None,
            dbias: None,
        })
    }
}
