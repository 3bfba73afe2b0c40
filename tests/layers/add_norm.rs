//! A residual added and the sum normalized in one pass: the values, gradients and errors of one
//! after the other.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{
    Affine, Cast, LayerNorm, LayerNormOptions, Path, RmsNorm, RmsNormOptions, layer_norm, ops,
    rms_norm, with_path,
};

use testkit::data::uniform;
use testkit::data::{Draw, bits, tensor, values, variable};
use testkit::errors::assert_message;
use testkit::view::View;

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
const PATHS: [Path; 3] = [Path::Fused, Path::Composed, Path::Emulated];

/// A norm of the last axis.
#[derive(Debug, Clone, Copy)]
enum Norm {
    Layer,
    Rms { offset: f64, cast: Cast },
}

impl Norm {
    const ALL: [Self; 3] = [
        Self::Layer,
        Self::Rms {
            offset: 1.,
            cast: Cast::AfterWeight,
        },
        Self::Rms {
            offset: 0.,
            cast: Cast::BeforeWeight,
        },
    ];

    /// How many parameters it can have.
    fn params(self) -> usize {
        match self {
            Self::Layer => 2,
            Self::Rms { .. } => 1,
        }
    }

    /// In one pass: the normalized sum, and the sum.
    fn at_once(self, x: &Tensor, residual: &Tensor, params: &[Tensor]) -> Result<(Tensor, Tensor)> {
        let (len, weight) = (x.dims()[x.rank() - 1], params.first());
        match self {
            Self::Layer => ops::add_layer_norm(x, residual, len, [weight, params.get(1)], 1e-5),
            Self::Rms { offset, cast } => ops::add_rms_norm(
                x,
                residual,
                len,
                weight,
                ops::RmsOptions {
                    eps: Some(1e-5),
                    offset,
                    cast,
                },
            ),
        }
    }

    /// One after the other.
    fn apart(self, x: &Tensor, residual: &Tensor, params: &[Tensor]) -> Result<(Tensor, Tensor)> {
        let (len, weight) = (x.dims()[x.rank() - 1], params.first());
        let sum = (x + residual)?;
        let y = match self {
            Self::Layer => ops::layer_norm(&sum, len, weight, params.get(1), 1e-5)?,
            Self::Rms { offset, cast } => ops::rms_norm(
                &sum,
                len,
                weight,
                ops::RmsOptions {
                    eps: Some(1e-5),
                    offset,
                    cast,
                },
            )?,
        };
        Ok((y, sum))
    }
}

/// The gradients of both outputs together, each with a cotangent of its own.
fn backward((y, sum): &(Tensor, Tensor)) -> Result<GradStore> {
    let mut draw = Draw::new(7);
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for output in [y, sum] {
        let cotangent = tensor(&draw.normal(output.elem_count()), output.dims(), DType::F64)?;
        loss = (loss + (output.to_dtype(DType::F64)? * cotangent)?.sum_all()?)?;
    }
    loss.backward()
}

#[track_caller]
fn gradient<'a>(grads: &'a GradStore, of: &Tensor, what: &str) -> &'a Tensor {
    let found = grads.get(of);
    found.unwrap_or_else(|| panic!("{what}: no gradient arrived"))
}

/// The gradients of both outputs together, whose cotangents have few bits: every dtype has them as
/// they are.
fn backward_rounded((y, sum): &(Tensor, Tensor)) -> Result<GradStore> {
    let mut draw = Draw::new(7);
    let mut loss = Tensor::zeros((), DType::F64, &Device::Cpu)?;
    for output in [y, sum] {
        let cotangent = draw.normal(output.elem_count());
        let cotangent: Vec<f64> = cotangent.iter().map(|v| (v * 16.).round() / 16.).collect();
        let cotangent = tensor(&cotangent, output.dims(), DType::F64)?;
        loss = (loss + (output.to_dtype(DType::F64)? * cotangent)?.sum_all()?)?;
    }
    loss.backward()
}

