//! Files: states of scalers beside each other and beside the variables of a model.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{Debug, Display};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::VarMap;
use safetensors::SafeTensors;
use serde_json::{Map, Value};

use super::State;
use super::check;
use candle_norm_support::files;

const LAYER: &str = "Archive";

/// Start of the keys of the metadata, before the prefix of a part.
const KEY: &str = "candle_norm:";

/// The contents of a safetensors file that holds states, each under a prefix, and any other
/// tensors, such as a model's variables.
///
/// A state under the prefix `p` has its tensors at `p.NAME`, and in the metadata, at the key
/// `candle_norm:p`, a JSON object: `kind`, `version`, `axes` and `names` of the features, the
/// counts `values` and `nan` of each, `options`. Readers of safetensors that know nothing of
/// scalers, `VarMap::load` among them, take the other tensors and leave these.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_norm::scaling::{Archive, Scaler, StandardScaler};
///
/// let vars = VarMap::new();
/// candle_nn::linear(2, 1, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let scaler = StandardScaler::default();
/// scaler.fit(&Tensor::new(&[[1f32, 10.], [3., 30.]], &Device::Cpu)?)?;
///
/// let file = std::env::temp_dir().join("candle-norm-archive.safetensors");
/// let mut archive = Archive::default();
/// archive.put_vars(&vars)?;
/// archive.put("inputs", &scaler.state()?)?;
/// archive.write(&file)?;
///
/// let restored = StandardScaler::from_state(&Archive::read(&file)?.state("inputs")?)?;
/// assert_eq!(restored.mean()?, [2., 20.]);
/// # std::fs::remove_file(&file)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Archive {
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
    /// The file that was read, which messages name.
    source: Option<PathBuf>,
}

