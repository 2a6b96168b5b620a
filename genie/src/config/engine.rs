//! The `engine` block: what runs the model, and from which files.

use std::path::{Path, PathBuf};

use super::json::{Entry, Fields};
use super::{ConfigError, ContextConfig, LoraConfig, lora};

/// What an engine is opened with.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Worker threads; 0 means one per core that may be used. (`engine/n-threads`)
    pub n_threads: usize,
    /// Context binaries in split order, resolved against the config's directory. (`engine/model/binary/ctx-bins`)
    pub ctx_bins: Vec<PathBuf>,
    /// Whether context binaries are mapped instead of read. (`engine/backend/QnnHtp/use-mmap`)
    pub use_mmap: bool,
    /// Cores for the workers, bit `i` for core `i`; without effect so far. (`engine/backend/QnnHtp/cpu-mask`)
    pub cpu_mask: Option<u64>,
    /// Whether the config lets idle workers spin; without effect so far. (`engine/backend/QnnHtp/poll`)
    pub poll: bool,
    /// Name of the engine inside its dialog, `primary` unless given. (`engine/role`)
    pub role: String,
    /// Positions the dialog may fill. (`context/size`)
    pub context_size: usize,
    /// Size of the vocabulary. (`context/n-vocab`)
    pub n_vocab: usize,
    /// Position encoding, where the config states one. (`engine/model/positional-encoding`)
    pub positional_encoding: Option<PositionalEncoding>,
    /// The adapters. (`engine/model/binary/lora`)
    pub lora: LoraConfig,
}

/// Rotary positions, as the config states them. The model's own values count; stated ones are compared with them when the model
/// is opened. A scaling that is not stated is none, a base that is not stated beside a scaling is 10000.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct PositionalEncoding {
    /// Half the number of rotated components of a head. (`rope-dim`)
    pub rope_dim: Option<usize>,
    /// Base of the rotation frequencies. (`rope-theta`)
    pub rope_theta: Option<f64>,
    /// How frequencies are scaled for longer contexts. (`rope-scaling`)
    pub rope_scaling: Option<RopeScaling>,
}

/// How rotation frequencies are scaled for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all. (`default`)
    Default,
    /// All frequencies are divided by `factor`. (`linear`)
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones kept, with a ramp between. (`llama3`)
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Below this many turns over the original context a frequency is low.
        low_freq_factor: f64,
        /// Above this many turns over the original context a frequency is high.
        high_freq_factor: f64,
        /// Context length of the first training.
        original_max_position_embeddings: usize,
    },
}

/// Reads the block. Sizes of the context come from its own block.
pub(super) fn parse(entry: &Entry<'_>, base_dir: &Path, context: &ContextConfig) -> Result<EngineConfig, ConfigError> {
    if entry.is_list() {
        return Err(entry.value("one object: arrays of engines belong to dialog types spd, eaglet and kv-share"));
    }
    let fields = entry.object(KEYS)?;
    fields.version()?;
    fields.refuse_unsupported(&["longcontext", "cache-groups", "training-config", "optimizer-config"])?;
    if let Some(kind) = fields.get("type") {
        kind.text()?;
        super::no_effect(&kind);
    }
    let role = fields.get("role").map_or(Ok("primary"), |role| role.word(ROLES))?;
    let htp = parse_backend(&fields.need("backend")?, base_dir)?;
    let model = parse_model(&fields.need("model")?, base_dir)?;
    if let (Some(key), Some(_)) = (&htp.rope_key, &model.positional_encoding) {
        return Err(key.value("no such key beside model/positional-encoding"));
    }
    Ok(EngineConfig {
        n_threads: fields.need("n-threads")?.int(0..=MAX_THREADS)?,
        ctx_bins: model.ctx_bins,
        use_mmap: htp.use_mmap,
        cpu_mask: htp.cpu_mask,
        poll: htp.poll,
        role: role.to_owned(),
        context_size: context.size,
        n_vocab: context.n_vocab,
        positional_encoding: model.positional_encoding.or(htp.positional_encoding),
        lora: model.lora,
    })
}

