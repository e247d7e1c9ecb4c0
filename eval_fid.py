"""Metrics of generated images: Frechet distance (FID), Inception Score, precision and recall.

    d^2 = |m_1 - m_2|^2 + tr C_1 + tr C_2 - 2 tr (C_1^1/2 C_2 C_1^1/2)^1/2
    of Gaussians fitted to features of the samples and of a reference

    python eval_fid.py samples/meanflow_1.npz --reference VIRTUAL_imagenet256_labeled.npz   # as the ADM suite
    python eval_fid.py samples/meanflow_1.npz --reference data/val --features dinov2        # FD-DINOv2
    torchrun --nproc_per_node=8 eval_fid.py samples/meanflow_1.npz --reference ...          # on eight GPUs
    python eval_fid.py --reference data/val --save-statistics val.safetensors    # a reference for later

Sources: arXiv 1706.08500 (FID), 1606.03498 (IS), 1904.06991 (precision, recall), 2306.04675 (FD-DINOv2).
What each number is, and whose numbers it may stand beside: docs/EVALUATION.md.
"""
import hashlib
import io
import math
import os
import re
import sys
import time
import urllib.request
import warnings
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
import torch.distributed as dist

from model import (
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, barrier, command, digest_of, is_first, launch, lock,
    number, provenance, read_tensors, say, whole, write_atomically, write_json, write_tensors)

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INTERFACE = "the interface of inception-2015-12-05.pt"
# Neighbours of precision and recall (ADM).
K = 3


# ---- Metrics of feature arrays -----------------------------------------------
class Moments:
    """Count, mean (D,) and unbiased covariance (D, D) of features seen in parts, in float64.

    `update` takes features (B, D), `merge` the Moments of another process. The sums S of outer products about
    the mean join as S_a + S_b + (m_b - m_a)(m_b - m_a)^T n_a n_b / n (Chan et al. 1979): nothing cancels."""
    def __init__(self):
        self.count = 0

    def update(self, features):
        mean = features.double().mean(0)
        centred = features.double() - mean
        return self._join(len(features), mean, lambda scatter: scatter.addmm_(centred.T, centred))

    def merge(self, other):
        if not other.count:
            return self
        return self._join(other.count, other.mean, lambda scatter: scatter.add_(other.scatter))

    def _join(self, count, mean, add_to):
        if not self.count:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        delta, total = mean - self.mean, self.count + count
        add_to(self.scatter).addr_(delta, delta, alpha=self.count * count / total)
        self.count, self.mean = total, self.mean + delta * (count / total)
        return self

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)


def frechet_distance(mean_1, cov_1, mean_2, cov_2):
    """Squared Frechet (2-Wasserstein) distance of two Gaussians (arXiv 1706.08500, eq. 6).

    (D,), (D, D), (D,), (D, D), tensors or arrays -> float >= 0.
    Its last trace is the sum of the roots of a symmetric matrix's eigenvalues; these roots are the
    singular values of C_1^1/2 C_2^1/2. Taken as such they are real, and keep the digits that squaring
    would cost where a covariance is singular. Eigenvalues that rounding cannot tell from 0 count as 0,
    and a warning names the rank.
    InputError: shapes disagree, a value is not finite, or a `cov` is no covariance."""
    moments = [torch.as_tensor(x).double() for x in (mean_1, cov_1, mean_2, cov_2)]
    mean_1, cov_1, mean_2, cov_2 = moments
    square = cov_1.shape == cov_2.shape == 2 * mean_1.shape
    if mean_1.dim() != 1 or mean_2.shape != mean_1.shape or not square:
        raise InputError(f"moments of shapes {[tuple(x.shape) for x in moments]} do not fit: "
                         "use one kind of features")
    if not all(x.isfinite().all() for x in moments):
        raise InputError("a mean or covariance is not finite: of fewer than 2 images, or its file is damaged")
    roots = []
    for place, cov in enumerate((cov_1, cov_2), 1):
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
        largest = values.abs().max()
        # Files in float32 are off by 1e-6.
        if values[0] < -1e-4 * largest or (cov - cov.T).abs().max() > 1e-4 * largest:
            raise InputError(f"covariance {place} is not symmetric with eigenvalues >= 0: "
                             "get an undamaged file")
        kept = values > largest * len(values) * torch.finfo(torch.float64).eps
        if not kept.all():
            warnings.warn(f"covariance {place} is singular: rank {kept.sum()} of {len(values)}", stacklevel=2)
        # C = R R^T
        roots.append(vectors[:, kept] * values[kept].sqrt())
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross
    return max(0.0, distance.item())


