//! Files of `torch.save`: a state dict, read without running the code that a pickle asks for.
//!
//! Since PyTorch 1.6 such a file is a zip archive: a pickle, and beside it the storages of the
//! tensors. In the older format, the same pickle lies between others, and the storages follow it.

mod pickle;
mod state_dict;
mod view;

use std::collections::HashMap;
use std::io::{Cursor, Read};

use candle_core::pickle::Object;
use candle_core::{Error, Result, Tensor, bail};
use zip::ZipArchive;

pub(super) use pickle::other_protocol;
use pickle::{PROTOCOL, protocol, unpickle};
use state_dict::{class_of, state_dict, text};
use view::{Rebuild, widths_in};

/// The tensors of a file, or why one cannot be had, the key that they were found under, and the
/// paths of those that lie beside them.
#[derive(Default)]
pub(super) struct Pickled {
    pub(super) tensors: Vec<(String, std::result::Result<Tensor, String>)>,
    pub(super) key: Option<String>,
    pub(super) beside: Vec<String>,
}

pub(super) fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04")
}

/// The pickle of PyTorch's magic number, 0x1950a86a20f9469cfc6c, that the older format begins with.
const MAGIC: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.";

pub(super) fn is_old(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// The protocol of a file of the older format, if it is a later one.
pub(super) fn later_protocol(bytes: &[u8]) -> Option<u8> {
    let protocol = protocol(bytes).filter(|p| *p > PROTOCOL)?;
    // A frame may stand before it.
    let start = bytes.get(..32).unwrap_or(bytes);
    let number = &MAGIC[2..];
    start
        .windows(number.len())
        .any(|w| w == number)
        .then_some(protocol)
}

pub(super) fn read_zip(bytes: &[u8], key: Option<&str>) -> Result<Pickled> {
    let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(Error::wrap)?;
    let names: Vec<String> = zip
        .file_names()
        .filter_map(|name| Some(name.ok()?.into_owned()))
        .collect();
    let Some(pickle) = names
        .iter()
        .find(|n| *n == "data.pkl" || n.ends_with("/data.pkl"))
    else {
        let has = |end: &str| names.iter().any(|n| n.ends_with(end));
        let kind = if has(".npy") {
            "arrays of NumPy; Tensor::read_npz reads them"
        } else if has(".weights.h5") {
            "a file of Keras; write its arrays to safetensors with Python's h5py"
        } else {
            "a zip archive that torch.save did not write; unpack it"
        };
        bail!("expected a safetensors file or one of torch.save, got {kind}")
    };
    let folder = pickle.trim_end_matches("data.pkl");
    let mut entry = |name: String| -> Result<Vec<u8>> {
        let mut bytes = vec![];
        let mut file = zip.by_name(&name).map_err(Error::wrap)?;
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let order = format!("{folder}byteorder");
    if names.contains(&order) && entry(order)? == b"big" {
        bail!("expected numbers with the low byte first, got a file of a big-endian machine")
    }
    let object = unpickle(&mut entry(pickle.clone())?.as_slice())?;
    if let Some(Object::Class { module_name, .. }) = class_of(&object)
        && module_name.starts_with("__torch__")
    {
        bail!(
            "expected a state dict, got a TorchScript module; save its state dict: \
            torch.save(torch.jit.load(path).state_dict(), ..)"
        )
    }
    tensors(object, key, |storage| {
        entry(format!("{folder}data/{storage}"))
    })
}

pub(super) fn read_old(bytes: &[u8], key: Option<&str>) -> Result<Pickled> {
    let mut rest = &bytes[MAGIC.len()..];
    // The version of the format, and what the machine was.
    unpickle(&mut rest)?;
    let machine = unpickle(&mut rest)?;
    if let Object::Dict(entries) = machine
        && entries.contains(&(text("little_endian"), Object::Bool(false)))
    {
        bail!("expected numbers with the low byte first, got a file of a big-endian machine")
    }
    let object = unpickle(&mut rest)?;
    let Object::List(keys) = unpickle(&mut rest)? else {
        bail!("expected a list of storages after the pickle")
    };
    let mut widths = HashMap::new();
    widths_in(&object, &mut widths);
    let mut storages = HashMap::new();
    for key in keys {
        let key = key.unicode().unwrap_or_default();
        let Some(&width) = widths.get(&key) else {
            bail!("expected to know how wide the elements of storage {key:?} are")
        };
        let Some((count, behind)) = rest.split_first_chunk() else {
            bail!("expected storage {key:?}, got the end of the file; fetch it again")
        };
        let count = usize::try_from(u64::from_le_bytes(*count)).unwrap_or(usize::MAX);
        let split = count
            .checked_mul(width)
            .and_then(|n| behind.split_at_checked(n));
        let Some((storage, behind)) = split else {
            bail!(
                "expected {count} elements of storage {key:?}, got the end of the file; fetch it \
                again"
            )
        };
        storages.insert(key, storage);
        rest = behind;
    }
    tensors(object, key, |storage| match storages.get(storage) {
        Some(bytes) => Ok(bytes.to_vec()),
        None => bail!("there is no storage {storage:?}"),
    })
}

/// The tensors of the state dict in `object`, from their storages.
fn tensors(
    object: Object,
    key: Option<&str>,
    mut storage: impl FnMut(&str) -> Result<Vec<u8>>,
) -> Result<Pickled> {
    let (entries, key, beside) = state_dict(object, key)?;
    let mut found = Pickled {
        key,
        beside,
        ..Default::default()
    };
    // Views of one storage mostly follow each other; more than one would hold the file in memory
    // twice.
    let mut last: Option<(String, Vec<u8>)> = None;
    for (name, value) in entries {
        let (Object::Unicode(name), Some(rebuild)) = (name, Rebuild::of(&value)) else {
            continue;
        };
        let tensor = match rebuild.view() {
            Ok(view) => {
                let bytes = match last.take().filter(|(of, _)| *of == view.storage) {
                    Some((_, bytes)) => bytes,
                    None => storage(&view.storage)?,
                };
                let tensor = view.tensor(&bytes);
                last = Some((view.storage, bytes));
                tensor
            }
            Err(reason) => Err(reason),
        };
        found.tensors.push((name, tensor));
    }
    Ok(found)
}
