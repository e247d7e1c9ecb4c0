"""The sanity run's report: distances and accuracies, what must hold and whether it does, and one picture.

    python sanity/report.py --run runs/sanity --data data/digits   # -> report.md, report.json, picture.png
    python sanity/report.py --run runs/cifar --data cifar/train.zip --held-out cifar/held-out.zip --samples \\
        "teacher 50=samples/teacher_50.npz:50" "MFD 1=samples/mfd_1.npz:1"      # name=file:nfe, one or more

Frechet distances to held-out real images in two feature spaces: the latents' encoder, its tokens averaged
over the grid; and the third of the four blocks of a small convolutional classifier, averaged likewise,
which is fitted here to the real training images and kept in --run. The distance in its last block is given
too, but not judged by: there a fitted classifier has little left but the class, so that it sees neither
colour nor sharpness and likes what is average (docs/RESULTS.md has the figures). Class accuracy is that
classifier's. Sample files are sample.py's: image i of each has the same noise, and the label i mod K.
"""

import hashlib
import io
import json
import sys
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from torch import nn  # noqa: E402

from encode_latents import Images, Latents, batches_of, encoder_of  # noqa: E402
from eval_fid import Moments, complaint, frechet_distance  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser,
    InputError,
    command,
    load_decoder,
    lock,
    provenance,
    read_log,
    read_tensors,
    say,
    whole,
    write_atomically,
    write_json,
    write_tensors,
)
from sample import read_about, to_uint8  # noqa: E402

COLUMNS = ("teacher 50", "teacher 1", "CMT 1", "MFD 1", "MFD 2", "MFT 1")
BATCH = 250


