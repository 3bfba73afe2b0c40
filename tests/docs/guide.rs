//! The guide gives no advice without a figure, and no figure that its source does not have.
//!
//! `figures.tsv` says of each figure beside a link where it stands in what is linked: the row and
//! the column of a table, or the beginning of a paragraph. After a change of the sources or of the
//! guide:
//!
//! ```sh
//! CANDLE_NORM_GUIDE=write cargo test --test docs guide     # figures of the sources into the guide
//! CANDLE_NORM_GUIDE=anchor cargo test --test docs guide    # places of figures that have none
//! ```
//!
//! Read what the second has chosen: another cell may hold the same number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

const GUIDE: &str = include_str!("../../docs/guide.md");

fn docs() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("docs")
}

/// The guide without its code.
fn prose() -> String {
    let parts = GUIDE.split("```");
    parts.step_by(2).collect::<Vec<_>>().join("\n")
}

/// A unit of text: a row of a table, an item of a list, or a paragraph, each on one line.
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

/// Contents of a block: the figures of its words, and its links. Texts of links, citations and
/// code are neither.
enum Part<'a> {
    Figure(String),
    Link(&'a str),
}

/// The parts of a block in order, with the bytes that they take.
fn parts(block: &str) -> Vec<(Range<usize>, Part<'_>)> {
    let mut parts = vec![];
    let figures = |text: Range<usize>, parts: &mut Vec<_>| {
        for (range, number) in number_ranges(&block[text.clone()]) {
            let range = text.start + range.start..text.start + range.end;
            parts.push((range, Part::Figure(number)));
        }
    };
    let mut start = 0;
    for (i, piece) in block.split('`').enumerate() {
        let end = start + piece.len();
        let mut from = start;
        while i % 2 == 0 && from < end {
            let Some(open) = block[from..end].find('[').map(|at| from + at) else {
                figures(from..end, &mut parts);
                break;
            };
            figures(from..open, &mut parts);
            from = block[open..end].find(']').map_or(end, |at| open + at + 1);
            if block[from..end].starts_with('(') {
                let close = block[from..end].find(')').map_or(end, |at| from + at);
                parts.push((from + 1..close, Part::Link(&block[from + 1..close])));
                from = (close + 1).min(end);
            }
        }
        start = end + 1;
    }
    parts
}

fn figures(block: &str) -> Vec<String> {
    let figures = parts(block).into_iter().filter_map(|(_, part)| match part {
        Part::Figure(figure) => Some(figure),
        Part::Link(_) => None,
    });
    figures.collect()
}

/// Numbers with their signs and exponents: 5, 0.62, −1.40, 7.2e−7.
fn numbers(text: &str) -> Vec<String> {
    let found = number_ranges(text).into_iter();
    found.map(|(_, number)| number).collect()
}

/// [`numbers`] with the bytes that they take.
fn number_ranges(text: &str) -> Vec<(Range<usize>, String)> {
    let chars: Vec<(usize, char)> = text.char_indices().collect();
    let is = |i: usize, test: fn(char) -> bool| chars.get(i).is_some_and(|(_, c)| test(*c));
    let digit = |i: usize| is(i, |c| c.is_ascii_digit());
    let minus = |i: usize| is(i, |c| matches!(c, '−' | '-'));
    let mut numbers = vec![];
    let mut i = 0;
    while i < chars.len() {
        if !digit(i) {
            i += 1;
            continue;
        }
        // A hyphen within a word or a range is no sign.
        let signed = i > 0 && minus(i - 1) && (i < 2 || !is(i - 2, char::is_alphanumeric));
        let start = i - usize::from(signed);
        while digit(i) || (is(i, |c| c == '.') && digit(i + 1)) {
            i += 1;
        }
        let exponent = i + 1 + usize::from(minus(i + 1));
        if is(i, |c| c == 'e') && digit(exponent) {
            i = exponent;
            while digit(i) {
                i += 1;
            }
        }
        let end = chars.get(i).map_or(text.len(), |(at, _)| *at);
        let range = chars[start].0..end;
        let number = text[range.clone()].replace('-', "−");
        numbers.push((range, number));
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

/// A number of a source, by where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    /// Page and section, as the guide links to them.
    target: String,
    /// Cells of a table that lead to the row, or the first words of a paragraph.
    row: String,
    /// Title of a column; none of a paragraph.
    column: String,
    /// Position among the numbers of the cell or paragraph.
    nth: usize,
}

/// The first words of a paragraph, without its marks.
fn beginning(paragraph: &str) -> String {
    let words = paragraph.split_whitespace();
    let plain = words.map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()));
    let named = plain.filter(|word| !word.is_empty() && numbers(word).is_empty());
    named.take(6).collect::<Vec<_>>().join(" ")
}

