//! The summaries as a table for the terminal and as sentences.

use crate::summary::{Spread, Summary, TARGET};

/// The table for a terminal.
pub(crate) fn table(rows: &[Summary]) -> String {
    let target = format!("steps to {:.0}\u{a0}%", 100. * TARGET);
    let head = [
        "norm",
        &target,
        "final test accuracy",
        "largest gradient norm",
        "ms a step",
    ]
    .map(str::to_string);
    let body = rows.iter().map(|row| {
        [
            row.norm.clone(),
            row.steps_text(),
            row.accuracy_text(),
            row.gradient_text(),
            row.milliseconds_text(),
        ]
    });
    let lines: Vec<_> = [head].into_iter().chain(body).collect();
    let mut text = String::new();
    for line in &lines {
        for (column, cell) in line.iter().enumerate() {
            let width = lines
                .iter()
                .map(|line| line[column].chars().count())
                .max()
                .unwrap_or(0);
            text += &format!("{cell:width$}   ");
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// A few sentences on what the table shows.
pub(crate) fn findings(rows: &[Summary]) -> Vec<String> {
    let mut sentences: Vec<_> = [first_to_target(rows), best_at_the_end(rows)]
        .into_iter()
        .flatten()
        .collect();
    if let Some((small, large)) =
        extremes(rows, |row| row.largest_gradient.unwrap_or(f64::INFINITY))
    {
        let [small, large] =
            [small, large].map(|row| format!("{}, {}", row.norm, row.gradient_text()));
        sentences.push(format!(
            "Largest gradient norm: {large}; smallest of these maxima: {small}."
        ));
    }
    if let Some((fast, slow)) = extremes(rows, |row| row.milliseconds) {
        let (ms, times) = (
            fast.milliseconds_text(),
            slow.milliseconds / fast.milliseconds,
        );
        sentences.push(format!(
            "Cheapest step: {}, {ms} ms; dearest: {}, {times:.2} times that.",
            fast.norm, slow.norm
        ));
    }
    for row in rows.iter().filter(|row| row.diverged > 0) {
        sentences.push(format!(
            "The loss of {} stopped being a number with {} of {} seeds.",
            row.norm, row.diverged, row.seeds
        ));
    }
    sentences
}

fn first_to_target(rows: &[Summary]) -> Option<String> {
    let median = |row: &Summary| row.steps.median;
    let named = |steps: f64| {
        let names: Vec<_> = rows
            .iter()
            .filter(|row| median(row) == steps)
            .map(|row| row.norm.as_str())
            .collect();
        listed(&names)
    };
    let Spread {
        min: first,
        max: last,
        ..
    } = Spread::of(rows.iter().map(median))?;
    let target = format!("{:.0}\u{a0}% of the test digits", 100. * TARGET);
    if first.is_infinite() {
        return Some(format!(
            "No kind got to {target} within the run with most of its seeds."
        ));
    }
    let seeds = match rows.iter().map(|row| row.seeds).max() {
        Some(seeds @ 2..) => format!(" (median of {seeds} seeds)"),
        _ => String::new(),
    };
    let rest = match last {
        last if last == first => String::new(),
        last if last.is_infinite() => {
            format!(" Not within the run, with most seeds: {}.", named(last))
        }
        last => format!(" Last: {}, after {last:.0}.", named(last)),
    };
    Some(format!(
        "First to {target}: {}, after {first:.0} steps{seeds}.{rest}",
        named(first)
    ))
}

fn best_at_the_end(rows: &[Summary]) -> Option<String> {
    let (worst, best) = extremes(rows, |row| row.accuracy.median)?;
    let [best, worst] = [best, worst].map(|end| {
        let same = |row: &&Summary| row.accuracy.median == end.accuracy.median;
        rows.iter().filter(same).collect::<Vec<_>>()
    });
    let named = |rows: &[&Summary]| {
        let names: Vec<_> = rows.iter().map(|row| row.norm.as_str()).collect();
        listed(&names)
    };
    let apart = best
        .iter()
        .all(|high| worst.iter().all(|low| low.accuracy.max < high.accuracy.min));
    let chance = match apart {
        _ if rows.iter().all(|row| row.seeds == 1) => String::new(),
        true => format!(
            " Every seed of {} did better than every seed of {}.",
            named(&best),
            named(&worst)
        ),
        false => " Their seeds overlap: this may be chance.".to_string(),
    };
    let text = |rows: &[&Summary]| {
        format!(
            "{}, {:.1}\u{a0}%",
            named(rows),
            100. * rows[0].accuracy.median
        )
    };
    Some(format!(
        "Highest test accuracy at the end: {}; lowest: {}.{chance}",
        text(&best),
        text(&worst)
    ))
}

/// The rows with the smallest and the largest value, unless all are the same.
fn extremes(rows: &[Summary], key: impl Fn(&Summary) -> f64) -> Option<(&Summary, &Summary)> {
    let compare = |a: &&Summary, b: &&Summary| key(a).total_cmp(&key(b));
    let (least, most) = (rows.iter().min_by(compare)?, rows.iter().max_by(compare)?);
    (key(least) < key(most)).then_some((least, most))
}

/// "a", "a and b", "a, b and c".
fn listed(names: &[&str]) -> String {
    match names {
        [all @ .., last] if !all.is_empty() => format!("{} and {last}", all.join(", ")),
        _ => names.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::summary::samples::summary;

    #[test]
    fn findings_name_first_last_and_overlap() {
        let rows = [
            summary("none", &[&[0.5, 0.96], &[0.5, 0.96]]),
            summary("rms", &[&[0.96, 0.98], &[0.96, 0.98]]),
            summary("layer", &[&[0.96, 0.97], &[0.96, 0.99]]),
        ];
        let text = findings(&rows).join(" ");
        let first_and_last = "First to 95\u{a0}% of the test digits: rms and layer, after 2 steps \
             (median of 2 seeds). Last: none, after 4.";
        assert!(text.contains(first_and_last), "{text}");
        assert!(
            text.contains("lowest: none, 96.0\u{a0}%. Every seed of rms and layer did"),
            "{text}"
        );
        let rows = [
            summary("none", &[&[0.5, 0.8]]),
            summary("rms", &[&[0.96, 0.96]]),
        ];
        assert!(
            findings(&rows)
                .join(" ")
                .contains("after 2 steps. Not within the run, with most seeds: none.")
        );
    }

    #[test]
    fn a_loss_that_is_no_number_is_said() {
        let mut row = summary("none", &[&[0.1], &[0.1]]);
        row.diverged = 1;
        assert!(findings(&[row])[1].contains("none stopped being a number with 1 of 2 seeds"));
    }
}
