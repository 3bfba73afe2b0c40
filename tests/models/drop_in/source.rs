// Code as users of candle-nn's norms write it. It is compiled twice: with the names of candle-nn,
// and with those of this crate. Everything candle-nn 0.11 makes public of its norms occurs here, in
// candle's order of arguments.

/// The results of a run by name, for the other run to be compared with.
pub(crate) type Results = Vec<(String, Tensor)>;

struct Block {
    batch: BatchNorm,
    layer: LayerNorm,
    rms: RmsNorm,
    group: GroupNorm,
}

impl Block {
    // A literal or a variable as eps, as a size.
    fn new(channels: usize, width: usize, vb: VarBuilder) -> Result<Self> {
        let eps: f64 = 1e-5;
        Ok(Self {
            batch: batch_norm(channels, eps, vb.pp("batch"))?,
            layer: layer_norm(width, 1e-5, vb.pp("layer"))?,
            rms: rms_norm(width, 1e-6, vb.pp("rms"))?,
            group: group_norm(2, channels, 1e-5, vb.pp("group"))?,
        })
    }
}

impl ModuleT for Block {
    fn forward_t(&self, xs: &Tensor, train: bool) -> Result<Tensor> {
        let xs = xs.apply_t(&self.batch, train)?.apply(&self.group)?;
        let xs = self.layer.forward(&strided(&xs)?)?;
        self.rms.forward_diff(&xs)
    }
}

// candle's fused layer norm and RMS norm drop gradients and know no f64. A strided input takes its
// other path.
fn strided(xs: &Tensor) -> Result<Tensor> {
    let last = xs.rank() - 1;
    xs.transpose(last - 1, last)?
        .contiguous()?
        .transpose(last - 1, last)
}

fn rows(xs: &Tensor) -> Result<Tensor> {
    match xs.dtype() {
        DType::F64 => strided(xs),
        _ => Ok(xs.clone()),
    }
}

fn parameter(size: usize, offset: f64, xs: &Tensor) -> Result<Tensor> {
    let ramp = Tensor::arange(0u32, size as u32, xs.device())?.to_dtype(xs.dtype())?;
    (ramp * 0.25)? + offset
}

fn scalar(value: f64) -> Result<Tensor> {
    Tensor::new(value, &Device::Cpu)
}

