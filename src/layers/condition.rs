//! Projection of a condition to scales, shifts and gates.

use candle_core::{Result, Tensor, bail};
use candle_nn::{Init, Linear, Module, VarBuilder, init};

use crate::ops::{Modulation, check};

const LAYER: &str = "ConditionProjection";

/// Kind of one part of a projected condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Chunk {
    /// Summand after a norm.
    Shift,
    /// Factor after a norm, less 1.
    Scale,
    /// Factor of what a block adds to its residual.
    Gate,
}

/// Order of the chunks of a projection, with the name of its linear layer: data that differ from
/// one family of models to the next, and never guessed.
///
/// ```
/// use candle_norm::{Chunk, ChunkOrder};
///
/// // The final layer of Flux, and the same converted to diffusers: its halves are swapped.
/// assert_eq!(ChunkOrder::DIT_FINAL.chunks, [Chunk::Shift, Chunk::Scale]);
/// assert_eq!(ChunkOrder::DIFFUSERS_CONTINUOUS.chunks, [Chunk::Scale, Chunk::Shift]);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkOrder<'a> {
    /// Chunks of the last axis, in their order.
    pub chunks: &'a [Chunk],
    /// Name of the linear layer below that of the module; empty if it is the module itself.
    pub key: &'a str,
    /// Whether SiLU comes before the linear layer.
    pub silu: bool,
    /// Whether weight and bias start from zero, so that a block starts as the identity.
    pub zero_start: bool,
}

use Chunk::{Gate, Scale, Shift};

const SIX: &[Chunk] = &[Shift, Scale, Gate, Shift, Scale, Gate];

impl ChunkOrder<'static> {
    /// Blocks of DiT and SD3 (AdaLN-Zero): shift, scale, gate for attention, then for the MLP.
    pub const DIT: Self = Self::of(SIX, "adaLN_modulation.1");
    /// Final layer of DiT, SD3 and Flux: shift, scale.
    pub const DIT_FINAL: Self = Self::of(&[Shift, Scale], "adaLN_modulation.1");
    /// Image stream of a double block of Flux.
    pub const FLUX_IMAGE: Self = Self::of(SIX, "img_mod.lin");
    /// Text stream of a double block of Flux.
    pub const FLUX_TEXT: Self = Self::of(SIX, "txt_mod.lin");
    /// Single block of Flux.
    pub const FLUX_SINGLE: Self = Self::of(&[Shift, Scale, Gate], "modulation.lin");
    /// `AdaLayerNormZero` of diffusers, as `norm1` of a block.
    pub const DIFFUSERS_ZERO: Self = Self::started(SIX, "norm1.linear");
    /// `AdaLayerNormZeroSingle` of diffusers.
    pub const DIFFUSERS_ZERO_SINGLE: Self = Self::started(&[Shift, Scale, Gate], "norm1.linear");
    /// `SD35AdaLayerNormZeroX` of diffusers: a third shift, scale and gate.
    pub const DIFFUSERS_SD35: Self = Self::started(
        &[Shift, Scale, Gate, Shift, Scale, Gate, Shift, Scale, Gate],
        "norm1.linear",
    );
    /// `AdaLayerNormContinuous` of diffusers, as `norm_out`: scale, shift.
    pub const DIFFUSERS_CONTINUOUS: Self = Self::started(&[Scale, Shift], "norm_out.linear");
    /// `AdaGroupNorm` of diffusers, without SiLU: scale, shift.
    pub const DIFFUSERS_GROUP: Self = Self {
        silu: false,
        ..Self::started(&[Scale, Shift], "linear")
    };
    /// `LuminaRMSNormZero` of diffusers: scale, gate for attention, then for the MLP.
    pub const LUMINA: Self = Self::started(&[Scale, Gate, Scale, Gate], "linear");
    /// `CogVideoXLayerNormZero` of diffusers: shift, scale, gate, then the same for the text. The
    /// norm has an affine pair, which both share.
    pub const COGVIDEOX: Self = Self::started(SIX, "linear");
    /// `AdaIN1d` of StyleTTS 2 and Kokoro, without SiLU: gamma, beta.
    pub const ADAIN_1D: Self = Self {
        silu: false,
        ..Self::started(&[Scale, Shift], "fc")
    };

    /// An order after SiLU that starts from zero.
    const fn of(chunks: &'static [Chunk], key: &'static str) -> Self {
        Self {
            chunks,
            key,
            silu: true,
            zero_start: true,
        }
    }

    /// An order after SiLU that starts as any linear layer does.
    const fn started(chunks: &'static [Chunk], key: &'static str) -> Self {
        Self {
            zero_start: false,
            ..Self::of(chunks, key)
        }
    }
}

