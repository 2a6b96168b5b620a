//! What an architecture needs to know about a model, from `config.json` or GGUF metadata.

use crate::offline::error::ImportError;

mod hf;
mod rope;

pub use hf::{HfConfig, HfDefaults, from_hf};
pub use rope::{LongRope, Rope, RopeBase};

/// Sizes and choices of a decoder-only language model. All sizes have been checked against the limits below.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family, as `model_type` of `config.json`: `llama`.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of one head; even.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest context the model was made for, or is stretched to.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_epsilon: f32,
    /// Added to every weight of a norm: 1 where files store the difference to 1, as Gemma's do.
    pub norm_offset: f32,
    /// True if each head of queries and keys is normed before it is rotated.
    pub qk_norm: bool,
    /// Rotary embeddings; a layer picks one.
    pub ropes: Vec<Rope>,
    /// The decoder layers.
    pub layers: Vec<LayerConfig>,
    /// Factor on attention scores; `1 / sqrt(head_dim)` if `None`.
    pub attention_scale: Option<f32>,
    /// Soft cap of attention scores.
    pub attention_soft_cap: Option<f32>,
    /// What the gate of the MLP goes through.
    pub activation: GatedActivation,
    /// Which matrices have a bias.
    pub bias: Biases,
    /// True if the head is the embedding, unless the source has one of other values.
    pub tied_head: bool,
    /// Factor on embeddings.
    pub embedding_multiplier: f32,
    /// Factor on what a layer's attention and MLP add to the residual stream.
    pub residual_multiplier: f32,
    /// Factor on logits, before their cap.
    pub logit_multiplier: f32,
    /// Soft cap of logits.
    pub logit_soft_cap: Option<f32>,
    /// Id of the token that opens a text, if the model has one.
    pub bos_token_id: Option<u32>,
    /// Ids of the tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// What a user should know before relying on the graph.
    pub warnings: Vec<String>,
}

/// What differs between the layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerConfig {
    /// Positions that a row sees, its own included; all of them if `None`.
    pub window: Option<usize>,
    /// Index in [`ModelConfig::ropes`]; `None` for a layer whose queries and keys are not rotated.
    pub rope: Option<usize>,
}

/// Activation of a gated MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatedActivation {
    /// `x · sigmoid(x)`.
    Silu,
    /// The Gaussian error linear unit in its tanh form.
    GeluTanh,
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
    /// A model of `n_layers` layers with full attention and nothing out of the ordinary. Its sizes are 0 and have to be
    /// set, and so has its rotary embedding.
    pub fn plain(model_type: &str, n_layers: usize) -> ModelConfig {
        ModelConfig {
            model_type: model_type.to_owned(),
            hidden_size: 0,
            intermediate_size: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            vocab_size: 0,
            max_position_embeddings: 0,
            rms_norm_epsilon: 0.0,
            norm_offset: 0.0,
            qk_norm: false,
            ropes: Vec::new(),
            layers: vec![LayerConfig { window: None, rope: Some(0) }; n_layers.min(MAX_LAYERS + 1)],
            attention_scale: None,
            attention_soft_cap: None,
            activation: GatedActivation::Silu,
            bias: Biases::default(),
            tied_head: false,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            logit_multiplier: 1.0,
            logit_soft_cap: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Gives every layer the sliding window `window`.
    pub fn set_window(&mut self, window: Option<usize>) {
        self.layers.iter_mut().for_each(|layer| layer.window = window);
    }

    /// What a user should know of a rotary embedding that depends on the length of the context.
    fn warn_of_long_contexts(&mut self) {
        let long = self.ropes.iter().filter_map(|rope| rope.long.as_ref()).map(|long| long.above);
        self.warnings.extend(long.map(|above| {
            format!(
                "LongRoPE: context binaries for up to {above} positions (--cl) use the factors for short contexts, larger ones \
                 those for long contexts at every position"
            )
        }));
    }

    /// Checks every size against its limit and against the others, once YaRN has stretched the longest context.
    ///
    /// # Errors
    /// [`ImportError::Config`] naming the key.
    pub fn check(mut self) -> Result<ModelConfig, ImportError> {
        // Model cards add YaRN to a configuration whose own length stays the original one.
        let reach = self.ropes.iter().filter_map(|rope| rope.reach).max();
        self.max_position_embeddings = self.max_position_embeddings.max(reach.unwrap_or(0));
        let sizes = [
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("num_hidden_layers", self.layers.len(), MAX_LAYERS),
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
        if self.layers.iter().any(|layer| layer.window == Some(0)) {
            return Err(config_error("sliding_window", 0, "at least 1, or null".to_owned()));
        }
        self.check_numbers()?;
        self.warn_of_long_contexts();
        Ok(self)
    }

    /// Factors and caps that would make every result useless, or not a number.
    fn check_numbers(&self) -> Result<(), ImportError> {
        let factors = [
            ("query_pre_attn_scalar or attention_multiplier", self.attention_scale),
            ("attn_logit_softcapping", self.attention_soft_cap),
            ("final_logit_softcapping", self.logit_soft_cap),
            ("embedding_multiplier", Some(self.embedding_multiplier)),
            ("residual_multiplier", Some(self.residual_multiplier)),
            ("logits_scaling", Some(self.logit_multiplier)),
        ];
        for (key, factor) in factors {
            if factor.is_some_and(|factor| !(factor > 0.0 && factor.is_finite())) {
                let have = factor.map_or(String::new(), |factor| format!("a factor of {factor}"));
                return Err(config_error(key, have, "one above 0".to_owned()));
            }
        }
        for rope in &self.ropes {
            let useless = rope.inv_freq.is_empty() || rope.inv_freq.len() * 2 > self.head_dim;
            let long = rope.long.iter().flat_map(|long| &long.inv_freq);
            if useless || !rope.scale.is_finite() || rope.inv_freq.iter().chain(long).any(|f| !f.is_finite()) {
                let have = format!("{} frequencies", rope.inv_freq.len());
                return Err(config_error("rope", have, format!("1 to {}, all finite", self.head_dim / 2)));
            }
        }
        match self.layers.iter().find(|layer| layer.rope.is_some_and(|rope| rope >= self.ropes.len())) {
            Some(_) => Err(config_error("rope", self.ropes.len(), "one for each layer that rotates".to_owned())),
            None => Ok(()),
        }
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
/// Most elements of a head.
pub const MAX_HEAD_DIM: usize = 4096;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;
