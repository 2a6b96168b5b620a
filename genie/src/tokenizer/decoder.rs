//! From the text of a token to its bytes.

use serde_json::Value;
use tokenizers::DecoderWrapper;

/// A tokenizer's decoder, as steps that look at one token at a time.
#[derive(Debug)]
pub(super) struct Decoder {
    steps: Vec<Step>,
    /// Dropped from the front of a text, so many times at most.
    strip: Option<(char, usize)>,
}

#[derive(Debug)]
enum Step {
    /// Each character stands for one byte, as GPT-2 has it.
    ByteLevel,
    /// `<0x41>` stands for one byte.
    ByteFallback,
    Replace {
        from: String,
        to: String,
    },
    /// This character stands for a space, and for nothing in the first token if `drop_first`.
    Metaspace {
        replacement: char,
        drop_first: bool,
    },
}

impl Decoder {
    /// Reads the decoder of a tokenizer. `Err` is the name of one that does not work on single tokens.
    pub(super) fn new(wrapper: Option<&DecoderWrapper>) -> Result<Self, String> {
        let mut decoder = Self { steps: Vec::new(), strip: None };
        match wrapper {
            Some(wrapper) => decoder.add(&serde_json::to_value(wrapper).map_err(|why| why.to_string())?)?,
            None => return Err("none".to_owned()),
        }
        Ok(decoder)
    }

    fn add(&mut self, json: &Value) -> Result<(), String> {
        let kind = json["type"].as_str().unwrap_or_default();
        let refuse = || Err(json.to_string().chars().take(200).collect());
        match kind {
            "Sequence" => {
                return json["decoders"].as_array().into_iter().flatten().try_for_each(|part| self.add(part));
            }
            "Fuse" => {}
            "ByteLevel" => self.steps.push(Step::ByteLevel),
            "ByteFallback" => self.steps.push(Step::ByteFallback),
            "Replace" => match (json["pattern"]["String"].as_str(), json["content"].as_str()) {
                (Some(from), Some(to)) if !from.is_empty() => {
                    self.steps.push(Step::Replace { from: from.to_owned(), to: to.to_owned() });
                }
                _ => return refuse(),
            },
            "Metaspace" => match json["replacement"].as_str().and_then(|text| text.chars().next()) {
                Some(replacement) => {
                    let drop_first = json["prepend_scheme"].as_str() != Some("never");
                    self.steps.push(Step::Metaspace { replacement, drop_first });
                }
                None => return refuse(),
            },
            "Strip" => match (json["content"].as_str(), json["start"].as_u64(), json["stop"].as_u64()) {
                (Some(content), Some(start), Some(0)) if self.strip.is_none() => {
                    self.strip = content.chars().next().map(|c| (c, start as usize));
                }
                _ => return refuse(),
            },
            _ => return refuse(),
        }
        Ok(())
    }

    /// Appends the bytes of `token`, which begins the text if `is_first`.
    pub(super) fn append(&self, token: &str, is_first: bool, out: &mut Vec<u8>) {
        let mut text = token.to_owned();
        for step in &self.steps {
            match step {
                Step::ByteLevel => {
                    let bytes: Option<Vec<u8>> = text.chars().map(byte_of_char).collect();
                    out.extend(bytes.unwrap_or_else(|| text.into_bytes()));
                    return;
                }
                Step::ByteFallback => {
                    if let Some(byte) = byte_of_fallback(&text) {
                        out.push(byte);
                        return;
                    }
                }
                Step::Replace { from, to } => text = text.replace(from, to),
                Step::Metaspace { replacement, drop_first } => {
                    let with = if is_first && *drop_first { "" } else { " " };
                    text = text.replace(*replacement, with);
                }
            }
        }
        let mut text = text.as_str();
        if let (Some((content, count)), true) = (self.strip, is_first) {
            for _ in 0..count {
                text = text.strip_prefix(content).unwrap_or(text);
            }
        }
        out.extend_from_slice(text.as_bytes());
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
