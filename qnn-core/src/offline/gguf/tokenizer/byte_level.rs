//! Byte-level BPE (`gpt2`): text is cut by the model's regular expressions, bytes become characters, pairs are merged.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

use super::{Parts, vocabulary, wrong};
use crate::offline::{error::ImportError, gguf::GgufFile};

/// How text is cut before merging, by the name in `tokenizer.ggml.pre`.
struct Splitter {
    names: &'static [&'static str],
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

/// Normalizer, pre-tokenizer, decoder and model.
///
/// # Errors
/// [`ImportError::Unsupported`] for a way of cutting that is not known here; merges that contradict the vocabulary.
pub(super) fn read(file: &GgufFile, ids: &HashMap<&str, u32>) -> Result<Parts, ImportError> {
    let splitter = find_splitter(file.string("tokenizer.ggml.pre")?.unwrap_or("default"))?;
    let steps: Vec<Json> = splitter.steps.iter().map(|step| step.json()).collect();
    let merges: Vec<Json> = read_merges(file, ids)?.iter().map(|(left, right)| json!([left, right])).collect();
    Ok(Parts {
        // A GGUF names no normalizer, and llama.cpp applies none to byte-level vocabularies: neither does this one, even
        // where the family's own tokenizer.json brings text to NFC first.
        normalizer: Json::Null,
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder: byte_level(true),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": splitter.ignore_merges,
            "vocab": vocabulary(ids),
            "merges": merges,
        }),
        add_bos: splitter.add_bos,
    })
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

/// The names in `tokenizer.ggml.pre` that are known here.
pub fn pre_tokenizer_names() -> Vec<&'static str> {
    SPLITTERS.iter().flat_map(|splitter| splitter.names).copied().collect()
}

fn find_splitter(name: &str) -> Result<&'static Splitter, ImportError> {
    SPLITTERS.iter().find(|s| s.names.contains(&name)).ok_or_else(|| ImportError::Unsupported {
        what: format!("pre-tokenizer {name:?}"),
        supported: pre_tokenizer_names().join(", "),
    })
}

impl Splitter {
    const fn new(names: &'static [&'static str], steps: &'static [Step]) -> Splitter {
        Splitter { names, steps, ignore_merges: false, add_bos: false }
    }
}

/// One way of cutting each; the names are those that converters to GGUF write.
const SPLITTERS: &[Splitter] = &[
    Splitter::new(&["gpt-2", "phi-2", "gigachat", "mellum", "mpt", "olmo", "jais", "exaone4"], &[Step::ByteLevelGpt2]),
    Splitter::new(
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        &[Step::Digits, Step::ByteLevelGpt2],
    ),
    Splitter::new(
        &["qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"],
        &[Step::Split(QWEN2_WORDS), Step::ByteLevel],
    ),
    Splitter {
        ignore_merges: true,
        add_bos: true,
        ..Splitter::new(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"],
            &[Step::Split(LLAMA3_WORDS), Step::ByteLevel],
        )
    },
    Splitter::new(&["smaug-bpe", "dbrx"], &[Step::Split(LLAMA3_WORDS), Step::ByteLevel]),
    Splitter::new(&["gpt-4o", "llama4", "kanana2"], &[Step::Split(GPT4O_WORDS), Step::ByteLevel]),
    Splitter {
        ignore_merges: true,
        add_bos: true,
        ..Splitter::new(&["tekken"], &[Step::Split(TEKKEN_WORDS), Step::ByteLevel])
    },
    Splitter::new(
        &["deepseek-coder"],
        &[
            Step::Split(r"[\r\n]"),
            Step::Split(r"\s?\p{L}+"),
            Step::Split(r"\s?\p{P}+"),
            Step::Split("[一-龥ࠀ-一가-퟿]+"),
            Step::Split(r"\p{N}"),
            Step::ByteLevel,
        ],
    ),
    Splitter::new(
        &["deepseek-v3"],
        &[Step::Split(r"\p{N}{1,3}"), Step::Split("[一-龥぀-ゟ゠-ヿ]+"), Step::Split(DEEPSEEK3_WORDS), Step::ByteLevel],
    ),
    // What llama.cpp does for a file that does not say how its text was cut.
    Splitter::new(
        &["default"],
        &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
            Step::ByteLevel,
        ],
    ),
];

const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_WORDS: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const MERGES: &str = "tokenizer.ggml.merges";
