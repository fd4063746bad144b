#!/usr/bin/env bash
# Files that `vitrum convert` writes, in the hands of the libraries that they are for: timm, transformers, and a NumPy
# forward pass of vit_jax's model. Compares logits.
#
#     tests/interop/run.sh            makes the environment on first use (about 5 GB with torch) and keeps it
#
# VITRUM_INTEROP_ENV   where the environment is kept (default: $VITRUM_CACHE/interop, else ~/.cache/vitrum/interop)
# VITRUM_BIN           the program to test (default: built here, release)
#
# Where the environment cannot be made (no network, no python3) it says so in one line and ends well.
set -euo pipefail
cd "$(dirname "$0")/../.."

env_dir="${VITRUM_INTEROP_ENV:-${VITRUM_CACHE:-$HOME/.cache/vitrum}/interop}"
python="$env_dir/bin/python"
imports='import numpy, safetensors.torch, timm, torch, transformers'

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
HF_HUB_OFFLINE=1 exec "$python" tests/interop/check.py "$VITRUM_BIN"
