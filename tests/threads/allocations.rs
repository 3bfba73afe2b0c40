//! Allocations of a call: little for small inputs, and no copy of an input that a
//! kernel can walk.

use allocation_counter::AllocationInfo;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::ops;

use testkit::data::noise;

/// Allocations of `f` on this thread, once it has run before.
fn allocated(f: impl Fn() -> Result<Tensor>) -> Result<AllocationInfo> {
    f()?;
    let mut result = None;
    let allocated = allocation_counter::measure(|| result = Some(f()));
    result.transpose()?;
    Ok(allocated)
}

/// One row costs about what an addition of candle costs, in calls and in bytes.
#[test]
fn one_row_takes_few_allocations() -> Result<()> {
    let x = noise(&[1, 768], DType::F32)?;
    let (weight, bias) = (noise(&[768], DType::F32)?, noise(&[768], DType::F32)?);
    let add = allocated(|| &x + &x)?;
    let (w, b) = (Some(&weight), Some(&bias));
    let layer = allocated(|| ops::layer_norm(&x, 768, w, b, 1e-5))?;
    let rms = allocated(|| ops::rms_norm(&x, 768, w, ops::RmsOptions::default()))?;
    for (name, norm) in [("layer norm", layer), ("RMS norm", rms)] {
        assert!(
            norm.count_total <= add.count_total + 12,
            "{name}: {norm:?}, an addition {add:?}"
        );
        assert!(
            norm.bytes_total <= add.bytes_total + 2048,
            "{name}: {norm:?}, an addition {add:?}"
        );
    }
    Ok(())
}

/// The output is of the size of the input; a copy would be another one.
#[test]
fn channels_last_input_of_batch_norm_is_not_copied() -> Result<()> {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = one_thread.map_err(candle_core::Error::wrap)?;
    pool.install(|| {
        let x = noise(&[8, 40, 40, 64], DType::F32)?.permute((0, 3, 1, 2))?;
        let size = (x.elem_count() * DType::F32.size_in_bytes()) as u64;
        let (mean, var) = (
            noise(&[64], DType::F32)?,
            Tensor::ones(64, DType::F32, &Device::Cpu)?,
        );
        let training = allocated(|| Ok(ops::batch_norm(&x, None, None, 1e-5)?.0))?;
        let inference =
            allocated(|| ops::batch_norm_inference(&x, [&mean, &var], None, None, 1e-5))?;
        for (name, allocated) in [("training", training), ("inference", inference)] {
            assert!(
                allocated.bytes_total < size * 3 / 2,
                "{name}: {allocated:?} for {size} bytes"
            );
        }
        Ok(())
    })
}

/// The statistics of planes are formed without an output of their own, and half precision without a
/// wider copy.
#[test]
fn switch_norm_allocates_its_output_and_little_else() -> Result<()> {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = one_thread.map_err(candle_core::Error::wrap)?;
    pool.install(|| {
        let shares = Tensor::ones(3, DType::F32, &Device::Cpu)?;
        let options = ops::SwitchOptions {
            instance: true,
            batch: ops::SwitchBatch::Own,
            unbiased: true,
            eps: 1e-5,
        };
        for dtype in [DType::F32, DType::BF16] {
            let x = noise(&[8, 16, 40, 40], dtype)?;
            let size = (x.elem_count() * dtype.size_in_bytes()) as u64;
            let norm = || ops::switch_norm(&x, None, None, [&shares, &shares], options);
            let allocated = allocated(|| Ok(norm()?.0))?;
            assert!(
                allocated.bytes_total < size * 3 / 2,
                "{dtype:?}: {allocated:?} for {size} bytes"
            );
        }
        Ok(())
    })
}

/// Statistics of rows are kept for a backward alone.
#[test]
fn inference_keeps_no_statistics_of_rows() -> Result<()> {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let pool = one_thread.map_err(candle_core::Error::wrap)?;
    pool.install(|| {
        let x = noise(&[4096, 4], DType::F32)?;
        let size = (x.elem_count() * DType::F32.size_in_bytes()) as u64;
        let inference = allocated(|| ops::layer_norm(&x, 4, None, None, 1e-5))?;
        assert!(
            inference.bytes_total < size + 4096,
            "{inference:?} for {size} bytes"
        );
        let tracked = Var::from_tensor(&x)?;
        let training = allocated(|| ops::layer_norm(&tracked, 4, None, None, 1e-5))?;
        assert!(training.bytes_total >= size + 4096 * 24, "{training:?}");
        Ok(())
    })
}
