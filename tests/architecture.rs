//! The sources keep to their rooms: `layers/` calls `ops/`, `ops/` calls `kernels/`, and no arrow
//! points back. The room `kernels/` is the crate `crates/kernels`.
//!
//! | room | may name | never |
//! | --- | --- | --- |
//! | `layers/` | `layers`, `ops`, the trait `Norm` that they implement | storages, threads, custom ops |
//! | `ops/` | `ops`, `kernels` | |
//! | `kernels/` | `kernels` | candle |
//! | `scaling/` | `scaling`, `ops`, `checkpoint` | storages, threads, custom ops |
//!
//! `unsafe` is in kernels alone, no operation drops gradients, messages for users are made in `ops/check`, and nothing panics.

use std::fs;
use std::path::{Path, PathBuf};

/// A piece of Rust source. Comments are none.
#[derive(Debug, Clone, PartialEq)]
enum Token {
    /// An identifier, keyword or number.
    Word(String),
    /// The text of a string literal as it is written.
    Text(String),
    /// `::`
    Path,
    /// Any other character.
    Mark(char),
}

use Token::{Mark, Text, Word};

impl Token {
    fn is_word(&self, word: &str) -> bool {
        matches!(self, Word(w) if w == word)
    }
}

fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let mut found = vec![];
    let mut i = 0;
    while i < chars.len() {
        let rest = &chars[i..];
        let is_word = |c: &char| c.is_alphanumeric() || *c == '_';
        let taken = match rest {
            ['/', '/', ..] => count(rest, |c| *c != '\n'),
            ['/', '*', ..] => block_comment(rest),
            ['"', ..] => {
                let len = quoted(rest, '"');
                found.push(Text(rest[1..len - 1].iter().collect()));
                len
            }
            ['\'', '\\', ..] => quoted(rest, '\''),
            ['\'', _, '\'', ..] => 3,
            // A lifetime.
            ['\'', ..] => 1 + count(&rest[1..], is_word),
            [':', ':', ..] => {
                found.push(Token::Path);
                2
            }
            [c, ..] if c.is_whitespace() => 1,
            [c, ..] if is_word(c) => match raw_string(rest) {
                Some((text, len)) => {
                    found.push(Text(text));
                    len
                }
                None => {
                    let len = count(rest, is_word);
                    found.push(Word(rest[..len].iter().collect()));
                    len
                }
            },
            [c, ..] => {
                found.push(Mark(*c));
                1
            }
            [] => break,
        };
        i += taken;
    }
    found
}

fn count(chars: &[char], belongs: impl Fn(&char) -> bool) -> usize {
    chars.iter().take_while(|c| belongs(c)).count()
}

