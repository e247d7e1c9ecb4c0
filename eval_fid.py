"""Metrics of generated images: Frechet distance (FID), Inception Score, precision and recall.

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1^1/2 C_2 C_1^1/2)^1/2
    of Gaussians fitted to features of the samples and of a reference

    python eval_fid.py samples/meanflow_1.npz --reference VIRTUAL_imagenet256_labeled.npz   # as the ADM suite
    python eval_fid.py samples/meanflow_1.npz --reference data/val --features dinov2        # FD-DINOv2
    torchrun --nproc_per_node=8 eval_fid.py samples/meanflow_1.npz --reference ...          # on eight GPUs
    python eval_fid.py --reference data/val --save-statistics val.safetensors    # a reference for later

Sources: arXiv 1706.08500 (FID), 1606.03498 (IS), 1904.06991 (precision, recall), 2306.04675 (FD-DINOv2).
What each number means, and what it can be compared with: docs/EVALUATION.md.
"""
import hashlib
import math
import re
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model import (
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, barrier, command, digest_of, gather, is_first, launch,
    location, lock, number, progress, provenance, read_json, read_tensors, refuse_other, say, whole,
    write_json, write_tensors)

INCEPTION_URL = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                 "inception-2015-12-05.pt")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


# ---- Metrics of feature arrays -----------------------------------------------
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features (B, D), from sums in float64."""

    def __init__(self):
        self.count, self.total, self.scatter = 0, 0, 0

    def update(self, features):
        x = features.double()
        self.count += len(x)
        self.total, self.scatter = self.total + x.sum(0), self.scatter + x.T @ x
        return self

    @property
    def mean(self):
        return self.total / self.count

    @property
    def covariance(self):
        return (self.scatter - self.count * self.mean.outer(self.mean)) / (self.count - 1)


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (arXiv 1706.08500, eq. 6).

    (D,), (D, D), (D,), (D, D), tensors or arrays -> float >= 0, computed in float64 on the CPU.
    The last trace is the sum of the singular values of C_1^1/2 C_2^1/2. Taken as roots of eigenvalues, they
    would lose half of their digits where a covariance is singular."""
    moments = [torch.as_tensor(x).double().cpu() for x in (mean_1, cov_1, mean_2, cov_2)]
    mean_1, cov_1, mean_2, cov_2 = moments
    if mean_1.shape != mean_2.shape or not cov_1.shape == cov_2.shape == 2 * mean_1.shape:
        shapes = [tuple(x.shape) for x in moments]
        raise InputError(f"moments of shapes {shapes} are not of one kind of features")
    if not all(x.isfinite().all() for x in moments):
        raise InputError("a mean or a covariance is not finite: a damaged file?")
    roots = []
    for cov in (cov_1, cov_2):
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        # The others are 0 but for rounding.
        kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        roots.append(vectors[:, kept] * values[kept].sqrt())  # C = R R^T
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, distance.item())


def precision_recall(real, fake, k=3, block=2048):
    """Improved precision and recall (arXiv 1904.06991) as ADM counts: (N, D), (M, D) -> two floats in [0, 1].

    A set's manifold is the union of closed balls around its points, each up to the k-th nearest neighbour.
    Precision is the share of `fake` in the manifold of `real`, recall that of `real` in that of `fake`.
    N, M > k. Float64, on the features' device, in blocks of rows."""
    # Centred, |a|^2 + |b|^2 - 2 a b cancels least; torch.cdist without that formula takes 30 times as long.
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre

    def squared_distances(a, b):              # and what rounding may do to them
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        return torch.addmm(norms, a, b.T, alpha=-2), 1e-13 * norms

    def share_in_manifold(points, of):
        nearest = [squared_distances(rows, of)[0].topk(k + 1, largest=False).values
                   for rows in of.split(block)]
        radii = torch.cat(nearest)[:, k]          # each point's nearest is itself
        inside = []
        for rows in points.split(block):
            distances, rounding = squared_distances(rows, of)
            # So that ties count, as in exact arithmetic.
            inside.append((distances - rounding <= radii).any(1))
        return torch.cat(inside).double().mean().item()
    return share_in_manifold(fake, of=real), share_in_manifold(real, of=fake)


def inception_score(probabilities, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) (arXiv 1606.03498), averaged over consecutive splits as in ADM.

    (N, classes), rows that sum to 1 -> float in [1, classes]; p(y) is a split's mean."""
    scores = []
    for p in probabilities.double().split(split_size):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


# ---- Images: len(), image_size, read(consecutive indices) -> uint8 (B, 3, S, S), labels
@contextmanager
def reading(path):
    """Errors from a damaged or foreign .npz become an InputError."""
    try:
        yield
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a readable .npz with arr_0 uint8 (N, S, S, 3) ({error})") from error


