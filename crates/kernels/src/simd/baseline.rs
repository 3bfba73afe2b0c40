//! The instructions that every processor of the target has: arrays, which the compiler makes of
//! them what it can.

use std::ops::{Add, Div, Mul, Sub};

use super::{Isa, Kernel, LANES, Real, Vector, half_bits};

#[derive(Clone, Copy)]
pub(super) struct Baseline;

#[derive(Clone, Copy)]
pub(crate) struct Array<T>([T; LANES]);

macro_rules! lanewise {
    ($trait:ident, $method:ident) => {
        impl<T: Real> $trait for Array<T> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                let mut out = self;
                for i in 0..LANES {
                    out.0[i] = self.0[i].$method(other.0[i]);
                }
                out
            }
        }
    };
}
lanewise!(Add, add);
lanewise!(Sub, sub);
lanewise!(Mul, mul);
lanewise!(Div, div);

impl<T: Real> Vector<Baseline, T> for Array<T> {
    #[inline(always)]
    fn load(_: Baseline, v: &[T; LANES]) -> Self {
        Self(*v)
    }
    #[inline(always)]
    fn splat(_: Baseline, v: T) -> Self {
        Self([v; LANES])
    }
    #[inline(always)]
    fn to_array(self) -> [T; LANES] {
        self.0
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.if_above(other, self, other)
    }
    #[inline(always)]
    fn if_above(self, bound: Self, then: Self, otherwise: Self) -> Self {
        let mut out = otherwise;
        for i in 0..LANES {
            if self.0[i] > bound.0[i] {
                out.0[i] = then.0[i];
            }
        }
        out
    }
    #[inline(always)]
    fn integer_as_exponent(self) -> Self {
        Self(self.0.map(T::integer_as_exponent))
    }
    #[inline(always)]
    fn keep_last(self, count: usize) -> Self {
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
}

impl Isa for Baseline {
    type F32 = Array<f32>;
    type F64 = Array<f64>;

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn widen_f16(self, v: [u16; LANES]) -> Array<f32> {
        Array(v.map(half_bits::widen_f16))
    }
    #[inline(always)]
    fn narrow_f16(self, v: Array<f32>) -> [u16; LANES] {
        v.0.map(half_bits::narrow_f16)
    }
    #[inline(always)]
    fn widen_bf16(self, v: [u16; LANES]) -> Array<f32> {
        Array(v.map(half_bits::widen_bf16))
    }
    #[inline(always)]
    fn narrow_bf16(self, v: Array<f32>) -> [u16; LANES] {
        v.0.map(half_bits::narrow_bf16)
    }
}
