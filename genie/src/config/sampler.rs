//! The `sampler` block.

use super::ConfigError;
use super::json::Entry;

/// How the next token is chosen. [`crate::sampler`] says in which order the stages run.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerConfig {
    /// Start of the random numbers; `None` takes a fresh one at every reset. (`seed`; -1 means `None`)
    pub seed: Option<u64>,
    /// Always the most likely token. (`greedy`)
    pub greedy: bool,
    /// Divisor of the logits; 0 means greedy. (`temp`)
    pub temp: f32,
    /// Only so many of the most likely tokens; 0 means all. (`top-k`)
    pub top_k: usize,
    /// Only the fewest tokens whose probabilities sum to this; 1 means all. (`top-p`)
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 means all. (`min-p`, not in Genie's schema)
    pub min_p: f32,
    /// Penalties on tokens that are already there. (`token-penalty`)
    pub penalty: TokenPenalty,
}

/// Penalties on tokens that occur among the last tokens of the conversation.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenPenalty {
    /// How many of the last tokens count; 0, the default, means no penalty at all. (`penalize-last-n`)
    pub last_n: usize,
    /// Divides positive logits and multiplies negative ones; 0 and 1 are off. (`repetition-penalty`)
    pub repetition: f32,
    /// Subtracted once from the logit of a token that occurs. (`presence-penalty`)
    pub presence: f32,
    /// Subtracted for each time a token occurs. (`frequency-penalty`)
    pub frequency: f32,
}

impl TokenPenalty {
    /// Whether a penalty would change anything if tokens counted.
    fn is_set(&self) -> bool {
        (self.repetition != 0.0 && self.repetition != 1.0) || self.presence != 0.0 || self.frequency != 0.0
    }
}

impl Default for SamplerConfig {
    /// The values that first-party bundles carry: seed 42, temp 0.8, top-k 40, top-p 0.95.
    fn default() -> Self {
        Self {
            seed: Some(42),
            greedy: false,
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.0,
            penalty: TokenPenalty::default(),
        }
    }
}

impl SamplerConfig {
    /// Whether every value is one that a config may have. Those that were read from one are.
    ///
    /// # Errors
    /// [`ConfigError::Value`] with the key, the value and what would do.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        TEMP.check("temp", self.temp)?;
        TOP_P.check("top-p", self.top_p)?;
        MIN_P.check("min-p", self.min_p)?;
        REPETITION.check("token-penalty/repetition-penalty", self.penalty.repetition)?;
        PENALTY.check("token-penalty/presence-penalty", self.penalty.presence)?;
        PENALTY.check("token-penalty/frequency-penalty", self.penalty.frequency)
    }
}

/// Numbers that a key may have.
struct Range {
    wanted: &'static str,
    holds: fn(f32) -> bool,
}

impl Range {
    fn read(&self, entry: &Entry<'_>) -> Result<f32, ConfigError> {
        entry.number(self.wanted, |x| (self.holds)(x as f32)).map(|x| x as f32)
    }

    fn check(&self, key: &str, value: f32) -> Result<(), ConfigError> {
        if (self.holds)(value) {
            return Ok(());
        }
        let (pointer, found) = (format!("/sampler/{key}"), value.to_string());
        Err(ConfigError::Value { pointer, found, wanted: self.wanted.to_owned() })
    }
}

pub(super) fn parse(entry: &Entry<'_>) -> Result<SamplerConfig, ConfigError> {
    entry.object(KEYS)?.version()?;
    merge(entry, &SamplerConfig::default())
}

/// The sampler of `base` with the keys that are here laid over it.
pub(super) fn merge(entry: &Entry<'_>, base: &SamplerConfig) -> Result<SamplerConfig, ConfigError> {
    let fields = entry.object(KEYS)?;
    if fields.get("version").is_some() {
        fields.version()?;
    }
    if let Some(kind) = fields.get("type") {
        match kind.word(&["basic", "custom"])? {
            "basic" => {}
            other => return Err(kind.unsupported(format!("sampler type {other:?}"))),
        }
    }
    if let Some(name) = fields.get("callback-name") {
        return Err(name.value("no such key: it belongs to samplers of type \"custom\""));
    }
    let mut sampler = base.clone();
    if let Some(seed) = fields.get("seed") {
        sampler.seed = u64::try_from(seed.int(-1..=i128::from(u64::MAX))?).ok();
    }
    if let Some(greedy) = fields.get("greedy") {
        sampler.greedy = greedy.bool()?;
    }
    if let Some(temp) = fields.get("temp") {
        sampler.temp = TEMP.read(&temp)?;
    }
    if let Some(top_k) = fields.get("top-k") {
        sampler.top_k = top_k.int(0..=i32::MAX as usize)?;
    }
    if let Some(top_p) = fields.get("top-p") {
        sampler.top_p = TOP_P.read(&top_p)?;
    }
    if let Some(min_p) = fields.get("min-p") {
        sampler.min_p = MIN_P.read(&min_p)?;
    }
    if let Some(penalty) = fields.get("token-penalty") {
        sampler.penalty = merge_penalty(&penalty, base.penalty)?;
    }
    Ok(sampler)
}

fn merge_penalty(entry: &Entry<'_>, base: TokenPenalty) -> Result<TokenPenalty, ConfigError> {
    let fields = entry.object(PENALTY_KEYS)?;
    fields.version()?;
    let mut penalty = base;
    if let Some(last_n) = fields.get("penalize-last-n") {
        penalty.last_n = last_n.int(0..=i32::MAX as usize)?;
    }
    if let Some(repetition) = fields.get("repetition-penalty") {
        penalty.repetition = REPETITION.read(&repetition)?;
    }
    for (key, value) in [("presence-penalty", &mut penalty.presence), ("frequency-penalty", &mut penalty.frequency)] {
        if let Some(entry) = fields.get(key) {
            *value = PENALTY.read(&entry)?;
        }
    }
    // As Genie has it, whose default is 0, so it is no error; but hardly what somebody wanted who wrote a penalty down.
    if penalty.last_n == 0 && penalty.is_set() {
        let place = entry.pointer();
        tracing::warn!("config {place}: penalize-last-n is 0: these penalties have no effect, need 1 or more");
    }
    Ok(penalty)
}

const TEMP: Range = Range { wanted: "a temperature in 0..=100", holds: |x| (0.0..=100.0).contains(&x) };
const TOP_P: Range = Range { wanted: "a probability above 0, at most 1", holds: |x| 0.0 < x && x <= 1.0 };
const MIN_P: Range = Range { wanted: "a fraction in 0..=1", holds: |x| (0.0..=1.0).contains(&x) };
const REPETITION: Range = Range { wanted: "a factor in 0..=100", holds: |x| (0.0..=100.0).contains(&x) };
const PENALTY: Range = Range { wanted: "a penalty in -100..=100", holds: |x| (-100.0..=100.0).contains(&x) };

const KEYS: &[&str] =
    &["version", "seed", "temp", "top-k", "top-p", "min-p", "greedy", "type", "callback-name", "token-penalty"];

const PENALTY_KEYS: &[&str] =
    &["version", "penalize-last-n", "repetition-penalty", "presence-penalty", "frequency-penalty"];
