//! Normalization in float64, as the formulas are written: loops over slices, nothing of candle.
//!
//! All normalizations are one function of two partitions of the elements of `x`: a *row* is a set
//! of elements that share a mean and a variance, a *slot* the set of elements that share a weight
//! and a bias. Switchable norm has several partitions into rows, and the mean and variance of an
//! element are mixtures of those of its rows.

/// A normalization of `[dims]` in row-major order.
#[derive(Debug, Clone)]
pub struct Norm {
    /// Partitions into rows: one, or those that are mixed.
    sources: Vec<Source>,
    /// The slot of each element.
    slots: Vec<usize>,
    /// Subtract the mean.
    center: bool,
    eps: f64,
    /// Added to the weight.
    offset: f64,
    /// Divide by the length of a row, at least `eps`, instead of `√(var + eps)`.
    by_length: bool,
}

/// A partition into rows, and the shares that their means and variances have.
#[derive(Debug, Clone)]
struct Source {
    /// The row of each element.
    rows: Vec<usize>,
    mean_share: f64,
    var_share: f64,
}

impl Source {
    fn num_rows(&self) -> usize {
        self.rows.iter().max().map_or(0, |last| last + 1)
    }

    /// For each element, the mean of `values` in its row.
    fn means(&self, values: &[f64], count: &[f64]) -> Vec<f64> {
        let mut means = vec![0.; count.len()];
        for (&row, v) in self.rows.iter().zip(values) {
            means[row] += v / count[row];
        }
        self.rows.iter().map(|&row| means[row]).collect()
    }
}

/// Results of a forward pass; the statistics are those of the first source.
pub struct Forward {
    /// Output, in row-major order.
    pub y: Vec<f64>,
    /// Size of each `x̂ · weight`, which a bias may cancel.
    pub products: Vec<f64>,
    /// Of each row; 0 where rows are not centered.
    pub mean: Vec<f64>,
    /// Of each row, biased; the mean square where rows are not centered.
    pub var: Vec<f64>,
    /// The number of elements of each row.
    pub count: Vec<f64>,
}

/// Of each row, and the elements less the mean of theirs.
struct Statistics {
    mean: Vec<f64>,
    var: Vec<f64>,
    count: Vec<f64>,
    centered: Vec<f64>,
}

/// Of each source, and of each element what the mixture makes of it.
struct Normalized {
    sources: Vec<Statistics>,
    std: Vec<f64>,
    xhat: Vec<f64>,
}

/// Results of a backward pass.
pub struct Backward {
    /// Gradient of the input.
    pub dx: Gradient,
    /// Gradient of the weight.
    pub dweight: Gradient,
    /// Gradient of the bias.
    pub dbias: Gradient,
}

/// Numbers, and the size of the terms that each of them is the sum or difference of.
pub struct Gradient {
    /// Elements of the gradient.
    pub values: Vec<f64>,
    /// Size of the terms of each element.
    pub terms: Vec<f64>,
}

/// The element of a tensor of the axes `kept` that each element of one of `dims` falls on.
pub fn along(dims: &[usize], kept: &[usize]) -> Vec<usize> {
    let count = dims.iter().product();
    let mut found = Vec::with_capacity(count);
    for element in 0..count {
        let (mut id, mut stride, mut rest) = (0, 1, element);
        for axis in (0..dims.len()).rev() {
            if kept.contains(&axis) {
                id += rest % dims[axis] * stride;
                stride *= dims[axis];
            }
            rest /= dims[axis];
        }
        found.push(id);
    }
    found
}

impl Norm {
    fn new(dims: &[usize], rows: &[usize], slots: &[usize], eps: f64) -> Self {
        let source = Source {
            rows: along(dims, rows),
            mean_share: 1.,
            var_share: 1.,
        };
        Self {
            sources: vec![source],
            slots: along(dims, slots),
            center: true,
            eps,
            offset: 0.,
            by_length: false,
        }
    }

