#!/usr/bin/env python3
"""usage: families.py      needs transformers 4.57.6, peft 0.19.1, torch 2.9.1

Writes families/: a tiny random model of each family as transformers saves it (odd sizes, every option of its
configuration somewhere), a LoRA of PEFT on every linear layer, and in logits.json what transformers computes with both
in float32. A variant is a change of config.json over the same weights.
"""
import json
import os
import shutil

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "families")
IDS = [1, 5, 60, 9, 0, 31, 31, 12, 50, 7, 23, 44, 2, 18, 37, 55, 6, 29, 41, 3]
ROWS = [0, 7, 13, 19]
SIZES = dict(vocab_size=61, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=12, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1,
             eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
FLAT = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]

# family: model_type, stored type, configuration, variants, targets
FAMILIES = {
    "llama": ("llama", torch.float32, dict(tie_word_embeddings=False, attention_bias=True, mlp_bias=True), {
        "linear": dict(rope_scaling=dict(rope_type="linear", factor=2.5)),
        "old_linear": dict(rope_scaling=dict(type="linear", factor=3.0)),
        "llama3": dict(rope_scaling=LLAMA3, rope_theta=500.0),
        "yarn": dict(rope_scaling=YARN),
        "yarn_all": dict(rope_scaling=dict(YARN, beta_fast=8.0, beta_slow=0.5, mscale=1.3, mscale_all_dim=0.7,
                                           truncate=False), rope_theta=300.0),
        "yarn_attention_factor": dict(rope_scaling=dict(YARN, attention_factor=1.3)),
        "yarn_max_positions": dict(rope_scaling=dict(rope_type="yarn", factor=2.0)),
    }, SPLIT),
    "mistral": ("mistral", torch.bfloat16, dict(sliding_window=6, tie_word_embeddings=True), {
        "full": dict(sliding_window=None)}, SPLIT),
    "qwen2": ("qwen2", torch.float16, dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), {
        "full": dict(use_sliding_window=False, layer_types=None),
        "layer_types": dict(layer_types=["sliding_attention", "full_attention"])}, SPLIT),
    "qwen3": ("qwen3", torch.bfloat16, dict(attention_bias=True, tie_word_embeddings=True), {
        "sliding": dict(use_sliding_window=True, sliding_window=7, max_window_layers=0, layer_types=None)}, SPLIT),
    "gemma2": ("gemma2", torch.bfloat16, dict(
        sliding_window=5, query_pre_attn_scalar=20, attn_logit_softcapping=4.0, final_logit_softcapping=6.0), {
        "uncapped": dict(attn_logit_softcapping=None, final_logit_softcapping=None)}, SPLIT),
    "gemma3": ("gemma3_text", torch.bfloat16, dict(
        sliding_window=5, query_pre_attn_scalar=20, sliding_window_pattern=2, rope_theta=20000.0,
        rope_local_base_freq=100.0, attention_bias=True), {
        "capped": dict(attn_logit_softcapping=3.0, final_logit_softcapping=5.0),
        "scaled": dict(rope_scaling=dict(rope_type="linear", factor=8.0)),
        "layer_types": dict(layer_types=["full_attention", "sliding_attention"])}, SPLIT),
    "phi3": ("phi3", torch.float16, dict(sliding_window=7, head_dim=None, hidden_size=48), {
        "partial": dict(partial_rotary_factor=0.5, sliding_window=None),
        "longrope": dict(rope_scaling=dict(type="longrope", short_factor=FLAT, long_factor=[4.0] * 6),
                         original_max_position_embeddings=32),
        "longrope_beyond": dict(rope_scaling=dict(type="longrope", short_factor=FLAT,
                                                  long_factor=[1.5, 2.0, 3.0, 4.0, 6.0, 7.0]),
                                original_max_position_embeddings=12)}, FUSED),
    "smollm3": ("smollm3", torch.bfloat16, dict(no_rope_layers=[1, 0], attention_bias=True, mlp_bias=True), {
        "interval": dict(no_rope_layers=None, no_rope_layer_interval=2),
        "sliding": dict(use_sliding_window=True, sliding_window=6, layer_types=None)}, SPLIT),
    "granite": ("granite", torch.float16, dict(
        embedding_multiplier=6.0, residual_multiplier=0.7, attention_multiplier=0.4, logits_scaling=3.0,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True), {"llama3": dict(rope_scaling=LLAMA3)}, SPLIT),
}


