//! Scale and shift from outside, after a norm or alone.

use candle_core::{Result, Tensor, bail};
use candle_nn::Activation as Named;

use super::activation::fused;
use super::check;
use super::instance_norm::more_than_one_position;
use crate::computations::composed::{self, Along};
use crate::computations::{Activation, Groups, Modulate, Spread};
use crate::graph;

/// Scale and shift from outside of a layer, such as those that a condition is projected to.
///
/// `y = norm(x) · (offset + scale) + shift`. A norm with an affine pair of its own applies that
/// first: `norm(x) = x̂ · w + b`.
///
/// Scale and shift may differ in shape, and either may be absent. They have the dtype of `x`;
/// beside half precision also `f32`. All is computed in `f32` there and rounded once.
///
/// | `x` | scale and shift |
/// | --- | --- |
/// | features last, `[B, *, C]` | `[C]`, `[B, C]`, `[B, 1, .., C]`, or the shape of `x` |
/// | channels first, `[N, C, *]` | `[C]`, `[N, C]`, `[N, C, 1, ..]`, or the shape of `x` |
///
/// `[B, C]` is one row for each sample, also where `B` is `C`. A batch axis of 1 is broadcast, and
/// its gradient summed. For a norm over several trailing axes, `C` stands for all of them.
///
/// | model | norm | offset |
/// | --- | --- | --- |
/// | DiT, SD3, Flux, PixArt, Wan, Lumina (AdaLN) | layer or RMS, no affine pair | 1 |
/// | ADM, diffusers `AdaGroupNorm` | group | 1 |
/// | StyleTTS 2 and Kokoro `AdaIN1d`; SPADE | instance; batch | 1 |
/// | BigGAN (conditional batch norm) | batch | 1 |
/// | VQ `SpatialNorm`; NeMo `ConditionalLayerNorm`; AdaIN of two maps | group; layer; instance | 0 |
/// | FiLM | none: [`modulate`] | 1 or 0 |
///
/// FiLM: <https://arxiv.org/abs/1709.07871>; conditional batch norm:
/// <https://arxiv.org/abs/1707.00683>; AdaIN: <https://arxiv.org/abs/1703.06868>; SPADE:
/// <https://arxiv.org/abs/1903.07291>; AdaGN: <https://arxiv.org/abs/2105.05233>; AdaLN-Zero:
/// <https://arxiv.org/abs/2212.09748>.
#[derive(Debug, Clone, Copy)]
pub struct Modulation<'a> {
    /// Factor, less the offset; `None` is zero.
    pub scale: Option<&'a Tensor>,
    /// Summand; `None` is zero.
    pub shift: Option<&'a Tensor>,
    /// Added to the scale. Default: 1, with which a scale of zero changes nothing.
    pub offset: f64,
}

impl Default for Modulation<'_> {
    fn default() -> Self {
        Self::new(None, None)
    }
}

impl<'a> Modulation<'a> {
    /// A modulation of offset 1.
    pub fn new(scale: Option<&'a Tensor>, shift: Option<&'a Tensor>) -> Self {
        Self {
            scale,
            shift,
            offset: 1.,
        }
    }

    /// The same with another offset.
    pub fn with_offset(self, offset: f64) -> Self {
        Self { offset, ..self }
    }
}

/// Steps after the normalization: the affine pair of a layer, a modulation, an activation.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scaling<'a> {
    pub(crate) weight: Option<&'a Tensor>,
    pub(crate) bias: Option<&'a Tensor>,
    pub(crate) modulation: Option<Modulation<'a>>,
    pub(crate) activation: Option<Activation>,
}

impl<'a> Scaling<'a> {
    pub(crate) fn new(weight: Option<&'a Tensor>, bias: Option<&'a Tensor>) -> Self {
        Self {
            weight,
            bias,
            modulation: None,
            activation: None,
        }
    }