struct Htp<'a> {
    use_mmap: bool,
    cpu_mask: Option<u64>,
    poll: bool,
    positional_encoding: Option<PositionalEncoding>,
    /// The key that set `positional_encoding`.
    rope_key: Option<Entry<'a>>,
}

fn parse_backend<'a>(entry: &Entry<'a>, base_dir: &Path) -> Result<Htp<'a>, ConfigError> {
    let backend = entry.object(BACKEND_KEYS)?;
    backend.version()?;
    let kind = backend.need("type")?;
    match kind.word(BACKENDS)? {
        "QnnHtp" => {}
        other => return Err(kind.unsupported(format!("backend {other:?}"))),
    }
    if let Some(block) = BACKENDS[1..].iter().find_map(|name| backend.get(name)) {
        return Err(block.value("no such block: the backend is of type \"QnnHtp\""));
    }
    if let Some(extensions) = backend.get("extensions") {
        super::existing_file(&extensions, base_dir)?;
        super::no_effect(&extensions);
    }
    if let Some(device) = backend.get("device") {
        device.text()?;
        super::no_effect(&device);
    }
    parse_htp(&backend.need("QnnHtp")?)
}

fn parse_htp<'a>(entry: &Entry<'a>) -> Result<Htp<'a>, ConfigError> {
    let htp = entry.object(HTP_KEYS)?;
    htp.version()?;
    check_without_effect(&htp)?;
    if let Some(batch) = htp.get("batch-size") {
        match batch.int(1..=i32::MAX)? {
            1 => {}
            _ => return Err(batch.unsupported("a batch size above 1")),
        }
    }
    let (poll, cores) = (htp.need("poll")?, htp.need("cpu-mask")?);
    [&poll, &cores].into_iter().for_each(super::no_effect);
    let rope_dim = htp.get("pos-id-dim");
    let rope_theta = htp.get("rope-theta");
    let positional_encoding = PositionalEncoding {
        rope_dim: rope_dim.as_ref().map(|entry| entry.int(1..=MAX_DIM)).transpose()?,
        rope_theta: rope_theta.as_ref().map(theta).transpose()?,
        rope_scaling: None,
    };
    let rope_key = rope_dim.or(rope_theta);
    Ok(Htp {
        use_mmap: htp.need("use-mmap")?.bool()?,
        cpu_mask: cpu_mask(&cores)?,
        poll: poll.bool()?,
        positional_encoding: rope_key.is_some().then_some(positional_encoding),
        rope_key,
    })
}

/// Keys that steer Qualcomm hardware only: their types and their dependencies are checked.
fn check_without_effect(htp: &Fields<'_>) -> Result<(), ConfigError> {
    for key in ["spill-fill-bufsize", "mmap-budget"] {
        htp.need(key)?;
    }
    for key in ["spill-fill-bufsize", "mmap-budget", "kv-dim", "data-alignment-size"] {
        if let Some(entry) = htp.get(key) {
            entry.int(0..=i64::MAX)?;
            super::no_effect(&entry);
        }
    }
    let bools =
        ["allow-async-init", "enable-graph-switching", "weight-shared-lora", "skip-lora-validation", "shared-engine"];
    for key in bools {
        if let Some(entry) = htp.get(key) {
            entry.bool()?;
            super::no_effect(&entry);
        }
    }
    if let Some(method) = htp.get("kv-update-method") {
        method.text()?;
        super::no_effect(&method);
    }
    let is_on = |key| htp.get(key).is_some_and(|entry| matches!(entry.bool(), Ok(true)));
    if let Some(policy) = htp.get("graph-switching-lora-policy") {
        let policy_is_lazy = policy.word(&["lazy", "eager"])? == "lazy";
        if policy_is_lazy && !is_on("enable-graph-switching") {
            return Err(policy.value("\"lazy\" only with enable-graph-switching true"));
        }
        if policy_is_lazy && is_on("weight-shared-lora") {
            return Err(policy.value("\"eager\" with weight-shared-lora true"));
        }
        super::no_effect(&policy);
    }
    match htp.get("shared-engine") {
        Some(shared) if is_on("shared-engine") && !is_on("allow-async-init") => {
            Err(shared.value("true only with allow-async-init true"))
        }
        _ => Ok(()),
    }
}

