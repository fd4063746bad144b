"""Memory of a bf16 training step: Vitrum's plan, and what PyTorch's autocast keeps for its backward. Needs no GPU.

    python benches/memory.py --stand-in target/debug/standin
        python benches/memory.py --compiled        the same with torch.compile (a minute more)

PyTorch's share is counted, not measured: the storages that autograd saves (parameters once, activations, bf16 copies of weights), on
the processor with one and two images and one and two blocks, which determine the linear function; plus 16 bytes per parameter for
masters, gradients and AdamW. A GPU would need more: temporary memory, caches and workspaces are left out. Vitrum's total is everything
that it allocates on a GPU. Needs a Python with torch; `--json FILE` stores the figures.
"""
import argparse
import datetime
import json
import os

from compare_cpu import pytorch_model
from compare_gpu import CASES, CLASSES, vitrum

MODES = {"plain": [], "f32 stream": ["train.residual=f32"], "ln+gelu": ["train.recompute=ln+gelu"]}


def saved_bytes(model, images, compiled):
    """Distinct storages that autograd keeps from a forward pass, without parameters."""
    import torch

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    call = torch.compile(model) if compiled else model
    labels = torch.randint(CLASSES, (len(images),))

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            logits = call(images)
        return torch.nn.functional.cross_entropy(logits.float(), labels)

    if compiled:
        loss().backward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = loss()
    total = sum(kept.values())
    del held
    return total


def pytorch_bytes(name, compiled):
    import torch

    image, patch, width, depth, heads, batch = CASES[name]
    found = {}
    for blocks in (1, 2):
        model = pytorch_model(torch, image, patch, width, blocks, heads, CLASSES, "tanh")
        for images in (1, 2):
            torch._dynamo.reset()
            found[blocks, images] = saved_bytes(model, torch.randn(images, 3, image, image), compiled)
        found[blocks, "parameters"] = sum(p.numel() for p in model.parameters())

    def at(key):
        """By the number of blocks."""
        return found[1, key] + (depth - 1) * (found[2, key] - found[1, key])

    return at(1) + (batch - 1) * (at(2) - at(1)) + 16 * at("parameters")


def vitrum_bytes(args, name, settings):
    image, *_, batch = CASES[name]
    variant = name.split("@")[0]
    sizes = [f"model.variant={variant}", f"model.image={image}", f"model.classes={CLASSES}", "model.head_bias=0"]
    words = ["plan", "b16/imagenet21k", "--device", "cuda"]
    for setting in [*sizes, f"train.batch={batch}", f"train.micro_batch={batch}", *settings]:
        words += ["--set", setting]
    env = dict(os.environ)
    if args.stand_in:
        # More memory than any GPU has: the plan is printed whatever its size.
        env |= {"LD_LIBRARY_PATH": args.stand_in, "VITRUM_STANDIN": f"checks=off,memory={1 << 40}"}
    return vitrum(args, *words, env=env)["memory"]["total_bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--stand-in", help="the folder of the stand-in GPU, where there is no card")
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--commit", help="what was counted, for the record")
    parser.add_argument("--json")
    args = parser.parse_args()
    import torch

    peer = "torch.compile" if args.compiled else "autocast"
    print(f"GiB of a training step in bf16; PyTorch {torch.__version__}, {peer}: counted, and a lower bound")
    print("| model, batch | PyTorch |" + "".join(f" Vitrum, {mode} | share |" for mode in MODES))
    print("| --- | --- |" + " --- | --- |" * len(MODES))
    rows = []
    for name in args.models.split(","):
        theirs = pytorch_bytes(name, args.compiled)
        ours = {mode: vitrum_bytes(args, name, settings) for mode, settings in MODES.items()}
        cells = "".join(f" {b / 2**30:.1f} | {b / theirs:.2f} |" for b in ours.values())
        print(f"| {name}, {CASES[name][-1]} | {theirs / 2**30:.1f} |{cells}", flush=True)
        rows.append({"model": name, "batch": CASES[name][-1], "pytorch_bytes": theirs, "vitrum_bytes": ours})
    if args.json:
        record = {"date": datetime.date.today().isoformat(), "commit": args.commit, "torch": torch.__version__, "peer": peer, "rows": rows}
        with open(args.json, "w") as f:
            json.dump(record, f, indent=1)
            f.write("\n")


if __name__ == "__main__":
    main()
