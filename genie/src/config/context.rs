//! The `context` block: sizes and control tokens.

use super::ConfigError;
use super::json::{Entry, Fields};

/// Size of context and vocabulary, and the control tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct ContextConfig {
    /// Tokens a conversation may have. (`size`)
    pub size: usize,
    /// Number of token ids, which is the number of logits. (`n-vocab`)
    pub n_vocab: usize,
    /// Token that begins a text. Only checked: whether a prompt gets one is the tokenizer's to say. (`bos-token`; -1 means none)
    pub bos_token: Option<u32>,
    /// Tokens that end an answer: `eos-token`, and `eot-token` where there is one.
    pub eos_tokens: Vec<u32>,
    /// Token that fills batches. (`pad-token`; -1 means none)
    pub pad_token: Option<u32>,
}

pub(super) fn parse(entry: &Entry<'_>) -> Result<ContextConfig, ConfigError> {
    let fields = entry.object(KEYS)?;
    fields.version()?;
    fields.refuse_unsupported(&["grammar", "img-token", "draft-n-vocab"])?;
    let n_vocab = fields.need("n-vocab")?.int(1..=MAX_VOCAB)?;
    let mut eos_tokens = eos_tokens(&fields.need("eos-token")?, n_vocab)?;
    let eot_token = optional_token(&fields, "eot-token", n_vocab)?;
    eos_tokens.extend(eot_token.filter(|id| !eos_tokens.contains(id)));
    if let Some(n_embd) = fields.get("n-embd") {
        n_embd.int(1..=MAX_VOCAB)?;
        super::no_effect(&n_embd);
    }
    Ok(ContextConfig {
        size: fields.need("size")?.int(1..=MAX_CONTEXT)?,
        n_vocab,
        bos_token: fields.need("bos-token").and_then(|entry| token_or_none(&entry, n_vocab))?,
        eos_tokens,
        pad_token: optional_token(&fields, "pad-token", n_vocab)?,
    })
}

fn eos_tokens(entry: &Entry<'_>, n_vocab: usize) -> Result<Vec<u32>, ConfigError> {
    if !entry.is_list() {
        return Ok(vec![token(entry, n_vocab)?]);
    }
    let items = entry.list()?;
    if items.is_empty() || MAX_EOS_TOKENS < items.len() {
        return Err(entry.value(format!("1 to {MAX_EOS_TOKENS} token ids")));
    }
    items.iter().map(|item| token(item, n_vocab)).collect()
}

fn optional_token(fields: &Fields<'_>, key: &str, n_vocab: usize) -> Result<Option<u32>, ConfigError> {
    fields.get(key).map_or(Ok(None), |entry| token_or_none(&entry, n_vocab))
}

fn token_or_none(entry: &Entry<'_>, n_vocab: usize) -> Result<Option<u32>, ConfigError> {
    let id = entry.int(-1..=n_vocab as i64 - 1)?;
    Ok(u32::try_from(id).ok())
}

fn token(entry: &Entry<'_>, n_vocab: usize) -> Result<u32, ConfigError> {
    entry.int(0..=n_vocab as u32 - 1)
}

const KEYS: &[&str] = &[
    "version",
    "size",
    "n-vocab",
    "bos-token",
    "eos-token",
    "eot-token",
    "pad-token",
    "img-token",
    "n-embd",
    "draft-n-vocab",
    "grammar",
];

/// Longest context: far above any model, far below any overflow.
const MAX_CONTEXT: usize = 1 << 24;

/// Largest vocabulary: far above any model, far below any overflow.
const MAX_VOCAB: usize = 1 << 24;

/// Most tokens that may end an answer.
const MAX_EOS_TOKENS: usize = 256;
