"""Images from a network: a student in a few long jumps, a teacher along its probability-flow ODE.

    student    z_s = z_t - (t - s) h(z_t, t, y, s)
               at even times: 1 -> 0, or 1 -> 0.5 -> 0, ...          (MF-RAE, arXiv 2511.13019)
    teacher    dz/dt = v(z, t, y) from t = 1 to t = 0
               on the grid t_i = shift(1 - i / N), Euler or Heun     (RAE, arXiv 2510.11690)

    python sample.py runs/meanflow --nfe 1        # 50,000 images -> samples/meanflow_1.npz
    torchrun --nproc_per_node=8 sample.py runs/meanflow --nfe 2         # from eight GPUs
    python sample.py runs/meanflow/state_00050000.safetensors           # from a state that training kept
    python sample.py runs/teacher --grid grid.png --labels 207          # a picture of 64 images, no more

Noise and label of image i follow from the seed and i alone, whatever the batch size or the
number of processes. The file is what the ADM evaluation suite reads: .npz, arr_0 uint8
(N, H, W, 3), and arr_1 the labels; about.json in it says how it was made. Batches rest in
files of their own until all are there, so that processes share nothing and the same command,
repeated, goes on.
"""
import hashlib
import json
import math
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw

from model import (
    ArgumentParser, InputError, add_guidance_flags, barrier, command, default_time_shift, denormalize,
    digest_of, fraction, is_first, launch, load_decoder, load_guidance, load_network, load_stats, location,
    lock, long_jumps, number, ode_times, positive, progress, read_json, read_tensors, refuse_other, say,
    solve_ode, whole, write_atomically, write_json, write_tensors)

DECODER = "nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"


def noise_and_labels(indices, seed, shape, num_classes, labels="equal"):
    """z_1 (B, C, H, W) and y (B,) of the images `indices`, on the CPU.

    labels: "equal", image i has class i mod num_classes; "random"; or a list, repeated.
    The stream is one that numpy keeps frozen, with a key of 128 bits: torch's CPU generator has 32."""
    def draw(i):
        digest = hashlib.sha256(repr((seed, "sample", i)).encode()).digest()
        key = int.from_bytes(digest[:16], "big")
        stream = numpy.random.RandomState(numpy.random.Philox(key=key))
        z = torch.from_numpy(stream.standard_normal(shape).astype(numpy.float32))
        if labels == "random":
            return z, stream.randint(num_classes)
        return z, i % num_classes if labels == "equal" else labels[i % len(labels)]
    # numpy draws without Python's lock.
    with ThreadPoolExecutor() as threads:
        z, y = zip(*threads.map(draw, indices), strict=True)
    return torch.stack(z), torch.tensor(y)


def generate(net, z, y, nfe, solver="euler", shift=None, v=None):
    """Latents from noise z (B, C, H, W) and labels y (B,), in `nfe` evaluations of `net`.

    shift: a of a teacher's grid; default_time_shift of its latents, unless it was trained with another.
    v: a teacher's guided velocity, of model.guided, in its place; it counts as one."""
    if net.r_embedder is not None:
        return long_jumps(net, z, y, [1 - i / nfe for i in range(nfe + 1)])
    times = ode_times(nfe if solver == "euler" else nfe // 2, shift or default_time_shift(net.shape))
    return solve_ode(v or net, z, y, times, solver)[-1]


def to_uint8(images, truncate=False):
    """(B, 3, H, W) in [0, 1], clipped -> (B, H, W, 3) uint8. The published code truncates."""
    images = images.clamp(0, 1) * 255
    images = images if truncate else images.round()
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---- The sample file, by way of a folder with a file for each batch ----------
def begin(out, parts, settings):
    """See that `out` and `parts` are free, or hold work of these settings."""
    lock(out.with_name(f".{out.name}.lock"))
    if out.exists():
        return refuse_other(out, read_about(out), settings)
    if (parts / "about.json").exists():
        return refuse_other(parts, read_json(parts / "about.json"), settings)
    if parts.exists() and any(not path.name.startswith(".") for path in parts.iterdir()):
        raise InputError(f"{parts} holds something else: give another --out")
    write_json(parts / "about.json", settings)


def read_about(path):
    """The settings in a sample file. InputError: it is none, or not ours."""
    try:
        with zipfile.ZipFile(path) as file:
            return dict(json.loads(file.read("about.json")))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no whole sample file of ours ({error}): give another --out, or remove "
                         "it") from error


