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
import re
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from model import (
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, all_reduce, barrier, command, digest_of, is_first,
    launch, location, lock, number, progress, provenance, read_json, read_tensors, refuse_other, say, whole,
    write_json, write_tensors)

INCEPTION_URL = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                 "inception-2015-12-05.pt")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INTERFACE = "needed is one with the interface of inception-2015-12-05.pt"
# Neighbours of precision and recall (ADM).
K = 3


# ---- Metrics of feature arrays -----------------------------------------------
class Moments:
    """Mean (D,) and unbiased covariance (D, D) of features (B, D) seen in parts, from sums in float64."""

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
    Its last trace is the sum of the singular values of C_1^1/2 C_2^1/2: taken as such they are real, and keep
    the digits that squaring would cost where a covariance is singular. Eigenvalues that rounding cannot tell
    from 0 count as 0. InputError: shapes disagree, a value is not finite, or a `cov` is no covariance."""
    from scipy.linalg import eigh, svdvals
    moments = [torch.as_tensor(x).double().cpu().numpy() for x in (mean_1, cov_1, mean_2, cov_2)]
    mean_1, cov_1, mean_2, cov_2 = moments
    square = cov_1.shape == cov_2.shape == 2 * mean_1.shape
    if mean_1.ndim != 1 or mean_2.shape != mean_1.shape or not square:
        raise InputError(f"moments of shapes {[x.shape for x in moments]} do not fit: use one kind of "
                         "features")
    if not all(np.isfinite(x).all() for x in moments):
        raise InputError("a mean or covariance is not finite: of fewer than 2 images, or its file is damaged")
    roots = []
    for place, cov in enumerate((cov_1, cov_2), 1):
        values, vectors = eigh((cov + cov.T) / 2)
        largest = abs(values).max()
        # Files in float32 are off by 1e-6.
        if values[0] < -1e-4 * largest or abs(cov - cov.T).max() > 1e-4 * largest:
            raise InputError(f"covariance {place} is not symmetric with eigenvalues >= 0: a damaged file")
        kept = values > largest * len(values) * np.finfo(float).eps
        # C = R R^T
        roots.append(vectors[:, kept] * values[kept] ** 0.5)
    cross = svdvals(roots[0].T @ roots[1]).sum() if all(root.size for root in roots) else 0
    return max(0.0, float(((mean_1 - mean_2) ** 2).sum() + cov_1.trace() + cov_2.trace() - 2 * cross))


def precision_recall(real, fake, k=K, block=2048):
    """Improved precision and recall (arXiv 1904.06991) as ADM counts: (N, D), (M, D) -> two floats in [0, 1].

    A set's manifold: the balls around its points, each as far as the point's k-th nearest other one, border
    included. Precision is the part of `fake` in the manifold of `real`, recall the part of `real` in that of
    `fake`. Float64, on the features' device, in blocks of rows. InputError: a set has no k + 1 points."""
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall need at least {k + 1} images a side, "
                         f"here {len(real)} and {len(fake)}")
    # Where |a|^2 + |b|^2 - 2 a b cancels least; torch.cdist without that formula takes 30 times as long.
    centre = real.double().mean(0)
    real, fake = real.double() - centre, fake.double() - centre

    def squared_distances(a, b):
        """And what rounding may do to them."""
        norms = a.square().sum(1)[:, None] + b.square().sum(1)
        return torch.addmm(norms, a, b.T, alpha=-2), 1e-13 * norms

    def share_in_manifold(points, of):
        # k + 1: a point's nearest is itself.
        nearest = [squared_distances(rows, of)[0].topk(k + 1, largest=False).values
                   for rows in of.split(block)]
        radii, inside = torch.cat(nearest)[:, k], []
        for rows in points.split(block):
            distances, rounding = squared_distances(rows, of)
            # Less rounding, so that ties count, as in exact arithmetic.
            inside.append((distances - rounding <= radii).any(1))
        return torch.cat(inside).double().mean().item()
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


# ---- Images: len(), image_size, read(consecutive indices) -> uint8 (B, 3, S, S), labels
@contextmanager
def complaint(what, hint):
    """What a damaged or foreign file may end in becomes an InputError: `what` (the reason): `hint`."""
    try:
        yield
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, TypeError, AttributeError, MemoryError,
            OverflowError, zipfile.BadZipFile, zlib.error) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{what} ({lines[-1] if lines else type(error).__name__}): {hint}") from error


