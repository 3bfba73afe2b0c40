//! A layer as a case of the gradient check.
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_norm::gradcheck::GradCheck;
use candle_norm::{Affine, Path, with_path};
use testkit::data::uniform;

type Forward = Box<dyn Fn(VarBuilder, &Tensor) -> Result<Tensor>>;

/// A layer as a function of its input and its parameters.
pub(crate) struct Case {
    name: String,
    input: Vec<usize>,
    /// Parameters that `forward` finds in its `VarBuilder`, by name and shape.
    params: Vec<(String, Vec<usize>)>,
    /// The shape of the running statistics that `forward` finds, for itself and for a norm that is
    /// part of it.
    statistics: Option<Vec<usize>>,
    /// Also checked where the first sample and channel are zero.
    zeros: bool,
    paths: &'static [Path],
    forward: Forward,
}

impl Case {
    pub(crate) fn new(
        name: impl Into<String>,
        input: &[usize],
        forward: impl Fn(VarBuilder, &Tensor) -> Result<Tensor> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            input: input.to_vec(),
            params: vec![],
            statistics: None,
            zeros: true,
            paths: &[Path::Auto, Path::Composed],
            forward: Box::new(forward),
        }
    }

    pub(crate) fn param(mut self, name: &str, shape: &[usize]) -> Self {
        self.params.push((name.to_string(), shape.to_vec()));
        self
    }

    /// Weight and bias, as far as `affine` has them.
    pub(crate) fn affine(self, affine: Affine, shape: &[usize]) -> Self {
        match affine {
            Affine::None => self,
            Affine::Weight => self.param("weight", shape),
            Affine::Bias => self.param("bias", shape),
            Affine::WeightAndBias => self.param("weight", shape).param("bias", shape),
        }
    }

    pub(crate) fn statistics(self, channels: usize) -> Self {
        self.statistics_of(&[channels])
    }

    /// Running statistics of a shape of their own.
    pub(crate) fn statistics_of(mut self, shape: &[usize]) -> Self {
        self.statistics = Some(shape.to_vec());
        self
    }

    /// The layer has no derivative at zero, or one that a step of 1e-6 cannot see.
    pub(crate) fn not_at_zero(mut self) -> Self {
        self.zeros = false;
        self
    }

    /// The case on one path: it is the same on every path.
    pub(crate) fn on_one_path(mut self) -> Self {
        self.paths = &[Path::Auto];
        self
    }

    /// The inputs to check at: contiguous, with its axes in another order in memory, sliced out of
    /// a larger one, and with a sample and a channel of zeros, where a variance is zero.
    fn inputs(&self) -> Result<Vec<(&'static str, Tensor)>> {
        let x = uniform(self.input.as_slice(), 1);
        let last = x.rank() - 1;
        let mut inputs = vec![("contiguous", x.clone())];
        if last > 0 {
            let transposed = x.transpose(0, last)?.contiguous()?.transpose(0, last)?;
            inputs.push(("transposed", transposed));
        }
        let sliced = x.pad_with_same(last, 1, 2)?.narrow(last, 1, x.dim(last)?)?;
        inputs.push(("sliced", sliced));
        if self.zeros && last > 0 {
            let from_second = |axis| -> Result<Tensor> {
                let rest = x.narrow(axis, 1, x.dim(axis)? - 1)?.ones_like()?;
                rest.pad_with_zeros(axis, 1, 0)
            };
            inputs.push(("zeros", (&x * (from_second(0)? * from_second(1)?)?)?));
        }
        Ok(inputs)
    }

    /// Faults of the gradients, if there are any.
    fn check(&self) -> Result<Vec<String>> {
        let params: Vec<Tensor> = (self.params.iter().zip(2..))
            .map(|((_, shape), seed)| uniform(shape.as_slice(), seed))
            .collect();
        let forward = |v: &[Tensor]| {
            let names = self.params.iter().map(|(name, _)| name.to_string());
            let mut tensors: Vec<_> = names.zip(v[1..].iter().cloned()).collect();
            if let Some(shape) = &self.statistics {
                for prefix in ["", "norm."] {
                    let name = |statistic: &str| format!("{prefix}{statistic}");
                    tensors.push((name("running_mean"), uniform(shape.as_slice(), 101)));
                    tensors.push((name("running_var"), (uniform(shape.as_slice(), 102) + 1.5)?));
                }
            }
            let tensors = tensors.into_iter().collect();
            let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
            (self.forward)(vb, &v[0])
        };
        let mut faults = vec![];
        for (layout, x) in self.inputs()? {
            let check = GradCheck {
                projections: (x.elem_count() > 60).then_some(4),
                ..Default::default()
            };
            let inputs: Vec<Tensor> = std::iter::once(x).chain(params.clone()).collect();
            for &path in self.paths {
                let report = with_path(path, || check.check(forward, &inputs));
                let what = format!("{}, {layout}, {path:?}", self.name);
                match report {
                    Ok(report) if report.passed() && report.unreached.is_empty() => {}
                    Ok(report) => faults.push(format!("{what}: {report}")),
                    Err(error) => faults.push(format!("{what}: {error}")),
                }
            }
        }
        Ok(faults)
    }
}

pub(crate) fn check_all(cases: impl IntoIterator<Item = Case>) -> Result<()> {
    let mut faults = vec![];
    for case in cases {
        faults.extend(case.check()?);
    }
    assert!(faults.is_empty(), "{}", faults.join("\n\n"));
    Ok(())
}
