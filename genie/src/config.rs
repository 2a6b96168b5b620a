//! Strict JSON in, [`DialogConfig`] out.
//!
//! The schema is Genie's dialog schema. Every key of it is known here; a key, a type or a value that this version
//! cannot honour is refused with its JSON pointer, never ignored. Keys that only steer Qualcomm hardware are checked
//! and then reported once, at level INFO, as having no effect.

use std::path::{Path, PathBuf};

use crate::Error;

mod context;
mod engine;
mod error;
mod json;
mod lora;
mod sampler;

pub use context::ContextConfig;
pub use engine::{EngineConfig, PositionalEncoding, RopeScaling};
pub use error::ConfigError;
pub use lora::{AdapterConfig, KvReuse, LoraConfig};
pub use sampler::{SamplerConfig, TokenPenalty};

use json::{Entry, Fields};

/// Everything a dialog is made from. (`GenieDialogConfig_createFromJson`)
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DialogConfig {
    /// How the dialog behaves.
    pub settings: Settings,
    /// The `tokenizer.json`, resolved. (`dialog/tokenizer/path`)
    pub tokenizer_path: PathBuf,
    /// What runs the model. (`dialog/engine`)
    pub engine: EngineConfig,
}

/// The part of a dialog's config that names no file.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Size of context and vocabulary, and the control tokens. (`dialog/context`)
    pub context: ContextConfig,
    /// How tokens are chosen. (`dialog/sampler`)
    pub sampler: SamplerConfig,
    /// Texts that end an answer. (`dialog/stop-sequence`)
    pub stop_sequences: Vec<String>,
    /// Most tokens an answer may have; `u32::MAX` means no limit, 0 counts as 1. (`dialog/max-num-tokens`)
    pub max_num_tokens: u32,
}

impl DialogConfig {
    /// Reads a config file. Relative paths in it are resolved against its directory.
    ///
    /// # Errors
    /// [`Error::Config`] with the JSON pointer of what is wrong.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let fail = |why| Error::Config { origin: path.display().to_string(), why };
        let text = read_bounded(path).map_err(|why| fail(ConfigError::Read { why }))?;
        let base_dir = path.parent().unwrap_or(Path::new(""));
        parse_dialog(&text, base_dir).map_err(fail)
    }

    /// Reads a config text. Relative paths in it are resolved against `base_dir`.
    ///
    /// # Errors
    /// [`Error::Config`] with the JSON pointer of what is wrong.
    pub fn from_json(text: &str, base_dir: impl AsRef<Path>) -> Result<Self, Error> {
        parse_dialog(text, base_dir.as_ref()).map_err(in_text)
    }
}

/// Reads `{"stop-sequence": [...]}`; an empty text or `{}` gives none. (`GenieDialog_setStopSequence`)
pub(crate) fn stop_sequences_from_json(text: &str) -> Result<Vec<String>, Error> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let read = || {
        let root = json::parse(text)?;
        let fields = root.root().object(&["stop-sequence"])?;
        fields.get("stop-sequence").map_or(Ok(Vec::new()), |entry| stop_sequences(&entry))
    };
    read().map_err(in_text)
}

/// Reads `{"sampler": {…}}` over `base`: keys that are absent keep their value. (`GenieSampler_applyConfig`)
pub(crate) fn sampler_from_json(text: &str, base: &SamplerConfig) -> Result<SamplerConfig, Error> {
    let read = || {
        let root = json::parse(text)?;
        sampler::merge(&root.root().object(&["sampler"])?.need("sampler")?, base)
    };
    read().map_err(in_text)
}

fn in_text(why: ConfigError) -> Error {
    Error::Config { origin: "text".to_owned(), why }
}

