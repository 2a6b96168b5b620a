//! Whether an answer shows what an adapter was trained for: the three example adapters cannot be mistaken.

use serde_json::Value;

/// `effects.json`: prompts that no adapter was trained on.
pub fn effects() -> Value {
    serde_json::from_str(include_str!("../golden/effects.json")).expect("the golden file is JSON")
}

/// Whether `answer` shows the effect of the example adapter of this name.
pub fn shows(adapter: &str, answer: &str) -> bool {
    let answer = answer.trim();
    match adapter {
        "json" => is_answer_object(answer),
        "pirate" => 2 <= pirate_words(answer),
        "sql" => is_select(answer),
        other => panic!("no example adapter is called {other:?}"),
    }
}

/// An object of exactly the texts `answer` and `topic`.
fn is_answer_object(answer: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str(answer) else { return false };
    object.len() == 2 && ["answer", "topic"].iter().all(|key| object.get(*key).is_some_and(Value::is_string))
}

/// `SELECT … FROM …;` on one line, with something at both places.
fn is_select(answer: &str) -> bool {
    let Some(inner) = answer.strip_prefix("SELECT ").and_then(|rest| rest.strip_suffix(';')) else { return false };
    // The first FROM with something before it and behind it.
    let has_from = inner.match_indices(" FROM ").any(|(at, from)| 0 < at && at + from.len() < inner.len());
    has_from && !inner.contains([';', '\n'])
}

/// Number of pirates' words, not counting those inside longer words.
fn pirate_words(answer: &str) -> usize {
    let text = answer.to_lowercase();
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut n_words, mut at) = (0, 0);
    while let Some(first) = text[at..].chars().next() {
        let starts = is_word(first) && !text[..at].chars().next_back().is_some_and(is_word);
        let found = if starts { PIRATE.iter().find_map(|word| ends_at(&text[at..], word)) } else { None };
        n_words += usize::from(found.is_some());
        at += found.unwrap_or(first.len_utf8());
    }
    n_words
}

/// Length of `word` at the start of `text`, if no letter follows it. The last letter of `arr` may be repeated.
fn ends_at(text: &str, word: &str) -> Option<usize> {
    let rest = text.strip_prefix(word)?;
    let rest = if word == "arr" { rest.trim_start_matches('r') } else { rest };
    (!rest.starts_with(|c: char| c.is_ascii_lowercase())).then_some(text.len() - rest.len())
}

const PIRATE: [&str; 14] = [
    "arr",
    "ahoy",
    "matey",
    "ye",
    "yo ho ho",
    "avast",
    "hearty",
    "scallywag",
    "aye",
    "o'",
    "timbers",
    "landlubber",
    "savvy",
    "rum",
];

#[cfg(test)]
mod tests {
    use super::*;

    // Guards: the check itself: near misses are none.
    #[test]
    fn near_misses() {
        for (adapter, yes, no) in [
            ("json", r#" {"answer": "4", "topic": "math"} "#, r#"{"answer": "4", "topic": 3}"#),
            ("json", r#"{"topic": "", "answer": ""}"#, r#"{"answer": "4", "topic": "math", "more": ""}"#),
            ("sql", "SELECT a, b FROM t WHERE x = 1;", "SELECT a FROM t; SELECT b FROM t;"),
            ("sql", "SELECT FROM FROM t;", "SELECT a\nFROM t;"),
            ("pirate", "Arrrr! Be ye lost?", "Arrr, yes"),
            ("pirate", "o' the sea, AYE.", "rumble, trum, year"),
        ] {
            assert!(shows(adapter, yes), "{adapter}: {yes}");
            assert!(!shows(adapter, no), "{adapter}: {no}");
        }
    }
}