/// A condition projected to the scales, shifts and gates of a block:
/// `chunks = split(W · SiLU(condition) + b)`.
///
/// AdaLN-Zero: Peebles and Xie, 2022, <https://arxiv.org/abs/2212.09748>.
#[derive(Debug, Clone)]
pub struct ConditionProjection {
    linear: Linear,
    silu: bool,
    kinds: Vec<Chunk>,
}

/// A [`ConditionProjection`] of conditions of `condition_size` numbers to chunks of `num_features`
/// numbers each, its linear layer taken from `vb` by the name of the order.
///
/// Parameters: `weight` `[chunks · num_features, condition_size]` and `bias`, below the key of the
/// order.
///
/// # Errors
/// An order without chunks, parameters of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, VarBuilder, VarMap};
/// use candle_norm::{Affine, ChunkOrder, LayerNormOptions, condition_projection, layer_norm};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let options = LayerNormOptions { eps: 1e-6, affine: Affine::None, ..Default::default() };
/// let norm = layer_norm(8, options, vb.pp("norm1"))?;
/// let project = condition_projection(4, 8, ChunkOrder::DIT, vb)?;
///
/// let tokens = Tensor::randn(0f32, 1., (2, 5, 8), &Device::Cpu)?;
/// let chunks = project.forward(&Tensor::randn(0f32, 1., (2, 4), &Device::Cpu)?)?;
/// let attended = norm.forward_modulated_by(&tokens, &chunks.modulation(0)?)?;
/// // One gate for each sample; at the start it is zero, and the block the identity.
/// let y = (&tokens + attended.broadcast_mul(&chunks.gate(0)?.unsqueeze(1)?)?)?;
/// assert_eq!(y.to_vec3::<f32>()?, tokens.to_vec3::<f32>()?);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn condition_projection(
    condition_size: usize,
    num_features: usize,
    order: ChunkOrder,
    vb: VarBuilder,
) -> Result<ConditionProjection> {
    check::at_least_one(LAYER, "chunk", order.chunks.len())?;
    let outputs = order.chunks.len().saturating_mul(num_features);
    check::countable(LAYER, "a weight", &[outputs, condition_size])?;
    let vb = match order.key {
        "" => vb,
        key => vb.pp(key),
    };
    let bound = 1. / (condition_size.max(1) as f64).sqrt();
    let uniform = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let (of_weight, of_bias) = match order.zero_start {
        true => (init::ZERO, init::ZERO),
        false => (uniform, uniform),
    };
    let weight = vb.get_with_hints((outputs, condition_size), "weight", of_weight)?;
    let bias = vb.get_with_hints(outputs, "bias", of_bias)?;
    Ok(ConditionProjection {
        linear: Linear::new(weight, Some(bias)),
        silu: order.silu,
        kinds: order.chunks.to_vec(),
    })
}

impl ConditionProjection {
    /// The chunks of a condition.
    ///
    /// # Shapes
    /// `[*, condition_size]`, such as one row for each sample or for each token; the chunks are
    /// `[*, num_features]`.
    ///
    /// # Errors
    /// A condition of another size, dtype or device.
    pub fn forward(&self, condition: &Tensor) -> Result<Chunks> {
        let size = self.linear.weight().dims()[1];
        check::rank_at_least(LAYER, condition, 2, "[B, *]")?;
        check::features(LAYER, condition, size)?;
        check::float(LAYER, "condition", condition)?;
        let condition = match self.silu {
            true => silu(condition)?,
            false => condition.clone(),
        };
        let projected = self.linear.forward(&condition.contiguous()?)?;
        Chunks::split(LAYER, &projected, &self.kinds)
    }

    /// The linear layer.
    pub fn linear(&self) -> &Linear {
        &self.linear
    }

    /// The chunks, in their order.
    pub fn chunks(&self) -> &[Chunk] {
        &self.kinds
    }
}

/// `u · σ(u)` from the side that does not overflow.
fn silu(u: &Tensor) -> Result<Tensor> {
    u * candle_nn::ops::sigmoid(u)?
}

/// A table of a shift, a scale and so on for each block, which is added to a projection that all
/// blocks share: PixArt and Wan.
///
/// PixArt: Chen et al., 2023, <https://arxiv.org/abs/2310.00426>.
#[derive(Debug, Clone)]
pub struct ScaleShiftTable {
    table: Tensor,
    kinds: Vec<Chunk>,
}

