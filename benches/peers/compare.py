#!/usr/bin/env python3
"""Runs genie and its peers in turn on the same cores, several rounds, and writes medians, ranges, ratios and shares of the machine's limits.
Started by run.sh, which builds everything."""
import argparse, os, re, subprocess, sys, time

import report
from bundles import DEPTH, ROOT, Bundles
from contenders import Genie, LlamaCpp, Script, json_lines, up_to_512


def main():
    args = arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    bundles = Bundles(args.model, args.build, args.ours)
    contenders = choose(args, bundles)
    figures, failed, busy = report.Figures(), {}, [others_load()]
    limits = measure_limits(args, bundles)
    for turn in range(args.rounds):
        names = [name for name in contenders if name not in failed]
        for name in names if turn % 2 == 0 else reversed(names):
            started = time.monotonic()
            try:
                for metric, variant, value in contenders[name].round(worth(figures, name)):
                    figures.add(name, metric, variant, value)
            except (subprocess.SubprocessError, OSError, ValueError) as why:
                failed[name] = str(why)
                print(f"{name} failed and is left out from here on: {why}", file=sys.stderr)
            print(f"round {turn + 1} of {args.rounds}: {name}, {time.monotonic() - started:.0f} s", file=sys.stderr)
            busy.append(others_load())
    for metric, value in measure_limits(args, bundles).items():
        limits[metric] = max(value, limits.get(metric, 0.0))
    if max(busy) > BUSY:
        print(f"warning: other processes used up to {max(busy):.0%} of a core between runs; figures are too low and uneven", file=sys.stderr)
    header = {
        "date": time.strftime("%Y-%m-%d"), "machine": machine(), "model": os.path.basename(args.model), "threads": args.threads,
        "peers": peers(args.build), "rounds": args.rounds, "others_used_cores": round(max(busy), 3), "limits": limits, "failed": failed,
    }
    costs = {name: contender.costs for name, contender in contenders.items() if isinstance(contender, Genie)}
    lines = [header, *report.lines(figures, costs, limits)]
    report.write(lines, args.output)
    print(report.table(lines), file=sys.stderr)


