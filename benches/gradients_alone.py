"""How far a GPU's bf16 gradients are from the CPU's f32 gradients, on weights and images of noise. Needs no Python package.

    python3 benches/gradients_alone.py --vitrum target/release/vitrum --json FILE

`expected` is the distance of the CPU's own gradients with rounding to bf16 where a GPU stores bf16; a GPU also rounds the
probabilities of attention. `gradients.py` compares with float64 and PyTorch.
"""
import argparse
import array
import json
import math
import os
import random
import subprocess
import tempfile

#        image, patch, width, depth, classes, batch; heads are 64 wide
CASES = {"long": (56, 4, 128, 4, 16, 2), "deep": (16, 4, 64, 24, 10, 16)}
TINY = {"tiny": (16, 8, 64, 2, 10, 2)}
# For a GPU: an engine's name, the value of `vitrum grad --residual`, and how the CPU rounds.
STREAMS = [("vitrum, stream bf16", "bf16", "bf16"), ("vitrum, stream f32", "f32", "bf16-residual-f32")]


def shapes(image, patch, width, depth, classes):
    """timm's names, in any order."""
    yield "patch_embed.proj.weight", (width, 3, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    yield "cls_token", (1, 1, width)
    yield "pos_embed", (1, (image // patch) ** 2 + 1, width)
    for block in (f"blocks.{i}" for i in range(depth)):
        for name, out, into in [("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width)]:
            yield f"{block}.{name}.weight", (out, into)
            yield f"{block}.{name}.bias", (out,)
        for name in ("norm1", "norm2"):
            yield f"{block}.{name}.weight", (width,)
            yield f"{block}.{name}.bias", (width,)
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)
    yield "head.weight", (classes, width)
    yield "head.bias", (classes,)


def write_safetensors(path, tensors):
    """name → (shape, array of f32 or of i64)."""
    head, at = {}, 0
    for name, (shape, values) in tensors.items():
        size = len(values) * values.itemsize
        head[name] = {"dtype": {"f": "F32", "q": "I64"}[values.typecode], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            file.write(values.tobytes())


def read_gradients(path):
    with open(path, "rb") as file:
        data = file.read()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, tensor in json.loads(data[8:start]).items():
        if name.startswith("grad/"):
            begin, end = tensor["data_offsets"]
            found[name] = array.array("f", data[start + begin : start + end])
    return found


def apart(gradients, exact):
    """Relative L2 distance over all parameters."""
    square = sum((a - b) ** 2 for name, values in exact.items() for a, b in zip(gradients[name], values))
    return math.sqrt(square / sum(b * b for values in exact.values() for b in values))


def noise(draws, spread, shape):
    return array.array("f", (draws.gauss(0, spread) for _ in range(math.prod(shape))))


def write_case(folder, case):
    image, patch, width, depth, classes, batch = case
    draws, weights = random.Random(0), {}
    for name, shape in shapes(image, patch, width, depth, classes):
        # Weights like those after training: nothing is zero or one.
        values = noise(draws, 0.05, shape)
        if "norm" in name and name.endswith("weight"):
            values = array.array("f", (1 + v for v in values))
        weights[name] = (shape, values)
    write_safetensors(os.path.join(folder, "model.safetensors"), weights)
    pixels, labels = (batch, image, image, 3), array.array("q", (draws.randrange(classes) for _ in range(batch)))
    batch_file = {"images": (pixels, noise(draws, 1.0, pixels)), "labels": ((batch,), labels)}
    write_safetensors(os.path.join(folder, "batch.safetensors"), batch_file)


def gradients(vitrum, folder, device, residual="auto", rounds=""):
    out = os.path.join(folder, "out.safetensors")
    files = [word for key in ("weights", "batch") for word in (f"--{key}", os.path.join(folder, f"{key.replace('weights', 'model')}.safetensors"))]
    words = [vitrum, "grad", *files, "--out", out, "--device", device, "--residual", residual, "--set", "model.gelu=tanh"]
    subprocess.run(words, env=dict(os.environ, VITRUM_CPU_ROUNDS=rounds), check=True)
    return read_gradients(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vitrum", default="target/release/vitrum")
    parser.add_argument("--tiny", action="store_true", help="one small model")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    rows = []
    for name, case in (TINY if args.tiny else CASES).items():
        with tempfile.TemporaryDirectory() as folder:
            write_case(folder, case)
            exact = gradients(args.vitrum, folder, "cpu")
            for engine, residual, rounds in STREAMS:
                expected = apart(gradients(args.vitrum, folder, "cpu", rounds=rounds), exact)
                found = apart(gradients(args.vitrum, folder, "cuda", residual), exact)
                rows.append({"case": name, "engine": engine, "all": found, "expected": expected})
                print(f"{name:<8}{engine:<20}{found:>10.2e}, expected {expected:.2e}", flush=True)
    with open(args.json, "w") as file:
        json.dump({"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
