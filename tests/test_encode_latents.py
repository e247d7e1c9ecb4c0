"""encode_latents.py: images read and prepared as promised, the encoder, the files it writes and their readers."""
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import encode_latents
from encode_latents import Encoder, Images, Latents, RowSampler, TrainingData, adm_crop, batches_of, main, open_rgb
from model import InputError, read_json, read_tensors, write_json, write_tensors
from sanity import random_encoder

SCRIPT = Path(encode_latents.__file__)


ENCODERS = Path(tempfile.mkdtemp())


def encoder_folder(name="tiny", folder=ENCODERS, **sizes):
    """A folder with a random encoder, made once."""
    sizes = dict(width=16, depth=1, heads=2, patch=8, seed=3) | sizes
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    random_encoder.main(["--out", str(folder / name), *flags])
    return str(folder / name)


TINY = encoder_folder()


def picture(width, height, seed=0):
    """A smooth RGB picture with some grain, (height, width, 3) uint8."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    grain = np.random.default_rng(seed).normal(0, 8, y.shape)
    return (127 + 80 * np.sin(x / 9 + c + seed) * np.cos(y / 7 - c * seed) + grain).clip(0, 255).astype(np.uint8)


def write_images(folder, per_class=(9, 8, 6)):
    """Class folders b, a, c (not in this order on purpose); one image lies deeper."""
    for name, count in zip(("b", "a", "c"), per_class, strict=True):
        for i in range(count):
            path = folder / name / ("deep/er" if (name, i) == ("a", 3) else "") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(40 + i, 36 + 2 * i, ord(name) + i)).save(path)
    (folder / "b" / "notes.txt").write_text("not an image")
    return folder


def encode(data, out, *more):
    main(["--data-path", str(data), "--out", str(out), "--encoder", TINY, "--image-size", "32", "--encoder-size", "32",
          "--batch-size", "3", "--shard-size", "8", "--workers", "0", *more])
    return out


def contents(folder):
    """{name: bytes}; of a safetensors file its header, whose entries are in no order, and the bytes after it."""
    found = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}
    for name, data in found.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            found[name] = json.loads(data[8:end]), data[end:]
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def encoded(data, tmp_path_factory):
    return encode(data, tmp_path_factory.mktemp("encoded") / "latents")


@pytest.fixture
def copy(encoded, tmp_path):
    return shutil.copytree(encoded, tmp_path / "copy")


# ----------------------------------------------------------------------------------------------------------------------
# Images
# ----------------------------------------------------------------------------------------------------------------------
def test_class_ids_are_those_of_imagenet(tmp_path):
    wnids = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331"]    # the published ids 0 .. 5
    for wnid in reversed(wnids):
        (tmp_path / wnid).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / wnid / f"{wnid}_10.JPEG", "JPEG")
        Image.new("RGB", (9, 9)).save(tmp_path / wnid / f"{wnid}_9.JPEG", "JPEG")
    images = Images(tmp_path, 8)
    assert images.classes == wnids
    assert images.labels.tolist() == [i for i in range(6) for _ in range(2)] and images.labels.dtype == torch.int64
    assert images.paths[:2] == ["n01440764/n01440764_10.JPEG", "n01440764/n01440764_9.JPEG"]


def test_classes_of_folders(data, tmp_path):
    images = Images(data, 32)
    assert (images.classes, len(images)) == (["a", "b", "c"], 23)
    assert [images.paths[i] for i in (0, 7, 8, 22)] == ["a/00.png", "a/deep/er/03.png", "b/00.png", "c/05.png"]
    assert images.labels.tolist() == [0] * 8 + [1] * 9 + [2] * 6
    alone = Images(data / "c", 32)
    assert (alone.classes, alone.labels.tolist()) == (["c"], [0] * 6)
    for make, complaint in (((), "does not exist"), (("x",), "no images"), (("y.txt",), "no images"),
                            (("x/y.png", "z"), "class folder z holds no images"),
                            (("x/y.png", "z.png"), "z.png lies beside")):
        folder = tmp_path / "-".join(make).replace("/", "-") / "top"
        for name in make:
            path = folder / name
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            if path.suffix:
                Image.new("RGB", (4, 4)).save(path, "PNG")
        with pytest.raises(InputError, match=complaint):
            Images(folder, 8)


def test_adm_preparation():
    def reference(array, size):                               # halvings by hand, where the sides are even
        while min(array.shape[:2]) >= 2 * size:
            for axis in (1, 0):
                array = np.floor(np.add(*(array.take(range(i, array.shape[axis], 2), axis) / 2 for i in (0, 1))) + 0.5)
            array = array.astype(np.uint8)
        scale = size / min(array.shape[:2])
        shape = round(array.shape[1] * scale), round(array.shape[0] * scale)
        array = np.asarray(Image.fromarray(array).resize(shape, Image.Resampling.BICUBIC))
        top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
        return array[top:top + size, left:left + size]

    for width, height, size in ((64, 64, 32), (128, 160, 32), (120, 76, 32), (72, 300, 16), (63, 40, 32), (20, 31, 32)):
        array = picture(width, height)
        difference = adm_crop(Image.fromarray(array), size).astype(int) - reference(array, size)
        halved = min(width, height) >= 2 * size               # Pillow rounds after each axis, in an order of its own
        assert np.abs(difference).max() <= 2 * halved, (width, height, size)
    assert adm_crop(Image.fromarray(picture(131, 67)), 16).shape == (16, 16, 3)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep_png(array):
    """A PNG of 16 bits per channel, by hand: Pillow writes none in colour."""
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def odd_images():
    """{file name: (bytes, the RGB array a viewer shows, or None where the file must be refused)}."""
    rgb = picture(24, 20)
    image, rows = Image.fromarray(rgb), rgb.astype(int)
    grey, alpha = rgb[..., 0], np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (20, 1))
    deep = (rgb[..., 1].astype(np.uint16) << 8) + 77
    eight = (deep / 257).round().astype(np.uint8)
    a = alpha[..., None] / 255

    def three(x):
        return np.stack([x] * 3, -1)

    def decoded(data):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    on_white = (rows * a + 255 * (1 - a)).round()
    palette = image.quantize(16)
    shown = np.asarray(palette.convert("RGB"))
    see_through = np.where((np.asarray(palette) == 3)[..., None], 255, shown)
    keyed = np.where((rgb == rgb[2, 3]).all(-1)[..., None], 255, rgb)
    jpeg, cmyk = saved(image, "JPEG", quality=90), saved(image.convert("CMYK"), "JPEG", quality=95)
    rgba, second = Image.fromarray(np.dstack([rgb, alpha])), Image.fromarray(255 - rgb)
    odd = {
        "rgb.png": (saved(image, "PNG"), rgb), "rgb.bmp": (saved(image, "BMP"), rgb),
        "rgb.ppm": (saved(image, "PPM"), rgb), "rgb.tif": (saved(image, "TIFF"), rgb),
        "upper.JPEG": (jpeg, decoded(jpeg)), "a png.jpg": (saved(image, "PNG"), rgb),
        "progressive.jpg": (saved(image, "JPEG", quality=90, progressive=True), decoded(jpeg)),
        "lossless.webp": (saved(image, "WEBP", lossless=True), rgb),
        "grey.png": (saved(Image.fromarray(grey), "PNG"), three(grey)),
        "grey.jpg": (saved(Image.fromarray(grey), "JPEG"), decoded(saved(Image.fromarray(grey), "JPEG"))),
        "one bit.png": (saved(Image.fromarray(grey > 127), "PNG"), three(np.where(grey > 127, 255, 0))),
        "grey alpha.png": (saved(Image.fromarray(np.dstack([grey, alpha])), "PNG"),
                           (three(grey) * a + 255 * (1 - a)).round()),
        "palette.png": (saved(palette, "PNG"), shown), "palette.gif": (saved(palette, "GIF"), shown),
        "palette alpha.png": (saved(palette, "PNG", transparency=3), see_through),
        "palette alphas.png": (saved(palette, "PNG", transparency=bytes([255, 255, 255, 0])), see_through),
        "palette alpha.gif": (saved(palette, "GIF", transparency=3), see_through),
        "key colour.png": (saved(image, "PNG", transparency=tuple(rgb[2, 3].tolist())), keyed),
        "rgba.png": (saved(rgba, "PNG"), on_white), "rgba.tif": (saved(rgba, "TIFF"), on_white),
        "rgba.webp": (saved(rgba, "WEBP", lossless=True, exact=True), on_white),
        "cmyk.jpg": (cmyk, decoded(cmyk)), "cmyk.tif": (saved(image.convert("CMYK"), "TIFF"), rgb),
        "deep.png": (saved(Image.fromarray(deep), "PNG"), three(eight)),
        "deep.tif": (saved(Image.fromarray(deep), "TIFF"), three(eight)),
        "deep big-endian.tif": (saved(Image.frombytes("I;16B", (24, 20), deep.astype(">u2").tobytes()), "TIFF"),
                                three(eight)),
        "deep.pgm": (b"P5 24 20 65535\n" + deep.astype(">u2").tobytes(), three(eight)),
        "deep colour.png": (deep_png(rgb * np.uint16(257)), rgb),
        "moving.gif": (saved(palette, "GIF", save_all=True, append_images=[second.quantize(16)]), shown),
        "moving.png": (saved(image, "PNG", save_all=True, append_images=[second]), rgb),
        "moving.webp": (saved(image, "WEBP", save_all=True, append_images=[second], lossless=True), rgb),
        "two pages.tif": (saved(image, "TIFF", save_all=True, append_images=[second]), rgb),
        "bad exif.jpg": (jpeg[:2] + b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff" + jpeg[2:], decoded(jpeg)),
    }
    turns = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
             5: lambda x: x.transpose(1, 0, 2), 6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
             7: lambda x: x[::-1, ::-1].transpose(1, 0, 2), 8: lambda x: x.transpose(1, 0, 2)[::-1]}
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        odd[f"exif {orientation}.jpg"] = saved(image, "JPEG", quality=90, exif=exif), turn(decoded(jpeg))
    png = bytearray(saved(image, "PNG"))
    png[len(png) // 2] ^= 1
    webp, tif = saved(image, "WEBP"), saved(image, "TIFF")
    broken = {
        "empty.png": b"", "text.jpg": b"<html>404</html>", "cut.jpg": jpeg[:len(jpeg) // 2], "head.jpg": jpeg[:30],
        "cut.png": saved(image, "PNG")[:900], "flipped bit.png": bytes(png), "cut.webp": webp[:len(webp) // 2],
        "cut.tif": tif[:300], "cut.gif": saved(palette, "GIF")[:60], "cut.bmp": saved(image, "BMP")[:200],
        "float.tif": saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF")}
    for name, data in broken.items():
        odd[name] = data, None
    return odd


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_odd_and_broken_images(tmp_path):
    odd = odd_images()
    assert len(odd) >= 30
    for name, (data, _) in odd.items():
        (tmp_path / name).write_bytes(data)
    images = Images(tmp_path, 16)
    assert sorted(images.paths) == sorted(odd)
    for i, name in enumerate(images.paths):
        if odd[name][1] is None:
            with pytest.raises(InputError, match=name):
                images.read(i)
            continue
        with open(tmp_path / name, "rb") as file:
            image = open_rgb(file)
        assert image.mode == "RGB", name
        rounded = "rgba" in name or "alpha.png" in name
        assert np.abs(np.asarray(image).astype(int) - odd[name][1]).max() <= rounded, name
        assert np.array_equal(images.read(i)[0].transpose(1, 2, 0), adm_crop(image, 16)), name


def test_small_images_are_enlarged_and_counted(tmp_path):
    for name, size in (("a", (1, 1)), ("b", (300, 7)), ("c", (16, 16)), ("d", (17, 40))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    images, _, enlarged, bad = Images(tmp_path, 16).fetch([0, 1, 2, 3])
    assert (enlarged, bad) == (2, {}) and images.shape == (4, 3, 16, 16)
    assert (images == torch.tensor([255, 0, 0])[:, None, None]).all()


def test_flipped_copies_and_worker_processes(data):
    images = Images(data, 16)
    straight, labels = images.__getitems__([5, 20, 0])
    flipped, flipped_labels = images.__getitems__([28, 43, 23])
    assert torch.equal(flipped, straight.flip(3)) and torch.equal(labels, flipped_labels)
    (by_worker, worker_labels), = batches_of(images, [[5, 20, 0]], workers=1)
    assert torch.equal(by_worker, straight) and torch.equal(worker_labels, labels) and labels.tolist() == [0, 2, 0]


def test_an_error_in_a_worker_is_one_line(tmp_path):
    (tmp_path / "cut.png").write_bytes(saved(Image.new("RGB", (9, 9)), "PNG")[:40])
    with pytest.raises(InputError) as error:
        list(batches_of(Images(tmp_path, 8), [[0]], workers=1))
    assert str(error.value).startswith(str(tmp_path / "cut.png")) and "\n" not in str(error.value)


def test_workers_outlive_signals_but_not_their_training(data):
    """SIGTERM and SIGINT from outside leave them reading; a training that ends, by an error with its batches at hand too, does not hang."""
    program = f"""
