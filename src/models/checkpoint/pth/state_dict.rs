//! The state dict among the objects of a pickle.

use candle_core::pickle::Object;
use candle_core::{Result, bail};

use super::super::report;
use super::view::Rebuild;

/// The keys and values of a dict.
pub(super) type Entries = Vec<(Object, Object)>;

/// The entries of the state dict: `object` itself, what it has under `key`, or the one dict of more
/// tensors than lie beside it. With them, their key and the paths of all other tensors.
pub(super) fn state_dict(
    object: Object,
    key: Option<&str>,
) -> Result<(Entries, Option<String>, Vec<String>)> {
    let entries = match object {
        Object::Dict(entries) => entries,
        other => match class_of(&other) {
            Some(Object::Class { class_name, .. }) => bail!(
                "expected a state dict, got a pickled {class_name}; save its state dict: \
                torch.save(model.state_dict(), ..)"
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
            "expected a state dict under the key {key:?}, got state dicts under {}; set `key` of \
            LoadOptions to one of them",
            report::quoted(&parts)
        ),
        (None, [part]) => part,
        (None, []) if own > 0 => {
            let beside = beside(&entries, None);
            return Ok((entries, None, beside));
        }
        (None, []) => bail!("expected a state dict, got {}", without_tensors(&entries)),
        (None, _) => bail!(
            "expected one state dict, got several, under {}; call checkpoint::load_with with `key` \
            of LoadOptions set to one of them",
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

/// Number of tensors in a dict.
fn count(entries: &[(Object, Object)]) -> usize {
    let tensors = entries.iter().filter_map(|(_, value)| Rebuild::of(value));
    tensors.count()
}

/// The class that an object is made by.
pub(super) fn class_of(object: &Object) -> Option<&Object> {
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

pub(super) fn text(text: &str) -> Object {
    Object::Unicode(text.to_string())
}
