//! The names that a norm is called by, and which of them someone meant.

use crate::layers::Names;

/// A name in lower case, without what joins words.
fn plain(name: &str) -> String {
    let joins = |c: &char| c.is_whitespace() || ['-', '_'].contains(c);
    let kept = name.chars().filter(|c| !joins(c));
    kept.flat_map(char::to_lowercase).collect()
}

/// Without the number of axes at the end, if there is one.
fn without_axes(name: &str) -> Option<&str> {
    ["1d", "2d", "3d"]
        .iter()
        .find_map(|axes| name.strip_suffix(axes))
}

/// The names among `kinds` of the norm that `name` stands for, if it stands for one.
pub(super) fn kind(kinds: &'static [Names], name: &str) -> Option<&'static Names> {
    let name = plain(name);
    let axes = without_axes(&name);
    let word = axes.unwrap_or(&name);
    let endings = ["normalization", "norm"];
    let stem = endings.iter().find_map(|end| word.strip_suffix(end));
    let stands = |kind: &&Names| match (stem, axes) {
        (Some(stem), Some(_)) => kind.by_axes && kind.stems.contains(&stem),
        (Some(stem), None) => kind.stems.contains(&stem),
        (None, Some(_)) => false,
        (None, None) => kind.stems.contains(&word) || kind.alone.contains(&word),
    };
    kinds.iter().find(stands)
}

/// Norm of `kinds` that `name` may have been meant for, as it is written: the nearest name, if two
/// thirds of it are right.
pub(super) fn nearest(kinds: &[Names], name: &str) -> Option<String> {
    let word = plain(name);
    let word = without_axes(&word).unwrap_or(&word);
    let letters: Vec<char> = word.chars().filter(|c| c.is_alphabetic()).collect();
    // `group8`, `group=8` and `GroupNorm(8)` say the number too, at the end.
    let end = word.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number = &end[end.trim_end_matches(|c: char| c.is_ascii_digit()).len()..];
    let mut best: Option<(usize, &Names)> = None;
    for kind in kinds {
        for form in [kind.name.to_string(), format!("{}norm", kind.name)] {
            let form: Vec<char> = form.chars().collect();
            let missed = match letters.len() {
                0..=32 => distance(&letters, &form),
                _ => continue,
            };
            if missed <= form.len() / 3 && best.is_none_or(|(least, _)| missed < least) {
                best = Some((missed, kind));
            }
        }
    }
    let Names { name, argument, .. } = best?.1;
    Some(match argument {
        Some(_) if number.parse::<usize>().is_ok_and(|n| n > 0) => format!("{name}:{number}"),
        Some(argument) => format!("{name}:{}", argument.suggested),
        None => name.to_string(),
    })
}

/// Number of letters to be added, left out, replaced, or swapped with their neighbor to make one
/// of the other.
fn distance(from: &[char], to: &[char]) -> usize {
    let mut rows = vec![(0..=to.len()).collect::<Vec<_>>()];
    for i in 1..=from.len() {
        let mut row = vec![i];
        for j in 1..=to.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}