# ---- The classifier: a judge that has nothing to do with the encoder -------------------------------------
class Classifier(nn.Module):
    """uint8 images (B, 3, S, S) -> features of the third block (B, 128), of the fourth and last, (B, 128),
    and logits."""

    def __init__(self, classes):
        super().__init__()
        layers = [nn.Conv2d(3, 32, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        for before, width in ((32, 64), (64, 128), (128, 128)):
            layers += [
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk, self.last = nn.Sequential(*layers[:10]), nn.Sequential(*layers[10:-1])
        self.head = nn.Linear(128, classes)

    def forward(self, images):
        x = self.trunk(images.float() / 127.5 - 1)
        last = self.last(x).mean((2, 3))
        return x.mean((2, 3)), last, self.head(last)


def fit(images, labels, classes, steps, seed, device):
    """A classifier fitted to real images: AdamW on the cross entropy, batches of 128."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(classes).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    start = time.time()
    for step, rows in enumerate(batches_of(len(images), seed, 128, [(0, 128)], 0, steps), 1):
        loss = F.cross_entropy(net(images[rows].to(device))[-1], labels[rows].to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 4) == 0:
            say(f"classifier: step {step} of {steps}, loss {loss:.3f}; {time.time() - start:.0f} s")
    return net.eval()


def classifier(path, train, sample, steps, seed, device):
    """The classifier kept at `path`, if fitted to these images with these settings; otherwise fitted now
    and kept.

    The images are known by their names and by the pixels of `sample`, some of them, read already."""
    key = hashlib.sha256(json.dumps([train.classes, train.paths, train.image_size, steps, seed]).encode())
    key.update(sample.numpy())
    net = Classifier(len(train.classes))
    if path.exists():
        parts, about, _ = read_tensors(path)
        if about == {"key": key.hexdigest()}:
            net.load_state_dict(parts[""])
            say(f"classifier: {path}, fitted before")
            return net.to(device).eval()
    net = fit(*read(train, range(len(train))), len(train.classes), steps, seed, device)
    write_tensors(path, {"": net.state_dict()}, {"key": key.hexdigest()})
    return net


# ---- Images in, numbers out ------------------------------------------------------------------------------
def read(images, indices):
    """-> uint8 (N, 3, S, S), labels (N,)"""
    parts = [images.read(list(indices[i : i + BATCH])) for i in range(0, len(indices), BATCH)]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def read_samples(path, size, classes):
    """A sample file -> uint8 (N, 3, S, S), labels (N,), which must be i mod `classes`."""
    if not Path(path).exists():
        raise InputError(
            f"{path} does not exist: sample.py --out {path} makes it; or name other files with --samples"
        )
    with (
        complaint(f"{path} is not a readable sample file", "make it again with sample.py"),
        np.load(path) as file,
    ):
        images, labels = file["arr_0"], torch.from_numpy(file["arr_1"])
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, 3) or len(images) != len(labels):
        raise InputError(
            f"{path} holds {images.dtype} images {images.shape}, needed are uint8 (N, {size}, {size}, 3)"
        )
    if len(images) < classes or not torch.equal(labels, torch.arange(len(labels)) % classes):
        raise InputError(
            f"{path}: image i must have label i mod {classes}, every class be there: sample.py's default"
        )
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


@torch.no_grad()
def measure(images, labels, encoder, net, device):
    """-> {space: Moments}: the encoder's pooled tokens, two of the classifier's blocks; and the
    classifier's accuracy."""
    moments, hits = {"encoder": Moments(), "classifier": Moments(), "last_block": Moments()}, 0
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
    """Images through encoder and decoder, the latents rounded to float16 as they are on disk: uint8 like
    `images`."""
    parts = [to_uint8(decoder(encoder(x.to(device)).half().float())).cpu() for x in images.split(BATCH)]
    return torch.cat(parts).permute(0, 3, 1, 2).contiguous()


def likeness(images, teacher, classes):
    """How far images are from the teacher's of the same noise, in units of how far they are from its images
    of the same class and other noise, in mean squared pixel error: 0 is the same picture, 1 an unrelated
    one."""
    n = min(len(images), len(teacher))
    x, t = images[:n].float(), teacher[:n].float()
    other = (x - t.roll(classes, 0)).square().mean().item()
    return (x - t).square().mean().item() / other if other else 0.0


def judge(rows, held_out_accuracy, held_out_count):
    """What must hold (the sanity run's aims), as far as there are rows: [(statement, figures, whether it
    holds)]."""
    fewest = min(held_out_count, *(row["count"] for row in rows.values()))
    lines = [
        ("at least 5,000 images behind every distance, on both sides", f"fewest {fewest:,}", fewest >= 5000),
        (
            "the classifier can judge: accuracy on held-out real images at least 0.98",
            f"{held_out_accuracy:.4f}",
            held_out_accuracy >= 0.98,
        ),
    ]

    def compare(statement, name, other, holds):
        if name in rows and other in rows:
            for space in ("encoder", "classifier"):
                a, b = rows[name][space], rows[other][space]
                lines.append((f"{statement}, {space} features", f"{a:.3g} against {b:.3g}", holds(a, b)))

    compare(
        "MFD in 1 step at most 1.2 times the teacher in 50", "MFD 1", "teacher 50", lambda a, b: a <= 1.2 * b
    )
    if "MFD 1" in rows:
        accuracy = rows["MFD 1"]["accuracy"]
        lines.append(("class accuracy of MFD in 1 step at least 0.90", f"{accuracy:.4f}", accuracy >= 0.90))
        if "teacher 50" in rows:
            teacher = rows["teacher 50"]["accuracy"]
            lines.append(
                (
                    "... and at most 2 points below the teacher's in 50",
                    f"{accuracy:.4f} against {teacher:.4f}",
                    accuracy >= teacher - 0.02,
                )
            )
    for other in ("teacher 50", "MFD 1"):
        compare(
            f"teacher in 1 step far worse (5 times) than {other}", "teacher 1", other, lambda a, b: a >= 5 * b
        )
    compare("teacher in 1 step worse than CMT in 1 step", "teacher 1", "CMT 1", lambda a, b: a > b)
    compare("CMT in 1 step clearly worse (2 times) than MFD in 1", "CMT 1", "MFD 1", lambda a, b: a >= 2 * b)
    return lines


# ---- The report ------------------------------------------------------------------------------------------
def read_seconds(run):
    """{stage: seconds} from the lines `stage seconds` of seconds.txt; of a training that was interrupted,
    what its log has counted."""
    lines = (run / "seconds.txt").read_text().splitlines() if (run / "seconds.txt").exists() else []
    seconds = {name: float(n) for name, _, n in (line.rpartition(" ") for line in lines) if name}
    for name in seconds:
        if lines := read_log(run / name.lower()):
            seconds[name] = max(seconds[name], lines[-1]["seconds"])
    return seconds


def draw_picture(path, columns, names):
    """PNG below 1 MB: a row for each of `names`, a column for each of `columns`, {title: uint8 (rows, 3, S,
    S)}."""
    size = next(iter(columns.values())).shape[2]
    cell, gap, font = size * (96 // size) if size <= 96 else 96, 4, ImageFont.load_default(14)
    titles = [title.replace(", ", ",\n") for title in columns]  # an experiment's arms have long names
    left, top = (
        int(max(font.getlength(name) for name in names)) + 12,
        9 + 17 * max(len(title.split("\n")) for title in titles),
    )
    picture = Image.new("RGB", (left + len(columns) * (cell + gap), top + len(names) * (cell + gap)), "white")
    pen = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        pen.text((left - 6, top + row * (cell + gap) + cell / 2), name, fill="black", font=font, anchor="rm")
    for column, title in enumerate(titles):
        narrow = ImageFont.load_default(
            14 * min(1, cell / max(font.getlength(line) for line in title.split("\n")))
        )
        pen.text(
            (left + column * (cell + gap) + cell / 2, top / 2),
            title,
            fill="black",
            font=narrow,
            anchor="mm",
            align="center",
        )
    # Smoothly enlarged photographs can be too many bytes: then as squares, then with a palette.
    smooth, squares = Image.Resampling.LANCZOS, Image.Resampling.NEAREST
    for resampling, colours in ((smooth, 0), (squares, 0), (smooth, 256)):
        for column, images in enumerate(columns.values()):
            for row, image in enumerate(images):
                image = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((cell, cell), resampling)
                picture.paste(image, (left + column * (cell + gap), top + row * (cell + gap)))
        file = io.BytesIO()
        (picture.quantize(colours) if colours else picture).save(file, "PNG")
        if file.tell() < 1_000_000:
            break
    write_atomically(path, lambda out: out.write(file.getvalue()))


def write_report(path, about, rows, checks, seconds):
    """report.md from the numbers of report.json."""
    encoder, real, held_out = about["encoder"], rows["real"]["count"], about["held_out"]["count"]
    plain = f"The encoder is `{encoder['id']}`."
    if encoder["untrained"]:
        plain = (
            f"**The encoder is RANDOM** (`{encoder['id']}`: weights from a seed), not the paper's DINOv2: "
            "what this shows is whether every stage does its work."
        )

    def cell(value, form=""):
        return "" if value is None else format(value, form)

    lines = [
        "# Report of a run",
        "",
        plain + " No figure here can stand beside a published FID, whose features are others.",
        "",
        "![picture](picture.png)",
        "",
        "Rows are classes; along a row, the generated images have the same noise.",
        "",
        "| | NFE | Frechet distance, encoder | Frechet distance, classifier | (its last block) | "
        "class accuracy | likeness | images | training s | sampling s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {cell(row['nfe'])} | {row['encoder']:.3g} | {row['classifier']:.3g} | "
            f"{row['last_block']:.3g} | {row['accuracy']:.4f} | {cell(row['likeness'], '.3f')} | "
            f"{row['count']:,} | {cell(row['training_seconds'], '.0f')} | "
            f"{cell(row['sampling_seconds'], '.0f')} |"
        )
    lines += [
        "",
        f"Distances are to {held_out:,} held-out real images: between the encoder's tokens averaged over the "
        "grid, and between the third block's features of a small classifier fitted to the "
        f"{about['train']['count']:,} real training images, averaged likewise. In its last block there is "
        "little left but the class: that distance is given, but not judged by. *real* is the floor: "
        f"{real:,} training images to the held-out ones; the accuracy in its row is on the held-out images, "
        "which the classifier has not seen. "
        "*decoded real* is those training images through encoder and decoder: a perfect generator's figures. "
        "Likeness: squared pixel error to the teacher's 50-step image of the same noise, in units of that "
        "to its images of the same class and other noise (0 the same picture, 1 an unrelated one).",
        "",
        "## What must hold",
        "",
        "| | figures | holds |",
        "|---|---|---|",
    ]
    lines += [
        f"| {statement} | {figures} | {'yes' if holds else 'no'} |" for statement, figures, holds in checks
    ]
    failed = sum(not holds for *_, holds in checks)
    lines += ["", "All of it holds." if not failed else f"**{failed} of {len(checks)} do not hold.**"]
    if seconds:
        lines += [
            "",
            "## Seconds",
            "",
            ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
            + f"; together {sum(seconds.values()):.0f}.",
        ]
    made = about["provenance"]
    lines += [
        "",
        f"Made by `{made['command']}` on {made['date']}: {made['device']}, Python {made['python']}, torch "
        f"{made['torch']}, commit {made['commit'] or 'none'}. All figures: report.json.",
        "",
    ]
    write_atomically(path, lambda file: file.write("\n".join(lines).encode()))


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--run", default="runs/sanity", help="folder of the run, to write to")
    add(
        "--data",
        default="data/digits",
        help="training images, folder or .zip; or a folder of `train` and `held-out`",
    )
    add(
        "--held-out",
        help="real images that no stage has seen, folder or .zip (default: `held-out` in --data)",
    )
    add("--latents", help="latents, whose encoder is used (default: `latents` in --run)")
    add("--decoder", help="decoder for *decoded real* (default: `decoder` in --run)")
    add(
        "--samples",
        nargs="+",
        metavar="NAME=FILE:NFE",
        help="sample files, in the order of the columns (default: "
        f"{', '.join(COLUMNS)}, from `samples/teacher_50.npz` and so on in --run)",
    )
    add("--classifier-steps", type=whole(), default=200, help="of the optimizer, 128 images each")
    add("--seed", type=whole(0), default=0, help="of the classifier")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run, data = Path(args.run), Path(args.data)
    lock(run / ".lock")
    whole = (data / "train").is_dir() and (data / "held-out").is_dir()
    if not whole and not args.held_out:
        raise InputError(
            f"{data} does not hold `train` and `held-out`: name the images kept out with --held-out"
        )
    usual = [
        f"{name}={run}/samples/{name.lower().replace(' ', '_')}.npz:{name.split()[1]}" for name in COLUMNS
    ]
    files = {}
    for text in args.samples or usual:
        rest, _, nfe = text.rpartition(":")
        name, _, path = rest.rpartition("=")  # a name may hold another =
        if not (name and path and nfe.isdigit()) or name in files:
            raise InputError(f"--samples {text}: it must be NAME=FILE:NFE, and every NAME once")
        files[name] = (path, int(nfe))
    seeds = set()
    for path, nfe in files.values():  # sample.py leaves its settings beside its file
        if zipfile.is_zipfile(path) and "about.json" in zipfile.ZipFile(path).namelist():
            made = read_about(path)
            seeds.add(made["seed"])
            if made["nfe"] != nfe or len(seeds) > 1:
                raise InputError(
                    f"{path} was made with --nfe {made['nfe']} --seed {made['seed']}; wanted are {nfe} "
                    "evaluations, and one seed for all files"
                )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # features in true float32
    folder = args.latents or run / "latents"
    latents = Latents(folder)
    about = latents.about["encoder"]
    encoder = encoder_of(folder).to(device)
    size = about["identity"]["image_size"]
    train = Images(data / "train" if whole else data, size)
    held_out = Images(args.held_out or data / "held-out", size)
    if not train.classes == held_out.classes == latents.classes:
        raise InputError(f"{train.path}, {held_out.path} and the latents must have the same classes")
    decoder = load_decoder(args.decoder or run / "decoder")[0].to(device).eval()
    if decoder.shape != encoder.shape:
        raise InputError(f"the decoder takes latents {decoder.shape}, the encoder makes {encoder.shape}")
    sets = {name: read_samples(path, size, len(train.classes)) for name, (path, _) in files.items()}

    real, real_labels = read(held_out, range(len(held_out)))
    spaced = (
        np.linspace(0, len(train) - 1, min(len(held_out), len(train))).round().astype(int)
    )  # of every class
    other, other_labels = read(train, spaced.tolist())
    net = classifier(run / "classifier.safetensors", train, other, args.classifier_steps, args.seed, device)
    say(f"measuring {len(real):,} held-out images, {len(other):,} others, and {len(sets)} sample files")
    decoded = decode(other, encoder, decoder, device)
    sets = {"real": (other, other_labels), "decoded real": (decoded, other_labels), **sets}
    reference, held_out_accuracy = measure(real, real_labels, encoder, net, device)
    seconds, rows = read_seconds(run), {}
    for name, (images, labels) in sets.items():
        moments, accuracy = measure(images, labels, encoder, net, device)
        rows[name] = dict(
            nfe=files[name][1] if name in files else None,
            **{space: distance(m, reference[space]) for space, m in moments.items()},
            accuracy=held_out_accuracy if name == "real" else accuracy,
            likeness=None,
            count=len(images),
            sampling_seconds=seconds.get(f"sample {name}"),
            training_seconds=seconds.get("decoder" if name == "decoded real" else name.split()[0]),
        )
        if name in files and "teacher 50" in sets:
            rows[name]["likeness"] = likeness(images, sets["teacher 50"][0], len(train.classes))
    checks = judge(rows, held_out_accuracy, len(real))

    first = [real_labels.tolist().index(k) for k in range(len(train.classes))][:16]
    shown = {
        "real": real[first],
        "decoded real": decode(real[first], encoder, decoder, device),
        **{name: sets[name][0][: len(first)] for name in files},
    }
    draw_picture(run / "picture.png", shown, train.classes[:16])
    import PIL
    import transformers

    result = {
        "encoder": about,
        "train": {"name": train.path.name, "count": len(train)},
        "settings": vars(args),
        "held_out": {"name": held_out.path.name, "count": len(real), "accuracy": held_out_accuracy},
        "provenance": {
            **provenance(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_report(run / "report.md", result, rows, checks, seconds)
    write_json(
        run / "report.json",
        {
            **result,
            "rows": rows,
            "seconds": seconds,
            "checks": [
                {"statement": statement, "figures": figures, "holds": bool(holds)}
                for statement, figures, holds in checks
            ],
        },
    )
    text = (run / "report.md").read_text()
    say(text[text.index("| | NFE") : text.index("Distances are")] + text[text.index("| | figures") :])
    say(f"written: {run / 'report.md'}, {run / 'report.json'}, {run / 'picture.png'}")


if __name__ == "__main__":
    command(main)
