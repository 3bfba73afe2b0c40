//! Layers that keep running statistics, by one signature.

use std::fmt;

use candle_core::Result;
use candle_nn::VarBuilder;
use candle_norm::{
    Affine, BatchNorm, BatchNormOptions, BatchRenormOptions, InstanceNorm, InstanceNormOptions,
    Norm, SwitchNorm, SwitchNormOptions,
};

/// Options that every layer with statistics has.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Number that is added to the variance.
    pub eps: f64,
    /// Share of a new batch; none for the average over all batches.
    pub momentum: Option<f64>,
    /// Batches that are not finite are errors.
    pub refuse_non_finite: bool,
}

/// [`Settings`] as all layers have them by default.
pub const DEFAULTS: Settings = Settings {
    eps: 1e-5,
    momentum: Some(0.1),
    refuse_non_finite: false,
};

/// A norm whose clones are the same layer.
pub trait Shared: Norm {
    /// A clone, which shares parameters and statistics.
    fn share(&self) -> Box<dyn Shared>;
}

impl<N: Norm + Clone + 'static> Shared for N {
    fn share(&self) -> Box<dyn Shared> {
        Box::new(self.clone())
    }
}

/// A layer with running statistics, a weight and a bias.
#[derive(Clone, Copy)]
pub struct Tracked {
    /// Name in the messages of tests.
    pub name: &'static str,
    /// Builds the layer for a number of features, with variables.
    build: fn(usize, Settings, VarBuilder) -> Result<Box<dyn Shared>>,
    /// Its statistics are the mean and the unbiased variance of each channel, and inference is by
    /// these.
    pub moments: bool,
    /// The mean is one of its statistics; else it stays zero.
    pub centered: bool,
    /// There is a form of it whose statistics are fixed.
    pub freezes: bool,
}

impl fmt::Debug for Tracked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Tracked {
    /// The layer for a number of features, with variables.
    pub fn build(
        &self,
        features: usize,
        settings: Settings,
        vb: VarBuilder,
    ) -> Result<Box<dyn Shared>> {
        (self.build)(features, settings, vb)
    }
}

fn batch(features: usize, remove_mean: bool, s: Settings, vb: VarBuilder) -> Result<BatchNorm> {
    let options = BatchNormOptions {
        momentum: s.momentum,
        refuse_non_finite: s.refuse_non_finite,
        remove_mean,
        ..s.eps.into()
    };
    candle_norm::batch_norm(features, options, vb)
}

fn instance(features: usize, s: Settings, vb: VarBuilder) -> Result<InstanceNorm> {
    let options = InstanceNormOptions {
        momentum: s.momentum,
        refuse_non_finite: s.refuse_non_finite,
        affine: Affine::WeightAndBias,
        track_running_stats: true,
        ..s.eps.into()
    };
    candle_norm::instance_norm(features, options, vb)
}

fn switch(features: usize, spatial_dims: usize, s: Settings, vb: VarBuilder) -> Result<SwitchNorm> {
    let options = SwitchNormOptions {
        momentum: s.momentum,
        refuse_non_finite: s.refuse_non_finite,
        spatial_dims,
        ..s.eps.into()
    };
    candle_norm::switch_norm(features, options, vb)
}

/// Batch normalization.
pub const BATCH: Tracked = Tracked {
    name: "batch norm",
    build: |features, s, vb| Ok(Box::new(batch(features, true, s, vb)?)),
    moments: true,
    centered: true,
    freezes: true,
};

/// Batch normalization by the root mean square.
pub const BATCH_NO_MEAN: Tracked = Tracked {
    name: "batch norm, not centered",
    build: |features, s, vb| Ok(Box::new(batch(features, false, s, vb)?)),
    moments: false,
    centered: false,
    freezes: true,
};

/// Batch renormalization, up to the end of its warm-up.
pub const BATCH_RENORM: Tracked = Tracked {
    name: "batch renorm",
    build: |features, s, vb| {
        let options = BatchRenormOptions {
            momentum: s.momentum,
            refuse_non_finite: s.refuse_non_finite,
            ..s.eps.into()
        };
        Ok(Box::new(candle_norm::batch_renorm(features, options, vb)?))
    },
    moments: true,
    centered: true,
    freezes: true,
};

/// Instance normalization.
pub const INSTANCE: Tracked = Tracked {
    name: "instance norm",
    build: |features, s, vb| Ok(Box::new(instance(features, s, vb)?)),
    moments: true,
    centered: true,
    freezes: true,
};

/// Switchable normalization.
pub const SWITCH: Tracked = Tracked {
    name: "switch norm",
    build: |features, s, vb| Ok(Box::new(switch(features, 1, s, vb)?)),
    moments: true,
    centered: true,
    freezes: false,
};

/// Switchable normalization without instances, whose variances are biased.
pub const SWITCH_FLAT: Tracked = Tracked {
    name: "switch norm, without instances",
    build: |features, s, vb| Ok(Box::new(switch(features, 0, s, vb)?)),
    moments: false,
    centered: true,
    freezes: false,
};