import multiprocessing, os, signal, sys, time
from encode_latents import Images, batches_of
batches = batches_of(Images({str(data)!r}, 16), [[0], [1], [2]] * 9, workers=2)
next(batches), next(batches)                    # one from each worker: both are up
for number in (signal.SIGTERM, signal.SIGINT):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
time.sleep(0.5)
print(sum(1 for batch in zip(batches, range(20))), len(multiprocessing.active_children()), flush=True)
raise ValueError("kept alive by this error's traceback", batches)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(encode_latents.__file__).parent, capture_output=True, text=True,
                          timeout=60)
    assert done.stdout == "20 2\n" and done.returncode == 1 and done.stderr.count("Error") == 1, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_encoder_is_dinov2_without_the_last_affine(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    torch.manual_seed(0)
    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                                                             image_size=56, patch_size=14)).eval()
    for parameter in net.parameters():                        # all: zero registers or biases would hide mistakes
        parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, 48)
    images = torch.from_numpy(np.stack([picture(48, 48, seed) for seed in range(2)])).permute(0, 3, 1, 2)
    x = torch.nn.functional.interpolate(images / 255, (42, 42), mode="bicubic", align_corners=False, antialias=False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    x = (x - mean) / std
    tokens = net.encoder(net.embeddings(x)).last_hidden_state
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    wanted = tokens[:, 1 + 4:].reshape(2, 3, 3, 24).permute(0, 3, 1, 2)
    z = encoder(images)
    assert z.shape == (2, *encoder.shape) == (2, 24, 3, 3) and z.dtype == torch.float32
    assert (z - wanted).abs().max() < 1e-4
    assert torch.equal(z, encoder(images / 255))
    assert {k: v for k, v in encoder.describe().items() if k != "sha256"} == {
        "id": str(tmp_path), "image_size": 48, "encoder_size": 42, "patch": 14, "width": 24, "untrained": False}
    assert (Encoder(tmp_path, 256).encoder_size, Encoder(tmp_path, 512).encoder_size) == (224, 448)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    reduced = Encoder(tmp_path, 48, precision="bf16")(images)
    assert reduced.dtype == torch.float32 and 1e-4 < (reduced - z).abs().max() < 0.5


def test_encoders_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    from transformers import Dinov2Config, Dinov2Model
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    Dinov2Model(config).save_pretrained(tmp_path)
    for arguments, complaint in (((tmp_path,), "a dinov2 model"), ((tmp_path / "none",), "no encoder"),
                                 ((TINY, 40), "encoder-size"), ((TINY, 32, 30), "multiple of 8"),
                                 (("random:width=16,seed=3",), "random_encoder.py --out FOLDER --width 16 --seed 3")):
        with pytest.raises(InputError, match=complaint):
            Encoder(*arguments)


def test_random_encoder_depends_on_its_seed_alone_and_keeps_the_image():
    state = torch.get_rng_state()
    sizes = dict(width=48, depth=2, heads=4, patch=4)
    encoder = Encoder(encoder_folder("a", **sizes, seed=0), 32, 32)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    assert encoder.digest == Encoder(encoder_folder("b", **sizes, seed=0), 32, 32).digest
    assert encoder.digest != Encoder(encoder_folder("c", **sizes, seed=1), 32, 32).digest
    assert encoder.untrained and encoder.describe()["untrained"]
    images = torch.stack([torch.from_numpy(picture(32, 32, seed)) for seed in range(60)]).permute(0, 3, 1, 2) / 255
    brightness = torch.linspace(0.2, 1, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    images = images * brightness[:, None, None, None]         # a LayerNorm would lose it
    z = encoder(images).flatten(2).transpose(1, 2)
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    z = torch.cat([z, torch.ones(*z.shape[:2], 1)], dim=2)
    linear = torch.linalg.lstsq(z[:40].flatten(0, 1), patches[:40].flatten(0, 1)).solution
    error = (z[40:] @ linear - patches[40:]).square().mean() / patches[40:].var()
    assert error < 0.01                                       # 0.0034; with the default initialization 0.068


def test_gradients_reach_the_images():
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    Encoder(TINY, 32, 32)(images).square().mean().backward()
    assert images.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# Latents on disk
# ----------------------------------------------------------------------------------------------------------------------
def test_latents_and_their_order(data, encoded):
    latents, images, encoder = Latents(encoded), Images(data, 32), Encoder(TINY, 32, 32)
    assert (latents.shape, latents.count, len(latents)) == ((16, 4, 4), 23, 23)
    assert (latents.classes, latents.num_classes) == (["a", "b", "c"], 3)
    order = [22, 0, 8, 7, 15, 16, 3, 3]
    z, y = latents.__getitems__(order)
    x, labels = images.__getitems__(order)
    assert z.dtype == torch.float16 and y.dtype == torch.int64 and torch.equal(y, labels)
    assert (z - encoder(x)).abs().max() < 2e-3                # float16 rounding of values up to 3
    (z_worker, y_worker), = batches_of(latents, [order], workers=1)
    assert torch.equal(z, z_worker) and torch.equal(y, y_worker)
    about = json.loads((encoded / "latents.json").read_text())
    assert about["encoder"] == encoder.describe() and about["data"]["name"] == data.name and about["image_size"] == 32
    assert [shard["count"] for shard in about["shards"]] == [8, 8, 7]
    assert about["dtype"] == "float16" and not about["flips"]
    assert str(data) not in (encoded / "latents.json").read_text()


def test_statistics_are_those_of_the_rounded_latents(encoded):
    latents = Latents(encoded)
    z = latents.__getitems__(list(range(23)))[0].numpy().astype(np.float64)
    mean, var = latents.stats
    assert mean.dtype == var.dtype == torch.float64 and mean.shape == var.shape == (16, 4, 4)
    np.testing.assert_allclose(mean, z.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(var, z.var(0), rtol=1e-11)


def test_statistics_survive_a_large_mean():
    x = (1000 + torch.randn(50, 2, 3, 3)).half()
    parts = [encode_latents.moments(part) for part in (x[:7], x[7:7], x[7:30], x[30:])]
    n, mean, m2 = parts[0]
    for part in parts[1:]:
        n, mean, m2 = encode_latents.merge((n, mean, m2), part)
    assert n == 50
    np.testing.assert_allclose(mean, x.numpy().astype(np.float64).mean(0), rtol=1e-13)
    np.testing.assert_allclose(m2 / n, x.numpy().astype(np.float64).var(0), rtol=1e-9)


def test_going_on_gives_the_same_files(data, encoded, copy, capsys):
    (copy / "shard_00000.safetensors").unlink()
    cut, damaged = copy / "shard_00001.safetensors", copy / "shard_00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    (copy / ".shard_00000.safetensors.1.tmp").write_bytes(b"of a killed process")
    encode(data, copy)
    assert contents(copy) == contents(encoded)
    said = capsys.readouterr().err
    assert "shard_00001" in said and "shard_00002" in said


def test_whole_shards_are_kept(data, encoded, copy, monkeypatch):
    (copy / "latents.json").unlink()
    (copy / "shard_00001.safetensors").unlink()
    seen = []
    monkeypatch.setattr(Images, "read", lambda self, i, read=Images.read: (seen.append(i), read(self, i))[1])
    encode(data, copy)
    assert seen == list(range(8, 16)) and contents(copy) == contents(encoded)


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "shard_00002.safetensors", "latent_stats.safetensors"])
def test_verify_names_the_file_with_one_flipped_bit(copy, name, capsys):
    main(["--verify", "--out", str(copy)])
    assert "23 latents read back, all whole" in capsys.readouterr().out
    whole = (copy / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    digest = whole.index(b'"sha256":"') + 12
    for place, bit in ((header, 0), ((header + len(whole)) // 2, 7), (len(whole) - 1, 3), (digest, 0)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=f"1 of 4 files are damaged.*{name}"):
            main(["--verify", "--out", str(copy)])


def test_the_reader_refuses_cut_and_unfinished_folders(copy, tmp_path):
    path = copy / "shard_00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:50], whole + b"x", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="shard_00001"):
            Latents(copy)
    path.unlink()
    with pytest.raises(InputError, match="shard_00001"):
        Latents(copy)
    (copy / "latents.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        Latents(copy)
    with pytest.raises(InputError, match="encode_latents.py --data-path IMAGES --out .*none"):
        Latents(tmp_path / "none")


def test_a_folder_with_something_else_is_refused(data, copy, tmp_path):
    before, other = contents(copy), write_images(tmp_path / "other", (9, 7, 7))
    for flags, complaint in ((("--encoder", encoder_folder("other", seed=4)), "encoder"), (("--flips",), "flips"),
                             (("--shard-size", "4"), "shard_size"), (("--data-path", str(other)), "data")):
        with pytest.raises(InputError, match=f"holds other work.*{complaint}"):
            encode(data, copy, *flags)
    assert contents(copy) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not to be lost")
    with pytest.raises(InputError, match="something else"):
        encode(data, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_space_is_printed_and_checked_before_the_first_image(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 11_000))
    with pytest.raises(InputError, match="do not fit"):       # 23 x (16 x 4 x 4 x 2 + 8) bytes = 11,960
        encode(data, tmp_path / "out")
    assert not (tmp_path / "out").exists() and "space needed" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 0, 12_000))
    encode(data, tmp_path / "out")


def test_latents_that_do_not_fit_float16_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "forward", lambda self, x: torch.full((len(x), *self.shape), 7e4))
    with pytest.raises(InputError, match="a/00.png.*float16"):
        encode(data, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["encoding.json"]


def test_zip_is_folder(data, encoded, tmp_path):
    for top in ("", "train/"):
        with zipfile.ZipFile(tmp_path / f"{data.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in reversed(sorted(data.rglob("*"))):
                archive.write(path, top + path.relative_to(data).as_posix())
            archive.writestr(f"__MACOSX/{top}a/._00.png", b"resource fork")
        out = encode(tmp_path / f"{data.name}.zip", tmp_path / f"out{len(top)}", "--workers", "2")
        assert {k: v for k, v in contents(out).items() if k.startswith(("shard", "latent_"))} == {
            k: v for k, v in contents(encoded).items() if k.startswith(("shard", "latent_"))}
    images = Images(tmp_path / f"{data.name}.zip", 8)
    place = os.lseek(images.zip.fp.fileno(), 0, os.SEEK_CUR)
    list(batches_of(images, [[0, 22]], workers=1))
    assert os.lseek(images.zip.fp.fileno(), 0, os.SEEK_CUR) == place      # a forked worker must not move ours
    (tmp_path / "cut.zip").write_bytes((tmp_path / f"{data.name}.zip").read_bytes()[:-40])
    with pytest.raises(InputError, match="cut.zip is no whole .zip"):
        Images(tmp_path / "cut.zip", 8)


def test_flips(data, encoded, tmp_path):
    both, straight = Latents(encode(data, tmp_path / "out", "--flips")), Latents(encoded)
    encoder = Encoder(TINY, 32, 32)
    assert both.count == 46 and both.description["flips"]
    z, y = both.__getitems__(list(range(46)))
    assert torch.equal(y[:23], y[23:]) and torch.equal(y[:23], straight.labels)
    assert (z[:23] - straight.__getitems__(list(range(23)))[0]).abs().max() < 4e-3    # other batches, other rounding
    assert (z[23:] - encoder(Images(data, 32).__getitems__(list(range(23)))[0].flip(3))).abs().max() < 4e-3


def test_bad_images_stop_or_are_listed_and_left_out(data, encoded, tmp_path, capsys):
    broken = shutil.copytree(data, tmp_path / "broken")
    for name in ("a/02.png", "b/08.png", *(f"c/0{i}.png" for i in range(6))):        # all of the last shard's class c
        (broken / name).write_bytes((broken / name).read_bytes()[:200])
    with pytest.raises(InputError, match="a/02.png"):
        encode(broken, tmp_path / "out")
    latents = Latents(encode(broken, tmp_path / "out", "--skip-bad"))                # the same folder: it goes on
    assert "8 unreadable and left out (skipped.txt)" in capsys.readouterr().out
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(" is not")[0] for line in listed] == [str(broken / name) for name in (
        "a/02.png", "b/08.png", *(f"c/0{i}.png" for i in range(6)))]
    good = [i for i in range(17) if i not in (2, 16)]
    z, y = latents.__getitems__(list(range(latents.count)))
    wanted, labels = Latents(encoded).__getitems__(good)
    assert torch.equal(y, labels) and (z - wanted).abs().max() < 4e-3
    np.testing.assert_allclose(latents.stats[1], z.numpy().astype(np.float64).var(0), rtol=1e-11)
    assert [shard["count"] for shard in latents.description["shards"]] == [7, 8, 0]
    main(["--verify", "--out", str(tmp_path / "out")])


def test_two_processes_write_what_one_writes(data, encoded, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, "--data-path", data, "--out", tmp_path / "out", "--encoder", TINY,
               "--image-size", "32", "--encoder-size", "32", "--batch-size", "3", "--shard-size", "8", "--workers", "1"]
    two = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={
        **os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}) for rank in range(2)]
    said = [process.communicate(timeout=120)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert contents(tmp_path / "out") == contents(encoded)
    assert "30 of 30 images" in said[0] and "images" not in said[1]        # two shards here, 15 images; one there


# ----------------------------------------------------------------------------------------------------------------------
# The order in which training sees it
# ----------------------------------------------------------------------------------------------------------------------
def test_rows_do_not_depend_on_splitting_or_resuming():
    whole = list(RowSampler(10, 5, 8, [(0, 8)], 0, 7))
    assert all(len(rows) == 8 for rows in whole)
    flat = [i for rows in whole for i in rows]
    epochs = [flat[start:start + 10] for start in range(0, 50, 10)]                  # batches straddle epochs
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 5
    assert list(RowSampler(10, 5, 8, [(0, 8)], 3, 7)) == whole[3:]
    first, second = (iter(RowSampler(10, 5, 8, rows, 2, 7)) for rows in ([(0, 2), (2, 4)], [(4, 6), (6, 8)]))
    assert [next(first) + next(first) + next(second) + next(second) for _ in range(5)] == whole[2:]
    assert list(RowSampler(10, 6, 8, [(0, 8)], 0, 7)) != whole
    assert [len(set(rows)) for rows in RowSampler(3, 0, 8, [(0, 8)], 0, 2)] == [3, 3]        # a batch of several epochs
    assert len(RowSampler(10, 5, 8, [(0, 4), (4, 8)], 3, 7)) == 8


def test_flips_follow_from_the_position():
    plain = [i for rows in RowSampler(50, 1, 20, [(0, 20)], 0, 50) for i in rows]
    bits = [i for rows in RowSampler(50, 1, 20, [(0, 20)], 0, 50, flips=True) for i in rows]
    assert [i % 50 for i in bits] == plain
    assert 400 < sum(i >= 50 for i in bits) < 600
    assert len(set(bits)) == 100 and [i >= 50 for i in bits[:50]] != [i >= 50 for i in bits[50:100]]
    assert [i for rows in RowSampler(50, 1, 20, [(10, 20)], 25, 50, flips=True) for i in rows] == [
        i for k in range(25, 50) for i in bits[20 * k + 10:20 * k + 20]]


def test_training_data(data, encoded, copy, tmp_path):
    """From stored latents and from images encoded on the fly: the same samples; flipped on the fly as --flips said."""
    arguments = 7, 6, [(0, 3), (3, 6)], 2, 6, torch.device("cpu")

    def samples(training):
        return [torch.cat(part) for part in zip(*training.batches(*arguments), strict=True)]
    stored = TrainingData(encoded)
    for path in copy.glob("shard_*"):                         # the shards are not needed
        path.unlink()
    fly = TrainingData(copy, data)
    assert (fly.shape, fly.classes, len(list(stored.batches(*arguments)))) == ((16, 4, 4), ["a", "b", "c"], 8)
    assert fly.about["encoder"]["id"] == TINY and "shards" not in fly.about and not fly.flips
    (z, y), (z_fly, y_fly) = samples(stored), samples(fly)
    assert torch.equal(y, y_fly) and (z - z_fly).abs().max() < 4e-3
    flipping = TrainingData(encode(data, tmp_path / "flips", "--flips"), data)
    flipped = [i >= 23 for rows in RowSampler(23, *arguments[:-1], flips=True) for i in rows]
    z_flip, y_flip = samples(flipping)
    far = (z - z_flip).abs().flatten(1).max(1).values > 4e-3
    assert torch.equal(y, y_flip) and far.tolist() == flipped and 4 < sum(flipped) < 20
    assert len({stored.digest, fly.digest, flipping.digest}) == 3
    with pytest.raises(InputError, match="other classes"):
        TrainingData(encoded, data / "b")
    about = read_json(encoded / "latents.json")
    write_json(copy / "latents.json", {**about, "encoder": {**about["encoder"], "sha256": "0" * 64}})
    with pytest.raises(InputError, match="other weights"):
        TrainingData(copy, data)


def test_synthetic_training_data():
    arguments = 0, 4, [(0, 4)], 3, 5, torch.device("cpu")
    data = TrainingData("none", synthetic=512)
    (z, y), (z_next, _) = data.batches(*arguments)
    assert z.shape == (4, *data.shape) == (4, 768, 32, 32) and y.max() < len(data.classes) == 1000
    assert not torch.equal(z, z_next) and data.stats[1].shape == data.shape


# ----------------------------------------------------------------------------------------------------------------------
# Anybody's pictures
# ----------------------------------------------------------------------------------------------------------------------
def dot(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), colour).save(path, "PNG")


def pack(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            info = zipfile.ZipInfo("x")
            info.filename = name                              # as it stands, backslashes and all
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")               # of names that stand twice
                archive.writestr(info, b"" if name.endswith(("/", "\\")) else saved(Image.new("RGB", (9, 9), "red"), "PNG"))
    return path


def test_archives_of_all_kinds(tmp_path, capsys):
    images = Images(pack(tmp_path / "windows.zip", "top\\b\\1.png", "top\\a\\", "top\\a\\deep\\2.png"), 8)
    assert (images.classes, images.paths) == (["a", "b"], ["a/deep/2.png", "b/1.png"])
    assert images.__getitems__([0, 1])[1].tolist() == [0, 1]
    images = Images(pack(tmp_path / "twice.zip", "./a/1.png", "./a/1.png", "./b/2.png"), 8)
    assert images.paths == ["a/1.png", "b/2.png"] and "1 entries that stand twice" in capsys.readouterr().err
    assert images.read(0)[0].shape == (3, 8, 8)
    for names, complaint in ((("a\\1.png", "b/2.png"), "a\\\\1.png has a backslash"), (("a/1.png", "../b/2.png"), "leads out"),
                             (("/a/1.png",), "leads out"), (("C:\\a\\1.png",), "leads out")):
        with pytest.raises(InputError, match=complaint):
            Images(pack(tmp_path / "wrong.zip", *names), 8)
    flat = Images(pack(tmp_path / "pictures.zip", "holiday/1.png", "holiday/2.png"), 8)
    assert flat.classes == ["holiday"] and "no class folders: all is one class, holiday" in capsys.readouterr().err
    assert Images(pack(tmp_path / "v1.0.zip", "1.png"), 8).classes == ["v1.0"]


def test_the_parent_of_splits_is_refused(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/3.png"):
        dot(tmp_path / "data" / name)
    with pytest.raises(InputError, match=f"holds train and val, which are no classes: give {tmp_path}/data/train"):
        Images(tmp_path / "data", 8)
    with pytest.raises(InputError, match="no classes"):
        Images(pack(tmp_path / "data.zip", "data/train/a/1.png", "data/test/2.png"), 8)
    assert Images(tmp_path / "data/train", 8).classes == ["a", "b"]
    dot(tmp_path / "vehicles/train/1.png")
    dot(tmp_path / "vehicles/test/1.png")
    assert Images(tmp_path / "vehicles", 8).classes == ["test", "train"]              # no folders in them: classes


def test_links(tmp_path, capsys):
    data, store = tmp_path / "data", tmp_path / "store"
    for name in ("a/1.png", "b/2.png"):
        dot(data / name)
    dot(store / "3.png")
    dot(store / "deep/4.png")
    (store / "round").symlink_to(store)
    (data / "a/up").symlink_to("..")
    (data / "a/loop").symlink_to(".")
    (data / "b/other").symlink_to(data / "a")
    (data / "b/gone.png").symlink_to("nowhere.png")
    (data / "a/far.png").symlink_to(store / "3.png")
    (data / "a/above").symlink_to(tmp_path)
    (data / "c").symlink_to(store)
    images = Images(data, 8)
    assert images.paths == ["a/1.png", "a/far.png", "b/2.png", "c/3.png", "c/deep/4.png"]
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    said = capsys.readouterr().err
    assert "5 links to what is here anyway" in said and "1 links to nothing" in said
    (data / "d").symlink_to(store)
    with pytest.raises(InputError, match="c and d are one folder"):
        Images(data, 8)


def test_what_is_no_image_is_left_out_and_counted(tmp_path, capsys, monkeypatch):
    for name in ("a/1.png", "a/@eaDir/1.png/THUMB.png", "$RECYCLE.BIN/x.png", "lost+found/y.png", ".thumbnails/z.png",
                 "a/shots.png/2.png"):
        dot(tmp_path / name)
    for name in ("a/1.HEIC", "a/2.heic", "a/read me.txt", "a/nothing"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "a/pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "a/s.png"))
    images = Images(tmp_path, 8)
    assert (images.classes, images.paths) == (["a"], ["a/1.png", "a/shots.png/2.png"])
    said = capsys.readouterr().err
    for part in ("4 hidden or of the system", "2 pipes, sockets or devices", "2 .heic", "1 .txt", "1 without a suffix"):
        assert part in said
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("shots.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="cannot read the folder .*shots.png/ .Permission denied"):
        Images(tmp_path, 8)


def test_names_of_numbers_and_of_strange_bytes(tmp_path, capsys):
    for name in ("0", "1", "2", "10"):
        dot(tmp_path / "numbers" / name / "x.png")
    encode(tmp_path / "numbers", tmp_path / "out")
    assert Latents(tmp_path / "out").classes == ["0", "1", "10", "2"]
    assert "as text: 0 has 0, 1 has 1, 10 has 2, 2 has 3" in capsys.readouterr().out
    for name in (b"ok.png", b"esc\x1b[2J.png", b"new\nline.png", b"latin\xe9.png"):
        path = os.path.join(os.fsencode(tmp_path), b"strange", name)
        dot(tmp_path / "strange/ok.png")
        Path(os.fsdecode(path)).write_bytes(b"no image")
    out = encode(tmp_path / "numbers", tmp_path / "out2")
    with pytest.raises(InputError) as error:
        encode(tmp_path / "strange", out.parent / "out3")
    assert str(error.value).isprintable()
    dot(tmp_path / "strange/ok.png")
    encode(tmp_path / "strange", out.parent / "out3", "--skip-bad")
    listed = (out.parent / "out3/skipped.txt").read_text()
    assert listed.count("\n") == 3 and all(part in listed for part in ("esc\\x1b[2J.png", "new\\nline.png", "latin\\udce9.png"))


def test_strips_take_little_memory(tmp_path):
    """Each is a few kB as a file; enlarged, it would be gigabytes."""
    program = """
import resource, sys
import numpy as np
from PIL import Image
from encode_latents import adm_crop
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
for width, height in ((20000, 2), (2, 20000), (60000, 1), (1, 60000)):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    pixels = adm_crop(image, 256)
    assert pixels.shape == (256, 256, 3)
    if width == 20000:                                    # the two passes of Pillow, cropped between them
        wide = image.resize((width * 128, 2), Image.Resampling.BICUBIC)
        left = (width * 128 - 256) // 2
        whole = wide.crop((left, 0, left + 256, 2)).resize((256, 256), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(whole).astype(int) - pixels).max() <= 1
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")            # Pillow's word on what is broken on purpose
def test_metadata_never_stops_pixels():
    rgb = picture(24, 20)
    png = saved(Image.fromarray(rgb), "PNG")
    head, rest = png[:33], png[33:]                           # signature and IHDR; then the pixels
    long = zlib.compress(bytes(3_000_000))
    odd = {"text": chunk(b"zTXt", b"workflow\0\0" + long), "international": chunk(b"iTXt", b"prompt\0\1\0\0\0" + long),
           "profile": chunk(b"iCCP", b"p\0\0" + long), "method": chunk(b"zTXt", b"key\0\7" + long),
           "checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"?", "exif": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff broken")}
    for name, part in odd.items():
        for data in (head + part + rest, png[:-12] + part + png[-12:]):
            assert np.array_equal(np.asarray(open_rgb(io.BytesIO(data))), rgb), name
    jpeg = saved(Image.fromarray(rgb), "JPEG")
    for body in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\10\0\2\1\22\0\7\0\0\0\1\0\0\0\0"):
        data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
        assert np.array_equal(np.asarray(open_rgb(io.BytesIO(data))), np.asarray(Image.open(io.BytesIO(jpeg))))


def test_large_images_and_formats_that_are_not_named(tmp_path, monkeypatch):
    Image.new("1", (14000, 14000)).save(tmp_path / "large.png")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    images = Images(tmp_path, 8)
    assert images.read(0)[0].shape == (3, 8, 8)
    with pytest.raises(InputError, match="script.png is not a readable image .UnidentifiedImageError"):
        images.read(1)
    monkeypatch.setattr(encode_latents, "MAX_PIXELS", 10_000_000)
    with pytest.raises(InputError, match="14000 x 14000 pixels, MFRAE_MAX_PIXELS is 10000000"):
        images.read(0)


def test_a_folder_that_holds_all_of_it(tmp_path, capsys):
    """The command over most of the above at once."""
    rgb = picture(24, 20)
    png = saved(Image.fromarray(rgb), "PNG")
    for name in ("a/1.png", "a/@eaDir/1.png/THUMB.png", "b/deep/2.png", "b/folder.png/3.png", "lost+found/x.png"):
        dot(tmp_path / "data" / name)
    data = tmp_path / "data"
    (data / "a/text.png").write_bytes(png[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))) + png[33:])
    (data / "a/strip.png").write_bytes(saved(Image.new("RGB", (20000, 2)), "PNG"))
    (data / "a/script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    (data / "a/notes.txt").write_text("")
    (data / "a/loop").symlink_to(".")
    (data / os.fsdecode(b"b/\x1b\xff.png")).write_bytes(png)
    os.mkfifo(data / "b/pipe.png")
    latents = Latents(encode(data, tmp_path / "out", "--skip-bad"))
    assert latents.classes == ["a", "b"] and latents.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "1 unreadable and left out" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Nothing wrong in silence
# ----------------------------------------------------------------------------------------------------------------------
def test_workers_need_no_shared_memory_and_are_missed(data):
    """No file of theirs may grow beyond 4 kB, so shared memory is of no use; one that is killed ends the reading in one line."""
    program = f"""
import multiprocessing, os, resource, signal
from encode_latents import Images, batches_of
from model import command

def main():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    batches = batches_of(Images({str(data)!r}, 64), [[i % 23, 3] for i in range(40)], workers=2)
    print(sum(len(x) for x, _ in [next(batches) for _ in range(20)]), flush=True)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    list(batches)
command(main)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "40\n" and done.returncode == 2
    assert "fewer --workers" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


def test_workers_end_with_their_training(data):
    """Killed with full pipes: its workers hold the output's pipe, too, so it ends only when they have."""
    program = f"""
import os, signal, time
from encode_latents import Images, batches_of
batches = batches_of(Images({str(data)!r}, 64), [list(range(20))] * 40, workers=2)
print(len(next(batches)[0]), flush=True)
time.sleep(1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=SCRIPT.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "20\n" and done.returncode == -signal.SIGKILL, done.stderr


def test_shards_of_others_are_noticed(data, encoded, copy, tmp_path, capsys):
    other = encode(data, tmp_path / "other", "--encoder", encoder_folder("other", seed=4))
    swaps = {"doubled": ("shard_00000", copy, "shard_00001"), "of another encoder": ("shard_00001", other, "shard_00001")}
    for kind, (name, folder, place) in swaps.items():
        shutil.copy(folder / f"{name}.safetensors", copy / f"{place}.safetensors")
        (copy / "latents.json").unlink(missing_ok=True)
        encode(data, copy)
        assert f"{place}.safetensors is of other images or another encoder" in capsys.readouterr().err, kind
        assert contents(copy) == contents(encoded)
    shutil.copy(other / "latent_stats.safetensors", copy)
    for read in (Latents, TrainingData, lambda folder: TrainingData(folder, data)):
        with pytest.raises(InputError, match="latent_stats.safetensors is not of these latents.*--stats"):
            read(copy)
    with pytest.raises(InputError, match="latent_stats.safetensors is of other images"):
        main(["--verify", "--out", str(copy)])
    about = read_json(encoded / "latents.json")               # a description that names another encoder's shard
    shutil.copy(encoded / "latent_stats.safetensors", copy)
    shutil.copy(other / "shard_00002.safetensors", copy)
    shards = [*about["shards"][:2], read_json(other / "latents.json")["shards"][2]]
    write_json(copy / "latents.json", {**about, "shards": shards})
    with pytest.raises(InputError, match="1 of 4 files are damaged.*shard_00002.*"):
        main(["--verify", "--out", str(copy)])


def test_identity_is_by_content(data, encoded, copy, tmp_path):
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert TrainingData(moved).digest == TrainingData(encoded).digest
    images, network = shutil.copytree(data, tmp_path / "elsewhere"), shutil.copytree(TINY, tmp_path / "network")
    encode(images, moved, "--encoder", str(network))          # the same images and encoder elsewhere: it goes on
    assert TrainingData(moved).digest == TrainingData(encoded).digest
    assert TrainingData(moved).about["encoder"]["id"] == str(network)
    assert TrainingData(moved, images).digest == TrainingData(copy, data).digest


def test_latents_of_older_versions(data, encoded, copy, capsys):
    """Notes in a tensor, no origin, an encoder of the form random:...: trained from, and gone on with."""
    about = read_json(copy / "latents.json")
    for shard in about["shards"]:
        tensors, header = read_tensors(copy / shard["file"])
        notes = torch.tensor(list(header["notes"].encode()), dtype=torch.uint8)
        shard["sha256"] = write_tensors(copy / shard["file"], {**tensors, "notes": notes})
    settings = read_json(copy / "encoding.json")
    for text, name in ((about, "latents.json"), (settings, "encoding.json")):
        del text["encoder"]["untrained"]
        text["encoder"]["id"] = "random:width=16,depth=1,heads=2,patch=8,seed=3"
        write_json(copy / name, text)
    assert len(TrainingData(copy).dataset) == 23
    with pytest.raises(InputError, match="sanity/random_encoder.py --out FOLDER --width 16 --depth 1 .* --encoder FOLDER"):
        TrainingData(copy, data)
    main(["--verify", "--out", str(copy)])
    before = {name: whole for name, whole in contents(copy).items() if name.startswith("shard")}
    encode(data, copy)
    assert before == {name: whole for name, whole in contents(copy).items() if name.startswith("shard")}
    TrainingData(copy, data)
    assert "encoding it again" not in capsys.readouterr().err


def test_broken_descriptions_are_one_line(copy, tmp_path):
    about = read_json(copy / "latents.json")
    shard = about["shards"][0]
    wrong = [{"count": 10 ** 9}, {"shape": [16, 4]}, {"shape": [16, 4, 2 ** 40]}, {"shape": None}, {"classes": "abc"},
             {"classes": []}, {"shards": [{**shard, "file": "../../etc/passwd"}]}, {"shards": [{**shard, "count": -1}]},
             {"shards": 3}, {"encoder": []}, {"encoder": {**about["encoder"], "image_size": 10 ** 9}}, {"flips": 1},
             {"data": None}, {"precision": "int8"}, {"count": 23.0}, {"statistics_sha256": None},
             {"shards": [{**shard, "count": 10 ** 9}], "count": 10 ** 9}]
    texts = [json.dumps({**about, **change}) for change in wrong]
    texts += [json.dumps({k: v for k, v in about.items() if k != name}) for name in about if name not in ("dtype",)]
    texts += ["[]", "3", "null", "{}", "[" * 100_000, "", "{\"a\": "]
    for text in texts:
        (copy / "latents.json").write_text(text)
        for read in (Latents, TrainingData, lambda folder: main(["--verify", "--out", str(folder)])):
            try:
                read(copy)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                raise AssertionError(f"taken: {text}")
    for text in ("[]", "3", "{}", '{"data": 3}'):
        (copy / "encoding.json").write_text(text)
        with pytest.raises(InputError):
            encode(tmp_path, copy)


def test_one_process_writes_a_folder(data, tmp_path):
    """A second one is refused, and a user's own hidden file stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.important_tmp_backup").write_text("mine")
    (tmp_path / "out/.shard_00000.safetensors.77.tmp").write_text("of a killed process")
    hold = f"from model import hold; hold({str(tmp_path / 'out/.lock')!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=SCRIPT.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        with pytest.raises(InputError, match="being written by another process .process"):
            encode(data, tmp_path / "out")
        first.communicate(b"\n")
    encode(data, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob(".*")} == {".lock", ".important_tmp_backup"}


@pytest.mark.parametrize("flags", [("--batch-size", "0"), ("--workers", "-1"), ("--image-size", "-3"), ("--shard-size", "x"),
                                   ("--encoder-size", "100000"), ("--image", "32")])
def test_ranges_at_the_parser(tmp_path, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--data-path", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert capsys.readouterr().err.count("\n") == 1 and not os.listdir(tmp_path)


def test_a_full_disk_is_one_line(data, tmp_path):
    """The files that fitted stay, and the same command goes on."""
    program = """
import resource, signal, sys
import encode_latents, model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
sys.argv[0] = "encode_latents.py"
model.command(lambda: encode_latents.main(sys.argv[1:]))
"""
    flags = ["--data-path", data, "--out", tmp_path / "out", "--encoder", TINY, "--image-size", "32", "--encoder-size", "32",
             "--workers", "0", "--shard-size"]
    done = subprocess.run([sys.executable, "-c", program, *flags, "8"], cwd=SCRIPT.parent, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "cannot write" in error and "space" in error, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "encoding.json"]


RANDOM = {(64, 2, 4, 8, 0): "2eb7de805403026320986e27f0dfc0b60d0ddb3676da9947ced4801b617d96e6",
          (16, 1, 2, 8, 3): "4bfc39c1004f23e12ad2d8ba1fbc036f38c73081d26fc817562d88cd16f77cb8",
          (48, 2, 4, 4, 0): "01992781c357012e3e7794026b07f02c24df2f2c0223e02b86c9097df47fadf7",
          (12, 1, 2, 4, 0): "76fa6375be83d48e950b3c9ec77fc2efc1724f431978f9f0f39c572eb2fdd95e"}


@pytest.mark.parametrize("sizes", RANDOM)
def test_random_encoder_is_the_one_of_older_versions(sizes, tmp_path):
    """Digests of the encoders that `random:width=...` made on the spot."""
    names = ("width", "depth", "heads", "patch", "seed")
    assert Encoder(encoder_folder("e", tmp_path, **dict(zip(names, sizes, strict=True))), 32, 32).digest == RANDOM[sizes]


def test_random_encoder_folder(tmp_path, capsys):
    folder = Path(encoder_folder("e", tmp_path))
    assert json.loads((folder / "config.json").read_text())["untrained"] is True
    before = (folder / "model.safetensors").stat().st_mtime_ns
    encoder_folder("e", tmp_path)
    assert "is there" in capsys.readouterr().out and (folder / "model.safetensors").stat().st_mtime_ns == before
    for sizes in (dict(seed=4), dict(patch=4), dict(width=32)):
        with pytest.raises(InputError, match=f"holds other work .*{'seed' if 'seed' in sizes else '_size'}"):
            encoder_folder("e", tmp_path, **sizes)
    (folder / "config.json").unlink()                         # killed before it was written
    encoder_folder("e", tmp_path)
    assert (folder / "config.json").exists()
    with pytest.raises(InputError, match="multiple of the heads"):
        encoder_folder("f", tmp_path, width=15)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(InputError, match="something else"):
        encoder_folder("mine", tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------
def test_errors_are_one_line_and_help_is_light(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, "--data-path", tmp_path / "none"], capture_output=True, text=True,
                         cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and not os.listdir(tmp_path)
    assert run.stderr.startswith(f"encode_latents.py: error: {tmp_path / 'none'} does not exist")
    light = "import sys, encode_latents as e\ntry: e.main(['-h'])\nfinally: assert 'transformers' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert run.returncode == 0, run.stderr
    assert "facebook/dinov2-with-registers-base" in " ".join(run.stdout.split())
