//! Messages for users: the modules in which they are made, and how they begin.

use super::assert_none;
use super::sources::{Source, sources, starts_with, text_of, without_tests};

/// Modules in which messages for users are made: those of one layer beside it, those of several in
/// `ops/check` and `support`.
const MODULES: [&str; 9] = [
    "collective",
    "distributed",
    "graph",
    "layers",
    "models",
    "nn",
    "ops",
    "scaling",
    "support",
];

pub(super) fn makes_messages(source: &Source) -> bool {
    let own = OWN_MESSAGES.iter().any(|own| source.path.starts_with(own));
    MODULES.contains(&source.module().0) && !own
}

/// Files and folders that make messages of their own, since they are about things that no layer
/// knows: files, configurations and functions of the caller's own.
const OWN_MESSAGES: [&str; 3] = [
    "models/checkpoint/",
    "models/config.rs",
    "crates/gradcheck/",
];

/// The texts of the errors that a source makes, in code that is not for tests.
fn messages(source: &Source) -> Vec<String> {
    let tokens = without_tests(&source.tokens);
    let mut found = vec![];
    for i in 0..tokens.len() {
        let rest = &tokens[i..];
        let how = ["msg", "Msg", "wrap", "debug"];
        let made = starts_with(rest, &["bail", "!"])
            || how
                .iter()
                .any(|how| starts_with(rest, &["Error", ":", ":", how]));
        if made {
            let text = rest.iter().find_map(|token| text_of(token));
            found.push(text.unwrap_or_default().to_string());
        }
    }
    found
}

#[test]
fn messages_are_made_in_their_modules() {
    let sources = sources();
    let mut broken = vec![];
    for source in &sources {
        let path = source.path.as_str();
        if makes_messages(source) || OWN_MESSAGES.iter().any(|own| path.starts_with(own)) {
            continue;
        }
        let messages = messages(source);
        if !messages.is_empty() {
            broken.push(format!("{path} makes messages: {messages:#?}"));
        }
    }
    assert_none(broken);
}

/// A message starts with the layer and says what was expected.
#[test]
fn messages_name_the_layer_and_what_it_expected() {
    let all = sources();
    let checks = all.iter().filter(|s| makes_messages(s));
    let messages: Vec<String> = checks.flat_map(messages).collect();
    assert!(messages.len() > 10, "only {} messages", messages.len());
    let names_layer =
        |m: &str| ["{layer}: expected ", "{LAYER}: expected "].map(|start| m.starts_with(start));
    let unclear = messages
        .into_iter()
        .filter(|m| names_layer(m) == [false; 2]);
    assert_none(unclear.collect());
}

#[cfg(test)]
mod tests {
    use super::super::sources::tokens;
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_made() {
        let text = r#"
            bail!("a {x}", x);
            return Err(Error::Msg(format!("b")));
            candle_core::bail!("c");
            Error::msg("d").bt()
            #[cfg(test)] mod tests { bail!("e") }
            // bail!("f")
        "#;
        let source = Source {
            path: "a.rs".to_string(),
            tokens: tokens(text),
        };
        assert_eq!(messages(&source), ["a {x}", "b", "c", "d"]);
    }
}
