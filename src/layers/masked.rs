//! Batch, instance and group normalization of padded batches.

use candle_core::{Result, Tensor, bail};

use super::batch::Taken;
use super::batch_norm::BatchNorm;
use super::group_norm::GroupNorm;
use super::instance_norm::InstanceNorm;
use crate::ops::{self, BatchStatistics, Mask, check};

impl BatchNorm {
    /// [`forward_t`](candle_nn::ModuleT::forward_t) of a padded batch, whose statistics are those
    /// of the valid positions.
    ///
    /// `mask` is not zero where a position is valid, as in Keras, Flax and `attention_mask`;
    /// PyTorch's `key_padding_mask` is the opposite. The output is 0 at invalid positions, and so
    /// is the gradient there: what stands in them, NaN included, reaches nothing. In inference with
    /// running statistics, zeros are all that the mask makes.
    ///
    /// # Shapes
    /// `xs`: `[N, num_features, *]`; `mask`: `[N, *]`, any dtype
    /// ([`ops::mask_of_lengths`] makes one of lengths); the output as `xs`, contiguous.
    ///
    /// # Errors
    /// A mask of another shape; in training, one valid position, or a `virtual_batch_size`. A batch
    /// without any is as an empty one.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    /// use candle_norm::ops;
    ///
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    /// let norm = candle_norm::batch_norm(1, 1e-9, vb)?;
    /// let x = Tensor::new(&[[[1f64, 3., f64::NAN]]], &Device::Cpu)?;
    /// let mask = ops::mask_of_lengths(&Tensor::new(&[2u32], &Device::Cpu)?, 3)?;
    /// let y = norm.forward_masked_t(&x, &mask, true)?.flatten_all()?.to_vec1::<f64>()?;
    /// assert!((y[0] + 1.).abs() < 1e-6 && (y[1] - 1.).abs() < 1e-6 && y[2] == 0.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn forward_masked_t(&self, xs: &Tensor, mask: &Tensor, train: bool) -> Result<Tensor> {
        const LAYER: &str = "BatchNorm";
        if let (true, Some(size)) = (train, self.options().virtual_batch_size) {
            bail!(
                "{LAYER}: expected no virtual_batch_size with a mask, got {size}; parts of valid \
                positions are no parts of samples"
            )
        }
        let mask = Mask::of(LAYER, xs, mask)?;
        check::channels(LAYER, xs, self.num_features())?;
        let params = [self.weight(), self.bias()];
        mask.over_batch(LAYER, xs, &params, |valid| {
            candle_nn::ModuleT::forward_t(self, valid, train)
        })
    }
}

impl InstanceNorm {
    /// [`forward_t`](candle_nn::ModuleT::forward_t) of a padded batch, whose statistics are those
    /// of the valid positions of each sample: as
    /// [`BatchNorm::forward_masked_t`](crate::BatchNorm::forward_masked_t).
    ///
    /// A sample of one valid position gives the bias there; running statistics leave such samples
    /// out.
    ///
    /// # Shapes
    /// `xs`: `[N, num_features, *]` of rank at least 3; `mask`: `[N, *]`, any dtype.
    ///
    /// # Errors
    /// A mask of another shape, an input of another rank or number of channels.
    pub fn forward_masked_t(&self, xs: &Tensor, mask: &Tensor, train: bool) -> Result<Tensor> {
        const LAYER: &str = "InstanceNorm";
        check::rank_at_least(LAYER, xs, 3, "[N, C, ...]")?;
        let mask = Mask::of(LAYER, xs, mask)?;
        check::channels(LAYER, xs, self.num_features())?;
        let (eps, tracks) = (self.eps(), self.running_stats());
        let params = [self.weight(), self.bias()];
        if let Some(stats) = tracks.filter(|_| !train) {
            let now = stats.snapshot()?;
            let [weight, bias] = params;
            return mask.over_batch(LAYER, xs, &params, |valid| {
                ops::batch_norm_inference(valid, [&now.mean, &now.var], weight, bias, eps)
            });
        }
        let wide = ops::wide_params(xs, params)?;
        let [weight, bias] = [0, 1].map(|i| wide[i].as_ref());
        let mut seen: Vec<BatchStatistics> = vec![];
        let y = mask.over_samples(LAYER, xs, &[weight, bias], |_, valid| {
            if valid.dims()[2] == 1 {
                return ops::group_norm(valid, valid.dims()[1], weight, bias, eps);
            }
            let (y, statistics) = ops::instance_norm(valid, weight, bias, eps)?;
            seen.extend(statistics);
            Ok(y)
        })?;
        if let (Some(stats), Some(statistics)) = (tracks, ops::averaged(&seen)?) {
            let samples = xs.narrow(0, 0, seen.len())?;
            stats.observe_as(&samples, Some(statistics), Taken::OfSamples)?;
        }
        Ok(y)
    }
}

impl GroupNorm {
    /// [`forward`](candle_nn::Module::forward) of a padded batch, whose statistics are those of the
    /// valid positions of each sample: as
    /// [`BatchNorm::forward_masked_t`](crate::BatchNorm::forward_masked_t).
    ///
    /// # Shapes
    /// `xs`: `[N, num_channels, *]`; `mask`: `[N, *]`, any dtype.
    ///
    /// # Errors
    /// A mask of another shape, an input of another rank or number of channels.
    pub fn forward_masked(&self, xs: &Tensor, mask: &Tensor) -> Result<Tensor> {
        const LAYER: &str = "GroupNorm";
        let mask = Mask::of(LAYER, xs, mask)?;
        check::channels(LAYER, xs, self.num_channels())?;
        let wide = ops::wide_params(xs, [self.weight(), self.bias()])?;
        let [weight, bias] = [0, 1].map(|i| wide[i].as_ref());
        mask.over_samples(LAYER, xs, &[weight, bias], |_, valid| {
            ops::group_norm(valid, self.num_groups(), weight, bias, self.eps())
        })
    }
}
