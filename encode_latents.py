"""Images -> frozen DINOv2 with registers -> latents on disk, with their statistics; and the readers of both.

An image is prepared as ADM does (box halvings, bicubic, centre crop), resized to the encoder's size, and
becomes the encoder's last hidden state: patch tokens alone, final LayerNorm without its affine part (RAE,
arXiv 2510.11690). Latents are stored raw, as float16, in shards; mean and variance (C, H, W) lie beside them.

    python encode_latents.py --data-path imagenet/train               # one GPU (or CPU): writes data/latents
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train                    # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        encode_latents.py --data-path imagenet/train      # on each of four nodes; --out on a disk they share
    python encode_latents.py --verify                                 # read everything back, and prove it

A shard covers fixed images, so the files are the same whatever the number of processes, and the same command
goes on where it was stopped. Folder: encoding.json (what is encoded, by what), shard_*.safetensors,
latent_stats.safetensors, skipped.txt if any were, latents.json (written last).
"""
import atexit
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import threading
import time
import zipfile
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from model import (
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, barrier, command, digest_of, generator, is_first,
    launch, load_stats, location, lock, number, read_json, read_tensors, refuse_other, say, whole,
    write_atomically, write_json, write_tensors)

DINOV2 = "facebook/dinov2-with-registers-base"
SUFFIXES = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()
# 16,384 x 16,384, for which a process takes 3 GB; the environment variable MFRAE_MAX_PIXELS is another limit.
MAX_PIXELS = int(os.environ.get("MFRAE_MAX_PIXELS", 2 ** 28))
Image.MAX_IMAGE_PIXELS = None


# ---- Pictures ----------------------------------------------------------------------------------------------
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
         7: "TRANSVERSE", 8: "ROTATE_90"}         # what an EXIF orientation asks for


@functools.cache
def formats():
    """Pillow's formats of SUFFIXES; others may do more than show an image (EPS starts Ghostscript)."""
    Image.init()
    return [name for name in {Image.EXTENSION.get(f".{suffix}") for suffix in SUFFIXES} if name in Image.OPEN]


def open_image(file):
    """An image whose pixels are not read yet. ValueError: more than MAX_PIXELS."""
    image = Image.open(file, formats=formats())
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, MFRAE_MAX_PIXELS is {MAX_PIXELS}")
    return image


def read_upright(file):
    image = open_image(file)
    image.load()
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:                             # broken EXIF turns nothing; it raises some ten kinds
        turn = None
    return image.transpose(Image.Transpose[turn]) if turn else image


def bare_png(data):
    """A PNG's bytes without texts, colour profile and the like, which Pillow may refuse."""
    parts, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place:place + 4], "big")
        name = data[place + 4:place + 8]
        if name[:1].isupper() or name in (b"tRNS", b"eXIf"):
            parts.append(data[place:end])
        place = end
    return b"".join(parts)


def open_rgb(file):
    """An image as a viewer shows it, in RGB: upright, first frame, 16 bits as 8, transparency on white."""
    try:
        image = read_upright(file)
    except Exception:
        file.seek(0)
        data = file.read()
        if not data.startswith(b"\x89PNG"):
            raise
        image = read_upright(io.BytesIO(bare_png(data)))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):                # convert() would clip 16 bits to 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
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
    width, height = round(image.width * scale), round(image.height * scale)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height > 2 ** 26:
        # A strip, which would take gigabytes: only its middle is enlarged, equal but for the last rounding.
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)[top:top + size, left:left + size]


# ---- Folders and archives: one walk for all ----------------------------------------------------------------
SYSTEM_FOLDERS = ("@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "system volume information",
                  "__macosx")
SPLITS = ("train", "val", "valid", "validation", "test", "held-out")


