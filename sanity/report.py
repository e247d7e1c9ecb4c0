"""The sanity run's report: distances and accuracies, what must hold and whether it does, and one picture.

    python sanity/report.py --run runs/sanity --data data/digits   # -> report.md, report.json, picture.png

Frechet distances to held-out images: of the latents' encoder, and of the third block of a classifier that is
fitted here to the training images. Its last block does not judge: it knows little but the class.
"""
import hashlib
import io
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images, batches_of, encoder_of  # noqa: E402
from eval_fid import Moments, NpzImages, frechet_distance  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser, InputError, command, launch, load_decoder, lock, provenance, read_json, read_log,
    read_tensors, say, whole, write_atomically, write_json, write_tensors)
from sample import read_about, to_uint8  # noqa: E402

COLUMNS = ("teacher 50", "teacher 1", "CMT 1", "MFD 1", "MFD 2", "MFT 1")
BATCH = 250
CHECKS = (   # what must hold, of a row alone or by another's; the first: the classifier can judge
    ("accuracy", "real", ">=", 0.98, "", ""),
    ("distance", "MFD 1", "<=", 1.2, "x", "teacher 50"),
    ("accuracy", "MFD 1", ">=", 0.9, "", ""),
    ("accuracy", "MFD 1", ">=", -0.02, "+", "teacher 50"),
    ("distance", "teacher 1", ">=", 5, "x", "teacher 50"),
    ("distance", "teacher 1", ">=", 5, "x", "MFD 1"),
    ("distance", "teacher 1", ">=", 1, "x", "CMT 1"),
    ("distance", "CMT 1", ">=", 2, "x", "MFD 1"))


