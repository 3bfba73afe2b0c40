//! Code written for candle-nn's norms compiles with this crate's names instead, and computes the
//! same. `scripts/convert_candle_transformers.sh` does it
//! with a hundred models.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{Path, with_path};
use testkit::data::uniform;

macro_rules! with_the_norms_of {
    ($module:ident, $($origin:ident)::+) => {
        mod $module {
            use candle_core::{DType, Device, Result, Tensor, Var};
            use candle_nn::{Module, ModuleT, Optimizer, SGD, VarBuilder, VarMap, seq};
            use $($origin)::+::{
                BatchNorm, BatchNormConfig, GroupNorm, LayerNorm, LayerNormConfig, RmsNorm,
                batch_norm, group_norm, layer_norm, layer_norm_no_bias, rms_norm,
            };

            include!("drop_in/source.rs");
        }
    };
}

with_the_norms_of!(theirs, candle_nn);
with_the_norms_of!(ours, candle_norm);
with_the_norms_of!(ours_under_candles_names, candle_norm::nn);

/// Code that names nothing but candle-nn, as a file does in which candle-nn is renamed.
mod whole {
    pub(crate) mod theirs {
        include!("drop_in/whole.rs");
    }

    pub(crate) mod ours {
        use candle_norm::nn as candle_nn;

        include!("drop_in/whole.rs");
    }
}

type Run<R> = fn(&[Tensor]) -> Result<R>;

/// Runs both on the same inputs, three batches each of moderate mean, where candle's fused variance
/// is accurate, and compares all that they return.
fn same_results(
    theirs: Run<theirs::Results>,
    ours: Run<ours::Results>,
    shapes: &[&[usize]],
) -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-12)] {
        for shape in shapes {
            let batches = (1..4)
                .map(|seed| {
                    (uniform(*shape, seed) * 2.0)?
                        .affine(1.0, 0.5)?
                        .to_dtype(dtype)
                })
                .collect::<Result<Vec<_>>>()?;
            let (theirs, ours) = (theirs(&batches)?, ours(&batches)?);
            assert_eq!(theirs.len(), ours.len());
            for ((name, theirs), (same_name, ours)) in theirs.iter().zip(&ours) {
                let what = format!("{name} at {shape:?} in {dtype:?}");
                assert_eq!(name, same_name);
                assert_eq!(theirs.dims(), ours.dims(), "{what}");
                assert_eq!(theirs.dtype(), ours.dtype(), "{what}");
                let (theirs, ours) = (theirs.to_dtype(DType::F64)?, ours.to_dtype(DType::F64)?);
                let largest = |t: Tensor| t.abs()?.max_all()?.to_scalar::<f64>();
                let error = largest((&theirs - ours)?)?;
                assert!(
                    error <= tolerance * largest(theirs)?,
                    "{what}: off by {error}"
                );
            }
        }
    }
    Ok(())
}

/// Runs candle's and both of ours.
macro_rules! same_results_of {
    ($run:ident, $shapes:expr) => {{
        let shapes = $shapes;
        same_results(theirs::$run, ours::$run, &shapes)?;
        same_results(theirs::$run, ours_under_candles_names::$run, &shapes)
    }};
}

#[test]
fn batch_norm() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[8, 4], &[5, 4, 3], &[3, 4, 5, 2]];
    same_results_of!(batch_norms, shapes)
}

#[test]
fn layer_norm_and_rms_norm() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[3, 7], &[2, 3, 7], &[2, 3, 2, 16]];
    same_results_of!(row_norms, shapes)
}

#[test]
fn group_norm() -> Result<()> {
    let shapes: [&[usize]; 2] = [&[2, 4, 5], &[2, 6, 3, 2]];
    same_results_of!(group_norms, shapes)
}

#[test]
fn a_model_of_all() -> Result<()> {
    let shapes: [&[usize]; 2] = [&[4, 4, 6], &[2, 4, 3, 5]];
    same_results_of!(model, shapes)
}

#[test]
fn whatever_converts_into_candles_configurations() -> Result<()> {
    let shapes: [&[usize]; 1] = [&[4, 4, 6]];
    same_results_of!(conversions, shapes)
}

