"""Vitrum's input pipeline compared with torchvision, OpenCV and Pillow: the same files, the same core, in one run.

Every engine runs in its own process on one pinned core, on data in memory, and its own CPU time counts, so that a busy machine changes
the figures little. Each case runs twice, the second time in the opposite order; medians of rounds are averaged. Vitrum is also
measured unpinned, for its loader with all workers.

    python benches/compare_data.py --photos DIR --cifar cifar10.tar --json benches/results/NAME.json

DIR is an image folder; only its colour JPEGs are used, because grey ones are faster. Needs a Python with numpy and Pillow. A peer that
cannot be imported (torch with torchvision, cv2) is skipped with one line. FFCV is not included: it reads only its own files, and
builds only with a system's OpenCV.

Cases
  jpeg              decode, random-resized-crop 224 (area .08-1, ratio 3/4-4/3), flip, to u8. OpenCV's resize is not
                    antialiased: other pixels, less work.
  jpeg_randaugment  the same with RandAugment(2, 15)
  raw_crop          u8 pixels of 256x256: random crop 224, flip
  raw_rrc           the same pixels: random-resized-crop 224, flip
  cifar             32x32: 4 pixels of black around, random crop 32, flip
  cifar_randaugment the same with RandAugment(2, 15)
"""
import argparse
import datetime
import glob
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

RANDAUGMENT = "augment.randaugment=tf(2,15)"
#       data, size, settings
CASES = {
    "jpeg": ("jpeg", 224, ["augment.crop=torch"]),
    "jpeg_randaugment": ("jpeg", 224, ["augment.crop=torch", RANDAUGMENT]),
    "raw_crop": ("raw", 224, ["augment.crop=resize", "augment.resize=256"]),
    "raw_rrc": ("raw", 224, ["augment.crop=torch"]),
    "cifar": ("cifar", 32, ["augment.crop=pad", "augment.pad=4"]),
    "cifar_randaugment": ("cifar", 32, ["augment.crop=pad", "augment.pad=4", RANDAUGMENT]),
}
PEERS = {
    "jpeg": ["torchvision", "torchvision on Pillow", "OpenCV, not antialiased"],
    "jpeg_randaugment": ["torchvision", "torchvision on Pillow"],
    "raw_crop": ["torchvision", "OpenCV"],
    "raw_rrc": ["torchvision", "OpenCV, not antialiased"],
    "cifar": ["torchvision", "OpenCV"],
    "cifar_randaugment": ["torchvision", "torchvision on Pillow"],
}


