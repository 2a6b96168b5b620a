//! `adapter_config.json`: what it means, with PEFT's own matching rules, and what is refused.

use fancy_regex::{Regex, RegexBuilder};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::LoraError;

/// The part of an `adapter_config.json` that decides what an adapter computes.
#[derive(Debug)]
pub struct PeftConfig {
    /// Rank where no pattern says otherwise.
    pub rank: usize,
    /// `lora_alpha` where no pattern says otherwise.
    pub alpha: f64,
    /// Scaling is `alpha / sqrt(rank)` instead of `alpha / rank`.
    pub use_rslora: bool,
    /// What the adapter was trained on, as its config calls it.
    pub base_model: Option<String>,
    /// What was found and has no effect here.
    pub warnings: Vec<String>,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
    target: Selector,
    exclude: Selector,
    layers: Vec<usize>,
    layers_pattern: Vec<Regex>,
}

/// Which modules a key of the config names.
#[derive(Debug)]
enum Selector {
    /// Modules with one of these names, or whose path ends with one of them.
    Names(Vec<String>),
    /// Modules whose whole path matches.
    Pattern(Regex),
    /// `all-linear`, or no value.
    All,
}

impl PeftConfig {
    /// Reads a config.
    ///
    /// # Errors
    /// [`LoraError`]: a feature that cannot be represented, by its key and with what to do instead, or a value of a wrong
    /// kind.
    pub fn from_json(json: &[u8]) -> Result<PeftConfig, LoraError> {
        let raw: Raw = serde_json::from_slice(json).map_err(LoraError::Json)?;
        raw.refuse_unsupported()?;
        let mut warnings = Vec::new();
        if raw.fan_in_fan_out == Some(true) {
            warnings.push("fan_in_fan_out is ignored, as PEFT does on linear layers".to_owned());
        }
        let rank = raw.r.unwrap_or(PEFT_DEFAULT_RANK);
        if rank == 0 {
            return Err(LoraError::config("r", "0", "1 or more"));
        }
        let rank_pattern = patterns("rank_pattern", raw.rank_pattern)?;
        if let Some((pattern, _)) = rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return Err(LoraError::config("rank_pattern", format!("0 for {}", pattern.as_str()), "1 or more"));
        }
        Ok(PeftConfig {
            rank,
            alpha: raw.lora_alpha.unwrap_or(PEFT_DEFAULT_ALPHA),
            use_rslora: raw.use_rslora.unwrap_or(false),
            base_model: raw.base_model_name_or_path,
            warnings,
            rank_pattern,
            alpha_pattern: patterns("alpha_pattern", raw.alpha_pattern)?,
            target: target(raw.target_modules)?,
            exclude: match raw.exclude_modules {
                None => Selector::Names(Vec::new()),
                Some(OneOrMany::Many(names)) => Selector::Names(names),
                Some(OneOrMany::One(pattern)) => Selector::Pattern(whole("exclude_modules", &pattern)?),
            },
            layers: match raw.layers_to_transform {
                None => Vec::new(),
                Some(OneOrMany::One(layer)) => vec![layer],
                Some(OneOrMany::Many(layers)) => layers,
            },
            layers_pattern: layers_pattern(raw.layers_pattern)?,
        })
    }

    /// Whether PEFT would put an adapter on `module`, a path like `model.layers.0.self_attn.q_proj`.
    ///
    /// # Errors
    /// [`LoraError::Pattern`] if a pattern takes too long on it.
    pub fn selects(&self, module: &str) -> Result<bool, LoraError> {
        if self.exclude.selects(module)? || !self.target.selects(module)? {
            return Ok(false);
        }
        let by_name = matches!(self.target, Selector::Names(_));
        if !by_name || self.layers.is_empty() {
            return Ok(true);
        }
        for pattern in &self.layers_pattern {
            let found = pattern.captures(module).map_err(|why| too_hard(pattern, why))?;
            if let Some(index) = found.and_then(|groups| groups.get(1)) {
                return Ok(index.as_str().parse().is_ok_and(|layer| self.layers.contains(&layer)));
            }
        }
        Ok(false)
    }

    /// Rank of the adapter on `module`.
    ///
    /// # Errors
    /// As [`PeftConfig::selects`].
    pub fn rank_of(&self, module: &str) -> Result<usize, LoraError> {
        Ok(first(&self.rank_pattern, module)?.unwrap_or(self.rank))
    }

    /// Factor on the adapter's product on `module`.
    ///
    /// # Errors
    /// As [`PeftConfig::selects`].
    pub fn scaling_of(&self, module: &str) -> Result<f64, LoraError> {
        let rank = self.rank_of(module)? as f64;
        let alpha = first(&self.alpha_pattern, module)?.unwrap_or(self.alpha);
        Ok(alpha / if self.use_rslora { rank.sqrt() } else { rank })
    }
}

