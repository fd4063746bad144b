"""How far bf16 gradients are from float64: Vitrum and PyTorch's autocast, on the same weights and images.

    python benches/gradients.py --vitrum target/release/vitrum
    python benches/gradients.py --vitrum target/release/vitrum --stand-in target/debug/standin

The second command uses the stand-in GPU: the product's kernels, run on the processor. PyTorch computes on a GPU if there is one, else
on the processor. Needs a Python with torch and safetensors. The bias of the keys is left out: its gradient is only rounding. `--json
FILE` stores the figures.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile

from compare_cpu import pytorch_model

#        image, patch, width, depth, heads, classes, batch
CASES = {
    "ti4_32": (32, 4, 192, 12, 3, 10, 4),
    "wide": (28, 7, 384, 6, 6, 100, 8),
    "long": (56, 4, 128, 4, 2, 16, 2),  # 197 tokens
    "deep": (16, 4, 64, 24, 1, 10, 16),
}
SEEDS = (0, 1, 2)


def timm_name(name):
    for ours, timms in [("patch_embed.", "patch_embed.proj."), (".qkv.", ".attn.qkv."), (".proj.", ".attn.proj."), (".mlp.0.", ".mlp.fc1."), (".mlp.2.", ".mlp.fc2.")]:
        if ours in name:
            return name.replace(ours, timms)
    return name


def without_key_bias(name, gradient):
    import torch

    if not name.endswith("qkv.bias"):
        return gradient
    q, _, v = gradient.chunk(3)
    return torch.cat([q, v])


def errors(gradients, exact):
    """Relative L2 distance over all parameters, and tensor by tensor."""
    each = {n: (gradients[n].double() - g).norm() / g.norm() for n, g in exact.items()}
    square = sum(((gradients[n].double() - g) ** 2).sum() for n, g in exact.items())
    whole = (square / sum((g**2).sum() for g in exact.values())).sqrt()
    worst = max(each, key=each.get)
    return {
        "all": whole.item(),
        "median": statistics.median(e.item() for e in each.values()),
        "worst": each[worst].item(),
        "worst_tensor": worst,
    }


def pytorch_gradients(torch, model, pixels, labels, device, dtype=None):
    """With timm's names. `dtype`: that of autocast."""
    model, pixels, labels = model.to(device), pixels.to(device), labels.to(device)
    model.zero_grad()
    with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(pixels)
    torch.nn.functional.cross_entropy(logits if dtype is None else logits.float(), labels).backward()
    return {timm_name(n): without_key_bias(n, p.grad.cpu()) for n, p in model.named_parameters()}


def vitrum_gradients(args, scratch, device, residual="auto"):
    from safetensors.torch import load_file

    out = os.path.join(scratch, f"{device}.safetensors")
    command = [args.vitrum, "grad", "--weights", os.path.join(scratch, "model.safetensors")]
    command += ["--batch", os.path.join(scratch, "batch.safetensors"), "--out", out, "--device", device]
    command += ["--residual", residual, "--set", "model.gelu=tanh"]
    env = dict(os.environ)
    if args.stand_in and device == "cuda":
        env |= {"LD_LIBRARY_PATH": args.stand_in, "VITRUM_STANDIN": "checks=off"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    found = load_file(out)
    return {n[5:]: without_key_bias(n, g) for n, g in found.items() if n.startswith("grad/")}


def run(args, case, seed, scratch):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    image, patch, width, depth, heads, classes, batch = CASES[case]
    model = pytorch_model(torch, image, patch, width, depth, heads, classes, "tanh")
    with torch.no_grad():
        # Weights like those after training: nothing is zero or one.
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pixels, labels = torch.randn(batch, 3, image, image), torch.randint(classes, (batch,))
    save_file({timm_name(n): p.detach().clone() for n, p in model.named_parameters()}, os.path.join(scratch, "model.safetensors"))
    images = pixels.permute(0, 2, 3, 1).contiguous()
    save_file({"images": images, "labels": labels}, os.path.join(scratch, "batch.safetensors"))

    card = "cuda" if torch.cuda.is_available() else "cpu"
    autocast = pytorch_gradients(torch, model, pixels, labels, card, torch.bfloat16)
    exact = pytorch_gradients(torch, model.double(), pixels.double(), labels, "cpu")
    return {
        "torch autocast": errors(autocast, exact),
        "vitrum, stream bf16": errors(vitrum_gradients(args, scratch, "cuda", "bf16"), exact),
        "vitrum, stream f32": errors(vitrum_gradients(args, scratch, "cuda", "f32"), exact),
        "vitrum f32, cpu": errors(vitrum_gradients(args, scratch, "cpu"), exact),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--stand-in", help="the folder of the stand-in GPU, where there is no card")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--commit", help="what was measured, for the record")
    parser.add_argument("--json")
    args = parser.parse_args()
    import torch

    rows = []
    print(f"distance from float64, relative L2, mean over {len(SEEDS)} seeds; torch {torch.__version__}")
    print(f"{'case':<10}{'engine':<20}{'all':>10}{'median':>10}{'worst':>10}  of the tensors")
    for case in args.cases.split(","):
        found = []
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as scratch:
                found.append(run(args, case, seed, scratch))
        for engine in found[0]:
            mean = {k: statistics.mean(f[engine][k] for f in found) for k in ("all", "median", "worst")}
            tensors = [f[engine]["worst_tensor"] for f in found]
            rows.append({"case": case, "engine": engine, **mean, "worst_tensors": tensors})
            print(f"{case:<10}{engine:<20}{mean['all']:>10.2e}{mean['median']:>10.2e}{mean['worst']:>10.2e}  {', '.join(sorted(set(tensors)))}", flush=True)
    if args.json:
        record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "torch": torch.__version__, "rows": rows}
        os.makedirs(os.path.dirname(args.json) or ".", exist_ok=True)
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
