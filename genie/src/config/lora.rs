//! The `lora` block of a model: its adapters, and what happens to the cache when they change.

use std::path::{Path, PathBuf};

use super::ConfigError;
use super::json::Entry;
use crate::engine::{AdapterSource, GroupSource};

/// The adapters of a model. (`engine/model/binary/lora`)
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LoraConfig {
    /// Name under which all strengths of an adapter are set at once. (`alpha-tensor-name`; `lora_alpha` unless given)
    pub alpha_tensor_name: String,
    /// The adapters that may be applied. (`adapters`)
    pub adapters: Vec<AdapterConfig>,
    /// What happens to cache rows of another adapter or strength. (`kv-reuse`, not in Genie's schema)
    pub kv_reuse: KvReuse,
}

/// One adapter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AdapterConfig {
    /// Name to apply it by. (`name`)
    pub name: String,
    /// Names of its strengths, in the order of its slots; empty means that they keep their own. (`alphas`)
    pub alphas: Vec<String>,
    /// Its files, resolved, with those of its group. (`bin-sections`, `groups`; or `peft`, which is not in Genie's schema)
    pub source: AdapterSource,
}

/// What a query does about cache rows that another adapter, or another strength, made.
///
/// In every case a query that gives the whole conversation anew ([`crate::SentenceCode::Rewind`],
/// [`crate::Dialog::chat`]) takes over no such row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KvReuse {
    /// The conversation goes on behind them, as Genie has it; reports and profiles say so. (`keep`)
    #[default]
    Keep,
    /// They are computed again from the tokens of the conversation, and all that follows them. (`prefill`)
    Prefill,
    /// The query is refused if it would use them. (`refuse`)
    Refuse,
}

impl Default for LoraConfig {
    /// No adapters.
    fn default() -> Self {
        Self { alpha_tensor_name: DEFAULT_ALPHA.to_owned(), adapters: Vec::new(), kv_reuse: KvReuse::Keep }
    }
}

/// Reads the block of a model of `n_splits` context binaries.
pub(super) fn parse(entry: &Entry<'_>, base_dir: &Path, n_splits: usize) -> Result<LoraConfig, ConfigError> {
    let fields = entry.object(KEYS)?;
    fields.version()?;
    if let Some(version) = fields.get("lora-version")
        && version.int(1..=3)? == 1
    {
        return Err(version.unsupported("lora-version 1, weights as graph inputs: make sections and use version 2"));
    }
    let alpha_tensor_name = match fields.get("alpha-tensor-name") {
        Some(entry) => name(&entry)?,
        None => DEFAULT_ALPHA.to_owned(),
    };
    let items = fields.need("adapters")?;
    let items = bounded(&items, MAX_ADAPTERS, "adapters")?;
    let mut adapters: Vec<AdapterConfig> = Vec::new();
    for item in &items {
        let adapter = parse_adapter(item, base_dir, n_splits, &alpha_tensor_name)?;
        if adapters.iter().any(|known| known.name == adapter.name) {
            return Err(item.value(format!("another name than {:?}, which is there already", adapter.name)));
        }
        adapters.push(adapter);
    }
    if let Some(groups) = fields.get("groups") {
        put_in_groups(&groups, &mut adapters, base_dir, n_splits)?;
    }
    let kv_reuse = match fields.get("kv-reuse") {
        Some(entry) => match entry.word(&["keep", "prefill", "refuse"])? {
            "prefill" => KvReuse::Prefill,
            "refuse" => KvReuse::Refuse,
            _ => KvReuse::Keep,
        },
        None => KvReuse::Keep,
    };
    Ok(LoraConfig { alpha_tensor_name, adapters, kv_reuse })
}

fn parse_adapter(
    entry: &Entry<'_>,
    base_dir: &Path,
    n_splits: usize,
    alpha_tensor_name: &str,
) -> Result<AdapterConfig, ConfigError> {
    let fields = entry.object(ADAPTER_KEYS)?;
    fields.version()?;
    if let Some(path) = fields.get("path") {
        return Err(path.value("no such key: it belongs to lora-version 1; need \"bin-sections\" or \"peft\""));
    }
    let alphas = match fields.get("alphas") {
        Some(entry) => parse_alphas(&entry, alpha_tensor_name)?,
        None => Vec::new(),
    };
    let source = match fields.get("peft") {
        Some(folder) if fields.get("bin-sections").is_some() => {
            return Err(folder.value("no such key beside \"bin-sections\""));
        }
        Some(folder) => AdapterSource::Peft(existing_folder(&folder, base_dir)?),
        None => AdapterSource::Sections(parse_sections(&fields.need("bin-sections")?, base_dir, n_splits)?),
    };
    Ok(AdapterConfig { name: name(&fields.need("name")?)?, alphas, source })
}

fn parse_alphas(entry: &Entry<'_>, alpha_tensor_name: &str) -> Result<Vec<String>, ConfigError> {
    let items = bounded(entry, MAX_ALPHAS, "alphas")?;
    let mut alphas: Vec<String> = Vec::new();
    for item in &items {
        let alpha = name(item)?;
        if alphas.contains(&alpha) {
            return Err(item.value("a name that is not there already"));
        }
        if alpha == alpha_tensor_name && 1 < items.len() {
            return Err(item.value("another name than alpha-tensor-name, which sets all alphas at once"));
        }
        alphas.push(alpha);
    }
    Ok(alphas)
}

