//! Sums where the values are: what an engine on devices runs, here in the memory of the host.

use std::sync::Arc;

use candle_core::{DType, Device, DeviceLocation, Result, Tensor, Var};
use candle_nn::{ModuleT, VarMap};
use candle_norm::distributed::{Call, Collective, DeviceSums, Threads, sum_gradients};
use candle_norm::{BatchNormOptions, Norm, Path, batch_norm, trainable_vars, with_path};
use testkit::compare::{assert_close, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values};
use testkit::vars::vb;

/// Ranks that sum in place, by the sums of another group.
#[derive(Debug)]
struct InPlace(Arc<dyn Collective>);

impl Collective for InPlace {
    fn rank(&self) -> usize {
        self.0.rank()
    }
    fn size(&self) -> usize {
        self.0.size()
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
        Some(self)
    }
}

impl DeviceSums for InPlace {
    fn serves(&self, location: DeviceLocation) -> bool {
        location == DeviceLocation::Cpu
    }
}

/// The output, the gradients of input and weight, and the running statistics of each rank.
type Trained = (Tensor, Tensor, Tensor, Vec<Tensor>);

fn train(counts: &[usize], dtype: DType, center: bool, in_place: bool) -> Result<Vec<Trained>> {
    let total: usize = counts.iter().sum();
    let mut draw = Draw::new(3);
    let x = tensor(&draw.normal(total * 3 * 4), &[total, 3, 4], dtype)?;
    let dy = tensor(&draw.normal(total * 3 * 4), &[total, 3, 4], dtype)?;
    Threads::run(counts.len(), |group| {
        let start = counts[..group.rank()].iter().sum();
        let share = |t: &Tensor| t.narrow(0, start, counts[group.rank()])?.force_contiguous();
        let (x, dy) = (Var::from_tensor(&share(&x)?)?, share(&dy)?);
        let group: Arc<dyn Collective> = match in_place {
            true => Arc::new(InPlace(group)),
            false => group,
        };
        with_path(Path::Composed, || {
            let vars = VarMap::new();
            let options = BatchNormOptions {
                remove_mean: center,
                ..Default::default()
            };
            let norm = batch_norm(3, options, vb(&vars, dtype))?.synchronized(group.clone());
            let y = norm.forward_t(&x, true)?;
            let mut grads = (&y * dy)?.sum_all()?.backward()?;
            let trained = trainable_vars(&vars);
            sum_gradients(&*group, &trained, &mut grads)?;
            let dweight = grads.get(norm.weight().expect("one")).expect("a gradient");
            let dx = grads.get(&x).cloned().map_or(x.zeros_like(), Ok)?;
            let buffers = norm.buffers().into_iter().map(|(_, t)| t.copy());
            Ok((
                y.detach(),
                dx,
                dweight.clone(),
                buffers.collect::<Result<_>>()?,
            ))
        })
    })
}

/// Uneven and empty ranks, in all dtypes: the same as sums on the host.
#[test]
fn statistics_and_gradients_are_those_of_sums_on_the_host() -> Result<()> {
    for counts in [&[4usize, 4][..], &[1, 2, 5], &[0, 3, 0, 2]] {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for center in [true, false] {
                let got = train(counts, dtype, center, true)?;
                let want = train(counts, dtype, center, false)?;
                for (rank, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = format!("rank {rank} of {counts:?} {dtype:?} {center}");
                    let close = |got: &Tensor, want: &Tensor| -> Result<()> {
                        assert_close(&what, got, &values(want)?, tolerance(dtype));
                        Ok(())
                    };
                    close(&got.0, &want.0)?;
                    close(&got.1, &want.1)?;
                    close(&got.2, &want.2)?;
                    for (got, want) in got.3.iter().zip(&want.3) {
                        assert_close(&what, got, &values(want)?, 1e-6);
                    }
                }
                for rank in &got[1..] {
                    for (first, own) in got[0].3.iter().zip(&rank.3) {
                        assert_same_bits("buffers", own, first);
                    }
                    assert_same_bits("dweight", &rank.2, &got[0].2);
                }
            }
        }
    }
    Ok(())
}

/// The host's votes come first: no rank waits on a device for one that failed.
#[test]
fn an_error_on_one_rank_is_an_error_on_all() -> Result<()> {
    let said = Threads::run(3, |group| {
        let rank = group.rank();
        let group: Arc<dyn Collective> = Arc::new(InPlace(group));
        let norm = batch_norm(2, 1e-5, vb(&VarMap::new(), DType::F32))?.synchronized(group);
        let channels = if rank == 1 { 3 } else { 2 };
        let x = Tensor::ones((4, channels), DType::F32, &Device::Cpu)?;
        let error = with_path(Path::Composed, || norm.forward_t(&x, true)).expect_err("an error");
        Ok(error.to_string())
    })?;
    assert!(said[1].starts_with("BatchNorm: expected"), "{said:?}");
    assert!(said[0].contains("an error on rank 1"), "{said:?}");
    assert!(said[2].contains("an error on rank 1"), "{said:?}");
    Ok(())
}
