#!/usr/bin/env python3
"""usage: ggml_blocks.py > ggml_blocks.json      needs numpy and gguf

Random blocks of every GGML format that is imported, with the floats that the `gguf` package reads out of them.
"""
import json
import numpy as np
from gguf import GGMLQuantizationType as T, GGML_QUANT_SIZES, dequantize

random, out = np.random.default_rng(1), {}
for t in (T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q4_K, T.Q5_K, T.Q6_K, T.Q2_K, T.Q3_K, T.IQ4_NL, T.IQ4_XS):
    size = GGML_QUANT_SIZES[t][1]
    blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
    halves = {T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
              T.Q2_K: [80, 82], T.Q3_K: [108]}.get(t, [0])
    for at in halves:  # scales and minima of a sensible size
        blocks[:, at:at + 2] = random.uniform(-0.01, 0.01, 2).astype(np.float16).view(np.uint8).reshape(2, 2)
    values = dequantize(blocks, t).astype(np.float32).ravel()
    out[t.name] = {"number": int(t), "bytes": blocks.tobytes().hex(), "values": [float(v) for v in values]}
print(json.dumps(out))
