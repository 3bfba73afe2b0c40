// A file of a model as it is written for candle-nn: it names no other crate of layers, and it stays
// as it is when that name stands for
// `candle_norm::nn`. It is compiled both ways.

use candle_core::{DType, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{
    Conv1d, Conv1dConfig, ConvTranspose1d, ConvTranspose1dConfig, LayerNorm, Module, VarBuilder,
    VarMap, layer_norm, ops,
};

/// The results of a run by name, for the other run to be compared with.
pub(crate) type Results = Vec<(String, Tensor)>;

// What a checkpoint's configuration holds.
struct Config {
    size: String,
    eps: f32,
}

// Types that are known from candle's signatures alone.
struct Norms {
    rms: candle_nn::RmsNorm,
    group: candle_nn::GroupNorm,
    layer: LayerNorm,
    plain: candle_nn::layer_norm::LayerNorm,
}

impl Norms {
    fn new(config: &Config, vb: VarBuilder) -> Result<Self> {
        let size = || config.size.parse().unwrap_or_default();
        Ok(Self {
            rms: candle_nn::rms_norm(size(), config.eps.into(), vb.pp("rms"))?,
            group: candle_nn::group_norm(1, 1, config.eps.into(), vb.pp("group"))?,
            layer: layer_norm(size(), f64::from(config.eps), vb.pp("layer"))?,
            plain: candle_nn::layer_norm_no_bias(size(), config.eps.into(), vb.pp("plain"))?,
        })
    }
}

fn parameter(size: usize, offset: f64, xs: &Tensor) -> Result<Tensor> {
    let ramp = Tensor::arange(0u32, size as u32, xs.device())?.to_dtype(xs.dtype())?;
    (ramp * 0.25)? + offset
}

/// The functions of `ops` over the last axis. candle's fused ones know no f64.
pub(crate) fn functions(xs: &[Tensor]) -> Result<Results> {
    let x = &xs[0];
    let n = x.dim(x.rank() - 1)?;
    let (alpha, beta) = (parameter(n, 0.5, x)?, parameter(n, -0.5, x)?);
    let mut results: Results = vec![
        ("softmax_last_dim".into(), softmax_last_dim(x)?),
        ("softmax".into(), candle_nn::ops::softmax(x, 0)?),
        (
            "layer_norm_slow".into(),
            ops::layer_norm_slow(x, &alpha, &beta, 1e-5)?,
        ),
        ("rms_norm_slow".into(), ops::rms_norm_slow(x, &alpha, 1e-5)?),
        ("silu".into(), candle_nn::ops::silu(x)?),
    ];
    if x.dtype() == DType::F32 {
        let fused: fn(&Tensor, &Tensor, f32) -> Result<Tensor> = candle_nn::ops::rms_norm;
        results.push(("rms_norm".into(), fused(x, &alpha, 1e-5)?));
        let y = candle_nn::ops::layer_norm(x, &alpha, &beta, 1e-5)?;
        results.push(("layer_norm".into(), y));
        let vars = VarMap::new();
        let config = Config {
            size: n.to_string(),
            eps: 1e-3,
        };
        let vb = VarBuilder::from_varmap(&vars, x.dtype(), x.device());
        let norms = Norms::new(&config, vb)?;
        let y = norms.rms.forward(x)?.apply(&norms.layer)?;
        let y = y.apply(&norms.plain)?.reshape((x.elem_count(), 1, 1))?;
        results.push((
            "norms".into(),
            y.broadcast_as((x.elem_count(), 1, 2))?
                .apply(&norms.group)?,
        ));
    }
    Ok(results)
}

/// Convolutions of `[1, C, L]`, all ways to make and run them.
pub(crate) fn convolutions(xs: &[Tensor]) -> Result<Results> {
    let x = &xs[0];
    let c = x.dim(1)?;
    let mut results: Results = vec![];
    let config = Conv1dConfig {
        padding: 1,
        stride: 2,
        dilation: 1,
        groups: 2,
        ..Default::default()
    };
    let up = ConvTranspose1dConfig {
        padding: 1,
        stride: 2,
        ..Default::default()
    };
    let weight = parameter(4 * c / 2 * 3, -1., x)?.reshape((4, c / 2, 3))?;
    let up_weight = parameter(c * 4 * 3, -1., x)?.reshape((c, 4, 3))?;
    let named = [
        ("down.weight", weight.clone()),
        ("down.bias", parameter(4, 0.5, x)?),
        ("up.weight", up_weight.clone()),
        ("up.bias", parameter(4, 0.5, x)?),
    ];
    let named = named.map(|(name, value)| (name.to_string(), value));
    let vb = VarBuilder::from_tensors(named.into(), x.dtype(), x.device());
    let down: [Conv1d; 4] = [
        Conv1d::new(weight, Some(parameter(4, 0.1, x)?), config),
        candle_nn::conv1d(c, 4, 3, config, vb.pp("down"))?,
        candle_nn::conv1d_no_bias(c, 4, 3, config, vb.pp("down"))?,
        candle_nn::conv::conv1d(c, 4, 3, config, vb.pp("down"))?,
    ];
    for layer in down {
        assert!(layer.config() == &config && format!("{layer:?}").contains("Conv1d"));
        results.push(("weight".into(), layer.weight().clone()));
        results.extend(layer.bias().map(|bias| ("bias".into(), bias.clone())));
        results.push(("forward".into(), layer.clone().forward(x)?));
        results.push(("apply".into(), x.apply(&layer)?));
        results.push(("sequential".into(), candle_nn::seq().add(layer).forward(x)?));
    }
    let layers: [ConvTranspose1d; 3] = [
        ConvTranspose1d::new(up_weight, None, up),
        candle_nn::conv_transpose1d(c, 4, 3, up, vb.pp("up"))?,
        candle_nn::conv_transpose1d_no_bias(c, 4, 3, up, vb.pp("up"))?,
    ];
    for layer in layers {
        assert!(layer.config() == &up && format!("{layer:?}").contains("ConvTranspose1d"));
        results.push(("weight".into(), layer.weight().clone()));
        results.extend(layer.bias().map(|bias| ("bias".into(), bias.clone())));
        results.push(("forward".into(), layer.clone().forward(x)?));
    }
    Ok(results)
}
