//! Passes over tensors with channels, which several computations share: moments, normalization,
//! and the gradients of both.

use candle_core::Result;
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::channels::{Columns, Planes};

use super::operands::dtype;
use super::statistics::Moments;
use super::{Call, Device, Launcher, Operand};

/// Weight and bias of each channel.
pub(super) struct Affine<'a, S> {
    pub(super) weight: Option<Operand<'a, S>>,
    pub(super) bias: Option<Operand<'a, S>>,
}

/// The statistics that channels are normalized by.
pub(super) struct By<'a, S> {
    /// Zero where there is none.
    pub(super) mean: Option<&'a S>,
    pub(super) rest: Option<&'a S>,
    /// `1 / √(var + eps)`, or one where there is none.
    pub(super) third: Option<&'a S>,
    /// The third is the variance.
    pub(super) of_var: bool,
    pub(super) eps: f64,
}

impl<'a, S> By<'a, S> {
    pub(super) fn own<L: Launcher<Storage = S>>(moments: &'a Moments<L>) -> Self {
        Self {
            mean: Some(&moments.mean),
            rest: Some(&moments.rest),
            third: Some(&moments.inv_std),
            of_var: false,
            eps: 0.,
        }
    }

    /// Values less `mean`.
    pub(super) fn about(mean: &'a S, rest: Option<&'a S>) -> Self {
        Self {
            mean: Some(mean),
            rest,
            third: None,
            of_var: false,
            eps: 0.,
        }
    }
}

impl<'a, L: Launcher> Call<'a, L> {
    fn by(self, by: &By<'a, L::Storage>) -> Self {
        self.maybe_read_all(by.mean)
            .maybe_read_all(by.rest)
            .maybe_read_all(by.third)
    }

    fn planes(self, planes: Planes) -> Self {
        self.sizes([planes.outer, planes.channels, planes.inner])
    }

    fn matrix(self, m: Columns) -> Self {
        self.sizes([m.elements, m.width, m.rows, m.period, m.inner])
    }

    fn write_moments(self, moments: &'a mut Moments<L>) -> Self {
        self.write(&mut moments.mean)
            .write(&mut moments.rest)
            .write(&mut moments.inv_std)
            .write(&mut moments.var)
    }
}

/// How the weights of planes lie: `span` neighbors of a plane share one, and those of channel `c`
/// begin at `c % period · inner / span`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spread {
    pub(super) span: u64,
    pub(super) period: u64,
}

impl Spread {
    /// One weight for each channel.
    pub(super) fn by_channel(planes: Planes) -> Self {
        Self {
            span: planes.inner,
            period: planes.channels,
        }
    }

    fn sizes(self) -> [u64; 2] {
        [self.span, self.period]
    }
}

fn accumulator(types: Types) -> candle_core::DType {
    dtype(types.x().accumulator())
}

/// The moments of the channels of planes.
pub(super) fn own_of_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    x: &Operand<L::Storage>,
    center: bool,
    eps: f64,
) -> Result<Moments<L>> {
    let acc = accumulator(planes.types);
    let mut moments = Moments::alloc(device, acc, planes.channels as usize)?;
    let mut partial = device.alloc(acc, planes.moments_scratch() as usize)?;
    device
        .call(&planes.moments())
        .read(x)
        .write(&mut partial)
        .planes(planes)
        .parts(planes.parts())
        .flag(center)
        .run()?;
    device
        .call(&planes.merge())
        .read_all(&partial)
        .write_moments(&mut moments)
        .sizes([planes.channels])
        .parts(planes.parts())
        .float(eps)
        .run()?;
    Ok(moments)
}

/// The moments of the channels of columns.
pub(super) fn own_of_columns<L: Launcher>(
    device: Device<L>,
    columns: Columns,
    x: &Operand<L::Storage>,
    center: bool,
    eps: f64,
) -> Result<Moments<L>> {
    let acc = accumulator(columns.types);
    let channels = columns.period / columns.inner;
    let mut moments = Moments::alloc(device, acc, channels as usize)?;
    let mut partial = device.alloc(acc, columns.moments_scratch() as usize)?;
    device
        .call(&columns.moments())
        .read(x)
        .write(&mut partial)
        .matrix(columns)
        .parts(columns.across)
        .flag(center)
        .run()?;
    device
        .call(&columns.merge())
        .read_all(&partial)
        .write_moments(&mut moments)
        .matrix(columns)
        .parts(columns.parts)
        .float(eps)
        .run()?;
    Ok(moments)
}

