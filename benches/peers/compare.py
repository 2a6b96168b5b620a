#!/usr/bin/env python3
"""Runs genie-bench and its peers in turn on the same cores; prints medians, ranges and ratios. Started by run.sh."""
import argparse, json, os, re, statistics, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
LOWER_IS_BETTER = ("start_to_first_token", "ttft", "rss", "peak_rss", "load_model", "switch", "alpha_change", "adapter_")


def main():
    args = arguments()
    cores = set(sorted(os.sched_getaffinity(0))[: args.threads])
    os.sched_setaffinity(0, cores)
    contenders = {"genie": lambda: genie(args)}
    if args.isa:
        contenders[f"genie {args.isa}"] = lambda: genie(args, {"HTP_SIM_ISA": args.isa})
    if os.path.exists(f"{args.build}/bin/llama-bench"):
        contenders["llama.cpp"] = lambda: llama_cpp(args)
    if os.path.exists(f"{args.build}/openvino/bin/python") and os.path.exists(f"{args.build}/model.Q4_0.gguf"):
        contenders["openvino"] = lambda: openvino(args)
    wanted = args.only.split(",") if args.only else list(contenders)
    figures, failed = {name: {} for name in contenders if name in wanted}, {}
    busy = [idle_load()]
    for turn in range(args.rounds):
        names = list(figures)
        for name in names if turn % 2 == 0 else reversed(names):
            if name in failed:
                continue
            try:
                for metric, value in contenders[name]():
                    figures[name].setdefault(metric, []).append(value)
            except (subprocess.SubprocessError, OSError, ValueError) as why:
                failed[name] = str(why)
                print(f"{name} failed and is left out from here on: {why}", file=sys.stderr)
            busy.append(idle_load())
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
    limits = measure_limits(args)
    if max(busy) > BUSY:
        print(f"warning: other processes used up to {max(busy):.0%} of a core between runs; figures are too low and uneven", file=sys.stderr)
    report(args, figures, limits, max(busy), failed)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ours", "config", "gguf", "build"):
        parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", default="128,512")
    parser.add_argument("--depths", default="0,512")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one decode measurement")
    parser.add_argument("--adapters", action="store_true", help="measure with adapters of rank 8, 16, 32 and 64 too")
    parser.add_argument("--isa", help="measure ours once more with this kernel tier, for example avx2")
    parser.add_argument("--only", help="names of the contenders to run, with commas between")
    parser.add_argument("--limits", help="command that prints the machine's limits as JSON lines with metric and median: benches/limits.rs")
    parser.add_argument("--output", help="write the JSON lines to this file too")
    return parser.parse_args()


def genie(args, environment={}):
    common = ["-p", args.prompts, "-d", args.depths, "-n", str(args.tokens), "-t", str(args.threads), "-r", "1", "--json"]
    environment = os.environ | environment
    yield from json_lines([args.ours, "-c", args.config, *common], environment)
    for rank in RANKS if args.adapters else ():
        config = f"{args.build}/adapters/genie/genie_config.json"
        for metric, value in json_lines([args.ours, "-c", config, "-l", f"r{rank}", *common], environment):
            if metric.endswith("_lora1") or metric in ("switch", "alpha_change", "adapter_load", "rss_per_adapter"):
                yield f"{metric}_r{rank}", value


def llama_cpp(args):
    """Each figure with the better of flash attention on and off."""
    best = {}
    common = [f"{args.build}/bin/llama-bench", "-m", args.gguf, "-t", str(args.threads), "-r", "1", "-fa", "0,1", "-o", "jsonl"]
    for extra in (["-p", args.prompts, "-n", "0"], ["-p", "0", "-n", str(args.tokens), "-d", args.depths]):
        for line in output(common + extra).splitlines():
            f = json.loads(line)
            name = f"pp{f['n_prompt']}" if f["n_prompt"] else f"tg{f['n_gen']}_d{f['n_depth']}"
            best[name] = max(best.get(name, 0.0), f["avg_ts"])
    yield from best.items()
    yield from llama_process(args)
    for rank in RANKS if args.adapters else ():
        yield from llama_adapter(args, rank)


def llama_command(args, n_words, n_tokens):
    prompt = " ".join(["time"] * n_words)
    return [f"{args.build}/bin/llama-completion", "-m", args.gguf, "-t", str(args.threads), "-c", "2048", "-n", str(n_tokens), "-p", prompt,
            "-no-cnv", "--temp", "0", "--ignore-eos"]


def llama_process(args):
    """A fresh process that answers a prompt of about 128 tokens with one token: wall time and peak memory."""
    start = time.monotonic()
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = llama_command(args, 128, 1) + ["--no-warmup"]
    child = subprocess.Popen(command, **quiet)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise ValueError(f"{command[0]} ended with status {status}")
    yield "start_to_first_token_p128", (time.monotonic() - start) * 1e3
    yield "rss_after_first", usage.ru_maxrss * 1024 / 1e6


