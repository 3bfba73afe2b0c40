//! The faults of candle 0.11 on the CPU that this crate works around, each shown in candle and
//! shown to be absent here.
//!
//! A fault that candle has mended fails no test: `.ci/run` prints a table of all of them, with what
//! can be dropped then.

use candle_core::{DType, Device, IndexOp, Result, Tensor, Var};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, Linear, Module, ModuleT, VarBuilder, VarMap,
};
use candle_norm::gradcheck::GradCheck;
use candle_norm::{
    NormConfig, WeightNormOptions, batch_norm, group_norm, layer_norm, rms_norm, weight_norm,
};
use testkit::compare::largest_difference;
use testkit::data::uniform;
use testkit::faults;

fn at_fault(still: bool, what: &str, then: &str) {
    faults::report(what, still, then);
}

/// Whether the gradient agrees with central differences for every input.
fn gradients_agree(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor]) -> Result<bool> {
    let projected = GradCheck {
        projections: Some(3),
        ..Default::default()
    };
    Ok(projected.check(f, inputs)?.passed())
}

/// Whether the gradient of a weight-normalized layer agrees, for its input, magnitude and
/// direction.
fn weight_norm_agrees<M: Module>(
    x: &Tensor,
    weight_shape: &[usize],
    build: impl Fn(VarBuilder) -> Result<M>,
) -> Result<bool> {
    let mut magnitude_shape = vec![1; weight_shape.len()];
    magnitude_shape[0] = weight_shape[0];
    let inputs = [
        x.clone(),
        uniform(magnitude_shape, 11),
        uniform(weight_shape, 12),
    ];
    let f = |v: &[Tensor]| {
        let named = [("weight_g", &v[1]), ("weight_v", &v[2])];
        let named = named.map(|(name, value)| (name.to_string(), value.clone()));
        let vb = VarBuilder::from_tensors(named.into(), DType::F64, &Device::Cpu);
        build(vb)?.forward(&v[0])
    };
    gradients_agree(f, &inputs)
}

/// The convolution of `[N, C, L]` with `[O, C, K]`, written out.
fn conv1d_by_definition(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let taps = weight.dim(2)?;
    let columns = (0..=x.dim(2)? - taps)
        .map(|start| {
            let window = x.narrow(2, start, taps)?.contiguous()?.flatten_from(1)?;
            window.matmul(&weight.flatten_from(1)?.t()?)
        })
        .collect::<Result<Vec<_>>>()?;
    Tensor::stack(&columns, 2)
}

/// The transposed convolution of `[N, C, L]` with `[C, O, K]`, written out.
fn conv_transpose1d_by_definition(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let taps = weight.dim(2)?;
    let samples = (0..x.dim(0)?)
        .map(|n| {
            let mut parts = (0..taps).map(|tap| {
                let part = weight.i((.., .., tap))?.t()?.matmul(&x.i(n)?)?;
                part.pad_with_zeros(1, tap, taps - 1 - tap)
            });
            let first = parts.next().expect("a kernel has a tap")?;
            parts.try_fold(first, |sum, part| sum + part?)
        })
        .collect::<Result<Vec<_>>>()?;
    Tensor::stack(&samples, 0)
}

