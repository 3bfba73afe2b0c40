//! Content of a scaler, as it goes into a file.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::str::FromStr;

use candle_core::{DType, Device, Result, Tensor, bail};
use serde_json::{Map, Value, json};

use super::{Features, Moments, check};

/// Beyond this many values a count would not be exact as an `f64`.
pub(crate) const MOST_VALUES: u64 = 1 << 53;

/// Counts of the values of a feature that were seen, and of those that were NaN.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Values that the statistics are of.
    pub values: u64,
    /// NaN, left out.
    pub nan: u64,
}

impl Seen {
    /// Counts of both.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            values: self.values.saturating_add(other.values),
            nan: self.nan.saturating_add(other.nan),
        }
    }

    /// The counts of each feature with those of more data.
    ///
    /// # Errors
    /// More than an `f64` can count, which a file would be refused for.
    pub(super) fn and_more(
        layer: &str,
        features: &Features,
        seen: &[Self],
        more: &[Self],
    ) -> Result<Vec<Self>> {
        let mut all = seen.to_vec();
        all.resize(more.len(), Self::default());
        for (i, (all, more)) in all.iter_mut().zip(more).enumerate() {
            *all = all.plus(*more);
            let (label, most) = (features.label(i), all.values.max(all.nan));
            check::countable(layer, "values", &label, most, MOST_VALUES)?;
        }
        Ok(all)
    }
}

/// All that a scaler knows, apart from the scaler: what is saved, restored, merged, and sent
/// between machines.
///
/// Statistics are tensors on the CPU, in `f64` or as integers, so that nothing is lost on the way.
/// Options are text; Rust's text of an `f64` has all of its bits.
#[derive(Debug, Clone)]
pub struct State {
    kind: String,
    version: u32,
    features: Features,
    seen: Vec<Seen>,
    options: BTreeMap<String, String>,
    tensors: BTreeMap<String, Tensor>,
}

impl State {
    /// An empty state of the kind, which is the name of the type.
    pub fn new(kind: &str, version: u32) -> Self {
        Self {
            kind: kind.to_string(),
            version,
            features: Features::default(),
            seen: vec![],
            options: BTreeMap::new(),
            tensors: BTreeMap::new(),
        }
    }

    /// This with features, and what was seen of each.
    pub fn with_features(mut self, features: Features, seen: Vec<Seen>) -> Self {
        self.features = features;
        self.seen = seen;
        self
    }

    /// This with an option of the scaler.
    pub fn with_option(mut self, name: &str, value: impl Display) -> Self {
        self.options.insert(name.to_string(), value.to_string());
        self
    }

    /// This with a tensor.
    pub fn with_tensor(mut self, name: &str, tensor: Tensor) -> Self {
        self.tensors.insert(name.to_string(), tensor);
        self
    }

    /// This with numbers, as an `f64` tensor of one axis.
    ///
    /// # Errors
    /// Only those of candle.
    pub fn with_values(self, name: &str, values: &[f64]) -> Result<Self> {
        let tensor = Tensor::from_slice(values, values.len(), &Device::Cpu)?;
        Ok(self.with_tensor(name, tensor))
    }

    /// This with bytes, as a `u8` tensor of one axis.
    ///
    /// # Errors
    /// Only those of candle.
    pub fn with_bytes(self, name: &str, bytes: &[u8]) -> Result<Self> {
        let tensor = Tensor::from_slice(bytes, bytes.len(), &Device::Cpu)?;
        Ok(self.with_tensor(name, tensor))
    }

    /// The name of the type that this is the state of.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The features.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Counts of each feature.
    pub fn seen(&self) -> &[Seen] {
        &self.seen
    }

    /// Whether this is the state of a `kind`, in its version.
    ///
    /// # Errors
    /// Another kind or version.
    pub fn require(&self, kind: &str, version: u32) -> Result<()> {
        same_kind(kind, &self.kind)?;
        same_version(kind, version, self.version)
    }

    /// An option.
    ///
    /// # Errors
    /// It is not there, or is not a `T`.
    pub fn option<T: FromStr<Err: Display>>(&self, name: &str) -> Result<T> {
        let what = format!("option {name:?}");
        let text = check::present(&self.kind, &what, self.options.get(name))?;
        check::well_formed(&self.kind, &what, text.parse())
    }

