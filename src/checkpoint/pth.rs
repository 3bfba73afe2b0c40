//! Files of `torch.save`: a state dict, read without running what a pickle asks for.
//!
//! Since PyTorch 1.6 such a file is a zip archive: a pickle, and beside it the storages of the
//! tensors. Before, the same pickle lies
//! between others, and the storages follow it.

use std::collections::HashMap;
use std::io::{Cursor, Read};

use candle_core::pickle::{Object, Stack};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use zip::ZipArchive;

use super::report;

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

/// The last protocol of pickles that can be read; torch.save writes it unless it is told otherwise.
const PROTOCOL: u8 = 2;

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

/// The protocol that a pickle begins with.
fn protocol(bytes: &[u8]) -> Option<u8> {
    match bytes {
        [0x80, protocol, ..] => Some(*protocol),
        _ => None,
    }
}

/// Description of a file of pickle protocol `protocol`, with the remedy.
pub(super) fn other_protocol(protocol: u8) -> String {
    format!(
        "a pickle of protocol {protocol}; save it in protocol {PROTOCOL}, as is the default: torch.save(.., pickle_protocol={PROTOCOL})"
    )
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
            "expected a state dict, got a TorchScript module; save its state dict: torch.save(torch.jit.load(path).state_dict(), ..)"
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
        bail!("expected a list of storages behind the pickle")
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
                "expected {count} elements of storage {key:?}, got the end of the file; fetch it again"
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

fn text(text: &str) -> Object {
    Object::Unicode(text.to_string())
}

/// The class that an object is made by.
fn class_of(object: &Object) -> Option<&Object> {
    match object {
        Object::Class { .. } => Some(object),
        Object::Reduce { callable, .. } | Object::Build { callable, .. } => class_of(callable),
        // The older format keeps the source of a module's class beside it.
        Object::PersistentLoad(id) => match &**id {
            Object::Tuple(id) => id.get(1).and_then(class_of),
            _ => None,
        },
        _ => None,
    }
}

/// The keys and values of a dict.
type Entries = Vec<(Object, Object)>;

/// The entries of the state dict: `object` itself, what it has under `key`, or the one dict of more
/// tensors than lie beside it. With them,
/// their key and the paths of all other tensors.
fn state_dict(object: Object, key: Option<&str>) -> Result<(Entries, Option<String>, Vec<String>)> {
    let entries = match object {
        Object::Dict(entries) => entries,
        other => match class_of(&other) {
            Some(Object::Class { class_name, .. }) => bail!(
                "expected a state dict, got a pickled {class_name}; save its state dict: torch.save(model.state_dict(), ..)"
            ),
            _ => bail!("expected a state dict, got another object; save model.state_dict()"),
        },
    };
    let own = count(&entries);
    let mut parts: Vec<String> = entries
        .iter()
        .filter_map(|(name, value)| match (name, value) {
            (Object::Unicode(name), Object::Dict(part)) if count(part) > 0 => {
                (key.is_some() || count(part) > own).then(|| name.clone())
            }
            _ => None,
        })
        .collect();
    parts.sort();
    let key = match (key, parts.as_slice()) {
        (Some(key), _) if parts.iter().any(|part| part == key) => key,
        (Some(key), []) => bail!(
            "expected a state dict under the key {key:?}, got {}",
            without_tensors(&entries)
        ),
        (Some(key), _) => bail!(
            "expected a state dict under the key {key:?}, got state dicts under {}; set `key` of LoadOptions to one of them",
            report::quoted(&parts)
        ),
        (None, [part]) => part,
        (None, []) if own > 0 => {
            let beside = beside(&entries, None);
            return Ok((entries, None, beside));
        }
        (None, []) => bail!("expected a state dict, got {}", without_tensors(&entries)),
        (None, _) => bail!(
            "expected one state dict, got several, under {}; call checkpoint::load_with with `key` of LoadOptions set to one of them",
            report::quoted(&parts)
        ),
    };
    let key = key.to_string();
    let beside = beside(&entries, Some(&key));
    let part = entries.into_iter().find(|(name, _)| *name == text(&key));
    match part {
        Some((_, Object::Dict(part))) => Ok((part, Some(key), beside)),
        _ => bail!("expected a state dict under the key {key:?}"),
    }
}

/// A dict in which no state dict was found, and the remedy.
fn without_tensors(entries: &[(Object, Object)]) -> String {
    let mut keys: Vec<String> = entries.iter().map(|(key, _)| name_of(key)).collect();
    keys.sort();
    let dict = match keys.as_slice() {
        [] => "an empty dict".to_string(),
        keys => format!(
            "a dict without tensors or state dicts, with the keys {}",
            report::quoted(keys)
        ),
    };
    format!("{dict}; save the state dict alone: torch.save(model.state_dict(), ..)")
}

/// The paths of the tensors that do not lie in the state dict itself, which is `root` or what it
/// has under `key`.
fn beside(root: &[(Object, Object)], key: Option<&str>) -> Vec<String> {
    let mut found = vec![];
    for (name, value) in root {
        let path = name_of(name);
        match (value, key) {
            (Object::Dict(part), Some(key)) if *name == text(key) => {
                below(part, &path, &mut found);
            }
            _ if key.is_none() && is_entry(name, value) => {}
            _ => paths(value, path, &mut found),
        }
    }
    found
}

/// The paths of the tensors in the state dict at `path` that are none of its entries.
fn below(part: &[(Object, Object)], path: &str, found: &mut Vec<String>) {
    for (name, value) in part.iter().filter(|(n, v)| !is_entry(n, v)) {
        paths(value, format!("{path}.{}", name_of(name)), found);
    }
}

/// Whether this is a tensor of a state dict.
fn is_entry(name: &Object, value: &Object) -> bool {
    matches!(name, Object::Unicode(_)) && Rebuild::of(value).is_some()
}

/// The paths of all tensors in `object`, which lies at `path`.
fn paths(object: &Object, path: String, found: &mut Vec<String>) {
    // A pickle may take the same tensor and the same long key again and again; nobody reads so many
    // names.
    const MOST: usize = 1 << 24;
    match object {
        Object::Dict(entries) => {
            for (name, value) in entries {
                paths(value, format!("{path}.{}", name_of(name)), found);
            }
        }
        Object::List(items) | Object::Tuple(items) => {
            for (i, item) in items.iter().enumerate() {
                paths(item, format!("{path}.{i}"), found);
            }
        }
        _ if found.len() * path.len() >= MOST || Rebuild::of(object).is_none() => {}
        _ => found.push(path),
    }
}

/// Key of a dict as a part of a path.
fn name_of(key: &Object) -> String {
    match key {
        Object::Unicode(name) => name.clone(),
        Object::Int(i) => i.to_string(),
        Object::Long(i) => i.to_string(),
        _ => "?".to_string(),
    }
}

/// How many tensors a dict has.
fn count(entries: &[(Object, Object)]) -> usize {
    let tensors = entries.iter().filter_map(|(_, value)| Rebuild::of(value));
    tensors.count()
}

/// A call of one of PyTorch's functions that rebuild a tensor.
struct Rebuild<'a> {
    function: &'a str,
    args: &'a [Object],
}