    /// The last `axes` axes are a row, with a parameter for each of its elements.
    pub fn layer(dims: &[usize], axes: usize, eps: f64) -> Self {
        let first = dims.len() - axes;
        let (outer, inner): (Vec<_>, Vec<_>) = (0..dims.len()).partition(|&a| a < first);
        Self::new(dims, &outer, &inner, eps)
    }

    /// The channels of each position of `[N, C, *]` are a row.
    pub fn layer_channels_first(dims: &[usize], eps: f64) -> Self {
        let outer: Vec<_> = (0..dims.len()).filter(|&a| a != 1).collect();
        Self::new(dims, &outer, &[1], eps)
    }

    /// `C / groups` channels and all of space are a row.
    pub fn group(dims: &[usize], groups: usize, eps: f64) -> Self {
        let split = [&[dims[0], groups, dims[1] / groups], &dims[2..]].concat();
        Self::new(&split, &[0, 1], &[1, 2], eps)
    }

    /// The space of each channel of each sample is a row.
    pub fn instance(dims: &[usize], eps: f64) -> Self {
        Self::new(dims, &[0, 1], &[1], eps)
    }

    /// The batch and space of each channel are a row.
    pub fn batch(dims: &[usize], eps: f64) -> Self {
        Self::new(dims, &[1], &[1], eps)
    }

    /// Instance (where there is space), layer and batch, mixed by the softmax of `mean_weight` and
    /// that of `var_weight`.
    pub fn switch(dims: &[usize], [mean, var]: [&[f64]; 2], eps: f64) -> Self {
        let kept: &[&[usize]] = match dims.len() {
            2 => &[&[0], &[1]],
            _ => &[&[0, 1], &[0], &[1]],
        };
        let softmax = |weights: &[f64]| {
            let e: Vec<f64> = weights[..kept.len()].iter().map(|w| w.exp()).collect();
            let sum: f64 = e.iter().sum();
            e.into_iter().map(|e| e / sum).collect::<Vec<_>>()
        };
        let shares = softmax(mean).into_iter().zip(softmax(var));
        let sources = kept.iter().zip(shares);
        let sources = sources.map(|(kept, (mean_share, var_share))| Source {
            rows: along(dims, kept),
            mean_share,
            var_share,
        });
        Self {
            sources: sources.collect(),
            ..Self::new(dims, &[], &[1], eps)
        }
    }

    /// The last axis, or axis 1, is a row, with one parameter for all.
    pub fn scale(dims: &[usize], axis: usize, eps: f64) -> Self {
        let outer: Vec<_> = (0..dims.len()).filter(|&a| a != axis).collect();
        Self {
            center: false,
            by_length: true,
            ..Self::new(dims, &outer, &[], eps)
        }
    }

    /// The same norm about zero instead of the mean.
    pub fn without_mean(self) -> Self {
        Self {
            center: false,
            ..self
        }
    }

    /// The same norm with `offset` added to its weight.
    pub fn with_offset(self, offset: f64) -> Self {
        Self { offset, ..self }
    }

    fn statistics(&self, source: &Source, x: &[f64]) -> Statistics {
        let rows = source.num_rows();
        let mut count = vec![0.; rows];
        let mut first = vec![0.; rows];
        for (&row, &x) in source.rows.iter().zip(x) {
            if count[row] == 0. && self.center {
                first[row] = x;
            }
            count[row] += 1.;
        }
        // Differences to an element of the row are exact where the mean is many times the spread; a
        // mean rounded to float64 is not.
        let mut shift = vec![0.; rows];
        if self.center {
            for (&row, &x) in source.rows.iter().zip(x) {
                shift[row] += (x - first[row]) / count[row];
            }
        }
        let centered: Vec<f64> = (source.rows.iter().zip(x))
            .map(|(&row, &x)| (x - first[row]) - shift[row])
            .collect();
        let mut var = vec![0.; rows];
        for (&row, d) in source.rows.iter().zip(&centered) {
            var[row] += d * d / count[row];
        }
        Statistics {
            mean: first.iter().zip(&shift).map(|(f, s)| f + s).collect(),
            var,
            count,
            centered,
        }
    }