class Classifier(nn.Module):
    """uint8 (B, 3, S, S) -> features of the third block and of the fourth, the last, (B, 128); logits."""

    def __init__(self, classes):
        super().__init__()
        layers = [nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        for before, width in ((32, 64), (64, 128), (128, 128)):
            conv = nn.Conv2d(before, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
        self.trunk, self.last = nn.Sequential(*layers[:10]), nn.Sequential(*layers[10:-1])
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = self.trunk(images.float() / 127.5 - 1)
        last = self.last(x).mean((2, 3))
        return x.mean((2, 3)), last, self.head(last)


def fit(net, images, labels, steps, seed, device):
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for rows in batches_of(len(images), seed, 128, [(0, 128)], 0, steps):
        F.cross_entropy(net(images[rows].to(device))[-1], labels[rows].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def classifier(path, train, sample, steps, seed, device):
    """The one kept at `path`, if fitted to images of these names and pixels; else made."""
    key = hashlib.sha256(json.dumps([train.classes, train.paths, train.image_size, steps, seed]).encode())
    key.update(sample.numpy())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(len(train.classes)).to(device)
    if path.exists() and read_tensors(path)[1] == {"key": key.hexdigest()}:
        net.load_state_dict(read_tensors(path)[0][""])
    else:
        fit(net, *read(train, range(len(train))), steps, seed, device)
        write_tensors(path, {"": net.state_dict()}, {"key": key.hexdigest()})
    return net.eval()


def read(images, indices):
    """-> uint8 (N, 3, S, S), labels (N,)"""
    return images.read(list(indices))


def read_samples(path, size, classes, nfe=None):
    """A file of sample.py's -> uint8 (N, 3, S, S), labels (N,), which must be i mod `classes`."""
    images, made = NpzImages(path), read_about(path)["nfe"]
    labels = torch.arange(len(images)) % classes
    if (images.image_size, made) != (size, nfe or made) or not np.array_equal(np.load(path)["arr_1"], labels):
        raise InputError(f"{path}, {images.image_size} px, --nfe {made}: wanted are {size} px, {nfe or made} "
                         f"evaluations, image i of class i mod {classes}")
    return images.read(range(len(images)))[0], labels


@torch.no_grad()
def measure(images, labels, encoder, net, device):
    """-> {space: Moments} of features averaged over positions; the classifier's accuracy."""
    moments, hits = {space: Moments() for space in ("encoder", "classifier", "last_block")}, 0
    for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        x = x.to(device)
        *features, logits = net(x)
        for m, values in zip(moments.values(), (encoder(x).mean((2, 3)), *features), strict=True):
            m.update(values)
        hits += (logits.argmax(1).cpu() == y).sum().item()
    return moments, hits / len(labels)


def distance(a, b):
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


@torch.no_grad()
def decode(images, encoder, decoder, device):
    """uint8 images through encoder and decoder, the latents in float16 as they are on disk."""
    parts = [to_uint8(decoder(encoder(x.to(device)).half().float())).cpu() for x in images.split(BATCH)]
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()


def likeness(images, teacher, classes):
    n = min(len(images), len(teacher))
    x, t = images[:n].float(), teacher[:n].float()
    same, other = ((x - y).square().mean().item() for y in (t, t.roll(classes, 0)))
    return same / other if other else 0.0


def judge(rows, held_out_count):
    """What must hold, as far as there are rows, and whether it does."""
    fewest = min(held_out_count, *(row["count"] for row in rows.values()))
    checks = [("images >= 5000", str(fewest), fewest >= 5000)]
    for kind, name, relation, c, sign, other in CHECKS:
        for column in ("encoder", "classifier") if kind == "distance" else (kind,):
            if {name, other} <= {*rows, ""}:
                a, b = (rows[row][column] if row else 0 for row in (name, other))
                b = c * b if sign == "x" else c + b
                checks.append((f"{column}: {name} {relation} {c} {sign} {other}".rstrip(),
                               f"{a:.4g}, {b:.4g}", a >= b if relation == ">=" else a <= b))
    return [dict(zip(("statement", "figures", "holds"), check, strict=True)) for check in checks]


def read_seconds(run):
    """{stage: seconds} by seconds.txt; of a training that was interrupted, what its log has counted."""
    path, seconds = run / "seconds.txt", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, n = line.rpartition(" ")
        seconds[name] = max([float(n), *(row["seconds"] for row in read_log(run / name.lower())[-1:])])
    return seconds


def draw_picture(path, columns, names):
    """PNG below 1 MB: a row for each of `names`, a column for each {title: uint8 (rows, 3, S, S)}."""
    size = next(iter(columns.values())).shape[2]
    cell, font = size * (96 // size) if size <= 96 else 96, ImageFont.load_default(14)
    left = int(max(map(font.getlength, names))) + 12
    titles = [title.replace(", ", ",\n") for title in columns]             # arms have long names
    top = 26 + 17 * max(title.count("\n") for title in titles)
    x, y = (range(start, 10 ** 6, cell + 4) for start in (left, top))
    picture = Image.new("RGB", (x[len(columns)], y[len(names)]), "white")
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        pen.text((left - 6, y[row] + cell / 2), name, "black", font, "rm")
    for column, title in enumerate(titles):
        narrow = ImageFont.load_default(14 * min(1, cell / max(map(font.getlength, title.split("\n")))))
        pen.text((x[column] + cell / 2, top / 2), title, "black", narrow, "mm", align="center")
    # Of photographs, smoothly enlarged, too many bytes: then as squares, then with a palette.
    smooth, squares = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
    for resampling, colours in ((smooth, 0), (squares, 0), (smooth, 256)):
        for column, images in enumerate(columns.values()):
            for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
                picture.paste(Image.fromarray(image).resize((cell, cell), resampling), (x[column], y[row]))
        file = io.BytesIO()
        (picture.quantize(colours) if colours else picture).save(file, "PNG")
        if file.tell() < 1_000_000:
            break
    write_atomically(path, lambda out: out.write(file.getvalue()))


def write_report(path, result):
    """report.md, of what is in report.json."""
    def table(rows):
        cells = [[f"{x:.4g}" if isinstance(x, float) else "" if x is None else str(x) for x in row.values()]
                 for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [[*rows[0]], ["---"] * len(rows[0]), *cells])
    made, failed = result["provenance"], sum(not check["holds"] for check in result["checks"])
    text = "\n\n".join([
        f"# A run with {'a RANDOM' if result['encoder']['untrained'] else 'a trained'} encoder",
        "No figure here can stand beside a published FID; docs/RESULTS.md says what the columns are.",
        "![picture](picture.png)", table([{"": name, **row} for name, row in result["rows"].items()]),
        table(result["checks"]), f"**{failed} do not hold.**" if failed else "All of it holds.",
        f"`{made['command']}`, {made['date']}, {made['device']}, commit {made['commit']}\n"])
    write_atomically(path, lambda file: file.write(text.encode()))
    say(text)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", default="runs/sanity", help="folder of the run, to write to")
    add("--data", default="data/digits", help="training images; or a folder of `train` and `held-out`")
    add("--held-out", help="images that no stage has seen (default: in --data)")
    add("--latents", help="to know their encoder (default: in --run)")
    add("--decoder", help="(default: in --run)")
    add("--samples", nargs="+", metavar="NAME=FILE:NFE", help=f"(default: in --run, {', '.join(COLUMNS)})")
    add("--classifier-steps", type=whole(), default=200, help="of the optimizer, 128 images each")
    add("--seed", type=whole(0), default=0, help="of the classifier")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run, data, folder = Path(args.run), Path(args.data), args.latents or f"{args.run}/latents"
    lock(run / ".lock")
    device, *_ = launch()
    torch.backends.cudnn.allow_tf32 = False       # features in true float32
    encoder, about = encoder_of(folder).to(device), read_json(f"{folder}/latents.json")
    decoder = load_decoder(args.decoder or run / "decoder")[0].to(device).eval()
    size = encoder.about["identity"]["image_size"]
    train = Images(data / "train" if (data / "train").is_dir() else data, size)
    held_out, classes = Images(args.held_out or data / "held-out", size), train.classes
    if not classes == held_out.classes == about["classes"] or decoder.shape != encoder.shape:
        raise InputError(f"{train.path}, {held_out.path}, {folder}, decoder: other classes, or other latents")
    files = args.samples or [
        f"{name}={run}/samples/{name.lower().replace(' ', '_')}.npz:{name.split()[1]}" for name in COLUMNS]
    samples, nfe, seeds = {}, {}, set()
    for text in files:
        found = re.fullmatch("(.+)=([^=]+):([0-9]+)", text)
        if not found or found[1] in nfe:
            raise InputError(f"--samples {text}: it must be NAME=FILE:NFE, and every NAME once")
        name, path, nfe[name] = found[1], found[2], int(found[3])
        samples[name] = read_samples(path, size, len(classes), nfe[name])
        seeds.add(read_about(path)["seed"])
    if len(seeds) > 1:
        raise InputError(f"samples of seeds {seeds}: give files of one, of the same noise")

    real, y = held_out.read(range(len(held_out)))
    first = [y.tolist().index(k) for k in range(len(classes))][:16]
    # Of every class
    spaced = np.linspace(0, len(train) - 1, min(len(held_out), len(train))).round().astype(int)
    other, labels = train.read(spaced.tolist())
    net = classifier(run / "classifier.safetensors", train, other, args.classifier_steps, args.seed, device)
    reference, of_held_out = measure(real, y, encoder, net, device)
    sets = {"real": (other, labels), "decoded real": (decode(other, encoder, decoder, device), labels)}
    seconds, rows, teacher = read_seconds(run), {}, samples.get("teacher 50")
    for name, (images, y) in {**sets, **samples}.items():
        moments, accuracy = measure(images, y, encoder, net, device)
        rows[name] = {
            "nfe": nfe.get(name), **{space: distance(m, reference[space]) for space, m in moments.items()},
            "accuracy": of_held_out if name == "real" else accuracy,
            "likeness": likeness(images, teacher[0], len(classes)) if teacher and name in nfe else None,
            "count": len(images), "sampling_seconds": seconds.get(f"sample {name}"),
            "training_seconds": seconds.get("decoder" if name == "decoded real" else name.split()[0])}

    shown = {"real": real[first], "decoded real": decode(real[first], encoder, decoder, device)}
    shown |= {name: images[:len(first)] for name, (images, _) in samples.items()}
    draw_picture(run / "picture.png", shown, classes[:16])
    result = {"encoder": about["encoder"], "train": {"name": train.path.name, "count": len(train)},
              "settings": vars(args), "provenance": {
                  **provenance(), **{name: version(name) for name in ("numpy", "pillow", "transformers")}},
              "held_out": {"name": held_out.path.name, "count": len(real), "accuracy": of_held_out},
              "rows": rows, "seconds": seconds, "checks": judge(rows, len(real))}
    write_json(run / "report.json", result)
    write_report(run / "report.md", result)


if __name__ == "__main__":
    command(main)