#[test]
fn gradients_of_conv1d() -> Result<()> {
    let then = "LinearMap needs no detour over conv2d for conv1d";
    let (x, w) = (uniform((2, 4, 5), 1), uniform((6, 4, 2), 2));
    let y = x.conv1d(&w, 0, 1, 1, 1)?;
    assert!(largest_difference(&y, &conv1d_by_definition(&x, &w)?)? < 1e-12);
    assert!(gradients_agree(
        |v| conv1d_by_definition(&v[0], &v[1]),
        &[x.clone(), w.clone()]
    )?);

    let by_weight = |x: Tensor| {
        gradients_agree(
            move |v| x.conv1d(&v[0], 1, 1, 1, 1),
            std::slice::from_ref(&w),
        )
    };
    assert!(by_weight(x.i(..1)?)?);
    at_fault(
        !by_weight(x.clone())?,
        "conv1d's weight gradient at batch 2",
        then,
    );
    let by_input = |padding| {
        let w = w.clone();
        gradients_agree(
            move |v| v[0].conv1d(&w, padding, 1, 1, 1),
            std::slice::from_ref(&x),
        )
    };
    assert!(by_input(1)?);
    at_fault(
        !by_input(0)?,
        "conv1d's input gradient without padding",
        then,
    );

    for (padding, stride, groups) in [(0, 1, 1), (1, 1, 1), (1, 2, 2)] {
        let config = Conv1dConfig {
            padding,
            stride,
            groups,
            ..Default::default()
        };
        assert!(weight_norm_agrees(&x, &[6, 4 / groups, 2], |vb| {
            weight_norm::conv1d_no_bias(4, 6, 2, config, WeightNormOptions::default(), vb)
        })?);
    }
    // A layer followed by its norm goes the same way.
    let f = |v: &[Tensor]| {
        let named = [
            ("layer.weight", &v[1]),
            ("norm.weight", &v[2]),
            ("norm.bias", &v[3]),
        ];
        let named = named.map(|(name, value)| (name.to_string(), value.clone()));
        let vb = VarBuilder::from_tensors(named.into(), DType::F64, &Device::Cpu);
        let block = "group:3"
            .parse::<NormConfig>()?
            .conv1d(4, 6, 2, Default::default(), vb)?;
        block.forward_t(&v[0], true)
    };
    assert!(gradients_agree(f, &[x, w, uniform(6, 3), uniform(6, 4)])?);
    Ok(())
}

#[test]
fn conv_transpose1d() -> Result<()> {
    let then = "LinearMap needs no detour over conv_transpose2d for conv_transpose1d";
    let (x, w) = (uniform((2, 4, 5), 1), uniform((4, 6, 3), 2));
    let right = conv_transpose1d_by_definition(&x, &w)?;
    let full = x.conv_transpose1d(&w, 0, 0, 1, 1, 1)?;
    let wrong = largest_difference(&full, &right)? > 0.1;
    at_fault(
        wrong,
        "conv_transpose1d's forward without padding at batch 2",
        then,
    );
    let one_sample = x.i(..1)?.conv_transpose1d(&w, 0, 0, 1, 1, 1)?;
    assert!(largest_difference(&one_sample, &right.i(..1)?)? < 1e-12);
    let cropped = x.conv_transpose1d(&w, 1, 0, 1, 1, 1)?;
    assert!(largest_difference(&cropped, &right.narrow(2, 1, 5)?)? < 1e-12);

    let variable = Var::from_tensor(&x)?;
    let backward = variable
        .conv_transpose1d(&w, 1, 0, 1, 1, 1)?
        .sum_all()?
        .backward();
    let text = backward.err().map(|e| e.to_string()).unwrap_or_default();
    let missing = text.contains("backward is not supported for conv-transpose1d");
    at_fault(missing, "the missing backward of conv_transpose1d", then);

    for (padding, stride, groups) in [(0, 1, 1), (1, 2, 1), (1, 2, 2)] {
        let config = ConvTranspose1dConfig {
            padding,
            stride,
            groups,
            ..Default::default()
        };
        let build = |vb: VarBuilder| {
            let options = WeightNormOptions::default();
            weight_norm::conv_transpose1d_no_bias(4, 6, 3, config, options, vb)
        };
        assert!(weight_norm_agrees(&x, &[4, 6 / groups, 3], build)?);
    }
    // The forward, with a magnitude that leaves the weight as it is.
    let norms = w.sqr()?.sum_keepdim((1, 2))?.sqrt()?;
    let named = [("weight_g", norms), ("weight_v", w)].map(|(name, t)| (name.to_string(), t));
    let vb = VarBuilder::from_tensors(named.into(), DType::F64, &Device::Cpu);
    let options = WeightNormOptions::default();
    let ours = weight_norm::conv_transpose1d_no_bias(4, 6, 3, Default::default(), options, vb)?;
    assert!(largest_difference(&ours.forward(&x)?, &right)? < 1e-12);
    Ok(())
}

