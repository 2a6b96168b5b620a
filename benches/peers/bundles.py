"""What genie reads for the comparison: bundles (context binary, config, tokenizer) of the GGUF that the peers read."""
import json, os, shutil, subprocess, sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
RANKS = (8, 16, 32, 64)
# Longest context that is measured, and room to generate behind it.
DEPTH = 2048
CONTEXT = DEPTH + 256


class Bundles:
    """Bundles of one GGUF, made when first asked for, in a folder of its own; made again when a tool has changed."""

    def __init__(self, gguf, build, tools):
        self.gguf, self.tools, self.folder = gguf, tools, folder_of(gguf, build)
        # Made by run.sh; a peer's tool makes it, so that it may be missing.
        self.q4_0_gguf = os.path.join(self.folder, "Q4_0.gguf")

    def plain(self):
        """16-bit activations, no adapters."""
        return self.bundle("a16", [])

    def a8(self):
        """8-bit activations, a scale for each row."""
        return self.bundle("a8", ["--act_bitwidth", "8"])

    def q4_0(self):
        """The file that the peers are fastest with, as it is."""
        return self.bundle("q4_0", [], gguf=self.q4_0_gguf)

    def lpbq(self):
        """4-bit weights in blocks of 32 with whole steps, rounded and calibrated over the text of ARCHITECTURE.md."""
        return self.bundle("lpbq", ["--weights_bitwidth", "32"], quantize=["--weights_bitwidth", "4", "--use_block_steps", "--block_size", "32"])

    def adapters(self):
        """Branches on every projection, and an adapter for each of RANKS."""
        return self.bundle("lora", [flag for rank in RANKS for flag in ("--lora_adapter", self.adapter(rank))], lora=True)

    def adapter(self, rank):
        """The PEFT directory of a rank; beside it is the same as a GGUF, with the suffix .gguf."""
        return os.path.join(self.folder, "adapters", f"r{rank}")

    def bundle(self, name, flags, lora=False, quantize=(), gguf=None):
        """The config of a bundle, converted with `flags` and, if there are any, quantized with others."""
        gguf = gguf or self.gguf
        folder = os.path.join(self.folder, name)
        config, context = os.path.join(folder, "genie_config.json"), os.path.join(folder, "model.bin")
        tools = ["qairt-converter", *(["qairt-quantizer"] if quantize else []), "qnn-context-binary-generator"]
        if lora:
            tools.append("qairt-lora-importer")
        sources = [gguf, *(self.tool(tool) for tool in tools)]
        sources += [os.path.join(self.adapter(rank), "adapter_model.safetensors") for rank in RANKS] if lora else []
        if is_newer(config, sources):
            return config
        os.makedirs(folder, exist_ok=True)
        dlc = os.path.join(folder, "model.dlc")
        self.run("qairt-converter", "-i", gguf, "-o", dlc, *flags)
        if quantize:
            text = os.path.join(ROOT, "ARCHITECTURE.md")
            self.run("qairt-quantizer", "-i", dlc, "-o", dlc + ".quantized", "--calibration_text", text, *quantize)
            os.replace(dlc + ".quantized", dlc)
        generate = ["--dlc_path", dlc, "--output_dir", folder, "--binary_file", "model", "--ar", "128,1", "--cl", str(2 * DEPTH)]
        if lora:
            generate += ["--adapter_weight_config", self.import_adapters(dlc, folder)]
        self.run("qnn-context-binary-generator", *generate)
        os.remove(dlc)
        write_config(config, self.n_vocab(context), lora)
        return config

    def import_adapters(self, dlc, folder):
        use_cases = os.path.join(self.folder, "adapters", "use_cases.yaml")
        with open(use_cases, "w") as file:
            file.write("use_case:\n" + "".join(f"  - {{name: r{rank}, lora_weights: r{rank}}}\n" for rank in RANKS))
        output = os.path.join(folder, "imported")
        self.run("qairt-lora-importer", "--lora_config", use_cases, "--input_dlc", dlc, "--output_dir", output)
        return os.path.join(output, "lora_output_files.yaml")

    def n_vocab(self, context):
        contents = json.loads(self.run("qnn-context-binary-utility", "--context_binary", context))
        outputs = (tensor for graph in contents["graphs"] for tensor in graph["outputs"])
        return next(tensor["dims"][-1] for tensor in outputs if tensor["name"] == "logits")

    def tool(self, name):
        return os.path.join(self.tools, name)

    def run(self, tool, *flags):
        made = subprocess.run([self.tool(tool), *flags], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if made.returncode != 0:
            raise ValueError(f"{tool} ended with {made.returncode}: {made.stderr.strip()}")
        return made.stdout


def folder_of(gguf, build):
    """The folder of all that is made of a GGUF, for genie and for its peers; emptied when another file has that name."""
    folder = os.path.join(build, "models", os.path.splitext(os.path.basename(gguf))[0])
    state = os.stat(gguf)
    made_of, stamp = f"{os.path.realpath(gguf)} {state.st_size} {state.st_mtime_ns}", os.path.join(folder, "made_of")
    if os.path.realpath(gguf).startswith(os.path.realpath(folder) + os.sep):
        raise SystemExit(f"{gguf} lies in {folder}, which is for what is made of it; move it elsewhere")
    if os.path.exists(folder) and not (os.path.exists(stamp) and open(stamp).read() == made_of):
        shutil.rmtree(folder)
    os.makedirs(folder, exist_ok=True)
    with open(stamp, "w") as file:
        file.write(made_of)
    return folder


def write_config(path, n_vocab, lora):
    """The sample config, for this model and the longest context that is measured."""
    with open(os.path.join(ROOT, "configs", "smollm2-135m-instruct.json")) as file:
        config = json.load(file)
    dialog = config["dialog"]
    dialog["context"].update({"size": CONTEXT, "n-vocab": n_vocab})
    binary = dialog["engine"]["model"]["binary"]
    binary["ctx-bins"] = ["model.bin"]
    if lora:
        adapters = [{"version": 1, "name": f"r{rank}", "bin-sections": [f"model_r{rank}.bin"]} for rank in RANKS]
        binary["lora"] = {"version": 1, "adapters": adapters}
    with open(path + ".part", "w") as file:
        json.dump(config, file, indent=2)
    os.replace(path + ".part", path)


def is_newer(path, sources):
    return os.path.exists(path) and all(os.path.getmtime(source) <= os.path.getmtime(path) for source in sources)


if __name__ == "__main__":
    # For run.sh: bundles.py GGUF BUILD
    print(folder_of(*sys.argv[1:]))