/// Hexadecimal digits with or without `0x`.
fn cpu_mask(entry: &Entry<'_>) -> Result<Option<u64>, ConfigError> {
    let text = entry.text()?;
    let digits = text.strip_prefix("0x").or(text.strip_prefix("0X")).unwrap_or(text);
    let is_hex = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    match u64::from_str_radix(digits, 16) {
        Ok(mask) if is_hex && mask != 0 => Ok(Some(mask)),
        _ => Err(entry.value("a hexadecimal mask of 1 to 64 bits with a bit set, such as \"0xf0\"")),
    }
}

struct Model {
    ctx_bins: Vec<PathBuf>,
    positional_encoding: Option<PositionalEncoding>,
    lora: LoraConfig,
}

fn parse_model(entry: &Entry<'_>, base_dir: &Path) -> Result<Model, ConfigError> {
    let model = entry.object(MODEL_KEYS)?;
    model.version()?;
    let kind = model.need("type")?;
    match kind.word(MODELS)? {
        "binary" => {}
        other => return Err(kind.unsupported(format!("model type {other:?}"))),
    }
    if let Some(block) = MODELS[1..].iter().find_map(|name| model.get(name)) {
        return Err(block.value("no such block: the model is of type \"binary\""));
    }
    model.refuse_unsupported(&["draft-token-map", "mask-type"])?;
    for key in ["cross-attention", "linear-attention"] {
        match model.get(key) {
            Some(entry) if entry.bool()? => return Err(entry.unsupported(format!("{key:?}"))),
            _ => {}
        }
    }
    let binary = model.need("binary")?.object(&["version", "ctx-bins", "lora"])?;
    binary.version()?;
    let bins = binary.need("ctx-bins")?;
    let items = bins.list()?;
    if items.is_empty() || MAX_SPLITS < items.len() {
        return Err(bins.value(format!("1 to {MAX_SPLITS} paths")));
    }
    let ctx_bins = items.iter().map(|item| super::existing_file(item, base_dir)).collect::<Result<Vec<_>, _>>()?;
    let lora = binary.get("lora").map(|entry| lora::parse(&entry, base_dir, ctx_bins.len())).transpose()?;
    Ok(Model {
        ctx_bins,
        positional_encoding: model.get("positional-encoding").map(|entry| parse_positions(&entry)).transpose()?,
        lora: lora.unwrap_or_default(),
    })
}

fn parse_positions(entry: &Entry<'_>) -> Result<PositionalEncoding, ConfigError> {
    if entry.is_list() {
        return Err(entry.unsupported("a positional-encoding for each cache group"));
    }
    let fields = entry.object(&["type", "rope-dim", "rope-theta", "rope-scaling"])?;
    let kind = fields.need("type")?;
    match kind.word(&["rope", "absolute", "alibi", "none"])? {
        "rope" => {}
        other => return Err(kind.unsupported(format!("positional encoding {other:?}"))),
    }
    Ok(PositionalEncoding {
        rope_dim: fields.get("rope-dim").map(|entry| entry.int(1..=MAX_DIM)).transpose()?,
        rope_theta: fields.get("rope-theta").map(|entry| theta(&entry)).transpose()?,
        rope_scaling: fields.get("rope-scaling").map(|entry| parse_scaling(&entry)).transpose()?,
    })
}

