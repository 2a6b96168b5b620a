//! The tokenizer in a GGUF's metadata, as the files that the `tokenizers` and `transformers` libraries read.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

mod byte_level;
mod sentencepiece;

use super::{GgufError, GgufFile};
use crate::offline::{config::ModelConfig, error::ImportError};

pub use byte_level::pre_tokenizer_names;

/// `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`; none for a file without a tokenizer.
///
/// # Errors
/// [`ImportError::Unsupported`] for a tokenizer whose ids could not be reproduced; [`ImportError::Gguf`] for metadata that
/// contradicts itself.
pub(super) fn sidecars(file: &GgufFile, config: &ModelConfig) -> Result<Vec<(&'static str, Vec<u8>)>, ImportError> {
    if !is_there(file)? {
        return Ok(Vec::new());
    }
    let tokenizer = Tokenizer::read(file)?;
    if tokenizer.vocab.tokens.len() > config.vocab_size {
        let (have, want) = (format!("{} tokens", tokenizer.vocab.tokens.len()), config.vocab_size);
        return Err(wrong(TOKENS, have, format!("at most {want}, the rows of the embedding")));
    }
    let pretty = |value: &Json| serde_json::to_vec_pretty(value).map_err(ImportError::Json);
    Ok(vec![
        ("tokenizer.json", serde_json::to_vec(&tokenizer.json()?)?),
        ("tokenizer_config.json", pretty(&tokenizer.config_json(file, config)?)?),
        ("generation_config.json", pretty(&tokenizer.generation_json(config))?),
    ])
}

/// Whether the file has a tokenizer at all.
fn is_there(file: &GgufFile) -> Result<bool, ImportError> {
    Ok(!matches!(file.string(MODEL)?, None | Some("none" | "no_vocab")))
}

/// Ids that end an answer: those that the metadata names, and tokens that by their text end a turn or a text, which many files
/// leave unnamed.
pub(super) fn end_tokens(file: &GgufFile) -> Result<Vec<u32>, ImportError> {
    let mut ends = Vec::new();
    for role in ["eos", "eot", "eom"] {
        ends.extend(token_id(file, role)?);
    }
    let texts = file.strings(TOKENS)?.unwrap_or_default();
    ends.extend(texts.iter().zip(0..).filter(|(text, _)| ENDS.contains(text)).map(|(_, id)| id));
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|id| seen.insert(*id));
    Ok(ends)
}

/// The token with `role`, whether or not there is one with its id: as the metadata says, or llama.cpp takes where it does not.
pub(super) fn token_id(file: &GgufFile, role: &str) -> Result<Option<u32>, ImportError> {
    let key = id_key(role);
    if let Some(id) = file.unsigned(&key)? {
        return u32::try_from(id).map(Some).map_err(|_| wrong(&key, id, "a token id"));
    }
    let usual = match (file.string(MODEL)?, role) {
        (Some("llama"), "bos") => 1,
        (Some("llama"), "eos") => 2,
        _ => return Ok(None),
    };
    Ok(Some(usual).filter(|id| file.array_len(TOKENS).ok().flatten().is_some_and(|len| (*id as usize) < len)))
}

/// What a user should know of the tokenizer.
pub(super) fn warnings(file: &GgufFile) -> Result<Vec<String>, ImportError> {
    if !is_there(file)? {
        return Ok(vec!["the file has no tokenizer; a dialog needs a tokenizer.json beside the model".to_owned()]);
    }
    let (mut warnings, len) = (Vec::new(), file.array_len(TOKENS)?.unwrap_or(0));
    for key in ["unknown", "padding"].map(id_key) {
        if let Some(id) = file.unsigned(&key)?.filter(|id| *id >= len as u64) {
            warnings.push(format!("{key} {id} is ignored: there are {len} tokens"));
        }
    }
    Ok(warnings)
}

fn id_key(role: &str) -> String {
    format!("tokenizer.ggml.{role}_token_id")
}

/// What the metadata says, checked.
struct Tokenizer<'a> {
    vocab: Vocabulary<'a>,
    /// Tokens that are found in the text before anything else.
    added: Vec<Added<'a>>,
    parts: Parts,
    special: Special,
    add_bos: bool,
    add_eos: bool,
}

/// The tokens.
struct Vocabulary<'a> {
    /// Text of each id; `None` for ids that the tokenizer does not know (padding of the embedding).
    tokens: Vec<Option<&'a str>>,
    kinds: Vec<i64>,
    ids: HashMap<&'a str, u32>,
}

