//! Which branches a converted model gets: from a list of weights, from adapters, or both.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::{
    LoraBits, LoraError, LoraPlan, PeftAdapter, UpdatableMode, a_name, load_peft,
    peft::{Half, parse_key},
};
use crate::{error::Error, offline::safetensors::read_text};

/// What the converter is told about adapters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoraOptions {
    /// File with names of LoRA weights, one a line (`--lora_weight_list`).
    pub weight_list: Option<PathBuf>,
    /// PEFT directories (`--lora_adapter`); without a list, the branches are those that they need together.
    pub adapters: Vec<PathBuf>,
    /// Columns of the branches. Default: the largest rank of the adapters.
    pub max_rank: Option<usize>,
    /// Storage of the adapters' weights; see [`LoraPlan::bits`].
    pub bits: Option<LoraBits>,
    /// Which encodings a section may replace.
    pub mode: UpdatableMode,
}

/// The branches that `options` asks for, and the adapters it names, before a model is seen.
///
/// # Errors
/// [`Error::Io`]; [`Error::Lora`] naming the file and the line or tensor that cannot be.
pub fn plan(options: &LoraOptions) -> Result<(LoraPlan, Vec<PeftAdapter>), Error> {
    let adapters = options.adapters.iter().map(|dir| load_peft(dir)).collect::<Result<Vec<_>, _>>()?;
    let targets = match &options.weight_list {
        None => adapters.iter().flat_map(|adapter| &adapter.modules).map(|module| module.name.clone()).collect(),
        Some(path) => {
            let text = read_text(path, MAX_LIST_BYTES)?;
            let targets = listed(&String::from_utf8_lossy(&text)).map_err(Error::lora(path))?;
            for adapter in &adapters {
                if let Some(module) = adapter.modules.iter().find(|module| !targets.contains(&module.name)) {
                    let why = format!("{} does not list it", path.display());
                    return Err(Error::lora(&adapter.path)(LoraError::NoPoint { tensor: a_name(&module.name), why }));
                }
            }
            targets
        }
    };
    let rank = adapters.iter().map(PeftAdapter::rank).max();
    let max_rank = options.max_rank.or(rank).ok_or_else(|| {
        let why = LoraError::config("lora_max_rank", "not given", "a rank: a list of names does not tell it");
        Error::lora(options.weight_list.as_deref().unwrap_or(Path::new(".")))(why)
    })?;
    if let Some(adapter) = adapters.iter().find(|adapter| adapter.rank() > max_rank) {
        let name = adapter.path.display().to_string();
        return Err(Error::lora(&adapter.path)(LoraError::Rank { adapter: name, have: adapter.rank(), max: max_rank }));
    }
    Ok((LoraPlan { targets, max_rank, bits: options.bits, mode: options.mode }, adapters))
}

/// The modules whose A and B `list` names, one name a line. Empty lines are passed over.
fn listed(list: &str) -> Result<BTreeSet<String>, LoraError> {
    let mut modules: BTreeMap<String, Vec<(Half, &str)>> = BTreeMap::new();
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (module, half) = parse_key(line)?;
        let halves = modules.entry(module).or_default();
        if halves.iter().any(|(other, _)| *other == half) {
            return Err(LoraError::Key { tensor: line.to_owned(), why: "is listed twice".to_owned() });
        }
        halves.push((half, line));
    }
    match modules.values().find(|halves| halves.len() == 1) {
        Some(halves) => Err(LoraError::Unpaired { have: halves[0].1.to_owned() }),
        None if modules.is_empty() => Err(LoraError::Empty),
        None => Ok(modules.into_keys().collect()),
    }
}

/// Longest list that is read.
const MAX_LIST_BYTES: u64 = 16 << 20;
