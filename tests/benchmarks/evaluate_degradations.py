"""The tables of docs/EVALUATION.md: how the metrics answer to degraded photographs, and to few of them.

    python sanity/random_encoder.py --out runs/encoder48 --width 48 --depth 2 --heads 4 --patch 4
    python tests/benchmarks/evaluate_degradations.py data/cifar10_train.zip --features encoder:runs/encoder48

The images are split in two halves by a seeded permutation. One is the reference. The other is compared with
it as it is, then blurred, noised and compressed, and then in parts of N images, to show the bias at small N.
Prints Markdown.
"""
import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from encode_latents import Images  # noqa: E402
from eval_fid import Moments, frechet_distance, load_features, precision_recall  # noqa: E402
from model import ArgumentParser, command, launch, say, whole  # noqa: E402


def blur(image, radius):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(image, quality):
    """Compressed with the grid of blocks shifted by 4 pixels.

    CIFAR-10's photographs here are JPEGs of quality 75 already. On their own grid, quality 50, whose
    quantization table is twice theirs, would round every odd coefficient away from zero."""
    file = io.BytesIO()
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), "reflect")
    Image.fromarray(padded).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[4:-4, 4:-4]


def random_filters(images):
    """Mean size of the responses to 64 random 5 x 5 filters: (B, 64).

    A second opinion: it sees fine structure, which averages over the encoder's tokens hardly do."""
    kernel = torch.randn(64, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(images.device)
    kernel -= kernel.mean((1, 2, 3), keepdim=True)
    return torch.nn.functional.conv2d(images.float() / 255, kernel).abs().mean((2, 3))


def main(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", help="folder of class folders of images, or a .zip of one")
    add("--features", required=True, help="as eval_fid.py's")
    add("--image-size", type=whole(), default=32, help="pixels")
    add("--encoder-size", type=whole(), default=32, help="pixels")
    add("--inception", help="TorchScript file, for --features inception")
    add("--digest", help="its sha256")
    args, began = parser.parse_args(argv), time.monotonic()
    # A random encoder's features sum to 0.
    warnings.filterwarnings("ignore", message="covariance . is singular")

    device, *_ = launch()
    data = Images(args.data, args.image_size)
    about, embed, _ = load_features(args, args.image_size, device)
    order = np.random.default_rng(0).permutation(len(data))
    first, second = order[:len(data) // 2], order[len(data) // 2:]

    def pixels(indices):
        return data.read(list(indices))[0].permute(0, 2, 3, 1).numpy()

    def features(images):
        batches = torch.from_numpy(images).permute(0, 3, 1, 2).split(250)
        with torch.no_grad():
            return [torch.cat([f(x.to(device)).cpu() for x in batches]) for f in (embed, random_filters)]

    def moments(x):
        m = Moments().update(x)
        return m.mean, m.covariance
    reference, images = features(pixels(first)), pixels(second)
    as_is, targets = features(images), [moments(x) for x in reference]
    noise = np.random.default_rng(1).standard_normal(images.shape, np.float32)
    say(f"{len(first)} images against {len(second)}; the features are {about}\n")

    series = {
        "Gaussian blur, radius in pixels": ((0.4, 0.6, 1, 2), lambda s: np.stack([blur(x, s) for x in images])),
        "white noise, standard deviation in levels": (
            (4, 8, 16, 32, 64), lambda s: (images + s * noise).round().clip(0, 255).astype(np.uint8)),
        "JPEG, quality": ((90, 70, 50, 30, 10), lambda s: np.stack([jpeg(x, s) for x in images]))}
    say("| degradation | strength | Frechet distance | precision | recall | Frechet distance, random filters |")
    say("|---" * 6 + "|")

    def row(name, strength, x):
        pairs = zip(x, targets, strict=True)
        distance, of_filters = (frechet_distance(*moments(a), *target) for a, target in pairs)
        precision, recall = precision_recall(reference[0][:5000], x[0][:5000])
        say(f"| {name} | {strength} | {distance:.5f} | {precision:.3f} | {recall:.3f} | {of_filters:.5f} |")
    row("none (the other half)", "", as_is)
    for name, (strengths, degrade) in series.items():
        for strength in strengths:
            row(name, strength, features(degrade(strength)))

    say("\n| N | parts | mean distance of a part | standard deviation between parts |\n|---|---|---|---|")
    for n in (100, 200, 500, 1000, 2000, 5000, 10_000):
        parts = [x for x in as_is[0].split(n)[:20] if len(x) == n]
        distances = torch.tensor([frechet_distance(*moments(x), *targets[0]) for x in parts])
        if parts:
            spread = f"{distances.std():.5f}" if len(parts) > 1 else ""
            say(f"| {n:,} | {len(parts)} | {distances.mean():.5f} | {spread} |")
    say(f"\n{time.monotonic() - began:.0f} s, torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")


if __name__ == "__main__":
    command(main)
