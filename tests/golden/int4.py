#!/usr/bin/env python3
"""usage: int4.py PACKERS      needs transformers 4.57.6, torch 2.9.1, safetensors, numpy

PACKERS is a folder with the packages auto_gptq 0.7.1, autoawq 0.2.9 and gptqmodel 7.7.0, unpacked and not installed:
`pip download --no-deps` gets them, and only their packers in plain torch are used, on a CPU.

Writes int4/: tiny models whose matrices these packers packed, and in logits.json what transformers computes in float32
with the values that the codes stand for, (q - zero) * scale.
"""
import ast
import contextlib
import copy
import glob
import importlib.util
import json
import math
import os
import shutil
import sys
import types

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

PACKERS = sys.argv[1]
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "int4")
IDS, ROWS = [1, 5, 30, 9, 0, 31, 22, 12], [0, 4, 7]
CONFIG = dict(vocab_size=33, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
              tie_word_embeddings=False)


def find(path):
    return glob.glob(os.path.join(PACKERS, "**", path), recursive=True)[0]


def load(path, name, parents=()):
    """The module in a file of a package whose own __init__ would load CUDA."""
    for parent in parents:
        module = types.ModuleType(parent)
        module.__path__ = [find(parent.replace(".", "/"))]
        sys.modules[parent] = module
    spec = importlib.util.spec_from_file_location(name, find(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def function(path, name, **names):
    """One function of a file that needs too much to be loaded as a whole."""
    tree = ast.parse(open(find(path)).read())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    for argument in found.args.args:
        argument.annotation = None
    exec(compile(ast.Module([found], []), path, "exec"), names)
    return names[name]


auto_gptq = load("auto_gptq/nn_modules/qlinear/qlinear_cuda.py", "auto_gptq_packer")
awq = load("awq/modules/linear/gemm.py", "awq.modules.linear.gemm", ("awq", "awq.utils", "awq.modules"))
gptqmodel_pack = function(
    "gptqmodel/nn_modules/qlinear/__init__.py", "pack_original", t=torch, np=np, nn=torch.nn, math=math,
    transformers=transformers, _ConvNd=torch.nn.Conv2d,
    THREADPOOLCTL=types.SimpleNamespace(threadpool_limits=lambda n: contextlib.nullcontext()))
gptqmodel_to_v1 = function(
    "gptqmodel/utils/model.py", "convert_gptq_v2_to_v1_format_module", torch=torch, BaseQuantLinear=torch.nn.Module,
    log=types.SimpleNamespace(info=types.SimpleNamespace(once=print)))


def by_auto_gptq(linear, group, grid, order):
    packed = auto_gptq.QuantLinear(4, group, linear.in_features, linear.out_features, True,
                                   weight_dtype=linear.weight.dtype)
    linear.bias = linear.bias if linear.bias is not None else torch.nn.Parameter(torch.zeros(linear.out_features))
    packed.pack(linear, grid["scales"].T.clone(), grid["zeros"].T.clone().float(), order)
    # What the library itself takes its codes for.
    value = copy.deepcopy(packed).float()(torch.eye(linear.in_features)) - packed.bias
    return {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales", "g_idx", "bias")}, value.T


def by_gptqmodel(version):
    def pack(linear, group, grid, order):
        packed = torch.nn.Module()
        packed.bits, packed.maxq, packed.pack_factor, packed.pack_dtype_bits, packed.planar = 4, 15, 8, 32, False
        packed.pack_dtype, packed.pack_np_dtype, packed.pack_np_math_dtype = torch.int32, np.int32, np.uint32
        packed.qzero_format = lambda format: None
        gptqmodel_pack(packed, linear, grid["scales"].T.clone(), grid["zeros"].T.clone().float(), order)
        if version == 1:
            gptqmodel_to_v1(packed, packed)
        return {k: getattr(packed, k) for k in ("qweight", "qzeros", "scales", "g_idx")}, None
    return pack


def by_auto_awq(linear, group, grid, order):
    packed = awq.WQLinear_GEMM.from_linear(linear, 4, group, scales=grid["scales"].T.clone().T,
                                           zeros=grid["zeros"].clone().float())
    value = awq.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group)
    tensors = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales}
    return {**tensors, **({} if packed.bias is None else {"bias": packed.bias})}, value.T


def matrix(linear, rng, pack, group_size, symmetric=False, least_zero=1, act_order=False, dtype=torch.float16,
           tiny_scales=False):
    """Gives `linear` random values on a grid and packs them."""
    k, n = linear.in_features, linear.out_features
    group = k if group_size == -1 else group_size
    shape = (k // group, n)
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, shape) * 0.25 / k ** 0.5)
    if tiny_scales:
        scales[:, ::3] *= 1e-4
    scales = scales.to(dtype)
    zeros = torch.full(shape, 8) if symmetric else torch.from_numpy(rng.integers(least_zero, 16, shape))
    codes = torch.from_numpy(rng.integers(0, 16, (k, n)))
    order = torch.arange(k) // group
    if act_order:
        order = order[torch.from_numpy(rng.permutation(k))]
    value = ((codes - zeros[order]).float() * scales.float()[order]).T.contiguous()
    linear.weight.data = value
    if linear.bias is not None:
        linear.bias.data = torch.from_numpy(rng.normal(0, 0.2, n)).to(dtype).float()
    given = torch.nn.Linear(k, n, bias=linear.bias is not None)
    given.weight.data = value.to(dtype) if pack is by_auto_gptq else value
    if linear.bias is not None:
        given.bias.data = linear.bias.data.to(dtype)
    grid = {"scales": scales.float(), "zeros": zeros}
    tensors, library = pack(given, group, grid, order.to(torch.int32))
    if library is not None:
        assert torch.allclose(library, value, rtol=1e-2, atol=1e-5), (library - value).abs().max()
    return tensors


