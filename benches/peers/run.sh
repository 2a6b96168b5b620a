#!/usr/bin/env bash
# Speed and memory beside llama.cpp and OpenVINO GenAI: same machine, same model, same cores, in turn.
#
#   bash benches/peers/run.sh [OPTIONS]         # the model comes from examples/quickstart.sh
#
#   --model FILE.gguf   another model
#   --adapters          with random adapters of rank 8, 16, 32 and 64 on every projection too (genie and llama.cpp)
#   --avx2              genie's avx2 tier beside a llama.cpp that is built for AVX2 only
#   --quick             a round of some five minutes, to see whether everything runs
#   --help              lists the rest
#
# Needs Rust, a C++ compiler, Python 3.10 or later with pip and venv, and the Python package registry.
#
# Builds llama.cpp natively from the source distribution of the Python package llama-cpp-python and installs OpenVINO GenAI
# into benches/peers/build (ignored by git; once, some minutes; $GENIE_PEERS names another folder). A peer that cannot be
# installed or run is reported, and the others are measured without it. Then compare.py converts the model, runs everything
# in turn, prints one JSON line per figure (medians, ranges, ratios, shares of the machine's limits) and a table, and says so
# if the machine was busy. `report.py RECORD.jsonl` makes the table of the README of such lines.
#
# llama.cpp is measured with flash attention on and off, with its cache at 16 and at 8 bits (genie's has 8), with the GGUF as
# it is and requantized to Q4_0, and counts with the best of them, figure by figure. OpenVINO reads Q4_0 alone of these
# formats, and finds no layer for an adapter in a model that it read from a GGUF. ONNX Runtime GenAI is not here: it reads no
# GGUF, and its exporter wants torch, transformers and the model's original directory.
#
# On two cores, once everything is built, a round takes about two minutes, the first some ten; with --adapters about twice that.
set -euo pipefail

readonly llama_cpp="llama-cpp-python==0.3.36"
readonly llama_cpp_sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
readonly openvino="openvino-genai==2026.4.1.0"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
models="${GENIE_MODELS:-$root/models}"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
build="${GENIE_PEERS:-$here/build}"
target="${CARGO_TARGET_DIR:-$root/target}/release"

main() {
    case " $* " in *" --help "* | *" -h "*) exec python3 "$here/compare.py" --help ;; esac
    local argument before=""
    for argument in "$@"; do
        case "$argument" in --model=*) gguf="${argument#--model=}" ;; esac
        [ "$before" != --model ] || gguf="$argument"
        before="$argument"
    done
    [ -f "$gguf" ] || { echo "no model $gguf: run examples/quickstart.sh first, or name one with --model" >&2; exit 1; }
    cargo build --release --locked --quiet --manifest-path "$root/Cargo.toml" -p genie -p qnn-core --bins
    cargo bench --locked --quiet --manifest-path "$root/Cargo.toml" -p genie-workspace --bench limits --no-run
    mkdir -p "$build"
    is_complete "$build/bin" "$llama_cpp" || attempt llama.cpp build_llama_cpp "$build" -DGGML_NATIVE=ON
    is_complete "$build/openvino" "$openvino" || attempt "OpenVINO GenAI" install_openvino
    local own
    own=$(python3 "$here/bundles.py" "$gguf" "$build")
    if [ -x "$build/bin/llama-quantize" ] && [ ! -f "$own/Q4_0.gguf" ]; then
        attempt "the Q4_0 file" quantize "$own/Q4_0.gguf"
    fi
    case " $* " in *" --avx2 "*)
        is_complete "$build/avx2/bin" "$llama_cpp" || attempt "llama.cpp for AVX2" build_llama_cpp "$build/avx2" -DGGML_NATIVE=OFF \
            -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON
        ;;
    esac
    case " $* " in *" --adapters "*)
        [ -f "$own/adapters/r64/adapter_config.json" ] || make_adapters "$own/adapters"
        [ "$build/bin/llama-lora" -nt "$here/llama_lora.cpp" ] || attempt "llama.cpp with adapters" build_llama_lora
        ;;
    esac
    exec python3 "$here/compare.py" --ours "$target" --build "$build" --model "$gguf" "$@"
}

