//! A GGUF's metadata as a configuration: what all families share, then what only some have.

use serde_json::{Value, json};

use super::{GgufModel, missing, tokenizer};
use crate::offline::{
    config::{Biases, DEFAULT_ROPE_THETA, GatedActivation, MAX_HEAD_DIM, ModelConfig, Rope, RopeBase, config_error},
    error::ImportError,
};

impl GgufModel {
    /// The configuration that the metadata describes.
    ///
    /// # Errors
    /// [`ImportError`] naming the key that is missing, wrong, or asks for what is not supported.
    pub fn config(&self) -> Result<ModelConfig, ImportError> {
        self.refuse_experts()?;
        self.refuse_encoders()?;
        let heads = self.size("attention.head_count")?;
        let hidden_size = self.size("embedding_length")?;
        let head_dim = match self.optional_size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        if head_dim > MAX_HEAD_DIM {
            return Err(config_error(&self.key("attention.key_length"), head_dim, format!("1 to {MAX_HEAD_DIM}")));
        }
        let epsilon_key = self.key("attention.layer_norm_rms_epsilon");
        let epsilon = self.file.float(&epsilon_key)?.ok_or_else(|| missing(&epsilon_key))?;
        let has = |name: &str| self.entry(name).is_some();
        let max_position_embeddings = self.size("context_length")?;
        let rope = RopeBase {
            theta: self.float("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_THETA),
            rotary_dim: self.rotary_dim(head_dim)?,
            max_positions: max_position_embeddings,
            original_max_positions: None,
        };
        let mut config = ModelConfig {
            hidden_size,
            intermediate_size: self.size("feed_forward_length")?,
            heads,
            kv_heads: self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab_size: self.entry("token_embd.weight").and_then(|t| t.shape.first().copied()).unwrap_or(0),
            max_position_embeddings,
            rms_norm_epsilon: epsilon as f32,
            // The files hold the factors themselves, Gemma's too.
            norm_offset: 0.0,
            qk_norm: has("blk.0.attn_q_norm.weight"),
            ropes: vec![self.rope(rope)?],
            bias: Biases {
                qkv: has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
                output: has("blk.0.attn_output.bias"),
                mlp: has("blk.0.ffn_gate.bias"),
            },
            tied_head: !has("output.weight"),
            bos_token_id: tokenizer::token_id(&self.file, "bos")?,
            eos_token_ids: tokenizer::end_tokens(&self.file)?,
            ..ModelConfig::plain(self.architecture.model_types[0], self.size("block_count")?)
        };
        // The key means something in these families only. llama.cpp leaves Phi-3's window out; transformers has it.
        if matches!(self.prefix.as_str(), "gemma2" | "gemma3" | "phi3") {
            config.set_window(self.optional_size("attention.sliding_window")?.filter(|window| *window > 0));
        }
        match self.prefix.as_str() {
            "gemma2" => self.gemma2(&mut config)?,
            "gemma3" => self.gemma3(&mut config, rope)?,
            "granite" => self.granite(&mut config)?,
            // Every fourth layer does not rotate.
            "smollm3" => config.layers.iter_mut().skip(3).step_by(4).for_each(|layer| layer.rope = None),
            _ => {}
        }
        config.warnings.extend(tokenizer::warnings(&self.file)?);
        config.check()
    }

    fn refuse_experts(&self) -> Result<(), ImportError> {
        match self.optional_size("expert_count")?.filter(|n| *n > 0) {
            None => Ok(()),
            Some(experts) => {
                let what = format!("{} {experts}", self.key("expert_count"));
                Err(ImportError::Unsupported { what, supported: "dense models".to_owned() })
            }
        }
    }

    fn refuse_encoders(&self) -> Result<(), ImportError> {
        let key = self.key("attention.causal");
        match self.file.bool(&key)? {
            Some(false) => Err(unsupported(format!("{key} false"), "causal models")),
            _ => Ok(()),
        }
    }

    /// Elements of a head that are rotated.
    fn rotary_dim(&self, head_dim: usize) -> Result<usize, ImportError> {
        let check = |key: &str, fits: fn(usize, usize) -> bool, want: &str| match self.optional_size(key)? {
            Some(have) if !fits(have, head_dim) => {
                Err(config_error(&self.key(key), have, format!("{want}{head_dim}, as the heads have")))
            }
            have => Ok(have),
        };
        check("attention.value_length", |have, head_dim| have == head_dim, "")?;
        let rotary_dim = if self.architecture.partial_rotary {
            check(
                "rope.dimension_count",
                |have, head_dim| have <= head_dim && have.is_multiple_of(2),
                "an even number up to ",
            )?
        } else {
            check("rope.dimension_count", |have, head_dim| have == head_dim, "")?
        };
        Ok(rotary_dim.unwrap_or(head_dim))
    }

    /// The rotary embedding of `base`, scaled by the factors in a tensor or as the metadata asks for.
    fn rope(&self, base: RopeBase) -> Result<Rope, ImportError> {
        let pairs = base.rotary_dim / 2;
        let (scaling, factor) = (self.key("rope.scaling"), self.scaling_factor()?);
        let kind = self.file.string(&format!("{scaling}.type"))?;
        let tensors = ["rope_freqs.weight", "rope_factors_short.weight"];
        if let Some(tensor) =
            tensors.iter().find(|name| self.entry(name).is_some() && factor != 1.0 && kind != Some("none"))
        {
            // llama.cpp divides by both.
            return Err(unsupported(format!("{scaling}.factor {factor} beside {tensor}"), "one of both"));
        }
        if let Some(factors) = self.rope_factors("rope_freqs.weight", pairs)? {
            return Ok(base.with_factors(|i| factors[i]));
        }
        if let Some(short) = self.rope_factors("rope_factors_short.weight", pairs)? {
            let missing = || ImportError::MissingTensor { name: LONG_FACTORS.to_owned() };
            let long = self.rope_factors(LONG_FACTORS, pairs)?.ok_or_else(missing)?;
            let original = self.optional_size("rope.scaling.original_context_length")?.unwrap_or(base.max_positions);
            let scale = self.float("rope.scaling.attn_factor")?.unwrap_or(1.0) as f32;
            return Ok(base.with_both(&short, &long, original, scale));
        }
        // As llama.cpp has it: a factor without a type is linear.
        match kind.unwrap_or("linear") {
            "none" => Ok(base.plain()),
            "linear" => base.scaled(&scaling, &json!({ "rope_type": "linear", "factor": factor })),
            "yarn" => base.scaled(&scaling, &self.yarn(factor)?),
            other => Err(ImportError::Unsupported {
                what: format!("{scaling}.type {other:?}"),
                supported: "\"none\", \"linear\", \"yarn\", factors in a tensor".to_owned(),
            }),
        }
    }

    /// YaRN by `factor`, as `config.json` would have it.
    fn yarn(&self, factor: f64) -> Result<Value, ImportError> {
        // -1 is llama.cpp's "not set", which means 1 here.
        for (key, usual) in [("yarn_ext_factor", [1.0, -1.0]), ("yarn_log_multiplier", [0.0, 0.0])] {
            let key = format!("rope.scaling.{key}");
            if let Some(have) = self.float(&key)?.filter(|have| !usual.contains(have)) {
                return Err(unsupported(format!("{} {have}", self.key(&key)), &usual[0].to_string()));
            }
        }
        // Converters write `attention_factor` under the second key; the first is a factor on what follows from the length.
        let (by, whole) = (self.float("rope.scaling.attn_factor")?, self.float("rope.scaling.yarn_attn_factor")?);
        let by_length = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
        let attention = by.or(whole).map(|_| by.unwrap_or(1.0) * whole.unwrap_or(by_length));
        Ok(json!({
            "rope_type": "yarn", "factor": factor, "attention_factor": attention,
            "original_max_position_embeddings": self.optional_size("rope.scaling.original_context_length")?,
            "beta_fast": self.float("rope.scaling.yarn_beta_fast")?,
            "beta_slow": self.float("rope.scaling.yarn_beta_slow")?,
        }))
    }

    /// What positions are divided by: under its key or the older one, which llama.cpp reads too. 0 stands for none.
    fn scaling_factor(&self) -> Result<f64, ImportError> {
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        Ok(factor.filter(|factor| *factor != 0.0).unwrap_or(1.0))
    }

    /// The tensor called `name`, a divisor for the frequency of each of `pairs`.
    fn rope_factors(&self, name: &str, pairs: usize) -> Result<Option<Vec<f64>>, ImportError> {
        let Some(tensor) = self.stored(name)? else { return Ok(None) };
        let factors: Vec<f64> = tensor.to_f32().into_iter().map(f64::from).collect();
        if factors.len() != pairs || factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
            let (have, want) =
                (format!("{} factors", factors.len()), format!("{pairs} above 0, one for each rotated pair"));
            return Err(ImportError::Tensor { name: name.to_owned(), have, want });
        }
        Ok(Some(factors))
    }

