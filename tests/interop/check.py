"""Files that `vitrum convert` writes, loaded by the libraries that they are for. Called by run.sh.

For each model: its own library makes it at random and computes logits; Vitrum converts it to every layout that can hold
it; each result is loaded by the layout's library (names strict), and its logits, and Vitrum's own (`vitrum grad`), are
compared with the first.
"""

import functools  # noqa: F401  (the constructor in a file's metadata names it)
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import timm.models.deit  # noqa: F401
import timm.models.vision_transformer  # noqa: F401
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

VITRUM = sys.argv[1]
# f32 on both sides, sums in another order. The two forms of GELU are 1e-4 and more apart.
TOLERANCE = 2e-5


def vitrum(*args, fails=False):
    done = subprocess.run([VITRUM, *map(str, args)], capture_output=True, text=True)
    if fails != (done.returncode != 0):
        sys.exit(f"vitrum {' '.join(map(str, args))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def near(what, got, expected):
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    print(f"  {what:<28} {error:.1e}")
    if not error <= TOLERANCE:
        sys.exit(f"{what}: the logits differ by {error:.1e}")


def of_vitrum(weights, images, folder, *sets):
    """Logits of `vitrum grad`."""
    batch, out = folder / "batch.safetensors", folder / "grads.safetensors"
    labels = torch.zeros(len(images), dtype=torch.int64)
    save_file({"images": images.permute(0, 2, 3, 1).contiguous(), "labels": labels}, batch)
    more = [word for s in sets for word in ("--set", s)]
    vitrum("grad", "--weights", weights, "--batch", batch, "--out", out, "--device", "cpu", *more)
    return load_file(out)["logits"].numpy()


@torch.no_grad()
def of_torch(model, images):
    out = model.eval()(images)
    return (out.logits if hasattr(out, "logits") else out).numpy()


def of_timm_file(path, images):
    """Made as the file's metadata says, loaded strictly."""
    with safe_open(path, "pt") as file:
        model = eval(file.metadata()["timm.python"])
    model.load_state_dict(load_file(path), strict=True)
    return of_torch(model, images)


def of_hf_folder(path, images):
    model, info = transformers.ViTForImageClassification.from_pretrained(path, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return of_torch(model, images)


def of_timm_npz(path, model, images):
    """timm's own reader of the published format."""
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.load_pretrained(str(path))
    return of_torch(model, images)


def of_npz(path, images, gelu, eps):
    """vit_jax's forward pass (Dosovitskiy et al. 2021) in float64, under the names of the published files."""
    p = {name: value.astype(np.float64) for name, value in np.load(path).items()}

    def norm(x, name):
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + eps) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def activate(x):
        if gelu == "tanh":
            return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def attention(x, name):
        q, k, v = (
            np.einsum("btd,dhe->bthe", x, p[f"{name}/{part}/kernel"]) + p[f"{name}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        scores = np.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("bhqk,bkhe->bqhe", scores, v)
        return np.einsum("bqhe,hed->bqd", out, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]

    kernel = p["embedding/kernel"]
    ph, pw, channels, width = kernel.shape
    x = images.permute(0, 2, 3, 1).numpy().astype(np.float64)
    b, h, w, _ = x.shape
    x = x.reshape(b, h // ph, ph, w // pw, pw, channels).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, ph * pw * channels)
    x = x @ kernel.reshape(-1, width) + p["embedding/bias"]
    if "cls" in p:
        x = np.concatenate([np.tile(p["cls"], (b, 1, 1)), x], 1)
    x = x + p["Transformer/posembed_input/pos_embedding"]
    for i in range(sum(name.endswith("LayerNorm_0/scale") for name in p)):
        block = f"Transformer/encoderblock_{i}"
        x = x + attention(norm(x, f"{block}/LayerNorm_0"), f"{block}/MultiHeadDotProductAttention_1")
        y = dense(norm(x, f"{block}/LayerNorm_2"), f"{block}/MlpBlock_3/Dense_0")
        x = x + dense(activate(y), f"{block}/MlpBlock_3/Dense_1")
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in p else x.mean(1)
    if "pre_logits/kernel" in p:
        x = np.tanh(dense(x, "pre_logits"))
    return dense(x, "head")


def timm_models():
    """(name, constructor and arguments, settings for a state dict that says nothing, layouts besides timm's)."""
    vit, deit = timm.models.vision_transformer.VisionTransformer, timm.models.deit.VisionTransformerDistilled
    size = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2, num_classes=10)
    tanh = dict(act_layer="gelu_tanh")
    average = dict(class_token=False, global_pool="avg")
    return [
        ("class token, tanh", vit, size | tanh, ["model.gelu=tanh"], ["hf", "npz"]),
        ("class token, erf", vit, size, [], ["hf", "npz"]),
        ("oblong", vit, size | dict(img_size=(32, 48)), ["model.image=32x48"], ["hf", "npz"]),
        ("average, normalised first", vit, size | average | dict(fc_norm=False), [], ["npz"]),
        ("average, then normalised", vit, size | average, [], []),
        ("attention pooling", vit, size | dict(class_token=False, global_pool="map"), [], []),
        ("LayerScale", vit, size | dict(init_values=0.1), [], []),
        ("no row for the class token", vit, size | dict(no_embed_class=True), [], []),
        ("no bias of q, k, v", vit, size | dict(qkv_bias=False), [], ["hf"]),
        ("distilled", deit, size, [], []),
    ]


def check_timm(folder):
    for name, build, args, sets, layouts in timm_models():
        print(f"timm: {name}")
        model = randomise(build(**args))
        height, width = args["img_size"] if isinstance(args["img_size"], tuple) else (args["img_size"],) * 2
        images = torch.randn(5, 3, height, width)
        expected = of_torch(model, images)
        source = folder / "source.safetensors"
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, source)
        sets = [*sets, "model.heads=4"]
        more = [word for s in sets for word in ("--set", s)]
        near("vitrum", of_vitrum(source, images, folder, *sets), expected)

        out = folder / "timm.safetensors"
        vitrum("convert", source, out, "--to", "timm", *more)
        near("convert --to timm", of_timm_file(out, images), expected)
        near("  and back in vitrum", of_vitrum(out, images, folder), expected)
        if "hf" in layouts:
            vitrum("convert", out, folder / "hf", "--to", "hf")
            near("convert --to hf", of_hf_folder(folder / "hf", images), expected)
            near("  and back in vitrum", of_vitrum(folder / "hf", images, folder), expected)
        else:
            vitrum("convert", out, folder / "never", "--to", "hf", fails=True)
            assert not (folder / "never").exists()
        if "npz" in layouts:
            npz = folder / "model.npz"
            vitrum("convert", out, npz)
            gelu = "tanh" if "act_layer" in args else "erf"
            near("convert to .npz", of_npz(npz, images, gelu, 1e-6), expected)
            near("  by timm's reader", of_timm_npz(npz, build(**args), images), expected)


def randomise(model):
    """Nothing is zero or one, and logits are of unit size."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model


def check_transformers(folder):
    print("transformers: ViTForImageClassification")
    names = {0: "cat", 1: "dog", 2: "a hen, brown"}
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=32, patch_size=8,
        id2label=names, label2id={name: i for i, name in names.items()}, layer_norm_eps=1e-5,
    )  # fmt: skip
    model = randomise(transformers.ViTForImageClassification(config))
    images = torch.randn(4, 3, 32, 32)
    expected = of_torch(model, images)
    source, back = folder / "hf-source", folder / "hf-back"
    model.save_pretrained(source)
    near("vitrum", of_vitrum(source, images, folder), expected)
    vitrum("convert", source, folder / "own.safetensors")
    vitrum("convert", folder / "own.safetensors", back, "--to", "hf")
    near("there and back", of_hf_folder(back, images), expected)
    loaded = transformers.AutoConfig.from_pretrained(back)
    assert loaded.id2label == names and loaded.layer_norm_eps == 1e-5, loaded
    first, second = (load_file(path / "model.safetensors") for path in (source, back))
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)

    print("transformers: in parts, q, k and v without a bias")
    bare = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**config.to_dict() | dict(qkv_bias=False))))
    bare.save_pretrained(folder / "parts", max_shard_size="100KB")
    parts = len(list((folder / "parts").glob("model-*.safetensors")))
    assert parts > 1, "transformers wrote one file"
    near(f"vitrum, {parts} parts", of_vitrum(folder / "parts", images, folder), of_torch(bare, images))
    vitrum("convert", folder / "parts", folder / "whole", "--to", "hf")
    near("convert --to hf", of_hf_folder(folder / "whole", images), of_torch(bare, images))

    print("transformers: ViTModel")
    base = randomise(transformers.ViTModel(config))
    base.save_pretrained(folder / "base")
    vitrum("convert", folder / "base", folder / "base-back", "--to", "hf")
    again, info = transformers.ViTModel.from_pretrained(folder / "base-back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        near("pooled", again.eval()(images).pooler_output.numpy(), base.eval()(images).pooler_output.numpy())


def main():
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}")
    version = json.dumps(vitrum("--version").stdout.strip())
    print(f"vitrum {version}; relative differences of logits, at most {TOLERANCE}")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        check_timm(Path(folder))
        check_transformers(Path(folder))
    print("interop: all of them agree")


if __name__ == "__main__":
    main()
