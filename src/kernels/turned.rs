//! Rows to columns: a copy of `[outer, rows, columns]` as `[outer, columns, rows]`, tile by tile.

use std::array::from_fn;
use std::mem::MaybeUninit;

use super::buffer::filled;
use super::par::{items_per_block, run};
use super::readers::all;
use super::simd::{LANES, turn};

/// Some columns of a matrix.
struct Block<'a, E> {
    matrix: &'a [E],
    first: usize,
    out: &'a mut [E],
}

impl<E: Copy> Block<'_, E> {
    /// Writes the columns one after the other.
    fn turn(self, rows: usize, columns: usize) {
        let width = self.out.len() / rows;
        let row = |r: usize| &self.matrix[r * columns + self.first..][..width];
        // A tile is written at a distance of `rows`, which cannot be less than its side.
        let whole = |count: usize| count - count % LANES;
        let (tiled_rows, tiled) = (whole(rows), whole(width));
        for c in (0..tiled).step_by(LANES) {
            for r in (0..tiled_rows).step_by(LANES) {
                let tile = from_fn(|i| row(r + i)[c..].first_chunk());
                if let Some(tile) = all(tile) {
                    turn(tile, &mut self.out[c * rows + r..], rows);
                }
            }
        }
        for r in 0..rows {
            let from = if r < tiled_rows { tiled } else { 0 };
            for (c, v) in row(r).iter().enumerate().skip(from) {
                self.out[c * rows + r] = *v;
            }
        }
    }
}

/// `x`, which is `[outer, rows, columns]`, as `[outer, columns, rows]`.
pub(crate) fn turned<E: Copy + Send + Sync>(x: &[E], [outer, rows, columns]: [usize; 3]) -> Vec<E> {
    assert!(x.len() == outer * rows * columns);
    if x.is_empty() {
        return vec![];
    }
    let width = items_per_block(columns, rows).next_multiple_of(LANES);
    // SAFETY: the layouts are the same, and elements of `E` may be read as elements that need not be written.
    let values: &[MaybeUninit<E>] =
        unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) };
    let fill = |out: &mut [MaybeUninit<E>]| {
        let matrices = values.chunks_exact(rows * columns);
        let pairs = matrices.zip(out.chunks_exact_mut(rows * columns));
        let jobs = pairs.flat_map(|(matrix, out)| {
            let blocks = out.chunks_mut(width * rows).enumerate();
            blocks.map(move |(i, out)| Block {
                matrix,
                first: i * width,
                out,
            })
        });
        run(jobs.collect(), x.len(), |block| block.turn(rows, columns));
    };
    // SAFETY: the blocks make up the whole, and each writes every row of every one of its columns, from elements that were written.
    unsafe { filled(x.len(), fill) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_changes_places() {
        for [outer, rows, columns] in [
            [1, 1, 1],
            [2, 3, 5],
            [3, 16, 16],
            [2, 17, 49],
            [1, 15, 400],
            [2, 400, 15],
            [1, 130, 3136],
        ] {
            let x: Vec<u32> = (0..(outer * rows * columns) as u32).collect();
            let y = turned(&x, [outer, rows, columns]);
            for (i, v) in y.iter().enumerate() {
                let (o, c, r) = (i / (rows * columns), i / rows % columns, i % rows);
                assert_eq!(*v as usize, (o * rows + r) * columns + c);
            }
            assert_eq!(turned(&y, [outer, columns, rows]), x);
            let halves: Vec<u16> = x.iter().map(|v| *v as u16).collect();
            let turned_halves = turned(&halves, [outer, rows, columns]);
            assert!(turned_halves.iter().zip(&y).all(|(h, v)| *h == *v as u16));
        }
        assert!(turned::<f32>(&[], [0, 3, 4]).is_empty());
    }
}
