#!/usr/bin/env bash
# Speed beside llama.cpp, on the same machine, with the same weights, in one run.
#
#   bash benches/peers/llama_cpp.sh [ROUNDS]      # default 5; the model comes from examples/quickstart.sh
#
# Builds llama.cpp natively from the source distribution of the Python package llama-cpp-python into benches/peers/build
# (ignored by git; once, some minutes), then runs genie-bench and llama-bench in turn, on the same two cores, and prints
# one JSON line per figure (medians, ranges, ratio) and a table. Both read the same Q4_1 grid. Needs a quiet machine: it
# says so if it finds another load.
set -euo pipefail

readonly package="llama-cpp-python==0.3.36"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
models="${GENIE_MODELS:-$root/models}"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
config="$models/smollm2-135m-instruct-q4_1/genie_config.json"
build="$here/build"
ours="${CARGO_TARGET_DIR:-$root/target}/release/genie-bench"

main() {
    [ -f "$gguf" ] && [ -f "$config" ] || { echo "no model in $models: run examples/quickstart.sh first" >&2; exit 1; }
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p genie --bin genie-bench
    [ -x "$build/bin/llama-bench" ] || build_llama_cpp
    python3 "$here/compare.py" --ours "$ours" --config "$config" --llama "$build/bin/llama-bench" --gguf "$gguf" \
        --rounds "${1:-5}"
}

build_llama_cpp() {
    local source="$build/source"
    rm -rf "$build"
    mkdir -p "$source"
    python3 -m venv "$build/venv"
    "$build/venv/bin/pip" --quiet --disable-pip-version-check install cmake ninja
    "$build/venv/bin/pip" --quiet --disable-pip-version-check download --no-deps --no-binary llama-cpp-python \
        --dest "$source" "$package"
    tar -xf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components=1
    # gcc 12 drops stores to the AMX tile configuration unless it is told that the memory is read.
    find "$source/vendor/llama.cpp/ggml" -name mmq.cpp -exec sed -i \
        's/^\( *\)_tile_loadconfig(\(&[a-z_]*\));/\1asm volatile("" :: "r"(\2) : "memory"); _tile_loadconfig(\2);/' {} +
    export PATH="$build/venv/bin:$PATH"
    cmake -S "$source/vendor/llama.cpp" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF >/dev/null
    cmake --build "$build" --target llama-bench llama-completion
}

main "$@"