/// Every way to make and to run a batch norm, for `[N, C, *]`.
pub(crate) fn batch_norms(xs: &[Tensor]) -> Result<Results> {
    let x = &xs[0];
    let c = x.dim(1)?;
    let mut results = vec![];
    let (weight, bias) = (parameter(c, 0.5, x)?, parameter(c, -0.5, x)?);
    let (mean, var) = (parameter(c, 0.1, x)?, parameter(c, 0.7, x)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());

    let config = BatchNormConfig {
        eps: 1e-3,
        remove_mean: true,
        affine: true,
        momentum: 0.3,
    };
    let default = BatchNormConfig::default();
    let from_eps = BatchNormConfig::from(1e-5);
    assert!(default == from_eps && default != config);
    let plain = BatchNormConfig {
        affine: false,
        ..config
    };
    let uncentered = batch_norm::BatchNormConfig {
        remove_mean: false,
        ..Default::default()
    };
    let (m, v, w, b) = (mean.clone(), var.clone(), weight.clone(), bias.clone());
    let layers: [(&str, BatchNorm); 9] = [
        ("eps", batch_norm(c, 1e-5, vb.pp("eps"))?),
        ("config", batch_norm(c, config, vb.pp("config"))?),
        ("plain", batch_norm(c, plain, vb.pp("plain"))?),
        (
            "uncentered",
            batch_norm::batch_norm(c, uncentered, vb.pp("uncentered"))?,
        ),
        ("default", batch_norm(c, default, vb.pp("default"))?),
        (
            "new",
            BatchNorm::new(c, m.clone(), v.clone(), w.clone(), b.clone(), 1e-5)?,
        ),
        (
            "new_no_bias",
            BatchNorm::new_no_bias(c, m.clone(), v.clone(), 1e-5)?,
        ),
        (
            "new_with_momentum",
            BatchNorm::new_with_momentum(c, m.clone(), v.clone(), w, b, 1e-4, 0.4)?,
        ),
        (
            "new_no_bias_with_momentum",
            batch_norm::BatchNorm::new_no_bias_with_momentum(c, m, v, 1e-4, 0.4)?,
        ),
    ];
    for (name, layer) in layers {
        assert!(format!("{layer:?}").contains("BatchNorm"));
        let mut push =
            |what: &str, result: Tensor| results.push((format!("{name} {what}"), result));
        push("eps", scalar(layer.eps())?);
        push("momentum", scalar(layer.momentum())?);
        push("untrained", layer.forward_t(x, false)?);
        let copy = layer.clone();
        for x in xs {
            // Where the copies share their statistics, so do the originals.
            push("trained", copy.forward_t(x, true)?);
        }
        push("running_mean", layer.running_mean().clone());
        push("running_var", layer.running_var().clone());
        push("inferred", layer.forward_t(x, false)?);
        push("forward_train", layer.forward_train(x)?);
        if let Some((weight, bias)) = layer.weight_and_bias() {
            push("weight", weight.clone());
            push("bias", bias.clone());
        }
        for train in [true, false] {
            let variable = Var::from_tensor(x)?;
            let loss = (layer.forward_t(&variable, train)? * x.sin()?)?.sum_all()?;
            let gradients = loss.backward()?;
            push(
                "gradient",
                gradients
                    .get(&variable)
                    .expect("an input's gradient")
                    .clone(),
            );
        }
    }
    // From a checkpoint.
    let named = [
        ("bias", bias),
        ("running_mean", mean),
        ("running_var", var),
        ("weight", weight),
    ];
    let named = named.map(|(name, value)| (format!("bn.{name}"), value));
    let vb = VarBuilder::from_tensors(named.into(), x.dtype(), x.device());
    let loaded = batch_norm(c, 1e-5, vb.pp("bn"))?;
    results.push(("loaded".into(), loaded.forward_t(x, false)?));
    Ok(results)
}

