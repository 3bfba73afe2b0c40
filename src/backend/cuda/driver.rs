//! The kernels on NVIDIA GPUs, by candle's device: the one file that speaks of the driver.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
    SyncOnDrop,
};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, DType, Result};
use candle_norm_cuda_kernels::Launch;
use candle_norm_cuda_kernels::ptx::{self, Module};
use half::{bf16, f16};

use super::{Arg, Launcher};
use candle_norm_support::messages;

/// The compute capability that the kernels are compiled for; the driver takes them to later ones.
const BUILT_FOR: &str = "8.0";

/// The driver of the GPU, on the stream of candle's device.
pub(crate) struct Driver;

/// The module of each kernel.
fn modules() -> &'static HashMap<&'static str, Module> {
    static MODULES: OnceLock<HashMap<&'static str, Module>> = OnceLock::new();
    MODULES.get_or_init(|| {
        let mut found = HashMap::new();
        for module in ptx::modules() {
            for entry in module.ptx.split(".entry ").skip(1) {
                let end = entry.find(|c: char| c == '(' || c.is_whitespace());
                found.insert(&entry[..end.unwrap_or(entry.len())], module);
            }
        }
        found
    })
}

/// A kernel, whose module is loaded when it is first asked for.
fn function(layer: &str, device: &CudaDevice, kernel: &str) -> Result<CudaFunction> {
    let Some(module) = modules().get(kernel) else {
        return messages::internal(layer, &format!("a kernel {kernel}"));
    };
    let name = format!("candle_norm_{}", module.name);
    match device.get_or_load_custom_func(kernel, &name, module.ptx) {
        Ok(function) => Ok(function.into_cuda_function()),
        Err(why) => {
            let capability = device.cuda_stream().context().compute_capability();
            let capability = match capability {
                Ok((major, minor)) => format!("{major}.{minor}"),
                Err(_) => "unknown".to_string(),
            };
            messages::not_loaded(layer, BUILT_FOR, &capability, &why.to_string())
        }
    }
}

fn alloc<T: CudaDType + DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaStorage> {
    // SAFETY: a kernel writes every element before anything reads one.
    let slice = unsafe { device.alloc::<T>(len)? };
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// `$body` for the slice `$slice` of a storage.
macro_rules! for_slice {
    ($layer:expr, $storage:expr, $slice:ident => $body:expr) => {
        match $storage {
            CudaStorageSlice::F32($slice) => $body,
            CudaStorageSlice::F64($slice) => $body,
            CudaStorageSlice::F16($slice) => $body,
            CudaStorageSlice::BF16($slice) => $body,
            CudaStorageSlice::I64($slice) => $body,
            _ => return messages::internal($layer, "a dtype that kernels know"),
        }
    };
}

/// An argument as the driver takes it: a word, and what orders streams as long as it is alive.
fn word<'a>(
    layer: &str,
    arg: &'a mut Arg<'_, CudaStorage>,
    stream: &'a CudaStream,
) -> Result<(u64, Option<SyncOnDrop<'a>>)> {
    Ok(match arg {
        Arg::Read(storage, at) => {
            let skipped = *at * storage.dtype().size_in_bytes();
            let (start, sync) = for_slice!(layer, &storage.slice, s => s.device_ptr(stream));
            (start + skipped as u64, Some(sync))
        }
        Arg::Write(storage) => {
            let (start, sync) = for_slice!(
                layer, &mut storage.slice, s => s.device_ptr_mut(stream)
            );
            (start, Some(sync))
        }
        Arg::Null => (0, None),
        Arg::I64(v) => (*v as u64, None),
        // The first four bytes of a word: devices and their hosts are little-endian.
        Arg::I32(v) => (u64::from(*v as u32), None),
        Arg::F64(v) => (v.to_bits(), None),
    })
}

impl Launcher for Driver {
    type Storage = CudaStorage;

    fn alloc(like: &CudaStorage, dtype: DType, len: usize) -> Result<CudaStorage> {
        let device = like.device();
        match dtype {
            DType::F32 => alloc::<f32>(device, len),
            DType::F64 => alloc::<f64>(device, len),
            DType::F16 => alloc::<f16>(device, len),
            DType::BF16 => alloc::<bf16>(device, len),
            DType::I64 => alloc::<i64>(device, len),
            _ => messages::internal("CUDA", "a dtype that kernels know"),
        }
    }

    fn launch(
        layer: &'static str,
        like: &CudaStorage,
        launch: &Launch,
        args: &mut [Arg<'_, CudaStorage>],
    ) -> Result<()> {
        let device = like.device();
        let function = function(layer, device, &launch.kernel)?;
        let stream = device.cuda_stream();
        let words = args.iter_mut().map(|arg| word(layer, arg, &stream));
        let words = words.collect::<Result<Vec<_>>>()?;
        let mut builder = stream.launch_builder(&function);
        for (word, _) in &words {
            builder.arg(word);
        }
        let [gx, gy, gz] = launch.grid;
        let [bx, by, bz] = launch.block;
        let config = LaunchConfig {
            grid_dim: (gx, gy, gz),
            block_dim: (bx, by, bz),
            shared_mem_bytes: launch.shared,
        };
        // SAFETY: the words are the arguments that the geometry describes for the kernel, in its
        // order; the memory that they point to has the sizes that it names, and is alive: storages
        // are freed in the order of the stream.
        match unsafe { builder.launch(config) } {
            Ok(_) => Ok(()),
            Err(why) => messages::launch(layer, &launch.kernel, &why.to_string()),
        }
    }
}