/// Both outputs and all gradients have the same bits as those of an addition and a norm.
fn assert_same(norm: Norm, dtype: DType, dims: &[usize], views: [View; 2], count: usize) {
    for path in PATHS {
        let what =
            format!("{norm:?} of {dims:?} in {dtype:?}, {views:?}, {count} parameters, {path:?}");
        let run = |at_once: bool| -> Result<Vec<Vec<u64>>> {
            let mut draw = Draw::new(3);
            let (x_base, x) = views[0].draw(dims, dtype, &mut draw)?;
            let (residual_base, residual) = views[1].draw(dims, dtype, &mut draw)?;
            let len = dims[dims.len() - 1];
            let params = (0..count)
                .map(|_| variable(&draw.weight(len), &[len], dtype))
                .collect::<Result<Vec<_>>>()?;
            let both = match at_once {
                true => norm.at_once(&x, &residual, &params),
                false => norm.apart(&x, &residual, &params),
            }?;
            let grads = backward(&both)?;
            assert!(both.0.is_contiguous() && both.1.is_contiguous(), "{what}");
            let mut found = vec![bits(&both.0)?, bits(&both.1)?];
            for leaf in [x_base, residual_base].iter().chain(&params) {
                let gradient = gradient(&grads, leaf, &what);
                assert_eq!(gradient.dtype(), dtype, "{what}");
                found.push(bits(gradient)?);
            }
            Ok(found)
        };
        let both = with_path(path, || (run(true), run(false)));
        let (got, want) = (both.0.expect("tensors that fit"), both.1.expect("the same"));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(got == want, "{what}: tensor {i} differs");
        }
    }
}

#[test]
fn the_same_as_one_after_the_other() {
    let plain = View::Sliced(0);
    for norm in Norm::ALL {
        for dtype in [DType::F32, DType::F64] {
            for (case, dims) in [&[1, 1][..], &[13], &[3, 17], &[2, 3, 100], &[33, 769]]
                .iter()
                .enumerate()
            {
                let count = (case + 1) % (norm.params() + 1);
                assert_same(norm, dtype, dims, [plain; 2], count);
            }
            assert_same(norm, dtype, &[3, 17], [plain; 2], norm.params());
        }
    }
}

#[test]
fn strided_inputs_are_the_same_as_contiguous_ones() {
    let dims = [3, 4, 19];
    let views = View::all(dims.len());
    for norm in Norm::ALL {
        for (i, view) in views.iter().enumerate() {
            let other = views[(i + 3) % views.len()];
            assert_same(norm, DType::F32, &dims, [*view, other], norm.params());
        }
    }
}

