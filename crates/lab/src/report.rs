//! The output: a page in Markdown with a figure for each claim, and the same as one HTML file.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::claim::{Claim, Data, place, show, steps};
use crate::common::ROUGH;
use crate::figure;
use crate::lab::Measure;
use crate::plot::escape;

/// A claim and what was measured of it.
pub(crate) struct Entry {
    pub(crate) claim: Claim,
    pub(crate) data: Data,
}

const TITLE: &str = "Claims about normalization, measured";
/// Claims up to this one are met in articles and tutorials, those beyond in `docs/guide.md`.
const OF_TUTORIALS: u32 = 24;

fn introduction(quick: bool, [seeds, tuning]: [u64; 2]) -> String {
    let rough = format!("**{ROUGH}**\n\n");
    format!(
        "{}Articles and tutorials make many claims about normalization, and so does [the \
         guide](guide.md) of this crate. Each row is one claim, with an experiment on real data \
         and a verdict. The verdict is computed from the measurements, by the rule in the section \
         of the claim.\n\n\
         Figures are medians over {seeds} seeds; the tables have the range. Where a network is \
         trained and its section neither names nor varies the learning rate, each variant is \
         trained with the best of the same few rates, chosen by the median result of {tuning} \
         further seeds on a part of the training data that is held out for it. Where variants are \
         compared seed by seed, both have the same initial weights and see the same batches. The \
         networks are small, and so are the data (`examples/data`): a verdict holds here, and not \
         everywhere.\n",
        if quick { rough } else { String::new() }
    )
}

fn command(id: u32, quick: bool) -> String {
    let quick = if quick { " --quick" } else { "" };
    format!("cargo run --release -p candle-norm-lab -- --claim {id}{quick}")
}

/// The rows of one table of verdicts: those of tutorials come first, then those of the guide.
fn tables(entries: &[Entry]) -> impl Iterator<Item = (&'static str, &[Entry])> {
    let said = entries.partition_point(|entry| entry.claim.id <= OF_TUTORIALS);
    let (tutorials, guide) = entries.split_at(said);
    [
        ("Claims of articles and tutorials", tutorials),
        ("Claims of the guide of this crate", guide),
    ]
    .into_iter()
    .filter(|(_, entries)| !entries.is_empty())
}

fn table(entries: &[Entry]) -> Result<String, Box<dyn Error>> {
    let mut text = "| # | claim | measured | verdict |\n| --- | --- | --- | --- |\n".to_string();
    for Entry { claim, data } in entries {
        let judged = (claim.judge)(data);
        let (id, words) = (claim.id, judged.words());
        writeln!(
            text,
            "| [{id}](#claim-{id}) | {} | {} | **{words}** |",
            claim.text, judged.figure
        )?;
    }
    Ok(text)
}

fn html_table(entries: &[Entry]) -> Result<String, Box<dyn Error>> {
    let mut text =
        "<table><thead><tr><th>#<th>claim<th>measured<th>verdict</thead><tbody>".to_string();
    for Entry { claim, data } in entries {
        let judged = (claim.judge)(data);
        write!(
            text,
            "<tr class=\"{:?}\"><td><a href=\"#claim-{id}\">{id}</a><td>{}<td>{}<td><b>{}</b>",
            judged.verdict,
            escape(claim.text),
            escape(&judged.figure),
            escape(&judged.words()),
            id = claim.id,
        )?;
    }
    text += "</tbody></table>";
    Ok(text)
}

/// Writes `claims.md`, `claims.html` and `claims/NN.svg` into `folder`.
pub(crate) fn write(
    folder: &Path,
    entries: &[Entry],
    quick: bool,
    seeds: [u64; 2],
) -> Result<(), Box<dyn Error>> {
    let figures = folder.join("claims");
    fs::create_dir_all(&figures)?;
    let introduction = introduction(quick, seeds);
    let mut markdown = format!("# {TITLE}\n\n{introduction}");
    let mut html = format!("<h1>{TITLE}</h1>{}", paragraphs(&introduction));
    for (title, entries) in tables(entries) {
        write!(markdown, "\n## {title}\n\n{}", table(entries)?)?;
        write!(html, "<h2>{title}</h2>{}", html_table(entries)?)?;
    }
    for Entry { claim, data } in entries {
        let svg = figure::svg(claim, &data.0)?;
        let name = format!("{:02}.svg", claim.id);
        fs::write(figures.join(&name), &svg)?;
        markdown += &section(claim, data, quick, &name)?;
        html += &html_section(claim, data, quick, &svg)?;
    }
    fs::write(folder.join("claims.md"), markdown)?;
    fs::write(folder.join("claims.html"), page(&html))?;
    Ok(())
}

