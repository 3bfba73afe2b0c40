//! The README shows the results of the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::Result;

#[allow(dead_code)]
#[path = "../../examples/replace_candle_nn.rs"]
mod replace;

const README: &str = include_str!("../../README.md");
const GUIDE: &str = include_str!("../../docs/guide.md");

fn root() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The cells of the rows of a table after the line that starts with `head`.
fn rows<'a>(text: &'a str, head: &str) -> Vec<Vec<&'a str>> {
    let lines = text.lines().skip_while(|line| !line.starts_with(head));
    let table = lines.take_while(|line| line.starts_with("| "));
    let cells = |line: &'a str| line.trim_matches('|').split(" | ").map(str::trim);
    table.skip(2).map(|line| cells(line).collect()).collect()
}

/// The number that a cell starts with; none where there is no gradient.
fn number(cell: &str) -> Option<f32> {
    let word = cell.split_whitespace().next()?;
    (cell != "**none**").then(|| word.parse().unwrap_or_else(|e| panic!("{cell}: {e}")))
}

#[test]
fn the_table_of_gradients_is_that_of_the_example() -> Result<()> {
    let head = "| norm of the gradient of";
    let outcome = [
        replace::train(replace::before)?,
        replace::train(replace::after)?,
    ];
    let table = replace::table(&outcome[0], &outcome[1]);
    let (shown, found) = (rows(README, head), rows(&table, head));
    assert_eq!(shown.len(), found.len(), "expected\n{table}");
    assert!(shown.len() > 8);
    let mut absent = 0;
    for (shown, found) in shown.iter().zip(&found) {
        assert_eq!(shown[0], found[0]);
        // Products of matrices differ from processor to processor in their last bits, which 400
        // steps of training amplify.
        let tolerance = if shown[0].starts_with('`') { 0.002 } else { 2. };
        for column in 1..3 {
            match (number(shown[column]), number(found[column])) {
                (None, None) => absent += 1,
                (Some(a), Some(b)) if (a - b).abs() <= tolerance => {}
                _ => panic!("README: {shown:?}, computed: {found:?}"),
            }
        }
        assert!(number(found[2]).is_some(), "{found:?}");
    }
    assert!(absent >= 7, "candle-nn drops {absent} gradients");
    Ok(())
}

#[test]
fn gradients_beside_a_residual_are_as_wrong_as_the_readme_says() -> Result<()> {
    let wrong = replace::error(replace::before_residual, replace::after_residual)?;
    let said = README.split("wrong: here by up to ").nth(1);
    let said = said.and_then(|rest| rest.split(' ').next()?.parse().ok());
    let said: f32 = said.expect("a number");
    assert!(
        (said - wrong).abs() < 1.,
        "README: {said}, computed: {wrong}"
    );
    let right = replace::error(replace::after_residual, replace::after_residual)?;
    assert_eq!(right, 0.);
    Ok(())
}

/// The lines of advice that begin with "- **", without their links.
fn advice(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| line.starts_with("- **"));
    let plain = |line: &str| {
        let mut parts = line.split("](");
        let first = parts.next().unwrap_or("").to_string();
        let rest = parts.map(|part| part.split_once(')').map_or(part, |(_, rest)| rest));
        rest.fold(first, |text, part| text + part).replace('[', "")
    };
    lines.map(plain).collect()
}

#[test]
fn readme_and_guide_give_the_same_eight_lines_of_advice() {
    let guide = advice(GUIDE.split("\n## ").next().unwrap_or(""));
    assert_eq!(guide.len(), 8, "{guide:#?}");
    let section = README.split("\n## Which norm?\n").nth(1).unwrap_or("");
    assert_eq!(advice(section.split("\n## ").next().unwrap_or("")), guide);
    for line in README.lines().filter(|line| line.starts_with("- **")) {
        assert!(
            line.contains("](docs/guide.md#"),
            "no link to the guide: {line}"
        );
    }
}

/// The sources in a folder, as one text.
fn sources(folder: &Path) -> String {
    let files = fs::read_dir(folder).expect("a folder").flatten();
    files
        .map(|file| fs::read_to_string(file.path()).unwrap_or_default())
        .collect()
}

/// The examples by their names, each with its sources.
fn examples() -> Vec<(String, String)> {
    let mut found = vec![];
    for entry in fs::read_dir(root().join("examples")).expect("the examples") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_stem()
            .and_then(|s| s.to_str())
            .unwrap_or("")
            .to_string();
        if path.extension().is_some_and(|e| e == "rs") {
            found.push((name, fs::read_to_string(&path).unwrap_or_default()));
        } else if path.join("main.rs").exists() {
            found.push((name, sources(&path)));
        }
    }
    found
}

#[test]
fn the_readme_lists_every_example() {
    let listed: BTreeSet<String> = rows(README, "| example |")
        .iter()
        .map(|row| row[0].trim_matches('`').to_string())
        .collect();
    let there: BTreeSet<String> = examples().into_iter().map(|(name, _)| name).collect();
    assert_eq!(listed, there);
}

#[test]
fn every_quick_run_says_that_its_figures_are_rough() {
    let quick: Vec<_> = examples()
        .into_iter()
        .chain([(
            "claims".to_string(),
            sources(&root().join("crates/lab/src")),
        )])
        .filter(|(_, text)| text.contains("quick: bool,"))
        .collect();
    assert!(quick.len() > 10, "{}", quick.len());
    for (name, text) in quick {
        let warns = ["common::run(options.quick,", "warn_if_quick(options.quick)"];
        assert!(warns.iter().any(|call| text.contains(call)), "{name}");
    }
}

#[test]
fn the_readme_lists_every_cargo_feature() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    let section = manifest.split("[features]\n").nth(1).unwrap_or("");
    let section = section.split("\n[").next().unwrap_or("");
    let features: BTreeSet<&str> = section
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(" = ").map(|(name, _)| name))
        .filter(|name| *name != "default")
        .collect();
    let rows = rows(README, "| cargo feature |");
    let listed: BTreeSet<&str> = rows
        .iter()
        .flat_map(|row| row[0].split(", "))
        .map(|name| name.trim_matches('`'))
        .collect();
    assert_eq!(listed, features);
}

/// Links of every page of the documentation to files and headings that there are.
#[test]
fn links_between_the_pages_lead_somewhere() {
    let docs = root().join("docs");
    let pages = fs::read_dir(&docs).expect("the pages").flatten();
    let pages = pages.map(|entry| entry.path());
    let pages = pages.filter(|path| path.extension().is_some_and(|e| e == "md"));
    let mut checked = 0;
    for page in pages.chain([root().join("README.md")]) {
        let text = fs::read_to_string(&page).expect("a page");
        let prose: String = text.split("```").step_by(2).collect();
        for target in prose
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            if target.starts_with("http") {
                continue;
            }
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => page.clone(),
                file => page.parent().expect("a folder").join(file),
            };
            assert!(path.exists(), "{}: {target}", page.display());
            if !anchor.is_empty() {
                let text = fs::read_to_string(&path).expect("a page");
                let found = anchors(&text).contains(&anchor.replace('\n', " "));
                assert!(found, "{}: {target}: no such heading", page.display());
            }
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked} links");
}

/// Targets of links to a page: its headings as GitHub and rustdoc name them, and its anchors.
fn anchors(text: &str) -> BTreeSet<String> {
    let slug = |heading: &str| {
        let title = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = title
            .chars()
            .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    let named = text.split("<a id=\"").skip(1);
    let named = named.filter_map(|rest| rest.split('"').next().map(str::to_string));
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings.map(slug).chain(named).collect()
}