def make(name, seed, kind, pack, quantization, file=None, **options):
    rng, folder = np.random.default_rng(seed), os.path.join(HERE, name)
    os.makedirs(folder)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**CONFIG)).eval()
    tensors = {}
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if ".layers." in module_name and isinstance(module, torch.nn.Linear):
                packed = matrix(module, rng, pack, quantization["group_size"], **options)
                tensors.update({f"{module_name}.{part}": value.contiguous() for part, value in packed.items()})
        for key, p in model.named_parameters():
            if ".layers." not in key or "norm" in key:
                p.copy_((torch.randn_like(p) * 0.3 + (1.0 if p.dim() == 1 else 0.0)).half().float())
                tensors[key] = p.half()
        logits = model(torch.tensor([IDS])).logits[0][ROWS]
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    config = {"architectures": [type(model).__name__], "model_type": kind, "hidden_act": "silu", **CONFIG}
    if file is None:
        config["quantization_config"] = quantization
    else:
        json.dump(quantization, open(os.path.join(folder, file), "w"), indent=1)
    json.dump(config, open(os.path.join(folder, "config.json"), "w"), indent=1)
    return [[round(v, 5) for v in row] for row in logits.tolist()]


GPTQ = dict(quant_method="gptq", bits=4, group_size=32, desc_act=False, sym=False)
shutil.rmtree(HERE, ignore_errors=True)
golden = {
    "gptq": make("gptq", 1, "llama", by_auto_gptq, GPTQ),
    "gptq_act_order": make("gptq_act_order", 2, "qwen2", by_auto_gptq, dict(GPTQ, desc_act=True, sym=True),
                           act_order=True, symmetric=True),
    "gptq_bf16": make("gptq_bf16", 3, "qwen2", by_auto_gptq, dict(GPTQ, group_size=16), dtype=torch.bfloat16,
                      tiny_scales=True),
    "gptq_zero": make("gptq_zero", 4, "llama", by_gptqmodel(1), dict(GPTQ, checkpoint_format="gptq"), least_zero=0),
    "gptq_v2": make("gptq_v2", 5, "llama", by_gptqmodel(2),
                    dict(bits=4, group_size=-1, desc_act=False, sym=True, format="gptq_v2", pack_dtype="int32"),
                    "quantize_config.json", symmetric=True),
    "awq": make("awq", 6, "qwen2", by_auto_awq,
                dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemm"), least_zero=0),
}
json.dump({"ids": IDS, "rows": ROWS, "logits": golden}, open(os.path.join(HERE, "logits.json"), "w"),
          separators=(",", ":"))
