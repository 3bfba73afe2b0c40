//! Passes over tensors with channels, which several computations share: moments, normalization,
//! and the gradients of both.

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{DType, Result};
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

    /// Arguments of a kernel that reads a tensor, by its form; `more` of planes alone.
    fn pass<const N: usize>(self, form: Form, more: [u64; N]) -> Self {
        match form {
            Form::Planes(planes, _) => self
                .sizes([planes.outer, planes.channels, planes.inner])
                .sizes(more)
                .parts(planes.parts()),
            Form::Columns(columns) => self.matrix(columns).parts(columns.across),
        }
    }

    /// Arguments of a kernel that merges parts, by their form.
    fn merge(self, form: Form) -> Self {
        match form {
            Form::Planes(planes, _) => self.sizes([planes.channels]).parts(planes.parts()),
            Form::Columns(columns) => self.matrix(columns).parts(columns.parts),
        }
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

/// How a tensor with channels is read.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form {
    /// Along the neighbors of a channel in a sample.
    Planes(Planes, Spread),
    /// Down the rows of a matrix.
    Columns(Columns),
}

/// The launch of this name of a form.
macro_rules! of_form {
    ($form:expr, $launch:ident) => {
        match $form {
            Form::Planes(planes, _) => planes.$launch(),
            Form::Columns(columns) => columns.$launch(),
        }
    };
}

impl Form {
    /// Of one weight for each channel.
    pub(super) fn along(planes: Planes) -> Self {
        Self::Planes(planes, Spread::by_channel(planes))
    }

    /// [`along`](Self::along) where planes are long, else down columns.
    pub(super) fn of(planes: Planes) -> Self {
        let Planes {
            types,
            outer,
            channels,
            inner,
        } = planes;
        match planes.are_long() {
            true => Self::along(planes),
            false => Self::Columns(Columns::new(types, outer, channels, inner)),
        }
    }

    fn types(self) -> Types {
        match self {
            Self::Planes(planes, _) => planes.types,
            Self::Columns(columns) => columns.types,
        }
    }

    fn acc(self) -> DType {
        accumulator(self.types())
    }

    fn channels(self) -> u64 {
        match self {
            Self::Planes(planes, _) => planes.channels,
            Self::Columns(columns) => columns.period / columns.inner,
        }
    }

    /// Values of a channel.
    fn count(self) -> u64 {
        match self {
            Self::Planes(planes, _) => planes.outer * planes.inner,
            Self::Columns(columns) => columns.elements / self.channels(),
        }
    }

    /// The places of weights, of planes alone.
    fn spread(self) -> [u64; 2] {
        match self {
            Self::Planes(_, spread) => spread.sizes(),
            Self::Columns(_) => [0; 2],
        }
    }
}

/// The gradients that a backward is to compute.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// The statistics are those of x, about the means of the channels or about zero.
    pub(super) own: Option<bool>,
    pub(super) params: bool,
}

fn accumulator(types: Types) -> DType {
    dtype(types.x().accumulator())
}

/// The moments of the channels of a form.
pub(super) fn own<L: Launcher>(
    device: Device<L>,
    form: Form,
    x: &Operand<L::Storage>,
    center: bool,
    eps: f64,
) -> Result<Moments<L>> {
    let mut moments = Moments::alloc(device, form.acc(), form.channels() as usize)?;
    let mut partial = device.alloc(form.acc(), of_form!(form, moments_scratch) as usize)?;
    device
        .call(&of_form!(form, moments))
        .read(x)
        .write(&mut partial)
        .pass(form, [])
        .flag(center)
        .run()?;
    device
        .call(&of_form!(form, merge))
        .read_all(&partial)
        .write_moments(&mut moments)
        .merge(form)
        .float(eps)
        .run()?;
    Ok(moments)
}

