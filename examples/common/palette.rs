//! Colors of the figures, in light and in dark mode. Each norm has the same color in all figures.
//! Curves of other things take the remaining colors in order.

use std::fmt::Write;

/// A name, its color on white, its color on black. They are told apart also by eyes with protan,
/// deutan or tritan deficiency.
const NORMS: [(&str, &str, &str); 8] = [
    ("none", "#4f4f4f", "#d0d0d0"),
    ("batch", "#0052a5", "#5d88e3"),
    ("layer", "#e5301a", "#ec6e48"),
    ("group", "#118d55", "#38d685"),
    ("instance", "#4a93e6", "#a6caff"),
    ("rms", "#a63c85", "#d074b3"),
    ("weight", "#877e1f", "#ffca55"),
    ("switch", "#00788a", "#35c6d8"),
];
const OTHERS: [(&str, &str); 6] = [
    ("#c4600a", "#ff9f45"),
    ("#5b3fb5", "#a78bff"),
    ("#0b7f6f", "#56d9c3"),
    ("#b3245a", "#ff7fa8"),
    ("#6b4a2b", "#cfa67c"),
    ("#3d6f9e", "#8fbbe6"),
];
/// Dashes of the first, second and third line of a color, in the units of a `Chart`.
const DASHES: [&str; 3] = ["none", "32 18", "2 16"];
const COLORS: usize = NORMS.len() + OTHERS.len();

/// The class of each of the `names` of a figure: the color of its norm, or the next of the others;
/// the second and third line of one color are dashed.
pub(crate) fn classes(names: &[&str]) -> Vec<usize> {
    let mut others = (NORMS.len()..COLORS).cycle();
    let mut used = [0; COLORS];
    let mut class = |name: &&str| {
        let color = norm(name).or_else(|| others.next()).unwrap_or(0);
        used[color] += 1;
        color + COLORS * ((used[color] - 1) % DASHES.len())
    };
    names.iter().map(&mut class).collect()
}

/// The norm that one of the words of a name is: `layer` of "raw, LayerNorm", `group` of "group:8".
fn norm(name: &str) -> Option<usize> {
    let lower = name.to_lowercase();
    let words = lower.split(|c: char| !c.is_alphanumeric());
    let words = words.map(|word| word.strip_suffix("norm").unwrap_or(word));
    words
        .filter_map(|word| NORMS.iter().position(|(norm, ..)| *norm == word))
        .next()
}

/// Style sheet of a figure of its own: text and paper, lines (`.line`) and areas (`.area`) of each
/// class, which begins with `family`.
pub(crate) fn style(family: char, classes: &[usize]) -> String {
    let mut style = "svg{color:#1c1e21;background:#fff}.line{fill:none;stroke-linejoin:round}\
                     .soft{stroke:#d9dde2}"
        .to_string();
    let mut dark = "svg{color:#e9ebed;background:#14171a}.soft{stroke:#343a41}".to_string();
    for class in classes {
        let (light, black) = match class % COLORS {
            color if color < NORMS.len() => (NORMS[color].1, NORMS[color].2),
            color => OTHERS[color - NORMS.len()],
        };
        let dash = DASHES[class / COLORS % DASHES.len()];
        for (rules, color) in [(&mut style, light), (&mut dark, black)] {
            // Writing to a String does not fail.
            let _ = write!(
                rules,
                ".line.{family}{class}{{stroke:{color}}}.area.{family}{class}{{fill:{color}}}"
            );
        }
        if dash != "none" {
            let _ = write!(style, ".line.{family}{class}{{stroke-dasharray:{dash}}}");
        }
    }
    format!("{style}@media (prefers-color-scheme:dark){{{dark}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_norm_has_one_color_and_its_second_line_is_dashed() {
        let classes = classes(&[
            "raw",
            "batch",
            "raw, LayerNorm",
            "group:8",
            "batch, before ReLU",
        ]);
        assert_eq!(classes, [NORMS.len(), 1, 2, 3, 1 + COLORS]);
        let style = style('a', &classes);
        assert!(
            style.contains(".line.a2{stroke:#e5301a}")
                && style.contains(".line.a2{stroke:#ec6e48}")
        );
        let dashed = format!(".line.a{}{{stroke-dasharray:32 18}}", 1 + COLORS);
        assert_eq!(style.matches("dasharray").count(), 1);
        assert!(style.contains(&dashed), "{style}");
    }

    #[test]
    fn there_is_a_color_for_every_line() {
        let names: Vec<String> = (0..20).map(|i| format!("way {i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut found = classes(&names);
        found.sort_unstable();
        found.dedup();
        assert_eq!(found.len(), OTHERS.len() * DASHES.len());
    }
}
