#!/usr/bin/env python3
"""A float model whose weights lie on no 4-bit grid, of one whose weights do: off_grid.py HF_DIR OUT_DIR

Needs numpy and safetensors. SmolLM2's directory is made from a Q4_1 GGUF, so that every block of 32 weights has 16 values, and a
format that finds them again loses nothing. (Scaling channels hides them from some formats, but not from a tool that scales
channels itself.) Here each weight of a projection moves by up to half a step of its block, at random, always the same. The
result is a worse model, a float model like any other, and what each format is measured against.
"""
import pathlib
import shutil
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

BLOCK = 32


def off_grid(weights, random):
    blocks = weights.astype(np.float32).reshape(weights.shape[0], -1, BLOCK)
    step = (blocks.max(axis=-1, keepdims=True) - blocks.min(axis=-1, keepdims=True)) / 15
    return (blocks + random.uniform(-0.5, 0.5, blocks.shape).astype(np.float32) * step).reshape(weights.shape)


def main():
    source, out = map(pathlib.Path, sys.argv[1:3])
    out.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.json"):
        shutil.copy(file, out)
    random = np.random.default_rng(1)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: off_grid(tensor, random) if name.endswith("_proj.weight") else tensor.astype(np.float32) for name, tensor in tensors.items()},
        out / "model.safetensors",
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main()
