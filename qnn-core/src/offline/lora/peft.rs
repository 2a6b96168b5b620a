//! A PEFT directory: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::{LoraError, PREFIX, config::PeftConfig};
use crate::{
    error::Error,
    map::Bytes,
    offline::{
        safetensors::{SafetensorsFile, read_text},
        source::{ElementFormat, SourceTensor},
    },
};

/// An adapter as PEFT stores it. Everything in it is complete and consistent; whether it fits a model is another question.
#[derive(Debug)]
pub struct PeftAdapter {
    /// Its directory.
    pub path: PathBuf,
    /// What its config says.
    pub config: PeftConfig,
    /// Its pairs, in natural order of their names (layer 2 before layer 10).
    pub modules: Vec<PeftModule>,
    /// Hash of both files.
    pub hash: String,
}

/// The pair of one module: `scaling · B · A` is added to the module's weight.
#[derive(Debug)]
pub struct PeftModule {
    /// Path of the module in the model: `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Columns of the pair.
    pub rank: usize,
    /// Outputs of the module.
    pub n: usize,
    /// Inputs of the module.
    pub k: usize,
    /// `lora_alpha / rank`, or what the config says for this module.
    pub scaling: f64,
    /// A: `[rank, k]`.
    pub a: Vec<f32>,
    /// B: `[n, rank]`, not scaled.
    pub b: Vec<f32>,
}

impl PeftAdapter {
    /// Largest rank of its modules.
    pub fn rank(&self) -> usize {
        self.modules.iter().map(|module| module.rank).max().unwrap_or(0)
    }
}

/// Reads the PEFT directory `dir`, or the one that the weights file `dir` lies in.
///
/// # Errors
/// [`Error::Io`]; [`Error::Lora`] naming the feature that cannot be represented, the tensor that is alone, of a wrong
/// shape or not finite, or the key that the config does not explain.
pub fn load_peft(dir: &Path) -> Result<PeftAdapter, Error> {
    let (folder, weights) = if dir.is_file() {
        (dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")), dir.to_owned())
    } else {
        (dir, dir.join(WEIGHTS))
    };
    let config_path = folder.join(CONFIG);
    if folder.is_dir() && !config_path.is_file() {
        return Err(Error::lora(dir)(LoraError::NoConfig));
    }
    let config_text = read_text(&config_path, MAX_CONFIG_BYTES)?;
    let config = PeftConfig::from_json(&config_text).map_err(Error::lora(&config_path))?;
    if weights.extension().is_some_and(|e| e == "bin") || (!weights.is_file() && folder.join(PICKLE).is_file()) {
        let what = "weights in a pickle (adapter_model.bin)".to_owned();
        let instead = "save them with save_pretrained(..., safe_serialization=True)";
        return Err(Error::lora(folder)(LoraError::NotSupported { what, instead }));
    }
    let bytes = Bytes::map_file(&weights).map_err(Error::io(&weights))?;
    let mut hash = blake3::Hasher::new();
    hash.update(&config_text).update(&bytes);
    let file = SafetensorsFile::parse(bytes).map_err(LoraError::Safetensors).map_err(Error::lora(&weights))?;
    if file.metadata("format") == Some(super::import::FORMAT) {
        return Err(Error::lora(&weights)(LoraError::IsImported));
    }
    let modules = modules(&file, &config).map_err(Error::lora(&weights))?;
    Ok(PeftAdapter { path: folder.to_owned(), config, modules, hash: hash.finalize().to_hex().to_string() })
}

/// Which half of a pair a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    A,
    B,
}

#[derive(Default)]
struct Pair {
    a: Option<(String, SourceTensor)>,
    b: Option<(String, SourceTensor)>,
}

fn modules(file: &SafetensorsFile, config: &PeftConfig) -> Result<Vec<PeftModule>, LoraError> {
    // Refuse by name before any tensor is read.
    let mut found = Vec::new();
    for key in file.names() {
        found.push((key, parse_key(key)?));
    }
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for (key, (module, half)) in found {
        let tensor = read(file, key)?;
        let pair = pairs.entry(module).or_default();
        let slot = if half == Half::A { &mut pair.a } else { &mut pair.b };
        if let Some((first, _)) = slot.replace((key.to_owned(), tensor)) {
            return Err(LoraError::Key { tensor: key.to_owned(), why: format!("stands for the same as {first}") });
        }
    }
    if pairs.is_empty() {
        return Err(LoraError::Empty);
    }
    let modules = pairs.into_iter().map(|(name, pair)| join(name, pair, config));
    let mut modules = modules.collect::<Result<Vec<_>, _>>()?;
    modules.sort_by_cached_key(|module| natural(&module.name));
    Ok(modules)
}