    fn normalized(&self, x: &[f64]) -> Normalized {
        let (mut std, mut xhat) = (vec![0.; x.len()], vec![0.; x.len()]);
        let sources: Vec<Statistics> = (self.sources.iter())
            .map(|source| self.statistics(source, x))
            .collect();
        for (source, s) in self.sources.iter().zip(&sources) {
            for (i, &row) in source.rows.iter().enumerate() {
                // The shares add up to 1, so that the distance from a mixture is the mixture of the
                // distances.
                xhat[i] += source.mean_share * s.centered[i];
                std[i] += source.var_share * s.var[row];
            }
        }
        for (i, (std, xhat)) in std.iter_mut().zip(&mut xhat).enumerate() {
            *std = match self.by_length {
                true if self.is_short(&sources[0], i) => self.eps,
                true => self.length(&sources[0], i),
                false => (*std + self.eps).sqrt(),
            };
            *xhat /= *std;
        }
        Normalized { sources, std, xhat }
    }

    /// The length of the row of element `i`.
    fn length(&self, s: &Statistics, i: usize) -> f64 {
        let row = self.sources[0].rows[i];
        (s.var[row] * s.count[row]).sqrt()
    }

    /// Whether the row of element `i` is divided by ε instead of its length.
    fn is_short(&self, s: &Statistics, i: usize) -> bool {
        self.length(s, i) < self.eps
    }

    /// The number of elements that the square which element `i` is divided by is a mean of: those
    /// of its row, one if it is their sum, and none if it is fixed.
    fn share(&self, s: &Statistics, i: usize) -> f64 {
        match self.by_length {
            true if self.is_short(s, i) => 0.,
            true => s.count[self.sources[0].rows[i]],
            false => 1.,
        }
    }

    /// The slot of an element.
    pub fn slot(&self, element: usize) -> usize {
        self.slots[element]
    }

    /// The row of an element; in a mixture, gradients reach every element from every other.
    pub fn row(&self, element: usize) -> usize {
        match self.sources.as_slice() {
            [source] => source.rows[element],
            _ => 0,
        }
    }

    /// Whether rows are centered.
    pub fn is_centered(&self) -> bool {
        self.center
    }

    /// Whether the statistics of an element are mixtures of those of several rows.
    pub fn is_mixture(&self) -> bool {
        self.sources.len() > 1
    }

    /// Whether one element has a part in the output at another: whether any row has both.
    pub fn reaches(&self, from: usize, to: usize) -> bool {
        let shared = |source: &Source| source.rows[from] == source.rows[to];
        self.sources.iter().any(shared)
    }

    fn weight(&self, weight: Option<&[f64]>, slot: usize) -> f64 {
        weight.map_or(1., |w| w[slot] + self.offset)
    }

    /// `(x − mean) / √(var + ε) · weight + bias`, and the statistics.
    pub fn forward(&self, x: &[f64], weight: Option<&[f64]>, bias: Option<&[f64]>) -> Forward {
        let mut n = self.normalized(x);
        let products: Vec<f64> = (0..x.len())
            .map(|i| n.xhat[i] * self.weight(weight, self.slots[i]))
            .collect();
        let y = (products.iter().zip(&self.slots))
            .map(|(product, &slot)| product + bias.map_or(0., |b| b[slot]))
            .collect();
        let s = n.sources.swap_remove(0);
        Forward {
            y,
            products: products.into_iter().map(f64::abs).collect(),
            mean: s.mean,
            var: s.var,
            count: s.count,
        }
    }

