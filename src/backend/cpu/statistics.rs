//! Statistics of the kernels as tensors.

use candle_core::{Device, Result, Tensor};

use crate::backend::Statistics;
use candle_norm_kernels::Stats;

fn tensor(values: Vec<f64>) -> Result<Tensor> {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu)
}

impl Statistics for Vec<Stats> {
    fn mean(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.mean.high).collect())
    }

    fn var(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.var).collect())
    }

    fn std(&self) -> Result<Tensor> {
        tensor(self.iter().map(|s| s.inv_std.recip()).collect())
    }

    fn over_samples(&self, channels: usize) -> Result<[Tensor; 2]> {
        let samples = (self.len() / channels) as f64;
        let (mut mean, mut var) = (vec![0.; channels], vec![0.; channels]);
        for sample in self.chunks(channels) {
            for (c, stats) in sample.iter().enumerate() {
                mean[c] += stats.mean.high / samples;
                var[c] += stats.var / samples;
            }
        }
        Ok([tensor(mean)?, tensor(var)?])
    }
}
