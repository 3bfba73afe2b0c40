//! The guide gives no advice without a figure, and no figure that its source does not have.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const GUIDE: &str = include_str!("../docs/guide.md");

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

/// `block` without the texts and targets of its links, and without code.
fn figures(block: &str) -> BTreeSet<String> {
    let without_code: String = block.split('`').step_by(2).collect::<Vec<_>>().join(" ");
    let mut words = String::new();
    let mut rest = without_code.as_str();
    while let Some(start) = rest.find('[') {
        words += &rest[..start];
        rest = &rest[start..];
        let end = rest.find(']').map_or(rest.len(), |end| end + 1);
        rest = &rest[end..];
        if rest.starts_with('(') {
            rest = &rest[rest.find(')').map_or(rest.len(), |end| end + 1)..];
        }
    }
    numbers(&(words + rest))
}

/// Runs of digits with at most one point in each: 5, 0.62.
fn numbers(text: &str) -> BTreeSet<String> {
    let digits = text.split(|c: char| !c.is_ascii_digit() && c != '.');
    let trimmed = digits.map(|number| number.trim_matches('.').to_string());
    trimmed.filter(|number| !number.is_empty()).collect()
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
    if anchor.is_empty() {
        return text;
    }
    let mut level = None;
    let mut lines = vec![];
    for line in text.lines() {
        let depth = line.chars().take_while(|c| *c == '#').count();
        match level {
            None if depth > 0 && slug(line) == anchor => level = Some(depth),
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
    let mut checked = 0;
    for block in blocks(&prose()) {
        let sources: Vec<&str> = links(&block)
            .into_iter()
            .filter(|t| is_evidence(t))
            .collect();
        if sources.is_empty() {
            continue;
        }
        let known: BTreeSet<String> = sources.iter().flat_map(|t| numbers(&section(t))).collect();
        for figure in figures(&block) {
            assert!(
                known.contains(&figure),
                "{figure} is in none of {sources:?}:\n{block}"
            );
            checked += 1;
        }
    }
    assert!(checked > 100, "only {checked} figures");
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
    for title in ["Choosing", "Options"] {
        let rows = chapter(title).lines().filter(|line| line.starts_with("| "));
        // The first row is the head, the second the rule below it.
        let rows: Vec<&str> = rows
            .filter(|row| !row.starts_with("| ---"))
            .skip(1)
            .collect();
        assert!(rows.len() > 5, "{title}: {} rows", rows.len());
        for row in rows {
            assert!(supported(row), "{title}: no figure in\n{row}");
        }
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