    /// A tensor.
    ///
    /// # Errors
    /// It is not there.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        let what = format!("tensor {name:?}");
        check::present(&self.kind, &what, self.tensors.get(name))
    }

    /// The numbers of an `f64` tensor.
    ///
    /// # Errors
    /// It is not there, of another dtype, or not of `len` elements.
    pub fn values(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        let tensor = self.tensor(name)?;
        check::dtype(&self.kind, name, tensor, DType::F64)?;
        check::saved_length(&self.kind, name, len, tensor.elem_count())?;
        tensor.flatten_all()?.to_vec1()
    }

    /// The bytes of a `u8` tensor.
    ///
    /// # Errors
    /// It is not there, or of another dtype.
    pub fn bytes(&self, name: &str) -> Result<Vec<u8>> {
        let tensor = self.tensor(name)?;
        check::dtype(&self.kind, name, tensor, DType::U8)?;
        tensor.flatten_all()?.to_vec1()
    }

    /// Counts, as a scaler can go on from them: of every feature or of none, and no more than
    /// an `f64` can count.
    ///
    /// # Errors
    /// Counts of other features, or counts that no data have.
    pub fn counts(&self) -> Result<&[Seen]> {
        if !self.seen.is_empty() {
            let (expected, got) = (self.features.count(), self.seen.len());
            check::saved_length(&self.kind, "counts", expected, got)?;
        }
        for (i, seen) in self.seen.iter().enumerate() {
            let most = seen.values.max(seen.nan);
            let label = self.features.label(i);
            let holds = most <= MOST_VALUES;
            check::saved_value(&self.kind, "count", &label, most as f64, holds)?;
        }
        Ok(&self.seen)
    }

    /// The moments of a feature that these parts are of: count, mean, what the mean was rounded by,
    /// squared distances.
    ///
    /// # Errors
    /// A part that no data have.
    pub(crate) fn moments(&self, feature: usize, parts: [f64; 4]) -> Result<Moments> {
        let [count, mean, mean_error, m2] = parts;
        let label = self.features.label(feature);
        let is_size = |v: f64| v.is_finite() && v >= 0.;
        for (what, value, holds) in [
            ("count", count, is_size(count)),
            ("mean", mean, (mean + mean_error).is_finite()),
            ("m2", m2, is_size(m2)),
        ] {
            check::saved_value(&self.kind, what, &label, value, holds)?;
        }
        Ok(Moments::from_parts(count, mean, mean_error, m2))
    }

    /// The tensors by their names.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// All but the tensors, as JSON.
    pub(crate) fn metadata(&self) -> String {
        let counts = |of: fn(&Seen) -> u64| self.seen.iter().map(of).collect::<Vec<_>>();
        json!({
            "kind": self.kind,
            "version": self.version,
            "axes": self.features.axes(),
            "names": self.features.names(),
            "values": counts(|s| s.values),
            "nan": counts(|s| s.nan),
            "options": self.options,
        })
        .to_string()
    }

    /// The state that [`metadata`](Self::metadata) and tensors describe.
    pub(crate) fn from_metadata(text: &str, tensors: BTreeMap<String, Tensor>) -> Result<Self> {
        let fields: Map<String, Value> =
            check::well_formed("State", "the metadata", serde_json::from_str(text))?;
        let field = |layer: &str, name: &str| {
            let value = check::present(layer, name, fields.get(name))?;
            Ok::<Value, candle_core::Error>(value.clone())
        };
        // A macro, since the type of each is inferred, which closures cannot.
        macro_rules! parsed {
            ($layer:expr, $name:literal) => {{
                let value = serde_json::from_value(field($layer, $name)?);
                check::well_formed($layer, $name, value)?
            }};
        }
        let kind: String = parsed!("State", "kind");
        let layer = kind.as_str();
        let values: Vec<u64> = parsed!(layer, "values");
        let nan: Vec<u64> = parsed!(layer, "nan");
        check::saved_length(layer, "nan", values.len(), nan.len())?;
        let seen = values.into_iter().zip(nan);
        Ok(Self {
            version: parsed!(layer, "version"),
            features: Features::from_parts(layer, parsed!(layer, "axes"), parsed!(layer, "names"))?,
            seen: seen.map(|(values, nan)| Seen { values, nan }).collect(),
            options: parsed!(layer, "options"),
            tensors,
            kind,
        })
    }
}

fn same_kind(layer: &str, got: &str) -> Result<()> {
    if layer != got {
        bail!("{layer}: expected the state of a {layer}, got that of a {got}")
    }
    Ok(())
}

fn same_version(layer: &str, expected: u32, got: u32) -> Result<()> {
    if expected != got {
        bail!(
            "{layer}: expected state of version {expected}, got version {got}; it was written by \
            another version of candle-norm"
        )
    }
    Ok(())
}
