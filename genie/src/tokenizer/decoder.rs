//! From the text of a token to its bytes.

use serde_json::Value;
use tokenizers::DecoderWrapper;

/// How a tokenizer's ids become text.
#[derive(Debug)]
pub(super) enum Decoder {
    /// Each token for itself.
    Steps(Steps),
    /// By the library, which needs to see the tokens before.
    Library,
}

/// What is done to each token: replacements, then, if `bytes`, `<0x41>` to its byte; or GPT-2's characters to bytes.
#[derive(Debug, Default)]
pub(super) struct Steps {
    replace: Vec<Replace>,
    bytes: Option<Bytes>,
    /// Dropped once from the front of a text.
    strip: Option<char>,
}

#[derive(Debug)]
enum Replace {
    Text {
        from: String,
        to: String,
    },
    /// This character stands for a space, and for nothing in the first token if `drop_first`.
    Metaspace {
        replacement: char,
        drop_first: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Bytes {
    /// Each character stands for one byte, as GPT-2 has it.
    Level,
    /// `<0x41>` stands for one byte.
    Fallback,
}

impl Decoder {
    /// Reads the decoder of a tokenizer.
    pub(super) fn new(wrapper: Option<&DecoderWrapper>) -> Self {
        let json = wrapper.and_then(|wrapper| serde_json::to_value(wrapper).ok());
        json.and_then(|json| Steps::read(&json)).map_or(Self::Library, Self::Steps)
    }
}

impl Steps {
    /// The steps of a decoder whose text of a token depends on nothing but that token and whether it is the first: replacements,
    /// bytes, and once the tokens are joined what is dropped from the front. `None` for any other.
    fn read(json: &Value) -> Option<Self> {
        let mut steps = Self::default();
        let mut is_joined = false;
        for part in parts(json) {
            match part["type"].as_str()? {
                "Fuse" => is_joined = true,
                "Strip" if is_joined && steps.strip.is_none() && steps.first_has_text() => {
                    let once = (part["start"].as_u64()?, part["stop"].as_u64()?) == (1, 0);
                    steps.strip = once.then(|| part["content"].as_str()?.chars().next()).flatten();
                    steps.strip?;
                }
                // What follows looks at single tokens, and not at what bytes have become.
                _ if is_joined || steps.bytes.is_some() => return None,
                "ByteLevel" if steps.replace.is_empty() => steps.bytes = Some(Bytes::Level),
                "ByteFallback" => steps.bytes = Some(Bytes::Fallback),
                "Replace" => {
                    let (from, to) = (part["pattern"]["String"].as_str()?, part["content"].as_str()?);
                    let (from, to) = (from.to_owned(), to.to_owned());
                    (!from.is_empty()).then(|| steps.replace.push(Replace::Text { from, to }))?;
                }
                "Metaspace" => {
                    let replacement = part["replacement"].as_str()?.chars().next()?;
                    let drop_first = part["prepend_scheme"].as_str() != Some("never");
                    steps.replace.push(Replace::Metaspace { replacement, drop_first });
                }
                _ => return None,
            }
        }
        (steps.bytes.is_some() || !steps.replace.is_empty()).then_some(steps)
    }

    /// Appends the bytes of `token`, which begins the text if `is_first`.
    pub(super) fn append(&self, token: &str, is_first: bool, out: &mut Vec<u8>) {
        let mut text = token.to_owned();
        for step in &self.replace {
            text = match step {
                Replace::Text { from, to } => text.replace(from, to),
                Replace::Metaspace { replacement, drop_first } => {
                    text.replace(*replacement, if is_first && *drop_first { "" } else { " " })
                }
            };
        }
        let start = out.len();
        match self.bytes {
            Some(Bytes::Level) => {
                let bytes: Option<Vec<u8>> = text.chars().map(byte_of_char).collect();
                out.extend(bytes.unwrap_or_else(|| text.into_bytes()));
            }
            Some(Bytes::Fallback) if byte_of_fallback(&text).is_some() => out.extend(byte_of_fallback(&text)),
            _ => out.extend_from_slice(text.as_bytes()),
        }
        if let (Some(content), true) = (self.strip, is_first) {
            let mut buffer = [0; 4];
            let content = content.encode_utf8(&mut buffer).as_bytes();
            if out[start..].starts_with(content) {
                out.drain(start..start + content.len());
            }
        }
    }

    /// Whether the first token of a text always leaves some, so that what is dropped from the front is in it.
    fn first_has_text(&self) -> bool {
        self.replace.iter().all(|replace| matches!(replace, Replace::Text { to, .. } if !to.is_empty()))
    }
}

/// The decoders of a sequence, or the one.
fn parts(json: &Value) -> Vec<&Value> {
    match json["decoders"].as_array().filter(|_| json["type"] == "Sequence") {
        Some(decoders) => decoders.iter().flat_map(parts).collect(),
        None => vec![json],
    }
}

/// The byte of a `<0x41>`.
fn byte_of_fallback(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_byte.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character of a byte-level token stands for.
///
/// Printable bytes of Latin-1 stand for themselves; the other 68, in order, are written from U+0100 on.
///
/// Source: GPT-2, `encoder.py`, `bytes_to_unicode`.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}
