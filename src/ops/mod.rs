//! The layers as stateless, differentiable functions on tensors.
//!
//! A function here checks its input (`check`), picks the path that computes it and returns a tensor whose
//! gradients reach every argument. The layers of this crate add parameters, configuration and running
//! statistics to these functions and nothing else.

pub(crate) mod check;
pub(crate) mod composed;
mod fused;
pub(crate) mod linear_map;

mod add_norm;
mod batch_norm;
mod group_norm;
mod instance_norm;
mod moments;
mod row_norm;
mod softmax;
mod switch_norm;
mod turn;
mod weight_norm;

use std::cell::Cell;

use candle_core::{Result, Tensor};

pub(crate) use add_norm::add_row_norm;
pub use add_norm::{add_layer_norm, add_rms_norm};
pub use batch_norm::{BatchStatistics, batch_norm, batch_norm_inference};
pub(crate) use batch_norm::{batch_norm_with, normalize_with};
pub use group_norm::group_norm;
pub use instance_norm::instance_norm;
pub(crate) use instance_norm::instance_norm_by;
pub(crate) use moments::columns;
#[doc(inline)]
pub use moments::{Moments, moments};
pub use row_norm::{Cast, layer_norm, rms_norm};
pub(crate) use row_norm::{RowNorm, row_norm};
pub(crate) use softmax::softmax_last_dim;
pub use switch_norm::{SwitchBatch, SwitchSources, switch_norm};
pub(crate) use switch_norm::{shares, switch_norm_with};
pub use weight_norm::weight_norm;
pub(crate) use weight_norm::{magnitude_shape, norms};

/// Which implementation computes a layer.
///
/// All paths keep one numeric contract; they differ in speed and in the devices that they serve.
///
/// Values may be set between forward and backward, by `Var::set` or an optimizer. Parameters are
/// copied where a backward may follow. On
/// the fused path, an input that has changed is an error in the backward, as in PyTorch; it is told
/// by up to 64 of its elements, so that a change of a
/// few elements of a large input may go unseen. On the composed path the input is copied if it is a
/// variable; for parts of variables the
/// rule is candle's own: the backward of each operation reads what is there when it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Path {
    /// The fastest path that serves the device and dtype of the input.
    #[default]
    Auto,
    /// The fused CPU kernels, forward and backward: `f16`, `bf16`, `f32`, `f64`.
    Fused,
    /// candle's tensor operations: every device, every dtype, differentiable to any order.
    Composed,
}

thread_local! {
    static PATH: Cell<Path> = const { Cell::new(Path::Auto) };
}

/// Runs `f` with every layer that it calls on this thread forced to `path`.
///
/// A path that cannot serve an input is then an error, never a quiet fallback. The path of the caller is
/// restored afterwards, also when `f` panics.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_norm::{Path, ops, with_path};
///
/// let x = Tensor::new(&[[1f32, 2., 3.]], &Device::Cpu)?;
/// let y = with_path(Path::Composed, || ops::layer_norm(&x, 3, None, None, 1e-5))?;
/// assert_eq!(y.dims(), [1, 3]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn with_path<T>(path: Path, f: impl FnOnce() -> T) -> T {
    struct Restore(Path);
    impl Drop for Restore {
        fn drop(&mut self) {
            PATH.set(self.0);
        }
    }
    let _restore = Restore(PATH.replace(path));
    f()
}

/// How a call is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    Fused,
    Composed,
}

/// The route by which `layer` computes `x`, whose dtype is one of floating point. This is the one place where a path is chosen.
fn route(layer: &str, x: &Tensor) -> Result<Route> {
    let served = x.device().is_cpu();
    match PATH.get() {
        Path::Composed => Ok(Route::Composed),
        Path::Auto if !served => Ok(Route::Composed),
        Path::Auto | Path::Fused => check::served(layer, x, served).map(|()| Route::Fused),
    }
}

#[doc(hidden)]
pub mod hook;
