#!/usr/bin/env python3
"""usage: gguf_families.py LLAMA_CPP      needs a llama.cpp source tree, transformers 4.57.6, torch 2.9.1

Writes families/gguf/: a tiny random model of each family as llama.cpp's converter writes it, in f16 and without a tokenizer,
and in logits.json what transformers computes with the same weights in float32, for the ids and rows of families/logits.json.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [sys.argv[1], os.path.join(sys.argv[1], "gguf-py")]
import gguf
import torch
from conversion import base
from convert_hf_to_gguf import ModelType, get_model_architecture, get_model_class
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

HERE = Path(__file__).resolve().parent / "families"
GOLDEN = json.load(open(HERE / "logits.json"))
SIZES = dict(vocab_size=61, hidden_size=40, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
# What the metadata cannot say is as llama.cpp has it: scores scaled by the width of a head, Gemma 3's five layers that slide
# for one that does not, SmolLM3's every fourth layer that does not rotate.
CASES = {
    "llama": ("llama", dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True, rope_theta=500.0,
                            rope_scaling=LLAMA3)),
    "qwen2": ("qwen2", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "qwen3": ("qwen3", dict(tie_word_embeddings=True, rope_scaling=dict(rope_type="linear", factor=2.0))),
    "gemma2": ("gemma2", dict(sliding_window=5, query_pre_attn_scalar=12, attn_logit_softcapping=4.0,
                              final_logit_softcapping=6.0)),
    "gemma3": ("gemma3_text", dict(sliding_window=5, query_pre_attn_scalar=12, num_hidden_layers=6, rope_theta=20000.0,
                                   rope_local_base_freq=10000.0)),
    "phi3": ("phi3", dict(sliding_window=7, head_dim=None, hidden_size=48, partial_rotary_factor=0.5,
                          rope_scaling=dict(type="longrope", short_factor=[1.0, 1.3, 2.0], long_factor=[4.0] * 3),
                          original_max_position_embeddings=32)),
    "smollm3": ("smollm3", dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "granite": ("granite", dict(embedding_multiplier=6.0, residual_multiplier=0.7, attention_multiplier=0.4,
                                logits_scaling=3.0, head_dim=None, hidden_size=48, tie_word_embeddings=True)),
}


def randomize(model, seed):
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            value = torch.randn_like(p) * 0.2 + (0.0 if "gemma" in model.config.model_type else 1.0)
        elif p.dim() == 1:
            value = torch.randn_like(p) * 0.3
        else:
            value = torch.randn_like(p) * (1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5)
        p.copy_(value.half().float())


def to_gguf(folder, out):
    architecture = get_model_architecture(base.ModelBase.load_hparams(folder, False), ModelType.TEXT)
    model_class = get_model_class(architecture)
    no_vocab = {"set_vocab": lambda self: self.gguf_writer.add_tokenizer_model("none"), "model_arch": model_class.model_arch}
    type("Converter", (model_class,), no_vocab)(folder, gguf.LlamaFileType.MOSTLY_F16, out, eager=True).write()


with torch.no_grad():
    os.makedirs(HERE / "gguf", exist_ok=True)
    found = {}
    for seed, (name, (kind, options)) in enumerate(CASES.items()):
        config = CONFIG_MAPPING[kind](**{k: v for k, v in {**SIZES, **options}.items() if v is not None})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomize(model, seed)
        rows = model(torch.tensor([GOLDEN["ids"]]), use_cache=False).logits[0]
        found[name] = [[round(v, 5) for v in rows[row].tolist()] for row in GOLDEN["rows"]]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            # Gemma's converter counts the tokens.
            vocab = {str(i): i for i in range(SIZES["vocab_size"])}
            json.dump({"model": {"vocab": vocab}, "added_tokens": []}, open(Path(folder) / "tokenizer.json", "w"))
            to_gguf(Path(folder), HERE / "gguf" / f"{name}.gguf")
    json.dump(found, open(HERE / "gguf" / "logits.json", "w"), separators=(",", ":"))
