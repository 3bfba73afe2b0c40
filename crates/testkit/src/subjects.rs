//! The layers that normalize an input, by one signature, each with its oracle.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::VarBuilder;
use candle_norm::{
    Affine, BatchNormOptions, BatchRenormOptions, GroupNormOptions, InstanceNormOptions,
    LayerNormOptions, RmsNormOptions, ScaleNormOptions, SwitchNormOptions,
};

use crate::compare::{assert_close_beside, assert_gradient, unit_roundoff};
use crate::data::{tensor, values, variable};
use crate::oracle;

/// A layer that normalizes by the statistics of its input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// Over the last `axes` axes.
    Layer {
        /// Number of axes that make a row.
        axes: usize,
    },
    /// Over axis 1.
    LayerChannelsFirst,
    /// Over the last axis, by the root mean square.
    LayerNoMean,
    /// Over the last `axes` axes.
    Rms {
        /// Number of axes that make a row.
        axes: usize,
        /// Number that is added to the weight.
        offset: f64,
    },
    /// Over axis 1, by the root mean square.
    RmsChannelsFirst,
    /// Over the last axis, by the length.
    Scale,
    /// Over axis 1, by the length.
    ScaleChannelsFirst,
    /// Over space and the channels of a group.
    Group {
        /// Number of groups, which divides the channels.
        groups: usize,
    },
    /// Over space.
    Instance,
    /// Over the batch and space.
    Batch,
    /// Over the batch and space, by the root mean square.
    BatchNoMean,
    /// Over the batch and space, up to the end of the warm-up.
    BatchRenorm,
    /// Mixed by [`SHARES`]; variances biased, so that one position will do.
    Switch,
}

/// Factors that the means and the variances of a [`Kind::Switch`] are mixed by: exact in every
/// dtype.
pub const SHARES: [[f64; 3]; 2] = [[0.25, -0.5, 1.], [-0.75, 1., 0.5]];

/// A layer with its ε.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Subject {
    /// The layer.
    pub kind: Kind,
    /// The number that is added to the variance.
    pub eps: f64,
}

/// The affine parameters of a layer, as many as it has.
#[derive(Debug, Clone, Default)]
pub struct Params {
    /// Scale, if the layer has one.
    pub weight: Option<Tensor>,
    /// Shift, if the layer has one.
    pub bias: Option<Tensor>,
}

impl Params {
    /// The option of a layer that has these parameters.
    pub fn affine(&self) -> Affine {
        match (&self.weight, &self.bias) {
            (None, None) => Affine::None,
            (Some(_), None) => Affine::Weight,
            (Some(_), Some(_)) => Affine::WeightAndBias,
            (None, Some(_)) => Affine::Bias,
        }
    }

    /// A weight, and a bias where there is a second tensor.
    pub fn new(params: &[Tensor]) -> Self {
        Self {
            weight: params.first().cloned(),
            bias: params.get(1).cloned(),
        }
    }

    /// The dtype of the parameters; without any, that of the input.
    fn dtype(&self, x: &Tensor) -> DType {
        self.weight
            .as_ref()
            .or(self.bias.as_ref())
            .unwrap_or(x)
            .dtype()
    }

    /// A builder that holds these parameters and fresh statistics of `features` channels.
    pub fn builder(&self, features: usize, dtype: DType) -> Result<VarBuilder<'static>> {
        let statistics = statistics(dtype);
        let mut tensors = HashMap::from([
            (
                "running_mean".to_string(),
                Tensor::zeros(features, statistics, &Device::Cpu)?,
            ),
            (
                "running_var".to_string(),
                Tensor::ones(features, statistics, &Device::Cpu)?,
            ),
        ]);
        for (name, value) in [("weight", &self.weight), ("bias", &self.bias)] {
            if let Some(value) = value {
                tensors.insert(name.to_string(), value.clone());
            }
        }
        Ok(VarBuilder::from_tensors(tensors, dtype, &Device::Cpu))
    }
}

