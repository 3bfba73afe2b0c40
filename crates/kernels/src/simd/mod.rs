//! Sixteen values at a time, on whatever the processor has.
//!
//! A kernel is written once over [`Lanes`], sixteen numbers of the accumulator's type, and
//! [`Level::run`] compiles it for each instruction set, inside a function that has the set enabled.
//! The number of lanes is the same on every machine and nothing is contracted into fused
//! multiply-adds, so every level computes the same bits.
//!
//! Lanes are registers of the set, not arrays: left to itself the compiler cuts arrays of sixteen
//! into pieces of four and keeps them in memory, which costs three to five times the time.

mod approximate;
mod baseline;
mod half_bits;
mod transpose;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::{Add, AddAssign, Div, Mul, Sub};
use std::sync::OnceLock;

pub(crate) use approximate::{Approximate, ERF, ERF_RANGE, ERFC};
use baseline::Baseline;
use half::{bf16, f16};
pub(crate) use transpose::{Place, Plain, prefetch, tile, transpose_tile};

/// How many values a kernel takes at a time: 16 `f32` are one register of AVX-512, two of AVX2,
/// four of SSE2 or NEON.
pub(crate) const LANES: usize = 16;

/// Type that sums and products are formed in: `f32` or `f64`.
pub(crate) trait Real:
    Elem<Acc = Self>
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// Sixteen of them in registers of `I`.
    type Lanes<I: Isa>: Vector<I, Self>;
    /// Bits of the mantissa.
    const MANTISSA: u32;
    /// Of a power of two whose inverse is a normal number too.
    const LARGEST_EXPONENT: f64;

    fn from_f64(v: f64) -> Self;
    fn to_f64(self) -> f64;

    /// The exponential of a number that is not above zero but by rounding; zero where it is too
    /// small for a normal number.
    fn exp_of_negative(self) -> Self;

    /// The power of two whose exponent, and its bias, are the last bits.
    fn integer_as_exponent(self) -> Self;
}

