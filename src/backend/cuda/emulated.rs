//! The kernels on the CPU, by the emulator that a test program installs.

use std::sync::OnceLock;

use candle_core::{CpuStorage, DType, Result};
pub use candle_norm_cuda_kernels::Launch;
use candle_norm_cuda_kernels::geometry::rows::ALIGNMENT;
use half::{bf16, f16};

use super::{Arg, Launcher};
use candle_norm_support::messages;

/// An argument of a kernel, in memory of the host.
#[derive(Debug)]
pub enum Argument<'a> {
    /// Memory that the kernel reads, and how many bytes of it lie before the first element.
    Read(&'a [u128], usize),
    /// Memory that the kernel writes, and may read.
    Write(&'a mut [u128]),
    /// A null pointer.
    Null,
    /// A `long long`.
    I64(i64),
    /// An `int`.
    I32(i32),
    /// A `double`.
    F64(f64),
}

/// A function that runs a launch, or says why it cannot.
pub type Emulator = fn(&Launch, Vec<Argument<'_>>) -> std::result::Result<(), String>;

static EMULATOR: OnceLock<Emulator> = OnceLock::new();

/// Installs the emulator by which [`Path::Emulated`](crate::Path::Emulated) runs the CUDA kernels.
/// The first one stays.
pub fn install_emulator(emulator: Emulator) {
    let _ = EMULATOR.set(emulator);
}

/// The emulator behind storages of the CPU.
pub(crate) struct Emulated;

/// A copy of elements at the place modulo [`ALIGNMENT`] that they have on a device. Bytes around
/// them have all bits set, and nothing may write them.
struct Memory {
    words: Vec<u128>,
    skipped: usize,
    len: usize,
}

impl Memory {
    /// The elements of a storage from the one at `at` on.
    fn new(layer: &str, storage: &CpuStorage, at: usize) -> Result<Self> {
        macro_rules! bytes {
            ($v:expr) => {{
                let skipped = at * size_of_val(&$v[..1]) % ALIGNMENT;
                let before = std::iter::repeat_n(u8::MAX, skipped);
                let elements = $v[at..].iter().flat_map(|v| v.to_ne_bytes());
                (before.chain(elements).collect::<Vec<u8>>(), skipped)
            }};
        }
        let (mut bytes, skipped) = match storage {
            CpuStorage::F32(v) => bytes!(v),
            CpuStorage::F64(v) => bytes!(v),
            CpuStorage::F16(v) => bytes!(v),
            CpuStorage::BF16(v) => bytes!(v),
            CpuStorage::I64(v) => bytes!(v),
            _ => messages::internal(layer, "a dtype that kernels know")?,
        };
        let len = bytes.len() - skipped;
        bytes.resize((bytes.len() / ALIGNMENT + 2) * ALIGNMENT, u8::MAX);
        let words = bytes.as_chunks().0.iter().copied().map(u128::from_ne_bytes);
        Ok(Self {
            words: words.collect(),
            skipped,
            len,
        })
    }

    /// The elements in the place of those of `storage`, if nothing around them has changed.
    fn write_to(self, storage: &mut CpuStorage) -> bool {
        let bytes: Vec<u8> = self.words.into_iter().flat_map(u128::to_ne_bytes).collect();
        let (before, rest) = bytes.split_at(self.skipped);
        let (elements, behind) = rest.split_at(self.len);
        macro_rules! write {
            ($v:expr, $t:ty) => {{
                let values = elements.as_chunks().0.iter().copied();
                *$v = values.map(<$t>::from_ne_bytes).collect();
            }};
        }
        match storage {
            CpuStorage::F32(v) => write!(v, f32),
            CpuStorage::F64(v) => write!(v, f64),
            CpuStorage::F16(v) => write!(v, f16),
            CpuStorage::BF16(v) => write!(v, bf16),
            CpuStorage::I64(v) => write!(v, i64),
            _ => return false,
        }
        before.iter().chain(behind).all(|byte| *byte == u8::MAX)
    }
}

impl Launcher for Emulated {
    type Storage = CpuStorage;

    /// Not a number: what a kernel leaves out is seen.
    fn alloc(_: &CpuStorage, dtype: DType, len: usize) -> Result<CpuStorage> {
        Ok(match dtype {
            DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
            DType::F64 => CpuStorage::F64(vec![f64::NAN; len]),
            DType::F16 => CpuStorage::F16(vec![f16::NAN; len]),
            DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; len]),
            DType::I64 => CpuStorage::I64(vec![i64::MIN; len]),
            _ => messages::internal("emulator", "a dtype that kernels know")?,
        })
    }

    fn launch(
        layer: &'static str,
        _: &CpuStorage,
        launch: &Launch,
        args: &mut [Arg<'_, CpuStorage>],
    ) -> Result<()> {
        let Some(emulator) = EMULATOR.get() else {
            return messages::launch(layer, &launch.kernel, "no emulator is installed");
        };
        let place = |arg: &Arg<CpuStorage>| match arg {
            Arg::Read(storage, at) => Memory::new(layer, storage, *at).map(Some),
            Arg::Write(storage) => Memory::new(layer, storage, 0).map(Some),
            _ => Ok(None),
        };
        let mut memory = args.iter().map(place).collect::<Result<Vec<_>>>()?;
        let arguments = args.iter().zip(&mut memory).map(|pair| match pair {
            (Arg::Read(..), Some(memory)) => Argument::Read(&memory.words, memory.skipped),
            (Arg::Write(_), Some(memory)) => Argument::Write(&mut memory.words),
            (Arg::I64(v), _) => Argument::I64(*v),
            (Arg::I32(v), _) => Argument::I32(*v),
            (Arg::F64(v), _) => Argument::F64(*v),
            _ => Argument::Null,
        });
        if let Err(why) = emulator(launch, arguments.collect()) {
            return messages::launch(layer, &launch.kernel, &why);
        }
        for (arg, memory) in args.iter_mut().zip(memory) {
            if let (Arg::Write(storage), Some(memory)) = (arg, memory)
                && !memory.write_to(storage)
            {
                return messages::launch(layer, &launch.kernel, "it wrote past an argument");
            }
        }
        Ok(())
    }
}
