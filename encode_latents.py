"""Images -> frozen encoder (DINOv2) -> latents on disk, with their statistics; and the readers of both.

An image is prepared as ADM does, resized to the encoder's size, and becomes the encoder's last hidden state:
patch tokens alone, final LayerNorm without its affine part (RAE, arXiv 2510.11690). Latents are stored raw,
as float16, in shards; their mean and variance (C, H, W) lie beside them.

    python encode_latents.py --data-path imagenet/train               # one GPU (or CPU): writes data/latents
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train                    # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        encode_latents.py --data-path imagenet/train      # on each of four nodes; --out on a disk they share
    python encode_latents.py --verify                                 # read everything back, and prove it

A shard covers fixed images, so the files are the same whatever the number of processes, and the same command
goes on where it was stopped. Folder: first latents.json (what is encoded, by what), then the shards, and
skipped.txt if any were, last latent_stats.safetensors: with it the folder is finished.
"""
import collections
import functools
import hashlib
import json
import math
import os
import stat
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn

from model import (
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, barrier, command, digest_of, generator, launch,
    load_stats, location, lock, number, progress, read_json, read_tensors, refuse_other, say, whole,
    write_atomically, write_json, write_tensors)

DINOV2 = "facebook/dinov2-with-registers-base"
SUFFIXES = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()
# What viewers show, and Pillow takes for an attack: long texts in a PNG, pictures of up to 268 megapixels, at
# half of which it warns.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28
Image.MAX_IMAGE_PIXELS = 2 ** 27
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


# ---- Pictures ----------------------------------------------------------------------------------------------
@functools.cache
def formats():
    """Pillow's formats of SUFFIXES; others may do more than show an image (EPS starts Ghostscript)."""
    Image.init()
    return [name for name in {Image.EXTENSION.get(f".{suffix}") for suffix in SUFFIXES} if name in Image.OPEN]