impl<'a> Rebuild<'a> {
    /// The innermost such call of `object`: parameters and subclasses wrap that of the tensor.
    fn of(object: &'a Object) -> Option<Self> {
        let Object::Reduce { callable, args } = object else {
            return None;
        };
        let (
            Object::Class {
                module_name,
                class_name,
            },
            Object::Tuple(args),
        ) = (&**callable, &**args)
        else {
            return None;
        };
        if !(module_name.starts_with("torch.") && class_name.starts_with("_rebuild")) {
            return None;
        }
        match (class_name.as_str(), args.as_slice()) {
            ("_rebuild_parameter" | "_rebuild_parameter_with_state", [tensor, ..]) => {
                Self::of(tensor)
            }
            (
                "_rebuild_from_type_v2",
                [Object::Class { class_name, .. }, _, Object::Tuple(args), ..],
            ) => Some(Self {
                function: class_name,
                args,
            }),
            (function, args) => Some(Self { function, args }),
        }
    }

    fn view(&self) -> std::result::Result<View, String> {
        let unknown = || {
            format!(
                "it is made by torch's {}, which has no reader",
                self.function
            )
        };
        if !["_rebuild_tensor", "_rebuild_tensor_v2"].contains(&self.function) {
            return Err(unknown());
        }
        let [storage, offset, size, stride, ..] = self.args else {
            return Err(unknown());
        };
        let (class, storage, _) = storage_of(storage).ok_or_else(unknown)?;
        let dtype = element(class).and_then(|(dtype, _)| dtype);
        let dtype = dtype.ok_or_else(|| format!("candle has no dtype for a {class}"))?;
        Ok(View {
            dtype,
            storage: storage.to_string(),
            offset: index(offset).ok_or_else(unknown)?,
            size: indices(size).ok_or_else(unknown)?,
            stride: indices(stride).ok_or_else(unknown)?,
        })
    }
}

/// Class, key and what else a persistent id of a storage says.
fn storage_of(object: &Object) -> Option<(&str, &str, &[Object])> {
    let Object::PersistentLoad(id) = object else {
        return None;
    };
    let Object::Tuple(id) = &**id else {
        return None;
    };
    match id.as_slice() {
        [
            Object::Unicode(kind),
            Object::Class { class_name, .. },
            Object::Unicode(key),
            rest @ ..,
        ] if kind == "storage" => Some((class_name, key, rest)),
        _ => None,
    }
}