#[test]
fn linear_after_transpose() -> Result<()> {
    let then = "WeightNorm<Linear> needs no contiguous input, and the README no limit";
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let norm = layer_norm(4, 1e-5, vb.pp("norm"))?;
    let normed_weight = weight_norm::linear(4, 5, WeightNormOptions::default(), vb.pp("linear"))?;
    let plain = Linear::new(uniform((5, 4), 2), None);
    for dims in [&[2, 4, 3][..], &[2, 2, 4, 3]] {
        let x = uniform(dims, 1).transpose(dims.len() - 2, dims.len() - 1)?;
        let copy = x.contiguous()?;
        let error = largest_difference(&plain.forward(&x)?, &plain.forward(&copy)?)?;
        at_fault(
            error > 0.1,
            "the product of a transposed and a broadcast tensor",
            then,
        );

        let (y, right) = (norm.forward(&x)?, norm.forward(&copy)?);
        assert!(y.is_contiguous());
        assert_eq!(
            largest_difference(&plain.forward(&y)?, &plain.forward(&right)?)?,
            0.0
        );
        let (y, right) = (normed_weight.forward(&x)?, normed_weight.forward(&copy)?);
        assert_eq!(largest_difference(&y, &right)?, 0.0);
    }
    let one_sample = uniform((1, 4, 3), 1).transpose(1, 2)?;
    let copy = plain.forward(&one_sample.contiguous()?)?;
    assert!(largest_difference(&plain.forward(&one_sample)?, &copy)? < 1e-12);
    Ok(())
}

#[test]
fn fused_operations_drop_gradients() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let x = Var::from_tensor(&uniform((3, 4), 1).to_dtype(DType::F32)?)?;
    let reached =
        |y: Tensor| Ok::<_, candle_core::Error>(y.sqr()?.sum_all()?.backward()?.get(&x).is_some());

    let then = "the migration guide need not warn of it";
    let layer = candle_nn::layer_norm(4, 1e-5, vb.pp("layer"))?;
    at_fault(!reached(layer.forward(&x)?)?, "LayerNorm's gradients", then);
    let rms = candle_nn::rms_norm(4, 1e-6, vb.pp("rms"))?;
    at_fault(!reached(rms.forward(&x)?)?, "RmsNorm's gradients", then);
    let softmax = candle_nn::ops::softmax_last_dim(&x)?;
    at_fault(!reached(softmax)?, "softmax_last_dim's gradients", then);
    assert!(reached(candle_nn::ops::softmax(&x, 1)?)?);
    assert!(reached(candle_norm::nn::ops::softmax_last_dim(&x)?)?);
    let queries = x.reshape((1, 1, 3, 4))?;
    let angles = uniform((3, 2), 2).to_dtype(DType::F32)?;
    let rope = candle_nn::rotary_emb::rope(&queries, &angles, &angles)?;
    at_fault(!reached(rope)?, "rope's gradients", then);
    assert!(reached(candle_norm::nn::rotary_emb::rope(
        &queries, &angles, &angles
    )?)?);

    // The same variables in this crate's layers: all of them get their gradient.
    let layer = layer_norm(4, 1e-5, vb.pp("layer"))?;
    let rms = rms_norm(4, 1e-6, vb.pp("rms"))?;
    let loss = (layer.forward(&x)?.sqr()? + rms.forward(&x)?.sqr()?)?.sum_all()?;
    let gradients = loss.backward()?;
    assert_eq!(vars.all_vars().len(), 3);
    for variable in vars.all_vars().iter().chain([&x]) {
        assert!(gradients.get(variable).is_some());
    }
    Ok(())
}

