//! Every rule an input must meet and every message a user can get.
//!
//! A message names the layer, says what was expected and what came, and, where there is one, the remedy.

pub(crate) mod averages;
pub(crate) mod scaling;
pub(crate) mod series;

use candle_core::{DType, Device, Result, Tensor, bail};

use super::linear_map::Geometry;

/// The dtypes that the layers compute on.
const FLOATS: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

/// A parameter as a layer declares it: its name, its value, and the shape it must have.
pub(crate) struct Param<'a> {
    pub(crate) name: &'static str,
    pub(crate) value: &'a Tensor,
    pub(crate) shape: &'a [usize],
}

impl<'a> Param<'a> {
    /// The affine pair of a layer, as far as it has one.
    pub(crate) fn affine(
        weight: Option<&'a Tensor>,
        bias: Option<&'a Tensor>,
        shape: &'a [usize],
    ) -> Vec<Self> {
        let named = [("weight", weight), ("bias", bias)];
        named
            .into_iter()
            .filter_map(|(name, value)| value.map(|value| Param { name, value, shape }))
            .collect()
    }
}

/// The input of every layer: a float tensor, and parameters that fit it in shape, dtype and device.
pub(crate) fn input(layer: &str, x: &Tensor, params: &[Param]) -> Result<()> {
    float(layer, "input", x)?;
    for param in params {
        let Param { name, value, shape } = param;
        self::shape(layer, name, value, shape)?;
        param_dtype(layer, name, value, x)?;
        same_device(layer, name, value, x.device())?;
    }
    Ok(())
}

pub(crate) fn float(layer: &str, name: &str, x: &Tensor) -> Result<()> {
    if !FLOATS.contains(&x.dtype()) {
        bail!(
            "{layer}: expected {name} with dtype F16, BF16, F32 or F64, got {:?}; convert it with to_dtype",
            x.dtype()
        )
    }
    Ok(())
}

pub(crate) fn shape(layer: &str, name: &str, value: &Tensor, expected: &[usize]) -> Result<()> {
    if value.dims() != expected {
        bail!(
            "{layer}: expected {name} with shape {expected:?}, got {:?}",
            value.dims()
        )
    }
    Ok(())
}

/// A tensor to be made: no more elements than memory has addresses for. An axis without elements
/// counts as one of size 1: others that are made
/// beside the tensor, such as a bias, do not have it, and steps between elements are products of
/// the other axes.
pub(crate) fn countable(layer: &str, name: &str, dims: &[usize]) -> Result<()> {
    let most = isize::MAX as usize / size_of::<f64>();
    let count = dims
        .iter()
        .try_fold(1usize, |count, size| count.checked_mul((*size).max(1)));
    if count.is_none_or(|count| count > most) {
        bail!("{layer}: expected {name} with at most {most} elements, got shape {dims:?}")
    }
    Ok(())
}

/// A checkpoint that holds parameters which a layer would not take. `affines` are its own `affine`,
/// and the one that takes them.
pub(crate) fn dropped<T>(
    layer: &str,
    stored: &[String],
    (affine, fitting): (String, String),
) -> Result<T> {
    bail!(
        "{layer}: expected no parameters but those of affine {affine}, got {stored:?}, which would be dropped unseen; set affine to {fitting}, or, if they are another layer's, give each layer its own prefix (vb.pp)"
    )
}

/// A checkpoint for a layer that was asked for without a bias.
pub(crate) fn no_stored_bias(layer: &str, stored: Option<String>) -> Result<()> {
    match stored {
        Some(stored) => bail!(
            "{layer}: expected a checkpoint without a bias, got {stored:?}, which would be dropped unseen; build the layer with a bias, or, if it is another layer's, give each layer its own prefix (vb.pp)"
        ),
        None => Ok(()),
    }
}

/// A checkpoint that holds `other` of an affine pair, and nothing of `names`.
pub(crate) fn stored_alone<T>(
    layer: &str,
    names: &[&str],
    other: &str,
    (affine, fitting): (String, String),
) -> Result<T> {
    let names = names.join(" or ");
    bail!(
        "{layer}: expected {names} too, since affine is {affine}, got {other:?} alone; set affine to {fitting} for a layer that was trained so, or, if it is another layer's, give each layer its own prefix (vb.pp)"
    )
}

