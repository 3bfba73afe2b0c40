//! Modules depend on each other in one order: a module names itself and those before it
//! ([`MODULES`]). The crates below the library do the same ([`CRATES`]).
//!
//! Crates and lints hold the rest, but for what no compiler knows: no operation drops gradients,
//! messages for users name the layer, and nothing panics.

mod lines;
mod messages;
mod sources;

use std::collections::BTreeSet;
use std::fs;

use messages::makes_messages;
use sources::{Source, named_at_root, root, sources, without_tests};

/// Modules of `src`, in the order in which they may depend on each other.
const MODULES: [&str; 8] = [
    "collective",
    "computations",
    "backend",
    "graph",
    "ops",
    "layers",
    "models",
    "distributed",
];

/// Names at the root of the crate that are no modules, with the module that they belong to.
const REEXPORTS: [(&str, &str); 1] = [("Norm", "layers")];

/// A crate below the library.
struct Crate {
    /// The folder in `crates`, which is also the name of its module here.
    folder: &'static str,
    /// All that it may depend on of candle and of this workspace.
    depends_on: &'static [&'static str],
    /// Files that may name it, by the start of their paths; none where all may.
    known_to: Option<&'static [&'static str]>,
    /// Whether its sources are read here; those of the kernels have rules of their own.
    is_read: bool,
}

impl Crate {
    /// The name in sources.
    fn name(&self) -> String {
        format!("candle_norm_{}", self.folder.replace('-', "_"))
    }
}

/// The one file of the library that calls the driver of a GPU.
const UNSAFE: &str = "backend/cuda/driver.rs";

/// Crates below the library.
const CRATES: [Crate; 5] = [
    Crate {
        folder: "kernels",
        depends_on: &[],
        known_to: Some(&[
            "backend/",
            "ops/",
            "internals.rs",
            "crates/scaling/src/moments.rs",
        ]),
        is_read: false,
    },
    Crate {
        folder: "cuda-kernels",
        depends_on: &[],
        known_to: Some(&["backend/cuda/"]),
        is_read: false,
    },
    Crate {
        folder: "support",
        depends_on: &["candle-core"],
        known_to: None,
        is_read: true,
    },
    Crate {
        folder: "scaling",
        depends_on: &[
            "candle-core",
            "candle-nn",
            "candle-norm-kernels",
            "candle-norm-support",
        ],
        known_to: Some(&["models/", "scaling.rs", "lib.rs"]),
        is_read: true,
    },
    Crate {
        folder: "gradcheck",
        depends_on: &["candle-core"],
        known_to: Some(&["lib.rs"]),
        is_read: true,
    },
];

/// Whether a word must not occur in a module.
type Forbidden = fn(&str) -> bool;

/// Words that must not occur in a module.
const NEVER: [(&str, Forbidden); 10] = [
    ("support", below_tensors),
    ("collective", tensors),
    ("computations", below_tensors),
    ("backend", custom_op),
    ("ops", custom_op),
    ("layers", below_tensors),
    ("models", custom_op),
    ("scaling", below_tensors),
    ("distributed", below_tensors),
    ("gradcheck", below_tensors),
];

/// Where an operation may drop gradients: the backward of a fused one is an operation without a
/// backward.
const DROP_GRADIENTS: &str = "graph/node.rs";

/// Names at the root of the crate that a module may use; none where there is no rule.
fn may_name(module: &str) -> Option<Vec<&'static str>> {
    let position = MODULES.iter().position(|of| *of == module)?;
    let known = &MODULES[..=position];
    let names = REEXPORTS.iter().filter(|(_, of)| known.contains(of));
    Some(
        known
            .iter()
            .copied()
            .chain(names.map(|(name, _)| *name))
            .collect(),
    )
}

/// Words of `graph` alone.
fn custom_op(word: &str) -> bool {
    word.starts_with("CustomOp") || word.starts_with("apply_op")
}

/// Words of tensors, of which a group of ranks knows nothing.
fn tensors(word: &str) -> bool {
    let tensor = ["Tensor", "Var", "VarMap", "Device"].contains(&word);
    tensor || custom_op(word) || ["candle_norm_kernels", "rayon"].contains(&word)
}

/// Words of `graph`, `backend` and the kernels alone.
fn below_tensors(word: &str) -> bool {
    let storage = word.contains("storage") || word.contains("Storage");
    storage || custom_op(word) || ["rayon", "thread"].contains(&word)
}

