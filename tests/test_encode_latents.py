"""encode_latents.py: images read and prepared as promised, the files it writes and their readers, the order of training."""
import argparse
import io
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import encode_latents
from encode_latents import Encoder, Images, Latents, TrainingData, adm_crop, batches_of, main, open_rgb
from model import InputError, read_json
from runs import let_go, run_on
from sanity import random_encoder

ENCODERS = Path(tempfile.mkdtemp())


def encoder_folder(name="tiny", folder=ENCODERS, **sizes):
    """A folder with a random encoder, made once."""
    sizes = dict(width=16, depth=1, heads=2, patch=8, seed=3) | sizes
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    random_encoder.main(["--out", str(folder / name), *flags])
    return str(folder / name)


TINY = encoder_folder()
FLAGS = ["--encoder", TINY, *"--image-size 32 --encoder-size 32 --batch-size 3 --shard-size 8 --workers 0".split()]


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


def dot(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9), "red").save(path, "PNG")


def encode(data, out, *more):
    main(["--data-path", str(data), "--out", str(out), *FLAGS, *more])
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


# ---- Images ----
def test_classes_of_folders(data, tmp_path):
    """Ids follow the names as text, as ImageNet's published ones do; no class folders are one class."""
    images = Images(data, 32)
    assert (images.classes, len(images)) == (["a", "b", "c"], 23)
    assert [images.paths[i] for i in (0, 7, 8, 22)] == ["a/00.png", "a/deep/er/03.png", "b/00.png", "c/05.png"]
    assert images.labels.tolist() == [0] * 8 + [1] * 9 + [2] * 6 and images.labels.dtype == torch.int64
    alone = Images(data / "c", 32)
    assert (alone.classes, alone.labels.tolist()) == (["images"], [0] * 6)
    (tmp_path / "none").mkdir()
    dot(tmp_path / "both/x/y.png")
    dot(tmp_path / "both/z.png")
    dot(tmp_path / "empty/a/1.png")
    (tmp_path / "empty/b").mkdir()
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        archive.write(data / "a/00.png", "a\\00.png")
    for name, complaint in (("nowhere", "is no folder"), ("none", "no images"), ("both", "z.png lies beside"),
                            ("empty", "b holds no images"), ("windows.zip", "names with backslashes")):
        with pytest.raises(InputError, match=complaint):
            Images(tmp_path / name, 8)


