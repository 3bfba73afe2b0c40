//! Column sums: in lanes over a run of rows, and in `f64` over the runs.

use std::mem::MaybeUninit;

use super::loops::{store_tail, tail};
use super::par;
use super::simd::{Elem, Isa, LANES, Lanes, Real, Vector, zero};

/// How many rows are added up in the accumulator's precision.
const ROWS_PER_RUN: usize = 32;

/// `N` sums for each column.
pub(crate) struct ColumnSums<'a, I: Isa, T: Real, const N: usize> {
    /// Those of the last rows. The columns of the last chunk are at its end.
    chunks: Vec<[Lanes<I, T>; N]>,
    /// How many rows these are.
    rows: usize,
    /// Those of the rows before: the first sum of every column, then the next.
    totals: &'a mut [f64],
}

impl<'a, I: Isa, T: Real, const N: usize> ColumnSums<'a, I, T, N> {
    /// Adds to `totals`, which has `N` numbers for each column.
    #[inline(always)]
    pub(crate) fn new(isa: I, totals: &'a mut [f64]) -> Self {
        Self {
            chunks: vec![[zero::<I, T>(isa); N]; (totals.len() / N).div_ceil(LANES)],
            rows: 0,
            totals,
        }
    }

    /// The sums of each chunk, for loops of their own.
    #[inline(always)]
    pub(crate) fn chunks(&mut self) -> &mut [[Lanes<I, T>; N]] {
        &mut self.chunks
    }

    /// Must follow the adding of `rows` rows.
    #[inline(always)]
    pub(crate) fn added(&mut self, isa: I, rows: usize) {
        self.rows += rows;
        if self.rows >= ROWS_PER_RUN {
            self.flush(isa);
        }
    }

    /// Adds `f(k, x)` for each chunk `k` of a row.
    #[inline(always)]
    pub(crate) fn add<E: Elem<Acc = T>>(
        &mut self,
        isa: I,
        x: &[E],
        f: impl Fn(usize, Lanes<I, T>) -> [Lanes<I, T>; N],
    ) {
        let (whole, rest) = self.chunks.split_at_mut(self.totals.len() / N / LANES);
        for ((k, sums), x) in whole.iter_mut().enumerate().zip(x.as_chunks().0) {
            *sums = plus::<I, T, N>(*sums, f(k, E::load(isa, x)));
        }
        for sums in rest {
            *sums = plus::<I, T, N>(*sums, f(whole.len(), tail(isa, x)));
        }
        self.added(isa, 1);
    }

    /// [`add`](Self::add) for each of some rows, four at a time, whose sums stay in registers
    /// meanwhile: for rows that are in the cache.
    #[inline(always)]
    pub(crate) fn add_rows<E: Elem<Acc = T>>(
        &mut self,
        isa: I,
        rows: &[E],
        f: impl Fn(usize, Lanes<I, T>) -> [Lanes<I, T>; N],
    ) {
        const ROWS: usize = 4;
        let width = self.totals.len() / N;
        let fours = rows.chunks_exact(ROWS * width);
        let last = fours.remainder();
        for rows in fours {
            let chunks = whole_chunks::<ROWS, E>(rows, width);
            let (whole, rest) = self.chunks.split_at_mut(width / LANES);
            for (k, sums) in whole.iter_mut().enumerate() {
                for r in 0..ROWS {
                    *sums = plus::<I, T, N>(*sums, f(k, E::load(isa, &chunks[r][k])));
                }
            }
            for sums in rest {
                for row in rows.chunks_exact(width) {
                    *sums = plus::<I, T, N>(*sums, f(width / LANES, tail(isa, row)));
                }
            }
            self.added(isa, ROWS);
        }
        for row in last.chunks_exact(width) {
            self.add(isa, row, &f);
        }
    }

