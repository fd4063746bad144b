#!/usr/bin/env python3
"""The first minutes on a GPU: is it correct, how fast is it, and what was expected. One command, one table.

    python3 benches/first_run.py --vitrum target/release/vitrum --out first
    python3 benches/first_run.py --out more --phases peers-compiled,peers-autotune --minutes 9 --add first/first-run.json

Needs a GPU, its driver and a Python without packages; if this Python has PyTorch, it is compared. `scripts/carry` makes a folder for a
machine that has nothing else. Phases run in the order of `--list`, the most important first, each command under a limit. A phase that
fails does not stop the others; one that does not fit into the remaining minutes is reported as skipped. `first-run.json` and
`first-run.md` in OUT are rewritten after each command and `logs/PHASE.log` while it runs, so that nothing is lost if the script is
stopped. With `--add`, the phases of an earlier run on the same GPU become part of the table.

On the stand-in GPU, or with `--tiny`, every phase runs at sizes that say nothing about speed. Exit codes: 0 if every phase passed, or
was skipped for lack of PyTorch; 1 otherwise.
"""
import argparse
import datetime
import glob
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Callable, NamedTuple

sys.dont_write_bytecode = True
import compare_gpu
import first_run_curve
import first_run_table
from processes import Commands, Wrong, objects, one_object, say, write_whole

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
# The most important first; the models whose steps are compared with PyTorch.
STEPS = ("B/16", "S/16", "L/16", "Ti/16")
# Attention at all named sizes, each with about as many rows as in `vitrum bench --what kernels`.
ATTENTION = ("B/16", "L/16", "S/16", "Ti/16", "H/14", "B/16@384")
ROWS = 100_864


class Phase(NamedTuple):
    """Commands that answer one question."""

    name: str
    usual: float  # seconds of one command, a guess: with less time left it is not begun
    each: float  # limit of one command
    limit: float  # limit of all
    asks: str
    commands: Callable  # of the run, to `Command`s; may look at what earlier ones found
    torch: bool = False  # it is about PyTorch: without one there is nothing to do


class Command(NamedTuple):
    words: list
    read: Callable  # from what it prints to rows of the record; raises `Wrong`
    needs_libraries: bool = True  # of CUDA; PyTorch finds its own


