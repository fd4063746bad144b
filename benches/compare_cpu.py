"""Vitrum and PyTorch on this machine's processor: whole training steps, side by side.

One step is forward, cross-entropy with label smoothing 0.1, backward, clipping by global norm, AdamW, all in f32, on one synthetic
batch. Both engines use the same GELU form. Each case runs twice, the second time in the opposite order, every engine in its own
process; medians are compared.

    python benches/compare_cpu.py --vitrum target/release/vitrum --json benches/results/NAME.json

Needs a Python with torch. `--modes` names the PyTorch modes to measure; ratios are against its fastest f32 mode.
"""
import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

#        image, patch, width, depth, heads, classes, batch
CASES = {
    "ti4_32": (32, 4, 192, 12, 3, 10, 64),
    "ti16_224": (224, 16, 192, 12, 3, 1000, 16),
    "s16_224": (224, 16, 384, 12, 6, 1000, 8),
}
VARIANT = {192: "Ti", 384: "S"}


def pytorch_model(torch, image, patch, width, depth, heads, classes, gelu):
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, eps=1e-6)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate=gelu), nn.Linear(4 * width, width))

        def forward(self, x):
            batch, tokens, _ = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, heads, width // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            o = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
            x = x + self.proj(o)
            return x + self.mlp(self.norm2(x))

    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = nn.Conv2d(3, width, patch, stride=patch)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, classes)

        def forward(self, x):
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
            return self.head(self.norm(self.blocks(x)[:, 0]))

    return Vit()


def time_pytorch(case, mode, threads, rounds, seconds, gelu):
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image, patch, width, depth, heads, classes, batch = CASES[case]
    model = pytorch_model(torch, image, patch, width, depth, heads, classes, "tanh" if gelu == "tanh" else "none")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    pixels, labels = torch.randn(batch, 3, image, image), torch.randint(classes, (batch,))
    forward = torch.compile(model) if mode.endswith("compile") else model

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.startswith("bf16")):
            logits = forward(pixels)
        torch.nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        begin, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - begin < seconds:
            step()
            steps += 1
        times.append((time.perf_counter() - begin) / steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"engine": f"torch {torch.__version__}", "mode": mode, "ms": 1e3 * statistics.median(times), "peak_mib": peak}


def run_pytorch(args, case, mode):
    command = [sys.executable, __file__, "--child", case, mode, "--threads", str(args.threads)]
    command += ["--rounds", str(args.rounds), "--seconds", str(args.seconds), "--gelu", args.gelu]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{case} {mode} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def run_vitrum(args, case, isa):
    image, patch, width, _, _, classes, batch = CASES[case]
    command = [args.vitrum, "bench", "--model", f"{VARIANT[width]}/{patch}", "--batch", str(batch), "--device", "cpu", "--json"]
    command += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    for key, value in [("model.image", image), ("model.classes", classes), ("model.gelu", args.gelu), ("train.threads", args.threads)]:
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "VITRUM_ISA": isa})
    if done.returncode:
        print(f"{case} {isa} failed: {done.stderr.strip()}", file=sys.stderr)
        return None
    out = json.loads(done.stdout)
    return {"engine": out["engine"], "mode": isa, "ms": out["ms_per_step"], "peak_mib": out["peak_rss_bytes"] / 2**20, "gflops": out["gflops"]}


def processor():
    try:
        with open("/proc/cpuinfo") as f:
            fields = dict(line.split(":", 1) for line in f.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {k.strip(): v.strip() for k, v in fields.items()}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})", fields.get("flags", "").split()
    except (OSError, KeyError):
        return platform.processor() or platform.machine(), []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--modes", default="fp32,fp32_compile,bf16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--gelu", choices=["tanh", "erf"], default="tanh")
    parser.add_argument("--commit", help="what was measured, for the record")
    parser.add_argument("--json")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(time_pytorch(*args.child, args.threads, args.rounds, args.seconds, args.gelu)))
        return

    name, flags = processor()
    isas = [isa for isa, flag in [("avx2", "avx2"), ("avx512", "avx512f")] if flag in flags] or ["scalar"]
    print(f"{name}, {args.threads} threads, GELU {args.gelu}")
    print(f"{'case':<10}{'engine':<24}{'mode':<14}{'ms/step':>10}{'peak MiB':>10}{'x best f32':>12}")
    rows = []
    for case in args.cases.split(","):
        jobs = [lambda i=isa: run_vitrum(args, case, i) for isa in isas]
        jobs += [lambda m=mode: run_pytorch(args, case, m) for mode in args.modes.split(",")]
        found = {}
        for job in jobs + jobs[::-1]:
            row = job()
            if row:
                found.setdefault((row["engine"], row["mode"]), []).append(row)
        merged = []
        for (engine, mode), both in found.items():
            row = {"case": case, "engine": engine, "mode": mode, "ms": statistics.mean(r["ms"] for r in both)}
            row["runs_ms"] = [r["ms"] for r in both]
            row["peak_mib"] = max(r["peak_mib"] for r in both)
            merged.append(row)
        f32 = [r["ms"] for r in merged if r["mode"].startswith("fp32")]
        for row in merged:
            row["speed_against_best_f32"] = min(f32) / row["ms"] if f32 else None
            ratio = f"{row['speed_against_best_f32']:>11.2f}x" if f32 else ""
            print(f"{case:<10}{row['engine']:<24}{row['mode']:<14}{row['ms']:>10.1f}{row['peak_mib']:>10.0f}{ratio}", flush=True)
        rows += merged
    if args.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": args.commit,
            "processor": name,
            "threads": args.threads,
            "gelu": args.gelu,
            "rows": rows,
        }
        os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