def precision_recall(real, fake, k=K, block=2048):
    """Improved precision and recall (arXiv 1904.06991) as ADM counts: (N, D), (M, D) -> two floats in [0, 1].

    A set's manifold: the balls around its points, each as far as the point's k-th nearest other one, border
    included. Precision is the part of `fake` in the manifold of `real`, recall the part of `real` in that of
    `fake`. Float64, on the features' device, `block` x `block` distances at a time.
    InputError: a set has no k + 1 points."""
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need at least {k + 1} images a side, "
                         f"here {len(real)} and {len(fake)}")
    # Where |a|^2 + |b|^2 - 2 a b cancels least.
    centre = real.double().mean(0)

    def squared_distances(a, b):
        """And what rounding may do to them."""
        a, b = a.double() - centre, b.double() - centre
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        return torch.addmm(norms, a, b.T, alpha=-2), 1e-13 * norms

    def squared_radii(x):
        parts = x.split(block)
        # k + 1 of every part: a point's nearest is itself.
        nearest = [[] for _ in parts]
        for i, a in enumerate(parts):
            # Each pair of parts once.
            for j, b in enumerate(parts[:i + 1]):
                distances, _ = squared_distances(a, b)
                for of, d in [(i, distances)] + [(j, distances.T)] * (j < i):
                    nearest[of].append(d.topk(min(k + 1, d.shape[1]), largest=False).values)
        return torch.cat([torch.cat(near, 1).topk(k + 1, largest=False).values[:, k] for near in nearest])

    def share_in_manifold(points, of):
        inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
        for centres, radii in zip(of.split(block), squared_radii(of).split(block), strict=True):
            # Of the points, those that no ball holds so far.
            for rows in (~inside).nonzero()[:, 0].split(block):
                distances, rounding = squared_distances(points[rows], centres)
                # Less rounding, so that ties count, as in exact arithmetic.
                inside[rows] = (distances - rounding <= radii).any(1)
        return inside.double().mean().item()
    return share_in_manifold(fake, of=real), share_in_manifold(real, of=fake)


def inception_score(probabilities, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) (arXiv 1606.03498), averaged over consecutive splits as in ADM.

    (N, classes), rows that sum to 1 -> float in [1, classes]; p(y) is a split's mean. What does not fill a
    split is a split of its own."""
    scores = []
    for p in probabilities.double().split(split_size):
        divergence = torch.xlogy(p, p) - torch.xlogy(p, p.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return torch.stack(scores).mean().item()


# ---- Images: len(), image_size, __getitems__(consecutive) -> uint8 (B, 3, S, S), labels
@contextmanager
def complaint(what, hint):
    """What a damaged or foreign file may end in becomes an InputError: `what` (the reason): `hint`."""
    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError,
            OverflowError, HTTPException, BadZipFile, zlib.error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what} ({lines[-1] if lines else type(error).__name__}): {hint}") from error


class NpzImages:
    """`arr_0` of an .npz, streamed: 50,000 images of 256 px are 10 GB, a batch is not."""
    def __init__(self, path):
        self.path = path
        with complaint(f"{path} is not a readable .npz with arr_0", "make or download it again"):
            archive = ZipFile(path)
            self.member = archive.open("arr_0.npy")
            formats = np.lib.format
            first = formats.read_magic(self.member) == (1, 0)
            read = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
            self.shape, fortran, dtype = read(self.member)
            self.start, self.row = self.member.tell(), math.prod(self.shape[1:])
            length = archive.getinfo("arr_0.npy").file_size
            packed = Path(path).stat().st_size
        square = len(self.shape) == 4 and self.shape[1:] == (self.shape[1], self.shape[1], 3)
        if dtype != np.uint8 or fortran or not square or min(self.shape[:2]) < 0 or not self.row:
            raise InputError(
                f"{path}: arr_0 is {dtype} {self.shape}{' in Fortran order' * fortran}, and must be uint8 "
                "(N, S, S, 3) in C order: write it as sample.py does")
        # Nothing packs a thousand bytes into less than one.
        if length != self.start + self.shape[0] * self.row or length > 1100 * packed:
            raise InputError(f"{path}: arr_0 is not as long as its header says: make or download it again")
        self.image_size = self.shape[1]

    def __len__(self):
        return self.shape[0]

    def __getitems__(self, indices):
        with complaint(f"{self.path} is damaged", "make or download it again"):
            self.member.seek(self.start + indices[0] * self.row)
            data = np.frombuffer(self.member.read(len(indices) * self.row), np.uint8)
            images = data.reshape(len(indices), *self.shape[1:]).transpose(0, 3, 1, 2)
            return torch.from_numpy(images.copy()), None


def open_images(path, size):
    """An .npz; or a folder or .zip of images, brought to `size` pixels as ADM does (None: all have one)."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist: give an .npz, a folder or a .zip "
                         "(python sample.py makes samples)")
    if Path(path).suffix == ".npz":
        return NpzImages(path)
    from encode_latents import Images
    images = Images(path, size)
    if size is None:
        from PIL import Image
        with complaint(f"{path} holds a file that is no image", "replace or remove it"):
            sizes = {Image.open(images.open(name)).size for name in images.paths}
        if len(sizes) > 1 or len(set(min(sizes))) > 1:
            raise InputError(
                f"{path} has images of {min(sizes)} to {max(sizes)} pixels: samples must be square and of "
                "one size, and a reference is brought to one by --image-size")
        images.image_size = min(sizes)[0]
    return images


