//! Scale and shift from outside: worked examples, gradients, every shape on every path, edges, and
//! what is refused.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Module, ModuleT, VarBuilder, VarMap};
use candle_norm::gradcheck::{GradCheck, gradcheck};
use candle_norm::ops::{self, Modulation};
use candle_norm::{
    Affine, BatchNormOptions, InstanceNormOptions, LayerNormOptions, Path, RmsNormOptions,
    with_path,
};

use testkit::compare::{assert_close, assert_digits, tolerance};
use testkit::data::{tensor, ties, uniform, values, variable};
use testkit::errors::assert_message;
use testkit::subjects::gradients;
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const PATHS: [Path; 4] = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];
/// The most elements on the emulator, which takes a microsecond for each.
const MOST_EMULATED: usize = 10_000;
/// Those that are fast enough for differences.
const ON_THE_CPU: [Path; 3] = [Path::Fused, Path::Composed, Path::Reference];

#[test]
fn a_layer_norm_of_two_samples() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = variable(
                &[1., 2., 4., 0., -1., 3., 2., 2., 5., 1., 0., -1.],
                &[2, 2, 3],
                DType::F64,
            )?;
            let scale = variable(&[0.5, -1., 0., 1., 0., 2.], &[2, 3], DType::F64)?;
            let shift = variable(&[0.1, 0.2, 0.3, 0., -0.1, 1.], &[2, 1, 3], DType::F64)?;
            let dy = tensor(
                &[1., 0., -2., 0.5, 1., 0., 0., 1., 1., -1., 2., 0.5],
                &[2, 2, 3],
                DType::F64,
            )?;
            let modulation = Modulation::new(Some(&scale), Some(&shift));
            let y = ops::modulated_layer_norm(&x, 3, [None, None], 1e-6, &modulation)?;
            let want = [
                -1.503566936,
                0.2,
                1.63630578,
                -0.4883483036,
                0.2,
                1.672812708,
                -1.414213209,
                -0.8071066044,
                5.242639626,
                2.449487906,
                -0.1,
                -2.674231859,
            ];
            assert_digits("y", &values(&y)?, &want);
            let grads = gradients(&y, &dy, &[&x, &scale, &shift])?;
            let want = [
                0.1145412809,
                -0.1718105468,
                0.05726926594,
                0.2715453787,
                -0.2036590086,
                -0.06788637014,
                -0.3535535968,
                0.3535530076,
                5.89255209e-7,
                -0.9185611796,
                1.837115929,
                -0.9185547497,
            ];
            assert_digits("dx", &grads[0], &want);
            let want = [
                -1.265160725,
                -0.980580506,
                -2.67261156,
                -1.224743953,
                -0.7071066044,
                0.8018412324,
            ];
            assert_digits("dscale", &grads[1], &want);
            assert_digits("dshift", &grads[2], &[1.5, 1., -2., -1., 3., 1.5]);

            let (w, b) = (
                tensor(&[2., 1., 0.5], &[3], DType::F64)?,
                tensor(&[0.1, 0., -0.1], &[3], DType::F64)?,
            );
            let y = ops::modulated_layer_norm(&x, 3, [Some(&w), Some(&b)], 1e-6, &modulation)?;
            let want = [
                -2.957133872,
                0.2,
                0.86815289,
                -0.9266966072,
                0.2,
                0.8864063542,
            ];
            assert_digits("y of an affine norm", &values(&y.get(0)?)?, &want);
            Ok::<(), candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn a_batch_norm_in_training() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = variable(&[1., 3., 2., -2.], &[2, 1, 2], DType::F64)?;
            let scale = variable(&[0.5, -0.5], &[2, 1], DType::F64)?;
            let shift = variable(&[0., 1.], &[2, 1], DType::F64)?;
            let dy = tensor(&[1., 0., -1., 2.], &[2, 1, 2], DType::F64)?;
            let options = BatchNormOptions {
                affine: Affine::None,
                ..Default::default()
            };
            let norm = candle_norm::batch_norm(1, options, vb(&VarMap::new(), DType::F64))?;
            let y = norm.forward_modulated_t(&x, Some(&scale), Some(&shift), true)?;
            let want = [0., 1.603565161, 1.26726086, 0.1982174197];
            assert_digits("y", &values(&y)?, &want);
            let grads = gradients(&y, &dy, &[&x, &scale, &shift])?;
            let want = [0.5345217202, -7.636002757e-7, -0.400891672, -0.1336292847];
            assert_digits("dx", &grads[0], &want);
            assert_digits("dscale", &grads[1], &[0., -3.741652042]);
            assert_digits("dshift", &grads[2], &[1., 1.]);
            // The statistics are those of x: a mean of 1 and an unbiased variance of 14/3.
            assert_digits("running mean", &values(norm.running_mean())?, &[0.1]);
            let want = 0.9 + 0.1 * 14. / 3.;
            assert_digits("running variance", &values(norm.running_var())?, &[want]);
            Ok::<(), candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn an_rms_norm_with_a_scale_alone() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = variable(&[1., 2., 2.], &[1, 3], DType::F64)?;
            let scale = variable(&[0.5, -1., 0.], &[3], DType::F64)?;
            let dy = tensor(&[1., 1., -1.], &[1, 3], DType::F64)?;
            let modulation = Modulation::new(Some(&scale), None);
            let y = ops::modulated_rms_norm(&x, 3, None, 1e-6, &modulation)?;
            assert_digits("y", &values(&y)?, &[0.8660252594, 0., 1.154700346]);
            let grads = gradients(&y, &dy, &[&x, &scale])?;
            let want = [0.8981002584, 0.06414999783, -0.5132001751];
            assert_digits("dx", &grads[0], &want);
            let want = [0.577350173, 1.154700346, -1.154700346];
            assert_digits("dscale", &grads[1], &want);
            Ok::<(), candle_core::Error>(())
        })?;
    }
    Ok(())
}

