//! The other forms of a layer compute what it does: baked weight norm, frozen statistics, norms
//! folded into the layer before.

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{
    Conv1d, Conv1dConfig, Conv2d, Conv2dConfig, ConvTranspose1d, ConvTranspose1dConfig,
    ConvTranspose2d, ConvTranspose2dConfig, Linear, VarBuilder, VarMap,
};
use candle_norm::weight_norm::{self, WeightNorm, Weighted};
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, Foldable, InstanceNormOptions, batch_norm, instance_norm,
};
use proptest::prelude::*;

use super::{FLOATS, config};
use testkit::compare::{assert_close, assert_near, assert_same_bits, tolerance};
use testkit::data::{Draw, tensor, values, variable};
use testkit::oracle::along;
use testkit::subjects::{backward, gradient};

/// Sets every float variable of a model to numbers as a trained one has them; variances are
/// positive.
fn randomize(vars: &VarMap, draw: &mut Draw) -> Result<()> {
    let data = vars.data().lock().expect("no panic while it was held");
    let mut named: Vec<(&String, &Var)> = data.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (name, var) in named {
        if var.dtype().is_int() {
            continue;
        }
        let mut numbers = draw.normal(var.elem_count());
        if name.ends_with("running_var") {
            numbers.iter_mut().for_each(|v| *v = 0.1 + *v * *v);
        }
        var.set(&tensor(&numbers, var.dims(), var.dtype())?)?;
    }
    Ok(())
}

fn random<L>(
    dtype: DType,
    seed: u64,
    build: impl FnOnce(VarBuilder) -> Result<L>,
) -> Result<(L, VarMap)> {
    let vars = VarMap::new();
    let layer = build(VarBuilder::from_varmap(&vars, dtype, &Device::Cpu))?;
    randomize(&vars, &mut Draw::new(seed))?;
    Ok((layer, vars))
}

/// How a plain layer shows its weight and its bias.
type Parts<L> = (fn(&L) -> &Tensor, fn(&L) -> Option<&Tensor>);

/// A baked layer is candle's own: the same weight to the bit, the same output up to the order of
/// its sums.
fn check_baked<L: Weighted + Module>(
    layer: &WeightNorm<L>,
    (weight, bias): Parts<L>,
    x: &Tensor,
) -> Result<()> {
    let baked = layer.bake()?;
    assert_same_bits("weight", weight(&baked), &layer.weight()?);
    assert!(
        !weight(&baked).track_op(),
        "a baked weight leads back to g and v"
    );
    match (bias(&baked), layer.bias()) {
        (Some(a), Some(b)) => assert_same_bits("bias", a, b),
        (a, b) => assert_eq!(a.is_some(), b.is_some()),
    }
    let (y, want) = (layer.forward(x)?, baked.forward(x)?);
    assert!(y.is_contiguous());
    assert_eq!(y.dims(), want.dims());
    assert_close(
        &format!("{:?}", x.dims()),
        &y,
        &values(&want)?,
        2. * tolerance(x.dtype()),
    );

    // And back: a layer made from the plain one computes what that does.
    let again = WeightNorm::from_layer(&baked, layer.dim().into())?;
    let weight = values(&layer.weight()?)?;
    assert_close(
        "weight made again",
        &again.weight()?,
        &weight,
        tolerance(x.dtype()),
    );
    Ok(())
}

/// The geometry of a convolution along one axis or two, on which candle's own forward is right.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    batch: usize,
    size: usize,
    /// In and out, for each group.
    channels: (usize, usize),
    groups: usize,
    kernel: usize,
    padding: usize,
    output_padding: usize,
    stride: usize,
    dilation: usize,
}

