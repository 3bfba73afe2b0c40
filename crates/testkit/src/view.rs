//! Ways to lay out a tensor in memory.

use candle_core::{DType, Result, Tensor};

use crate::data::{Draw, variable};

/// A way to lay out a tensor in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum View {
    /// Two axes of the storage are swapped.
    Transposed(usize, usize),
    /// Axis 1 is the last of the storage, which has three or more.
    ChannelsLast,
    /// Elements lie before and after it along an axis.
    Sliced(usize),
    /// The storage has one index of an axis, read over and over.
    Broadcast(usize),
    /// All axes in reverse order, and a slice.
    ReversedAndSliced,
}

impl View {
    /// Every view of a tensor of a rank.
    pub fn all(rank: usize) -> Vec<Self> {
        let mut views = vec![View::ReversedAndSliced];
        if rank > 2 {
            views.push(View::ChannelsLast);
        }
        for axis in 0..rank {
            views.extend([View::Sliced(axis), View::Broadcast(axis)]);
            views.extend((0..axis).map(|other| View::Transposed(other, axis)));
        }
        views
    }

    /// The shape of the storage behind a view of shape `dims`.
    pub fn stored(self, dims: &[usize]) -> Vec<usize> {
        let mut stored = dims.to_vec();
        match self {
            View::Transposed(a, b) => stored.swap(a, b),
            View::ChannelsLast => stored[1..].rotate_left(1),
            View::Sliced(axis) => stored[axis] += 3,
            View::Broadcast(axis) => stored[axis] = 1,
            View::ReversedAndSliced => {
                stored.reverse();
                stored[0] += 2;
            }
        }
        stored
    }

    /// The view of shape `dims` of `base`, which has the shape [`stored`](Self::stored).
    pub fn of(self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let rank = dims.len();
        let view = match self {
            View::Transposed(a, b) => base.transpose(a, b)?,
            View::ChannelsLast => {
                let axes: Vec<usize> = [0, rank - 1].into_iter().chain(1..rank - 1).collect();
                base.permute(axes)?
            }
            View::Sliced(axis) => base.narrow(axis, 2, dims[axis])?,
            View::Broadcast(_) => base.broadcast_as(dims)?,
            View::ReversedAndSliced => {
                let axes: Vec<usize> = (0..rank).rev().collect();
                base.permute(axes)?.narrow(rank - 1, 1, dims[rank - 1])?
            }
        };
        assert_eq!(view.dims(), dims);
        Ok(view)
    }

    /// A variable of random numbers, contiguous, and a view of it of shape `dims`.
    pub fn draw(self, dims: &[usize], dtype: DType, draw: &mut Draw) -> Result<(Tensor, Tensor)> {
        let stored = self.stored(dims);
        let base = variable(&draw.normal(stored.iter().product()), &stored, dtype)?;
        let view = self.of(&base, dims)?;
        Ok((base, view))
    }
}