/// The parts of a `tokenizer.json` that depend on the kind of tokenizer.
struct Parts {
    normalizer: Json,
    pre_tokenizer: Json,
    decoder: Json,
    model: Json,
    /// Whether a text begins with BOS when the metadata does not say.
    add_bos: bool,
}

struct Added<'a> {
    id: u32,
    content: &'a str,
    special: bool,
    /// Whether the white space behind it is part of it.
    strips: bool,
}

/// Ids with a role.
#[derive(Clone, Copy)]
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

impl<'a> Tokenizer<'a> {
    fn read(file: &'a GgufFile) -> Result<Tokenizer<'a>, ImportError> {
        let vocab = Vocabulary::read(file)?;
        let parts = match file.string(MODEL)?.unwrap_or("none") {
            "gpt2" => byte_level::read(file, &vocab.ids)?,
            "llama" => sentencepiece::read(file, &vocab)?,
            model => {
                let supported = "\"gpt2\" (byte-level BPE), \"llama\" (SentencePiece)".to_owned();
                return Err(ImportError::Unsupported { what: format!("tokenizer model {model:?}"), supported });
            }
        };
        let mut added = vocab.added();
        if file.string("general.architecture")? == Some("phi3") && file.string(MODEL)? == Some("llama") {
            // As in Microsoft's own tokenizer.json; a GGUF has no place for it, and llama.cpp knows it, too.
            for token in added.iter_mut().filter(|token| token.special) {
                token.strips = !["<unk>", "<s>", "<|endoftext|>"].contains(&token.content);
            }
        }
        let special = Special::read(file, &vocab.tokens)?;
        let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.add_bos);
        let add_eos = file.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        Ok(Tokenizer { vocab, added, parts, special, add_bos, add_eos })
    }

    fn json(&self) -> Result<Json, ImportError> {
        let Parts { normalizer, pre_tokenizer, decoder, model, .. } = &self.parts;
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(Added::json).collect::<Vec<Json>>(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.post_processor()?,
            "decoder": decoder,
            "model": model,
        }))
    }

    /// Adds BOS and EOS where the metadata asks for them.
    fn post_processor(&self) -> Result<Json, ImportError> {
        let mut single = vec![json!({ "Sequence": { "id": "A", "type_id": 0 } })];
        let mut pair = vec![single[0].clone(), json!({ "Sequence": { "id": "B", "type_id": 1 } })];
        let mut special_tokens = Map::new();
        let roles = [
            (self.add_bos, self.special.bos, "tokenizer.ggml.bos_token_id"),
            (self.add_eos, self.special.eos, "tokenizer.ggml.eos_token_id"),
        ];
        for (at_end, (add, id, key)) in roles.into_iter().enumerate() {
            if !add {
                continue;
            }
            let text = id.and_then(|id| self.text(id)).ok_or_else(|| wrong(key, "missing", "the id of a token"))?;
            let piece = json!({ "SpecialToken": { "id": text, "type_id": 0 } });
            for pieces in [&mut single, &mut pair] {
                let at = if at_end == 1 { pieces.len() } else { 0 };
                pieces.insert(at, piece.clone());
            }
            special_tokens.insert(text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] }));
        }
        if special_tokens.is_empty() {
            return Ok(Json::Null);
        }
        Ok(json!({
            "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special_tokens,
        }))
    }

    fn config_json(&self, file: &GgufFile, config: &ModelConfig) -> Result<Json, ImportError> {
        let mut out = Map::new();
        out.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
        out.insert("add_bos_token".to_owned(), json!(self.add_bos));
        out.insert("add_eos_token".to_owned(), json!(self.add_eos));
        out.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        out.insert("model_max_length".to_owned(), json!(config.max_position_embeddings));
        let special = self.special;
        let roles = [
            ("bos_token", special.bos),
            ("eos_token", special.eos),
            ("unk_token", special.unknown),
            ("pad_token", special.padding),
        ];
        for (role, id) in roles {
            if let Some(text) = id.and_then(|id| self.text(id)) {
                out.insert(role.to_owned(), json!(text));
            }
        }
        let decoder: Map<String, Json> = self.added.iter().map(|token| (token.id.to_string(), token.json())).collect();
        out.insert("added_tokens_decoder".to_owned(), Json::Object(decoder));
        if let Some(template) = file.string("tokenizer.chat_template")? {
            out.insert("chat_template".to_owned(), json!(template));
        }
        Ok(Json::Object(out))
    }

    fn generation_json(&self, config: &ModelConfig) -> Json {
        let mut out = Map::new();
        out.insert("bos_token_id".to_owned(), json!(config.bos_token_id));
        out.insert("eos_token_id".to_owned(), json!(config.eos_token_ids));
        out.insert("pad_token_id".to_owned(), json!(self.special.padding));
        out.retain(|_, value| !value.is_null());
        Json::Object(out)
    }

    fn text(&self, id: u32) -> Option<&'a str> {
        self.vocab.tokens.get(id as usize).copied().flatten()
    }
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Vocabulary<'a>, ImportError> {
        let texts = file.strings(TOKENS)?.ok_or_else(|| wrong(TOKENS, "missing", "an array of strings"))?;
        let mut kinds = file.integers(KINDS)?.unwrap_or_else(|| vec![KIND_NORMAL; texts.len()]);
        if kinds.len() != texts.len() || u32::try_from(texts.len()).is_err() {
            return Err(wrong(KINDS, format!("{} entries", kinds.len()), format!("{}, one a token", texts.len())));
        }
        // Some files have them as plain text; llama.cpp corrects that, too.
        for (kind, _) in kinds.iter_mut().zip(&texts).filter(|(_, text)| ENDS.contains(text)) {
            *kind = KIND_CONTROL;
        }
        let (mut tokens, mut ids) = (Vec::with_capacity(texts.len()), HashMap::new());
        for (id, (content, kind)) in texts.into_iter().zip(&kinds).enumerate() {
            let id = id as u32; // `texts.len()` fits
            if content.len() > MAX_TOKEN_BYTES {
                let have = format!("token {id} of {} bytes", content.len());
                return Err(wrong(TOKENS, have, format!("at most {MAX_TOKEN_BYTES} bytes")));
            }
            // No text has an empty token in it; llama.cpp gives each a name of its own.
            let used = *kind != KIND_UNUSED && !content.is_empty();
            tokens.push(used.then_some(content));
            if !used {
                continue;
            }
            if let Some(first) = ids.insert(content, id) {
                return Err(wrong(TOKENS, format!("{content:?} as {first} and {id}"), "every token once"));
            }
        }
        Ok(Vocabulary { tokens, kinds, ids })
    }

    fn added(&self) -> Vec<Added<'a>> {
        let roles = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = roles.filter(|(_, (_, kind))| matches!(**kind, KIND_UNKNOWN | KIND_CONTROL | KIND_USER_DEFINED));
        added
            .filter_map(|(id, (content, kind))| {
                Some(Added { id: id as u32, content: (*content)?, special: *kind != KIND_USER_DEFINED, strips: false })
            })
            .collect()
    }
}

