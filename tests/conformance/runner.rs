//! Runs cases on every path and layout, and reports.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path as FilePath, PathBuf};

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_norm::Path;

use crate::case::{Case, Outcome, device, one_line};
use crate::compare::{Worst, compare};
use crate::family;
use crate::layers::{COUNT, Inputs, OPS, Op, Outputs, Plan, RESIDUAL, STATE};
use crate::ranks::on_path;

/// How the input lies in memory. All layouts hold the same values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Layout {
    Contiguous,
    /// Every other element of a buffer, the elements between being NaN: whoever reads the buffer
    /// instead of the view shows it.
    EveryOther,
    /// The axes lie in memory in reverse order.
    Reversed,
}

impl Layout {
    /// The layouts that are different ones for tensors of this rank.
    fn of_rank(rank: usize) -> &'static [Self] {
        match rank {
            0 | 1 => &[Self::Contiguous, Self::EveryOther],
            _ => &[Self::Contiguous, Self::EveryOther, Self::Reversed],
        }
    }

    /// The buffer whose view has the values of `t`.
    fn buffer(self, t: &Tensor) -> Result<Tensor> {
        match self {
            Self::Contiguous => Ok(t.clone()),
            Self::EveryOther => {
                let between = Tensor::full(f32::NAN, t.shape(), t.device())?.to_dtype(t.dtype())?;
                Tensor::stack(&[&between, t], t.rank())
            }
            Self::Reversed => t.permute(reversed(t.rank()))?.contiguous(),
        }
    }

    /// The view of a buffer, or of the gradient of a buffer.
    fn view(self, buffer: &Tensor) -> Result<Tensor> {
        match self {
            Self::Contiguous => Ok(buffer.clone()),
            Self::EveryOther => {
                let axis = buffer.rank() - 1;
                buffer.narrow(axis, 1, 1)?.squeeze(axis)
            }
            Self::Reversed => buffer.permute(reversed(buffer.rank())),
        }
    }
}

fn reversed(rank: usize) -> Vec<usize> {
    (0..rank).rev().collect()
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Contiguous => "contiguous",
            Self::EveryOther => "every other element",
            Self::Reversed => "reversed axes",
        })
    }
}

fn path_name(path: Path) -> &'static str {
    match path {
        Path::Auto => "auto",
        Path::Fused => "fused",
        Path::Composed => "composed",
        Path::Reference => "reference",
        Path::Emulated => "cuda emulated",
        _ => "another",
    }
}

/// Results of one folder.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) passed: usize,
    /// One line for each case that falls short, or for the folder itself.
    pub(crate) failures: Vec<String>,
    /// By path and layout: how many cases ran.
    runs: BTreeMap<(&'static str, Layout), usize>,
    /// By op, dtype and path: the case that came closest to its tolerance, or went farthest over.
    closest: BTreeMap<(String, String, &'static str), (f64, String)>,
    /// How many cases were of an op or a device that the fused path must refuse, and did.
    refused: usize,
}

impl Report {
    pub(crate) fn passes(&self) -> bool {
        self.failures.is_empty()
    }

    pub(crate) fn closing_line(&self) -> String {
        format!("{} passed, {} failed", self.passed, self.failures.len())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ((op, dtype, path), (error, place)) in &self.closest {
            writeln!(
                f,
                "{op} {dtype} {path}: at most {error:.1e} of the tolerance, {place}"
            )?;
        }
        let paths = [Path::Fused, Path::Composed, Path::Reference, Path::Emulated];
        for path in paths.map(path_name) {
            let runs = self.runs.iter().filter(|((p, _), _)| *p == path);
            let counts: Vec<String> = runs
                .map(|((_, layout), n)| format!("{n} {layout}"))
                .collect();
            match counts.is_empty() {
                true => writeln!(f, "{path} path: 0 cases ran")?,
                false => writeln!(f, "{path} path: {}", counts.join(", "))?,
            }
        }
        if self.refused > 0 {
            writeln!(
                f,
                "fused path: {} cases refused, as they must be",
                self.refused
            )?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED {failure}")?;
        }
        writeln!(f, "{}", self.closing_line())
    }
}

/// Runs every case of a folder and of the folders in it. A folder without cases is a failure.
pub(crate) fn run_folder(folder: &FilePath) -> Report {
    let mut report = Report::default();
    let mut files = vec![];
    if let Err(error) = collect(folder, &mut files) {
        report.failures.push(error);
    } else if files.is_empty() {
        let text = format!("{}: no .safetensors file in this folder", folder.display());
        report.failures.push(text);
    }
    files.sort();
    for file in files {
        let relative = file
            .strip_prefix(folder)
            .unwrap_or(&file)
            .with_extension("");
        let name = relative.display().to_string();
        // A layer that panics fails its case and no other.
        let result = catch_unwind(AssertUnwindSafe(|| {
            run_case(&Case::read(name.clone(), &file)?, &mut report)
        }));
        match result {
            Ok(Ok(())) => report.passed += 1,
            Ok(Err(error)) => report.failures.push(format!("{name}: {error}")),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                let text = one_line(text.unwrap_or_default());
                report.failures.push(format!("{name}: panicked: {text}"));
            }
        }
    }
    report
}

