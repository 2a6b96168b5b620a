//! The tokenizer in a GGUF's metadata, as the files that the `tokenizers` and `transformers` libraries read.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::{GgufError, GgufFile};
use crate::offline::{config::ModelConfig, error::ImportError};

/// `tokenizer.json`, `tokenizer_config.json`, `generation_config.json`.
///
/// # Errors
/// [`ImportError::Unsupported`] for a tokenizer whose ids could not be reproduced; [`ImportError::Gguf`] for metadata that
/// contradicts itself.
pub(super) fn sidecars(file: &GgufFile, config: &ModelConfig) -> Result<Vec<(&'static str, Vec<u8>)>, ImportError> {
    let tokenizer = Tokenizer::read(file)?;
    if tokenizer.tokens.len() > config.vocab_size {
        let (have, want) = (format!("{} tokens", tokenizer.tokens.len()), config.vocab_size);
        return Err(wrong(TOKENS, have, format!("at most {want}, the rows of the embedding")));
    }
    let pretty = |value: &Json| serde_json::to_vec_pretty(value).map_err(ImportError::Json);
    Ok(vec![
        ("tokenizer.json", serde_json::to_vec(&tokenizer.json()?)?),
        ("tokenizer_config.json", pretty(&tokenizer.config_json(file, config)?)?),
        ("generation_config.json", pretty(&tokenizer.generation_json(config))?),
    ])
}

/// What the metadata says, checked.
struct Tokenizer<'a> {
    /// Text of each id; `None` for ids that the tokenizer does not know (padding of the embedding).
    tokens: Vec<Option<&'a str>>,
    ids: HashMap<&'a str, u32>,
    /// Tokens that are found in the text before anything else.
    added: Vec<Added<'a>>,
    merges: Vec<(&'a str, &'a str)>,
    splitter: &'static Splitter,
    special: Special,
    add_bos: bool,
    add_eos: bool,
}

struct Added<'a> {
    id: u32,
    content: &'a str,
    special: bool,
}

/// Ids with a role.
#[derive(Clone, Copy)]
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
    padding: Option<u32>,
}

/// How text is cut before merging, by the name in `tokenizer.ggml.pre`.
struct Splitter {
    names: &'static [&'static str],
    /// Unicode normalization of the text.
    nfc: bool,
    steps: &'static [Step],
    /// A whole word that is a token is taken as it is.
    ignore_merges: bool,
    /// Whether a text begins with BOS when the metadata does not say.
    add_bos: bool,
}

