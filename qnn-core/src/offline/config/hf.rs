//! `config.json` of a Hugging Face directory.

use serde::Deserialize;
use serde_json::Value;

use super::{
    Biases, DEFAULT_ROPE_THETA, GatedActivation, LayerConfig, MAX_HEAD_DIM, MAX_LAYERS, ModelConfig, Rope, RopeBase,
    config_error,
};
use crate::offline::{arch, error::ImportError};

/// The keys of `config.json` that matter here. What a family makes of them is its own business.
#[derive(Debug, Deserialize)]
#[allow(missing_docs, reason = "the names are those of the file")]
pub struct HfConfig {
    pub model_type: String,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    pub vocab_size: usize,
    pub max_position_embeddings: usize,
    pub original_max_position_embeddings: Option<usize>,
    pub rms_norm_eps: f32,
    pub rope_theta: Option<f64>,
    pub rope_local_base_freq: Option<f64>,
    pub rope_scaling: Option<Value>,
    pub rope_parameters: Option<Value>,
    pub partial_rotary_factor: Option<f64>,
    pub rope_interleaved: Option<bool>,
    pub hidden_act: Option<String>,
    pub hidden_activation: Option<String>,
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
    pub tie_word_embeddings: Option<bool>,
    /// Present and null is another thing than absent, for which each family has its own default.
    #[serde(default, deserialize_with = "present")]
    pub sliding_window: Option<Option<usize>>,
    pub use_sliding_window: Option<bool>,
    pub max_window_layers: Option<usize>,
    pub sliding_window_pattern: Option<usize>,
    pub layer_types: Option<Vec<String>>,
    pub no_rope_layers: Option<Vec<u8>>,
    pub no_rope_layer_interval: Option<usize>,
    pub query_pre_attn_scalar: Option<f64>,
    #[serde(default, deserialize_with = "present")]
    pub attn_logit_softcapping: Option<Option<f32>>,
    #[serde(default, deserialize_with = "present")]
    pub final_logit_softcapping: Option<Option<f32>>,
    pub use_bidirectional_attention: Option<bool>,
    pub is_causal: Option<bool>,
    pub embedding_multiplier: Option<f32>,
    pub attention_multiplier: Option<f32>,
    pub residual_multiplier: Option<f32>,
    pub logits_scaling: Option<f32>,
    pub bos_token_id: Option<Value>,
    pub eos_token_id: Option<Value>,
}

/// What transformers takes for keys that are absent, where families differ.
#[derive(Debug, Clone, Copy)]
pub struct HfDefaults {
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `tie_word_embeddings`.
    pub tied_head: bool,
    /// The key that names the activation: `hidden_act` or `hidden_activation`.
    pub activation_key: &'static str,
    /// Its default.
    pub activation: GatedActivation,
}

/// The keys of `generation_config.json` that matter here.
#[derive(Deserialize, Default)]
struct HfGeneration {
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

fn present<'de, D: serde::Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<Option<T>>, D::Error> {
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
    let architecture = arch::find(&family.model_type)?;
    let hf: HfConfig = serde_json::from_slice(config)?;
    let generation: HfGeneration = generation.map(serde_json::from_slice).transpose()?.unwrap_or_default();
    hf.refuse_unsupported()?;
    if hf.num_hidden_layers == 0 || hf.num_hidden_layers > MAX_LAYERS {
        return Err(config_error("num_hidden_layers", hf.num_hidden_layers, format!("1 to {MAX_LAYERS}")));
    }
    let heads = hf.num_attention_heads;
    let head_dim = hf.head_dim()?;
    let bos = generation.bos_token_id.or(hf.bos_token_id.clone()).unwrap_or(Value::Null);
    let eos = generation.eos_token_id.or(hf.eos_token_id.clone()).unwrap_or(Value::Null);
    let defaults = &architecture.defaults;
    let mut config = ModelConfig {
        hidden_size: hf.hidden_size,
        intermediate_size: hf.intermediate_size,
        heads,
        kv_heads: hf.num_key_value_heads.unwrap_or(heads),
        head_dim,
        vocab_size: hf.vocab_size,
        max_position_embeddings: hf.max_position_embeddings,
        rms_norm_epsilon: hf.rms_norm_eps,
        activation: hf.activation(defaults)?,
        ropes: vec![hf.rope(defaults)?],
        bias: Biases::default(),
        tied_head: hf.tie_word_embeddings.unwrap_or(architecture.defaults.tied_head),
        bos_token_id: token_ids("bos_token_id", &bos)?.first().copied(),
        eos_token_ids: token_ids("eos_token_id", &eos)?,
        ..ModelConfig::plain(&hf.model_type, hf.num_hidden_layers)
    };
    (architecture.apply_hf)(&mut config, &hf)?;
    config.check()
}

