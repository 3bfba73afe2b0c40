//! Passes over tensors with channels, which several computations share: moments, normalization,
//! and the gradients of both.

use candle_core::Result;
use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_norm_cuda_kernels::Types;
use candle_norm_cuda_kernels::geometry::channels::{Columns, Planes};
use candle_norm_cuda_kernels::geometry::rows::{Norm, Rows};

use super::operands::dtype;
use super::statistics::Moments;
use super::{Call, Device, Launcher, Operand};
use crate::computations::Gradients;

/// Weight and bias of each channel.
pub(super) struct Affine<'a, S> {
    pub(super) weight: Option<Operand<'a, S>>,
    pub(super) bias: Option<Operand<'a, S>>,
}

/// The statistics that channels are normalized by.
pub(super) struct By<'a, S> {
    /// Zero where there is none.
    pub(super) mean: Option<Operand<'a, S>>,
    pub(super) rest: Option<Operand<'a, S>>,
    /// `1 / √(var + eps)`, or one where there is none.
    pub(super) third: Option<Operand<'a, S>>,
    /// The third is the variance.
    pub(super) of_var: bool,
    pub(super) eps: f64,
}

impl<'a, S: BackendStorage> By<'a, S> {
    pub(super) fn own<L: Launcher<Storage = S>>(moments: &'a Moments<L>) -> Self {
        Self {
            mean: Some(Operand::from(&moments.mean, 0)),
            rest: Some(Operand::from(&moments.rest, 0)),
            third: Some(Operand::from(&moments.inv_std, 0)),
            ..Self::none()
        }
    }

    /// The values as they are.
    pub(super) fn none() -> Self {
        Self {
            mean: None,
            rest: None,
            third: None,
            of_var: false,
            eps: 0.,
        }
    }

    /// Values less `mean`.
    pub(super) fn about(mean: &'a S, rest: Option<&'a S>) -> Self {
        Self {
            mean: Some(Operand::from(mean, 0)),
            rest: rest.map(|rest| Operand::from(rest, 0)),
            ..Self::none()
        }
    }
}

impl<'a, L: Launcher> Call<'a, L> {
    pub(super) fn by(self, by: &'a By<L::Storage>) -> Self {
        self.maybe_read(by.mean.as_ref())
            .maybe_read(by.rest.as_ref())
            .maybe_read(by.third.as_ref())
    }

    fn planes(self, planes: Planes) -> Self {
        self.sizes([planes.outer, planes.channels, planes.inner])
    }

    fn matrix(self, m: Columns) -> Self {
        self.sizes([m.elements, m.width, m.rows, m.period, m.inner])
    }

    pub(super) fn write_backs(self, backs: Option<&'a mut Backs<L::Storage>>) -> Self {
        match backs {
            Some(Backs { mean, along }) => self.write(mean).write(along),
            None => self.null().null(),
        }
    }