impl Archive {
    /// Adds a state under a prefix.
    ///
    /// # Errors
    /// The prefix is in use, or a tensor is of a dtype that cannot be written; nothing is added
    /// then.
    pub fn put(&mut self, prefix: &str, state: &State) -> Result<()> {
        let key = format!("{KEY}{prefix}");
        let start = format!("{prefix}.");
        let inside = |name: &String| name.starts_with(&start);
        // A part within a part, either way, would have its tensors among those of the other.
        let taken = self.tensors.keys().any(inside)
            || self.parts().iter().any(inside)
            || belongs(&start, &self.starts());
        free_name(prefix, taken)?;
        for (name, tensor) in state.tensors() {
            writable(&format!("{prefix}.{name}"), tensor.dtype())?;
        }
        let named = state.tensors().iter();
        self.tensors
            .extend(named.map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone())));
        self.metadata.insert(key, state.metadata());
        Ok(())
    }

    /// Adds a state under a prefix, in place of the one that is there, if one is.
    ///
    /// # Errors
    /// As [`put`](Self::put), but for the state that is replaced; nothing is changed then.
    pub fn replace(&mut self, prefix: &str, state: &State) -> Result<()> {
        let mut next = self.clone();
        next.remove(prefix);
        next.put(prefix, state)?;
        *self = next;
        Ok(())
    }

    /// Takes out the state under a prefix, and says whether there was one.
    pub fn remove(&mut self, prefix: &str) -> bool {
        let found = self.metadata.remove(&format!("{KEY}{prefix}")).is_some();
        if found {
            let start = format!("{prefix}.");
            self.tensors.retain(|name, _| !name.starts_with(&start));
        }
        found
    }

    /// Adds the variables of a model under their own names, with the values that they have now.
    ///
    /// # Errors
    /// A name is in use, or begins with the prefix of a state and a dot, or a variable is of a
    /// dtype that cannot be written; nothing is added then.
    pub fn put_vars(&mut self, vars: &VarMap) -> Result<()> {
        let vars = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
        let starts = self.starts();
        for (name, var) in vars.iter() {
            let taken = self.tensors.contains_key(name) || belongs(name, &starts);
            free_name(name, taken)?;
            writable(name, var.dtype())?;
        }
        let mut named = BTreeMap::new();
        for (name, var) in vars.iter() {
            // A variable that is trained on would change what is archived.
            named.insert(name.clone(), var.as_detached_tensor().copy()?);
        }
        self.tensors.extend(named);
        Ok(())
    }

    /// The prefixes of the states, in order.
    pub fn parts(&self) -> Vec<String> {
        let keys = self.metadata.keys().filter_map(|k| k.strip_prefix(KEY));
        let mut parts: Vec<String> = keys.map(str::to_string).collect();
        parts.sort();
        parts
    }

    /// The state under a prefix.
    ///
    /// # Errors
    /// There is none, or its metadata does not describe one.
    pub fn state(&self, prefix: &str) -> Result<State> {
        let parts = self.parts();
        if !parts.iter().any(|part| part == prefix) {
            let mut others: Vec<String> = self.others().into_keys().collect();
            others.sort();
            let source = self.source.as_deref();
            return no_part(prefix, source, &parts, &others);
        }
        let text = self.metadata.get(&format!("{KEY}{prefix}"));
        let text = check::present(LAYER, prefix, text)?;
        let start = format!("{prefix}.");
        let named = self.tensors.iter().filter_map(|(name, tensor)| {
            let name = name.strip_prefix(&start)?;
            Some((name.to_string(), tensor.clone()))
        });
        State::from_metadata(text, named.collect())
    }

    /// Starts of the names of the tensors of states.
    fn starts(&self) -> Vec<String> {
        self.parts().iter().map(|p| format!("{p}.")).collect()
    }

    /// The tensors that belong to no state: the variables of a model.
    pub fn others(&self) -> HashMap<String, Tensor> {
        let starts = self.starts();
        let others = (self.tensors.iter()).filter(|(name, _)| !belongs(name, &starts));
        others.map(|(n, t)| (n.clone(), t.clone())).collect()
    }

    /// Reads a file, all of it.
    ///
    /// # Errors
    /// It cannot be read, is not a whole safetensors file, or holds a dtype that candle cannot.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = check::file(LAYER, path, fs::read(path))?;
        let header = SafeTensors::read_metadata(&bytes);
        let (_, header) = check::file(LAYER, path, header)?;
        let whole = SafeTensors::deserialize(&bytes);
        let whole = check::file(LAYER, path, whole)?;
        let mut tensors = BTreeMap::new();
        for (name, view) in whole.tensors() {
            let tensor = view.load(&Device::Cpu);
            let tensor = loaded(path, &name, view.dtype(), tensor)?;
            tensors.insert(name, tensor);
        }
        Ok(Self {
            tensors,
            metadata: header.metadata().clone().unwrap_or_default(),
            source: Some(path.to_path_buf()),
        })
    }

    /// Writes the file, which appears whole or not at all.
    ///
    /// # Errors
    /// A tensor of a dtype that cannot be written; those of the file system and of devices; a file
    /// that was there before is then as it was.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let mut named = vec![];
        for (name, tensor) in &self.tensors {
            writable(name, tensor.dtype())?;
            named.push((name, tensor.to_device(&Device::Cpu)?.contiguous()?));
        }
        let metadata = Some(self.metadata.clone()).filter(|m| !m.is_empty());
        let bytes = safetensors::serialize(named, metadata);
        let bytes = check::written(LAYER, path, bytes)?;
        check::written(LAYER, path, files::write(path, &bytes))
    }

    /// [`write`](Self::write), unless the file that is there holds anything that this has not.
    ///
    /// # Errors
    /// Also such a file.
    pub(super) fn write_over(&self, path: &Path) -> Result<()> {
        let (names, parts) = contents(path).unwrap_or_default();
        let mine = self.starts();
        let lost = (names.into_iter()).find(|name| !belongs(name, &mine));
        let lost = lost.or(parts.into_iter().find(|part| !self.parts().contains(part)));
        nothing_lost(path, lost.as_deref())?;
        self.write(path)
    }
}

