//! A training step and an inference of a layer on both sides, the emulator and the device.

use candle_core::{DType, Device, Error, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_norm::{Path, with_path};
use testkit::data::{Draw, values};
use testkit::emulated::{Order, with_order};
use testkit::table::{Form, Layer, forms};
use testkit::view::View;

/// Layers with computations that are composed of candle's operations on a GPU, whose bits are those
/// of candle's kernels.
const COMPOSED: [&str; 0] = [];

/// Forms of layers whose computations have kernels, or else the other ones.
pub(crate) fn forms_with_kernels(
    with: bool,
) -> impl Iterator<Item = (&'static Layer, &'static Form)> {
    forms().filter(move |(layer, _)| COMPOSED.contains(&layer.name) != with)
}

/// The device, which all tests share.
pub(crate) fn device() -> Result<Device> {
    crate::case::device().cloned().map_err(Error::Msg)
}

/// Whether there is a GPU to test, or the emulator is compared with itself.
pub(crate) fn is_gpu() -> Result<bool> {
    Ok(device()?.is_cuda())
}

/// How an input lies in memory: as a view of a buffer, or contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lies(pub(crate) Option<View>);

impl Lies {
    /// Layouts of an input of a rank. A broadcast one sums gradients by an operation of candle.
    pub(crate) fn all(rank: usize) -> Vec<Self> {
        let views = View::all(rank);
        let kept = views
            .into_iter()
            .filter(|view| !matches!(view, View::Broadcast(_)));
        [None].into_iter().chain(kept.map(Some)).map(Self).collect()
    }

    /// The shape of the buffer.
    pub(crate) fn stored(self, dims: &[usize]) -> Vec<usize> {
        self.0.map_or(dims.to_vec(), |view| view.stored(dims))
    }

    fn of(self, buffer: &Tensor, dims: &[usize]) -> Result<Tensor> {
        match self.0 {
            Some(view) => view.of(buffer, dims),
            None => Ok(buffer.clone()),
        }
    }
}

/// A layer and its input.
pub(crate) struct Case<'a> {
    pub(crate) form: &'a Form,
    pub(crate) dims: &'a [usize],
    pub(crate) dtype: DType,
    /// Of the parameters.
    pub(crate) params: DType,
    pub(crate) lies: Lies,
    /// Elements of the buffer that the input is a view of.
    pub(crate) x: &'a [f64],
}

/// Results by name, as numbers in `f64`.
pub(crate) type Results = Vec<(String, Vec<f64>)>;

/// Sets each parameter to numbers that follow from its name and size.
pub(crate) fn set_params(vars: &VarMap) -> Result<()> {
    let vars = vars.data().lock().expect("no thread panicked");
    for (name, var) in vars.iter().filter(|(name, _)| is_param(name)) {
        let mut draw = Draw::new((name.len() + var.elem_count()) as u64);
        let numbers = draw.weight(var.elem_count());
        let numbers = Tensor::from_vec(numbers, var.shape(), &Device::Cpu)?;
        let numbers = numbers.to_dtype(var.dtype())?;
        var.set(&numbers.to_device(var.device())?)?;
    }
    Ok(())
}

fn is_param(name: &str) -> bool {
    !name.starts_with("running") && name != "num_batches_tracked"
}

impl Case<'_> {
    /// Output, gradients, running statistics, and the output of an inference.
    pub(crate) fn on(&self, device: &Device, path: Path) -> Result<Results> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, self.params, device);
        let norm = (self.form.build)(self.dims, vb)?;
        set_params(&vars)?;
        let stored = self.lies.stored(self.dims);
        let host = |numbers: &[f64], dims: &[usize]| {
            let numbers = Tensor::from_slice(numbers, dims, &Device::Cpu)?;
            numbers.to_dtype(self.dtype)?.to_device(device)
        };
        let buffer = Var::from_tensor(&host(self.x, &stored)?)?;
        let dy = Draw::new(7).normal(self.dims.iter().product());
        let dy = host(&dy, self.dims)?;
        let x = self.lies.of(&buffer, self.dims)?;
        with_path(path, || {
            let y = norm.forward_t(&x, true)?;
            // The product's gradient is dy, to the bit.
            let grads = (&y * &dy)?.sum_all()?.backward()?;
            let mut results = vec![("y".to_string(), values(&y)?)];
            if let Some(dx) = grads.get(&buffer) {
                results.push(("dx".to_string(), values(dx)?));
            }
            let vars = vars.data().lock().expect("no thread panicked");
            let mut names: Vec<&String> = vars.keys().collect();
            names.sort();
            for name in names {
                let var = &vars[name];
                if let Some(gradient) = grads.get(var) {
                    results.push((format!("d{name}"), values(gradient)?));
                } else if !is_param(name) {
                    results.push((name.clone(), values(var)?));
                }
            }
            let inference = norm.forward_t(&x.detach(), false)?;
            results.push(("y of inference".to_string(), values(&inference)?));
            Ok(results)
        })
    }

    /// The first number of the device that is not the emulator's, bit by bit; one NaN is as good as
    /// another.
    pub(crate) fn difference(&self, device: &Device) -> Result<Option<String>> {
        let emulated = self.on(&Device::Cpu, Path::Emulated)?;
        let found = match device {
            Device::Cpu => with_order(Order::Descending, || self.on(device, Path::Emulated))?,
            _ => self.on(device, Path::Fused)?,
        };
        for ((name, want), (other, got)) in emulated.iter().zip(&found) {
            assert_eq!(name, other);
            assert_eq!(want.len(), got.len(), "{name}");
            let same =
                |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            let pairs = || want.iter().zip(got);
            if let Some(at) = pairs().position(|pair| !same(pair)) {
                let count = pairs().filter(|pair| !same(*pair)).count();
                return Ok(Some(format!(
                    "{name}[{at}] is {:e} on the device, {:e} on the emulator; {count} of {} \
                    differ",
                    got[at],
                    want[at],
                    want.len()
                )));
            }
        }
        assert_eq!(emulated.len(), found.len());
        Ok(None)
    }
}

/// The failures of many cases as one.
pub(crate) fn assert_none(ran: usize, faults: Vec<String>) {
    assert!(ran > 0, "no case ran");
    assert!(
        faults.is_empty(),
        "{} of {ran} cases differ:\n{}",
        faults.len(),
        faults.join("\n")
    );
}