fn geometries() -> impl Strategy<Value = Geometry> {
    (
        (1usize..4, 5usize..12),
        (1usize..4, 1usize..4),
        1usize..4,
        1usize..4,
        (0usize..3, 0usize..3),
        (1usize..4, 1usize..3),
    )
        .prop_map(
            |((batch, size), channels, groups, kernel, paddings, (stride, dilation))| Geometry {
                batch,
                size,
                channels,
                groups,
                kernel,
                padding: paddings.0,
                output_padding: paddings.1.min(stride.max(dilation) - 1),
                stride,
                dilation,
            },
        )
}

impl Geometry {
    fn inputs(&self) -> usize {
        self.channels.0 * self.groups
    }

    fn outputs(&self) -> usize {
        self.channels.1 * self.groups
    }

    fn conv1d(&self) -> Conv1dConfig {
        Conv1dConfig {
            padding: self.padding,
            stride: self.stride,
            dilation: self.dilation,
            groups: self.groups,
            ..Default::default()
        }
    }

    fn conv2d(&self) -> Conv2dConfig {
        Conv2dConfig {
            padding: self.padding,
            stride: self.stride,
            dilation: self.dilation,
            groups: self.groups,
            ..Default::default()
        }
    }

    fn input(&self, axes: usize, dtype: DType, seed: u64) -> Tensor {
        let mut dims = vec![self.batch, self.inputs(), self.size];
        if axes == 2 {
            dims.push(self.size + 2);
        }
        tensor(
            &Draw::new(!seed).normal(dims.iter().product()),
            &dims,
            dtype,
        )
        .unwrap()
    }
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn baked_linear_layers_are_the_originals(
        (rows, inputs, outputs) in (1usize..6, 1usize..9, 1usize..9),
        dim in prop::sample::select(vec![None, Some(0), Some(1)]),
        bias in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        seed in any::<u64>(),
    ) {
        let (layer, _vars) = random(dtype, seed, |vb| match bias {
            true => weight_norm::linear(inputs, outputs, dim.into(), vb),
            false => weight_norm::linear_no_bias(inputs, outputs, dim.into(), vb),
        }).unwrap();
        let x = Draw::new(!seed).normal(2 * rows * inputs);
        let x = tensor(&x, &[2, rows, inputs], dtype).unwrap();
        check_baked(&layer, (Linear::weight, Linear::bias), &x).unwrap();
    }

    #[test]
    fn baked_convolutions_are_the_originals(
        g in geometries(),
        dim in prop::sample::select(vec![None, Some(0), Some(1), Some(2)]),
        bias in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        seed in any::<u64>(),
    ) {
        let (inputs, outputs, kernel) = (g.inputs(), g.outputs(), g.kernel);
        let (layer, _vars) = random(dtype, seed, |vb| match bias {
            true => weight_norm::conv1d(inputs, outputs, kernel, g.conv1d(), dim.into(), vb),
            false => {
                weight_norm::conv1d_no_bias(inputs, outputs, kernel, g.conv1d(), dim.into(), vb)
            }
        }).unwrap();
        check_baked(&layer, (Conv1d::weight, Conv1d::bias), &g.input(1, dtype, seed)).unwrap();

        let (layer, _vars) = random(dtype, seed, |vb| match bias {
            true => weight_norm::conv2d(inputs, outputs, kernel, g.conv2d(), dim.into(), vb),
            false => {
                weight_norm::conv2d_no_bias(inputs, outputs, kernel, g.conv2d(), dim.into(), vb)
            }
        }).unwrap();
        check_baked(&layer, (Conv2d::weight, Conv2d::bias), &g.input(2, dtype, seed)).unwrap();
    }

