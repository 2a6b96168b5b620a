//! Strict reading of JSON: every key accounted for, every error with its JSON pointer.

use std::fmt;
use std::ops::RangeInclusive;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::ConfigError;

/// A JSON value that keeps what `serde_json::Value` loses: repeated keys and the order of keys.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Object(Vec<(String, Node)>),
}

/// One value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Entry<'a> {
    node: &'a Node,
    pointer: String,
}

/// An object whose keys were all found to be known.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    pointer: String,
    entries: &'a [(String, Node)],
}

/// Reads `text`, which may hold no key twice in one object.
pub(super) fn parse(text: &str) -> Result<Node, ConfigError> {
    if MAX_TEXT_BYTES < text.len() {
        return Err(ConfigError::TooLong { have_bytes: text.len(), limit_bytes: MAX_TEXT_BYTES });
    }
    let node = serde_json::from_str(text).map_err(|why| ConfigError::Syntax { why })?;
    refuse_duplicates(&node, "")?;
    Ok(node)
}

impl Node {
    /// The whole document as an entry.
    pub(super) fn root(&self) -> Entry<'_> {
        Entry { node: self, pointer: String::new() }
    }
}

impl<'a> Entry<'a> {
    pub(super) fn pointer(&self) -> &str {
        &self.pointer
    }

