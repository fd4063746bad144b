#!/usr/bin/env python3
"""Does a run survive? Kills, flipped bits, and an hour of training, on CPU ranks under mpirun.

    benches/soak.py --vitrum target/release/vitrum                          20 kills, 500 flips, 60 minutes
    benches/soak.py --vitrum target/release/vitrum --kills 2 --flips 20 --minutes 1

1. A rank is killed (SIGKILL) at a random moment, every other time while a checkpoint is being written, and the run is
   resumed; in the end its checkpoint must have the bytes of an unbroken run in one process.
2. One random bit of a checkpoint's files is flipped: a resume must notice it. The same for a packed data set and
   `vitrum pack --check`.
3. A long run with many checkpoints and evaluations: resident memory, open files and threads of every rank must not grow.

Prints one line of JSON per part and exits with 1 if any failed. Needs mpirun for more than one rank.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

MODEL = [
    "model.image=32", "model.patch=8", "model.width=48", "model.depth=2", "model.heads=3", "model.dropout=0.1",
    "model.drop_path=0.1", "augment.mixup=0.2", "optim.ema=0.9", "optim.clip=1", "train.batch=32",
    "train.micro_batch=0", "train.reduce_chunks=4", "train.log_every=1", "train.eval_every=50", "train.timeout=30",
]
FILES = ["model.safetensors", "ema.safetensors", "state.safetensors"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", required=True, type=pathlib.Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(given, out, ranks, steps, every):
    command = [str(given.vitrum.resolve()), "train", "demo", "--device", "cpu", "--out", str(out), "--resume"]
    for setting in MODEL + [f"train.steps={steps}", f"train.checkpoint_every={every}"]:
        command += ["--set", setting]
    if ranks == 1:
        return command
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=True).stdout
    mpi = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    return ["mpirun", *mpi, "-n", str(ranks), *command]


def processes(out, ranks):
    """The processes of a run, by rank."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.split(b"=", 1) for v in (folder / "environ").read_bytes().split(b"\0") if b"=" in v)
        except OSError:
            continue
        if str(out).encode() not in words or words[0].endswith(b"mpirun"):
            continue
        rank = variables.get(b"OMPI_COMM_WORLD_RANK", variables.get(b"PMI_RANK", b"0" if ranks == 1 else None))
        if rank is not None:
            found[int(rank)] = int(folder.name)
    return found


def writes(out):
    folder = out / "checkpoints"
    return folder.is_dir() and any(name.startswith(".step-") for name in os.listdir(folder))


def result(out):
    return [(out / "checkpoints/last" / name).read_bytes() for name in FILES]


def kills(given, work):
    steps, every = 400, 3
    unbroken, out = work / "unbroken", work / "killed"
    subprocess.run(train(given, unbroken, 1, steps, every), check=True, capture_output=True)
    done = hit = 0
    slowest = 0.0
    while done < given.kills:
        run = subprocess.Popen(train(given, out, given.ranks, steps, every), stderr=subprocess.DEVNULL)
        started = time.time()
        moment = started + random.uniform(0.5, 4)
        wants_writing = done % 2 == 0
        while run.poll() is None and (time.time() < moment or (wants_writing and not writes(out))):
            time.sleep(0.001)
        ranks = processes(out, given.ranks)
        if run.poll() is not None or not ranks:
            run.wait()
            shutil.rmtree(out, ignore_errors=True)
            continue
        hit += writes(out)
        os.kill(random.choice(list(ranks.values())), signal.SIGKILL)
        killed = time.time()
        run.wait(timeout=120)
        while processes(out, given.ranks):
            if time.time() - killed > 120:
                return {"part": "kills", "ok": False, "why": "a rank outlived its run by two minutes"}
            time.sleep(0.1)
        slowest = max(slowest, time.time() - killed)
        done += 1
    subprocess.run(train(given, out, given.ranks, steps, every), check=True, capture_output=True)
    same = result(out) == result(unbroken)
    return {"part": "kills", "ok": same, "kills": done, "while_writing": hit, "slowest_end_seconds": round(slowest, 2)}


