#!/usr/bin/env python3
"""Transfer learning on two cores: does pre-training on five classes of CIFAR-10 help to learn the other five?

A small ViT (`mini/cifar10`) is trained on five classes. From it, and from scratch, the other five are learned with 1 %, 10 % and 100 %
of their labels: full fine-tuning, layer-wise rates, the head alone, and without training by ridge regression and nearest neighbours.
Every run of a row has the same recipe, steps and images; only the start and the learning rate differ. Accuracy is that of the last
step, on images that were not used for any choice.

    python3 benches/transfer.py cifar10.tar --out transfer             three seeds
    python3 benches/transfer.py cifar10.tar --out quick --quick        one seed, few steps: does everything work?

The archive holds `train/CLASS/ID.png` and `test/CLASS/ID.png` (7,000 images are enough). Finished runs are kept: the same command
continues where it was stopped. Prints two tables in Markdown and writes `results.json`. Needs no package.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import tarfile
from pathlib import Path

FIRST = ["airplane", "automobile", "bird", "cat", "deer"]
SECOND = ["dog", "frog", "horse", "ship", "truck"]
SHARES = [1, 10, 100]
# The head's rate of each method, and its other differences from `mini/cifar10`.
METHODS = {
    "from scratch": ["optim.lr=1e-3"],
    "full": ["optim.lr=5e-4"],
    "layer-wise (0.75)": ["optim.lr=1e-3", "optim.layer_decay=0.75"],
    "head only": ["optim.lr=3e-3", "optim.freeze_backbone=true"],
}
PROBES = {"ridge": ["--method", "ridge"], "k-NN (10)": ["--method", "knn", "--k", "10"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="train/CLASS/ID.png and test/CLASS/ID.png")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vitrum", default="target/release/vitrum", help="the program")
    parser.add_argument("--pretrain-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="400 + 60 steps, one seed")
    args = parser.parse_args()
    if args.quick:
        args.pretrain_steps, args.steps, args.seeds = 400, 60, 1
    pictures = read(args.archive)
    args.out.mkdir(parents=True, exist_ok=True)

    start = args.out / "pretrained"
    data = split(args.out / "data/first", pictures, FIRST, 100, 0)
    train(args, start, ["train", "mini/cifar10"], data, args.pretrain_steps, 64, 0, [])
    results, curves = {}, {}
    for share in SHARES:
        for seed in range(args.seeds):
            data = split(args.out / f"data/second-{share}-{seed}", pictures, SECOND, share, seed)
            batch = min(64, count(data / "train"))
            for method, settings in METHODS.items():
                run = args.out / f"{method.split(' (')[0].replace(' ', '-')}-{share}-{seed}"
                command = ["train", "mini/cifar10"]
                if method != "from scratch":
                    command = ["finetune", "mini/cifar10", "--weights", str(start)]
                curve = train(args, run, command, data, args.steps, batch, seed, settings)
                results.setdefault(method, {}).setdefault(share, []).append(curve[-1][1])
                curves.setdefault(method, {}).setdefault(share, []).append(curve)
            for method, flags in PROBES.items():
                top1 = probe(args, start, data, flags)
                results.setdefault(method, {}).setdefault(share, []).append(top1)
    (args.out / "results.json").write_text(json.dumps({"top1": results, "curves": curves}, indent=1) + "\n")
    print(table(results))
    print(curve_table(curves))


def read(archive):
    """Bytes of every picture by split, class and name."""
    pictures = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) >= 3:
                pictures.setdefault((parts[-3], parts[-2]), {})[parts[-1]] = tar.extractfile(member).read()
    return pictures


def split(folder, pictures, classes, share, seed):
    """`train/` with that share of each class, chosen by the seed, and `val/` with all test pictures."""
    for part, source in [("train", "train"), ("val", "test")]:
        for name in classes:
            key = lambda picture: hashlib.sha256(f"{seed}/{name}/{picture}".encode()).digest()
            chosen = sorted(pictures[source, name], key=key)
            if part == "train":
                chosen = chosen[: max(1, len(chosen) * share // 100)]
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for picture in chosen:
                (folder / part / name / picture).write_bytes(pictures[source, name][picture])
    return folder


def count(folder):
    return sum(1 for path in folder.rglob("*") if path.is_file())


def train(args, run, command, data, steps, batch, seed, settings):
    """One complete run of the program; returns (step, top-1) of every evaluation."""
    every = max(1, steps // 10)
    settings = [
        f"data.train={data}", f"train.steps={steps}", f"train.batch={batch}", f"train.seed={seed}",
        f"train.eval_every={every}", f"train.log_every={every}", *settings,
    ]  # fmt: skip
    flags = [flag for setting in settings for flag in ("--set", setting)]
    metrics = run / "metrics.jsonl"
    if not metrics.exists() or evaluations(metrics)[-1:] == [] or evaluations(metrics)[-1][0] != steps:
        call(args, [*command, "--out", str(run), "--resume", *flags])
    print(f"{run.name:<28} {100 * evaluations(metrics)[-1][1]:.1f} %", flush=True)
    return evaluations(metrics)


def evaluations(metrics):
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line["eval"]["top1"]) for line in lines if "eval" in line]


def probe(args, weights, data, flags):
    out = call(args, ["probe", "--weights", str(weights), "--data", str(data), "--json", *flags])
    results = json.loads(out)["results"]
    return (results[0] if isinstance(results, list) else results)["top1"]


def call(args, words):
    done = subprocess.run([args.vitrum, *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"vitrum {' '.join(words)}\n{done.stderr}")
    return done.stdout


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(results):
    lines = ["", "| method | " + " | ".join(f"{share} % of the labels" for share in SHARES) + " |"]
    lines.append("| --- |" + " --- |" * len(SHARES))
    for method, by_share in results.items():
        cells = [f"{100 * statistics.mean(v):.1f} ± {100 * spread(v):.1f} %" for v in by_share.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table(curves):
    """Mean accuracy over the seeds at every evaluation, with a tenth of the labels."""
    share = SHARES[1]
    steps = [step for step, _ in curves["full"][share][0]]
    lines = ["", f"| top-1 at step ({share} % of the labels) | " + " | ".join(map(str, steps)) + " |"]
    lines.append("| --- |" + " --- |" * len(steps))
    for method, by_share in curves.items():
        means = [statistics.mean(curve[i][1] for curve in by_share[share]) for i in range(len(steps))]
        lines.append(f"| {method} | " + " | ".join(f"{100 * mean:.0f} %" for mean in means) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
