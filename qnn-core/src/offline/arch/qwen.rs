//! Qwen: llama with a bias on q, k and v (2, 2.5), or with normed heads (3). Upper layers may slide.

use super::{Architecture, llama};
use crate::offline::{
    config::{HfConfig, LayerConfig},
    error::ImportError,
};

/// Qwen2 and Qwen2.5.
pub(super) const QWEN2: Architecture = Architecture {
    title: "Qwen2, Qwen2.5",
    notes: "bias on q, k, v; sliding window on upper or listed layers",
    model_types: &["qwen2"],
    gguf_names: &["qwen2"],
    gguf_interleaves_qk: false,
    apply_hf: |config, hf| {
        config.bias.qkv = true;
        config.layers = layers(hf)?;
        Ok(())
    },
    ..llama::LLAMA
};

/// Qwen3, dense.
pub(super) const QWEN3: Architecture = Architecture {
    title: "Qwen3 (dense)",
    notes: "normed heads; sliding window on upper or listed layers",
    model_types: &["qwen3"],
    gguf_names: &["qwen3"],
    apply_hf: |config, hf| {
        llama::apply_biases(config, hf);
        config.bias.mlp = false;
        config.qk_norm = true;
        config.layers = layers(hf)?;
        Ok(())
    },
    ..QWEN2
};

/// Layers from `max_window_layers` on slide, if `use_sliding_window` is set.
fn layers(hf: &HfConfig) -> Result<Vec<LayerConfig>, ImportError> {
    let window = match hf.use_sliding_window {
        Some(true) => hf.sliding_window.unwrap_or(Some(4096)),
        _ => None,
    };
    let first = hf.max_window_layers.unwrap_or(28);
    hf.layers(window, |layer| layer >= first)
}
