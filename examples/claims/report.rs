//! What is written: a page in Markdown with a figure a claim, and the same as one HTML file.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use crate::claim::{Claim, Data, show};
use crate::figure;
use crate::lab::Measure;
use crate::plot::escape;

/// A claim and what was measured of it.
pub(crate) struct Entry {
    pub(crate) claim: Claim,
    pub(crate) data: Data,
}

const TITLE: &str = "What is said of normalization, measured";

fn introduction(quick: bool, [seeds, tuning]: [u64; 2]) -> String {
    let rough = "**These figures are rough**: they come from a quick run, with fewer seeds, steps and learning rates.\n\n";
    format!(
        "{}Articles and tutorials say a lot about normalization. Each row here is one such claim, an experiment on real data, and a verdict that \
         follows from the measurements by the rule that its section states: nothing is typed in. Figures are medians of {seeds} seeds, with their \
         range. Where a network is trained, the learning rate of every arm is the best of the same few rates, by the median \
         result of {tuning} seeds that are used for nothing else, on a part of the training data that is kept back for it. Where arms are compared seed by seed, both \
         start alike and see the same batches. The networks are small, and so are the data (`examples/data`): a verdict says what holds here, not what holds everywhere.\n",
        if quick { rough } else { "" }
    )
}

fn command(id: u32, quick: bool) -> String {
    let quick = if quick { " --quick" } else { "" };
    format!("cargo run --release --example claims -- --claim {id}{quick}")
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
    let mut markdown = format!(
        "# {TITLE}\n\n{}\n| # | claim | measured | verdict |\n| --- | --- | --- | --- |\n",
        introduction(quick, seeds)
    );
    let mut html = format!(
        "<h1>{TITLE}</h1>{}",
        paragraphs(&introduction(quick, seeds))
    );
    html += "<table><thead><tr><th>#<th>claim<th>measured<th>verdict</thead><tbody>";
    for Entry { claim, data } in entries {
        let judged = (claim.judge)(data);
        let (id, words) = (claim.id, judged.words());
        writeln!(
            markdown,
            "| [{id}](#claim-{id}) | {} | {} | **{words}** |",
            claim.text, judged.figure
        )?;
        write!(
            html,
            "<tr class=\"{:?}\"><td><a href=\"#claim-{id}\">{id}</a><td>{}<td>{}<td><b>{}</b>",
            judged.verdict,
            escape(claim.text),
            escape(&judged.figure),
            escape(&words)
        )?;
    }
    html += "</tbody></table>";
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

fn section(
    claim: &Claim,
    data: &Data,
    quick: bool,
    figure: &str,
) -> Result<String, Box<dyn Error>> {
    let judged = (claim.judge)(data);
    let (id, y) = (claim.id, claim.plot.y);
    let mut text = format!(
        "\n## Claim {id}\n\n> {}\n\n**{}**: {}.\n\n- Varied: {}.\n- Held fixed: {}.\n- Rule: {}.\n\n![{y}](claims/{figure})\n\n",
        claim.text,
        judged.words(),
        judged.figure,
        claim.varied,
        claim.fixed,
        claim.rule,
    );
    let rows = rows(claim, data);
    writeln!(text, "| {} |", rows[0].join(" | "))?;
    writeln!(text, "|{}", " --- |".repeat(rows[0].len()))?;
    for row in &rows[1..] {
        writeln!(text, "| {} |", row.join(" | "))?;
    }
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
        "<section id=\"claim-{id}\"><h2>Claim {id}</h2><blockquote>{}</blockquote><p><b class=\"{:?}\">{}</b>: {}.</p><ul><li>Varied: {}.\
         <li>Held fixed: {}.<li>Rule: {}.</ul><figure>{svg}</figure><table><thead><tr>",
        escape(claim.text),
        judged.verdict,
        escape(&judged.words()),
        escape(&judged.figure),
        escape(claim.varied),
        escape(claim.fixed),
        escape(claim.rule),
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

/// The measurements as a table, with its head. Columns that say nothing are left out.
fn rows(claim: &Claim, data: &Data) -> Vec<Vec<String>> {
    let rated = data.0.iter().any(|m| m.rate.is_some());
    let line = |arm: String, metric: String, x: String, rest: [String; 3]| {
        let mut line = vec![arm, metric];
        line.extend(claim.plot.x.map(|_| x));
        let [median, range, rate] = rest;
        line.extend([median, range]);
        line.extend(rated.then_some(rate));
        line
    };
    let head = ["median", "range", "learning rate"].map(str::to_string);
    let x = claim.plot.x.unwrap_or_default().to_string();
    let mut rows = vec![line("arm".to_string(), "what".to_string(), x, head)];
    rows.extend(data.0.iter().map(|m: &Measure| {
        let range = format!("{} to {}", show(m.low()), show(m.high()));
        let rate = m.rate.map_or("".to_string(), show);
        line(
            m.arm.clone(),
            m.metric.clone(),
            show(m.x),
            [show(m.median()), range, rate],
        )
    }));
    rows
}

fn paragraphs(text: &str) -> String {
    let escaped = escape(text).replace("**", "").replace('`', "");
    let parts = escaped.trim().split("\n\n");
    parts.map(|part| format!("<p>{part}</p>")).collect()
}

fn page(body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{TITLE}</title><style>{}</style></head><body>{body}</body></html>\n",
        include_str!("report.css")
    )
}
