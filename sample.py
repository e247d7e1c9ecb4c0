"""Images from a network: a student in a few long jumps, a teacher along its probability-flow ODE.

    student    z_s = z_t - (t - s) h(z_t, t, y, s)
               at even times: 1 -> 0, or 1 -> 0.5 -> 0, ...          (MF-RAE, arXiv 2511.13019)
    teacher    dz/dt = v(z, t, y) from t = 1 to t = 0
               on the grid t_i = shift(1 - i / N), Euler or Heun     (RAE, arXiv 2510.11690)

    python sample.py runs/meanflow --nfe 1        # 50,000 images -> samples/meanflow_1.npz
    torchrun --nproc_per_node=8 sample.py runs/meanflow --nfe 2         # from eight GPUs
    python sample.py runs/meanflow/state_00050000.safetensors           # from a state that training kept
    python sample.py runs/teacher --num-samples 64 --grid grid.png      # a picture

Noise and label of image i follow from the seed and i alone, whatever the batch size or the
number of processes. The file is what the ADM evaluation suite reads: .npz, arr_0 uint8
(N, H, W, 3), and arr_1 the labels. An interrupted run goes on when repeated.
"""
import hashlib
import math
import os
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import torch

from model import (
    ArgumentParser, InputError, add_guidance_flags, barrier, command, default_time_shift, denormalize,
    digest_of, fraction, is_first, launch, load_decoder, load_guidance, load_network, load_stats, location,
    lock, long_jumps, ode_times, positive, provenance, read_json, read_tensors, refuse_other, say,
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
def claim(out, settings, need):
    """See that `out` and its folder .part are free, or hold work of these settings; write .json."""
    part, note = out.with_suffix(".part"), out.with_suffix(".json")
    lock(out.with_name(f".{out.name}.lock"))
    if out.exists() or any(part.glob("*.safetensors")):
        place = out if out.exists() else part
        return refuse_other(place, read_json(note).get("settings", {}) if note.exists() else {}, settings)
    try:
        part.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {part} ({error}): make space, or give another --out") from error
    free = shutil.disk_usage(part).free
    if 2 * need > free:
        raise InputError(f"{part} and the .npz made of it need {2 * need / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                         "are free there: make space, or give another --out")
    write_json(note, {"settings": settings, **provenance()})


def batch_path(part, k):
    return part / f"{k:06d}.safetensors"


def sample_all(part, batches, make, rank, world):
    """Write the files of those batches that `part` lacks, this process its share of them.

    batches: ranges of image numbers; make: range -> {"images": uint8 (B, H, W, 3), "labels": (B,)}."""
    if not part.exists():
        raise InputError(f"process {rank} sees no {part}: it must lie on a disk all nodes share")
    missing = [k for k in range(len(batches)) if not batch_path(part, k).exists()]
    # All have looked before the first one writes.
    barrier()
    mine = missing[rank::world]
    start = said = time.monotonic()
    if is_first() and len(missing) < len(batches):
        say(f"goes on: {len(batches) - len(missing)} of {len(batches)} batches are there")
    for n, k in enumerate(mine, 1):
        write_tensors(batch_path(part, k), {"": make(batches[k])})
        now = time.monotonic()
        if is_first() and (now > said + 10 or n == len(mine)):
            left = (now - start) / n * (len(mine) - n)
            say(f"batch {n} of {len(mine)} of this process, {left:.0f} s left")
            said = now
    barrier()


def bundle(part, count, shape, out):
    """The `count` batches as an uncompressed .npz; shape: (N, H, W, 3)."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    formats = numpy.lib.format

    def write(out):
        labels = []
        with zipfile.ZipFile(out, "w") as file:
            # A ZipInfo has no date: the same samples are the same file.
            with file.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
                formats.write_array_header_1_0(stream, header)
                for k in range(count):
                    tensors = read_tensors(batch_path(part, k))[0][""]
                    stream.write(tensors["images"].numpy())
                    labels.append(tensors["labels"].numpy())
            with file.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                formats.write_array(stream, numpy.concatenate(labels))
    write_atomically(out, write)


# ---- Pictures ----------------------------------------------------------------
def read_samples(path, count):
    """(image, label) for the first `count` of an .npz, one by one, without reading the rest."""
    try:
        labels = numpy.load(path)["arr_1"].tolist()
        with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as stream:
            numpy.lib.format.read_magic(stream)
            shape = numpy.lib.format.read_array_header_1_0(stream)[0]
            for label in labels[:count]:
                pixels = stream.read(math.prod(shape[1:]))
                yield numpy.frombuffer(pixels, numpy.uint8).reshape(shape[1:]), label
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): remove it and repeat the command") from error


def save_png(path, image):
    write_atomically(path, lambda file: image.save(file, "PNG"))


def draw_grid(path, images, labels, classes, columns):
    """A PNG of images (N, H, W, 3), each under its class name."""
    from PIL import Image, ImageDraw
    size, caption = images.shape[1], 12
    cell = size * max(1, 96 // size)
    rows = -(-len(images) // columns)
    canvas = columns * (cell + 2), rows * (cell + caption + 2)
    grid = Image.new("RGB", canvas, "white")
    pen = ImageDraw.Draw(grid)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * (cell + 2), k // columns * (cell + caption + 2)
        name = str(classes[label]).encode("utf-8", "backslashreplace").decode()
        pen.text((x + 1, y), name[:cell // 6], fill="black")
        image = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
        grid.paste(image, (x, y + caption))
    save_png(path, grid)


def draw(out, args, classes):
    """What --grid and --png ask for, from the sample file."""
    from PIL import Image
    if args.grid:
        columns = len(classes) if len(classes) <= 16 else 8
        images, labels = zip(*read_samples(out, 8 * columns), strict=True)
        draw_grid(args.grid, numpy.stack(images), labels, classes, columns)
        say(f"{args.grid}: the first {len(images)} images")
    if args.png:
        # Of a process that was killed while it wrote.
        for left in Path(args.png).glob(".[0-9]*_*.png.*.tmp"):
            left.unlink()
        for i, (image, label) in enumerate(read_samples(out, args.num_samples)):
            save_png(Path(args.png) / f"{i:06d}_{label}.png", Image.fromarray(image))


# ---- What the flags name -----------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("networks").add_argument
    add("network", type=location, help="a run, one of its states, a published file, or a Hub path")
    add("--decoder", type=location, default=DECODER, help="likewise (RAE)")
    add("--stats", type=location, metavar="FILE",
        help="latent_stats.safetensors or stat.pt (default: the network's)")

    add = parser.add_argument_group("method").add_argument
    add("--nfe", type=whole(), help="evaluations for an image (default: student 1, teacher 50; MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of a teacher; heun: nfe / 2 steps")
    add("--time-shift", type=positive, help="a of a teacher's grid (default: the network's)")
    add_guidance_flags(add)
    add("--guidance-interval", type=fraction, nargs=2, default=[0.0, 1.0], metavar="T", help="from t to t")

    add = parser.add_argument_group("images").add_argument
    add("--num-samples", type=whole(), default=50_000, help="images (ADM)")
    add("--labels", default="equal",
        help="'equal' (image i has class i mod K), 'random', or a list to repeat, of numbers or names")
    add("--seed", type=whole(0), default=0, help="of noise and random labels")
    add("--truncate", action="store_true", help="to uint8 as the published code does, instead of rounding")

    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=whole(), default=64, help="images at a time and per process")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--compile", action="store_true", help="torch.compile network and decoder")

    add = parser.add_argument_group("files").add_argument
    add("--out", metavar="NPZ", help="the sample file (default: samples/NETWORK_NFE.npz)")
    add("--grid", metavar="PNG", help="also a picture of the first images, under their class names")
    add("--png", metavar="FOLDER", help="also every image as a PNG file")

    args = parser.parse_args(argv)
    if args.solver == "heun" and args.nfe and args.nfe % 2:
        parser.error(f"--nfe {args.nfe} with --solver heun: it must be even, two for each step")
    if args.grid and not args.grid.endswith(".png"):
        parser.error(f"--grid {args.grid}: a file name that ends in .png")
    return args


def load_all(args):
    """-> network, decoder, what their files say, statistics, which fit together; what the kind of network
    decides is filled in `args`."""
    net, about = load_network(args.network)
    args.nfe = args.nfe or (1 if net.r_embedder else 50)
    args.time_shift = args.time_shift or about["time_shift"]
    training = "; or train one: python sanity/train_decoder.py --data-path IMAGES --latents LATENTS"
    training *= args.decoder == DECODER
    try:
        decoder, of_decoder = load_decoder(args.decoder)
    except InputError as error:
        raise InputError(f"{error}{training}") from error
    if net.shape != decoder.shape:
        raise InputError(f"the network makes latents {net.shape}, the decoder takes {decoder.shape}: give "
                         f"the --decoder of its encoder and size{training}")
    stats = load_stats(args.stats, net.shape) if args.stats else about["stats"] or of_decoder["stats"]
    if stats is None:
        raise InputError(f"{args.network} brings no latent statistics: give them with --stats")
    return net, about, decoder, of_decoder, stats


def read_labels(text, classes):
    """--labels as "equal", "random" or a list of class numbers, which may be given by name."""
    if text in ("equal", "random"):
        return text
    number = {str(name): k for k, name in enumerate(classes)}
    number |= {str(k): k for k in range(len(classes))}
    names = [text] if text in number else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in number:
            raise InputError(f"--labels {text}: no class {name!r}; 'equal', 'random', or a list of numbers "
                             f"below {len(classes)} or of names such as {classes[0]}")
    return [number[name] for name in names]


def default_out(args):
    """samples/NETWORK_NFE, of a state samples/NETWORK_STEP_NFE."""
    path = Path(re.sub(r"\.(pt|safetensors)$", "", os.path.abspath(args.network)))
    state = re.fullmatch(r"state_0*(\d+)", path.name)
    name = f"{path.parent.name}_{state[1]}" if state else path.name
    return f"samples/{name}_{args.nfe}"


def introduce(args, net, classes, text):
    """The first lines of a run: what it is."""
    kind = "teacher" if net.r_embedder is None else "student"
    count = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{args.network}: {kind}, {count:.1f} million parameters, {args.nfe} evaluations an image; {text}")
    if isinstance(args.labels, list):
        say("labels: " + ", ".join(f"{k} ({classes[k]})" for k in args.labels))


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(hours=24)
    net, about, decoder, of_decoder, stats = load_all(args)
    classes = about["classes"] or range(net.num_classes)
    args.labels = read_labels(args.labels, classes)
    net, decoder = net.to(device).eval(), decoder.to(device).eval()
    v, weak = (None, None) if net.r_embedder else load_guidance(args, net, about, args.guidance_interval)

    out = Path((args.out or default_out(args)).removesuffix(".npz") + ".npz")
    size = decoder.shape[1] * decoder.patch_size
    shape = args.num_samples, size, size, 3
    starts = range(0, args.num_samples, args.batch_size)
    batches = [range(i, min(i + args.batch_size, args.num_samples)) for i in starts]
    if is_first():
        text = f"{args.num_samples:,} images of {size} px, seed {args.seed}, on {world} x {device.type}"
        introduce(args, net, classes, text)
        # Contents, not paths: what is moved is the same.
        others = "network", "decoder", "weak_teacher", "stats", "compile", "out", "grid", "png"
        settings = {flag: value for flag, value in vars(args).items() if flag not in others} | {
            "sha256 of network": about["sha256"], "sha256 of weak teacher": weak,
            "sha256 of decoder": of_decoder["sha256"], "sha256 of stats": digest_of(stats)}
        claim(out, settings, math.prod(shape))
    barrier()

    stats = {name: x.to(device) for name, x in stats.items()}
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

    part = out.with_suffix(".part")
    if not out.exists():
        sample_all(part, batches, make, rank, world)
        if is_first():
            bundle(part, len(batches), shape, out)
    if is_first():
        shutil.rmtree(part, ignore_errors=True)
        say(f"{out}: {args.num_samples:,} images")
        draw(out, args, classes)


if __name__ == "__main__":
    command(main)
