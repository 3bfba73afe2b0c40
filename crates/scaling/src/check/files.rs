//! Messages about the files of an archive.

use std::fmt::Display;
use std::path::Path;

use candle_core::{DType, Result, bail};

/// A file that may be written over. `lost` is what it holds that would not be there any more.
pub(crate) fn nothing_lost(layer: &str, path: &Path, lost: Option<&str>) -> Result<()> {
    if let Some(lost) = lost {
        bail!(
            "{layer}: expected a file of this scaler alone at {}, or none, got one that also holds \
            {lost:?}; add the scaler to it by Archive: read, replace, write",
            path.display()
        )
    }
    Ok(())
}

/// A part that a file does not have. `others` are the names of its tensors that belong to no part.
pub(crate) fn no_part<T>(
    layer: &str,
    prefix: &str,
    file: Option<&Path>,
    parts: &[String],
    others: &[String],
) -> Result<T> {
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
        "{layer}: expected a part {prefix:?} in the file{file}, got the parts {parts:?} and \
        {tensors}; {remedy}"
    )
}

/// A dtype that safetensors files are written of: candle holds others, which it cannot bring back
/// out.
pub(crate) fn writable(layer: &str, name: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F6E2M3 | DType::F6E3M2 | DType::F4 | DType::F8E8M0 => bail!(
            "{layer}: expected tensors of a dtype that can be written, got {name:?} of {dtype:?}, \
            which candle can only read; leave it in a file of its own"
        ),
        _ => Ok(()),
    }
}

/// A tensor of a file.
pub(crate) fn loaded<T, E: Display>(
    layer: &str,
    path: &Path,
    name: &str,
    dtype: impl std::fmt::Debug,
    loaded: std::result::Result<T, E>,
) -> Result<T> {
    match loaded {
        Ok(loaded) => Ok(loaded),
        Err(e) => bail!(
            "{layer}: expected tensors of a dtype that candle holds in {}, got {name:?} of \
            {dtype:?}: {e}",
            path.display()
        ),
    }
}

/// A name that nothing in the file has yet.
pub(crate) fn free_name(layer: &str, name: &str, taken: bool) -> Result<()> {
    if taken {
        bail!(
            "{layer}: expected names that are not in use and do not begin with the prefix of a \
            state, got {name:?} twice; choose another prefix"
        )
    }
    Ok(())
}
