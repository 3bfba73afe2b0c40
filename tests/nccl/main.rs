//! NCCL on one GPU: sums in its memory, which are those of one rank.
//!
//! ```sh
//! cargo test --release -p candle-norm-tests --features nccl --test nccl
//! ```

use std::sync::Arc;
use std::time::Duration;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap};
use candle_norm::distributed::{
    Call, Collective, DeviceSums, Nccl, Threads, assert_same, broadcast_vars, sum_gradients,
};
use candle_norm::{Norm, batch_norm, trainable_vars};
use testkit::compare::{assert_close, tolerance};
use testkit::data::{Draw, tensor, values};

/// A group of one that says it has two ranks: a group of one is left out by the layers.
#[derive(Debug)]
struct Two(Arc<dyn Collective>);

impl Collective for Two {
    fn rank(&self) -> usize {
        0
    }
    fn size(&self) -> usize {
        2
    }
    fn all_reduce_sum(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        self.0.all_reduce_sum(call, values)
    }
    fn all_reduce_sum_f32(&self, call: &Call, values: &mut [f32]) -> Result<()> {
        self.0.all_reduce_sum_f32(call, values)
    }
    fn broadcast(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        self.0.broadcast(call, values)
    }
    fn split(&self, color: usize) -> Result<Arc<dyn Collective>> {
        Ok(Arc::new(Self(self.0.split(color)?)))
    }
    fn device_sums(&self) -> Option<&dyn DeviceSums> {
        self.0.device_sums()
    }
}

/// The output, the gradients of input and weight, and the running statistics.
fn train(group: Option<Arc<dyn Collective>>, dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let mut draw = Draw::new(5);
    let dims = [6, 3, 8, 4];
    let drawn = [0; 2].map(|_| tensor(&draw.normal(dims.iter().product()), &dims, dtype));
    let [x, dy] = drawn.map(|t| t.and_then(|t| t.to_device(device)));
    let x = Var::from_tensor(&x?)?;
    let vars = VarMap::new();
    let builder = VarBuilder::from_varmap(&vars, dtype, device);
    let mut norm = batch_norm(3, 1e-5, builder)?;
    if let Some(group) = &group {
        norm = norm.synchronized(group.clone());
        broadcast_vars(&**group, &vars)?;
    }
    let y = norm.forward_t(&x, true)?;
    let mut grads = (&y * dy?)?.sum_all()?.backward()?;
    if let Some(group) = &group {
        sum_gradients(&**group, &trainable_vars(&vars), &mut grads)?;
        assert_same(&**group, &vars)?;
    }
    let grad = |t: &Tensor| grads.get(t).expect("a gradient").clone();
    let mut all = vec![y.detach(), grad(&x), grad(norm.weight().expect("a weight"))];
    all.extend(norm.buffers().into_iter().map(|(_, t)| t.detach()));
    all.iter().map(|t| t.to_device(&Device::Cpu)).collect()
}

#[test]
fn sums_on_the_device_are_those_of_the_host() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let host = Threads::group(1, Duration::from_secs(60))?.remove(0);
    let group = Nccl::over(host, device.as_cuda_device()?)?;
    let part = group.split(0)?;
    for group in [group, part] {
        let group: Arc<dyn Collective> = Arc::new(Two(group));
        for dtype in [DType::F32, DType::F64, DType::BF16] {
            let got = train(Some(group.clone()), dtype, &device)?;
            let want = train(None, dtype, &Device::Cpu)?;
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let tolerance = tolerance(dtype).max(1e-6);
                assert_close(&format!("{i} {dtype:?}"), got, &values(want)?, tolerance);
            }
        }
    }
    Ok(())
}