def arguments():
    # No shortened names: run.sh looks for some of the options, and knows their whole names.
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name in ("model", "ours", "build"):
        parser.add_argument(f"--{name}", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", default="128,512,2048")
    parser.add_argument("--depths", default="0,512,2048")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of one decode measurement")
    parser.add_argument("--quick", action="store_true", help="one round, without the prompt and the depth of 2048")
    parser.add_argument("--adapters", action="store_true", help="with adapters of rank 8, 16, 32 and 64 too, in genie and in llama.cpp")
    parser.add_argument("--isa", default="", help="genie once more with these kernel tiers, with commas between, for example avx512_vnni,avx2")
    parser.add_argument("--avx2", action="store_true", help="genie with its avx2 tier beside a llama.cpp that is built for AVX2 only")
    parser.add_argument("--a8", action="store_true", help="genie once more with 8-bit activations")
    parser.add_argument("--lpbq", action="store_true", help="genie once more with 4-bit weights in LPBQ blocks, whose sums need no float until the end")
    parser.add_argument("--q4_0", action="store_true", help="genie once more with the Q4_0 file that the peers read")
    parser.add_argument("--one_thread", action="store_true", help="genie once more with one thread; for the peers too: --threads 1")
    parser.add_argument("--only", help="names of the contenders to run, with commas between")
    parser.add_argument("--output", help="write the JSON lines to this file, not to standard output")
    args = parser.parse_args()
    if args.quick:
        args.rounds, (args.prompts, args.depths) = 1, up_to_512(args)
    longest = max(int(word) for word in f"{args.prompts},{args.depths}".split(",") if word)
    if DEPTH < longest or 256 < args.tokens:
        parser.error(f"a prompt or depth of {longest} and {args.tokens} tokens; need at most {DEPTH} and 256")
    return args


def choose(args, bundles):
    """The contenders that were asked for and are installed, by name."""
    ggufs = {"as it is": args.model}
    if os.path.exists(bundles.q4_0_gguf):
        ggufs["Q4_0"] = bundles.q4_0_gguf
    elif args.q4_0:
        raise SystemExit("--q4_0 needs llama.cpp, whose tool makes that file")
    lora = bundles.adapters() if args.adapters else None
    all_of_them = {"genie": lambda: Genie(args, bundles.plain(), lora=lora)}
    if args.one_thread:
        all_of_them["genie 1 thread"] = lambda: Genie(args, bundles.plain(), threads=1)
    if args.a8:
        all_of_them["genie a8"] = lambda: Genie(args, bundles.a8(), planes=1)
    if args.q4_0:
        all_of_them["genie q4_0"] = lambda: Genie(args, bundles.q4_0())
    if args.lpbq:
        all_of_them["genie lpbq"] = lambda: Genie(args, bundles.lpbq())
    isas = [isa for isa in args.isa.split(",") if isa] + (["avx2"] if args.avx2 and "avx2" not in args.isa.split(",") else [])
    for isa in isas:
        all_of_them[f"genie {isa}"] = lambda isa=isa: Genie(args, bundles.plain(), isa=isa)
    if os.path.exists(f"{args.build}/bin/llama-bench"):
        all_of_them["llama.cpp"] = lambda: LlamaCpp(args, f"{args.build}/bin", ggufs, bundles.adapter if args.adapters else None)
    if args.avx2 and os.path.exists(f"{args.build}/avx2/bin/llama-bench"):
        all_of_them["llama.cpp avx2"] = lambda: LlamaCpp(args, f"{args.build}/avx2/bin", ggufs)
    if "Q4_0" in ggufs and os.path.exists(f"{args.build}/openvino/complete"):
        all_of_them["openvino"] = lambda: Script(args, "openvino", "openvino_bench.py", bundles.q4_0_gguf)
    wanted = args.only.split(",") if args.only else list(all_of_them)
    if unknown := [name for name in wanted if name not in all_of_them]:
        raise SystemExit(f"no contender is called {', '.join(unknown)}; there are {', '.join(all_of_them)}")
    return {name: make() for name, make in all_of_them.items() if name in wanted}


def worth(figures, name):
    """Whether a variant may still be the best of its contender: nothing was measured yet, or it was not far behind. Memory varies
    little and takes long: once."""
    def answer(metric, variant):
        variants = figures.of(name).get(metric)
        if variants is None:
            return True
        if variant is None:
            return False
        best = report.median_of_best(metric, variants)[1]
        return variant not in variants or report.is_near(metric, report.median(variants[variant]), best)
    return answer


def measure_limits(args, bundles):
    """What the machine can do, on the same cores, with a buffer of the model's size: medians, as all figures are. Where its speed
    changes from minute to minute, a share of it may be above 1."""
    try:
        size_bytes = os.path.getsize(os.path.join(os.path.dirname(bundles.plain()), "model.bin"))
        command = ["cargo", "bench", "--locked", "--quiet", "--manifest-path", os.path.join(ROOT, "Cargo.toml"),
                   "-p", "genie-workspace", "--bench", "limits", "--",
                   "--mib", str(max(1, size_bytes >> 20)), "--threads", str(args.threads)]
        return {line["metric"]: line["median"] for line in json_lines(command)}
    except (subprocess.SubprocessError, OSError, ValueError) as why:
        print(f"the limits were not measured: {why}", file=sys.stderr)
        return {}


def peers(build):
    """The packages that run.sh took the peers from."""
    stamps = [os.path.join(build, folder, "complete") for folder in ("bin", "openvino")]
    return [open(stamp).read().strip() for stamp in stamps if os.path.exists(stamp)]


def others_load():
    """What others use of our cores while we do nothing, in cores."""
    def busy():
        with open("/proc/stat") as stat:
            fields = [line.split() for line in stat if re.match(r"cpu\d", line)]
        wanted = [f for f in fields if int(f[0][3:]) in os.sched_getaffinity(0)]
        return sum(int(n) for f in wanted for n in f[1:4] + f[6:9])
    before, started = busy(), time.monotonic()
    time.sleep(0.5)
    return (busy() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


def machine():
    with open("/proc/cpuinfo") as info:
        return next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), "unknown")


# Cores that others may use before figures are doubted.
BUSY = 0.1

if __name__ == "__main__":
    main()
