//! Initial values that are the same on every run: candle's own generator cannot be seeded on the CPU.

use candle_core::{Device, Error, Result, Tensor};
use candle_nn::VarMap;
use rand::SeedableRng;
use rand_distr::{Distribution, Normal};

/// Draws weights of two axes or more from a normal distribution, He-scaled, in the order of their names, and zeroes biases.
/// The weights of norms stay the ones that they are.
pub(crate) fn initialize(vars: &VarMap, seed: u64) -> Result<()> {
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let vars = vars.data().lock().expect("no thread panicked");
    let mut named: Vec<_> = vars.iter().collect();
    named.sort_by_key(|(name, _)| *name);
    for (name, var) in named {
        if name.ends_with("bias") {
            var.set(&var.zeros_like()?.detach())?;
        } else if var.rank() >= 2 {
            let fan_in = var.elem_count() / var.dims()[0];
            let normal = Normal::new(0f32, (2. / fan_in as f32).sqrt()).map_err(Error::wrap)?;
            let values = normal.sample_iter(&mut rng).take(var.elem_count());
            var.set(&Tensor::from_vec(
                values.collect(),
                var.shape(),
                &Device::Cpu,
            )?)?;
        }
    }
    Ok(())
}