#[test]
fn sums_in_the_dtype_of_the_elements() -> Result<()> {
    let then = "the composed path may sum in one step";
    let ones = Tensor::ones(4096, DType::BF16, &Device::Cpu)?;
    let sum = ones.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    at_fault(sum == 256.0, "sums in bf16", then);
    let hundreds = Tensor::full(100f32, 4096, &Device::Cpu)?.to_dtype(DType::F16)?;
    let mean = hundreds
        .mean_all()?
        .to_dtype(DType::F64)?
        .to_scalar::<f64>()?;
    at_fault(mean.is_infinite(), "means in f16", then);

    // Off the last axis, one element after the other: also the gradient of a broadcast bias. With
    // equal terms every addition to a partial sum of the same binade rounds the same way.
    let rows = 1 << 16;
    let cotangent = Tensor::full(0.1f32, (rows, 2), &Device::Cpu)?.contiguous()?;
    let total = cotangent.to_dtype(DType::F64)?.sum(0)?;
    let relative = |sum: &Tensor| {
        largest_difference(&(sum.to_dtype(DType::F64)? / &total)?, &total.ones_like()?)
    };
    const TOLERANCE: f64 = 2e-6;
    let error = relative(&cotangent.sum(0)?)?;
    at_fault(error > TOLERANCE, "sums along the first axis", then);

    let (weight, bias) = (
        Var::ones(2, DType::F32, &Device::Cpu)?,
        Var::zeros(2, DType::F32, &Device::Cpu)?,
    );
    let x = uniform((rows, 2), 2).to_dtype(DType::F32)?;
    let layer =
        candle_norm::LayerNorm::new(weight.as_tensor().clone(), bias.as_tensor().clone(), 1e-5);
    let gradients = (layer.forward(&x)? * &cotangent)?.sum_all()?.backward()?;
    let bias_gradient = gradients.get(&bias).expect("the bias is a variable");
    assert!(relative(bias_gradient)? < TOLERANCE);

    // Half precision: a row of 4096 values around 100, which overflows f16 sums and stalls bf16
    // ones.
    for dtype in [DType::F16, DType::BF16] {
        let x = (uniform((2, 4096), 3) * 8.0)?
            .affine(1.0, 100.0)?
            .to_dtype(dtype)?;
        let ones = Tensor::ones(4096, dtype, &Device::Cpu)?;
        let zeros = ones.zeros_like()?;
        let y = candle_norm::LayerNorm::new(ones, zeros, 1e-5).forward(&x)?;
        let exact = x.to_dtype(DType::F64)?;
        let centered = exact.broadcast_sub(&exact.mean_keepdim(1)?)?;
        let std = (centered.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
        // One rounding of values up to 2: half a unit in the last place is 2⁻¹¹ and 2⁻⁸.
        let rounding = if dtype == DType::F16 {
            2f64.powi(-11)
        } else {
            2f64.powi(-8)
        };
        let error = largest_difference(&y, &centered.broadcast_div(&std)?)?;
        assert!(error < 1.01 * rounding, "{dtype:?}: {error}");
    }
    Ok(())
}

#[test]
fn bf16_convolution() -> Result<()> {
    let bf16 = |shape: &[usize]| uniform(shape, 1).to_dtype(DType::BF16);
    let (x, w) = (bf16(&[2, 4, 5, 5])?, bf16(&[4, 4, 3, 3])?);
    let then = "the README need not list it as a limit";
    at_fault(x.conv2d(&w, 0, 1, 1, 1).is_err(), "conv2d in bf16", then);
    let variable = Var::from_tensor(&x)?;
    let transposed = variable.conv_transpose2d(&w, 0, 0, 1, 1)?.sum_all()?;
    at_fault(
        transposed.backward().is_err(),
        "conv_transpose2d's backward in bf16",
        then,
    );

    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::BF16, &Device::Cpu);
    let norms: [Box<dyn ModuleT>; 4] = [
        Box::new(batch_norm(4, 1e-5, vb.pp("batch"))?),
        Box::new(group_norm(2, 4, 1e-5, vb.pp("group"))?),
        Box::new(layer_norm(5, 1e-5, vb.pp("layer"))?),
        Box::new(rms_norm((5, 5), 1e-6, vb.pp("rms"))?),
    ];
    for norm in norms {
        let y = norm.forward_t(&variable, true)?;
        let gradients = y.sqr()?.sum_all()?.backward()?;
        let dx = gradients.get(&variable).expect("the input is a variable");
        assert_eq!((y.dtype(), dx.dtype()), (DType::BF16, DType::BF16));
    }
    let linear = weight_norm::linear(5, 3, WeightNormOptions::default(), vb.pp("linear"))?;
    assert_eq!(linear.forward(&x)?.dtype(), DType::BF16);
    Ok(())
}

