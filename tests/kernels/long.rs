//! Rows, groups and channels so long that they are cut, and so few that there is not one for each
//! thread.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::internals;
use candle_norm::ops;

use crate::Stamp;
use crate::common::compare::{assert_close, tolerance};
use crate::common::data::variable;
use crate::common::subjects::Kind;

pub(crate) fn few_long_rows(stamp: Stamp) {
    let rms = Kind::Rms {
        axes: 1,
        offset: 1.,
    };
    for (case, (kind, dims)) in [
        (Kind::Layer { axes: 1 }, vec![1, 300_007]),
        (Kind::Layer { axes: 1 }, vec![3, 40_003]),
        (rms, vec![2, 100_003]),
        (rms, vec![5, 40_003]),
        (Kind::Group { groups: 1 }, vec![1, 2, 100_003]),
        (Kind::Group { groups: 2 }, vec![1, 4, 40_001]),
        (Kind::Group { groups: 1 }, vec![1, 40_003, 3]),
        (Kind::Group { groups: 1 }, vec![2, 20_001, 2]),
        (Kind::Instance, vec![1, 1, 300_007]),
        (Kind::Instance, vec![1, 3, 100_003]),
        (Kind::Batch, vec![1, 1, 300_007]),
        (Kind::Batch, vec![1, 3, 100_003]),
        (Kind::Batch, vec![2, 2, 50_001]),
        (Kind::Batch, vec![100_003, 1]),
        (Kind::Batch, vec![100_003, 3]),
        (Kind::Batch, vec![20_001, 2, 7]),
        (Kind::Batch, vec![5_001, 2, 33]),
        (Kind::BatchNoMean, vec![2, 1, 100_003]),
        (Kind::BatchNoMean, vec![50_001, 2]),
    ]
    .into_iter()
    .enumerate()
    {
        stamp.check(case, kind, &dims);
    }
}

/// The longest rows of the contract, in `f32`, of which sums in `f32` alone would be far off.
pub(crate) fn sixteen_million_elements(stamp: Stamp) {
    if !stamp.takes(LEN) {
        return;
    }
    let row = Row::new();
    type Op = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
    let centered: [(&str, &[usize], Op); 4] = [
        ("layer norm", &[1, LEN], |x, _, _| {
            ops::layer_norm(x, LEN, None, None, EPS)
        }),
        ("group norm", &[1, 4, LEN / 4], |x, w, b| {
            ops::group_norm(x, 1, Some(w), Some(b), EPS)
        }),
        ("batch norm", &[1, 1, LEN], |x, w, b| {
            Ok(ops::batch_norm(x, Some(w), Some(b), EPS)?.0)
        }),
        ("batch norm of columns", &[LEN, 1], |x, w, b| {
            Ok(ops::batch_norm(x, Some(w), Some(b), EPS)?.0)
        }),
    ];
    for (what, dims, op) in centered {
        row.check(stamp, what, dims, true, op)
            .expect("tensors that fit");
    }
    let rms = |x: &Tensor, _: &Tensor, _: &Tensor| ops::rms_norm(x, LEN, None, EPS);
    row.check(stamp, "RMS norm", &[1, LEN], false, rms)
        .expect("tensors that fit");
}

const LEN: usize = 1 << 24;
const EPS: f64 = 1e-5;

/// A row whose mean moves along it, and a cotangent.
struct Row {
    x: Vec<f32>,
    dy: Vec<f32>,
}

impl Row {
    fn new() -> Self {
        // Of a linear congruential generator, since there are so many.
        let mut state = 1u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.
        };
        let along = |i: usize| i as f32 / LEN as f32;
        Self {
            x: (0..LEN).map(|i| 3. + along(i) + uniform()).collect(),
            dy: (0..LEN)
                .map(|i| 0.1 + uniform() * (0.5 + along(i)))
                .collect(),
        }
    }

    /// The mean, or zero, and one over the standard deviation about it.
    fn statistics(&self, center: bool) -> (f64, f64) {
        let n = LEN as f64;
        let mean = match center {
            true => self.x.iter().map(|&x| f64::from(x)).sum::<f64>() / n,
            false => 0.,
        };
        let squares = self.x.iter().map(|&x| (f64::from(x) - mean).powi(2));
        (mean, 1. / (squares.sum::<f64>() / n + EPS).sqrt())
    }

    /// Compares `op` on this row, taken as a tensor of shape `dims` whose axis 1 has the
    /// parameters.
    fn check(
        &self,
        stamp: Stamp,
        what: &str,
        dims: &[usize],
        center: bool,
        op: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let weights = [0.5, -1.5, 2., 1.];
        let channels = dims[1].min(weights.len());
        let weights = &weights[..channels];
        let x = Var::from_slice(&self.x, dims, &Device::Cpu)?.into_inner();
        let dy = Tensor::from_slice(&self.dy, dims, &Device::Cpu)?;
        let w = variable(weights, &[channels], DType::F32)?;
        let b = variable(weights, &[channels], DType::F32)?;
        let (y, (dx, dweight, dbias)) = stamp.run(|| {
            let saved = internals::recorded(|| op(&x, &w, &b))?;
            Ok((saved.output().clone(), saved.backward(&dy)?))
        });
        let affine = dweight.is_some();
        let weight = |i: usize| {
            if affine {
                weights[i / (LEN / channels)]
            } else {
                1.
            }
        };
        let bias = |i: usize| if affine { weight(i) } else { 0. };

        let (mean, inv_std) = self.statistics(center);
        let normal = |i: usize| (f64::from(self.x[i]) - mean) * inv_std;
        let dy = |i: usize| f64::from(self.dy[i]);
        let (mut dw, mut db) = (vec![0.; channels], vec![0.; channels]);
        for i in 0..LEN {
            dw[i / (LEN / channels)] += dy(i) * normal(i);
            db[i / (LEN / channels)] += dy(i);
        }
        let per_element = |sums: &[f64]| {
            let products = sums.iter().enumerate();
            products
                .map(|(c, s)| s * weight(c * (LEN / channels)))
                .sum::<f64>()
                / LEN as f64
        };
        let along = per_element(&dw);
        let mean_g = if center { per_element(&db) } else { 0. };
        assert_all_near(&format!("{what}: y"), &y, |i| {
            normal(i) * weight(i) + bias(i)
        })?;
        assert_all_near(&format!("{what}: dx"), &dx, |i| {
            inv_std * (dy(i) * weight(i) - mean_g - normal(i) * along)
        })?;
        for (name, got, want) in [("dweight", dweight, dw), ("dbias", dbias, db)] {
            if let Some(got) = got {
                assert_close(&format!("{what}: {name}"), &got, &want, stamp.tolerance());
            }
        }
        Ok(())
    }
}

/// [`assert_close`] of the `f32` of `got` to what `want` makes of their indices.
fn assert_all_near(what: &str, got: &Tensor, want: impl Fn(usize) -> f64) -> Result<()> {
    let got = got.flatten_all()?.to_vec1::<f32>()?;
    let scale = ((0..LEN).map(|i| want(i).powi(2)).sum::<f64>() / LEN as f64).sqrt();
    for (i, got) in got.into_iter().enumerate() {
        let want = want(i);
        let error = (f64::from(got) - want).abs() / (scale + want.abs());
        assert!(
            error <= tolerance(DType::F32),
            "{what}: element {i} is {got:e}, should be {want:e} at scale {scale:e}"
        );
    }
    Ok(())
}
