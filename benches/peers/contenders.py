"""The contenders: each is a generator of figures (metric, variant, value), one round of everything it can do.

A variant is a setting that a user could choose, such as flash attention on or off; the best one counts. `worth(metric,
variant)` says whether it still can be the best: after the first round the others are left out.
"""
import json, os, subprocess, threading, time

from bundles import DEPTH, RANKS

HERE = os.path.dirname(os.path.abspath(__file__))
TIMEOUT_S = 900
# A prompt of one token a word in all models that were looked at, and the lengths that are asked for.
WORD, FIRST_PROMPT, LONG_PROMPT = "time ", 128, DEPTH - 48


class Genie:
    """Ours, with a bundle and an environment. `costs` gets what a token of each rate reads and multiplies; `planes` is the number of
    8-bit products that a weight takes."""

    def __init__(self, args, config, isa=None, threads=None, lora=None, planes=2):
        self.args, self.config, self.lora, self.planes = args, config, lora, planes
        self.threads = threads or args.threads
        self.isa, self.environment = isa, os.environ | ({"HTP_SIM_ISA": isa} if isa else {})
        self.costs = {}

    def round(self, worth):
        args = self.args
        for figure in self.bench(self.config, args.prompts, args.depths):
            yield figure["metric"], "", figure["median"]
        # genie-t2t-run has the threads of the config: all there are.
        if self.threads == args.threads:
            yield from first_tokens(self.first_token, worth)
        for rank in RANKS if self.lora else ():
            for figure in self.bench(self.lora, *up_to_512(args), "-l", f"r{rank}"):
                if figure["metric"].endswith("_lora1") or figure["metric"] in LORA_COSTS:
                    yield f"{figure['metric']}_r{rank}", "", figure["median"]

    def bench(self, config, prompts, depths, *extra):
        command = [f"{self.args.ours}/genie-bench", "-c", config, "-p", prompts, "-d", depths, "-n", str(self.args.tokens)]
        figures = json_lines([*command, "-t", str(self.threads), "-r", "1", "--json", *extra], self.environment)
        # Genie takes its best kernels where it does not have those of that name.
        ran = {figure["kernels"] for figure in figures if "kernels" in figure}
        if self.isa and ran != {self.isa}:
            raise ValueError(f"asked for the kernels {self.isa}, genie ran {', '.join(sorted(ran)) or 'none'}")
        for figure in figures:
            # Its own figures of start and memory are without text: `first_tokens` measures all contenders alike.
            if figure["metric"].startswith(("start_", "rss_after", "peak_")):
                continue
            if "kernels" in figure:
                self.costs[figure["metric"]] = figure | {"planes": self.planes}
            yield figure

    def first_token(self, n_words):
        prompt = (WORD * n_words).strip()
        command = [f"{self.args.ours}/genie-t2t-run", "-c", self.config, "-p", prompt, "--max_tokens", "2"]
        yield "", first_output(command, b"[BEGIN]: ", self.environment)


class LlamaCpp:
    """llama.cpp of one build, with each of `ggufs` (name: path) and each of ATTENTIONS."""

    def __init__(self, args, binaries, ggufs, lora=None):
        self.args, self.binaries, self.ggufs, self.lora = args, binaries, ggufs, lora

    def round(self, worth):
        args = self.args
        for prompt in numbers(args.prompts):
            yield from self.rates(f"pp{prompt}", ["-p", str(prompt), "-n", "0"], worth)
        for depth in numbers(args.depths):
            yield from self.rates(f"tg{args.tokens}_d{depth}", ["-p", "0", "-n", str(args.tokens), "-d", str(depth)], worth)
        yield from first_tokens(self.first_token, worth)
        if self.lora and os.path.exists(f"{self.binaries}/llama-lora"):
            yield from self.adapters(worth)

    def variants(self):
        return [(f"{name}, {words}", path, flags) for name, path in self.ggufs.items() for words, flags in ATTENTIONS.items()]

    def rates(self, metric, flags, worth):
        for variant, path, attention in self.variants():
            if worth(metric, variant):
                command = [f"{self.binaries}/llama-bench", "-m", path, "-t", str(self.args.threads), "-r", "1", "-o", "jsonl", *attention]
                yield metric, variant, json.loads(output(command + flags).splitlines()[-1])["avg_ts"]

    def first_token(self, n_words):
        for variant, path, attention in self.variants():
            command = [f"{self.binaries}/llama-completion", "-m", path, "-t", str(self.args.threads), "-c", str(DEPTH), "-n", "2", "-p",
                       (WORD * n_words).strip(), "-no-cnv", "--no-warmup", "--no-display-prompt", "--temp", "0", "--ignore-eos", *attention]
            yield variant, first_output(command)

    def adapters(self, worth):
        """Through a program over its library: llama-bench knows no adapters."""
        args = self.args
        prompts, depths = up_to_512(args)
        rates = [f"pp{prompt}_lora1" for prompt in numbers(prompts)] + [f"tg{args.tokens}_d{depth}_lora1" for depth in numbers(depths)]
        for rank in RANKS:
            other = RANKS[RANKS.index(rank) - 1]
            for variant, path, attention in self.variants():
                if not any(worth(f"{rate}_r{rank}", variant) for rate in rates):
                    continue
                flash, cache = int("on" in attention), "q8_0" if "q8_0" in attention else "f16"
                command = [f"{self.binaries}/llama-lora", path, str(args.threads), str(flash), cache, prompts, depths, str(args.tokens)]
                for figure in json_lines(command + [self.lora(rank) + ".gguf", self.lora(other) + ".gguf"]):
                    yield f"{figure['metric']}_r{rank}", variant, figure["median"]


