//! Functions that the gradient check accepts, and functions that it must not accept.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var, bail};
use candle_norm::gradcheck::{Direction, GradCheck, Report, Suspicion, gradcheck};
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use testkit::data::uniform;
use testkit::faults;

const PROJECTIONS: GradCheck = GradCheck {
    eps: 1e-6,
    atol: 1e-7,
    rtol: 1e-5,
    projections: Some(3),
    seed: 7,
};

/// How the backward of [`Standardize`] goes wrong.
#[derive(Clone)]
enum Fault {
    None,
    Scale,
    MissingTerm,
    NoGradient,
    WrongShape,
    Nan,
    /// Adds the number of earlier backward passes, counted here, times a small amount.
    Drifts(Arc<AtomicUsize>),
}

/// Rows of a contiguous matrix, shifted and scaled to mean 0 and variance 1: LayerNorm without
/// parameters.
struct Standardize(Fault);

const EPS: f64 = 1e-5;

impl CustomOp1 for Standardize {
    fn name(&self) -> &'static str {
        "standardize"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("standardize: expected a contiguous input")
        };
        let (_, columns) = layout.shape().dims2()?;
        let mut out = Vec::with_capacity(end - start);
        for row in storage.as_slice::<f64>()?[start..end].chunks(columns) {
            let n = columns as f64;
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            out.extend(row.iter().map(|x| (x - mean) / (variance + EPS).sqrt()));
        }
        Ok((CpuStorage::F64(out), layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let centered = x.broadcast_sub(&x.mean_keepdim(1)?)?;
        let rstd = (centered.sqr()?.mean_keepdim(1)? + EPS)?.sqrt()?.recip()?;
        let through_mean = grad.broadcast_sub(&grad.mean_keepdim(1)?)?;
        let through_variance = y.broadcast_mul(&(grad * y)?.mean_keepdim(1)?)?;
        let right = (&through_mean - through_variance)?.broadcast_mul(&rstd)?;
        Ok(match &self.0 {
            Fault::None => Some(right),
            Fault::Scale => Some((right * 1.001)?),
            Fault::MissingTerm => Some(through_mean.broadcast_mul(&rstd)?),
            Fault::NoGradient => None,
            Fault::WrongShape => Some(right.narrow(0, 0, 1)?),
            Fault::Nan => Some((right * f64::NAN)?),
            Fault::Drifts(passes) => {
                Some((right + passes.fetch_add(1, Ordering::Relaxed) as f64 * 1e-12)?)
            }
        })
    }
}

fn standardize(fault: Fault) -> impl Fn(&[Tensor]) -> Result<Tensor> {
    move |v| v[0].contiguous()?.apply_op1(Standardize(fault.clone()))
}