def printable(name):
    """A name with what a terminal would obey, or cannot show, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_image(name):
    return os.path.splitext(name)[1].lower()[1:] in SUFFIXES


def list_folder(path, left_out):
    """Names of the regular files under a folder, and of its folders, which end in "/"; the rest is counted in
    `left_out`. Links are followed where they lead out of it. InputError: a folder that cannot be read, or
    that is in two classes."""
    def within(a, b):
        return f"{a}/".startswith(f"{b}/".replace("//", "/"))

    root, where = os.path.realpath(path), printable(path)
    found, known, waiting = [], {}, [""]
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(Path(path, inside)), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"cannot read the folder {where}/{printable(inside)} ({error.strerror}): let "
                             "this user read it, or move it away") from error
        for entry in entries:
            name = inside + entry.name
            target = os.path.realpath(entry.path) if entry.is_symlink() else None
            if is_hidden(entry.name):
                left_out["hidden or of the system"] += 1
            elif target and not os.path.exists(target):
                left_out["links to nothing"] += 1
            elif target and (within(target, root) or within(root, target)):
                left_out["links to what is here anyway"] += 1
            elif entry.is_file():
                found.append(name)
            elif not entry.is_dir():
                left_out["pipes, sockets or devices"] += 1
            else:
                status = entry.stat()
                first = known.setdefault((status.st_dev, status.st_ino), name)
                if first == name:
                    found.append(f"{name}/")
                    waiting.append(f"{name}/")
                elif first.split("/")[0] == name.split("/")[0]:
                    left_out["links to what is here anyway"] += 1
                else:
                    raise InputError(f"{where}: {printable(first)} and {printable(name)} are one folder, "
                                     "which cannot be in two classes: remove a link")
    return found


def list_archive(path, archive, left_out):
    """The same of a .zip: {name: the entry's own}. InputError: names that lead out, or are of two kinds."""
    found, entries = {}, archive.infolist()
    slashes = any("/" in entry.filename for entry in entries)
    for entry in entries:
        # Windows' tools may write backslashes.
        name = entry.filename if slashes else entry.filename.replace("\\", "/")
        name = name.removeprefix("./")
        parts, wrong = name.split("/"), None
        if "\\" in name:
            wrong = "has a backslash, and others have slashes"
        elif parts[0] == "" or parts[0].endswith(":") or ".." in parts:
            wrong = "leads out of the archive"
        if wrong:
            raise InputError(f"{printable(path)}: the entry {printable(name)} {wrong}: pack it again")
        if any(map(is_hidden, filter(None, parts))):
            left_out["hidden or of the system"] += 1
        elif stat.S_ISLNK(entry.external_attr >> 16):
            left_out["links"] += 1
        elif name in found:
            left_out["entries that stand twice"] += 1
        else:
            found[name] = entry.filename
    return found


def check_layout(path, found, images):
    """The names of the class folders, none where all images lie side by side. InputError: anything else."""
    where, folders = printable(path), sorted({name.split("/")[0] for name in found if "/" in name})
    if folders and all(name.lower() in SPLITS for name in folders):
        meant = {name.split("/")[0].lower(): name.split("/")[0] for name in found if name.count("/") > 1}
        if meant:
            meant = next(meant[name] for name in SPLITS if name in meant)
            raise InputError(f"{where} holds {' and '.join(folders)}, which are no classes: give "
                             f"{where}/{meant}, or a .zip of it")
    if not images:
        raise InputError(f"{where} holds no images ({' '.join(SUFFIXES)})")
    empty = sorted(set(folders) - {name.split("/")[0] for name in images})
    if empty:
        raise InputError(f"{where}: class folder {printable(empty[0])} holds no images: fill or remove it ("
                         f"{len(empty)} such)")
    beside = [name for name in images if "/" not in name]
    if beside and folders:
        raise InputError(f"{where}: {printable(beside[0])} lies beside the class folders: move it into one, "
                         f"or away ({len(beside)} such)")
    return folders


def label(images, folders):
    """-> names sorted by class, then name; labels (N,). Ids follow the folders' names as text."""
    ids = {name: i for i, name in enumerate(folders)}
    pairs = sorted((ids.get(name.split("/")[0], 0), name) for name in images)
    return [name for _, name in pairs], torch.tensor([i for i, _ in pairs])


class Images:
    """The images of a folder of class folders (nested at will), or of a .zip of one, which is read in place.

    Class ids follow the sorted folder names (for ImageNet's wnids: the published ids); a folder without class
    folders is one class. Attributes: `classes` (names), `paths` (relative, sorted by class, then name),
    `labels` (N,) int64, `digest` (of classes and paths). An index >= N is the horizontally flipped copy of
    index - N. What is left out is counted and said. InputError: no images, an empty class, unreadable."""

    def __init__(self, path, image_size):
        self.path, self.image_size, self.zip, self.pid = Path(path), image_size, None, None
        where, left_out, alone = printable(path), Counter(), self.path.resolve().name
        if not self.path.exists():
            raise InputError(f"{where} does not exist: --data-path takes a folder of class folders of "
                             "images, or a .zip of one")
        if self.path.is_dir():
            found = {name: name for name in list_folder(self.path, left_out)}
        else:
            try:
                self.zip, self.pid = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise InputError(f"{where} is no whole .zip ({error}): give a folder of class folders, or a "
                                 ".zip of one") from error
            found, alone = list_archive(self.path, self.zip, left_out), self.path.stem
            tops = {name.split("/")[0] for name in found}
            if len(tops) == 1 and all("/" in name for name in found):
                alone = tops.pop()
                found = {name.removeprefix(f"{alone}/"): entry for name, entry in found.items()}
        images = [name for name in found if is_image(name)]
        for name in found:
            if name and not name.endswith("/") and not is_image(name):
                left_out[printable(os.path.splitext(name)[1].lower() or "without a suffix")] += 1
        folders = check_layout(self.path, found, images)
        self.classes = folders or [alone]
        self.paths, self.labels = label(images, folders)
        # What an image is called where it lies, if otherwise than here.
        self.entries = {name: found[name] for name in images if found[name] != name}
        self.digest = hashlib.sha256(json.dumps([self.classes, self.paths]).encode()).hexdigest()
        if left_out and is_first():
            kinds = ", ".join(f"{n:,} {what}" for what, n in left_out.most_common())
            say(f"{where}: left out: {kinds}")
        if not folders and is_first():
            say(f"{where} has no class folders: all is one class, {printable(alone)}")

    def __len__(self):
        return len(self.paths)

    def __getstate__(self):
        return {**self.__dict__, "zip": None, "pid": None}

    def open(self, name):
        name = self.entries.get(name, name)
        if self.path.is_dir():
            return open(self.path / name, "rb")
        if self.zip is None:
            self.zip = zipfile.ZipFile(self.path)
        elif self.pid != os.getpid():
            # A forked worker may share our million names, not our position in the file.
            self.zip.fp = open(self.path, "rb")
        self.pid = os.getpid()
        return self.zip.open(name)

    def read(self, index):
        """-> (uint8 array (3, S, S), whether the image was enlarged). InputError: an unreadable file."""
        name = self.paths[index % len(self)]
        try:
            with self.open(name) as file:
                image = open_rgb(file)
                pixels = adm_crop(image, self.image_size)
        except Exception as error:                # decoders of damaged files raise some twenty kinds
            reason = printable(f"{type(error).__name__}: {error}".replace("\n", " "))
            raise InputError(f"{printable(self.path / name)} is not a readable image ({reason}): replace or "
                             "remove it (encode_latents.py --skip-bad leaves it out)") from error
        pixels = pixels[:, ::-1] if index >= len(self) else pixels
        return pixels.transpose(2, 0, 1), min(image.size) < self.image_size

    def fetch(self, indices):
        """-> uint8 (B, 3, S, S), labels (B,) int64, how many were enlarged, {place in batch: InputError}"""
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
        """-> (uint8 (B, 3, S, S), labels (B,) int64), a batch. InputError: the first unreadable file."""
        images, labels, _, bad = self.fetch(indices)
        for error in bad.values():
            raise error
        return images, labels


class ImagesWithNotes(Images):
    __getitems__ = Images.fetch


# ---- The encoder -------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """A frozen Dinov2WithRegistersModel as an image encoder (RAE, section 3): images (B, 3, S, S), uint8 or
    float in [0, 1] -> raw latents (B, C, G, G), float32, G = encoder_size / patch, differentiable.

    source: a folder or Hub id. encoder_size: pixels, default image_size * patch / 16 (G = image_size / 16).
    precision: "fp32" or "bf16" (autocast). InputError: no such encoder, sizes that do not fit its patches."""

    def __init__(self, source=DINOV2, image_size=256, encoder_size=None, precision="fp32"):
        super().__init__()
        self.net, self.source = load_dinov2(str(source)), str(source)
        config = self.net.config
        self.untrained = getattr(config, "untrained", None) is True
        self.patch, self.precision, self.skip = config.patch_size, precision, 1 + config.num_register_tokens
        self.image_size, self.encoder_size = image_size, encoder_size or image_size * self.patch // 16
        if self.encoder_size % self.patch or not encoder_size and image_size % 16:
            raise InputError(f"images of {image_size} px at encoder size {self.encoder_size} do not fit "
                             f"patches of {self.patch} px: --encoder-size must be a multiple of {self.patch}")
        self.shape = (config.hidden_size, *[self.encoder_size // self.patch] * 2)
        width, eps = config.hidden_size, config.layer_norm_eps
        self.net.layernorm = nn.LayerNorm(width, eps, elementwise_affine=False)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)
        self.requires_grad_(False).eval()
        self.digest = digest_of(self.net.state_dict())

    def forward(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = F.interpolate(x, size=(self.encoder_size,) * 2, mode="bicubic", align_corners=False)
        # cuDNN would run the patch embedding of fp32 in TF32.
        with (torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            tokens = self.net(pixel_values=(x - self.mean) / self.std).last_hidden_state[:, self.skip:]
        return tokens.float().transpose(1, 2).unflatten(2, self.shape[1:])

    def describe(self):
        """What made the latents, for their description; `sha256` is of the weights."""
        return {"id": self.source, "untrained": self.untrained, "sha256": self.digest, "patch": self.patch,
                "width": self.shape[0], "image_size": self.image_size, "encoder_size": self.encoder_size}


def load_dinov2(source):
    if source.startswith("random:"):              # older versions made it on the spot
        flags = source.removeprefix("random:").replace("=", " ").replace(",", " --")
        raise InputError(f"no encoder {source}: sanity/random_encoder.py --out FOLDER --{flags} makes it; "
                         "then repeat encode_latents.py with --encoder FOLDER, which keeps the shards")
    from transformers import AutoConfig, Dinov2WithRegistersModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
        net, notes = Dinov2WithRegistersModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    except Exception as error:                    # transformers raises a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"no encoder {source} ({reason}): give --encoder a folder or Hub id of a DINOv2 "
                         "with registers; sanity/random_encoder.py makes an untrained one") from error
    if kind != "dinov2_with_registers" or notes["missing_keys"]:
        raise InputError(f"{source} is a {kind} model, a dinov2_with_registers one is needed as --encoder")
    return net


def digest_of_text(*parts):
    """sha256 of what JSON can hold, whatever the order of its dicts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ---- The format's readers ----------------------------------------------------------------------------------
def identity(about):
    """What the contents of latents follow from: no paths, no names of folders."""
    return {"data": about["data"]["sha256_of_names"], "encoder": about["encoder"]["sha256"],
            "encoder_size": about["encoder"]["encoder_size"],
            **{k: about[k] for k in ("format", "image_size", "precision", "flips", "shard_size")}}


def origin(about, k):
    """What the header of shard k says about it."""
    return digest_of_text(identity(about), k)


def read_about(path):
    """encoding.json or latents.json: what is encoded, by what."""
    about = read_json(path)
    try:
        identity(about)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} describes no latents ({error}): give another --out") from error
    return about