    /// The gradients of `Σ dy · y`: with x̂ the normalized value, r = 1 / √(var + ε) and g = dy ·
    /// weight, `dx = g · r − mean(g · r) − (x − mean) · mean(g · x̂ · r²)`, without `mean(g · r)`
    /// where rows are not centered. Of several sources, the second and third term of each have its
    /// shares. Where r is one over the length of a row, the last mean is a sum, and zero if the
    /// length is ε.
    pub fn backward(&self, x: &[f64], weight: Option<&[f64]>, dy: &[f64]) -> Backward {
        let Normalized { sources, std, xhat } = self.normalized(x);
        let leading: Vec<f64> = (0..x.len())
            .map(|i| dy[i] * self.weight(weight, self.slots[i]) / std[i])
            .collect();
        let along: Vec<f64> = (0..x.len())
            .map(|i| leading[i] * xhat[i] / std[i])
            .collect();
        let (mut dx, mut terms) = (leading.clone(), vec![0f64; x.len()]);
        for (source, s) in self.sources.iter().zip(&sources) {
            let (mean, along) = (
                source.means(&leading, &s.count),
                source.means(&along, &s.count),
            );
            let sizes = rms_of_rows(&leading, &source.rows, s.count.len());
            for i in 0..x.len() {
                if self.center {
                    dx[i] -= source.mean_share * mean[i];
                }
                dx[i] -= source.var_share * s.centered[i] * along[i] * self.share(s, i);
                terms[i] = terms[i].max(sizes[i]);
            }
        }
        let slots = self.slots.iter().max().map_or(0, |last| last + 1);
        Backward {
            dx: Gradient { values: dx, terms },
            dweight: summed(slots, &self.slots, |i| dy[i] * xhat[i]),
            dbias: summed(slots, &self.slots, |i| dy[i]),
        }
    }

    /// [`forward`](Self::forward) with given statistics, one for each slot.
    pub fn forward_fixed(
        &self,
        x: &[f64],
        (mean, var): (&[f64], &[f64]),
        weight: Option<&[f64]>,
        bias: Option<&[f64]>,
    ) -> Vec<f64> {
        (0..x.len())
            .map(|i| {
                let slot = self.slots[i];
                let xhat = (x[i] - mean[slot]) / (var[slot] + self.eps).sqrt();
                xhat * self.weight(weight, slot) + bias.map_or(0., |b| b[slot])
            })
            .collect()
    }

    /// [`backward`](Self::backward) with given statistics, which get no gradient.
    pub fn backward_fixed(
        &self,
        x: &[f64],
        (mean, var): (&[f64], &[f64]),
        weight: Option<&[f64]>,
        dy: &[f64],
    ) -> Backward {
        let rstd: Vec<f64> = var.iter().map(|v| 1. / (v + self.eps).sqrt()).collect();
        let dx: Vec<f64> = (0..x.len())
            .map(|i| dy[i] * self.weight(weight, self.slots[i]) * rstd[self.slots[i]])
            .collect();
        let xhat = |i: usize| (x[i] - mean[self.slots[i]]) * rstd[self.slots[i]];
        Backward {
            dx: Gradient {
                terms: vec![0.; dx.len()],
                values: dx,
            },
            dweight: summed(mean.len(), &self.slots, |i| dy[i] * xhat(i)),
            dbias: summed(mean.len(), &self.slots, |i| dy[i]),
        }
    }
}

/// The sum of the terms of each slot, and the size that such sums have unless their terms cancel.
fn summed(slots: usize, slot: &[usize], term: impl Fn(usize) -> f64) -> Gradient {
    let (mut sums, mut squares) = (vec![0.; slots], vec![0.; slots]);
    for (i, &slot) in slot.iter().enumerate() {
        sums[slot] += term(i);
        squares[slot] += term(i).powi(2);
    }
    let sizes: Vec<f64> = squares.into_iter().map(f64::sqrt).collect();
    Gradient {
        values: sums,
        terms: vec![rms(&sizes); slots],
    }
}

/// For each element, the rms of the row that it is in.
fn rms_of_rows(values: &[f64], rows: &[usize], num_rows: usize) -> Vec<f64> {
    let (mut squares, mut count) = (vec![0.; num_rows], vec![0.; num_rows]);
    for (&row, v) in rows.iter().zip(values) {
        squares[row] += v * v;
        count[row] += 1.;
    }
    rows.iter()
        .map(|&row| f64::sqrt(squares[row] / count[row]))
        .collect()
}

