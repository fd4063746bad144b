#!/usr/bin/env bash
# Files that `vitrum convert` writes, in the hands of the libraries that they are for: timm, transformers, and a NumPy
# forward pass of vit_jax's model. Compares logits, and of fine-tuned models the class of every test picture.
#
#     tests/interop/run.sh               makes the environment on first use (about 6 GB with torch) and keeps it
#     tests/interop/run.sh PICTURES      fine-tunes on PICTURES/train/CLASS, compares on PICTURES/test/CLASS (32 x 32 PNG);
#                                        without, it draws some
#
# VITRUM_INTEROP_ENV   where the environment is kept (default: $VITRUM_CACHE/interop, else ~/.cache/vitrum/interop)
# VITRUM_BIN           the program to test (default: built here, release)
#
# Where the environment cannot be made (no network, no python3) it says so in one line and ends well.
set -euo pipefail
cd "$(dirname "$0")/../.."

env_dir="${VITRUM_INTEROP_ENV:-${VITRUM_CACHE:-$HOME/.cache/vitrum}/interop}"
python="$env_dir/bin/python"
imports='import numpy, PIL, safetensors.torch, timm, torch, torchvision, transformers'

left_out() {
    echo "interop: left out, $1"
    exit 0
}

if ! "$python" -c "$imports" 2>/dev/null; then
    command -v python3 >/dev/null || left_out "there is no python3"
    mkdir -p "$env_dir"
    log="$env_dir/install.log"
    echo "interop: installing torch, timm and transformers into $env_dir (once)" >&2
    python3 -m venv "$env_dir" >"$log" 2>&1 || left_out "python3 makes no virtual environment (see $log)"
    # Any torch will do; the builds without CUDA are smaller where their index can be reached.
    "$python" -m pip install -q torch torchvision --index-url https://download.pytorch.org/whl/cpu >>"$log" 2>&1 ||
        "$python" -m pip install -q torch torchvision >>"$log" 2>&1 || left_out "torch cannot be installed (see $log)"
    "$python" -m pip install -q numpy timm transformers safetensors >>"$log" 2>&1 ||
        left_out "timm and transformers cannot be installed (see $log)"
    "$python" -c "$imports" >>"$log" 2>&1 || left_out "the libraries do not import (see $log)"
fi

if [ -z "${VITRUM_BIN:-}" ]; then
    cargo build --release --quiet
    VITRUM_BIN="${CARGO_TARGET_DIR:-target}/release/vitrum"
fi
export HF_HUB_OFFLINE=1
"$python" tests/interop/check.py "$VITRUM_BIN"
exec "$python" tests/interop/finetuned.py "$VITRUM_BIN" "$@"