    fn gemma2(&self, config: &mut ModelConfig) -> Result<(), ImportError> {
        self.gemma(config, 46);
        config.attention_soft_cap = Some(self.float("attn_logit_softcapping")?.unwrap_or(50.0) as f32);
        config.logit_soft_cap = Some(self.float("final_logit_softcapping")?.unwrap_or(30.0) as f32);
        let window = self.optional_size("attention.sliding_window")?.unwrap_or(4096);
        for (i, layer) in config.layers.iter_mut().enumerate() {
            layer.window = i.is_multiple_of(2).then_some(window);
        }
        Ok(())
    }

    fn gemma3(&self, config: &mut ModelConfig, rope: RopeBase) -> Result<(), ImportError> {
        self.gemma(config, 62);
        let cap = self.float("final_logit_softcapping")?.map(|cap| cap as f32);
        config.logit_soft_cap = cap.filter(|cap| *cap != 0.0);
        let theta = self.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
        config.ropes.push(RopeBase { theta, ..rope }.plain());
        let pattern = self.optional_size("attention.sliding_window_pattern")?.unwrap_or(6).max(1);
        for (i, layer) in config.layers.iter_mut().enumerate() {
            if (i + 1).is_multiple_of(pattern) {
                layer.window = None;
            } else if layer.window.is_some() {
                layer.rope = Some(1);
            }
        }
        Ok(())
    }

