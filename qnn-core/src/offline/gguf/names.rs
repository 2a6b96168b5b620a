//! From a GGUF's names of tensors to those of Hugging Face.

/// The Hugging Face name of the tensor that a GGUF of `architecture` calls `name`; `None` if there is none.
pub(super) fn hf_name(architecture: &str, name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let mut parts = name.strip_prefix("blk.")?.split('.');
    let (layer, module, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let plain = !layer.is_empty() && layer.bytes().all(|b| b.is_ascii_digit());
    if parts.next().is_some() || !plain || !matches!(kind, "weight" | "bias") {
        return None;
    }
    let own = match architecture {
        "gemma2" | "gemma3" => GEMMA,
        "phi3" => PHI3,
        _ => &[],
    };
    let module = own.iter().chain(MODULES).find(|(gguf, _)| *gguf == module)?.1;
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

/// Whether `name` is a tensor of rotary factors, which become part of the frequencies and not of the graph.
pub(super) fn is_rope_factors(name: &str) -> bool {
    matches!(name, "rope_freqs.weight" | "rope_factors_short.weight" | "rope_factors_long.weight")
}

const MODULES: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];
/// Norms on both sides of attention and MLP.
const GEMMA: &[(&str, &str)] = &[
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
];
/// Fused projections; `ffn_up` is gate and up.
const PHI3: &[(&str, &str)] = &[("attn_qkv", "self_attn.qkv_proj"), ("ffn_up", "mlp.gate_up_proj")];