/// A norm of a tensor of these axes, whose features are last or on axis 1.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Layer { channels_first: bool },
    Rms { offset: f64 },
    Group(usize),
    Instance { given: bool },
    Batch { train: bool },
    Frozen,
    Alone { channels_first: bool },
}

const KINDS: [Kind; 12] = [
    Kind::Layer {
        channels_first: false,
    },
    Kind::Layer {
        channels_first: true,
    },
    Kind::Rms { offset: 0. },
    Kind::Rms { offset: 1. },
    Kind::Group(2),
    Kind::Instance { given: false },
    Kind::Instance { given: true },
    Kind::Batch { train: true },
    Kind::Batch { train: false },
    Kind::Frozen,
    Kind::Alone {
        channels_first: false,
    },
    Kind::Alone {
        channels_first: true,
    },
];

impl Kind {
    fn features_last(self) -> bool {
        matches!(
            self,
            Kind::Layer {
                channels_first: false
            } | Kind::Rms { .. }
                | Kind::Alone {
                    channels_first: false
                }
        )
    }

    /// A name, and shapes of scales for an input of these axes.
    fn shapes(self, dims: &[usize]) -> Vec<Vec<usize>> {
        let [n, rest @ ..] = dims else { return vec![] };
        let ones = vec![1; rest.len() - 1];
        let mut shapes = vec![dims.to_vec(), [&[1], rest].concat()];
        if self.features_last() {
            let c = rest[rest.len() - 1];
            shapes.extend([vec![c], vec![*n, c], vec![1, c]]);
            shapes.push([&[*n], &ones[..], &[c]].concat());
        } else {
            let c = rest[0];
            shapes.extend([vec![c], vec![*n, c], vec![1, c]]);
            shapes.push([&[*n, c], &ones[..]].concat());
        }
        shapes
    }

    /// The axis of the features.
    fn features(self, dims: &[usize]) -> usize {
        match self.features_last() {
            true => dims[dims.len() - 1],
            false => dims[1],
        }
    }

