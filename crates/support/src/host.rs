//! Elements that go between the host and the device that has them, which is counted.
//!
//! On a GPU a copy to the host waits for all work before it, and no CUDA graph can be captured
//! around it. The layers reach elements by these functions alone, so that a test sees each copy.

use std::cell::Cell;

use candle_core::{Device, Result, Shape, Tensor, WithDType};

/// Copies between the host and a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copies {
    /// From the device to the host, which waits for each.
    pub to_host: usize,
    /// From the host to the device.
    pub from_host: usize,
}

thread_local! {
    static COPIES: Cell<Option<Copies>> = const { Cell::new(None) };
}

/// Runs `f` as if all of its tensors were on a GPU, and returns the copies that it asked for on
/// this thread.
pub fn recording<T>(f: impl FnOnce() -> T) -> (T, Copies) {
    let before = COPIES.replace(Some(Copies::default()));
    let result = f();
    (result, COPIES.replace(before).unwrap_or_default())
}

fn count(what: impl FnOnce(&mut Copies)) {
    if let Some(mut copies) = COPIES.get() {
        what(&mut copies);
        COPIES.set(Some(copies));
    }
}

/// Whether the host has the elements of a tensor: a check may read them at every step.
pub fn has(t: &Tensor) -> bool {
    t.device().is_cpu() && COPIES.get().is_none()
}

/// The elements of a vector.
///
/// # Errors
/// Those of candle.
pub fn vector<T: WithDType>(t: &Tensor) -> Result<Vec<T>> {
    count(|copies| copies.to_host += 1);
    t.to_vec1()
}

/// The element of a scalar.
///
/// # Errors
/// Those of candle.
pub fn scalar<T: WithDType>(t: &Tensor) -> Result<T> {
    count(|copies| copies.to_host += 1);
    t.to_scalar()
}

/// A tensor on the CPU.
///
/// # Errors
/// Those of candle.
pub fn moved(t: &Tensor) -> Result<Tensor> {
    count(|copies| copies.to_host += 1);
    t.to_device(&Device::Cpu)
}

/// A tensor of numbers of the host on a device.
///
/// # Errors
/// Those of candle.
pub fn tensor<T: WithDType>(
    values: Vec<T>,
    shape: impl Into<Shape>,
    device: &Device,
) -> Result<Tensor> {
    count(|copies| copies.from_host += 1);
    Tensor::from_vec(values, shape.into(), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_counted_within_a_recording_alone() -> Result<()> {
        let cpu = &Device::Cpu;
        let values = tensor(vec![1f32, 2.], 2, cpu)?;
        assert!(has(&values));
        let (read, copies) = recording(|| -> Result<_> {
            assert!(!has(&values));
            let (inner, copies) = recording(|| tensor(vec![3i64], (), cpu));
            assert_eq!((copies.to_host, copies.from_host), (0, 1));
            assert_eq!(scalar::<i64>(&inner?)?, 3);
            vector::<f32>(&moved(&values)?)
        });
        assert_eq!(read?, [1., 2.]);
        assert_eq!((copies.to_host, copies.from_host), (3, 0));
        assert!(has(&values));
        Ok(())
    }
}