class NpzImages:
    """`arr_0` of an .npz, read batch by batch: 50,000 images of 256 px are 10 GB."""

    def __init__(self, path):
        self.path = path
        with reading(path):
            self.member = zipfile.ZipFile(path).open("arr_0.npy")
            np.lib.format.read_magic(self.member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(self.member)
            side = shape[1:2]
            if (shape[1:], dtype, fortran) != ((*side, *side, 3), np.uint8, False):
                raise ValueError(f"it is {dtype} {shape}{', in Fortran order' * fortran}")
        self.count, self.image_size = shape[:2]
        self.start = self.member.tell()

    def __len__(self):
        return self.count

    def read(self, indices):
        shape = (len(indices), self.image_size, self.image_size, 3)
        with reading(self.path):
            self.member.seek(self.start + indices[0] * math.prod(shape[1:]))
            images = np.frombuffer(self.member.read(math.prod(shape)), np.uint8).reshape(shape)
        return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), None


def open_images(path, size):
    """An .npz; or a folder or .zip of images, resized as ADM does to `size` (None: that of the first)."""
    if path.endswith(".npz"):
        return NpzImages(path)
    from encode_latents import Images
    images = Images(path, size)
    if not size:
        with images.open(images.paths[0]) as file:
            images.image_size = min(Image.open(file).size)
    return images


# ---- Feature networks: -> what it is; functions of uint8 images (B, 3, S, S) to features (B, D),
# and to probabilities (B, classes), or None
def inception(path, device):
    """The original FID's network, in TorchScript: from `path`, or fetched once into torch's cache."""
    try:
        if not path:
            path = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
            if is_first() and not path.exists():
                say(f"fetching {INCEPTION_URL} to {path}")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
            barrier()
        net = torch.jit.load(path, map_location=device).eval()
        net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot load {path} ({error}): give --inception the file of {INCEPTION_URL}"
                         ) from error
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return ({"name": "Inception", "sha256": sha256}, lambda images: net(images, return_features=True),
            lambda images: net(images, no_output_bias=True))


