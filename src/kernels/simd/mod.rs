//! Sixteen values at a time, on whatever the processor has.
//!
//! [`Lanes`] are plain arrays, and a kernel is written once over them. [`Level::run`] compiles it once for each instruction set,
//! inside a function that has the set enabled: the compiler turns the arrays into registers there. The number of lanes is the same
//! on every machine and nothing is contracted into fused multiply-adds, so every level computes the same bits. What a compiler
//! does not find by itself, the conversion of `f16`, is an instruction of the [`Isa`].

mod half_bits;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::{Add, Div, Mul, Sub};
use std::sync::OnceLock;

use half::{bf16, f16};

/// How many values a kernel takes at a time: 16 `f32` are one register of AVX-512, two of AVX2, four of SSE2 or NEON.
pub(crate) const LANES: usize = 16;

/// What sums and products are formed in: `f32` or `f64`.
pub(crate) trait Real:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + 'static
{
    fn from_wide(v: f64) -> Self;
    fn wide(self) -> f64;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            #[inline(always)]
            fn from_wide(v: f64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self as f64
            }
        }
    };
}
real!(f32);
real!(f64);

/// Sixteen accumulator values.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lanes<T>(pub(crate) [T; LANES]);

impl<T: Real> Lanes<T> {
    #[inline(always)]
    pub(crate) fn splat(v: T) -> Self {
        Self([v; LANES])
    }

    #[inline(always)]
    pub(crate) fn zero() -> Self {
        Self::splat(T::default())
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(T, T) -> T) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] = f(self.0[i], other.0[i]);
        }
        out
    }

    /// The last `count` lanes; zero in the others.
    #[inline(always)]
    pub(crate) fn keep_last(self, count: usize) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] = if i + count >= LANES {
                self.0[i]
            } else {
                T::default()
            };
        }
        out
    }

    /// The sum of all lanes, by halves.
    #[inline(always)]
    pub(crate) fn sum(self) -> f64 {
        let v = self.0;
        let mut eight = [T::default(); 8];
        for i in 0..8 {
            eight[i] = v[i] + v[i + 8];
        }
        let mut four = [T::default(); 4];
        for i in 0..4 {
            four[i] = eight[i] + eight[i + 4];
        }
        ((four[0] + four[2]) + (four[1] + four[3])).wide()
    }
}

macro_rules! lanewise {
    ($trait:ident, $method:ident) => {
        impl<T: Real> $trait for Lanes<T> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, T::$method)
            }
        }
    };
}
lanewise!(Add, add);
lanewise!(Sub, sub);
lanewise!(Mul, mul);

/// What an instruction set offers beyond arithmetic. A value of it proves that the processor has the set.
pub(crate) trait Isa: Copy {
    fn widen_f16(self, v: [u16; LANES]) -> [f32; LANES];
    fn narrow_f16(self, v: [f32; LANES]) -> [u16; LANES];
}

/// The instructions that every processor of the target has.
#[derive(Clone, Copy)]
pub(crate) struct Baseline;

impl Isa for Baseline {
    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> [f32; LANES] {
        v.map(half_bits::widen_f16)
    }
    #[inline(always)]
    fn narrow_f16(self, v: [f32; LANES]) -> [u16; LANES] {
        v.map(half_bits::narrow_f16)
    }
}

/// What tensors hold.
pub(crate) trait Elem: Copy + Default + Send + Sync + 'static {
    /// What it is computed in.
    type Acc: Real;

    fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<Self::Acc>;
    fn narrow<I: Isa>(isa: I, v: Lanes<Self::Acc>) -> [Self; LANES];

    /// Rounded to this type, and back.
    #[inline(always)]
    fn round<I: Isa>(isa: I, v: Lanes<Self::Acc>) -> Lanes<Self::Acc> {
        Self::load(isa, &Self::narrow(isa, v))
    }

    #[inline(always)]
    fn store<I: Isa>(isa: I, v: Lanes<Self::Acc>, out: &mut [MaybeUninit<Self>; LANES]) {
        let narrow = Self::narrow(isa, v);
        for i in 0..LANES {
            out[i] = MaybeUninit::new(narrow[i]);
        }
    }
}