/// The dtype of the elements of a storage, if candle has it, and their width.
fn element(class: &str) -> Option<(Option<DType>, usize)> {
    Some(match class {
        "FloatStorage" => (Some(DType::F32), 4),
        "DoubleStorage" => (Some(DType::F64), 8),
        "HalfStorage" => (Some(DType::F16), 2),
        "BFloat16Storage" => (Some(DType::BF16), 2),
        // One byte each, 0 or 1.
        "ByteStorage" | "BoolStorage" => (Some(DType::U8), 1),
        "ShortStorage" => (Some(DType::I16), 2),
        "IntStorage" => (Some(DType::I32), 4),
        "LongStorage" => (Some(DType::I64), 8),
        "CharStorage" | "QInt8Storage" | "QUInt8Storage" => (None, 1),
        "QInt32Storage" => (None, 4),
        "ComplexFloatStorage" => (None, 8),
        "ComplexDoubleStorage" => (None, 16),
        _ => return None,
    })
}

/// How wide the elements of each storage in `object` are.
fn widths_in(object: &Object, widths: &mut HashMap<String, usize>) {
    if let Some((class, key, _)) = storage_of(object)
        && let Some((_, width)) = element(class)
    {
        widths.insert(key.to_string(), width);
    }
    match object {
        Object::Tuple(items) | Object::List(items) => {
            items.iter().for_each(|item| widths_in(item, widths));
        }
        Object::Dict(entries) => {
            for (key, value) in entries {
                widths_in(key, widths);
                widths_in(value, widths);
            }
        }
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            widths_in(callable, widths);
            widths_in(args, widths);
        }
        _ => {}
    }
}

fn index(object: &Object) -> Option<usize> {
    match object {
        Object::Int(i) => usize::try_from(*i).ok(),
        Object::Long(i) => usize::try_from(*i).ok(),
        _ => None,
    }
}

fn indices(object: &Object) -> Option<Vec<usize>> {
    match object {
        Object::Tuple(items) => items.iter().map(index).collect(),
        _ => None,
    }
}

/// A tensor as a view of a storage, in elements.
struct View {
    dtype: DType,
    storage: String,
    offset: usize,
    size: Vec<usize>,
    stride: Vec<usize>,
}

impl View {
    fn tensor(&self, storage: &[u8]) -> std::result::Result<Tensor, String> {
        let bytes = self.elements(storage).ok_or_else(|| {
            format!(
                "its size {:?} with strides {:?} from element {} is not within a storage of {} bytes; save it with contiguous()",
                self.size,
                self.stride,
                self.offset,
                storage.len()
            )
        })?;
        Tensor::from_raw_buffer(&bytes, self.dtype, &self.size, &Device::Cpu)
            .map_err(|e| e.to_string())
    }

    /// Whether the elements lie in the order of the axes, without gaps. The size has no overflow.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.size
            .iter()
            .zip(&self.stride)
            .rev()
            .all(|(size, stride)| {
                let fits = *size == 1 || *stride == expected;
                expected *= size;
                fits
            })
    }

    /// The elements in the order of the axes.
    fn elements(&self, storage: &[u8]) -> Option<Vec<u8>> {
        let width = self.dtype.size_in_bytes();
        let available = storage.len() / width;
        let multiplied = |count: usize, size: &usize| count.checked_mul(*size);
        let count = self.size.iter().try_fold(1, multiplied)?;
        if self.stride.len() != self.size.len() || count > available {
            return None;
        }
        if count == 0 {
            return Some(vec![]);
        }
        let reach = (self.size.iter().zip(&self.stride))
            .try_fold(self.offset, |last, (n, s)| {
                last.checked_add((n - 1).checked_mul(*s)?)
            })?;
        if reach >= available {
            return None;
        }
        if self.is_contiguous() {
            let start = self.offset * width;
            return Some(storage[start..start + count * width].to_vec());
        }
        let mut bytes = Vec::with_capacity(count * width);
        let mut at = vec![0; self.size.len()];
        for _ in 0..count {
            let position: usize = at.iter().zip(&self.stride).map(|(i, s)| i * s).sum();
            let start = (self.offset + position) * width;
            bytes.extend_from_slice(&storage[start..start + width]);
            for (i, size) in at.iter_mut().zip(&self.size).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Some(bytes)
    }
}