#[test]
fn functions_of_ops() -> Result<()> {
    let shapes: [&[usize]; 3] = [&[3, 7], &[2, 3, 7], &[2, 3, 2, 33]];
    same_results(whole::theirs::functions, whole::ours::functions, &shapes)
}

/// At batch 1, where candle's are right.
#[test]
fn convolutions_along_one_axis() -> Result<()> {
    let shapes: [&[usize]; 2] = [&[1, 4, 9], &[1, 2, 6]];
    same_results(
        whole::theirs::convolutions,
        whole::ours::convolutions,
        &shapes,
    )
}

/// The functions of `ops` have every gradient, and those of candle none: programs rename them for
/// that.
#[test]
fn functions_of_ops_have_every_gradient() -> Result<()> {
    use candle_norm::nn::ops;
    let inputs = [uniform((2, 3, 5), 1), uniform(5, 2), uniform(5, 3)];
    let of = |f: fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]| {
        for path in [Path::Fused, Path::Composed] {
            with_path(path, || gradcheck(f, inputs))?;
        }
        Ok::<_, candle_core::Error>(())
    };
    of(|v| ops::layer_norm(&v[0], &v[1], &v[2], 1e-5), &inputs)?;
    of(|v| ops::layer_norm_slow(&v[0], &v[1], &v[2], 1e-5), &inputs)?;
    of(|v| ops::rms_norm(&v[0], &v[1], 1e-5), &inputs[..2])?;
    of(|v| ops::rms_norm_slow(&v[0], &v[1], 1e-5), &inputs[..2])?;
    of(|v| ops::softmax_last_dim(&v[0]), &inputs[..1])?;
    let transposed = inputs[0].transpose(1, 2)?;
    of(|v| ops::softmax_last_dim(&v[0]), &[transposed])
}

/// Rotary embeddings: candle's values, also where a gradient follows, and every gradient.
#[test]
fn rotary_embeddings_have_every_gradient() -> Result<()> {
    use candle_norm::nn::rotary_emb::{self as ours, rope_i_slow, rope_slow};
    type Rope = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
    let theirs = [
        candle_nn::rotary_emb::rope as Rope,
        candle_nn::rotary_emb::rope_i,
        candle_nn::rotary_emb::rope_thd,
    ];
    let ours = [ours::rope as Rope, ours::rope_i, ours::rope_thd];
    // Axes 1 and 2 differ, and the factors are of more positions than there are.
    let x = uniform((2, 3, 4, 6), 1);
    for factors in [vec![7, 3], vec![2, 7, 3]] {
        let (cos, sin) = (uniform(factors.clone(), 2), uniform(factors, 3));
        for (which, (ours, theirs)) in ours.into_iter().zip(theirs).enumerate() {
            let positions = [4, 4, 3][which];
            let here = |t: &Tensor| t.narrow(t.rank() - 2, 0, positions)?.contiguous();
            let want = theirs(&x, &here(&cos)?, &here(&sin)?)?;
            assert_eq!(difference(&ours(&x, &cos, &sin)?, &want)?, 0.);
            let tracked = Var::from_tensor(&x)?;
            assert!(difference(&ours(&tracked, &cos, &sin)?, &want)? < 1e-15);
            let f = |v: &[Tensor]| ours(&v[0], &v[1], &v[2]);
            gradcheck(f, &[x.clone(), cos.clone(), sin.clone()])?;
        }
    }
    let (cos, sin) = (uniform((4, 3), 2), uniform((4, 3), 3));
    let tracked = Var::from_tensor(&x)?;
    let slow = rope_slow(&x, &cos, &sin)?;
    assert!(difference(&ours[0](&tracked, &cos, &sin)?, &slow)? < 1e-15);
    let slow = rope_i_slow(&x, &cos, &sin)?;
    assert!(difference(&ours[1](&tracked, &cos, &sin)?, &slow)? < 1e-15);
    // Views, which candle's own refuses.
    let transposed = x.transpose(1, 2)?;
    let got = ours[2](&transposed, &cos, &sin)?;
    let want = ours[0](&x, &cos, &sin)?.transpose(1, 2)?;
    assert_eq!(difference(&got, &want)?, 0.);

    let text = |result: Result<Tensor>| result.unwrap_err().to_string();
    let short = text(ours[0](&x, &cos.narrow(0, 0, 3)?, &sin));
    assert!(short.contains("rope: expected cos of [T', 3]"), "{short}");
    assert!(short.contains("T' of at least 4"), "{short}");
    let odd = text(ours[1](&uniform((2, 3, 4, 5), 1), &cos, &sin));
    assert!(odd.contains("rope_i: expected an even D"), "{odd}");
    let flat = text(ours[2](&uniform((2, 6), 1), &cos, &sin));
    assert!(
        flat.contains("rope_thd: expected an input [B, T, H, D]"),
        "{flat}"
    );
    Ok(())
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    assert_eq!(a.dims(), b.dims());
    (a - b)?.abs()?.max_all()?.to_scalar()
}

