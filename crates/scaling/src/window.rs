//! Moments of the last rows of a series, in constant time a row and without drift.

use candle_core::{Result, bail};

use super::check;
use super::rows::of_series;
use super::{Moments, State};

/// The numbers that moments are made of.
const PARTS: usize = 4;

/// The rows that a window holds, summed so that the oldest can be left out.
///
/// Taking an old value out of running moments is a subtraction that cancels, and what it loses
/// stays lost. Here nothing is ever taken out: the sums of the older rows are kept for every place
/// where the window may begin, and the sum of the newer rows is merged to them. Each row moves the
/// sums of the next turn on by one place (Tangwongsan, Hirzel and Schneider, 2021, "In-order
/// sliding-window aggregation in worst-case constant time",
/// <https://doi.org/10.1007/s00778-021-00668-3>), so that no row costs more than another.
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
pub struct Window {
    /// The most rows that it holds.
    len: usize,
    features: usize,
    /// A ring of at most `len` rows; rows that have not come yet are not there.
    ring: Vec<Moments>,
    front: usize,
    left: usize,
    right: usize,
    done: usize,
    newer: usize,
    end: usize,
    /// Moments of the rows from `right` to `newer`, while there are any at `left`.
    middle: Vec<Moments>,
    /// Moments of the rows from `newer` on.
    recent: Vec<Moments>,
    /// While an attempt lasts: the sums that it has overwritten, with their places in the ring.
    overwritten: Option<Vec<(usize, Moments)>>,
}

impl Window {
    pub(super) fn of(len: usize, features: usize) -> Self {
        Self {
            len,
            features,
            ring: vec![],
            front: 0,
            left: 0,
            right: 0,
            done: 0,
            newer: 0,
            end: 0,
            middle: vec![Moments::default(); features],
            recent: vec![Moments::default(); features],
            overwritten: None,
        }
    }

    /// Runs `f`, and takes back what it pushed if that fails: at the price of the rows that it
    /// pushed, however long the window.
    pub(super) fn attempt<T>(&mut self, f: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.overwritten = Some(vec![]);
        let before = Self {
            ring: vec![],
            overwritten: None,
            middle: self.middle.clone(),
            recent: self.recent.clone(),
            ..*self
        };
        let len = self.ring.len();
        let done = f(self);
        let overwritten = self.overwritten.take().unwrap_or_default();
        if done.is_err() {
            let mut ring = std::mem::take(&mut self.ring);
            for (at, sum) in overwritten.into_iter().rev() {
                ring[at] = sum;
            }
            ring.truncate(len);
            *self = Self { ring, ..before };
        }
        done
    }

    /// Puts a sum into the ring.
    fn set(&mut self, at: usize, sum: Moments) {
        let old = std::mem::replace(&mut self.ring[at], sum);
        if let Some(overwritten) = &mut self.overwritten {
            overwritten.push((at, old));
        }
    }

    /// Number of rows held.
    fn rows(&self) -> usize {
        self.end - self.front
    }