/// `g · v / ‖v‖` for each row of `v`; `rows` is the row of each element.
pub fn weight_norm(v: &[f64], g: &[f64], rows: &[usize]) -> Vec<f64> {
    let norms = norms(v, g.len(), rows);
    (0..v.len())
        .map(|i| match norms[rows[i]] {
            0. => 0.,
            norm => g[rows[i]] * v[i] / norm,
        })
        .collect()
}

/// The gradients of `Σ dw · w` for v and g. With v̂ = v / ‖v‖: `dg = Σ dw · v̂` and `dv = g / ‖v‖ ·
/// (dw − v̂ · Σ dw · v̂)`; zero for a row of zeros.
pub fn weight_norm_backward(
    v: &[f64],
    g: &[f64],
    rows: &[usize],
    dw: &[f64],
) -> (Gradient, Gradient) {
    let norms = norms(v, g.len(), rows);
    let unit = |i: usize| match norms[rows[i]] {
        0. => 0.,
        norm => v[i] / norm,
    };
    let dg = summed(g.len(), rows, |i| dw[i] * unit(i));
    let slope = |row: usize| match norms[row] {
        0. => 0.,
        norm => g[row] / norm,
    };
    let leading: Vec<f64> = (0..v.len()).map(|i| slope(rows[i]) * dw[i]).collect();
    let dv = (0..v.len())
        .map(|i| leading[i] - slope(rows[i]) * unit(i) * dg.values[rows[i]])
        .collect();
    let dv = Gradient {
        values: dv,
        terms: rms_of_rows(&leading, rows, g.len()),
    };
    (dv, dg)
}

/// The Euclidean norm of each row of `v`; `rows` is the row of each element.
pub fn norms(v: &[f64], num_rows: usize, rows: &[usize]) -> Vec<f64> {
    let mut squares = vec![0.; num_rows];
    for (&row, v) in rows.iter().zip(v) {
        squares[row] += v * v;
    }
    squares.into_iter().map(f64::sqrt).collect()
}

