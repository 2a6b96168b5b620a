#!/usr/bin/env python3
"""Runs genie-bench and llama-bench in turn and prints medians, ranges and ratios. Used by llama_cpp.sh."""
import argparse, json, os, statistics, subprocess, sys, time

PROMPTS, DEPTHS, TOKENS, THREADS = "128,512", "0,512", 48, 2


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ours", "config", "llama", "gguf"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: load {load:.1f} before the start; figures will be too low and uneven", file=sys.stderr)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:THREADS]))
    ours, theirs = {}, {}
    for turn in range(args.rounds):
        contenders = [(run_ours, ours), (run_llama, theirs)]
        for run, figures in contenders if turn % 2 == 0 else reversed(contenders):
            for metric, value in run(args):
                figures.setdefault(metric, []).append(value)
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
    report(ours, theirs)


def run_ours(args):
    command = [args.ours, "-c", args.config, "-p", PROMPTS, "-d", DEPTHS, "-n", str(TOKENS), "-t", str(THREADS), "-r", "1", "--json"]
    for line in output(command).splitlines():
        figure = json.loads(line)
        yield figure["metric"], figure["median"]


def run_llama(args):
    """Each figure with the better of flash attention on and off."""
    best = {}
    common = [args.llama, "-m", args.gguf, "-t", str(THREADS), "-r", "1", "-fa", "0,1", "-o", "jsonl"]
    for extra in (["-p", PROMPTS, "-n", "0"], ["-p", "0", "-n", str(TOKENS), "-d", DEPTHS]):
        for line in output(common + extra).splitlines():
            f = json.loads(line)
            name = f"pp{f['n_prompt']}" if f["n_prompt"] else f"tg{f['n_gen']}_d{f['n_depth']}"
            best[name] = max(best.get(name, 0.0), f["avg_ts"])
    yield from best.items()
    yield from llama_process(args)


def llama_process(args):
    """A fresh process that answers a prompt of about 128 tokens with one token: wall time and peak memory."""
    program = os.path.join(os.path.dirname(args.llama), "llama-completion")
    prompt = " ".join(["time"] * 128)
    command = [program, "-m", args.gguf, "-t", str(THREADS), "-c", "2048", "-n", "1", "-p", prompt, "-no-cnv", "--no-warmup", "--temp", "0"]
    start = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        raise SystemExit(f"{program} ended with status {status}")
    yield "start_to_first_token_p128", (time.monotonic() - start) * 1e3
    yield "rss_after_first", usage.ru_maxrss * 1024 / 1e6


def output(command):
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def report(ours, theirs):
    rows = []
    for metric, values in ours.items():
        mine, other = statistics.median(values), theirs.get(metric)
        line = {"metric": metric, "genie": mine, "genie_range": [min(values), max(values)]}
        if other:
            line |= {"llama.cpp": statistics.median(other), "llama.cpp_range": [min(other), max(other)]}
            line["ratio"] = mine / line["llama.cpp"]
        print(json.dumps(line))
        rows.append((metric, f"{mine:.1f}", f"{line['llama.cpp']:.1f}" if other else "-", f"{line['ratio']:.2f}" if other else "-"))
    print(f"{'metric':<28}{'genie':>10}{'llama.cpp':>12}{'ratio':>8}", file=sys.stderr)
    for metric, mine, other, ratio in rows:
        print(f"{metric:<28}{mine:>10}{other:>12}{ratio:>8}", file=sys.stderr)


if __name__ == "__main__":
    main()