impl HfConfig {
    /// `head_dim`, or what is left of `hidden_size` for each head.
    fn head_dim(&self) -> Result<usize, ImportError> {
        let (heads, hidden_size) = (self.num_attention_heads, self.hidden_size);
        match self.head_dim {
            Some(head_dim) => Ok(head_dim),
            None if heads > 0 && hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
            None => {
                Err(config_error("num_attention_heads", heads, format!("a divisor of hidden_size ({hidden_size})")))
            }
        }
    }

    fn activation(&self, defaults: &HfDefaults) -> Result<GatedActivation, ImportError> {
        let key = defaults.activation_key;
        let name = if key == "hidden_activation" { &self.hidden_activation } else { &self.hidden_act };
        match name.as_deref() {
            None => Ok(defaults.activation),
            Some("silu") => Ok(GatedActivation::Silu),
            Some("gelu_pytorch_tanh") => Ok(GatedActivation::GeluTanh),
            Some(other) => Err(unsupported(format!("{key} {other:?}"), "\"silu\", \"gelu_pytorch_tanh\"")),
        }
    }

    /// The embedding that `rope_theta`, `rope_scaling` and `rope_parameters` describe: of all layers, or of those with full
    /// attention.
    fn rope(&self, defaults: &HfDefaults) -> Result<Rope, ImportError> {
        // Newer files have a set of parameters for each type of layer, or one set with the base inside.
        let (key, parameters) = self.rope_parameters("full_attention");
        // Wherever the base is, that inside of an object goes before that beside it.
        let theta = match &self.rope_scaling {
            Some(scaling) if scaling.get("rope_theta").is_some() => {
                self.theta("rope_scaling", Some(scaling), defaults.rope_theta)?
            }
            _ => self.theta(&key, parameters, defaults.rope_theta)?,
        };
        let base = RopeBase { theta, ..self.rope_base("full_attention")? };
        match (parameters, &self.rope_scaling) {
            (_, Some(scaling)) => base.scaled("rope_scaling", scaling),
            (Some(parameters), None) => base.scaled(&key, parameters),
            (None, None) => Ok(base.plain()),
        }
    }

    /// The plain embedding of layers with a sliding window, where these have a base of their own.
    pub(in crate::offline) fn sliding_rope(&self) -> Result<Rope, ImportError> {
        let (key, parameters) = self.rope_parameters("sliding_attention");
        let nested = parameters.filter(|_| key.ends_with("sliding_attention"));
        let theta = match nested {
            Some(_) => self.theta(&key, nested, DEFAULT_ROPE_THETA)?,
            None => check_theta(self.rope_local_base_freq.unwrap_or(DEFAULT_ROPE_THETA))?,
        };
        let base = RopeBase { theta, ..self.rope_base("sliding_attention")? };
        nested.map_or_else(|| Ok(base.plain()), |parameters| base.scaled(&key, parameters))
    }

    /// The part of `rope_parameters` for layers of `layer_type`, and its key in messages.
    fn rope_parameters(&self, layer_type: &str) -> (String, Option<&Value>) {
        let nested = self.rope_parameters.as_ref().and_then(|p| p.get(layer_type));
        match nested {
            Some(_) => (format!("rope_parameters/{layer_type}"), nested),
            None => ("rope_parameters".to_owned(), self.rope_parameters.as_ref()),
        }
    }

