//! The comparison with candle-nn that the README makes, row by row.
//!
//! A fault that candle has mended fails no test: `.ci/run` prints a table of all of them.

use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::VarMap;
use candle_norm::{BatchNormOptions, batch_norm, checkpoint, group_norm, layer_norm};

use testkit::data::{noise, values};
use testkit::faults;
use testkit::vars::vb;

const CPU: Device = Device::Cpu;
const HALF: [DType; 2] = [DType::F16, DType::BF16];

fn at_fault(still: bool, what: &str) {
    let then = "the README's comparison has a cell to change";
    faults::report(what, still, then);
}

#[test]
fn layer_norm_and_rms_norm_pass_gradients_on() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    let x = Var::from_tensor(&noise(&[3, 8], DType::F32)?)?;
    let theirs: [Box<dyn Module>; 2] = [
        Box::new(candle_nn::layer_norm(8, 1e-5, vb.pp("layer"))?),
        Box::new(candle_nn::rms_norm(8, 1e-6, vb.pp("rms"))?),
    ];
    for norm in theirs {
        let gradients = norm.forward(&x)?.sqr()?.sum_all()?.backward()?;
        let reached = vars.all_vars().iter().any(|v| gradients.get(v).is_some());
        at_fault(
            !reached && gradients.get(&x).is_none(),
            "the gradients of LayerNorm and RmsNorm",
        );
    }
    let ours = layer_norm(8, 1e-5, vb.pp("layer"))?.forward(&x)?.sqr()?
        + candle_norm::rms_norm(8, 1e-6, vb.pp("rms"))?.forward(&x)?;
    let gradients = ours?.sum_all()?.backward()?;
    assert_eq!(vars.all_vars().len(), 3);
    for var in vars.all_vars().iter().chain([&x]) {
        assert!(gradients.get(var).is_some());
    }
    Ok(())
}

#[test]
fn batch_norm_trains_and_evaluates_in_half_precision() -> Result<()> {
    for dtype in HALF {
        let x = noise(&[4, 3, 2, 2], DType::F32)?.to_dtype(dtype)?;
        for (statistics, params) in [
            (dtype, dtype),
            (dtype, DType::F32),
            (DType::F32, dtype),
            (DType::F32, DType::F32),
        ] {
            let (zeros, ones) = (
                Tensor::zeros(3, DType::F32, &CPU)?,
                Tensor::ones(3, DType::F32, &CPU)?,
            );
            let theirs = candle_nn::BatchNorm::new(
                3,
                zeros.to_dtype(statistics)?,
                ones.to_dtype(statistics)?,
                ones.to_dtype(params)?,
                zeros.to_dtype(params)?,
                1e-5,
            )?;
            let works = |train| theirs.forward_t(&x, train).is_ok();
            at_fault(
                !(works(true) && works(false)),
                "BatchNorm in half precision",
            );
        }
        // A model of the input's dtype, and one with parameters in f32.
        for model in [dtype, DType::F32] {
            let vars = VarMap::new();
            let norm = batch_norm(3, 1e-5, vb(&vars, model))?;
            let y = norm.forward_t(&x, true)?;
            let gradients = y.sqr()?.sum_all()?.backward()?;
            let (weight, _) = norm.weight_and_bias().expect("affine by default");
            assert_eq!(gradients.get(weight).map(Tensor::dtype), Some(model));
            assert_eq!(
                (y.dtype(), norm.forward_t(&x, false)?.dtype()),
                (dtype, dtype)
            );
            assert_eq!(norm.running_var().dtype(), DType::F32);
        }
        let vars = VarMap::new();
        let theirs = candle_nn::batch_norm(3, 1e-5, vb(&vars, dtype))?;
        at_fault(
            theirs.running_var().dtype() == dtype,
            "the dtype of the running statistics of BatchNorm",
        );
    }
    Ok(())
}

#[test]
fn layer_norm_at_a_large_mean() -> Result<()> {
    let x = (noise(&[16, 768], DType::F32)? + 1000.)?;
    let exact = x.to_dtype(DType::F64)?;
    let centered = exact.broadcast_sub(&exact.mean_keepdim(1)?)?;
    let std = (centered.sqr()?.mean_keepdim(1)? + 1e-5)?.sqrt()?;
    let want = values(&centered.broadcast_div(&std)?)?;
    let worst = |y: Tensor| -> Result<f64> {
        let errors = values(&y)?.into_iter().zip(&want);
        Ok(errors.fold(0., |worst: f64, (y, want)| {
            if y.is_nan() {
                f64::INFINITY
            } else {
                worst.max((y - want).abs())
            }
        }))
    };
    let (ones, zeros) = (
        Tensor::ones(768, DType::F32, &CPU)?,
        Tensor::zeros(768, DType::F32, &CPU)?,
    );
    let theirs = candle_nn::LayerNorm::new(ones.clone(), zeros.clone(), 1e-5);
    at_fault(
        worst(theirs.forward(&x)?)? > 0.1,
        "the variance of LayerNorm at a large mean",
    );
    let ours = candle_norm::LayerNorm::new(ones, zeros, 1e-5);
    assert!(worst(ours.forward(&x)?)? < 2e-6);
    Ok(())
}

