#!/usr/bin/env python3
"""usage: int4.py      needs transformers 4.57.6, torch 2.9.1, safetensors, numpy

Writes int4/: tiny llamas whose matrices are packed as GPTQ and AWQ document it, and in logits.json what transformers
computes in float32 with the values that the packed codes stand for, (q - zero) * scale.
"""
import json
import os
import shutil

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "int4")
IDS, ROWS = [1, 5, 30, 9, 0, 31, 22, 12], [0, 4, 7]
CONFIG = dict(vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1,
              eos_token_id=2, tie_word_embeddings=False)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack(nibbles, order=range(8)):
    """Eight columns to a word."""
    nibbles = nibbles.reshape(nibbles.shape[0], -1, 8).astype(np.uint64)
    return sum(nibbles[..., o] << (4 * i) for i, o in enumerate(order)).astype(np.uint32).view(np.int32)


def gptq(q, zeros, scales, group, less_one):
    stored = (zeros - less_one) & 15
    return {"qweight": np.ascontiguousarray(pack(q.T).T), "qzeros": pack(stored), "scales": scales,
            "g_idx": (np.arange(q.shape[0]) // group).astype(np.int32)}


def awq(q, zeros, scales):
    return {"qweight": pack(q, AWQ_ORDER), "qzeros": pack(zeros, AWQ_ORDER), "scales": scales}


def make(name, seed, group_size, symmetric, store, quantization, file=None):
    rng, folder = np.random.default_rng(seed), os.path.join(HERE, name)
    os.makedirs(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG)).eval()
    tensors = {}
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".layers." in key and p.dim() == 2:
                n, k = p.shape
                group = k if group_size == -1 else group_size
                q = rng.integers(0, 16, (k, n))
                zeros = np.full((k // group, n), 8) if symmetric else rng.integers(1, 16, (k // group, n))
                scales = (rng.uniform(0.5, 1.5, (k // group, n)) * 0.25 / k ** 0.5).astype(np.float16)
                wide = lambda x: np.repeat(x, group, axis=0)
                value = (q - wide(zeros)).astype(np.float32) * wide(scales).astype(np.float32)
                p.copy_(torch.from_numpy(value.T.copy()))
                module = key.removesuffix(".weight")
                tensors.update({f"{module}.{part}": v for part, v in store(q, zeros, scales, group).items()})
            else:
                p.copy_((torch.randn_like(p) * 0.3 + (1.0 if p.dim() == 1 else 0.0)).half().float())
                tensors[key] = p.half().numpy()
        logits = model(torch.tensor([IDS])).logits[0][ROWS]
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **CONFIG}
    if file is None:
        config["quantization_config"] = quantization
    else:
        json.dump(quantization, open(os.path.join(folder, file), "w"), indent=1)
    json.dump(config, open(os.path.join(folder, "config.json"), "w"), indent=1)
    return [[round(v, 5) for v in row] for row in logits.tolist()]


shutil.rmtree(HERE, ignore_errors=True)
golden = {
    "gptq": make("gptq", 1, 16, False, lambda *w: gptq(*w, less_one=1),
                 dict(quant_method="gptq", bits=4, group_size=16, desc_act=False, sym=False)),
    "gptq_v2": make("gptq_v2", 2, -1, True, lambda *w: gptq(*w, less_one=0),
                    dict(bits=4, group_size=-1, desc_act=False, sym=True, checkpoint_format="gptq_v2"),
                    "quantize_config.json"),
    "awq": make("awq", 3, 32, False, lambda q, z, s, g: awq(q, z, s),
                dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm")),
}
json.dump({"ids": IDS, "rows": ROWS, "logits": golden}, open(os.path.join(HERE, "logits.json"), "w"),
          separators=(",", ":"))
