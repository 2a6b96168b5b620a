//! Phi-3 and Phi-3.5: llama with fused projections, which are split at import, and heads that may be rotated in part.

use super::{Architecture, llama};

/// Phi-3.
pub(super) const PHI3: Architecture = Architecture {
    title: "Phi-3, Phi-3.5 (mini)",
    notes: "fused projections are split at import, adapters on them too; heads rotated in part; LongRoPE's factors go by \
            the length that a context binary is made for (--cl)",
    model_types: &["phi3"],
    gguf_names: &["phi3"],
    gguf_interleaves_qk: false,
    partial_rotary: true,
    apply_hf: |config, hf| {
        config.set_window(hf.sliding_window.flatten());
        Ok(())
    },
    ..llama::LLAMA
};
