#!/usr/bin/env bash
# Perplexity of llama.cpp's 4-bit formats, made from a float model, by the golden method of tests/golden.
#
#   bash benches/peers/perplexity.sh HF_DIR [OUT]      # OUT takes the GGUF files; default: a temporary folder
#
# HF_DIR is a Hugging Face directory of SmolLM2-135M-Instruct or of a model with the same tokenizer and shapes. llama.cpp is the one
# that benches/peers/run.sh builds (run it first; $GENIE_PEERS names its folder). Prints one JSON line for each format.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
build="${GENIE_PEERS:-$here/build}"
gguf="${GENIE_MODELS:-$root/models}/SmolLM2-135M-Instruct.Q4_1.gguf"
source="$build/source/vendor/llama.cpp"

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 1; }
[ -x "$build/bin/llama-quantize" ] || { echo "no llama.cpp in $build: run benches/peers/run.sh first" >&2; exit 1; }
[ -f "$gguf" ] || { echo "no $gguf: run examples/quickstart.sh first" >&2; exit 1; }
out="${2:-$(mktemp -d)}"
mkdir -p "$out"
[ -x "$out/python/bin/python" ] || {
    python3 -m venv "$out/python"
    "$out/python/bin/pip" --quiet --disable-pip-version-check install numpy safetensors gguf
}
c++ -O2 -std=c++17 -I"$source/include" -I"$source/ggml/include" "$here/llama_windows.cpp" -L"$build/bin" -lllama -lggml \
    -lggml-base -Wl,-rpath,"$build/bin" -o "$out/llama-windows"
python3 -c 'import json, sys; print(*json.load(open(sys.argv[1]))["ids"], sep="\n")' "$root/tests/golden/ppl.json" >"$out/ids.txt"
"$out/python/bin/python" "$here/float_gguf.py" "$gguf" "$1" "$out/F16.gguf"
for format in F16 Q4_0 Q4_K_M; do
    if [ "$format" != F16 ]; then
        "$build/bin/llama-quantize" "$out/F16.gguf" "$out/$format.gguf" "$format" >"$out/$format.log" 2>&1
        # Rows whose length is no multiple of 256 take another, larger format.
        grep -i "fallback quantization" "$out/$format.log" >&2 || true
    fi
    echo "$format $("$out/llama-windows" "$out/$format.gguf" "$(nproc)" 512 <"$out/ids.txt")"
done