/// The text of a failure, over the full Jacobian and over random projections: neither may let it
/// pass.
fn failures(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> [String; 2] {
    [GradCheck::default(), PROJECTIONS].map(|check| {
        let verdict = check.check(&f, inputs).and_then(|r| r.into_result());
        verdict.expect_err("the fault was not seen").to_string()
    })
}

#[test]
fn right_gradients_pass() -> Result<()> {
    let (x, w) = (uniform((3, 4), 1), uniform((4, 2), 2));
    let row = uniform(4, 3);
    type F = fn(&[Tensor]) -> Result<Tensor>;
    let cases: [(&str, F, &[Tensor]); 6] = [
        ("matmul", |v| v[0].matmul(&v[1]), &[x.clone(), w]),
        (
            "broadcast division",
            |v| v[0].broadcast_div(&(v[1].sqr()? + 1.0)?),
            &[x.clone(), row],
        ),
        (
            "used twice",
            |v| &v[0] * v[0].tanh()?,
            std::slice::from_ref(&x),
        ),
        (
            "scalar output",
            |v| v[0].exp()?.sum_all(),
            std::slice::from_ref(&x),
        ),
        (
            "scalar input",
            |v| v[0].sqr(),
            &[Tensor::new(0.7f64, &Device::Cpu)?],
        ),
        (
            "the same input in two places",
            |v| &v[0] * &v[1],
            &[x.clone(), x.clone()],
        ),
    ];
    for (name, f, inputs) in cases {
        for check in [GradCheck::default(), PROJECTIONS] {
            let report = check.check(f, inputs)?;
            assert!(report.passed(), "{name}: {report}");
            assert!(report.unreached.is_empty(), "{name}: {report}");
        }
    }
    gradcheck(standardize(Fault::None), &[x])
}

#[test]
fn counts_what_it_compared() -> Result<()> {
    let inputs = [uniform((3, 4), 1), uniform((4, 2), 2)];
    let matmul = |v: &[Tensor]| v[0].matmul(&v[1]);
    let full = GradCheck::default().check(matmul, &inputs)?;
    assert_eq!(full.compared, (12 + 8) * 6);
    assert_eq!(PROJECTIONS.check(matmul, &inputs)?.compared, (12 + 8) * 3);
    Ok(())
}

#[test]
fn empty_tensors_pass_without_a_panic() -> Result<()> {
    let empty = Tensor::zeros((0, 4), DType::F64, &Device::Cpu)?;
    let w = uniform(4, 1);
    for check in [GradCheck::default(), PROJECTIONS] {
        // The weight has elements, the output has none: its gradient is zero.
        let report = check.check(|v| v[0].broadcast_mul(&v[1]), &[empty.clone(), w.clone()])?;
        assert!(report.passed(), "{report}");
        let report = check.check(|v| v[0].sum_all(), std::slice::from_ref(&empty))?;
        assert!(report.passed(), "{report}");
        assert_eq!(report.compared, 0);
    }
    Ok(())
}

#[test]
fn a_wrong_scale_is_caught() {
    for text in failures(standardize(Fault::Scale), &[uniform((3, 4), 1)]) {
        assert!(text.contains("derivatives disagree"), "{text}");
    }
}

#[test]
fn a_sum_as_the_loss_hides_what_a_random_cotangent_shows() -> Result<()> {
    let x = Var::from_tensor(&uniform((3, 4), 1))?;
    // The variance has no part in the gradient of a row's sum, nor has anything else: it is zero
    // with and without the term that the faulty backward leaves out.
    for fault in [Fault::None, Fault::MissingTerm] {
        let loss = standardize(fault)(&[x.as_tensor().clone()])?.sum_all()?;
        let gradients = loss.backward()?;
        let dx = gradients.get(&x).expect("the input is a variable");
        let largest: f64 = dx.abs()?.max_all()?.to_scalar()?;
        assert!(largest < 1e-12, "{largest}");
    }
    for text in failures(standardize(Fault::MissingTerm), &[x.into_inner()]) {
        assert!(text.contains("derivatives disagree"), "{text}");
    }
    Ok(())
}

#[test]
fn a_fault_in_one_element_is_named() -> Result<()> {
    // The gradient of row 1, column 2 is lost where its value goes through a detached copy.
    let f = |v: &[Tensor]| {
        let mask = Tensor::new(&[[0f64, 0.0, 0.0], [0.0, 0.0, 1.0]], &Device::Cpu)?;
        let kept = (&v[0] * (1.0 - &mask)?)?;
        (kept + (v[0].detach() * mask)?)? * 3.0
    };
    let x = uniform((2, 3), 1);
    let report = GradCheck::default().check(f, std::slice::from_ref(&x))?;
    assert!(!report.passed());
    assert_eq!(report.failed, 1);
    let worst = report.worst.as_ref().expect("elements were compared");
    assert_eq!((worst.input, worst.element.as_slice()), (0, &[1, 2][..]));
    assert_eq!(worst.direction, Direction::Element(vec![1, 2]));
    assert_eq!(worst.analytic, Some(0.0));
    assert!((worst.numeric - 3.0).abs() < 1e-8);
    assert!(report.worst_error() > 1e4);
    let text = report.to_string();
    assert!(
        text.contains("worst: input 0 at [1, 2], output element [1, 2]: analytic 0e0, numeric"),
        "{text}"
    );

    let report = PROJECTIONS.check(f, &[x])?;
    assert_eq!(report.failed, 3);
    let text = report.to_string();
    assert!(text.contains("input 0 at [1, 2], projection "), "{text}");
    Ok(())
}

#[test]
fn a_missing_gradient_is_a_failure() -> Result<()> {
    let inputs = [uniform((2, 3), 1), uniform((2, 3), 2)];
    for text in failures(|v| &v[0] * v[1].detach(), &inputs) {
        assert!(
            text.contains("no gradient reached input 1, finite differences say"),
            "{text}"
        );
        assert!(!text.contains("no gradient reached input 0"), "{text}");
    }
    // A backward that answers with no gradient, at a variable and in the middle of a graph, where
    // candle panics.
    for text in failures(standardize(Fault::NoGradient), &inputs[..1]) {
        assert!(text.contains("no gradient reached input 0"), "{text}");
    }
    let inside = |v: &[Tensor]| (&v[0] * 2.0)?.apply_op1(Standardize(Fault::NoGradient));
    for text in failures(inside, &inputs[..1]) {
        assert!(text.contains("backward panicked"), "{text}");
    }
    Ok(())
}

#[test]
fn candles_fused_layer_norm_is_caught() -> Result<()> {
    // It has no f64, so the differences are those of f32: a wide step and a wide tolerance.
    let single = GradCheck {
        eps: 1e-2,
        atol: 1e-2,
        rtol: 1e-2,
        ..Default::default()
    };
    let fused = |v: &[Tensor]| {
        let [x, w, b] = [0, 1, 2].map(|i| v[i].to_dtype(DType::F32));
        candle_nn::ops::layer_norm(&x?, &w?, &b?, 1e-5)?.to_dtype(DType::F64)
    };
    let composed = |v: &[Tensor]| {
        let [x, w, b] = [0, 1, 2].map(|i| v[i].to_dtype(DType::F32));
        candle_nn::ops::layer_norm_slow(&x?, &w?, &b?, 1e-5)?.to_dtype(DType::F64)
    };
    let inputs = [uniform((2, 5), 1), uniform(5, 2), uniform(5, 3)];
    let report = single.check(fused, &inputs)?;
    let then = "the gradient check needs another example";
    faults::report("gradients of ops::layer_norm", !report.passed(), then);
    if !report.passed() {
        let unreached: Vec<usize> = report.unreached.iter().map(|u| u.input).collect();
        assert_eq!(unreached, [0, 1, 2]);
    }
    let report = single.check(composed, &inputs)?;
    assert!(report.passed(), "{report}");
    Ok(())
}

#[test]
fn an_input_without_influence_is_no_fault() -> Result<()> {
    let report = GradCheck::default().check(|v| v[0].sqr(), &[uniform(3, 1), uniform(2, 2)])?;
    assert!(report.passed(), "{report}");
    assert_eq!(report.unreached.len(), 1);
    assert_eq!(report.unreached[0].input, 1);
    assert_eq!(report.unreached[0].numeric, 0.0);
    // No input at all has influence here.
    gradcheck(|v| v[0].zeros_like(), &[uniform(3, 1)])
}

#[test]
fn randomness_is_refused() {
    let x = uniform((2, 3), 1);
    let calls = Cell::new(0);
    let drifting = |v: &[Tensor]| {
        calls.set(calls.get() + 1);
        &v[0] + f64::from(calls.get()) * 1e-12
    };
    for text in failures(drifting, std::slice::from_ref(&x)) {
        assert!(text.contains("the function is not deterministic"), "{text}");
    }
    for text in failures(standardize(Fault::Drifts(Arc::default())), &[x]) {
        assert!(
            text.contains("backward is not deterministic") && text.contains("input 0"),
            "{text}"
        );
    }
}

#[test]
fn nan_is_never_a_pass() -> Result<()> {
    let x = uniform((2, 3), 1);
    for text in failures(standardize(Fault::Nan), std::slice::from_ref(&x)) {
        assert!(text.contains("analytic NaN"), "{text}");
    }
    let nan = |v: &[Tensor]| v[0].sqrt();
    for text in failures(nan, &[Tensor::new(&[0.5f64, -1.0], &Device::Cpu)?]) {
        assert!(
            text.contains("element [1] of the function's output is NaN"),
            "{text}"
        );
    }
    // At 0 the root is finite, its derivative is not, and the point to the left has no root.
    for text in failures(nan, &[Tensor::new(&[0.5f64, 0.0], &Device::Cpu)?]) {
        assert!(text.contains("input 0 at [1]"), "{text}");
        assert!(text.contains("error inf times"), "{text}");
    }
    let text = gradcheck(
        |v| v[0].sqr(),
        &[Tensor::new(&[[1.0, f64::INFINITY]], &Device::Cpu)?],
    )
    .unwrap_err()
    .to_string();
    assert!(text.contains("element [0, 1] of input 0 is inf"), "{text}");
    Ok(())
}

#[test]
fn a_kink_is_named_and_the_remedy_with_it() -> Result<()> {
    let line = |values: &[f64]| Tensor::new(values, &Device::Cpu);
    // At 0, and nearer to it than the step: once to the right, once to the left, where candle's
    // gradient is 0.
    let relu = |v: &[Tensor]| v[0].relu();
    for (at, kinks) in [(&[0.0, 1.0][..], 1), (&[3e-7, 0.0, -1.0], 2), (&[-3e-7], 1)] {
        let report = GradCheck::default().check(relu, &[line(at)?])?;
        assert_eq!(report.failed, kinks, "{report}");
        assert_eq!(report.suspicions, [Suspicion::Kink(kinks)], "{report}");
        for text in failures(relu, &[line(at)?]) {
            assert!(text.contains("a kink? at "), "{text}");
            assert!(text.contains("move the point away"), "{text}");
        }
    }
    let text = gradcheck(relu, &[line(&[0.0, 1.0])?])
        .unwrap_err()
        .to_string();
    let sides = "analytic 1e0, numeric 5e-1, error 9.804e4 times the tolerance; 0e0 to the left, \
        1e0 to the right";
    assert!(text.contains(sides), "{text}");
    // The larger of two equal values.
    let report = GradCheck::default().check(|v| v[0].max(0), &[line(&[2.0, 2.0, 1.0])?])?;
    assert_eq!(report.suspicions, [Suspicion::Kink(2)], "{report}");
    Ok(())
}

#[test]
fn a_fault_is_no_kink() -> Result<()> {
    // Beside a kink, a gradient that neither side has.
    let x = Tensor::new(&[0.0f64, 1.0], &Device::Cpu)?;
    let wrong = |v: &[Tensor]| (v[0].relu()? * 4.0)? - (v[0].relu()?.detach() * 2.0)?;
    let report = GradCheck::default().check(wrong, &[x])?;
    assert_eq!((report.failed, report.suspicions.len()), (2, 0), "{report}");
    // And faults of a smooth function, however it bends.
    for fault in [Fault::Scale, Fault::MissingTerm, Fault::NoGradient] {
        for text in failures(standardize(fault), &[(uniform((2, 5), 1) * 1e-2)?]) {
            assert!(!text.contains('?'), "{text}");
        }
    }
    let bent = |v: &[Tensor]| (v[0].sqr()? * 2.0)? - v[0].sqr()?.detach();
    let report = GradCheck::default().check(bent, &[Tensor::new(&[3e-3f64], &Device::Cpu)?])?;
    assert_eq!((report.failed, report.suspicions.len()), (1, 0), "{report}");
    Ok(())
}

#[test]
fn other_causes_than_the_backward_are_named() -> Result<()> {
    let check = |f: fn(&[Tensor]) -> Result<Tensor>, x: Tensor| -> Result<Report> {
        let report = GradCheck::default().check(f, &[x])?;
        assert!(!report.passed(), "{report}");
        Ok(report)
    };
    let edge = check(|v| v[0].sqrt(), Tensor::new(&[0.5f64, 0.0], &Device::Cpu)?)?;
    assert_eq!(edge.suspicions, [Suspicion::Edge(1)]);
    assert!(edge.to_string().contains("move the point inside"), "{edge}");

    let single = |v: &[Tensor]| v[0].to_dtype(DType::F32)?.sqr()?.to_dtype(DType::F64);
    let single = check(single, uniform((2, 3), 1))?;
    assert_eq!(single.suspicions, [Suspicion::SinglePrecision], "{single}");
    assert!(single.to_string().contains("f64 throughout"), "{single}");

    let large = check(|v| &v[0] + 1e9, uniform((2, 3), 1))?;
    assert!(
        matches!(large.suspicions[..], [Suspicion::Rounding(_)]),
        "{large}"
    );
    assert!(large.to_string().contains("choose a larger eps"), "{large}");
    // With the remedy it passes.
    let wider = GradCheck {
        eps: 1.0,
        ..Default::default()
    };
    let report = wider.check(|v| &v[0] + 1e9, &[uniform((2, 3), 1)])?;
    assert!(report.passed() && report.suspicions.is_empty(), "{report}");
    Ok(())
}

#[test]
fn a_gradient_of_the_wrong_shape_is_an_error() {
    for text in failures(standardize(Fault::WrongShape), &[uniform((2, 3), 1)]) {
        assert!(text.contains("shape mismatch"), "{text}");
    }
}

#[test]
fn only_f64_is_checked() -> Result<()> {
    let x = uniform((2, 3), 1);
    let single = x.to_dtype(DType::F32)?;
    let text = gradcheck(|v| v[0].broadcast_mul(&v[1]), &[x.clone(), single])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("input 1 is F32, expected F64") && text.contains("to_dtype(DType::F64)"),
        "{text}"
    );
    let text = gradcheck(|v| v[0].to_dtype(DType::F32), &[x])
        .unwrap_err()
        .to_string();
    assert!(text.contains("the function's output is F32"), "{text}");
    Ok(())
}