class Script:
    """A peer with a Python interface, measured by a script of this folder in its own virtual environment."""

    def __init__(self, args, environment, script, model):
        self.args = args
        self.command = [f"{args.build}/{environment}/bin/python", os.path.join(HERE, script), model, str(args.threads)]

    def round(self, worth):
        args = self.args
        for figure in json_lines([*self.command, "rates", args.prompts, args.depths, str(args.tokens)]):
            yield figure["metric"], "", figure["median"]
        yield from first_tokens(self.first_token, worth)

    def first_token(self, n_words):
        yield "", first_output([*self.command, "first", (WORD * n_words).strip()])


def first_tokens(first_token, worth):
    """Time and memory of fresh processes: with a short prompt, and once with one that fills the context."""
    for variant, (ms, memory_mb) in first_token(FIRST_PROMPT):
        yield f"start_to_first_token_p{FIRST_PROMPT}", variant, ms
        yield f"peak_rss_p{FIRST_PROMPT}", variant, memory_mb
    if worth(f"peak_rss_p{LONG_PROMPT}", None):
        for variant, (_, memory_mb) in first_token(LONG_PROMPT):
            yield f"peak_rss_p{LONG_PROMPT}", variant, memory_mb


def first_output(command, behind=b"", environment=None):
    """Milliseconds from the start of a process to the first byte of its answer, which follows `behind` on its standard output, and
    the most memory (MB) that it had."""
    start = time.monotonic()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    watchdog = threading.Timer(TIMEOUT_S, child.kill)
    watchdog.start()
    seen, at = b"", None
    with child.stdout:
        while piece := os.read(child.stdout.fileno(), 1 << 16):
            seen += piece
            if at is None and behind in seen and seen.index(behind) + len(behind) < len(seen):
                at = time.monotonic()
    _, status, usage = os.wait4(child.pid, 0)
    watchdog.cancel()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0 or at is None:
        raise ValueError(f"{os.path.basename(command[0])} ended with {child.returncode}{'' if at else ' and no answer'}")
    return (at - start) * 1e3, usage.ru_maxrss * 1024 / 1e6


def up_to_512(args):
    """The prompts and depths that are measured where there is much else to measure; the least ones where all are longer."""
    return tuple(",".join(map(str, [n for n in lengths if n <= 512] or lengths[:1])) for lengths in
                 (sorted(numbers(args.prompts)), sorted(numbers(args.depths))))


def json_lines(command, environment=None):
    return [json.loads(line) for line in output(command, environment).splitlines() if line.startswith("{")]


def output(command, environment=None):
    run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S)
    if run.returncode != 0:
        last = (run.stderr.strip() or "nothing on standard error").splitlines()[-1]
        raise ValueError(f"{os.path.basename(command[0])} ended with {run.returncode}: {last}")
    return run.stdout


def numbers(text):
    return [int(word) for word in text.split(",") if word]


# What a user of llama.cpp could choose: genie's cache has 8 bits, so theirs may, which needs flash attention.
EIGHT_BITS = ["-ctk", "q8_0", "-ctv", "q8_0"]
ATTENTIONS = {"flash attention on": ["-fa", "on"], "flash attention off": ["-fa", "off"],
              "flash attention on, cache q8_0": ["-fa", "on", *EIGHT_BITS]}
# Not the memory of an adapter: genie-bench tells the mean over all that a config has.
LORA_COSTS = ("switch", "alpha_change", "adapter_load")