    #[test]
    fn baked_transposed_convolutions_are_the_originals(
        g in geometries(),
        dim in prop::sample::select(vec![None, Some(0), Some(1), Some(2)]),
        bias in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        seed in any::<u64>(),
    ) {
        // Without padding, candle's one-dimensional one mixes up the samples of a batch.
        let batch = if g.padding == 0 { 1 } else { g.batch };
        let g = Geometry { batch, ..g };
        let config = ConvTranspose1dConfig {
            padding: g.padding,
            output_padding: g.output_padding,
            stride: g.stride,
            dilation: g.dilation,
            groups: g.groups,
        };
        let (inputs, outputs, kernel) = (g.inputs(), g.outputs(), g.kernel);
        let (layer, _vars) = random(dtype, seed, |vb| match bias {
            true => weight_norm::conv_transpose1d(inputs, outputs, kernel, config, dim.into(), vb),
            false => weight_norm::conv_transpose1d_no_bias(
                inputs, outputs, kernel, config, dim.into(), vb,
            ),
        }).unwrap();
        let parts = (ConvTranspose1d::weight as _, ConvTranspose1d::bias as _);
        check_baked(&layer, parts, &g.input(1, dtype, seed)).unwrap();

        let g = Geometry { groups: 1, ..g };
        let config = ConvTranspose2dConfig {
            padding: g.padding,
            output_padding: g.output_padding,
            stride: g.stride,
            dilation: g.dilation,
        };
        let (inputs, outputs) = (g.inputs(), g.outputs());
        let (layer, _vars) = random(dtype, seed, |vb| match bias {
            true => weight_norm::conv_transpose2d(inputs, outputs, kernel, config, dim.into(), vb),
            false => weight_norm::conv_transpose2d_no_bias(
                inputs, outputs, kernel, config, dim.into(), vb,
            ),
        }).unwrap();
        let parts = (ConvTranspose2d::weight as _, ConvTranspose2d::bias as _);
        check_baked(&layer, parts, &g.input(2, dtype, seed)).unwrap();
    }
}

/// Every combination of affine parameters.
fn affines() -> impl Strategy<Value = Affine> {
    prop::sample::select(vec![
        Affine::None,
        Affine::Weight,
        Affine::Bias,
        Affine::WeightAndBias,
    ])
}

proptest! {
    #![proptest_config(config(80))]

    /// Frozen statistics are those of inference; the affine parameters stay those of the layer.
    #[test]
    fn frozen_layers_are_the_originals_in_inference(
        (n, c, space) in (1usize..4, 1usize..6, 2usize..9),
        affine in affines(),
        instance in any::<bool>(),
        dtype in prop::sample::select(&FLOATS[..]),
        seed in any::<u64>(),
    ) {
        let (layer, frozen, stats, vars): (Box<dyn ModuleT>, _, _, _) = if instance {
            let options = InstanceNormOptions {
                affine,
                track_running_stats: true,
                ..Default::default()
            };
            let (layer, vars) = random(dtype, seed, |vb| instance_norm(c, options, vb)).unwrap();
            let frozen = layer.frozen().unwrap();
            let stats = layer.running_stats().cloned();
            (Box::new(layer), frozen, stats, vars)
        } else {
            let options = BatchNormOptions { affine, ..Default::default() };
            let (layer, vars) = random(dtype, seed, |vb| batch_norm(c, options, vb)).unwrap();
            let frozen = layer.frozen().unwrap();
            let stats = layer.running_stats().cloned();
            (Box::new(layer), frozen, stats, vars)
        };
        let dims = [n, c, space];
        let mut draw = Draw::new(!seed);
        let numbers = draw.normal(n * c * space);
        let dy = tensor(&draw.normal(n * c * space), &dims, dtype).unwrap();
        let run = |layer: &dyn Fn(&Tensor) -> Result<Tensor>| {
            let x = variable(&numbers, &dims, dtype).unwrap();
            let y = layer(&x).unwrap();
            let grads = backward(&y, &dy).unwrap();
            let mut all = vec![gradient(&grads, &x)];
            for name in ["weight", "bias"] {
                if let Some(var) = vars.data().lock().unwrap().get(name) {
                    all.push(gradient(&grads, var));
                }
            }
            all.push(y);
            all
        };
        let originals = run(&|x| layer.forward_t(x, false));
        for (a, b) in run(&|x| frozen.forward(x)).iter().zip(&originals) {
            assert_same_bits("frozen", a, b);
        }

        // Training moves the layer on, but not the frozen one; a step of the optimizer reaches
        // both.
        let x = tensor(&numbers, &dims, dtype).unwrap();
        layer.forward_t(&x, true).unwrap();
        let last = &originals[originals.len() - 1];
        assert_same_bits("after training", &frozen.forward(&x).unwrap(), last);
        let moved = stats.unwrap().snapshot().unwrap();
        prop_assert_ne!(values(&moved.var).unwrap(), values(frozen.running_var()).unwrap());
        if affine.has_weight() {
            let weight = vars.data().lock().unwrap()["weight"].clone();
            weight.set(&weight.zeros_like().unwrap().detach()).unwrap();
            let bias = match frozen.bias() {
                Some(b) => values(b).unwrap(),
                None => vec![0.; c],
            };
            let y = values(&frozen.forward(&x).unwrap()).unwrap();
            let want: Vec<f64> = along(&dims, &[1]).into_iter().map(|c| bias[c]).collect();
            prop_assert_eq!(y, want);
        }
    }
}