def llama_adapter(args, rank):
    """llama-bench knows no adapters: the rates that llama-completion prints."""
    lora = ["--lora", f"{args.build}/adapters/r{rank}.gguf"]
    for prompt in args.prompts.split(","):
        yield f"pp{prompt}_lora1_r{rank}", rate(llama_command(args, int(prompt), 1) + lora, "prompt eval time")
    yield f"tg{args.tokens}_d0_lora1_r{rank}", rate(llama_command(args, 1, args.tokens + 1) + lora, "  eval time")


def rate(command, what):
    run = subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    line = next((line for line in run.stderr.splitlines() if what in line and "tokens per second" in line), None)
    if line is None:
        raise ValueError(f"{command[0]} printed no {what.strip()}")
    return float(re.search(r"([\d.]+) tokens per second", line)[1])


def openvino(args):
    command = [f"{args.build}/openvino/bin/python", f"{HERE}/openvino_bench.py", f"{args.build}/model.Q4_0.gguf", str(args.threads), args.prompts, args.depths, str(args.tokens)]
    yield from json_lines(command)


def measure_limits(args):
    """What the machine can do at most, on the same cores, with a buffer of the model's size."""
    if not args.limits:
        return {}
    try:
        mib = max(1, model_bytes(args) >> 20)
        return dict(json_lines([*args.limits.split(), "--mib", str(mib), "--threads", str(args.threads)]))
    except (subprocess.SubprocessError, OSError, ValueError) as why:
        print(f"the limits were not measured: {why}", file=sys.stderr)
        return {}


def model_bytes(args):
    with open(args.config) as file:
        names = json.load(file)["dialog"]["engine"]["model"]["binary"]["ctx-bins"]
    return sum(os.path.getsize(os.path.join(os.path.dirname(args.config), name)) for name in names)


def json_lines(command, environment=None):
    for line in output(command, environment).splitlines():
        if line.startswith("{"):
            figure = json.loads(line)
            yield figure["metric"], figure["median"]


def output(command, environment=None):
    run = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, timeout=TIMEOUT_S)
    if run.returncode != 0:
        last = (run.stderr.strip() or "nothing on standard error").splitlines()[-1]
        raise ValueError(f"{os.path.basename(command[0])} ended with {run.returncode}: {last}")
    return run.stdout


def idle_load():
    """What others use of our cores while we do nothing, in cores."""
    def busy():
        with open("/proc/stat") as stat:
            fields = [line.split() for line in stat if re.match(r"cpu\d", line)]
        wanted = [f for f in fields if int(f[0][3:]) in os.sched_getaffinity(0)]
        return sum(int(n) for f in wanted for n in f[1:4] + f[6:9])
    before, started = busy(), time.monotonic()
    time.sleep(0.5)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


def report(args, figures, limits, busy, failed):
    lines = [{"machine": machine(), "threads": args.threads, "rounds": args.rounds, "others_used_cores": round(busy, 3), "limits": limits, "failed": failed}]
    ours = figures.get("genie", {})
    metrics = list(dict.fromkeys(metric for own in figures.values() for metric in own))
    names = list(figures)
    print(f"{'metric':<28}" + "".join(f"{name:>14}" for name in names) + f"{'to best peer':>14}", file=sys.stderr)
    for metric in metrics:
        line, medians = {"metric": metric}, {}
        for name in names:
            if values := figures[name].get(metric):
                medians[name] = statistics.median(values)
                line[name] = {"median": medians[name], "min": min(values), "max": max(values)}
        peers = [value for name, value in medians.items() if not name.startswith("genie")]
        if peers and metric in ours:
            best = min(peers) if metric.startswith(LOWER_IS_BETTER) else max(peers)
            line["ratio_to_best_peer"] = medians["genie"] / best
        if re.fullmatch(r"tg\d+_d0", metric) and metric in ours and "read_bytes_per_s" in limits:
            # A step at depth 0 reads the whole context binary once; embedding and head are one tensor.
            line["share_of_read_limit"] = medians["genie"] * model_bytes(args) / limits["read_bytes_per_s"]
        lines.append(line)
        cells = "".join(f"{medians[name]:>14.2f}" if name in medians else f"{'-':>14}" for name in names)
        ratio = f"{line['ratio_to_best_peer']:>14.2f}" if "ratio_to_best_peer" in line else f"{'-':>14}"
        share = f"   {line['share_of_read_limit']:.0%} of the read limit" if "share_of_read_limit" in line else ""
        print(f"{metric:<28}{cells}{ratio}{share}", file=sys.stderr)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    print(text, end="")
    if args.output:
        with open(args.output, "w") as file:
            file.write(text)


def machine():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")


RANKS = (8, 16, 32, 64)
# Cores that others may use before figures are doubted.
BUSY = 0.1
TIMEOUT_S = 900

if __name__ == "__main__":
    main()
