"""A model that Vitrum has fine-tuned, back in the libraries: the same class for every picture of a test set.

    finetuned.py VITRUM              draws its pictures
    finetuned.py VITRUM PICTURES     takes those of PICTURES/train/CLASS and PICTURES/test/CLASS, 32 x 32 pixels

Weights that timm or transformers made are fine-tuned for some steps and converted to every layout. Vitrum classifies the
test pictures from the run (`vitrum predict`), each library classifies them from its converted file: it reads the picture
files itself and prepares them by its own transform. NumPy, which has none, takes the pixels as (x - 127.5) / 127.5.
Pictures have the model's size and evaluation neither enlarges nor crops (`eval.resize=squash`), so that there is nothing to
resize: libraries differ in that, and it is not the subject here. Called by run.sh.
"""

import functools  # noqa: F401  (the constructor in a file's metadata names it)
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import timm.data
import timm.models.vision_transformer
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from check import of_hf_folder, of_npz, of_timm_npz, of_torch, randomise, vitrum

SIDE = 32
STEPS = 150
CLASSES = ["across", "checks", "disc", "down", "frame"]


def main():
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        folder = Path(folder)
        pictures = Path(sys.argv[2]) if len(sys.argv) > 2 else draw(folder / "pictures")
        for name, source in [("timm", timm_weights), ("transformers", transformers_weights)]:
            check(name, source(folder), pictures, folder)
    print("interop: fine-tuned models predict the same class everywhere")


def check(name, source, pictures, folder):
    run, files = folder / f"run-{name}", sorted((pictures / "test").rglob("*.png"))
    settings = [
        f"train.steps={STEPS}", "train.batch=32", "train.micro_batch=32", f"train.eval_every={STEPS}", "optim.name=adamw",
        "optim.lr=1e-3", "augment.crop=pad", "eval.resize=squash",
    ]  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    vitrum("finetune", "--weights", source, "--data", pictures, "--out", run, *sets)
    predictions = json.loads(vitrum("predict", "--weights", run, "--top", 1, "--json", *files).stdout)["predictions"]
    ours = np.array([prediction["top"][0]["class"] for prediction in predictions])
    names = [prediction["top"][0]["name"] for prediction in predictions]
    right = sum(file.parent.name == name for file, name in zip(files, names))
    print(f"fine-tuned from {name}: {len(files)} test pictures, {100 * right / len(files):.1f} % right in vitrum")
    # A model that has learned nothing agrees with anybody.
    assert right > 1.5 * len(files) / len(set(names)) and len(set(names)) > 3, (right, set(names))

    own, hf, npz = folder / "own.safetensors", folder / "tuned-hf", folder / "tuned.npz"
    vitrum("convert", run, own, "--to", "timm")
    vitrum("convert", run, hf, "--to", "hf")
    vitrum("convert", run, npz)

    with safe_open(own, "pt") as file:
        metadata = file.metadata()
    model = eval(metadata["timm.python"])
    model.load_state_dict(load_file(own), strict=True)
    agree("timm, its transform", of_torch(model, by_timm(files, json.loads(metadata["vitrum.meta"]))), ours)

    processor = transformers.AutoImageProcessor.from_pretrained(hf)
    images = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")["pixel_values"]
    agree("transformers, its processor", of_hf_folder(hf, images), ours)
    labels = transformers.AutoConfig.from_pretrained(hf).id2label
    assert [labels[int(c)] for c in ours] == names, "class names differ"

    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).astype(np.float64)
    images = torch.from_numpy((pixels - 127.5) / 127.5).permute(0, 3, 1, 2)
    config = json.loads((hf / "config.json").read_text())
    agree("vit_jax's pass in NumPy", of_npz(npz, images, "erf", config["layer_norm_eps"]), ours)
    agree("timm's reader of .npz", of_timm_npz(npz, eval(metadata["timm.python"]), images.float()), ours)


def agree(what, logits, ours):
    theirs = logits.argmax(1)
    same, logits = int((theirs == ours).sum()), np.sort(logits, 1)
    print(f"  {what:<28} {same} of {len(ours)} the same (smallest margin {(logits[:, -1] - logits[:, -2]).min():.1e})")
    if same != len(ours):
        sys.exit(f"{what}: other classes for {len(ours) - same} pictures")


def by_timm(files, meta):
    mean, std = ([value / 255 for value in meta["normalise"][key]] for key in ("mean", "std"))
    transform = timm.data.create_transform((3, SIDE, SIDE), mean=mean, std=std, crop_pct=1.0)
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


def timm_weights(folder):
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=64, depth=3, num_heads=1, mlp_ratio=2, num_classes=7
    )
    path = folder / "pretrained.safetensors"
    save_file({key: value.contiguous() for key, value in randomise(model).state_dict().items()}, path)
    return path


def transformers_weights(folder):
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, image_size=SIDE, patch_size=8,
        num_labels=7,
    )  # fmt: skip
    path = folder / "pretrained-hf"
    randomise(transformers.ViTForImageClassification(config)).save_pretrained(path)
    return path


def draw(folder):
    """Five patterns in random colours, places and sizes, with noise."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE]
    for part, count in [("train", 200), ("test", 100)]:
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                phase, period = random.integers(8, size=2), random.integers(3, 6)
                centre, size = random.integers(10, 22, size=2), random.integers(5, 10)
                across, down = ((y + phase[0]) // period % 2, (x + phase[1]) // period % 2)
                distance = np.maximum(abs(y - centre[0]), abs(x - centre[1]))
                on = {
                    "across": across,
                    "down": down,
                    "checks": across ^ down,
                    "disc": np.hypot(y - centre[0], x - centre[1]) < size,
                    "frame": (distance < size) & (distance >= size - 2),
                }[name]
                colours = random.uniform(0, 255, size=(2, 3))
                pixels = np.where(on[..., None] != 0, colours[0], colours[1]) + random.normal(0, 25, (SIDE, SIDE, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / name / f"{i:03}.png")
    return folder


if __name__ == "__main__":
    main()