pub(crate) fn same_device(layer: &str, name: &str, value: &Tensor, device: &Device) -> Result<()> {
    if !value.device().same_device(device) {
        bail!(
            "{layer}: expected {name} on the input's device {:?}, got {:?}; move one of them with to_device",
            device.location(),
            value.device().location()
        )
    }
    Ok(())
}

/// What is added to the input.
pub(crate) fn residual(layer: &str, residual: &Tensor, x: &Tensor) -> Result<()> {
    if residual.dims() != x.dims() {
        bail!(
            "{layer}: expected a residual of the input's shape {:?}, got {:?}; expand one of them with broadcast_as",
            x.dims(),
            residual.dims()
        )
    }
    if residual.dtype() != x.dtype() {
        bail!(
            "{layer}: expected a residual of the input's dtype {:?}, got {:?}; convert one of them with to_dtype",
            x.dtype(),
            residual.dtype()
        )
    }
    same_device(layer, "residual", residual, x.device())
}

/// Hint where one axis is missing.
const NO_BATCH_AXIS: &str = "; if the batch axis is missing, add it with unsqueeze(0)";

pub(crate) fn rank_at_least(layer: &str, x: &Tensor, rank: usize, form: &str) -> Result<()> {
    if x.rank() < rank {
        let hint = match form.starts_with("[N") && x.rank() + 1 == rank {
            true => NO_BATCH_AXIS,
            false => "",
        };
        bail!(
            "{layer}: expected an input of rank at least {rank}, {form}, got {:?}{hint}",
            x.dims()
        )
    }
    Ok(())
}

pub(crate) fn channels(layer: &str, x: &Tensor, expected: usize) -> Result<()> {
    let got = x.dims()[1];
    if got != expected {
        bail!(
            "{layer}: expected {expected} channels on axis 1, got {got} in input size {:?}{}",
            x.dims(),
            channels_elsewhere(layer, x.dims(), expected)
        )
    }
    Ok(())
}

/// Where the channels of an input may be instead of axis 1, and what brings them there.
fn channels_elsewhere(layer: &str, dims: &[usize], channels: usize) -> String {
    let mut hint = String::new();
    let last = dims.len() - 1;
    if last > 1 && dims[last] == channels {
        hint += &format!("; the last axis has {channels}: if channels are last, ");
        let order: Vec<String> = (1..last).map(|axis| axis.to_string()).collect();
        hint += &match (layer, last) {
            ("LayerNorm" | "RmsNorm", _) => "leave out channels_first".to_string(),
            (_, 2) => "bring them to axis 1 with transpose(1, 2)".to_string(),
            _ => format!(
                "bring them to axis 1 with permute((0, {last}, {}))",
                order.join(", ")
            ),
        };
    }
    if dims[0] == channels {
        hint += &format!(
            "; axis 0 has {channels}: if the batch axis is missing, add it with unsqueeze(0)"
        );
    }
    hint
}

/// What runs along the last axis.
pub(crate) fn features(layer: &str, x: &Tensor, expected: usize) -> Result<()> {
    if x.dims().last() != Some(&expected) {
        let hint = match x.dims().get(1) {
            Some(channels) if *channels == expected => format!(
                "; axis 1 has {expected}: if channels come first, bring them to the last axis with a transposition, or build a layer for channels"
            ),
            _ => String::new(),
        };
        bail!(
            "{layer}: expected {expected} features on the last axis, got input size {:?}{hint}",
            x.dims()
        )
    }
    Ok(())
}

/// The input and the factors of a rotary embedding, with the positions along axis `positions` of
/// the input.
pub(crate) fn rotation(
    layer: &str,
    x: &Tensor,
    positions: usize,
    factors: [(&str, &Tensor); 2],
) -> Result<()> {
    let layout = ["[B, T, H, D]", "[B, H, T, D]"][positions - 1];
    let &[batch, _, _, len] = x.dims() else {
        bail!("{layer}: expected an input {layout}, got {:?}", x.dims())
    };
    if !len.is_multiple_of(2) {
        bail!(
            "{layer}: expected an even D of {layout}, got {:?}",
            x.dims()
        )
    }
    let steps = x.dims()[positions];
    for (name, factor) in factors {
        let (outer, rest) = factor.dims().split_at(factor.rank().saturating_sub(2));
        let fits = matches!(rest, [t, d] if *t >= steps && *d == len / 2);
        if !fits || !(outer.is_empty() || outer == [batch]) {
            bail!(
                "{layer}: expected {name} of [T', {half}] or [{batch}, T', {half}] with T' of at least {steps} for an input {:?} \
                 as {layout}, got {:?}",
                x.dims(),
                factor.dims(),
                half = len / 2
            )
        }
        dtype(layer, name, factor, x.dtype())?;
        same_device(layer, name, factor, x.device())?;
    }
    Ok(())
}