def flip(path):
    """Flips a random bit, and returns what flips it back."""
    length = path.stat().st_size
    at, bit = random.randrange(length), 1 << random.randrange(8)

    def again():
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ bit]))

    again()
    return again, f"{path.name}: bit {bit:#x} of byte {at}"


def flips(given, work):
    out = work / "unbroken"
    if not out.is_dir():
        subprocess.run(train(given, out, 1, 400, 3), check=True, capture_output=True)
    last = (out / "checkpoints/last").resolve()
    best = out / "checkpoints/best"
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.resolve() != last:
            shutil.rmtree(folder)
    best.unlink(missing_ok=True)
    names = [*FILES, "checkpoint.json"]
    missed = []
    for i in range(given.flips):
        back, what = flip(last / names[i % len(names)])
        done = subprocess.run(train(given, out, 1, 400, 3), capture_output=True, text=True)
        back()
        if done.returncode != 1 or "damaged" not in done.stderr:
            missed.append(what)
    whole = subprocess.run(train(given, out, 1, 400, 3), capture_output=True).returncode == 0
    pictures, packed = work / "pictures", work / "packed"
    for i in range(64):
        folder = pictures / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.randbytes(16 * 16 * 3)
        head = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54 + len(pixels), 0, 0, 54, 40, 16, 16, 1, 24, 0, 0, 0, 0, 0, 0)
        (folder / f"{i}.bmp").write_bytes(head + pixels)
    vitrum = str(given.vitrum.resolve())
    subprocess.run([vitrum, "pack", str(pictures), str(packed)], check=True, capture_output=True)
    shards = sorted(packed.rglob("*.safetensors"))
    for i in range(given.flips):
        back, what = flip(shards[i % len(shards)])
        if subprocess.run([vitrum, "pack", str(shards[0].parent), "--check"], capture_output=True).returncode == 0:
            missed.append(what)
        back()
    return {"part": "flips", "ok": not missed and whole, "flips": 2 * given.flips, "missed": missed[:10]}


def sample(pid):
    """Resident KiB, open files, threads."""
    status = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return int(status["VmRSS"].split()[0]), files, int(status["Threads"])


def soak(given, work):
    out = work / "soaked"
    run = subprocess.Popen(train(given, out, given.ranks, 100_000_000, 20), stderr=subprocess.DEVNULL)
    end, samples = time.time() + 60 * given.minutes, {}
    # The first tenth warms up.
    begin = time.time() + 6 * given.minutes
    while time.time() < end and run.poll() is None:
        time.sleep(min(5, given.minutes))
        for rank, pid in processes(out, given.ranks).items():
            try:
                if time.time() > begin:
                    samples.setdefault(rank, []).append(sample(pid))
            except OSError:
                pass
    alive = run.poll() is None
    for pid in processes(out, given.ranks).values():
        os.kill(pid, signal.SIGUSR1)
        break
    code = run.wait(timeout=120)
    grown = {}
    for rank, seen in samples.items():
        half = len(seen) // 2
        for index, (name, slack) in enumerate([("memory_kib", 4096), ("files", 3), ("threads", 2)]):
            before = max(values[index] for values in seen[:half] or seen)
            after = max(values[index] for values in seen[half:])
            grown[f"{name}_{rank}"] = [before, after]
            alive = alive and after <= before * 1.02 + slack
    steps = sum(1 for line in open(out / "metrics.jsonl") if '"loss"' in line)
    return {"part": "soak", "ok": alive and code == 143, "code": code, "minutes": given.minutes, "lines": steps, **grown}


def main():
    given = arguments()
    random.seed(given.seed)
    good = True
    with tempfile.TemporaryDirectory() as work:
        os.environ["VITRUM_CACHE"] = f"{work}/cache"
        for part, wanted in [(kills, given.kills), (flips, given.flips), (soak, given.minutes)]:
            if wanted > 0:
                done = part(given, pathlib.Path(work))
                print(json.dumps(done), flush=True)
                good = good and done["ok"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
