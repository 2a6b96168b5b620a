//! Phi-3 and Phi-3.5: llama with fused projections, which are split at import, and heads that may be rotated in part.

use super::{Architecture, llama};

/// Phi-3. With LongRoPE the context ends at the original length: see [`crate::offline::config::RopeBase::scaled`].
pub(super) const PHI3: Architecture = Architecture {
    title: "Phi-3, Phi-3.5 (mini)",
    notes: "fused projections are split at import, adapters on them too; heads rotated in part; with LongRoPE the \
            context ends at the original length",
    model_types: &["phi3"],
    gguf_names: &["phi3"],
    gguf_interleaves_qk: false,
    partial_rotary: true,
    apply_hf: |config, hf| {
        config.set_window(hf.sliding_window.flatten());
        let original = hf.original_max_position_embeddings.filter(|_| hf.rope_scaling.is_some());
        if let Some(original) = original.filter(|original| *original < config.max_position_embeddings) {
            config.warnings.push(format!(
                "LongRoPE: the factors for contexts up to {original} are used, so the context ends there (the model's: {})",
                config.max_position_embeddings
            ));
            config.max_position_embeddings = original;
        }
        Ok(())
    },
    ..llama::LLAMA
};