pub(crate) fn normalized_shape(layer: &str, normalized_shape: &[usize]) -> Result<()> {
    if normalized_shape.is_empty() {
        bail!("{layer}: expected a normalized_shape of at least one axis, got []")
    }
    Ok(())
}

pub(crate) fn trailing(layer: &str, x: &Tensor, normalized_shape: &[usize]) -> Result<()> {
    self::normalized_shape(layer, normalized_shape)?;
    if !x.dims().ends_with(normalized_shape) {
        bail!(
            "{layer}: expected an input that ends in normalized_shape {normalized_shape:?}, got {:?}{}",
            x.dims(),
            rows_elsewhere(x.dims(), normalized_shape)
        )
    }
    Ok(())
}

/// Where the one normalized axis of an input may be instead of the end.
fn rows_elsewhere(dims: &[usize], normalized_shape: &[usize]) -> String {
    let on =
        |axis: usize| normalized_shape.len() == 1 && dims.get(axis) == normalized_shape.first();
    let n = normalized_shape[0];
    if on(1) {
        return format!(
            "; axis 1 has {n}: if channels come first, set channels_first in the options, or use NormConfig::channels"
        );
    }
    if on(0) && dims.len() > 1 {
        return format!(
            "; axis 0 has {n}: if channels come first and the batch axis is missing, set channels_first in the options and add the axis with unsqueeze(0)"
        );
    }
    String::new()
}

pub(crate) fn one_axis(layer: &str, normalized_shape: &[usize]) -> Result<usize> {
    match normalized_shape {
        [n] => Ok(*n),
        _ => bail!(
            "{layer}: expected one size for channels_first, the number of channels, got normalized_shape {normalized_shape:?}"
        ),
    }
}

pub(crate) fn eps(layer: &str, eps: f64) -> Result<()> {
    if !(eps.is_finite() && eps > 0.) {
        bail!("{layer}: expected eps > 0 and finite, got {eps}; 1e-5 is usual")
    }
    Ok(())
}

pub(crate) fn at_most(layer: &str, name: &str, value: usize, most: usize) -> Result<()> {
    if value > most {
        bail!("{layer}: expected {name} of at most {most}, got {value}")
    }
    Ok(())
}

pub(crate) fn momentum(layer: &str, momentum: Option<f64>) -> Result<()> {
    match momentum {
        Some(m) if !(0. ..=1.).contains(&m) => bail!(
            "{layer}: expected a momentum between 0 and 1 (the weight of the new batch), got {m}; use None for the cumulative average"
        ),
        _ => Ok(()),
    }
}

/// Source of the start of a scale.
pub(crate) fn has_scale(layer: &str, option: &str, scale: bool) -> Result<()> {
    if !scale {
        bail!(
            "{layer}: expected an affine with a scale for {option}, which sets where it starts, got one without; set {option} to false"
        )
    }
    Ok(())
}

pub(crate) fn finite(layer: &str, name: &str, value: f64) -> Result<()> {
    if !value.is_finite() {
        bail!("{layer}: expected a finite {name}, got {value}")
    }
    Ok(())
}

pub(crate) fn groups(layer: &str, num_groups: usize, num_channels: usize) -> Result<()> {
    if num_groups == 0 || !num_channels.is_multiple_of(num_groups) {
        let hint = match divisors(num_channels, num_groups) {
            found if found.is_empty() => String::new(),
            found => format!("; {} do", found.join(", ")),
        };
        let order = match num_groups > num_channels {
            true => "; are the two numbers in their order?",
            false => "",
        };
        bail!(
            "{layer}: expected num_groups ({num_groups}) to divide num_channels ({num_channels}){hint}{order}"
        )
    }
    Ok(())
}

