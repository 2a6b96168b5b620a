//! What the tests of this crate share: small tokenizers and the committed golden files.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::tokenizer::Tokenizer;

/// A file under the workspace's `tests/golden`.
pub(crate) fn golden(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(name)
}

pub(crate) fn golden_json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// SmolLM2's tokenizer.
pub(crate) fn smollm2() -> Tokenizer {
    Tokenizer::load(golden("smollm2/tokenizer.json")).unwrap()
}

/// Control tokens of [`bytes_json`], from id 256 on. `<think>` is not marked special, `  ` is no control token.
pub(crate) const CONTROL: [&str; 5] = ["<end>", "<user>", "<bot>", "<think>", "  "];
pub(crate) const END: u32 = 256;

/// A byte-level tokenizer without merges: byte `b` is token `b`.
pub(crate) fn bytes_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        (0..=255_u8).map(|byte| (char_of_byte(byte).to_string(), byte.into())).collect();
    let added = |(i, content): (usize, &&str)| {
        json!({"id": 256 + i, "content": content, "special": i < 3, "normalized": false,
               "single_word": false, "lstrip": false, "rstrip": false})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": CONTROL.iter().enumerate().map(added).collect::<Vec<_>>(),
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// [`bytes_json`], whose texts open with the token `<user>`.
pub(crate) fn bytes_after_bos() -> Arc<Tokenizer> {
    let mut json = bytes_json();
    let id = END + 1;
    let template = json!([{"SpecialToken": {"id": "<user>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    json["post_processor"] = json!({
        "type": "TemplateProcessing", "single": template, "pair": template,
        "special_tokens": {"<user>": {"id": "<user>", "ids": [id], "tokens": ["<user>"]}},
    });
    Arc::new(tokenizer(&json))
}

pub(crate) fn tokenizer(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string().as_bytes(), "test").unwrap()
}

/// [`bytes_json`], ready to use.
pub(crate) fn bytes() -> Arc<Tokenizer> {
    Arc::new(tokenizer(&bytes_json()))
}

/// A tokenizer as sentencepiece models have it: `▁` for spaces, bytes for what has no token.
pub(crate) fn sentencepiece_json() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        (0..=255_u8).map(|byte| (format!("<0x{byte:02X}>"), byte.into())).collect();
    for (i, piece) in ["▁", "a", "b", "▁a", "▁b", "ab", "<unk>"].iter().enumerate() {
        vocab.insert((*piece).to_owned(), (256 + i).into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "post_processor": null, "pre_tokenizer": null,
        "added_tokens": [{"id": 263, "content": "</s>", "special": true, "normalized": false,
                          "single_word": false, "lstrip": false, "rstrip": false}],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": ["▁ a", "▁ b", "a b"]},
    })
}

fn char_of_byte(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0..=0x20 => 0x100 + code,
        0x7F..=0xA0 => 0x121 + code - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(code).unwrap()
}
