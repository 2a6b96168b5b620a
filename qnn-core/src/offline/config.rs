//! What an architecture needs to know about a model, from `config.json` or GGUF metadata.

use serde::Deserialize;
use serde_json::Value;

use crate::offline::{arch, error::ImportError};

/// Sizes and choices of a decoder-only language model. All sizes have been checked against the limits below.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family, as `model_type` of `config.json`: `llama`.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub n_layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_epsilon: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Which matrices have a bias.
    pub bias: Biases,
    /// True if the head is the embedding.
    pub tied_head: bool,
    /// Sliding window of every layer.
    pub window: Option<usize>,
    /// Id of the token that opens a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// Which matrices of a layer have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// Query, key and value projections.
    pub qkv: bool,
    /// Output projection of the attention.
    pub output: bool,
    /// The three matrices of the MLP.
    pub mlp: bool,
}

impl ModelConfig {
    /// Checks every size against its limit and against the others.
    ///
    /// # Errors
    /// [`ImportError::Config`] naming the key.
    pub fn check(self) -> Result<ModelConfig, ImportError> {
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.n_layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_HEADS),
            ("num_key_value_heads", self.kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (key, have, limit) in sizes {
            if have == 0 || have > limit {
                return Err(config_error(key, have, format!("1 to {limit}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let want = format!("a divisor of num_attention_heads ({})", self.heads);
            return Err(config_error("num_key_value_heads", self.kv_heads, want));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(config_error("head_dim", self.head_dim, "an even number".to_owned()));
        }
        if !(self.rms_norm_epsilon > 0.0 && self.rms_norm_epsilon < 1.0) {
            return Err(config_error("rms_norm_eps", self.rms_norm_epsilon, "a number between 0 and 1".to_owned()));
        }
        if !(self.rope_theta >= 1.0 && self.rope_theta.is_finite()) {
            return Err(config_error("rope_theta", self.rope_theta, "a number from 1".to_owned()));
        }
        if self.window == Some(0) {
            return Err(config_error("sliding_window", 0, "at least 1, or null".to_owned()));
        }
        Ok(self)
    }
}

/// The keys of `config.json` that matter here.
#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    partial_rotary_factor: Option<f64>,
    rope_interleaved: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    /// Present and null is another thing than absent, for which each family has its own default.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    quantization_config: Option<Value>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

/// The keys of `generation_config.json` that matter here.
#[derive(Deserialize, Default)]
struct HfGeneration {
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

fn present<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(from).map(Some)
}

/// Reads `config.json`, and the token ids of `generation_config.json`, which win.
///
/// # Errors
/// [`ImportError`] naming the key that is missing, wrong or not supported.
pub fn from_hf(config: &[u8], generation: Option<&[u8]>) -> Result<ModelConfig, ImportError> {
    // The family first: another one may lack keys that these families need, which would only mislead.
    #[derive(Deserialize)]
    struct Family {
        model_type: String,
    }
    let family: Family = serde_json::from_slice(config)?;
    arch::find(&family.model_type)?;
    let hf: HfConfig = serde_json::from_slice(config)?;
    let generation: HfGeneration = generation.map(serde_json::from_slice).transpose()?.unwrap_or_default();
    refuse_unsupported(&hf)?;
    let heads = hf.num_attention_heads;
    let head_dim = match hf.head_dim {
        Some(head_dim) => head_dim,
        None if heads > 0 && hf.hidden_size.is_multiple_of(heads) => hf.hidden_size / heads,
        None => {
            return Err(config_error(
                "num_attention_heads",
                heads,
                format!("a divisor of hidden_size ({})", hf.hidden_size),
            ));
        }
    };
    let bos = generation.bos_token_id.or(hf.bos_token_id.clone()).unwrap_or(Value::Null);
    let eos = generation.eos_token_id.or(hf.eos_token_id.clone()).unwrap_or(Value::Null);
    let mut config = ModelConfig {
        hidden_size: hf.hidden_size,
        intermediate_size: hf.intermediate_size,
        n_layers: hf.num_hidden_layers,
        heads,
        kv_heads: hf.num_key_value_heads.unwrap_or(heads),
        head_dim,
        vocab_size: hf.vocab_size,
        max_position_embeddings: hf.max_position_embeddings,
        rms_norm_epsilon: hf.rms_norm_eps,
        rope_theta: rope_theta(&hf)?,
        bias: Biases::default(),
        tied_head: hf.tie_word_embeddings.unwrap_or(false),
        window: None,
        bos_token_id: token_ids("bos_token_id", &bos)?.first().copied(),
        eos_token_ids: token_ids("eos_token_id", &eos)?,
        model_type: hf.model_type.clone(),
    };
    let choices = HfChoices {
        attention_bias: hf.attention_bias.unwrap_or(false),
        mlp_bias: hf.mlp_bias.unwrap_or(false),
        sliding_window: hf.sliding_window,
        use_sliding_window: hf.use_sliding_window.unwrap_or(false),
    };
    (arch::find(&hf.model_type)?.apply_hf)(&mut config, &choices)?;
    config.check()
}

/// Keys of `config.json` whose meaning differs between families.
#[derive(Debug, Clone, Copy)]
pub struct HfChoices {
    /// `attention_bias`.
    pub attention_bias: bool,
    /// `mlp_bias`.
    pub mlp_bias: bool,
    /// `sliding_window`: absent, null, or a number.
    pub sliding_window: Option<Option<usize>>,
    /// `use_sliding_window`.
    pub use_sliding_window: bool,
}

/// Refuses what would change the result and is not built here.
fn refuse_unsupported(hf: &HfConfig) -> Result<(), ImportError> {
    let refuse =
        |what: String, supported: &str| Err(ImportError::Unsupported { what, supported: supported.to_owned() });
    if let Some(act) = hf.hidden_act.as_deref().filter(|act| *act != "silu") {
        return refuse(format!("hidden_act {act:?}"), "\"silu\"");
    }
    if let Some(quantization) = &hf.quantization_config {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        return refuse(
            format!("quantization_config of method {method:?}"),
            "unquantized weights (F32, F16, BF16), GGUF",
        );
    }
    if let Some(factor) = hf.partial_rotary_factor.filter(|factor| *factor != 1.0) {
        return refuse(format!("partial_rotary_factor {factor}"), "1");
    }
    if hf.rope_interleaved == Some(true) {
        return refuse("rope_interleaved true".to_owned(), "false");
    }
    for (key, scaling) in [("rope_scaling", &hf.rope_scaling), ("rope_parameters", &hf.rope_parameters)] {
        let Some(scaling) = scaling else { continue };
        let rope_type = ["rope_type", "type"].iter().find_map(|key| scaling.get(key)).and_then(Value::as_str);
        if !matches!(rope_type, Some("default") | None) || (rope_type.is_none() && scaling.get("factor").is_some()) {
            return refuse(format!("{key} of type {:?}", rope_type.unwrap_or("unknown")), "\"default\"");
        }
    }
    Ok(())
}

fn rope_theta(hf: &HfConfig) -> Result<f64, ImportError> {
    let in_parameters = hf.rope_parameters.as_ref().and_then(|p| p.get("rope_theta"));
    match in_parameters {
        None => Ok(hf.rope_theta.unwrap_or(DEFAULT_ROPE_THETA)),
        Some(theta) => {
            theta.as_f64().ok_or_else(|| config_error("rope_parameters/rope_theta", theta, "a number".to_owned()))
        }
    }
}

/// One id, a list of ids, or null.
fn token_ids(key: &str, value: &Value) -> Result<Vec<u32>, ImportError> {
    let wrong = || config_error(key, value, "a token id or a list of them".to_owned());
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).ok_or_else(wrong);
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) if ids.len() <= MAX_EOS_IDS => ids.iter().map(one).collect(),
        other => Ok(vec![one(other)?]),
    }
}

/// An [`ImportError::Config`].
pub(super) fn config_error(key: &str, have: impl ToString, want: String) -> ImportError {
    ImportError::Config { key: key.to_owned(), have: have.to_string(), want }
}

/// What transformers takes when `rope_theta` is absent.
pub const DEFAULT_ROPE_THETA: f64 = 10_000.0;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 1024;
const MAX_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 4096;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;
const MAX_EOS_IDS: usize = 1024;