class NpzImages:
    """`arr_0` of an .npz, streamed: 50,000 images of 256 px are 10 GB, a batch is not."""

    def __init__(self, path):
        self.path, formats = path, np.lib.format
        with complaint(f"{path} is not a readable .npz with arr_0", "make or download it again"):
            self.archive = zipfile.ZipFile(path)
            self.member = self.archive.open("arr_0.npy")
            first = formats.read_magic(self.member) == (1, 0)
            read = formats.read_array_header_1_0 if first else formats.read_array_header_2_0
            self.shape, fortran, dtype = read(self.member)
            _, size, *_ = self.shape
            self.start, self.row, self.image_size = self.member.tell(), 3 * size * size, size
            length = self.archive.getinfo("arr_0.npy").file_size - self.start
        wanted = (size, size, 3), np.uint8, False, self.shape[0] * self.row
        if (self.shape[1:], dtype, fortran, length) != wanted:
            order = " in Fortran order" * fortran
            raise InputError(f"{path}: arr_0 is {dtype} {self.shape}{order}, and must be uint8 (N, S, S, 3), "
                             "in C order, of the length that its header says")

    def __del__(self):
        with suppress(AttributeError):            # it was no .npz
            self.archive.close()
            self.member.close()

    def __len__(self):
        return self.shape[0]

    def read(self, indices):
        with complaint(f"{self.path} is damaged", "make or download it again"):
            self.member.seek(self.start + indices[0] * self.row)
            data = np.frombuffer(self.member.read(len(indices) * self.row), np.uint8)
            images = data.reshape(len(indices), *self.shape[1:]).transpose(0, 3, 1, 2)
            return torch.from_numpy(images.copy()), None


def open_images(path, size=None):
    """An .npz; or a folder or .zip of images, brought to `size` pixels as ADM does (None: all have one)."""
    if not Path(path).exists():
        raise InputError(f"{path} does not exist: give an .npz (sample.py makes it), a folder or a .zip")
    if Path(path).suffix == ".npz":
        return NpzImages(path)
    from encode_latents import Images
    images = Images(path, size)
    if size is None:
        from PIL import Image
        sizes = set()
        for name in images.paths:
            with complaint(f"{path}/{name} is no image", "remove it"), images.open(name) as file:
                sizes |= set(Image.open(file).size)
        if len(sizes) > 1:
            raise InputError(f"{path} has sides of {sorted(sizes)} pixels: samples are square, of one size")
        images.image_size = sizes.pop()
    return images


# ---- Feature networks: -> what it is, and functions of uint8 images (B, 3, S, S):
# features (B, D), and probabilities (B, classes) or None
def inception(path, device):
    """A TorchScript file with the interface of NVIDIA's inception-2015-12-05.pt.

    That one is the TensorFlow network of the original FID and takes images of any size; it is the default,
    fetched into torch's cache on first use."""
    if not path:
        path = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name)
        if is_first() and not path.exists():
            say(f"fetching {INCEPTION_URL} to {path}")
            with complaint(f"cannot fetch {INCEPTION_URL}", "get it elsewhere, for --inception PATH"):
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, path, INCEPTION_SHA256, progress=False)
        barrier()
    with complaint(f"{path} is no TorchScript file", INTERFACE):
        net = torch.jit.load(path, map_location=device).eval()
    about = {"name": "Inception (TorchScript)", "sha256": file_digest(path)}
    return (about, lambda images: net(images, return_features=True),
            lambda images: net(images, no_output_bias=True))


def dinov2(source, device):
    """CLS token after a DINOv2's last LayerNorm, at 224 px by Pillow's bicubic: dgm-eval's (2306.04675)."""
    from PIL import Image
    from transformers import AutoConfig, AutoModel
    with complaint(f"--features {source} is not inception, dinov2, encoder:LATENTS or a DINOv2 by its name",
                   "give one of these"):
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
        resized = [np.array(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in pixels]
        x = torch.from_numpy(np.stack(resized)).to(device).permute(0, 3, 1, 2) / 255
        return net(pixel_values=(x - mean) / std).last_hidden_state[:, 0]
    return {"name": "DINOv2", "source": source, "sha256": digest_of(net.state_dict())}, features, None


def frozen_encoder(latents, device):
    """The encoder that made the latents in a folder, its tokens averaged over the grid."""
    from encode_latents import encoder_of
    net = encoder_of(latents).to(device)
    name = "RANDOM encoder (untrained)" if net.about["untrained"] else "encoder"
    about = {"name": name, "source": net.about["id"], **net.about["identity"]}
    return about, lambda images: net(images).mean((2, 3)), None


def load_features(args, size, device):
    """The one of these that --features names, tried on two blank images."""
    if args.features == "inception":
        about, features, probabilities = inception(args.inception, device)
    elif args.features.startswith("encoder:"):
        about, features, probabilities = frozen_encoder(args.features[8:], device)
    else:
        source = {"dinov2": "facebook/dinov2-large"}.get(args.features, args.features)
        about, features, probabilities = dinov2(source, device)
    blank = torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device)
    with torch.no_grad(), complaint(f"{about['name']} does not answer as it should", INTERFACE):
        f, p = features(blank), probabilities(blank) if probabilities else torch.ones(2, 1)
        if not f.dim() == p.dim() == len(f) == len(p) == 2 or ((p.sum(1) - 1).abs() > 1e-3).any():
            raise ValueError(f"features {tuple(f.shape)} and probabilities {tuple(p.shape)} of 2 images")
    return {**about, "width": f.shape[1]}, features, probabilities