impl Selector {
    fn selects(&self, module: &str) -> Result<bool, LoraError> {
        match self {
            Selector::All => Ok(true),
            Selector::Pattern(pattern) => pattern.is_match(module).map_err(|why| too_hard(pattern, why)),
            Selector::Names(names) => Ok(names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|path| path.is_empty() || path.ends_with('.'))
            })),
        }
    }
}

/// Value of the first pattern that matches `module`.
fn first<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Result<Option<T>, LoraError> {
    for (pattern, value) in patterns {
        if pattern.is_match(module).map_err(|why| too_hard(pattern, why))? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// PEFT's rule for pattern keys: the key matches the end of the path, from its start or after a dot.
fn patterns<T>(key: &'static str, entries: Option<Entries<T>>) -> Result<Vec<(Regex, T)>, LoraError> {
    let entries = entries.map_or(Vec::new(), |entries| entries.0);
    if entries.len() > MAX_PATTERNS {
        return Err(LoraError::config(key, format!("{} patterns", entries.len()), format!("at most {MAX_PATTERNS}")));
    }
    let compiled = entries.into_iter().map(|(text, value)| Ok((regex(key, &format!(r"\A(.*\.)?({text})\z"))?, value)));
    compiled.collect()
}

fn target(raw: Option<OneOrMany<String>>) -> Result<Selector, LoraError> {
    Ok(match raw {
        None => Selector::All,
        Some(OneOrMany::One(word)) if word.eq_ignore_ascii_case("all-linear") => Selector::All,
        Some(OneOrMany::One(pattern)) => Selector::Pattern(whole("target_modules", &pattern)?),
        Some(OneOrMany::Many(names)) if names.is_empty() => {
            return Err(LoraError::config("target_modules", "an empty list", "names of linear layers"));
        }
        Some(OneOrMany::Many(names)) => Selector::Names(names),
    })
}

/// Where the number of a layer stands in a path. Without a pattern: after any part of it.
fn layers_pattern(raw: Option<OneOrMany<String>>) -> Result<Vec<Regex>, LoraError> {
    let names = match raw {
        None => Vec::new(),
        Some(OneOrMany::One(name)) if name.is_empty() => Vec::new(),
        Some(OneOrMany::One(name)) => vec![name],
        Some(OneOrMany::Many(names)) => names,
    };
    if names.len() > MAX_PATTERNS {
        let have = format!("{} patterns", names.len());
        return Err(LoraError::config("layers_pattern", have, format!("at most {MAX_PATTERNS}")));
    }
    if names.is_empty() {
        return Ok(vec![regex("layers_pattern", r"\A.*\.[^.]*\.(\d+)\.")?]);
    }
    names.iter().map(|name| regex("layers_pattern", &format!(r"\A.*\.{name}\.(\d+)\."))).collect()
}

fn whole(key: &'static str, pattern: &str) -> Result<Regex, LoraError> {
    regex(key, &format!(r"\A(?:{pattern})\z"))
}

fn regex(key: &'static str, pattern: &str) -> Result<Regex, LoraError> {
    let compiled = RegexBuilder::new(pattern).delegate_size_limit(MAX_PATTERN_BYTES).build();
    compiled.map_err(|why| LoraError::Pattern { key, pattern: pattern.to_owned(), why: Box::new(why) })
}

fn too_hard(pattern: &Regex, why: fancy_regex::Error) -> LoraError {
    LoraError::Pattern { key: "a pattern", pattern: pattern.as_str().to_owned(), why: Box::new(why) }
}

/// The file as it is.
#[derive(Deserialize)]
struct Raw {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    rank_pattern: Option<Entries<usize>>,
    alpha_pattern: Option<Entries<f64>>,
    target_modules: Option<OneOrMany<String>>,
    exclude_modules: Option<OneOrMany<String>>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    bias: Option<String>,
    init_lora_weights: Option<Value>,
    fan_in_fan_out: Option<bool>,
    base_model_name_or_path: Option<String>,
    #[serde(flatten)]
    rest: std::collections::BTreeMap<String, Value>,
}

impl Raw {
    fn refuse_unsupported(&self) -> Result<(), LoraError> {
        let refuse = |what: String, instead: &'static str| Err(LoraError::NotSupported { what, instead });
        match self.peft_type.as_deref() {
            Some("LORA") => {}
            other => return refuse(format!("peft_type {}", other.unwrap_or("(none)")), "train a LORA adapter"),
        }
        for (key, instead) in REFUSED {
            if let Some(value) = self.rest.get(*key).filter(|value| !is_empty(value)) {
                return refuse(format!("{key} = {value}"), instead);
            }
        }
        if let Some(bias) = self.bias.as_deref().filter(|bias| *bias != "none") {
            return refuse(format!("bias = {bias:?}"), "train with bias=\"none\"");
        }
        if let Some(Value::String(init)) = &self.init_lora_weights
            && MOVES_BASE.iter().any(|name| init.to_lowercase().starts_with(name))
        {
            return refuse(
                format!("init_lora_weights = {init:?}, which changes the base's weights"),
                "save with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it plain LoRA",
            );
        }
        match self.rest.iter().find(|(key, value)| !is_known(key) && !is_empty(value)) {
            None => Ok(()),
            Some((key, value)) => {
                refuse(format!("{key} = {value}"), "remove the key if it has no effect on a trained adapter")
            }
        }
    }
}

fn is_known(key: &str) -> bool {
    TRAINING_ONLY.contains(&key) || REFUSED.iter().any(|(refused, _)| *refused == key)
}

/// A value that switches nothing on.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

/// An object's entries in the order of the file: the first pattern that matches counts.
struct Entries<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries<T>, D::Error> {
        struct Visitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = Entries<T>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of patterns")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Entries<T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Visitor(std::marker::PhantomData))
    }
}

/// Patterns under one key, at most: one for each linear layer of the largest models.
const MAX_PATTERNS: usize = 4096;

/// Bytes of a compiled pattern, at most.
const MAX_PATTERN_BYTES: usize = 256 << 10;

/// Keys whose features cannot be represented, with what to do instead.
const REFUSED: &[(&str, &str)] = &[
    ("use_dora", "train with use_dora=False, or merge the adapter into the base and convert that"),
    ("modules_to_save", "train without modules_to_save; whole modules are part of the base"),
    ("lora_bias", "train with lora_bias=False"),
    ("layer_replication", "convert the model with its layers repeated, and train on that"),
    ("target_parameters", "train with target_modules, which names linear layers"),
    ("trainable_token_indices", "train without trainable_token_indices; embeddings are part of the base"),
    ("use_qalora", "train with use_qalora=False"),
    ("use_bdlora", "train without use_bdlora"),
    ("alora_invocation_tokens", "train a plain LoRA adapter; it is active on every token"),
    ("arrow_config", "export each adapter alone, or a composition with fixed strengths"),
    ("megatron_config", "export the adapter to Hugging Face's layout"),
];

/// Beginnings of `init_lora_weights` that move a part of the base into the adapter.
const MOVES_BASE: &[&str] = &["pissa", "olora", "corda", "loftq", "lora_ga"];

/// Keys that have no effect on what a trained adapter computes.
const TRAINING_ONLY: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

const PEFT_DEFAULT_RANK: usize = 8;
const PEFT_DEFAULT_ALPHA: f64 = 8.0;