    /// The object here, all of whose keys must be in `known`.
    pub(super) fn object(&self, known: &[&str]) -> Result<Fields<'a>, ConfigError> {
        let Node::Object(entries) = self.node else { return Err(self.wrong_type("an object")) };
        for (key, _) in entries {
            if !known.contains(&key.as_str()) {
                return Err(ConfigError::UnknownKey { pointer: below(&self.pointer, key), hint: nearest(key, known) });
            }
        }
        Ok(Fields { pointer: self.pointer.clone(), entries })
    }

    pub(super) fn list(&self) -> Result<Vec<Entry<'a>>, ConfigError> {
        let Node::List(items) = self.node else { return Err(self.wrong_type("an array")) };
        let entry = |(i, node)| Entry { node, pointer: format!("{}/{i}", self.pointer) };
        Ok(items.iter().enumerate().map(entry).collect())
    }

    pub(super) fn is_list(&self) -> bool {
        matches!(self.node, Node::List(_))
    }

    pub(super) fn text(&self) -> Result<&'a str, ConfigError> {
        match self.node {
            Node::Text(text) => Ok(text),
            _ => Err(self.wrong_type("a string")),
        }
    }

    pub(super) fn bool(&self) -> Result<bool, ConfigError> {
        match self.node {
            Node::Bool(value) => Ok(*value),
            _ => Err(self.wrong_type("true or false")),
        }
    }

    /// An integer inside `range`.
    pub(super) fn int<T>(&self, range: RangeInclusive<T>) -> Result<T, ConfigError>
    where
        T: TryFrom<i128> + PartialOrd + fmt::Display,
    {
        let Node::Int(value) = self.node else { return Err(self.wrong_type("an integer")) };
        match T::try_from(*value) {
            Ok(value) if range.contains(&value) => Ok(value),
            _ => Err(self.value(format!("an integer in {}..={}", range.start(), range.end()))),
        }
    }

    /// A finite number for which `accept` holds; `wanted` says which those are.
    pub(super) fn number(&self, wanted: &str, accept: impl Fn(f64) -> bool) -> Result<f64, ConfigError> {
        let value = match self.node {
            Node::Int(value) => *value as f64,
            Node::Float(value) => *value,
            _ => return Err(self.wrong_type("a number")),
        };
        if value.is_finite() && accept(value) { Ok(value) } else { Err(self.value(wanted)) }
    }

    /// One of the words in `words`.
    pub(super) fn word(&self, words: &[&'static str]) -> Result<&'static str, ConfigError> {
        let text = self.text()?;
        words.iter().find(|&&word| word == text).copied().ok_or_else(|| {
            let hint = nearest(text, words).map(|near| format!("; did you mean {near:?}?")).unwrap_or_default();
            self.value(format!("one of {}{hint}", words.join(", ")))
        })
    }

    /// The refusal of a value; `wanted` says what would do.
    pub(super) fn value(&self, wanted: impl Into<String>) -> ConfigError {
        ConfigError::Value { pointer: self.pointer.clone(), found: self.node.to_string(), wanted: wanted.into() }
    }

    /// The refusal of something that the schema knows and this version lacks.
    pub(super) fn unsupported(&self, what: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported { pointer: self.pointer.clone(), what: what.into() }
    }

    fn wrong_type(&self, wanted: &'static str) -> ConfigError {
        ConfigError::WrongType { pointer: self.pointer.clone(), found: self.node.to_string(), wanted }
    }
}

impl<'a> Fields<'a> {
    pub(super) fn get(&self, key: &str) -> Option<Entry<'a>> {
        let (_, node) = self.entries.iter().find(|(name, _)| name == key)?;
        Some(Entry { node, pointer: below(&self.pointer, key) })
    }

    pub(super) fn need(&self, key: &str) -> Result<Entry<'a>, ConfigError> {
        self.get(key).ok_or_else(|| ConfigError::MissingKey { pointer: below(&self.pointer, key) })
    }

    /// Every block carries `"version": 1`.
    pub(super) fn version(&self) -> Result<(), ConfigError> {
        let version = self.need("version")?;
        match version.int(i64::MIN..=i64::MAX)? {
            1 => Ok(()),
            _ => Err(version.value("version 1")),
        }
    }

    /// Refuses each of `keys` that is here: they belong to the schema, but not to this version.
    pub(super) fn refuse_unsupported(&self, keys: &[&str]) -> Result<(), ConfigError> {
        match keys.iter().find_map(|key| Some((key, self.get(key)?))) {
            Some((key, entry)) => Err(entry.unsupported(format!("{key:?}"))),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Node {
    /// The value as JSON, cut to a length that fits an error message.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Text(text) if text.chars().count() <= MAX_SHOWN_CHARS => write!(f, "{text:?}"),
            Self::Text(text) => write!(f, "{:?}…", text.chars().take(MAX_SHOWN_CHARS).collect::<String>()),
            Self::List(items) => write!(f, "an array of {}", items.len()),
            Self::Object(entries) => write!(f, "an object of {}", entries.len()),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Int(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = from.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut from: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = from.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Object(entries))
    }
}

fn refuse_duplicates(node: &Node, pointer: &str) -> Result<(), ConfigError> {
    match node {
        Node::Object(entries) => {
            let mut keys: Vec<&str> = entries.iter().map(|(key, _)| key.as_str()).collect();
            keys.sort_unstable();
            if let Some(pair) = keys.windows(2).find(|pair| pair[0] == pair[1]) {
                return Err(ConfigError::DuplicateKey { pointer: below(pointer, pair[0]) });
            }
            entries.iter().try_for_each(|(key, node)| refuse_duplicates(node, &below(pointer, key)))
        }
        Node::List(items) => {
            let each = |(i, node)| refuse_duplicates(node, &format!("{pointer}/{i}"));
            items.iter().enumerate().try_for_each(each)
        }
        _ => Ok(()),
    }
}

fn below(pointer: &str, key: &str) -> String {
    let key: String = key.chars().take(MAX_SHOWN_CHARS).collect();
    format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"))
}

/// The known key that a typing mistake most likely meant.
fn nearest(key: &str, known: &[&str]) -> Option<String> {
    let plain = |text: &str| text.to_lowercase().replace('_', "-");
    let key = plain(key);
    if MAX_SHOWN_CHARS < key.chars().count() {
        return None;
    }
    let (distance, near) = known.iter().map(|word| (edits(&key, &plain(word)), word)).min_by_key(|(n, _)| *n)?;
    (distance <= 1 + key.chars().count() / 4).then(|| (*near).to_owned())
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Longest config text that is read.
const MAX_TEXT_BYTES: usize = 4 << 20;

/// Longest part of a value or key that an error message shows.
const MAX_SHOWN_CHARS: usize = 60;