    /// The same with an activation of `layer` after it.
    pub(crate) fn activated(self, layer: &str, activation: Option<Named>) -> Result<Self> {
        Ok(Self {
            activation: fused(layer, activation)?,
            ..self
        })
    }

    pub(crate) fn modulated(self, modulation: &Modulation<'a>) -> Self {
        Self {
            modulation: Some(*modulation),
            ..self
        }
    }

    /// All tensors that there may be.
    pub(super) fn tensors(&self) -> [Option<&'a Tensor>; 4] {
        let outside = self.modulation.unwrap_or_default();
        [self.weight, self.bias, outside.scale, outside.shift]
    }

    /// Checks that scale and shift fit `x`.
    pub(super) fn check(&self, layer: &str, x: &Tensor, features: Features) -> Result<()> {
        let Some(Modulation {
            scale,
            shift,
            offset,
        }) = self.modulation
        else {
            return Ok(());
        };
        check::finite(layer, "offset", offset)?;
        for (name, value) in [("scale", scale), ("shift", shift)] {
            if let Some(value) = value {
                check::float(layer, name, value)?;
                form(layer, name, value, x, features)?;
                check::param_dtype(layer, name, value, x)?;
                check::same_device(layer, name, value, x.device())?;
            }
        }
        Ok(())
    }

    /// One weight and one bias that do the same; `offset` is added to the weight of the layer.
    /// `x` is not empty, and everything fits.
    pub(super) fn merged(
        &self,
        layer: &str,
        x: &Tensor,
        features: Features,
        offset: f64,
    ) -> Result<Merged> {
        let (weight, bias) = (self.weight.cloned(), self.bias.cloned());
        let Some(modulation) = self.modulation else {
            return Ok(Merged {
                weight,
                bias,
                form: Form::Shared,
                offset,
            });
        };
        let acc = composed::accumulator(x.dtype());
        let own = |p: Option<Tensor>| p.map(|p| p.flatten_all()?.to_dtype(acc)).transpose();
        let weight = own(weight)?
            .map(|w| if offset == 0. { Ok(w) } else { w + offset })
            .transpose()?;
        let bias = own(bias)?;
        let place = Place::new(x, features);
        let outside = |name, value: Option<&Tensor>| -> Result<_> {
            let Some(value) = value else { return Ok(None) };
            let (form, is_shared_batch) = form(layer, name, value, x, features)?;
            let value = place.canonical(&value.to_dtype(acc)?, form, is_shared_batch)?;
            Ok(Some((value, form)))
        };
        let scale = outside("scale", modulation.scale)?;
        let shift = outside("shift", modulation.shift)?;
        let form = [&scale, &shift].into_iter().flatten().map(|s| s.1).max();
        let form = form.unwrap_or(Form::Shared);
        let factor = scale
            .map(|(scale, form)| Ok::<_, candle_core::Error>(((scale + modulation.offset)?, form)))
            .transpose()?;
        // The layer's value times the factor, and the form of the product.
        let scaled = |own: &Option<Tensor>| -> Result<Option<(Tensor, Form)>> {
            let Some(own) = own else { return Ok(None) };
            Ok(Some(match &factor {
                // candle drops gradients where a tensor is multiplied by the number 0.
                None => (
                    (own * (own.ones_like()? * modulation.offset)?)?,
                    Form::Shared,
                ),
                Some((factor, form)) => {
                    let dims = place.dims(*form).to_vec();
                    let factor = factor.reshape(dims)?;
                    (composed::scale_shift(&factor, Some(own), None)?, *form)
                }
            }))
        };
        let full = match &weight {
            Some(_) => scaled(&weight)?,
            None if factor.is_some() => factor.clone(),
            None if modulation.offset == 1. => None,
            None => {
                let len = place.dims(Form::Shared)[1];
                let factor = Tensor::full(modulation.offset, len, x.device())?.to_dtype(acc)?;
                Some((factor, Form::Shared))
            }
        };
        let widened = |value: Option<(Tensor, Form)>| {
            value
                .map(|(value, from)| place.widened(value, from, form))
                .transpose()
        };
        let weight = widened(full)?;
        let bias = match [widened(scaled(&bias)?)?, widened(shift)?] {
            [Some(bias), Some(shift)] => Some((bias.reshape(shift.shape())? + shift)?),
            [bias, shift] => bias.or(shift),
        };
        Ok(Merged {
            weight,
            bias,
            form,
            offset: 0.,
        })
    }
}