#[test]
fn the_cpu_generator_takes_no_seed() -> Result<()> {
    let refused = Device::Cpu.set_seed(1).is_err();
    at_fault(
        refused,
        "the seed of the CPU generator",
        "rand is not needed to draw values",
    );

    let wrong = |v: &[Tensor]| &v[0] + v[0].detach().sqr()?;
    let worst = |seed| {
        let check = GradCheck {
            projections: Some(2),
            seed,
            ..Default::default()
        };
        Ok::<_, candle_core::Error>(check.check(wrong, &[uniform(5, 1)])?.worst)
    };
    assert_eq!(worst(1)?, worst(1)?);
    assert_ne!(worst(1)?, worst(2)?);
    Ok(())
}

/// No layer of this crate pools; models around them do.
#[test]
fn gradients_of_pooling() -> Result<()> {
    let then = "examples may use it";
    let max = |v: &[Tensor]| v[0].max_pool2d(2);
    let average = |v: &[Tensor]| v[0].avg_pool2d(2);
    let odd = [uniform((1, 2, 5, 5), 1)];
    at_fault(
        !gradients_agree(max, &odd)?,
        "max_pool2d's gradient at odd sizes",
        then,
    );
    at_fault(
        !gradients_agree(average, &odd)?,
        "avg_pool2d's gradient at odd sizes",
        then,
    );
    // At even sizes the largest element of a window gets a quarter of its gradient: the other three
    // count as if they were as large.
    let even = [uniform((1, 2, 4, 4), 1)];
    assert!(gradients_agree(average, &even)?);
    at_fault(!gradients_agree(max, &even)?, "max_pool2d's gradient", then);
    let x = Var::from_tensor(&even[0])?;
    let gradients = x.max_pool2d(2)?.sum_all()?.backward()?;
    let total = gradients
        .get(&x)
        .expect("the input is a variable")
        .sum_all()?;
    at_fault(
        total.to_scalar::<f64>()? == 8.0 / 4.0,
        "max_pool2d's gradient",
        then,
    );
    Ok(())
}

#[test]
fn conv2d_that_leaves_unequal_remainders() -> Result<()> {
    let then = "LinearMap need not trim its input";
    let config = Conv2dConfig {
        stride: 2,
        ..Default::default()
    };
    // A kernel of 3 at stride 2 leaves the last of 8 elements unused and uses all of 7.
    for (height, width, fails) in [(7, 8, true), (8, 7, true), (8, 8, false), (7, 7, false)] {
        let x = uniform((2, 4, height, width), 1);
        let variable = Var::from_tensor(&x)?;
        let w = uniform((6, 4, 3, 3), 2);
        let backward = variable.conv2d(&w, 0, 2, 1, 1)?.sum_all()?.backward();
        if fails {
            at_fault(
                backward.is_err(),
                "conv2d's backward at 7x8 and stride 2",
                then,
            );
        } else {
            assert!(gradients_agree(
                |v| v[0].conv2d(&v[1], 0, 2, 1, 1),
                &[x.clone(), w]
            )?);
        }
        let build = |vb: VarBuilder| {
            weight_norm::conv2d_no_bias(4, 6, 3, config, WeightNormOptions::default(), vb)
        };
        assert!(weight_norm_agrees(&x, &[6, 4, 3, 3], build)?);
    }
    Ok(())
}