def read_description(folder):
    """latents.json of a finished folder, every entry of the kind and size that its readers rely on."""
    path = Path(folder, "latents.json")
    if not path.exists():
        if Path(folder, "encoding.json").exists():
            raise InputError(f"{folder} holds unfinished latents: repeat the command that was making them")
        raise InputError(f"no latents in {folder}: encode_latents.py --data-path IMAGES --out {folder} makes "
                         "them")
    about = read_about(path)
    try:
        shape, classes, shards, encoder = (about[k] for k in ("shape", "classes", "shards", "encoder"))
        sizes = [*shape, about["image_size"], encoder["image_size"], encoder["encoder_size"]]
        counts = [shard["count"] for shard in shards]
        texts = [*classes, *(shard["sha256"] for shard in shards), encoder["id"], encoder["sha256"],
                 about["statistics_sha256"], about["data"]["name"]]
        fits = [type(classes) is list and classes, len(shape) == 3, about["count"] == sum(counts) > 0,
                all(type(n) is int and 0 < n <= 2 ** 14 for n in sizes),
                all(type(n) is int and n >= 0 for n in [*counts, about["count"]]),
                all(isinstance(text, str) for text in texts),
                about["precision"] in ("fp32", "bf16"), type(about["flips"]) is bool,
                all(re.fullmatch(r"shard_\d+\.safetensors", shard["file"]) for shard in shards)]
        if not all(fits):
            raise ValueError("an entry is not of its kind or size")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} describes no latents ({error}): repeat the command that made it") from error
    return about


