#!/usr/bin/env python3
"""Answers as `vitrum` does on a card, in no time, and misbehaves where it is told to.

`MISBEHAVE` is a list of JSON: {"when": words of the command line, "how": a function's name in here}. Numbers that it prints were
made up.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BENCHES = Path(os.environ["BENCHES"])


# ---- As it should be ----


def doctor(_):
    card = {"name": os.environ.get("CARD", "NVIDIA H100 80GB HBM3"), "capability": "9.0", "driver": "13.0", "cublaslt": 130100}
    about = {"version": "0.1.0", "kernels": 138, "kernel_targets": ["sm_90a"], "kernels_reason": None, "processor": "a processor", "cores": 16}
    return {**about, "device": "cuda", "device_reason": None, "cuda": card}


def selftest(_):
    proof = {"device": "cuda, bf16", "seconds": 1.0, "distance": 1e-3, "tolerance": 0.02, "repeats": True}
    return {"device": "cuda, bf16", "cases": 7, "failed": 0, "passed": True, "results": [], "training": [proof]}


def bench(words):
    if value(words, "--what") == "kernels":
        return kernels()
    card = {"memory_bytes": 31 << 30, "mfu_data_sheet": 0.4, "mfu_product": 0.5}
    rates = {"img_per_s": 5000.0, "ms_per_step": 100.0, "first_step_s": 2.5, "arena_bytes": 30 << 30}
    return {"engine": "vitrum 0.1.0", "batch": int(value(words, "--batch")), "card": card, **rates}


def kernels():
    rate = {"ms": 0.5, "bytes": 10**9, "of_copy": 0.7}
    product = {**rate, "flops": 3.5e11, "of_product": 0.9}
    operations = [
        {"operation": "qkv, bias", "shape": "B/16 [100864, 768] → 2304", **product},
        {"operation": "attention", "shape": "B/16 [100864, 768], 197 tokens, 12 heads of 64", **product},
        {"operation": "attention_backward", "shape": "B/16 [100864, 768], 197 tokens, 12 heads of 64", **product},
    ]
    if "heads of" in " ".join(sys.argv):
        operations = operations[1:]
    return {"engine": "vitrum 0.1.0", "copy_bytes_per_s": 3.0e12, "product_flops_per_s": 7.9e14, "operations": operations}


def train(words):
    """The CPU's curve, to the digit."""
    kept = json.loads((BENCHES / "results" / "first-run-curves.json").read_text())["full"]["f32"]
    losses = [loss + float(os.environ.get("FARTHER", 0)) for loss in kept["loss"] for _ in range(10)]
    lines = [{"step": 1 + i, "loss": loss} for i, loss in enumerate(losses)] + [{"step": len(losses), "eval": kept["val"]}]
    out = Path(value(words, "--out"))
    out.mkdir()
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def value(words, flag):
    return words[words.index(flag) + 1]


# ---- As it should not be ----


def hang():
    time.sleep(600)


def hang_deaf():
    """Hears no SIGTERM, and has started something that hears none either."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def leave_behind():
    """Ends well, and something that it has started does not."""
    child = subprocess.Popen(["sleep", "600"])
    Path(os.environ["PIDS"]).write_text(f"{child.pid}")


def crash():
    print("about to touch what is not there", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def garbage():
    print("Segmentation fault? No: [[[{")
    sys.exit(0)


def list_instead():
    print("[1, 2, 3]")
    sys.exit(0)


def nothing():
    sys.exit(0)


def fail():
    print("error: the driver said no\nhint: ask it again", file=sys.stderr)
    sys.exit(1)


def flood():
    while True:
        sys.stdout.write("x" * (1 << 20))


def flood_stderr():
    while True:
        sys.stderr.write("y" * (1 << 20))


def not_a_number():
    print(json.dumps({**bench(sys.argv[1:]), "img_per_s": float("nan")}))
    sys.exit(0)


def other_keys():
    print(json.dumps({"img/s": 5000}))
    sys.exit(0)


def failed_cases():
    failure = {"operation": "matmul", "case": "B 3", "error": 0.5, "tolerance": 0.01, "passed": False, "note": "y"}
    proof = {"device": "cuda, bf16", "seconds": 1.0, "distance": None, "tolerance": 0.02, "repeats": False}
    print(json.dumps({**selftest([]), "failed": 1, "passed": False, "results": [failure], "training": [proof]}))
    sys.exit(1)


def no_card():
    found = {**doctor([]), "device": "cpu", "device_reason": "the CUDA driver sees no card", "cuda": None}
    print(json.dumps(found))
    sys.exit(0)


def remove_out():
    subprocess.run(["rm", "-r", os.environ["OUT_OF_RUN"]], check=True)


def main():
    words = sys.argv[1:]
    for fault in json.loads(os.environ.get("MISBEHAVE", "[]")):
        if fault["when"] in " ".join(words):
            globals()[fault["how"]]()
    found = {"doctor": doctor, "selftest": selftest, "bench": bench, "train": train}[words[0]](words)
    if found:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
