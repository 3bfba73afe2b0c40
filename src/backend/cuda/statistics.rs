//! Statistics of groups and channels, which stay on the device.

use candle_core::backend::BackendStorage;
use candle_core::op::{Add, BackpropOp, Recip};
use candle_core::{DType, Layout, Result, Tensor};
use candle_norm_cuda_kernels::geometry::channels::Columns;

use super::launches::column_sums;
use super::operands::cast;
use super::{Device, Launcher, Operand};
use crate::backend::{DeviceStorage, Statistics};

/// The statistics of each group or channel, in the accumulator's dtype.
pub(crate) struct Moments<L: Launcher> {
    layer: &'static str,
    len: usize,
    pub(super) mean: L::Storage,
    /// The rounding error of the mean.
    pub(super) rest: L::Storage,
    /// `1 / √(var + eps)`.
    pub(super) inv_std: L::Storage,
    /// Biased.
    pub(super) var: L::Storage,
}

impl<L: Launcher> Moments<L> {
    /// Memory for kernels to write.
    pub(super) fn alloc(device: Device<L>, dtype: DType, len: usize) -> Result<Self> {
        let alloc = || device.alloc(dtype, len);
        Ok(Self {
            layer: device.layer(),
            len,
            mean: alloc()?,
            rest: alloc()?,
            inv_std: alloc()?,
            var: alloc()?,
        })
    }

    /// Mean, what it was rounded by, `1 / √(var + eps)`, and variance of each channel.
    pub(super) fn of(device: Device<L>, len: usize, parts: [L::Storage; 4]) -> Self {
        let [mean, rest, inv_std, var] = parts;
        Self {
            layer: device.layer(),
            len,
            mean,
            rest,
            inv_std,
            var,
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.len
    }

    /// The mean, what it was rounded by, and the variance, in `f64`.
    pub(super) fn tensors(&self) -> Result<[Tensor; 3]> {
        let tensor = |values| Ok::<_, candle_core::Error>(tensor(self.wide(values)?, self.len));
        Ok([tensor(&self.mean)?, tensor(&self.rest)?, tensor(&self.var)?])
    }

    fn wide(&self, values: &L::Storage) -> Result<L::Storage> {
        cast(values, &Layout::contiguous(self.len), DType::F64)
    }

    /// The means with all their digits, in `f64`.
    pub(super) fn wide_mean(&self) -> Result<L::Storage> {
        let line = Layout::contiguous(self.len);
        let rest = self.wide(&self.rest)?;
        self.wide(&self.mean)?
            .binary_impl::<Add>(&rest, &line, &line)
    }

    /// The biased variances in `f64`.
    pub(super) fn wide_var(&self) -> Result<L::Storage> {
        self.wide(&self.var)
    }

    /// The mean of each column of `values` `[samples, channels]`, in `f64`.
    fn over_samples(&self, values: &L::Storage, channels: usize) -> Result<Tensor> {
        let device = Device::<L>::of(self.layer, values);
        let types = device.types(DType::F64, [])?;
        let samples = self.len / channels;
        let columns = Columns::new(types, samples as u64, channels as u64, 1);
        let sums = column_sums(device, columns, &Operand::all(values, self.len))?;
        let means = sums.affine(&Layout::contiguous(channels), 1. / samples as f64, 0.)?;
        Ok(tensor(means, channels))
    }
}

impl<L: Launcher> Statistics for Moments<L> {
    fn mean(&self) -> Result<Tensor> {
        Ok(tensor(self.wide_mean()?, self.len))
    }

    fn var(&self) -> Result<Tensor> {
        Ok(tensor(self.wide_var()?, self.len))
    }

    fn std(&self) -> Result<Tensor> {
        let inv_std = self.wide(&self.inv_std)?;
        let std = inv_std.unary_impl::<Recip>(&Layout::contiguous(self.len))?;
        Ok(tensor(std, self.len))
    }

    fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]> {
        Ok([
            Self::over_samples(self, &self.wide_mean()?, channels)?,
            Self::over_samples(self, &self.wide_var()?, channels)?,
        ])
    }
}

/// A vector outside of the graph.
pub(super) fn tensor(values: impl DeviceStorage, len: usize) -> Tensor {
    Tensor::from_storage(values.into_storage(), len, BackpropOp::none(), false)
}