fn collect(folder: &FilePath, files: &mut Vec<PathBuf>) -> Outcome<()> {
    let at_folder = |error| format!("{}: {}", folder.display(), one_line(error));
    for entry in std::fs::read_dir(folder).map_err(at_folder)? {
        let path = entry.map_err(at_folder)?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    Ok(())
}

fn run_case(case: &Case, report: &mut Report) -> Outcome<()> {
    let op = OPS
        .iter()
        .chain(family::OPS)
        .find(|op| op.name == case.op)
        .ok_or_else(|| format!("unknown op `{}`", case.op))?;
    check_tensors(case, op)?;
    let plan = (op.plan)(case)?;
    let mut short = vec![];
    let mut paths = vec![Path::Composed];
    if op.fused && device()?.is_cpu() {
        paths.extend([Path::Fused, Path::Reference, Path::Emulated]);
    } else if op.fused && device()?.is_cuda() {
        paths.push(Path::Fused);
    } else {
        // Should the forced path run all the same, then either it fell back quietly or the table is
        // behind.
        let leaves = Leaves::new(case, op, Layout::Contiguous)?;
        if on_path(Path::Fused, || plan(leaves.inputs)).is_ok() {
            return Err("the fused path ran, which does not serve this case".to_string());
        }
        report.refused += 1;
    }
    for path in paths {
        for &layout in Layout::of_rank(case.tensor(op.input)?.rank()) {
            let place = format!("{}, {layout}", path_name(path));
            let run = on_path(path, || run_once(case, op, &plan, layout))
                .map_err(|e| format!("{place}: {e}"))?;
            *report.runs.entry((path_name(path), layout)).or_default() += 1;
            for (name, result) in run {
                let worst = match result {
                    Ok(None) => continue,
                    Ok(Some(worst)) => worst,
                    Err(error) => {
                        short.push(format!("{place}: {name}: {error}"));
                        continue;
                    }
                };
                let Worst {
                    index,
                    got,
                    want,
                    error,
                } = &worst;
                if *error > 1. {
                    short.push(format!(
                        "{place}: {name}{index:?} got {got:e}, want {want:e}, {error:.3e} \
                        tolerances"
                    ));
                }
                let key = (
                    op.name.to_string(),
                    format!("{:?}", case.dtype),
                    path_name(path),
                );
                let closest = report.closest.entry(key).or_insert((-1., String::new()));
                if *error > closest.0 {
                    *closest = (*error, format!("{name} of {} ({layout})", case.name));
                }
            }
        }
    }
    match short.is_empty() {
        true => Ok(()),
        false => Err(short.join("; ")),
    }
}

/// Names and dtypes: what is missing, and what nobody would look at.
fn check_tensors(case: &Case, op: &Op) -> Outcome<()> {
    let inputs = || std::iter::once(&op.input).chain(op.required);
    for name in inputs().chain(family::fixed(op)) {
        case.tensor(name)?;
    }
    let state = || STATE.iter().filter(|_| op.stateful);
    for (name, tensor) in &case.tensors {
        let dtype = if let Some((_, dtype)) = state().find(|(state, _)| state == name) {
            *dtype
        } else if family::fixed(op).contains(&name.as_str()) {
            continue;
        } else if inputs().chain(op.optional).any(|n| n == name) || is_cotangent(op, name) {
            case.dtype
        } else {
            return Err(format!("unknown tensor `{name}` for op `{}`", op.name));
        };
        if tensor.dtype() != dtype {
            return Err(format!(
                "`{name}` is {:?}, must be {dtype:?}",
                tensor.dtype()
            ));
        }
    }
    let gradient = |name: &str| {
        let of = name.strip_prefix('d')?;
        inputs().chain(op.optional).find(|n| **n == of)
    };
    let is_output = |name: &str| {
        name == "y"
            || (op.adds && name == "sum")
            || gradient(name).is_some()
            || state().any(|(state, _)| *state == name)
            || family::state(op).contains(&name)
    };
    let has_cotangent = case.tensors.keys().any(|name| is_cotangent(op, name));
    for name in case.expected.keys() {
        if !is_output(name) {
            return Err(format!(
                "unknown tensor `expected.{name}` for op `{}`",
                op.name
            ));
        }
        if let Some(of) = gradient(name)
            && !(has_cotangent && case.has(of))
        {
            return Err(format!("`expected.{name}` without `dy` and `{of}`"));
        }
    }
    match case.scales.keys().find(|name| !is_output(name)) {
        None => Ok(()),
        Some(name) => Err(format!("unknown scale `{name}` for op `{}`", op.name)),
    }
}

/// Whether `name` is the cotangent of an output of `op`.
fn is_cotangent(op: &Op, name: &str) -> bool {
    name == "dy" || (op.adds && name == "dsum")
}

/// The tensors of a case as a layer gets them, and the variables behind them.
struct Leaves {
    inputs: Inputs,
    vars: HashMap<String, (Var, Layout)>,
}

impl Leaves {
    fn new(case: &Case, op: &Op, layout: Layout) -> Outcome<Self> {
        let device = device()?;
        let on_device = |tensor: &Tensor, layout: Layout| {
            let var = Var::from_tensor(&layout.buffer(tensor)?.to_device(device)?)?;
            let view = layout.view(var.as_tensor())?;
            Ok::<_, candle_core::Error>((var, view))
        };
        let mut leaves = Self {
            inputs: HashMap::new(),
            vars: HashMap::new(),
        };
        for name in family::fixed(op) {
            let value = case.tensor(name)?.to_device(device).map_err(one_line)?;
            leaves.inputs.insert(name.to_string(), value);
        }
        let differentiable = std::iter::once(&op.input)
            .chain(op.required)
            .chain(op.optional);
        for name in differentiable {
            let Some(tensor) = case.tensors.get(*name) else {
                continue;
            };
            let layout = match name == &op.input || *name == RESIDUAL {
                true => layout,
                false => Layout::Contiguous,
            };
            let (var, view) = on_device(tensor, layout).map_err(one_line)?;
            leaves.inputs.insert(name.to_string(), view);
            leaves.vars.insert(name.to_string(), (var, layout));
        }
        Ok(leaves)
    }
}

type Compared = Vec<(String, Outcome<Option<Worst>>)>;

/// One forward and backward, and the comparison of everything that the case expects.
fn run_once(case: &Case, op: &Op, plan: &Plan, layout: Layout) -> Outcome<Compared> {
    let Leaves { inputs, vars } = Leaves::new(case, op, layout)?;
    let Outputs { y, sum, state } = plan(inputs).map_err(one_line)?;
    let outputs: Vec<(&str, Tensor)> = [("y", y)]
        .into_iter()
        .chain(sum.map(|sum| ("sum", sum)))
        .collect();
    let grads = backward(case, &outputs)?;
    let produced = |name: &str| -> Outcome<Tensor> {
        if let Some((_, output)) = outputs.iter().find(|(output, _)| *output == name) {
            return Ok(output.clone());
        }
        if let Some((_, value)) = state.iter().find(|(state, _)| *state == name) {
            return Ok(value.clone());
        }
        let gradient = name.strip_prefix('d').and_then(|of| {
            let (var, layout) = vars.get(of)?;
            Some((grads.as_ref()?.get(var.as_tensor()), layout))
        });
        match gradient {
            Some((Some(gradient), _)) if gradient.dtype() != case.dtype => Err(format!(
                "is {:?}, must be {:?}",
                gradient.dtype(),
                case.dtype
            )),
            Some((Some(gradient), layout)) => layout.view(gradient).map_err(one_line),
            Some((None, _)) => Err("no gradient arrived".to_string()),
            None => Err("the layer produced none".to_string()),
        }
    };
    let compared = case.expected.iter().map(|(name, want)| {
        // A count is a whole number: no share of it is a rounding.
        let (rtol, atol) = match name.as_str() {
            COUNT => (0., 0.),
            _ => (case.rtol, case.atol),
        };
        let scale = case.scales.get(name).copied();
        let got = produced(name).and_then(|got| match name.as_str() {
            COUNT if want.elem_count() == 1 => got.reshape(want.shape()).map_err(one_line),
            _ => Ok(got),
        });
        let worst = got.and_then(|got| compare(&got, want, rtol, atol, scale));
        (name.clone(), worst)
    });
    Ok(compared.collect())
}

/// The gradients of the outputs, of those that the case has a cotangent for, together.
fn backward(case: &Case, outputs: &[(&str, Tensor)]) -> Outcome<Option<GradStore>> {
    let mut total: Option<Tensor> = None;
    for (name, output) in outputs {
        if output.dtype() != case.dtype {
            let dtype = output.dtype();
            return Err(format!("{name} is {dtype:?}, must be {:?}", case.dtype));
        }
        let Some(cotangent) = case.tensors.get(&format!("d{name}")) else {
            continue;
        };
        if cotangent.dims() != output.dims() {
            return Err(format!(
                "`d{name}` has shape {:?}, {name} has {:?}",
                cotangent.dims(),
                output.dims()
            ));
        }
        // In f64, where no loss of a half dtype overflows; the cotangent itself arrives at the
        // output unrounded.
        let part = loss(output, cotangent).map_err(one_line)?;
        total = Some(match total {
            Some(total) => (total + part).map_err(one_line)?,
            None => part,
        });
    }
    total.map(|l| l.backward().map_err(one_line)).transpose()
}

pub(crate) fn loss(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dy = dy.to_device(y.device())?;
    if y.elem_count() == 0 {
        // candle converts no tensor without elements on a GPU.
        return (y * dy)?.sum_all();
    }
    (y.to_dtype(DType::F64)? * dy.to_dtype(DType::F64)?)?.sum_all()
}

/// The strided views are strided, and hold the same values.
#[test]
fn layouts_differ_in_memory_only() -> Result<()> {
    let t = Tensor::arange(0f32, 24., &Device::Cpu)?.reshape((2, 3, 4))?;
    for t in [t.clone(), t.flatten_all()?] {
        for &layout in Layout::of_rank(t.rank()) {
            let view = layout.view(&layout.buffer(&t)?)?;
            assert_eq!(view.dims(), t.dims(), "{layout}");
            assert_eq!(
                view.is_contiguous(),
                layout == Layout::Contiguous,
                "{layout}"
            );
            let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
            assert_eq!(values(&view)?, values(&t)?, "{layout}");
        }
    }
    Ok(())
}