/// Asserts that `layer` folded with `norm` is `layer` and then `norm`.
fn check_folded<L: Foldable + Module>(layer: &L, norm: &BatchNorm, x: &Tensor) -> Result<()> {
    let folded = norm.fold_into(layer)?;
    let frozen = norm.frozen()?.fold_into(layer)?;
    assert_same_bits("weight", folded.weight(), frozen.weight());

    let dtype = x.dtype();
    let want = norm.forward_t(&layer.forward(x)?, false)?;
    let y = folded.forward(x)?;
    assert_eq!(y.dtype(), dtype);
    assert!(!y.track_op(), "a folded layer leads back to parameters");
    // s·(W·x + b − mean) + bias: what adds up to an output may be larger than it.
    let size = |t: Option<&Tensor>| t.map_or(Ok(0.), |t| values(t).map(|v| largest(&v)));
    let scale = largest(
        &values(norm.running_var())?
            .iter()
            .map(|v| 1. / v.sqrt())
            .collect::<Vec<_>>(),
    ) * norm
        .weight()
        .map_or(Ok(1.), |w| values(w).map(|v| largest(&v)))?;
    let inner = largest(&values(&layer.forward(x)?)?) + size(layer.bias())?;
    let terms = scale * (inner + largest(&values(norm.running_mean())?)) + size(norm.bias())?;
    let want = values(&want)?;
    let terms = vec![terms; want.len()];
    assert_near("folded", &values(&y)?, &want, &terms, tolerance(dtype));
    Ok(())
}

fn largest(v: &[f64]) -> f64 {
    v.iter().fold(0., |a, v| a.max(v.abs()))
}