/// A switchable norm for inputs of the rank of `x`.
fn switch(x: &Tensor, features: usize, eps: f64, params: &Params) -> Result<Box<dyn ModuleT>> {
    let cpu = &Device::Cpu;
    let dtype = params.dtype(x);
    let spatial_dims = x.rank().min(3) - 2;
    let shape = &[1, features, 1][..spatial_dims + 2];
    let [mean_weight, var_weight] =
        SHARES.map(|s| tensor(&s[..spatial_dims + 2], &[spatial_dims + 2], dtype));
    let mut tensors = vec![
        ("mean_weight", mean_weight?),
        ("var_weight", var_weight?),
        (
            "running_mean",
            Tensor::zeros(shape, statistics(dtype), cpu)?,
        ),
        ("running_var", Tensor::ones(shape, statistics(dtype), cpu)?),
    ];
    for (name, value) in [("weight", &params.weight), ("bias", &params.bias)] {
        if let Some(value) = value {
            tensors.push((name, value.reshape(shape)?));
        }
    }
    let tensors: HashMap<_, _> = (tensors.into_iter())
        .map(|(name, t)| (name.to_string(), t))
        .collect();
    let options = SwitchNormOptions {
        eps,
        affine: params.affine(),
        spatial_dims,
        unbiased: false,
        ..Default::default()
    };
    let vb = VarBuilder::from_tensors(tensors, dtype, cpu);
    Ok(Box::new(candle_norm::switch_norm(features, options, vb)?))
}

/// A scale norm of the given weight, or of one.
fn scale(
    normalized_shape: &[usize],
    options: ScaleNormOptions,
    params: &Params,
    x: &Tensor,
) -> Result<Box<dyn ModuleT>> {
    let dtype = params.dtype(x);
    let weight = match &params.weight {
        Some(weight) => weight.clone(),
        None => Tensor::ones(1, dtype, x.device())?,
    };
    let tensors = HashMap::from([("weight".to_string(), weight)]);
    let vb = VarBuilder::from_tensors(tensors, dtype, x.device());
    let norm = candle_norm::scale_norm(normalized_shape, options, vb)?;
    Ok(Box::new(norm))
}

