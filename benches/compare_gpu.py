"""Vitrum and PyTorch on this machine's GPU: self-test, ceilings, kernels and whole training steps, in one run.

    python3 benches/compare_gpu.py --vitrum target/release/vitrum --out benches/results/NAME

writes NAME.json and NAME.md. A step is forward, cross-entropy with label smoothing 0.1, backward, clipping by global norm and AdamW,
on one synthetic batch of u8 pixels that is on the GPU (PyTorch) or is sent to it (Vitrum); bf16 products, f32 weights and gradients,
tanh GELU on both sides. Each case runs twice, the second time in the opposite order, every engine in its own process; medians are
compared. Vitrum's last block is computed in full and for the class token only, the latter also with an f32 residual stream, as in
autocast. PyTorch is measured as `torch.compile`, plain and with max-autotune, with the attention of cuDNN or of FlashAttention.
Without torch that half is skipped with a message. Inference is the same without loss, backward and update; PyTorch's weights are bf16
there.

`--parts` runs some of it: tuning and compiling take minutes per model. `--tiny` shrinks every size, to try the script itself, with
`--torch-device cpu` on machines without a GPU.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time

from compare_cpu import pytorch_model

# One list of models for predictions and measurements.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "scripts"))
from step_model import CLASSES, MODELS as CASES

#                image, patch, width, depth, heads, batch
TINY = {"mu/16": (32, 16, 32, 1, 2, 4)}


# ---- Vitrum ----


def vitrum(args, *words, env=None):
    """The JSON that a command prints."""
    done = subprocess.run([args.vitrum, *words, "--json"], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"vitrum {' '.join(words)}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# The Vitrum configurations to time: a name, and its settings.
VARIANTS = {
    "train": {
        "bf16": ["train.prune_last_block=false"],
        "bf16, pruned": [],
        "bf16, pruned, stream f32": ["train.residual=f32"],
    },
    "infer": {"bf16": ["train.prune_last_block=false"], "bf16, pruned": []},
}


def bench_words(args, what, model, mode):
    """The arguments of `vitrum`, without `--json`."""
    image, *_, batch = args.cases[model]
    words = ["bench", "--what", what, "--model", model.split("@")[0], "--batch", str(batch), "--device", "cuda"]
    words += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    for setting in [f"model.image={image}", f"train.micro_batch={batch}", "model.gelu=tanh", *VARIANTS[what][mode]]:
        words += ["--set", setting]
    return words


def bench_row(out, mode):
    """The compared values of its JSON."""
    card = out["card"]
    return {
        "engine": out["engine"],
        "mode": mode,
        "img_per_s": out["img_per_s"],
        "ms": out["ms_per_step"],
        "memory_bytes": card["memory_bytes"],
        "first_step_s": out["first_step_s"],
        "mfu_data_sheet": card["mfu_data_sheet"],
        "mfu_product": card["mfu_product"],
    }


def vitrum_bench(args, what, model, mode):
    return bench_row(vitrum(args, *bench_words(args, what, model, mode)), mode)


# ---- PyTorch ----


def time_pytorch(args, what, model, mode):
    """One process: `eager`, `compile` or `autotune`, with the attention named by `+cudnn` or `+flash`."""
    start = time.perf_counter()
    import contextlib

    import torch

    compiled, _, attention = mode.partition("+")
    device = torch.device(args.torch_device)
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    image, patch, width, depth, heads, batch = args.cases[model]
    vit = pytorch_model(torch, image, patch, width, depth, heads, CLASSES, "tanh")

    class FromPixels(torch.nn.Module):
        """Normalises u8 pixels `[B, H, W, 3]` on the device, inside the compiled code."""

        def __init__(self):
            super().__init__()
            self.vit = vit

        def forward(self, pixels):
            images = (pixels.float() / 127.5 - 1.0).permute(0, 3, 1, 2)
            return self.vit(images.to(self.vit.head.weight.dtype))

    net = FromPixels().to(device)
    if what == "infer":
        net = net.to(torch.bfloat16).eval()
    decay = [p for p in net.parameters() if p.ndim >= 2]
    rest = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    pixels = torch.randint(256, (batch, image, image, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(CLASSES, (batch,), device=device)
    compilers = {
        "eager": lambda net: net,
        "compile": torch.compile,
        "autotune": lambda net: torch.compile(net, mode="max-autotune"),
    }
    forward = compilers[compiled](net)
    backend = contextlib.nullcontext()
    if on_gpu and attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = sdpa_kernel({"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[attention])

    @torch.no_grad()
    def infer():
        forward(pixels)

    def train():
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(pixels)
        torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step = {"train": train, "infer": infer}[what]

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    with backend:
        step()
        wait()
        first = time.perf_counter() - start
        for _ in range(5 if on_gpu else 1):
            step()
        wait()
        times = []
        for _ in range(args.rounds):
            begin, steps = time.perf_counter(), 0
            while steps < 2 or time.perf_counter() - begin < args.seconds:
                step()
                steps += 1
                # The GPU's queue must not run ahead of the clock.
                if steps % 10 == 0:
                    wait()
            wait()
            times.append((time.perf_counter() - begin) / steps)
    seconds = statistics.median(times)
    memory = None
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        memory = total - free
    return {
        "engine": f"torch {torch.__version__}",
        "mode": mode,
        "img_per_s": batch / seconds,
        "ms": 1e3 * seconds,
        "memory_bytes": memory,
        "first_step_s": first,
    }


def pytorch_words(args, what, model, mode):
    """The command of that process. Its last output line is JSON."""
    command = [sys.executable, os.path.abspath(__file__), "--child", what, model, mode, "--torch-device", args.torch_device]
    return command + ["--rounds", str(args.rounds), "--seconds", str(args.seconds)] + ["--tiny"] * args.tiny


def pytorch_bench(args, what, model, mode):
    done = subprocess.run(pytorch_words(args, what, model, mode), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{mode}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- The run ----


def engines(args, what):
    """Every engine on every model, `train` or `infer`."""
    rows = []
    for model in args.cases:
        jobs = [lambda m=mode: vitrum_bench(args, what, model, m) for mode in VARIANTS[what]] if args.vitrum else []
        jobs += [lambda m=mode: pytorch_bench(args, what, model, m) for mode in args.modes.split(",") if mode]
        found = {}
        for job in jobs + jobs[::-1]:
            try:
                row = job()
            except RuntimeError as why:
                print(f"{model}: {why}", file=sys.stderr)
                continue
            found.setdefault((row["engine"], row["mode"]), []).append(row)
        merged = []
        for both in found.values():
            ms = statistics.mean(r["ms"] for r in both)
            row = {**both[0], "model": model, "batch": args.cases[model][-1], "ms": ms, "runs_ms": [r["ms"] for r in both]}
            row["img_per_s"] = row["batch"] / ms * 1e3
            merged.append(row)
        best = max((r["img_per_s"] for r in merged if r["engine"].startswith("torch")), default=None)
        ours = next((r for r in merged if r["engine"].startswith("vitrum")), None)
        for row in merged:
            row["against_best_torch"] = row["img_per_s"] / best if best else None
            if ours and row is not ours:
                for key in ("mfu_data_sheet", "mfu_product"):
                    row[key] = ours[key] and ours[key] * row["img_per_s"] / ours["img_per_s"]
            print(f"{what:6}{model:10}{row['engine']:22}{row['mode']:26}{row['img_per_s']:12,.1f} img/s", flush=True)
        rows += merged
    return rows


def percent(share):
    return "" if share is None else f"{100 * share:.1f} %"


def markdown(record):
    lines = [f"# {record['device']}", "", f"`benches/compare_gpu.py` on {record['date']}, commit {record['commit'] or 'not said'}.", ""]
    if record.get("stand_in"):
        lines += ["**The stand-in GPU computes on the host: no time below says anything about a card.**", ""]
    if check := record.get("selftest"):
        lines += [f"Self-test: {check['cases'] - check['failed']} of {check['cases']} cases passed.", ""]
    if kernels := record.get("kernels"):
        ceilings = f"copy {kernels['copy_bytes_per_s'] / 1e9:,.0f} GB/s, product {kernels['product_flops_per_s'] / 1e12:,.0f} TFLOP/s"
        lines += ["## Operations", "", f"Measured ceilings: {ceilings}.", ""]
        lines += ["| operation | shape | ms | GB/s | of copy | TFLOP/s | of product |", "| --- | --- | --- | --- | --- | --- | --- |"]
        for o in kernels["operations"]:
            flops = f"{o['flops_per_s'] / 1e12:,.0f}" if o["flops"] else ""
            lines.append(
                f"| {o['operation']} | {o['shape']} | {o['ms']:.4f} | {o['bytes_per_s'] / 1e9:,.0f} | {percent(o['of_copy'])} | {flops} | {percent(o['of_product'])} |"
            )
        lines.append("")
    for what, title in [("train", "Training steps"), ("infer", "Inference")]:
        if not record.get(what):
            continue
        lines += [f"## {title}", "", "MFU counts the model's FLOPs against the data sheet and the product above; a training step counts as three forward passes.", ""]
        lines += ["| model, batch | engine | mode | img/s | ms | MFU, data sheet | MFU, product | in use | first step | against torch |"]
        lines += ["| --- " * 10 + "|"]
        for r in record[what]:
            memory = f"{r['memory_bytes'] / 2**30:.1f} GiB" if r["memory_bytes"] else ""
            first = f"{r['first_step_s']:.1f} s" if r["first_step_s"] else ""
            against = f"{r['against_best_torch']:.2f}" if r["against_best_torch"] else ""
            mfu = [percent(r.get(key)) for key in ("mfu_data_sheet", "mfu_product")]
            cells = [f"{r['model']}, {r['batch']}", r["engine"], r["mode"], f"{r['img_per_s']:,.0f}", f"{r['ms']:.1f}", *mfu, memory, first, against]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum", help="empty: PyTorch alone")
    parser.add_argument("--out", help="where to write, without .json and .md")
    parser.add_argument("--parts", default="selftest,kernels,train,infer")
    parser.add_argument("--models", help="some of the cases, separated by commas")
    parser.add_argument("--modes", default="autotune+cudnn,compile+cudnn,compile+flash", help="of PyTorch (eager, compile, autotune, with +cudnn or +flash); empty: none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--commit", help="what was measured, for the record")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--torch-device", default="cuda")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "MODEL", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cases = TINY if args.tiny else CASES
    if args.tiny:
        args.rounds, args.seconds = 1, 0.0
    if args.models:
        args.cases = {model: args.cases[model] for model in args.models.split(",")}
    if args.child:
        print(json.dumps(time_pytorch(args, *args.child)))
        return
    probe = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    if args.modes and probe.returncode:
        print("note: this Python has no torch: Vitrum is measured alone", file=sys.stderr)
        args.modes = ""

    parts = args.parts.split(",")
    record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "device": "PyTorch alone", "stand_in": False}
    if args.vitrum and "selftest" in parts:
        record["selftest"] = vitrum(args, "selftest", "--device", "cuda", *(["--filter", "layernorm: "] if args.tiny else []))
        record["device"] = record["selftest"]["device"]
        print(f"self-test: {record['selftest']['cases']} cases passed", flush=True)
    if args.vitrum and "kernels" in parts:
        few = ["--few", "--filter", "layernorm Ti"] if args.tiny else []
        record["kernels"] = vitrum(args, "bench", "--what", "kernels", "--device", "cuda", *few)
        record["device"], record["stand_in"] = (record["kernels"][key] for key in ("device", "stand_in"))
        print(f"{len(record['kernels']['operations'])} operations timed", flush=True)
    for what in ("train", "infer"):
        if what in parts:
            record[what] = engines(args, what)
    if args.out:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        with open(args.out + ".json", "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
        with open(args.out + ".md", "w") as file:
            file.write(markdown(record))
    else:
        print(markdown(record))


if __name__ == "__main__":
    main()
