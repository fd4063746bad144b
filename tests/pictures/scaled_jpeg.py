"""Makes `scaled_jpeg.npz`: small JPEGs of all samplings, what libjpeg-turbo makes of them at 1/2, 1/4 and 1/8, and what
Pillow makes of a part with borders inside pixels.

    python tests/pictures/scaled_jpeg.py [DIR]

DIR is a folder of photographs: of these only checksums are printed, for the constants in `src/data/jpeg/scaled.rs`. Needs
numpy, Pillow (which decodes) and opencv-python-headless (which writes 4:4:0).
"""
import glob
import io
import os
import sys
import zlib

import cv2
import numpy
from PIL import Image, ImageFile, features

SAMPLINGS = {name: getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{name}") for name in ("444", "422", "440", "420")}


def picture(height, width):
    """Smooth, sharp and noisy in turn, with colours at the ends of their range."""
    y, x = numpy.mgrid[0:height, 0:width]
    waves = [127 + 127 * numpy.sin((y * a + x * b) / 40) for a, b in ((1, 2), (3, -1), (-2, 2))]
    pixels = numpy.stack(waves, -1)
    pixels[(y // 9 + x // 7) % 5 == 0] = (255, 0, 40)
    noise = numpy.random.default_rng(1).integers(0, 256, pixels.shape)
    noisy = (y // 16 + x // 24) % 4 == 1
    pixels[noisy] = noise[noisy]
    return pixels.astype(numpy.uint8)


def encoded(pixels, sampling):
    if sampling == "grey":
        pixels, settings = pixels[..., 1], []
    else:
        settings = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 70, *settings])[1].tobytes()


def decoded(bytes_, divisor):
    """As after `Image.draft`, which does not take pictures that are smaller than the divisor."""
    image = Image.open(io.BytesIO(bytes_))
    drafted = Image.open(io.BytesIO(bytes_))
    drafted.draft(None, [max(side // divisor, 1) for side in image.size])
    _, _, offset, arguments = image.tile[0]
    image._size = tuple(-(-side // divisor) for side in image.size)
    image.tile = [ImageFile._Tile("jpeg", (0, 0, *image.size), offset, arguments)]
    image.decoderconfig = (divisor, 0)
    pixels = numpy.asarray(image.convert("RGB"))
    if drafted.size == image.size:
        assert (pixels == numpy.asarray(drafted.convert("RGB"))).all()
    return pixels


print("Pillow", Image.__version__, "libjpeg-turbo", features.version_feature("libjpeg_turbo"))
if len(sys.argv) > 1:
    for divisor in (2, 4, 8):
        checksum = 1
        for file in sorted(glob.glob(os.path.join(sys.argv[1], "**", "*.*"), recursive=True)):
            if not file.endswith(".md"):
                checksum = zlib.adler32(decoded(open(file, "rb").read(), divisor).tobytes(), checksum)
        print(f"1/{divisor}: {checksum:#x}")
arrays = {}
for height, width in ((37, 45), (21, 5), (3, 34)):
    for sampling in ("444", "422", "440", "420", "grey"):
        name = f"{sampling}_{height}x{width}"
        bytes_ = encoded(picture(height, width), sampling)
        arrays[f"{name}.jpg"] = numpy.frombuffer(bytes_, numpy.uint8)
        for divisor in (2, 4, 8):
            arrays[f"{name}.{divisor}"] = decoded(bytes_, divisor)
arrays["part"] = arrays["420_37x45.2"]
for name, kernel in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
    box = (1.25, 2.5, 21.375, 18.625)
    arrays[f"part.{name}"] = numpy.asarray(Image.fromarray(arrays["part"]).resize((9, 7), kernel, box))
numpy.savez_compressed(os.path.join(os.path.dirname(__file__), "scaled_jpeg.npz"), **arrays)
