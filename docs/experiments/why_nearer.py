"""Why one jump of MFD may stand nearer to real images than its teacher: sampling error, spread, or smoothing?

    for seed in 0 1 2; do                        # three draws of the noise; the networks are the sanity run's
        python sample.py runs/sanity/teacher --decoder runs/sanity/decoder --nfe 50 --solver heun --num-samples 5000 \\
            --batch-size 500 --seed $seed --out runs/experiments/nearer/heun_50-$seed.npz
        for nfe in 1 2 4; do python sample.py runs/sanity/mfd ...same... --out runs/experiments/nearer/mfd_$nfe-$seed.npz; done
    done
    python docs/experiments/why_nearer.py

Prints for each kind of sample, over the draws: the Frechet distance in both spaces, its two terms (of the
means; of the covariances), the total variance of the features in units of the real one; and the same of the
teacher's images after a slight blur.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from docs.experiments.run import markdown, spaced
from encode_latents import Images, encoder_of
from model import command
from sanity.report import distance, fit_classifier, measure, read_samples

BLURS = (0.3, 0.35, 0.4, 0.5)                     # pixels
CPU = torch.device("cpu")


def blur(images, sigma):
    """uint8 (N, 3, S, S), each convolved with a Gaussian of `sigma` pixels."""
    kernel = torch.exp(-torch.arange(-2, 3) ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    y = F.pad(images.float(), (2, 2, 2, 2), mode="replicate")
    y = F.conv2d(F.conv2d(y, kernel[:, :, None], groups=3), kernel[..., None], groups=3)
    return y.round().clamp(0, 255).byte()


def main():
    encoder = encoder_of("runs/sanity/latents")
    train, held_out = (Images(f"data/digits/{part}", 32) for part in ("train", "held-out"))
    real, labels = held_out.read(range(len(held_out)))
    net = fit_classifier(train, 200, 0, CPU)
    reference, _ = measure(real, labels, encoder, net, CPU)

    def row(images, labels):
        moments, numbers = measure(images, labels, encoder, net, CPU)[0], {}
        for space in ("encoder", "classifier"):
            a, b = moments[space], reference[space]
            of_means, both = (a.mean - b.mean).square().sum().item(), distance(a, b)
            numbers |= {f"{space}: distance": both, f"{space}: of means": of_means,
                        f"{space}: of covariances": both - of_means,
                        f"{space}: variance": (a.covariance.trace() / b.covariance.trace()).item()}
        return numbers

    rows = {"real (training)": [row(*train.read(spaced(len(train), len(held_out))))]}
    for path in sorted(Path("runs/experiments/nearer").glob("*-*.npz")):
        kind, (images, y) = path.stem.rpartition("-")[0], read_samples(path, 32, len(train.classes))
        rows.setdefault(kind, []).append(row(images, y))
        for sigma in () if kind.startswith("mfd") else BLURS:
            rows.setdefault(f"{kind}, blurred {sigma}", []).append(row(blur(images, sigma), y))

    def cell(x):
        return f"{statistics.mean(x):.3g}" + (f" ± {statistics.stdev(x):.1g}" if len(x) > 1 else "")
    print(markdown({kind: {key: cell([draw[key] for draw in draws]) for key in draws[0]}
                    for kind, draws in rows.items()}))


if __name__ == "__main__":
    command(main)