/// Channels normalized by given statistics.
pub(super) fn normalized<L: Launcher>(
    device: Device<L>,
    form: Form,
    x: &Operand<L::Storage>,
    affine: &Affine<L::Storage>,
    by: &By<L::Storage>,
) -> Result<L::Storage> {
    let mut y = device.alloc(dtype(form.types().x()), x.len())?;
    device
        .call(&of_form!(form, normalize))
        .read(x)
        .maybe_read(affine.weight.as_ref())
        .maybe_read(affine.bias.as_ref())
        .by(by)
        .write(&mut y)
        .pass(form, form.spread())
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(y)
}

/// Channels normalized by their own statistics, in one launch where those of planes fit.
pub(super) fn own_and_normalized<L: Launcher>(
    device: Device<L>,
    form: Form,
    x: &Operand<L::Storage>,
    affine: &Affine<L::Storage>,
    center: bool,
    eps: f64,
) -> Result<(L::Storage, Moments<L>)> {
    let fit = match form {
        Form::Planes(planes, spread) => planes.fit().map(|launch| (launch, planes, spread)),
        Form::Columns(_) => None,
    };
    let Some((launch, planes, spread)) = fit else {
        let moments = own(device, form, x, center, eps)?;
        let y = normalized(device, form, x, affine, &By::own(&moments))?;
        return Ok((y, moments));
    };
    let mut moments = Moments::alloc(device, form.acc(), planes.channels as usize)?;
    let mut y = device.alloc(dtype(planes.types.x()), x.len())?;
    device
        .call(&launch)
        .read(x)
        .maybe_read(affine.weight.as_ref())
        .maybe_read(affine.bias.as_ref())
        .write(&mut y)
        .write_moments(&mut moments)
        .sizes([planes.outer, planes.channels, planes.inner])
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
/// of each channel; of planes one mean for each `per_mean` channels.
pub(super) fn grad_sums<L: Launcher>(
    device: Device<L>,
    form: Form,
    [x, dy]: [&Operand<L::Storage>; 2],
    mean: Option<&Operand<L::Storage>>,
    per_mean: u64,
) -> Result<L::Storage> {
    let mut partial = device.alloc(form.acc(), of_form!(form, grad_scratch) as usize)?;
    device
        .call(&of_form!(form, grad_sums))
        .read(x)
        .read(dy)
        .maybe_read(mean)
        .write(&mut partial)
        .pass(form, [per_mean])
        .run()?;
    Ok(partial)
}

/// The gradient of channels; without `backs`, the statistics do not depend on them.
pub(super) fn grad_input<L: Launcher>(
    device: Device<L>,
    form: Form,
    [x, dy]: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    backs: Option<&Backs<L::Storage>>,
) -> Result<L::Storage> {
    let mut dx = device.alloc(dtype(form.types().x()), x.len())?;
    device
        .call(&of_form!(form, grad_input))
        .read(x)
        .read(dy)
        .maybe_read(weight)
        .by(by)
        .maybe_read_all(backs.map(|b| &b.mean))
        .maybe_read_all(backs.map(|b| &b.along))
        .write(&mut dx)
        .pass(form, form.spread())
        .flag(by.of_var)
        .float(by.eps)
        .run()?;
    Ok(dx)
}

/// Results of a merge of sums, as far as they are wanted.
pub(super) struct Merged<S> {
    pub(super) dweight: Option<S>,
    pub(super) dbias: Option<S>,
    pub(super) backs: Option<Backs<S>>,
}

impl<S: BackendStorage> Merged<S> {
    /// Memory for a kernel to write.
    fn alloc<L: Launcher<Storage = S>>(
        device: Device<L>,
        types: Types,
        channels: u64,
        wanted: Wanted,
    ) -> Result<Self> {
        let alloc = || device.alloc(dtype(types.param()), channels as usize);
        let alloc = || wanted.params.then(alloc).transpose();
        let backs = |_| alloc_backs(device, types, channels);
        Ok(Self {
            dweight: alloc()?,
            dbias: alloc()?,
            backs: wanted.own.map(backs).transpose()?,
        })
    }
}

/// The sums over channels that a backward takes.
pub(super) fn merged_sums<L: Launcher>(
    device: Device<L>,
    form: Form,
    both: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Merged<L::Storage>> {
    let mut merged = Merged::alloc(device, form.types(), form.channels(), wanted)?;
    if wanted.params || wanted.own.is_some() {
        let partial = grad_sums(device, form, both, by.mean.as_ref(), 1)?;
        device
            .call(&of_form!(form, grad_merge))
            .read_all(&partial)
            .maybe_read(weight)
            .by(by)
            .maybe_write(merged.dweight.as_mut())
            .maybe_write(merged.dbias.as_mut())
            .write_backs(merged.backs.as_mut())
            .merge(form)
            .float(form.count() as f64)
            .flag(by.of_var)
            .float(by.eps)
            .flag(wanted.own == Some(true))
            .run()?;
    }
    Ok(merged)
}

/// The gradients of channels: of x, and of weight and bias where `params`; in one launch where
/// planes fit.
pub(super) fn grads<L: Launcher>(
    device: Device<L>,
    form: Form,
    both: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Gradients<L::Storage>> {
    let [x, dy] = both;
    if let (Some(center), Form::Planes(planes, _)) = (wanted.own, form)
        && let Some(launch) = planes.grad_fit()
    {
        let params = Wanted {
            own: None,
            ..wanted
        };
        let mut merged = Merged::alloc(device, planes.types, planes.channels, params)?;
        let mut dx = device.alloc(dtype(planes.types.x()), x.len())?;
        device
            .call(&launch)
            .read(x)
            .read(dy)
            .maybe_read(weight)
            .by(by)
            .write(&mut dx)
            .maybe_write(merged.dweight.as_mut())
            .maybe_write(merged.dbias.as_mut())
            .null()
            .sizes([planes.outer, planes.channels, planes.inner])
            .sizes([planes.channels])
            .flag(center)
            .run()?;
        return Ok(Gradients {
            dx,
            dweight: merged.dweight,
            dbias: merged.dbias,
        });
    }
    let Merged {
        dweight,
        dbias,
        backs,
    } = merged_sums(device, form, both, weight, by, wanted)?;
    let dx = grad_input(device, form, both, weight, by, backs.as_ref())?;
    Ok(Gradients { dx, dweight, dbias })
}

/// [`grads`] of planes with one weight for each channel of each sample.
pub(super) fn grads_by_sample<L: Launcher>(
    device: Device<L>,
    planes: Planes,
    both: [&Operand<L::Storage>; 2],
    weight: Option<&Operand<L::Storage>>,
    by: &By<L::Storage>,
    wanted: Wanted,
) -> Result<Gradients<L::Storage>> {
    let all = planes.by_sample();
    let (form, len) = (Form::along(all), all.channels as usize);
    // The statistics of channels, beside each plane.
    let mut beside = device.alloc(form.acc(), 3 * len)?;
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
    let mut merged = Merged::alloc(device, planes.types, all.channels, wanted)?;
    if wanted.params || wanted.own.is_some() {
        let partial = grad_sums(device, form, both, by_plane.mean.as_ref(), 1)?;
        device
            .call(&planes.grad_merge_by_sample())
            .read_all(&partial)
            .maybe_read(weight)
            .by(by)
            .maybe_write(merged.dweight.as_mut())
            .maybe_write(merged.dbias.as_mut())
            .write_backs(merged.backs.as_mut())
            .sizes([planes.outer, planes.channels])
            .parts(all.parts())
            .float((planes.outer * planes.inner) as f64)
            .flag(by.of_var)
            .float(by.eps)
            .flag(wanted.own == Some(true))
            .run()?;
    }
    let backs = merged.backs.as_ref();
    Ok(Gradients {
        dx: grad_input(device, form, both, weight, &by_plane, backs)?,
        dweight: merged.dweight,
        dbias: merged.dbias,
    })
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
    let wanted = Wanted {
        own: None,
        params: true,
    };
    // The gradient of a bias is such a sum.
    let (form, by) = (Form::Columns(columns), By::none());
    let merged = merged_sums(device, form, [values, values], None, &by, wanted)?;
    device.launch(merged.dbias)
}
