//! The guide gives no advice without a figure, and no figure that its source does not have.

use std::fs;
use std::path::{Path, PathBuf};

const GUIDE: &str = include_str!("../../docs/guide.md");

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

/// The guide without its code.
fn prose() -> String {
    let parts = GUIDE.split("```");
    parts.step_by(2).collect::<Vec<_>>().join("\n")
}

/// What stands together: a row of a table, an item of a list, or a paragraph, each on one line.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks: Vec<String> = vec![];
    let mut open = false;
    for line in text.lines() {
        let item = ["| ", "- ", "#", "> "]
            .iter()
            .any(|start| line.starts_with(start));
        if open && !item && !line.trim().is_empty() {
            let last = blocks.last_mut().expect("an open block");
            *last += " ";
            *last += line.trim();
        } else if !line.trim().is_empty() {
            blocks.push(line.to_string());
        }
        open = !line.trim().is_empty();
    }
    blocks
}

/// The targets of the links in `block`, as they are written.
fn links(block: &str) -> Vec<&str> {
    let targets = block.split("](").skip(1);
    targets.filter_map(|rest| rest.split(')').next()).collect()
}

/// A block in order: the figures of its words, and what it links to. Texts of links, citations and
/// code are neither.
enum Part<'a> {
    Figure(String),
    Link(&'a str),
}

fn parts(block: &str) -> Vec<Part<'_>> {
    let mut parts = vec![];
    let words = |text: &str, parts: &mut Vec<Part>| {
        parts.extend(numbers(text).into_iter().map(Part::Figure));
    };
    for (i, piece) in block.split('`').enumerate() {
        if i % 2 == 1 {
            continue;
        }
        let mut rest = piece;
        while let Some(start) = rest.find('[') {
            words(&rest[..start], &mut parts);
            rest = &rest[start..];
            let end = rest.find(']').map_or(rest.len(), |end| end + 1);
            rest = &rest[end..];
            if rest.starts_with('(') {
                let end = rest.find(')').unwrap_or(rest.len());
                parts.push(Part::Link(&rest[1..end]));
                rest = &rest[(end + 1).min(rest.len())..];
            }
        }
        words(rest, &mut parts);
    }
    parts
}

fn figures(block: &str) -> Vec<String> {
    let figures = parts(block).into_iter().filter_map(|part| match part {
        Part::Figure(figure) => Some(figure),
        Part::Link(_) => None,
    });
    figures.collect()
}

/// Numbers with their signs and exponents: 5, 0.62, −1.40, 7.2e−7.
fn numbers(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let digit = |i: usize| chars.get(i).is_some_and(char::is_ascii_digit);
    let minus = |i: usize| matches!(chars.get(i), Some('−' | '-'));
    let mut numbers = vec![];
    let mut i = 0;
    while i < chars.len() {
        if !digit(i) {
            i += 1;
            continue;
        }
        let mut number = String::new();
        // A hyphen within a word or a range is no sign.
        if i > 0 && minus(i - 1) && (i < 2 || !chars[i - 2].is_alphanumeric()) {
            number.push('−');
        }
        while digit(i) || (chars.get(i) == Some(&'.') && digit(i + 1)) {
            number.push(chars[i]);
            i += 1;
        }
        let exponent = i + 1 + usize::from(minus(i + 1));
        if chars.get(i) == Some(&'e') && digit(exponent) {
            number.push('e');
            if minus(i + 1) {
                number.push('−');
            }
            i = exponent;
            while digit(i) {
                number.push(chars[i]);
                i += 1;
            }
        }
        numbers.push(number);
    }
    numbers
}

#[test]
fn numbers_keep_their_signs_and_exponents() {
    let text = "from −1.40 to 7.2e−7, at 1e-3, f32, 3×3, 50.8 %, −30.0. claim-12 (0.05).";
    let found = [
        "−1.40", "7.2e−7", "1e−3", "32", "3", "3", "50.8", "−30.0", "12", "0.05",
    ];
    assert_eq!(numbers(text), found);
    let block = "| 95 % `0.1` [4] of 3 ([claim 9](claims.md#claim-9)) and [5 more](x.md) |";
    assert_eq!(figures(block), ["95", "3"]);
}

/// The section of a page that a link leads to, with the name of the page for messages.
fn section(target: &str) -> String {
    let (page, anchor) = target.split_once('#').unwrap_or((target, ""));
    let path = if page.is_empty() {
        docs().join("guide.md")
    } else {
        docs().join(page)
    };
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{target}: {e}"));
    if target.ends_with(".rs") {
        // What a program says of itself, not what it computes with.
        let header = text.lines().take_while(|line| line.starts_with("//!"));
        return header.collect::<Vec<_>>().join("\n");
    }
    if anchor.is_empty() {
        return text;
    }
    let mut level = None;
    let mut lines = vec![];
    // An anchor of its own stands before its heading, which it does not depend on.
    let named = format!("<a id=\"{anchor}\"></a>");
    let mut next = false;
    for line in text.lines() {
        let depth = line.chars().take_while(|c| *c == '#').count();
        next |= line == named;
        match level {
            None if depth > 0 && (next || slug(line) == anchor) => level = Some(depth),
            Some(level) if depth > 0 && depth <= level => break,
            Some(_) => lines.push(line),
            None => {}
        }
    }
    assert!(
        level.is_some(),
        "docs/guide.md links to {target}: no such heading"
    );
    lines.join("\n")
}

