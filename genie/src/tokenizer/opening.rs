//! What a text opens with, before its first word.

use serde::Deserialize;
use tokenizers::{Encoding, Token};

use super::{Inner, Tokenizer};

/// The keys of `tokenizer_config.json` that matter here.
#[derive(Deserialize)]
struct Config {
    add_bos_token: Option<bool>,
    bos_token: Option<Bos>,
}

/// A token by its text, alone or with properties.
#[derive(Deserialize)]
#[serde(untagged)]
enum Bos {
    Text(String),
    Token { content: String },
}

/// What the post-processor of a `tokenizer.json` puts before a text.
pub(super) fn of_post_processor(inner: &Inner) -> Vec<u32> {
    let text = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
    // As elsewhere: a damaged file can make the library panic; such a tokenizer opens texts with nothing.
    let processed = std::panic::catch_unwind(|| inner.post_process(text, None, true));
    let Ok(Ok(whole)) = processed else { return Vec::new() };
    let ids = whole.get_ids();
    ids.iter().position(|id| *id == TEXT).map_or_else(Vec::new, |at| ids[..at].to_vec())
}

/// What texts of `tokenizer` open with by `config`, the text of a `tokenizer_config.json`.
///
/// # Errors
/// What is wrong with `config`: no JSON, or a BOS that is to be added and that there is not.
pub(super) fn configured(tokenizer: &Tokenizer, config: &[u8]) -> Result<Vec<u32>, String> {
    let config: Config = serde_json::from_slice(config).map_err(|why| why.to_string())?;
    match (config.add_bos_token, config.bos_token) {
        (Some(false), _) => Ok(Vec::new()),
        (Some(true), bos) if tokenizer.opening.is_empty() => {
            let bos = bos.map(|(Bos::Text(text) | Bos::Token { content: text })| text);
            let id = bos.as_ref().and_then(|text| tokenizer.inner.token_to_id(text));
            let have = || format!("add_bos_token is true, bos_token is {bos:?}, need one of its tokens");
            id.map(|id| vec![id]).ok_or_else(have)
        }
        _ => Ok(tokenizer.opening.clone()),
    }
}

/// Id that stands for the text: no tokenizer has as many.
const TEXT: u32 = u32::MAX;
