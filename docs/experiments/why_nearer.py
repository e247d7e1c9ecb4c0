"""Why one jump of MFD may stand nearer to real images than its teacher: sampling error, spread, or smoothing?

    for seed in 0 1 2; do                        # three draws of the noise; the networks are the sanity run's
        python sample.py runs/sanity/teacher --decoder runs/sanity/decoder --nfe 50 --solver heun --num-samples 5000 \\
            --batch-size 500 --seed $seed --out runs/experiments/nearer/heun_50-$seed.npz
        for nfe in 1 2 4; do python sample.py runs/sanity/mfd ...same... --out runs/experiments/nearer/mfd_$nfe-$seed.npz; done
    done
    python docs/experiments/why_nearer.py

Prints for each kind of sample, over the draws: the Frechet distance in both spaces, its two terms (of the means;
of the covariances), the total variance of the features in units of the real one, sharpness; and the same of
the teacher's images after a slight blur.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from encode_latents import Images, encoder_of  # noqa: E402
from model import ArgumentParser, command  # noqa: E402
from sanity.report import distance, fit_classifier, measure, read_samples  # noqa: E402


def blur(images, sigma):
    """uint8 (N, 3, S, S), each convolved with a Gaussian of `sigma` pixels."""
    if not sigma:
        return images
    x = torch.arange(-2, 3)
    kernel = torch.exp(-x ** 2 / (2 * sigma ** 2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    y = F.pad(images.float(), (2, 2, 2, 2), mode="replicate")
    y = F.conv2d(F.conv2d(y, kernel[:, :, None], groups=3), kernel[..., None], groups=3)
    return y.round().clamp(0, 255).byte()


def sharpness(images):
    """Mean square of the difference to a blurred copy (sigma 1 px), in grey values: energy of fine detail."""
    return (images.float() - blur(images, 1.0).float()).square().mean().item()


def main(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/sanity", help="the sanity run's folder")
    parser.add_argument("--samples", default="runs/experiments/nearer", help="folder of KIND-SEED.npz")
    parser.add_argument("--data", default="data/digits", help="`train` and `held-out`")
    parser.add_argument("--blur", nargs="*", type=float, default=[0.3, 0.35, 0.4, 0.5], help="pixels")
    args = parser.parse_args(argv)
    run, device = Path(args.run), torch.device("cpu")
    encoder = encoder_of(run / "latents")
    size = encoder.about["identity"]["image_size"]
    train, held_out = (Images(Path(args.data, part), size) for part in ("train", "held-out"))
    real, labels = held_out.read(range(len(held_out)))
    spaced = torch.linspace(0, len(train) - 1, len(held_out), dtype=torch.float64).round().long().tolist()
    other, other_labels = train.read(spaced)
    net = fit_classifier(train, 200, 0, device)
    reference, _ = measure(real, labels, encoder, net, device)

    def row(images, labels):
        moments, _ = measure(images, labels, encoder, net, device)
        numbers = []
        for space in ("encoder", "classifier"):
            a, b = moments[space], reference[space]
            of_means = (a.mean - b.mean).square().sum().item()
            whole = distance(a, b)
            numbers += [whole, of_means, whole - of_means, (a.covariance.trace() / b.covariance.trace()).item()]
        return [*numbers, sharpness(images) / sharpness(real)]

    kinds = {}
    for path in sorted(Path(args.samples).glob("*-*.npz")):
        kinds.setdefault(path.stem.rpartition("-")[0], []).append(read_samples(path, size, len(train.classes)))
    rows = {"real (training)": [row(other, other_labels)]}
    rows |= {kind: [row(*draw) for draw in draws] for kind, draws in kinds.items()}
    rows |= {f"{kind}, blurred {sigma}": [row(blur(images, sigma), labels) for images, labels in kinds[kind]]
             for sigma in args.blur for kind in kinds if not kind.startswith("mfd")}
    print("| | encoder: distance | of means | of covariances | variance | classifier: distance | of means | "
          "of covariances | variance | sharpness |\n" + "|---" * 10 + "|")
    for kind, draws in rows.items():
        cells = [f"{statistics.mean(x):.3g}" + (f" ± {statistics.stdev(x):.1g}" if len(x) > 1 else "") for x in zip(*draws, strict=True)]
        print("|", " | ".join([kind, *cells]), "|", flush=True)


if __name__ == "__main__":
    command(main)