/// The dtype of the running statistics of a model.
fn statistics(model: DType) -> DType {
    match model {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

impl Kind {
    /// Whether rows lie across memory, along axis 1.
    pub fn is_channels_first(self) -> bool {
        use Kind::*;
        matches!(
            self,
            LayerChannelsFirst | RmsChannelsFirst | ScaleChannelsFirst
        )
    }

    /// Whether the layer has a shift among its options.
    pub fn has_bias(self) -> bool {
        match self {
            Kind::Layer { .. } | Kind::LayerChannelsFirst | Kind::LayerNoMean => true,
            Kind::Rms { .. } | Kind::RmsChannelsFirst => true,
            Kind::Group { .. } | Kind::Instance | Kind::Switch => true,
            Kind::Batch | Kind::BatchNoMean | Kind::BatchRenorm => true,
            Kind::Scale | Kind::ScaleChannelsFirst => false,
        }
    }

    /// The largest number of affine parameters.
    pub fn num_params(self) -> usize {
        1 + usize::from(self.has_bias())
    }
}

impl Subject {
    /// A layer with its ε.
    pub fn new(kind: Kind, eps: f64) -> Self {
        Self { kind, eps }
    }

    /// The layer that gives for inputs times `scale` what this one gives for the inputs.
    pub fn scaled(self, scale: f64) -> Self {
        let eps = match self.kind {
            Kind::Layer { .. } | Kind::LayerChannelsFirst | Kind::LayerNoMean => scale * scale,
            Kind::Rms { .. } | Kind::RmsChannelsFirst => scale * scale,
            Kind::Group { .. } | Kind::Instance | Kind::Switch => scale * scale,
            Kind::Batch | Kind::BatchNoMean | Kind::BatchRenorm => scale * scale,
            Kind::Scale | Kind::ScaleChannelsFirst => scale.abs(),
        };
        Self {
            eps: self.eps * eps,
            ..self
        }
    }

    /// The shape of the parameters for an input of shape `dims`.
    pub fn param_dims<'a>(&self, dims: &'a [usize]) -> &'a [usize] {
        match self.kind {
            Kind::Layer { axes } | Kind::Rms { axes, .. } => &dims[dims.len() - axes..],
            Kind::LayerNoMean => &dims[dims.len() - 1..],
            Kind::Scale | Kind::ScaleChannelsFirst => &[1],
            _ => &dims[1..2],
        }
    }

    /// The layer, built anew from a checkpoint, in training.
    pub fn forward(&self, x: &Tensor, params: &Params) -> Result<Tensor> {
        self.build(x, params)?.forward_t(x, true)
    }

    /// The layer for inputs of the shape and dtype of `x`.
    pub fn build(&self, x: &Tensor, params: &Params) -> Result<Box<dyn ModuleT>> {
        let (eps, affine) = (self.eps, params.affine());
        let shape = self.param_dims(x.dims()).to_vec();
        let dtype = params.dtype(x);
        let features = shape[0];
        let vb = params.builder(features, dtype)?;
        let layer = LayerNormOptions {
            eps,
            affine,
            ..Default::default()
        };
        let rms = RmsNormOptions {
            eps: Some(eps),
            affine,
            ..Default::default()
        };
        let batch = BatchNormOptions {
            eps,
            affine,
            ..Default::default()
        };
        Ok(match self.kind {
            Kind::Layer { .. } => Box::new(candle_norm::layer_norm(shape, layer, vb)?),
            Kind::LayerChannelsFirst => {
                let options = LayerNormOptions {
                    channels_first: true,
                    ..layer
                };
                Box::new(candle_norm::layer_norm(shape, options, vb)?)
            }
            Kind::LayerNoMean => {
                let options = LayerNormOptions {
                    remove_mean: false,
                    ..layer
                };
                Box::new(candle_norm::layer_norm(shape, options, vb)?)
            }
            Kind::Rms { offset, .. } => {
                let options = RmsNormOptions { offset, ..rms };
                Box::new(candle_norm::rms_norm(shape, options, vb)?)
            }
            Kind::RmsChannelsFirst => {
                let options = RmsNormOptions {
                    channels_first: true,
                    ..rms
                };
                Box::new(candle_norm::rms_norm(shape, options, vb)?)
            }
            Kind::Scale => scale(&x.dims()[x.rank() - 1..], eps.into(), params, x)?,
            Kind::ScaleChannelsFirst => {
                let options = ScaleNormOptions {
                    channels_first: true,
                    ..eps.into()
                };
                scale(&x.dims()[1..2], options, params, x)?
            }
            Kind::Group { groups } => {
                let options = GroupNormOptions {
                    eps,
                    affine,
                    ..Default::default()
                };
                Box::new(candle_norm::group_norm(groups, features, options, vb)?)
            }
            Kind::Instance => {
                let options = InstanceNormOptions {
                    eps,
                    affine,
                    ..Default::default()
                };
                Box::new(candle_norm::instance_norm(features, options, vb)?)
            }
            Kind::Batch => Box::new(candle_norm::batch_norm(features, batch, vb)?),
            Kind::BatchNoMean => {
                let options = BatchNormOptions {
                    remove_mean: false,
                    ..batch
                };
                Box::new(candle_norm::batch_norm(features, options, vb)?)
            }
            Kind::BatchRenorm => {
                let options = BatchRenormOptions {
                    affine,
                    ..eps.into()
                };
                Box::new(candle_norm::batch_renorm(features, options, vb)?)
            }
            Kind::Switch => switch(x, features, eps, params)?,
        })
    }

    /// The same normalization in float64, for inputs of shape `dims`.
    pub fn oracle(&self, dims: &[usize]) -> oracle::Norm {
        let eps = self.eps;
        match self.kind {
            Kind::Layer { axes } => oracle::Norm::layer(dims, axes, eps),
            Kind::LayerChannelsFirst => oracle::Norm::layer_channels_first(dims, eps),
            Kind::LayerNoMean => oracle::Norm::layer(dims, 1, eps).without_mean(),
            Kind::Rms { axes, offset } => {
                let norm = oracle::Norm::layer(dims, axes, eps).without_mean();
                norm.with_offset(offset)
            }
            Kind::RmsChannelsFirst => oracle::Norm::layer_channels_first(dims, eps).without_mean(),
            Kind::Scale => oracle::Norm::scale(dims, dims.len() - 1, eps),
            Kind::ScaleChannelsFirst => oracle::Norm::scale(dims, 1, eps),
            Kind::Group { groups } => oracle::Norm::group(dims, groups, eps),
            Kind::Instance => oracle::Norm::instance(dims, eps),
            Kind::Batch => oracle::Norm::batch(dims, eps),
            Kind::BatchRenorm => oracle::Norm::batch(dims, eps),
            Kind::BatchNoMean => oracle::Norm::batch(dims, eps).without_mean(),
            Kind::Switch => oracle::Norm::switch(dims, SHARES.each_ref().map(|s| &s[..]), eps),
        }
    }

    /// Runs the layer on `x`, a variable, and backpropagates `dy`.
    pub fn run(&self, x: &Tensor, params: &Params, dy: &Tensor) -> Result<Ran> {
        let y = self.forward(x, params)?;
        let grads = backward(&y, dy)?;
        let gradient = |t: &Option<Tensor>| t.as_ref().map(|t| gradient(&grads, t));
        Ok(Ran {
            dx: gradient(&Some(x.clone())).expect("x is there"),
            dweight: gradient(&params.weight),
            dbias: gradient(&params.bias),
            y,
        })
    }
}

