//! Qwen2 and Qwen2.5: llama with a bias on q, k and v.

use super::{Architecture, llama};
use crate::offline::error::ImportError;

/// Qwen2. Its mixed window (only some layers slide) is not built.
pub(super) const QWEN2: Architecture = Architecture {
    model_types: &["qwen2"],
    gguf_names: &["qwen2"],
    gguf_interleaves_qk: false,
    apply_hf: |config, choices| {
        if choices.use_sliding_window {
            let (what, supported) = ("use_sliding_window true".to_owned(), "false".to_owned());
            return Err(ImportError::Unsupported { what, supported });
        }
        config.bias.qkv = true;
        Ok(())
    },
    build: llama::build,
};
