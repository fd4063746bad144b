"""Time until every weight of a safetensors file has been read once, by safetensors and torch; beside `benches/load.rs`.

    cargo bench --bench load -- --keep DIR
    ~/.cache/vitrum/interop/bin/python tests/interop/load.py DIR/own.safetensors
"""

import sys
import time

import torch
from safetensors.torch import load_file

for path in sys.argv[1:]:
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        total = sum(tensor.sum() for tensor in load_file(path).values())
        assert torch.isfinite(total)
        best = min(best, time.perf_counter() - start)
    print(f"{path}: load_file and a sum over all tensors: {best:.3f} s (torch {torch.__version__})")
