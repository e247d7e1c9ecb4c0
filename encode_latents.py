"""Images -> frozen DINOv2 with registers -> latents on disk, with their statistics; and the readers of both.

An image is prepared as ADM does (box halvings, bicubic, centre crop), resized to the encoder's size, and becomes the
encoder's last hidden state: patch tokens alone, final LayerNorm without its affine part (RAE, arXiv 2510.11690).
Latents are stored raw, as float16, in shards; mean and variance (C, H, W) lie beside them, to be applied in training.

    python encode_latents.py --data-path imagenet/train                       # one GPU (or CPU): writes data/latents
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train  # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 encode_latents.py \\
        --data-path imagenet/train                              # on each of four nodes; --out on a disk they share
    python encode_latents.py --verify                                         # read everything back

A shard covers fixed images, so the files are the same whatever the number of processes, and the same command goes on
where it was stopped. Folder: encoding.json (what is encoded, by what), shard_*.safetensors, latent_stats.safetensors,
skipped.txt if any were, latents.json (written last).
"""
import argparse
import atexit
import functools
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import (IMAGE_MEAN, IMAGE_STD, InputError, command, digest_of, generator, load_stats, processes, read_json, read_tensors,
                   write_atomically, write_json, write_tensors)

IMAGE_FILES = {f".{suffix}" for suffix in "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()}
DINOV2, RANDOM = "facebook/dinov2-with-registers-base", "random:width=64,depth=2,heads=4,patch=8,seed=0"


# ---- Images ----------------------------------------------------------------------------------------------------------
def open_rgb(file):
    """An image as a viewer shows it, in RGB: upright, first frame, 16 bits scaled to 8, transparency on white."""
    image = ImageOps.exif_transpose(Image.open(file))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):                            # convert() would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def adm_crop(image, size):
    """ADM's preparation (arXiv 2105.05233): halve with a box filter while the short side is >= 2 * size, bicubic to
    short side = size, centre crop. PIL image -> uint8 array (size, size, 3)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    top, left = (image.height - size) // 2, (image.width - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


class Images:
    """The images of a folder of class folders (nested at will), or of a .zip of one, which is read in place.

    Class ids follow the sorted folder names (for ImageNet's wnids: the published ids); a folder without class folders
    is one class. Attributes: `classes` (names), `paths` (relative, sorted by class, then name), `labels` (N,) int64. An
    index >= N is the horizontally flipped copy of index - N. InputError: no images, a class without any, unreadable."""

    def __init__(self, path, image_size):
        self.path, self.image_size, self.zip = Path(path), image_size, None
        if not self.path.exists():
            raise InputError(f"{path} does not exist: --data-path takes a folder of class folders of images, or a .zip")
        if self.path.is_dir():
            found = []
            for top, folders, files in os.walk(self.path, followlinks=True):
                top = f"{Path(top).relative_to(self.path).as_posix()}/".removeprefix("./")
                found += [f"{top}{name}/" for name in folders] + [f"{top}{name}" for name in files]
        else:
            try:
                self.zip, self.pid = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} is no whole .zip ({error}): give a folder of class folders, or a .zip of "
                                 "one") from error
            found = self.zip.namelist()
        found = [name for name in found if not name.startswith((".", "__MACOSX")) and "/." not in name]
        tops = {name.split("/")[0] for name in found}
        one_top = self.zip and len(tops) == 1 and all("/" in name for name in found)
        self.top = f"{tops.pop()}/" if one_top else ""
        found = [name.removeprefix(self.top) for name in found]
        files = [name for name in found if Path(name).suffix.lower() in IMAGE_FILES]
        folders = {name.split("/")[0] for name in found if "/" in name}
        empty = sorted(folders - {name.split("/")[0] for name in files})
        beside = [name for name in files if "/" not in name]
        if not files:
            raise InputError(f"{path} holds no images ({' '.join(sorted(IMAGE_FILES))})")
        if empty:
            raise InputError(f"{path}: class folder {empty[0]} holds no images: fill or remove it ({len(empty)} such)")
        if beside and folders:
            raise InputError(f"{path}: {beside[0]} lies beside the class folders: move it into one, or away "
                             f"({len(beside)} such)")
        self.classes = sorted(folders) or [self.path.stem]
        ids = {name: i for i, name in enumerate(self.classes)} if folders else {}
        self.paths = sorted(files, key=lambda name: (ids.get(name.split("/")[0], 0), name))
        self.labels = torch.tensor([ids.get(name.split("/")[0], 0) for name in self.paths])

    def __len__(self):
        return len(self.paths)

    def __getstate__(self):
        return {**self.__dict__, "zip": None, "pid": None}

    def open(self, name):
        if self.path.is_dir():
            return open(self.path / name, "rb")
        if self.zip is None:
            self.zip = zipfile.ZipFile(self.path)
        elif self.pid != os.getpid():       # a forked worker may share our million names, not our position in the file
            self.zip.fp = open(self.path, "rb")
        self.pid = os.getpid()
        return self.zip.open(self.top + name)

    def read(self, index):
        """-> (uint8 array (3, S, S), whether the image had to be enlarged). InputError names an unreadable file."""
        name = self.paths[index % len(self)]
        try:
            with self.open(name) as file:
                image = open_rgb(file)
                pixels = adm_crop(image, self.image_size)
        except Exception as error:          # decoders of damaged files raise some twenty kinds
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise InputError(f"{self.path / name} is not a readable image ({reason}): replace or remove it "
                             "(encode_latents.py --skip-bad leaves it out)") from error
        pixels = pixels[:, ::-1] if index >= len(self) else pixels
        return pixels.transpose(2, 0, 1), min(image.size) < self.image_size

    def fetch(self, indices):
        """-> uint8 (B, 3, S, S), labels (B,) int64, how many were enlarged, {position in the batch: InputError}."""
        batch = np.zeros((len(indices), 3, self.image_size, self.image_size), np.uint8)
        enlarged, bad = 0, {}
        for i, index in enumerate(indices):
            try:
                batch[i], small = self.read(index)
                enlarged += small
            except InputError as error:
                bad[i] = error
        return torch.from_numpy(batch), self.labels[[i % len(self) for i in indices]], enlarged, bad

    def __getitems__(self, indices):
        """-> (uint8 (B, 3, S, S), labels (B,) int64): what a DataLoader asks a data set for."""
        images, labels, _, bad = self.fetch(indices)
        for error in bad.values():
            raise error
        return images, labels


class ImagesWithNotes(Images):
    __getitems__ = Images.fetch


# ---- The encoder -----------------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """A frozen Dinov2WithRegistersModel as an image encoder (RAE, section 3): images (B, 3, S, S), uint8 or float in
    [0, 1] -> raw latents (B, C, G, G), float32, G = encoder_size / patch. Gradients reach the images.

    source: a Hub id, a local folder, or "random:width=64,depth=2,heads=4,patch=8,seed=0", made here and now.
    encoder_size: pixels, default image_size * patch / 16 (G = image_size / 16). precision: "fp32" or "bf16" (autocast).
    InputError: no such encoder, or sizes that do not fit its patches."""

    def __init__(self, source=DINOV2, image_size=256, encoder_size=None, precision="fp32"):
        super().__init__()
        source = str(source)
        self.net, self.source = random_dinov2(source) if source.startswith("random:") else (load_dinov2(source), source)
        config = self.net.config
        self.patch, self.precision, self.skip = config.patch_size, precision, 1 + config.num_register_tokens
        self.image_size, self.encoder_size = image_size, encoder_size or image_size * self.patch // 16
        if self.encoder_size % self.patch or not encoder_size and image_size % 16:
            raise InputError(f"images of {image_size} px at encoder size {self.encoder_size} do not fit patches of "
                             f"{self.patch} px: give an --encoder-size that is a multiple of {self.patch}")
        self.shape = (config.hidden_size, *[self.encoder_size // self.patch] * 2)
        self.net.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()
        self.digest = digest_of(self.net.state_dict())

    def forward(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = F.interpolate(x, size=(self.encoder_size, self.encoder_size), mode="bicubic", align_corners=False)
        # cuDNN would run the patch embedding of fp32 in TF32
        with (torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            tokens = self.net(pixel_values=(x - self.mean) / self.std).last_hidden_state[:, self.skip:]
        return tokens.float().transpose(1, 2).unflatten(2, self.shape[1:])

    def describe(self):
        """What made the latents, for their description; `sha256` is of the weights."""
        return {"id": self.source, "image_size": self.image_size, "encoder_size": self.encoder_size,
                "patch": self.patch, "width": self.shape[0], "sha256": self.digest}


def load_dinov2(source):
    from transformers import AutoConfig, Dinov2WithRegistersModel
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        net, notes = Dinov2WithRegistersModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:              # the Hub's client has a dozen kinds: offline, absent, forbidden, ...
        raise InputError(f"no encoder {source} ({str(error).strip().splitlines()[0]}): give --encoder a folder or Hub "
                         f"id of a Dinov2WithRegistersModel, or {RANDOM}") from error
    if kind != "dinov2_with_registers" or notes["missing_keys"]:
        raise InputError(f"{source} is a {kind} model, a dinov2_with_registers one is needed as --encoder")
    return net


def random_dinov2(source):
    """A DINOv2 with seeded random weights, for runs without downloads, made so that a token keeps what its patch shows.

    The patch projection turns the patch's lowest frequencies (a DCT; luminance finer than colour) by a random rotation.
    The final LayerNorm removes a token's mean and length, so these are made to hold little: the rotation leaves out the
    direction (1, ..., 1) and that of a bias longer than the signal. Blocks add random features, scaled by 0.2."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    sizes = dict(width=64, depth=2, heads=4, patch=8, seed=0)
    try:
        given = dict(pair.split("=") for pair in source.removeprefix("random:").split(",") if pair)
        sizes |= {name: int(value) for name, value in given.items()}
        width, depth, heads, patch, seed = sizes.values()
        if width < 3 or width % heads or min(depth, patch) < 1:
            raise ValueError
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"no encoder {source}: it must be like {RANDOM}, width a multiple of heads") from error
    config = Dinov2WithRegistersConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                                       patch_size=patch, image_size=8 * patch, layerscale_value=0.2)
    with torch.random.fork_rng(devices=[]):                   # its own initialization, all of it replaced here
        net = Dinov2WithRegistersModel(config)
    g = generator("cpu", seed, "random encoder")

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    for name, parameter in net.named_parameters():
        if name.startswith("embeddings."):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            parameter.data = (normal(*parameter.shape) / parameter.shape[1] ** 0.5).float()

    k = torch.arange(patch, dtype=torch.float64)
    line = torch.cos(math.pi / patch * k[:, None] * (k + 0.5))
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    waves = torch.einsum("ac,iy,jx->aijcyx", colour, line, line).flatten(0, 2).flatten(1)
    frequency = torch.tensor([1, 3, 3])[:, None, None] * (1 + k[:, None] ** 2 + k ** 2).sqrt()
    waves = F.normalize(waves)[frequency.flatten().argsort(stable=True)[:width - 2]]
    rotation = torch.linalg.qr(torch.cat([torch.ones_like(normal(width, 1)), normal(width, width - 1)], dim=1))[0]
    projection = net.embeddings.patch_embeddings.projection
    projection.weight.data = (rotation[:, 2:2 + len(waves)] @ waves / patch).view(width, 3, patch, patch).float()
    projection.bias.data = (4 * rotation[:, 1]).float()
    return net, "random:" + ",".join(f"{name}={value}" for name, value in sizes.items())


