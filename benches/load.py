#!/usr/bin/env python3
"""Loading weights, Vitrum compared with safetensors and torch: seconds until every weight of a file has been read once.

    ~/.cache/vitrum/interop/bin/python benches/load.py            L/16 and B/16 (7 GB of temporary files)
    ~/.cache/vitrum/interop/bin/python benches/load.py B/16

Needs torch and safetensors, as in the environment of `tests/interop/run.sh`. `cargo bench --bench load` writes each model in every
layout. Then both sides take turns; each run is a separate process that reads its file once, from a warm page cache: `vitrum` opens it
and sums all its tensors, `torch` does so with `safetensors.torch.load_file`. Medians. The rest of the table is Vitrum's: the model on
the device, one image, the same layout written and synced, and anonymous memory after loading as a share of the file.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUNS = 7
# The same values are summed in f32, once.
TORCH = """
import sys, time, torch
from safetensors.torch import load_file
start = time.perf_counter()
total = sum(tensor.sum() for tensor in load_file(sys.argv[1]).values())
assert torch.isfinite(total)
print(time.perf_counter() - start)
"""


def main():
    models = sys.argv[1:] or ["L/16", "B/16"]
    os.chdir(Path(__file__).parent.parent)
    build = ["cargo", "bench", "-p", "vitrum-benches", "--bench", "load", "--no-run", "--message-format=json"]
    messages = map(json.loads, run(build).splitlines())
    program = next(m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "load")
    columns = ["vitrum", "torch", "ratio", "load", "run", "export", "memory"]
    print("| model | layout | " + " | ".join(columns) + " |\n" + "| --- " * (2 + len(columns)) + "|")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            run([program, "--model", model, "--keep", folder])
            for layout in ["own.safetensors", "timm.safetensors", "hf", "vit_jax.npz"]:
                print(f"| {model} | {layout} | " + " | ".join(row(program, Path(folder) / layout)) + " |", flush=True)


def row(program, path):
    torch_file = path / "model.safetensors" if path.is_dir() else path
    ours, theirs = [], []
    for _ in range(RUNS):
        ours.append(json.loads(run([program, "--json", str(path)])))
        if torch_file.suffix == ".safetensors":
            theirs.append(float(run([sys.executable, "-c", TORCH, str(torch_file)])))
    of = lambda key: statistics.median(one[key] for one in ours)
    times = [f"{of('read'):.3f} s", "-", "-"]
    if theirs:
        other = statistics.median(theirs)
        times[1:] = [f"{other:.3f} s", f"{other / of('read'):.1f}x"]
    share = of("anonymous_bytes") / ours[0]["bytes"]
    return [*times, *(f"{of(key):.3f} s" for key in ["load", "run", "export"]), f"{share:.2f} of the file"]


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: exit {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
