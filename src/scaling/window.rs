//! Moments of the last rows of a series, in constant time a row and without drift.

use crate::ops::Moments;

/// The rows that a window holds, summed so that the oldest can be left out.
///
/// Taking an old value out of running moments is a subtraction that cancels, and what it loses stays lost. Here nothing is ever taken
/// out: the sums of the older rows are kept for every place where the window may begin, and the sum of the newer rows is merged to them.
/// Each row moves the sums of the next turn on by one place (Tangwongsan, Hirzel and Schneider, 2021, "In-order sliding-window
/// aggregation in worst-case constant time", <https://doi.org/10.1007/s00778-021-00668-3>), so that no row costs more than another.
///
/// The rows, oldest first, stand in five stretches, each of which ends where the next begins:
///
/// | from | what stands at a row |
/// | --- | --- |
/// | `front` | the moments of it and all up to `newer` |
/// | `left` | the moments of it and all up to `right` |
/// | `right` | its own |
/// | `done` | the moments of it and all up to `newer` |
/// | `newer` | its own |
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Window {
    /// The most rows that it holds.
    len: usize,
    features: usize,
    /// A ring of `len` rows.
    ring: Vec<Moments>,
    front: usize,
    left: usize,
    right: usize,
    done: usize,
    newer: usize,
    end: usize,
    /// Of the rows from `right` to `newer`, while there are any at `left`.
    middle: Vec<Moments>,
    /// Of the rows from `newer` on.
    recent: Vec<Moments>,
}

impl Window {
    pub(super) fn new(len: usize, features: usize) -> Self {
        Self {
            len,
            features,
            ring: vec![Moments::default(); len * features],
            front: 0,
            left: 0,
            right: 0,
            done: 0,
            newer: 0,
            end: 0,
            middle: vec![Moments::default(); features],
            recent: vec![Moments::default(); features],
        }
    }

    /// How many rows it holds.
    pub(super) fn rows(&self) -> usize {
        self.end - self.front
    }

    /// Takes one row in, and lets the oldest go where it is full. A value that is none counts as none.
    pub(super) fn push(&mut self, row: &[f64]) {
        if self.rows() == self.len {
            self.front += 1;
            self.advance();
        }
        let at = self.place(self.end);
        for (feature, &value) in row.iter().enumerate() {
            let one = one(value);
            self.ring[at + feature] = one;
            self.recent[feature] = self.recent[feature].merge(one);
        }
        self.end += 1;
        self.advance();
    }

    /// The moments of one feature over all rows.
    pub(super) fn moments(&self, feature: usize) -> Moments {
        let recent = self.recent[feature];
        if self.front == self.newer {
            return recent;
        }
        self.ring[self.place(self.front) + feature].merge(recent)
    }

    fn place(&self, row: usize) -> usize {
        row % self.len * self.features
    }

    /// Moves the sums on by one place, after a row came or went.
    fn advance(&mut self) {
        if self.front == self.newer {
            // Of one row, its own moments are its sum.
            self.left = self.end;
            self.right = self.end;
            self.done = self.end;
            self.newer = self.end;
            self.recent.fill(Moments::default());
            return;
        }
        if self.left == self.newer {
            self.left = self.front;
            self.done = self.end;
            self.newer = self.end;
            std::mem::swap(&mut self.middle, &mut self.recent);
            self.recent.fill(Moments::default());
        }
        if self.left == self.right {
            self.left += 1;
            self.right += 1;
            self.done += 1;
            return;
        }
        let left = self.place(self.left);
        for feature in 0..self.features {
            let here = &mut self.ring[left + feature];
            *here = here.merge(self.middle[feature]);
        }
        self.left += 1;
        self.done -= 1;
        if self.done + 1 < self.newer {
            let (here, next) = (self.place(self.done), self.place(self.done + 1));
            for feature in 0..self.features {
                self.ring[here + feature] =
                    self.ring[here + feature].merge(self.ring[next + feature]);
            }
        }
    }
}

/// The moments of one value; of none if it is NaN.
pub(super) fn one(value: f64) -> Moments {
    match value.is_nan() {
        true => Moments::default(),
        false => Moments::from_parts(1., value, 0., 0.),
    }
}