/// The names of the tensors, and the prefixes of the states, in a safetensors file, by its header
/// alone; none of another file, or where there is none.
fn contents(path: &Path) -> Option<(Vec<String>, Vec<String>)> {
    let header = files::header(path).ok()?;
    let mut names: Map<String, Value> = serde_json::from_slice(&header).ok()?;
    let metadata = names.remove("__metadata__").unwrap_or_default();
    let keys = metadata.as_object().into_iter().flat_map(Map::keys);
    let parts = keys.filter_map(|key| key.strip_prefix(KEY));
    let parts = parts.map(str::to_string).collect();
    Some((names.into_iter().map(|(name, _)| name).collect(), parts))
}

/// Whether `name` is that of a tensor of a state.
fn belongs(name: &str, starts: &[String]) -> bool {
    starts.iter().any(|start| name.starts_with(start))
}

/// A name that nothing in the file has yet.
fn free_name(name: &str, taken: bool) -> Result<()> {
    if taken {
        bail!(
            "{LAYER}: expected names that are not in use and do not begin with the prefix of a \
            state, got {name:?} twice; choose another prefix"
        )
    }
    Ok(())
}

/// A dtype that safetensors files are written of: candle holds others, which it cannot bring back
/// out.
fn writable(name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0 => bail!(
            "{LAYER}: expected tensors of a dtype that can be written, got {name:?} of {dtype:?}, \
            which candle can only read; leave it in a file of its own"
        ),
        _ => Ok(()),
    }
}

/// A part that a file does not have. `others` are the names of its tensors that belong to no part.
fn no_part<T>(prefix: &str, file: Option<&Path>, parts: &[String], others: &[String]) -> Result<T> {
    const SHOWN: usize = 4;
    let file = file.map_or(String::new(), |file| format!(" {}", file.display()));
    let tensors = match others {
        [] => String::from("no other tensors"),
        few if few.len() <= SHOWN => format!("the tensors {few:?}"),
        all => {
            let (first, more) = (&all[..SHOWN], all.len() - SHOWN);
            format!("the tensors {first:?} and {more} more")
        }
    };
    let has = |part: &str| parts.iter().any(|p| p == part);
    let remedy = if parts.is_empty() {
        String::from(
            "its tensors are those of a model alone: add scalers by Archive::put, or save a \
            Pipeline",
        )
    } else if has("pipeline") {
        String::from("it is the file of a Pipeline: read it by Pipeline::load")
    } else if has("scaler") {
        String::from("it is the file of a scaler: read it by scaling::load")
    } else {
        format!(
            "read one of its parts: Archive::read(file)?.state({:?})",
            parts[0]
        )
    };
    bail!(
        "{LAYER}: expected a part {prefix:?} in the file{file}, got the parts {parts:?} and \
        {tensors}; {remedy}"
    )
}

/// A tensor of a file.
fn loaded<T, E: Display>(
    path: &Path,
    name: &str,
    dtype: impl Debug,
    loaded: std::result::Result<T, E>,
) -> Result<T> {
    match loaded {
        Ok(loaded) => Ok(loaded),
        Err(e) => bail!(
            "{LAYER}: expected tensors of a dtype that candle holds in {}, got {name:?} of \
            {dtype:?}: {e}",
            path.display()
        ),
    }
}

/// A file that may be written over. `lost` is what it holds that would not be there any more.
fn nothing_lost(path: &Path, lost: Option<&str>) -> Result<()> {
    if let Some(lost) = lost {
        bail!(
            "{LAYER}: expected a file of this scaler alone at {}, or none, got one that also holds \
            {lost:?}; add the scaler to it by Archive: read, replace, write",
            path.display()
        )
    }
    Ok(())
}
