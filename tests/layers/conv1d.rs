//! Convolutions along one axis without a norm: the right results and gradients at every batch size,
//! and candle's face.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Conv1dConfig, ConvTranspose1dConfig, Module, ModuleT, VarBuilder, VarMap};
use candle_norm::gradcheck::gradcheck;
use candle_norm::{
    Conv1d, ConvTranspose1d, WeightNorm, batch_norm, conv_transpose1d, conv_transpose1d_no_bias,
    conv1d, conv1d_no_bias, fold,
};
use testkit::compare::largest_difference;
use testkit::data::uniform;

/// `[N, C, L]` as nested lists.
type Maps = Vec<Vec<Vec<f64>>>;

/// The convolution by its definition, one product after the other.
fn by_definition(x: &Maps, w: &Maps, bias: &[f64], c: &Conv1dConfig) -> Maps {
    let (length, kernel) = (x[0][0].len() + 2 * c.padding, w[0][0].len());
    let positions = (length - (kernel - 1) * c.dilation - 1) / c.stride + 1;
    let per_group = w.len() / c.groups;
    let output = |sample: &Vec<Vec<f64>>, o: usize, position: usize| {
        let mut sum = bias[o];
        for (i, taps) in w[o].iter().enumerate() {
            let channel = &sample[o / per_group * w[o].len() + i];
            for (tap, weight) in taps.iter().enumerate() {
                let at = position * c.stride + tap * c.dilation;
                let inside = at >= c.padding && at - c.padding < channel.len();
                sum += weight * if inside { channel[at - c.padding] } else { 0. };
            }
        }
        sum
    };
    let channels = |sample| -> Vec<Vec<f64>> {
        let positions = |o| (0..positions).map(|p| output(sample, o, p)).collect();
        (0..w.len()).map(positions).collect()
    };
    x.iter().map(channels).collect()
}

/// The transposed convolution by its definition: every input is spread over the outputs under the
/// kernel.
fn transposed_by_definition(x: &Maps, w: &Maps, bias: &[f64], c: &ConvTranspose1dConfig) -> Maps {
    let (length, kernel, per_group) = (x[0][0].len(), w[0][0].len(), w[0].len());
    let size =
        (length - 1) * c.stride + (kernel - 1) * c.dilation + 1 + c.output_padding - 2 * c.padding;
    let inputs = w.len() / c.groups;
    let spread = |sample: &Vec<Vec<f64>>| {
        let mut y: Vec<_> = bias.iter().map(|b| vec![*b; size]).collect();
        for (i, channel) in sample.iter().enumerate() {
            for (o, taps) in w[i].iter().enumerate() {
                for (at, x) in channel.iter().enumerate() {
                    for (tap, weight) in taps.iter().enumerate() {
                        let to = at * c.stride + tap * c.dilation;
                        if to >= c.padding && to - c.padding < size {
                            y[i / inputs * per_group + o][to - c.padding] += weight * x;
                        }
                    }
                }
            }
        }
        y
    };
    x.iter().map(spread).collect()
}

/// (padding, stride, dilation, groups).
fn geometries() -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let moves = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)];
    let padded = moves.map(|(stride, dilation)| [0, 1, 2].map(|p| (p, stride, dilation)));
    let all = padded.into_iter().flatten();
    all.flat_map(|(p, s, d)| [(p, s, d, 1), (p, s, d, 2)])
}

#[test]
fn conv1d_is_right_in_every_geometry_and_so_are_its_gradients() -> Result<()> {
    for (padding, stride, dilation, groups) in geometries() {
        let config = Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..Default::default()
        };
        let inputs = [
            uniform((2, 4, 8), 1),
            uniform((6, 4 / groups, 3), 2),
            uniform(6, 3),
        ];
        let f = |v: &[Tensor]| Conv1d::new(v[1].clone(), Some(v[2].clone()), config).forward(&v[0]);
        let [x, w, bias] = &inputs;
        let right = by_definition(&x.to_vec3()?, &w.to_vec3()?, &bias.to_vec1()?, &config);
        let right = Tensor::new(right, &Device::Cpu)?;
        let error = largest_difference(&f(&inputs)?, &right)?;
        assert!(error < 1e-12, "{config:?}: off by {error}");
        if let Err(e) = gradcheck(f, &inputs) {
            panic!("{config:?}: {e}");
        }
    }
    Ok(())
}