def bundle(out, files, shape, settings):
    """The images of `files` as an uncompressed .npz; shape: (N, H, W, 3)."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    formats = numpy.lib.format

    def write(target):
        labels = []
        with zipfile.ZipFile(target, "w") as file:
            # A ZipInfo has no date: the same samples are the same file.
            with file.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                formats.write_array_header_1_0(stream, header)
                for path in files:
                    batch = read_tensors(path)[0][""]
                    stream.write(batch["images"].numpy())
                    labels.append(batch["labels"].numpy())
            with file.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                formats.write_array(stream, numpy.concatenate(labels))
            file.writestr(zipfile.ZipInfo("about.json"), json.dumps(settings, indent=1))
    write_atomically(out, write)


def first_samples(path, count):
    """The first images (N, H, W, 3) of an .npz, without reading the rest, and their labels (N,)."""
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as stream:
        numpy.lib.format.read_magic(stream)
        n, *shape = numpy.lib.format.read_array_header_1_0(stream)[0]
        pixels = stream.read(min(n, count) * math.prod(shape))
    return numpy.frombuffer(pixels, numpy.uint8).reshape(-1, *shape), numpy.load(path)["arr_1"][:count]


def draw_grid(path, images, labels, classes):
    """A PNG of images (N, H, W, 3), each under its class name."""
    size, caption, columns = images.shape[1], 12, len(classes) if len(classes) <= 16 else 8
    cell = size * max(1, 96 // size)
    canvas = columns * (cell + 2), -(-len(images) // columns) * (cell + caption + 2)
    grid = Image.new("RGB", canvas, "white")
    pen = ImageDraw.Draw(grid)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * (cell + 2), k // columns * (cell + caption + 2)
        name = str(classes[label]).encode("utf-8", "backslashreplace").decode()
        pen.text((x + 1, y), name[:cell // 6], fill="black")
        image = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
        grid.paste(image, (x, y + caption))
    write_atomically(path, lambda file: grid.save(file, "PNG"))
    say(f"{path}: {len(images)} images")


# ---- What the flags name -----------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("network", type=location, help="a run, one of its states, a published file, or a Hub path")
    add("--decoder", type=location, default=DECODER, help="likewise (RAE)")
    add("--image-norm", type=number(float, 0, 1e3), nargs=6, metavar="X",
        help="mean and std of R, G, B that its pixels are given back (default: its own, or ImageNet's)")
    add("--stats", type=location, metavar="FILE",
        help="latent_stats.safetensors or stat.pt (default: the network's)")
    add("--nfe", type=whole(), help="evaluations for an image (default: student 1, teacher 50; MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of a teacher; heun: nfe / 2 steps")
    add("--time-shift", type=positive, help="a of a teacher's grid (default: the network's)")
    add_guidance_flags(add)
    add("--guidance-interval", type=fraction, nargs=2, default=[0.0, 1.0], metavar="T", help="from t to t")
    add("--num-samples", type=whole(), help="images (default: 50,000, ADM; of a --grid alone 64)")
    add("--labels", default="equal",
        help="'equal' (image i has class i mod K), 'random', or a list to repeat, of numbers or names")
    add("--seed", type=whole(0), default=0, help="of noise and random labels")
    add("--truncate", action="store_true", help="to uint8 as the published code does, instead of rounding")
    add("--batch-size", type=whole(), default=64, help="images at a time and per process")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--compile", action="store_true", help="torch.compile network and decoder")
    add("--out", type=location, metavar="NPZ", help="the sample file (default: samples/NETWORK_NFE.npz)")
    add("--grid", type=location, metavar="PNG",
        help="a picture of the first images, under their class names; without --out nothing else is written")

    args = parser.parse_args(argv)
    if args.solver == "heun" and args.nfe and args.nfe % 2:
        parser.error(f"--nfe {args.nfe} with --solver heun: it must be even, two for each step")
    if args.guidance_interval[0] > args.guidance_interval[1]:
        parser.error(f"--guidance-interval {args.guidance_interval}: the lower time comes first")
    if not (args.grid or ".png").endswith(".png") or not (args.out or ".npz").endswith(".npz"):
        parser.error("--grid takes a name that ends in .png, --out one in .npz")
    return args


def read_labels(text, classes):
    """--labels as "equal", "random" or a list of class numbers, which may be given by name."""
    if text in ("equal", "random"):
        return text
    number = {str(k): k for k in range(len(classes))}
    number |= {str(name): k for k, name in enumerate(classes)}
    names = [text] if text in number else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in number:
            raise InputError(f"--labels {text}: no class {name!r}; 'equal', 'random', or a list of numbers "
                             f"below {len(classes)} or of names such as {classes[0]}")
    return [number[name] for name in names]


def default_out(args):
    """samples/NETWORK_NFE.npz; of a state samples/RUN_STEP_NFE, with guidance ..._wW."""
    path = Path(args.network).absolute()
    state = re.fullmatch(r"state_0*(\d+)\.safetensors", path.name)
    name = f"{path.parent.name}_{state[1]}" if state else re.sub(r"\.(pt|safetensors)$", "", path.name)
    return f"samples/{name}_{args.nfe}{f'_w{args.guidance:g}' * (args.guidance != 1)}.npz"


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(hours=24)

    # Network, decoder and statistics, which fit together
    net, about = load_network(args.network)
    try:
        decoder, of_decoder = load_decoder(args.decoder)
        if args.image_norm:
            decoder.image_norm = args.image_norm[:3], args.image_norm[3:]
        if net.shape != decoder.shape:
            raise InputError(f"the network makes latents {net.shape}, the decoder takes {decoder.shape}")
    except InputError as error:
        own = ": give the --decoder of its encoder, or python sanity/train_decoder.py makes one"
        raise InputError(f"{error}{own * (args.decoder == DECODER)}") from error
    stats = load_stats(args.stats, net.shape) if args.stats else about["stats"] or of_decoder["stats"]
    if stats is None:
        raise InputError(f"{args.network} brings no latent statistics: give them with --stats")
    net, decoder = net.to(device).eval(), decoder.to(device).eval()
    stats = {name: x.to(device) for name, x in stats.items()}
    v, weak = (None, None) if net.r_embedder else load_guidance(args, net, about, args.guidance_interval)
    if net.r_embedder and args.guidance != 1:
        raise InputError(f"{args.network} is a student: --guidance is for teachers, and for training")
    classes = about["classes"] or range(net.num_classes)
    args.labels = read_labels(args.labels, classes)
    args.nfe = args.nfe or (1 if net.r_embedder else 50)
    args.time_shift = args.time_shift or about["time_shift"]
    alone = args.grid and not args.out
    count = args.num_samples = args.num_samples or (64 if alone else 50_000)
    labels = f", labels {args.labels}" * (args.labels != "equal")
    say(f"{args.network}: {about['kind']}, {args.nfe} evaluations an image, {count:,} images, seed "
        f"{args.seed}, on {world} x {device.type}{labels}")
    if args.compile:
        net.compile(dynamic=False)
        decoder.compile(dynamic=False)

    @torch.inference_mode()
    def make(indices):
        z, y = noise_and_labels(indices, args.seed, net.shape, net.num_classes, args.labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z_0 = generate(net, z.to(device), y.to(device), args.nfe, args.solver, args.time_shift, v)
            images = decoder(denormalize(z_0, stats))
        if not images.isfinite().all():
            raise InputError(f"images {indices[0]} to {indices[-1]} are not finite: weights or statistics "
                             "are damaged, or too large for --precision bf16")
        return {"images": to_uint8(images, args.truncate), "labels": y}

    batches = [range(i, min(i + args.batch_size, count)) for i in range(0, count, args.batch_size)]
    if alone:
        if is_first():
            made = [make(indices) for indices in progress(batches, len(batches), "batches")]
            images = torch.cat([batch["images"] for batch in made]).cpu().numpy()
            draw_grid(args.grid, images, torch.cat([batch["labels"] for batch in made]).tolist(), classes)
        return

    # Every process makes its share of the batches that are missing; the first one bundles them.
    out = Path(args.out or default_out(args))
    parts = out.with_name(f"{out.name}.parts")
    files = [parts / f"{k:06d}.safetensors" for k in range(len(batches))]
    if is_first():
        others = ("network", "decoder", "weak_teacher", "stats", "compile", "out", "grid")
        settings = {flag: value for flag, value in vars(args).items() if flag not in others} | {
            "sha256 of network": about["sha256"], "sha256 of weak teacher": weak,
            "sha256 of decoder": of_decoder["sha256"], "sha256 of stats": digest_of(stats)}
        begin(out, parts, settings)
    barrier()
    if not out.exists():
        if not parts.exists():
            raise InputError(f"process {rank} sees no {parts}: it must lie on a disk all nodes share")
        missing = [k for k, path in enumerate(files) if not path.exists()]
        # All have looked before the first one writes.
        barrier()
        if 0 < len(missing) < len(files):
            say(f"goes on: {len(files) - len(missing)} of {len(files)} batches are there")
        for k in progress(missing[rank::world], len(missing[rank::world]), "batches"):
            write_tensors(files[k], {"": make(batches[k])})
        barrier()
        if is_first():
            size = decoder.shape[1] * decoder.patch_size
            bundle(out, files, (count, size, size, 3), settings)
    if is_first():
        for path in [*files, *parts.glob(".*.tmp"), parts / "about.json"]:
            path.unlink(missing_ok=True)
        with suppress(OSError):                   # something of the user's is in it, or it is gone
            parts.rmdir()
        say(f"{out}: {count:,} images")
        if args.grid:
            draw_grid(args.grid, *first_samples(out, min(count, 64)), classes)


if __name__ == "__main__":
    command(main)