class Run:
    """Shared by the phases: the program, the GPU and the peer, once the first phases have found them."""

    def __init__(self, args):
        self.vitrum, self.tiny = os.path.abspath(args.vitrum), args.tiny
        self.card = self.torch = self.torch_device = None
        self.worked = None  # whether the last command did
        self.scratch = tempfile.mkdtemp(prefix="first-run-")

    @property
    def torch_env(self):
        """PyTorch finds its own libraries, and must not find the stand-in's."""
        return {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH" or not is_stand_in(self.card)}

    @property
    def bench(self):
        """The arguments in `compare_gpu`'s form."""
        cases = compare_gpu.TINY if self.tiny else compare_gpu.CASES
        rounds, seconds = (1, 0.0) if self.tiny else (3, 0.5)
        return SimpleNamespace(cases=cases, rounds=rounds, seconds=seconds, tiny=self.tiny, torch_device=self.torch_device)

    @property
    def models(self):
        return list(compare_gpu.TINY) if self.tiny else STEPS

    def program(self, *words, read):
        return Command([self.vitrum, *words, "--json"], lambda output: read(one_object(output)))


# ---- The phases: commands, and how their results are read ----


def doctor(run):
    def read(found):
        run.card = (found["cuda"] or {}).get("name")
        run.tiny = run.tiny or is_stand_in(run.card)
        row = {"card": run.card, **{key: found[key] for key in ("version", "kernels", "kernel_targets", "processor", "cores")}}
        row |= {"commit": found.get("commit"), **(found["cuda"] or {})}
        if found["device"] != "cuda":
            raise Wrong(f"no card is used: {found['device_reason']}", [row])
        return [row]

    yield run.program("doctor", read=read)


def torch(run):
    def read(output):
        found = objects(output)[-1]
        run.torch = found["torch"]
        if not (found["cuda"] or run.tiny):
            raise Wrong(f"PyTorch {run.torch} sees no card", [found])
        run.torch_device = "cuda" if found["cuda"] else "cpu"
        return [found]

    look = "import json, torch; print(json.dumps({'torch': torch.__version__, 'cuda': torch.cuda.is_available()}))"
    yield Command([sys.executable, "-c", look], read, needs_libraries=False)


def selftest(*words, tiny):
    def read(found):
        failures = [case for case in found["results"] if not case["passed"]]
        trainings = [{key: proof[key] for key in ("device", "distance", "tolerance", "repeats")} for proof in found["training"]]
        row = {"cases": int(found["cases"]), "failed": int(found["failed"]), "training": trainings, "failures": failures[:20]}
        if found["passed"] is not True:
            agrees = lambda proof: proof["repeats"] and proof["distance"] is not None and proof["distance"] <= proof["tolerance"]
            apart = [proof["device"] for proof in trainings if not agrees(proof)]
            raise Wrong("; ".join([f"{row['failed']} of {row['cases']} cases failed", *(f"training: {device}" for device in apart)]), [row])
        return [row]

    def commands(run):
        yield run.program("selftest", "--device", "cuda", *(tiny if run.tiny else words), read=read)

    return commands


def choices(run):
    """Nothing is cached yet: the ways of matrix products are timed and chosen here, and the first start is measured."""
    for model in run.models:
        brief = run.bench
        brief.rounds, brief.seconds = 1, 0.0
        yield run.program(*compare_gpu.bench_words(brief, "train", model, "bf16"), read=partial(step, model, "bf16"))


def steps(run):
    for model in run.models:
        for mode in compare_gpu.VARIANTS["train"]:
            words = compare_gpu.bench_words(run.bench, "train", model, mode)
            yield run.program(*words, read=partial(step, model, mode))


def step(model, mode, found):
    row = compare_gpu.bench_row(found, mode)
    check_rates(row, "img_per_s", "ms", "first_step_s", "memory_bytes")
    row |= {"model": model, "batch": found["batch"], "planned_bytes": found["arena_bytes"]}
    # How each matrix product is computed, if the program reports it.
    products = [{**p, "microseconds": {**p["microseconds"]}} for p in found.get("products") or []]
    for product in products:
        check_rates(product["microseconds"], *product["microseconds"])
    return [row | {"products": [{key: p[key] for key in ("product", "way", "microseconds")} for p in products]}]


def peers(*modes):
    """The first mode that works."""

    def commands(run):
        left = list(modes)
        for model in run.models:
            while left:
                words = compare_gpu.pytorch_words(run.bench, "train", model, left[0])
                yield Command(words, partial(peer, model), needs_libraries=False)
                if run.worked:
                    break
                left = left[1:]

    return commands


def peer(model, output):
    row = objects(output)[-1]
    check_rates(row, "img_per_s", "ms", "first_step_s")
    return [row | {"model": model}]


def kernels(run):
    few = ["--few", "--filter", "qkv, bias Ti/16"]
    for words in [few] if run.tiny else [["--rounds", "3", "--seconds", "0.02", "--filter", f"{model} ["] for model in (*STEPS, "H/14")]:
        yield run.program("bench", "--what", "kernels", "--device", "cuda", *words, read=operations)


def operations(found):
    ceilings = {key: found[key] for key in ("copy_bytes_per_s", "product_flops_per_s")}
    check_rates(ceilings, *ceilings)
    rows = [{key: o[key] for key in ("operation", "shape", "ms", "bytes", "flops", "of_copy", "of_product")} for o in found["operations"]]
    for row in rows:
        check_rates(row, "ms")
    return [*rows, ceilings]


def attention(run):
    words = ["--few", "--filter", "3 heads of 64"] if run.tiny else ["--rounds", "3", "--seconds", "0.05", "--filter", " heads of "]
    yield run.program("bench", "--what", "kernels", "--device", "cuda", *words, read=attention_times)


def attention_times(found):
    # Operations that PyTorch also has; `attention_backward, bias` also computes the bias gradient of `qkv`.
    directions = {"attention": "forward", "attention_backward": "backward"}
    rows = []
    for o in found["operations"]:
        if o["operation"] not in directions:
            continue
        model, images = re.match(r"(.+) \[(\d+), .* tokens", o["shape"])[1].replace(" at ", "@"), images_of(o["shape"])
        check_rates(o, "ms")
        rows.append({"engine": found["engine"], "model": model, "images": images, "direction": directions[o["operation"]], "ms": o["ms"]})
    if not rows:
        raise Wrong("timed no attention")
    return rows


def images_of(shape):
    rows, tokens = map(int, re.search(r"\[(\d+), \d+\], (\d+) tokens", shape).groups())
    return rows // tokens


def peers_attention(run):
    shapes = ["Ti/16,1,197,3,64"]
    if not run.tiny:
        cases = {model: compare_gpu.CASES[model] for model in ATTENTION}
        tokens = {model: (image // patch) ** 2 + 1 for model, (image, patch, *_) in cases.items()}
        shapes = [f"{m},{ROWS // tokens[m]},{tokens[m]},{heads},{width // heads}" for m, (_, _, width, _, heads, _) in cases.items()]
    words = [sys.executable, os.path.join(HERE, "attention_torch.py"), *shapes, "--device", run.torch_device]
    yield Command(words + ["--rounds", "1", "--seconds", "0"] * run.tiny, backends, needs_libraries=False)


def backends(output):
    rows = objects(output)
    for row in rows:
        if "refused" not in row:
            check_rates(row, "ms")
    return [{key: row[key] for key in ("engine", "backend", "model", "direction", "ms", "refused") if key in row} for row in rows]


def curve(run):
    size, out = "tiny" if run.tiny else "full", os.path.join(run.scratch, "curve")

    def read(_):
        found, cpu = first_run_curve.read(out), first_run_curve.kept(size)
        # Rounding alone changes the CPU's own curve by this much.
        apart, rounding = farthest(found["loss"], cpu["f32"]["loss"]), farthest(cpu["bf16"]["loss"], cpu["f32"]["loss"])
        row = {**found, "cpu": cpu["f32"], "apart": apart, "rounding": rounding, "allowed": 3 * rounding + 0.005}
        if not apart <= row["allowed"]:
            raise Wrong(f"the loss is {apart:.3f} from the CPU's, of which rounding explains {rounding:.3f}", [row])
        return [row]

    yield Command(first_run_curve.words(run.vitrum, size, "cuda", out), read)


def farthest(a, b):
    if len(a) != len(b):
        raise Wrong(f"the curve has {len(a)} points, not {len(b)}")
    return max(abs(x - y) for x, y in zip(a, b))


def gradients(run):
    """Compared with PyTorch's if possible, else with the CPU's."""
    out = os.path.join(run.scratch, "gradients.json")
    if run.torch and run.torch_device == "cuda" and importlib.util.find_spec("safetensors"):
        words = [sys.executable, os.path.join(HERE, "gradients.py"), "--vitrum", run.vitrum, "--cases", "long,deep", "--json", out]
    else:
        words = [sys.executable, os.path.join(HERE, "gradients_alone.py"), "--vitrum", run.vitrum, "--json", out] + ["--tiny"] * run.tiny

    def read(_):
        with open(out) as file:
            rows = json.load(file)["rows"]
        expected = expected_gradients()
        kept = []
        for row in rows:
            likely = row.get("expected") or expected.get((row["case"], row["engine"]))
            kept.append({"case": row["case"], "engine": row["engine"], "apart": row["all"], "expected": likely})
        ours = [row for row in kept if row["engine"].startswith("vitrum, stream")]
        far = [f"{r['case']}, {r['engine']}" for r in ours if not r["apart"] <= 2 * r["expected"]]
        if far or not ours:
            raise Wrong(f"gradients are more than twice as far as expected: {'; '.join(far)}", kept)
        return kept

    yield Command(words, read)


def expected_gradients():
    """(case, engine) → the last recorded result of the stand-in GPU."""
    with open(max(glob.glob(os.path.join(HERE, "results", "*-gradients.json")))) as file:
        return {(row["case"], row["engine"]): row["all"] for row in json.load(file)["rows"]}


def check_rates(row, *keys):
    for key in keys:
        if not (isinstance(row[key], (int, float)) and 0 < row[key] < math.inf):
            raise Wrong(f"`{key}` is {row[key]!r}")


FILTERED = ["--precision", "bf16", "--filter"]
PHASES = [
    #     name, seconds of a command (a guess), its limit, the limit of all, the question
    Phase("doctor", 3, 30, 30, "is there a card, and is it used?", doctor),
    Phase("torch", 8, 60, 60, "is there a PyTorch that sees it?", torch, torch=True),
    Phase("selftest-matmul", 10, 90, 90, "are matrix products those of float64?", selftest(*FILTERED, "matmul", tiny=[*FILTERED, "matmul none"])),
    Phase("selftest-attention", 10, 90, 90, "is attention?", selftest(*FILTERED, "attention", tiny=[*FILTERED, "attention: B 1"])),
    Phase("selftest-training", 10, 60, 60, "are whole steps those of the CPU, and repeatable?", selftest("--filter", "training", tiny=[*FILTERED, "training"])),
    Phase("choices", 8, 60, 150, "which way is each product computed, and how long does a first start take?", choices),
    Phase("steps", 5, 30, 180, "images per second, memory, a later start", steps),
    Phase("curve", 10, 60, 60, "do 200 steps of `mini/cifar10` follow the CPU?", curve),
    Phase("gradients", 40, 90, 90, "how far are gradients from float64?", gradients),
    Phase("kernels", 15, 60, 150, "rates of matrix products and of a copy", kernels),
    Phase("attention", 10, 60, 60, "attention, forward and backward", attention),
    Phase("peers-attention", 30, 90, 90, "PyTorch's attention, by each of its backends", peers_attention, torch=True),
    Phase("peers-eager", 12, 60, 120, "PyTorch's steps", peers("eager"), torch=True),
    Phase("peers-compiled", 50, 150, 400, "PyTorch's steps, compiled", peers("compile+cudnn", "compile+flash"), torch=True),
    Phase("selftest-rest", 60, 300, 300, "are all operations those of float64, in all precisions?", selftest(tiny=[*FILTERED, "layernorm: "])),
    Phase("peers-autotune", 120, 300, 600, "PyTorch's steps, compiled with max-autotune", peers("autotune+cudnn", "autotune+flash"), torch=True),
]


# ---- One phase after the other ----


class Record:
    """The results so far, in OUT: complete at any moment."""

    def __init__(self, out, head):
        self.out, self.head, self.phases, self.predictions, self.warned = out, head, {}, {}, False

    def write(self):
        """Also writes the text for people."""
        whole = {**self.head, "phases": self.phases, "predictions": self.predictions}
        try:
            whole["table"] = first_run_table.rows(whole)
            text = first_run_table.markdown(whole)
        except Exception as e:
            # Results are worth more than their rendering: any failure of the table is tolerated.
            text = whole["table"] = f"no table can be made of first-run.json: {type(e).__name__}: {e}\n"
        try:
            write_whole(os.path.join(self.out, "first-run.json"), json.dumps(plain(whole), indent=1) + "\n")
            write_whole(os.path.join(self.out, "first-run.md"), text)
        except OSError as e:
            if not self.warned:
                say(f"warning: {self.out} cannot be written any more: {e.strerror}")
            self.warned = True
        return text

    def add(self, earlier, path):
        """Results of another run for phases that this one does not have, if it was the same program on the same GPU."""
        for key in ("card", "commit"):
            if earlier.get(key) != self.head[key]:
                say(f"warning: {path} is left out: its {key} is {earlier.get(key)}, not {self.head[key]}")
                return
        found = {name: phase for name, phase in earlier["phases"].items() if phase["rows"]}
        self.phases = {**found, **self.phases}


def plain(value):
    """Without the numbers that JSON does not support."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def perform(phase, run, commands, record):
    """Runs a phase, and saves its results after each command."""
    state = record.phases[phase.name] = {"state": "running", "why": None, "seconds": 0.0, "commands": [], "rows": []}
    begin = commands.elapsed()
    record.write()

    def end(verdict, why=None):
        state["state"], state["why"], state["seconds"] = verdict, why, round(commands.elapsed() - begin, 2)
        record.write()
        say(f"[{commands.elapsed():4.0f} s] {phase.name:20}{verdict}{f': {why}' if why else ''}")

    if phase.torch and not importlib.util.find_spec("torch"):
        return end("absent", "this Python has no torch")
    if phase.torch and phase.name != "torch" and not run.torch_device:
        return end("absent", "there is no PyTorch that sees the card")
    wrong, done = [], 0
    for command in phase.commands(run):
        if commands.signal:
            return end("interrupted", f"by {commands.signal}")
        if commands.left() < phase.usual:
            where = f"after {done} commands " if state["commands"] else ""
            left = f"{where}{commands.left():.0f} s were left, and a command usually takes {phase.usual:.0f}"
            return end("failed" if wrong else "cut short" if done else "skipped", "; ".join([*wrong, left]))
        limit = min(phase.each, phase.limit - (commands.elapsed() - begin))
        if limit <= 0:
            wrong.append(f"its {phase.limit:.0f} s were up after {done} commands")
            break
        ended = commands.run(phase.name, command.words, limit, commands.env if command.needs_libraries else run.torch_env)
        rows, why = read(command, ended)
        run.worked = not why
        state["rows"] += rows
        state["commands"].append({"words": command.words, "code": ended.code, "seconds": round(ended.seconds, 2), "why": why})
        record.write()
        if commands.signal:
            return end("interrupted", f"by {commands.signal}")
        if ended.out_of_time:
            return end("failed" if wrong else "cut short", "; ".join([*wrong, "the time of the whole run was up"]))
        if why:
            wrong.append(why)
        done += not why
    end("failed" if wrong else "passed", "; ".join(wrong) or None)


def read(command, ended):
    """Rows, and what was wrong: a failed command may also have produced rows."""
    try:
        return command.read(ended.output), ended.why
    except Wrong as wrong:
        return wrong.rows, ended.why or str(wrong)
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as e:
        return [], ended.why or f"what it gives is not as expected: {type(e).__name__}: {e}"


def predict(run, commands):
    """The predictions of `scripts/predict-gpu` for this GPU: with a stream in bf16, and in f32."""
    found, script = {}, os.path.join(ROOT, "scripts", "predict-gpu")
    for residual in ("bf16", "f32"):
        ended = commands.run("predictions", [sys.executable, script, "--json", "--residual", residual], 20)
        try:
            if ended.why:
                raise Wrong(ended.why)
            cards = one_object(ended.output)["cards"]
            name = first_run_table.card_of(run.card, cards)
            found[residual] = first_run_table.digest(cards.get(name, {}))
        except (Wrong, LookupError, TypeError, AttributeError) as why:
            say(f"note: no predictions: {why}")
            return {"why": str(why)}
        if not name:
            return {"why": f"no predictions for {run.card}"}
    return {"card": name, **found}


def is_stand_in(card):
    return (card or "").startswith("Vitrum stand-in")


def cuda_libraries():
    """Folders with cuBLASLt among this Python's packages, the newest version first."""
    found = {}
    for folder in sys.path:
        for path in glob.glob(os.path.join(folder, "nvidia", "*", "lib", "libcublasLt.so*")):
            version = re.search(r"\.so\.(\d+)", path)
            found[os.path.dirname(path)] = int(version[1]) if version else 0
    return sorted(found, key=found.get, reverse=True)


def environment(scratch):
    """The environment of commands that open CUDA's libraries: the caller's settings come first. Nothing of earlier runs is cached."""
    env = dict(os.environ, VITRUM_CACHE=os.path.join(scratch, "cache"))
    folders = [*filter(None, env.get("LD_LIBRARY_PATH", "").split(":")), *cuda_libraries()]
    if folders:
        env["LD_LIBRARY_PATH"] = ":".join(folders)
    # On the stand-in the phases are only exercised, and checks would take most of the time.
    return {"VITRUM_STANDIN": "checks=off", **env}


def commit_of(row):
    """What was built: from the program, else from the carried folder."""
    if row.get("commit"):
        return row["commit"]
    try:
        with open(os.path.join(ROOT, "commit")) as file:
            return file.read().strip() or None
    except OSError:
        return None


def chosen(names):
    """Phases by name, plus those that others depend on."""
    known = [phase.name for phase in PHASES]
    wanted = known if names is None else [name for name in names.split(",") if name]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        refuse(f"no phase `{unknown[0]}`: {', '.join(known)}")
    needs = {"doctor"} | {"torch" for phase in PHASES if phase.name in wanted and (phase.torch or phase.name == "gradients")}
    return [phase for phase in PHASES if phase.name in needs | set(wanted)]


def program():
    carried = os.path.join(ROOT, "vitrum")
    return carried if os.path.exists(carried) else "target/release/vitrum"


def refuse(why):
    raise SystemExit(f"error: {why}")


def read_earlier(path):
    with open(path) as file:
        try:
            found = one_object(file.read())
            if all(isinstance(phase["rows"], list) for phase in found["phases"].values()):
                return found
        except (Wrong, LookupError, TypeError, AttributeError):
            pass
    refuse(f"{path} is no first-run.json of an earlier run")


def listed():
    lines = [[p.name, f"{p.usual:.0f} s", f"{p.each:.0f} s", f"{p.limit:.0f} s", p.asks] for p in PHASES]
    return "\n".join(first_run_table.table(["phase", "a command", "at most", "all at most", "asks"], lines))


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default=program(), help="the program [default: that of a carried folder, else target/release/vitrum]")
    parser.add_argument("--out", default="first-run", help="folder of the results")
    parser.add_argument("--logs", help="folder of the logs, where that of the results has to stay small [default: OUT/logs]")
    parser.add_argument("--phases", help="only these, separated by commas, and those that find the card and the PyTorch")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all of it")
    parser.add_argument("--add", metavar="FILE", help="the first-run.json of an earlier run: what it has and this one has not")
    parser.add_argument("--tiny", action="store_true", help="sizes for a look at the script itself")
    parser.add_argument("--list", action="store_true", help="name the phases, with seconds as guessed and limits")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.list:
        print(listed())
        return 0
    phases = chosen(args.phases)
    if not os.path.isfile(args.vitrum):
        refuse(f"{args.vitrum} is not there: `--vitrum` names the program")
    if not os.access(args.vitrum, os.X_OK):
        refuse(f"{args.vitrum} cannot be executed: `chmod +x {args.vitrum}`")
    logs = args.logs or os.path.join(args.out, "logs")
    head = {"date": datetime.date.today().isoformat(), "commit": None, "card": None, "stand_in": False, "tiny": args.tiny, "torch": None}
    head |= {"minutes": args.minutes, "ended": None}
    record = Record(args.out, head)
    if os.path.exists(os.path.join(args.out, "first-run.json")):
        refuse(f"{args.out} holds the results of an earlier run: `--out` names another folder")
    try:
        added = read_earlier(args.add) if args.add else None
        os.makedirs(args.out, exist_ok=True)
        os.makedirs(logs, exist_ok=True)
        write_whole(os.path.join(args.out, "first-run.json"), "{}\n")
    except OSError as e:
        refuse(f"{e.filename}: {e.strerror}")
    run = Run(args)
    try:
        commands = Commands(logs, 60 * args.minutes, run.scratch, environment(run.scratch))
        commands.note_signals()
        for phase in phases:
            perform(phase, run, commands, record)
            head["torch"] = run.torch
            if phase.name == "doctor":
                row = next(iter(record.phases["doctor"]["rows"]), {})
                head |= {"card": run.card, "stand_in": is_stand_in(run.card), "tiny": run.tiny, "commit": commit_of(row)}
                record.predictions = predict(run, commands)
        if added:
            record.add(added, args.add)
        head["ended"] = commands.signal or "by itself"
        say("\n" + record.write())
    finally:
        shutil.rmtree(run.scratch, ignore_errors=True)
    unlike = [phase.name for phase in phases if record.phases[phase.name]["state"] not in ("passed", "absent")]
    if unlike:
        say(f"not passed: {', '.join(unlike)}")
    return 1 if unlike else 0


if __name__ == "__main__":
    sys.exit(main())