def dinov2(source, device):
    """A DINOv2's CLS token after its last LayerNorm, images at 224 px by Pillow's bicubic: as dgm-eval."""
    from transformers import AutoModel
    try:
        net = AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
        if not net.config.model_type.startswith("dinov2"):
            raise ValueError(f"a {net.config.model_type}")
    except Exception as error:                    # transformers raises a dozen kinds
        raise InputError(f"--features {source} is no DINOv2, here or on the Hub ({error})") from error
    net = net.eval().to(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))

    def features(images):
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = [np.array(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in pixels]
        x = torch.from_numpy(np.stack(resized)).to(device).permute(0, 3, 1, 2) / 255
        return net(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    return {"name": "DINOv2", "sha256": digest_of(net.state_dict())}, features, None


def frozen_encoder(latents, device):
    """The encoder that made the latents in a folder, its tokens averaged over the grid."""
    from encode_latents import encoder_of
    net = encoder_of(latents).to(device)
    name = "RANDOM encoder (untrained)" if net.about["untrained"] else "encoder"
    return {"name": name, **net.about["identity"]}, lambda images: net(images).mean((2, 3)), None


def load_features(args, device):
    if args.features == "inception":
        return inception(args.inception, device)
    if args.features.startswith("encoder:"):
        return frozen_encoder(args.features.removeprefix("encoder:"), device)
    return dinov2("facebook/dinov2-large" if args.features == "dinov2" else args.features, device)


# ---- From images to statistics -----------------------------------------------
@torch.no_grad()
def measure(images, embed, classify, kept, micro_batch, device, rank, world):
    """-> {"mean", "covariance", and "features" of `kept` images, evenly spread}; probabilities, if any.

    Each process takes consecutive images: the Inception Score's splits depend on their order."""
    count = len(images)
    if count < max(4, world):
        raise InputError(f"{count} images are too few: give {max(4, world)} at least, and to publish 50,000")
    start, stop = rank * count // world, (rank + 1) * count // world
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.arange(kept) * count // max(kept, 1)] = True
    moments, features, probabilities = Moments(), [], []
    starts = range(start, stop, micro_batch)
    for i in progress(starts, len(starts), "batches"):
        rows = range(i, min(i + micro_batch, stop))
        batch = images.read(rows)[0].to(device)
        f = embed(batch).float()
        if not f.isfinite().all():
            raise InputError(f"features of images {i} to {rows[-1]} are not finite")
        moments.update(f)
        features.append(f.cpu()[keep[i:rows.stop]])
        probabilities.append(classify(batch).float().cpu() if classify else torch.empty(0))
    parts = torch.cat(features), torch.cat(probabilities), moments.total.cpu(), moments.scatter.cpu()
    features, probabilities, totals, scatters = zip(*gather(parts), strict=True)
    moments.count, moments.total, moments.scatter = count, sum(totals), sum(scatters)
    found = {"mean": moments.mean, "covariance": moments.covariance, "features": torch.cat(features)}
    return found, torch.cat(probabilities)


# ---- The command -------------------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("samples", type=location, nargs="?", help=".npz with arr_0 uint8 (N, S, S, 3), or a folder of images")
    add("--reference", type=location, required=True,
        help=".npz of images or of ADM's mu and sigma, folder or .zip of images, --save-statistics FILE")
    add("--image-size", type=whole(), metavar="PX",
        help="to which a folder's images are resized (default: the samples' size; without samples 256)")
    add("--pr-images", type=number(int, 0), default=10_000, metavar="N",
        help="images of the reference for precision and recall, at most (ADM); under 4: neither")
    add("--features", default="inception", help="inception (FID), dinov2 (facebook/dinov2-large), another "
        "DINOv2's Hub id or folder, or encoder:LATENTS, which made a folder's latents")
    add("--inception", type=location, metavar="PATH", help="TorchScript file (default: NVIDIA's, fetched)")
    add("--micro-batch", type=whole(), default=64, help="images per device and forward pass (ADM)")
    add("--out", type=location, metavar="JSON", help="the results (default: SAMPLES.FEATURES.json)")
    add("--save-statistics", type=location, metavar="FILE",
        help="keep the reference's in this .safetensors; needs no SAMPLES")

    args = parser.parse_args(argv)
    if not args.samples and not args.save_statistics:
        parser.error("give SAMPLES, or --save-statistics FILE")
    for path, suffix in ((args.out, ".json"), (args.save_statistics, ".safetensors")):
        if path and not path.endswith(suffix):
            parser.error(f"{path} must end in {suffix}")
    if args.samples and not args.out:
        features = re.sub(r"\W+", "-", args.features)
        args.out = f"{str(Path(args.samples)).removesuffix('.npz')}.{features}.json"
    return args


def open_reference(args, size):
    """-> images or None; the file's statistics, among {"mean", "covariance", "features"}; its `about`.

    ADM's file holds the Inception moments of ImageNet's whole training set, and 10,000 images."""
    path, stored = args.reference, {}
    if path.endswith(".safetensors"):
        parts, about, _ = read_tensors(path)
        return None, parts.get("", {}), {"features": None, **about}
    if path.endswith(".npz"):
        with reading(path), np.load(path) as file:
            if args.features == "inception" and "mu" in file:
                stored = {"mean": torch.from_numpy(file["mu"]), "covariance": torch.from_numpy(file["sigma"])}
            if stored and "arr_0" not in file:
                return None, stored, {}
    images = open_images(path, size)
    return images, stored, {"count": len(images), "image_size": images.image_size}


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(hours=4)
    torch.backends.cudnn.allow_tf32 = False       # features in true float32

    # Images of one size, and the network that sees them
    samples = open_images(args.samples, args.image_size) if args.samples else None
    size = samples.image_size if args.samples else args.image_size or 256
    real, stored, saved = open_reference(args, size)
    if args.samples and saved.get("image_size", size) != size:
        raise InputError(f"samples are of {size} pixels a side, the reference of {saved['image_size']}")
    about, embed, classify = load_features(args, device)
    if saved.get("features", about) != about:
        raise InputError(f"{args.reference} has statistics of {saved['features']}, not of {about}")
    say(f"features of {about['name']}, on {world} x {device.type}")

    # Nothing is overwritten but this program's own output, of this reference and these features
    made = {"reference": args.reference, "features": about}
    for path in filter(None, (args.out, args.save_statistics) if rank == 0 else ()):
        lock(Path(path).with_name(f".{Path(path).name}.lock"))
        if Path(path).exists():
            before = read_tensors(path, only=())[1] if path == args.save_statistics else read_json(path)
            refuse_other(path, {name: before.get(name) for name in made}, made)

    # Statistics of the reference, its images' or those in its file, and of the samples
    place = args.micro_batch, device, rank, world
    if real is not None:
        stored = {**measure(real, embed, None, min(args.pr_images, len(real)), *place)[0], **stored}
    if args.samples:
        fake, probabilities = measure(samples, embed, classify, len(samples), *place)
    if args.save_statistics and rank == 0:
        write_tensors(args.save_statistics, {"": stored}, {**saved, **made})
        say(f"statistics of {args.reference} are in {args.save_statistics}")
    if rank > 0 or not args.samples:
        return

    # The metrics
    moments = fake["mean"], fake["covariance"], stored["mean"], stored["covariance"]
    metrics = {"frechet_distance": frechet_distance(*moments)}
    if classify:
        metrics["inception_score"] = inception_score(probabilities)
    if args.pr_images > 3 and len(real := stored.get("features", ())) > 3:
        real, fake = real.to(device), fake["features"].to(device)
        metrics["precision"], metrics["recall"] = precision_recall(real, fake)
    counts = {"samples": len(samples), "reference": saved.get("count", 0)}
    write_json(args.out, {"metrics": metrics, **made, "samples": args.samples, "counts": counts,
                          **provenance()})
    for name, value in metrics.items():
        say(f"{name.replace('_', ' '):18}{value:.4f}")
    for name, count in counts.items():
        if 0 < count < 10_000:
            say(f"note: {count:,} {name}: under 10,000 the distance is biased upwards, compare equal counts")
    say(f"all of it is in {args.out}")


if __name__ == "__main__":
    command(main)