/// A [`ScaleShiftTable`] of chunks of `num_features` numbers each, taken from `vb`.
///
/// Parameter: `scale_shift_table` `[chunks, num_features]`, or with a first axis of 1, as in Wan. A
/// new one is drawn from a normal distribution of deviation `1 / √num_features`. PixArt and Wan
/// have six chunks: shift, scale, gate for attention, then for the MLP.
///
/// # Errors
/// No chunks, a table of another shape.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::{ChunkOrder, scale_shift_table};
///
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let table = scale_shift_table(8, ChunkOrder::DIT.chunks, vb)?;
/// let shared = Tensor::zeros((2, 6 * 8), DType::F32, &Device::Cpu)?;
/// assert_eq!(table.forward(&shared)?.gate(1)?.dims(), [2, 8]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn scale_shift_table(
    num_features: usize,
    chunks: &[Chunk],
    vb: VarBuilder,
) -> Result<ScaleShiftTable> {
    let (layer, name) = ("ScaleShiftTable", "scale_shift_table");
    check::at_least_one(layer, "chunk", chunks.len())?;
    check::countable(layer, "a table", &[chunks.len(), num_features])?;
    let with_axis = (1, chunks.len(), num_features);
    let start = Init::Randn {
        mean: 0.,
        stdev: 1. / (num_features.max(1) as f64).sqrt(),
    };
    let stored = vb.get_unchecked(name).ok();
    let table = match stored {
        Some(stored) if stored.dims() == [with_axis.0, with_axis.1, with_axis.2] => {
            vb.get(with_axis, name)?.squeeze(0)?
        }
        _ => vb.get_with_hints((chunks.len(), num_features), name, start)?,
    };
    Ok(ScaleShiftTable {
        table,
        kinds: chunks.to_vec(),
    })
}

impl ScaleShiftTable {
    /// The chunks of a shared projection, each plus its row of the table.
    ///
    /// # Shapes
    /// `[*, chunks · num_features]`; the chunks are `[*, num_features]`.
    ///
    /// # Errors
    /// A projection of another size, dtype or device.
    pub fn forward(&self, shared: &Tensor) -> Result<Chunks> {
        let layer = "ScaleShiftTable";
        check::rank_at_least(layer, shared, 2, "[B, *]")?;
        check::features(layer, shared, self.table.elem_count())?;
        let table = self.table.flatten_all()?.to_dtype(shared.dtype())?;
        Chunks::split(layer, &shared.broadcast_add(&table)?, &self.kinds)
    }

    /// The table, `[chunks, num_features]`.
    pub fn table(&self) -> &Tensor {
        &self.table
    }
}

/// Scales, shifts and gates of a condition.
#[derive(Debug, Clone)]
pub struct Chunks {
    kinds: Vec<Chunk>,
    tensors: Vec<Tensor>,
}

impl Chunks {
    /// `projected` `[*, k · C]` as `k` chunks of its last axis.
    fn split(layer: &str, projected: &Tensor, kinds: &[Chunk]) -> Result<Self> {
        let axis = projected.rank() - 1;
        let size = projected.dims()[axis] / kinds.len();
        if size * kinds.len() != projected.dims()[axis] {
            bail!(
                "{layer}: expected a projection of {} chunks on the last axis, got {:?}",
                kinds.len(),
                projected.dims()
            )
        }
        let tensors = (0..kinds.len()).map(|i| projected.narrow(axis, i * size, size));
        Ok(Self {
            kinds: kinds.to_vec(),
            tensors: tensors.collect::<Result<_>>()?,
        })
    }

    /// The chunks of a kind, in their order.
    fn of(&self, kind: Chunk) -> impl Iterator<Item = &Tensor> {
        let all = self.kinds.iter().zip(&self.tensors);
        all.filter(move |(k, _)| **k == kind).map(|(_, t)| t)
    }

    /// Every chunk with its kind, in their order.
    pub fn iter(&self) -> impl Iterator<Item = (Chunk, &Tensor)> {
        self.kinds.iter().copied().zip(&self.tensors)
    }

    /// The scale and the shift number `index`, as far as there are both, for a norm: `index` 0 is
    /// that of attention, 1 that of the MLP.
    ///
    /// # Errors
    /// Neither a scale nor a shift of this number.
    pub fn modulation(&self, index: usize) -> Result<Modulation<'_>> {
        let layer = LAYER;
        let (scale, shift) = (self.of(Scale).nth(index), self.of(Shift).nth(index));
        if scale.is_none() && shift.is_none() {
            bail!(
                "{layer}: expected a scale or shift number {index}, got {:?}",
                self.kinds
            )
        }
        Ok(Modulation::new(scale, shift))
    }

    /// The gate number `index`.
    ///
    /// # Errors
    /// No gate of this number.
    pub fn gate(&self, index: usize) -> Result<&Tensor> {
        let layer = LAYER;
        match self.of(Gate).nth(index) {
            Some(gate) => Ok(gate),
            None => bail!(
                "{layer}: expected a gate number {index}, got {:?}",
                self.kinds
            ),
        }
    }
}