    /// The norm of `x`, with an affine pair if there is one, built by the public layer.
    fn forward(
        self,
        x: &Tensor,
        affine: Option<[&Tensor; 2]>,
        modulation: &Modulation,
    ) -> Result<Tensor> {
        let c = self.features(x.dims());
        let mut named = std::collections::HashMap::new();
        if let Some([weight, bias]) = affine {
            named.insert("weight".to_string(), weight.clone());
            named.insert("bias".to_string(), bias.clone());
        }
        let state: Vec<f32> = (0..c).map(|i| 0.5 + 0.1 * i as f32).collect();
        for name in ["running_mean", "running_var"] {
            named.insert(name.to_string(), Tensor::new(state.as_slice(), &CPU)?);
        }
        let dtype = affine.map_or(x.dtype(), |[w, _]| w.dtype());
        let vb = VarBuilder::from_tensors(named, dtype, &CPU);
        let has = match affine {
            Some(_) => Affine::WeightAndBias,
            None => Affine::None,
        };
        match self {
            Kind::Layer { channels_first } => {
                let options = LayerNormOptions {
                    affine: has,
                    channels_first,
                    ..Default::default()
                };
                candle_norm::layer_norm(c, options, vb)?.forward_modulated_by(x, modulation)
            }
            Kind::Rms { offset } => {
                let options = RmsNormOptions {
                    affine: has,
                    offset,
                    ..Default::default()
                };
                candle_norm::rms_norm(c, options, vb)?.forward_modulated_by(x, modulation)
            }
            Kind::Group(groups) => {
                let options = candle_norm::GroupNormOptions {
                    affine: has,
                    ..Default::default()
                };
                candle_norm::group_norm(groups, c, options, vb)?.forward_modulated_by(x, modulation)
            }
            Kind::Instance { given } => {
                let options = InstanceNormOptions {
                    affine: has,
                    track_running_stats: given,
                    ..Default::default()
                };
                let norm = candle_norm::instance_norm(c, options, vb)?;
                norm.forward_modulated_by_t(x, modulation, !given)
            }
            Kind::Batch { .. } | Kind::Frozen => {
                let options = BatchNormOptions {
                    affine: has,
                    ..Default::default()
                };
                let norm = candle_norm::batch_norm(c, options, vb)?;
                match self {
                    Kind::Batch { train } => norm.forward_modulated_by_t(x, modulation, train),
                    _ => norm.frozen()?.forward_modulated_by(x, modulation),
                }
            }
            Kind::Alone { channels_first } => {
                // The affine pair of no norm: a modulation before this one.
                let x = match affine {
                    Some([weight, bias]) => {
                        let own = Modulation::new(Some(weight), Some(bias)).with_offset(0.);
                        ops::modulate(x, &own, channels_first)?
                    }
                    None => x.clone(),
                };
                ops::modulate(&x, modulation, channels_first)
            }
        }
    }

    /// The same by the norm alone and candle's own product and sum.
    fn plainly(
        self,
        x: &Tensor,
        affine: Option<[&Tensor; 2]>,
        modulation: &Modulation,
    ) -> Result<Tensor> {
        let y = self.forward(x, affine, &Modulation::default())?;
        let spread = |value: &Tensor| -> Result<Tensor> {
            let (c, rank) = (self.features(x.dims()), x.rank());
            let batch = value.elem_count() / c;
            let dims = match value.rank() {
                1 | 2 if value.dims() != x.dims() => {
                    let mut dims = vec![1; rank];
                    dims[if self.features_last() { rank - 1 } else { 1 }] = c;
                    dims[0] = batch.max(dims[0]);
                    dims
                }
                _ => value.dims().to_vec(),
            };
            value.reshape(dims)?.broadcast_as(x.shape())
        };
        let scaled = match modulation.scale {
            Some(scale) => (y * (spread(scale)? + modulation.offset)?)?,
            // candle drops gradients where a tensor is multiplied by the number 0.
            None => (&y * y.ones_like()?.affine(modulation.offset, 0.)?)?,
        };
        match modulation.shift {
            Some(shift) => scaled + spread(shift)?,
            None => Ok(scaled),
        }
    }
}

