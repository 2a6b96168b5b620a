"""A llama-architecture GGUF as a Hugging Face directory with f16 weights.

usage: make_hf_dir.py MODEL.gguf OUT_DIR        (make_hf_dir.sh calls it, in an environment with the right packages)

Every weight is dequantized to f32 and rounded once to f16. GGUF stores the rows of the query and key projections with
the two halves of each rotated pair side by side; Hugging Face keeps the halves of a head apart, so they are moved.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # the GGUF token type


def main(source: str, out: Path) -> None:
    reader = GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if meta["general.architecture"] != "llama" or meta["tokenizer.ggml.pre"] != "smollm":
        sys.exit("make_hf_dir: this script knows llama models with the smollm tokenizer only")
    out.mkdir(parents=True, exist_ok=True)
    weights = read_weights(reader, meta)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    for name, content in {
        "config.json": model_config(meta, tied="lm_head.weight" not in weights),
        "generation_config.json": {"_from_model_config": True, **token_ids(meta)},
        "tokenizer_config.json": tokenizer_config(meta),
    }.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{out}: {len(weights)} tensors, {sum(w.size for w in weights.values()):,} parameters")


def read_weights(reader, meta) -> dict:
    """Tensors by their Hugging Face names, f16."""
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        inner = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if inner is None:
            name = OUTER[tensor.name]
        else:
            layer, part = inner.groups()
            name = f"model.layers.{layer}.{INNER[part]}.weight"
            if part in heads:
                values = separate_halves(values, heads[part])
        weights[name] = np.ascontiguousarray(values.astype(np.float16))
    return weights


def separate_halves(rows, heads: int):
    """Rows 0 1 2 3 … of each head become 0 2 4 … 1 3 5 …"""
    head_dim = rows.shape[0] // heads
    order = np.arange(rows.shape[0]).reshape(heads, head_dim)
    order = np.concatenate([order[:, 0::2], order[:, 1::2]], axis=1)
    return rows[order.reshape(-1)]


def build_tokenizer(meta) -> Tokenizer:
    """Byte-level BPE in which every digit stands alone."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control_tokens(meta)])
    return tokenizer


def control_tokens(meta) -> list:
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    return [token for token, kind in zip(tokens, kinds) if kind == CONTROL_TOKEN]


def token_ids(meta) -> dict:
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": meta[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in ids.items()}


def tokenizer_config(meta) -> dict:
    tokens = meta["tokenizer.ggml.tokens"]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {key.removesuffix("_id"): tokens[i] for key, i in token_ids(meta).items()}
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **named,
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": meta["llama.context_length"],
        "added_tokens_decoder": {str(tokens.index(t)): {"content": t, **flags} for t in control_tokens(meta)},
        "chat_template": meta["tokenizer.chat_template"],
    }


def model_config(meta, tied: bool) -> dict:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": meta["llama.context_length"],
        # GGUF keeps it as f32; the shortest decimal that reads back as the same f32 is the value that was meant.
        "rms_norm_eps": float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(meta["llama.rope.freq_base"]),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        **token_ids(meta),
    }


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