    pub(super) fn write_moments(self, moments: &'a mut Moments<L>) -> Self {
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

/// The gradients that a backward is to compute.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// The statistics are those of x, about the means of the channels or about zero.
    pub(super) own: Option<bool>,
    pub(super) params: bool,
}

/// Memory for the gradients of parameters.
fn alloc_params<L: Launcher>(
    device: Device<L>,
    types: Types,
    channels: u64,
    wanted: Wanted,
) -> Result<[Option<L::Storage>; 2]> {
    let alloc = || device.alloc(dtype(types.param()), channels as usize);
    let alloc = || wanted.params.then(alloc).transpose();
    Ok([alloc()?, alloc()?])
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
    mean: Option<&Operand<L::Storage>>,
    per_mean: u64,
) -> Result<L::Storage> {
    let mut partial = device.alloc(accumulator(planes.types), planes.grad_scratch() as usize)?;
    device
        .call(&planes.grad_sums())
        .read(x)
        .read(dy)
        .maybe_read(mean)
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

/// The gradients of columns: of x, and of weight and bias where `params`. The statistics are those
/// of x, about the means of the channels or zero, or do not depend on it.
pub(super) fn grads_of_columns<L: Launcher>(
    device: Device<L>,
    columns: Columns,
    [x, dy]: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Gradients<L::Storage>> {
    let channels = columns.period / columns.inner;
    let [mut dweight, mut dbias] = alloc_params(device, columns.types, channels, wanted)?;
    let backs = |_| alloc_backs(device, columns.types, channels);
    let mut backs = wanted.own.map(backs).transpose()?;
    if wanted.params || wanted.own.is_some() {
        let acc = accumulator(columns.types);
        let mut partial = device.alloc(acc, columns.grad_scratch() as usize)?;
        device
            .call(&columns.grad_sums())
            .read(x)
            .read(dy)
            .maybe_read(by.mean.as_ref())
            .write(&mut partial)
            .matrix(columns)
            .parts(columns.across)
            .run()?;
        device
            .call(&columns.grad_merge())
            .read_all(&partial)
            .maybe_read(weight)
            .by(by)
            .maybe_write(dweight.as_mut())
            .maybe_write(dbias.as_mut())
            .write_backs(backs.as_mut())
            .matrix(columns)
            .parts(columns.parts)
            .float((columns.elements / channels) as f64)
            .flag(by.of_var)
            .float(by.eps)
            .flag(wanted.own == Some(true))
            .run()?;
    }
    let mut dx = device.alloc(dtype(columns.types.x()), x.len())?;
    device
        .call(&columns.grad_input())
        .read(x)
        .read(dy)
        .maybe_read(weight)
        .by(by)
        .maybe_read_all(backs.as_ref().map(|b| &b.mean))
        .maybe_read_all(backs.as_ref().map(|b| &b.along))
        .write(&mut dx)
        .matrix(columns)
        .parts(columns.across)
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(Gradients { dx, dweight, dbias })
}

/// [`grads_of_columns`] of planes with one weight for each channel, in one launch where a channel
/// fits.
pub(super) fn grads_of_planes<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    [x, dy]: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Gradients<L::Storage>> {
    let [mut dweight, mut dbias] = alloc_params(device, planes.types, planes.channels, wanted)?;
    if let (Some(center), Some(launch)) = (wanted.own, planes.grad_fit()) {
        let mut dx = device.alloc(dtype(planes.types.x()), x.len())?;
        device
            .call(&launch)
            .read(x)
            .read(dy)
            .maybe_read(weight)
            .by(by)
            .write(&mut dx)
            .maybe_write(dweight.as_mut())
            .maybe_write(dbias.as_mut())
            .null()
            .planes(planes)
            .sizes([planes.channels])
            .flag(center)
            .run()?;
        return Ok(Gradients { dx, dweight, dbias });
    }
    let backs = |_| alloc_backs(device, planes.types, planes.channels);
    let mut backs = wanted.own.map(backs).transpose()?;
    if wanted.params || wanted.own.is_some() {
        let partial = grad_sums_of_planes(device, planes, [x, dy], by.mean.as_ref(), 1)?;
        device
            .call(&planes.grad_merge())
            .read_all(&partial)
            .maybe_read(weight)
            .by(by)
            .maybe_write(dweight.as_mut())
            .maybe_write(dbias.as_mut())
            .write_backs(backs.as_mut())
            .sizes([planes.channels])
            .parts(planes.parts())
            .float((planes.outer * planes.inner) as f64)
            .flag(by.of_var)
            .float(by.eps)
            .flag(wanted.own == Some(true))
            .run()?;
    }
    let spread = Spread::by_channel(planes);
    let dx = grad_input_of_planes(device, planes, [x, dy], weight, spread, by, backs.as_ref())?;
    Ok(Gradients { dx, dweight, dbias })
}

/// [`grads_of_planes`] with one weight for each channel of each sample.
pub(super) fn grads_by_sample<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    [x, dy]: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Gradients<L::Storage>> {
    let all = planes.by_sample();
    let len = all.channels as usize;
    // The statistics of channels, beside each plane.
    let mut beside = device.alloc(accumulator(planes.types), 3 * len)?;
    device
        .call(&planes.spread())
        .by(by)
        .write(&mut beside)
        .sizes([planes.outer, planes.channels])
        .run()?;
    let part = |i: usize| Some(Operand::from(&beside, i * len));
    let by_plane = By {
        mean: part(0),
        rest: part(1),
        third: part(2),
        ..*by
    };
    let [mut dweight, mut dbias] = alloc_params(device, planes.types, all.channels, wanted)?;
    let backs = |_| alloc_backs(device, planes.types, all.channels);
    let mut backs = wanted.own.map(backs).transpose()?;
    if wanted.params || wanted.own.is_some() {
        let mean = by_plane.mean.as_ref();
        let partial = grad_sums_of_planes(device, all, [x, dy], mean, 1)?;
        device
            .call(&planes.grad_merge_by_sample())
            .read_all(&partial)
            .maybe_read(weight)
            .by(by)
            .maybe_write(dweight.as_mut())
            .maybe_write(dbias.as_mut())
            .write_backs(backs.as_mut())
            .sizes([planes.outer, planes.channels])
            .parts(all.parts())
            .float((planes.outer * planes.inner) as f64)
            .flag(by.of_var)
            .float(by.eps)
            .flag(wanted.own == Some(true))
            .run()?;
    }
    let (both, spread) = ([x, dy], Spread::by_channel(all));
    let dx = grad_input_of_planes(device, all, both, weight, spread, &by_plane, backs.as_ref())?;
    Ok(Gradients { dx, dweight, dbias })
}

/// The sums over the rows of each sample, `[samples, rows, cols]`, of `dy · x` and of `dy`.
pub(super) fn sums_by_sample<L: Launcher>(
    device: Device<L>,
    types: Types,
    [x, dy]: [&Operand<L::Storage>; 2],
    [samples, rows, cols]: [usize; 3],
) -> Result<[L::Storage; 2]> {
    let (acc, rows) = (accumulator(types), samples * rows);
    let spec = Rows {
        norm: Norm {
            center: false,
            add: false,
        },
        types,
        rows,
        cols,
        aligned: true,
    };
    let plan = device.launch(spec.sums_by_sample(samples))?;
    let ones = device.filled(Scalar::one(acc), rows)?;
    let mut partial = device.alloc(acc, samples * plan.parts * 2 * cols)?;
    device
        .call(&plan.columns)
        .read(x)
        .null()
        .read(dy)
        .read_all(&ones)
        .write(&mut partial)
        .sizes([rows as u64, cols as u64])
        .int(0)
        .run()?;
    let param = || device.alloc(dtype(types.param()), samples * cols);
    let (mut of_products, mut of_dy) = (param()?, param()?);
    device
        .call(&plan.finish)
        .read_all(&partial)
        .write(&mut of_products)
        .write(&mut of_dy)
        .sizes([plan.parts as u64, cols as u64])
        .run()?;
    Ok([of_products, of_dy])
}

/// The sum of each column of a matrix with one column for each channel.
pub(super) fn column_sums<L: Launcher>(
    device: Device<L>,
    columns: Columns,
    values: &Operand<L::Storage>,
) -> Result<L::Storage> {
    let acc = accumulator(columns.types);
    let mut partial = device.alloc(acc, columns.grad_scratch() as usize)?;
    let mut sums = device.alloc(dtype(columns.types.param()), columns.period as usize)?;
    // The gradient of a bias is such a sum.
    device
        .call(&columns.grad_sums())
        .read(values)
        .read(values)
        .null()
        .write(&mut partial)
        .matrix(columns)
        .parts(columns.across)
        .run()?;
    device
        .call(&columns.grad_merge())
        .read_all(&partial)
        .null()
        .by(&By::none())
        .null()
        .write(&mut sums)
        .write_backs(None)
        .matrix(columns)
        .parts(columns.parts)
        .float(1.)
        .flag(false)
        .float(1.)
        .flag(false)
        .run()?;
    Ok(sums)
}
