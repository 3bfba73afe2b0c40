//! The sources keep to their floors: a room names itself and the rooms below it, and no arrow
//! points back ([`FLOORS`]). The crates below the library do the same ([`CRATES`]).
//!
//! Crates and lints hold the rest, but for what no compiler knows: no operation drops gradients,
//! messages for users name the layer, and nothing panics.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Rooms from the lowest floor to the highest: folders and files of `src`.
const FLOORS: [&str; 8] = [
    "collective",
    "computations",
    "backend",
    "graph",
    "ops",
    "layers",
    "models",
    "distributed",
];

/// Names at the root of the crate that are no rooms, with the floor that they belong to.
const REEXPORTS: [(&str, &str); 1] = [("Norm", "layers")];

/// A crate below the library.
struct Crate {
    /// The folder in `crates`, which is also the name of its room.
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

/// Whether a word must not occur in a room.
type Forbidden = fn(&str) -> bool;

/// Words that must not occur in a room.
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

/// Identifiers, literals and single marks of a source. Comments are none, but for documentation,
/// which is an attribute with a literal.
fn tokens(source: &str) -> Vec<String> {
    fn flatten(stream: TokenStream, found: &mut Vec<String>) {
        for tree in stream {
            let TokenTree::Group(group) = tree else {
                found.push(tree.to_string());
                continue;
            };
            let (open, close) = match group.delimiter() {
                Delimiter::Parenthesis => ("(", ")"),
                Delimiter::Brace => ("{", "}"),
                Delimiter::Bracket => ("[", "]"),
                Delimiter::None => ("", ""),
            };
            found.push(open.to_string());
            flatten(group.stream(), found);
            found.push(close.to_string());
        }
    }
    let mut found = vec![];
    flatten(source.parse().expect("a file of Rust"), &mut found);
    found
}

/// The text between the quotes of a string literal.
fn text_of(token: &str) -> Option<&str> {
    let (start, end) = (token.find('"')?, token.rfind('"')?);
    let is_string = token[..start].chars().all(|c| "brc#".contains(c));
    (is_string && start < end).then(|| &token[start + 1..end])
}

fn starts_with(tokens: &[String], start: &[&str]) -> bool {
    tokens.len() >= start.len() && tokens.iter().zip(start).all(|(a, b)| a == b)
}

/// Without the modules that are compiled for tests alone.
fn without_tests(tokens: &[String]) -> Vec<String> {
    let mut kept = vec![];
    let mut i = 0;
    while i < tokens.len() {
        if starts_with(&tokens[i..], &["#", "[", "cfg", "(", "test", ")", "]"]) {
            let opens = |t: &String| t == "{" || t == ";";
            let open = i + tokens[i..].iter().position(opens).unwrap_or(0);
            i = open + closing(&tokens[open..]) + 1;
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

/// The index of the brace that closes the one at index 0, or 0 where there is none.
fn closing(tokens: &[String]) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate() {
        depth += i32::from(token == "{") - i32::from(token == "}");
        if depth == 0 {
            return i;
        }
    }
    tokens.len() - 1
}

/// Names at the root of the crate: the `x` of `crate::x`, of `crate::{x, y}` and of as many
/// `super::` as lead there from a file that is `depth` modules deep.
fn named_at_root(tokens: &[String], depth: usize) -> Vec<String> {
    let mut found = vec![];
    for i in 0..tokens.len() {
        let rest = &tokens[i..];
        let continues = i > 1 && starts_with(&tokens[i - 2..], &[":", ":"]);
        if continues {
            continue;
        }
        if starts_with(rest, &["crate", ":", ":"]) {
            found.extend(heads(&rest[3..]));
        }
        let supers = rest
            .chunks(3)
            .take_while(|t| starts_with(t, &["super", ":", ":"]));
        let supers = supers.count();
        if supers >= depth {
            found.extend(heads(&rest[3 * supers..]));
        }
    }
    found
}

/// The first names of a path or of a braced list of paths. A glob takes everything.
fn heads(tokens: &[String]) -> Vec<String> {
    let Some(first) = tokens.first().filter(|first| *first == "{") else {
        return tokens.first().cloned().into_iter().collect();
    };
    let inside = &tokens[1..closing(tokens)];
    let (mut depth, mut found, mut before) = (0, vec![], first);
    for (i, token) in inside.iter().enumerate() {
        if depth == 0 && (before == "{" || before == ",") {
            found.extend(heads(&inside[i..]));
        }
        depth += i32::from(token == "{") - i32::from(token == "}");
        before = token;
    }
    found
}

/// A source file of the library, or of a crate below it.
struct Source {
    /// From `src` of the library on, or from the folder of all crates on, with `/`.
    path: String,
    tokens: Vec<String>,
    /// The longest line, in characters.
    columns: usize,
}

impl Source {
    /// The folder or file directly under `src`, or the crate, and how many modules deep the file
    /// is.
    fn room(&self) -> (&str, usize) {
        let of_crate = self.of_crate();
        let inside = of_crate.map_or(self.path.as_str(), |(_, inside)| inside);
        let parts: Vec<&str> = inside.split('/').collect();
        let deep = match parts.last() {
            Some(&("mod.rs" | "lib.rs" | "main.rs")) => parts.len() - 1,
            _ => parts.len(),
        };
        (of_crate.map_or(parts[0], |(folder, _)| folder), deep)
    }

    /// The crate below the library, and the path from its `src` on.
    fn of_crate(&self) -> Option<(&str, &str)> {
        self.path.strip_prefix("crates/")?.split_once("/src/")
    }
}

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn sources() -> Vec<Source> {
    let mut found = sources_below(&root().join("src"), "");
    for of in CRATES.iter().filter(|of| of.is_read) {
        let within = format!("crates/{}/src", of.folder);
        found.extend(sources_below(&root().join(&within), &format!("{within}/")));
    }
    found
}

/// The sources in a folder and its folders. `prefix` stands before the paths from there on.
fn sources_below(root: &Path, prefix: &str) -> Vec<Source> {
    let mut folders = vec![root.to_path_buf()];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).expect("a folder of sources");
        let mut paths: Vec<PathBuf> = entries.map(|e| e.expect("an entry").path()).collect();
        paths.sort();
        for path in paths {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                let relative = path.strip_prefix(root).expect("below the root");
                let parts: Vec<_> = relative.iter().map(|p| p.to_string_lossy()).collect();
                found.push(Source {
                    path: format!("{prefix}{}", parts.join("/")),
                    tokens: tokens(&text),
                    columns: text.lines().map(|l| l.chars().count()).max().unwrap_or(0),
                });
            }
        }
    }
    assert!(
        found.iter().any(|s| s.path == format!("{prefix}lib.rs")),
        "no sources below {}",
        root.display()
    );
    found
}