/// A number of a source.
struct Known {
    place: Place,
    number: String,
    /// Words that say what it is: those of its row and column, or those around it in a paragraph.
    words: HashSet<String>,
}

/// The words of a text, in lower case.
fn words(text: &str) -> Vec<String> {
    let words = text.split(|c: char| !c.is_alphanumeric());
    let words = words.filter(|word| !word.is_empty());
    words.map(str::to_lowercase).collect()
}

/// The words nearest to what stands at `range`, before and after it in turn.
fn words_around(text: &str, range: &Range<usize>) -> Vec<String> {
    let (mut before, after) = (words(&text[..range.start]), words(&text[range.end..]));
    before.reverse();
    let count = before.len().max(after.len());
    let pairs = (0..count).flat_map(|i| before.get(i).into_iter().chain(after.get(i)));
    pairs.cloned().collect()
}

/// The same names, with a number after those that came before.
fn told_apart(names: Vec<String>) -> Vec<String> {
    let mut counts = HashMap::<String, usize>::new();
    let told = |name: String| {
        let count = counts.entry(name.clone()).or_default();
        *count += 1;
        match *count {
            1 => name,
            count => format!("{name} ({count})"),
        }
    };
    names.into_iter().map(told).collect()
}

/// Every number of a section with its place, in order.
fn places(target: &str) -> Vec<Known> {
    let text = section(target).replace("//!", "");
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let text = lines.join("\n");
    let (mut found, mut rows) = (vec![], HashMap::<String, usize>::new());
    let mut titles: Option<Vec<String>> = None;
    for block in blocks(&text) {
        let cells: Vec<String> = match block.strip_prefix("| ") {
            Some(row) => row.split('|').map(|cell| cell.trim().to_string()).collect(),
            None => vec![],
        };
        if cells.is_empty() {
            titles = None;
        } else if titles.is_none() {
            titles = Some(told_apart(cells));
            continue;
        }
        // The cells before the result say what it is of.
        let results = ["median", "range"];
        let leading = match &titles {
            Some(titles) => (titles
                .iter()
                .position(|title| results.contains(&title.as_str())))
            .or_else(|| cells.iter().position(|cell| !numbers(cell).is_empty()))
            .unwrap_or(1),
            None => 0,
        };
        let mut row = match cells.is_empty() {
            true => beginning(&block),
            false => cells[..leading.clamp(1, cells.len())].join(" / "),
        };
        let before = rows.entry(row.clone()).or_default();
        *before += 1;
        if *before > 1 {
            row = format!("{row} ({before})");
        }
        let parts = match &titles {
            Some(titles) => titles.iter().cloned().zip(cells).collect(),
            None => vec![(String::new(), block)],
        };
        for (column, text) in parts {
            for (nth, (range, number)) in number_ranges(&text).into_iter().enumerate() {
                let near = match column.is_empty() {
                    true => words_around(&text, &range).into_iter().take(12).collect(),
                    false => words(&format!("{row} {column}")),
                };
                let place = Place {
                    target: target.to_string(),
                    row: row.clone(),
                    column: column.clone(),
                    nth,
                };
                found.push(Known {
                    place,
                    number,
                    words: near.into_iter().collect(),
                });
            }
        }
    }
    found
}