# ---- Feature networks: -> what it is, and functions of uint8 images (B, 3, S, S):
# features (B, D), and probabilities (B, classes) or None
def inception(path, digest, device):
    """A TorchScript file with the interface of NVIDIA's inception-2015-12-05.pt.

    That one is the TensorFlow network of the original FID and takes images of any size; it is the default,
    fetched into torch's cache on first use."""
    if not path:
        path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rpartition("/")[2]
        if not path.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
            fetch(INCEPTION_URL, path)
        barrier()
    sha256 = file_digest(path)
    if digest and digest.lower() != sha256:
        raise InputError(f"{path} has sha256 {sha256}, which is not --digest: get the file you mean")
    with complaint(f"{path} is no TorchScript file", f"give one with {INTERFACE}"):
        net = torch.jit.load(path, map_location=device).eval()
    about = {"name": "Inception (TorchScript)", "file": str(path), "sha256": sha256}
    return (about, lambda images: net(images, return_features=True),
            lambda images: net(images, no_output_bias=True))


def fetch(url, path):
    """Download a TorchScript file. What is broken off, or is none (a page that says why not), is not kept."""
    with complaint(f"cannot fetch {url}", "get it elsewhere and give it as --inception PATH"):
        with urllib.request.urlopen(url, timeout=60) as answer:
            say(f"fetching {url} ({answer.headers['Content-Length']} bytes) to {path}")
            data = answer.read()
        torch.jit.load(io.BytesIO(data), map_location="cpu")
    write_atomically(path, lambda file: file.write(data))


