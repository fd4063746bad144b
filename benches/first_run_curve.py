"""The loss curve that a GPU has to follow: `mini/cifar10` for 200 steps, on the images that the program draws itself.

    python3 benches/first_run_curve.py --vitrum target/release/vitrum --commit COMMIT --machine PROCESSOR

trains it on the CPU, in f32 and with bf16 rounding where a GPU stores bf16, and rewrites `results/first-run-curves.json`; a run on a
GPU is compared with it. Batches, augmentation and first weights are functions of the seed, the same everywhere. `tiny` is a smaller
model for a few steps, for the stand-in GPU.
"""
import argparse
import datetime
import json
import os
import subprocess
import tempfile
from pathlib import Path

from processes import write_whole
from residual_stream import POINT, curve

CURVES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "first-run-curves.json")
COMMON = ["data.train=demo", "train.log_every=1", "train.seed=0"]
SMALL = ["train.batch=8", "model.patch=16", "model.width=64", "model.heads=1", "model.depth=1"]
SETTINGS = {
    "full": [*COMMON, "train.steps=200", "train.eval_every=200"],
    "tiny": [*COMMON, "train.steps=20", "train.eval_every=20", *SMALL],
}


def words(vitrum, size, device, out):
    sets = [word for setting in SETTINGS[size] for word in ("--set", setting)]
    return [vitrum, "train", "mini/cifar10", "--device", device, "--out", out, *sets]


def read(out):
    """Means of the training loss over POINT steps each, and the evaluation at the end."""
    found = curve(Path(out))
    return {"loss": found["loss"], "val": found["val"][found["steps"]]}


def kept(size):
    """The CPU's curves, in `f32` and `bf16`, if they were made with the current settings."""
    with open(CURVES) as file:
        of_size = json.load(file)[size]
    if of_size["settings"] != SETTINGS[size]:
        raise ValueError(f"{os.path.basename(CURVES)} was made with other settings")
    return of_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--commit", help="what was run, for the record")
    parser.add_argument("--machine", help="where, for the record")
    args = parser.parse_args()
    record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "machine": args.machine, "steps_per_point": POINT}
    for size, settings in SETTINGS.items():
        record[size] = {"settings": settings}
        for rounds in ("f32", "bf16"):
            with tempfile.TemporaryDirectory() as scratch:
                env = dict(os.environ, VITRUM_CPU_ROUNDS="" if rounds == "f32" else rounds)
                subprocess.run(words(args.vitrum, size, "cpu", os.path.join(scratch, "run")), env=env, check=True)
                record[size][rounds] = read(os.path.join(scratch, "run"))
    write_whole(CURVES, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
