//! Norms on a GPU: the kernels beside the composed path, candle-nn and a copy of the tensor on the
//! device, timed by CUDA events.
//!
//! ```text
//! cargo bench --features cuda --bench cuda                 # the table of docs/performance.md
//! cargo bench --features cuda --bench cuda -- layer bf16   # rows that contain all of these words
//! cargo bench --features cuda --bench cuda -- --json=FILE  # the numbers also as a file
//! ```
//!
//! A step is forward, a product with a fixed cotangent, and candle's backward to input and
//! parameters. candle-nn's fused LayerNorm and RmsNorm pass no gradients on, so that its steps go
//! through its `layer_norm_slow` and `rms_norm_slow`.

use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, Var};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
use candle_norm::{Path, batch_norm, group_norm, instance_norm, layer_norm, rms_norm, with_path};
use serde_json::{Map, Value, json};

/// The norms and the shapes that they are timed on.
const CASES: [(&str, &[usize]); 9] = [
    ("layer", &[16384, 1024]),
    ("layer", &[8192, 4096]),
    ("layer", &[64, 768]),
    ("rms", &[8192, 4096]),
    ("batch", &[32, 256, 56, 56]),
    ("batch", &[8, 64, 16, 16]),
    ("batch", &[8192, 256]),
    ("group", &[32, 256, 56, 56]),
    ("instance", &[32, 256, 56, 56]),
];

/// Calls in one measurement, and measurements that the median is taken of.
const CALLS: usize = 10;
const ROUNDS: usize = 9;

/// A norm in training mode.
type Forward = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// A time of a row, by its name in a file and at the head of the table.
const COLUMNS: [(&str, &str); 7] = [
    ("copy", "copy"),
    ("forward", "forward"),
    ("composed_forward", "composed"),
    ("candle_nn_forward", "candle-nn"),
    ("step", "step"),
    ("composed_step", "composed"),
    ("candle_nn_step", "candle-nn"),
];

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let device = Device::new_cuda(0)?;
    println!("milliseconds; candle-nn has no instance norm, and no batch norm in half precision");
    let heads = COLUMNS.map(|(_, head)| format!("{head:>9}"));
    println!("{:>32} {}", "", heads.join(" "));
    let mut rows = vec![];
    for (norm, dims) in CASES {
        for dtype in [DType::F32, DType::BF16] {
            let name = format!("{norm} {dims:?} {}", dtype.as_str());
            let skip = |w: &String| !w.starts_with('-') && !name.contains(w.as_str());
            if !words.iter().any(skip) {
                let times = row(norm, dims, dtype, &device)?;
                let cell = |t: Option<f64>| t.map_or(format!("{:>9}", ""), |t| format!("{t:>9.3}"));
                println!("{name:>32} {}", times.map(cell).join(" "));
                let named = COLUMNS.iter().zip(times);
                let times = named.map(|((name, _), time)| (name.to_string(), json!(time)));
                let of =
                    json!({"name": name, "norm": norm, "shape": dims, "dtype": dtype.as_str()});
                let mut row: Map<String, Value> = times.collect();
                row.extend(of.as_object().cloned().unwrap_or_default());
                rows.push(row);
            }
        }
    }
    match words.iter().find_map(|word| word.strip_prefix("--json=")) {
        Some(file) => Ok(std::fs::write(file, json!(rows).to_string())?),
        None => Ok(()),
    }
}

/// Milliseconds of each of [`COLUMNS`], where candle-nn has one.
fn row(norm: &str, dims: &[usize], dtype: DType, device: &Device) -> Result<[Option<f64>; 7]> {
    let random = || Tensor::randn(0f32, 1., dims, device)?.to_dtype(dtype);
    let (x, dy) = (Var::from_tensor(&random()?)?, random()?);
    let data = x.as_tensor().detach();
    let vars = VarMap::new();
    let ours = ours(norm, dims[1], VarBuilder::from_varmap(&vars, dtype, device))?;
    let theirs = candle(norm, dims[1], dtype, device)?;
    let forward = |f: &Forward| median(device, || f(&data).map(drop));
    let step = |f: &Forward| {
        median(device, || {
            (f(&x)? * &dy)?.sum_all()?.backward()?;
            Ok(())
        })
    };
    let (their_forward, their_step) = theirs.unzip();
    let composed = |run: &dyn Fn() -> Result<f64>| with_path(Path::Composed, run);
    Ok([
        Some(median(device, || data.copy().map(drop))?),
        Some(forward(&ours)?),
        Some(composed(&|| forward(&ours))?),
        their_forward.as_ref().map(forward).transpose()?,
        Some(step(&ours)?),
        Some(composed(&|| step(&ours))?),
        their_step.as_ref().map(step).transpose()?,
    ])
}

fn ours(norm: &str, size: usize, vb: VarBuilder) -> Result<Forward> {
    fn training(layer: impl ModuleT + 'static) -> Forward {
        Box::new(move |x| layer.forward_t(x, true))
    }
    Ok(match norm {
        "layer" => training(layer_norm(size, 1e-5, vb)?),
        "rms" => training(rms_norm(size, 1e-5, vb)?),
        "batch" => training(batch_norm(size, 1e-5, vb)?),
        "group" => training(group_norm(32, size, 1e-5, vb)?),
        _ => training(instance_norm(size, 1e-5, vb)?),
    })
}

/// candle-nn's forward, and its forward that gradients pass.
fn candle(
    norm: &str,
    size: usize,
    dtype: DType,
    device: &Device,
) -> Result<Option<(Forward, Forward)>> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, device);
    let weight = Var::ones(size, dtype, device)?;
    let bias = Var::zeros(size, dtype, device)?;
    Ok(match norm {
        "layer" => {
            let layer = candle_nn::layer_norm(size, 1e-5, vb)?;
            Some((
                Box::new(move |x| layer.forward(x)),
                Box::new(move |x| candle_nn::ops::layer_norm_slow(x, &weight, &bias, 1e-5)),
            ))
        }
        "rms" => {
            let layer = candle_nn::rms_norm(size, 1e-5, vb)?;
            Some((
                Box::new(move |x| layer.forward(x)),
                Box::new(move |x| candle_nn::ops::rms_norm_slow(x, &weight, 1e-5)),
            ))
        }
        "batch" if dtype == DType::F32 => {
            let layer = candle_nn::batch_norm(size, 1e-5, vb)?;
            let again = layer.clone();
            Some((
                Box::new(move |x| layer.forward_t(x, true)),
                Box::new(move |x| again.forward_t(x, true)),
            ))
        }
        "group" => {
            let layer = candle_nn::group_norm(32, size, 1e-5, vb)?;
            let again = layer.clone();
            Some((
                Box::new(move |x| layer.forward(x)),
                Box::new(move |x| again.forward(x)),
            ))
        }
        _ => None,
    })
}

/// The median time of a call, in milliseconds, between events on candle's stream.
fn median(device: &Device, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let cuda: &CudaDevice = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let event = || {
        let event = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map_err(candle_core::Error::wrap)
    };
    for _ in 0..CALLS {
        call()?;
    }
    let mut times = vec![];
    for _ in 0..ROUNDS {
        device.synchronize()?;
        let start = event()?;
        for _ in 0..CALLS {
            call()?;
        }
        let end = event()?;
        let elapsed = start.elapsed_ms(&end).map_err(candle_core::Error::wrap)?;
        times.push(f64::from(elapsed) / CALLS as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUNDS / 2])
}
