//! Slices as sixteen lanes at a time.
//!
//! What is left at the end of a slice is read as the *last* sixteen elements, of which only the last few lanes are new: a map computes the
//! rest a second time, to the same result, and a sum leaves them out. A slice of fewer than sixteen elements is read into the
//! last lanes of a register of zeros.

use std::mem::MaybeUninit;

use super::simd::{Elem, Isa, LANES, Lanes, Real};

/// The lanes at the end of `x`; the first of them are from before the tail, or zero.
#[inline(always)]
pub(crate) fn tail<E: Elem, I: Isa>(isa: I, x: &[E]) -> Lanes<E::Acc> {
    match x.last_chunk::<LANES>() {
        Some(last) => E::load(isa, last),
        None => {
            let mut padded = [E::default(); LANES];
            padded[LANES - x.len()..].copy_from_slice(x);
            E::load(isa, &padded)
        }
    }
}

/// Writes the lanes of [`tail`] back.
#[inline(always)]
pub(crate) fn store_tail<E: Elem, I: Isa>(isa: I, v: Lanes<E::Acc>, out: &mut [MaybeUninit<E>]) {
    match out.last_chunk_mut::<LANES>() {
        Some(last) => E::store(isa, v, last),
        None => {
            let narrow = E::narrow(isa, v);
            let len = out.len();
            for (o, v) in out.iter_mut().zip(&narrow[LANES - len..]) {
                *o = MaybeUninit::new(*v);
            }
        }
    }
}

/// A slice of accumulator values that runs alongside elements: a weight, a bias, the sums of columns.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a, T> {
    chunks: &'a [[T; LANES]],
    tail: Lanes<T>,
}

impl<'a, T: Elem<Acc = T> + Real> Columns<'a, T> {
    #[inline(always)]
    pub(crate) fn new<I: Isa>(isa: I, values: &'a [T]) -> Self {
        Self {
            chunks: values.as_chunks().0,
            tail: tail(isa, values),
        }
    }

    /// The lanes of chunk `k`; the tail follows the last whole chunk.
    #[inline(always)]
    pub(crate) fn at(&self, k: usize) -> Lanes<T> {
        match self.chunks.get(k) {
            Some(chunk) => Lanes(*chunk),
            None => self.tail,
        }
    }
}

/// `out = f(k, x)` for each chunk `k` of `x` and for its tail.
#[inline(always)]
pub(crate) fn map<E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    out: &mut [MaybeUninit<E>],
    f: impl Fn(usize, Lanes<E::Acc>) -> Lanes<E::Acc>,
) {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (out_chunks, _) = out.as_chunks_mut::<LANES>();
    for (k, (x, out)) in chunks.iter().zip(out_chunks).enumerate() {
        E::store(isa, f(k, E::load(isa, x)), out);
    }
    if !rest.is_empty() {
        store_tail(isa, f(chunks.len(), tail(isa, x)), out);
    }
}

/// `out = f(k, x, y)` for each chunk `k` of `x` and `y` and for their tails.
#[inline(always)]
pub(crate) fn map2<E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    y: &[E],
    out: &mut [MaybeUninit<E>],
    f: impl Fn(usize, Lanes<E::Acc>, Lanes<E::Acc>) -> Lanes<E::Acc>,
) {
    let (xs, rest) = x.as_chunks::<LANES>();
    let (ys, _) = y.as_chunks::<LANES>();
    let (outs, _) = out.as_chunks_mut::<LANES>();
    for (k, ((x, y), out)) in xs.iter().zip(ys).zip(outs).enumerate() {
        E::store(isa, f(k, E::load(isa, x), E::load(isa, y)), out);
    }
    if !rest.is_empty() {
        store_tail(isa, f(xs.len(), tail(isa, x), tail(isa, y)), out);
    }
}

/// The longest run that is added up in the accumulator's precision; longer ones are added up in `f64`.
pub(crate) const RUN: usize = 2048;

/// The sums of `f(x)` over `x`, for any number of sums at once.
#[inline(always)]
pub(crate) fn sums<const N: usize, E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    f: impl Fn(Lanes<E::Acc>) -> [Lanes<E::Acc>; N],
) -> [f64; N] {
    let mut totals = [0f64; N];
    for run in x.chunks(RUN) {
        let (chunks, rest) = run.as_chunks::<LANES>();
        // Two of each, so that an addition does not wait for the last.
        let mut even = [Lanes::zero(); N];
        let mut odd = [Lanes::zero(); N];
        let (pairs, single) = chunks.as_chunks::<2>();
        for [a, b] in pairs {
            let (a, b) = (f(E::load(isa, a)), f(E::load(isa, b)));
            for i in 0..N {
                even[i] = even[i] + a[i];
                odd[i] = odd[i] + b[i];
            }
        }
        for a in single {
            let a = f(E::load(isa, a));
            for i in 0..N {
                even[i] = even[i] + a[i];
            }
        }
        if !rest.is_empty() {
            let a = f(tail(isa, run));
            for i in 0..N {
                odd[i] = odd[i] + a[i].keep_last(rest.len());
            }
        }
        for i in 0..N {
            totals[i] += (even[i] + odd[i]).sum();
        }
    }
    totals
}

/// The sums of `f(k, x, y)` over `x` and `y`, for any number of sums at once; `k` counts chunks.
#[inline(always)]
pub(crate) fn sums2<const N: usize, E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    y: &[E],
    f: impl Fn(usize, Lanes<E::Acc>, Lanes<E::Acc>) -> [Lanes<E::Acc>; N],
) -> [f64; N] {
    let mut totals = [0f64; N];
    let mut first = 0;
    for (x, y) in x.chunks(RUN).zip(y.chunks(RUN)) {
        let (xs, rest) = x.as_chunks::<LANES>();
        let (ys, _) = y.as_chunks::<LANES>();
        let mut even = [Lanes::zero(); N];
        let mut odd = [Lanes::zero(); N];
        let (x_pairs, x_single) = xs.as_chunks::<2>();
        let (y_pairs, y_single) = ys.as_chunks::<2>();
        let mut k = first;
        for ([xa, xb], [ya, yb]) in x_pairs.iter().zip(y_pairs) {
            let a = f(k, E::load(isa, xa), E::load(isa, ya));
            let b = f(k + 1, E::load(isa, xb), E::load(isa, yb));
            for i in 0..N {
                even[i] = even[i] + a[i];
                odd[i] = odd[i] + b[i];
            }
            k += 2;
        }
        for (x, y) in x_single.iter().zip(y_single) {
            let a = f(k, E::load(isa, x), E::load(isa, y));
            for i in 0..N {
                even[i] = even[i] + a[i];
            }
            k += 1;
        }
        if !rest.is_empty() {
            let a = f(k, tail(isa, x), tail(isa, y));
            for i in 0..N {
                odd[i] = odd[i] + a[i].keep_last(rest.len());
            }
        }
        for i in 0..N {
            totals[i] += (even[i] + odd[i]).sum();
        }
        first += RUN / LANES;
    }
    totals
}
