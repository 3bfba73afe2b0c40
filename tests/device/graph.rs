//! A training step is captured as a CUDA graph, and replayed.
//!
//! Results of the graph are copied into variables that were there before: no memory of the graph
//! outlives a replay. Streams are one alone, so that no event of another is waited for.
#![allow(unsafe_code)]

use candle_core::cuda_backend::cudarc::driver::sys::{
    CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::Norm;
use testkit::data::{Draw, values};
use testkit::table::Form;

use crate::sides::{forms_with_kernels, is_gpu, set_params};

const DIMS: [usize; 3] = [4, 6, 50];
const RATE: f64 = 0.125;

/// A layer in training: its variables, its input, and where a step leaves its results.
struct Training {
    norm: Box<dyn Norm>,
    vars: VarMap,
    x: Var,
    dy: Tensor,
    y: Var,
    dx: Var,
}

impl Training {
    fn new(form: &Form, dtype: DType, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let norm = (form.build)(&DIMS, VarBuilder::from_varmap(&vars, dtype, device))?;
        set_params(&vars)?;
        let numbers = |seed| {
            let numbers = Draw::new(seed).normal(DIMS.iter().product());
            let numbers = Tensor::from_vec(numbers, &DIMS, &Device::Cpu)?;
            numbers.to_dtype(dtype)?.to_device(device)
        };
        Ok(Self {
            norm,
            vars,
            x: Var::from_tensor(&numbers(1)?)?,
            dy: numbers(2)?,
            y: Var::zeros(&DIMS, dtype, device)?,
            dx: Var::zeros(&DIMS, dtype, device)?,
        })
    }

    /// Forward, backward, running statistics, and a step along the gradients.
    fn step(&self) -> Result<()> {
        let y = self.norm.forward_t(&self.x, true)?;
        let grads = (&y * &self.dy)?.sum_all()?.backward()?;
        self.y.set(&y.detach())?;
        if let Some(dx) = grads.get(&self.x) {
            self.dx.set(dx)?;
        }
        for var in self.vars.all_vars() {
            if let Some(gradient) = grads.get(&var) {
                var.set(&(var.as_detached_tensor() - (gradient * RATE)?)?)?;
            }
        }
        Ok(())
    }

    /// Everything that a step changes.
    fn state(&self) -> Result<Vec<(String, Vec<f64>)>> {
        let vars = self.vars.data().lock().expect("no thread panicked");
        let mut state = vec![("y", &self.y), ("dx", &self.dx)];
        state.extend(vars.iter().map(|(name, var)| (name.as_str(), var)));
        state.sort_by_key(|(name, _)| *name);
        let values = |(name, var): (&str, &Var)| Ok((name.to_string(), values(var)?));
        state.into_iter().map(values).collect()
    }
}

/// State that a step of a layer leaves after two replays of its graph, and after two steps.
fn check(form: &Form, dtype: DType, device: &Device) -> Result<()> {
    let cuda = device.as_cuda_device()?;
    let stream = cuda.cuda_stream();
    let (captured, eager) = (
        Training::new(form, dtype, device)?,
        Training::new(form, dtype, device)?,
    );
    let cache = cuda.enable_cuda_graph_htod_cache();
    // Loads the kernels, and strides of candle's own.
    let before = captured.state()?;
    Training::new(form, dtype, device)?.step()?;
    device.synchronize()?;
    stream
        .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        .map_err(Error::wrap)?;
    let step = captured.step();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0));
    step?;
    let Some(graph) = graph.map_err(Error::wrap)? else {
        candle_core::bail!("nothing was captured")
    };
    drop(cache);
    assert_eq!(captured.state()?, before, "a capture runs nothing");
    for _ in 0..2 {
        graph.launch().map_err(Error::wrap)?;
        eager.step()?;
    }
    device.synchronize()?;
    for ((name, got), (_, want)) in captured.state()?.iter().zip(eager.state()?) {
        let same = got
            .iter()
            .zip(&want)
            .all(|(a, b)| a.to_bits() == b.to_bits());
        if !same {
            candle_core::bail!("{name} of the graph is not that of the steps")
        }
    }
    Ok(())
}

fn check_all(with_kernels: bool) -> Result<()> {
    if !is_gpu()? {
        return Ok(());
    }
    // The default stream cannot be captured.
    let device = Device::new_cuda_with_stream(0)?;
    // SAFETY: all work is on the one stream of the device.
    unsafe { device.as_cuda_device()?.disable_event_tracking() };
    let mut faults = vec![];
    for (_, form) in forms_with_kernels(with_kernels) {
        for dtype in [DType::F32, DType::BF16] {
            if let Err(error) = check(form, dtype, &device) {
                faults.push(format!("{}, {dtype:?}: {error}", form.name));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

#[test]
fn steps_of_layers_with_kernels() -> Result<()> {
    check_all(true)
}

#[test]
fn steps_of_composed_layers() -> Result<()> {
    check_all(false)
}
