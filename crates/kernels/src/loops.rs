//! Vector loops: slices sixteen lanes at a time.
//!
//! The tail of a slice is read as the *last* sixteen elements, of which only the last few lanes are
//! new: a map computes the others a second time, to the same result, and a sum leaves them out. A
//! slice of fewer than sixteen elements is read into the last lanes of a register of zeros.

use std::mem::MaybeUninit;

use super::simd::{Elem, Isa, LANES, Lanes, Real, Vector, zero};

/// The lanes at the end of `x`; the first of them are from before the tail, or zero.
#[inline(always)]
pub(crate) fn tail<E: Elem, I: Isa>(isa: I, x: &[E]) -> Lanes<I, E::Acc> {
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
pub(crate) fn store_tail<E: Elem, I: Isa>(isa: I, v: Lanes<I, E::Acc>, out: &mut [MaybeUninit<E>]) {
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

/// One accumulator value for each column, read alongside the elements of a row: a weight, a bias,
/// sums of columns.
#[derive(Clone, Copy)]
pub(crate) struct ColumnValues<'a, I: Isa, T: Real> {
    isa: I,
    chunks: &'a [[T; LANES]],
    tail: Lanes<I, T>,
}

impl<'a, I: Isa, T: Real> ColumnValues<'a, I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, values: &'a [T]) -> Self {
        Self {
            isa,
            chunks: values.as_chunks().0,
            tail: tail(isa, values),
        }
    }

    /// The lanes of chunk `k`; the tail follows the last whole chunk.
    #[inline(always)]
    pub(crate) fn at(&self, k: usize) -> Lanes<I, T> {
        match self.chunks.get(k) {
            Some(chunk) => T::load(self.isa, chunk),
            None => self.tail,
        }
    }
}

/// A factor for each column, or one.
#[derive(Clone, Copy)]
pub(crate) struct ColumnFactor<'a, I: Isa, T: Real>(Option<ColumnValues<'a, I, T>>);

impl<'a, I: Isa, T: Real> ColumnFactor<'a, I, T> {
    #[inline(always)]
    pub(crate) fn new(isa: I, values: Option<&'a [T]>) -> Self {
        Self(values.map(
            #[inline(always)]
            |v| ColumnValues::new(isa, v),
        ))
    }

    /// `v` times the factors of chunk `k`.
    #[inline(always)]
    pub(crate) fn times(&self, k: usize, v: Lanes<I, T>) -> Lanes<I, T> {
        match &self.0 {
            Some(factor) => v * factor.at(k),
            None => v,
        }
    }
}

/// `out = f(k, x)` for each chunk `k` of `x` and for its tail.
#[inline(always)]
pub(crate) fn map<'o, E: Elem, O: Elem<Acc = E::Acc>, I: Isa>(
    isa: I,
    x: &[E],
    out: &'o mut [MaybeUninit<O>],
    f: impl Fn(usize, Lanes<I, E::Acc>) -> Lanes<I, E::Acc>,
) -> &'o mut [O] {
    assert!(x.len() == out.len());
    let (chunks, rest) = x.as_chunks::<LANES>();
    let (out_chunks, _) = out.as_chunks_mut::<LANES>();
    for (k, (x, out)) in chunks.iter().zip(out_chunks).enumerate() {
        O::store(isa, f(k, E::load(isa, x)), out);
    }
    if !rest.is_empty() {
        store_tail(isa, f(chunks.len(), tail(isa, x)), out);
    }
    // SAFETY: `out` is as long as `x`, and every chunk and the tail were stored.
    unsafe { out.assume_init_mut() }
}

/// `out = f(k, x, y)` for each chunk `k` of `x` and `y` and for their tails.
#[inline(always)]
pub(crate) fn map2<'o, E: Elem, F: Elem<Acc = E::Acc>, O: Elem<Acc = E::Acc>, I: Isa>(
    isa: I,
    x: &[E],
    y: &[F],
    out: &'o mut [MaybeUninit<O>],
    f: impl Fn(usize, Lanes<I, E::Acc>, Lanes<I, E::Acc>) -> Lanes<I, E::Acc>,
) -> &'o mut [O] {
    assert!(x.len() == out.len() && y.len() == out.len());
    let (xs, rest) = x.as_chunks::<LANES>();
    let (ys, _) = y.as_chunks::<LANES>();
    let (outs, _) = out.as_chunks_mut::<LANES>();
    for (k, ((x, y), out)) in xs.iter().zip(ys).zip(outs).enumerate() {
        O::store(isa, f(k, E::load(isa, x), F::load(isa, y)), out);
    }
    if !rest.is_empty() {
        store_tail(isa, f(xs.len(), tail(isa, x), tail(isa, y)), out);
    }
    // SAFETY: `out` is as long as `x` and `y`, and every chunk and the tail were stored.
    unsafe { out.assume_init_mut() }
}

/// The longest run that is added up in the accumulator's precision; the sums of runs are added up
/// in `f64`.
pub(crate) const RUN: usize = 2048;

/// Sums that are being formed, `N` at once. There are two of each, so that an addition need not
/// wait for the one before.
struct LaneSums<I: Isa, T: Real, const N: usize> {
    even: [Lanes<I, T>; N],
    odd: [Lanes<I, T>; N],
}