/// The gradients of `Σ dy · y`.
pub fn backward(y: &Tensor, dy: &Tensor) -> Result<GradStore> {
    (y * dy)?.sum_all()?.backward()
}

/// The gradients of `Σ dy · y` with respect to some variables, in row-major order.
pub fn gradients(y: &Tensor, dy: &Tensor, of: &[&Tensor]) -> Result<Vec<Vec<f64>>> {
    let grads = backward(y, dy)?;
    let of = of.iter().map(|t| match grads.get(t) {
        Some(grad) => values(grad),
        None => candle_core::bail!("no gradient"),
    });
    of.collect()
}

/// The gradient of a variable, which must have its shape and dtype.
#[track_caller]
pub fn gradient(grads: &GradStore, of: &Tensor) -> Tensor {
    let found = grads.get(of).expect("a gradient that reaches every leaf");
    assert_eq!(found.dims(), of.dims(), "shape of a gradient");
    assert_eq!(found.dtype(), of.dtype(), "dtype of a gradient");
    found.clone()
}

/// Results of a layer: the output, and the gradients.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Output.
    pub y: Tensor,
    /// Gradient of the input.
    pub dx: Tensor,
    /// Gradient of the weight, if there is one.
    pub dweight: Option<Tensor>,
    /// Gradient of the bias, if there is one.
    pub dbias: Option<Tensor>,
}

impl Ran {
    /// All tensors, by name.
    pub fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let mut named = vec![("y", &self.y), ("dx", &self.dx)];
        named.extend(self.dweight.iter().map(|t| ("dweight", t)));
        named.extend(self.dbias.iter().map(|t| ("dbias", t)));
        named
    }
}

