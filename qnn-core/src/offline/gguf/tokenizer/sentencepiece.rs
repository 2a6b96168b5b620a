//! SentencePiece (`llama`): spaces become `▁`, the neighbours whose union has the best score are joined first, and what no
//! piece has is written in bytes.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::{KIND_BYTE, KIND_NORMAL, KIND_UNKNOWN, Parts, TOKENS, Vocabulary, vocabulary, wrong};
use crate::offline::{error::ImportError, gguf::GgufFile};

/// Normalizer, pre-tokenizer, decoder and model.
///
/// # Errors
/// [`ImportError::Unsupported`] for a normalization that is not rebuilt here; scores or bytes that are incomplete.
pub(super) fn read(file: &GgufFile, vocab: &Vocabulary<'_>) -> Result<Parts, ImportError> {
    if file.bool(EXTRA_SPACES)?.unwrap_or(false) {
        let (what, supported) = (format!("{EXTRA_SPACES} true"), "false".to_owned());
        return Err(ImportError::Unsupported { what, supported });
    }
    if file.array_len(CHARACTER_MAP)?.is_some_and(|len| len > 0) {
        let (what, supported) = (CHARACTER_MAP.to_owned(), "text as it is".to_owned());
        return Err(ImportError::Unsupported { what, supported });
    }
    let scores = file.floats(SCORES)?.ok_or_else(|| wrong(SCORES, "missing", "an array of f32"))?;
    if scores.len() != vocab.kinds.len() {
        return Err(wrong(SCORES, format!("{} entries", scores.len()), format!("{}, one a token", vocab.kinds.len())));
    }
    let n_bytes = (0..=255u8).filter(|byte| vocab.ids.contains_key(format!("<0x{byte:02X}>").as_str())).count();
    if vocab.kinds.contains(&KIND_BYTE) && n_bytes != 256 {
        return Err(wrong(TOKENS, format!("{n_bytes} tokens for bytes"), "256 or none"));
    }
    let unknown = vocab.kinds.iter().position(|kind| *kind == KIND_UNKNOWN).and_then(|id| vocab.tokens[id]);
    let space_prefix = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE })];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if space_prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Json::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": n_bytes == 256,
            "ignore_merges": false,
            "vocab": vocabulary(&vocab.ids),
            "merges": merges(vocab, &scores)?,
        }),
        add_bos: true,
    })
}

/// Every pair of pieces that makes a third, in the order in which SentencePiece joins them: the best score of the union
/// first. Pairs with the same union keep the order of their ids.
///
/// # Errors
/// [`ImportError::Gguf`] if finding or storing them takes far more than those of a real vocabulary do.
fn merges(vocab: &Vocabulary<'_>, scores: &[f32]) -> Result<Vec<Json>, ImportError> {
    let pieces: HashMap<&str, u32> = vocab
        .ids
        .iter()
        .map(|(text, id)| (*text, *id))
        .filter(|(_, id)| vocab.kinds[*id as usize] == KIND_NORMAL)
        .collect();
    let stored: usize = pieces.keys().map(|text| text.len()).sum();
    // Every prefix and suffix is looked up.
    let read: usize = pieces.keys().map(|text| text.len() * text.len()).sum();
    refuse_more("to look for merges in, by the squares of lengths", read, 32 * (stored + (1 << 20)))?;
    let (mut found, mut written): (Vec<(u32, u32, u32)>, usize) = (Vec::new(), 0);
    for (text, id) in &pieces {
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(left), Some(right)) = (pieces.get(&text[..at]), pieces.get(&text[at..])) {
                found.push((*id, *left, *right));
                written += text.len();
            }
        }
    }
    // As many as the splits, each with the text of its union: cubic in the length of runs of which all shorter ones are pieces.
    refuse_more("in merges", written, 8 * (stored + (1 << 20)))?;
    let score = |id: u32| scores[id as usize];
    found.sort_unstable_by(|a, b| {
        let by_score = score(b.0).partial_cmp(&score(a.0)).unwrap_or(Ordering::Equal);
        by_score.then(a.cmp(b))
    });
    let text = |id: u32| vocab.tokens[id as usize];
    Ok(found.into_iter().map(|(_, left, right)| json!([text(left), text(right)])).collect())
}

fn refuse_more(what: &str, have: usize, most: usize) -> Result<(), ImportError> {
    let refuse = || wrong(TOKENS, format!("{have} bytes {what}"), format!("at most {most} for pieces of this size"));
    if have > most { Err(refuse()) } else { Ok(()) }
}

/// What a space is written as.
const SPACE: &str = "▁";
const SCORES: &str = "tokenizer.ggml.scores";
const EXTRA_SPACES: &str = "tokenizer.ggml.remove_extra_whitespaces";
const CHARACTER_MAP: &str = "tokenizer.ggml.precompiled_charsmap";