#[test]
fn unusable_settings_and_inputs_are_errors() -> Result<()> {
    let x = uniform((2, 3), 1);
    let good = GradCheck::default();
    let settings = [
        (GradCheck { eps: 0.0, ..good }, "eps"),
        (GradCheck { eps: -1e-6, ..good }, "eps"),
        (
            GradCheck {
                eps: f64::NAN,
                ..good
            },
            "eps",
        ),
        (
            GradCheck {
                eps: f64::INFINITY,
                ..good
            },
            "eps",
        ),
        (GradCheck { atol: -1.0, ..good }, "atol"),
        (
            GradCheck {
                atol: f64::INFINITY,
                ..good
            },
            "atol",
        ),
        (
            GradCheck {
                rtol: f64::NAN,
                ..good
            },
            "rtol",
        ),
        (
            GradCheck {
                projections: Some(0),
                ..good
            },
            "projections",
        ),
    ];
    for (check, name) in settings {
        let text = check
            .check(|v| v[0].sqr(), std::slice::from_ref(&x))
            .unwrap_err()
            .to_string();
        assert!(text.contains(name), "{text}");
    }
    let text = gradcheck(|_| Tensor::new(1f64, &Device::Cpu), &[])
        .unwrap_err()
        .to_string();
    assert!(text.contains("at least one input"), "{text}");

    let far = Tensor::new(&[1.0, 1e12], &Device::Cpu)?;
    let text = gradcheck(|v| v[0].sqr(), &[far]).unwrap_err().to_string();
    assert!(
        text.contains("does not move element [1] of input 0"),
        "{text}"
    );

    // A function that fails fails the check with its own words.
    let text = gradcheck(|_| bail!("out of cheese"), std::slice::from_ref(&x))
        .unwrap_err()
        .to_string();
    assert!(text.contains("out of cheese"), "{text}");

    let above = |v: &[Tensor]| {
        let rows = if v[0].sum_all()?.to_scalar::<f64>()? > 0.0 {
            2
        } else {
            1
        };
        v[0].narrow(0, 0, rows)
    };
    let text = gradcheck(above, &[Tensor::zeros((2, 1), DType::F64, &Device::Cpu)?])
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("has shape [2, 1] after an input moved"),
        "{text}"
    );
    Ok(())
}