proptest! {
    #![proptest_config(config(120))]

    #[test]
    fn folded_norms_are_the_two_layers(
        g in geometries(),
        affine in affines(),
        own_bias in any::<bool>(),
        dtype in prop::sample::select(vec![DType::F32, DType::F64]),
        seed in any::<u64>(),
    ) {
        let (inputs, outputs) = (g.inputs(), g.outputs());
        let options = BatchNormOptions { affine, ..Default::default() };
        let (norm, _vars) = random(dtype, seed, |vb| batch_norm(outputs, options, vb)).unwrap();
        let mut draw = Draw::new(!seed);
        let mut param = |dims: &[usize]| {
            tensor(&draw.normal(dims.iter().product()), dims, dtype).unwrap()
        };
        let bias = own_bias.then(|| param(&[outputs]));
        let weight = param(&[outputs, inputs]);
        let x = param(&[g.batch, inputs]);
        check_folded(&Linear::new(weight, bias.clone()), &norm, &x).unwrap();
        let weight = param(&[outputs, g.channels.0, g.kernel]);
        let layer = Conv1d::new(weight, bias.clone(), g.conv1d());
        check_folded(&layer, &norm, &g.input(1, dtype, seed)).unwrap();
        let weight = param(&[outputs, g.channels.0, g.kernel, g.kernel]);
        let layer = Conv2d::new(weight, bias, g.conv2d());
        check_folded(&layer, &norm, &g.input(2, dtype, seed)).unwrap();
    }

    /// The folded values themselves, in every dtype: formed in f32 at least and rounded once.
    #[test]
    fn folded_parameters_are_rounded_once(
        (inputs, outputs) in (1usize..9, 1usize..9),
        affine in affines(),
        own_bias in any::<bool>(),
        dtype in prop::sample::select(&FLOATS[..]),
        seed in any::<u64>(),
    ) {
        let options = BatchNormOptions { affine, ..Default::default() };
        let (norm, _vars) = random(dtype, seed, |vb| batch_norm(outputs, options, vb)).unwrap();
        let mut draw = Draw::new(!seed);
        let weight = tensor(&draw.normal(inputs * outputs), &[outputs, inputs], dtype).unwrap();
        let bias = own_bias.then(|| tensor(&draw.normal(outputs), &[outputs], dtype).unwrap());
        let folded = norm.fold_into(&Linear::new(weight.clone(), bias.clone())).unwrap();

        let line = |t: Option<&Tensor>, missing: f64| match t {
            Some(t) => values(t).unwrap(),
            None => vec![missing; outputs],
        };
        let (w, b) = (line(norm.weight(), 1.), line(norm.bias(), 0.));
        let (mean, var) = (line(Some(norm.running_mean()), 0.), line(Some(norm.running_var()), 0.));
        let scale: Vec<f64> = (0..outputs).map(|c| w[c] / (var[c] + norm.eps()).sqrt()).collect();
        let own = line(bias.as_ref(), 0.);
        let want: Vec<f64> = (0..outputs).map(|c| scale[c] * (own[c] - mean[c]) + b[c]).collect();
        let terms: Vec<f64> = (0..outputs)
            .map(|c| scale[c].abs() * (own[c].abs() + mean[c].abs()) + b[c].abs())
            .collect();
        let got = values(folded.bias().unwrap()).unwrap();
        let f32s = tolerance(if dtype == DType::F64 { DType::F64 } else { DType::F32 });
        for c in 0..outputs {
            let allowed = tolerance(dtype) * want[c].abs() + f32s * terms[c];
            prop_assert!((got[c] - want[c]).abs() <= allowed, "bias {} of {:?}", c, dtype);
        }
        let want: Vec<f64> = values(&weight).unwrap().iter().enumerate()
            .map(|(i, v)| v * scale[i / inputs])
            .collect();
        assert_close("weight", folded.weight(), &want, tolerance(dtype));
    }
}

/// Layers that cannot be frozen or folded give an error that says so.
#[test]
fn what_cannot_be_folded_is_an_error() -> Result<()> {
    let vb = || VarBuilder::zeros(DType::F32, &Device::Cpu);
    let untracked = BatchNormOptions {
        track_running_stats: false,
        affine: Affine::None,
        ..Default::default()
    };
    let norm = batch_norm(3, untracked, vb())?;
    let weight = Tensor::zeros((4, 2), DType::F32, &Device::Cpu)?;
    let error = norm.frozen().unwrap_err().to_string();
    assert!(
        error.contains("BatchNorm") && error.contains("track_running_stats"),
        "{error}"
    );

    let options = BatchNormOptions {
        affine: Affine::None,
        ..Default::default()
    };
    let vars = VarMap::new();
    let norm = batch_norm(
        3,
        options,
        VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu),
    )?;
    let error = norm
        .fold_into(&Linear::new(weight, None))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("BatchNorm") && error.contains('3') && error.contains("[4, 2]"),
        "{error}"
    );
    Ok(())
}
