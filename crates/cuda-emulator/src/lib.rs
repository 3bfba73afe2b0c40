//! Runs the CUDA kernels of `candle-norm-cuda-kernels` on the CPU, for tests.
//!
//! The same `.cu` sources are compiled as C++. The threads of a block are fibers that a barrier or
//! a shuffle switches; shared memory starts as NaN. A launch runs under a chosen [`Order`] of
//! threads
//! and blocks: what lacks a barrier gives other bits under another order.
//!
//! With `CANDLE_NORM_GPU=FOLDER` launches run on a GPU too, by the modules of the folder, and bytes
//! are compared: see `device.rs`.
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::marker::PhantomData;

mod device;

/// The order in which a block's threads run between barriers, and the blocks of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// From the first to the last.
    Ascending,
    /// From the last to the first.
    Descending,
    /// Shuffled by a seed.
    Shuffled(u32),
}

impl Order {
    /// The three orders that every kernel is tested in.
    pub const ALL: [Order; 3] = [Order::Ascending, Order::Descending, Order::Shuffled(5)];

    fn code(self) -> u32 {
        match self {
            Order::Ascending => 0,
            Order::Descending => 1,
            Order::Shuffled(seed) => seed.wrapping_add(2).max(2),
        }
    }
}

/// A fault of a launch. On a device most of these are undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No kernel has this name.
    NoKernel,
    /// A grid, block or shared memory beyond the limits of compute capability 8.0 (99 KB of shared
    /// memory, as on 8.6), or threads that do not fill their warps.
    Geometry,
    /// Some threads of a block wait at a barrier that others never reach.
    Barrier,
    /// Some lanes of a warp wait in a shuffle that others never reach.
    Shuffle,
    /// More or fewer arguments than the kernel has.
    Arguments,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fault::NoKernel => "no kernel has this name",
            Fault::Geometry => "the grid, block or shared memory is beyond the limits",
            Fault::Barrier => "some threads wait at a barrier that others never reach",
            Fault::Shuffle => "some lanes wait in a shuffle that others never reach",
            Fault::Arguments => "the kernel has another number of arguments",
        })
    }
}

impl std::error::Error for Fault {}

/// The arguments of a kernel, in its order: buffers that live as long as the launch, and scalars.
#[derive(Default)]
pub struct Args<'a> {
    words: Vec<u64>,
    buffers: Vec<device::Buffer>,
    lifetime: PhantomData<&'a mut ()>,
}

impl<'a> Args<'a> {
    /// No arguments.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer that the kernel reads.
    pub fn read<T>(mut self, buffer: &'a [T]) -> Self {
        self.push(buffer.as_ptr() as u64, buffer);
        self
    }

    /// A buffer that the kernel reads, or a null pointer.
    pub fn maybe_read<T>(self, buffer: Option<&'a [T]>) -> Self {
        match buffer {
            Some(buffer) => self.read(buffer),
            None => self.null(),
        }
    }

    /// A buffer that the kernel writes.
    pub fn write<T>(mut self, buffer: &'a mut [T]) -> Self {
        self.push(buffer.as_mut_ptr() as u64, buffer);
        self
    }

    fn push<T>(&mut self, address: u64, buffer: &[T]) {
        self.buffers.push(device::Buffer {
            argument: self.words.len(),
            address,
            bytes: size_of_val(buffer),
            size: size_of::<T>(),
        });
        self.words.push(address);
    }

    /// A buffer that the kernel writes, or a null pointer.
    pub fn maybe_write<T>(self, buffer: Option<&'a mut [T]>) -> Self {
        match buffer {
            Some(buffer) => self.write(buffer),
            None => self.null(),
        }
    }

    /// A null pointer.
    pub fn null(mut self) -> Self {
        self.words.push(0);
        self
    }

    /// A `long long`.
    pub fn i64(mut self, value: i64) -> Self {
        self.words.push(value as u64);
        self
    }

    /// An `int`.
    pub fn i32(mut self, value: i32) -> Self {
        self.words.push(u64::from(value as u32));
        self
    }

    /// A `float`.
    pub fn f32(mut self, value: f32) -> Self {
        self.words.push(u64::from(value.to_bits()));
        self
    }

    /// A `double`.
    pub fn f64(mut self, value: f64) -> Self {
        self.words.push(value.to_bits());
        self
    }
}

unsafe extern "C" {
    fn candle_norm_emulate(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared: u32,
        params: *mut *mut c_void,
        arguments: u32,
        order: u32,
    ) -> c_int;
}