/// The object of a pickle, which `bytes` then lies behind.
///
/// candle's machine takes one operation at a time: those that would make it fail or grow without
/// end are seen before.
fn unpickle(bytes: &mut &[u8]) -> Result<Object> {
    let protocol = protocol(bytes).unwrap_or_default();
    // From the fourth on, a pickle has frames.
    if protocol > 3 {
        bail!("expected a state dict, got {}", other_protocol(protocol))
    }
    let mut stack = Stack::empty();
    let mut limits = Limits::new(bytes.len());
    loop {
        let operation = bytes.first().copied().unwrap_or_default();
        let next = *bytes;
        let before = stack.stack().len();
        let stop = match next {
            // A whole number beyond 64 bits, such as a seed: no tensor needs it.
            [0x8a, len, rest @ ..] if *len > 8 => {
                *bytes = rest.get(usize::from(*len)..).unwrap_or_default();
                stack.read(&mut &b"N"[..])?
            }
            // A text of Python 2.
            [b'U', len, rest @ ..] if rest.len() >= usize::from(*len) => {
                let (text, rest) = rest.split_at(usize::from(*len));
                *bytes = rest;
                let unicode = [&[b'X', *len, 0, 0, 0], text].concat();
                stack.read(&mut unicode.as_slice())?
            }
            [] => bail!("expected a longer pickle: the file was cut off; fetch it again"),
            [b'X', a, b, c, d, rest @ ..]
                if u32::from_le_bytes([*a, *b, *c, *d]) as usize > rest.len() =>
            {
                bail!("expected a longer pickle: the file was cut off; fetch it again")
            }
            _ => match stack.read(bytes) {
                Ok(stop) => stop,
                Err(_) if protocol > PROTOCOL => {
                    bail!("expected a state dict, got {}", other_protocol(protocol))
                }
                Err(e) => bail!(
                    "its pickle has something other than numbers, texts and tensors in it ({e}); save model.state_dict() alone, or as safetensors"
                ),
            },
        };
        if stop {
            return stack.finalize();
        }
        limits.take(operation, next, before, stack.stack().len())?;
    }
}

/// How large and how nested objects become. A pickle may take the same object again and again, so
/// that a short one has no limit of
/// its own, and what is nested without end overflows the stack when it is dropped.
struct Limits {
    most: u64,
    stack: Vec<Extent>,
    memo: HashMap<u32, Extent>,
    /// The sizes of all in `stack` and `memo`.
    total: u64,
}

#[derive(Clone, Copy)]
struct Extent {
    depth: u32,
    size: u64,
}

impl Limits {
    /// A state dict of a model has some tens.
    const DEPTH: u32 = 128;
    /// About 70 objects describe a tensor, those in the memo included.
    const SIZE: u64 = 1 << 24;

    /// For a pickle in so many bytes: a tensor takes more than a hundred of them.
    fn new(bytes: usize) -> Self {
        Self {
            most: (8 * bytes as u64).clamp(1000, Self::SIZE),
            stack: vec![],
            memo: HashMap::new(),
            total: 0,
        }
    }

    /// `operation` turned `before` objects on the machine's stack into `after`.
    fn take(&mut self, operation: u8, code: &[u8], before: usize, after: usize) -> Result<()> {
        let id = match (operation, code) {
            (b'q' | b'h', [_, id, ..]) => u32::from(*id),
            (b'r' | b'j', [_, a, b, c, d, ..]) => u32::from_le_bytes([*a, *b, *c, *d]),
            _ => 0,
        };
        let one = Extent { depth: 1, size: 1 };
        match operation {
            // The version of the format.
            0x80 => {}
            b'q' | b'r' => {
                let top = self.stack.last().copied().unwrap_or(one);
                self.total += top.size;
                if let Some(old) = self.memo.insert(id, top) {
                    self.total -= old.size;
                }
            }
            _ if after > before => {
                let pushed = match operation {
                    b'h' | b'j' => self.memo.get(&id).copied().unwrap_or(one),
                    _ => one,
                };
                self.total += pushed.size;
                self.stack.push(pushed);
            }
            _ => {
                let popped = self
                    .stack
                    .split_off(after.saturating_sub(1).min(self.stack.len()));
                let size: u64 = popped.iter().map(|e| e.size).sum();
                let depth = |of: &[Extent]| of.iter().map(|e| e.depth).max().unwrap_or(0);
                let depth = match (operation, popped.as_slice()) {
                    // What is added to a list or dict does not nest that further.
                    (b'a' | b'e' | b's' | b'u', [to, added @ ..]) => to.depth.max(depth(added) + 1),
                    (_, all) => depth(all) + 1,
                };
                self.total += 1;
                self.stack.push(Extent {
                    depth,
                    size: size + 1,
                });
            }
        }
        let deepest = self.stack.last().map_or(0, |e| e.depth);
        if deepest > Self::DEPTH || self.total > self.most {
            bail!(
                "expected a pickle of at most {} objects, nested {} deep at most; save model.state_dict() alone",
                self.most,
                Self::DEPTH
            )
        }
        Ok(())
    }
}
