"""Images -> frozen encoder (DINOv2) -> latents on disk, with their statistics; and the readers of both.

An image is prepared as ADM does, resized to the encoder's size, and becomes the encoder's last hidden state:
patch tokens alone, final LayerNorm without its affine part (RAE, arXiv 2510.11690). Latents are stored raw,
as float16, in shards; their mean and variance (C, H, W) lie beside them.

    python encode_latents.py --data-path imagenet/train               # one GPU (or CPU): writes data/latents
    torchrun --nproc_per_node=8 encode_latents.py --data-path imagenet/train        # eight GPUs; so nodes

A shard covers fixed images, so the files are the same whatever the number of processes. The same command
goes on where it was stopped, and reads back what was there. Folder: latents.json (what is encoded, by what),
the shards, last latent_stats.safetensors: then it is done.
"""
import collections
import functools
import hashlib
import json
import math
import os
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
    load_stats, location, progress, read_json, read_tensors, say, start_folder, whole, write_tensors)

DINOV2 = "facebook/dinov2-with-registers-base"
SUFFIXES = "avif bmp gif jfif jp2 jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()
# Others do more than show an image: EPS starts Ghostscript.
FORMATS = [kind for suffix, kind in Image.registered_extensions().items() if suffix[1:] in SUFFIXES]
# What viewers show, and Pillow takes for an attack: long texts in a PNG, and large pictures.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = Image.MAX_IMAGE_PIXELS = 2 ** 28
# Hidden, or what systems keep.
SYSTEM = (".", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume", "lost+found", "__MACOSX")


# ---- Images ----
def open_rgb(file):
    """An image as a viewer shows it, in RGB: upright, first frame, 16 bits as 8, transparency on white."""
    image = Image.open(file, formats=FORMATS)
    if max(image.size) > 100 * min(image.size):
        raise ValueError("a strip")
    image.load()
    with suppress(Exception):                     # broken EXIF turns nothing; it raises some ten kinds
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                     # convert() would clip 16 bits to 255
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("floats, and integers beyond 16 bits, have no agreed range")
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


def list_folder(path):
    """Names of what is under a folder, of folders with a "/"; each folder once, and none of latents."""
    names, seen, waiting = [], {os.path.realpath(path)}, [""]
    while waiting:
        inside = waiting.pop()
        for entry in os.scandir(Path(path, inside)):
            if entry.name.startswith(SYSTEM):
                continue
            place = os.path.realpath(entry)
            if not entry.is_dir():
                names.append(inside + entry.name + " (no file)" * (not entry.is_file()))
            elif place not in seen and not Path(place, "latents.json").exists():
                seen.add(place)
                waiting.append(f"{inside}{entry.name}/")
                names.append(waiting[-1])
    return names


def list_archive(archive):
    """Likewise of a .zip; and the one folder around it all, taken off the names, or ""."""
    names = [name for name in archive.namelist()
             if not any(part.startswith(SYSTEM) and part != "." for part in name.split("/"))]
    tops = {name[:name.find("/") + 1] for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    return [name[len(top):] for name in dict.fromkeys(names)], top


class Images:
    """The images of a folder of class folders (nested at will), or of a .zip of one, read in place.

    Class ids follow the sorted folder names (for ImageNet's wnids: the published ids); images without class
    folders are one class. Attributes: `classes` (names), `paths` (sorted by class, then name), `labels` (N,),
    `sha256` (of names; of a .zip's contents, too). An index >= N is the flipped copy of index - N.
    InputError: no images, unreadable ones, or other folders than of classes."""

    def __init__(self, path, image_size):
        self.path, self.image_size, self.zip, self.top = Path(path), image_size, None, ""
        if self.path.is_dir():
            names = list_folder(path)
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except Exception as error:
                raise InputError(f"{path} is no folder and no whole .zip ({error})") from error
            names, self.top = list_archive(self.zip)
        images = [name for name in names if name.rpartition(".")[2].lower() in SUFFIXES]
        if any("\\" in name for name in images):
            raise InputError(f"{path} has names with backslashes: pack it anew")
        if not images:
            raise InputError(f"{path} holds no images ({' '.join(SUFFIXES)}): give class folders")
        pairs = sorted((name.partition("/")[0] if "/" in name else "", name) for name in images)
        classes = sorted({folder for folder, _ in pairs})
        if classes[0] == "" and len(classes) > 1:
            raise InputError(f"{path}: {pairs[0][1]} lies beside the class folders: move it")
        if empty := {name.partition("/")[0] for name in names if "/" in name} - {*classes}:
            raise InputError(f"{path}: {min(empty)} holds no images: fill or remove it")
        self.classes = [name or "images" for name in classes]
        self.paths = [name for _, name in pairs]
        ids = {folder: i for i, folder in enumerate(classes)}
        self.labels = torch.tensor([ids[folder] for folder, _ in pairs])
        sums = [self.zip.getinfo(self.top + name).CRC for name in self.paths] if self.zip else None
        self.sha256 = sha256([self.classes, self.paths, sums])
        others = (name for name in set(names) - set(images) if name[-1:] not in ("", "/"))
        if others := collections.Counter(Path(name).suffix.lower() for name in others):
            say(f"{path}: left out: {', '.join(f'{n:,} {suffix}' for suffix, n in others.most_common())}")

    def __len__(self):
        return len(self.paths)

    def open(self, name):
        return self.zip.open(self.top + name) if self.zip else open(self.path / name, "rb")

    def pixels(self, index):
        """-> uint8 (S, S, 3)"""
        name = self.paths[index % len(self)]
        try:
            with self.open(name) as file:
                pixels = adm_crop(open_rgb(file), self.image_size)
        except Exception as error:                # some twenty kinds
            raise InputError(f"{self.path / name} is no readable image ({type(error).__name__}: {error}): "
                             "replace it, or begin anew without it") from error
        return pixels[:, ::-1] if index >= len(self) else pixels

    def read(self, indices):
        """-> uint8 (B, 3, S, S), labels (B,) int64"""
        x = torch.from_numpy(np.stack([self.pixels(i) for i in indices]))
        return x.permute(0, 3, 1, 2).contiguous(), self.labels[[i % len(self) for i in indices]]


def sha256(content):
    """Of what JSON holds, in any order."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_ahead(read, batches, threads):
    """read(batch) for each of `batches`, in order; ahead in threads, if any, which Python's lock lets run."""
    if not threads:
        yield from map(read, batches)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for batch in batches:
            waiting.append(pool.submit(read, batch))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- The encoder ----
# transformers' vision towers: class, last LayerNorm, published mean and std of the pixels.
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
    precision: "fp32" or "bf16" (autocast). `about`: what it is; latents follow from its "identity".
    InputError: no such encoder, or no such size."""

    def __init__(self, source=DINOV2, image_size=256, encoder_size=None, precision="fp32"):
        super().__init__()
        self.net, kind, image_norm = load_tower(str(source))
        config = self.net.config
        patch, self.kind, self.precision = config.patch_size, kind, precision
        self.encoder_size = encoder_size or image_size * patch // 16
        if self.encoder_size % patch or not encoder_size and image_size % 16:
            raise InputError(f"--encoder-size {self.encoder_size} must be a multiple of {patch}, its patches")
        self.shape = (config.hidden_size, self.encoder_size // patch, self.encoder_size // patch)
        config.mask_ratio = 0.0                   # MAE's: nothing is masked
        self.mean, self.std = map(nn.Buffer, torch.tensor(image_norm)[:, :, None, None])
        self.requires_grad_(False).eval()
        # Weights, and what else changes the answer.
        names = "num_attention_heads", "layer_norm_eps", "hidden_act", "rope_theta"
        identity = {name: getattr(config, name) for name in names if hasattr(config, name)} | {
            "kind": kind, "sha256": digest_of(self.net.state_dict()), "image_size": image_size,
            "encoder_size": self.encoder_size, "precision": precision, "image_norm": image_norm}
        untrained = getattr(config, "untrained", None) is True
        path = os.path.abspath(source) if os.path.exists(source) else source
        self.about = {"id": str(path), "untrained": untrained, "identity": identity}

    def forward(self, images):
        x = images.float() / 255 if images.dtype == torch.uint8 else images
        x = F.interpolate(x, size=(self.encoder_size,) * 2, mode="bicubic", align_corners=False)
        count, more = self.shape[1] * self.shape[2], {}
        if self.kind in ("siglip", "siglip_vision_model", "vit_mae"):      # the others always do
            more["interpolate_pos_encoding"] = True
        if self.kind == "vit_mae":                # rising noise keeps the order
            more["noise"] = torch.arange(count).expand(len(x), -1)
        # cuDNN would run the patch embedding of fp32 in TF32.
        with (torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
              torch.backends.cudnn.flags(enabled=True, allow_tf32=False)):
            tokens = self.net(pixel_values=(x - self.mean) / self.std, **more).last_hidden_state
        # The patches come last, after a class token and registers.
        return tokens[:, -count:].float().transpose(1, 2).unflatten(2, self.shape[1:])


def load_tower(source):
    """-> a tower of TOWERS, its last LayerNorm without affine part; its kind; its pixels' [mean, std]."""
    import transformers
    from transformers.utils import logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()                 # it lists a text tower's weights
    try:
        kind = transformers.PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        name, norm, image_norm = TOWERS.get(kind, (None, None, None))
        if name:
            net, notes = getattr(transformers, name).from_pretrained(
                source, dtype=torch.float32, output_loading_info=True)
            try:
                said, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
                image_norm = [said["image_mean"], said["image_std"]]
            except (OSError, KeyError) as error:
                if "valid JSON" in str(error):
                    raise
                say(f"{source} has no preprocessor_config.json with image_mean: {image_norm}, as published")
            torch.tensor(image_norm).view(2, 3)
    except Exception as error:                    # transformers raises a dozen kinds
        raise InputError(f"no encoder {source} ({error!s:.200}): give a folder or Hub id; "
                         "sanity/random_encoder.py makes an untrained one") from error
    if not name or notes["missing_keys"] or net.config.num_channels != 3:
        found = "lacks weights, or is not for RGB" if name else f"is of model_type {kind}"
        raise InputError(f"{source} {found}: an encoder is one of {', '.join(TOWERS)}")
    eps = net.get_submodule(norm).eps
    net.set_submodule(norm, nn.LayerNorm(net.config.hidden_size, eps, elementwise_affine=False))
    return net, kind, image_norm


# ---- The format's readers ----
def read_about(folder):
    """latents.json of a finished folder."""
    if not Path(folder, "latent_stats.safetensors").exists():
        raise InputError(f"no finished latents in {folder}: encode_latents.py --out {folder} makes them")
    return read_json(Path(folder, "latents.json"))


def encoder_of(folder):
    """The Encoder that made a folder's latents. InputError: another by now, or a module of one's own."""
    about = read_about(folder)["encoder"]
    made, source = about["identity"], about["id"]
    if "kind" not in made:
        raise InputError(f"{folder} is by {source}, which is no --encoder: not available here")
    encoder = Encoder(source, made["image_size"], made["encoder_size"], made["precision"])
    if encoder.about["identity"] != made:
        raise InputError(f"{source} is another encoder than the one that made {folder}: encode again")
    return encoder


def shard_path(folder, k):
    return Path(folder, f"shard_{k:05d}.safetensors")


def read_shard(folder, about, k, check=False):
    """-> {"latents", "labels", "sum", "squares"}, maps of the file; its sha256."""
    parts, said, digests = read_tensors(shard_path(folder, k), check=check)
    if said.get("identity") != sha256(about["identity"]):
        raise InputError(f"{shard_path(folder, k)} is of other latents than latents.json: remove it")
    return parts[""], digests[""]


class Latents:
    """The latents of a folder, as maps of its shards. Attributes: `shape` (C, H, W), `classes` (names),
    `stats` ({"mean", "var"}), `labels` (N,), `about` (latents.json), `sha256`."""

    def __init__(self, folder):
        self.about = read_about(folder)
        self.shape, self.classes = tuple(self.about["shape"]), self.about["classes"]
        self.stats = load_stats(folder, self.shape)
        shards = [read_shard(folder, self.about, k) for k in range(self.about["shards"])]
        self.shards = [tensors["latents"] for tensors, _ in shards]
        self.labels = torch.cat([tensors["labels"] for tensors, _ in shards])
        self.sha256 = sha256([digest for _, digest in shards])

    def __len__(self):
        return len(self.labels)

    def read(self, indices):
        """-> float16 (B, C, H, W), labels (B,) int64, in any order."""
        places = (divmod(i, self.about["identity"]["shard_size"]) for i in indices)
        return torch.stack([self.shards[k][i] for k, i in places]), self.labels[indices]


# ---- The order in which training sees them ----
@functools.lru_cache(maxsize=2)
def epoch(number, count, seed, flips):
    """A permutation of range(count), by (seed, number) alone; flips: + count for about half."""
    order = torch.randperm(count, generator=generator("cpu", seed, "epoch", number))
    if flips:
        order += count * torch.randint(2, (count,), generator=generator("cpu", seed, "flips", number))
    return order


def batches_of(count, seed, batch_size, rows, first_step, last_step, flips=False):
    """For each step from first_step to before last_step and (start, stop) of `rows`, the rows' indices.

    Row r of step k is position k * batch_size + r in an endless sequence of epochs, so the samples are the
    same however a run is split or goes on."""
    for step in range(first_step, last_step):
        for start, stop in rows:
            positions = range(step * batch_size + start, step * batch_size + stop)
            yield [int(epoch(p // count, count, seed, flips)[p % count]) for p in positions]


class TrainingData:
    """What a stage trains on: the latents of a folder; or images encoded on the fly as that folder describes,
    with random flips where its latents have them.

    Attributes as of Latents; `sha256` is of the contents."""

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
                raise InputError(f"{data_path} has other classes than {latents}")
        self.sha256 = sha256([made, self.classes, digest_of(self.stats), self.data.sha256])

    def batches(self, args, rows, first_step, device):
        """Raw latents (B, C, H, W), labels (B,) on `device`, for each step and (start, stop) of `rows`."""
        def read(indices):
            batch = self.data.read(indices)
            return [x.pin_memory() for x in batch] if device.type == "cuda" else batch
        encode = self.encode.to(device)
        indices = batches_of(
            len(self.data), args.seed, args.batch_size, rows, first_step, args.steps, self.flips)
        for x, y in read_ahead(read, indices, args.workers):
            yield encode(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)


# ---- Encoding ----
@torch.no_grad()
def encode(images, encoder, out, flips=False, batch_size=64, workers=1, shard_size=4096):
    """Encode `images` (an Images) into the folder `out`; the same call goes on.

    encoder: an Encoder; or a module of one's own, uint8 (B, 3, S, S) -> raw latents (B, C, G, G), with
    `shape` (C, G, G) and `digest`, a text that changes when its latents do.
    InputError: `out` holds other work; latents of another shape, or not finite in float16."""
    device, rank, world = launch(hours=24)
    total = len(images) * (1 + flips)
    made_by = encoder.about if type(encoder) is Encoder else {
        "id": type(encoder).__name__,
        "identity": {"sha256": str(encoder.digest), "image_size": images.image_size}}
    identity = {"images": images.sha256, "flips": flips, "shard_size": shard_size, **made_by["identity"]}
    about = describe(images.path.resolve().name, made_by, images.classes, encoder.shape, total, identity)
    if rank == 0:
        start_folder(out, "latents.json", about, "identity")
        say(f"{len(images):,} images in {len(images.classes)} classes ({', '.join(images.classes[:5])} ...), "
            f"{total * math.prod(encoder.shape) * 2 / 1e9:,.2f} GB of latents, on {world} x {device.type}")
    barrier()

    shards = [range(i, min(i + shard_size, total)) for i in range(0, total, shard_size)]
    missing = [k for k in range(len(shards)) if not shard_path(out, k).exists()]
    barrier()                                     # all have looked before the first one writes
    if rank == 0 and missing:                     # statistics: of others
        Path(out, "latent_stats.safetensors").unlink(missing_ok=True)
    say(f"{len(shards) - len(missing)} of {len(shards)} shards are there")
    plan = [(k, shards[k][i:i + batch_size]) for k in missing[rank::world]
            for i in range(0, len(shards[k]), batch_size)]
    parts, batches = [], read_ahead(images.read, [rows for _, rows in plan], workers)
    encoder.to(device).eval()
    for (k, rows), (x, y) in zip(plan, progress(batches, len(plan), "batches"), strict=True):
        z = encoder(x.to(device)).half().cpu()
        if list(z.shape) != [len(x), *about["shape"]]:
            raise InputError(f"the encoder makes {list(z.shape)} of {len(x)} images: its shape is another")
        parts.append((z, y))
        if rows[-1] == shards[k][-1]:
            write_shard(out, about, k, *map(torch.cat, zip(*parts, strict=True)))
            parts = []
    barrier()
    if rank == 0:
        finish(out, about, missing)


def write_latents(out, latents, labels, classes=None, made_by="given", shard_size=4096):
    """Write latents that exist as such a folder; one process, the same call starts over.

    latents: (N, C, G, G), raw, a tensor, an array or a map of one. labels: (N,) integers. classes: names.
    InputError: shapes or classes do not fit; or as of `encode`."""
    latents, labels = torch.as_tensor(latents).detach(), torch.as_tensor(labels)
    found = labels.unique().tolist()
    classes = list(map(str, range(len(found)) if classes is None else classes))
    fits = latents.ndim == 4 and latents.shape[2] == latents.shape[3] and latents.shape[:1] == labels.shape
    if not fits or not found or found != [*range(len(classes))]:
        raise InputError(f"latents {[*latents.shape]}, labels {[*labels.shape]}, {len(classes)} classes: "
                         "give (N, C, G, G), and (N,) numbers of classes, each of which occurs")
    contents = digest_of({"latents": latents, "labels": labels})
    identity = {"latents": contents, "classes": classes, "shard_size": shard_size}
    by = {"id": str(made_by), "identity": {}}
    about = describe(by["id"], by, classes, latents.shape[1:], len(labels), identity)
    start_folder(out, "latents.json", about, "identity")
    for k in range(about["shards"]):
        rows = slice(k * shard_size, (k + 1) * shard_size)
        write_shard(out, about, k, latents[rows].half().cpu(), labels[rows].long().cpu())
    finish(out, about, range(about["shards"]))


def describe(data, encoder, classes, shape, count, identity):
    """What latents.json says. identity: all that the latents follow from."""
    return {"data": data, "encoder": encoder, "classes": classes, "shape": list(map(int, shape)),
            "shards": math.ceil(count / identity["shard_size"]), "identity": identity}


def write_shard(out, about, k, z, y):
    """Write z (n, C, H, W) float16, y (n,) int64, and sums for the statistics."""
    total, squares = torch.zeros(2, *z.shape[1:], dtype=torch.float64)
    for part in z.split(64):
        total += part.double().sum(0)
        squares += part.double().square().sum(0)
    if not squares.isfinite().all():
        raise InputError(f"latents of {shard_path(out, k)} are not finite in float16: see what makes them")
    tensors = {"latents": z, "labels": y, "sum": total, "squares": squares}
    write_tensors(shard_path(out, k), {"": tensors}, {"identity": sha256(about["identity"])})


def finish(out, about, made):
    """Write the statistics, by the shards' sums; those not `made` just now are read as a whole."""
    shards = [read_shard(out, about, k, check=k not in made)[0] for k in range(about["shards"])]
    count = sum(len(shard["labels"]) for shard in shards)
    mean, square = (sum(shard[name] for shard in shards) / count for name in ("sum", "squares"))
    stats = {"mean": mean, "var": (square - mean.square()).clamp(min=0)}
    write_tensors(Path(out, "latent_stats.safetensors"), {"": stats})
    say(f"{out}: {count:,} latents of {'x'.join(map(str, about['shape']))}, {len(about['classes'])} classes")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add = parser.add_argument
    add("--data-path", type=location, default="imagenet/train", help="class folders, or a .zip of them")
    add("--image-size", type=whole(), default=256, help="pixels (paper; also 512)")
    add("--flips", action="store_true", help="every image flipped sideways too (on the fly: at random)")
    add("--encoder", type=location, default=DINOV2, help="folder or Hub id: DINOv2 (RAE), v3, MAE, SigLIP")
    add("--encoder-size", type=whole(), help="pixels that it sees (default: image size * patch / 16; RAE)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast, of 8 bits")
    add("--batch-size", type=whole(), default=64, help="per process and pass; changes rounding alone")
    add("--workers", type=whole(0), default=min(16, cores), help="threads that read images, per process")
    add("--out", type=location, default="data/latents", help="folder, on a disk that all processes share")
    add("--shard-size", type=whole(), default=4096, help="images per file: 1.6 GB at 256 px")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    launch(hours=24)
    images = Images(args.data_path, args.image_size)
    encoder = Encoder(args.encoder, args.image_size, args.encoder_size, args.precision)
    encode(images, encoder, args.out, args.flips, args.batch_size, args.workers, args.shard_size)


if __name__ == "__main__":
    command(main)
