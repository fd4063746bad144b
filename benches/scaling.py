"""Training steps on 1, 2, 4, ... ranks of this machine, and what `vitrum plan --gpus` predicted for them.

    python3 benches/scaling.py --vitrum target/release/vitrum --out benches/results/NAME.json
        measures B/16 with 512 samples on each of 1, 2, 4 and 8 GPUs, prints a table and draws the curves
    python3 benches/scaling.py --vitrum target/release/vitrum --device cpu --ranks 1,2 --model Ti/16 --batch 4
        checks the model of `plan` on this machine's cores: one thread to a rank, each rank bound to a core of its own

Weak scaling: every rank has `--batch` samples, however many there are. Each number of ranks is timed `--repeats` times, in turn, and
medians are compared. The plan gets the speed of one rank alone (`--measured`); its step of N ranks is then a prediction, which has to
be within `--within` of the measured one (15 % by default), else the script ends with 1. *Beside others* is the step of each rank by
itself, all at the same time, over the common step: what communication alone costs, without what ranks take from each other. On a CPU, the machine has to be quiet: the
script writes the load that it found before it began. Needs Open MPI's mpirun. The curve is drawn where matplotlib is installed.
"""
import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile


def command(args, ranks):
    """The words of one measurement."""
    words = [args.vitrum, "bench", "--what", "train", "--json", "--model", args.model, "--device", args.device]
    words += ["--batch", str(args.batch * ranks), "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    for setting in settings(args):
        words += ["--set", setting]
    # A single rank is bound, too: it has the same core alone that it has beside others.
    bind = ["--bind-to", "core", "--map-by", "core"] if args.device == "cpu" else ["--bind-to", "none"]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [args.mpirun, *root, *bind, "-n", str(ranks), *words]


def settings(args):
    threads = ["train.threads=1"] if args.device == "cpu" else []
    return [f"train.micro_batch={args.batch}", *threads, *args.set]


def run(words):
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def measured(args, ranks):
    return run(command(args, ranks))


def predicted(args, ranks, alone):
    """The row of the plan for that many ranks, from the measured speed of one."""
    # What `bench` times: the variant with 1000 classes, and defaults.
    recipe = f'[model]\nvariant = "{args.model}"\nclasses = 1000\n[train]\nsteps = 1000\nbatch = {args.batch * ranks}\n'
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(recipe)
        file.flush()
        words = [args.vitrum, "plan", file.name, "--json", "--gpus", str(ranks), "--measured", alone]
        if args.device == "cpu":
            words += ["--device", "cpu"]
        elif args.gpu:
            words += ["--gpu", args.gpu]
        for link in args.link:
            words += ["--link", link]
        for setting in settings(args):
            words += ["--set", setting]
        return run(words)["rows"][-1]


def table(rows):
    head = ["ranks", "batch", "ms/step", "of plan", "off by, %", "img/s", "efficiency, %", "beside others, %", "of plan, %"]
    cells = [head, ["---"] * len(head)]
    for row in rows:
        cells.append(
            [
                str(row["ranks"]),
                str(row["batch"]),
                f"{row['ms_per_step']:.2f}",
                f"{row['plan_ms_per_step']:.2f}",
                f"{100 * row['off_by']:+.1f}",
                f"{row['img_per_s']:.1f}",
                f"{100 * row['efficiency']:.1f}",
                f"{100 * row['efficiency_beside']:.1f}",
                f"{100 * row['plan_efficiency']:.1f}",
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def draw(rows, path):
    """Images per second over ranks: measured, planned, and proportional to one rank's."""
    try:
        import matplotlib
    except ImportError:
        print("no curve: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = [row["ranks"] for row in rows]
    figure, axes = pyplot.subplots()
    axes.plot(ranks, [row["img_per_s"] for row in rows], "o-", label="measured")
    axes.plot(ranks, [row["plan_img_per_s"] for row in rows], "s--", label="planned")
    axes.plot(ranks, [rows[0]["img_per_s"] / ranks[0] * n for n in ranks], ":", label="proportional")
    axes.set_xlabel("ranks")
    axes.set_ylabel("img/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.legend()
    figure.savefig(path)
    print(f"drawn: {path}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--ranks", default="1,2,4,8", help="numbers of ranks; the first has to be 1")
    parser.add_argument("--model", default="B/16")
    parser.add_argument("--batch", type=int, default=512, help="samples of each rank")
    parser.add_argument("--gpu", help="the GPU's name for the plan, if it is not an H100")
    parser.add_argument("--link", action="append", default=[], help="a link for the plan, as `vitrum plan` takes it")
    parser.add_argument("--set", action="append", default=[], help="a setting of the recipe, for both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--within", type=float, default=0.15, help="how far the plan may be off")
    parser.add_argument("--out", help="the file of the figures; the curve is drawn beside it")
    args = parser.parse_args()
    counts = [int(count) for count in args.ranks.split(",")]
    if counts[0] != 1:
        parser.error("--ranks begins with 1, which the others are compared with")
    out = args.out or os.path.join(os.environ.get("TMPDIR", "."), "scaling.json")

    load = os.getloadavg()[0]
    runs = {count: [] for count in counts}
    for _ in range(args.repeats):
        for count in counts:
            runs[count].append(measured(args, count))
            print(f"{count} ranks: {runs[count][-1]['ms_per_step']:.2f} ms", file=sys.stderr)
    # The run in the middle stands for its number of ranks.
    middle = [sorted(runs[count], key=lambda run: run["ms_per_step"])[args.repeats // 2] for count in counts]
    found = {"date": datetime.date.today().isoformat(), "load_before": load, "runs": middle}
    with open(out, "w") as file:
        json.dump(found, file, indent=1)

    rows = []
    for count, run_ in zip(counts, middle):
        plan = predicted(args, count, out)
        rows.append(
            {
                "ranks": count,
                "batch": args.batch,
                "ms_per_step": run_["ms_per_step"],
                "all_ms_per_step": [one["ms_per_step"] for one in runs[count]],
                "img_per_s": run_["img_per_s"],
                "efficiency": run_["img_per_s"] / count / middle[0]["img_per_s"],
                # The same step of each rank by itself, while the others do the same, over the common step.
                "efficiency_beside": (run_["row"] or {"efficiency": 1.0})["efficiency"],
                "plan_ms_per_step": plan["ms_per_step"],
                "plan_img_per_s": plan["img_per_s"],
                "plan_efficiency": plan["efficiency"],
                "off_by": plan["ms_per_step"] / run_["ms_per_step"] - 1,
            }
        )
    found |= {"rows": rows, "command": " ".join(command(args, counts[-1])[1:])}
    with open(out, "w") as file:
        json.dump(found, file, indent=1)
    print(table(rows), end="")
    print(f"load before: {load:.2f}; stored in {out}", file=sys.stderr)
    draw(rows, os.path.splitext(out)[0] + ".png")
    worst = max(abs(row["off_by"]) for row in rows)
    if worst > args.within:
        print(f"the plan is off by {100 * worst:.1f} %", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