fn parse_scaling(entry: &Entry<'_>) -> Result<RopeScaling, ConfigError> {
    let fields = entry.object(SCALING_KEYS)?;
    let kind = fields.need("rope-type")?;
    let positive = |key| fields.need(key)?.number("a number above 0", |x| 0.0 < x);
    let used: &[&str] = match kind.word(SCALINGS)? {
        "default" => &[],
        "linear" => &["factor"],
        "llama3" => &["factor", "low-freq-factor", "high-freq-factor", "original-max-position-embeddings"],
        other => return Err(kind.unsupported(format!("rope scaling {other:?}"))),
    };
    let unused = |key: &&&str| **key != "rope-type" && !used.contains(*key);
    if let Some(extra) = SCALING_KEYS.iter().filter(unused).find_map(|key| fields.get(key)) {
        return Err(extra.value("no such key for this rope-type"));
    }
    if let (Some(low), Some(high)) = (fields.get("low-freq-factor"), fields.get("high-freq-factor")) {
        let low = low.number("a number above 0", |x| 0.0 < x)?;
        high.number("a number above low-freq-factor", |x| low < x)?;
    }
    Ok(match used.len() {
        0 => RopeScaling::Default,
        1 => RopeScaling::Linear { factor: positive("factor")? },
        _ => RopeScaling::Llama3 {
            factor: positive("factor")?,
            low_freq_factor: positive("low-freq-factor")?,
            high_freq_factor: positive("high-freq-factor")?,
            original_max_position_embeddings: fields
                .need("original-max-position-embeddings")?
                .int(1..=i32::MAX as usize)?,
        },
    })
}

fn theta(entry: &Entry<'_>) -> Result<f64, ConfigError> {
    entry.number("a number above 0", |x| 0.0 < x)
}

const KEYS: &[&str] = &[
    "version",
    "backend",
    "model",
    "n-threads",
    "role",
    "type",
    "longcontext",
    "cache-groups",
    "training-config",
    "optimizer-config",
];

const ROLES: &[&str] = &["primary", "secondary", "draft", "target"];

const BACKENDS: &[&str] = &["QnnHtp", "QnnGenAiTransformer", "QnnGpu", "libtorch"];

const BACKEND_KEYS: &[&str] =
    &["version", "type", "extensions", "device", "QnnHtp", "QnnGenAiTransformer", "QnnGpu", "libtorch"];

const HTP_KEYS: &[&str] = &[
    "version",
    "spill-fill-bufsize",
    "use-mmap",
    "mmap-budget",
    "poll",
    "cpu-mask",
    "kv-dim",
    "pos-id-dim",
    "rope-theta",
    "kv-update-method",
    "allow-async-init",
    "enable-graph-switching",
    "graph-switching-lora-policy",
    "weight-shared-lora",
    "skip-lora-validation",
    "shared-engine",
    "data-alignment-size",
    "batch-size",
];

const MODELS: &[&str] = &["binary", "library", "checkpoint"];

const MODEL_KEYS: &[&str] = &[
    "version",
    "type",
    "binary",
    "library",
    "checkpoint",
    "positional-encoding",
    "draft-token-map",
    "cross-attention",
    "mask-type",
    "linear-attention",
];

const SCALINGS: &[&str] = &[
    "default",
    "llama3",
    "longrope",
    "linear",
    "yarnrope",
    "qwen2vl-mrope",
    "qwen3vl-mrope",
    "hunyuan",
    "proportional",
];

const SCALING_KEYS: &[&str] = &[
    "rope-type",
    "factor",
    "low-freq-factor",
    "high-freq-factor",
    "original-max-position-embeddings",
    "short-factor",
    "long-factor",
    "mrope-section",
    "time-step",
    "spatial-merge-size",
    "dim",
    "extrapolation-factor",
    "attn-factor",
    "beta-fast",
    "beta-slow",
    "partial-rotary-factor",
];

/// Most worker threads of one engine.
const MAX_THREADS: usize = 1024;

/// Most context binaries of one model.
const MAX_SPLITS: usize = 256;

/// Largest rotated half of a head.
const MAX_DIM: usize = 1 << 16;
