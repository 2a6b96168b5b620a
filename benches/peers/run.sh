#!/usr/bin/env bash
# Speed beside llama.cpp and OpenVINO GenAI: same machine, same model, same cores, in turn.
#
#   bash benches/peers/run.sh [OPTIONS OF compare.py]      # --help lists them; the model comes from examples/quickstart.sh
#
# Builds llama.cpp natively from the source distribution of the Python package llama-cpp-python and installs OpenVINO GenAI
# into benches/peers/build (ignored by git; once, some minutes; $GENIE_PEERS names another folder). A peer that cannot be
# installed or run is reported, and the others are measured without it. Then compare.py runs everything in turn, prints one
# JSON line per figure (medians, ranges, ratios) and a table, and says so if the machine was busy.
#
# llama.cpp reads the same Q4_1 file as the quickstart converts; OpenVINO cannot read Q4_1, and gets the file requantized to
# Q4_0. With --adapters random adapters of several ranks on every projection are made, and measured in ours and llama.cpp.
set -euo pipefail

readonly package="llama-cpp-python==0.3.36"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
models="${GENIE_MODELS:-$root/models}"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
config="$models/smollm2-135m-instruct-q4_1/genie_config.json"
build="${GENIE_PEERS:-$here/build}"
target="${CARGO_TARGET_DIR:-$root/target}/release"

main() {
    case " $* " in *" --help "* | *" -h "*) exec python3 "$here/compare.py" --help ;; esac
    [ -f "$gguf" ] && [ -f "$config" ] || { echo "no model in $models: run examples/quickstart.sh first" >&2; exit 1; }
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p genie -p qnn-core --bins
    cargo bench --locked --quiet --manifest-path "$root/Cargo.toml" -p genie-workspace --bench limits --no-run
    mkdir -p "$build"
    [ -x "$build/bin/llama-bench" ] || attempt llama.cpp build_llama_cpp
    [ -x "$build/openvino/bin/python" ] || attempt "OpenVINO GenAI" install_openvino
    if [ -x "$build/bin/llama-quantize" ] && [ ! -f "$build/model.Q4_0.gguf" ]; then
        attempt "the Q4_0 file" "$build/bin/llama-quantize" --allow-requantize "$gguf" "$build/model.Q4_0.gguf" Q4_0
    fi
    case " $* " in *" --adapters "*) [ -f "$build/adapters/genie/genie_config.json" ] || make_adapters ;; esac
    python3 "$here/compare.py" --ours "$target/genie-bench" --config "$config" --gguf "$gguf" --build "$build" \
        --limits "cargo bench --locked --quiet --manifest-path $root/Cargo.toml -p genie-workspace --bench limits --" "$@"
}

# attempt WHAT COMMAND...: a peer that fails is reported, not fatal.
attempt() {
    local what="$1"
    shift
    ("$@") >"$build/log" 2>&1 || echo "$what cannot be had here; the end of $build/log: $(tail -n 1 "$build/log")" >&2
}

build_llama_cpp() {
    set -e
    local source="$build/source"
    mkdir -p "$source"
    python3 -m venv "$build/tools"
    "$build/tools/bin/pip" --quiet --disable-pip-version-check install cmake ninja
    "$build/tools/bin/pip" --quiet --disable-pip-version-check download --no-deps --no-binary llama-cpp-python \
        --dest "$source" "$package"
    tar -xf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components=1
    # gcc 12 drops stores to the AMX tile configuration unless it is told that the memory is read.
    find "$source/vendor/llama.cpp/ggml" -name mmq.cpp -exec sed -i \
        's/^\( *\)_tile_loadconfig(\(&[a-z_]*\));/\1asm volatile("" :: "r"(\2) : "memory"); _tile_loadconfig(\2);/' {} +
    export PATH="$build/tools/bin:$PATH"
    cmake -S "$source/vendor/llama.cpp" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build "$build" --target llama-bench llama-completion llama-quantize
}

install_openvino() {
    set -e
    python3 -m venv "$build/openvino.part"
    "$build/openvino.part/bin/pip" --quiet --disable-pip-version-check install openvino-genai
    rm -rf "$build/openvino"
    # Not moved: a virtual environment keeps its path.
    ln -s openvino.part "$build/openvino"
}

# Random adapters for all contenders: PEFT directories, GGUF files, and a context with branches and sections.
make_adapters() {
    local adapters="$build/adapters" rank flags=() yaml
    [ -x "$build/python/bin/python" ] || {
        python3 -m venv "$build/python"
        "$build/python/bin/pip" --quiet --disable-pip-version-check install numpy safetensors gguf
    }
    "$build/python/bin/python" "$here/make_adapters.py" "$gguf" "$adapters"
    yaml="$adapters/use_cases.yaml"
    echo "use_case:" >"$yaml"
    for rank in 8 16 32 64; do
        flags+=(--lora_adapter "$adapters/r$rank")
        printf '  - {name: r%s, lora_weights: r%s}\n' "$rank" "$rank" >>"$yaml"
    done
    "$target/qairt-converter" -i "$gguf" -o "$adapters/genie/model.dlc" "${flags[@]}"
    "$target/qairt-lora-importer" --lora_config "$yaml" --input_dlc "$adapters/genie/model.dlc" --output_dir "$adapters/genie/lora"
    "$target/qnn-context-binary-generator" --dlc_path "$adapters/genie/model.dlc" --output_dir "$adapters/genie" \
        --binary_file model --cl 2048 --adapter_weight_config "$adapters/genie/lora/lora_output_files.yaml"
    python3 - "$config" "$adapters/genie" <<'PY'
import json, sys
config = json.load(open(sys.argv[1]))
binary = config["dialog"]["engine"]["model"]["binary"]
binary["ctx-bins"] = ["model.bin"]
adapters = [{"version": 1, "name": f"r{rank}", "bin-sections": [f"model_r{rank}.bin"]} for rank in (8, 16, 32, 64)]
binary["lora"] = {"version": 1, "adapters": adapters}
config["dialog"]["tokenizer"]["path"] = "tokenizer.json"
json.dump(config, open(sys.argv[2] + "/genie_config.json", "w"), indent=2)
PY
}

main "$@"