/// Names at the root of the crate that a room may use; none where there is no rule.
fn may_name(room: &str) -> Option<Vec<&'static str>> {
    let floor = FLOORS.iter().position(|floor| *floor == room)?;
    let below = &FLOORS[..=floor];
    let names = REEXPORTS.iter().filter(|(_, of)| below.contains(of));
    Some(
        below
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
    let (room, depth) = source.room();
    let mut broken = vec![];
    if let Some(may_name) = may_name(room) {
        for name in named_at_root(&source.tokens, depth) {
            if !may_name.contains(&name.as_str()) {
                broken.push(format!("{} names crate::{name}", source.path));
            }
        }
    }
    let never = || NEVER.iter().filter(|(of, _)| *of == room);
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
fn arrows_point_one_way() {
    assert_none(sources().iter().flat_map(broken_rules).collect());
}

/// The rooms that this file speaks of are there.
#[test]
fn every_room_has_its_files() {
    let sources = sources();
    let crates = CRATES.iter().filter(|of| of.is_read).map(|of| of.folder);
    for room in FLOORS.into_iter().chain(crates) {
        let files = sources.iter().filter(|s| s.room().0 == room).count();
        assert!(files > 2, "{room} has {files} files");
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

#[test]
fn lines_of_the_crates_end_at_100_columns() {
    let sources = sources();
    let long = sources
        .iter()
        .filter(|s| s.of_crate().is_some() && s.columns > 100);
    assert_none(long.map(|s| s.path.clone()).collect());
}

/// Rooms in which messages for users are made: those of one layer beside it, those of several in
/// `ops/check` and `support`.
const SPEAK: [&str; 9] = [
    "collective",
    "distributed",
    "graph",
    "layers",
    "models",
    "nn",
    "ops",
    "scaling",
    "support",
];

fn makes_messages(source: &Source) -> bool {
    let own = OWN_MESSAGES.iter().any(|own| source.path.starts_with(own));
    SPEAK.contains(&source.room().0) && !own
}

/// Files and folders that make messages of their own, since they are about things that no layer
/// knows: files, configurations and functions of the caller's own.
const OWN_MESSAGES: [&str; 3] = [
    "models/checkpoint/",
    "models/config.rs",
    "crates/gradcheck/",
];

/// The texts of the errors that a source makes, in code that is not for tests.
fn messages(source: &Source) -> Vec<String> {
    let tokens = without_tests(&source.tokens);
    let mut found = vec![];
    for i in 0..tokens.len() {
        let rest = &tokens[i..];
        let how = ["msg", "Msg", "wrap", "debug"];
        let made = starts_with(rest, &["bail", "!"])
            || how
                .iter()
                .any(|how| starts_with(rest, &["Error", ":", ":", how]));
        if made {
            let text = rest.iter().find_map(|token| text_of(token));
            found.push(text.unwrap_or_default().to_string());
        }
    }
    found
}

#[test]
fn messages_are_made_in_their_rooms() {
    let sources = sources();
    let mut broken = vec![];
    for source in &sources {
        let path = source.path.as_str();
        if makes_messages(source) || OWN_MESSAGES.iter().any(|own| path.starts_with(own)) {
            continue;
        }
        let messages = messages(source);
        if !messages.is_empty() {
            broken.push(format!("{path} makes messages: {messages:#?}"));
        }
    }
    assert_none(broken);
}

/// A message starts with the layer and says what was expected.
#[test]
fn messages_name_the_layer_and_what_it_expected() {
    let all = sources();
    let checks = all.iter().filter(|s| makes_messages(s));
    let messages: Vec<String> = checks.flat_map(messages).collect();
    assert!(messages.len() > 10, "only {} messages", messages.len());
    let names_layer =
        |m: &str| ["{layer}: expected ", "{LAYER}: expected "].map(|start| m.starts_with(start));
    let unclear = messages
        .into_iter()
        .filter(|m| names_layer(m) == [false; 2]);
    assert_none(unclear.collect());
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

/// What a layer reads on the host goes through `candle_norm_support::host`, which tests record.
#[test]
fn copies_to_the_host_are_counted() {
    let mut broken = vec![];
    for source in sources() {
        if !["computations", "graph", "layers", "ops"].contains(&source.room().0) {
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
mod scanner {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source {
            path: path.to_string(),
            tokens: tokens(text),
            columns: text.len(),
        }
    }

    #[test]
    fn comments_and_literals_are_no_words() {
        let text = r##"
            /// kernels
            //! kernels
            /* kernels /* kernels */ kernels */
            a("kernels \" kernels", 'k', '\'', '"', b"kernels", r"kernels", r#"kernels " kernels"#)
            fn b<'c>(c: &'c str) // kernels
            d
        "##;
        let found = tokens(text);
        assert!(!found.iter().any(|word| word == "kernels"), "{found:?}");
        for word in ["a", "b", "c", "d", "fn", "str"] {
            assert!(found.iter().any(|found| found == word), "{word}");
        }
    }

    #[test]
    fn texts_are_kept() {
        let found = tokens(r##"a("b\"c", r#"d"e"#, 'f', '"')"##);
        let texts: Vec<_> = found.iter().filter_map(|token| text_of(token)).collect();
        assert_eq!(texts, ["b\\\"c", "d\"e"]);
    }

    #[test]
    fn modules_for_tests_are_left_out() {
        let text = "a(); #[cfg(test)] mod tests { fn b() { c.unwrap() } } \
            #[cfg(test)] use d; #[cfg(feature)] e();";
        let kept = without_tests(&tokens(text));
        for (word, is_kept) in [
            ("a", true),
            ("b", false),
            ("unwrap", false),
            ("d", false),
            ("e", true),
        ] {
            assert_eq!(kept.iter().any(|t| t == word), is_kept, "{word}");
        }
    }

    #[test]
    fn what_is_named_at_the_root_is_found_however_it_is_written() {
        let named = |text: &str| named_at_root(&tokens(text), 2);
        assert_eq!(named("use crate::layers::params;"), ["layers"]);
        assert_eq!(named("let x = crate::norm::Norm;"), ["norm"]);
        assert_eq!(named("let x: crate::norm::Norm;"), ["norm"]);
        assert_eq!(
            named("use crate::{ops::{self, check}, layers::{A, B}, Norm};"),
            ["ops", "layers", "Norm"]
        );
        assert_eq!(named("use super::super::layers;"), ["layers"]);
        assert_eq!(named("use super::super::{layers, ops};"), ["layers", "ops"]);
        assert_eq!(
            named("use super::check; pub(crate) fn a() {} use self::b;"),
            [""; 0]
        );
        assert!(named("use crate::*;")[0].contains('*'));
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

    #[test]
    fn messages_are_found_however_they_are_made() {
        let text = r#"
            bail!("a {x}", x);
            return Err(Error::Msg(format!("b")));
            candle_core::bail!("c");
            Error::msg("d").bt()
            #[cfg(test)] mod tests { bail!("e") }
            // bail!("f")
        "#;
        assert_eq!(messages(&source("a.rs", text)), ["a {x}", "b", "c", "d"]);
    }
}
