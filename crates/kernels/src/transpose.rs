//! Transposition: a copy of `[outer, rows, columns]` as `[outer, columns, rows]`, tile by tile.

use super::buffer::{Part, fill};
use super::par;
use super::simd::{LANES, Place, Plain, tile, transpose_tile};

/// Some columns of a matrix.
struct ColumnBlock<'a, E> {
    matrix: &'a [E],
    /// The first of them.
    first: usize,
    out: Part<'a, E>,
}

impl<E: Plain> ColumnBlock<'_, E> {
    /// Writes the columns one after the other.
    fn transpose(mut self, rows: usize, columns: usize) {
        let (matrix, first) = (self.matrix, self.first);
        self.out.write(self.out.len(), |out| {
            let width = out.len() / rows;
            let row = |r: usize| &matrix[r * columns + first..][..width];
            // A tile is written at a distance of `rows`, which cannot be less than its side.
            let whole = |count: usize| count - count % LANES;
            let (tiled_rows, tiled) = (whole(rows), whole(width));
            for c in (0..tiled).step_by(LANES) {
                for r in (0..tiled_rows).step_by(LANES) {
                    let tile = tile(|i| &row(r + i)[c..]);
                    transpose_tile(tile, &mut out[c * rows + r..], rows);
                }
            }
            for r in 0..rows {
                let from = if r < tiled_rows { tiled } else { 0 };
                for (c, v) in row(r).iter().enumerate().skip(from) {
                    out[c * rows + r].put(*v);
                }
            }
            // SAFETY: the tiles and what is beside them make up all columns of every row.
            unsafe { out.assume_init_mut() }
        });
    }
}

/// `x`, which is `[outer, rows, columns]`, as `[outer, columns, rows]`.
pub(crate) fn transposed<E: Plain + Send + Sync>(
    x: &[E],
    [outer, rows, columns]: [usize; 3],
) -> Vec<E> {
    assert!(x.len() == outer * rows * columns);
    if x.is_empty() {
        return vec![];
    }
    let width = par::items_per_block(columns, rows).next_multiple_of(LANES);
    fill(x.len(), rows * columns, |outs| {
        let matrices = x.chunks_exact(rows * columns).zip(outs);
        let blocks = matrices.flat_map(|(matrix, out)| {
            let outs = out.divide(width * rows).enumerate();
            outs.map(move |(i, out)| ColumnBlock {
                matrix,
                first: i * width,
                out,
            })
        });
        par::for_each(blocks.collect(), x.len(), |block| {
            block.transpose(rows, columns)
        });
    })
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
            let y = transposed(&x, [outer, rows, columns]);
            for (i, v) in y.iter().enumerate() {
                let (o, c, r) = (i / (rows * columns), i / rows % columns, i % rows);
                assert_eq!(*v as usize, (o * rows + r) * columns + c);
            }
            assert_eq!(transposed(&y, [outer, columns, rows]), x);
            let halves: Vec<u16> = x.iter().map(|v| *v as u16).collect();
            let transposed_halves = transposed(&halves, [outer, rows, columns]);
            assert!(
                transposed_halves
                    .iter()
                    .zip(&y)
                    .all(|(h, v)| *h == *v as u16)
            );
        }
        assert!(transposed::<f32>(&[], [0, 3, 4]).is_empty());
    }
}
