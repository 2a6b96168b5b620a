//! What a text opens with, before its first word: in a dialog, and where a model is calibrated for one.

use serde::Deserialize;
use tokenizers::{Decoder, Encoding, Model, Normalizer, PostProcessor, PreTokenizer, Result, Token, TokenizerImpl};

/// What the post-processor of `tokenizer` puts before a text.
///
/// # Errors
/// What the library says of it.
pub fn of_post_processor<M, N, PT, PP, D>(tokenizer: &TokenizerImpl<M, N, PT, PP, D>) -> Result<Vec<u32>>
where
    M: Model,
    N: Normalizer,
    PT: PreTokenizer,
    PP: PostProcessor,
    D: Decoder,
{
    let text = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
    let whole = tokenizer.post_process(text, None, true)?;
    let ids = whole.get_ids();
    Ok(ids.iter().position(|id| *id == TEXT).map_or_else(Vec::new, |at| ids[..at].to_vec()))
}

/// What texts open with by `config`, the text of a `tokenizer_config.json`, where the post-processor puts `opening` there.
/// `id_of` knows the tokenizer's tokens.
///
/// # Errors
/// What is wrong with `config`: no JSON, or a BOS that is to be added and that there is not.
pub fn configured(
    config: &[u8],
    opening: Vec<u32>,
    id_of: impl Fn(&str) -> Option<u32>,
) -> std::result::Result<Vec<u32>, String> {
    let config: Config = serde_json::from_slice(config).map_err(|why| why.to_string())?;
    match (config.add_bos_token, config.bos_token) {
        (Some(false), _) => Ok(Vec::new()),
        (Some(true), bos) if opening.is_empty() => {
            let bos = bos.map(|(Bos::Text(text) | Bos::Token { content: text })| text);
            let id = bos.as_ref().and_then(|text| id_of(text));
            let have = || format!("add_bos_token is true, bos_token is {bos:?}, need one of the tokenizer's tokens");
            id.map(|id| vec![id]).ok_or_else(have)
        }
        _ => Ok(opening),
    }
}

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

/// Id that stands for the text: no tokenizer has as many.
const TEXT: u32 = u32::MAX;