# ---- Readers: latents, and the order in which training sees them -----------------------------------------------------
def read_description(folder):
    """latents.json of a finished folder."""
    if not (Path(folder) / "latents.json").exists():
        if (Path(folder) / "encoding.json").exists():
            raise InputError(f"{folder} holds unfinished latents: repeat the command that was making them")
        raise InputError(f"no latents in {folder}: encode_latents.py --data-path IMAGES --out {folder} makes them")
    return read_json(Path(folder) / "latents.json")


def encoder_of(description):
    """The Encoder that made the latents of this description; InputError where its weights are others by now."""
    about = description["encoder"]
    encoder = Encoder(about["id"], about["image_size"], about["encoder_size"], description["precision"])
    if encoder.digest != about["sha256"]:
        raise InputError(f"the encoder {about['id']} has other weights than the one that made the latents: encode again")
    return encoder


class Latents:
    """The latents of a folder written by this file, by memory map. Attributes: `shape` (C, H, W), `count`, `classes`,
    `num_classes`, `stats` (mean, var; float64), `labels` (N,), `description` (latents.json). InputError: none, cut."""

    def __init__(self, folder):
        self.description = about = read_description(folder)
        self.shape, self.count, self.classes = tuple(about["shape"]), about["count"], about["classes"]
        self.num_classes, self.stats, self.maps, labels = len(self.classes), load_stats(folder), {}, []
        self.paths = [Path(folder, shard["file"]) for shard in about["shards"]]
        self.ends = np.cumsum([shard["count"] for shard in about["shards"]])
        for path, shard in zip(self.paths, about["shards"], strict=True):
            tensors, header = read_tensors(path, check=False)
            if header.get("sha256") != shard["sha256"]:
                raise InputError(f"{path} is not the file that {folder}/latents.json describes: the command that made it makes it again")
            labels.append(tensors["labels"].clone())
        self.labels = torch.cat(labels)

    def __len__(self):
        return self.count

    def __getstate__(self):                                   # pickling a map would copy the data
        return {**self.__dict__, "maps": {}}

    def __getitems__(self, indices):
        """-> (float16 (B, C, H, W), labels (B,) int64), in any order."""
        batch = np.empty((len(indices), *self.shape), np.float16)
        for i, (index, k) in enumerate(zip(indices, np.searchsorted(self.ends, indices, side="right"), strict=True)):
            if k not in self.maps:
                self.maps[k] = read_tensors(self.paths[k], check=False)[0]["latents"].numpy()
            batch[i] = self.maps[k][index - self.ends[k]]     # both counted from the shard's end: a negative index
        return torch.from_numpy(batch), self.labels[indices]


