//! A conformance case: one safetensors file, and the checks that its format asks for.
//!
//! String metadata:
//!
//! | key | value |
//! | --- | --- |
//! | `op` | a name of the table in `layers.rs` |
//! | `config` | a JSON object with the keys of that op |
//! | `dtype` | `f64`, `f32`, `f16` or `bf16`: the dtype of inputs, parameters and cotangents |
//! | `rtol`, `atol` | a value passes when abs(got − want) ≤ atol·scale + rtol·abs(want) |
//! | `scales` | a JSON object, output name to scale; an absent name takes the rms of the expected tensor, or 1 |
//! | `source` | who computed the expected values |
//!
//! Tensors: the inputs and parameters by name, `dy` and, where the layer returns the sum too,
//! `dsum` (without them the case is forward only), the state before the call, and `expected.NAME`
//! in f64 for each output NAME that is compared.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::path::Path;
use std::sync::OnceLock;

use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use crate::DEFAULT_DEVICE;

/// A result, or the fault of a case or of the layer that it tests.
pub(crate) type Outcome<T> = Result<T, String>;

/// A candle error in one line: the report has one line for each case.
pub(crate) fn one_line(error: impl Display) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim().to_string()
}

/// The device that layers run on: that of `CANDLE_NORM_DEVICE` (`cpu`, or `cuda` with the feature
/// of that name), else [`DEFAULT_DEVICE`].
pub(crate) fn device() -> Outcome<&'static Device> {
    static DEVICE: OnceLock<Outcome<Device>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        let asked = std::env::var("CANDLE_NORM_DEVICE");
        match asked.as_deref().unwrap_or(DEFAULT_DEVICE) {
            "cpu" => Ok(Device::Cpu),
            "cuda" => Device::new_cuda(0).map_err(one_line),
            other => Err(format!(
                "CANDLE_NORM_DEVICE is {other:?}, must be cpu or cuda"
            )),
        }
    });
    device.as_ref().map_err(Clone::clone)
}

/// One case as it was stored, on the CPU.
pub(crate) struct Case {
    /// The path below the folder that is run, without the extension.
    pub(crate) name: String,
    pub(crate) op: String,
    pub(crate) dtype: DType,
    pub(crate) rtol: f64,
    pub(crate) atol: f64,
    pub(crate) scales: BTreeMap<String, f64>,
    /// Everything but the expected tensors.
    pub(crate) tensors: HashMap<String, Tensor>,
    /// Without their `expected.`.
    pub(crate) expected: BTreeMap<String, Tensor>,
    config: Map<String, Value>,
}

impl Case {
    /// Reads a file. What only the op can judge (names of tensors and configuration keys) is left
    /// to it.
    pub(crate) fn read(name: String, path: &Path) -> Outcome<Self> {
        let bytes = std::fs::read(path).map_err(one_line)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(one_line)?;
        let metadata = header
            .metadata()
            .as_ref()
            .ok_or("the file has no metadata")?;
        let text = |key: &str| {
            metadata
                .get(key)
                .map(String::as_str)
                .ok_or_else(|| format!("no metadata key `{key}`"))
        };
        let number = |key: &str| match text(key)?.trim().parse::<f64>() {
            Ok(value) if value.is_finite() && value >= 0. => Ok(value),
            _ => Err(format!(
                "metadata `{key}` is not a tolerance: {:?}",
                text(key)?
            )),
        };
        let dtype = match text("dtype")? {
            "f64" => DType::F64,
            "f32" => DType::F32,
            "f16" => DType::F16,
            "bf16" => DType::BF16,
            other => return Err(format!("unknown dtype `{other}`")),
        };
        let mut scales = BTreeMap::new();
        if metadata.contains_key("scales") {
            for (key, value) in object("scales", text("scales")?)? {
                match value.as_f64() {
                    Some(scale) if scale >= 0. => scales.insert(key, scale),
                    _ => return Err(format!("scale `{key}` is not a scale: {value}")),
                };
            }
        }
        let mut tensors =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(one_line)?;
        let names: Vec<String> = tensors.keys().cloned().collect();
        let mut expected = BTreeMap::new();
        for name in names {
            if let Some(output) = name.strip_prefix("expected.")
                && let Some(tensor) = tensors.remove(&name)
            {
                if tensor.dtype() != DType::F64 {
                    return Err(format!("`{name}` is {:?}, must be F64", tensor.dtype()));
                }
                expected.insert(output.to_string(), tensor);
            }
        }
        if expected.is_empty() {
            return Err("the case expects nothing: no tensor `expected.*`".to_string());
        }
        Ok(Self {
            name,
            op: text("op")?.to_string(),
            dtype,
            rtol: number("rtol")?,
            atol: number("atol")?,
            scales,
            config: object("config", text("config")?)?,
            tensors,
            expected,
        })
    }