/// A weight and a bias, and how they are spread.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) weight: Option<Tensor>,
    pub(super) bias: Option<Tensor>,
    pub(super) form: Form,
    /// Yet to be added to the weight.
    pub(super) offset: f64,
}

impl Merged {
    /// How weight and bias of channels are spread.
    pub(super) fn spread(&self) -> Spread {
        match self.form {
            Form::Shared => Spread::Channel,
            Form::Sample => Spread::SampleAndChannel,
            Form::Element => Spread::Element,
        }
    }
}

/// Where the features of an input lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Features<'a> {
    /// On the last axes, of this shape.
    Last(&'a [usize]),
    /// On axis 1.
    First,
}

/// Parts of an input that have a scale in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Form {
    /// A feature.
    Shared,
    /// A feature of a sample.
    Sample,
    /// An element.
    Element,
}

/// The form of a scale or shift, and whether it has one element for all samples of an axis of its
/// own.
fn form(
    layer: &str,
    name: &str,
    value: &Tensor,
    x: &Tensor,
    features: Features,
) -> Result<(Form, bool)> {
    let (dims, got) = (x.dims(), value.dims());
    let (feature, middle): (&[usize], &[usize]) = match features {
        Features::Last(shape) => {
            let lead = &dims[..dims.len() - shape.len()];
            (shape, lead.get(1..).unwrap_or_default())
        }
        Features::First => (&dims[1..2], &dims[2..]),
    };
    if got == feature {
        return Ok((Form::Shared, false));
    }
    if got == dims {
        return Ok((Form::Element, false));
    }
    let has_batch = dims.len() > feature.len();
    if let (true, Some((&batch, rest))) = (has_batch, got.split_first())
        && (batch == 1 || batch == dims[0])
    {
        let ones = vec![1; middle.len()];
        let with = |middle: &[usize]| match features {
            Features::Last(_) => [middle, feature].concat(),
            Features::First => [feature, middle].concat(),
        };
        if rest == feature || rest == with(&ones) {
            return Ok(match batch == dims[0] {
                true => (Form::Sample, false),
                false => (Form::Shared, false),
            });
        }
        if rest == with(middle) {
            return Ok((Form::Element, true));
        }
    }
    let batch = dims.first().copied().unwrap_or_default();
    let sample = match has_batch {
        true => format!(", {:?}", [&[batch], feature].concat()),
        false => String::new(),
    };
    bail!(
        "{layer}: expected a {name} of shape {feature:?}{sample} or the input's {dims:?}, got \
        {got:?}; expand it with broadcast_as"
    )
}

/// An input as scales and shifts see it.
#[derive(Debug, Clone, Copy)]
struct Place {
    samples: usize,
    /// Positions of a sample: tokens, or places of a map.
    positions: usize,
    features: usize,
    is_last: bool,
}

impl Place {
    fn new(x: &Tensor, features: Features) -> Self {
        let samples = match features {
            Features::Last(shape) if shape.len() == x.rank() => 1,
            _ => x.dims()[0],
        };
        let count = match features {
            Features::Last(shape) => shape.iter().product(),
            Features::First => x.dims()[1],
        };
        Self {
            samples,
            positions: x.elem_count() / (samples * count),
            features: count,
            is_last: matches!(features, Features::Last(_)),
        }
    }

    /// Axes of a scale of this form, features in the middle.
    fn dims(self, form: Form) -> [usize; 3] {
        match form {
            Form::Shared => [1, self.features, 1],
            Form::Sample => [self.samples, self.features, 1],
            Form::Element if self.is_last => [self.samples * self.positions, self.features, 1],
            Form::Element => [self.samples, self.features, self.positions],
        }
    }