/// The divisors of `n`; where there are many, those nearest to `wanted`.
fn divisors(n: usize, wanted: usize) -> Vec<String> {
    const MOST: usize = 12;
    const SEARCHED: usize = 1 << 16;
    let small = (1..=n.min(SEARCHED)).take_while(|d| d.checked_mul(*d).is_some_and(|s| s <= n));
    let mut found: Vec<usize> = small
        .filter(|d| n.is_multiple_of(*d))
        .flat_map(|d| [d, n / d])
        .collect();
    found.sort_unstable();
    found.dedup();
    found.sort_by_key(|d| d.abs_diff(wanted));
    found.truncate(MOST);
    found.sort_unstable();
    found.iter().map(usize::to_string).collect()
}

/// A mean of one value is that value, and its unbiased variance is 0/0: nothing is learned and the
/// running statistics are lost.
pub(crate) fn more_than_one_value(layer: &str, values: usize, x: &Tensor) -> Result<()> {
    if values == 1 {
        bail!(
            "{layer}: expected more than 1 value per channel when training, got input size {:?}; use a larger batch, frozen() statistics, or GroupNorm",
            x.dims()
        )
    }
    Ok(())
}

/// A channel of one sample has no variance where it has one position. No batch is large enough to
/// change that.
pub(crate) fn more_than_one_position(layer: &str, positions: usize, x: &Tensor) -> Result<()> {
    if positions == 1 {
        bail!(
            "{layer}: expected more than 1 value per channel when training, got input size {:?}; each channel of a sample is normalized over its own positions, so a larger batch does not help: use larger maps (less stride or pooling before), LayerNorm over the channels, or GroupNorm with several channels in a group",
            x.dims()
        )
    }
    Ok(())
}

/// A variance that is divided by n − 1.
pub(crate) fn more_values(layer: &str, of: &str, values: usize, x: &Tensor) -> Result<()> {
    if values == 1 {
        bail!(
            "{layer}: expected more than 1 value per {of}, whose variance is unbiased, got input size {:?}; set unbiased to false",
            x.dims()
        )
    }
    Ok(())
}

/// A batch to initialize from: what has one output for each channel has no variance.
pub(crate) fn more_than_one_output(layer: &str, outputs: usize, x: &Tensor) -> Result<()> {
    if outputs == 1 {
        bail!(
            "{layer}: expected more than one output per channel to initialize from, got one of input size {:?}; use a larger batch",
            x.dims()
        )
    }
    Ok(())
}

/// A statistic of a batch, when the layer was asked to refuse what would poison it.
pub(crate) fn finite_batch(layer: &str, statistic: &Tensor, of: &str) -> Result<()> {
    let statistic = statistic.flatten_all()?.to_dtype(DType::F64)?;
    let values = statistic.to_vec1::<f64>()?;
    if let Some(channel) = values.iter().position(|v| !v.is_finite()) {
        bail!(
            "{layer}: expected a finite batch, since refuse_non_finite is set, got {} as a statistic of channel {channel} in {of}; the running statistics are unchanged",
            values[channel]
        )
    }
    Ok(())
}

/// A running statistic as it comes from a checkpoint or a caller.
pub(crate) fn statistic(layer: &str, name: &str, value: &Tensor, non_negative: bool) -> Result<()> {
    float(layer, name, value)?;
    let values = value
        .flatten_all()?
        .to_dtype(DType::F64)?
        .to_vec1::<f64>()?;
    for (channel, v) in values.into_iter().enumerate() {
        if !v.is_finite() {
            bail!("{layer}: expected {name} to be finite, got {v} at channel {channel}")
        }
        if non_negative && v < 0. {
            bail!("{layer}: expected {name} to be at least 0, got {v} at channel {channel}")
        }
    }
    Ok(())
}

/// A number of batches as it comes from a checkpoint, which may have made a float of it.
pub(crate) fn counter(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    let count = value.to_dtype(DType::F64)?.to_scalar::<f64>()?;
    if !(count >= 0. && count.fract() == 0.) {
        bail!("{layer}: expected {name} to be a whole number of at least 0, got {count}")
    }
    Ok(())
}

/// What needs running statistics, of a layer that may have none.
pub(crate) fn tracked<T>(layer: &str, statistics: Option<T>) -> Result<T> {
    match statistics {
        Some(s) => Ok(s),
        None => bail!(
            "{layer}: expected a layer with running statistics, got one without; set track_running_stats"
        ),
    }
}

