#!/usr/bin/env python3
"""usage: tiny_logits.py > tiny_logits.json      needs numpy

Logits of the tiny models of tests/support/tiny_model.rs (seed 7), computed in float64 by a direct reading of the
architectures' definitions in transformers (modeling_llama, modeling_mistral, modeling_qwen2). It shares no code with the
importer or the backends.
"""
import json
import numpy as np

MASK = (1 << 64) - 1
IDS = [1, 5, 66, 9, 0, 31, 31, 12, 50, 7, 23]
ROWS = [0, 6, 10]


def splitmix(seed):
    while True:
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        yield z ^ (z >> 31)


def weights(c, seed):
    q, kv, h = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"], 48
    shapes = [("model.embed_tokens.weight", (67, h))]
    for i in range(2):
        p = f"model.layers.{i}."
        shapes.append((p + "input_layernorm.weight", (h,)))
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            shapes.append((f"{p}self_attn.{name}_proj.weight", (n, h)))
            if c["bias"]:
                shapes.append((f"{p}self_attn.{name}_proj.bias", (n,)))
        shapes += [(p + "self_attn.o_proj.weight", (h, q)), (p + "post_attention_layernorm.weight", (h,)),
                   (p + "mlp.gate_proj.weight", (80, h)), (p + "mlp.up_proj.weight", (80, h)),
                   (p + "mlp.down_proj.weight", (h, 80))]
    shapes.append(("model.norm.weight", (h,)))
    if not c["tied"]:
        shapes.append(("lm_head.weight", (67, h)))
    random, out = splitmix(seed), {}
    for name, shape in shapes:
        centre = 1024 if name.endswith("norm.weight") else 0
        flat = [(centre + next(random) % 513 - 256) / 1024 for _ in range(int(np.prod(shape)))]
        out[name] = np.array(flat).reshape(shape)
    return out


def norm(x, w):
    return w * (x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5))


def rotate(x, positions):  # x: [rows, heads, head_dim]
    d = x.shape[-1]
    angle = positions[:, None] * 10000.0 ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(np.concatenate([angle, angle], -1))[:, None], np.sin(np.concatenate([angle, angle], -1))[:, None]
    return x * cos + np.concatenate([-x[..., d // 2:], x[..., :d // 2]], -1) * sin


def logits(c, seed):
    w, d = weights(c, seed), c["head_dim"]
    x, pos = w["model.embed_tokens.weight"][IDS], np.arange(len(IDS))
    for i in range(2):
        p = f"model.layers.{i}."
        def linear(v, name):
            return v @ w[p + name + ".weight"].T + w.get(p + name + ".bias", 0)
        y = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = (linear(y, f"self_attn.{n}_proj").reshape(len(IDS), -1, d) for n in "qkv")
        q, k = rotate(q, pos), rotate(k, pos)
        k, v = (np.repeat(t, c["heads"] // c["kv_heads"], axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(d)
        seen = pos[:, None] >= pos[None]
        if c["window"]:
            seen &= pos[:, None] - pos[None] < c["window"]
        scores = np.where(seen, scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(len(IDS), -1)
        x = x + linear(mixed, "self_attn.o_proj")
        y = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = linear(y, "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, "mlp.up_proj"), "mlp.down_proj")
    head = w["model.embed_tokens.weight" if c["tied"] else "lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ head.T


LLAMA = {"heads": 3, "kv_heads": 1, "head_dim": 16, "bias": False, "window": None, "tied": True}
MODELS = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "window": 5, "tied": False},
    "qwen2": {**LLAMA, "heads": 4, "kv_heads": 2, "head_dim": 24, "bias": True},
}
print(json.dumps({"ids": IDS, "rows": ROWS,
                  "logits": {name: [[round(float(v), 7) for v in row] for row in logits(c, 7)[ROWS]]
                             for name, c in MODELS.items()}}))