/// Every way to make and to run a layer norm or an RMS norm, over the last axis.
pub(crate) fn row_norms(xs: &[Tensor]) -> Result<Results> {
    let n = xs[0].dim(xs[0].rank() - 1)?;
    let x = &rows(&xs[0])?;
    let mut results = vec![];
    let (weight, bias) = (parameter(n, 0.5, x)?, parameter(n, -0.5, x)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());

    let config = LayerNormConfig {
        eps: 1e-3,
        remove_mean: true,
        affine: true,
    };
    assert!(LayerNormConfig::default() == LayerNormConfig::from(1e-5));
    let uncentered = LayerNormConfig {
        remove_mean: false,
        ..config
    };
    let plain = layer_norm::LayerNormConfig {
        affine: false,
        ..Default::default()
    };
    let (w, b) = (weight.clone(), bias.clone());
    let layers: [(&str, LayerNorm); 10] = [
        ("eps", layer_norm(n, 1e-5, vb.pp("eps"))?),
        ("config", layer_norm(n, config, vb.pp("config"))?),
        (
            "uncentered",
            layer_norm::layer_norm(n, uncentered, vb.pp("uncentered"))?,
        ),
        ("plain", layer_norm(n, plain, vb.pp("plain"))?),
        (
            "layer_norm_no_bias",
            layer_norm_no_bias(n, 1e-4, vb.pp("no_bias"))?,
        ),
        (
            "no_bias of the module",
            layer_norm::layer_norm_no_bias(n, 1e-4, vb.pp("no_bias"))?,
        ),
        ("new", LayerNorm::new(w.clone(), b, 1e-5)),
        ("new_no_bias", LayerNorm::new_no_bias(w.clone(), 1e-5)),
        ("rms_norm", layer_norm::LayerNorm::rms_norm(w.clone(), 1e-5)),
        ("into_inner", RmsNorm::new(w.clone(), 1e-3).into_inner()),
    ];
    for (name, layer) in layers {
        assert!(format!("{layer:?}").contains("LayerNorm"));
        let mut push =
            |what: &str, result: Tensor| results.push((format!("{name} {what}"), result));
        push("eps", scalar(layer.eps())?);
        push(
            "remove_mean",
            scalar(f64::from(u8::from(layer.remove_mean())))?,
        );
        push("weight", layer.weight().clone());
        if let Some(bias) = layer.bias() {
            push("bias", bias.clone());
        }
        let copy = layer.clone();
        push("forward", copy.forward(x)?);
        push("forward_t", layer.forward_t(x, true)?);
        push("apply", x.apply(&layer)?);
        push("sequential", seq().add(layer).forward(x)?);
    }
    let norms: [(&str, RmsNorm); 3] = [
        ("rms_norm", rms_norm(n, 1e-6, vb.pp("rms"))?),
        (
            "rms_norm of the module",
            layer_norm::rms_norm(n, 1e-6, vb.pp("rms"))?,
        ),
        (
            "RmsNorm::new",
            layer_norm::RmsNorm::new(weight.clone(), 1e-5),
        ),
    ];
    for (name, norm) in norms {
        assert!(format!("{norm:?}").contains("RmsNorm"));
        let mut push =
            |what: &str, result: Tensor| results.push((format!("{name} {what}"), result));
        push("eps", scalar(norm.eps())?);
        push("weight", norm.weight().clone());
        push("forward", norm.clone().forward(x)?);
        push("forward_t", norm.forward_t(x, false)?);
        push("forward_diff", norm.forward_diff(x)?);
        let variable = Var::from_tensor(x)?;
        let loss = (norm.forward_diff(&variable)? * x.sin()?)?.sum_all()?;
        let gradients = loss.backward()?;
        push(
            "gradient",
            gradients
                .get(&variable)
                .expect("an input's gradient")
                .clone(),
        );
    }
    // From a checkpoint, by the present names and by those of old TensorFlow ones.
    for [weight_name, bias_name] in [["weight", "bias"], ["gamma", "beta"]] {
        let named = [(weight_name, weight.clone()), (bias_name, bias.clone())];
        let named = named.map(|(name, value)| (format!("ln.{name}"), value));
        let vb = VarBuilder::from_tensors(named.into(), x.dtype(), x.device());
        let loaded = layer_norm(n, 1e-5, vb.pp("ln"))?;
        results.push((format!("loaded from {weight_name}"), loaded.forward(x)?));
    }
    Ok(results)
}

/// Every way to make and to run a group norm, for `[N, C, *]` of rank 3 and more.
pub(crate) fn group_norms(xs: &[Tensor]) -> Result<Results> {
    let x = &xs[0];
    let c = x.dim(1)?;
    let mut results = vec![];
    let (weight, bias) = (parameter(c, 0.5, x)?, parameter(c, -0.5, x)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());
    let layers: [(&str, GroupNorm); 4] = [
        ("group_norm", group_norm(2, c, 1e-5, vb.pp("a"))?),
        (
            "group_norm of the module",
            group_norm::group_norm(c, c, 1e-3, vb.pp("b"))?,
        ),
        (
            "new",
            GroupNorm::new(weight.clone(), bias.clone(), c, 2, 1e-5)?,
        ),
        (
            "one group",
            group_norm::GroupNorm::new(weight, bias, c, 1, 1e-5)?,
        ),
    ];
    for (name, layer) in layers {
        assert!(format!("{layer:?}").contains("GroupNorm"));
        let mut push =
            |what: &str, result: Tensor| results.push((format!("{name} {what}"), result));
        push("forward", layer.clone().forward(x)?);
        push("forward_t", layer.forward_t(x, true)?);
        let variable = Var::from_tensor(x)?;
        let loss = (layer.forward(&variable)? * x.sin()?)?.sum_all()?;
        let gradients = loss.backward()?;
        push(
            "gradient",
            gradients
                .get(&variable)
                .expect("an input's gradient")
                .clone(),
        );
    }
    assert!(GroupNorm::new(parameter(c, 0.5, x)?, parameter(c, 0.5, x)?, c, c - 1, 1e-5).is_err());
    Ok(results)
}