def rrc_box(width, height):
    """torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def samples(case, scratch):
    """The case's samples in a peer's form: encoded bytes, or numpy arrays [H, W, 3]."""
    import numpy
    from PIL import Image

    data = CASES[case][0]
    if data == "cifar":
        with tarfile.open(os.path.join(scratch, "cifar.tar")) as tar:
            members = [m for m in tar.getmembers() if m.name.endswith(".png")][:2000]
            return [numpy.array(Image.open(tar.extractfile(m)).convert("RGB")) for m in members]
    files = sorted(glob.glob(os.path.join(scratch, "photos", "*", "*")))
    encoded = [open(file, "rb").read() for file in files]
    if data == "jpeg":
        return encoded

    def square(picture):
        picture = picture.convert("RGB")
        scale = 256 / min(picture.size)
        picture = picture.resize([max(256, round(side * scale)) for side in picture.size], Image.BICUBIC)
        left, top = (picture.width - 256) // 2, (picture.height - 256) // 2
        return numpy.array(picture.crop((left, top, left + 256, top + 256)))

    return [square(Image.open(io.BytesIO(bytes_))) for bytes_ in encoded]


def torchvision_work(case, on_pillow, data):
    import torch

    torch.set_num_threads(1)
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    size = CASES[case][1]
    steps = {
        "jpeg": [v2.RandomResizedCrop(size, antialias=True)],
        "raw_crop": [v2.RandomCrop(size)],
        "raw_rrc": [v2.RandomResizedCrop(size, antialias=True)],
        "cifar": [v2.RandomCrop(size, padding=4)],
    }[case.removesuffix("_randaugment")] + [v2.RandomHorizontalFlip()]
    if case.endswith("_randaugment"):
        steps.append(v2.RandAugment(2, 15))
    version = f"torchvision {__import__('torchvision').__version__}"
    if on_pillow:
        transform = v2.Compose(steps + [v2.PILToTensor()])
        if case.startswith("jpeg"):
            return version, data, lambda b: transform(Image.open(io.BytesIO(b)).convert("RGB"))
        return version, [Image.fromarray(a) for a in data], transform
    transform = v2.Compose(steps)
    if case.startswith("jpeg"):
        data = [torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in data]
        return version, data, lambda b: transform(decode_jpeg(b, mode=ImageReadMode.RGB))
    return version, [torch.from_numpy(a.transpose(2, 0, 1).copy()) for a in data], transform


def opencv_work(case, data):
    import cv2
    import numpy

    cv2.setNumThreads(1)
    size = CASES[case][1]

    def flipped(picture):
        return cv2.flip(picture, 1) if random.random() < 0.5 else numpy.ascontiguousarray(picture)

    def resized(picture):
        x, y, w, h = rrc_box(picture.shape[1], picture.shape[0])
        return flipped(cv2.resize(picture[y : y + h, x : x + w], (size, size), interpolation=cv2.INTER_LINEAR))

    def cropped(picture):
        y, x = (random.randint(0, side - size) for side in picture.shape[:2])
        return flipped(picture[y : y + size, x : x + size])

    work = {
        "jpeg": lambda b: resized(cv2.imdecode(b, cv2.IMREAD_COLOR_RGB)),
        "raw_crop": cropped,
        "raw_rrc": resized,
        "cifar": lambda a: cropped(cv2.copyMakeBorder(a, 4, 4, 4, 4, cv2.BORDER_CONSTANT)),
    }[case]
    if case == "jpeg":
        data = [numpy.frombuffer(b, numpy.uint8) for b in data]
    return f"OpenCV {cv2.__version__}", data, work


def time_peer(case, peer, scratch, rounds, seconds):
    """Runs in a separate process."""
    random.seed(0)
    data = samples(case, scratch)
    if peer.startswith("torchvision"):
        version, data, work = torchvision_work(case, peer.endswith("Pillow"), data)
    else:
        version, data, work = opencv_work(case, data)
    for sample in data:
        work(sample)
    rates = []
    for _ in range(rounds):
        begin, count = time.process_time(), 0
        while time.process_time() - begin < seconds:
            for sample in data:
                work(sample)
            count += len(data)
        rates.append(count / (time.process_time() - begin))
    return {"engine": peer, "version": version, "img_per_s": statistics.median(rates)}


def pinned():
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run_peer(args, case, peer, scratch):
    command = [sys.executable, __file__, "--child", case, peer, scratch]
    command += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pinned, env=env)
    if done.returncode:
        print(f"{case}: {peer} left out: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_vitrum(args, vitrum, case, scratch, one_core):
    data, size, settings = CASES[case]
    command = [vitrum, "bench", "--what", "data", "--data", os.path.join(scratch, data), "--json"]
    command += ["--model", "Ti/16" if size == 224 else "Ti/4", "--batch", "128" if size == 224 else "512"]
    command += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    for setting in [f"model.image={size}", *settings]:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=pinned if one_core else None)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def vitrum_rows(args, vitrum, case, scratch):
    """On the core of the peers, and then on all cores."""
    one, whole = (run_vitrum(args, vitrum, case, scratch, one_core) for one_core in (True, False))
    label = "vitrum" if len(args.vitrum) == 1 else f"vitrum ({vitrum})"
    stages = {s["stage"]: s["us"] for s in one["stages"]}
    workers = whole["workers"]
    return [
        {
            "engine": label,
            "version": f"{one['engine']}; {one['jpeg_decoder']}",
            "img_per_s": one["img_per_s_one_core"],
            "stages_us": stages,
            "decode_img_per_s": 1e6 / (stages["read"] + stages["decode"]),
            "copy_img_per_s_cached": one["copy_img_per_s_cached"],
            "copy_img_per_s_ring": one["copy_img_per_s_ring"],
        },
        {"engine": f"{label}, loader, 1", "img_per_s": whole["img_per_s_one_worker"]},
        {"engine": f"{label}, loader, {workers}", "img_per_s": whole["img_per_s"]},
        {"engine": f"{label}, {workers} cores, no loader", "img_per_s": whole["img_per_s_all_cores"]},
    ]


def prepare(args, scratch):
    """The colour JPEGs of the folder, packed in both forms, and CIFAR."""
    from PIL import Image

    colour = []
    for file in sorted(glob.glob(os.path.join(args.photos, "**", "*.*"), recursive=True)):
        if file.lower().endswith((".jpg", ".jpeg")) and Image.open(file).mode == "RGB":
            folder = os.path.join(scratch, "photos", os.path.basename(os.path.dirname(file)))
            os.makedirs(folder, exist_ok=True)
            with open(file, "rb") as source, open(os.path.join(folder, os.path.basename(file)), "wb") as copy:
                copy.write(source.read())
            colour.append(os.path.getsize(file))
    os.symlink(os.path.abspath(args.cifar), os.path.join(scratch, "cifar.tar"))
    photos = os.path.join(scratch, "photos")
    for source, name, more in [(photos, "jpeg", []), (photos, "raw", ["--format", "raw", "--size", "256"]), (args.cifar, "cifar", [])]:
        subprocess.run([args.vitrum[0], "pack", source, os.path.join(scratch, name), *more], check=True, capture_output=True)
    return len(colour), sum(colour) / len(colour)


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            fields = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", nargs="+", default=["target/release/vitrum"], help="one or more builds")
    parser.add_argument("--photos", help="an image folder with JPEGs")
    parser.add_argument("--cifar", help="a tar archive of CIFAR-10's pictures as PNG, train/CLASS/NAME.png")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--commit", help="what was measured, for the record")
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "PEER", "SCRATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(time_peer(*args.child, args.rounds, args.seconds)))
        return
    if not args.photos or not args.cifar:
        parser.error("name the pictures: --photos DIR --cifar TAR")

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        count, mean = prepare(args, scratch)
        name = processor()
        print(f"{name}; {count} colour JPEGs of {mean / 1024:.0f} KiB in the mean; img/s of one core, by CPU time")
        print(f"{'case':<20}{'engine':<32}{'img/s':>12}{'vitrum is':>12}")
        for case in args.cases.split(","):
            jobs = [lambda v=v: vitrum_rows(args, v, case, scratch) for v in args.vitrum]
            jobs += [lambda p=peer: [run_peer(args, case, p, scratch)] for peer in PEERS[case]]
            found = {}
            for job in jobs + jobs[::-1]:
                for row in filter(None, job()):
                    found.setdefault(row["engine"], []).append(row)
            ours = statistics.mean(r["img_per_s"] for r in next(iter(found.values())))
            for engine, both in found.items():
                row = {"case": case, **both[0], "img_per_s": statistics.mean(r["img_per_s"] for r in both)}
                row["runs"] = [r["img_per_s"] for r in both]
                is_peer = engine in PEERS[case]
                if is_peer:
                    row["vitrum_is"] = ours / row["img_per_s"]
                ratio = f"{row['vitrum_is']:>11.2f}x" if is_peer else ""
                print(f"{case:<20}{engine:<32}{row['img_per_s']:>12,.0f}{ratio}", flush=True)
                rows.append(row)
            whole = next(r for r in rows if r["case"] == case)
            stages = ", ".join(f"{stage} {us:.2f}" for stage, us in whole["stages_us"].items())
            print(f"{'':<20}of which, in us: {stages}", flush=True)
            print(
                f"{'':<20}{'floors: decoding alone' if 'jpeg' in case else 'floors:':<32}"
                + (f"{whole['decode_img_per_s']:>12,.0f}; " if "jpeg" in case else " " * 12)
                + f"copying {whole['copy_img_per_s_cached']:,.0f} in cache, {whole['copy_img_per_s_ring']:,.0f} into a ring",
                flush=True,
            )
    if args.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": args.commit,
            "processor": name,
            "pictures": count,
            "bytes_per_picture": mean,
            "rows": rows,
        }
        os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