pub(crate) fn dim(layer: &str, dim: Option<usize>, weight: &[usize]) -> Result<()> {
    match dim {
        Some(d) if d >= weight.len() => bail!(
            "{layer}: expected dim below the weight's rank {}, got {d} for weight shape {weight:?}",
            weight.len()
        ),
        _ => Ok(()),
    }
}

pub(crate) fn rank(layer: &str, name: &str, x: &Tensor, expected: usize) -> Result<()> {
    if x.rank() != expected {
        let hint = match name == "input" && x.rank() + 1 == expected {
            true => NO_BATCH_AXIS,
            false => "",
        };
        bail!(
            "{layer}: expected {name} of rank {expected}, got shape {:?}{hint}",
            x.dims()
        )
    }
    Ok(())
}

/// A parameter has the input's dtype; half-precision inputs also take `f32` parameters.
pub(crate) fn param_dtype(layer: &str, name: &str, value: &Tensor, x: &Tensor) -> Result<()> {
    let half = matches!(x.dtype(), DType::F16 | DType::BF16);
    let serving = if half { DType::F32 } else { x.dtype() };
    if value.dtype() != x.dtype() && !(half && value.dtype() == DType::F32) {
        bail!(
            "{layer}: expected {name} with the input's dtype {:?}{}, got {:?}; convert the input with to_dtype, or hold the parameters in {serving:?}: build the layer with vb.set_dtype(DType::{serving:?})",
            x.dtype(),
            if half { " or F32" } else { "" },
            value.dtype()
        )
    }
    Ok(())
}

pub(crate) fn geometry(layer: &str, g: &Geometry) -> Result<()> {
    for (name, value) in [
        ("stride", g.stride),
        ("dilation", g.dilation),
        ("groups", g.groups),
    ] {
        if value == 0 {
            bail!("{layer}: expected {name} of at least 1, got 0")
        }
    }
    if g.output_padding > 0 && g.output_padding >= g.stride.max(g.dilation) {
        bail!(
            "{layer}: expected output_padding below the stride or the dilation, got {} for stride {} and dilation {}",
            g.output_padding,
            g.stride,
            g.dilation
        )
    }
    Ok(())
}

/// The variances of the outputs that a data-dependent initialization divides by.
pub(crate) fn varying(layer: &str, var: &Tensor) -> Result<()> {
    let values = var.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    match values.iter().position(|v| !(*v > 0. && v.is_finite())) {
        Some(channel) => bail!(
            "{layer}: expected outputs that vary over the batch, got a variance of {} in channel {channel}; use a larger batch",
            values[channel]
        ),
        None => Ok(()),
    }
}

pub(crate) fn dtype(layer: &str, name: &str, value: &Tensor, expected: DType) -> Result<()> {
    if value.dtype() != expected {
        bail!(
            "{layer}: expected {name} with dtype {expected:?}, got {:?}",
            value.dtype()
        )
    }
    Ok(())
}

pub(crate) fn non_negative(layer: &str, name: &str, value: &Tensor) -> Result<()> {
    let lowest = value.flatten_all()?.min(0)?.to_dtype(DType::F64)?;
    let lowest = lowest.to_scalar::<f64>()?;
    if lowest < 0. {
        bail!("{layer}: expected {name} to be at least 0, got {lowest}")
    }
    Ok(())
}

pub(crate) fn at_least_one(layer: &str, what: &str, count: usize) -> Result<()> {
    if count == 0 {
        bail!("{layer}: expected at least one {what}, got none")
    }
    Ok(())
}

/// The layer that a normalization of `channels` channels is folded into.
pub(crate) fn output_channels(
    layer: &str,
    weight: &Tensor,
    outputs: usize,
    channels: usize,
) -> Result<()> {
    if outputs != channels {
        bail!(
            "{layer}: expected a layer with {channels} output channels to fold into, got {outputs} of weight shape {:?}",
            weight.dims()
        )
    }
    Ok(())
}

/// A norm that follows a layer with nothing between; `between` is what bends the layer's outputs
/// before the norm has them.
pub(crate) fn nothing_between(layer: &str, between: Option<&str>) -> Result<()> {
    match between {
        Some(between) => bail!(
            "{layer}: expected norms right after the layer, got {between} between the layer and a norm; no linear layer or convolution does what {between} does, so folding would change the outputs: keep this norm (frozen() makes it a Module), or train with the norm before {between}"
        ),
        None => Ok(()),
    }
}

