//! Sources as tokens, and the names at the root of the crate that they use.

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::CRATES;

/// Identifiers, literals and single marks of a source. Comments are none, but for documentation,
/// which is an attribute with a literal.
pub(super) fn tokens(source: &str) -> Vec<String> {
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
pub(super) fn text_of(token: &str) -> Option<&str> {
    let (start, end) = (token.find('"')?, token.rfind('"')?);
    let is_string = token[..start].chars().all(|c| "brc#".contains(c));
    (is_string && start < end).then(|| &token[start + 1..end])
}

pub(super) fn starts_with(tokens: &[String], start: &[&str]) -> bool {
    tokens.len() >= start.len() && tokens.iter().zip(start).all(|(a, b)| a == b)
}

/// Without the modules that are compiled for tests alone.
pub(super) fn without_tests(tokens: &[String]) -> Vec<String> {
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
pub(super) fn named_at_root(tokens: &[String], depth: usize) -> Vec<String> {
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
pub(super) struct Source {
    /// From `src` of the library on, or from the folder of all crates on, with `/`.
    pub(super) path: String,
    pub(super) tokens: Vec<String>,
}

impl Source {
    /// The folder or file directly under `src`, or the crate, and how many modules deep the file
    /// is.
    pub(super) fn module(&self) -> (&str, usize) {
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
    pub(super) fn of_crate(&self) -> Option<(&str, &str)> {
        self.path.strip_prefix("crates/")?.split_once("/src/")
    }
}

pub(super) fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

pub(super) fn sources() -> Vec<Source> {
    let mut found = sources_below(&root().join("src"), "");
    for of in CRATES.iter().filter(|of| of.is_read) {
        let within = format!("crates/{}/src", of.folder);
        found.extend(sources_below(&root().join(&within), &format!("{within}/")));
    }
    found
}

/// The sources in a folder and its folders. `prefix` stands before the paths from there on.
fn sources_below(root: &Path, prefix: &str) -> Vec<Source> {
    let files = rust_files(root).into_iter();
    let found: Vec<Source> = files
        .map(|(path, text)| Source {
            path: format!("{prefix}{path}"),
            tokens: tokens(&text),
        })
        .collect();
    assert!(
        found.iter().any(|s| s.path == format!("{prefix}lib.rs")),
        "no sources below {}",
        root.display()
    );
    found
}

/// The files of Rust in a folder and its folders: the path from there on, with `/`, and the text.
pub(super) fn rust_files(root: &Path) -> Vec<(String, String)> {
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
                found.push((parts.join("/"), text));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