/// A factor of zero ends candle's walk through the graph, so that what lies above gets no gradient
/// instead of zeros.
#[test]
fn a_factor_of_zero_cuts_the_graph() -> Result<()> {
    let x = Var::from_tensor(&uniform(3, 1))?;
    let cut = (x.as_tensor() * 0.0)?.sum_all()?.backward()?;
    at_fault(
        cut.get(&x).is_none(),
        "the gradient of a product with zero",
        "any anchor will do",
    );

    // Layers on an empty batch are such a case: every parameter gets zeros all the same.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    let norm = layer_norm(4, 1e-5, vb.pp("norm"))?;
    let linear = weight_norm::linear(4, 5, WeightNormOptions::default(), vb.pp("linear"))?;
    let conv = weight_norm::conv1d(
        5,
        2,
        1,
        Default::default(),
        WeightNormOptions::default(),
        vb.pp("conv"),
    )?;
    let empty = Tensor::zeros((0, 3, 4), DType::F64, &Device::Cpu)?;
    let y = linear.forward(&norm.forward(&empty)?)?.transpose(1, 2)?;
    let gradients = conv.forward(&y)?.sum_all()?.backward()?;
    assert_eq!(vars.all_vars().len(), 2 + 3 + 3);
    for (name, variable) in vars
        .data()
        .lock()
        .expect("no test panics holding it")
        .iter()
    {
        let Some(gradient) = gradients.get(variable) else {
            panic!("no gradient reached {name}")
        };
        assert_eq!(
            gradient.abs()?.max_all()?.to_scalar::<f64>()?,
            0.0,
            "{name}"
        );
    }
    Ok(())
}

#[test]
fn gradient_of_the_root_of_zero() -> Result<()> {
    let then = "Lengths and UnitRows need no constant in place of a zero";
    let (zeros, ones) = (
        Tensor::zeros(4, DType::F64, &Device::Cpu)?,
        uniform(4, 1).ones_like()?,
    );
    // A channel of zeros, as candle-transformers normalizes it by its length.
    let x = Var::from_tensor(&Tensor::stack(&[&zeros, &ones], 0)?)?;
    let finite = |y: Tensor| -> Result<bool> {
        let grads = (y * uniform((2, 4), 2))?.sum_all()?.backward()?;
        let dx = grads.get(&x).expect("a gradient").flatten_all()?;
        Ok(dx.to_vec1::<f64>()?.iter().all(|v| v.is_finite()))
    };
    let lengths = x.sqr()?.sum_keepdim(1)?.sqrt()?;
    let shares = lengths.broadcast_div(&(lengths.mean_keepdim(0)? + 1e-6)?)?;
    let wrong = !finite(x.broadcast_mul(&shares)?)?;
    at_fault(wrong, "the gradient of a root at zero, which is NaN", then);
    let weight = Tensor::ones(2, DType::F64, &Device::Cpu)?;
    let rows = x.unsqueeze(0)?;
    let y = candle_norm::ops::global_response_norm(&rows, &weight, &weight, 1e-6, true)?;
    assert!(finite(y.squeeze(0)?)?);
    let unit = candle_norm::ops::L2Form::Max;
    assert!(finite(candle_norm::ops::l2_normalize(&x, 1, 1e-12, unit)?)?);
    Ok(())
}

/// The slope of relu at 0, where a dead channel is, and the digits of that of GELU.
#[test]
fn slopes_of_activations() -> Result<()> {
    let slope = |at: f64, f: fn(&Tensor) -> Result<Tensor>| -> Result<f64> {
        let x = Var::new(&[at], &Device::Cpu)?;
        let grads = f(&x)?.sum_all()?.backward()?;
        let grad = grads.get(&x).expect("a gradient of every activation");
        grad.i(0)?.to_scalar::<f64>()
    };
    let then = "the composed path can use it";
    let relu = slope(0., Tensor::relu)?;
    at_fault(relu != 0., "relu has slope 1 at 0", then);
    let gelu = slope(1., Tensor::gelu_erf)?;
    let is_off = (gelu - 1.083_315_470_587_686_3).abs() > 1e-9;
    at_fault(is_off, "the gradient of gelu_erf has six digits", then);
    let root = slope(0., Tensor::sqrt)?;
    at_fault(
        !root.is_infinite(),
        "the gradient of sqrt at 0 is no limit",
        then,
    );
    Ok(())
}
