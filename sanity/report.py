"""The sanity run's report: distances and accuracies, what must hold and whether it does, and one picture.

    python sanity/report.py --run runs/sanity --data data/digits   # -> report.md, report.json, picture.png

Frechet distances to held-out images: of the latents' encoder, and of the third block of a classifier that is
fitted here to the training images. Its last block does not judge: it knows little but the class.
"""
import sys
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
    ArgumentParser, InputError, command, launch, load_decoder, lock, provenance, read_log, say, whole,
    write_atomically, write_json)
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


def fit_classifier(images, steps, seed, device):
    """A Classifier fitted to all of `images`, an Images."""
    torch.manual_seed(seed)
    net, (x, y) = Classifier(len(images.classes)).to(device), images.read(range(len(images)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for rows in batches_of(len(x), seed, 128, [(0, 128)], 0, steps):
        F.cross_entropy(net(x[rows].to(device))[-1], y[rows].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return net.eval()


def read_samples(path, size, classes):
    """A file of sample.py's -> uint8 (N, 3, S, S), labels (N,), which must be i mod `classes`."""
    images = NpzImages(path)
    labels = torch.arange(len(images)) % classes
    if images.image_size != size or not np.array_equal(np.load(path)["arr_1"], labels):
        raise InputError(f"{path} has images of {images.image_size} px: wanted are {size} px, and image i of "
                         f"class i mod {classes}, as sample.py draws without --labels")
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


def judge(rows):
    """What must hold, as far as there are rows, and whether it does."""
    fewest = min(row["count"] for row in rows.values())
    checks = [("images >= 5000", str(fewest), fewest >= 5000)]
    for kind, name, relation, c, sign, other in CHECKS:
        for column in ("encoder", "classifier") if kind == "distance" else (kind,):
            if {name, other} <= {*rows, ""}:
                a, b = (rows[row][column] if row else 0 for row in (name, other))
                b = c * b if sign == "x" else c + b
                checks.append((f"{column}: {name} {relation} {c} {sign} {other}".rstrip(),
                               f"{a:.4g}, {b:.4g}", a >= b if relation == ">=" else a <= b))
    return [dict(zip(("statement", "figures", "holds"), check, strict=True)) for check in checks]


def draw_picture(path, columns, names):
    """PNG: a row for each of `names`, a column for each {title: uint8 (rows, 3, S, S)}."""
    cell, font = 96, ImageFont.load_default(14)
    left = int(max(map(font.getlength, names))) + 12
    x, y = (range(start, 10 ** 6, cell + 4) for start in (left, 26))
    picture = Image.new("RGB", (x[len(columns)], y[len(names)]), "white")
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        pen.text((left - 6, y[row] + cell / 2), name, "black", font, "rm")
    for column, (title, images) in enumerate(columns.items()):
        narrow = ImageFont.load_default(14 * min(1, cell / font.getlength(title)))
        pen.text((x[column] + cell / 2, 13), title, "black", narrow, "mm")
        for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            enlarged = Image.fromarray(image).resize((cell, cell), Image.Resampling.LANCZOS)
            picture.paste(enlarged, (x[column], y[row]))
    write_atomically(path, lambda file: picture.save(file, "PNG"))


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
    add("--samples", nargs="+", metavar="NAME=FILE", help=f"(default: in --run, {', '.join(COLUMNS)})")
    add("--classifier-steps", type=whole(), default=200, help="of the optimizer, 128 images each")
    add("--seed", type=whole(0), default=0, help="of the classifier")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run, data = Path(args.run), Path(args.data)
    device, *_ = launch()
    torch.backends.cudnn.allow_tf32 = False       # features in true float32
    encoder = encoder_of(args.latents or run / "latents").to(device)
    decoder = load_decoder(args.decoder or run / "decoder")[0].to(device).eval()
    size = encoder.about["identity"]["image_size"]
    train = Images(data / "train" if (data / "train").is_dir() else data, size)
    held_out, classes = Images(args.held_out or data / "held-out", size), train.classes
    if classes != held_out.classes or decoder.shape != encoder.shape:
        raise InputError(f"{train.path} and {held_out.path}, or encoder and decoder, do not fit each other: "
                         "give images of the same classes, and the encoder's decoder")
    lock(run / ".lock")
    # The last "=" is the one: names such as "w = 2" have others.
    files = dict(text.rpartition("=")[::2] for text in args.samples or [
        f"{name}={run}/samples/{name.lower().replace(' ', '_')}.npz" for name in COLUMNS])
    samples = {name: read_samples(path, size, len(classes)) for name, path in files.items()}

    real, y = held_out.read(range(len(held_out)))
    first = [y.tolist().index(k) for k in range(len(classes))][:16]
    # Of every class
    spaced = np.linspace(0, len(train) - 1, min(len(held_out), len(train))).round().astype(int)
    other, labels = train.read(spaced.tolist())
    net = fit_classifier(train, args.classifier_steps, args.seed, device)
    reference, of_held_out = measure(real, y, encoder, net, device)
    sets = {"real": (other, labels), "decoded real": (decode(other, encoder, decoder, device), labels)}
    rows, teacher = {}, samples.get("teacher 50")
    for name, (images, y) in {**sets, **samples}.items():
        moments, accuracy = measure(images, y, encoder, net, device)
        trained = read_log(run / ("decoder" if name == "decoded real" else name.split(" ")[0].lower()))
        rows[name] = {
            "nfe": read_about(files[name])["nfe"] if name in files else None,
            **{space: distance(m, reference[space]) for space, m in moments.items()},
            "accuracy": of_held_out if name == "real" else accuracy,
            "likeness": likeness(images, teacher[0], len(classes)) if teacher and name in files else None,
            "count": len(images), "training_seconds": trained[-1]["seconds"] if trained else None}

    shown = {"real": real[first], "decoded real": decode(real[first], encoder, decoder, device)}
    shown |= {name: images[:len(first)] for name, (images, _) in samples.items()}
    draw_picture(run / "picture.png", shown, classes[:16])
    result = {"encoder": encoder.about, "settings": vars(args), "provenance": provenance(), "rows": rows,
              "checks": judge(rows)}
    write_json(run / "report.json", result)
    write_report(run / "report.md", result)


if __name__ == "__main__":
    command(main)
