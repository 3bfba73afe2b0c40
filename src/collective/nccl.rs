//! Ranks with a GPU each, over NCCL.

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DeviceRepr, ValidAsZeroBits,
};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, NcclType, ReduceOp};
use candle_core::{CudaDevice, DeviceLocation, Error, Result, bail};

use super::{Call, Collective, DeviceSums, agree};

const LAYER: &str = "Nccl";

/// A group whose ranks have a GPU each, which sums in their memory by NVIDIA's NCCL.
///
/// It stands on a group of the same ranks on the host ([`Threads`](super::Threads), or one over
/// MPI), which it takes for all that the host knows: counts, votes, what the ranks compare, time
/// limits. For each sum on the devices the ranks first meet there, and every rank gets an error
/// where one has another call or does not come. A call on the devices is put on candle's stream,
/// and the host does not wait for it.
///
/// ```no_run
/// use candle_core::{DType, Device, Result};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::batch_norm;
/// use candle_norm::distributed::{Nccl, Threads};
///
/// # fn main() -> Result<()> {
/// Threads::run(2, |group| {
///     let device = Device::new_cuda(group.rank())?;
///     let group = Nccl::over(group, device.as_cuda_device()?)?;
///     let vars = VarMap::new();
///     let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
///     let norm = batch_norm(3, 1e-5, vb)?.synchronized(group);
///     Ok(())
/// })?;
/// # Ok(())
/// # }
/// ```
pub struct Nccl {
    host: Arc<dyn Collective>,
    device: CudaDevice,
    /// The thread that has the communicator, which must not leave it.
    communicator: Mutex<Communicator>,
}

impl Nccl {
    /// The ranks of `host`, each with its device.
    ///
    /// # Errors
    /// NCCL that does not start on one of the ranks; a rank that does not come within ten minutes;
    /// errors of `host`. On every rank.
    pub fn over(host: Arc<dyn Collective>, device: &CudaDevice) -> Result<Arc<dyn Collective>> {
        let id = match host.rank() {
            0 => Id::new().map_err(fault),
            // Of another rank: replaced by that of rank 0.
            _ => Ok(Id::uninit([0; ID])),
        };
        let id = agree(&*host, "nccl.id", id)?;
        // `c_char` has a sign on some processors.
        let mut bytes = id.internal().map(|byte| f64::from(byte as u8));
        host.broadcast(&Call::new("nccl.id"), &mut bytes)?;
        let id = Id::uninit(bytes.map(|byte| byte as u8 as _));
        let stream = device.cuda_stream();
        let communicator = Communicator::start(stream, host.rank(), host.size(), id);
        let communicator = agree(&*host, "nccl.start", communicator)?;
        Ok(Arc::new(Self {
            host,
            device: device.clone(),
            communicator: Mutex::new(communicator),
        }))
    }

    /// `values` of all ranks summed, after the ranks have met on the host.
    fn sum<T>(&self, call: &Call, dtype: &str, values: &mut CudaSlice<T>) -> Result<()>
    where
        T: DeviceRepr + ValidAsZeroBits,
        Job: From<(CudaSlice<T>, Sender<Done<T>>)>,
    {
        // Before the ranks meet: no rank may fail between the meeting and its sum, for which the
        // devices of the others wait.
        let place = self.device.alloc_zeros::<T>(1)?;
        // The number of values is a part of the name: the ranks compare it.
        let name = format!("{} of {} {dtype} on devices", call.name(), values.len());
        self.host.all_reduce_sum(&Call::new(name), &mut [0.])?;
        let communicator = self
            .communicator
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // The values go to the thread of the communicator, and come back.
        *values = communicator.sum(std::mem::replace(values, place))?;
        Ok(())
    }
}

/// Bytes of the number by which ranks find each other.
const ID: usize = 128;

/// The longest that NCCL may take to bring the ranks together.
const TIME_LIMIT: Duration = Duration::from_secs(600);

/// Values with their sum, or the fault.
type Done<T> = Result<CudaSlice<T>>;

/// A sum for the thread of a communicator.
enum Job {
    F64(CudaSlice<f64>, Sender<Done<f64>>),
    F32(CudaSlice<f32>, Sender<Done<f32>>),
}