/// The length of a block comment, which may hold others.
fn block_comment(chars: &[char]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < chars.len() {
        match chars[i..] {
            ['/', '*', ..] => (depth, i) = (depth + 1, i + 2),
            ['*', '/', ..] => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

/// The length of a literal between two of `quote`, in which a backslash escapes.
fn quoted(chars: &[char], quote: char) -> usize {
    let mut i = 1;
    while i < chars.len() && chars[i] != quote {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The text and the length of a raw string, if one starts here.
fn raw_string(chars: &[char]) -> Option<(String, usize)> {
    let prefix = count(chars, |c| "brc".contains(*c));
    if !chars[..prefix].contains(&'r') {
        return None;
    }
    let hashes = count(&chars[prefix..], |c| *c == '#');
    let start = prefix + hashes + 1;
    if chars.get(start - 1) != Some(&'"') {
        return None;
    }
    let end = [&['"'][..], &vec!['#'; hashes]].concat();
    let len = chars[start..].windows(end.len()).position(|w| w == end)?;
    let text = chars[start..start + len].iter().collect();
    Some((text, start + len + end.len()))
}

/// Without the modules that are compiled for tests alone.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let cfg_test = ["cfg", "test"].map(str::to_string).map(Word);
    let mut kept = vec![];
    let mut i = 0;
    while i < tokens.len() {
        let is_attribute = matches!(
            &tokens[i..],
            [Mark('#'), Mark('['), a, Mark('('), b, Mark(')'), Mark(']'), ..]
                if *a == cfg_test[0] && *b == cfg_test[1]
        );
        if is_attribute {
            i = match tokens[i..]
                .iter()
                .position(|t| matches!(t, Mark('{' | ';')))
            {
                Some(open) => i + open + closing(&tokens[i + open..]) + 1,
                None => tokens.len(),
            };
        } else {
            kept.push(tokens[i].clone());
            i += 1;
        }
    }
    kept
}

/// The index of the brace that closes the one at index 0, or 0 where there is none.
fn closing(tokens: &[Token]) -> usize {
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate() {
        match token {
            Mark('{') => depth += 1,
            Mark('}') => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i;
        }
    }
    tokens.len() - 1
}

/// What is named at the root of the crate: the `x` of `crate::x`, of `crate::{x, y}` and of as many `super::` as lead there from
/// a file that is `depth` modules deep.
fn named_at_root(tokens: &[Token], depth: usize) -> Vec<String> {
    let mut found = vec![];
    for i in 0..tokens.len() {
        let continues = i > 0 && tokens[i - 1] == Token::Path;
        if continues {
            continue;
        }
        if tokens[i].is_word("crate") && tokens.get(i + 1) == Some(&Token::Path) {
            found.extend(heads(&tokens[i + 2..]));
        }
        let supers = tokens[i..]
            .chunks(2)
            .take_while(|pair| matches!(pair, [word, Token::Path] if word.is_word("super")))
            .count();
        if supers >= depth {
            found.extend(heads(&tokens[i + 2 * supers..]));
        }
    }
    found
}

/// The first names of a path or of a braced list of paths.
fn heads(tokens: &[Token]) -> Vec<String> {
    match tokens.first() {
        Some(Word(word)) => vec![word.clone()],
        Some(Mark('{')) => {
            let inside = &tokens[1..closing(tokens)];
            let mut depth = 0;
            let mut found = vec![];
            for (i, token) in inside.iter().enumerate() {
                match token {
                    Mark('{') => depth += 1,
                    Mark('}') => depth -= 1,
                    _ => {}
                }
                let starts = i == 0 || (depth == 0 && inside[i - 1] == Mark(','));
                if starts {
                    found.extend(heads(&inside[i..]));
                }
            }
            found
        }
        // A glob takes everything.
        other => vec![format!("{other:?}")],
    }
}

/// A source file of the library.
struct Source {
    /// From `src` on, with `/`; of the kernels, after `kernels/`.
    path: String,
    tokens: Vec<Token>,
}

impl Source {
    /// The folder or file directly under `src`, and how many modules deep the file is.
    fn room(&self) -> (&str, usize) {
        let parts: Vec<&str> = self.path.split('/').collect();
        let deep = match parts.last() {
            Some(&("mod.rs" | "lib.rs" | "main.rs")) => parts.len() - 1,
            _ => parts.len(),
        };
        (parts[0], deep)
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = sources_below(&root.join("src"), "");
    let kernels = sources_below(&root.join("crates/kernels/src"), "kernels/");
    library.into_iter().chain(kernels).collect()
}

/// The sources of a crate, as the room `room` or as all rooms.
fn sources_below(root: &Path, room: &str) -> Vec<Source> {
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
                    path: format!("{room}{}", parts.join("/")),
                    tokens: tokens(&text),
                });
            }
        }
    }
    assert!(
        found.iter().any(|s| s.path == format!("{room}lib.rs")),
        "no sources below {}",
        root.display()
    );
    found
}

/// What a room may name at the root of the crate, and the words that must not occur in it.
struct Rules {
    room: &'static str,
    may_name: &'static [&'static str],
    never: fn(&str) -> bool,
}