impl<I: Isa, T: Real, const N: usize> LaneSums<I, T, N> {
    #[inline(always)]
    fn new(isa: I) -> Self {
        Self {
            even: [zero::<I, T>(isa); N],
            odd: [zero::<I, T>(isa); N],
        }
    }

    #[inline(always)]
    fn add_even(&mut self, v: [Lanes<I, T>; N]) {
        for i in 0..N {
            self.even[i] = self.even[i] + v[i];
        }
    }

    #[inline(always)]
    fn add_odd(&mut self, v: [Lanes<I, T>; N]) {
        for i in 0..N {
            self.odd[i] = self.odd[i] + v[i];
        }
    }

    #[inline(always)]
    fn add_tail(&mut self, v: [Lanes<I, T>; N], count: usize) {
        for i in 0..N {
            self.odd[i] = self.odd[i] + v[i].keep_last(count);
        }
    }

    #[inline(always)]
    fn totals(self) -> [f64; N] {
        let mut totals = [0f64; N];
        for i in 0..N {
            totals[i] = (self.even[i] + self.odd[i]).sum();
        }
        totals
    }
}

/// The sums of `f(x)` over slices of together about [`RUN`] elements, any number of sums at once.
#[inline(always)]
pub(crate) fn run_sums<'a, const N: usize, E: Elem, I: Isa>(
    isa: I,
    slices: impl Iterator<Item = &'a [E]>,
    f: impl Fn(Lanes<I, E::Acc>) -> [Lanes<I, E::Acc>; N],
) -> [f64; N] {
    let mut sums = LaneSums::<I, E::Acc, N>::new(isa);
    for x in slices {
        let (chunks, rest) = x.as_chunks::<LANES>();
        let (pairs, single) = chunks.as_chunks::<2>();
        for [a, b] in pairs {
            sums.add_even(f(E::load(isa, a)));
            sums.add_odd(f(E::load(isa, b)));
        }
        for a in single {
            sums.add_even(f(E::load(isa, a)));
        }
        if !rest.is_empty() {
            sums.add_tail(f(tail(isa, x)), rest.len());
        }
    }
    sums.totals()
}

/// The sums of `f(k, x, y)` over pairs of slices of together about [`RUN`] elements; `k` counts the
/// chunks of a slice, from `first` on.
#[inline(always)]
pub(crate) fn run_sums2<'a, const N: usize, E: Elem, F: Elem<Acc = E::Acc>, I: Isa>(
    isa: I,
    slices: impl Iterator<Item = (&'a [E], &'a [F])>,
    first: usize,
    f: impl Fn(usize, Lanes<I, E::Acc>, Lanes<I, E::Acc>) -> [Lanes<I, E::Acc>; N],
) -> [f64; N] {
    let mut sums = LaneSums::<I, E::Acc, N>::new(isa);
    for (x, y) in slices {
        let (xs, rest) = x.as_chunks::<LANES>();
        let (ys, _) = y.as_chunks::<LANES>();
        let (x_pairs, x_single) = xs.as_chunks::<2>();
        let (y_pairs, y_single) = ys.as_chunks::<2>();
        let mut k = first;
        for ([xa, xb], [ya, yb]) in x_pairs.iter().zip(y_pairs) {
            sums.add_even(f(k, E::load(isa, xa), F::load(isa, ya)));
            sums.add_odd(f(k + 1, E::load(isa, xb), F::load(isa, yb)));
            k += 2;
        }
        for (x, y) in x_single.iter().zip(y_single) {
            sums.add_even(f(k, E::load(isa, x), F::load(isa, y)));
            k += 1;
        }
        if !rest.is_empty() {
            sums.add_tail(f(k, tail(isa, x), tail(isa, y)), rest.len());
        }
    }
    sums.totals()
}

/// The sums of `f(x)` over a slice of any length.
#[inline(always)]
pub(crate) fn sums<const N: usize, E: Elem, I: Isa>(
    isa: I,
    x: &[E],
    f: impl Fn(Lanes<I, E::Acc>) -> [Lanes<I, E::Acc>; N] + Copy,
) -> [f64; N] {
    let mut totals = [0f64; N];
    for run in x.chunks(RUN) {
        let part = run_sums(isa, std::iter::once(run), f);
        for i in 0..N {
            totals[i] += part[i];
        }
    }
    totals
}

/// The sums of `f(k, x, y)` over two slices of any length; `k` counts chunks.
#[inline(always)]
pub(crate) fn sums2<const N: usize, E: Elem, F: Elem<Acc = E::Acc>, I: Isa>(
    isa: I,
    x: &[E],
    y: &[F],
    f: impl Fn(usize, Lanes<I, E::Acc>, Lanes<I, E::Acc>) -> [Lanes<I, E::Acc>; N] + Copy,
) -> [f64; N] {
    let mut totals = [0f64; N];
    for (run, pair) in x.chunks(RUN).zip(y.chunks(RUN)).enumerate() {
        let part = run_sums2(isa, std::iter::once(pair), run * (RUN / LANES), f);
        for i in 0..N {
            totals[i] += part[i];
        }
    }
    totals
}

/// How many slices of `len` elements make a run.
pub(crate) fn slices_per_run(len: usize) -> usize {
    (RUN / len.max(1)).max(1)
}
