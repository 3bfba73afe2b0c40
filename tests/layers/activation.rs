//! Activations fused with a norm: worked examples, slopes at the kinks, gradients, what keeps them
//! and what refuses them.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Activation, Linear, Module, ModuleT, VarMap};
use candle_norm::gradcheck::{GradCheck, gradcheck};
use candle_norm::ops::{self, Modulation};
use candle_norm::{
    Affine, BatchNormOptions, GroupNormOptions, InstanceNormOptions, LayerNormOptions, NormConfig,
    Path, RmsNormOptions, with_path,
};

use testkit::compare::{assert_close, assert_digits, tolerance};
use testkit::data::{noise_by, tensor, ties, uniform, values, variable};
use testkit::errors::assert_message;
use testkit::subjects::gradients;
use testkit::vars::{set, var, vb};

const CPU: Device = Device::Cpu;
const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];
/// The most elements on the emulator, which takes a microsecond for each.
const MOST_EMULATED: usize = 10_000;
/// Those that are fast enough for differences.
const ON_THE_CPU: [Path; 3] = [Path::Fused, Path::Composed, Path::Reference];
const ALL: [Activation; 9] = [
    Activation::Relu,
    Activation::Relu6,
    Activation::LeakyRelu(0.01),
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluPytorchTanh,
    Activation::HardSwish,
    Activation::Sigmoid,
    Activation::Mish,
];

#[test]
fn a_group_norm_with_silu() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = variable(&[1., 3., 2., 0., 5., 5., -1., 1.], &[1, 4, 2], DType::F64)?;
            let weight = variable(&[1., 2., -1., 0.5], &[4], DType::F64)?;
            let bias = variable(&[0., 0.5, 0., -0.5], &[4], DType::F64)?;
            let dy = tensor(&[1., -1., 0., 2., 1., 0.5, -1., 1.], &[1, 4, 2], DType::F64)?;
            let (w, b) = (Some(&weight), Some(&bias));
            let y = ops::group_norm_act(&x, 2, [w, b], 1e-5, Activation::Silu)?;
            let want = [
                -0.1744232877,
                1.063593228,
                1.117348168,
                -0.2210842593,
                -0.265992757,
                -0.265992757,
                -0.2772094353,
                -0.2464240504,
            ];
            assert_digits("y", &values(&y)?, &want);
            let grads = gradients(&y, &dy, &[&x, &weight, &bias])?;
            let want = [
                0.4076368721,
                -0.3669518907,
                0.3466055469,
                -0.3872905283,
                -0.01238439258,
                0.003774296135,
                -0.01722008475,
                0.0258301812,
            ];
            assert_digits("dx", &grads[0], &want);
            let want = [-1.486159638, 0.2614411922, 0.1211901654, -0.0495980664];
            assert_digits("dw", &grads[1], &want);
            let want = [-0.7295492903, -0.1948675388, 0.1259446076, 0.1185457337];
            assert_digits("db", &grads[2], &want);
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn a_batch_norm_with_relu() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let vars = VarMap::new();
            let options = BatchNormOptions {
                activation: Some(Activation::Relu),
                ..Default::default()
            };
            let norm = candle_norm::batch_norm(1, options, vb(&vars, DType::F64))?;
            set(&vars, "weight", &tensor(&[1.5], &[1], DType::F64)?)?;
            set(&vars, "bias", &tensor(&[-0.25], &[1], DType::F64)?)?;
            let x = variable(&[-1., 0., 2., 3., 1., 1., 0., -2.], &[2, 1, 4], DType::F64)?;
            let dy = tensor(&[1., -1., 0.5, 2., 0., 1., 1., -1.], &[2, 1, 4], DType::F64)?;
            let y = norm.forward_t(&x, true)?;
            let want = [
                0.,
                0.,
                1.249996667,
                2.249994444,
                0.2499988889,
                0.2499988889,
                0.,
                0.,
            ];
            assert_digits("y", &values(&y)?, &want);
            let (w, b) = (var(&vars, "weight"), var(&vars, "bias"));
            let grads = gradients(&y, &dy, &[&x, &w, &b])?;
            let want = [
                0.08333083335,
                -0.2638890741,
                -0.45833,
                0.6944467592,
                -0.6111089815,
                0.3888887963,
                -0.2638890741,
                0.4305507408,
            ];
            assert_digits("dx", &grads[0], &want);
            assert_digits("dw", &grads[1], &[4.166657407]);
            assert_digits("db", &grads[2], &[3.5]);
            // The statistics are those of x, before the activation.
            assert_digits("mean", &values(norm.running_mean())?, &[0.05]);
            assert_digits("variance", &values(norm.running_var())?, &[1.157142857]);
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn a_layer_norm_with_gelu() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = variable(&[1., 2., 4.], &[1, 3], DType::F64)?;
            let y = ops::layer_norm_act(&x, 3, [None, None], 1e-6, Activation::Gelu)?;
            let want = [-0.152365351, -0.1054703514, 1.215069874];
            assert_digits("y", &values(&y)?, &want);
            let dx = &gradients(&y, &tensor(&[1., 0., -2.], &[1, 3], DType::F64)?, &[&x])?[0];
            assert_digits("dx", dx, &[-0.2808287928, 0.4212441241, -0.1404153313]);
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