/// Against central differences, through both outputs and through each alone.
#[test]
fn the_gradients_are_those_of_the_mathematics() -> Result<()> {
    for norm in Norm::ALL {
        for len in [5, 19] {
            let mut inputs = vec![uniform((2, len), 1), uniform((2, len), 2)];
            inputs.extend((3..).take(norm.params()).map(|seed| uniform(len, seed)));
            for path in PATHS {
                with_path(path, || {
                    let run = |v: &[Tensor]| norm.at_once(&v[0], &v[1], &v[2..]);
                    gradcheck(
                        |v| {
                            let (y, sum) = run(v)?;
                            Tensor::cat(&[y, sum], 0)
                        },
                        &inputs,
                    )?;
                    gradcheck(|v| Ok(run(v)?.0), &inputs)?;
                    gradcheck(|v| Ok(run(v)?.1), &inputs[..2])
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_nothing_tracks_gets_nothing() -> Result<()> {
    let leaf = || variable(&Draw::new(1).normal(51), &[3, 17], DType::F32);
    for norm in Norm::ALL {
        for path in PATHS {
            with_path(path, || -> Result<()> {
                let what = format!("{norm:?}, {path:?}");
                let (x, constant) = (leaf()?, leaf()?.detach());
                let both = norm.at_once(&constant, &constant, &[])?;
                assert!(!both.0.track_op() && !both.1.track_op(), "{what}");
                for (a, b) in [(&x, &constant), (&constant, &x)] {
                    let grads = backward(&norm.at_once(a, b, &[])?)?;
                    gradient(&grads, &x, &what);
                    if path == Path::Fused {
                        assert!(grads.get(&constant).is_none(), "{what}");
                    }
                }
                // A tensor that is both gets both gradients.
                let twice = backward(&norm.at_once(&x, &x, &[])?)?;
                let want = backward(&norm.apart(&x, &x, &[])?)?;
                assert_eq!(
                    values(gradient(&twice, &x, &what))?,
                    values(gradient(&want, &x, &what))?
                );
                // A parameter alone.
                let weight = variable(&Draw::new(2).weight(17), &[17], DType::F32)?;
                let grads = backward(&norm.at_once(
                    &constant,
                    &constant,
                    std::slice::from_ref(&weight),
                )?)?;
                gradient(&grads, &weight, &what);
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn each_output_is_rounded_once() -> Result<()> {
    // bf16 has no 257: the sum becomes 256, and yet is normalized as 257.
    let x = Tensor::full(256f32, (1, 3), &Device::Cpu)?.to_dtype(DType::BF16)?;
    let residual = Tensor::new(&[[0f32, 1., 4.]], &Device::Cpu)?.to_dtype(DType::BF16)?;
    for norm in Norm::ALL {
        for path in PATHS {
            let (y, sum) = with_path(path, || norm.at_once(&x, &residual, &[]))?;
            assert_eq!(values(&sum)?, [256., 256., 260.]);
            let wide = Tensor::new(&[[256f64, 257., 260.]], &Device::Cpu)?;
            let zero = wide.zeros_like()?;
            let (want, _) = norm.apart(&wide, &zero, &[])?;
            let want = want.to_dtype(DType::F32)?.to_dtype(DType::BF16)?;
            assert_eq!(values(&y)?, values(&want)?, "{norm:?}, {path:?}");
        }
    }
    Ok(())
}

/// Half a unit in the last place, and what single precision adds.
#[track_caller]
fn assert_rounded_once(got: &[f64], want: &[f64], dtype: DType, what: &str) {
    let digits = if dtype == DType::F16 { 11 } else { 8 };
    for (got, want) in got.iter().zip(want) {
        let limit = want.abs() * 2f64.powi(-digits) * 1.001 + 1e-5;
        assert!((got - want).abs() <= limit, "{what}: {got}, not {want}");
    }
}

/// In half precision what comes from the norm and what comes by the sum itself is added up before
/// it is rounded.
#[test]
fn gradients_are_rounded_once() -> Result<()> {
    for norm in Norm::ALL {
        for dtype in [DType::F16, DType::BF16] {
            for path in PATHS {
                let dims = [9, 100];
                let mut draw = Draw::new(11);
                let inputs = [draw.normal(900), draw.normal(900), draw.weight(100)];
                let inputs = [&dims[..], &dims, &[100]]
                    .into_iter()
                    .zip(inputs)
                    .map(|(dims, values)| variable(&values, dims, dtype))
                    .collect::<Result<Vec<_>>>()?;
                let wide = inputs
                    .iter()
                    .map(|t| variable(&values(t)?, t.dims(), DType::F64))
                    .collect::<Result<Vec<_>>>()?;
                let run = |v: &[Tensor]| norm.at_once(&v[0], &v[1], &v[2..]);
                let grads = with_path(path, || backward_rounded(&run(&inputs)?))?;
                let want = backward_rounded(&run(&wide)?)?;
                // Before the weight the forward rounds twice.
                let weights = match norm {
                    Norm::Rms {
                        cast: Cast::BeforeWeight,
                        ..
                    } => 2,
                    _ => 3,
                };
                for (i, (leaf, of)) in inputs.iter().zip(&wide).enumerate().take(weights) {
                    let what = format!("{norm:?} in {dtype:?}, {path:?}: gradient {i}");
                    let got = values(gradient(&grads, leaf, &what))?;
                    let want = values(gradient(&want, of, &what))?;
                    assert_rounded_once(&got, &want, dtype, &what);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn empty_inputs_get_empty_outputs_and_gradients() -> Result<()> {
    for dims in [&[0, 8][..], &[2, 0, 8]] {
        for norm in Norm::ALL {
            for path in PATHS {
                let what = format!("{norm:?} of {dims:?}, {path:?}");
                let leaves = [
                    variable(&[], dims, DType::F32)?,
                    variable(&[], dims, DType::F32)?,
                ];
                let params = (0..norm.params())
                    .map(|_| variable(&[1.; 8], &[8], DType::F32))
                    .collect::<Result<Vec<_>>>()?;
                let both = with_path(path, || norm.at_once(&leaves[0], &leaves[1], &params))?;
                assert_eq!((both.0.dims(), both.1.dims()), (dims, dims), "{what}");
                let grads = backward(&both)?;
                for leaf in leaves.iter().chain(&params) {
                    let gradient = gradient(&grads, leaf, &what);
                    assert_eq!(gradient.dims(), leaf.dims(), "{what}");
                    assert!(values(gradient)?.iter().all(|g| *g == 0.), "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_by_name() -> Result<()> {
    let zeros = |dims: &[usize], dtype| Tensor::zeros(dims, dtype, &Device::Cpu);
    let x = zeros(&[2, 3, 4], DType::F32)?;
    let layer = |residual: &Tensor| ops::add_layer_norm(&x, residual, 4, [None, None], 1e-5);
    let rms = |residual: &Tensor, eps| ops::add_rms_norm(&x, residual, 4, None, eps);
    for path in PATHS {
        with_path(path, || -> Result<()> {
            for dims in [&[3, 4][..], &[1, 3, 4], &[2, 4, 3], &[]] {
                let residual = zeros(dims, DType::F32)?;
                let got = format!("got {dims:?}");
                let rest = [
                    "a residual of the input's shape [2, 3, 4]",
                    &got,
                    "broadcast_as",
                ];
                assert_message(layer(&residual), &[&["LayerNorm"][..], &rest].concat());
                assert_message(rms(&residual, 1e-5), &[&["RmsNorm"][..], &rest].concat());
            }
            for dtype in [DType::BF16, DType::F64, DType::U8] {
                let residual = zeros(&[2, 3, 4], dtype)?;
                let got = format!("got {dtype:?}");
                let rest = ["a residual of the input's dtype F32", &got, "to_dtype"];
                assert_message(layer(&residual), &[&["LayerNorm"][..], &rest].concat());
                assert_message(rms(&residual, 1e-5), &[&["RmsNorm"][..], &rest].concat());
            }
            let short = ops::add_layer_norm(&x, &x, 3, [None, None], 1e-5);
            assert_message(short, &["LayerNorm", "normalized_shape [3]", "[2, 3, 4]"]);
            let long = zeros(&[5], DType::F32)?;
            let weighted = ops::add_layer_norm(&x, &x, 4, [Some(&long), None], 1e-5);
            assert_message(weighted, &["LayerNorm", "weight", "[4]", "[5]"]);
            assert_message(rms(&x, 0.), &["RmsNorm", "eps > 0", "got 0"]);
            let ints = zeros(&[2, 4], DType::U32)?;
            let ints = ops::add_layer_norm(&ints, &ints, 4, [None, None], 1e-5);
            assert_message(ints, &["LayerNorm", "dtype", "U32"]);
            Ok(())
        })?;
    }
    Ok(())
}

/// Every option of the layers: what `forward_add` gives is the sum, and `forward` of the sum that
/// is not rounded.
#[test]
fn layers_add_first() -> Result<()> {
    for dtype in DTYPES {
        let half = matches!(dtype, DType::F16 | DType::BF16);
        for params in [dtype, DType::F32] {
            if params != dtype && !half {
                continue;
            }
            for channels_first in [false, true] {
                let len = if channels_first { 5 } else { 12 };
                for remove_mean in [false, true] {
                    let options = LayerNormOptions {
                        channels_first,
                        remove_mean,
                        ..Default::default()
                    };
                    layer_adds_first(dtype, params, |vb| layer_norm(len, options, vb))?;
                }
                let options = RmsNormOptions {
                    channels_first,
                    affine: Affine::WeightAndBias,
                    offset: 1.,
                    ..Default::default()
                };
                layer_adds_first(dtype, params, |vb| rms_norm(len, options, vb))?;
            }
        }
    }
    Ok(())
}

trait Adds: Module + std::fmt::Debug {
    fn add(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)>;
}

impl Adds for LayerNorm {
    fn add(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_add(x, residual)
    }
}

impl Adds for RmsNorm {
    fn add(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor)> {
        self.forward_add(x, residual)
    }
}

fn layer_adds_first<N: Adds>(
    dtype: DType,
    params: DType,
    build: impl Fn(VarBuilder) -> Result<N>,
) -> Result<()> {
    let new = |dtype| build(VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu));
    let norm = new(params)?;
    let mut draw = Draw::new(5);
    let mut like = || tensor(&draw.normal(120), &[2, 5, 12], dtype);
    let (x, residual) = (like()?, like()?);
    let wide = (x.to_dtype(DType::F64)? + residual.to_dtype(DType::F64)?)?;
    for path in PATHS {
        let (y, sum) = with_path(path, || norm.add(&x, &residual))?;
        assert_eq!(bits(&sum)?, bits(&(&x + &residual)?)?);
        if params == dtype && !matches!(dtype, DType::F16 | DType::BF16) {
            let apart = with_path(path, || norm.forward(&sum))?;
            assert_eq!(bits(&y)?, bits(&apart)?);
        } else {
            let want = values(&new(DType::F64)?.forward(&wide)?)?;
            assert_rounded_once(&values(&y)?, &want, dtype, &format!("{norm:?}, {path:?}"));
        }
    }
    Ok(())
}
