"""Makes `odd/`: small JPEGs of less common kinds as libjpeg-turbo writes them, with its own codes, and what it makes of them as PNG.

    python tests/pictures/odd_jpeg.py

Needs numpy and Pillow (13.0 with libjpeg-turbo 3.2.0 made them).
"""
import os

import numpy
from PIL import Image


def picture(height, width):
    """Smooth, sharp and noisy in turn."""
    y, x = numpy.mgrid[0:height, 0:width]
    pixels = numpy.stack([127 + 127 * numpy.sin((y * a + x * b) / 20) for a, b in ((1, 2), (3, -1), (-2, 2))], -1)
    pixels[(y // 9 + x // 7) % 5 == 0] = (255, 0, 40)
    noisy = (y // 8 + x // 12) % 4 == 1
    pixels[noisy] = numpy.random.default_rng(1).integers(0, 256, pixels.shape)[noisy]
    return Image.fromarray(pixels.astype(numpy.uint8))


folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "odd")
os.makedirs(folder, exist_ok=True)
kinds = {f"progressive_{sampling}": dict(progressive=True, subsampling=sampling) for sampling in ("4:4:4", "4:2:2", "4:2:0")}
kinds["progressive_grey"] = dict(progressive=True, mode="L")
kinds["progressive_restart"] = dict(progressive=True, subsampling="4:2:0", restart_marker_blocks=2)
kinds["rgb"] = dict(keep_rgb=True)
kinds["cmyk"] = dict(mode="CMYK")
kinds["optimised"] = dict(optimize=True, subsampling="4:2:0", quality=98)
for name, options in kinds.items():
    for height, width in ((37, 45), (5, 3), (2, 9)):
        mode = options.get("mode", "RGB")
        settings = {key: value for key, value in options.items() if key != "mode"}
        path = os.path.join(folder, f"{name.replace(':', '')}_{height}x{width}")
        picture(height, width).convert(mode).save(path + ".jpg", quality=settings.pop("quality", 70), **settings)
        Image.open(path + ".jpg").convert("RGB").save(path + ".png", optimize=True)