/// All of them in one model, trained for a few steps with an optimizer over all variables.
pub(crate) fn model(xs: &[Tensor]) -> Result<Results> {
    let x = &xs[0];
    let (c, n) = (x.dim(1)?, x.dim(x.rank() - 1)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());
    let block = Block::new(c, n, vb.pp("block"))?;
    let mut optimizer = SGD::new(vars.all_vars(), 0.05)?;
    let mut results = vec![];
    for x in xs {
        let loss = (block.forward_t(x, true)? - x.cos()?)?.sqr()?.mean_all()?;
        optimizer.backward_step(&loss)?;
        results.push(("loss".into(), loss));
    }
    results.push(("inferred".into(), block.forward_t(x, false)?));
    results.push(("running_mean".into(), block.batch.running_mean().clone()));
    results.push(("running_var".into(), block.batch.running_var().clone()));
    Ok(results)
}

/// A configuration of one's own.
struct Mine {
    eps: f64,
}

impl From<Mine> for LayerNormConfig {
    fn from(mine: Mine) -> Self {
        Self {
            affine: false,
            ..Self::from(mine.eps)
        }
    }
}

impl From<Mine> for BatchNormConfig {
    fn from(mine: Mine) -> Self {
        Self {
            momentum: 0.5,
            ..Self::from(mine.eps)
        }
    }
}

// Functions that hand on what candle's take, as those of candle-transformers do.
fn hand_on<C: Into<LayerNormConfig>>(size: usize, config: C, vb: VarBuilder) -> Result<LayerNorm> {
    layer_norm(size, config, vb)
}

fn hand_on_batch<C: Into<BatchNormConfig>>(
    size: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    batch_norm(size, config, vb)
}

/// All that converts into candle's configurations, directly and through a function.
pub(crate) fn conversions(xs: &[Tensor]) -> Result<Results> {
    let x = &rows(&xs[0])?;
    let (c, n) = (x.dim(1)?, x.dim(x.rank() - 1)?);
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());
    let eps = 1e-3;
    let plain = LayerNormConfig {
        affine: false,
        ..Default::default()
    };
    let layers: [(&str, LayerNorm); 6] = [
        ("literal", hand_on(n, 1e-5, vb.pp("a"))?),
        ("variable", hand_on(n, eps, vb.pp("b"))?),
        ("config", hand_on(n, plain, vb.pp("c"))?),
        (
            "default",
            hand_on(n, LayerNormConfig::default(), vb.pp("d"))?,
        ),
        ("own", hand_on(n, Mine { eps: 0.1 }, vb.pp("e"))?),
        (
            "own, directly",
            layer_norm(n, Mine { eps: 0.1 }, vb.pp("f"))?,
        ),
    ];
    let mut results: Results = vec![];
    for (name, layer) in layers {
        results.push((format!("{name} eps"), scalar(layer.eps())?));
        let bias = f64::from(u8::from(layer.bias().is_some()));
        results.push((format!("{name} bias"), scalar(bias)?));
        results.push((format!("{name} forward"), layer.forward(x)?));
    }
    let layers: [(&str, BatchNorm); 3] = [
        ("literal", hand_on_batch(c, 1e-5, vb.pp("g"))?),
        ("own", hand_on_batch(c, Mine { eps }, vb.pp("h"))?),
        ("own, directly", batch_norm(c, Mine { eps }, vb.pp("i"))?),
    ];
    for (name, layer) in layers {
        results.push((format!("{name} eps"), scalar(layer.eps())?));
        results.push((format!("{name} momentum"), scalar(layer.momentum())?));
        results.push((format!("{name} trained"), layer.forward_t(x, true)?));
        let variance = layer.running_var().clone();
        results.push((format!("{name} running_var"), variance));
    }
    Ok(results)
}
