#!/usr/bin/env python3
"""What checkpoints cost a run: seconds per step with one every so many steps, and without.

    benches/checkpoint_cost.py --vitrum target/release/vitrum

The two runs alternate, so that the machine's moods hit both. Each run is a B/16 on drawn pictures unless `--set` says
otherwise. The figure of a run is its mean time per step, so steps that a checkpoint slows down count fully; that of each
kind is the median of its runs. Prints one JSON object.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import tempfile


def run(given, out, every):
    command = [str(given.vitrum.resolve()), "train", "demo", "--device", given.device, "--out", str(out)]
    settings = [
        "model.variant=B/16", "model.image=224", "train.batch=4", "train.micro_batch=0", "train.log_every=1",
        f"train.steps={given.steps}", f"train.eval_every={given.steps}", *given.set,
        f"train.checkpoint_every={every}",
    ]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    # The first steps warm up; the run's last checkpoint is in neither.
    return [after - before for before, after in zip(seconds[2:], seconds[3:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", required=True, type=pathlib.Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=290)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    means = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as work:
        for turn in range(given.rounds):
            for name, every in [("with", given.every), ("without", 10 * given.steps)]:
                times = run(given, pathlib.Path(work) / f"{name}-{turn}", every)
                means[name].append(statistics.fmean(times))
    with_them, without = (statistics.median(means[name]) for name in ("with", "without"))
    print(json.dumps({
        "every": given.every, "steps": given.steps, "seconds_per_step": means,
        "cost_percent": round(100 * (with_them / without - 1), 2),
    }))


if __name__ == "__main__":
    main()
