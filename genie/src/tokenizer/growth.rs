//! How much longer the steps of a tokenizer may make a text.
//!
//! Each step takes what the one before it made. Fifty that write two letters for one would fill any memory with a short text, so
//! a file is refused by what its steps could do, before anything goes through them.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::{DecoderWrapper, NormalizerWrapper, PreTokenizerWrapper};

/// The parts of a `tokenizer.json` that change text.
#[derive(Deserialize)]
pub(super) struct Parts {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    decoder: Option<DecoderWrapper>,
}

impl Parts {
    /// As [`check`], of a part that was read alone.
    pub(super) fn check(&self) -> Result<(), String> {
        check(self.normalizer.as_ref(), self.pre_tokenizer.as_ref(), self.decoder.as_ref())
    }
}

/// Refuses steps that could make a text more than [`MAX_GROWTH`] times as long.
///
/// # Errors
/// Which parts they are, and how much they could do.
pub(super) fn check(
    normalizer: Option<&NormalizerWrapper>,
    pre_tokenizer: Option<&PreTokenizerWrapper>,
    decoder: Option<&DecoderWrapper>,
) -> Result<(), String> {
    let before = grown(grown(1, &json(normalizer)?), &json(pre_tokenizer)?);
    for (parts, growth) in [("normalizer and pre_tokenizer", before), ("decoder", grown(1, &json(decoder)?))] {
        if MAX_GROWTH < growth {
            return Err(format!("{parts} could make a text {growth} times as long, need at most {MAX_GROWTH}"));
        }
    }
    Ok(())
}

fn json<T: Serialize>(part: Option<&T>) -> Result<Value, String> {
    serde_json::to_value(part).map_err(|why| why.to_string())
}

/// Bytes that a byte of a text may have become behind `step` if there were `bytes` of it before.
///
/// What is added once to a text, or to a piece of one, is counted for every byte: there is at least one.
fn grown(bytes: u64, step: &Value) -> u64 {
    let len = |key: &str| step[key].as_str().map_or(0, str::len) as u64;
    let (times, more): (u64, u64) = match step["type"].as_str() {
        Some("Sequence") => {
            let steps = ["normalizers", "pretokenizers", "decoders"].iter().filter_map(|key| step[key].as_array());
            return steps.flatten().fold(bytes, grown);
        }
        Some("Replace") => match (step["pattern"]["String"].as_str().map(str::len), len("content")) {
            (Some(len @ 1..), content) => (content.div_ceil(len as u64).max(1), 0),
            // What may match nothing matches before each byte and at the end.
            (_, content) => (content.saturating_add(1), content),
        },
        Some("Prepend") => (1, len("prepend")),
        Some("Precompiled") => (longest_entry(step["precompiled_charsmap"].as_str().unwrap_or_default()), 0),
        // Source: Unicode Standard Annex 15, table 10, "Maximum expansion factors", in UTF-8.
        Some("NFC" | "NFD") => (3, 0),
        Some("NFKC" | "NFKD") => (11, 0),
        // Spaces around a Chinese character, NFD, lower case.
        Some("BertNormalizer") => (2 * 3 * 2, 0),
        Some("Lowercase") => (2, 0),
        // Each byte as a character of up to two; a space before.
        Some("ByteLevel") => (2, 2),
        // A space, and what is put before, become one character.
        Some("Metaspace") => (4, 4),
        // A space for nothing, if what it stands for is empty; a space before each token.
        Some("BPEDecoder" | "CTC" | "WordPiece") => (2, 1),
        // The others cut, or write no more than they take.
        _ => (1, 0),
    };
    bytes.saturating_mul(times).saturating_add(more)
}

/// Length of the longest text that a charsmap of sentencepiece puts in the place of a character: behind a trie, whose length in
/// bytes comes first, are texts that end with NUL.
fn longest_entry(base64: &str) -> u64 {
    let bytes = from_base64(base64);
    let trie_bytes = bytes.first_chunk().map_or(0, |len| u32::from_le_bytes(*len) as usize);
    let texts = bytes.get(4_usize.saturating_add(trie_bytes / 4 * 4)..).unwrap_or_default();
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max().map_or(1, |len| len.max(1) as u64)
}

fn from_base64(text: &str) -> Vec<u8> {
    let (mut bits, mut n_bits, mut bytes) = (0_u32, 0, Vec::with_capacity(text.len() / 4 * 3));
    for digit in text.bytes().map_while(|c| BASE64.iter().position(|digit| *digit == c)) {
        bits = bits << 6 | digit as u32;
        n_bits += 6;
        if 8 <= n_bits {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
        }
    }
    bytes
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// The most that steps may do, by a bound for each that is far above what they do together: NFKC, a mark before the text and for
/// each space, as sentencepiece has them, count 42.
const MAX_GROWTH: u64 = 1024;
