//! Gemma 2 and 3, text: norms before and after attention and MLP, scaled embeddings, layers that slide between layers that
//! see everything.

use super::{Architecture, blocks::Builder, llama};
use crate::offline::{
    config::{GatedActivation, HfConfig, HfDefaults, ModelConfig},
    error::ImportError,
};

/// Gemma 2: soft caps, every other layer slides.
pub(super) const GEMMA2: Architecture = Architecture {
    title: "Gemma 2",
    notes: "norms around each block, scaled embeddings, soft caps of scores and logits, alternating windows",
    model_types: &["gemma2"],
    gguf_names: &["gemma2"],
    gguf_interleaves_qk: false,
    defaults: HfDefaults {
        tied_head: true,
        activation_key: "hidden_activation",
        activation: GatedActivation::GeluTanh,
        ..llama::LLAMA.defaults
    },
    apply_hf: |config, hf| {
        apply(config, hf);
        config.attention_soft_cap = hf.attn_logit_softcapping.unwrap_or(Some(50.0));
        config.logit_soft_cap = hf.final_logit_softcapping.unwrap_or(Some(30.0));
        config.layers = hf.layers(hf.sliding_window.unwrap_or(Some(4096)), |layer| layer.is_multiple_of(2))?;
        Ok(())
    },
    build,
    ..llama::LLAMA
};

/// Gemma 3: normed heads, five layers that slide for each that does not, and a rotary base for either kind.
pub(super) const GEMMA3: Architecture = Architecture {
    title: "Gemma 3 (text)",
    notes: "as Gemma 2, with normed heads and a rotary base of their own for layers with a window; \
            attn_logit_softcapping has no effect, as in transformers; no images",
    model_types: &["gemma3_text"],
    gguf_names: &["gemma3"],
    defaults: HfDefaults { rope_theta: 1_000_000.0, ..GEMMA2.defaults },
    apply_hf: |config, hf| {
        apply(config, hf);
        config.qk_norm = true;
        if let Some(cap) = hf.attn_logit_softcapping.flatten() {
            config.warnings.push(format!("attn_logit_softcapping {cap} has no effect, as in transformers' gemma3"));
        }
        config.logit_soft_cap = hf.final_logit_softcapping.flatten();
        let pattern = hf.sliding_window_pattern.unwrap_or(6).max(1);
        let window = hf.sliding_window.unwrap_or(Some(4096));
        config.layers = hf.layers(window, |layer| !(layer + 1).is_multiple_of(pattern))?;
        config.ropes.push(hf.sliding_rope()?);
        for layer in config.layers.iter_mut().filter(|layer| layer.window.is_some()) {
            layer.rope = Some(1);
        }
        Ok(())
    },
    ..GEMMA2
};

fn apply(config: &mut ModelConfig, hf: &HfConfig) {
    llama::apply_biases(config, hf);
    config.bias.mlp = false;
    config.norm_offset = 1.0;
    config.embedding_multiplier = (config.hidden_size as f32).sqrt();
    config.attention_scale = Some((1.0 / hf.query_pre_attn_scalar.unwrap_or(256.0).sqrt()) as f32);
}

fn build(b: &mut Builder<'_>) -> Result<(), ImportError> {
    let mut hidden = b.scaled_embedding("model.embed_tokens")?;
    for layer in 0..b.config.layers.len() {
        let module = format!("model.layers.{layer}");
        let x = b.norm_for(&format!("{module}.input_layernorm"), hidden, &b.attention_weights(layer))?;
        let x = b.attention(layer, x)?;
        let x = b.norm(&format!("{module}.post_attention_layernorm"), x)?;
        hidden = b.add(&format!("{module}.self_attn.residual"), hidden, x)?;

        let x = b.norm_for(&format!("{module}.pre_feedforward_layernorm"), hidden, &b.mlp_weights(layer))?;
        let x = b.gated_mlp(layer, x)?;
        let x = b.norm(&format!("{module}.post_feedforward_layernorm"), x)?;
        hidden = b.add(&module, hidden, x)?;
        b.end_layer(hidden);
    }
    b.head("model.norm", "model.embed_tokens", hidden)
}