/// A table in Markdown, whose first row is its head.
fn lines(rows: &[Vec<String>]) -> String {
    let line = |row: &Vec<String>| format!("| {} |\n", row.join(" | "));
    let rule = format!("|{}\n", " --- |".repeat(rows[0].len()));
    let body: String = rows[1..].iter().map(line).collect();
    line(&rows[0]) + &rule + &body
}

/// Where links to a claim lead, whatever its heading says.
fn anchor(id: u32) -> String {
    format!("<a id=\"claim-{id}\"></a>")
}

fn section(
    claim: &Claim,
    data: &Data,
    quick: bool,
    figure: &str,
) -> Result<String, Box<dyn Error>> {
    let judged = (claim.judge)(data);
    let (id, y) = (claim.id, claim.plot.y);
    let mut text = format!(
        "\n{}\n\n## {} (claim {id})\n\n> {}\n\n**{}**: {}.\n\n- Varied: {}.\n- Held fixed: {}.\n- \
         Rule: {}.\n\n![{y}](claims/{figure})\n\n",
        anchor(id),
        claim.title,
        claim.text,
        judged.words(),
        judged.figure,
        claim.varied,
        claim.fixed,
        claim.rule,
    );
    text += &lines(&rows(claim, data));
    writeln!(text, "\n```sh\n{}\n```", command(id, quick))?;
    Ok(text)
}

fn html_section(
    claim: &Claim,
    data: &Data,
    quick: bool,
    svg: &str,
) -> Result<String, Box<dyn Error>> {
    let judged = (claim.judge)(data);
    let id = claim.id;
    let mut text = format!(
        "<section id=\"claim-{id}\"><h2>{} (claim {id})</h2><blockquote>{}</blockquote><p><b \
         class=\"{:?}\">{}</b>: {}.</p><ul><li>Varied: {}.\
         <li>Held fixed: {}.<li>Rule: {}.</ul><figure>{svg}</figure><table><thead><tr>",
        escape(claim.title),
        escape(claim.text),
        judged.verdict,
        escape(&judged.words()),
        escape(&judged.figure),
        code(&escape(claim.varied)),
        code(&escape(claim.fixed)),
        code(&escape(claim.rule)),
    );
    for (i, row) in rows(claim, data).iter().enumerate() {
        text += if i == 0 { "" } else { "<tr>" };
        for cell in row {
            write!(
                text,
                "<{}>{}",
                if i == 0 { "th" } else { "td" },
                escape(cell)
            )?;
        }
        text += if i == 0 { "</thead><tbody>" } else { "" };
    }
    write!(
        text,
        "</tbody></table><pre>{}</pre></section>",
        command(id, quick)
    )?;
    Ok(text)
}

/// Draws the figures of `claims.md` and `claims.html` in `folder` anew from the tables that stand
/// there, whose values have three digits.
pub(crate) fn redraw(folder: &Path, claims: &[Claim]) -> Result<(), Box<dyn Error>> {
    let markdown = fs::read_to_string(folder.join("claims.md"))?;
    let mut html = fs::read_to_string(folder.join("claims.html"))?;
    for claim in claims {
        let id = claim.id;
        let section =
            between(&markdown, &anchor(id), "\n```sh").map_err(|e| format!("{id}: {e}"))?;
        let measures = stored(claim, section).map_err(|e| format!("claims.md, {id}: {e}"))?;
        let svg = figure::svg(claim, &measures)?;
        fs::write(folder.join("claims").join(format!("{id:02}.svg")), &svg)?;
        let start = format!("<section id=\"claim-{id}\">");
        let page = between(&html, &start, "</section>")?;
        let old = between(page, "<figure>", "</figure>")?;
        html = html.replace(page, &page.replace(old, &svg));
    }
    fs::write(folder.join("claims.html"), html)?;
    Ok(())
}

fn between<'a>(text: &'a str, start: &str, end: &str) -> Result<&'a str, String> {
    let rest = text.split_once(start).map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split_once(end))
        .map(|(found, _)| found)
        .ok_or(format!("expected {start:?} and then {end:?}"))
}