    /// What Gemma 2 and 3 share. The model with `most_layers` layers, the largest, scales scores by the width that a head would
    /// have if all of them shared the residual stream; no key says so.
    fn gemma(&self, config: &mut ModelConfig, most_layers: usize) {
        config.activation = GatedActivation::GeluTanh;
        config.embedding_multiplier = (config.hidden_size as f32).sqrt();
        let by_stream = config.layers.len() == most_layers;
        let width = if by_stream { config.hidden_size / config.heads.max(1) } else { config.head_dim };
        config.attention_scale = Some((1.0 / (width as f64).sqrt()) as f32);
    }

    fn granite(&self, config: &mut ModelConfig) -> Result<(), ImportError> {
        // This family's way to say so.
        if self.file.bool(&self.key("rope.scaling.finetuned"))? == Some(false) {
            let (what, supported) = ("granite without rotary embeddings".to_owned(), "granite with them".to_owned());
            return Err(ImportError::Unsupported { what, supported });
        }
        let factor = |key: &str| Ok::<_, ImportError>(self.float(key)?.map(|factor| factor as f32));
        config.embedding_multiplier = factor("embedding_scale")?.unwrap_or(1.0);
        config.residual_multiplier = factor("residual_scale")?.unwrap_or(1.0);
        config.attention_scale = factor("attention.scale")?;
        config.logit_multiplier = 1.0 / factor("logit_scale")?.unwrap_or(1.0);
        Ok(())
    }

    fn float(&self, key: &str) -> Result<Option<f64>, ImportError> {
        Ok(self.file.float(&self.key(key))?)
    }

    fn size(&self, key: &str) -> Result<usize, ImportError> {
        self.optional_size(key)?.ok_or_else(|| missing(&self.key(key)))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>, ImportError> {
        // What does not fit `usize` is above every limit that `check` knows.
        Ok(self.file.unsigned(&self.key(key))?.map(|size| usize::try_from(size).unwrap_or(usize::MAX)))
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }
}

fn unsupported(what: String, supported: &str) -> ImportError {
    ImportError::Unsupported { what, supported: supported.to_owned() }
}

/// Divisors of the rotary frequencies for contexts beyond the original length.
const LONG_FACTORS: &str = "rope_factors_long.weight";