def dinov2(source, device):
    """CLS token after a DINOv2's last LayerNorm, at 224 px by Pillow's bicubic: dgm-eval's (2306.04675)."""
    from PIL import Image
    from transformers import AutoConfig, AutoModel
    with complaint(f"--features {source}: not inception, dinov2 or encoder:..., and no DINOv2 by this name",
                   "give one of these, or a DINOv2's folder or Hub id"):
        # Else there is no need to ask the Hub.
        if "/" not in source and not Path(source).exists():
            raise ValueError("neither a folder nor ORGANIZATION/NAME")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise ValueError("another kind of network")
        net = AutoModel.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    net = net.eval().to(device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))

    def features(images):
        pixels = images.permute(0, 2, 3, 1).cpu().numpy()
        resized = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in pixels]
        x = torch.from_numpy(np.stack([np.array(image) for image in resized]))
        x = x.to(device).permute(0, 3, 1, 2) / 255
        return net(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    return {"name": "DINOv2", "source": source, "sha256": digest_of(net.state_dict())}, features, None


def frozen_encoder(source, size, encoder_size, device):
    """The encoder of our own networks, its tokens averaged over the grid; source: latents that it made, whose
    description gives sizes and precision, or its own folder or Hub id."""
    from encode_latents import Encoder, encoder_of, read_description
    if Path(source, "latents.json").exists():
        net = encoder_of(read_description(source))
    else:
        net = Encoder(source, size, encoder_size)
    net, about = net.eval().to(device), net.describe()
    name = "RANDOM encoder (untrained)" if about.get("untrained") else "encoder"
    return {"name": name, **about}, lambda images: net(images).mean((2, 3)), None


def load_features(args, size, device):
    """The one of these that --features names, tried on two blank images."""
    if args.features == "inception":
        about, features, probabilities = inception(args.inception, args.digest, device)
    elif args.features.startswith("encoder:"):
        about, features, probabilities = frozen_encoder(args.features[8:], size, args.encoder_size, device)
    else:
        source = {"dinov2": "facebook/dinov2-large"}.get(args.features, args.features)
        about, features, probabilities = dinov2(source, device)
    blank = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
    with torch.no_grad(), complaint(f"{about['name']} does not answer as it should",
                                    f"a TorchScript file needs {INTERFACE}"):
        f, p = features(blank), probabilities(blank) if probabilities else torch.ones(2, 1)
        two_rows = f.dim() == p.dim() == 2 and len(f) == len(p) == 2
        if not two_rows or ((p.sum(1) - 1).abs() > 1e-3).any():
            raise ValueError(f"features {tuple(f.shape)} and probabilities {tuple(p.shape)} of 2 images")
    return {**about, "width": f.shape[1]}, features, probabilities


# ---- From images or files to statistics: mean, covariance, features, probabilities;
# about: what they are of
def file_digest(path):
    digest = hashlib.sha256()
    with complaint(f"cannot read {path}", "check the path"), open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def measure(images, network, kept, micro_batch, device, rank=0, world=1):
    """Moments of all images' features, features of `kept` of them evenly spread, probabilities if any.

    Each process takes consecutive images, as the Inception Score's splits go by order.
    Returns None beside rank 0."""
    from tqdm import tqdm
    (_, embed, classify), count = network, len(images)
    start, stop = rank * count // world, (rank + 1) * count // world
    keep = torch.zeros(count, dtype=torch.bool)
    keep[torch.arange(kept) * count // max(kept, 1)] = True
    moments, features, probabilities, digests = Moments(), [], [], []
    silent = rank > 0 or not sys.stderr.isatty()
    for i in tqdm(range(start, stop, micro_batch), unit="batch", disable=silent):
        rows = range(i, min(i + micro_batch, stop))
        batch = images.__getitems__(rows)[0]
        pixels = (image.permute(1, 2, 0).numpy().tobytes() for image in batch)
        digests += [hashlib.sha256(image).digest() for image in pixels]
        batch = batch.to(device)
        with torch.no_grad():
            f = embed(batch).float()
            if classify:
                probabilities.append(classify(batch).float().cpu())
        if not f.isfinite().all():
            raise InputError(f"features of images {i} to {rows[-1]} are not finite: "
                             "the network's file is damaged")
        moments.update(f)
        features.append(f.cpu()[keep[rows.start:rows.stop]])
    # More processes than images: nothing here.
    if moments.count:
        moments.mean, moments.scatter = moments.mean.cpu(), moments.scatter.cpu()
    part = moments, features, probabilities, digests
    parts = [part] if world == 1 else [None] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(part, parts)
    if rank > 0:
        return None
    for other, *_ in parts[1:]:
        moments.merge(other)
    features, probabilities, digests = (sum((part[i] for part in parts), []) for i in (1, 2, 3))
    # The same pixels in any kind of file.
    pixels_sha256 = hashlib.sha256(b"".join(digests)).hexdigest()
    return SimpleNamespace(
        mean=moments.mean, covariance=moments.covariance, features=torch.cat(features),
        probabilities=torch.cat(probabilities) if classify else None,
        about={"count": count, "image_size": images.image_size, "pixels_sha256": pixels_sha256})


def open_statistics(path):
    """The statistics that --save-statistics keeps."""
    parts, about, _ = read_tensors(path)
    hint = "eval_fid.py --reference IMAGES --save-statistics FILE makes them"
    with complaint(f"{path} has no statistics", hint):
        stored = SimpleNamespace(**{name: parts[""][name] for name in STATISTICS}, about=about)
        width, = stored.mean.shape
        features, counts = dict(about["features"]), (about.get("count"), about.get("image_size"))
        fits = stored.covariance.shape == (width, width) and stored.features.shape[1:] == (width,)
        if not fits or features["width"] != width or not all(type(n) in (int, type(None)) for n in counts):
            raise ValueError("entries of other kinds or sizes")
    return stored


STATISTICS = "mean", "covariance", "features"


def open_reference(args, samples):
    """-> images or None, (mu, sigma) or None, statistics of ours or None.

    ADM's references hold mu and sigma of the Inception features of ImageNet's whole training set, and 10,000
    of its images, for precision and recall."""
    path, moments, has_images = Path(args.reference), None, True
    if path.suffix == ".safetensors":
        return None, None, open_statistics(path)
    if path.suffix == ".npz" and path.exists():
        with complaint(f"{path} is not a readable .npz", "make or download it again"):
            file = np.load(path, allow_pickle=False)
            has_images = "arr_0" in file.files
            if "mu" in file.files and args.features == "inception":
                moments = [torch.from_numpy(file[name]).double() for name in ("mu", "sigma")]
                len(moments[0])
    if not has_images and not moments:
        raise InputError(f"{path} has no arr_0, and mu, sigma serve --features inception only: give images")
    size = args.image_size or samples and samples.image_size
    return open_images(path, size) if has_images else None, moments, None


# ---- The command -------------------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("images").add_argument
    add("samples", nargs="?", help=".npz with arr_0 uint8 (N, S, S, 3), or a folder of images of one size")
    add("--reference", required=True,
        help=".npz of images or of ADM's mu and sigma, folder or .zip of images, or --save-statistics file")
    add("--image-size", type=whole(), metavar="PX", help="of a reference folder (default: the samples')")
    add("--pr-images", type=number(int, 0), default=10_000, metavar="N",
        help="images of the reference, evenly spread, for precision and recall, at most (ADM); 0: neither")

    add = parser.add_argument_group("features").add_argument
    add("--features", default="inception",
        help="inception (FID), dinov2 (facebook/dinov2-large), another DINOv2's Hub id or folder, or "
             "encoder:LATENTS, the encoder that made these; or encoder: and its folder or Hub id")
    add("--inception", metavar="PATH", help=f"TorchScript file (default: {INCEPTION_URL}, fetched once)")
    add("--digest", metavar="SHA256", help="what that file must have (default: any; it is printed)")
    add("--encoder-size", type=whole(), metavar="PX", help="side at which an encoder sees images")
    add("--micro-batch", type=whole(), default=64, help="images per device and forward pass (ADM)")

    add = parser.add_argument_group("files").add_argument
    add("--out", metavar="FILE", help="JSON of the results (default: SAMPLES.metrics.json)")
    add("--save-statistics", metavar="FILE", help="keep the reference's, .safetensors; needs no SAMPLES")

    args = parser.parse_args(argv)
    if not args.samples and not args.save_statistics:
        parser.error("no samples: give an .npz or a folder of them, or --save-statistics FILE")
    if 0 < args.pr_images <= K:
        parser.error(f"--pr-images {args.pr_images}: 0, or more than {K}")
    kind, _, source = args.features.partition(":")
    sized = kind == "encoder" and not Path(source, "latents.json").exists()
    if sized and not args.encoder_size:
        parser.error(f"{source} has no latents.json, so it is an encoder: give its --encoder-size PX too")
    if args.samples and not args.out:
        args.out = re.sub(r"\.(npz|zip)$", "", str(Path(args.samples))) + ".metrics.json"
    return args


def common_size(sources, stored):
    """The one side in pixels of samples and reference; 256 where nothing says it."""
    sizes = {images.image_size for images in sources} | {stored.about.get("image_size") if stored else None}
    sizes.discard(None)
    if len(sizes) > 1:
        raise InputError(f"samples and reference are of {sorted(sizes)} pixels a side, and must be of one "
                         "size (a reference folder is brought to --image-size)")
    fewest = min(map(len, sources), default=K + 1)
    if fewest <= K:
        raise InputError(f"{fewest} images are too few: give {K + 1} at least, to publish it 50,000")
    return sizes.pop() if sizes else 256


def compare(fake, reference, args, device):
    """-> metrics, and notes on them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distance = frechet_distance(fake.mean, fake.covariance, reference.mean, reference.covariance)
    metrics = {"frechet_distance": distance}
    notes = [f"{warning.message} (1: samples, 2: reference)" for warning in caught]
    if fake.probabilities is not None:
        metrics["inception_score"] = inception_score(fake.probabilities)
    if args.pr_images and len(reference.features):
        pair = precision_recall(reference.features.to(device), fake.features.to(device))
        metrics["precision"], metrics["recall"] = pair
    else:
        notes.append("no precision and recall: the reference has no images, or --pr-images is 0")
    counts = [("samples", fake.about["count"])]
    if "moments" not in reference.about:
        counts.append(("reference images", reference.about.get("count")))
    notes += [f"{count:,} {name}: under 10,000 the distance is biased upwards; compare equal counts only"
              for name, count in counts if count and count < 10_000]
    return metrics, notes


def described(path, about):
    sha256 = file_digest(path) if Path(path).is_file() else None
    return {"path": str(path), "sha256": sha256, **about}


def report(result, args):
    """Print what the JSON holds."""
    for side in ("samples", "reference", "features"):
        say(f"{side:18}" + ", ".join(f"{key} {value}" for key, value in result[side].items()))
    names = {"inception": "FID", "dinov2": "FD-DINOv2"}
    for key, value in result["metrics"].items():
        name = key.replace("_", " ")
        if key == "frechet_distance":
            name = names.get(args.features, "Frechet distance")
        say(f"{name:18}{value:.4f}")
    for note in result["notes"]:
        say(f"note: {note}")
    say(f"written: {args.out}")


def main(argv=None):
    args, began = parse_args(argv), time.monotonic()
    device, rank, world = launch(hours=4)
    # Features in true float32.
    torch.backends.cudnn.allow_tf32 = False

    samples = open_images(args.samples, None) if args.samples else None
    real, moments, stored = open_reference(args, samples)
    sources = [images for images in (samples, real) if images is not None]
    size = common_size(sources, stored)
    network = load_features(args, size, device)
    about = network[0]
    used = stored.about["features"] if stored else {"width": len(moments[0])} if moments else {}
    # Wherever it lies.
    if any(used[key] != about.get(key) for key in used.keys() - {"file", "source", "id"}):
        raise InputError(f"{args.reference} is of other features, {used}, than {about}: "
                         "make or get one of these")
    if is_first():
        counts = " and ".join(f"{len(images):,}" for images in sources)
        say(f"{about['name']}: features of {counts} images of {size} px, on {world} x {device.type}")
        for file in filter(None, (args.out, args.save_statistics)):
            lock(Path(file).with_name(f".{Path(file).name}.lock"))
    barrier()

    reference, fake, place = stored, None, (args.micro_batch, device, rank, world)
    if real is not None:
        reference = measure(real, network, min(args.pr_images, len(real)), *place)
    if samples is not None:
        fake = measure(samples, network, len(samples), *place)
    if rank > 0:
        return
    if moments:
        reference = reference or SimpleNamespace(features=torch.empty(0), about={})
        reference.mean, reference.covariance = moments
        reference.about["moments"] = "mu and sigma of the file"
    if args.save_statistics:
        tensors = {name: getattr(reference, name) for name in STATISTICS}
        write_tensors(args.save_statistics, {"": tensors}, {**reference.about, "features": about})
        say(f"statistics of {args.reference} are in {args.save_statistics}")
    if fake is None:
        return

    metrics, notes = compare(fake, reference, args, device)
    pr_images = len(reference.features)
    result = {"metrics": metrics, "notes": notes, "features": about, "k": K,
              "samples": described(args.samples, fake.about),
              "reference": described(args.reference, {**reference.about, "pr_images": pr_images}),
              "micro_batch": args.micro_batch, "seconds": round(time.monotonic() - began, 1),
              **provenance(), "numpy": np.__version__, "transformers": version("transformers")}
    write_json(args.out, result)
    report(result, args)


if __name__ == "__main__":
    command(main)