/// One section per context binary; an empty text where a split has no branches.
fn parse_sections(entry: &Entry<'_>, base_dir: &Path, n_splits: usize) -> Result<Vec<Option<PathBuf>>, ConfigError> {
    let items = entry.list()?;
    if items.len() != n_splits {
        return Err(entry.value(format!("{n_splits} sections, one for each of ctx-bins, \"\" for none")));
    }
    let paths = files(&items, base_dir)?;
    if paths.iter().all(Option::is_none) {
        return Err(entry.value("at least one section that is not \"\""));
    }
    Ok(paths)
}

fn files(items: &[Entry<'_>], base_dir: &Path) -> Result<Vec<Option<PathBuf>>, ConfigError> {
    let path = |item: &Entry<'_>| match item.text()? {
        "" => Ok(None),
        _ => super::existing_file(item, base_dir).map(Some),
    };
    items.iter().map(path).collect()
}

/// Gives the members of each group its quantization sections. A group without any has no effect.
fn put_in_groups(
    entry: &Entry<'_>,
    adapters: &mut [AdapterConfig],
    base_dir: &Path,
    n_splits: usize,
) -> Result<(), ConfigError> {
    let mut names: Vec<String> = Vec::new();
    for item in bounded(entry, MAX_ADAPTERS, "groups")? {
        let fields = item.object(GROUP_KEYS)?;
        fields.version()?;
        let named = fields.need("name")?;
        let group_name = name(&named)?;
        if names.contains(&group_name) {
            return Err(named.value("a name that no other group has"));
        }
        names.push(group_name.clone());
        let sections = match fields.get("quant-bin-sections") {
            Some(entry) => parse_quant_sections(&entry, base_dir, n_splits)?,
            None => Vec::new(),
        };
        let has_sections = sections.iter().any(Option::is_some);
        let group = GroupSource { name: group_name, sections };
        for member in bounded(&fields.need("members")?, MAX_ADAPTERS, "members")? {
            let text = member.text()?;
            let Some(adapter) = adapters.iter_mut().find(|adapter| adapter.name == text) else {
                let known: Vec<&str> = adapters.iter().map(|adapter| adapter.name.as_str()).collect();
                return Err(member.value(format!("the name of an adapter: {}", known.join(", "))));
            };
            if has_sections {
                put_in(&member, adapter, &group)?;
            }
        }
        if !has_sections {
            super::no_effect(&item);
        }
    }
    Ok(())
}

fn put_in(member: &Entry<'_>, adapter: &mut AdapterConfig, group: &GroupSource) -> Result<(), ConfigError> {
    let sections = match &adapter.source {
        AdapterSource::Sections(sections) => sections.clone(),
        AdapterSource::Grouped { group: other, .. } => {
            return Err(member.value(format!("an adapter that is not in group {:?} already", other.name)));
        }
        AdapterSource::Peft(_) => {
            return Err(
                member.value("an adapter with \"bin-sections\": one with \"peft\" runs with the base's encodings")
            );
        }
    };
    adapter.source = AdapterSource::Grouped { sections, group: group.clone() };
    Ok(())
}

/// One section per context binary; an empty text where a split has none, an empty list where none has.
fn parse_quant_sections(
    entry: &Entry<'_>,
    base_dir: &Path,
    n_splits: usize,
) -> Result<Vec<Option<PathBuf>>, ConfigError> {
    let paths = files(&entry.list()?, base_dir)?;
    match paths.len() {
        0 => Ok(paths),
        len if len == n_splits => Ok(paths),
        _ => Err(entry.value(format!("{n_splits} sections, one for each of ctx-bins, \"\" for none"))),
    }
}

fn existing_folder(entry: &Entry<'_>, base_dir: &Path) -> Result<PathBuf, ConfigError> {
    let path = base_dir.join(entry.text()?);
    let fail = |why| ConfigError::File { pointer: entry.pointer().to_owned(), path: path.clone(), why };
    if !std::fs::metadata(&path).map_err(fail)?.is_dir() {
        return Err(fail(std::io::Error::new(std::io::ErrorKind::NotADirectory, "not a directory")));
    }
    Ok(path)
}

fn bounded<'a>(entry: &Entry<'a>, limit: usize, what: &str) -> Result<Vec<Entry<'a>>, ConfigError> {
    let items = entry.list()?;
    if limit < items.len() {
        return Err(entry.value(format!("at most {limit} {what}")));
    }
    Ok(items)
}

fn name(entry: &Entry<'_>) -> Result<String, ConfigError> {
    match entry.text()? {
        "" => Err(entry.value("a name that is not empty")),
        text if MAX_NAME_BYTES < text.len() => Err(entry.value(format!("a name of at most {MAX_NAME_BYTES} bytes"))),
        text => Ok(text.to_owned()),
    }
}

/// Name of the strengths where the config gives none.
const DEFAULT_ALPHA: &str = "lora_alpha";

const KEYS: &[&str] = &["version", "lora-version", "alpha-tensor-name", "adapters", "groups", "kv-reuse"];

const ADAPTER_KEYS: &[&str] = &["version", "name", "alphas", "bin-sections", "peft", "path"];

const GROUP_KEYS: &[&str] = &["version", "name", "members", "quant-bin-sections"];

/// Most adapters of one model, and most groups.
const MAX_ADAPTERS: usize = 4096;

/// Most strengths of one adapter.
const MAX_ALPHAS: usize = 256;

/// Longest name.
const MAX_NAME_BYTES: usize = 256;
