//! Bounds that no layer can beat: a copy of the tensor, and candle's engine around an op that only
//! copies.

use std::mem::MaybeUninit;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::case::{Case, Inputs};
use super::step::Layer;

/// A new buffer of the size of `x`, filled from it by all threads. It has no length, so that it
/// need not be a tensor to be dropped like one.
pub(crate) fn threaded_copy(x: &Tensor) -> Result<Buffer> {
    fn fill<T: Copy + Send + Sync>(from: &[T]) -> Vec<T> {
        /// Elements: small enough to share out, large enough to be one `memcpy`.
        const BLOCK: usize = 1 << 16;
        let mut to = Vec::with_capacity(from.len());
        to.spare_capacity_mut()
            .par_chunks_mut(BLOCK)
            .zip(from.par_chunks(BLOCK))
            .for_each(|(to, from)| copy_block(to, from));
        to
    }
    fn copy_block<T: Copy>(to: &mut [MaybeUninit<T>], from: &[T]) {
        for (to, from) in to.iter_mut().zip(from) {
            to.write(*from);
        }
    }
    let (storage, layout) = x.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets())
    else {
        bail!("expected a contiguous tensor on the CPU")
    };
    Ok(match storage {
        CpuStorage::F32(from) => Buffer::F32(fill(&from[start..end])),
        CpuStorage::F64(from) => Buffer::F64(fill(&from[start..end])),
        CpuStorage::F16(from) => Buffer::F16(fill(&from[start..end])),
        CpuStorage::BF16(from) => Buffer::BF16(fill(&from[start..end])),
        _ => bail!("expected a floating point tensor, got {:?}", x.dtype()),
    })
}

/// The buffer that [`threaded_copy`] fills; only ever dropped.
#[derive(Debug)]
#[expect(dead_code)]
pub(crate) enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    F16(Vec<half::f16>),
    BF16(Vec<half::bf16>),
}

/// The layer that copies: its output is `x`, every gradient a copy of what it is given.
pub(crate) fn engine(_: &Case, inputs: &Inputs) -> Result<Layer> {
    let weight = inputs.weight.clone();
    Ok(match inputs.bias.clone() {
        Some(bias) => Box::new(move |x| x.apply_op3(&weight, &bias, CopyOp)),
        None => Box::new(move |x| x.apply_op2(&weight, CopyOp)),
    })
}

struct CopyOp;

impl CopyOp {
    fn copy(storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        fn part<T: Clone>(values: &[T], layout: &Layout) -> Result<Vec<T>> {
            match layout.contiguous_offsets() {
                Some((start, end)) => Ok(values[start..end].to_vec()),
                None => bail!("expected a contiguous tensor"),
            }
        }
        let copy = match storage {
            CpuStorage::F32(values) => CpuStorage::F32(part(values, layout)?),
            CpuStorage::F64(values) => CpuStorage::F64(part(values, layout)?),
            CpuStorage::F16(values) => CpuStorage::F16(part(values, layout)?),
            CpuStorage::BF16(values) => CpuStorage::BF16(part(values, layout)?),
            _ => bail!("expected a floating point tensor"),
        };
        Ok((copy, layout.shape().clone()))
    }
}

impl CustomOp2 for CopyOp {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::copy(x, layout)
    }

    fn bwd(
        &self,
        _: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(dy.copy()?), Some(weight.detach().copy()?)))
    }
}

impl CustomOp3 for CopyOp {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::copy(x, layout)
    }

    fn bwd(
        &self,
        _: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let copy = |t: &Tensor| t.detach().copy().map(Some);
        Ok((copy(dy)?, copy(weight)?, copy(bias)?))
    }
}
