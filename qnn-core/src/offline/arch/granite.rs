//! Granite 3: llama with a factor on embeddings, scores, residuals and logits.

use super::{Architecture, llama};
use crate::offline::config::config_error;

/// Granite, dense.
pub(super) const GRANITE: Architecture = Architecture {
    title: "Granite 3 (dense)",
    notes: "factors on embeddings, scores, residuals and logits; biases",
    model_types: &["granite"],
    gguf_names: &["granite"],
    apply_hf: |config, hf| {
        llama::apply_biases(config, hf);
        config.embedding_multiplier = hf.embedding_multiplier.unwrap_or(1.0);
        config.residual_multiplier = hf.residual_multiplier.unwrap_or(1.0);
        config.attention_scale = Some(hf.attention_multiplier.unwrap_or(1.0));
        let scaling = hf.logits_scaling.unwrap_or(1.0);
        if scaling.is_nan() || scaling <= 0.0 {
            return Err(config_error("logits_scaling", scaling, "a number above 0".to_owned()));
        }
        config.logit_multiplier = 1.0 / scaling;
        Ok(())
    },
    ..llama::LLAMA
};