/// Shapes of scale and shift, as far as there are any.
fn pairs(shapes: &[Vec<usize>]) -> Vec<[Option<Vec<usize>>; 2]> {
    let mut pairs = vec![[None, None]];
    for (i, shape) in shapes.iter().enumerate() {
        let next = &shapes[(i + 1) % shapes.len()];
        pairs.push([Some(shape.clone()), Some(shape.clone())]);
        pairs.push([Some(shape.clone()), Some(next.clone())]);
        pairs.push([Some(shape.clone()), None]);
        pairs.push([None, Some(shape.clone())]);
    }
    pairs
}

#[test]
fn gradients_agree_with_differences() -> Result<()> {
    let check = GradCheck {
        projections: Some(2),
        ..Default::default()
    };
    for kind in KINDS {
        for dims in [&[2usize, 4, 3][..], &[2, 4, 2, 2]] {
            let c = kind.features(dims);
            for (i, [scale, shift]) in pairs(&kind.shapes(dims)).into_iter().enumerate() {
                let mut inputs = vec![uniform(dims, 1)];
                let outside = [&scale, &shift].into_iter().flatten().enumerate();
                inputs.extend(outside.map(|(i, dims)| uniform(dims.as_slice(), 2 + i as u64)));
                let with_affine = i % 2 == 0;
                if with_affine {
                    inputs.extend([uniform(c, 4), uniform(c, 5)]);
                }
                let offset = (i % 3) as f64 - 1.;
                let f = |v: &[Tensor]| {
                    let mut v = v.iter();
                    let x = v.next().expect("an input");
                    let scale = scale.as_ref().and_then(|_| v.next());
                    let shift = shift.as_ref().and_then(|_| v.next());
                    let modulation = Modulation::new(scale, shift).with_offset(offset);
                    let affine = v.next().zip(v.next()).map(|(w, b)| [w, b]);
                    kind.forward(x, affine, &modulation)
                };
                if scale.is_none() && shift.is_none() && offset == 0. {
                    continue;
                }
                for path in ON_THE_CPU {
                    let report = with_path(path, || check.check(f, &inputs))?;
                    let what = format!("{kind:?} {dims:?} {scale:?} {shift:?} {path:?}");
                    assert!(report.passed(), "{what}: {report}");
                }
            }
        }
    }
    Ok(())
}

