//! Llama, and what shares its graph under another name.

use super::{Architecture, blocks::Builder};
use crate::offline::error::ImportError;

/// Llama: no bias unless the configuration asks for it.
pub(super) const LLAMA: Architecture = Architecture {
    model_types: &["llama", "smollm"],
    gguf_names: &["llama"],
    gguf_interleaves_qk: true,
    apply_hf: |config, choices| {
        config.bias.qkv = choices.attention_bias;
        config.bias.output = choices.attention_bias;
        config.bias.mlp = choices.mlp_bias;
        Ok(())
    },
    build,
};

/// Mistral: llama without bias, and a sliding window that is 4096 unless the configuration says otherwise.
pub(super) const MISTRAL: Architecture = Architecture {
    model_types: &["mistral"],
    gguf_names: &[],
    gguf_interleaves_qk: true,
    apply_hf: |config, choices| {
        config.window = choices.sliding_window.unwrap_or(Some(4096));
        Ok(())
    },
    build,
};

/// Layers of attention and gated MLP, each after a norm and around a residual.
pub(super) fn build(b: &mut Builder<'_>) -> Result<(), ImportError> {
    let mut hidden = b.embedding("model.embed_tokens")?;
    for layer in 0..b.config.n_layers {
        let module = format!("model.layers.{layer}");
        let weight = |name: &str| format!("{module}.{name}.weight");

        let qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].map(weight);
        let input_type = b.input_type(&qkv)?;
        let x = b.rms_norm(&format!("{module}.input_layernorm"), hidden, input_type)?;
        let x = b.attention(layer, x)?;
        hidden = b.add(&format!("{module}.self_attn.residual"), hidden, x)?;

        let input_type = b.input_type(&["mlp.gate_proj", "mlp.up_proj"].map(weight))?;
        let x = b.rms_norm(&format!("{module}.post_attention_layernorm"), hidden, input_type)?;
        let x = b.gated_mlp(layer, x)?;
        hidden = b.add(&module, hidden, x)?;
        b.end_layer(hidden);
    }
    b.head("model.norm", "model.embed_tokens", hidden)
}
