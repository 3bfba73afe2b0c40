//! The layers on an NVIDIA GPU.
//!
//! ```text
//! cargo test --release -p candle-norm-tests --features cuda --test device
//! ```
//!
//! `conformance` runs the cases on the device, `bits` and `edges` compare layers with the emulator
//! bit by bit, and `graph` captures training steps as CUDA graphs. `rows` and `channels` are the
//! tests of the kernels by themselves, which run each launch on the GPU too where
//! `CANDLE_NORM_GPU` names a folder of modules; `scripts/device_check.sh` does so.
//!
//! `CANDLE_NORM_DEVICE=cpu` tries the program without a GPU: the emulator is then compared with
//! itself in another order of threads, and no graph is captured.

#[path = "../conformance/case.rs"]
mod case;
#[path = "../conformance/compare.rs"]
mod compare;
#[path = "../conformance/family.rs"]
mod family;
#[path = "../conformance/layers.rs"]
mod layers;
#[path = "../conformance/ranks.rs"]
mod ranks;
#[path = "../conformance/runner.rs"]
mod runner;

#[path = "../../crates/cuda-kernels/tests/channels.rs"]
mod channels;
#[path = "../../crates/cuda-kernels/tests/rows.rs"]
mod rows;

mod bits;
mod conformance;
mod edges;
mod graph;
mod sides;

/// Device of the conformance cases where the environment names none.
const DEFAULT_DEVICE: &str = "cuda";