#[derive(Clone, Copy)]
enum Step {
    /// Every digit for itself.
    Digits,
    /// Matches of a regular expression for themselves.
    Split(&'static str),
    /// Bytes to characters, after GPT-2's own cut.
    ByteLevelGpt2,
    /// Bytes to characters.
    ByteLevel,
}

impl<'a> Tokenizer<'a> {
    fn read(file: &'a GgufFile) -> Result<Tokenizer<'a>, ImportError> {
        let model = file.string("tokenizer.ggml.model")?.unwrap_or("none");
        if model != "gpt2" {
            let (what, supported) = (format!("tokenizer model {model:?}"), "\"gpt2\" (byte-level BPE)".to_owned());
            return Err(ImportError::Unsupported { what, supported });
        }
        let splitter = find_splitter(file.string("tokenizer.ggml.pre")?.unwrap_or("default"))?;
        let texts = file.strings(TOKENS)?.ok_or_else(|| wrong(TOKENS, "missing", "an array of strings"))?;
        let kinds = file.integers(KINDS)?.unwrap_or_else(|| vec![KIND_NORMAL; texts.len()]);
        if kinds.len() != texts.len() || u32::try_from(texts.len()).is_err() {
            return Err(wrong(KINDS, format!("{} entries", kinds.len()), format!("{}, one a token", texts.len())));
        }
        let (mut tokens, mut ids, mut added) = (Vec::with_capacity(texts.len()), HashMap::new(), Vec::new());
        for (id, (content, kind)) in texts.into_iter().zip(kinds).enumerate() {
            let id = id as u32; // `texts.len()` fits
            tokens.push((kind != KIND_UNUSED).then_some(content));
            if kind == KIND_UNUSED {
                continue;
            }
            if let Some(first) = ids.insert(content, id) {
                return Err(wrong(TOKENS, format!("{content:?} as {first} and {id}"), "every token once"));
            }
            if matches!(kind, KIND_UNKNOWN | KIND_CONTROL | KIND_USER_DEFINED) {
                added.push(Added { id, content, special: kind != KIND_USER_DEFINED });
            }
        }
        let special = Special::read(file, &tokens)?;
        let merges = read_merges(file, &ids)?;
        let add_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(splitter.add_bos);
        let add_eos = file.bool("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
        Ok(Tokenizer { tokens, ids, added, merges, splitter, special, add_bos, add_eos })
    }

    fn json(&self) -> Result<Json, ImportError> {
        let vocab: Map<String, Json> = self.ids.iter().map(|(text, id)| ((*text).to_owned(), json!(id))).collect();
        let steps: Vec<Json> = self.splitter.steps.iter().map(|step| step.json()).collect();
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added.iter().map(Added::json).collect::<Vec<Json>>(),
            "normalizer": if self.splitter.nfc { json!({ "type": "NFC" }) } else { Json::Null },
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": steps },
            "post_processor": self.post_processor()?,
            "decoder": byte_level(true),
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": null,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": false,
                "byte_fallback": false,
                "ignore_merges": self.splitter.ignore_merges,
                "vocab": vocab,
                "merges": self.merges.iter().map(|(left, right)| json!([left, right])).collect::<Vec<Json>>(),
            },
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
        self.tokens.get(id as usize).copied().flatten()
    }
}

impl Special {
    fn read(file: &GgufFile, tokens: &[Option<&str>]) -> Result<Special, ImportError> {
        let read = |role: &str| {
            let key = format!("tokenizer.ggml.{role}_token_id");
            let Some(id) = file.unsigned(&key)? else { return Ok(None) };
            let inside = usize::try_from(id).is_ok_and(|id| id < tokens.len());
            // `tokens.len()` fits u32, so the id does.
            if inside { Ok(Some(id as u32)) } else { Err(wrong(&key, id, format!("below {}", tokens.len()))) }
        };
        Ok(Special { bos: read("bos")?, eos: read("eos")?, unknown: read("unknown")?, padding: read("padding")? })
    }
}

impl Added<'_> {
    fn json(&self) -> Json {
        json!({
            "id": self.id, "content": self.content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": self.special,
        })
    }
}

impl Step {
    fn json(self) -> Json {
        match self {
            Step::Digits => json!({ "type": "Digits", "individual_digits": true }),
            Step::Split(regex) => {
                json!({ "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated", "invert": false })
            }
            Step::ByteLevelGpt2 => byte_level(true),
            Step::ByteLevel => byte_level(false),
        }
    }
}

fn byte_level(use_regex: bool) -> Json {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

/// Pairs in the order in which they are merged, each checked against the vocabulary.
fn read_merges<'a>(file: &'a GgufFile, ids: &HashMap<&str, u32>) -> Result<Vec<(&'a str, &'a str)>, ImportError> {
    let lines = file.strings(MERGES)?.ok_or_else(|| wrong(MERGES, "missing", "an array of strings"))?;
    let mut joined = String::new();
    let mut merges = Vec::with_capacity(lines.len());
    for line in lines {
        // The left part may itself begin with a space.
        let first = line.chars().next().map_or(0, char::len_utf8);
        let space = line[first..].find(' ').map(|at| at + first);
        let (left, right) = space.map_or((line, ""), |at| (&line[..at], &line[at + 1..]));
        joined.clear();
        joined.extend([left, right]);
        if ![left, right, &joined].into_iter().all(|text| ids.contains_key(text)) {
            return Err(wrong(MERGES, format!("{line:?}"), "two tokens that make a third"));
        }
        merges.push((left, right));
    }
    Ok(merges)
}

fn find_splitter(name: &str) -> Result<&'static Splitter, ImportError> {
    SPLITTERS.iter().find(|s| s.names.contains(&name)).ok_or_else(|| ImportError::Unsupported {
        what: format!("pre-tokenizer {name:?}"),
        supported: SPLITTERS.iter().flat_map(|s| s.names).copied().collect::<Vec<_>>().join(", "),
    })
}

fn wrong(key: &str, have: impl ToString, want: impl Into<String>) -> ImportError {
    GgufError::Metadata { key: key.to_owned(), have: have.to_string(), want: want.into() }.into()
}

const SPLITTERS: &[Splitter] = &[
    Splitter {
        names: &["smollm"],
        nfc: false,
        steps: &[Step::Digits, Step::ByteLevelGpt2],
        ignore_merges: false,
        add_bos: false,
    },
    Splitter { names: &["gpt-2"], nfc: false, steps: &[Step::ByteLevelGpt2], ignore_merges: false, add_bos: false },
    Splitter {
        names: &["qwen2"],
        nfc: true,
        steps: &[Step::Split(QWEN2_WORDS), Step::ByteLevel],
        ignore_merges: false,
        add_bos: false,
    },
    Splitter {
        names: &["llama-bpe", "llama3", "llama-v3"],
        nfc: false,
        steps: &[Step::Split(LLAMA3_WORDS), Step::ByteLevel],
        ignore_merges: true,
        add_bos: true,
    },
    // What llama.cpp does for a file that does not say how its text was cut.
    Splitter {
        names: &["default"],
        nfc: false,
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
            Step::ByteLevel,
        ],
        ignore_merges: false,
        add_bos: false,
    },
];
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TOKENS: &str = "tokenizer.ggml.tokens";
const KINDS: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const KIND_NORMAL: i64 = 1;
const KIND_UNKNOWN: i64 = 2;
const KIND_CONTROL: i64 = 3;
const KIND_USER_DEFINED: i64 = 4;
const KIND_UNUSED: i64 = 5;