pub(crate) fn in_settings(why: ConfigError) -> Error {
    Error::Config { origin: "settings".to_owned(), why }
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::{Error, ErrorKind, Read};
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if MAX_FILE_BYTES < text.len() as u64 {
        return Err(Error::new(ErrorKind::FileTooLarge, format!("more than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn parse_dialog(text: &str, base_dir: &Path) -> Result<DialogConfig, ConfigError> {
    let root = json::parse(text)?;
    let dialog = root.root().object(&["dialog"])?.need("dialog")?.object(DIALOG_KEYS)?;
    dialog.version()?;
    let kind = dialog.need("type")?;
    match kind.word(DIALOG_TYPES)? {
        "basic" => {}
        other => return Err(kind.unsupported(format!("dialog type {other:?}"))),
    }
    refuse_foreign_types(&dialog)?;
    dialog.refuse_unsupported(&["embedding", "accumulator-size", "debug"])?;
    let context = context::parse(&dialog.need("context")?)?;
    let tokenizer = dialog.need("tokenizer")?.object(&["version", "path"])?;
    tokenizer.version()?;
    let settings = Settings {
        sampler: match dialog.get("sampler") {
            Some(entry) => sampler::parse(&entry)?,
            None => SamplerConfig::default(),
        },
        stop_sequences: match dialog.get("stop-sequence") {
            Some(entry) => stop_sequences(&entry)?,
            None => Vec::new(),
        },
        max_num_tokens: match dialog.get("max-num-tokens") {
            Some(entry) => entry.int(0..=u32::MAX)?,
            None => u32::MAX,
        },
        context,
    };
    let engine = engine::parse(&dialog.need("engine")?, base_dir, &settings.context)?;
    let tokenizer_path = existing_file(&tokenizer.need("path")?, base_dir)?;
    Ok(DialogConfig { settings, tokenizer_path, engine })
}

/// A block named after a dialog type belongs to dialogs of that type only.
fn refuse_foreign_types(dialog: &Fields<'_>) -> Result<(), ConfigError> {
    match DIALOG_TYPES.iter().find_map(|name| dialog.get(name)) {
        Some(block) => Err(block.value("no such block: the dialog is of type \"basic\"")),
        None => Ok(()),
    }
}

fn stop_sequences(entry: &Entry<'_>) -> Result<Vec<String>, ConfigError> {
    let items = entry.list()?;
    if MAX_STOP_SEQUENCES < items.len() {
        return Err(entry.value(format!("at most {MAX_STOP_SEQUENCES} stop sequences")));
    }
    let text = |item: &Entry<'_>| match item.text()? {
        text if is_usable_stop(text) => Ok(text.to_owned()),
        _ => Err(item.value(format!("a text of 1 to {MAX_STOP_BYTES} bytes"))),
    };
    items.iter().map(text).collect()
}

fn is_usable_stop(text: &str) -> bool {
    (1..=MAX_STOP_BYTES).contains(&text.len())
}

/// Settings that do not come from JSON, but may hold anything.
pub(crate) fn check_stop_sequences(texts: &[String]) -> Result<(), ConfigError> {
    let Some(at) = texts.iter().position(|text| !is_usable_stop(text)) else { return Ok(()) };
    Err(ConfigError::Value {
        pointer: format!("/stop-sequence/{at}"),
        found: format!("a text of {} bytes", texts[at].len()),
        wanted: format!("a text of 1 to {MAX_STOP_BYTES} bytes"),
    })
}

/// The file named here, resolved against `base_dir`. It must be there.
fn existing_file(entry: &Entry<'_>, base_dir: &Path) -> Result<PathBuf, ConfigError> {
    let path = base_dir.join(entry.text()?);
    let fail = |why| ConfigError::File { pointer: entry.pointer().to_owned(), path: path.clone(), why };
    let meta = std::fs::metadata(&path).map_err(fail)?;
    if !meta.is_file() {
        return Err(fail(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")));
    }
    Ok(path)
}

fn no_effect(entry: &Entry<'_>) {
    tracing::info!("config {}: has no effect on a CPU", entry.pointer());
}

const DIALOG_TYPES: &[&str] = &["basic", "ssd-q1", "spd", "lade", "multistream", "eaglet", "kv-share"];

const DIALOG_KEYS: &[&str] = &[
    "version",
    "type",
    "context",
    "tokenizer",
    "engine",
    "sampler",
    "stop-sequence",
    "max-num-tokens",
    "embedding",
    "accumulator-size",
    "debug",
    "ssd-q1",
    "spd",
    "lade",
    "multistream",
    "eaglet",
    "kv-share",
];

/// Longest config file that is read.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Most stop sequences of one dialog.
const MAX_STOP_SEQUENCES: usize = 256;

/// Longest stop sequence.
const MAX_STOP_BYTES: usize = 4096;

#[cfg(test)]
mod tests;
