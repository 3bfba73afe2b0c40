//! The instruction sets of x86-64. A token of a set exists only after the processor was asked for it.

use std::arch::x86_64::{
    _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph, _mm512_cvtph_ps, _mm512_cvtps_ph,
};
use std::mem::transmute;

use super::{Isa, Kernel, LANES};

#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    #[inline]
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,f16c")]
        fn inner<K: Kernel>(isa: Avx2, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: `self` exists only if the processor has AVX2 and F16C.
        unsafe { inner(self, kernel) }
    }
}

impl Isa for Avx2 {
    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> [f32; LANES] {
        // SAFETY: `self` exists only if the processor has F16C; the arrays are of the size of the registers.
        unsafe {
            let [low, high]: [[u16; 8]; 2] = transmute(v);
            transmute([
                _mm256_cvtph_ps(transmute(low)),
                _mm256_cvtph_ps(transmute(high)),
            ])
        }
    }

    #[inline(always)]
    fn narrow_f16(self, v: [f32; LANES]) -> [u16; LANES] {
        // SAFETY: `self` exists only if the processor has F16C; the arrays are of the size of the registers.
        unsafe {
            let [low, high]: [[f32; 8]; 2] = transmute(v);
            transmute([
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(transmute(low)),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(transmute(high)),
            ])
        }
    }
}

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

    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn inner<K: Kernel>(isa: Avx512, kernel: K) -> K::Output {
            kernel.run(isa)
        }
        // SAFETY: `self` exists only if the processor has AVX-512 F, BW, DQ and VL.
        unsafe { inner(self, kernel) }
    }
}

impl Isa for Avx512 {
    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> [f32; LANES] {
        // SAFETY: `self` exists only if the processor has AVX-512 F; the arrays are of the size of the registers.
        unsafe { transmute(_mm512_cvtph_ps(transmute(v))) }
    }

    #[inline(always)]
    fn narrow_f16(self, v: [f32; LANES]) -> [u16; LANES] {
        // SAFETY: `self` exists only if the processor has AVX-512 F; the arrays are of the size of the registers.
        unsafe { transmute(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(transmute(v))) }
    }
}
