#!/usr/bin/env python3
"""How much quantization costs: makes a model in several widths and by several methods, compares each with its floats, and
writes one page of HTML about all of them.

    python3 benches/quality/run.py                     # SmolLM2-135M-Instruct and the three adapters of examples/

Needs the model's Hugging Face directory (tests/golden/make_hf_dir.sh makes SmolLM2's), cargo and Python; no packages. Every
figure of the page comes from this run: genie-accuracy writes one JSON file a variant, and genie-accuracy --report makes the
page of them. What is there already is not made again; --fresh starts anew. A folder holds results of one set of options,
which are in its options.json: with others, or when a text has changed, it is refused.

The defaults calibrate on two documents of this repository and score a third, so that a run needs nothing else. For figures
to quote, bring a longer calibration text and a text that was not calibrated on.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Variants of the base: a name, and what qairt-quantizer is given beside the text.
BASE = [
    ("w8a16", "--weights_bitwidth 8 --act_bitwidth 16"),
    ("w8a16 per channel", "--weights_bitwidth 8 --act_bitwidth 16 --use_per_channel_quantization"),
    ("w8a8", "--weights_bitwidth 8 --act_bitwidth 8"),
    ("w4a16", "--weights_bitwidth 4 --act_bitwidth 16"),
    ("w4a16 nearest", "--weights_bitwidth 4 --act_bitwidth 16 --weight_rounding nearest"),
    ("w4a16 mse", "--weights_bitwidth 4 --act_bitwidth 16 --weight_rounding mse"),
    ("w4a16 lpbq", "--weights_bitwidth 4 --act_bitwidth 16 --use_block_steps"),
]
# Variants that are run with the adapters, once with the base's encodings and once with their own.
ADAPTED = [
    ("w8a16", "--weights_bitwidth 8 --act_bitwidth 16"),
    ("w8a8", "--weights_bitwidth 8 --act_bitwidth 8"),
    # A base with two inputs less of 16 bits: what an adapter's own encodings can regain without the base's being changed.
    ("w8a8 22 dB", "--weights_bitwidth 8 --act_bitwidth 8 --act_min_sqnr 22"),
    # A base that is not prepared for 8 bits: what an adapter's own encodings can regain.
    ("w8a8 plain", "--weights_bitwidth 8 --act_bitwidth 8 --smooth_inputs false --equalize_channels false --act_min_sqnr 0"),
]


def main():
    options = arguments()
    started = time.monotonic()
    run = Run(options)
    run.say(f"tools in {run.bin}, results in {run.out}")
    run.reference()
    run.source()
    results = []
    for name, flags in chosen(BASE, options):
        results.append(run.base(name, flags))
    if options.adapter:
        for name, flags in chosen(ADAPTED, options):
            results.append(run.adapted(name, flags, tailored=False))
            results.append(run.adapted(name, flags, tailored=True))
    page = run.out / "report.html"
    run.tool("genie-accuracy", "--results", *results, "--report", page)
    print(page)
    run.say(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def arguments():
    default_out = Path(os.environ.get("GENIE_MODELS", ROOT / "models"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=default_out / "smollm2-135m-instruct", help="Hugging Face directory")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/smollm2-135m-instruct.json",
                        help="dialog config of the model; paths and context size are replaced")
    parser.add_argument("--adapter", type=Path, action="append", help="PEFT directory; repeatable. Default: those of "
                        "examples/adapters, if the model is the default one")
    parser.add_argument("--calibration_text", type=Path, action="append", help="repeatable")
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="text to score")
    parser.add_argument("--window", type=int, default=512, help="ids of a window")
    parser.add_argument("--windows", type=int, default=4, help="most windows to score")
    parser.add_argument("--only", help="regular expression: only the variants whose names it matches as a whole")
    parser.add_argument("--output", type=Path, default=default_out / "quality", help="folder of all that is made")
    parser.add_argument("--bin", type=Path, help="folder of the tools. Default: they are built")
    parser.add_argument("--fresh", action="store_true", help="make everything again")
    options = parser.parse_args()
    if options.adapter is None:
        default_model = options.model.resolve() == parser.get_default("model").resolve()
        options.adapter = adapters_of_examples() if default_model else []
    if not options.calibration_text:
        options.calibration_text = [ROOT / "ARCHITECTURE.md", ROOT / "qnn-core/FORMAT.md"]
    if not options.model.is_dir():
        parser.error(f"--model {options.model}: no such folder; tests/golden/make_hf_dir.sh makes that of SmolLM2")
    for path in files(options):
        if not path.is_file():
            parser.error(f"no file {path}")
    return options


def files(options):
    return [options.config, options.text, *options.calibration_text]


def adapters_of_examples():
    # Not glob("*/"), which gives files too before Python 3.11.
    return sorted(path for path in (ROOT / "examples/adapters").iterdir() if path.is_dir())


def chosen(variants, options):
    """The variants that --only asks for."""
    return [variant for variant in variants if options.only is None or re.fullmatch(options.only, variant[0])]


def options_text(options):
    """What results depend on, as JSON: the options, and what the files that they name say."""
    names = ("model", "config", "adapter", "calibration_text", "text", "window", "windows")
    chosen = {name: getattr(options, name) for name in names}
    chosen["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files(options)}
    return json.dumps(chosen, indent=1, default=lambda path: str(path.resolve())) + "\n"


class Run:
    """One run: folders, tools, and the commands that made each variant."""

    def __init__(self, options):
        self.options = options
        self.out = options.output.resolve()
        self.claim(options)
        self.bin = (options.bin or self.build()).resolve()
        self.log = []
        self.made_source = []

    def claim(self, options):
        """Makes the folder of results, or checks that the one that is there is ours and was made with the same options."""
        made, asked = self.out / "options.json", options_text(options)
        # Nothing of anybody else's is mixed with results, nor removed by --fresh.
        if self.out.exists() and not made.is_file() and any(self.out.iterdir()):
            sys.exit(f"{self.out} is not empty and has no options.json of an earlier run; name another --output, or remove it")
        if options.fresh and self.out.exists():
            shutil.rmtree(self.out)
        if made.is_file() and (found := made.read_text()) != asked:
            sys.exit(f"{self.out} was made with\n{found}asked for is\n{asked}use --fresh or another --output")
        self.out.mkdir(parents=True, exist_ok=True)
        made.write_text(asked)

    def build(self):
        self.say("building the tools")
        manifest = ROOT / "Cargo.toml"
        subprocess.run(["cargo", "build", "--release", "--locked", "--quiet", "--manifest-path", manifest,
                        "-p", "genie", "-p", "qnn-core", "--bins"], check=True)
        return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"

    def reference(self):
        """The model in floats, its adapters too."""
        folder = self.out / "float"
        self.say("float reference")
        if not (folder / "genie_config.json").is_file():
            self.convert(folder, "--lora_weights_bitwidth", "32")
            self.generate(folder, folder / "model.dlc", self.imported(folder, folder / "model.dlc"))
            (folder / "model.dlc").unlink()

    def source(self):
        """The float model that is quantized: its adapters get 8 bits, and may bring encodings for all tensors."""
        folder = self.out / "source"
        self.log = []
        # A rerun has to tell the same commands, so they are told whether or not the file is there.
        if not all((folder / name).is_file() for name in ("model.dlc", "commands.txt")):
            self.say("float model to quantize")
            self.convert(folder, "--lora_weights_bitwidth", "8", "--quant_updatable_mode", "all")
            (folder / "commands.txt").write_text("\n".join(self.log) + "\n")
        self.made_source = (folder / "commands.txt").read_text().splitlines()

    def base(self, name, flags):
        folder = self.folder(name)
        if not (folder / "result.json").is_file():
            self.log = list(self.made_source)
            self.quantize(name, folder, flags)
            self.generate(folder, folder / "model.dlc", None)
            self.compare(name, folder, [])
            (folder / "model.dlc").unlink()
        return folder / "result.json"

    def adapted(self, name, flags, tailored):
        label = f"{name}, {'own' if tailored else 'shared'} encodings"
        folder = self.folder(label)
        if not (folder / "result.json").is_file():
            self.log = list(self.made_source)
            if tailored:
                adapters = self.imported(folder / "imported", self.out / "source/model.dlc")
                self.quantize(label, folder, flags, "--lora_output_files", adapters, "--lora_output_dir", folder / "lora")
                # Where channels were scaled, so were the adapters, in files of their own.
                scaled = folder / "lora/lora_output_files.yaml"
                adapters = scaled if scaled.is_file() else adapters
            else:
                self.quantize(label, folder, flags)
                adapters = self.imported(folder, folder / "model.dlc")
            self.generate(folder, folder / "model.dlc", adapters)
            self.compare(label, folder, ["--all_adapters"])
            (folder / "model.dlc").unlink()
        return folder / "result.json"

    def convert(self, folder, *flags):
        adapters = [word for adapter in self.options.adapter for word in ("--lora_adapter", adapter)]
        self.tool("qairt-converter", "-i", self.options.model, "-o", folder / "model.dlc", "--weights_bitwidth", "32",
                  *adapters, *(flags if adapters else []))

    def imported(self, folder, dlc):
        """The adapters for `dlc`: the importer's list of its files, or None if there are no adapters."""
        if not self.options.adapter:
            return None
        cases = [{"name": adapter.name, "lora_weights": str(adapter.resolve())} for adapter in self.options.adapter]
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "use_cases.yaml"
        config.write_text(json.dumps({"use_case": cases}))  # JSON is YAML
        self.tool("qairt-lora-importer", "--lora_config", config, "--input_dlc", dlc, "--output_dir", folder / "lora")
        return folder / "lora/lora_output_files.yaml"

    def quantize(self, name, folder, flags, *more):
        self.say(f"{name}: quantizing")
        texts = [word for text in self.options.calibration_text for word in ("--calibration_text", text)]
        self.tool("qairt-quantizer", "-i", self.out / "source/model.dlc", "-o", folder / "model.dlc", *texts,
                  *shlex.split(flags), *more)

    def generate(self, folder, dlc, adapters):
        # Scoring runs 64 rows at a time and never decodes: one graph is enough.
        flags = ["--adapter_weight_config", adapters] if adapters else []
        self.tool("qnn-context-binary-generator", "--dlc_path", dlc, "--output_dir", folder, "--binary_file", "model",
                  "--ar", "64", "--cl", self.options.window, *flags)
        config = json.loads(self.options.config.read_text())
        dialog = config["dialog"]
        dialog["context"]["size"] = self.options.window
        binary = dialog["engine"]["model"]["binary"]
        binary["ctx-bins"] = ["model.bin"]
        binary.pop("lora", None)
        if adapters:
            names = [adapter.name for adapter in self.options.adapter]
            binary["lora"] = {"version": 1, "adapters": [
                {"version": 1, "name": name, "bin-sections": [f"model_{name}.bin"]} for name in names]}
        (folder / "genie_config.json").write_text(json.dumps(config, indent=1) + "\n")

    def compare(self, name, folder, flags):
        self.say(f"{name}: comparing with the floats")
        commands = folder / "commands.txt"
        commands.write_text("\n".join(self.log) + "\n")
        output = self.tool("genie-accuracy", "-c", folder / "genie_config.json",
                           "--reference", self.out / "float/genie_config.json", "--text", self.options.text,
                           "--window", self.options.window, "--windows", self.options.windows, "--label", name,
                           "--commands", commands, "--output", folder / "result.json", *flags)
        # The table by layer is in the page; here only the lines about the perplexities.
        print(output.split("\n\n")[1], flush=True)

    def folder(self, name):
        return self.out / re.sub(r"[^a-z0-9]+", "-", name)

    def tool(self, program, *words):
        """Runs a tool and gives what it printed; its command line is kept."""
        words = [str(word) for word in words]
        self.log.append(shlex.join([program, *words]))
        done = subprocess.run([self.bin / program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join([program, *words])}\n{done.stdout}{done.stderr}")
        return done.stdout

    def say(self, text):
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
