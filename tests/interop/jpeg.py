"""Our JPEG decoder beside Pillow's, over every sampling of 1 to 4 in each direction of three components.

    mkdir DIR
    VITRUM_JPEGS=DIR cargo test --lib -- data::jpeg::written
    python tests/interop/jpeg.py DIR

The test writes files that no camera writes (one scan or several, any order, restarts, odd sizes, progressive) and the pixels
that it has decoded, at full size or smaller. This decodes them with Pillow (`Image.draft` for smaller ones) and prints, for each
way of coding, how many pictures there are of each ratio of samplings, how many values differ, and by how much at most. Needs
numpy and Pillow.
"""
import collections
import glob
import io
import os
import sys

import numpy
from PIL import Image, ImageFile, features


def decoded(data, divisor):
    """RGB of Pillow at 1/divisor, or its reason not to."""
    image = Image.open(io.BytesIO(data))
    if divisor > 1:
        _, _, offset, arguments = image.tile[0]
        image._size = tuple(-(-side // divisor) for side in image.size)
        image.tile = [ImageFile._Tile("jpeg", (0, 0, *image.size), offset, arguments)]
        image.decoderconfig = (divisor, 0)
    return numpy.asarray(image.convert("RGB"))


def main(folder):
    print("Pillow", Image.__version__, "libjpeg-turbo", features.version_feature("libjpeg_turbo"))
    table = collections.defaultdict(lambda: [0, 0, 0, 0])
    only_ours, only_pillow = collections.Counter(), collections.Counter()
    files = sorted(glob.glob(os.path.join(folder, "*.jpg")))
    for path in files:
        sampling, kind, restarts, _, divisor = os.path.basename(path)[:-4].split("_")
        factors = [tuple(map(int, pair.split("x"))) for pair in sampling.split(",")]
        most = [max(f[i] for f in factors) for i in (0, 1)]
        if len(factors) == 1:
            most = factors[0]
        ratios = " ".join("x".join(f"{most[i] / f[i]:g}" for i in (0, 1)) for f in factors)
        ours = numpy.fromfile(path[:-4] + ".rgb", numpy.uint8)
        try:
            theirs = decoded(open(path, "rb").read(), int(divisor))
        except (OSError, SyntaxError):
            only_ours[kind] += len(ours) > 0
            continue
        if len(ours) == 0:
            only_pillow[ratios] += 1
            continue
        off = numpy.abs(ours.astype(int) - theirs.reshape(-1))
        shape = "progressive" if kind == "progressive" else f"{kind.count('+') + 1} scans"
        row = table[shape, "restarts" if any(int(n) for n in restarts.split(",")) else "", ratios]
        row[0] += 1
        row[1] += off.size
        row[2] += int((off > 0).sum())
        row[3] = max(row[3], int(off.max()))
    print(f"{'coding':12} {'':9} {'pixels of a sample, each component':36} {'pictures':>8} {'values':>9} {'differ':>7} {'most':>5}")
    for (shape, restarts, ratios), row in sorted(table.items()):
        print(f"{shape:12} {restarts:9} {ratios:36} {row[0]:8} {row[1]:9} {row[2]:7} {row[3]:5}")
    pictures, values, differ = (sum(row[i] for row in table.values()) for i in (0, 1, 2))
    worst = max((row[3] for row in table.values()), default=0)
    print(f"{len(files)} files, {pictures} decoded by both: {differ} of {values} values differ, by {worst} at most")
    print("decoded here and refused by Pillow:", dict(only_ours) or "none")
    print("decoded by Pillow and refused here:", dict(only_pillow) or "none")
    return worst > 0 or bool(only_pillow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