def randomize(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                # Gemma stores the difference to 1.
                p.copy_(torch.randn_like(p) * 0.2 + (0.0 if "gemma" in model.config.model_type else 1.0))
            elif p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.3)
            else:
                p.copy_(torch.randn_like(p) * (1.0 if "embed" in name else 1.5 / p.shape[1] ** 0.5))


def logits(model):
    with torch.no_grad():
        whole = model(torch.tensor([IDS]), use_cache=False).logits[0]
        # Here a context that grows beyond this length rotates new keys in another way than those in its cache.
        if (getattr(model.config, "original_max_position_embeddings", None) or len(IDS)) < len(IDS):
            return [[round(v, 5) for v in whole[row].tolist()] for row in ROWS]
        past, steps = None, []
        for i, token in enumerate(IDS):
            out = model(torch.tensor([[token]]), past_key_values=past, use_cache=True,
                        cache_position=torch.tensor([i]))
            past = out.past_key_values
            steps.append(out.logits[0, -1])
    assert (whole - torch.stack(steps)).abs().max() < 2e-4, (whole - torch.stack(steps)).abs().max()
    return [[round(v, 5) for v in whole[row].tolist()] for row in ROWS]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    golden = {"ids": IDS, "rows": ROWS, "families": {}}
    for seed, (name, (kind, dtype, options, variants, targets)) in enumerate(FAMILIES.items()):
        folder = os.path.join(HERE, name)
        config = CONFIG_MAPPING[kind](**{k: v for k, v in {**SIZES, **options}.items() if v is not None})
        model = AutoModelForCausalLM.from_config(config).eval()
        randomize(model, seed)
        # One family in shards.
        model.to(dtype).save_pretrained(folder, max_shard_size="30KB" if name == "qwen3" else "1GB")
        os.remove(os.path.join(folder, "generation_config.json"))
        path = os.path.join(folder, "config.json")
        saved = json.load(open(path))
        saved.pop("transformers_version")
        json.dump(saved, open(path, "w"), indent=1)
        found = {"base": {"config": {}, "logits": logits(load(folder))}}
        for variant, change in variants.items():
            json.dump({k: v for k, v in {**saved, **change}.items() if v is not None or k == "sliding_window"
                       or k.endswith("softcapping")}, open(path, "w"))
            found[variant] = {"config": change, "logits": logits(load(folder))}
        json.dump(saved, open(path, "w"), indent=1)

        adapter = get_peft_model(load(folder), LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        torch.manual_seed(100 + seed)
        with torch.no_grad():
            for key, p in adapter.named_parameters():
                if "lora_" in key:
                    p.copy_(torch.randn_like(p) * 0.3)
        adapter.eval().save_pretrained(os.path.join(folder, "adapter"))
        os.remove(os.path.join(folder, "adapter", "README.md"))
        found["adapter"] = {"config": {}, "logits": logits(adapter)}
        config_path = os.path.join(folder, "adapter", "adapter_config.json")
        saved = {**json.load(open(config_path)), "base_model_name_or_path": None}
        json.dump(dict(sorted((k, sorted(v) if k == "target_modules" else v) for k, v in saved.items())),
                  open(config_path, "w"), indent=1)
        golden["families"][name] = found
        print(name, list(found))
    with open(os.path.join(HERE, "logits.json"), "w") as out:
        json.dump(golden, out, separators=(",", ":"))


main()