const RULES: [Rules; 5] = [
    Rules {
        room: "layers",
        may_name: &["layers", "ops", "Norm"],
        never: below_tensors,
    },
    Rules {
        room: "scaling",
        may_name: &["scaling", "ops", "checkpoint", "files"],
        never: below_tensors,
    },
    Rules {
        room: "files.rs",
        may_name: &[],
        never: |word| word.starts_with("candle"),
    },
    Rules {
        room: "ops",
        may_name: &["ops", "kernels"],
        never: |word| word == "rayon",
    },
    Rules {
        room: "kernels",
        may_name: &["kernels"],
        never: |word| word.starts_with("candle"),
    },
];

/// What only `ops` and `kernels` know of.
fn below_tensors(word: &str) -> bool {
    let storage = word.contains("storage") || word.contains("Storage");
    let op = word.starts_with("CustomOp") || word.starts_with("apply_op");
    storage || op || ["kernels", "rayon", "thread"].contains(&word)
}

fn broken_rules(source: &Source) -> Vec<String> {
    let (room, depth) = source.room();
    let mut broken = vec![];
    for rules in RULES.iter().filter(|r| r.room == room) {
        for name in named_at_root(&source.tokens, depth) {
            if !rules.may_name.contains(&name.as_str()) {
                broken.push(format!("{} names crate::{name}", source.path));
            }
        }
        for token in &source.tokens {
            if let Word(word) = token
                && (rules.never)(word)
            {
                broken.push(format!("{} says `{word}`", source.path));
            }
        }
    }
    for token in &source.tokens {
        let Word(word) = token else { continue };
        let unsafe_outside = word == "unsafe" && room != "kernels";
        // The backward of a fused op is an op without one, on detached tensors; there is no other.
        let drops_gradients = word.starts_with("apply_op")
            && word.ends_with("no_bwd")
            && source.path != "ops/fused.rs";
        // The root names the crate, and only ops calls it.
        let kernels_outside = word == "kernels" && !["kernels", "ops", "lib.rs"].contains(&room);
        if unsafe_outside || drops_gradients || kernels_outside {
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
    for room in ["layers", "ops", "scaling"] {
        let files = sources.iter().filter(|s| s.room().0 == room).count();
        assert!(files > 3, "{room} has {files} files");
    }
    assert!(sources.iter().any(makes_messages), "no {CHECKS}.rs");
}

/// Where messages for users are made: the file of this name and those in its folder.
const CHECKS: &str = "ops/check";

fn makes_messages(source: &Source) -> bool {
    let rest = source.path.strip_prefix(CHECKS);
    rest.is_some_and(|rest| rest.starts_with(['.', '/']))
}

/// Files and folders that make messages of their own, since they are about things that no layer knows: files, configurations
/// and functions of the caller's own.
const OWN_MESSAGES: [&str; 3] = ["checkpoint/", "norm/config.rs", "gradcheck/"];

/// The texts of the errors that a source makes, in code that is not for tests.
fn messages(source: &Source) -> Vec<String> {
    let tokens = without_tests(&source.tokens);
    let mut found = vec![];
    for i in 0..tokens.len() {
        let made = match &tokens[i..] {
            [word, Mark('!'), ..] if word.is_word("bail") => true,
            [error, Token::Path, Word(how), ..] if error.is_word("Error") => {
                ["msg", "Msg", "wrap", "debug"].contains(&how.as_str())
            }
            _ => false,
        };
        if made {
            let text = tokens[i..].iter().find_map(|t| match t {
                Text(text) => Some(text.clone()),
                _ => None,
            });
            found.push(text.unwrap_or_default());
        }
    }
    found
}

#[test]
fn messages_are_made_in_one_place() {
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
    let unclear = messages
        .into_iter()
        .filter(|m| !m.starts_with("{layer}: expected "));
    assert_none(unclear.collect());
}

/// What a caller passes wrong is an error, never a panic.
#[test]
fn nothing_panics() {
    let mut broken = vec![];
    for source in sources() {
        // Kernels check what their callers have checked before.
        let kernels = source.room().0 == "kernels";
        for window in without_tests(&source.tokens).windows(2) {
            let Word(word) = &window[0] else { continue };
            let panics = match &window[1] {
                Mark('!') => {
                    let always = ["panic", "todo", "unimplemented", "unreachable"];
                    always.contains(&word.as_str()) || (word.starts_with("assert") && !kernels)
                }
                Mark('(') => {
                    ["unwrap", "expect", "unwrap_err", "expect_err"].contains(&word.as_str())
                }
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
        }
    }

    fn words(text: &str) -> Vec<String> {
        let word = |t| match t {
            Word(w) => Some(w),
            _ => None,
        };
        tokens(text).into_iter().filter_map(word).collect()
    }

    #[test]
    fn comments_and_literals_are_no_words() {
        let text = r##"
            /// kernels
            //! kernels
            /* kernels /* kernels */ kernels */
            a("kernels \" kernels", 'k', '\'', '"', b"kernels", r"kernels", r#"kernels " kernels"#)
            fn b<'kernels>(c: &'kernels str) // kernels
            d
        "##;
        assert_eq!(words(text), ["a", "b", "fn", "b", "c", "str", "d"]);
    }

    #[test]
    fn texts_are_kept() {
        let texts: Vec<_> = tokens(r##"a("b\"c", r#"d"e"#)"##);
        assert!(texts.contains(&Text("b\\\"c".to_string())));
        assert!(texts.contains(&Text("d\"e".to_string())));
    }

    #[test]
    fn modules_for_tests_are_left_out() {
        let text = "a(); #[cfg(test)] mod tests { fn b() { c.unwrap() } } #[cfg(test)] use d; #[cfg(feature)] e();";
        let kept = without_tests(&tokens(text));
        for (word, is_kept) in [
            ("a", true),
            ("b", false),
            ("unwrap", false),
            ("d", false),
            ("e", true),
        ] {
            assert_eq!(kept.iter().any(|t| t.is_word(word)), is_kept, "{word}");
        }
    }

    #[test]
    fn what_is_named_at_the_root_is_found_however_it_is_written() {
        let named = |text: &str| named_at_root(&tokens(text), 2);
        assert_eq!(named("use crate::layers::params;"), ["layers"]);
        assert_eq!(named("let x = crate::norm::Norm;"), ["norm"]);
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
            ("layers/a.rs", "use crate::kernels::rows;"),
            ("layers/a.rs", "use super::super::kernels;"),
            ("layers/a.rs", "use crate::norm::NormConfig;"),
            ("layers/a.rs", "x.storage_and_layout();"),
            ("layers/a.rs", "candle_core::CpuStorage"),
            ("layers/a.rs", "rayon::join()"),
            ("layers/a.rs", "x.apply_op1(f)"),
            ("layers/a.rs", "unsafe { }"),
            ("norm/a.rs", "crate::kernels::rows()"),
            ("scaling/a.rs", "use crate::kernels::moments;"),
            ("scaling/a.rs", "use crate::layers::params;"),
            ("files.rs", "use crate::ops::check;"),
            ("files.rs", "use candle_core::Result;"),
            ("ops/a.rs", "use crate::{check, layers};"),
            ("ops/a.rs", "fn f(norm: &dyn crate::Norm) {}"),
            ("ops/a.rs", "unsafe fn a() {}"),
            ("ops/a.rs", "x.apply_op2_no_bwd(y, &op)"),
            ("kernels/a.rs", "use candle_core::Result;"),
            ("kernels/simd/a.rs", "use super::super::super::ops;"),
            ("kernels/a.rs", "use crate::ops::check;"),
            ("lib.rs", "unsafe { }"),
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
                "use crate::Norm; use crate::ops::{self, check}; use super::params; // unsafe kernels",
            ),
            ("layers/mod.rs", "use super::ops;"),
            (
                "ops/a.rs",
                "use super::check; use crate::kernels::rows; let norm = layers; \"crate::layers\"",
            ),
            ("kernels/a.rs", "use super::simd; unsafe { } /* candle */"),
            ("kernels/simd/a.rs", "use super::super::lanes;"),
            ("lib.rs", "mod kernels; mod layers;"),
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