macro_rules! real {
    ($t:ident, $lanes:ident, $exp:path) => {
        impl Real for $t {
            type Lanes<I: Isa> = I::$lanes;
            const MANTISSA: u32 = $t::MANTISSA_DIGITS - 1;
            const LARGEST_EXPONENT: f64 = -($t::MIN_EXP as f64 - 1.);

            #[inline(always)]
            fn integer_as_exponent(self) -> Self {
                <$t>::from_bits(self.to_bits() << Self::MANTISSA)
            }

            #[inline(always)]
            fn from_f64(v: f64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn exp_of_negative(self) -> Self {
                $exp(self)
            }
        }
    };
}
real!(f32, F32, exp_f32);
real!(f64, F64, f64::exp);

/// `eˣ` as `2ⁿ · eʳ` with whole `n` and `|r| ≤ ln 2 / 2`, `eʳ` by the polynomial of Cephes
/// (`expf`). It has no branch and calls nothing, so that lanes are computed at once.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    /// Added to a number, it leaves the nearest whole one in the last bits.
    const WHOLE: f32 = 12_582_912.;
    /// Logarithm of the smallest normal number, rounded up.
    const LOWEST: f32 = -87.336_54;
    let within = if x < LOWEST { LOWEST } else { x };
    let whole = within * std::f32::consts::LOG2_E + WHOLE;
    let n = whole - WHOLE;
    // The first part of ln 2 has so few bits that its multiples are exact.
    let r = (within - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        0.166_666_65,
        0.5,
    ] {
        p = p * r + coefficient;
    }
    let fraction = (p * (r * r) + r) + 1.;
    let power = f32::from_bits((whole.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < LOWEST { 0. } else { fraction * power }
}

/// Sixteen accumulator values in registers of `I`.
pub(crate) type Lanes<I, T> = <T as Real>::Lanes<I>;

/// The same value in every lane.
#[inline(always)]
pub(crate) fn splat<I: Isa, T: Real>(isa: I, v: T) -> Lanes<I, T> {
    Vector::splat(isa, v)
}

/// Zero in every lane.
#[inline(always)]
pub(crate) fn zero<I: Isa, T: Real>(isa: I) -> Lanes<I, T> {
    splat(isa, T::default())
}

/// Operations on lanes. A value of them proves that the processor has the instruction set `I`.
pub(crate) trait Vector<I, T: Real>:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    fn load(isa: I, v: &[T; LANES]) -> Self;
    fn splat(isa: I, v: T) -> Self;
    fn to_array(self) -> [T; LANES];

    /// Of each lane the greater of both; `other` where they are equal or either is NaN.
    fn max(self, other: Self) -> Self;

    /// `then` in the lanes that are above `bound`, else `otherwise`; NaN is above nothing.
    fn if_above(self, bound: Self, then: Self, otherwise: Self) -> Self;

    /// The lanes whose last bits are an exponent and its bias, as powers of two.
    fn integer_as_exponent(self) -> Self;

    /// The last `count` lanes; zero in the others.
    fn keep_last(self, count: usize) -> Self;

    /// The sum of all lanes, by halves.
    #[inline(always)]
    fn sum(self) -> f64 {
        let v = self.to_array();
        let eight: [T; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let four: [T; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        ((four[0] + four[2]) + (four[1] + four[3])).to_f64()
    }
}

/// An instruction set. A value of it proves that the processor has it.
pub(crate) trait Isa: Copy {
    type F32: Vector<Self, f32>;
    type F64: Vector<Self, f64>;

    /// Runs a kernel as a function of its own with the instruction set: compiled once, wherever it
    /// is used.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn widen_f16(self, v: [u16; LANES]) -> Self::F32;
    fn narrow_f16(self, v: Self::F32) -> [u16; LANES];
    fn widen_bf16(self, v: [u16; LANES]) -> Self::F32;
    fn narrow_bf16(self, v: Self::F32) -> [u16; LANES];
}

/// Element type of tensors.
pub(crate) trait Elem: Plain + Default + Send + Sync + 'static {
    /// Type that it is computed in.
    type Acc: Real + Approximate;

    fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<I, Self::Acc>;
    fn narrow<I: Isa>(isa: I, v: Lanes<I, Self::Acc>) -> [Self; LANES];

    /// Rounded to this type, and back.
    #[inline(always)]
    fn round<I: Isa>(isa: I, v: Lanes<I, Self::Acc>) -> Lanes<I, Self::Acc> {
        Self::load(isa, &Self::narrow(isa, v))
    }

    #[inline(always)]
    fn store<I: Isa>(isa: I, v: Lanes<I, Self::Acc>, out: &mut [MaybeUninit<Self>; LANES]) {
        *out = Self::narrow(isa, v).map(MaybeUninit::new);
    }
}

macro_rules! full_precision {
    ($t:ty) => {
        impl Elem for $t {
            type Acc = $t;
            #[inline(always)]
            fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<I, $t> {
                Vector::load(isa, v)
            }
            #[inline(always)]
            fn narrow<I: Isa>(_: I, v: Lanes<I, $t>) -> [Self; LANES] {
                v.to_array()
            }
        }
    };
}
full_precision!(f32);
full_precision!(f64);

impl Elem for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<I, f32> {
        isa.widen_bf16(v.map(bf16::to_bits))
    }
    #[inline(always)]
    fn narrow<I: Isa>(isa: I, v: Lanes<I, f32>) -> [Self; LANES] {
        isa.narrow_bf16(v).map(bf16::from_bits)
    }
}

impl Elem for f16 {
    type Acc = f32;
    #[inline(always)]
    fn load<I: Isa>(isa: I, v: &[Self; LANES]) -> Lanes<I, f32> {
        isa.widen_f16(v.map(f16::to_bits))
    }
    #[inline(always)]
    fn narrow<I: Isa>(isa: I, v: Lanes<I, f32>) -> [Self; LANES] {
        isa.narrow_f16(v).map(f16::from_bits)
    }
}

/// A computation on slices, written over any instruction set. `run` and all that it calls must be
/// `#[inline(always)]`: only then is it compiled with the instructions of its caller.
pub(crate) trait Kernel {
    type Output;
    fn run<I: Isa>(self, isa: I) -> Self::Output;
}

/// An instruction set that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The instruction set that every processor of the target has: SSE2 or NEON.
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

    /// The highest level of this processor, or the one that the environment variable
    /// `CANDLE_NORM_ISA` names (`baseline`, `avx2`, `avx512`) if the processor has it.
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

    /// Runs `kernel`, compiled for this level. A level that the processor does not have runs as the
    /// baseline.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        match self {
            Level::Baseline => {}
            Level::Avx2 => {
                if let Some(isa) = x86::Avx2::detect() {
                    return isa.call(kernel);
                }
            }
            Level::Avx512 => {
                if let Some(isa) = x86::Avx512::detect() {
                    return isa.call(kernel);
                }
            }
        }
        Baseline.call(kernel)
    }
}