/// Runs a kernel over a grid and returns when all blocks are done.
///
/// # Errors
/// A [`Fault`]; the buffers that the kernel writes are then in an unknown state.
///
/// # Safety
/// The arguments must be those of the kernel, in its order and of its types, and the buffers must
/// have the sizes that the kernel's description names.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    args: Args<'_>,
    order: Order,
) -> Result<(), Fault> {
    let Ok(name) = CString::new(name) else {
        return Err(Fault::NoKernel);
    };
    let Args {
        mut words, buffers, ..
    } = args;
    let on_gpu = match order {
        Order::Ascending => device::before(&name, (grid, block, shared), &words, &buffers),
        _ => None,
    };
    let mut params: Vec<*mut c_void> = words
        .iter_mut()
        .map(|word| (word as *mut u64).cast::<c_void>())
        .collect();
    // SAFETY: `params` points at one word for each argument, and both outlive the call; the caller
    // answers for the arguments.
    let code = unsafe {
        candle_norm_emulate(
            name.as_ptr(),
            grid.as_ptr(),
            block.as_ptr(),
            shared,
            params.as_mut_ptr(),
            params.len() as u32,
            order.code(),
        )
    };
    if let Some(found) = on_gpu {
        device::after(&name, &buffers, found);
    }
    match code {
        0 => Ok(()),
        1 => Err(Fault::NoKernel),
        2 => Err(Fault::Geometry),
        3 => Err(Fault::Barrier),
        4 => Err(Fault::Shuffle),
        _ => Err(Fault::Arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    fn run(
        name: &str,
        blocks: u32,
        shared: u32,
        args: Args<'_>,
        order: Order,
    ) -> Result<(), Fault> {
        // SAFETY: the tests pass what self_test.cu declares.
        unsafe { launch(name, [blocks, 1, 1], [256, 1, 1], shared, args, order) }
    }

    fn reversed(barrier: i32, order: Order) -> Vec<f32> {
        let x: Vec<f32> = (0..768).map(|i| i as f32).collect();
        let mut y = vec![f32::NAN; 768];
        let args = Args::new().read(&x).write(&mut y).i32(barrier);
        run("self_test_reverse", 3, 0, args, order).unwrap();
        y
    }

    #[test]
    fn threads_exchange_through_shared_memory() {
        let right: Vec<f32> = (0..768)
            .map(|i| (i / 256 * 256 + 255 - i % 256) as f32)
            .collect();
        for order in Order::ALL {
            assert_eq!(reversed(1, order), right);
        }
    }

    #[test]
    fn a_missing_barrier_is_seen_as_nan() {
        for order in Order::ALL {
            assert!(reversed(0, order).iter().any(|v| v.is_nan()));
        }
        let [a, b] = [Order::Ascending, Order::Descending].map(|order| reversed(0, order));
        assert_ne!(a[0].is_nan(), b[0].is_nan());
    }

    #[test]
    fn a_sum_over_a_block_reaches_every_thread() {
        let x: Vec<f64> = (0..256).map(f64::from).collect();
        for order in Order::ALL {
            let mut y = vec![0.; 256];
            run(
                "self_test_sum",
                1,
                0,
                Args::new().read(&x).write(&mut y),
                order,
            )
            .unwrap();
            assert_eq!(y, vec![32640.; 256]);
        }
    }

    #[test]
    fn faults_are_told_apart() {
        let one = || Args::new().i32(0);
        let run = |name, shared| run(name, 1, shared, one(), Order::Ascending);
        assert_eq!(run("no_such", 0), Err(Fault::NoKernel));
        assert_eq!(run("self_test_divergent_barrier", 0), Err(Fault::Barrier));
        assert_eq!(run("self_test_divergent_shuffle", 0), Err(Fault::Shuffle));
        assert_eq!(
            run("self_test_divergent_barrier", 99 * 1024 + 1),
            Err(Fault::Geometry)
        );
        let two = one().i32(0);
        let two = super::tests::run("self_test_divergent_barrier", 1, 0, two, Order::Ascending);
        assert_eq!(two, Err(Fault::Arguments));
        // SAFETY: nothing runs.
        let partial_warp = unsafe {
            launch(
                "self_test_sum",
                [1; 3],
                [33, 1, 1],
                0,
                one().i32(0),
                Order::Ascending,
            )
        };
        assert_eq!(partial_warp, Err(Fault::Geometry));
    }

    #[test]
    fn dynamic_shared_memory_starts_as_nan() {
        let mut y = vec![0f32; 256];
        run(
            "self_test_dynamic",
            1,
            1024,
            Args::new().write(&mut y),
            Order::Ascending,
        )
        .unwrap();
        assert!(y[0].is_nan());
        assert_eq!(y[1..], vec![1.; 255]);
    }

    #[test]
    fn halves_round_as_the_crate_half_does() {
        // Every pattern of f16 and of bf16, and its neighbors in f32: ties among them.
        let mut x = Vec::new();
        for bits in 0..=u16::MAX {
            for value in [
                f16::from_bits(bits).to_f32(),
                bf16::from_bits(bits).to_f32(),
            ] {
                for step in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0x0fff, 0x1000, 0x1001] {
                    x.push(f32::from_bits(value.to_bits().wrapping_add(step)));
                }
            }
        }
        let n = x.len();
        let (mut h, mut b) = (vec![0u16; n], vec![0u16; n]);
        let (mut from_h, mut from_b) = (vec![0f32; n], vec![0f32; n]);
        let args = Args::new().read(&x).write(&mut h).write(&mut b);
        let args = args.write(&mut from_h).write(&mut from_b);
        run("self_test_half", n as u32 / 256, 0, args, Order::Ascending).unwrap();
        for i in 0..n {
            let (right_h, right_b) = (f16::from_f32(x[i]), bf16::from_f32(x[i]));
            if x[i].is_nan() {
                assert!(from_h[i].is_nan() && from_b[i].is_nan());
                continue;
            }
            assert_eq!(
                (h[i], b[i]),
                (right_h.to_bits(), right_b.to_bits()),
                "{:e}",
                x[i]
            );
            assert_eq!((from_h[i], from_b[i]), (right_h.to_f32(), right_b.to_f32()));
        }
    }
}