/// A figure of the guide that has evidence beside it.
struct Cited {
    /// Anchor of the heading that it stands below.
    heading: String,
    /// Position among the cited figures below the heading.
    nth: usize,
    figure: String,
    /// Where it stands in the guide.
    range: Range<usize>,
    /// The words around it, the nearest first.
    words: Vec<String>,
    /// The link that follows, and the one before.
    beside: Vec<String>,
}

impl Cited {
    /// Its name in `figures.tsv`.
    fn key(&self) -> (String, usize) {
        (self.heading.clone(), self.nth)
    }

    /// The place that fits the words around the figure best, of those that hold it; one that
    /// another figure has only where there is no other.
    fn likely(&self, known: &HashMap<String, Vec<Known>>, taken: &[&Place]) -> Option<Place> {
        let score = |known: &Known| -> f64 {
            let near = self.words.iter().take(30).enumerate();
            let hits = near.filter(|(_, word)| known.words.contains(*word));
            let score: f64 = hits.map(|(far, _)| 1. / (2. + far as f64)).sum();
            let others = taken.iter().filter(|place| **place == &known.place).count();
            score - others as f64
        };
        let mut best: Option<(f64, &Place)> = None;
        for known in self.beside.iter().flat_map(|target| &known[target]) {
            let score = score(known);
            if known.number == self.figure && best.is_none_or(|(most, _)| score > most) {
                best = Some((score, &known.place));
            }
        }
        best.map(|(_, place)| place.clone())
    }
}

/// Ranges of the blocks of the guide, with the anchor of the heading above each; code is none.
fn guide_blocks() -> Vec<(String, Range<usize>)> {
    let (mut found, mut heading) = (Vec::<(String, Range<usize>)>::new(), String::new());
    let (mut start, mut open, mut code) = (0, false, false);
    for line in GUIDE.split_inclusive('\n') {
        let range = start..start + line.len();
        start = range.end;
        let fence = line.starts_with("```");
        code ^= fence;
        if code || fence || line.trim().is_empty() {
            open = false;
            continue;
        }
        if line.starts_with('#') {
            heading = slug(line);
        }
        let begins = ["| ", "- ", "#", "> "].iter().any(|s| line.starts_with(s));
        match found.last_mut().filter(|_| open && !begins) {
            Some((_, block)) => block.end = range.end,
            None => found.push((heading.clone(), range)),
        }
        open = true;
    }
    found
}

fn cited() -> Vec<Cited> {
    let mut found = vec![];
    let mut counts = HashMap::<String, usize>::new();
    for (heading, range) in guide_blocks() {
        let block = &GUIDE[range.clone()];
        let parts = parts(block);
        let evidence = |(_, part): &(Range<usize>, Part)| match part {
            Part::Link(target) if is_evidence(target) => Some(target.to_string()),
            _ => None,
        };
        for (i, (at, part)) in parts.iter().enumerate() {
            let Part::Figure(figure) = part else { continue };
            // The link that follows, or the one before.
            let after = parts[i..].iter().find_map(evidence);
            let before = parts[..i].iter().rev().find_map(evidence);
            let beside: Vec<_> = after.into_iter().chain(before).collect();
            if beside.is_empty() {
                continue;
            }
            let nth = counts.entry(heading.clone()).or_default();
            found.push(Cited {
                heading: heading.clone(),
                nth: *nth,
                figure: figure.clone(),
                range: range.start + at.start..range.start + at.end,
                words: words_around(block, at),
                beside,
            });
            *nth += 1;
        }
    }
    found
}

fn figures_file() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).join("tests/docs/figures.tsv")
}

/// Where a figure of the guide comes from.
#[derive(Debug)]
struct Source {
    place: Place,
    /// A loss may be given as a number without its sign: `|2|` in the last column.
    unsigned: bool,
}

