//! Files: what they are, and the tensors of one or several of them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{Device, Result, Tensor, bail};
use safetensors::SafeTensors;

use super::pth::{self, Pickled};
use super::rename::{Rename, renamed};

/// A tensor as a file has it.
pub(super) struct Entry {
    /// Its name there.
    pub(super) name: String,
    /// The tensor, or why there is none: files hold what candle does not know.
    pub(super) tensor: std::result::Result<Tensor, String>,
}

/// The tensors of one or several files, by the names that the model has for them.
#[derive(Default)]
pub(super) struct Source {
    /// Name in messages.
    pub(super) label: String,
    pub(super) entries: BTreeMap<String, Entry>,
    /// The names of tensors that a rule left out.
    pub(super) skipped: Vec<String>,
    pub(super) key: Option<String>,
}

impl Source {
    /// Tensors in memory.
    pub(super) fn of(tensors: &HashMap<String, Tensor>, label: &str) -> Self {
        let entry = |(name, tensor): (&String, &Tensor)| {
            let tensor = Ok(tensor.clone());
            let entry = Entry {
                name: name.clone(),
                tensor,
            };
            (name.clone(), entry)
        };
        Self {
            label: label.to_string(),
            entries: tensors.iter().map(entry).collect(),
            ..Default::default()
        }
    }

    /// The files at `paths`, as if they were one.
    pub(super) fn read<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        key: Option<&str>,
        rules: &[Rename],
    ) -> Result<Self> {
        let mut source = Self::default();
        // Where each name comes from, for a message.
        let mut origins = BTreeMap::<String, String>::new();
        let mut files = vec![];
        for path in paths {
            let path = path.as_ref();
            let file = path.display().to_string();
            let mut found = match contents(path, key) {
                Ok(found) => found,
                Err(e) => bail!("cannot read {file}: {e}"),
            };
            // So that an error does not depend on the order in which a file has them.
            found.tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
            if found.key.is_some() {
                source.key = found.key;
            }
            source.skipped.append(&mut found.beside);
            for (name, tensor) in found.tensors {
                let Some(new) = renamed(&name, rules) else {
                    source.skipped.push(name);
                    continue;
                };
                let origin = format!("{name} in {file}");
                if let Some(other) = origins.insert(new.clone(), origin.clone()) {
                    let mut both = [other, origin];
                    both.sort();
                    bail!(
                        "expected one tensor for each name, got two for {new}: {} and {}",
                        both[0],
                        both[1]
                    )
                }
                source.entries.insert(new, Entry { name, tensor });
            }
            files.push(file);
        }
        source.skipped.sort();
        source.label = match files.as_slice() {
            [] => bail!("expected at least one file to load, got none"),
            [file] => file.clone(),
            [file, others @ ..] => format!("{file} and {} more", others.len()),
        };
        Ok(source)
    }
}

/// Tensors of the file at `path`, whose kind is told by its bytes, never by its name.
fn contents(path: &Path, key: Option<&str>) -> Result<Pickled> {
    let bytes = match path.is_dir() {
        true => bail!("it is a folder; pass the files in it"),
        false => fs::read(path)?,
    };
    if pth::is_zip(&bytes) {
        return pth::read_zip(&bytes, key);
    }
    if pth::is_old(&bytes) {
        return pth::read_old(&bytes, key);
    }
    if let Some(kind) = other_kind(&bytes, path) {
        bail!("expected a safetensors file or one of torch.save, got {kind}")
    }
    if let Some(key) = key {
        bail!("expected a file of torch.save with the key {key:?}, got a safetensors file")
    }
    let file = match SafeTensors::deserialize(&bytes) {
        Ok(file) => file,
        Err(e) => {
            bail!("its header does not describe it ({e}); the file is damaged or was cut off")
        }
    };
    let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
        let tensor = view.load(&Device::Cpu);
        (name, tensor.map_err(|e| e.to_string()))
    };
    Ok(Pickled {
        tensors: file.tensors().into_iter().map(tensor).collect(),
        ..Default::default()
    })
}

/// Beginnings of files that people have, what such a file is, and how to read it.
const KINDS: [(&[u8], &str); 13] = [
    (
        b"version https://git-lfs",
        "a pointer of Git LFS: the file itself was not fetched; run `git lfs pull`",
    ),
    (
        b"GGUF",
        "a GGUF file; candle_core::quantized::gguf_file::Content::read reads it",
    ),
    (
        b"tjgg",
        "a GGML file; candle_core::quantized::ggml_file::Content::read reads it",
    ),
    (
        b"lmgg",
        "a GGML file; candle_core::quantized::ggml_file::Content::read reads it",
    ),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras writes; write its arrays to safetensors with Python's h5py",
    ),
    (b"\x93NUMPY", "a NumPy array; Tensor::read_npy reads it"),
    (
        b"\x1f\x8b",
        "a file that gzip packed; unpack it with `gunzip`",
    ),
    (
        b"<!DOCTYPE",
        "a web page: the download failed; fetch the file again",
    ),
    (
        b"<!doctype",
        "a web page: the download failed; fetch the file again",
    ),
    (
        b"<html",
        "a web page: the download failed; fetch the file again",
    ),
    (
        b"\x80",
        "a pickle that torch.save did not write; write the tensors with torch.save or as \
        safetensors",
    ),
    (b"\xff\xd8\xff", "a JPEG picture; it holds no tensors"),
    (b"\x89PNG", "a PNG picture; it holds no tensors"),
];

/// Description of a file that is neither safetensors nor of PyTorch; `None` if it may be
/// safetensors.
fn other_kind(bytes: &[u8], path: &Path) -> Option<String> {
    // A header of safetensors follows its length.
    let header = bytes.get(8) == Some(&b'{');
    let length = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
    if header && length <= bytes.len() as u64 - 8 {
        return None;
    }
    if let Some(kind) = json(bytes) {
        return Some(kind);
    }
    let damaged = "a safetensors file that is damaged or was cut off; fetch it again";
    if header {
        return Some(damaged.to_string());
    }
    if let Some(protocol) = pth::later_protocol(bytes) {
        return Some(pth::other_protocol(protocol));
    }
    if let Some((_, kind)) = KINDS.iter().find(|(start, _)| bytes.starts_with(start)) {
        return Some(kind.to_string());
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some(
            "a tar archive, such as PyTorch wrote before 0.1.10; load it in Python and save it anew"
                .to_string(),
        );
    }
    if bytes.is_empty() {
        return Some("an empty file; fetch it again".to_string());
    }
    let extension = path.extension().and_then(|e| e.to_str());
    let kind = match extension {
        Some("onnx") => "an ONNX model; candle_onnx::read_file reads it",
        Some("msgpack") => "a file of Flax; write its arrays to safetensors in Python",
        Some("safetensors") => damaged,
        _ => "a file of another kind; write the tensors as safetensors",
    };
    Some(kind.to_string())
}

/// Description of a JSON file: the index beside shards, or nothing with tensors.
fn json(bytes: &[u8]) -> Option<String> {
    if !bytes.starts_with(b"{") {
        return None;
    }
    let index: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let map = index.get("weight_map").and_then(|map| map.as_object());
    let Some(map) = map else {
        return Some("a JSON file; it holds no tensors".to_string());
    };
    let mut shards: Vec<&str> = map.values().filter_map(|shard| shard.as_str()).collect();
    shards.sort_unstable();
    shards.dedup();
    Some(format!(
        "the index of {} shards; pass them to checkpoint::load_with: {}",
        shards.len(),
        super::report::few(&shards)
    ))
}