/// Planes normalized by given statistics.
pub(super) fn normalized_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    x: &Operand<L::Storage>,
    affine: &Affine<L::Storage>,
    spread: Spread,
    by: &By<L::Storage>,
) -> Result<L::Storage> {
    let mut y = device.alloc(dtype(planes.types.x()), x.len())?;
    device
        .call(&planes.normalize())
        .read(x)
        .maybe_read(affine.weight.as_ref())
        .maybe_read(affine.bias.as_ref())
        .by(by)
        .write(&mut y)
        .planes(planes)
        .sizes(spread.sizes())
        .parts(planes.parts())
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(y)
}

/// Columns normalized by given statistics.
pub(super) fn normalized_columns<L: Launcher>(
    device: Device<L>,
    columns: Columns,
    x: &Operand<L::Storage>,
    affine: &Affine<L::Storage>,
    by: &By<L::Storage>,
) -> Result<L::Storage> {
    let mut y = device.alloc(dtype(columns.types.x()), x.len())?;
    device
        .call(&columns.normalize())
        .read(x)
        .maybe_read(affine.weight.as_ref())
        .maybe_read(affine.bias.as_ref())
        .by(by)
        .write(&mut y)
        .matrix(columns)
        .parts(columns.across)
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(y)
}

/// Planes normalized by their own statistics, in one launch where a channel fits.
pub(super) fn own_and_normalized_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    x: &Operand<L::Storage>,
    affine: &Affine<L::Storage>,
    spread: Spread,
    center: bool,
    eps: f64,
) -> Result<(L::Storage, Moments<L>)> {
    let Some(launch) = planes.fit() else {
        let moments = own_of_planes(device, planes, x, center, eps)?;
        let by = By::own(&moments);
        let y = normalized_planes(device, planes, x, affine, spread, &by)?;
        return Ok((y, moments));
    };
    let acc = accumulator(planes.types);
    let mut moments = Moments::alloc(device, acc, planes.channels as usize)?;
    let mut y = device.alloc(dtype(planes.types.x()), x.len())?;
    device
        .call(&launch)
        .read(x)
        .maybe_read(affine.weight.as_ref())
        .maybe_read(affine.bias.as_ref())
        .write(&mut y)
        .write_moments(&mut moments)
        .planes(planes)
        .sizes(spread.sizes())
        .float(eps)
        .flag(center)
        .run()?;
    Ok((y, moments))
}

/// The means of the gradient of x̂ and of its product with x̂, over each channel or group.
pub(super) struct Backs<S> {
    pub(super) mean: S,
    /// Times `1 / √(var + eps)`.
    pub(super) along: S,
}

/// Means of gradients for kernels to write.
pub(super) fn alloc_backs<L: Launcher>(
    device: Device<L>,
    types: Types,
    len: u64,
) -> Result<Backs<L::Storage>> {
    let alloc = || device.alloc(accumulator(types), len as usize);
    Ok(Backs {
        mean: alloc()?,
        along: alloc()?,
    })
}

/// The sums of the gradient of the output, and of its products with x less a mean, over the parts
/// of each channel; one mean for each `per_mean` channels.
pub(super) fn grad_sums_of_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    [x, dy]: [&Operand<L::Storage>; 2],
    mean: Option<&L::Storage>,
    per_mean: u64,
) -> Result<L::Storage> {
    let mut partial = device.alloc(accumulator(planes.types), planes.grad_scratch() as usize)?;
    device
        .call(&planes.grad_sums())
        .read(x)
        .read(dy)
        .maybe_read_all(mean)
        .write(&mut partial)
        .planes(planes)
        .sizes([per_mean])
        .parts(planes.parts())
        .run()?;
    Ok(partial)
}

/// The gradient of planes; without `backs`, the statistics do not depend on them.
pub(super) fn grad_input_of_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    [x, dy]: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    spread: Spread,
    by: &By<L::Storage>,
    backs: Option<&Backs<L::Storage>>,
) -> Result<L::Storage> {
    let mut dx = device.alloc(dtype(planes.types.x()), x.len())?;
    device
        .call(&planes.grad_input())
        .read(x)
        .read(dy)
        .maybe_read(weight)
        .by(by)
        .maybe_read_all(backs.map(|b| &b.mean))
        .maybe_read_all(backs.map(|b| &b.along))
        .write(&mut dx)
        .planes(planes)
        .sizes(spread.sizes())
        .parts(planes.parts())
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(dx)
}