def open_rgb(file):
    """An image as a viewer shows it, in RGB: upright, first frame, 16 bits as 8, transparency on white."""
    image = Image.open(file, formats=formats())
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels, a strip")
    image.load()
    with suppress(Exception):                     # broken EXIF turns nothing; it raises some ten kinds
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):                # convert() would clip 16 bits to 255
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("integer pixels below 0 or beyond 16 bits have no agreed range")
        image = Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def adm_crop(image, size):
    """ADM's preparation (arXiv 2105.05233): halve with a box filter while the short side is >= 2 * size,
    bicubic to short side = size, centre crop. PIL image -> uint8 array (size, size, 3)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top:top + size, left:left + size]


# ---- Folders and archives ----------------------------------------------------------------------------------
SYSTEM = ("@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information",
          "__macosx")
SPLITS = ("train", "val", "valid", "validation", "test", "held-out")


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def list_folder(path):
    """{name: name} of folders, which end in "/", and files under a folder. Links lead to each folder once."""
    found, seen, waiting = {}, {os.path.realpath(path)}, [""]
    while waiting:
        inside = waiting.pop()
        for entry in os.scandir(Path(path, inside)):
            name = inside + entry.name
            if is_hidden(entry.name):
                continue
            if entry.is_file():
                found[name] = name
            elif entry.is_dir() and (place := os.path.realpath(entry)) not in seen:
                seen.add(place)
                found[f"{name}/"] = name
                waiting.append(f"{name}/")
    return found


def list_archive(archive):
    """{name: entry} of a .zip, likewise; one folder around all of it is taken off."""
    found = {}
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/").removeprefix("./")         # Windows' tools write backslashes
        if not any(map(is_hidden, name.split("/"))) and not stat.S_ISLNK(entry.external_attr >> 16):
            found[name] = entry.filename
    tops = {name.partition("/")[0] for name in found}
    if len(tops) == 1 and all("/" in name for name in found):
        found = {name.partition("/")[2]: entry for name, entry in found.items()}
    return found


def label_by_folder(where, found, images):
    """-> the names of the class folders, {image: class id}. Ids follow the folders' names as text.

    InputError: anything but class folders with images in each, or images alone, which are one class."""
    folders = sorted({name.partition("/")[0] for name in found if "/" in name})
    if folders and {name.lower() for name in folders} <= set(SPLITS) and any(n.count("/") > 1 for n in found):
        raise InputError(f"{where} holds {' and '.join(folders)}, which are no classes: give one of these")
    of = {name: name.partition("/")[0] for name in images}
    beside = [name for name in images if "/" not in name]
    if folders and beside:
        raise InputError(f"{where}: {beside[0]} lies beside the class folders: move it ({len(beside)} such)")
    if empty := sorted(set(folders) - set(of.values())):
        raise InputError(f"{where}: {empty[0]} holds no images: fill or remove it ({len(empty)} such)")
    ids = {name: i for i, name in enumerate(folders)}
    return folders or [Path(where).resolve().stem], {name: ids.get(of[name], 0) for name in images}


class Images:
    """The images of a folder of class folders (nested at will), or of a .zip of one, which is read in place.

    Class ids follow the sorted folder names (for ImageNet's wnids: the published ids).
    skip_bad: unreadable images stand in `skipped`, {index: why}. Attributes: `classes` (names), `paths`
    (sorted by class, then name), `labels` (N,) int64, `sha256` (of these; of a .zip's contents, too).
    An index >= N is the flipped copy of index - N. InputError: no images, no such classes, unreadable."""

    def __init__(self, path, image_size, skip_bad=False):
        self.path, self.image_size, self.zip = Path(path), image_size, None
        self.skip_bad, self.skipped = skip_bad, {}
        if self.path.is_dir():
            self.entries = list_folder(path)
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise InputError(f"{path} is no folder and no whole .zip ({error}): give a folder of class "
                                 "folders, or a .zip of one") from error
            self.entries = list_archive(self.zip)
        files = [name for name in self.entries if name and name[-1] != "/"]
        images = [name for name in files if name.rpartition(".")[2].lower() in SUFFIXES]
        if not images or "dataset.json" in files:
            what = "labels in a dataset.json" if images else "no images"
            raise InputError(f"{path} holds {what}: give class folders of images ({' '.join(SUFFIXES)})")
        self.classes, ids = label_by_folder(path, self.entries, images)
        self.paths = sorted(images, key=lambda name: (ids[name], name))
        self.labels = torch.tensor([ids[name] for name in self.paths])
        sums = [self.zip.getinfo(self.entries[name]).CRC for name in self.paths] if self.zip else None
        self.sha256 = sha256([self.classes, self.paths, self.labels.tolist(), sums])
        others = (Path(name).suffix.lower() or "without a suffix" for name in set(files) - set(images))
        if others := collections.Counter(others).most_common():
            say(f"{path}: left out: {', '.join(f'{n:,} {what}' for what, n in others)}")
        if len(self.classes) == 1:
            say(f"{path}: all is one class, {self.classes[0]}")

    def __len__(self):
        return len(self.paths)

    def open(self, name):
        return self.zip.open(self.entries[name]) if self.zip else open(self.path / name, "rb")

    def pixels(self, index):
        """-> uint8 (S, S, 3). InputError: no picture. What disk or memory refuse is none."""
        name = self.paths[index % len(self)]
        try:
            with self.open(name) as file:
                pixels = adm_crop(open_rgb(file), self.image_size)
        except Exception as error:                # decoders of damaged files raise some twenty kinds
            if isinstance(error, MemoryError) or getattr(error, "errno", None):
                raise
            raise InputError(f"{self.path / name} is no readable image ({type(error).__name__}: {error}): "
                             "replace or remove it (encode_latents.py --skip-bad leaves it out)") from error
        return pixels[:, ::-1] if index >= len(self) else pixels

    def read(self, indices):
        """-> uint8 (B, 3, S, S), labels (B,) int64; B is less where images are skipped."""
        pixels, kept = [], []
        for i in indices:
            try:
                pixels.append(self.pixels(i))
                kept.append(i % len(self))
            except InputError as error:
                if not self.skip_bad:
                    raise
                self.skipped[i] = str(error)
        x = np.array(pixels, np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), self.labels[kept]


def sha256(content):
    """Of what JSON can hold, whatever the order of its dicts."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_ahead(read, batches, threads):
    """read(batch) for each of `batches`, in order, ahead in threads, or in place (0).

    Threads are enough: Pillow, numpy and torch let go of Python's lock."""
    if not threads:
        yield from map(read, batches)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(read, batch))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


# ---- The encoder -------------------------------------------------------------------------------------------
# transformers' vision towers: the class, its last LayerNorm, the published mean and std of its pixels.
# SigLIP 2 of fixed size comes in SigLIP's classes.
IMAGENET, HALF = [list(IMAGE_MEAN), list(IMAGE_STD)], [[0.5] * 3, [0.5] * 3]
TOWERS = {
    "dinov2": ("Dinov2Model", "layernorm", IMAGENET),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "layernorm", IMAGENET),
    "dinov3_vit": ("DINOv3ViTModel", "norm", IMAGENET),
    "siglip": ("SiglipVisionModel", "post_layernorm", HALF),
    "siglip_vision_model": ("SiglipVisionModel", "post_layernorm", HALF),
    "vit_mae": ("ViTMAEModel", "layernorm", IMAGENET)}