impl Source {
    /// The figure that a number of this place makes in the guide.
    fn figure<'a>(&self, number: &'a str) -> &'a str {
        match self.unsigned {
            true => number.trim_start_matches('−'),
            false => number,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place {
            target,
            row,
            column,
            nth,
        } = &self.place;
        let sign = if self.unsigned { "|" } else { "" };
        write!(f, "{target}\t{row}\t{column}\t{sign}{nth}{sign}")
    }
}

/// The lines of `figures.tsv`, by heading and number of the figure.
fn known_sources() -> BTreeMap<(String, usize), Source> {
    let text = fs::read_to_string(figures_file()).unwrap_or_default();
    let entry = |line: &str| {
        let columns: Vec<&str> = line.split('\t').collect();
        let [heading, count, target, row, column, nth] = columns[..] else {
            panic!("{line}: not six columns")
        };
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{line}"));
        let place = Place {
            target: target.to_string(),
            row: row.to_string(),
            column: column.to_string(),
            nth: number(nth.trim_matches('|')),
        };
        let unsigned = nth.starts_with('|');
        let source = Source { place, unsigned };
        ((heading.to_string(), number(count)), source)
    };
    text.lines().map(entry).collect()
}

#[test]
fn every_figure_is_in_what_is_linked_beside_it() {
    let cited = cited();
    assert!(cited.len() > 150, "only {} figures", cited.len());
    let targets: HashSet<&String> = cited.iter().flat_map(|figure| &figure.beside).collect();
    let sources: HashMap<String, Vec<Known>> = (targets.into_iter())
        .map(|target| (target.clone(), places(target)))
        .collect();
    let numbers: HashMap<&Place, &String> = (sources.values().flatten())
        .map(|known| (&known.place, &known.number))
        .collect();
    let count: usize = sources.values().map(Vec::len).sum();
    assert_eq!(numbers.len(), count, "two numbers in one place");
    let mut known = known_sources();
    let mode = std::env::var("CANDLE_NORM_GUIDE").unwrap_or_default();
    let (mut guide, mut wrong) = (GUIDE.to_string(), vec![]);
    // From the end, so that what is written leaves the places before it where they are.
    for figure in cited.iter().rev() {
        let source = known.get(&figure.key());
        let source = source.filter(|source| figure.beside.contains(&source.place.target));
        let number = source.and_then(|source| {
            let number = numbers.get(&source.place)?;
            Some(source.figure(number))
        });
        match (number, mode.as_str()) {
            (Some(number), _) if number == figure.figure => {}
            (Some(number), "write") => guide.replace_range(figure.range.clone(), number),
            (_, "anchor") => {
                let others = known
                    .iter()
                    .filter(|((heading, _), _)| *heading == figure.heading);
                let taken: Vec<&Place> = others.map(|(_, source)| &source.place).collect();
                match figure.likely(&sources, &taken) {
                    Some(place) => {
                        let unsigned = false;
                        known.insert(figure.key(), Source { place, unsigned });
                    }
                    None => wrong.push(format!("{}: {} is nowhere", figure.heading, figure.figure)),
                }
            }
            (number, _) => wrong.push(format!(
                "{}: {} should be {number:?}, by {source:?}",
                figure.heading, figure.figure
            )),
        }
    }
    if mode == "anchor" {
        let keys: HashSet<_> = cited.iter().map(Cited::key).collect();
        known.retain(|key, _| keys.contains(key));
        let line = |((heading, nth), source): (&(String, usize), &Source)| {
            format!("{heading}\t{nth}\t{source}\n")
        };
        let text: String = known.iter().map(line).collect();
        fs::write(figures_file(), text).expect("a file that can be written");
    }
    if guide != GUIDE {
        fs::write(docs().join("guide.md"), guide).expect("a file that can be written");
    }
    assert_eq!(
        known.len(),
        cited.len(),
        "figures.tsv has other figures: anchor them"
    );
    wrong.reverse();
    let wrong = wrong.join("\n");
    assert!(wrong.is_empty(), "not what is linked beside it:\n{wrong}");
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