/// The ends of softmax, against values that PyTorch gives.
#[test]
fn softmax_at_the_ends() -> Result<()> {
    use candle_norm::nn::ops::softmax_last_dim;
    let row = |values: &[f32]| Tensor::new(values, &Device::Cpu);
    let of = |values: &[f32]| softmax_last_dim(&row(values)?)?.to_vec1::<f32>();
    let minus = f32::NEG_INFINITY;
    assert_eq!(of(&[1e30, -1e30, 0.])?, [1., 0., 0.]);
    assert_eq!(of(&[minus, 0., 0.])?, [0., 0.5, 0.5]);
    assert!(of(&[minus, minus])?.iter().all(|y| y.is_nan()));
    assert!(of(&[f32::NAN, 1.])?.iter().all(|y| y.is_nan()));
    assert_eq!(of(&[-7.])?, [1.]);
    // A masked row has no gradient that is NaN.
    let x = Var::new(&[minus, 0., 1.], &Device::Cpu)?;
    let y = softmax_last_dim(&x)?.sqr()?.sum_all()?;
    let gradients = y
        .backward()?
        .get(&x)
        .expect("a gradient")
        .to_vec1::<f32>()?;
    assert!(gradients.iter().all(|g| g.is_finite()), "{gradients:?}");
    // A long row of equal values: a sum in the dtype would stop at 2048 in f16.
    let n = 10_000;
    for dtype in [DType::F16, DType::BF16, DType::F32, DType::F64] {
        let y = softmax_last_dim(&Tensor::zeros((2, n), dtype, &Device::Cpu)?)?;
        let y = y.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
        let expected = Tensor::new(1. / n as f64, &Device::Cpu)?.to_dtype(dtype)?;
        let expected = expected.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        assert!(
            y.iter().all(|y| (y / expected - 1.).abs() < 1e-6),
            "{dtype:?}"
        );
    }
    for dims in [&[0, 3][..], &[3, 0]] {
        let empty = Tensor::zeros(dims, DType::F32, &Device::Cpu)?;
        assert_eq!(softmax_last_dim(&empty)?.dims(), dims);
    }
    for (x, says) in [
        (
            Tensor::new(1f32, &Device::Cpu)?,
            "softmax_last_dim: expected an input of rank at least 1, [..., N], got []",
        ),
        (
            Tensor::new(&[1u32], &Device::Cpu)?,
            "softmax_last_dim: expected input with dtype F16, BF16, F32 or F64, got U32; convert \
            it with to_dtype",
        ),
    ] {
        let text = softmax_last_dim(&x).expect_err("a refusal").to_string();
        assert_eq!(text.lines().next(), Some(says));
    }
    Ok(())
}

/// Options that need no type to be written where a function takes nothing else.
#[test]
fn the_type_of_options_is_inferred() -> Result<()> {
    use candle_norm::{WeightNorm, weight_norm};
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let linear = weight_norm::linear(5, 3, Default::default(), vb.pp("a"))?;
    assert_eq!(linear.dim(), Some(0));
    let (config, options) = (Default::default(), Default::default());
    let conv = weight_norm::conv_transpose1d(5, 3, 2, config, options, vb.pp("b"))?;
    assert_eq!(conv.dim(), Some(0));
    let whole = weight_norm::linear_no_bias(5, 3, None.into(), vb.pp("c"))?;
    assert_eq!(whole.dim(), None);
    let again = WeightNorm::from_layer(&linear.bake()?, Default::default())?;
    assert_eq!(again.dim(), Some(0));
    Ok(())
}