    /// The values of all samples.
    fn canonical(self, value: &Tensor, form: Form, is_shared_batch: bool) -> Result<Tensor> {
        let value = value.contiguous()?;
        if !is_shared_batch {
            return value.flatten_all();
        }
        let dims = (self.samples, value.elem_count(), 1);
        let zeros = Tensor::zeros(dims, value.dtype(), value.device())?;
        let all = composed::scale_shift(&zeros, None, Some(&value.flatten_all()?))?;
        debug_assert!(form == Form::Element);
        all.flatten_all()
    }

    /// Values of one form in that of another, which is as wide.
    fn widened(self, value: Tensor, from: Form, to: Form) -> Result<Tensor> {
        if from == to {
            return value.flatten_all();
        }
        let value = value.flatten_all()?;
        let zeros = |dims: [usize; 3]| Tensor::zeros(&dims, value.dtype(), value.device());
        let [a, b, c] = self.dims(to);
        let wide = match from {
            Form::Sample if self.is_last => {
                let zeros = zeros([self.samples, self.positions, self.features])?;
                composed::affine(&zeros, None, Some(&value), Along::Ends)?
            }
            Form::Sample => composed::scale_shift(&zeros([1, a * b, c])?, None, Some(&value))?,
            _ => composed::scale_shift(&zeros([a, b, c])?, None, Some(&value))?,
        };
        wide.flatten_all()
    }
}

/// `y = x · (offset + scale) + shift`, without a norm: FiLM
/// (Perez et al., 2017, <https://arxiv.org/abs/1709.07871>).
///
/// # Shapes
/// `x`: `[*, C]`, or `[N, C, *]` with `channels_first`; scale and shift as [`Modulation`] says; the
/// result has the shape and dtype of `x` and is contiguous.
///
/// # Errors
/// A scale or shift of another shape, dtype or device; an offset that is not finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops::{self, Modulation};
///
/// let x = Tensor::new(&[[[1f64, 2.]], [[3., 4.]]], &Device::Cpu)?;
/// let scale = Tensor::new(&[[0f64, 1.], [2., 0.]], &Device::Cpu)?;
/// let y = ops::modulate(&x, &Modulation::new(Some(&scale), None), false)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f64>()?, [1., 4., 9., 4.]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn modulate(x: &Tensor, modulation: &Modulation, channels_first: bool) -> Result<Tensor> {
    let layer = "modulate";
    if channels_first {
        check::rank_at_least(layer, x, 2, "[N, C, ...]")?;
        return modulate_in(layer, x, modulation, None);
    }
    check::rank_at_least(layer, x, 1, "[*, C]")?;
    let last = &x.dims()[x.rank() - 1..];
    modulate_in(layer, x, modulation, Some(last))
}

/// [`modulate`] in the name of a layer, which took an `x` whose trailing axes are features, or axis
/// 1 if no shape of them is given.
pub(crate) fn modulate_in(
    layer: &'static str,
    x: &Tensor,
    modulation: &Modulation,
    trailing: Option<&[usize]>,
) -> Result<Tensor> {
    check::input(layer, x, &[])?;
    let features = match trailing {
        Some(shape) => Features::Last(shape),
        None => Features::First,
    };
    let scaling = Scaling::default().modulated(modulation);
    scaling.check(layer, x, features)?;
    if x.elem_count() == 0 {
        return graph::empty(layer, x, &scaling.tensors());
    }
    let merged = scaling.merged(layer, x, features, 0.)?;
    let place = Place::new(x, features);
    let (dims, along) = match (merged.form, place.is_last) {
        (Form::Shared, true) => (
            [place.samples * place.positions, place.features, 1],
            Along::Middle,
        ),
        (Form::Shared, false) => (place.dims(Form::Element), Along::Middle),
        (Form::Sample, true) => (
            [place.samples, place.positions, place.features],
            Along::Ends,
        ),
        (Form::Sample, false) => (
            [1, place.samples * place.features, place.positions],
            Along::Middle,
        ),
        (Form::Element, _) => ([1, 1, x.elem_count()], Along::All),
    };
    let computation = Modulate { layer, dims, along };
    graph::apply(
        computation,
        &x.contiguous()?,
        merged.weight.as_ref(),
        merged.bias.as_ref(),
    )
}

