//! The instruction sets of x86-64. A token of a set exists only after the processor was asked for
//! it, and lanes of its registers only from such a token: whoever holds either may use its
//! instructions.

use std::arch::x86_64::*;
use std::mem::transmute;
use std::ops::{Add, Div, Mul, Sub};

use super::{Isa, Kernel, LANES, Vector};

/// Lanes of `$count` registers: arithmetic register by register.
macro_rules! registers {
    (
        $name:ident($register:ty; $count:literal) of $scalar:ident as $bits:ident in $isa:ident,
        $add:ident, $sub:ident, $mul:ident, $div:ident, $max:ident, $splat:ident,
        |$v:ident, $mask:ident| $and:expr,
        |$a:ident, $b:ident, $then:ident, $otherwise:ident| $if_above:expr,
        |$shifted:ident| $shift:expr
    ) => {
        #[derive(Clone, Copy)]
        pub(crate) struct $name([$register; $count]);

        registers!(@arithmetic $name, $count, Add, add, $add);
        registers!(@arithmetic $name, $count, Sub, sub, $sub);
        registers!(@arithmetic $name, $count, Mul, mul, $mul);
        registers!(@arithmetic $name, $count, Div, div, $div);

        impl Vector<$isa, $scalar> for $name {
            #[inline(always)]
            fn load(_: $isa, v: &[$scalar; LANES]) -> Self {
                // SAFETY: registers and array have the same size, and every bit pattern is valid
                // for both.
                Self(unsafe { transmute::<[$scalar; LANES], [$register; $count]>(*v) })
            }
            #[inline(always)]
            fn splat(_: $isa, v: $scalar) -> Self {
                // SAFETY: the token proves the instruction set.
                Self([unsafe { $splat(v) }; $count])
            }
            #[inline(always)]
            fn to_array(self) -> [$scalar; LANES] {
                // SAFETY: registers and array have the same size, and every bit pattern is valid
                // for both.
                unsafe { transmute::<[$register; $count], [$scalar; LANES]>(self.0) }
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                let mut out = self;
                for i in 0..$count {
                    // SAFETY: `self` proves the instruction set.
                    out.0[i] = unsafe { $max(self.0[i], other.0[i]) };
                }
                out
            }
            #[inline(always)]
            fn if_above(self, bound: Self, then: Self, otherwise: Self) -> Self {
                let mut out = self;
                for i in 0..$count {
                    let ($a, $b) = (self.0[i], bound.0[i]);
                    let ($then, $otherwise) = (then.0[i], otherwise.0[i]);
                    // SAFETY: `self` proves the instruction set.
                    out.0[i] = unsafe { $if_above };
                }
                out
            }
            #[inline(always)]
            fn integer_as_exponent(self) -> Self {
                let mut out = self;
                for i in 0..$count {
                    let $shifted = self.0[i];
                    // SAFETY: `self` proves the instruction set.
                    out.0[i] = unsafe { $shift };
                }
                out
            }
            #[inline(always)]
            fn keep_last(self, count: usize) -> Self {
                /// A window on it that starts at `count` has that many ones, at its end.
                static STEP: [$bits; 2 * LANES] = {
                    let mut step = [0; 2 * LANES];
                    let mut i = LANES;
                    while i < 2 * LANES {
                        step[i] = !0;
                        i += 1;
                    }
                    step
                };
                let mut window = [0; LANES];
                window.copy_from_slice(&STEP[count.min(LANES)..][..LANES]);
                // SAFETY: registers and array have the same size, and every bit pattern is valid
                // for both.
                let masks = unsafe { transmute::<[$bits; LANES], [$register; $count]>(window) };
                let mut out = self;
                for i in 0..$count {
                    let ($v, $mask) = (self.0[i], masks[i]);
                    // SAFETY: `self` proves the instruction set.
                    out.0[i] = unsafe { $and };
                }
                out
            }
        }
    };
    (@arithmetic $name:ident, $count:literal, $trait:ident, $method:ident, $instruction:ident) => {
        impl $trait for $name {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                let mut out = self;
                for i in 0..$count {
                    // SAFETY: `self` proves the instruction set.
                    out.0[i] = unsafe { $instruction(self.0[i], other.0[i]) };
                }
                out
            }
        }
    };
}