    fn theta(&self, key: &str, parameters: Option<&Value>, default: f64) -> Result<f64, ImportError> {
        let theta = match parameters.and_then(|p| p.get("rope_theta")) {
            None => self.rope_theta.unwrap_or(default),
            Some(theta) => theta
                .as_f64()
                .ok_or_else(|| config_error(&format!("{key}/rope_theta"), theta, "a number".to_owned()))?,
        };
        check_theta(theta)
    }

    /// The part of each head that is rotated in layers of `layer_type`.
    fn rotated_part(&self, layer_type: &str) -> Result<f64, ImportError> {
        let (key, parameters) = self.rope_parameters(layer_type);
        match parameters.and_then(|p| p.get("partial_rotary_factor")) {
            None | Some(Value::Null) => Ok(self.partial_rotary_factor.unwrap_or(1.0)),
            Some(factor) => factor
                .as_f64()
                .ok_or_else(|| config_error(&format!("{key}/partial_rotary_factor"), factor, "a number".to_owned())),
        }
    }

    fn rope_base(&self, layer_type: &str) -> Result<RopeBase, ImportError> {
        let head_dim = self.head_dim()?;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM || !head_dim.is_multiple_of(2) {
            return Err(config_error("head_dim", head_dim, format!("an even number, 2 to {MAX_HEAD_DIM}")));
        }
        let factor = self.rotated_part(layer_type)?;
        let rotary_dim = (head_dim as f64 * factor) as usize;
        if !(factor > 0.0 && factor <= 1.0) || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            let want = format!("a part of a head of {head_dim} that is an even number of elements");
            return Err(config_error("partial_rotary_factor", factor, want));
        }
        Ok(RopeBase {
            theta: DEFAULT_ROPE_THETA,
            rotary_dim,
            max_positions: self.max_position_embeddings,
            original_max_positions: self.original_max_position_embeddings,
        })
    }

    /// What each layer is, from `layer_types`, or from `by_default` (true: it slides) where the file has none.
    ///
    /// # Errors
    /// [`ImportError`] if the list is of another length, or names a type that is not known.
    pub(in crate::offline) fn layers(
        &self,
        window: Option<usize>,
        by_default: impl Fn(usize) -> bool,
    ) -> Result<Vec<LayerConfig>, ImportError> {
        let n_layers = self.num_hidden_layers;
        let layer = |slides: bool| LayerConfig { window: window.filter(|_| slides), rope: Some(0) };
        let Some(types) = &self.layer_types else {
            return Ok((0..n_layers).map(|i| layer(by_default(i))).collect());
        };
        if types.len() != n_layers {
            let want = format!("{n_layers}, the number of layers");
            return Err(config_error("layer_types", format!("a list of {}", types.len()), want));
        }
        let one = |name: &String| match name.as_str() {
            "full_attention" => Ok(layer(false)),
            "sliding_attention" => Ok(layer(true)),
            other => Err(unsupported(format!("layer type {other:?}"), "\"full_attention\", \"sliding_attention\"")),
        };
        types.iter().map(one).collect()
    }

    /// Refuses what would change the result of any family and is not built here.
    fn refuse_unsupported(&self) -> Result<(), ImportError> {
        let partial = arch::find(&self.model_type)?.partial_rotary;
        for layer_type in ["full_attention", "sliding_attention"] {
            let factor = self.rotated_part(layer_type)?;
            if factor != 1.0 && !partial {
                return Err(unsupported(format!("partial_rotary_factor {factor}"), "1"));
            }
        }
        if self.rope_interleaved == Some(true) {
            return Err(unsupported("rope_interleaved true".to_owned(), "false"));
        }
        if self.use_bidirectional_attention == Some(true) {
            return Err(unsupported("use_bidirectional_attention true".to_owned(), "causal models"));
        }
        if self.is_causal == Some(false) {
            return Err(unsupported("is_causal false".to_owned(), "causal models"));
        }
        Ok(())
    }
}

fn unsupported(what: String, supported: &str) -> ImportError {
    ImportError::Unsupported { what, supported: supported.to_owned() }
}

fn check_theta(theta: f64) -> Result<f64, ImportError> {
    if theta > 1.0 && theta.is_finite() {
        return Ok(theta);
    }
    Err(config_error("rope_theta", theta, "a number above 1".to_owned()))
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

const MAX_EOS_IDS: usize = 1024;
