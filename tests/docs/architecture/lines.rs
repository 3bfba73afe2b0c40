//! The length of lines, also of those that rustfmt leaves as they are.

use super::assert_none;
use super::sources::{root, rust_files, tokens};

/// The longest line, in characters.
const COLUMNS: usize = 100;

/// Folders whose files keep to it.
const FOLDERS: [&str; 4] = ["src", "crates", "tests", "examples"];

/// The numbers of the lines that are too long. A row of a table in documentation cannot be wrapped,
/// and a line of a raw string that has several is a part of its text.
fn long_lines(text: &str) -> Vec<usize> {
    let is_long = |line: &str| line.chars().count() > COLUMNS;
    if !text.lines().any(is_long) {
        return vec![];
    }
    let tokens = tokens(text);
    let raw = || tokens.iter().filter(|token| token.starts_with("r#"));
    let is_text = |line: &str| raw().any(|token| token.lines().skip(1).any(|of| of == line));
    let is_row = |line: &str| {
        let line = line.trim_start();
        line.starts_with("/// |") || line.starts_with("//! |")
    };
    let lines = text.lines().zip(1..);
    lines
        .filter(|(line, _)| is_long(line) && !is_row(line) && !is_text(line))
        .map(|(_, number)| number)
        .collect()
}

#[test]
fn lines_end_at_100_columns() {
    let mut broken = vec![];
    for folder in FOLDERS {
        let files = rust_files(&root().join(folder));
        assert!(files.len() > 20, "{folder} has {} files", files.len());
        for (path, text) in files {
            let lines = long_lines(&text).into_iter();
            broken.extend(lines.map(|line| format!("{folder}/{path}:{line}")));
        }
    }
    assert_none(broken);
}

#[test]
fn long_lines_are_found_but_for_rows_and_texts() {
    let long = "x".repeat(COLUMNS);
    for (text, lines) in [
        (format!("// {long}\n"), vec![1]),
        (format!("fn a() {{}}\n/// {long}\nfn b() {{}}\n"), vec![2]),
        (format!("const A: &str = \"{long}\";\n"), vec![1]),
        (format!("const A: &str = r#\"{long}\"#;\n"), vec![1]),
        (format!("const A: &str = \"\n{long} \\\n\";\n"), vec![2]),
        (format!("const A: &str = r#\"\n{long} \n\"#;\n"), vec![]),
        (format!("/// | {long} |\nfn a() {{}}\n"), vec![]),
        (format!("//! | {long} |\n"), vec![]),
        (format!("fn a() {{}}\n// {}\n", "é".repeat(97)), vec![]),
    ] {
        assert_eq!(long_lines(&text), lines, "{text}");
    }
}
