"""encode_latents.py: images read and prepared as promised, the encoder, the files it writes and their readers."""
import argparse
import errno
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import encode_latents
import model
from encode_latents import Encoder, Images, Latents, TrainingData, adm_crop, batches_of, main, open_rgb, read_ahead
from model import InputError, read_json
from runs import let_go, run_on
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
    let_go()
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


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
    for make, complaint in (((), "is no folder"), (("x",), "no images"), (("y.txt",), "no images"),
                            (("x/y.png", "z"), "z holds no images"),
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


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def deep_png(array):
    """A PNG of 16 bits per channel, by hand: Pillow writes none in colour."""
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
        "rgb.ppm": (saved(image, "PPM"), rgb),
        "upper.JPEG": (jpeg, decoded(jpeg)), "a png.jpg": (saved(image, "PNG"), rgb),
        "lossless.webp": (saved(image, "WEBP", lossless=True), rgb),
        "grey.png": (saved(Image.fromarray(grey), "PNG"), three(grey)),
        "one bit.png": (saved(Image.fromarray(grey > 127), "PNG"), three(np.where(grey > 127, 255, 0))),
        "grey alpha.png": (saved(Image.fromarray(np.dstack([grey, alpha])), "PNG"),
                           (three(grey) * a + 255 * (1 - a)).round()),
        "palette.png": (saved(palette, "PNG"), shown), "palette.gif": (saved(palette, "GIF"), shown),
        "palette alpha.png": (saved(palette, "PNG", transparency=3), see_through),
        "palette alphas.png": (saved(palette, "PNG", transparency=bytes([255, 255, 255, 0])), see_through),
        "key colour.png": (saved(image, "PNG", transparency=tuple(rgb[2, 3].tolist())), keyed),
        "rgba.png": (saved(rgba, "PNG"), on_white), "rgba.tif": (saved(rgba, "TIFF"), on_white),
        "cmyk.jpg": (cmyk, decoded(cmyk)), "cmyk.tif": (saved(image.convert("CMYK"), "TIFF"), rgb),
        "deep.png": (saved(Image.fromarray(deep), "PNG"), three(eight)),
        "deep.tif": (saved(Image.fromarray(deep), "TIFF"), three(eight)),
        "deep big-endian.tif": (saved(Image.frombytes("I;16B", (24, 20), deep.astype(">u2").tobytes()), "TIFF"),
                                three(eight)),
        "deep.pgm": (b"P5 24 20 65535\n" + deep.astype(">u2").tobytes(), three(eight)),
        "deep colour.png": (deep_png(rgb * np.uint16(257)), rgb),
        "moving.gif": (saved(palette, "GIF", save_all=True, append_images=[second.quantize(16)]), shown),
        "moving.png": (saved(image, "PNG", save_all=True, append_images=[second]), rgb),
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
        "empty.png": b"", "text.jpg": b"<html>404</html>", "cut.jpg": jpeg[:len(jpeg) // 2],
        "cut.png": saved(image, "PNG")[:900], "flipped bit.png": bytes(png), "cut.webp": webp[:len(webp) // 2],
        "cut.tif": tif[:300],
        "float.tif": saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "32 bits.tif": saved(Image.fromarray(grey.astype(np.int32) << 20), "TIFF"),
        "signed.tif": saved(Image.fromarray(grey.astype(np.int32) - 128), "TIFF"),
        "strip.png": saved(Image.new("RGB", (2020, 20)), "PNG")}
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
                images.read([i])
            continue
        with open(tmp_path / name, "rb") as file:
            image = open_rgb(file)
        assert image.mode == "RGB", name
        rounded = "rgba" in name or "alpha.png" in name
        assert np.abs(np.asarray(image).astype(int) - odd[name][1]).max() <= rounded, name
        assert np.array_equal(images.pixels(i), adm_crop(image, 16)), name


def test_flipped_copies_and_threads(data):
    images = Images(data, 16)
    straight, labels = images.read([5, 20, 0])
    flipped, flipped_labels = images.read([28, 43, 23])
    assert torch.equal(flipped, straight.flip(3)) and torch.equal(labels, flipped_labels) and labels.tolist() == [0, 2, 0]
    batches = [[i % 23, (7 * i) % 46] for i in range(50)]
    for threads in (0, 1, 3):
        found = list(read_ahead(images.read, iter(batches), threads))
        assert len(found) == 50 and all(torch.equal(found[i][0], images.read(batches[i])[0]) for i in (0, 13, 49))


def test_threads_read_ahead_and_no_further():
    """As many batches as there are threads; an error comes in its turn; who stops asking leaves none of them."""
    asked = []

    def batches():
        for i in range(100):
            asked.append(i)
            yield i
    reader = read_ahead(lambda i: 1 / (i - 5), batches(), 3)
    assert next(reader) == -0.2 and len(asked) == 4
    reader.close()
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(lambda i: 1 / (i - 5), range(100), 3))
    assert threading.active_count() == before


def test_what_the_disk_refuses_is_no_bad_image(data, tmp_path, monkeypatch):
    """Nor what the memory does: --skip-bad leaves nothing out for it."""
    opened = Images.open
    for error in (OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"), MemoryError()):
        def failing(self, name, error=error):
            if name.endswith("05.png"):
                raise error
            return opened(self, name)
        monkeypatch.setattr(Images, "open", failing)
        with pytest.raises(type(error)):
            encode(data, tmp_path / "out", "--skip-bad")
    monkeypatch.undo()
    let_go()
    assert len(Latents(encode(data, tmp_path / "out", "--skip-bad"))) == 23


# ----------------------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------------------
def test_encoders_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for arguments, complaint in (((tmp_path,), "is of model_type None"), ((tmp_path / "none",), "no encoder"),
                                 ((TINY, 40), "encoder-size"), ((TINY, 32, 30), "multiple of 8")):
        with pytest.raises(InputError, match=complaint):
            Encoder(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Latents on disk
# ----------------------------------------------------------------------------------------------------------------------
def test_latents_and_their_order(data, encoded):
    latents, images, encoder = Latents(encoded), Images(data, 32), Encoder(TINY, 32, 32)
    assert (latents.shape, len(latents), latents.classes) == ((16, 4, 4), 23, ["a", "b", "c"])
    order = [22, 0, 8, 7, 15, 16, 3, 3]
    z, y = latents.read(order)
    x, labels = images.read(order)
    assert z.dtype == torch.float16 and y.dtype == torch.int64 and torch.equal(y, labels)
    assert (z - encoder(x)).abs().max() < 2e-3                # float16 rounding of values up to 3
    about = read_json(encoded / "latents.json")
    assert about["shape"] == [16, 4, 4] and about["shards"] == 3 and about["data"] == data.name
    assert about["encoder"] == {**encoder.about, "from_here": os.path.relpath(TINY, encoded)}
    assert about["identity"] == {"images": images.sha256, "flips": False, "shard_size": 8, **encoder.about["identity"]}
    assert str(data) not in (encoded / "latents.json").read_text()
    assert sorted(contents(encoded)) == ["latent_stats.safetensors", "latents.json", *(f"shard_0000{k}.safetensors" for k in range(3))]


def test_statistics_are_those_of_the_rounded_latents(encoded):
    latents = Latents(encoded)
    z = latents.read(list(range(23)))[0].numpy().astype(np.float64)
    mean, var = latents.stats["mean"], latents.stats["var"]
    assert mean.dtype == var.dtype == torch.float64 and mean.shape == var.shape == (16, 4, 4)
    np.testing.assert_allclose(mean, z.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(var, z.var(0), rtol=1e-11)


def test_going_on_gives_the_same_files(data, encoded, copy, monkeypatch, capsys):
    """What is there is not encoded again; what a killed process left is written over."""
    (copy / "latent_stats.safetensors").unlink()
    (copy / "shard_00001.safetensors").unlink()
    (copy / ".shard_00001.safetensors.tmp").write_bytes(b"of a killed process")
    seen = []
    monkeypatch.setattr(Images, "pixels", lambda self, i, pixels=Images.pixels: (seen.append(i), pixels(self, i))[1])
    encode(data, copy)
    assert seen == list(range(8, 16)) and contents(copy) == contents(encoded)
    assert "2 of 3 shards are there; images are known by name" in capsys.readouterr().out
    encode(data, copy)
    assert seen == list(range(8, 16)) and contents(copy) == contents(encoded)


@pytest.mark.parametrize("name", ["shard_00002.safetensors", "latent_stats.safetensors"])
def test_verify_names_the_file_with_one_flipped_bit(copy, name, capsys):
    main(["--verify", "--out", str(copy)])
    assert "4 files with 23 latents read back, all whole" in capsys.readouterr().out
    whole = (copy / name).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place, bit in ((header, 0), ((header + len(whole)) // 2, 7), (len(whole) - 1, 3), (whole.index(b"sha256") + 16, 0)):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            main(["--verify", "--out", str(copy)])


def test_verify_knows_whose_files_these_are(data, copy, tmp_path):
    """Statistics, or a shard, of other latents; and the answer is the same for a process that is not the first."""
    other = encode(data, tmp_path / "other", "--encoder", encoder_folder("other", seed=4))
    for name, words in (("latent_stats", "is not of these shards"), ("shard_00001", "is of other latents")):
        kept = (copy / f"{name}.safetensors").read_bytes()
        shutil.copy(other / f"{name}.safetensors", copy)
        with pytest.raises(InputError, match=f"{name}.*{words}"):
            main(["--verify", "--out", str(copy)])
        done = subprocess.run([sys.executable, SCRIPT, "--verify", "--out", copy], env={**os.environ, "RANK": "1"}, capture_output=True)
        assert done.returncode == 2
        (copy / f"{name}.safetensors").write_bytes(kept)
    main(["--verify", "--out", str(copy)])


def test_the_reader_refuses_cut_and_unfinished_folders(data, copy, tmp_path):
    path = copy / "shard_00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:50], whole + b"x", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match="shard_00001"):
            Latents(copy)
    path.unlink()
    for read in (Latents, TrainingData):
        with pytest.raises(InputError, match="shard_00001"):
            read(copy)
    other = encode(data, tmp_path / "other", "--encoder", encoder_folder("other", seed=4))
    shutil.copy(other / "shard_00001.safetensors", copy)
    with pytest.raises(InputError, match="shard_00001.safetensors is of other latents"):
        Latents(copy)
    (copy / "latent_stats.safetensors").unlink()
    with pytest.raises(InputError, match="unfinished"):
        Latents(copy)
    with pytest.raises(InputError, match="is of other latents"):                     # the command, too
        encode(data, copy)
    let_go()
    with pytest.raises(InputError, match="encode_latents.py --data-path IMAGES --out .*none"):
        Latents(tmp_path / "none")


def test_a_folder_with_something_else_is_refused(data, copy, tmp_path):
    before, other = contents(copy), write_images(tmp_path / "other", (9, 7, 7))
    for flags, complaint in ((("--encoder", encoder_folder("other", seed=4)), "sha256"), (("--flips",), "flips"),
                             (("--shard-size", "4"), "shard_size"), (("--data-path", str(other)), "images"),
                             (("--precision", "bf16"), "precision"), (("--encoder-size", "24"), "encoder_size")):
        with pytest.raises(InputError, match=f"holds other work.*{complaint}"):
            encode(data, copy, *flags)
    assert contents(copy) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("not to be lost")
    with pytest.raises(InputError, match="something else"):
        encode(data, tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    with pytest.raises(InputError, match="lies within the images"):
        encode(data, data / "b" / "latents")
    assert not (data / "b" / "latents").exists()


@pytest.mark.parametrize("name, value", [("num_attention_heads", 4), ("layer_norm_eps", 1e-2), ("hidden_act", "relu")])
def test_an_encoder_is_its_config_too(data, copy, tmp_path, name, value):
    """Which changes the latents, and not the weights."""
    other = shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(InputError, match=f"holds other work .{name}: "):
        encode(data, copy, "--encoder", str(other))
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(TINY, tmp_path / "moved")
    (tmp_path / "moved" / "config.json").write_text(json.dumps({**config, name: value}))
    about = read_json(copy / "latents.json")
    about["encoder"] |= {"id": "gone", "from_here": "../moved"}
    model.write_json(copy / "latents.json", about)
    with pytest.raises(InputError, match="is another than the one that made"):
        encode_latents.encoder_of(copy)


def test_where_the_encoder_lies(data, tmp_path, monkeypatch):
    """Its path is kept as it was given; from another folder, or when all has moved, it is found from the latents."""
    shutil.copytree(TINY, tmp_path / "a" / "encoder")
    monkeypatch.chdir(tmp_path / "a")
    encode(data, Path("latents"), "--encoder", "encoder")
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert read_json("b/latents/latents.json")["encoder"]["id"] == "encoder"
    assert encode_latents.encoder_of("b/latents").about["id"] == "b/latents/../encoder"
    assert TrainingData("b/latents", data).encode is not None


def test_archives_are_known_by_their_contents(data, tmp_path, capsys):
    """And folders, where that would mean reading them, by names: a line says so."""
    shutil.copytree(data, tmp_path / "data")
    shutil.make_archive(tmp_path / "one", "zip", data)
    Image.fromarray(picture(40, 36, 99)).save(tmp_path / "data" / "a" / "00.png")
    shutil.make_archive(tmp_path / "two", "zip", tmp_path / "data")
    encode(tmp_path / "one.zip", tmp_path / "out")
    with pytest.raises(InputError, match="holds other work .images"):
        encode(tmp_path / "two.zip", tmp_path / "out")
    encode(tmp_path / "one.zip", tmp_path / "out")
    assert "3 of 3 shards are there\n" in capsys.readouterr().out


def test_latents_that_do_not_fit_float16_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Encoder, "forward", lambda self, x: torch.full((len(x), *self.shape), 7e4))
    with pytest.raises(InputError, match="a/00.png.*float16"):
        encode(data, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["latents.json"]


def test_zip_is_folder(data, encoded, tmp_path):
    for top in ("", "train/"):
        with zipfile.ZipFile(tmp_path / f"{data.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in reversed(sorted(data.rglob("*"))):
                archive.write(path, top + path.relative_to(data).as_posix())
            archive.writestr(f"__MACOSX/{top}a/._00.png", b"resource fork")
        out = Latents(encode(tmp_path / f"{data.name}.zip", tmp_path / f"out{len(top)}", "--workers", "2"))
        for a, b in zip(out.read(list(range(23))), Latents(encoded).read(list(range(23))), strict=True):
            assert torch.equal(a, b)
    (tmp_path / "cut.zip").write_bytes((tmp_path / f"{data.name}.zip").read_bytes()[:-40])
    with pytest.raises(InputError, match="cut.zip is no folder and no whole .zip"):
        Images(tmp_path / "cut.zip", 8)
    with pytest.raises(InputError, match="none is no folder"):
        Images(tmp_path / "none", 8)


def test_flips(data, encoded, tmp_path):
    both, straight = Latents(encode(data, tmp_path / "out", "--flips")), Latents(encoded)
    encoder = Encoder(TINY, 32, 32)
    z, y = both.read(list(range(46)))
    assert len(both) == 46 and torch.equal(y[:23], y[23:]) and torch.equal(y[:23], straight.labels)
    assert (z[:23] - straight.read(list(range(23)))[0]).abs().max() < 4e-3           # other batches, other rounding
    assert (z[23:] - encoder(Images(data, 32).read(list(range(23)))[0].flip(3))).abs().max() < 4e-3


def test_bad_images_stop_or_are_listed_and_left_out(data, encoded, tmp_path, capsys):
    broken, bad = shutil.copytree(data, tmp_path / "broken"), ["a/02.png", "b/08.png", *(f"c/0{i}.png" for i in range(5))]
    for name in bad:
        (broken / name).write_bytes((broken / name).read_bytes()[:200])
    with pytest.raises(InputError, match="a/02.png"):
        encode(broken, tmp_path / "out")
    let_go()
    latents = Latents(encode(broken, tmp_path / "out", "--skip-bad"))                # the same folder: it goes on
    assert "7 images unreadable and left out (skipped.txt)" in capsys.readouterr().out
    listed = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert [line.split(" is no")[0] for line in listed] == [str(broken / name) for name in bad]
    good = [i for i in range(23) if i not in (2, 16, 17, 18, 19, 20, 21)]
    z, y = latents.read(list(range(len(latents))))
    wanted, labels = Latents(encoded).read(good)
    assert torch.equal(y, labels) and (z - wanted).abs().max() < 4e-3
    np.testing.assert_allclose(latents.stats["var"], z.numpy().astype(np.float64).var(0), rtol=1e-11)
    main(["--verify", "--out", str(tmp_path / "out")])


def test_a_class_that_ends_empty_stops_with_its_name(data, tmp_path):
    """Its label would never be trained, and samples of it drawn all the same."""
    broken = shutil.copytree(data, tmp_path / "broken")
    for i in range(6):
        (broken / "c" / f"0{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image of class c could be read: .*c/00.png"):
        encode(broken, tmp_path / "out", "--skip-bad")
    with pytest.raises(InputError, match="unfinished"):
        Latents(tmp_path / "out")


def test_two_processes_write_what_one_writes(data, encoded, tmp_path):
    argv = ["--data-path", str(data), "--out", str(tmp_path / "out"), "--encoder", TINY, "--image-size", "32",
            "--encoder-size", "32", "--batch-size", "3", "--shard-size", "8", "--workers", "1"]
    run_on(2, main, argv)
    one, two = contents(encoded), contents(tmp_path / "out")
    for files in (one, two):
        files.pop("latents.json")                             # which says where the encoder lies from there
    assert one == two


# ----------------------------------------------------------------------------------------------------------------------
# The order in which training sees it
# ----------------------------------------------------------------------------------------------------------------------
def test_rows_do_not_depend_on_splitting_or_going_on():
    whole = list(batches_of(10, 5, 8, [(0, 8)], 0, 7))
    assert all(len(rows) == 8 for rows in whole)
    flat = [i for rows in whole for i in rows]
    epochs = [flat[start:start + 10] for start in range(0, 50, 10)]                  # batches straddle epochs
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 5
    assert list(batches_of(10, 5, 8, [(0, 8)], 3, 7)) == whole[3:]
    first, second = (batches_of(10, 5, 8, rows, 2, 7) for rows in ([(0, 2), (2, 4)], [(4, 6), (6, 8)]))
    assert [next(first) + next(first) + next(second) + next(second) for _ in range(5)] == whole[2:]
    assert list(batches_of(10, 6, 8, [(0, 8)], 0, 7)) != whole
    assert [len(set(rows)) for rows in batches_of(3, 0, 8, [(0, 8)], 0, 2)] == [3, 3]        # a batch of several epochs


def test_flips_follow_from_the_position():
    plain = [i for rows in batches_of(50, 1, 20, [(0, 20)], 0, 50) for i in rows]
    bits = [i for rows in batches_of(50, 1, 20, [(0, 20)], 0, 50, flips=True) for i in rows]
    assert [i % 50 for i in bits] == plain
    assert 400 < sum(i >= 50 for i in bits) < 600
    assert len(set(bits)) == 100 and [i >= 50 for i in bits[:50]] != [i >= 50 for i in bits[50:100]]
    assert [i for rows in batches_of(50, 1, 20, [(10, 20)], 25, 50, flips=True) for i in rows] == [
        i for k in range(25, 50) for i in bits[20 * k + 10:20 * k + 20]]


def test_training_data(data, encoded, copy, tmp_path):
    """From stored latents and from images encoded on the fly: the same samples; flipped on the fly as --flips said."""
    args = argparse.Namespace(seed=7, batch_size=6, steps=6, workers=2)
    place = [(0, 3), (3, 6)], 2, torch.device("cpu")

    def samples(training):
        return [torch.cat(part) for part in zip(*training.batches(args, *place), strict=True)]
    stored = TrainingData(encoded)
    for path in copy.glob("shard_*"):                         # the shards are not needed
        path.unlink()
    fly = TrainingData(copy, data)
    assert (fly.shape, fly.classes, len(list(stored.batches(args, *place)))) == ((16, 4, 4), ["a", "b", "c"], 8)
    assert fly.about["encoder"]["id"] == TINY and not fly.flips
    (z, y), (z_fly, y_fly) = samples(stored), samples(fly)
    assert torch.equal(y, y_fly) and (z - z_fly).abs().max() < 4e-3
    flipping = TrainingData(encode(data, tmp_path / "flips", "--flips"), data)
    flipped = [i >= 23 for rows in batches_of(23, 7, 6, place[0], 2, 6, flips=True) for i in rows]
    z_flip, y_flip = samples(flipping)
    far = (z - z_flip).abs().flatten(1).max(1).values > 4e-3
    assert torch.equal(y, y_flip) and far.tolist() == flipped and 4 < sum(flipped) < 20
    assert len({stored.sha256, fly.sha256, flipping.sha256}) == 3
    with pytest.raises(InputError, match="other classes"):
        TrainingData(encoded, data / "b")


def test_shards_made_again(data, tmp_path, monkeypatch):
    """While they are, the folder is not finished: a kill between the last shard and the statistics leaves no old ones."""
    copied = shutil.copytree(data, tmp_path / "data")
    out = encode(copied, tmp_path / "out")
    before = contents(out)
    (out / "shard_00001.safetensors").unlink()
    Image.fromarray(picture(40, 40, 99)).save(copied / "b/00.png")
    finish = encode_latents.finish
    monkeypatch.setattr(encode_latents, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(copied, out)
    with pytest.raises(InputError, match="unfinished latents"):
        Latents(out)
    let_go()
    monkeypatch.setattr(encode_latents, "finish", finish)
    main(["--out", str(encode(copied, out)), "--verify"])
    assert contents(out).keys() == before.keys() and contents(out) != before


def test_images_mended_after_skip_bad(data, tmp_path, capsys):
    """Without the flag, shards that lack images are made again; a mirror image is not a second bad one."""
    copied = shutil.copytree(data, tmp_path / "data")
    (copied / "a/01.png").write_bytes(b"no image")
    out = encode(copied, tmp_path / "out", "--flips", "--skip-bad")
    assert len((out / "skipped.txt").read_text().splitlines()) == 1 and len(Latents(out)) == 44
    assert "1 images unreadable" in capsys.readouterr().out
    with pytest.raises(InputError, match="a/01.png is no readable image"):
        encode(copied, out, "--flips")
    let_go()
    shutil.copy(data / "a/01.png", copied / "a/01.png")
    encode(copied, out, "--flips")
    made, whole = contents(out), contents(encode(data, tmp_path / "whole", "--flips"))
    assert made.keys() == whole.keys() and all(made[name] == whole[name] for name in made if name != "latents.json")


def test_identity_is_by_content(data, encoded, copy, tmp_path):
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert TrainingData(moved).sha256 == TrainingData(encoded).sha256
    images, network = shutil.copytree(data, tmp_path / "elsewhere"), shutil.copytree(TINY, tmp_path / "network")
    encode(images, moved, "--encoder", str(network))          # the same images and encoder elsewhere: it goes on
    assert TrainingData(moved).sha256 == TrainingData(encoded).sha256
    assert TrainingData(moved, images).sha256 == TrainingData(copy, data).sha256


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
    assert images.read([0, 1])[1].tolist() == [0, 1]
    images = Images(pack(tmp_path / "twice.zip", "./a/1.png", "./a/1.png", "./b/2.png"), 8)
    assert images.paths == ["a/1.png", "b/2.png"] and images.read([0])[0].shape == (1, 3, 8, 8)
    capsys.readouterr()
    flat = Images(pack(tmp_path / "pictures.zip", "holiday/1.png", "holiday/2.png"), 8)
    assert flat.classes == ["pictures"] and "all is one class, pictures" in capsys.readouterr().out
    assert Images(pack(tmp_path / "v1.0.zip", "1.png"), 8).classes == ["v1.0"]


def test_labels_of_a_dataset_json_are_not_folders(tmp_path):
    """As StyleGAN's and EDM2's tools write it: folders there are numbers of files, and mean no class."""
    dot(tmp_path / "data/00000/img00000000.png")
    (tmp_path / "data/dataset.json").write_text('{"labels": null}')
    with pytest.raises(InputError, match="holds labels in a dataset.json: give class folders"):
        Images(tmp_path / "data", 8)


def test_the_parent_of_splits_is_refused(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/3.png"):
        dot(tmp_path / "data" / name)
    with pytest.raises(InputError, match="holds train and val, which are no classes: give one of these"):
        Images(tmp_path / "data", 8)
    with pytest.raises(InputError, match="no classes"):
        Images(pack(tmp_path / "data.zip", "data/train/a/1.png", "data/test/2.png"), 8)
    assert Images(tmp_path / "data/train", 8).classes == ["a", "b"]
    dot(tmp_path / "vehicles/train/1.png")
    dot(tmp_path / "vehicles/test/1.png")
    assert Images(tmp_path / "vehicles", 8).classes == ["test", "train"]              # no folders in them: classes


def test_links(tmp_path):
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
    assert images.labels.tolist() == [0, 0, 1, 2, 2]
    assert images.paths == ["a/1.png", "a/far.png", "b/2.png", "c/3.png", "c/deep/4.png"]


def test_what_is_no_image_is_left_out_and_counted(tmp_path, capsys, monkeypatch):
    for name in ("a/1.png", "a/@eaDir/1.png/THUMB.png", "$RECYCLE.BIN/x.png", "lost+found/y.png", ".thumbnails/z.png",
                 "a/shots.png/2.png"):
        dot(tmp_path / name)
    for name in ("a/1.HEIC", "a/2.heic", "a/read me.txt", "a/nothing"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "a/pipe.png")
    images = Images(tmp_path, 8)
    assert (images.classes, images.paths) == (["a"], ["a/1.png", "a/shots.png/2.png"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("left out: 2 .heic", "1 .txt", "1 without a suffix"))
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("shots.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError):                      # which the command says in one line
        Images(tmp_path, 8)


def test_names_of_strange_bytes(tmp_path):
    for name in (b"ok.png", b"new\nline.png", b"latin\xe9.png"):
        dot(tmp_path / "strange/ok.png")
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"strange", name))).write_bytes(b"no image")
    dot(tmp_path / "strange/ok.png")
    program = "import model, encode_latents; model.command(encode_latents.main)"
    flags = ["--data-path", tmp_path / "strange", "--out", tmp_path / "out", "--encoder", TINY, *"--image-size 32 --encoder-size 32".split()]
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "latin\\udce9.png is no readable image" in done.stderr
    encode(tmp_path / "strange", tmp_path / "skipped", "--skip-bad")
    assert "latin\\udce9.png" in (tmp_path / "skipped/skipped.txt").read_text() and len(Latents(tmp_path / "skipped")) == 1


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")            # Pillow's word on what is broken on purpose
def test_metadata_never_stops_pixels():
    rgb = picture(24, 20)
    png = saved(Image.fromarray(rgb), "PNG")
    head, rest = png[:33], png[33:]                           # signature and IHDR; then the pixels
    long = zlib.compress(bytes(3_000_000))
    odd = {"text": chunk(b"zTXt", b"workflow\0\0" + long), "international": chunk(b"iTXt", b"prompt\0\1\0\0\0" + long),
           "profile": chunk(b"iCCP", b"p\0\0" + long), "exif": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff broken")}
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
    assert images.read([0])[0].shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match="script.png is no readable image .UnidentifiedImageError"):
        images.read([1])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000_000)
    with pytest.raises(InputError, match="DecompressionBomb"):
        images.read([0])


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------
def test_three_starts_at_once(data, encoded, tmp_path):
    """One works, two say so; nobody's hidden file is lost."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.important_tmp_backup").write_text("mine")
    program = """
import sys, time
import encode_latents, model
read = encode_latents.Images.pixels
encode_latents.Images.pixels = lambda self, i: time.sleep(0.4) or read(self, i)
model.command(lambda: encode_latents.main(sys.argv[1:]))
"""
    flags = ["--data-path", data, "--out", tmp_path / "out", "--encoder", TINY, "--image-size", "32", "--encoder-size", "32",
             "--batch-size", "3", "--shard-size", "8", "--workers", "0"]
    starts = [subprocess.Popen([sys.executable, "-c", program, *flags], cwd=SCRIPT.parent, stderr=subprocess.PIPE, text=True)
              for _ in range(3)]
    said = [start.communicate()[1] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 2, 2]
    assert sum("is written by another process (process" in text for text in said) == 2, said
    found = contents(tmp_path / "out")
    assert found.pop(".important_tmp_backup") == b"mine" and found.keys() == contents(encoded).keys()
    assert all(found[name] == content for name, content in contents(encoded).items() if name != "latents.json")


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{\"a\": "])
def test_broken_descriptions_are_one_line(copy, text):
    (copy / "latents.json").write_text(text)
    for read in (Latents, TrainingData, lambda folder: main(["--verify", "--out", str(folder)])):
        with pytest.raises(InputError, match="latents.json"):
            read(copy)


@pytest.mark.parametrize("flags", [("--batch-size", "0"), ("--encoder-size", "100000"), ("--image", "32")])
def test_ranges_at_the_parser(tmp_path, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--data-path", str(tmp_path), "--out", str(tmp_path / "out"), *flags])
    assert capsys.readouterr().err.count("\n") == 1 and not os.listdir(tmp_path)


def test_random_encoder_is_always_the_same_and_keeps_the_image(tmp_path):
    state = torch.get_rng_state()
    folder = encoder_folder("e", tmp_path, width=12, depth=1, heads=2, patch=4, seed=0)
    found = Encoder(folder, 32, 32).about["identity"]["sha256"]
    assert torch.equal(state, torch.get_rng_state()) and found == "6fe86f847ca191fb679e30e9e5b7b8fdb947e5d9d389fad980ca675da0f242f7"
    encoder = Encoder(encoder_folder("a", tmp_path, width=48, depth=2, heads=4, patch=4, seed=0), 32, 32)
    images = torch.stack([torch.from_numpy(picture(32, 32, seed)) for seed in range(60)]).permute(0, 3, 1, 2) / 255
    brightness = torch.linspace(0.2, 1, 60)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    images = (images * brightness[:, None, None, None]).requires_grad_()             # a LayerNorm would lose it
    z = encoder(images).flatten(2).transpose(1, 2)
    z.square().mean().backward()
    assert images.grad.abs().sum() > 0 and encoder.about["untrained"]
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2).detach()
    z = torch.cat([z, torch.ones(*z.shape[:2], 1)], dim=2).detach()
    linear = torch.linalg.lstsq(z[:40].flatten(0, 1), patches[:40].flatten(0, 1)).solution
    error = (z[40:] @ linear - patches[40:]).square().mean() / patches[40:].var()
    assert error < 0.01                                       # 0.0034; with the default initialization 0.068


def test_random_encoder_folder(tmp_path, capsys):
    folder = Path(encoder_folder("e", tmp_path))
    assert json.loads((folder / "config.json").read_text())["untrained"] is True
    before = (folder / "model.safetensors").stat().st_mtime_ns
    encoder_folder("e", tmp_path)
    assert "is there" in capsys.readouterr().out and (folder / "model.safetensors").stat().st_mtime_ns == before
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other/config.json").unlink()                 # weights of somebody's: not to be replaced
    with pytest.raises(InputError, match="something else"):
        encoder_folder("other", tmp_path, seed=4)
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


def test_errors_are_one_line_and_help_is_light(tmp_path):
    run = subprocess.run([sys.executable, SCRIPT, "--data-path", tmp_path / "none"], capture_output=True, text=True,
                         cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and not os.listdir(tmp_path)
    assert run.stderr.startswith(f"encode_latents.py: error: {tmp_path / 'none'} is no folder and no whole .zip")
    light = "import sys, encode_latents as e\ntry: e.main(['-h'])\nfinally: assert 'transformers' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert run.returncode == 0, run.stderr
    assert "facebook/dinov2-with-registers-base" in " ".join(run.stdout.split())