    /// Takes one row in, and lets the oldest go where it is full. A value that is none counts as
    /// none.
    pub(super) fn push(&mut self, row: &[f64]) {
        if self.rows() == self.len {
            self.front += 1;
            self.advance();
        }
        let at = self.place(self.end);
        if at == self.ring.len() {
            self.ring.resize(at + self.features, Moments::default());
        }
        for (feature, &value) in row.iter().enumerate() {
            let one = one(value);
            self.set(at + feature, one);
            self.recent[feature] = join(self.recent[feature], one);
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
        join(self.ring[self.place(self.front) + feature], recent)
    }

    /// The sums as they stand, the oldest row first, so that a restored window goes on with the
    /// same ones.
    pub(super) fn save(&self, state: State) -> Result<State> {
        let rows = (self.front..self.end).flat_map(|row| {
            let at = self.place(row);
            &self.ring[at..at + self.features]
        });
        let ends = [self.left, self.right, self.done, self.newer, self.end];
        let ends = ends.map(|end| (end - self.front).to_string());
        state
            .with_option("stretches", ends.join(" "))
            .with_values("rows", &parts(rows))?
            .with_values("middle", &parts(&self.middle))?
            .with_values("recent", &parts(&self.recent))
    }

    pub(super) fn restore(layer: &str, len: usize, features: usize, state: &State) -> Result<Self> {
        let text: String = state.option("stretches")?;
        let ends: std::result::Result<Vec<usize>, _> = text.split(' ').map(str::parse).collect();
        let ends = check::well_formed(layer, "stretches", ends)?;
        stretches(layer, &text, stretches_hold(&ends, len))?;
        let [left, right, done, newer, end] = [0, 1, 2, 3, 4].map(|i| ends[i]);
        let moments = |name: &str, rows: usize| -> Result<Vec<Moments>> {
            // A product that is too large is the length of no tensor.
            let len = rows.saturating_mul(features).saturating_mul(PARTS);
            let values = state.values(name, len)?;
            let mut sums = Vec::with_capacity(values.len() / PARTS);
            for (i, p) in values.chunks(PARTS).enumerate() {
                let feature = i % features.max(1);
                let sum = state.moments(feature, [p[0], p[1], p[2], p[3]])?;
                let holds = sum.count().fract() == 0. && sum.count() <= end as f64;
                let label = state.features().label(feature);
                check::saved_value(layer, "count", &label, sum.count(), holds)?;
                sums.push(of_series(state, feature, sum)?);
            }
            Ok(sums)
        };
        Ok(Self {
            len,
            features,
            ring: moments("rows", end)?,
            front: 0,
            left,
            right,
            done,
            newer,
            end,
            middle: moments("middle", 1)?,
            recent: moments("recent", 1)?,
            overwritten: None,
        })
    }

    fn place(&self, row: usize) -> usize {
        row % self.len * self.features
    }

    /// Keeps the counts of rows from growing for ever; rows stay where they are in the ring.
    fn count_from_anew(&mut self) {
        let turns = self.front / self.len * self.len;
        for count in [
            &mut self.front,
            &mut self.left,
            &mut self.right,
            &mut self.done,
            &mut self.newer,
            &mut self.end,
        ] {
            *count -= turns;
        }
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
            self.count_from_anew();
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
            let at = left + feature;
            self.set(at, join(self.ring[at], self.middle[feature]));
        }
        self.left += 1;
        self.done -= 1;
        if self.done + 1 < self.newer {
            let (here, next) = (self.place(self.done), self.place(self.done + 1));
            for feature in 0..self.features {
                let (at, later) = (here + feature, self.ring[next + feature]);
                self.set(at, join(self.ring[at], later));
            }
        }
    }
}

/// Whether these are the ends of stretches that a window of `len` rows can have between two rows,
/// the front being 0: as many rows have come since the last turn as sums of the next one have been
/// moved on.
fn stretches_hold(ends: &[usize], len: usize) -> bool {
    let &[left, right, done, newer, end] = ends else {
        return false;
    };
    let in_turn = || left == end - newer + 1 && right - left == done - right;
    ends.is_sorted() && end <= len && (end == 0 || in_turn())
}

/// The moments of one value; of none if it is NaN.
pub(super) fn one(value: f64) -> Moments {
    match value.is_nan() {
        true => Moments::default(),
        false => Moments::from_parts(1., value, 0., 0.),
    }
}

/// The moments of both, either of which may be of no values.
fn join(a: Moments, b: Moments) -> Moments {
    match b.count() > 0. {
        true => a.merge(b),
        false => a,
    }
}

/// Moments as numbers.
fn parts<'a>(moments: impl IntoIterator<Item = &'a Moments>) -> Vec<f64> {
    let parts = |m: &Moments| [m.count(), m.mean(), m.mean_error(), m.m2()];
    moments.into_iter().flat_map(parts).collect()
}

/// The stretches of a saved window.
fn stretches(layer: &str, text: &str, hold: bool) -> Result<()> {
    if !hold {
        bail!(
            "{layer}: expected five ascending ends of stretches as a window has them in the saved \
            state, got {text:?}"
        )
    }
    Ok(())
}
