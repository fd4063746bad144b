#!/usr/bin/env bash
# The page of a run, and one that compares two, in a headless Chromium at two widths and in two colour schemes; and the
# run's event files in TensorBoard. Fails on messages in the console, requests to anywhere, pictures that do not load,
# content wider than the window and text that is too small or too faint.
#
#     tests/page/run.sh                  trains two short demo runs first
#     tests/page/run.sh RUN...           looks at these runs
#
# VITRUM_PAGE_ENV      where the Python environment is kept (default: $VITRUM_CACHE/page, else ~/.cache/vitrum/page)
# VITRUM_BIN           the program to test (default: built here)
# VITRUM_SCREENSHOTS   a folder for the pictures of the pages, to be looked at
#
# Where the environment or the browser cannot be had (no network, no python3) it says so in one line and ends well.
set -euo pipefail
cd "$(dirname "$0")/../.."

env_dir="${VITRUM_PAGE_ENV:-${VITRUM_CACHE:-$HOME/.cache/vitrum}/page}"
python="$env_dir/bin/python"
export PLAYWRIGHT_BROWSERS_PATH="$env_dir/browsers"

left_out() {
    echo "page: left out, $1"
    exit 0
}

if [ ! -f "$env_dir/complete" ]; then
    command -v python3 >/dev/null || left_out "there is no python3"
    mkdir -p "$env_dir"
    log="$env_dir/install.log"
    echo "page: installing playwright and tensorboard into $env_dir (once)" >&2
    python3 -m venv "$env_dir" >"$log" 2>&1 || left_out "python3 makes no virtual environment (see $log)"
    "$python" -m pip install -q playwright tensorboard >>"$log" 2>&1 || left_out "playwright cannot be installed (see $log)"
    touch "$env_dir/complete"
fi

# The system's Chromium, else its package, else the one that playwright downloads.
find_chromium() {
    command -v chromium-headless-shell || command -v chromium || command -v chromium-browser || command -v google-chrome
}
if ! VITRUM_CHROMIUM=$(find_chromium); then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell; } >"$env_dir/browser.log" 2>&1 ||
        "$python" -m playwright install --only-shell chromium >>"$env_dir/browser.log" 2>&1 ||
        left_out "Chromium cannot be installed (see $env_dir/browser.log)"
    VITRUM_CHROMIUM=$(find_chromium) || VITRUM_CHROMIUM=
fi
export VITRUM_CHROMIUM

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [ -z "${VITRUM_BIN:-}" ]; then
    cargo build --quiet
    VITRUM_BIN="${CARGO_TARGET_DIR:-target}/debug/vitrum"
fi
runs=("$@")
if [ ${#runs[@]} -eq 0 ]; then
    for lr in 1e-3 3e-3; do
        "$VITRUM_BIN" train --out "$scratch/lr-$lr" --lr "$lr" --steps 60 --set train.eval_every=20 --set train.log_every=2 \
            --set optim.ema=0.9
        runs+=("$scratch/lr-$lr")
    done
fi
pages=()
for run in "${runs[@]}"; do
    pages+=("$("$VITRUM_BIN" report "$run")")
done
if [ ${#runs[@]} -gt 1 ]; then
    pages+=("$("$VITRUM_BIN" report "${runs[@]}" --out "$scratch/comparison.html")")
fi
"$python" tests/page/look.py "${VITRUM_SCREENSHOTS:-$scratch/screenshots}" "${pages[@]}"
"$python" tests/page/events.py "${runs[@]}"