def encoder_of(about):
    """The Encoder that made the latents of this description. InputError: its weights are others by now."""
    made = about["encoder"]
    encoder = Encoder(made["id"], made["image_size"], made["encoder_size"], about["precision"])
    if encoder.digest != made["sha256"] or list(encoder.shape) != about["shape"]:
        raise InputError(f"the encoder {made['id']} has other weights than the one that made the latents: "
                         "encode again")
    return encoder


def statistics_of(folder, about):
    """Those of latents. InputError where the file is not the one that their description names."""
    path = Path(folder, "latent_stats.safetensors")
    stats = load_stats(path, about["shape"])
    if read_tensors(path, check=False)[2].get("") != about["statistics_sha256"]:
        raise InputError(f"{path} is not of these latents: the command that made them makes it again; other "
                         "statistics go into --stats")
    return stats


class Latents:
    """The latents of a folder written by this file, by memory map. Attributes: `shape` (C, H, W), `count`,
    `classes`, `num_classes`, `stats` ({"mean", "var"}, float64), `labels` (N,), `description` (latents.json).
    InputError: none, cut, or not what the description says."""

    def __init__(self, folder):
        self.description = about = read_description(folder)
        self.shape, self.count, self.classes = tuple(about["shape"]), about["count"], about["classes"]
        self.num_classes, self.stats = len(self.classes), statistics_of(folder, about)
        self.paths = [Path(folder, shard["file"]) for shard in about["shards"]]
        self.ends = np.cumsum([shard["count"] for shard in about["shards"]])
        self.maps, labels = {}, []
        for path, shard in zip(self.paths, about["shards"], strict=True):
            parts, _, digests = read_tensors(path, check=False)
            z, y = (parts.get("", {}).get(name, torch.empty(0)) for name in ("latents", "labels"))
            fits = [digests.get("") == shard["sha256"], z.shape == (shard["count"], *self.shape),
                    y.shape == z.shape[:1], (z.dtype, y.dtype) == (torch.float16, torch.int64)]
            if not all(fits) or not ((0 <= y) & (y < self.num_classes)).all():
                raise InputError(f"{path} is not the file that {folder}/latents.json describes: the command "
                                 "that made it makes it again")
            labels.append(y.clone())
        self.labels = torch.cat(labels)

    def __len__(self):
        return self.count

    def __getstate__(self):                       # pickling a map would copy the data
        return {**self.__dict__, "maps": {}}

    def __getitems__(self, indices):
        """-> (float16 (B, C, H, W), labels (B,) int64), in any order."""
        batch = np.empty((len(indices), *self.shape), np.float16)
        shards = np.searchsorted(self.ends, indices, side="right")
        for i, (index, k) in enumerate(zip(indices, shards, strict=True)):
            if k not in self.maps:
                self.maps[k] = read_tensors(self.paths[k], check=False)[0][""]["latents"].numpy()
            # Both are counted from the shard's end: a negative index.
            batch[i] = self.maps[k][index - self.ends[k]]
        return torch.from_numpy(batch), self.labels[indices]