def test_adm_preparation():
    def reference(array, size):    # halvings by hand, where the sides are even
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
        halved = min(width, height) >= 2 * size    # Pillow rounds after each axis, in an order of its own
        assert np.abs(difference).max() <= 2 * halved, (width, height, size)
    assert adm_crop(Image.fromarray(picture(131, 67)), 16).shape == (16, 16, 3)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def odd_images():
    """{file name: (bytes, the RGB array a viewer shows, or None where the file must be refused)}."""
    rgb = picture(24, 20)
    image, grey = Image.fromarray(rgb), rgb[..., 0]
    alpha = np.tile(np.linspace(0, 255, 24).round().astype(np.uint8), (20, 1))
    deep = (rgb[..., 1].astype(np.uint16) << 8) + 77

    def three(x):
        return np.stack([x] * 3, -1)

    def decoded(data):
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    a, eight, palette = alpha[..., None] / 255, (deep / 257).round().astype(np.uint8), image.quantize(16)
    shown = np.asarray(palette.convert("RGB"))
    see_through = np.where((np.asarray(palette) == 3)[..., None], 255, shown)
    jpeg, cmyk = saved(image, "JPEG", quality=90), saved(image.convert("CMYK"), "JPEG", quality=95)
    second = Image.fromarray(255 - rgb).quantize(16)
    odd = {
        "upper.JPEG": (jpeg, decoded(jpeg)), "a png.jpg": (saved(image, "PNG"), rgb),
        "one bit.png": (saved(Image.fromarray(grey > 127), "PNG"), three(np.where(grey > 127, 255, 0))),
        "palette alpha.png": (saved(palette, "PNG", transparency=3), see_through),
        "rgba.tif": (saved(Image.fromarray(np.dstack([rgb, alpha])), "TIFF"), (rgb * a + 255 * (1 - a)).round()),
        "cmyk.jpg": (cmyk, decoded(cmyk)), "deep.png": (saved(Image.fromarray(deep), "PNG"), three(eight)),
        "deep.pgm": (b"P5 24 20 65535\n" + deep.astype(">u2").tobytes(), three(eight)),
        "moving.gif": (saved(palette, "GIF", save_all=True, append_images=[second]), shown)}
    png = saved(image, "PNG")
    for kind, body in (b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))), (b"eXIf", b"II*\0\xff\xff\xff\xff broken"):
        odd[f"{kind}.png"] = png[:33] + chunk(kind, body) + png[33:], rgb    # after signature and IHDR
    for orientation, turn in {3: lambda x: x[::-1, ::-1], 6: lambda x: x.transpose(1, 0, 2)[:, ::-1]}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        odd[f"exif {orientation}.jpg"] = saved(image, "JPEG", quality=90, exif=exif), turn(decoded(jpeg))
    broken = {
        "text.jpg": b"<html>404</html>", "cut.jpg": jpeg[:len(jpeg) // 2],
        "float.tif": saved(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "strip.png": saved(Image.new("RGB", (2020, 20)), "PNG"),
        "32 bits.tif": saved(Image.fromarray(grey.astype(np.int32) << 20), "TIFF"),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"}
    return odd | {name: (data, None) for name, data in broken.items()}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_odd_and_broken_images(tmp_path):
    odd = odd_images()
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
        assert np.abs(np.asarray(image).astype(int) - odd[name][1]).max() <= ("rgba" in name or "alpha" in name), name
        assert np.array_equal(images.pixels(i), adm_crop(image, 16)), name


# ---- Latents on disk ----
def test_latents_and_their_order(data, encoded):
    latents, images, encoder = Latents(encoded), Images(data, 32), Encoder(TINY, 32, 32)
    assert (latents.shape, len(latents), latents.classes) == ((16, 4, 4), 23, ["a", "b", "c"])
    order = [22, 0, 8, 7, 15, 16, 3, 3]
    z, y = latents.read(order)
    x, labels = images.read(order)
    assert z.dtype == torch.float16 and y.dtype == torch.int64 and torch.equal(y, labels)
    assert (z - encoder(x)).abs().max() < 2e-3    # float16 rounding of values up to 3
    about = read_json(encoded / "latents.json")
    assert about["shape"] == [16, 4, 4] and about["shards"] == 3 and about["data"] == data.name
    assert about["encoder"] == encoder.about and str(data) not in (encoded / "latents.json").read_text()
    assert about["identity"] == {"images": images.sha256, "flips": False, "shard_size": 8, **encoder.about["identity"]}
    assert sorted(contents(encoded)) == ["latent_stats.safetensors", "latents.json", *(f"shard_0000{k}.safetensors" for k in range(3))]
    z = latents.read(range(23))[0].numpy().astype(np.float64)    # statistics are of the rounded latents
    assert latents.stats["mean"].dtype == torch.float64
    np.testing.assert_allclose(latents.stats["mean"], z.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(latents.stats["var"], z.var(0), rtol=1e-11)


def test_going_on_gives_the_same_files(data, encoded, copy, monkeypatch, capsys):
    """What is there is not encoded again; what a killed process left is written over."""
    (copy / "latent_stats.safetensors").unlink()
    (copy / "shard_00001.safetensors").unlink()
    (copy / ".shard_00001.safetensors.tmp").write_bytes(b"of a killed process")
    seen = []
    monkeypatch.setattr(Images, "pixels", lambda self, i, pixels=Images.pixels: (seen.append(i), pixels(self, i))[1])
    encode(data, copy)
    assert seen == list(range(8, 16)) and contents(copy) == contents(encoded)
    assert "2 of 3 shards are there" in capsys.readouterr().out
    encode(data, copy)
    assert seen == list(range(8, 16)) and contents(copy) == contents(encoded)
    whole = bytearray((copy / "shard_00002.safetensors").read_bytes())    # what was there is read back
    whole[-1] ^= 8
    (copy / "shard_00002.safetensors").write_bytes(whole)
    with pytest.raises(InputError, match="shard_00002.safetensors is damaged"):
        encode(data, copy)
    let_go()


def test_the_reader_refuses_cut_and_unfinished_folders(data, copy, tmp_path):
    path, other = copy / "shard_00001.safetensors", encode(data, tmp_path / "other", "--encoder", encoder_folder("other", seed=4))
    whole = path.read_bytes()
    for content in (whole[:-1], b"", (other / path.name).read_bytes()):
        path.write_bytes(content)
        for read in (Latents, TrainingData, lambda copy: encode(data, copy)):
            with pytest.raises(InputError, match="shard_00001"):
                read(copy)
            let_go()
    path.write_bytes(whole)
    (copy / "latents.json").write_text('{"a": ')
    with pytest.raises(InputError, match="latents.json"):
        Latents(copy)
    (copy / "latent_stats.safetensors").unlink()
    with pytest.raises(InputError, match="no finished latents in .*copy: encode_latents.py --out"):
        Latents(copy)


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
    broken = shutil.copytree(data, tmp_path / "broken")
    (broken / "a/02.png").write_bytes(b"")
    with pytest.raises(InputError, match="a/02.png is no readable image"):
        encode(broken, tmp_path / "out")


@pytest.mark.parametrize("name, value", [("num_attention_heads", 4), ("layer_norm_eps", 1e-2), ("hidden_act", "relu")])
def test_an_encoder_is_its_config_too(data, copy, tmp_path, name, value):
    """Which changes the latents, and not the weights."""
    other = shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(InputError, match=f"holds other work .{name}: "):
        encode(data, copy, "--encoder", str(other))


def test_zip_is_folder(data, encoded, tmp_path):
    """But for its images, which are known by their contents, not by name."""
    for top in ("", "train/"):
        with zipfile.ZipFile(tmp_path / f"{data.name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in reversed(sorted(data.rglob("*"))):
                archive.write(path, top + path.relative_to(data).as_posix())
            archive.writestr(f"__MACOSX/{top}a/", b"")
        out = encode(tmp_path / f"{data.name}.zip", tmp_path / f"out{len(top)}", "--workers", "2")
        for a, b in zip(Latents(out).read(range(23)), Latents(encoded).read(range(23)), strict=True):
            assert torch.equal(a, b)
    copied = shutil.copytree(data, tmp_path / "data")
    Image.fromarray(picture(40, 36, 99)).save(copied / "a/00.png")
    shutil.make_archive(tmp_path / "other", "zip", copied)
    with pytest.raises(InputError, match="holds other work .images"):
        encode(tmp_path / "other.zip", out)
    (tmp_path / "cut.zip").write_bytes((tmp_path / "other.zip").read_bytes()[:-40])
    with pytest.raises(InputError, match="cut.zip is no folder and no whole .zip"):
        Images(tmp_path / "cut.zip", 8)


def test_two_processes_write_what_one_writes(data, encoded, tmp_path):
    run_on(2, main, ["--data-path", str(data), "--out", str(tmp_path / "out"), *FLAGS, "--workers", "1"])
    assert contents(tmp_path / "out") == contents(encoded)


# ---- The order in which training sees it ----
def test_rows_do_not_depend_on_splitting_or_going_on():
    whole = list(batches_of(10, 5, 8, [(0, 8)], 0, 7))
    assert all(len(rows) == 8 for rows in whole)
    flat = [i for rows in whole for i in rows]
    epochs = [flat[start:start + 10] for start in range(0, 50, 10)]    # batches straddle epochs
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 5
    assert list(batches_of(10, 5, 8, [(0, 8)], 3, 7)) == whole[3:]
    first, second = (batches_of(10, 5, 8, rows, 2, 7) for rows in ([(0, 2), (2, 4)], [(4, 6), (6, 8)]))
    assert [next(first) + next(first) + next(second) + next(second) for _ in range(5)] == whole[2:]
    assert list(batches_of(10, 6, 8, [(0, 8)], 0, 7)) != whole
    assert [len(set(rows)) for rows in batches_of(3, 0, 8, [(0, 8)], 0, 2)] == [3, 3]    # a batch of several epochs


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
    for path in copy.glob("shard_*"):    # the shards are not needed
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


def test_shards_made_again(data, copy, monkeypatch):
    """While they are, the folder is not finished."""
    (copy / "shard_00001.safetensors").unlink()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(encode_latents, "finish", lambda *_: 1 / 0)
        encode(data, copy)
    let_go()
    with pytest.raises(InputError, match="no finished latents"):
        Latents(copy)


def test_identity_is_by_content(data, encoded, copy, tmp_path):
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert TrainingData(moved).sha256 == TrainingData(encoded).sha256
    images, network = shutil.copytree(data, tmp_path / "elsewhere"), shutil.copytree(TINY, tmp_path / "network")
    encode(images, moved, "--encoder", str(network))    # the same images and encoder elsewhere: it goes on
    assert TrainingData(moved).sha256 == TrainingData(encoded).sha256
    assert TrainingData(moved, images).sha256 == TrainingData(copy, data).sha256


# ---- Anybody's pictures ----
def test_links_and_what_is_left_out(tmp_path, capsys):
    data, store = tmp_path / "data", tmp_path / "store"
    for name in ("a/1.png", "a/@eaDir/1.png/THUMB.png", "b/2.png", "$RECYCLE.BIN/x.png", ".thumbnails/z.png", "b/shots.png/3.png"):
        dot(data / name)
    dot(store / "deep/4.png")
    (store / "round").symlink_to(store)
    (data / "a/loop").symlink_to("..")
    (data / "b/gone.png").symlink_to("nowhere.png")
    (data / "a/far.png").symlink_to(store / "deep/4.png")
    (data / "c").symlink_to(store)
    for name in ("1.HEIC", "2.heic", "3.heic", "read me.txt"):
        (data / "a" / name).write_text("")
    os.mkfifo(data / "a/pipe.png")
    dot(data / "latents/0.png")
    (data / "latents/latents.json").touch()
    images = Images(data, 8)
    assert images.paths == ["a/1.png", "a/far.png", "b/2.png", "b/shots.png/3.png", "c/deep/4.png"]
    assert images.labels.tolist() == [0, 0, 1, 1, 2] and "left out: 3 .heic, 2 .png (no file), 1 .txt" in capsys.readouterr().out


# ---- The command ----
def test_random_encoder_is_always_the_same(tmp_path):
    state = torch.get_rng_state()
    encoder = Encoder(encoder_folder("e", tmp_path, width=12, depth=1, heads=2, patch=4, seed=0), 32, 32)
    assert torch.equal(state, torch.get_rng_state()) and encoder.about["untrained"]
    assert encoder.about["identity"]["sha256"] == "6fe86f847ca191fb679e30e9e5b7b8fdb947e5d9d389fad980ca675da0f242f7"
