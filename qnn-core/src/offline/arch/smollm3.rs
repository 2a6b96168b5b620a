//! SmolLM3: llama with layers that do not rotate.

use super::{Architecture, llama};
use crate::offline::{
    config::{HfDefaults, config_error},
    error::ImportError,
};

/// SmolLM3: every fourth layer is without rotary embedding, unless the configuration lists them.
pub(super) const SMOLLM3: Architecture = Architecture {
    title: "SmolLM3",
    notes: "layers without rotary embedding; biases; sliding window",
    model_types: &["smollm3"],
    gguf_names: &["smollm3"],
    defaults: HfDefaults { rope_theta: 2_000_000.0, tied_head: true, ..llama::LLAMA.defaults },
    apply_hf: |config, hf| {
        llama::apply_biases(config, hf);
        let n_layers = hf.num_hidden_layers;
        let interval = hf.no_rope_layer_interval.unwrap_or(4).max(1);
        // The list's name says "no rope", its ones say rope.
        let by_interval = || (0..n_layers).map(|i| u8::from(!(i + 1).is_multiple_of(interval))).collect();
        let rotates = hf.no_rope_layers.clone().unwrap_or_else(by_interval);
        if rotates.len() != n_layers {
            let want = format!("{n_layers}, the number of layers");
            return Err(config_error("no_rope_layers", format!("a list of {}", rotates.len()), want));
        }
        let window = hf.sliding_window.flatten().filter(|_| hf.use_sliding_window == Some(true));
        config.layers = hf.layers(window, |layer| rotates[layer] == 0)?;
        for (layer, rotates) in config.layers.iter_mut().zip(&rotates) {
            layer.rope = (*rotates != 0).then_some(0);
        }
        Ok::<(), ImportError>(())
    },
    ..llama::LLAMA
};