#[test]
fn conv_transpose1d_is_right_in_every_geometry_and_so_are_its_gradients() -> Result<()> {
    for (padding, stride, dilation, groups) in geometries() {
        for output_padding in 0..stride.max(dilation) {
            let config = ConvTranspose1dConfig {
                padding,
                output_padding,
                stride,
                dilation,
                groups,
            };
            let inputs = [
                uniform((2, 4, 5), 1),
                uniform((4, 6 / groups, 3), 2),
                uniform(6, 3),
            ];
            let f = |v: &[Tensor]| {
                ConvTranspose1d::new(v[1].clone(), Some(v[2].clone()), config).forward(&v[0])
            };
            let [x, w, bias] = &inputs;
            let (x, w, bias) = (x.to_vec3()?, w.to_vec3()?, bias.to_vec1()?);
            let right = transposed_by_definition(&x, &w, &bias, &config);
            let right = Tensor::new(right, &Device::Cpu)?;
            let error = largest_difference(&f(&inputs)?, &right)?;
            assert!(error < 1e-12, "{config:?}: off by {error}");
            if let Err(e) = gradcheck(f, &inputs) {
                panic!("{config:?}: {e}");
            }
        }
    }
    Ok(())
}

/// The fault that these layers are there for, in a model: without it, this test would say nothing.
#[test]
fn a_model_learns_at_batch_2_what_candles_own_has_wrong() -> Result<()> {
    let (x, w) = (uniform((2, 4, 8), 1), uniform((6, 4, 3), 2));
    let config = Conv1dConfig::default();
    let candles = |v: &[Tensor]| candle_nn::Conv1d::new(v[1].clone(), None, config).forward(&v[0]);
    assert!(gradcheck(candles, &[x.clone(), w.clone()]).is_err());
    let ours = |v: &[Tensor]| Conv1d::new(v[1].clone(), None, config).forward(&v[0]);
    gradcheck(ours, &[x, w])
}

#[test]
fn the_face_is_candles() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let x = uniform((1, 4, 8), 1).to_dtype(DType::F32)?;
    let config = Conv1dConfig {
        padding: 1,
        stride: 2,
        ..Default::default()
    };
    let theirs = candle_nn::conv1d(4, 6, 3, config, vb.pp("a"))?;
    let ours = conv1d(4, 6, 3, config, vb.pp("a"))?;
    assert_eq!(ours.config(), &config);
    assert_eq!(ours.weight().dims(), [6, 4, 3]);
    assert_eq!(ours.bias().map(Tensor::dims), Some(&[6][..]));
    assert!(largest_difference(&ours.forward(&x)?, &theirs.forward(&x)?)? < 1e-5);
    assert!(largest_difference(&ours.inner().forward(&x)?, &theirs.forward(&x)?)? == 0.);
    let again = Conv1d::from(theirs.clone());
    assert!(largest_difference(&again.forward(&x)?, &ours.forward(&x)?)? == 0.);
    assert!(
        conv1d_no_bias(4, 6, 3, config, vb.pp("a"))?
            .bias()
            .is_none()
    );

    let config = ConvTranspose1dConfig {
        padding: 1,
        stride: 2,
        output_padding: 1,
        ..Default::default()
    };
    let theirs = candle_nn::conv_transpose1d(4, 6, 3, config, vb.pp("b"))?;
    let ours = conv_transpose1d(4, 6, 3, config, vb.pp("b"))?;
    assert_eq!(ours.config(), &config);
    assert_eq!(ours.weight().dims(), [4, 6, 3]);
    assert_eq!(ours.bias().map(Tensor::dims), Some(&[6][..]));
    assert!(largest_difference(&ours.forward(&x)?, &theirs.forward(&x)?)? < 1e-5);
    let without = conv_transpose1d_no_bias(4, 6, 3, config, vb.pp("b"))?;
    assert!(without.bias().is_none());

    let names = vars.data().lock().expect("no thread panicked");
    let mut names: Vec<_> = names.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["a.bias", "a.weight", "b.bias", "b.weight"]);
    Ok(())
}

#[test]
fn initial_values_are_drawn_as_candle_draws_them() -> Result<()> {
    let spread = |vars: &VarMap, name: &str| -> Result<(f64, f64)> {
        let vars = vars.data().lock().expect("no thread panicked");
        let t = vars[name].flatten_all()?.to_dtype(DType::F64)?;
        let mean = t.mean_all()?.to_scalar::<f64>()?;
        Ok((mean, t.var(0)?.to_scalar::<f64>()?.sqrt()))
    };
    let build = |ours: bool| -> Result<VarMap> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let (a, b) = (vb.pp("a"), vb.pp("b"));
        if ours {
            conv1d(200, 300, 5, Default::default(), a)?;
            conv_transpose1d(200, 300, 5, Default::default(), b)?;
        } else {
            candle_nn::conv1d(200, 300, 5, Default::default(), a)?;
            candle_nn::conv_transpose1d(200, 300, 5, Default::default(), b)?;
        }
        Ok(vars)
    };
    let (ours, theirs) = (build(true)?, build(false)?);
    // 300 000 weights, 300 biases.
    for (name, tolerance) in [
        ("a.weight", 0.01),
        ("a.bias", 0.2),
        ("b.weight", 0.01),
        ("b.bias", 0.2),
    ] {
        let ((mean, std), (_, want)) = (spread(&ours, name)?, spread(&theirs, name)?);
        assert!(
            (std / want - 1.).abs() < tolerance,
            "{name}: {std}, candle has {want}"
        );
        assert!(mean.abs() < tolerance * want, "{name}: a mean of {mean}");
    }
    Ok(())
}