/// The root of the mean square of the finite values; 0 if there are none.
pub fn rms(values: &[f64]) -> f64 {
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    let largest = finite.iter().fold(0f64, |a, v| a.max(v.abs()));
    if largest == 0. {
        return 0.;
    }
    // Relative to the largest, so that no square overflows.
    let squares: f64 = finite.iter().map(|v| (v / largest).powi(2)).sum();
    largest * (squares / finite.len() as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Draw;

    #[test]
    fn elements_fall_on_the_axes_that_are_kept() {
        assert_eq!(along(&[2, 3], &[0]), [0, 0, 0, 1, 1, 1]);
        assert_eq!(along(&[2, 3], &[1]), [0, 1, 2, 0, 1, 2]);
        assert_eq!(along(&[2, 2, 2], &[0, 2]), [0, 1, 0, 1, 2, 3, 2, 3]);
        assert_eq!(along(&[2, 2], &[]), [0; 4]);
    }

    #[test]
    fn elements_reach_those_of_their_rows() {
        let dims = [2, 2, 2];
        let reached = |norm: Norm| (0..8).filter(|to| norm.reaches(3, *to)).collect::<Vec<_>>();
        assert_eq!(reached(Norm::layer(&dims, 2, 1.)), [0, 1, 2, 3]);
        assert_eq!(reached(Norm::batch(&dims, 1.)), [2, 3, 6, 7]);
        let shares: [&[f64]; 2] = [&[0.; 3]; 2];
        let mixed = Norm::switch(&dims, shares, 1.);
        assert!(mixed.is_mixture() && !Norm::batch(&dims, 1.).is_mixture());
        assert_eq!(reached(mixed), [0, 1, 2, 3, 6, 7]);
    }

    #[test]
    fn forward_is_what_a_pencil_gives() {
        // Mean 2, variance 1; ε = 3 makes the divisor 2.
        let y = Norm::layer(&[1, 2], 1, 3.).forward(&[1., 3.], Some(&[2., 4.]), Some(&[10., 20.]));
        assert_eq!(y.y, [9., 22.]);
        let y = Norm::layer(&[1, 2], 1, 11.)
            .without_mean()
            .forward(&[1., 7.], None, None);
        assert_eq!(y.y, [1. / 6., 7. / 6.]);
        // Two groups of two channels of one element.
        let y = Norm::group(&[1, 4], 2, 3.).forward(&[1., 3., 5., 7.], None, None);
        assert_eq!(y.y, [-0.5, 0.5, -0.5, 0.5]);
        assert_eq!(
            weight_norm(&[3., 4., 0., 0.], &[10., 1.], &[0, 0, 1, 1]),
            [6., 8., 0., 0.]
        );
    }

    /// The backward formulas are those of the forward ones.
    #[test]
    fn backward_is_the_slope_of_forward() {
        let dims = [3, 4, 5];
        let n = dims.iter().product();
        let mut draw = Draw::new(1);
        let (x, dy) = (draw.normal(n), draw.normal(n));
        for (norm, slots) in [
            (Norm::layer(&dims, 2, 0.1), 20),
            (Norm::layer(&dims, 1, 0.1).without_mean(), 5),
            (Norm::layer_channels_first(&dims, 0.1), 4),
            (Norm::group(&dims, 2, 0.1), 4),
            (Norm::instance(&dims, 0.1), 4),
            (Norm::batch(&dims, 0.1), 4),
            (
                Norm::switch(&dims, [&[0.3, -1., 0.5], &[-0.7, 0.2, 1.]], 0.1),
                4,
            ),
        ] {
            let (w, b) = (draw.weight(slots), draw.normal(slots));
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let y = norm.forward(x, Some(w), Some(b)).y;
                y.iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>()
            };
            let back = norm.backward(&x, Some(&w), &dy);
            assert_slope(&x, &back.dx.values, |x| loss(x, &w, &b));
            assert_slope(&w, &back.dweight.values, |w| loss(&x, w, &b));
            assert_slope(&b, &back.dbias.values, |b| loss(&x, &w, b));

            let fixed = (draw.normal(slots), draw.signs(slots, 2.));
            let fixed = (fixed.0, fixed.1.iter().map(|v| v.abs()).collect::<Vec<_>>());
            let fixed = (&fixed.0[..], &fixed.1[..]);
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let y = norm.forward_fixed(x, fixed, Some(w), Some(b));
                y.iter().zip(&dy).map(|(y, dy)| y * dy).sum::<f64>()
            };
            let back = norm.backward_fixed(&x, fixed, Some(&w), &dy);
            assert_slope(&x, &back.dx.values, |x| loss(x, &w, &b));
            assert_slope(&w, &back.dweight.values, |w| loss(&x, w, &b));
            assert_slope(&b, &back.dbias.values, |b| loss(&x, &w, b));
        }
        let rows = along(&dims, &[1]);
        let g = draw.weight(4);
        let loss = |v: &[f64], g: &[f64]| {
            let w = weight_norm(v, g, &rows);
            w.iter().zip(&dy).map(|(w, dw)| w * dw).sum::<f64>()
        };
        let (dv, dg) = weight_norm_backward(&x, &g, &rows, &dy);
        assert_slope(&x, &dv.values, |v| loss(v, &g));
        assert_slope(&g, &dg.values, |g| loss(&x, g));
    }

    fn assert_slope(at: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
        const STEP: f64 = 1e-5;
        assert_eq!(at.len(), gradient.len());
        for (i, want) in gradient.iter().enumerate() {
            let moved = |by: f64| {
                let mut at = at.to_vec();
                at[i] += by;
                f(&at)
            };
            let slope = (moved(STEP) - moved(-STEP)) / (2. * STEP);
            assert!(
                (slope - want).abs() < 1e-7 * (1. + want.abs()),
                "{i}: {slope}, {want}"
            );
        }
    }
}
