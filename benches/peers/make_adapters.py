#!/usr/bin/env python3
"""Random LoRA adapters of several ranks on every projection of a GGUF's model, as PEFT directories and as GGUF files.

    make_adapters.py MODEL.gguf OUT

They say nothing sensible: only their cost counts. Weights are small, so that the model still says something.
"""
import json, os, sys

import gguf
import numpy as np
from safetensors.numpy import save_file

from bundles import RANKS

MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def main():
    model, out = sys.argv[1:]
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    shapes = [(tensor.name, [int(n) for n in tensor.shape]) for tensor in reader.tensors]
    for rank in RANKS:
        random, peft = np.random.default_rng(rank), {}
        writer = gguf.GGUFWriter(os.path.join(folder(out), f"r{rank}.gguf"), architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(rank))
        for name, shape in shapes:
            parts = name.split(".")
            if parts[0] != "blk" or parts[2] not in MODULES:
                continue
            k, n = shape  # GGUF names the innermost extent first.
            a = (random.standard_normal((rank, k)) / k).astype(np.float16)
            b = (random.standard_normal((n, rank)) / rank).astype(np.float16)
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", b)
            module = f"base_model.model.model.layers.{parts[1]}.{MODULES[parts[2]]}"
            peft[f"{module}.lora_A.weight"], peft[f"{module}.lora_B.weight"] = a, b
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        directory = folder(os.path.join(out, f"r{rank}"))
        save_file(peft, os.path.join(directory, "adapter_model.safetensors"))
        targets = sorted(module.rsplit(".", 1)[1] for module in MODULES.values())
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
        # That of the largest rank is the last of all files: run.sh looks for it.
        with open(os.path.join(directory, "adapter_config.json"), "w") as file:
            json.dump(config, file, indent=2)


def folder(path):
    os.makedirs(path, exist_ok=True)
    return path


if __name__ == "__main__":
    main()
