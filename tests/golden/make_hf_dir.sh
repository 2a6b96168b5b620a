#!/usr/bin/env bash
# Makes the Hugging Face directory (f16) of SmolLM2-135M-Instruct that the slow tests read, from the GGUF that
# examples/quickstart.sh fetched. Does nothing when it is there already.
#
#   bash tests/golden/make_hf_dir.sh [MODELS]       # default: $GENIE_MODELS, else models/ in the clone
#
# Needs Python 3.10 or later with pip and venv, and the Python package registry.
#
# reads   MODELS/SmolLM2-135M-Instruct.Q4_1.gguf
# writes  MODELS/smollm2-135m-instruct/           260 MB
#         MODELS/venv/                            a virtual environment with the packages that read GGUF
set -euo pipefail

readonly weights_sha256="d8d8571b3af99053c8ad455ce009d8479eec5da515f80a417c075d0a7f317904"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
models="${1:-${GENIE_MODELS:-$here/../../models}}"
gguf="$models/SmolLM2-135M-Instruct.Q4_1.gguf"
out="$models/smollm2-135m-instruct"
part="$out.part"

[ -f "$gguf" ] || { echo "make_hf_dir: $gguf is not there; run examples/quickstart.sh first" >&2; exit 1; }

check() { # of the weights in folder $1
    local found
    found=$(python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$1/model.safetensors")
    [ "$found" = "$weights_sha256" ] || {
        echo "make_hf_dir: $1/model.safetensors has sha256 $found, need $weights_sha256" >&2
        exit 1
    }
}

if [ -d "$out" ]; then
    check "$out"
    echo "$out: already there"
    exit 0
fi
# `complete` is written last, so that an interrupted installation is not taken for a whole one.
if [ ! -f "$models/venv/complete" ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "make_hf_dir: python3 is $(python3 --version 2>&1); need Python 3.10 or later" >&2
        exit 1
    }
    # Debian has the module venv without what it needs.
    python3 -c 'import ensurepip, venv' 2>/dev/null || {
        echo "make_hf_dir: python3 has no venv; install it (Debian, Ubuntu: apt install python3-venv)" >&2
        exit 1
    }
    rm -rf "$models/venv"
    python3 -m venv "$models/venv"
    # A range: no numpy has wheels for all of Python 3.10 to 3.14. Weights come out the same, or `check` refuses them.
    "$models/venv/bin/pip" --disable-pip-version-check install --no-input --quiet \
        "numpy>=2.2.6,<2.4" gguf==0.19.0 safetensors==0.8.0 tokenizers==0.22.2
    touch "$models/venv/complete"
fi
rm -rf "$part"
"$models/venv/bin/python" "$here/make_hf_dir.py" "$gguf" "$part"
check "$part"
mv "$part" "$out"