/// Norms alone after a layer; `last` is what bends the outputs after them.
pub(crate) fn nothing_at_the_end(layer: &str, last: Option<&str>) -> Result<()> {
    match last {
        Some(last) => bail!(
            "{layer}: expected norms alone after the layer, got {last} at the end; leave it out, and apply it to what the folded layer returns"
        ),
        None => Ok(()),
    }
}

/// A norm that normalizes each input by its own statistics has none that could be fixed.
pub(crate) fn fixed_statistics<T>(kind: &str) -> Result<T> {
    let layer = format!("{kind} norm");
    bail!(
        "{layer}: expected statistics that stay the same for every input, got those of each input; BatchNorm has such statistics, and InstanceNorm that tracks them: only these can be frozen, or folded into the layer before"
    )
}

pub(crate) fn no_bias(layer: &str, bias: Option<&Tensor>) -> Result<()> {
    if bias.is_some() {
        bail!("{layer}: expected a layer without bias to copy from, got one with a bias")
    }
    Ok(())
}

pub(crate) fn bias<'a>(layer: &str, bias: Option<&'a Tensor>) -> Result<&'a Tensor> {
    match bias {
        Some(bias) => Ok(bias),
        None => bail!(
            "{layer}: expected a layer with a bias to initialize from a batch, got one without"
        ),
    }
}

/// What a data-dependent initialization scales: each output by itself.
pub(crate) fn magnitude_per_output(
    layer: &str,
    dim: Option<usize>,
    magnitudes: usize,
    (axis, outputs): (usize, usize),
) -> Result<()> {
    if dim != Some(axis) || magnitudes != outputs {
        bail!(
            "{layer}: expected dim {axis}, the axis of the {outputs} outputs, to initialize from a batch, got {dim:?}"
        )
    }
    Ok(())
}

pub(crate) fn not_empty<T>(layer: &str, statistics: Option<T>, x: &Tensor) -> Result<T> {
    match statistics {
        Some(s) => Ok(s),
        None => bail!(
            "{layer}: expected a batch with outputs to initialize from, got input size {:?}",
            x.dims()
        ),
    }
}

pub(crate) fn variable(layer: &str, param: &Tensor) -> Result<()> {
    if !param.is_variable() {
        bail!(
            "{layer}: expected parameters that are variables, got plain tensors; build the layer from a VarMap"
        )
    }
    Ok(())
}

pub(crate) fn grouped_channels(
    layer: &str,
    groups: usize,
    inputs: usize,
    outputs: usize,
) -> Result<()> {
    if !inputs.is_multiple_of(groups) || !outputs.is_multiple_of(groups) {
        bail!(
            "{layer}: expected groups ({groups}) to divide the channels, got {inputs} in and {outputs} out"
        )
    }
    Ok(())
}

/// The size of an output axis, if there is one.
pub(crate) fn kernel_fits(
    layer: &str,
    output: Option<usize>,
    x: &Tensor,
    weight: &Tensor,
    g: &Geometry,
) -> Result<usize> {
    match output {
        Some(size) => Ok(size),
        None => bail!(
            "{layer}: expected an input that the kernel fits, got size {:?} for weight shape {:?}, padding {}, dilation {}",
            x.dims(),
            weight.dims(),
            g.padding,
            g.dilation
        ),
    }
}

/// The fused path was forced: whether it can serve `x`.
pub(crate) fn served(layer: &str, x: &Tensor, served: bool) -> Result<()> {
    if !served {
        bail!(
            "{layer}: expected an input on the CPU, which the fused path serves, got one on {:?}; use Path::Auto",
            x.device().location()
        )
    }
    Ok(())
}

/// Check that the backward finds the input of the forward.
pub(crate) fn unchanged(layer: &str, unchanged: bool) -> Result<()> {
    if !unchanged {
        bail!(
            "{layer}: expected the input of the forward in the backward, got other values in its place, as Var::set and slice_set write them; run the forward again, or set the variable after the backward"
        )
    }
    Ok(())
}

/// What only a fault of this crate can bring about.
pub(crate) fn internal<T>(layer: &str, what: &str) -> Result<T> {
    bail!("{layer}: expected {what}; this is a fault of candle-norm")
}