fn broken_rules(source: &Source) -> Vec<String> {
    let (module, depth) = source.module();
    let mut broken = vec![];
    if let Some(may_name) = may_name(module) {
        for name in named_at_root(&source.tokens, depth) {
            if !may_name.contains(&name.as_str()) {
                broken.push(format!("{} names crate::{name}", source.path));
            }
        }
    }
    let never = || NEVER.iter().filter(|(of, _)| *of == module);
    for word in source.tokens.iter().map(String::as_str) {
        let drops_gradients = word.starts_with("apply_op")
            && word.ends_with("no_bwd")
            && source.path != DROP_GRADIENTS;
        let unknown = CRATES.iter().any(|of| {
            let starts = |start: &&str| source.path.starts_with(start);
            of.name() == word && of.known_to.is_some_and(|known| !known.iter().any(starts))
        });
        let forbidden = never().any(|(_, is_forbidden)| is_forbidden(word));
        let is_unsafe = word == "unsafe" && source.path != UNSAFE;
        if drops_gradients || unknown || forbidden || is_unsafe {
            broken.push(format!("{} says `{word}`", source.path));
        }
    }
    broken.sort();
    broken.dedup();
    broken
}

#[track_caller]
fn assert_none(broken: Vec<String>) {
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn modules_depend_on_those_before_them() {
    assert_none(sources().iter().flat_map(broken_rules).collect());
}

/// The modules of these rules are there.
#[test]
fn every_module_has_its_files() {
    let sources = sources();
    let crates = CRATES.iter().filter(|of| of.is_read).map(|of| of.folder);
    for module in MODULES.into_iter().chain(crates) {
        let files = sources.iter().filter(|s| s.module().0 == module).count();
        assert!(files > 2, "{module} has {files} files");
    }
    assert!(sources.iter().any(makes_messages), "no messages");
}

/// The crates below the library, with all that they may depend on, are those that it depends on.
#[test]
fn crates_depend_on_those_below() {
    let mut broken = vec![];
    for of in &CRATES {
        let manifest = root().join("crates").join(of.folder).join("Cargo.toml");
        let manifest = fs::read_to_string(manifest).expect("a manifest");
        for name in dependencies(&manifest) {
            if !of.depends_on.contains(&name) {
                broken.push(format!("{} depends on {name}", of.folder));
            }
        }
    }
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    let of_library: BTreeSet<&str> = dependencies(&manifest)
        .into_iter()
        .filter_map(|name| name.strip_prefix("candle-norm-"))
        .collect();
    assert_eq!(of_library, CRATES.iter().map(|of| of.folder).collect());
    assert_none(broken);
}

/// Dependencies of a manifest on candle and of this workspace, but for tests and examples.
fn dependencies(manifest: &str) -> Vec<&str> {
    let section = manifest.split("\n[dependencies]\n").nth(1).unwrap_or("");
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    lines
        .filter_map(|line| line.split_once(" = ").map(|(name, _)| name))
        .filter(|name| name.starts_with("candle"))
        .collect()
}

/// Words by which elements come from a device or go to it, or the host waits for it.
const BETWEEN_HOST_AND_DEVICE: [&str; 16] = [
    "to_cpu_storage",
    "to_scalar",
    "to_vec0",
    "to_vec1",
    "to_vec2",
    "to_vec3",
    "to_device",
    "synchronize",
    "clone_dtoh",
    "clone_htod",
    "memcpy_dtoh",
    "memcpy_htod",
    "from_vec",
    "from_slice",
    "storage_from_slice",
    "storage_from_cpu_storage",
];

/// A step on a GPU can be captured as a graph of it: nothing in the backend stops the stream.
#[test]
fn kernels_of_gpus_are_launched_without_waiting() {
    let sources = sources();
    let of_cuda: Vec<&Source> = sources
        .iter()
        .filter(|s| s.path.starts_with("backend/cuda/"))
        .collect();
    assert!(of_cuda.len() > 5, "{} files", of_cuda.len());
    let mut broken = vec![];
    for source in of_cuda {
        for word in source.tokens.iter().map(String::as_str) {
            if BETWEEN_HOST_AND_DEVICE.contains(&word) {
                broken.push(format!("{} says `{word}`", source.path));
            }
        }
    }
    assert_none(broken);
}

/// Words by which elements reach the host where nothing counts it.
const UNCOUNTED: [&str; 7] = [
    "to_cpu_storage",
    "to_scalar",
    "to_vec0",
    "to_vec1",
    "to_vec2",
    "to_vec3",
    "synchronize",
];

/// Layers read on the host through `candle_norm_support::host`, which tests record.
#[test]
fn copies_to_the_host_are_counted() {
    let mut broken = vec![];
    for source in sources() {
        if !["computations", "graph", "layers", "ops"].contains(&source.module().0) {
            continue;
        }
        for word in without_tests(&source.tokens) {
            if UNCOUNTED.contains(&word.as_str()) {
                broken.push(format!("{} says `{word}`", source.path));
            }
        }
    }
    assert_none(broken);
}

/// A wrong argument of a caller is an error, never a panic.
#[test]
fn nothing_panics() {
    let mut broken = vec![];
    for source in sources() {
        for window in without_tests(&source.tokens).windows(2) {
            let word = window[0].as_str();
            let panics = match window[1].as_str() {
                "!" => {
                    let always = ["panic", "todo", "unimplemented", "unreachable"];
                    always.contains(&word) || word.starts_with("assert")
                }
                "(" => ["unwrap", "expect", "unwrap_err", "expect_err"].contains(&word),
                _ => false,
            };
            if panics {
                broken.push(format!("{} may panic by `{word}`", source.path));
            }
        }
    }
    assert_none(broken);
}

#[cfg(test)]
mod tests {
    use super::sources::tokens;
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.to_string(),
            tokens: tokens(text),
        }
    }

    #[test]
    fn broken_rules_are_found() {
        for (path, text) in [
            ("layers/a.rs", "use candle_norm_kernels::Float;"),
            ("layers/a.rs", "use crate::norm::NormConfig;"),
            ("layers/a.rs", "x.storage_and_layout();"),
            ("layers/a.rs", "candle_core::CpuStorage"),
            ("layers/a.rs", "rayon::join()"),
            ("layers/a.rs", "x.apply_op1(f)"),
            ("nn/a.rs", "candle_norm_kernels::Level"),
            (
                "crates/scaling/src/a.rs",
                "use candle_norm_kernels::Moments;",
            ),
            (
                "crates/scaling/src/check/a.rs",
                "use candle_norm_gradcheck::gradcheck;",
            ),
            ("crates/gradcheck/src/a.rs", "rayon::join()"),
            ("layers/a.rs", "use candle_norm_scaling::Scaler;"),
            ("ops/a.rs", "candle_norm_gradcheck::gradcheck(f, &[x])"),
            ("layers/a.rs", "unsafe { x.get_unchecked(0) }"),
            ("ops/a.rs", "use crate::{check, layers};"),
            ("graph/a.rs", "use crate::ops::check;"),
            ("backend/cpu.rs", "use crate::graph::node;"),
            ("layers/a.rs", "use crate::models::checkpoint;"),
            ("layers/a.rs", "use crate::scaling::Pipeline;"),
            ("crates/support/src/a.rs", "x.storage_and_layout();"),
            ("graph/path.rs", "x.apply_op2_no_bwd(y, &op)"),
            ("backend/cpu/a.rs", "impl CustomOp1 for A {}"),
            ("models/a.rs", "use candle_norm_kernels::Float;"),
            ("ops/a.rs", "fn f(norm: &dyn crate::Norm) {}"),
            ("ops/a.rs", "x.apply_op2_no_bwd(y, &op)"),
            ("collective/a.rs", "use crate::computations::Args;"),
            ("collective/a.rs", "fn f(x: &Tensor) {}"),
        ] {
            assert!(
                !broken_rules(&source(path, text)).is_empty(),
                "{path}: {text}"
            );
        }
    }

    #[test]
    fn kept_rules_are_not_found() {
        for (path, text) in [
            (
                "layers/a.rs",
                "use crate::Norm; use crate::ops::{self, check}; use super::params; \
                // candle_norm_kernels",
            ),
            ("layers/mod.rs", "use super::ops;"),
            (
                "ops/a.rs",
                "use super::check; use candle_norm_kernels::Moments; let norm = layers; \
                \"crate::layers\"",
            ),
            ("lib.rs", "mod layers;"),
            (
                "crates/scaling/src/moments.rs",
                "pub use candle_norm_kernels::Moments; use super::layers;",
            ),
            ("models/a.rs", "use candle_norm_scaling::Archive;"),
            ("layers/a.rs", "use candle_norm_support::messages;"),
            (
                "computations/a.rs",
                "use crate::collective::Collective; fn f(x: &Tensor) {}",
            ),
            ("models/a.rs", "use crate::{Norm, layers, ops::check};"),
            (
                "graph/node.rs",
                "use crate::backend::cpu; x.apply_op2_no_bwd(y, &op)",
            ),
        ] {
            assert_eq!(broken_rules(&source(path, text)), [""; 0], "{path}: {text}");
        }
    }
}