/// Values and gradients on every path and in every dtype are those of the norm followed by candle's
/// own product and sum in f64.
fn agrees(kind: Kind, dims: &[usize], every: usize) -> Result<()> {
    let c = kind.features(dims);
    let all = pairs(&kind.shapes(dims));
    for (i, [scale, shift]) in all.into_iter().enumerate().skip(1).step_by(every) {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let rounded = |t: Tensor| -> Result<Tensor> {
                Ok(Var::from_tensor(&t.to_dtype(dtype)?)?.into_inner())
            };
            let x = rounded(ties(dims, 3)?)?;
            let outside = |dims: &Option<Vec<usize>>, step| {
                dims.as_ref()
                    .map(|dims| rounded(ties(dims.as_slice(), step)?))
                    .transpose()
            };
            let (scale, shift) = (outside(&scale, 5)?, outside(&shift, 7)?);
            let affine = match i % 2 {
                0 => Some([rounded(ties(&[c], 9)?)?, rounded(ties(&[c], 11)?)?]),
                _ => None,
            };
            let offset = (i % 3) as f64 / 2.;
            let dy = ties(dims, 13)?.to_dtype(dtype)?;
            let run = |x: &Tensor, v: &[Option<Tensor>], dy: &Tensor, is_plain: bool| {
                let modulation = Modulation::new(v[0].as_ref(), v[1].as_ref());
                let modulation = modulation.with_offset(offset);
                let affine = v[2].as_ref().zip(v[3].as_ref()).map(|(w, b)| [w, b]);
                let y = match is_plain {
                    true => kind.plainly(x, affine, &modulation)?,
                    false => kind.forward(x, affine, &modulation)?,
                };
                let tracked: Vec<&Tensor> = [x].into_iter().chain(v.iter().flatten()).collect();
                let grads = gradients(&y, dy, &tracked)?;
                Ok::<_, candle_core::Error>((y, grads))
            };
            let (weight, bias) = affine.map(|[w, b]| (w, b)).unzip();
            let params = [scale, shift, weight, bias];
            let wide = |t: &Tensor| -> Result<Tensor> {
                Ok(Var::from_tensor(&t.to_dtype(DType::F64)?)?.into_inner())
            };
            let wide_params = params
                .iter()
                .map(|p| p.as_ref().map(wide).transpose())
                .collect::<Result<Vec<_>>>()?;
            let (want, wants) = with_path(Path::Composed, || {
                run(&wide(&x)?, &wide_params, &dy.to_dtype(DType::F64)?, true)
            })?;
            for path in PATHS {
                if path == Path::Emulated && x.elem_count() > MOST_EMULATED {
                    continue;
                }
                let (y, grads) = with_path(path, || run(&x, &params, &dy, false))?;
                let what = format!("{kind:?} {dims:?} case {i} {dtype:?} {path:?}");
                let bound = 4. * tolerance(dtype);
                assert_close(&format!("y of {what}"), &y, &values(&want)?, bound);
                for (j, (grad, want)) in grads.iter().zip(&wants).enumerate() {
                    let grad = Tensor::new(grad.as_slice(), &CPU)?;
                    assert_close(&format!("gradient {j} of {what}"), &grad, want, bound);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_shape_on_every_path_and_in_every_dtype() -> Result<()> {
    for kind in KINDS {
        agrees(kind, &[3, 6, 5], 1)?;
        agrees(kind, &[2, 4, 5, 7], 3)?;
    }
    Ok(())
}

#[test]
fn long_and_many_rows() -> Result<()> {
    let layer = KINDS[0];
    // One sample in several blocks, several samples in one, and rows that are divided.
    agrees(layer, &[2, 200, 48], 5)?;
    agrees(layer, &[70, 3, 33], 5)?;
    agrees(KINDS[4], &[5, 6, 40, 31], 5)?;
    agrees(KINDS[7], &[5, 6, 40, 31], 5)?;
    for (kind, dims) in [(layer, [1, 2, 70_001]), (KINDS[4], [1, 2, 70_001])] {
        agrees(kind, &dims, 7)?;
    }
    Ok(())
}

#[test]
fn two_axes_at_once() -> Result<()> {
    let x = uniform((3, 2, 4, 5), 1);
    let shapes: [&[usize]; 5] = [
        &[4, 5],
        &[3, 4, 5],
        &[3, 1, 4, 5],
        &[1, 2, 4, 5],
        &[3, 2, 4, 5],
    ];
    for dims in shapes {
        let scale = uniform(dims, 2);
        let f = |v: &[Tensor]| {
            let modulation = Modulation::new(Some(&v[1]), Some(&v[1]));
            ops::modulated_layer_norm(&v[0], (4, 5), [None, None], 1e-5, &modulation)
        };
        gradcheck(f, &[x.clone(), scale.clone()])?;
        let alone = ops::layer_norm(&x, (4, 5), None, None, 1e-5)?;
        let lead = match dims.len() {
            2 => scale.reshape((1, 1, 4, 5))?,
            3 => scale.reshape((3, 1, 4, 5))?,
            _ => scale.clone(),
        };
        let want = alone.broadcast_mul(&(&lead + 1.)?)?.broadcast_add(&lead)?;
        assert_digits("y", &values(&f(&[x.clone(), scale])?)?, &values(&want)?);
    }
    Ok(())
}

#[test]
fn frozen_statistics_of_features_on_the_last_axis() -> Result<()> {
    let (x, c) = (uniform((3, 2, 5, 4), 1), 4);
    let vars = VarMap::new();
    let norm = "batch"
        .parse::<candle_norm::NormConfig>()?
        .features(c, vb(&vars, DType::F64))?;
    norm.forward_t(&x, true)?;
    let frozen = norm.frozen()?;
    let y = frozen.forward(&x)?;
    for dims in [&[4usize][..], &[3, 4], &[3, 1, 1, 4], &[3, 2, 5, 4]] {
        let scale = uniform(dims, 2);
        let spread = match dims.len() {
            2 => scale.reshape((3, 1, 1, 4))?,
            _ => scale.clone(),
        };
        let want = y.broadcast_mul(&(spread + 1.)?)?;
        let got = frozen.forward_modulated(&x, Some(&scale), None)?;
        assert_digits("y", &values(&got)?, &values(&want)?);
    }
    Ok(())
}

#[test]
fn a_scale_of_minus_the_offset_leaves_the_shift() -> Result<()> {
    for path in PATHS {
        with_path(path, || {
            let x = Var::from_tensor(&uniform((2, 3, 4), 1))?.into_inner();
            let (scale, shift) = (tensor(&[-1.; 8], &[2, 4], DType::F64)?, uniform((2, 4), 2));
            let modulation = Modulation::new(Some(&scale), Some(&shift));
            let y = ops::modulated_layer_norm(&x, 4, [None, None], 1e-5, &modulation)?;
            let want = shift.unsqueeze(1)?.broadcast_as((2, 3, 4))?;
            assert_eq!(values(&y)?, values(&want)?);
            let dx = &gradients(&y, &uniform((2, 3, 4), 3), &[&x])?[0];
            assert!(dx.iter().all(|v| *v == 0.), "{dx:?}");
            Ok::<_, candle_core::Error>(())
        })?;
    }
    Ok(())
}

#[test]
fn nan_in_a_scale_stays_in_its_sample() -> Result<()> {
    for path in PATHS {
        for kind in [KINDS[0], KINDS[4], KINDS[5]] {
            let x = Var::from_tensor(&uniform((3, 4, 4), 1))?.into_inner();
            let mut scale = vec![0.5; 12];
            scale[5] = f64::NAN;
            let scale = variable(&scale, &[3, 4], DType::F64)?;
            let y = with_path(path, || {
                kind.forward(&x, None, &Modulation::new(Some(&scale), None))
            })?;
            let dx = &gradients(&y, &uniform((3, 4, 4), 3), &[&x])?[0];
            for (i, (y, dx)) in values(&y)?.iter().zip(dx).enumerate() {
                if i / 16 != 1 {
                    assert!(y.is_finite() && dx.is_finite(), "{kind:?} {path:?} {i}");
                }
            }
            assert!(values(&y)?[16..32].iter().any(|y| y.is_nan()));
        }
    }
    Ok(())
}

#[test]
fn without_elements_the_gradients_are_zero() -> Result<()> {
    for path in PATHS {
        for (kind, dims, scale) in [
            (KINDS[0], [0, 3, 4], [0, 4]),
            (KINDS[0], [2, 0, 4], [2, 4]),
            (KINDS[4], [2, 4, 0], [2, 4]),
            (KINDS[7], [0, 4, 3], [0, 4]),
            (KINDS[10], [2, 0, 4], [2, 4]),
        ] {
            let x = Var::zeros(&dims, DType::F64, &CPU)?.into_inner();
            let scale = Var::ones(&scale, DType::F64, &CPU)?.into_inner();
            let shift = Var::ones(4, DType::F64, &CPU)?.into_inner();
            let modulation = Modulation::new(Some(&scale), Some(&shift));
            let y = with_path(path, || kind.forward(&x, None, &modulation))?;
            assert_eq!(y.dims(), dims);
            let grads = y.sum_all()?.backward()?;
            let grad = values(grads.get(&shift).expect("a gradient"))?;
            assert!(grad.iter().all(|g| *g == 0.), "{kind:?} {dims:?}");
        }
    }
    Ok(())
}

#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    let x = uniform((2, 5, 64), 1).to_dtype(DType::BF16)?;
    let scale = uniform((2, 64), 2).to_dtype(DType::BF16)?;
    let shift = uniform((2, 64), 3);
    let f32 = shift.to_dtype(DType::F32)?;
    for path in PATHS {
        // A shift of another float type than the scale.
        let modulation = Modulation::new(Some(&scale), Some(&f32));
        let y = with_path(path, || {
            ops::modulated_rms_norm(&x, 64, None, 1e-6, &modulation)
        })?;
        let (x, scale) = (x.to_dtype(DType::F64)?, scale.to_dtype(DType::F64)?);
        let shift = f32.to_dtype(DType::F64)?;
        let modulation = Modulation::new(Some(&scale), Some(&shift));
        let want = ops::modulated_rms_norm(&x, 64, None, 1e-6, &modulation)?;
        let want = want.to_dtype(DType::F32)?.to_dtype(DType::BF16)?;
        let same = values(&y)?
            .iter()
            .zip(values(&want)?)
            .filter(|(got, want)| **got == *want)
            .count();
        // Values between two numbers of the type may fall to either by the last bit of f32.
        assert!(same >= 638, "{path:?}: {same} of 640");
    }
    Ok(())
}

#[test]
fn a_style_in_place_of_the_own_statistics() -> Result<()> {
    let check = |content: &[usize], style: &[usize]| -> Result<()> {
        let inputs = [uniform(content, 1), uniform(style, 2)];
        for path in PATHS {
            with_path(path, || {
                gradcheck(|v| ops::adain(&v[0], &v[1], 1e-5), &inputs)
            })?;
        }
        let y = ops::adain(&inputs[0], &inputs[1], 1e-12)?;
        // Means and variances are those of the style.
        let moments = |t: &Tensor| -> Result<[Tensor; 2]> {
            let planes = t.flatten_from(2)?;
            let mean = planes.mean_keepdim(2)?;
            let var = planes.broadcast_sub(&mean)?.sqr()?.mean_keepdim(2)?;
            Ok([mean, var])
        };
        for (got, want) in moments(&y)?.iter().zip(moments(&inputs[1])?) {
            let want = want.broadcast_as(got.shape())?;
            assert_digits("moments", &values(got)?, &values(&want)?);
        }
        Ok(())
    };
    check(&[2, 3, 4, 2], &[2, 3, 5])?;
    check(&[2, 3, 6], &[1, 3, 2, 2])
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() -> Result<()> {
    let x = uniform((3, 4, 5), 1);
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F64, &CPU);
    let norm = |scale: &Tensor| {
        let modulation = Modulation::new(Some(scale), None);
        ops::modulated_layer_norm(&x, 5, [None, None], 1e-5, &modulation)
    };
    for dims in [
        &[4usize][..],
        &[2, 5],
        &[3, 4],
        &[3, 2, 5],
        &[3, 4, 1],
        &[1, 1, 1, 5],
        &[],
    ] {
        assert_message(
            norm(&zeros(dims)?),
            &[
                "LayerNorm",
                "scale",
                "[5]",
                "[3, 5]",
                "[3, 4, 5]",
                &format!("{dims:?}"),
            ],
        );
    }
    assert_message(
        norm(&zeros(&[5])?.to_dtype(DType::F32)?),
        &["LayerNorm", "scale", "F64", "F32"],
    );
    assert_message(
        norm(&zeros(&[5])?.to_dtype(DType::U8)?),
        &["LayerNorm", "scale", "U8"],
    );
    let scale = zeros(&[5])?;
    let infinite = Modulation::new(Some(&scale), None).with_offset(f64::INFINITY);
    let y = ops::modulated_layer_norm(&x, 5, [None, None], 1e-5, &infinite);
    assert_message(y, &["LayerNorm", "offset", "inf"]);

    let vars = VarMap::new();
    let norm = candle_norm::batch_norm(4, 1e-5, vb(&vars, DType::F64))?;
    let shift = zeros(&[3, 5])?;
    let y = norm.forward_modulated_t(&x, None, Some(&shift), true);
    assert_message(y, &["BatchNorm", "shift", "[4]", "[3, 4]", "[3, 5]"]);
    assert_eq!(values(norm.running_mean())?, [0.; 4]);
    assert_eq!(
        norm.running_stats()
            .expect("statistics")
            .snapshot()?
            .num_batches_tracked,
        0
    );
    assert_message(
        ops::modulate(&Tensor::new(1f64, &CPU)?, &Modulation::default(), false),
        &["modulate", "[*, C]"],
    );
    assert_message(
        ops::adain(&x, &uniform((3, 5, 5), 1), 1e-5),
        &["AdaIN", "[3, 4, ...]", "[3, 5, 5]"],
    );
    assert_message(
        ops::adain(&x, &uniform((3, 4, 1), 1), 1e-5),
        &["AdaIN", "1"],
    );
    Ok(())
}