/// Adaptive instance normalization: the content with the means and deviations of the style, channel
/// by channel (Huang and Belongie, 2017, <https://arxiv.org/abs/1703.06868>).
///
/// `y = (x − μ(x)) / √(σ²(x) + eps) · √(σ²(s) + eps) + μ(s)` for content `x` and style `s`, all
/// variances biased. Gradients flow into both. The authors' code takes unbiased variances: at equal
/// sizes the two differ only through `eps`, else by `√((n−1)·m / (n·(m−1)))` for `n` positions of
/// the content and `m` of the style.
///
/// # Shapes
/// `content`: `[N, C, *]`, `style`: `[N, C, *]` or `[1, C, *]`, of rank at least 3 and of any size
/// in space; the result has the shape and dtype of the content and is contiguous.
///
/// # Errors
/// A style of another batch size, number of channels, dtype or device; one spatial element in
/// either; `eps` that is not positive and finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::ops;
///
/// let content = Tensor::new(&[[[1f64, 3.]]], &Device::Cpu)?;
/// let style = Tensor::new(&[[[10f64, 30., 10., 30.]]], &Device::Cpu)?;
/// let y = ops::adain(&content, &style, 1e-9)?.to_vec3::<f64>()?;
/// assert!((y[0][0][0] - 10.).abs() < 1e-6 && (y[0][0][1] - 30.).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn adain(content: &Tensor, style: &Tensor, eps: f64) -> Result<Tensor> {
    let layer = "AdaIN";
    check::eps(layer, eps)?;
    for x in [content, style] {
        check::rank_at_least(layer, x, 3, "[N, C, ...]")?;
        check::input(layer, x, &[])?;
    }
    let (n, c) = (content.dims()[0], content.dims()[1]);
    let (styles, channels) = (style.dims()[0], style.dims()[1]);
    if channels != c || (styles != n && styles != 1) {
        bail!(
            "{layer}: expected a style of shape [{n}, {c}, ...] or [1, {c}, ...], got {:?}",
            style.dims()
        )
    }
    if style.dtype() != content.dtype() {
        bail!(
            "{layer}: expected a style of the content's dtype {:?}, got {:?}; convert one of them \
            with to_dtype",
            content.dtype(),
            style.dtype()
        )
    }
    check::same_device(layer, "style", style, content.device())?;
    if content.elem_count() == 0 || style.elem_count() == 0 {
        if content.elem_count() > 0 {
            bail!(
                "{layer}: expected a style with elements, got {:?}",
                style.dims()
            )
        }
        return graph::empty(layer, content, &[Some(style)]);
    }
    for x in [content, style] {
        let positions = x.elem_count() / (x.dims()[0] * c);
        more_than_one_position(layer, positions, x)?;
    }
    let groups = Groups::of(layer, style, c, eps);
    let [mean, std] = groups.mean_and_std(style)?;
    let by_channel = |t: Tensor| t.reshape((styles, c));
    let (mean, std) = (by_channel(mean)?, by_channel(std)?);
    let modulation = Modulation::new(Some(&std), Some(&mean)).with_offset(0.);
    let scaling = Scaling::default().modulated(&modulation);
    let merged = scaling.merged(layer, content, Features::First, 0.)?;
    let groups = Groups {
        spread: merged.spread(),
        ..Groups::of(layer, content, c, eps)
    };
    let (weight, bias) = (merged.weight.as_ref(), merged.bias.as_ref());
    graph::apply(groups, content, weight, bias)
}