impl Special {
    fn read(file: &GgufFile, tokens: &[Option<&str>]) -> Result<Special, ImportError> {
        let read = |role: &str| match token_id(file, role)? {
            Some(id) if id as usize >= tokens.len() => Err(wrong(&id_key(role), id, format!("below {}", tokens.len()))),
            id => Ok(id),
        };
        // No text depends on these; `warnings` tells of ids that there are not.
        let inside =
            |role: &str| Ok::<_, ImportError>(file.unsigned(&id_key(role))?.filter(|id| *id < tokens.len() as u64));
        // `tokens.len()` fits u32, so the ids do.
        let [unknown, padding] = [inside("unknown")?, inside("padding")?].map(|id| id.map(|id| id as u32));
        Ok(Special { bos: read("bos")?, eos: read("eos")?, unknown, padding })
    }
}

impl Added<'_> {
    fn json(&self) -> Json {
        json!({
            "id": self.id, "content": self.content, "single_word": false, "lstrip": false, "rstrip": self.strips,
            "normalized": false, "special": self.special,
        })
    }
}

/// The vocabulary of a model in a `tokenizer.json`.
fn vocabulary(ids: &HashMap<&str, u32>) -> Map<String, Json> {
    ids.iter().map(|(text, id)| ((*text).to_owned(), json!(id))).collect()
}

fn wrong(key: &str, have: impl ToString, want: impl Into<String>) -> ImportError {
    GgufError::Metadata { key: key.to_owned(), have: have.to_string(), want: want.into() }.into()
}

/// How the families end a turn or a text.
const ENDS: &[&str] = &[
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
];
/// Longest token that is read, far longer than real ones. A SentencePiece token's merges are found by looking up every prefix,
/// which takes time by the square of its length.
const MAX_TOKEN_BYTES: usize = 4096;
const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const KIND_NORMAL: i64 = 1;
const KIND_UNKNOWN: i64 = 2;
const KIND_CONTROL: i64 = 3;
const KIND_USER_DEFINED: i64 = 4;
const KIND_UNUSED: i64 = 5;
const KIND_BYTE: i64 = 6;