/// Numbers for one call of a layer.
#[derive(Debug, Clone)]
pub struct Numbers {
    /// Input, in row-major order.
    pub x: Vec<f64>,
    /// Gradient that comes back to the output.
    pub dy: Vec<f64>,
    /// Scale, if the layer has one.
    pub weight: Option<Vec<f64>>,
    /// Shift, if the layer has one.
    pub bias: Option<Vec<f64>>,
}

/// The dtypes of an input and of the parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DTypes {
    /// Of the input, and so of the output.
    pub input: DType,
    /// Of weight and bias.
    pub params: DType,
}

impl From<DType> for DTypes {
    fn from(dtype: DType) -> Self {
        Self {
            input: dtype,
            params: dtype,
        }
    }
}

impl Numbers {
    /// The layer in `dtypes`, on these numbers rounded to them.
    pub fn run(&self, subject: Subject, dims: &[usize], dtypes: DTypes) -> Result<Ran> {
        let param = |values: &Option<Vec<f64>>| {
            let dims = subject.param_dims(dims);
            values
                .as_ref()
                .map(|v| variable(v, dims, dtypes.params))
                .transpose()
        };
        let params = Params {
            weight: param(&self.weight)?,
            bias: param(&self.bias)?,
        };
        let x = variable(&self.x, dims, dtypes.input)?;
        subject.run(&x, &params, &tensor(&self.dy, dims, dtypes.input)?)
    }

    /// The numbers as tensors of `dtypes` hold them.
    pub fn rounded(&self, dtypes: DTypes) -> Result<Self> {
        let round = |v: &[f64], dtype| values(&tensor(v, &[v.len()], dtype)?);
        let param = |v: &Option<Vec<f64>>| v.as_ref().map(|v| round(v, dtypes.params)).transpose();
        Ok(Self {
            x: round(&self.x, dtypes.input)?,
            dy: round(&self.dy, dtypes.input)?,
            weight: param(&self.weight)?,
            bias: param(&self.bias)?,
        })
    }

    /// Panics unless the layer in `dtypes` gives what the oracle does, output and gradients,
    /// contiguous.
    #[track_caller]
    pub fn check(&self, subject: Subject, dims: &[usize], dtypes: DTypes, tolerance: f64) {
        let ran = self.run(subject, dims, dtypes).unwrap();
        self.check_against_oracle(&ran, subject, dims, dtypes, tolerance);
    }

    /// Panics unless `ran` is what the oracle gives, output and gradients, contiguous.
    #[track_caller]
    pub fn check_against_oracle(
        &self,
        ran: &Ran,
        subject: Subject,
        dims: &[usize],
        dtypes: DTypes,
        tolerance: f64,
    ) {
        let n = self.rounded(dtypes).unwrap();
        let (weight, bias) = (n.weight.as_deref(), n.bias.as_deref());
        let oracle = subject.oracle(dims);
        let forward = oracle.forward(&n.x, weight, bias);
        let back = oracle.backward(&n.x, weight, &n.dy);
        // The distance from the mean, 1/σ, and their products with each other and the weight are
        // each rounded, which a bias that cancels the product leaves.
        let unit = unit_roundoff(dtypes.input);
        let rounding: Vec<f64> = match bias {
            Some(_) => forward.products.iter().map(|p| 4. * unit * p).collect(),
            None => vec![0.; n.x.len()],
        };
        assert_eq!(ran.y.dims(), dims);
        assert_eq!(ran.y.dtype(), dtypes.input);
        for (name, t) in ran.named() {
            assert!(t.is_contiguous(), "{name} is not contiguous");
            let what = format!("{:?}: {name} of {dims:?} in {dtypes:?}", subject.kind);
            match name {
                "y" => assert_close_beside(&what, t, &forward.y, &rounding, tolerance),
                "dx" => assert_gradient(&what, t, &back.dx, tolerance),
                "dweight" => assert_gradient(&what, t, &back.dweight, tolerance),
                _ => assert_gradient(&what, t, &back.dbias, tolerance),
            }
        }
    }
}
