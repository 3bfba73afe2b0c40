//! The device that an example runs on.

use candle_core::{Device, Error, Result};

/// The device of a name: `cpu`, or `cuda`, the first NVIDIA GPU.
pub(crate) fn parse(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(0).map_err(|why| {
            let needs = "cuda needs an NVIDIA GPU, and `--features cuda` before `--example`";
            Error::Msg(format!("{needs}: {why}"))
        }),
        _ => Err(Error::Msg("allowed: cpu, cuda".to_string())),
    }
}

/// Prints the device of a run.
pub(crate) fn print(device: &Device) {
    match device {
        Device::Cpu => println!("Device: CPU"),
        _ => println!("Device: {:?}", device.location()),
    }
}