impl From<(CudaSlice<f64>, Sender<Done<f64>>)> for Job {
    fn from((values, done): (CudaSlice<f64>, Sender<Done<f64>>)) -> Self {
        Self::F64(values, done)
    }
}

impl From<(CudaSlice<f32>, Sender<Done<f32>>)> for Job {
    fn from((values, done): (CudaSlice<f32>, Sender<Done<f32>>)) -> Self {
        Self::F32(values, done)
    }
}

/// A communicator of NCCL in a thread of its own, which ends with it.
struct Communicator {
    /// None once the group is dropped.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Communicator {
    fn start(stream: Arc<CudaStream>, rank: usize, size: usize, id: Id) -> Result<Self> {
        let (jobs, waiting) = channel();
        let (started, outcome) = channel();
        let body = move || {
            let bound = stream.context().bind_to_thread().map_err(fault);
            let communicator =
                bound.and_then(|()| Comm::from_rank(stream.clone(), rank, size, id).map_err(fault));
            match communicator {
                Ok(communicator) => {
                    let _ = started.send(Ok(()));
                    serve(&communicator, &waiting);
                    // A communicator that is dropped aborts the sums that still run.
                    let _ = stream.synchronize();
                }
                Err(e) => {
                    let _ = started.send(Err(e));
                }
            }
        };
        let thread = thread::Builder::new().name("NCCL".into()).spawn(body)?;
        match outcome.recv_timeout(TIME_LIMIT) {
            Ok(Ok(())) => Ok(Self {
                jobs: Some(jobs),
                thread: Some(thread),
            }),
            Ok(Err(e)) => Err(e),
            Err(_) => bail!("{LAYER}: expected all ranks to start NCCL within {TIME_LIMIT:?}"),
        }
    }

    fn sum<T>(&self, values: CudaSlice<T>) -> Done<T>
    where
        Job: From<(CudaSlice<T>, Sender<Done<T>>)>,
    {
        let (done, sum) = channel();
        let jobs = self.jobs.as_ref();
        let sent = jobs.is_some_and(|jobs| jobs.send((values, done).into()).is_ok());
        match sum.recv() {
            Ok(sum) if sent => sum,
            _ => bail!("{LAYER}: expected the thread of NCCL to go on, got its end"),
        }
    }
}

/// Sums until the group is dropped.
fn serve(communicator: &Comm, jobs: &Receiver<Job>) {
    fn sum<T: NcclType + DeviceRepr>(
        communicator: &Comm,
        mut values: CudaSlice<T>,
        done: &Sender<Done<T>>,
    ) {
        let summed = communicator.all_reduce_in_place(&mut values, &ReduceOp::Sum);
        let _ = done.send(summed.map(|_| values).map_err(fault));
    }
    for job in jobs {
        match job {
            Job::F64(values, done) => sum(communicator, values, &done),
            Job::F32(values, done) => sum(communicator, values, &done),
        }
    }
}

fn fault(e: impl fmt::Debug) -> Error {
    Error::msg(format!("{LAYER}: expected NCCL to succeed, got {e:?}"))
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nccl")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}

impl Collective for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn size(&self) -> usize {
        self.host.size()
    }

    fn all_reduce_sum(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        self.host.all_reduce_sum(call, values)
    }

    fn all_reduce_sum_f32(&self, call: &Call, values: &mut [f32]) -> Result<()> {
        self.host.all_reduce_sum_f32(call, values)
    }

    fn broadcast(&self, call: &Call, values: &mut [f64]) -> Result<()> {
        self.host.broadcast(call, values)
    }

    fn split(&self, color: usize) -> Result<Arc<dyn Collective>> {
        Self::over(self.host.split(color)?, &self.device)
    }

    fn device_sums(&self) -> Option<&dyn DeviceSums> {
        Some(self)
    }
}

impl DeviceSums for Nccl {
    fn serves(&self, location: DeviceLocation) -> bool {
        let gpu_id = self.device.cuda_stream().context().ordinal();
        location == DeviceLocation::Cuda { gpu_id }
    }

    fn all_reduce_sum_cuda(&self, call: &Call, values: &mut CudaSlice<f64>) -> Result<()> {
        self.sum(call, "f64", values)
    }

    fn all_reduce_sum_f32_cuda(&self, call: &Call, values: &mut CudaSlice<f32>) -> Result<()> {
        self.sum(call, "f32", values)
    }
}