    /// Adds `f(k, x, y)` for each chunk `k` of two rows, and writes `g(k, x, y)` to a third.
    #[inline(always)]
    pub(crate) fn add_and_map<'o, E: Elem<Acc = T>, F: Elem<Acc = T>>(
        &mut self,
        isa: I,
        (x, y, out): (&[E], &[F], &'o mut [MaybeUninit<E>]),
        f: impl Fn(usize, Lanes<I, T>, Lanes<I, T>) -> [Lanes<I, T>; N],
        g: impl Fn(usize, Lanes<I, T>, Lanes<I, T>) -> Lanes<I, T>,
    ) -> &'o mut [E] {
        let width = self.totals.len() / N;
        assert!(x.len() == width && y.len() == width && out.len() == width);
        let (whole, rest) = self.chunks.split_at_mut(width / LANES);
        let chunks = x.as_chunks().0.iter().zip(y.as_chunks().0);
        let chunks = chunks.zip(out.as_chunks_mut().0);
        for ((k, sums), ((x, y), out)) in whole.iter_mut().enumerate().zip(chunks) {
            let (x, y) = (E::load(isa, x), F::load(isa, y));
            E::store(isa, g(k, x, y), out);
            *sums = plus::<I, T, N>(*sums, f(k, x, y));
        }
        for sums in rest {
            let (x, y) = (tail(isa, x), tail(isa, y));
            store_tail(isa, g(whole.len(), x, y), out);
            *sums = plus::<I, T, N>(*sums, f(whole.len(), x, y));
        }
        self.added(isa, 1);
        // SAFETY: the row is as wide as the sums, and every chunk and the tail were stored.
        unsafe { out.assume_init_mut() }
    }

    /// Adds `f(k, x, y)` for each chunk `k` of two rows.
    #[inline(always)]
    pub(crate) fn add2<E: Elem<Acc = T>, F: Elem<Acc = T>>(
        &mut self,
        isa: I,
        x: &[E],
        y: &[F],
        f: impl Fn(usize, Lanes<I, T>, Lanes<I, T>) -> [Lanes<I, T>; N],
    ) {
        let (whole, rest) = self.chunks.split_at_mut(self.totals.len() / N / LANES);
        let chunks = x.as_chunks().0.iter().zip(y.as_chunks().0);
        for ((k, sums), (x, y)) in whole.iter_mut().enumerate().zip(chunks) {
            *sums = plus::<I, T, N>(*sums, f(k, E::load(isa, x), F::load(isa, y)));
        }
        for sums in rest {
            *sums = plus::<I, T, N>(*sums, f(whole.len(), tail(isa, x), tail(isa, y)));
        }
        self.added(isa, 1);
    }

    /// The last rows go to the totals too.
    #[inline(always)]
    pub(crate) fn finish(mut self, isa: I) {
        self.flush(isa);
    }

    #[inline(always)]
    fn flush(&mut self, isa: I) {
        let width = self.totals.len() / N;
        if width == 0 {
            return;
        }
        for (i, totals) in self.totals.chunks_exact_mut(width).enumerate() {
            let (chunks, rest) = totals.as_chunks_mut::<LANES>();
            for (totals, sums) in chunks.iter_mut().zip(&self.chunks) {
                let sums = sums[i].to_array();
                for lane in 0..LANES {
                    totals[lane] += sums[lane].to_f64();
                }
            }
            if let Some(sums) = self.chunks.get(width / LANES) {
                let sums = sums[i].to_array();
                for (total, sum) in rest.iter_mut().zip(&sums[LANES - width % LANES..]) {
                    *total += sum.to_f64();
                }
            }
        }
        self.chunks.fill([zero::<I, T>(isa); N]);
        self.rows = 0;
    }
}

#[inline(always)]
fn plus<I: Isa, T: Real, const N: usize>(
    mut sums: [Lanes<I, T>; N],
    new: [Lanes<I, T>; N],
) -> [Lanes<I, T>; N] {
    for i in 0..N {
        sums[i] = sums[i] + new[i];
    }
    sums
}

/// The chunks of each of `R` rows, without their tails.
#[inline(always)]
pub(crate) fn whole_chunks<const R: usize, E>(rows: &[E], width: usize) -> [&[[E; LANES]]; R] {
    std::array::from_fn(|r| &rows[r * width..].as_chunks().0[..width / LANES])
}

/// How many of `rows` rows of `width` columns make a block that has sums of its own: so many that
/// combining these costs little beside forming them.
pub(crate) fn rows_per_block(rows: usize, width: usize) -> usize {
    let enough = ROWS_PER_RUN.min(rows.div_ceil(4));
    par::items_per_summing_block(rows, width)
        .max(enough)
        .next_multiple_of(4)
}

/// The sums of all blocks, added up in their order.
pub(crate) fn combined(blocks: &[f64], width: usize) -> Vec<f64> {
    /// So many columns are worth a thread.
    const COLUMNS: usize = 1 << 11;
    let mut totals = vec![0f64; width];
    let jobs = totals.chunks_mut(COLUMNS).enumerate().collect();
    par::for_each(jobs, blocks.len(), |(job, totals)| {
        for block in blocks.chunks_exact(width.max(1)) {
            for (total, sum) in totals.iter_mut().zip(&block[job * COLUMNS..]) {
                *total += sum;
            }
        }
    });
    totals
}
