//! The filter `tojson` of chat templates: Python's `json.dumps` with the defaults that transformers gives it.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// `value` as JSON. The options are those of transformers: `ensure_ascii`, which is off by default, `indent`, `separators` and
/// `sort_keys`.
///
/// # Errors
/// What has no form in JSON, an option that there is not, or a text that is too long or nested too deep.
pub(super) fn to_json(value: &Value, ensure_ascii: Option<bool>, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        Some(indent) if indent.is_none() => None,
        Some(indent) if indent.kind() == ValueKind::String => Some(indent.to_string()),
        // As Python counts, for which true is 1.
        Some(indent) if indent.kind() == ValueKind::Bool => Some(" ".repeat(usize::from(indent.is_true()))),
        Some(indent) => Some(" ".repeat(usize::try_from(indent)?.min(MAX_INDENT + 1))),
        None => None,
    };
    if indent.as_ref().is_some_and(|indent| MAX_INDENT < indent.len()) {
        return Err(refused(format!("indent is wider than {MAX_INDENT}")));
    }
    let (item, key) = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(other) => return Err(refused(format!("{} separators, need 2", other.len()))),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let ascii = ensure_ascii.or(options.get("ensure_ascii")?).unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let mut writer = Writer { text: String::new(), ascii, indent, item, key, sort_keys, depth: 0 };
    writer.value(value)?;
    Ok(Value::from(writer.text))
}

struct Writer {
    text: String,
    ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) -> Result<(), Error> {
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                // One by one: a repeated list is long only when it is written down.
                self.nested(['[', ']'], value.try_iter()?.map(|item| (None, item)))?;
            }
            ValueKind::Map => {
                let pair = |key: Value| Ok((Some(key_text(&key)?), value.get_item(&key)?));
                let mut pairs = value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>()?;
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.nested(['{', '}'], pairs.into_iter())?;
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            _ => self.text.push_str(&scalar(value)?),
        }
        if MAX_BYTES < self.text.len() {
            return Err(refused(format!("more than {MAX_BYTES} bytes")));
        }
        Ok(())
    }

    /// The items of an array, or those of an object with their keys.
    fn nested(
        &mut self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = (Option<String>, Value)>,
    ) -> Result<(), Error> {
        self.depth += 1;
        if MAX_DEPTH < self.depth {
            return Err(refused(format!("nested deeper than {MAX_DEPTH}")));
        }
        self.text.push(open);
        let mut is_empty = true;
        for (key, item) in items {
            if !is_empty {
                self.text.push_str(&self.item);
            }
            is_empty = false;
            self.line();
            if let Some(key) = key {
                self.string(&key);
                self.text.push_str(&self.key);
            }
            self.value(&item)?;
        }
        self.depth -= 1;
        if !is_empty {
            self.line();
        }
        self.text.push(close);
        Ok(())
    }

    fn line(&mut self) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(indent.as_str(), self.depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for c in text.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{C}' => self.text.push_str("\\f"),
                '\0'..='\u{1F}' => self.text.push_str(&format!("\\u{:04x}", u32::from(c))),
                // Private-use characters stand for hidden ones, which are mostly ASCII: they are left to come back.
                '\u{7F}'..='\u{D7FF}' | '\u{F900}'..='\u{EFFFF}' if self.ascii => {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| self.text.push_str(&format!("\\u{unit:04x}")));
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    key.as_str().map_or_else(|| scalar(key), |text| Ok(text.to_owned()))
}

fn scalar(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::None | ValueKind::Undefined => Ok("null".to_owned()),
        ValueKind::Bool => Ok(value.is_true().to_string()),
        ValueKind::Number => Ok(value.to_string()),
        other => Err(refused(format!("{other} has no form in JSON"))),
    }
}

fn refused(why: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {why}"))
}

/// Longest text that is written.
const MAX_BYTES: usize = 16 << 20;

/// Widest indent of a level.
const MAX_INDENT: usize = 64;

/// How deep values may nest.
const MAX_DEPTH: usize = 100;