    /// A tensor that the case cannot do without.
    pub(crate) fn tensor(&self, name: &str) -> Outcome<&Tensor> {
        self.tensors
            .get(name)
            .ok_or_else(|| format!("no tensor `{name}`"))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A reader of the configuration, which must be asked for every key that is there.
    pub(crate) fn config(&self) -> Config<'_> {
        Config {
            left: self.config.iter().map(|(k, v)| (k.as_str(), v)).collect(),
        }
    }
}

fn object(key: &str, text: &str) -> Outcome<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(format!("metadata `{key}` is not a JSON object: {other}")),
        Err(error) => Err(format!("metadata `{key}` is not JSON: {}", one_line(error))),
    }
}

/// The configuration keys that nobody has asked for yet.
pub(crate) struct Config<'a> {
    left: BTreeMap<&'a str, &'a Value>,
}

impl Config<'_> {
    fn take<T>(
        &mut self,
        key: &str,
        what: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Outcome<Option<T>> {
        match self.left.remove(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(read) => Ok(Some(read)),
                None => Err(format!("config key `{key}` must be {what}, is {value}")),
            },
        }
    }

    /// `true` or `false`; `None` where the key is absent.
    pub(crate) fn flag(&mut self, key: &str) -> Outcome<Option<bool>> {
        self.take(key, "true or false", Value::as_bool)
    }

    pub(crate) fn number(&mut self, key: &str) -> Outcome<Option<f64>> {
        self.take(key, "a number", Value::as_f64)
    }

    /// A number or `null`, which is not the same as an absent key.
    pub(crate) fn number_or_null(&mut self, key: &str) -> Outcome<Option<Option<f64>>> {
        self.take(key, "a number or null", |value| match value {
            Value::Null => Some(None),
            value => value.as_f64().map(Some),
        })
    }

    pub(crate) fn size(&mut self, key: &str) -> Outcome<Option<usize>> {
        self.take(key, "a whole number", size)
    }

    pub(crate) fn size_or_null(&mut self, key: &str) -> Outcome<Option<Option<usize>>> {
        self.take(key, "a whole number or null", |value| match value {
            Value::Null => Some(None),
            value => size(value).map(Some),
        })
    }

    pub(crate) fn sizes(&mut self, key: &str) -> Outcome<Option<Vec<usize>>> {
        self.take(key, "a list of whole numbers", |value| {
            value.as_array()?.iter().map(size).collect()
        })
    }

    pub(crate) fn word(&mut self, key: &str) -> Outcome<Option<String>> {
        self.take(key, "a string", |value| value.as_str().map(str::to_string))
    }

    /// Nothing may be left over: a key that is not read would be a configuration that is not
    /// tested.
    pub(crate) fn finish(self) -> Outcome<()> {
        match self.left.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("unknown config key `{key}`")),
        }
    }
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok())
}

/// The value of a key that the format does not call optional.
pub(crate) fn required<T>(key: &str, value: Option<T>) -> Outcome<T> {
    value.ok_or_else(|| format!("no config key `{key}`"))
}
