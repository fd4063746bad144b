#!/usr/bin/env python3
"""Loss curves in f32, with bf16 rounding where a GPU stores bf16, and with the same but an f32 residual stream.

    vitrum pack cifar10.tar packed
    python3 benches/residual_stream.py --vitrum target/release/vitrum --data packed --out runs/residual --json curves.json

Trains `mini/cifar10` (depth 4, with drop-path, so that LayerNorms join the stream) and a deeper, narrow model without drop-path (depth
12, so that matrix products join it) on the CPU, in each mode, for each seed. `f32-nudged` is f32 with a learning rate higher by a
thousandth: it shows how far two runs of a seed diverge for no reason. Existing runs are not repeated. docs/numerics.md discusses the
curves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

MODELS = {
    "cifar": ["train.steps=2000", "train.eval_every=500"],
    "deep": ["train.steps=500", "train.eval_every=250", "model.depth=12", "model.drop_path=0"],
}
# The value of VITRUM_CPU_ROUNDS, and settings.
MODES = {
    "f32": ("", []),
    "f32-nudged": ("", ["optim.lr=1.001e-3"]),
    "bf16": ("bf16", []),
    "bf16-residual-f32": ("bf16-residual-f32", []),
}
# Steps per point of a curve.
POINT = 10


def train(args, folder, model, mode, seed):
    rounds, more = MODES[mode]
    settings = MODELS[model] + more + [f"data.train={args.data}", f"train.seed={seed}", "train.log_every=1"]
    command = [args.vitrum, "train", "mini/cifar10", "--device", "cpu", "--out", str(folder)]
    command += [word for setting in settings + args.set for word in ("--set", setting)]
    print(folder.name, file=sys.stderr)
    with open(f"{folder}.log", "w") as log:
        subprocess.run(command, env=os.environ | {"VITRUM_CPU_ROUNDS": rounds}, stdout=log, stderr=log, check=True)


def curve(folder):
    """Means of the training loss over POINT steps each, and the evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    points = [statistics.fmean(losses[i : i + POINT]) for i in range(0, len(losses) - POINT + 1, POINT)]
    evals = {line["step"]: line["eval"] for line in lines if "eval" in line}
    return {
        "steps": len(losses),
        "loss": [round(point, 5) for point in points],
        "val": {step: {key: round(e[key], 5) for key in ("loss", "top1")} for step, e in evals.items()},
    }


def tenth(run, i):
    n = len(run["loss"]) // 10
    return statistics.fmean(run["loss"][i * n : (i + 1) * n])


def final(run):
    val = run["val"][run["steps"]]
    return tenth(run, 9), val["loss"], 100 * val["top1"]


def spread(values, digits):
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def tables(runs):
    for model in MODELS:
        of = {mode: {r["seed"]: r for r in runs if (r["model"], r["mode"]) == (model, mode)} for mode in MODES}
        if not any(of.values()):
            continue
        print(f"\n{model}\n\n| mode | seeds | training loss, last tenth | validation loss | top-1, % | minus f32, same seeds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for mode, seeds in of.items():
            if not seeds:
                continue
            ends = list(zip(*(final(run) for run in seeds.values())))
            pairs = [final(r)[0] - final(of["f32"][seed])[0] for seed, r in seeds.items() if seed in of["f32"]]
            minus = ", ".join(f"{pair:+.4f}" for pair in pairs) if mode != "f32" else ""
            cells = [mode, str(len(seeds)), spread(ends[0], 4), spread(ends[1], 4), spread(ends[2], 1), minus]
            print(f"| {' | '.join(cells)} |")
        print("\nminus f32, same seed, means of the training loss over a tenth of the run each:\n")
        for mode, seeds in of.items():
            for seed, run in seeds.items():
                base = of["f32"].get(seed)
                if mode == "f32" or not base:
                    continue
                print(mode, seed, " ".join(f"{tenth(run, i) - tenth(base, i):+.4f}" for i in range(10)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--data", required=True, help="CIFAR-10, packed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=VALUE", help="goes into the file")
    parser.add_argument("--json", type=Path, help="where the curves go")
    parser.add_argument("--no-train", action="store_true", help="read the runs that are there")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    runs = []
    for seed in args.seeds.split(","):
        for model in args.models.split(","):
            for mode in args.modes.split(","):
                folder = args.out / f"{model}-{mode}-{seed}"
                if not args.no_train and not folder.exists():
                    train(args, folder, model, mode, seed)
                run = curve(folder) if folder.exists() else {"steps": 0, "val": {}}
                if run["steps"] in run["val"]:
                    runs.append({"model": model, "mode": mode, "seed": seed} | run)
                else:
                    print(f"{folder.name} is not there, or not at its end", file=sys.stderr)
    tables(runs)
    if args.json:
        head = dict(note.split("=", 1) for note in args.note) | {"steps_per_point": POINT}
        lines = ",\n".join("  " + json.dumps(run) for run in runs)
        args.json.write_text(json.dumps(head)[:-1] + ', "runs": [\n' + lines + "\n]}\n")


if __name__ == "__main__":
    main()