class RowSampler:
    """For each step in first_step .. last_step - 1 and each (start, stop) of `rows`, the data set's indices of these
    rows of the global batch: a DataLoader's batch_sampler.

    Row r of step k is position k * batch_size + r in an endless sequence of epochs, each a permutation of range(count)
    that follows from (seed, epoch) alone; so the samples are the same however a run is split or resumed. flips: each
    position also draws a bit, and index + count stands for the flipped copy."""

    def __init__(self, count, seed, batch_size, rows, first_step, last_step, flips=False):
        self.count, self.seed, self.batch_size, self.rows, self.flips = count, seed, batch_size, rows, flips
        self.steps, self.epochs = range(first_step, last_step), {}

    def __len__(self):
        return len(self.steps) * len(self.rows)

    def epoch(self, number):
        if number not in self.epochs:
            self.epochs = {k: v for k, v in self.epochs.items() if k == number - 1}         # a batch may straddle two
            order = torch.randperm(self.count, generator=generator("cpu", self.seed, "epoch", number))
            if self.flips:
                bits = torch.randint(2, (self.count,), generator=generator("cpu", self.seed, "flips", number))
                order += self.count * bits
            self.epochs[number] = order
        return self.epochs[number]

    def __iter__(self):
        for step in self.steps:
            for start, stop in self.rows:
                positions = range(step * self.batch_size + start, step * self.batch_size + stop)
                yield [int(self.epoch(p // self.count)[p % self.count]) for p in positions]


def batches_of(dataset, sampler, workers, pin=False):
    """The data set's batches, as its __getitems__ returns them, read ahead by `workers` processes."""
    ending = multiprocessing.Value("b", False, lock=False)
    atexit.register(setattr, ending, "value", True)
    try:
        yield from DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=tuple, pin_memory=pin,
                              worker_init_fn=functools.partial(outlive_signals, ending),
                              generator=torch.Generator())    # else it draws from the global one
    except InputError as error:                               # a worker's comes wrapped in its traceback
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("model.InputError: ")) from None


def outlive_signals(ending, worker):
    """A signal to the whole group, torchrun's way, is the training's to act on: its workers go on until that ends. Only then
    is SIGTERM meant for them: multiprocessing sends it at exit, and waits for them."""
    def on_signal(number, frame):
        if ending.value:
            os._exit(0)                                       # else the loader would complain of a lost worker
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


class TrainingData:
    """What a stage trains on: the latents of a folder; or images encoded on the fly, flipped at random, as that folder
    describes (its shards are not needed); or, `synthetic` = 256 or 512, random latents at the real shapes.

    Attributes: `shape`, `classes` (names), `stats` (mean, var), `about` (dict, for the run's records)."""

    def __init__(self, latents, data_path=None, synthetic=None):
        self.encoder, self.dataset = None, None
        if synthetic:
            self.shape, self.classes = (768, synthetic // 16, synthetic // 16), [str(i) for i in range(1000)]
            self.stats = torch.zeros(self.shape).double(), torch.ones(self.shape).double()
            self.about = {"synthetic": synthetic}
            return
        description = read_description(latents)
        self.shape, self.classes = tuple(description["shape"]), description["classes"]
        self.stats = load_stats(latents)
        self.about = {name: value for name, value in description.items() if name not in ("classes", "shards")}
        if data_path is None:
            self.dataset = Latents(latents)
            return
        about = description["encoder"]
        self.dataset = Images(data_path, about["image_size"])
        if self.dataset.classes != self.classes:
            raise InputError(f"{data_path} has other classes than {latents}, made from {description['data']['name']}: "
                             "give the images that these latents are of")
        self.encoder = encoder_of(description)

    def batches(self, seed, batch_size, rows, first_step, last_step, device, workers=0):
        """Raw latents (B, C, H, W), labels (B,) on `device`, for each step and (start, stop) of `rows`: RowSampler."""
        if self.dataset is None:
            for step in range(first_step, last_step):
                for start, stop in rows:
                    g = generator(device, seed, "synthetic", step, start)
                    yield (torch.randn(stop - start, *self.shape, generator=g, device=device),
                           torch.randint(len(self.classes), (stop - start,), generator=g, device=device))
            return
        encode = self.encoder.to(device) if self.encoder else nn.Identity()
        sampler = RowSampler(len(self.dataset), seed, batch_size, rows, first_step, last_step, self.encoder is not None)
        for x, y in batches_of(self.dataset, sampler, workers, pin=device.type == "cuda"):
            yield encode(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)


# ---- Statistics that merge: (count, mean, m2), m2 the sum of squared deviations; float64 (C, H, W) -------------------
def moments(latents):
    x = latents.double()
    mean = x.sum(0) / max(len(x), 1)
    return len(x), mean.cpu(), (x - mean).square().sum(0).cpu()


def merge(a, b):
    """Moments of two sets together (Chan, Golub and LeVeque, 1979); either may be empty."""
    n, delta = a[0] + b[0], b[1] - a[1]
    share = b[0] / max(n, 1)
    return n, a[1] + delta * share, a[2] + b[2] + delta.square() * (a[0] * share)


# ---- Encoding --------------------------------------------------------------------------------------------------------
def shard_path(out, k):
    return out / f"shard_{k:05d}.safetensors"


def is_whole(path):
    try:
        return "sha256" in read_tensors(path)[1]
    except InputError as error:
        if path.exists():
            print(f"{error}: encoding it again", file=sys.stderr)
        return False


def claim(out, settings, needed):
    """Make `out` the folder of these latents, or see that it is; see that they fit the disk."""
    if (out / "encoding.json").exists():
        before = read_json(out / "encoding.json")
        other = [f"{k} {before.get(k)}, now {v}" for k, v in settings.items() if before.get(k) != v]
        if other:
            raise InputError(f"{out} holds other latents ({'; '.join(other)}): give another --out, or remove it")
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise InputError(f"{out} holds something else: give an --out that is empty or new")
    for path in out.glob(".*tmp*"):                           # of a process that was killed while it wrote
        path.unlink()
    there = sum(path.stat().st_size for path in out.glob("shard_*.safetensors"))
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    gigabytes = f"{needed / 1e9:,.2f} GB, {there / 1e9:,.2f} GB of it there, {free / 1e9:,.2f} GB free"
    print(f"space needed in {out}: {gigabytes}", flush=True)
    if needed - there > free:
        raise InputError(f"the latents do not fit into {out} ({gigabytes}): make space, or have the training stages "
                         "encode on the fly (their --data-path)")
    write_json(out / "encoding.json", settings)


@torch.no_grad()
def encode_shards(images, encoder, shards, out, batch_size, workers, skip_bad):
    """Encode `shards`, {number: range of indices}, in order; write each when complete. Yields each batch's size."""
    plan = [(k, rows[i:i + batch_size]) for k, rows in shards.items() for i in range(0, len(rows), batch_size)]
    device, parts = encoder.mean.device, []
    batches = batches_of(images, [rows for _, rows in plan], workers, pin=device.type == "cuda")
    for (k, rows), (x, y, enlarged, bad) in zip(plan, batches, strict=True):
        if bad and not skip_bad:
            raise next(iter(bad.values()))
        good = [i for i in range(len(rows)) if i not in bad]
        z = encoder(x.to(device))[good].half()
        if not z.isfinite().all():
            raise InputError(f"latents of {images.paths[rows[0] % len(images)]}, or of the {len(rows) - 1} images "
                             "after it, are not finite in float16: look at the encoder's weights")
        parts.append((z.cpu(), y[good], moments(z), enlarged, [str(error) for error in bad.values()]))
        if rows[-1] == shards[k][-1]:
            latents, labels, statistics, enlarged, skipped = zip(*parts, strict=True)
            _, mean, m2 = functools.reduce(merge, statistics)
            notes = json.dumps({"enlarged": sum(enlarged), "skipped": sum(skipped, [])}).encode()
            write_tensors(shard_path(out, k), {
                "latents": torch.cat(latents), "labels": torch.cat(labels), "mean": mean, "m2": m2,
                "notes": torch.tensor(list(notes), dtype=torch.uint8)})         # a tensor, so that the digest covers it
            parts = []
        yield len(rows)


def finish(out, count, settings, shape, classes):
    """From the shards' own moments and notes, without reading their latents: statistics, skipped.txt, latents.json."""
    statistics, shards, enlarged, skipped = [], [], 0, []
    for path in (shard_path(out, k) for k in range(count)):
        tensors, header = read_tensors(path, check=False)
        n, notes = len(tensors["labels"]), json.loads(bytes(tensors["notes"].tolist()))
        statistics.append((n, tensors["mean"], tensors["m2"]))
        shards.append({"file": path.name, "count": n, "sha256": header["sha256"]})
        enlarged, skipped = enlarged + notes["enlarged"], skipped + notes["skipped"]
    n, mean, m2 = functools.reduce(merge, statistics)
    if not n:
        raise InputError(f"no image could be read; the first: {skipped[0]}")
    digest = write_tensors(out / "latent_stats.safetensors", {"mean": mean, "var": m2 / n})
    if skipped:
        write_atomically(out / "skipped.txt", lambda path: path.write_text("\n".join([*skipped, ""]), errors="replace"))
    write_json(out / "latents.json", {**settings, "shape": shape, "dtype": "float16", "count": n, "classes": classes,
                                      "statistics_sha256": digest, "shards": shards})
    print(f"{out}: {n:,} latents of {'x'.join(map(str, shape))}, {len(classes)} classes; {enlarged:,} images were too "
          f"small and enlarged, {len(skipped):,} unreadable and left out{' (skipped.txt)' if skipped else ''}")


def verify(out):
    """Read every file back; InputError names the damaged ones."""
    about, bad = read_description(out), []
    files = {shard["file"]: shard["sha256"] for shard in about["shards"]}
    files["latent_stats.safetensors"] = about["statistics_sha256"]
    for name, digest in tqdm(files.items(), disable=not sys.stderr.isatty()):
        try:
            if read_tensors(out / name)[1].get("sha256") != digest:
                bad.append(f"{out / name} is not the file that latents.json describes")
        except InputError as error:
            bad.append(str(error))
    if bad:
        raise InputError(f"{len(bad)} of {len(files)} files are damaged (the command that made them makes them again): "
                         + "; ".join(bad))
    print(f"{out}: {len(files)} files with {about['count']:,} latents read back, all whole")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", default="data/imagenet/train",
        help="folder of class folders of images, or a .zip of one (default %(default)s)")
    add("--out", default="data/latents",
        help="folder for the latents, on a disk that all processes share (default %(default)s: what the stages read)")
    add("--encoder", default=DINOV2, help="Hub id or folder of a Dinov2WithRegistersModel, or one with random weights, "
        f"made on the spot: {RANDOM} (default %(default)s: RAE)")
    add("--image-size", type=int, default=256, help="pixels (default %(default)s: paper; also 512)")
    add("--encoder-size", type=int, help="pixels that the encoder sees, a multiple of its patch (default image size * "
        "patch / 16: 224 for 256, 448 for 512; RAE)")
    add("--batch-size", type=int, default=64, help="images per process and pass; changes latents by rounding alone "
        "(default %(default)s)")
    add("--workers", type=int, default=min(8, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
        help="processes per device that decode images (default here %(default)s: up to 8 of this machine's cores)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (default %(default)s: float16 "
        "keeps 11 bits, bf16 has 8)")
    add("--shard-size", type=int, default=4096, help="images per file (default %(default)s: 1.6 GB at 256 px)")
    add("--flips", action="store_true", help="encode every image flipped sideways too: twice the space (default no)")
    add("--skip-bad", action="store_true",
        help="leave unreadable images out and list them in skipped.txt (default: stop at the first)")
    add("--verify", action="store_true", help="read the latents in --out back and compare their digests; nothing else")
    args = parser.parse_args(argv)
    if min(args.image_size, args.batch_size, args.shard_size) < 1 or args.workers < 0 or (args.encoder_size or 1) < 1:
        raise InputError("sizes must be positive")
    return args


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    world, rank, device = processes(args.precision)
    if args.verify:
        return verify(out) if rank == 0 else None
    images = ImagesWithNotes(args.data_path, args.image_size)
    encoder = Encoder(args.encoder, args.image_size, args.encoder_size, args.precision).to(device)
    total = len(images) * (2 if args.flips else 1)
    count = -(-total // args.shard_size)
    listing = hashlib.sha256(json.dumps([images.classes, images.paths]).encode()).hexdigest()
    data = {"name": images.path.resolve().name, "images": len(images), "sha256_of_names": listing}
    settings = {"format": 1, "data": data, "encoder": encoder.describe(), "image_size": args.image_size,
                "precision": args.precision, "flips": args.flips, "shard_size": args.shard_size}
    if world > 1:                           # processes only wait for one another, perhaps for hours: Gloo on GPUs too
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    if rank == 0:
        print(f"{len(images):,} images in {len(images.classes)} classes; encoder {encoder.source} at "
              f"{encoder.encoder_size} px on {device}")
        claim(out, settings, total * (math.prod(encoder.shape) * 2 + 8))
    if world > 1:
        dist.barrier()
        if not (out / "encoding.json").exists() or read_json(out / "encoding.json") != settings:
            raise InputError(f"process {rank} does not see what process 0 wrote to {out}: it must lie on a disk that all nodes share")
    shards = {k: range(k * args.shard_size, min((k + 1) * args.shard_size, total)) for k in range(rank, count, world)
              if not is_whole(shard_path(out, k))}
    share, done, start = sum(map(len, shards.values())), 0, time.monotonic()
    bar, said = tqdm(total=share * world, unit=" images", disable=rank > 0 or not sys.stderr.isatty()), start
    for n in encode_shards(images, encoder, shards, out, args.batch_size, args.workers, args.skip_bad):
        done, now = done + n, time.monotonic()
        bar.update(n * world)               # all processes are about as far as this one
        if rank == 0 and bar.disable and (now - said > 10 or done == share):
            rate, said = done * world / (now - start), now
            left = timedelta(seconds=round((share - done) * world / rate))
            print(f"{done * world:,} of {share * world:,} images, {rate:,.0f} images/s, {left} left", flush=True)
    bar.close()
    if world > 1:
        dist.barrier()
    if rank == 0:
        finish(out, count, settings, encoder.shape, images.classes)


if __name__ == "__main__":
    command(main)