registers! {
    Two256(__m256; 2) of f32 as u32 in Avx2,
    _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_div_ps, _mm256_max_ps, _mm256_set1_ps,
    |v, mask| _mm256_and_ps(v, mask),
    |a, b, then, otherwise| {
        _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b))
    },
    |v| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_castps_si256(v)))
}
registers! {
    Four256d(__m256d; 4) of f64 as u64 in Avx2,
    _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_div_pd, _mm256_max_pd, _mm256_set1_pd,
    |v, mask| _mm256_and_pd(v, mask),
    |a, b, then, otherwise| {
        _mm256_blendv_pd(otherwise, then, _mm256_cmp_pd::<_CMP_GT_OQ>(a, b))
    },
    |v| _mm256_castsi256_pd(_mm256_slli_epi64::<52>(_mm256_castpd_si256(v)))
}
registers! {
    One512(__m512; 1) of f32 as u32 in Avx512,
    _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_div_ps, _mm512_max_ps, _mm512_set1_ps,
    |v, mask| _mm512_and_ps(v, mask),
    |a, b, then, otherwise| {
        _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), otherwise, then)
    },
    |v| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_castps_si512(v)))
}
registers! {
    Two512d(__m512d; 2) of f64 as u64 in Avx512,
    _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_div_pd, _mm512_max_pd, _mm512_set1_pd,
    |v, mask| _mm512_and_pd(v, mask),
    |a, b, then, otherwise| {
        _mm512_mask_blend_pd(_mm512_cmp_pd_mask::<_CMP_GT_OQ>(a, b), otherwise, then)
    },
    |v| _mm512_castsi512_pd(_mm512_slli_epi64::<52>(_mm512_castpd_si512(v)))
}

/// The processor has AVX2 and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }
}

/// One register of `f32` to the bits of eight `bf16`, each in 32 bits; as the portable conversion
/// does it.
#[inline(always)]
fn narrow_bf16_256(_: Avx2, v: __m256) -> __m256i {
    // SAFETY: the token proves AVX2.
    unsafe {
        let bits = _mm256_castps_si256(v);
        let high = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

impl Isa for Avx2 {
    type F32 = Two256;
    type F64 = Four256d;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,f16c")]
        #[inline(never)]
        fn inner<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { inner(self, kernel) }
    }

    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> Two256 {
        // SAFETY: `self` proves F16C; registers and arrays have the same size.
        unsafe {
            let [low, high]: [__m128i; 2] = transmute(v);
            Two256([_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)])
        }
    }

    #[inline(always)]
    fn narrow_f16(self, v: Two256) -> [u16; LANES] {
        // SAFETY: `self` proves F16C; registers and arrays have the same size.
        unsafe {
            transmute([
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0[0]),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0[1]),
            ])
        }
    }

    #[inline(always)]
    fn widen_bf16(self, v: [u16; LANES]) -> Two256 {
        // SAFETY: `self` proves AVX2; registers and arrays have the same size.
        unsafe {
            let halves: [__m128i; 2] = transmute(v);
            Two256(
                halves.map(|v| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(v)))
                }),
            )
        }
    }

    #[inline(always)]
    fn narrow_bf16(self, v: Two256) -> [u16; LANES] {
        let low = narrow_bf16_256(self, v.0[0]);
        let high = narrow_bf16_256(self, v.0[1]);
        // SAFETY: `self` proves AVX2; registers and arrays have the same size.
        unsafe {
            let packed = _mm256_packus_epi32(low, high);
            transmute(_mm256_permute4x64_epi64::<0b11_01_10_00>(packed))
        }
    }
}

/// The processor has AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl"))
        .then_some(Self(()))
    }
}

impl Isa for Avx512 {
    type F32 = One512;
    type F64 = Two512d;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        #[inline(never)]
        fn inner<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: `self` proves the instruction set.
        unsafe { inner(self, kernel) }
    }

    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> One512 {
        // SAFETY: `self` proves AVX-512 F; registers and arrays have the same size.
        One512([unsafe { _mm512_cvtph_ps(transmute::<[u16; LANES], __m256i>(v)) }])
    }

    #[inline(always)]
    fn narrow_f16(self, v: One512) -> [u16; LANES] {
        // SAFETY: `self` proves AVX-512 F; registers and arrays have the same size.
        unsafe { transmute(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v.0[0])) }
    }

    #[inline(always)]
    fn widen_bf16(self, v: [u16; LANES]) -> One512 {
        // SAFETY: `self` proves AVX-512 F; registers and arrays have the same size.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(transmute::<[u16; LANES], __m256i>(v));
            One512([_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))])
        }
    }

    #[inline(always)]
    fn narrow_bf16(self, v: One512) -> [u16; LANES] {
        let v = v.0[0];
        // SAFETY: `self` proves AVX-512 F; registers and arrays have the same size.
        unsafe {
            let bits = _mm512_castps_si512(v);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            transmute(_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(
                rounded, nan, quiet,
            )))
        }
    }
}