# is_complete FOLDER PACKAGE: its file `complete` names the package and is written last, so that what an interrupted or failed step
# left is not taken for whole, nor another version for this one.
is_complete() { [ -f "$1/complete" ] && [ "$(cat "$1/complete")" = "$2" ]; }

# attempt WHAT FUNCTION...: a peer that fails is reported, not fatal. The function ends at its first command that fails.
attempt() {
    local what="$1" failed
    shift
    # Not before `||`: there bash ignores `set -e`, in functions and subshells too, and a failed step would count as done.
    set +e
    (set -e; "$@") >"$build/log" 2>&1
    failed=$?
    set -e
    [ "$failed" = 0 ] || echo "$what cannot be had here; the end of $build/log: $(tail -n 1 "$build/log")" >&2
}

# get_llama_source: unpacks it into $build/source.
get_llama_source() {
    local source="$build/source.part"
    ! grep -qsF "$llama_cpp_sha256" "$build/source/requirement" || return 0
    rm -rf "$source" "$build/source"
    mkdir -p "$source"
    python3 -m venv "$build/tools"
    "$build/tools/bin/pip" --quiet --disable-pip-version-check install cmake ninja
    echo "$llama_cpp --hash=sha256:$llama_cpp_sha256" >"$source/requirement"
    "$build/tools/bin/pip" --quiet --disable-pip-version-check download --no-deps --no-binary llama-cpp-python \
        --require-hashes --requirement "$source/requirement" --dest "$source"
    tar -xf "$source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components=1
    # gcc 12 drops stores to the AMX tile configuration unless it is told that the memory is read.
    find "$source/vendor/llama.cpp/ggml" -name mmq.cpp -exec sed -i \
        's/^\( *\)_tile_loadconfig(\(&[a-z_]*\));/\1asm volatile("" :: "r"(\2) : "memory"); _tile_loadconfig(\2);/' {} +
    mv "$source" "$build/source"
}

# build_llama_cpp FOLDER FLAGS...
build_llama_cpp() {
    local folder="$1"
    shift
    get_llama_source
    export PATH="$build/tools/bin:$PATH"
    cmake -S "$build/source/vendor/llama.cpp" -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF "$@"
    cmake --build "$folder" --target llama-bench llama-completion llama-quantize
    echo "$llama_cpp" >"$folder/bin/complete"
}

# The program that measures llama.cpp with adapters, over the library that was built.
build_llama_lora() {
    local source="$build/source/vendor/llama.cpp"
    get_llama_source
    c++ -O2 -std=c++17 -I"$source/include" -I"$source/ggml/include" "$here/llama_lora.cpp" -L"$build/bin" -lllama \
        -Wl,-rpath,'$ORIGIN' -o "$build/bin/llama-lora"
}

quantize() {
    "$build/bin/llama-quantize" --allow-requantize "$gguf" "$1.part" Q4_0 && mv "$1.part" "$1"
}

install_openvino() {
    python3 -m venv "$build/openvino.part"
    "$build/openvino.part/bin/pip" --quiet --disable-pip-version-check install "$openvino"
    rm -rf "$build/openvino"
    # Not moved: a virtual environment keeps its path.
    ln -s openvino.part "$build/openvino"
    echo "$openvino" >"$build/openvino/complete"
}

# make_adapters FOLDER: random adapters for all contenders, as PEFT directories and as GGUF files.
make_adapters() {
    [ -f "$build/python/complete" ] || {
        python3 -m venv "$build/python"
        "$build/python/bin/pip" --quiet --disable-pip-version-check install numpy safetensors gguf
        touch "$build/python/complete"
    }
    rm -rf "$1.part"
    "$build/python/bin/python" "$here/make_adapters.py" "$gguf" "$1.part"
    rm -rf "$1"
    mv "$1.part" "$1"
}

main "$@"
