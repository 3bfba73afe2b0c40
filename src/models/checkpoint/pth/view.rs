//! Tensors of a pickle: views of storages.

use std::collections::HashMap;

use candle_core::pickle::Object;
use candle_core::{DType, Device, Tensor};

/// A call of one of PyTorch's functions that rebuild a tensor.
pub(super) struct Rebuild<'a> {
    function: &'a str,
    args: &'a [Object],
}

impl<'a> Rebuild<'a> {
    /// The innermost such call of `object`: parameters and subclasses wrap that of the tensor.
    pub(super) fn of(object: &'a Object) -> Option<Self> {
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

    pub(super) fn view(&self) -> std::result::Result<View, String> {
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

/// Width of the elements of each storage in `object`.
pub(super) fn widths_in(object: &Object, widths: &mut HashMap<String, usize>) {
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
pub(super) struct View {
    dtype: DType,
    pub(super) storage: String,
    offset: usize,
    size: Vec<usize>,
    stride: Vec<usize>,
}

impl View {
    pub(super) fn tensor(&self, storage: &[u8]) -> std::result::Result<Tensor, String> {
        let bytes = self.elements(storage).ok_or_else(|| {
            format!(
                "its size {:?} with strides {:?} from element {} is not within a storage of {} \
                bytes; save it with contiguous()",
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