/// The activation of biases alone, and its slopes: those of a norm of a constant row.
fn values_and_slopes(activation: Activation, at: &[f64], dtype: DType) -> Result<[Vec<f64>; 2]> {
    let n = at.len();
    let x = Tensor::ones((1, n), dtype, &CPU)?;
    let bias = variable(at, &[n], dtype)?;
    let y = ops::layer_norm_act(&x, n, [None, Some(&bias)], 1e-5, activation)?;
    let slopes = gradients(&y, &x, &[&bias])?.swap_remove(0);
    Ok([values(&y)?, slopes])
}

#[test]
fn slopes_are_those_of_pytorch() -> Result<()> {
    let at = [-3., -1., 0., 1., 3., 6., 7.];
    let table = [
        (Activation::Relu, [0., 0., 0., 1., 1., 1., 1.]),
        (Activation::Relu6, [0., 0., 0., 1., 1., 0., 0.]),
        (
            Activation::LeakyRelu(0.01),
            [0.01, 0.01, 0.01, 1., 1., 1., 1.],
        ),
        (
            Activation::HardSwish,
            [0., 0.1666666667, 0.5, 0.8333333333, 1., 1., 1.],
        ),
    ];
    let smooth = [
        (
            Activation::Silu,
            [
                -0.08810410602,
                0.07232948813,
                0.5,
                0.9276705119,
                1.088104106,
            ],
        ),
        (
            Activation::Gelu,
            [-0.0119456472, -0.08331547059, 0.5, 1.083315471, 1.011945647],
        ),
        (
            Activation::GeluPytorchTanh,
            [
                -0.01158416663,
                -0.08296408385,
                0.5,
                1.082964084,
                1.011584167,
            ],
        ),
        (
            Activation::Mish,
            [-0.09339311453, 0.05921675588, 0.6, 1.04903622, 1.021106911],
        ),
    ];
    for path in PATHS {
        with_path(path, || {
            for (activation, want) in table {
                let [_, slopes] = values_and_slopes(activation, &at, DType::F64)?;
                assert_digits(&format!("{activation:?} {path:?}"), &slopes, &want);
            }
            for (activation, want) in smooth {
                let [_, slopes] = values_and_slopes(activation, &at[..5], DType::F64)?;
                assert_digits(&format!("{activation:?} {path:?}"), &slopes, &want);
            }
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

/// A value and its slope in f64 by the formulas of the documentation.
fn formula(activation: Activation, u: f64) -> [f64; 2] {
    let sigmoid = |u: f64| 1. / (1. + (-u).exp());
    match activation {
        Activation::Silu => {
            let s = sigmoid(u);
            [u * s, s * (1. + u * sigmoid(-u))]
        }
        Activation::Sigmoid => [sigmoid(u), sigmoid(u) * sigmoid(-u)],
        Activation::Gelu => {
            let below = candle_core::cpu::erf::erfc_f64(-u / 2f64.sqrt()) / 2.;
            let density = (-u * u / 2.).exp() / (2. * std::f64::consts::PI).sqrt();
            [u * below, below + u * density]
        }
        Activation::GeluPytorchTanh => {
            let c = (2. / std::f64::consts::PI).sqrt();
            let t = (c * (u + 0.044715 * u.powi(3))).tanh();
            let inner = c * (1. + 3. * 0.044715 * u * u);
            [
                u / 2. * (1. + t),
                (1. + t) / 2. + u / 2. * (1. - t * t) * inner,
            ]
        }
        Activation::Mish => {
            let softplus = u.max(0.) + (-u.abs()).exp().ln_1p();
            let t = softplus.tanh();
            [u * t, t + u * sigmoid(u) / softplus.cosh().powi(2)]
        }
        other => panic!("no formula for {other:?}"),
    }
}

#[test]
fn smooth_activations_are_those_of_their_formulas_over_a_wide_range() -> Result<()> {
    let at: Vec<f64> = (-2500..=2500).map(|i| f64::from(i) / 83.).collect();
    for activation in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluPytorchTanh,
        Activation::Sigmoid,
        Activation::Mish,
    ] {
        for path in PATHS {
            for (dtype, bound) in [(DType::F64, 2e-15), (DType::F32, 3e-7)] {
                let at = values(&tensor(&at, &[at.len()], dtype)?)?;
                let got = with_path(path, || values_and_slopes(activation, &at, dtype))?;
                for (i, u) in at.iter().enumerate() {
                    let want = formula(activation, *u);
                    for (j, want) in want.into_iter().enumerate() {
                        let error = (got[j][i] - want).abs();
                        // 1 − tanh² of the formula itself loses digits.
                        let bound = bound * (1. + u.abs());
                        assert!(
                            error <= bound * (1. + want.abs()),
                            "{activation:?} {path:?} {dtype:?} {j} at {u}: {} for {want}",
                            got[j][i]
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn large_and_special_values() -> Result<()> {
    for activation in ALL {
        for path in PATHS {
            for dtype in [DType::F64, DType::F32] {
                let at = [-1e30, -1e4, -120., 120., 1e4, 1e30];
                let [y, slopes] = with_path(path, || values_and_slopes(activation, &at, dtype))?;
                for (i, u) in at.into_iter().enumerate() {
                    let what = format!("{activation:?} {path:?} {dtype:?} at {u}");
                    assert!(
                        y[i].is_finite() && slopes[i].is_finite(),
                        "{what}: {y:?} {slopes:?}"
                    );
                    let top = match activation {
                        Activation::Relu6 => 6.,
                        Activation::Sigmoid => 1.,
                        Activation::LeakyRelu(slope) if u < 0. => slope * u,
                        _ if u < 0. => 0.,
                        _ => u,
                    };
                    let want = if u < 0. && top > 0. { 0. } else { top };
                    assert!(
                        (y[i] - want).abs() <= 1e-6 * (1. + want.abs()),
                        "{what}: {}",
                        y[i]
                    );
                }
                let [y, _] = with_path(path, || {
                    values_and_slopes(activation, &[f64::NAN, 1.], dtype)
                })?;
                assert!(y[0].is_nan() && y[1].is_finite(), "{activation:?} {path:?}");
            }
        }
    }
    Ok(())
}

/// A layer with an activation, by name.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Layer(bool),
    Rms,
    Group(usize),
    Instance(bool),
    Batch(bool),
    Frozen,
}

const KINDS: [Kind; 10] = [
    Kind::Layer(false),
    Kind::Layer(true),
    Kind::Rms,
    Kind::Group(1),
    Kind::Group(2),
    Kind::Instance(false),
    Kind::Instance(true),
    Kind::Batch(true),
    Kind::Batch(false),
    Kind::Frozen,
];

impl Kind {
    fn features(self, dims: &[usize]) -> usize {
        match self {
            Kind::Layer(false) | Kind::Rms => dims[dims.len() - 1],
            _ => dims[1],
        }
    }

    fn forward(
        self,
        x: &Tensor,
        affine: [Option<&Tensor>; 2],
        activation: Option<Activation>,
        modulation: Option<&Modulation>,
    ) -> Result<Tensor> {
        let c = self.features(x.dims());
        let mut named = std::collections::HashMap::new();
        for (name, value) in [("weight", affine[0]), ("bias", affine[1])] {
            if let Some(value) = value {
                named.insert(name.to_string(), value.clone());
            }
        }
        let state: Vec<f32> = (0..c).map(|i| 0.5 + 0.1 * i as f32).collect();
        for name in ["running_mean", "running_var"] {
            named.insert(name.to_string(), Tensor::new(state.as_slice(), &CPU)?);
        }
        let vb = candle_nn::VarBuilder::from_tensors(named, x.dtype(), &CPU);
        let affine = match affine {
            [None, None] => Affine::None,
            [Some(_), None] => Affine::Weight,
            [None, Some(_)] => Affine::Bias,
            [Some(_), Some(_)] => Affine::WeightAndBias,
        };
        macro_rules! call {
            ($norm:expr) => {
                match modulation {
                    None => $norm.forward(x),
                    Some(m) => $norm.forward_modulated_by(x, m),
                }
            };
            ($norm:expr, $train:expr) => {
                match modulation {
                    None => $norm.forward_t(x, $train),
                    Some(m) => $norm.forward_modulated_by_t(x, m, $train),
                }
            };
        }
        match self {
            Kind::Layer(channels_first) => {
                let options = LayerNormOptions {
                    affine,
                    channels_first,
                    activation,
                    ..Default::default()
                };
                call!(candle_norm::layer_norm(c, options, vb)?)
            }
            Kind::Rms => {
                let options = RmsNormOptions {
                    affine,
                    activation,
                    ..Default::default()
                };
                call!(candle_norm::rms_norm(c, options, vb)?)
            }
            Kind::Group(groups) => {
                let options = GroupNormOptions {
                    affine,
                    activation,
                    ..Default::default()
                };
                call!(candle_norm::group_norm(groups, c, options, vb)?)
            }
            Kind::Instance(given) => {
                let options = InstanceNormOptions {
                    affine,
                    track_running_stats: given,
                    activation,
                    ..Default::default()
                };
                call!(candle_norm::instance_norm(c, options, vb)?, !given)
            }
            Kind::Batch(_) | Kind::Frozen => {
                let options = BatchNormOptions {
                    affine,
                    activation,
                    ..Default::default()
                };
                let norm = candle_norm::batch_norm(c, options, vb)?;
                match self {
                    Kind::Batch(train) => call!(norm, train),
                    _ => call!(norm.frozen()?),
                }
            }
        }
    }
}

#[test]
fn gradients_agree_with_differences() -> Result<()> {
    let check = GradCheck {
        projections: Some(2),
        ..Default::default()
    };
    for kind in KINDS {
        for dims in [&[2usize, 4, 3][..], &[2, 4, 2, 9]] {
            for (i, activation) in ALL.into_iter().enumerate() {
                let c = kind.features(dims);
                let mut inputs = vec![uniform(dims, 1), uniform(c, 2), uniform(c, 3)];
                let modulated = i % 3 == 0;
                if modulated {
                    inputs.extend([uniform((2, c), 4), uniform((2, c), 5)]);
                }
                let f = |v: &[Tensor]| {
                    let modulation = Modulation::new(v.get(3), v.get(4));
                    let affine = [Some(&v[1]), Some(&v[2])];
                    let modulation = modulated.then_some(&modulation);
                    kind.forward(&v[0], affine, Some(activation), modulation)
                };
                for path in ON_THE_CPU {
                    let report = with_path(path, || check.check(f, &inputs))?;
                    assert!(
                        report.passed(),
                        "{kind:?} {dims:?} {activation:?} {path:?}: {report}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Values and gradients on every path and in every dtype are those of the plain norm in f64, and of
/// the activation by the reference.
fn agrees(kind: Kind, dims: &[usize], activation: Activation, affine: [bool; 2]) -> Result<()> {
    let c = kind.features(dims);
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let rounded = |t: Tensor, dtype: DType| -> Result<Tensor> {
            Ok(Var::from_tensor(&t.to_dtype(dtype)?)?.into_inner())
        };
        let x = rounded(ties(dims, 3)?, dtype)?;
        let weight = affine[0]
            .then(|| rounded(noise_by(c, |i| 5 * i * i)?, dtype))
            .transpose()?;
        let bias = affine[1]
            .then(|| rounded((noise_by(c, |i| 7 * i * i)? * 2.)?, dtype))
            .transpose()?;
        let dy = ties(dims, 13)?.to_dtype(dtype)?;
        let run = |x: &Tensor, w: Option<&Tensor>, b: Option<&Tensor>, dy: &Tensor| {
            let y = kind.forward(x, [w, b], Some(activation), None)?;
            let of: Vec<&Tensor> = [Some(x), w, b].into_iter().flatten().collect();
            let grads = gradients(&y, dy, &of)?;
            Ok::<_, candle_core::Error>((y, grads))
        };
        let wide = |t: &Tensor| rounded(t.clone(), DType::F64);
        let (w64, b64) = (
            weight.as_ref().map(wide).transpose()?,
            bias.as_ref().map(wide).transpose()?,
        );
        let (want, wants) = with_path(Path::Reference, || {
            run(
                &wide(&x)?,
                w64.as_ref(),
                b64.as_ref(),
                &dy.to_dtype(DType::F64)?,
            )
        })?;
        for path in PATHS {
            if path == Path::Emulated && x.elem_count() > MOST_EMULATED {
                continue;
            }
            let (y, grads) = with_path(path, || run(&x, weight.as_ref(), bias.as_ref(), &dy))?;
            let what = format!("{kind:?} {dims:?} {activation:?} {dtype:?} {path:?}");
            let bound = 4. * tolerance(dtype);
            assert_close(&format!("y of {what}"), &y, &values(&want)?, bound);
            for (j, (grad, want)) in grads.iter().zip(&wants).enumerate() {
                let grad = Tensor::new(grad.as_slice(), &CPU)?;
                assert_close(&format!("gradient {j} of {what}"), &grad, want, bound);
            }
        }
    }
    Ok(())
}

#[test]
fn every_layer_on_every_path_and_in_every_dtype() -> Result<()> {
    let smooth = [Activation::Silu, Activation::Gelu, Activation::Mish];
    for (i, kind) in KINDS.into_iter().enumerate() {
        for (j, activation) in smooth.into_iter().enumerate() {
            let affine = [(i + j) % 3 != 0, (i + j) % 2 != 0];
            agrees(kind, &[3, 6, 5], activation, affine)?;
            agrees(kind, &[2, 4, 5, 7], activation, affine)?;
        }
    }
    for (kind, dims) in [
        (Kind::Layer(false), &[5usize, 40, 33][..]),
        (Kind::Layer(false), &[2, 70_001]),
        (Kind::Group(2), &[3, 4, 40, 31]),
        (Kind::Group(1), &[1, 2, 70_001]),
        (Kind::Batch(true), &[5, 3, 40, 31]),
        (Kind::Batch(true), &[300, 7]),
        (Kind::Batch(true), &[2, 2, 70_001]),
    ] {
        agrees(kind, dims, Activation::Silu, [true, true])?;
    }
    Ok(())
}

#[test]
fn frozen_keeps_it_and_folding_refuses_it() -> Result<()> {
    let options = BatchNormOptions {
        activation: Some(Activation::HardSwish),
        ..Default::default()
    };
    let norm = candle_norm::batch_norm(3, options, vb(&VarMap::new(), DType::F64))?;
    let x = uniform((4, 3, 5), 1);
    norm.forward_t(&x, true)?;
    let frozen = norm.frozen()?;
    assert_eq!(frozen.activation(), Some(Activation::HardSwish));
    assert_eq!(
        values(&frozen.forward(&x)?)?,
        values(&norm.forward_t(&x, false)?)?
    );
    let linear = Linear::new(uniform((3, 2), 1), None);
    assert_message(
        frozen.fold_into(&linear),
        &[
            "BatchNorm",
            "HardSwish",
            "call the activation after the folded layer",
        ],
    );
    Ok(())
}

#[test]
fn a_sum_is_normalized_and_activated() -> Result<()> {
    let options = LayerNormOptions {
        activation: Some(Activation::Silu),
        ..Default::default()
    };
    let norm = candle_norm::layer_norm(8, options, vb(&VarMap::new(), DType::F64))?;
    let (x, residual) = (uniform((3, 8), 1), uniform((3, 8), 2));
    for path in PATHS {
        let (y, sum) = with_path(path, || norm.forward_add(&x, &residual))?;
        assert_eq!(values(&sum)?, values(&(&x + &residual)?)?);
        assert_digits("y", &values(&y)?, &values(&norm.forward(&sum)?)?);
        let f = |v: &[Tensor]| {
            let (y, sum) = norm.forward_add(&v[0], &v[1])?;
            y + sum
        };
        with_path(path, || gradcheck(f, &[x.clone(), residual.clone()]))?;
    }
    Ok(())
}

#[test]
fn others_are_refused_by_name() -> Result<()> {
    let vars = VarMap::new();
    for activation in [
        Activation::Relu2,
        Activation::Elu(1.),
        Activation::HardSigmoid,
        Activation::Swiglu,
    ] {
        let expected = &[
            "LayerNorm",
            "Relu, Relu6, LeakyRelu, Silu",
            &format!("{activation:?}"),
        ];
        let options = LayerNormOptions {
            activation: Some(activation),
            ..Default::default()
        };
        let norm = candle_norm::layer_norm(4, options, vb(&vars, DType::F64));
        assert_message(norm, expected);
        let options = GroupNormOptions {
            activation: Some(activation),
            ..Default::default()
        };
        let norm = candle_norm::group_norm(2, 4, options, vb(&vars, DType::F64));
        assert_message(norm, &["GroupNorm", "Mish"]);
        let x = uniform((2, 4, 3), 1);
        assert_message(
            ops::batch_norm_act(&x, None, None, 1e-5, activation),
            &["BatchNorm", "Mish"],
        );
    }
    let x = uniform((2, 4), 1);
    assert_message(
        ops::layer_norm_act(&x, 4, [None, None], 1e-5, Activation::LeakyRelu(f64::NAN)),
        &["LayerNorm", "slope", "NaN"],
    );
    Ok(())
}

#[test]
fn the_text_of_a_configuration_stays_as_it_is() -> Result<()> {
    let config: NormConfig = "group:2".parse()?;
    assert_eq!(config.to_string(), "group:2");
    Ok(())
}
