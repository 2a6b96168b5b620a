#!/usr/bin/env bash
# Perplexity of 4-bit forms of one float model, in one run: llama.cpp's Q4_0 and Q4_K_M, and genie's with static encodings.
#
#   bash benches/peers/perplexity.sh HF_DIR [TEXT [CALIBRATION_TEXT...]]
#
# HF_DIR is a Hugging Face directory of SmolLM2-135M-Instruct or of a model with the same tokenizer and shapes; off_grid.py makes
# one whose weights lie on no 4-bit grid. TEXT is scored by the golden method of tests/golden, at most 8 windows of 512 ids
# (default: README.md); genie calibrates on the other texts (default: ARCHITECTURE.md and qnn-core/FORMAT.md). llama.cpp is the one
# that benches/peers/run.sh builds (run it first; $GENIE_PEERS names its folder). Prints one JSON line for each form, with its ratio
# to its own float. $OUT takes the models; default: a temporary folder.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
build="${GENIE_PEERS:-$here/build}"
gguf="${GENIE_MODELS:-$root/models}/SmolLM2-135M-Instruct.Q4_1.gguf"
llama="$build/source/vendor/llama.cpp"
tools="${CARGO_TARGET_DIR:-$root/target}/release"

[ $# -ge 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 1; }
[ -x "$build/bin/llama-quantize" ] || { echo "no llama.cpp in $build: run benches/peers/run.sh first" >&2; exit 1; }
[ -f "$gguf" ] || { echo "no $gguf: run examples/quickstart.sh first" >&2; exit 1; }
model="$1" text="${2:-$root/README.md}"
shift "$(($# < 2 ? $# : 2))"
[ $# -gt 0 ] || set -- "$root/ARCHITECTURE.md" "$root/qnn-core/FORMAT.md"
calibration=("${@/#/--calibration_text=}")
out="${OUT:-$(mktemp -d)}"
mkdir -p "$out"
trap '[ $? = 0 ] || echo "perplexity.sh: failed; what the tools said is in $out" >&2' EXIT

main() {
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p genie -p qnn-core --bins
    llama_forms
    mkdir -p "$out/float"
    "$tools/qairt-converter" -i "$model" -o "$out/float/model.dlc" --weights_bitwidth 32 >"$out/float/converter.log" 2>&1
    ours "genie float" float
    static "genie w4a16" w4a16
    static "genie w4a16, a tenth at 8 bits" tenth --wide_share 0.1
    static "genie w4a16, a fifth at 8 bits" fifth --wide_share 0.2
    for block in 16 32 64; do
        static "genie w4a16 LPBQ $block" "lpbq$block" --use_block_steps --block_size "$block"
    done
}

llama_forms() {
    # Written last, so that an interrupted installation is not taken for a whole one.
    [ -f "$out/python/complete" ] || {
        python3 -m venv "$out/python"
        "$out/python/bin/pip" --quiet --disable-pip-version-check install numpy safetensors gguf
        touch "$out/python/complete"
    }
    c++ -O2 -std=c++17 -I"$llama/include" -I"$llama/ggml/include" "$here/llama_windows.cpp" -L"$build/bin" -lllama -lggml \
        -lggml-base -Wl,-rpath,"$build/bin" -o "$out/llama-windows"
    "$out/python/bin/python" "$here/float_gguf.py" "$gguf" "$model" "$out/F16.gguf"
    local format result
    for format in F16 Q4_0 Q4_K_M; do
        if [ "$format" != F16 ]; then
            "$build/bin/llama-quantize" "$out/F16.gguf" "$out/$format.gguf" "$format" >"$out/$format.log" 2>&1
            # Rows whose length is no multiple of 256 take another, larger format.
            grep -i "fallback quantization" "$out/$format.log" >&2 || true
        fi
        result=$("$out/llama-windows" "$out/$format.gguf" "$(nproc)" 512 8 <"$text")
        line "llama.cpp $format" "$(stat -c %s "$out/$format.gguf")" "$result"
    done
}

# NAME FOLDER FLAGS...: the float model quantized with the flags.
static() {
    local name="$1" folder="$out/$2"
    shift 2
    mkdir -p "$folder"
    cp "$out"/float/*.json "$folder"
    "$tools/qairt-quantizer" -i "$out/float/model.dlc" -o "$folder/model.dlc" --weights_bitwidth 4 "$@" "${calibration[@]}" \
        >"$folder/quantizer.log" 2>&1
    ours "$name" "$(basename "$folder")"
}

# NAME FOLDER: the DLC of the folder as a context binary.
ours() {
    local folder="$out/$2"
    "$tools/qnn-context-binary-generator" --dlc_path "$folder/model.dlc" --output_dir "$folder" --binary_file model --ar 64 \
        --cl 512 >"$folder/generator.log" 2>&1
    sed -e 's/"ctx-bins": .*/"ctx-bins": ["model.bin"]/' -e 's/"size": 2048/"size": 512/' \
        "$root/configs/smollm2-135m-instruct.json" >"$folder/genie_config.json"
    local result
    result=$("$tools/genie-accuracy" -c "$folder/genie_config.json" --text "$text" 2>"$folder/accuracy.log")
    line "$1" "$(stat -c %s "$folder/model.bin")" "$result"
}

# NAME BYTES JSON: one line; the ratio is to the first line of the same program.
line() {
    python3 - "$1" "$2" "$3" "$out/reference" <<'X'
import json, sys
name, size, result, reference = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
program = name.split()[0]
try:
    floats = json.load(open(reference))
except FileNotFoundError:
    floats = {}
perplexity = result["value"]
floats.setdefault(program, perplexity)
json.dump(floats, open(reference, "w"))
print(json.dumps({"form": name, "file_bytes": size, "perplexity": perplexity, "ratio": perplexity / floats[program],
                  "scored_ids": result["scored_ids"]}))
X
}

rm -f "$out/reference"
main