/// The module and half that `key` stands for: `base_model.model.<module>.lora_A.weight`, perhaps with the adapter's name
/// before `weight`.
pub(super) fn parse_key(key: &str) -> Result<(String, Half), LoraError> {
    let refuse = |what: &str, instead| Err(LoraError::NotSupported { what: format!("{what} ({key})"), instead });
    let unknown = |why: &str| Err(LoraError::Key { tensor: key.to_owned(), why: why.to_owned() });
    let Some(path) = key.strip_prefix(PREFIX) else {
        return unknown("does not begin with base_model.model., as PEFT's keys do");
    };
    let parts: Vec<&str> = path.split('.').collect();
    let Some(at) = parts.iter().position(|part| part.starts_with("lora_")) else {
        return refuse("a whole weight", "train without modules_to_save and save with save_embedding_layers=False");
    };
    let (module, tail) = (parts[..at].join("."), &parts[at + 1..]);
    let half = match parts[at] {
        "lora_A" => Half::A,
        "lora_B" => Half::B,
        "lora_magnitude_vector" => {
            return refuse("DoRA", "train with use_dora=False, or merge the adapter into the base and convert that");
        }
        "lora_embedding_A" | "lora_embedding_B" => {
            return refuse("LoRA on an embedding", "leave embeddings out of target_modules");
        }
        _ => return unknown("is no part of a LoRA pair"),
    };
    if tail.last() == Some(&"bias") {
        return refuse("a bias in a LoRA pair", "train with lora_bias=False");
    }
    if !matches!(tail, ["weight"] | [_, "weight"]) || module.is_empty() {
        return unknown("does not end with lora_A.weight or lora_A.<adapter>.weight");
    }
    if parts[at - 1] == "lm_head" {
        return refuse("LoRA on lm_head", "leave lm_head out of target_modules");
    }
    Ok((module, half))
}

fn read(file: &SafetensorsFile, key: &str) -> Result<SourceTensor, LoraError> {
    let refuse =
        |have: String, want: &str| Err(LoraError::Tensor { tensor: key.to_owned(), have, want: want.to_owned() });
    let Some(stored) = file.tensor(key) else { return refuse("no bytes".to_owned(), "a tensor") };
    let format = match stored.dtype {
        "F32" => ElementFormat::F32,
        "F16" => ElementFormat::F16,
        "BF16" => ElementFormat::Bf16,
        other => return refuse(format!("elements {other}"), "F32, F16 or BF16"),
    };
    if stored.shape.len() != 2 {
        return refuse(format!("shape {:?}", stored.shape), "two extents: the adapter of a linear layer");
    }
    let tensor = SourceTensor::new(key, stored.shape, format, stored.bytes);
    tensor.map_err(|why| LoraError::Import(Box::new(why)))
}

fn join(name: String, pair: Pair, config: &PeftConfig) -> Result<PeftModule, LoraError> {
    let ((a_key, a), (b_key, b)) = match (pair.a, pair.b) {
        (Some(a), Some(b)) => (a, b),
        (Some((have, _)), None) | (None, Some((have, _))) => return Err(LoraError::Unpaired { have }),
        (None, None) => return Err(LoraError::Empty),
    };
    if !config.selects(&name)? {
        return Err(LoraError::NotSelected { tensor: a_key, module: name });
    }
    let rank = config.rank_of(&name)?;
    let shape =
        |tensor: &str, have: String, want: String| Err(LoraError::Tensor { tensor: tensor.to_owned(), have, want });
    if a.n() != rank {
        return shape(&a_key, format!("{} rows", a.n()), format!("{rank}, the rank that adapter_config.json gives it"));
    }
    if b.k() != rank {
        return shape(
            &b_key,
            format!("rows of {}", b.k()),
            format!("{rank}, the rank that adapter_config.json gives it"),
        );
    }
    let finite = |key: &str, tensor: &SourceTensor| {
        let values = tensor.to_f32();
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(at) => Err(LoraError::Tensor {
                tensor: key.to_owned(),
                have: format!("{} in row {}", values[at], at / tensor.k()),
                want: "finite values".to_owned(),
            }),
        }
    };
    let scaling = config.scaling_of(&name)?;
    Ok(PeftModule { rank, n: b.n(), k: a.k(), scaling, a: finite(&a_key, &a)?, b: finite(&b_key, &b)?, name })
}

/// A key that sorts numbers in names by value.
pub(super) fn natural(name: &str) -> Vec<(u64, String)> {
    name.split('.').map(|part| part.parse().map_or((u64::MAX, part.to_owned()), |n| (n, String::new()))).collect()
}

pub(super) const CONFIG: &str = "adapter_config.json";
pub(super) const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";
/// Longest `adapter_config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