#[test]
fn dtypes_of_the_row_norms() -> Result<()> {
    let parameters = |dtype| {
        let ones = Tensor::ones(4, dtype, &CPU)?;
        Ok::<_, candle_core::Error>((ones.clone(), ones.zeros_like()?))
    };
    for (input, params) in [
        (DType::F64, DType::F64),
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
    ] {
        let x = noise(&[2, 4], DType::F32)?.to_dtype(input)?;
        let (weight, bias) = parameters(params)?;
        let theirs = candle_nn::LayerNorm::new(weight.clone(), bias.clone(), 1e-5);
        at_fault(theirs.forward(&x).is_err(), "the dtypes of LayerNorm");
        let theirs = candle_nn::RmsNorm::new(weight.clone(), 1e-5);
        at_fault(theirs.forward(&x).is_err(), "the dtypes of RmsNorm");
        let ours = candle_norm::LayerNorm::new(weight.clone(), bias, 1e-5);
        assert_eq!(ours.forward(&x)?.dtype(), input);
        let ours = candle_norm::RmsNorm::new(weight, 1e-5);
        assert_eq!(ours.forward(&x)?.dtype(), input);
    }
    Ok(())
}

#[test]
fn batches_of_one_value_and_of_none() -> Result<()> {
    for (rows, refused) in [(1, true), (0, false)] {
        let x = Tensor::zeros((rows, 3), DType::F32, &CPU)?;
        let vars = VarMap::new();
        let theirs = candle_nn::batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
        theirs.forward_t(&x, true)?;
        at_fault(
            values(theirs.running_var())?.iter().all(|v| v.is_nan()),
            "the statistics of a batch without a variance",
        );
        let vars = VarMap::new();
        let ours = batch_norm(3, 1e-5, vb(&vars, DType::F32))?;
        assert_eq!(ours.forward_t(&x, true).is_err(), refused);
        assert_eq!(values(ours.running_var())?, [1.; 3]);
    }
    Ok(())
}

#[test]
fn files_go_from_one_crate_to_the_other() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("model.safetensors");
    let theirs = VarMap::new();
    let norm = candle_nn::batch_norm(3, 1e-5, vb(&theirs, DType::F32).pp("norm"))?;
    norm.forward_t(&noise(&[8, 3], DType::F32)?, true)?;
    theirs.save(&file)?;

    let mut ours = VarMap::new();
    let loaded = batch_norm(3, 1e-5, vb(&ours, DType::F32).pp("norm"))?;
    let error = ours.load(&file).expect_err("the file has no counter");
    assert!(error.to_string().contains("num_batches_tracked"));
    let report = checkpoint::load_into(&ours, &file)?;
    assert_eq!(report.counters_reset, ["norm.num_batches_tracked"]);
    assert_eq!(values(loaded.running_mean())?, values(norm.running_mean())?);

    loaded.forward_t(&noise(&[8, 3], DType::F32)?, true)?;
    ours.save(&file)?;
    let mut theirs = VarMap::new();
    let norm = candle_nn::batch_norm(3, 1e-5, vb(&theirs, DType::F32).pp("norm"))?;
    theirs.load(&file)?;
    assert_eq!(values(loaded.running_var())?, values(norm.running_var())?);
    Ok(())
}

#[test]
fn what_only_this_crate_takes() -> Result<()> {
    let vars = VarMap::new();
    let vb = vb(&vars, DType::F32);
    // More than one normalized axis.
    let maps = layer_norm((3, 4), 1e-5, vb.pp("maps"))?;
    assert_eq!(
        maps.forward(&noise(&[2, 3, 4], DType::F32)?)?.dims(),
        [2, 3, 4]
    );
    let (weight, bias) = (noise(&[3, 4], DType::F32)?, noise(&[3, 4], DType::F32)?);
    let theirs = candle_nn::LayerNorm::new(weight, bias, 1e-5);
    at_fault(
        theirs.forward(&noise(&[2, 3, 4], DType::F32)?).is_err(),
        "LayerNorm over two axes",
    );
    // Groups of channels without space.
    let rows = noise(&[2, 4], DType::F32)?;
    let theirs = candle_nn::group_norm(2, 4, 1e-5, vb.pp("theirs"))?;
    at_fault(theirs.forward(&rows).is_err(), "GroupNorm of rows");
    group_norm(2, 4, 1e-5, vb.pp("ours"))?.forward(&rows)?;
    // Folding without affine parameters, and into other layers than Conv2d.
    let options = BatchNormOptions {
        affine: candle_norm::Affine::None,
        ..Default::default()
    };
    let norm = batch_norm(4, options, vb.pp("plain"))?;
    let linear = candle_nn::linear(3, 4, vb.pp("linear"))?;
    let x = noise(&[2, 3], DType::F32)?;
    let folded = norm.fold_into(&linear)?.forward(&x)?;
    let apart = norm.forward_t(&linear.forward(&x)?, false)?;
    for (folded, apart) in values(&folded)?.into_iter().zip(values(&apart)?) {
        assert!((folded - apart).abs() < 1e-5);
    }
    Ok(())
}
