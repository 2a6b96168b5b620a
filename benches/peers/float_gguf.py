#!/usr/bin/env python3
"""A GGUF with the weights of a Hugging Face directory: float_gguf.py TEMPLATE.gguf HF_DIR OUT.gguf

Needs numpy, gguf and safetensors. Everything but the matrices and norms (tokenizer, architecture) comes from TEMPLATE, a GGUF of
the same llama model; matrices become F16, norms F32. Rows of q and k are interleaved, as llama.cpp wants them.
"""
import json
import pathlib
import sys

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def hf_name(name):
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{NAMES[parts[2]]}.weight"
    return f"{NAMES[parts[0]]}.weight"


def interleaved(rows, heads):
    half_split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return half_split.swapaxes(1, 2).reshape(rows.shape)


def main():
    template, folder, out = sys.argv[1:4]
    folder = pathlib.Path(folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    reader = gguf.GGUFReader(template)
    arch = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = tensors[hf_name(tensor.name)]
        if ".attn_q." in tensor.name:
            values = interleaved(values, config["num_attention_heads"])
        if ".attn_k." in tensor.name:
            values = interleaved(values, config["num_key_value_heads"])
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