# ---- The order in which training sees them -----------------------------------------------------------------
class RowSampler:
    """For each step in first_step .. last_step - 1 and each (start, stop) of `rows`, the data set's indices
    of these rows of the global batch.

    Row r of step k is position k * batch_size + r in an endless sequence of epochs, each a permutation of
    range(count) that follows from (seed, epoch) alone; so the samples are the same however a run is split or
    resumed. flips: each position also draws a bit, and index + count stands for the flipped copy."""

    def __init__(self, count, seed, batch_size, rows, first_step, last_step, flips=False):
        self.count, self.seed, self.batch_size, self.rows, self.flips = count, seed, batch_size, rows, flips
        self.steps, self.epochs = range(first_step, last_step), {}

    def __len__(self):
        return len(self.steps) * len(self.rows)

    def epoch(self, number):
        if number not in self.epochs:
            # A batch may straddle two.
            self.epochs = {k: v for k, v in self.epochs.items() if k == number - 1}
            order = torch.randperm(self.count, generator=generator("cpu", self.seed, "epoch", number))
            if self.flips:
                g = generator("cpu", self.seed, "flips", number)
                order += self.count * torch.randint(2, (self.count,), generator=g)
            self.epochs[number] = order
        return self.epochs[number]

    def __iter__(self):
        for step in self.steps:
            for start, stop in self.rows:
                positions = range(step * self.batch_size + start, step * self.batch_size + stop)
                yield [int(self.epoch(p // self.count)[p % self.count]) for p in positions]


def batches_of(dataset, sampler, workers, pin=False):
    """The data set's batches, as its __getitems__ returns them, read ahead by `workers` processes.

    Their arrays come through pipes, as numpy's: /dev/shm may be small.
    pin: into memory that a GPU copies from.
    A worker that is lost ends the program with one line (model.command)."""
    ending = multiprocessing.Value("b", False, lock=False)
    atexit.register(setattr, ending, "value", True)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=as_arrays,
                        worker_init_fn=functools.partial(outlive_signals, ending),
                        generator=torch.Generator())    # else it draws from the global one
    try:
        for batch in loader:
            batch = [torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in batch]
            yield tuple(x.pin_memory() if pin and isinstance(x, torch.Tensor) else x for x in batch)
    except InputError as error:                   # a worker's comes wrapped in its traceback
        message = str(error).strip().splitlines()[-1].removeprefix("model.InputError: ")
        raise InputError(message) from None


def as_arrays(batch):
    return [x.numpy() if isinstance(x, torch.Tensor) else x for x in batch]


def outlive_signals(ending, worker):
    """A signal to the whole group, torchrun's way, is the training's to act on: its workers go on.

    Only when it has ended is SIGTERM meant for them: multiprocessing sends it at exit, and waits.
    One whose training was killed would wait for ever where its pipe is full: it ends, too."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(0)
    threading.Thread(target=end_with_parent, daemon=True).start()

    def on_signal(number, frame):
        if ending.value:
            os._exit(0)                           # else the loader would complain of a lost worker
    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(caught, on_signal)


class TrainingData:
    """What a stage trains on: the latents of a folder; or images encoded on the fly as that folder describes
    (its shards are not needed).

    Attributes: `shape`, `classes` (names), `stats` ({"mean", "var"}), `about` (dict, for the run's records),
    `digest` (of the contents, wherever they lie), `encoder` (of images on the fly, else None)."""

    def __init__(self, latents, data_path=None):
        self.encoder, self.flips = None, False
        about = read_description(latents)
        self.shape, self.classes = tuple(about["shape"]), about["classes"]
        self.about = {k: v for k, v in about.items() if k not in ("classes", "shards")}
        if data_path is None:
            self.dataset = Latents(latents)
            self.stats = self.dataset.stats
            content = [shard["sha256"] for shard in about["shards"]]
        else:
            self.stats, self.flips = statistics_of(latents, about), about["flips"]
            self.dataset = Images(data_path, about["image_size"])
            if self.dataset.classes != self.classes:
                raise InputError(f"{data_path} has other classes than {latents}, made from "
                                 f"{about['data']['name']}: give the images that these latents are of")
            self.encoder = encoder_of(about)
            content = {**identity(about), "data": self.dataset.digest}
        encoder, stats = about["encoder"]["sha256"], about["statistics_sha256"]
        self.digest = digest_of_text(self.classes, encoder, stats, content)

    def batches(self, args, rows, first_step, device):
        """Raw latents (B, C, H, W), labels (B,) on `device`, for each step and (start, stop) of `rows`.

        args: `seed`, `batch_size`, `steps`, `workers`."""
        encode = self.encoder.to(device) if self.encoder else nn.Identity()
        sampler = RowSampler(
            len(self.dataset), args.seed, args.batch_size, rows, first_step, args.steps, self.flips)
        for x, y in batches_of(self.dataset, sampler, args.workers, pin=device.type == "cuda"):
            yield encode(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)


# ---- Statistics that merge: (count, mean, m2), m2 the sum of squared deviations; float64 (C, H, W) ---------
def moments(latents):
    x = latents.double()
    mean = x.sum(0) / max(len(x), 1)
    return len(x), mean.cpu(), (x - mean).square().sum(0).cpu()


def merge(a, b):
    """Moments of two sets together (Chan, Golub and LeVeque, 1979); either may be empty."""
    n, delta = a[0] + b[0], b[1] - a[1]
    share = b[0] / max(n, 1)
    return n, a[1] + delta * share, a[2] + b[2] + delta.square() * (a[0] * share)


# ---- Encoding ----------------------------------------------------------------------------------------------
def shard_path(out, k):
    return out / f"shard_{k:05d}.safetensors"


def claim(out, settings, needed):
    """Make `out` the folder of these latents, or see that it is; see that they fit the disk."""
    described = out / "encoding.json"
    if out.exists() and not described.exists():
        if not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir()):
            raise InputError(f"{out} holds something else: give an --out that is empty or new")
    there = sum(path.stat().st_size for path in out.glob("shard_*.safetensors"))
    free = shutil.disk_usage(next(path for path in (out, *out.absolute().parents) if path.exists())).free
    space = f"{needed / 1e9:,.2f} GB, {there / 1e9:,.2f} GB of it there, {free / 1e9:,.2f} GB free"
    say(f"space needed in {out}: {space}")
    if needed - there > free:
        raise InputError(f"the latents do not fit into {out} ({space}): make space, or have the stages "
                         "encode on the fly (their --data-path)")
    lock(out / ".lock")
    if described.exists():
        refuse_other(out, identity(read_about(described)), identity(settings))
    write_json(described, settings)


def fault_of(path, origin, digest):
    """What is wrong with a shard: damaged, or of other images or another encoder than `origin`; or None."""
    try:
        _, about, digests = read_tensors(path)
    except InputError as error:
        return str(error)
    if digests.get("") != digest and (about or {}).get("origin") != origin:
        return f"{path} is of other images or another encoder"


def missing(out, shards, settings):
    """Those of the shards, {number: range of indices}, that are not there, or not whole."""
    digests = {}
    if (out / "latents.json").exists():
        digests = {shard["file"]: shard["sha256"] for shard in read_description(out)["shards"]}
    for k, rows in shards.items():
        path = shard_path(out, k)
        fault = fault_of(path, origin(settings, k), digests.get(path.name, "")) if path.exists() else "absent"
        if fault and path.exists():
            say(f"{fault}: encoding it again")
        if fault:
            yield k, rows


@torch.no_grad()
def encode_shards(images, encoder, shards, out, settings, batch_size, workers, skip_bad):
    """Encode `shards`, {number: range of indices}, in order; write each when complete. Yields batch sizes."""
    plan = [(k, rows[i:i + batch_size]) for k, rows in shards.items()
            for i in range(0, len(rows), batch_size)]
    device, parts = encoder.mean.device, []
    batches = batches_of(images, [rows for _, rows in plan], workers, pin=device.type == "cuda")
    for (k, rows), (x, y, enlarged, bad) in zip(plan, batches, strict=True):
        if bad and not skip_bad:
            raise next(iter(bad.values()))
        good = [i for i in range(len(rows)) if i not in bad]
        z = encoder(x.to(device))[good].half()
        if not z.isfinite().all():
            first = printable(images.paths[rows[0] % len(images)])
            raise InputError(f"latents of {first}, or of the {len(rows) - 1} images after it, are not finite "
                             "in float16: look at the encoder's weights")
        # Without the folder's path: the same images elsewhere are the same shard.
        skipped = [str(error).removeprefix(f"{printable(images.path)}/") for error in bad.values()]
        parts.append((z.cpu(), y[good], moments(z), enlarged, skipped))
        if rows[-1] == shards[k][-1]:
            latents, labels, statistics, enlarged, skipped = zip(*parts, strict=True)
            _, mean, m2 = functools.reduce(merge, statistics)
            tensors = {"latents": torch.cat(latents), "labels": torch.cat(labels), "mean": mean, "m2": m2}
            about = {"origin": origin(settings, k), "enlarged": sum(enlarged), "skipped": sum(skipped, [])}
            write_tensors(shard_path(out, k), {"": tensors}, about)
            parts = []
        yield len(rows)


def gather(out, count):
    """What the shards say, without reading their latents: moments of all, the list for latents.json, the
    number of images that were enlarged, those that were left out."""
    statistics, shards, enlarged, skipped = [], [], 0, []
    for path in (shard_path(out, k) for k in range(count)):
        parts, notes, digests = read_tensors(path, check=False)
        tensors = parts[""]
        statistics.append((len(tensors["labels"]), tensors["mean"], tensors["m2"]))
        shards.append({"file": path.name, "count": len(tensors["labels"]), "sha256": digests[""]})
        enlarged, skipped = enlarged + notes["enlarged"], skipped + notes["skipped"]
    return functools.reduce(merge, statistics), shards, enlarged, skipped


def finish(out, count, settings, shape, images):
    """Write statistics, skipped.txt and, last, latents.json."""
    (n, mean, m2), shards, enlarged, skipped = gather(out, count)
    if not n:
        raise InputError(f"no image could be read; the first: {skipped[0]}")
    digest = write_tensors(out / "latent_stats.safetensors", {"": {"mean": mean, "var": m2 / n}})[""]
    if skipped:
        folder = f"{printable(images.path)}/"
        lines = "".join(f"{folder}{line.removeprefix(folder)}\n" for line in skipped)
        write_atomically(out / "skipped.txt", lambda file: file.write(lines.encode(errors="surrogateescape")))
    write_json(out / "latents.json", {
        **settings, "shape": shape, "dtype": "float16", "count": n, "classes": images.classes,
        "statistics_sha256": digest, "shards": shards})
    listed = " (skipped.txt)" if skipped else ""
    say(f"{out}: {n:,} latents of {'x'.join(map(str, shape))}, {len(images.classes)} classes; {enlarged:,} "
        f"images were too small and enlarged, {len(skipped):,} unreadable and left out{listed}")


def verify(out):
    """Read every file back. InputError names those that are damaged, of other images or another encoder, out
    of place, and statistics that are not the shards'."""
    about = read_description(out)
    shards, path = about["shards"], out / "latent_stats.safetensors"
    faults = [fault_of(shard_path(out, k), origin(about, k), shard["sha256"])
              for k, shard in enumerate(shards)]
    faults.append(fault_of(path, "", about["statistics_sha256"]))
    faults = list(filter(None, faults))
    if not faults:
        (n, mean, m2), found, *_ = gather(out, len(shards))
        faults = [f"{out / a['file']} is not the file that latents.json describes"
                  for a, b in zip(shards, found, strict=True) if a != b]
        if not faults and digest_of({"mean": mean, "var": m2 / n}) != about["statistics_sha256"]:
            faults = [f"{path} is not of these shards"]
    if faults:
        raise InputError(f"{len(faults)} of {len(shards) + 1} files are damaged (the command that made them "
                         f"makes them again): {'; '.join(faults)}")
    say(f"{out}: {len(shards) + 1} files with {about['count']:,} latents read back, all whole")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    cores, pixels = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), number(int, 1, 2 ** 14)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", type=location, default="data/imagenet/train",
        help="folder of class folders, or a .zip of one")
    add("--image-size", type=pixels, default=256, help="pixels (paper; also 512)")
    add("--flips", action="store_true", help="every image flipped sideways too (on the fly: at random)")
    add("--skip-bad", action="store_true", help="list unreadable images in skipped.txt, in place of stopping")
    add = parser.add_argument_group("encoder").add_argument
    add("--encoder", type=location, default=DINOV2,
        help="folder or Hub id of a Dinov2WithRegistersModel (RAE)")
    add("--encoder-size", type=pixels, help="pixels that it sees (default: image size * patch / 16; RAE)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, of 8 bits")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=whole(), default=64, help="images per process and pass; changes rounding alone")
    add("--workers", type=whole(0), default=min(8, cores), help="processes per device that decode images")
    add = parser.add_argument_group("files").add_argument
    add("--out", type=location, default="data/latents",
        help="folder for the latents, on a disk that all processes share")
    add("--shard-size", type=whole(), default=4096, help="images per file: 1.6 GB at 256 px")
    add("--verify", action="store_true", help="read the latents in --out back and prove them; nothing else")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    device, rank, world = launch(hours=24)
    if args.verify:
        return verify(out) if rank == 0 else None

    images = ImagesWithNotes(args.data_path, args.image_size)
    encoder = Encoder(args.encoder, args.image_size, args.encoder_size, args.precision).to(device)
    total = len(images) * (2 if args.flips else 1)
    data = {"name": images.path.resolve().name, "images": len(images), "sha256_of_names": images.digest}
    settings = {"format": 1, "data": data, "encoder": encoder.describe(), "image_size": args.image_size,
                "precision": args.precision, "flips": args.flips, "shard_size": args.shard_size}
    if rank == 0:
        say(f"{len(images):,} images in {len(images.classes)} classes; encoder {encoder.source} at "
            f"{encoder.encoder_size} px on {device}")
        numbered = all(name.isdecimal() for name in images.classes)
        if numbered and images.classes != sorted(images.classes, key=int):
            ids = ", ".join(f"{name} has {i}" for i, name in enumerate(images.classes[:20]))
            say(f"class ids follow the names as text: {ids}")
        claim(out, settings, total * (math.prod(encoder.shape) * 2 + 8))
    barrier()
    if not (out / "encoding.json").exists() or read_json(out / "encoding.json") != settings:
        raise InputError(f"process {rank} does not see what process 0 wrote to {out}: it must lie on a disk "
                         "that all nodes share")

    # The shards of this process, as far as they are not there; all processes are about as far as this one.
    size, count = args.shard_size, math.ceil(total / args.shard_size)
    shards = {k: range(k * size, min((k + 1) * size, total)) for k in range(rank, count, world)}
    shards = dict(missing(out, shards, settings))
    share, done = sum(map(len, shards.values())), 0
    start = said = time.monotonic()
    batch, workers, skip = args.batch_size, args.workers, args.skip_bad
    for n in encode_shards(images, encoder, shards, out, settings, batch, workers, skip):
        done, now = done + n, time.monotonic()
        if rank == 0 and (now - said > 10 or done == share):
            rate, said = done * world / (now - start), now
            left = timedelta(seconds=round((share - done) * world / rate))
            say(f"{done * world:,} of {share * world:,} images, {rate:,.0f} images/s, {left} left")
    barrier()
    if rank == 0:
        finish(out, count, settings, encoder.shape, images)


if __name__ == "__main__":
    command(main)