class Encoder(nn.Module):
    """A frozen vision tower as an image encoder (RAE, section 3): images (B, 3, S, S), uint8 or float in
    [0, 1] -> raw latents (B, C, G, G), float32, G = encoder_size / patch, differentiable.

    source: a folder or Hub id. encoder_size: pixels, default image_size * patch / 16 (G = image_size / 16).
    precision: "fp32" or "bf16" (autocast). `about`: what it is; its "identity" is what latents follow from.
    InputError: no such encoder, sizes that do not fit its patches."""

    def __init__(self, source=DINOV2, image_size=256, encoder_size=None, precision="fp32"):
        super().__init__()
        self.net, kind, image_norm = load_tower(str(source))
        config = self.net.config
        patch, self.precision, self.more = config.patch_size, precision, {}
        self.encoder_size = encoder_size or image_size * patch // 16
        if self.encoder_size % patch or not encoder_size and image_size % 16:
            raise InputError(f"images of {image_size} px at encoder size {self.encoder_size} do not fit "
                             f"patches of {patch} px: --encoder-size must be a multiple of {patch}")
        grid = self.encoder_size // patch
        self.shape = (config.hidden_size, grid, grid)
        if kind in ("siglip", "siglip_vision_model", "vit_mae"):           # the others always do
            self.more = {"interpolate_pos_encoding": True}
        if kind == "vit_mae":                     # nothing is masked, and noise that rises keeps the order
            config.mask_ratio, self.more["noise"] = 0.0, torch.arange(grid ** 2)[None]
        for name, x in zip(("mean", "std"), image_norm, strict=True):
            self.register_buffer(name, torch.tensor(x)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()
        # Weights, and what changes the answer and is not told by them.
        names = "num_attention_heads", "layer_norm_eps", "hidden_act", "rope_theta"
        identity = {name: getattr(config, name) for name in names if hasattr(config, name)} | {
            "kind": kind, "sha256": digest_of(self.net.state_dict()), "image_size": image_size,
            "encoder_size": self.encoder_size, "precision": precision, "image_norm": image_norm}
        untrained = getattr(config, "untrained", None) is True
        self.about = {"id": str(source), "untrained": untrained, "identity": identity}

    def forward(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = F.interpolate(x, size=(self.encoder_size,) * 2, mode="bicubic", align_corners=False)
        more = {k: v.expand(len(x), -1) if k == "noise" else v for k, v in self.more.items()}
        # cuDNN would run the patch embedding of fp32 in TF32.
        with (torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            tokens = self.net(pixel_values=(x - self.mean) / self.std, **more).last_hidden_state
        # The patches come last, after a class token and registers.
        tokens = tokens[:, -self.shape[1] * self.shape[2]:]
        return tokens.float().transpose(1, 2).unflatten(2, self.shape[1:])


def load_tower(source):
    """-> a tower of TOWERS, its last LayerNorm without affine part; its kind; its pixels' [mean, std]."""
    import transformers
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()                 # it lists a text tower's weights, which are not wanted
    try:
        kind = transformers.PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        name, norm, image_norm = TOWERS.get(kind, (None, None, None))
        if name:
            net, notes = getattr(transformers, name).from_pretrained(
                source, dtype=torch.float32, output_loading_info=True)
    except Exception as error:                    # transformers raises a dozen kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"no encoder {source} ({reason}): give a folder or Hub id; "
                         "sanity/random_encoder.py makes an untrained one") from error
    if not name or notes["missing_keys"]:
        found = "lacks weights" if name else f"is of model_type {kind}"
        raise InputError(f"{source} {found}: an encoder is one of {', '.join(TOWERS)}")
    if net.config.num_channels != 3 or not isinstance(net.config.patch_size, int):
        raise InputError(f"{source} does not see square patches of three colours")
    eps = net.get_submodule(norm).eps
    net.set_submodule(norm, nn.LayerNorm(net.config.hidden_size, eps, elementwise_affine=False))
    return net, kind, read_image_norm(source, image_norm)


def read_image_norm(source, default):
    """[mean, std] of an encoder's pixels by its preprocessor's file; `default` where there is none (said)."""
    from transformers.utils import cached_file
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        said = read_json(path) if path else {}
        said = said.get("image_processor", said)
        if "image_mean" in said:
            break
    else:
        say(f"{source} has no preprocessor_config.json with image_mean: {default}, as published")
        return default
    try:
        x = torch.tensor([said["image_mean"], said["image_std"]])
        fits = x.shape == (2, 3) and x.isfinite().all() and (x[1] > 0).all()
        fits = fits and said.get("do_normalize", True)
        fits = fits and abs(255 * said.get("rescale_factor", 1 / 255) - 1) < 0.01
    except (LookupError, ValueError, TypeError, RuntimeError):
        fits = False
    if not fits:
        raise InputError(f"{path}: image_mean and image_std must be of R, G, B in [0, 1], and be applied")
    return [said["image_mean"], said["image_std"]]


# ---- The format's readers ----------------------------------------------------------------------------------
def read_about(folder):
    """latents.json of a finished folder."""
    if not Path(folder, "latents.json").exists():
        raise InputError(f"no latents in {folder}: encode_latents.py --data-path IMAGES --out {folder}")
    if not Path(folder, "latent_stats.safetensors").exists():
        raise InputError(f"{folder} holds unfinished latents: repeat the command that was making them")
    return read_json(Path(folder, "latents.json"))


def encoder_of(folder):
    """The Encoder that made the latents of a folder, from where it lay then, or lies from here.

    InputError: it is gone, or another one by now, or a module of one's own."""
    about = read_about(folder)["encoder"]
    made, source = about["identity"], about["id"]
    if "kind" not in made:
        raise InputError(f"{folder} is by {source}, which is no --encoder: its images cannot be encoded here")
    beside = Path(folder, about["from_here"])
    if not Path(source).exists() and beside.exists():
        source = beside
    encoder = Encoder(source, made["image_size"], made["encoder_size"], made["precision"])
    if encoder.about["identity"] != made:
        raise InputError(f"the encoder {source} is another than the one that made {folder}: encode again")
    return encoder


def shard_path(folder, k):
    return Path(folder, f"shard_{k:05d}.safetensors")


def read_shard(folder, about, k, check=False):
    """-> {"latents", "labels", "sum", "squares"}, maps of the file; what it says; its sha256."""
    parts, said, digests = read_tensors(shard_path(folder, k), check=check)
    if said.get("identity") != sha256(about["identity"]):
        raise InputError(f"{shard_path(folder, k)} is of other latents than latents.json: remove it, and "
                         "repeat the command that made these")
    return parts[""], said, digests[""]


class Latents:
    """The latents of a folder written by this file, as maps of its shards. Attributes: `shape` (C, H, W),
    `classes` (names), `stats` ({"mean", "var"}, float64), `labels` (N,), `about` (latents.json), `sha256`.
    InputError: none, cut, or of other images or another encoder."""

    def __init__(self, folder):
        self.about = read_about(folder)
        self.shape, self.classes = tuple(self.about["shape"]), self.about["classes"]
        self.stats = load_stats(folder, self.shape)
        shards = [read_shard(folder, self.about, k) for k in range(self.about["shards"])]
        self.shards = [tensors["latents"].numpy() for tensors, _, _ in shards]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.labels = torch.cat([tensors["labels"] for tensors, _, _ in shards])
        self.sha256 = sha256([digest for *_, digest in shards])

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        """-> float16 (B, C, H, W), labels (B,) int64, in any order."""
        batch = np.empty((len(indices), *self.shape), np.float16)
        shards = np.searchsorted(self.ends, indices, side="right")
        for i, (index, k) in enumerate(zip(indices, shards, strict=True)):
            # Counted from the shard's end: a negative index.
            batch[i] = self.shards[k][index - self.ends[k]]
        return torch.from_numpy(batch), self.labels[indices]


# ---- The order in which training sees them -----------------------------------------------------------------
@functools.lru_cache(maxsize=2)                   # a batch may straddle two
def epoch(number, count, seed, flips):
    """A permutation of range(count) that follows from (seed, number) alone; flips: + count for about half."""
    order = torch.randperm(count, generator=generator("cpu", seed, "epoch", number))
    if flips:
        order += count * torch.randint(2, (count,), generator=generator("cpu", seed, "flips", number))
    return order


def batches_of(count, seed, batch_size, rows, first_step, last_step, flips=False):
    """For each step in first_step .. last_step - 1 and (start, stop) of `rows`, the indices of these rows.

    Row r of step k is position k * batch_size + r in an endless sequence of epochs, so the samples are the
    same however a run is split or goes on."""
    for step in range(first_step, last_step):
        for start, stop in rows:
            positions = range(step * batch_size + start, step * batch_size + stop)
            yield [int(epoch(p // count, count, seed, flips)[p % count]) for p in positions]


class TrainingData:
    """What a stage trains on: the latents of a folder; or images encoded on the fly as that folder describes
    (its shards are not needed), with random flips where its latents have them.

    Attributes: `shape`, `classes` (names), `stats` ({"mean", "var"}), `about` (for the run's records),
    `sha256` (of the contents, wherever they lie)."""

    def __init__(self, latents, data_path=None):
        about = read_about(latents)
        self.shape, self.classes, made = tuple(about["shape"]), about["classes"], about["identity"]
        self.stats, self.about = load_stats(latents, self.shape), {k: about[k] for k in ("data", "encoder")}
        if data_path is None:
            self.data, self.flips, self.encode = Latents(latents), False, nn.Identity()
        else:
            self.encode = encoder_of(latents)
            self.data, self.flips = Images(data_path, made["image_size"]), made["flips"]
            if self.data.classes != self.classes:
                raise InputError(f"{data_path} has other classes than {latents}, made from {about['data']}: "
                                 "give the images that these latents are of")
        self.sha256 = sha256([made, self.classes, digest_of(self.stats), self.data.sha256])

    def batches(self, args, rows, first_step, device):
        """Raw latents (B, C, H, W), labels (B,) on `device`, for each step and (start, stop) of `rows`.

        args: `seed`, `batch_size`, `steps`, `workers`."""
        def read(indices):
            batch = self.data.read(indices)
            return [x.pin_memory() for x in batch] if device.type == "cuda" else batch
        encode = self.encode.to(device)
        indices = batches_of(
            len(self.data), args.seed, args.batch_size, rows, first_step, args.steps, self.flips)
        for x, y in read_ahead(read, indices, args.workers):
            yield encode(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)


# ---- Encoding ----------------------------------------------------------------------------------------------
def begin(out, about):
    """Make `out` the folder of these latents, or see that it is."""
    if (out / "latents.json").exists():
        refuse_other(out, read_json(out / "latents.json").get("identity", {}), about["identity"])
    elif any(out.glob("[!.]*")) or out.is_file():
        raise InputError(f"{out} holds something else: give an --out that is empty or new")
    lock(out / ".lock")
    if not (out / "latents.json").exists():
        write_json(out / "latents.json", about)


@torch.no_grad()
def encode(images, encoder, out, flips=False, batch_size=64, workers=1, shard_size=4096):
    """Encode `images` (an Images) into the folder `out`; the same call goes on. Processes share the work.

    encoder: an Encoder; or a module of one's own, uint8 (B, 3, S, S) -> raw latents (B, C, G, G), with
    `shape` (C, G, G) and `digest`, a text that changes when its latents do: a hash of its weights, say.
    InputError: `out` holds other work, or lies within the images; latents that are not finite in float16."""
    device, rank, world = launch(hours=24)
    out, shape = Path(out), list(map(int, encoder.shape))
    if len(shape) != 3 or shape[1] != shape[2]:
        raise InputError(f"the encoder's shape is {shape}, and must be (C, G, G)")
    if images.path.is_dir() and images.path.resolve() in out.resolve().parents:
        raise InputError(f"--out {out} lies within the images: give one elsewhere")
    if type(encoder) is Encoder:
        made_by = {**encoder.about, "from_here": os.path.relpath(encoder.about["id"], out)}
    else:
        identity = {"sha256": str(encoder.digest), "image_size": images.image_size}
        made_by = {"id": type(encoder).__name__, "identity": identity}
    total = len(images) * (1 + flips)
    shards = {i // shard_size: range(i, min(i + shard_size, total)) for i in range(0, total, shard_size)}
    about = {
        "data": images.path.resolve().name, "shape": shape, "shards": len(shards),
        "encoder": made_by, "classes": images.classes,
        "identity": {"images": images.sha256, "flips": flips, "shard_size": shard_size,
                     **made_by["identity"]}}
    if rank == 0:
        say(f"{len(images):,} images in {len(images.classes)} classes, on {world} x {device.type}: "
            f"{total * math.prod(shape) * 2 / 1e9:,.2f} GB of latents in {out}")
        begin(out, about)
    barrier()

    # Without skip_bad, a shard that lacks images is made again.
    missing = [k for k in shards if not shard_path(out, k).exists()
               or not images.skip_bad and read_shard(out, about, k)[1]["skipped"]]
    barrier()                                     # all have looked before the first one writes
    if rank == 0 and missing:
        (out / "latent_stats.safetensors").unlink(missing_ok=True)         # of other shards
    if len(missing) < len(shards):
        known = "" if images.zip else "; images are known by name"
        say(f"{len(shards) - len(missing)} of {len(shards)} shards are there{known}")
    plan = [(k, shards[k][i:i + batch_size]) for k in missing[rank::world]
            for i in range(0, len(shards[k]), batch_size)]
    parts, batches = [], read_ahead(images.read, [rows for _, rows in plan], workers)
    encoder.to(device).eval()
    for (k, rows), (x, y) in zip(plan, progress(batches, len(plan), "batches"), strict=True):
        z = encoder(x.to(device)).half() if len(x) else torch.empty(0, *shape).half()
        if list(z.shape) != [len(x), *shape]:
            raise InputError(f"of {len(x)} images the encoder makes {list(z.shape)}; its shape is {shape}")
        if not z.isfinite().all():
            raise InputError(f"latents of {images.paths[rows[0] % len(images)]}, or of the {len(rows) - 1} "
                             "after it, are not finite in float16: look at the encoder's weights")
        parts.append((z.cpu(), y))
        if rows[-1] == shards[k][-1]:
            z, y = map(torch.cat, zip(*parts, strict=True))
            skipped = [images.skipped[i] for i in shards[k] if i in images.skipped]
            write_shard(out, k, z, y, about, skipped)
            parts = []
    barrier()
    if rank == 0 and (missing or not (out / "latent_stats.safetensors").exists()):
        finish(out, about)


def write_latents(out, latents, labels, classes=None, made_by="given", shard_size=4096):
    """Write latents that exist as such a folder. One process; the same call starts over.

    latents: (N, C, G, G), an array, a map of one, or a tensor, raw. labels: (N,) integers. classes: names.
    made_by: what made them. InputError: shapes or classes do not fit; or as of `encode`."""
    def block(k):
        x = latents[k * shard_size:(k + 1) * shard_size]
        x = x.detach().cpu() if isinstance(x, torch.Tensor) else torch.from_numpy(np.array(x, np.float32))
        if not x.half().isfinite().all():
            raise InputError(f"some latents are not finite in float16, from number {k * shard_size} on")
        return x.half()
    out, labels = Path(out), torch.as_tensor(labels).cpu()
    fits = latents.ndim == 4 and latents.shape[2] == latents.shape[3] and latents.shape[:1] == labels.shape
    if not fits or labels.is_floating_point() or not len(labels):
        raise InputError(f"latents {[*latents.shape]}, labels {[*labels.shape]} of {labels.dtype}: give "
                         "(N, C, G, G), and (N,) integers")
    labels = labels.long()
    classes = list(map(str, range(int(labels.max()) + 1) if classes is None else classes))
    if labels.unique().tolist() != list(range(len(classes))):
        raise InputError(f"{len(classes)} classes: give labels from 0 to {len(classes) - 1}, each of them")
    shards = range(math.ceil(len(labels) / shard_size))
    contents = [digest_of({"": block(k)}) for k in shards]
    about = {
        "data": str(made_by), "shape": list(latents.shape[1:]), "shards": len(shards),
        "encoder": {"id": str(made_by), "identity": {}}, "classes": classes,
        "identity": {"latents": sha256([contents, labels.tolist(), classes]), "shard_size": shard_size}}
    begin(out, about)
    for k in shards:
        write_shard(out, k, block(k), labels[k * shard_size:(k + 1) * shard_size], about)
    finish(out, about)


def write_shard(out, k, z, y, about, skipped=()):
    """z: (n, C, H, W) float16; y: (n,) int64; about: latents.json."""
    total, squares = torch.zeros(2, *z.shape[1:], dtype=torch.float64)
    for part in z.split(64):
        total += part.double().sum(0)
        squares += part.double().square().sum(0)
    tensors = {"latents": z, "labels": y, "sum": total, "squares": squares}
    said = {"identity": sha256(about["identity"]), "skipped": list(skipped)}
    write_tensors(shard_path(out, k), {"": tensors}, said)


def statistics(folder, about, check=False):
    """-> {"mean", "var"} of all latents, by the sums of their shards; labels; what was skipped."""
    sums, squares, labels, skipped = 0, 0, [], []
    for k in range(about["shards"]):
        tensors, said, _ = read_shard(folder, about, k, check)
        sums, squares = sums + tensors["sum"], squares + tensors["squares"]
        labels.append(tensors["labels"])
        skipped += said["skipped"]
    labels = torch.cat(labels)
    mean, square = (x / max(len(labels), 1) for x in (sums, squares))
    return {"mean": mean, "var": (square - mean.square()).clamp(min=0)}, labels, skipped


def finish(out, about):
    """Write skipped.txt and, last, the statistics. InputError: a class has no image."""
    stats, labels, skipped = statistics(out, about)
    skipped = list(dict.fromkeys(skipped))        # once, not also as a mirror image
    empty = sorted(set(range(len(about["classes"]))) - set(labels.tolist()))
    if empty:
        raise InputError(f"no image of class {about['classes'][empty[0]]} could be read: mend them, and "
                         f"repeat without --skip-bad ({skipped[0]})")
    (out / "skipped.txt").unlink(missing_ok=True)
    if skipped:
        text = "".join(f"{line}\n" for line in skipped)
        write_atomically(out / "skipped.txt", lambda file: file.write(text.encode(errors="backslashreplace")))
    write_tensors(out / "latent_stats.safetensors", {"": stats})
    shape, listed = "x".join(map(str, about["shape"])), " (skipped.txt)" * bool(skipped)
    say(f"{out}: {len(labels):,} latents of {shape}, {len(about['classes'])} classes; "
        f"{len(skipped):,} images unreadable and left out{listed}")


def verify(out):
    """Read all back. InputError: a file is damaged or of other latents, or the statistics are not theirs."""
    about = read_about(out)
    stats, labels, _ = statistics(out, about, check=True)
    written = load_stats(out, about["shape"])
    if not all(torch.equal(stats[name], written[name]) for name in stats):
        raise InputError(f"{out}/latent_stats.safetensors is not of these shards: remove it, and repeat the "
                         "command that made them")
    say(f"{out}: {about['shards'] + 1} files with {len(labels):,} latents read back, all whole")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    cores, pixels = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), number(int, 1, 2 ** 14)
    add = parser.add_argument
    add("--data-path", type=location, default="data/imagenet/train",
        help="folder of class folders, or a .zip of one")
    add("--image-size", type=pixels, default=256, help="pixels (paper; also 512)")
    add("--flips", action="store_true", help="every image flipped sideways too (on the fly: at random)")
    add("--skip-bad", action="store_true", help="list unreadable images in skipped.txt, in place of stopping")
    add("--encoder", type=location, default=DINOV2,
        help="folder or Hub id of DINOv2 (RAE), DINOv3, MAE, SigLIP")
    add("--encoder-size", type=pixels, help="pixels that it sees (default: image size * patch / 16; RAE)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, of 8 bits")
    add("--batch-size", type=whole(), default=64, help="images per process and pass; changes rounding alone")
    add("--workers", type=whole(0), default=min(16, cores), help="threads per process that decode images")
    add("--out", type=location, default="data/latents",
        help="folder for the latents, on a disk that all processes share")
    add("--shard-size", type=whole(), default=4096, help="images per file: 1.6 GB at 256 px")
    add("--verify", action="store_true", help="read the latents in --out back and prove them; nothing else")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    _, rank, _ = launch(hours=24)
    if args.verify:
        return verify(Path(args.out)) if rank == 0 else None
    images = Images(args.data_path, args.image_size, args.skip_bad)
    encoder = Encoder(args.encoder, args.image_size, args.encoder_size, args.precision)
    encode(images, encoder, args.out, args.flips, args.batch_size, args.workers, args.shard_size)


if __name__ == "__main__":
    command(main)