/// The anchor of a heading, as GitHub forms it.
fn slug(heading: &str) -> String {
    let title = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = title
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-');
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// A measurement: a claim, an example, or a table of times.
fn is_evidence(target: &str) -> bool {
    let pages = [
        "claims.md#claim-",
        "../examples/",
        "performance.md",
        "scaling.md",
    ];
    pages.iter().any(|page| target.starts_with(page))
}

#[test]
fn every_link_leads_somewhere() {
    for target in prose_links() {
        section(&target);
    }
}

fn prose_links() -> Vec<String> {
    let text = prose();
    let all = links(&text).into_iter().map(str::to_string);
    all.filter(|target| !target.starts_with("http")).collect()
}

#[test]
fn every_figure_is_in_what_is_linked_beside_it() {
    let (mut checked, mut missing) = (0, vec![]);
    for block in blocks(&prose()) {
        let parts = parts(&block);
        let source = |part: &Part| match part {
            Part::Link(target) if is_evidence(target) => Some(numbers(&section(target))),
            _ => None,
        };
        let sources: Vec<Option<Vec<String>>> = parts.iter().map(source).collect();
        for (i, part) in parts.iter().enumerate() {
            let Part::Figure(figure) = part else { continue };
            // The link that follows, or the one before.
            let after = sources[i..].iter().flatten().next();
            let before = sources[..i].iter().flatten().next_back();
            let beside: Vec<_> = after.into_iter().chain(before).collect();
            if !beside.is_empty() {
                let known = beside.iter().any(|numbers| numbers.contains(figure));
                if !known {
                    missing.push(format!("{figure} in {block}"));
                }
                checked += 1;
            }
        }
    }
    let missing = missing.join("\n");
    assert!(
        missing.is_empty(),
        "not in what is linked beside it:\n{missing}"
    );
    assert!(checked > 150, "only {checked} figures");
}

#[test]
fn every_row_of_the_table_and_every_mistake_has_its_figure() {
    let text = prose();
    let chapter = |title: &str| {
        let from = text.find(&format!("\n## {title}\n")).expect(title);
        let rest = &text[from + 4..];
        &rest[..rest.find("\n## ").unwrap_or(rest.len())]
    };
    let supported = |part: &str| {
        let evidence = |block: &String| links(block).iter().any(|t| is_evidence(t));
        blocks(part)
            .iter()
            .any(|block| evidence(block) && !figures(block).is_empty())
    };
    let rows = |title: &str| -> Vec<&str> {
        let rows = chapter(title).lines().filter(|line| line.starts_with("| "));
        // The first row is the head, the second the rule below it.
        let rows = rows.filter(|row| !row.starts_with("| ---")).skip(1);
        rows.collect()
    };
    assert!(rows("Options").len() > 5, "{} rows", rows("Options").len());
    for row in rows("Options") {
        assert!(supported(row), "no figure in\n{row}");
    }
    // The figures of a row of this table are in the section that its last column leads to.
    assert!(
        rows("Choosing").len() > 20,
        "{} rows",
        rows("Choosing").len()
    );
    let mut led = vec![];
    for row in rows("Choosing") {
        let last = row.trim_end_matches('|').split('|').next_back();
        let targets = links(last.unwrap_or(""));
        assert!(!targets.is_empty(), "no figures for\n{row}");
        for target in targets {
            assert!(target.starts_with('#'), "{target} in\n{row}");
            assert!(
                supported(&section(target)),
                "no figure in {target} of\n{row}"
            );
            led.push(target);
        }
    }
    let sections: Vec<&str> = chapter("Figures").split("\n### ").skip(1).collect();
    assert!(sections.len() >= 15, "{} sections", sections.len());
    for figures in sections {
        let heading = figures.lines().next().unwrap_or("");
        assert!(supported(figures), "no figure in {heading}");
        let anchor = format!("#{}", slug(heading));
        assert!(led.contains(&anchor.as_str()), "no row leads to {heading}");
    }
    let mistakes: Vec<&str> = chapter("Mistakes").split("\n### ").skip(1).collect();
    assert!(mistakes.len() >= 12, "{} mistakes", mistakes.len());
    for mistake in mistakes {
        assert!(supported(mistake), "no figure for\n{mistake}");
        for part in ["*Symptom", "*Remed"] {
            assert!(mistake.contains(part), "{part} is missing in\n{mistake}");
        }
    }
}
