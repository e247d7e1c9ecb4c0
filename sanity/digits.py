"""Coloured digits: the sanity run's data, drawn with Pillow's own font, as PNG files in class folders.

    python sanity/digits.py --out data/digits     -> data/digits/train/CLASS/00000.png, .../held-out/...

Ten classes; size, place, angle and the two colours vary. An image follows from split, class and index alone,
so that asking for more changes no earlier one.
"""
import functools
import math
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (  # noqa: E402
    ArgumentParser, command, lock, read_json, refuse_other, say, whole, write_json)

SPLITS = ("train", "held-out")
LUMA = np.array([0.299, 0.587, 0.114])
OVERSAMPLE = 3                                    # drawn so much larger, then averaged


@functools.cache
def glyph(digit):
    """The digit as a large grey mask, cut to its bounding box."""
    canvas = Image.new("L", (320, 320))
    font = ImageFont.load_default(160)
    ImageDraw.Draw(canvas).text((80, 40), str(digit), fill=255, font=font, stroke_width=2)
    return canvas.crop(canvas.getbbox())


def colour(rng, light):
    """A bright or a dark colour of any hue, RGB in [0, 1]."""
    lowest, highest = ([0, 0.2, 0.7], [1, 0.9, 1]) if light else ([0, 0.3, 0], [1, 1, 0.25])
    hue, saturation, value = rng.uniform(lowest, highest)
    return value * (1 - saturation * (1 - np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)))


def draw(split, digit, index, size):
    """One image, (size, size, 3) uint8."""
    rng = np.random.default_rng([0, SPLITS.index(split), digit, index])
    paper, ink = colour(rng, light=False), colour(rng, light=True)
    while abs((paper - ink) @ LUMA) < 0.35:        # a bright blue on a dark yellow would be hard to read
        paper, ink = colour(rng, light=False), colour(rng, light=True)
    mask, big = glyph(digit), size * OVERSAMPLE
    scale = rng.uniform(0.7, 0.85) * big / mask.height
    angle = math.radians(rng.uniform(-8, 8))
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    extent = scale * scale * np.array([mask.width * abs(cos) + mask.height * abs(sin),
                                       mask.width * abs(sin) + mask.height * abs(cos)])
    # A third of the way to the edge, at most.
    room = np.maximum(big - 2 * OVERSAMPLE - extent, 0) / 6
    x, y = big / 2 + rng.uniform(-room, room)
    inverse = (cos, sin, mask.width / 2 - cos * x - sin * y, -sin, cos, mask.height / 2 + sin * x - cos * y)
    placed = mask.transform((big, big), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    cover = np.asarray(placed.reduce(OVERSAMPLE), dtype=np.float64)[..., None] / 255
    return np.round(255 * (paper + (ink - paper) * cover)).astype(np.uint8)


def write_class(folder, split, digit, count, size):
    folder = Path(folder, split, str(digit))
    folder.mkdir(parents=True)
    for index in range(count):
        image = Image.fromarray(draw(split, digit, index, size))
        image.save(folder / f"{index:05}.png", compress_level=1)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", default="data/digits", help="folder to write")
    add("--train", type=whole(10), default=20000, metavar="IMAGES", help="to train on, a tenth of each class")
    add("--held-out", type=whole(10), default=5000, metavar="IMAGES", help="for the evaluation, likewise")
    add("--image-size", type=whole(8), default=32, help="pixels")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, settings = Path(args.out), {name: x for name, x in vars(args).items() if name != "out"}
    lock(out.with_name(f".{out.name}.lock"))
    if out.is_dir() and any(out.iterdir()):
        refuse_other(out, read_json(out / "digits.json"), settings)
        return say(f"{out} is there")
    # A killed call's workers go on, in its folder.
    for half in out.parent.glob(f".{out.name}.*.tmp"):
        shutil.rmtree(half, ignore_errors=True)
    half = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    jobs = [(half, split, digit, count // 10, args.image_size)
            for split, count in zip(SPLITS, (args.train, args.held_out), strict=True) for digit in range(10)]
    try:
        with ProcessPoolExecutor(min(os.cpu_count(), 10)) as pool:
            list(pool.map(write_class, *zip(*jobs, strict=True)))
        write_json(half / "digits.json", settings)
        os.replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    say(f"{out}: digits of {args.image_size} pixels")


if __name__ == "__main__":
    command(main)
