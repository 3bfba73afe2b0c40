//! The choice between the fused kernels of a device and the composed form.

use std::cell::Cell;

use candle_core::{DeviceLocation, Result, Tensor, bail};

#[cfg(feature = "internals")]
use candle_norm_support::messages;

/// Implementation that computes a layer.
///
/// All paths keep one numeric contract; they differ in speed and in the devices that they serve.
///
/// Values may be set between forward and backward, by `Var::set` or an optimizer. Parameters are
/// copied where a backward may follow. On the fused path, an input that has changed is an error in
/// the backward, as in PyTorch; it is told by up to 64 of its elements, so that a change of a few
/// elements of a large input may go unseen. On the composed path the input is copied if it is a
/// variable; for parts of variables the rule is candle's own: the backward of each operation reads
/// the values that are there when it runs. On a GPU nothing tells whether an input has changed: the
/// host would have to wait for its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Path {
    /// The fastest path that serves the device and dtype of the input.
    #[default]
    Auto,
    /// The fused kernels of the CPU, and with the feature `cuda` those of NVIDIA GPUs, forward and
    /// backward: `f16`, `bf16`, `f32`, `f64`. On GPUs, [`DyT`](crate::DyT),
    /// [`CumulativeLayerNorm`](crate::CumulativeLayerNorm), and scales and shifts of each feature
    /// of each of more than 65 535 samples have no kernels and are composed.
    Fused,
    /// candle's tensor operations: every device, every dtype, differentiable to any order.
    Composed,
    /// Plain loops over `f64` on the CPU, one thread, no vectors: what the other paths are tested
    /// against.
    #[cfg(feature = "internals")]
    Reference,
    /// The CUDA kernels on the CPU, by the emulator that a test program installs.
    #[cfg(feature = "internals")]
    Emulated,
}

thread_local! {
    static PATH: Cell<Path> = const { Cell::new(Path::Auto) };
}

/// Runs `f` with every layer that it calls on this thread forced to `path`.
///
/// A path that cannot serve an input is then an error, never a quiet fallback. The path of the
/// caller is restored afterwards, also when `f` panics.
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

/// The path that this thread is forced to.
#[cfg(feature = "internals")]
pub(crate) fn forced() -> Path {
    PATH.get()
}

/// How a call is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// By the kernels of a backend.
    Fused(Kernels),
    /// By tensor operations.
    Composed,
}

/// The backends that have kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernels {
    Cpu,
    #[cfg(feature = "internals")]
    Reference,
    #[cfg(feature = "internals")]
    Emulated,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// The kernels that serve the device of `x`.
fn kernels_for(x: &Tensor) -> Option<Kernels> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return Some(Kernels::Cuda);
    }
    x.device().is_cpu().then_some(Kernels::Cpu)
}

/// The route by which `layer` computes `x`, whose dtype is one of floating point.
pub(crate) fn route(layer: &str, x: &Tensor) -> Result<Route> {
    #[cfg(feature = "internals")]
    let forced = by_environment(PATH.get())?;
    #[cfg(not(feature = "internals"))]
    let forced = PATH.get();
    routed(layer, forced, kernels_for(x), x.device().location())
}

/// The route of a path on a device at `location` with `kernels`.
fn routed(
    layer: &str,
    path: Path,
    kernels: Option<Kernels>,
    location: DeviceLocation,
) -> Result<Route> {
    match (path, kernels) {
        (Path::Composed, _) | (Path::Auto, None) => Ok(Route::Composed),
        #[cfg(feature = "internals")]
        (Path::Reference, Some(Kernels::Cpu)) => Ok(Route::Fused(Kernels::Reference)),
        #[cfg(feature = "internals")]
        (Path::Emulated, Some(Kernels::Cpu)) => Ok(Route::Fused(Kernels::Emulated)),
        (Path::Auto | Path::Fused, Some(kernels)) => Ok(Route::Fused(kernels)),
        _ => unserved(layer, path, location),
    }
}

/// `path`, or in place of [`Path::Auto`] the path that the environment variable `CANDLE_NORM_PATH`
/// names: whole test programs run on a path by it.
#[cfg(feature = "internals")]
fn by_environment(path: Path) -> Result<Path> {
    use std::sync::OnceLock;

    static NAME: OnceLock<String> = OnceLock::new();
    let name = NAME.get_or_init(|| std::env::var("CANDLE_NORM_PATH").unwrap_or_default());
    match (path, name.as_str()) {
        (Path::Auto, "reference") => Ok(Path::Reference),
        (Path::Auto, "composed") => Ok(Path::Composed),
        (Path::Auto, "emulated") => Ok(Path::Emulated),
        (Path::Auto, "") => Ok(path),
        (Path::Auto, _) => {
            messages::internal("CANDLE_NORM_PATH", "reference, composed or emulated")
        }
        _ => Ok(path),
    }
}

/// The error of a path that was forced for a device that it does not serve.
fn unserved(layer: &str, path: Path, location: DeviceLocation) -> Result<Route> {
    let served = match (path, cfg!(feature = "cuda")) {
        (Path::Fused, true) => "the CPU or on an NVIDIA GPU",
        _ => "the CPU",
    };
    let remedy = match (path, location) {
        (Path::Fused, DeviceLocation::Cuda { .. }) => {
            "use Path::Auto, or build candle-norm with its feature `cuda`"
        }
        _ => "use Path::Auto",
    };
    bail!(
        "{layer}: expected an input on {served}, which {path:?} serves, got one on {location:?}; \
        {remedy}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPUS: [DeviceLocation; 2] = [
        DeviceLocation::Cuda { gpu_id: 0 },
        DeviceLocation::Metal { gpu_id: 1 },
    ];

    #[test]
    fn a_device_without_kernels_takes_the_composed_form() {
        for location in GPUS {
            for path in [Path::Auto, Path::Composed] {
                let route = routed("LayerNorm", path, None, location);
                assert_eq!(route.ok(), Some(Route::Composed), "{path:?}");
            }
        }
    }

    #[test]
    fn a_path_that_is_forced_on_a_device_without_kernels_is_an_error() {
        for location in GPUS {
            let error = match routed("LayerNorm", Path::Fused, None, location) {
                Ok(route) => panic!("{route:?}"),
                Err(error) => error.to_string(),
            };
            let device = format!("{location:?}");
            for part in [
                "LayerNorm: expected",
                "the CPU",
                "Fused",
                &device,
                "Path::Auto",
            ] {
                assert!(error.contains(part), "{error}");
            }
            let names_feature = error.contains("feature `cuda`");
            assert_eq!(names_feature, device.contains("Cuda"), "{error}");
        }
    }

    #[cfg(feature = "internals")]
    #[test]
    fn paths_of_tests_serve_the_cpu_alone() {
        for path in [Path::Reference, Path::Emulated] {
            for location in GPUS {
                assert!(routed("LayerNorm", path, None, location).is_err());
            }
            let cpu = routed("LayerNorm", path, Some(Kernels::Cpu), DeviceLocation::Cpu);
            assert!(matches!(cpu, Ok(Route::Fused(kernels)) if kernels != Kernels::Cpu));
        }
    }
}