macro_rules! full_precision {
    ($t:ty) => {
        impl Elem for $t {
            type Acc = $t;
            #[inline(always)]
            fn load<I: Isa>(_: I, v: &[Self; LANES]) -> Lanes<$t> {
                Lanes(*v)
            }
            #[inline(always)]
            fn narrow<I: Isa>(_: I, v: Lanes<$t>) -> [Self; LANES] {
                v.0
            }
        }
    };
}
full_precision!(f32);
full_precision!(f64);

impl Elem for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn load<I: Isa>(_: I, v: &[Self; LANES]) -> Lanes<f32> {
        Lanes(v.map(|v| half_bits::widen_bf16(v.to_bits())))
    }
    #[inline(always)]
    fn narrow<I: Isa>(_: I, v: Lanes<f32>) -> [Self; LANES] {
        v.0.map(|v| bf16::from_bits(half_bits::narrow_bf16(v)))
    }
}

impl Elem for f16 {
    type Acc = f32;
    #[inline(always)]
    fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<f32> {
        Lanes(isa.widen_f16(v.map(f16::to_bits)))
    }
    #[inline(always)]
    fn narrow<I: Isa>(isa: I, v: Lanes<f32>) -> [Self; LANES] {
        isa.narrow_f16(v.0).map(f16::from_bits)
    }
}

/// A computation on slices, written over any instruction set. `run` and all that it calls must be `#[inline(always)]`: only then is it
/// compiled with the instructions of its caller.
pub(crate) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has: SSE2 or NEON.
    Baseline,
    /// AVX2 and the conversions of F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

thread_local! {
    static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

impl Level {
    /// Every level, lowest first.
    pub const ALL: [Level; 3] = [Level::Baseline, Level::Avx2, Level::Avx512];

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Level::Baseline => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => x86::Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => x86::Avx512::detect().is_some(),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// The highest level of this processor, or the one that the environment variable `CANDLE_NORM_ISA` names (`baseline`, `avx2`,
    /// `avx512`) if the processor has it.
    pub(crate) fn current() -> Level {
        static BEST: OnceLock<Level> = OnceLock::new();
        FORCED.get().unwrap_or_else(|| {
            *BEST.get_or_init(|| {
                let wanted = std::env::var("CANDLE_NORM_ISA").unwrap_or_default();
                let available = Level::ALL.into_iter().filter(|l| l.is_available());
                let named = |l: &Level| format!("{l:?}").eq_ignore_ascii_case(&wanted);
                let levels: Vec<Level> = available.collect();
                let named = levels.iter().copied().find(named);
                named.or(levels.last().copied()).unwrap_or(Level::Baseline)
            })
        })
    }

    /// Runs `f` with kernels started on this thread at this level, if the processor has it.
    pub fn force<T>(self, f: impl FnOnce() -> T) -> Option<T> {
        struct Restore(Option<Level>);
        impl Drop for Restore {
            fn drop(&mut self) {
                FORCED.set(self.0);
            }
        }
        if !self.is_available() {
            return None;
        }
        let _restore = Restore(FORCED.replace(Some(self)));
        Some(f())
    }

    /// Runs `kernel`, compiled for this level. A level that the processor does not have runs as the baseline.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        match self {
            Level::Baseline => {}
            Level::Avx2 => {
                if let Some(isa) = x86::Avx2::detect() {
                    return isa.run(kernel);
                }
            }
            Level::Avx512 => {
                if let Some(isa) = x86::Avx512::detect() {
                    return isa.run(kernel);
                }
            }
        }
        kernel.run(Baseline)
    }
}