#[test]
fn norms_go_around_it_and_fold_into_it() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let x = uniform((2, 4, 8), 1);
    let layer = conv1d(4, 6, 3, Default::default(), vb.pp("a"))?;
    let normed = WeightNorm::from_layer(&layer, Default::default())?;
    let baked: Conv1d = normed.bake()?;
    assert!(largest_difference(&baked.forward(&x)?, &layer.forward(&x)?)? < 1e-12);

    let norm = batch_norm(6, 1e-5, vb.pp("norm"))?;
    norm.forward_t(&layer.forward(&x)?, true)?;
    let folded: Conv1d = norm.fold_into(&layer)?;
    let both = norm.forward_t(&layer.forward(&x)?, false)?;
    assert!(largest_difference(&folded.forward(&x)?, &both)? < 1e-12);
    let inner = Conv1d::from(norm.fold_into(layer.inner())?);
    assert_eq!(
        largest_difference(&inner.forward(&x)?, &folded.forward(&x)?)?,
        0.
    );

    let up = conv_transpose1d(4, 6, 3, Default::default(), vb.pp("up"))?;
    let folded: ConvTranspose1d = fold(&up, &[&norm])?;
    let both = norm.forward_t(&up.forward(&x)?, false)?;
    assert!(largest_difference(&folded.forward(&x)?, &both)? < 1e-12);
    Ok(())
}

#[test]
fn half_precision_is_rounded_once() -> Result<()> {
    let (x, w) = (uniform((2, 4, 8), 1), uniform((6, 4, 3), 2));
    // Half of the distance of two neighbors, next to the smaller of them.
    for (dtype, half) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        let (x, w) = (x.to_dtype(dtype)?, w.to_dtype(dtype)?);
        let y = Conv1d::new(w.clone(), None, Default::default()).forward(&x)?;
        assert_eq!(y.dtype(), dtype);
        let (wide_x, wide_w) = (x.to_dtype(DType::F64)?, w.to_dtype(DType::F64)?);
        let right = Conv1d::new(wide_w, None, Default::default()).forward(&wide_x)?;
        let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
        for (y, right) in values(&y)?.into_iter().zip(values(&right)?) {
            let error = (y - right).abs();
            assert!(
                error <= half * right.abs() + 1e-5,
                "{dtype:?}: {y} for {right}"
            );
        }
    }
    Ok(())
}

#[test]
fn mistakes_name_the_layer() -> Result<()> {
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let text = |e: candle_core::Error| e.to_string().lines().next().map(str::to_string);
    let layer = conv1d(4, 6, 3, Default::default(), vb())?;
    let ones = |dims: &[usize]| Tensor::ones(dims, DType::F32, &Device::Cpu);
    for (dims, says) in [
        (
            &[2, 3, 8][..],
            "Conv1d: expected 4 channels on axis 1, got 3 in input size [2, 3, 8]",
        ),
        (
            &[4, 8],
            "Conv1d: expected input of rank 3, got shape [4, 8]; if the batch axis is missing, add \
            it with unsqueeze(0)",
        ),
        (
            &[2, 4, 2],
            "Conv1d: expected an input that the kernel fits, got size [2, 4, 2] for weight shape \
            [6, 4, 3], padding 0, dilation 1",
        ),
    ] {
        let refused = layer.forward(&ones(dims)?).err().and_then(text);
        assert_eq!(refused.as_deref(), Some(says));
    }
    let grouped = Conv1dConfig {
        groups: 3,
        ..Default::default()
    };
    let still = ConvTranspose1dConfig {
        stride: 0,
        ..Default::default()
    };
    let before = vars.all_vars().len();
    for (refused, says) in [
        (
            conv1d(4, 6, 3, grouped, vb().pp("b")).err().and_then(text),
            "Conv1d: expected groups (3) to divide the channels, got 4 in and 6 out",
        ),
        (
            conv_transpose1d(4, 6, 3, still, vb().pp("b"))
                .err()
                .and_then(text),
            "ConvTranspose1d: expected stride of at least 1, got 0",
        ),
        (
            conv1d(0, 1 << 61, 1, Default::default(), vb().pp("b"))
                .err()
                .and_then(text),
            "Conv1d: expected weight with at most 1152921504606846975 elements, got shape \
            [2305843009213693952, 0, 1]",
        ),
    ] {
        assert_eq!(refused.as_deref(), Some(says));
    }
    assert_eq!(vars.all_vars().len(), before);
    // No element is no error, as in every layer here.
    assert_eq!(layer.forward(&ones(&[0, 4, 8])?)?.dims(), [0, 6, 6]);
    Ok(())
}
