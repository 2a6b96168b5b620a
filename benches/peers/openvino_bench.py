"""OpenVINO GenAI, measured as genie-bench measures: one JSON line per figure. Run by compare.py inside its environment.

    openvino_bench.py MODEL.gguf THREADS rates PROMPTS DEPTHS TOKENS
    openvino_bench.py MODEL.gguf THREADS first TEXT                   # answers TEXT with a token, to be timed from outside

Without adapters: in a model that it reads from a GGUF it finds no layer of a PEFT file ("Unused LoRA tensor", all of them).
"""
import json, sys

import numpy as np
import openvino as ov
import openvino_genai as genai

RANDOM = np.random.default_rng(1)


def main():
    model, threads, what, *rest = sys.argv[1:]
    pipe = genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=int(threads))
    if what == "first":
        # The others get the text as it is, too.
        print(pipe.generate(rest[0], max_new_tokens=1, ignore_eos=True, do_sample=False, apply_chat_template=False), flush=True)
    else:
        rates(pipe, *rest)


def rates(pipe, prompts, depths, n_tokens):
    for prompt in numbers(prompts):
        generate(pipe, prompt, 1)
        figure(f"pp{prompt}", prompt / generate(pipe, prompt, 1).get_ttft().mean * 1e3)
    for depth in numbers(depths):
        generate(pipe, max(depth, 1), 2)
        per_token = generate(pipe, max(depth, 1), int(n_tokens) + 1).get_tpot().mean
        figure(f"tg{n_tokens}_d{depth}", 1e3 / per_token)


def generate(pipe, n_prompt, n_new):
    """Runs a prompt of pseudo-random ids, other ones each time, since the pipeline keeps the cache of prompts it has seen;
    gives the pipeline's own times."""
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = n_new, True, False
    ids = RANDOM.integers(1000, 40000, (1, n_prompt), dtype=np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    return pipe.generate(inputs, config).perf_metrics


def numbers(text):
    return [int(word) for word in text.split(",") if word]


def figure(metric, value):
    print(json.dumps({"metric": metric, "median": value}), flush=True)


if __name__ == "__main__":
    main()
