//! Checks of an input, and of parameters that go with it.

use candle_core::{DType, Result, Tensor, bail};

use super::{float, same_device};

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
        super::shape(layer, name, value, shape)?;
        param_dtype(layer, name, value, x)?;
        same_device(layer, name, value, x.device())?;
    }
    Ok(())
}

/// A parameter has the input's dtype; half-precision inputs also take `f32` parameters.
pub(crate) fn param_dtype(layer: &str, name: &str, value: &Tensor, x: &Tensor) -> Result<()> {
    let half = matches!(x.dtype(), DType::F16 | DType::BF16);
    let serving = if half { DType::F32 } else { x.dtype() };
    if value.dtype() != x.dtype() && !(half && value.dtype() == DType::F32) {
        bail!(
            "{layer}: expected {name} with the input's dtype {:?}{}, got {:?}; convert the input \
            with to_dtype, or hold the parameters in {serving:?}: build the layer with \
            vb.set_dtype(DType::{serving:?})",
            x.dtype(),
            if half { " or F32" } else { "" },
            value.dtype()
        )
    }
    Ok(())
}

/// A tensor to be made: no more elements than memory has addresses for. An axis without elements
/// counts as one of size 1: others that are made beside the tensor, such as a bias, do not have it,
/// and steps between elements are products of the other axes.
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

pub(crate) fn channels(layer: &str, x: &Tensor, expected: usize) -> Result<()> {
    on_axis_1(layer, x, expected, None)
}

/// Channels on axis 1, where an option says that they are there.
pub(crate) fn channels_first(layer: &str, x: &Tensor, expected: usize) -> Result<()> {
    on_axis_1(layer, x, expected, Some("leave out channels_first"))
}

fn on_axis_1(layer: &str, x: &Tensor, expected: usize, if_last: Option<&str>) -> Result<()> {
    let got = x.dims()[1];
    if got != expected {
        bail!(
            "{layer}: expected {expected} channels on axis 1, got {got} in input size {:?}{}",
            x.dims(),
            channels_elsewhere(x.dims(), expected, if_last)
        )
    }
    Ok(())
}

/// Where the channels of an input may be instead of axis 1, and what brings them there.
fn channels_elsewhere(dims: &[usize], channels: usize, if_last: Option<&str>) -> String {
    let mut hint = String::new();
    let last = dims.len() - 1;
    if last > 1 && dims[last] == channels {
        hint += &format!("; the last axis has {channels}: if channels are last, ");
        let order: Vec<String> = (1..last).map(|axis| axis.to_string()).collect();
        hint += &match (if_last, last) {
            (Some(remedy), _) => remedy.to_string(),
            (None, 2) => "bring them to axis 1 with transpose(1, 2)".to_string(),
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

/// Features along the last axis.
pub(crate) fn features(layer: &str, x: &Tensor, expected: usize) -> Result<()> {
    if x.dims().last() != Some(&expected) {
        let hint = match x.dims().get(1) {
            Some(channels) if *channels == expected => format!(
                "; axis 1 has {expected}: if channels come first, bring them to the last axis with \
                a transposition, or build a layer for channels"
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