#[test]
fn the_function_sees_the_layout_of_the_input() -> Result<()> {
    let base = uniform((4, 6, 5), 1);
    let layouts = [
        ("contiguous", base.clone()),
        ("transposed", base.transpose(0, 2)?),
        ("permuted", base.permute((1, 2, 0))?),
        ("sliced rows", base.narrow(0, 1, 2)?),
        ("sliced columns", base.narrow(2, 1, 3)?),
        ("sliced in the middle", base.narrow(1, 2, 2)?),
        (
            "sliced, then transposed",
            base.narrow(1, 2, 2)?.transpose(0, 1)?,
        ),
        ("a column", base.narrow(2, 2, 1)?.squeeze(2)?),
        ("a single row", base.narrow(0, 3, 1)?.transpose(0, 1)?),
    ];
    for (name, x) in layouts {
        let seen = RefCell::new(vec![]);
        let f = |v: &[Tensor]| {
            let skips = v[0].layout().start_offset() > 0;
            seen.borrow_mut()
                .push((v[0].is_contiguous(), skips, memory_order(&v[0])));
            // The coefficients differ, so that a value that lands in another place is noticed.
            let coefficients = uniform(v[0].dims(), 2);
            v[0].sqr()?.broadcast_mul(&coefficients)
        };
        for check in [GradCheck::default(), PROJECTIONS] {
            let report = check.check(f, std::slice::from_ref(&x))?;
            assert!(report.passed(), "{name}: {report}");
        }
        let seen = seen.into_inner();
        let skips = x.layout().start_offset() > 0;
        for (contiguous, skipped, order) in &seen {
            assert_eq!(*contiguous, x.is_contiguous(), "{name}");
            assert_eq!(*order, memory_order(&x), "{name}");
            // A view may gain an offset where the input has gaps, it never loses one.
            assert!(*skipped || !skips, "{name}");
        }
        assert!(seen.len() > 2 * x.elem_count(), "{name}");
    }
    // Elements that share memory cannot be moved one by one.
    gradcheck(
        |v| {
            assert!(v[0].is_contiguous());
            v[0].sqr()
        },
        &[uniform(3, 1).broadcast_as((2, 3))?],
    )
}

/// Axes longer than one, outermost in memory first.
fn memory_order(x: &Tensor) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.rank()).filter(|&axis| x.dims()[axis] > 1).collect();
    order.sort_by_key(|&axis| std::cmp::Reverse(x.stride()[axis]));
    order
}

#[test]
fn a_fault_of_one_layout_only_is_caught() -> Result<()> {
    let f = |v: &[Tensor]| match v[0].is_contiguous() {
        true => v[0].sqr(),
        false => v[0].detach().sqr(),
    };
    let x = uniform((3, 4), 1);
    gradcheck(f, std::slice::from_ref(&x))?;
    for text in failures(f, &[x.t()?]) {
        assert!(text.contains("no gradient reached input 0"), "{text}");
    }
    Ok(())
}

#[test]
fn the_seed_decides_the_projections() -> Result<()> {
    let inputs = [uniform((3, 4), 1)];
    let worst = |seed| {
        let check = GradCheck {
            seed,
            ..PROJECTIONS
        };
        Ok::<_, candle_core::Error>(check.check(standardize(Fault::Scale), &inputs)?.worst)
    };
    assert_eq!(worst(1)?, worst(1)?);
    assert_ne!(worst(1)?, worst(2)?);
    Ok(())
}