def file_digest(path):
    with complaint(f"cannot read {path}", "check the path"), open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(2 ** 20):
            digest.update(piece)
    return digest.hexdigest()


# ---- From images to statistics -----------------------------------------------
@torch.no_grad()
def measure(images, embed, classify, kept, micro_batch, device, rank, world):
    """-> Moments of all images' features, features of `kept` of them evenly spread, probabilities or None.

    Each process takes consecutive images, as the Inception Score's splits go by order."""
    count = len(images)
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
            raise InputError(f"features of images {i} to {rows[-1]} are not finite: the network is damaged")
        moments.update(f)
        features.append(f.cpu()[keep[i:rows.stop]])
        if classify:
            probabilities.append(classify(batch).float().cpu())
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (features, probabilities))
        features, probabilities = (sum((part[i] for part in parts), []) for i in (0, 1))
        width = features[0].shape[1]
        # A process may have had no image.
        moments.total = all_reduce((moments.total + torch.zeros(width).double().to(device)).cpu())
        moments.scatter = all_reduce((moments.scatter + torch.zeros(width, width).double().to(device)).cpu())
        moments.count = count
    return moments, torch.cat(features), torch.cat(probabilities) if classify else None


STATISTICS = "mean", "covariance", "features"


# ---- The command -------------------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("samples", type=location, nargs="?",
        help=".npz with arr_0 uint8 (N, S, S, 3), or a folder of images of one size")
    add("--reference", type=location, required=True,
        help=".npz of images or of ADM's mu and sigma, folder or .zip of images, or --save-statistics file")
    add("--image-size", type=whole(), metavar="PX", help="of a reference folder (default: the samples')")
    add("--pr-images", type=number(int, 0), default=10_000, metavar="N",
        help="images of the reference, evenly spread, for precision and recall, at most (ADM); 0: neither")
    add("--features", default="inception",
        help="inception (FID), dinov2 (facebook/dinov2-large), another DINOv2's Hub id or folder, or "
             "encoder:LATENTS, the encoder that made these")
    add("--inception", type=location, metavar="PATH",
        help=f"TorchScript file (default: {INCEPTION_URL}, fetched once)")
    add("--micro-batch", type=whole(), default=64, help="images per device and forward pass (ADM)")
    add("--out", type=location, metavar="JSON", help="the results (default: SAMPLES.FEATURES.json)")
    add("--save-statistics", type=location, metavar="FILE",
        help="keep the reference's, .safetensors; needs no SAMPLES")

    args = parser.parse_args(argv)
    if not args.samples and not args.save_statistics:
        parser.error("no samples: give an .npz or a folder of them, or --save-statistics FILE")
    if 0 < args.pr_images <= K:
        parser.error(f"--pr-images {args.pr_images}: 0, or more than {K}")
    if args.samples and not args.out:
        kind = re.sub(r"\W+", "-", args.features)
        args.out = re.sub(r"\.(npz|zip)$", "", str(Path(args.samples))) + f".{kind}.json"
    for flag, suffix in (("out", ".json"), ("save_statistics", ".safetensors")):
        if not (getattr(args, flag) or suffix).endswith(suffix):
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: a name that ends in {suffix}")
    return args


def check_target(path, reference, features):
    """InputError, unless there is no such file, or one of this program's, of these."""
    if Path(path).exists():
        before = read_json(path) if path.endswith(".json") else read_tensors(path, only=())[1]
        known = before.get("reference")
        known = {"reference": known.get("path") if isinstance(known, dict) else None,
                 "features": before.get("features")}
        refuse_other(path, known, {"reference": reference, "features": features})


