//! `candle_nn::rotary_emb`, with every gradient.
//!
//! candle's `rope`, `rope_i` and `rope_thd` drop the gradients of all that comes before them, so
//! that queries and keys stay
//! untrained. Those here have candle's signatures and keep them; every other name is candle's own.
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use candle_norm::nn::rotary_emb::rope;
//!
//! let queries = Var::rand(-1f32, 1., (2, 3, 4, 6), &Device::Cpu)?; // [B, H, T, D]
//! let angles = Tensor::arange(0f32, 12., &Device::Cpu)?.reshape((4, 3))?; // [T, D / 2]
//! let y = rope(&queries, &angles.cos()?, &angles.sin()?)?;
//! assert_eq!(y.dims(), [2, 3, 4, 6]);
//! assert!(y.sqr()?.sum_all()?.backward()?.get(&queries).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```

use candle_core::{Result, Tensor, bail};

pub use candle_nn::rotary_emb::*;

use crate::computations::composed;
use crate::ops::check;

/// Layout of the pairs of elements that are rotated together.
#[derive(Clone, Copy)]
struct Pairs {
    name: &'static str,
    /// The axis of positions; the other of 1 and 2 is that of heads.
    positions: usize,
    /// Neighbors are a pair, not elements of the two halves of the last axis.
    interleaved: bool,
}

/// Rotary position embedding over the halves of the last axis.
///
/// `y = [a · cos − b · sin, a · sin + b · cos]` for the halves `a` and `b` of the last axis of
/// `xs`. Where a gradient may follow, it is composed of
/// candle's tensor operations, and half precision is computed in `f32` and rounded once; where
/// nothing tracks, it is candle's own kernel.
///
/// # Shapes
/// `xs`: `[B, H, T, D]` with an even D; `cos`, `sin`: `[T', D / 2]` or `[B, T', D / 2]` with
/// `T' ≥ T`; the result as `xs`, contiguous.
///
/// # Errors
/// Other shapes.
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let pairs = Pairs {
        name: "rope",
        positions: 2,
        interleaved: false,
    };
    rotated(pairs, xs, cos, sin, candle_nn::rotary_emb::rope)
}

/// [`rope`] over pairs of neighbors of the last axis.
///
/// # Shapes
/// Those of [`rope`].
///
/// # Errors
/// Those of [`rope`].
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let pairs = Pairs {
        name: "rope_i",
        positions: 2,
        interleaved: true,
    };
    rotated(pairs, xs, cos, sin, candle_nn::rotary_emb::rope_i)
}

/// [`rope`] of a tensor whose positions come before its heads.
///
/// # Shapes
/// `xs`: `[B, T, H, D]`; the rest as for [`rope`].
///
/// # Errors
/// Those of [`rope`].
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let pairs = Pairs {
        name: "rope_thd",
        positions: 1,
        interleaved: false,
    };
    rotated(pairs, xs, cos, sin, candle_nn::rotary_emb::rope_thd)
}

/// The rotation as a computation that passes gradients on, or by `kernel` where none can follow.
fn rotated(
    pairs: Pairs,
    xs: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    kernel: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let Pairs {
        name,
        positions,
        interleaved,
    } = pairs;
    check::float(name, "input", xs)?;
    rotation(name, xs, positions, [("cos", cos), ("sin", sin)])?;
    // candle's kernel takes factors of each sample to be of as many positions as the input.
    let here = |t: &Tensor| t.narrow(t.rank() - 2, 0, xs.dims()[positions]);
    let (cos, sin) = (here(cos)?, here(sin)?);
    if ![xs, &cos, &sin].iter().any(|t| t.track_op()) {
        return kernel(&xs.contiguous()?, &cos.contiguous()?, &sin.contiguous()?);
    }
    let (acc, half) = (composed::accumulator(xs.dtype()), xs.dims()[3] / 2);
    let factor = |t: &Tensor| -> Result<Tensor> {
        let t = match t.rank() {
            2 => t.unsqueeze(0)?,
            _ => t.clone(),
        };
        t.unsqueeze(3 - positions)?.to_dtype(acc)
    };
    let (cos, sin) = (factor(&cos)?, factor(&sin)?);
    let x = xs.to_dtype(acc)?;
    let [a, b] = if interleaved {
        let x = x.reshape([&xs.dims()[..3], &[half, 2]].concat())?;
        [
            x.narrow(4, 0, 1)?.squeeze(4)?,
            x.narrow(4, 1, 1)?.squeeze(4)?,
        ]
    } else {
        [x.narrow(3, 0, half)?, x.narrow(3, half, half)?]
    };
    let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let second = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
    let y = match interleaved {
        true => Tensor::stack(&[first, second], 4)?.reshape(xs.shape())?,
        false => Tensor::cat(&[first, second], 3)?,
    };
    y.to_dtype(xs.dtype())?.contiguous()
}

/// The input and the factors of a rotary embedding, with the positions along axis `positions` of
/// the input.
fn rotation(
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
                "{layer}: expected {name} of [T', {half}] or [{batch}, T', {half}] with T' of at \
                 least {steps} for an input {:?} \
                 as {layout}, got {:?}",
                x.dims(),
                factor.dims(),
                half = len / 2
            )
        }
        check::dtype(layer, name, factor, x.dtype())?;
        check::same_device(layer, name, factor, x.device())?;
    }
    Ok(())
}