/// The measurements in the table of a section: the reverse of [`rows`], where the lowest, the
/// median and the highest stand for all seeds.
fn stored(claim: &Claim, section: &str) -> Result<Vec<Measure>, String> {
    let number = |text: &str| match text {
        "" => Ok(0.),
        "never" | "∞" => Ok(f64::INFINITY),
        "—" => Ok(f64::NAN),
        text => (text.replace('−', "-").parse()).map_err(|e| format!("{text:?}: {e}")),
    };
    let lines = section.lines().filter(|line| line.starts_with("| "));
    let mut measures = vec![];
    // Below the head and the rule.
    for line in lines.skip(2) {
        let line = line.trim_start_matches("| ").trim_end_matches(" |");
        let mut cells = line.split(" | ").map(str::trim);
        let mut next = || cells.next().ok_or(format!("too few columns: {line}"));
        let (variant, metric) = (next()?.to_string(), next()?.to_string());
        let x = if claim.plot.x.is_some() { next()? } else { "" };
        let (median, range) = (number(next()?)?, next()?);
        let (low, high) = range
            .split_once(" to ")
            .ok_or(format!("a range: {range:?}"))?;
        measures.push(Measure {
            metric,
            variant,
            x: number(x)?,
            values: vec![number(low)?, median, number(high)?],
            rate: None,
        });
    }
    Ok(measures)
}

/// The measurements as a table, with its head. Columns that say nothing are left out.
fn rows(claim: &Claim, data: &Data) -> Vec<Vec<String>> {
    let rated = data.0.iter().any(|m| m.rate.is_some());
    let line = |variant: String, metric: String, x: String, rest: [String; 3]| {
        let mut line = vec![variant, metric];
        line.extend(claim.plot.x.map(|_| x));
        let [median, range, rate] = rest;
        line.extend([median, range]);
        line.extend(rated.then_some(rate));
        line
    };
    let head = ["median", "range", "tuned rate"].map(str::to_string);
    let x = claim.plot.x.unwrap_or_default().to_string();
    let mut rows = vec![line("variant".to_string(), "quantity".to_string(), x, head)];
    rows.extend(data.0.iter().map(|m: &Measure| {
        // Steps to a goal may never reach it.
        let show = match m.metric.starts_with("steps") {
            true => steps,
            false => show,
        };
        let range = format!("{} to {}", show(m.low()), show(m.high()));
        let rate = m.rate.map_or("".to_string(), place);
        // What was measured once for all places has none.
        let elsewhere = claim.plot.log_x || m.metric != claim.plot.metric;
        let x = match m.x == 0. && elsewhere {
            true => String::new(),
            false => place(m.x),
        };
        line(
            m.variant.clone(),
            m.metric.clone(),
            x,
            [show(m.median()), range, rate],
        )
    }));
    rows
}

/// The text with its parts between backticks as code.
fn code(text: &str) -> String {
    let parts = text.split('`').enumerate();
    let marked = parts.map(|(i, part)| match i % 2 {
        0 => part.to_string(),
        _ => format!("<code>{part}</code>"),
    });
    marked.collect()
}

fn paragraphs(text: &str) -> String {
    let escaped = escape(text).replace("**", "").replace('`', "");
    let escaped = escaped.replace("[the guide](guide.md)", "the guide");
    let parts = escaped.trim().split("\n\n");
    parts.map(|part| format!("<p>{part}</p>")).collect()
}

fn page(body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">\
         <title>{TITLE}</title><style>{}</style></head><body>{body}</body></html>\n",
        include_str!("report.css")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_read_as_it_was_written() -> Result<(), String> {
        for id in [10, 18] {
            let claims = crate::claims();
            let claim = claims.iter().find(|claim| claim.id == id).expect("a claim");
            let measure = |variant: &str, x: f64, values: [f64; 3]| Measure {
                metric: claim.plot.metric.to_string(),
                variant: variant.to_string(),
                x: if claim.plot.x.is_some() { x } else { 0. },
                values: values.to_vec(),
                rate: None,
            };
            let written = vec![
                measure("none", 0.03, [12.5, 20., f64::INFINITY]),
                measure("group:4", 10., [-7e-7, 0., 0.125]),
            ];
            let data = Data(written.clone());
            let read = stored(claim, &lines(&rows(claim, &data)))?;
            // Infinity is "never" for steps and "∞" for all else.
            assert_eq!(format!("{read:?}"), format!("{written:?}"));
        }
        Ok(())
    }
}