def open_reference(args, samples):
    """-> images or None; {name: tensor} of the STATISTICS that the file brings; what it says of them.

    ADM's references hold mu and sigma of the Inception features of ImageNet's whole training set, and 10,000
    of its images, for precision and recall."""
    path, stored = Path(args.reference), {}
    if path.suffix == ".safetensors":
        parts, about, _ = read_tensors(path)
        stored = parts.get("", {})
        if set(stored) != set(STATISTICS) or set(about) != {"reference", "features"}:
            raise InputError(f"{path} has no statistics: eval_fid.py --save-statistics FILE makes them")
        return None, stored, {**about["reference"], "features": about["features"]}
    if path.suffix == ".npz" and path.exists():
        with complaint(f"{path} is not a readable .npz", "make or download it again"), np.load(path) as file:
            if "mu" in file.files and args.features == "inception":
                names = zip(STATISTICS, ("mu", "sigma"), strict=False)
                stored = {name: torch.from_numpy(file[theirs]).double() for name, theirs in names}
            if "arr_0" not in file.files:
                if not stored:
                    raise ValueError("it has no arr_0, and mu, sigma serve --features inception only")
                return None, stored, {"features": {"width": len(stored["mean"])}}
    size = samples.image_size if samples is not None else None
    return open_images(args.reference, args.image_size or size), stored, {}


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(hours=4)
    # Features in true float32.
    torch.backends.cudnn.allow_tf32 = False

    # Images of one size, and the network that sees them
    samples = open_images(args.samples) if args.samples else None
    real, stored, of_stored = open_reference(args, samples)
    given = {"samples": samples, "reference": real}
    given = {name: images for name, images in given.items() if images is not None}
    counts = {"reference": of_stored.get("count"), **{name: len(images) for name, images in given.items()}}
    sizes = {images.image_size for images in given.values()} | {of_stored.get("image_size")} - {None}
    if len(sizes) > 1:
        raise InputError(f"samples and reference are of {sorted(sizes)} pixels a side, and must be of one "
                         "(--image-size is a reference folder's)")
    fewest = min(map(len, given.values()), default=K + 1)
    if fewest <= K:
        raise InputError(f"{fewest} images are too few: give {K + 1} at least, to publish it 50,000")
    about, embed, classify = load_features(args, *sizes or [256], device)
    used = of_stored.get("features", {})
    if any(used[key] != about.get(key) for key in used.keys() - {"source"}):
        raise InputError(f"{args.reference} is of other features, {used}, than {about}: make one of these")
    say(f"{about['name']}: features of {counts} images on {world} x {device.type}")
    if is_first():
        for file in filter(None, (args.out, args.save_statistics)):
            lock(Path(file).with_name(f".{Path(file).name}.lock"))
            check_target(file, args.reference, about)

    # Statistics of the reference, its images' or those that it brings, and of the samples
    place = args.micro_batch, device, rank, world
    if real is not None:
        moments, features, _ = measure(real, embed, None, min(args.pr_images, len(real)), *place)
        stored = {"mean": moments.mean, "covariance": moments.covariance, **stored, "features": features}
    if samples is not None:
        moments, fake, probabilities = measure(samples, embed, classify, len(samples), *place)
    if rank > 0:
        return
    pr_images = len(stored.get("features", ()))
    reference = {"path": args.reference, "count": counts["reference"], "image_size": max(sizes, default=None)}
    if args.save_statistics:
        stored.setdefault("features", torch.empty(0, about["width"]))
        tensors = {name: stored[name].cpu() for name in STATISTICS}
        write_tensors(args.save_statistics, {"": tensors}, {"reference": reference, "features": about})
        say(f"statistics of {args.reference} are in {args.save_statistics}")
    if samples is None:
        return

    # The metrics, and what to know of them
    distance = frechet_distance(moments.mean, moments.covariance, stored["mean"], stored["covariance"])
    metrics, notes = {"frechet_distance": distance}, []
    if classify:
        metrics["inception_score"] = inception_score(probabilities)
    if args.pr_images and pr_images:
        real, fake = stored["features"].to(device), fake.to(device)
        metrics["precision"], metrics["recall"] = precision_recall(real, fake)
    else:
        notes.append("no precision and recall: the reference has no images, or --pr-images is 0")
    for name, count in counts.items():
        if count and count < 10_000:
            notes.append(f"{count:,} {name}: under 10,000 the distance is biased upwards: compare equal ones")
        if count and count <= about["width"]:
            notes.append(f"{count:,} {name}, {about['width']:,} features: the covariance is singular")
    of_samples = {"path": args.samples, "count": counts["samples"], "image_size": samples.image_size}
    for side in (of_samples, reference):
        if Path(side["path"]).is_file():
            side["sha256"] = file_digest(side["path"])
    reference["pr_images"] = pr_images
    write_json(args.out, {"metrics": metrics, "notes": notes, "features": about, "samples": of_samples,
                          "reference": reference, "k": K, **provenance()})
    title = {"inception": "FID", "dinov2": "FD-DINOv2"}.get(args.features, "frechet distance")
    for name, value in {title: distance, **metrics}.items():
        if name != "frechet_distance":
            say(f"{name.replace('_', ' '):18}{value:.4f}")
    for note in [*notes, f"all of it is in {args.out}"]:
        say(f"note: {note}")


if __name__ == "__main__":
    command(main)
