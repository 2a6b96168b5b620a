//! Llama, and what shares its graph under another name.

use super::{Architecture, blocks::Builder};
use crate::offline::{
    config::{Biases, DEFAULT_ROPE_THETA, GatedActivation, HfConfig, HfDefaults, ModelConfig},
    error::ImportError,
};

/// Llama: no bias unless the configuration asks for it.
pub(super) const LLAMA: Architecture = Architecture {
    title: "Llama, SmolLM, SmolLM2",
    notes: "biases; head size of its own; tied or untied head",
    model_types: &["llama", "smollm"],
    gguf_names: &["llama"],
    gguf_interleaves_qk: true,
    partial_rotary: false,
    defaults: HfDefaults {
        rope_theta: DEFAULT_ROPE_THETA,
        tied_head: false,
        activation_key: "hidden_act",
        activation: GatedActivation::Silu,
    },
    apply_hf: |config, hf| {
        apply_biases(config, hf);
        Ok(())
    },
    build,
};

/// Biases as `attention_bias` and `mlp_bias` ask for them.
pub(super) fn apply_biases(config: &mut ModelConfig, hf: &HfConfig) {
    let attention = hf.attention_bias.unwrap_or(false);
    config.bias = Biases { qkv: attention, output: attention, mlp: hf.mlp_bias.unwrap_or(false) };
}

/// Mistral: llama without bias, and a sliding window that is 4096 unless the configuration says otherwise.
pub(super) const MISTRAL: Architecture = Architecture {
    title: "Mistral",
    notes: "sliding window on every layer; its GGUFs call themselves `llama` and have full attention, as in llama.cpp",
    model_types: &["mistral"],
    gguf_names: &[],
    apply_hf: |config, hf| {
        config.set_window(hf.sliding_window.unwrap_or(Some(4096)));
        Ok(())
    },
    ..LLAMA
};

/// Layers of attention and gated MLP, each after a norm and around a residual.
pub(super) fn build(b: &mut Builder<'_>) -> Result<(), ImportError> {
    let mut hidden = b.scaled_embedding("model.embed_tokens")?;
    for layer in 0..b.config.layers.len() {
        let module = format!("model.layers.{layer}");
        let x = b.norm_for(&format!("{module}.input_layernorm"), hidden, &b.attention_weights(layer))?;
        let x = b.attention(layer, x)?;
        let x = b.scale(&format!("{module}.self_attn.scaled"), x, b.config.residual_multiplier)?;
        hidden = b.add(&format!("{module}.self_attn.residual"), hidden, x)?;

        let x = b.norm_for(&format!("{module}.post_attention_layernorm"), hidden, &b.mlp_weights(layer))?;
        let x = b.gated_mlp(layer, x)?;
        let x = b.scale(&format!("{module}.mlp.scaled"), x, b.config.residual_multiplier)?;
        hidden = b.add(&module, hidden, x)?;
        b.end_layer(hidden);
    }
    b.head("model.norm", "model.embed_tokens", hidden)
}
