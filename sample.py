"""Images from a network: a student in a few long jumps, a teacher along its probability-flow ODE.

    student    z_s = z_t - (t - s) h(z_t, t, y, s)
               at even times: 1 -> 0, or 1 -> 0.5 -> 0, ...          (MF-RAE, arXiv 2511.13019)
    teacher    dz/dt = v(z, t, y) from t = 1 to t = 0
               on the grid t_i = shift(1 - i / N), Euler or Heun     (RAE, arXiv 2510.11690)

    python sample.py runs/meanflow --nfe 1        # 50,000 images -> samples/meanflow_1.npz
    torchrun --nproc_per_node=8 sample.py runs/meanflow --nfe 2         # from eight GPUs
    python sample.py runs/meanflow/state_00050000.safetensors           # from a state that training kept
    python sample.py runs/teacher --grid grid.png --labels 207          # a picture of 64 images, no more

Noise and label of image i follow from the seed and i alone, not from batches or processes.
The file is what the ADM evaluation suite reads, .npz with arr_0, uint8 (N, H, W, 3), and arr_1, the labels;
its about.json says how it was made. Until all batches are there, each is in a file of its own: the same
command, repeated, goes on.
"""
import hashlib
import json
import math
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
    lock, long_jumps, ode_times, positive, progress, read_tensors, refuse_other, say, solve_ode,
    whole, write_atomically, write_tensors)

DECODER = "nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/ViTXL_n08/model.pt"


def noise_and_labels(indices, seed, shape, num_classes, labels="equal"):
    """z_1 (B, C, H, W) and y (B,) of the images `indices`, on the CPU.

    labels: "equal", image i has class i mod num_classes; "random"; or a list, repeated.
    By a generator that numpy keeps frozen, with a key of 128 bits: torch's on the CPU has 32."""
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

    shift: a of a teacher's grid (None: default_time_shift).
    v: a teacher's velocity with guidance, in place of its own; counts as one evaluation."""
    if net.r_embedder is not None:
        return long_jumps(net, z, y, [1 - i / nfe for i in range(nfe + 1)])
    times = ode_times(nfe if solver == "euler" else nfe // 2, shift or default_time_shift(net.shape))
    return solve_ode(v or net, z, y, times, solver)[-1]


def to_uint8(images, truncate=False):
    """(B, 3, H, W), clipped to [0, 1] -> (B, H, W, 3) uint8. The published code truncates."""
    images = images.clamp(0, 1) * 255
    images = images if truncate else images.round()
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# ---- The sample file ---------------------------------------------------------
def read_about(path):
    """The settings in a sample file of ours."""
    try:
        with zipfile.ZipFile(path) as file:
            return dict(json.loads(file.read("about.json")))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no whole sample file of ours ({error}): give another --out") from error


def bundle(out, batches, shape, settings):
    """Write the images in the files `batches`, (N, H, W, 3), as an uncompressed .npz."""
    # A ZipInfo has no date: the same samples make the same file.
    arr_0, arr_1, about = map(zipfile.ZipInfo, ("arr_0.npy", "arr_1.npy", "about.json"))
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(target):
        labels = []
        with zipfile.ZipFile(target, "w") as file:
            with file.open(arr_0, "w", force_zip64=True) as stream:
                numpy.lib.format.write_array_header_1_0(stream, header)
                for path in batches:
                    parts, said, _ = read_tensors(path)
                    # Another process may have read another network.
                    refuse_other(path.parent, said, settings)
                    batch = parts[""]
                    stream.write(batch["images"].numpy())
                    labels.append(batch["labels"].numpy())
            with file.open(arr_1, "w", force_zip64=True) as stream:
                numpy.lib.format.write_array(stream, numpy.concatenate(labels))
            file.writestr(about, json.dumps(settings, indent=1))
    write_atomically(out, write)


def draw_grid(path, images, labels, classes):
    """A PNG of images (N, H, W, 3), each under its class name."""
    columns, caption = len(classes) if len(classes) <= 16 else 8, 12
    cell = images.shape[1] * max(1, 96 // images.shape[1])
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * cell, rows * (cell + caption)), "white")
    pen = ImageDraw.Draw(grid)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * cell, k // columns * (cell + caption)
        pen.text((x + 1, y), str(classes[label])[:cell // 6], fill="black")
        image = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
        grid.paste(image, (x, y + caption))
    write_atomically(path, lambda file: grid.save(file, "PNG"))
    say(f"{path}: {len(images)} images")


# ---- The command -------------------------------------------------------------
def class_list(text):
    """An argparse type: "equal", "random", or a list of class numbers."""
    return text if text in ("equal", "random") else [whole(0)(k) for k in text.split(",")]


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("network", type=location, help="a run, one of its states, a published file, or a Hub path")
    add("--decoder", type=location, default=DECODER, help="likewise (RAE)")
    add("--stats", type=location, metavar="FILE",
        help="latent_stats.safetensors or stat.pt (default: the network's)")
    add("--nfe", type=whole(), help="evaluations for an image (default: student 1, teacher 50; MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of a teacher; heun: nfe / 2 steps")
    add("--time-shift", type=positive, help="a of a teacher's grid (default: the network's)")
    add_guidance_flags(add)
    add("--guidance-interval", type=fraction, nargs=2, default=[0.0, 1.0], metavar="T", help="from t to t")
    add("--num-samples", type=whole(), help="images (default: 50,000, ADM; of a --grid alone 64)")
    add("--labels", type=class_list, default="equal",
        help="'equal' (image i has class i mod K), 'random', or a list of numbers to repeat: 207,360")
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
    if not (args.grid or ".png").endswith(".png") or not (args.out or ".npz").endswith(".npz"):
        parser.error("--grid takes a name that ends in .png, --out one in .npz")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(hours=24)

    # Network, decoder and statistics that fit together
    net, about = load_network(args.network)
    decoder, of_decoder = load_decoder(args.decoder)
    if net.shape != decoder.shape:
        raise InputError(f"the network makes latents {net.shape}, the decoder takes {decoder.shape}: give "
                         "the --decoder of its encoder (sanity/train_decoder.py makes one)")
    sources = about.get("latents") or {}, of_decoder
    made_by = [source["encoder"]["identity"] for source in sources if "encoder" in source]
    if len({identity["sha256"] for identity in made_by if "sha256" in identity}) > 1:
        raise InputError(f"{args.decoder} decodes another encoder's latents than {args.network} makes")
    if made_by and "image_norm" not in of_decoder:                     # as in a published .pt
        decoder.image_norm = made_by[0].get("image_norm", decoder.image_norm)
    stats = load_stats(args.stats, net.shape) if args.stats else about["stats"] or of_decoder["stats"]
    if stats is None:
        raise InputError(f"{args.network} brings no latent statistics: give --stats")
    net, decoder = net.to(device).eval(), decoder.to(device).eval()
    stats = {name: x.to(device) for name, x in stats.items()}
    v, weak = load_guidance(args, net, about, args.guidance_interval)
    classes = about["classes"] or range(net.num_classes)
    if isinstance(args.labels, list) and max(args.labels) >= net.num_classes:
        raise InputError(f"--labels {max(args.labels)}: the network's are 0 to {net.num_classes - 1}")
    args.nfe = args.nfe or (1 if net.r_embedder else 50)
    args.time_shift = args.time_shift or about["time_shift"]
    picture_alone = args.grid and not args.out
    count = args.num_samples = args.num_samples or (64 if picture_alone else 50_000)
    say(f"{count:,} images of {args.network}, {args.nfe} evaluations each, on {world} x {device.type}")
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
            raise InputError(f"images {indices[0]} to {indices[-1]} are not finite: damaged weights or "
                             "statistics, or too large for --precision bf16")
        return {"images": to_uint8(images, args.truncate).cpu(), "labels": y}

    starts = range(0, count, args.batch_size)
    batches = [range(i, min(i + args.batch_size, count)) for i in starts]

    def show(shown):
        made = [make(indices) for indices in batches if indices[0] < shown]
        images, labels = (torch.cat([batch[name] for batch in made])[:shown] for name in ("images", "labels"))
        draw_grid(args.grid, images.numpy(), labels.tolist(), classes)
    if picture_alone:
        if is_first():
            show(count)
        return

    # Every process makes its share of the missing batches; the first one bundles them
    name = Path(args.network).absolute().name.removesuffix(".pt").removesuffix(".safetensors")
    out = Path(args.out or f"samples/{name}_{args.nfe}.npz")
    parts = out.with_name(f"{out.name}.parts")
    files = [parts / f"{k:06d}.safetensors" for k in range(len(batches))]
    # Inputs are known by their contents, not by their paths.
    left_out = ("network", "decoder", "weak_teacher", "stats", "out", "grid", "compile")
    settings = {flag: x for flag, x in vars(args).items() if flag not in left_out} | {
        "sha256 of network": about["sha256"], "sha256 of weak teacher": weak,
        "sha256 of decoder": of_decoder["sha256"], "sha256 of stats": digest_of(stats)}
    if is_first():
        lock(out.with_name(f".{out.name}.lock"))
        there = [path for path in files if path.exists()]
        for path in there:
            refuse_other(parts, read_tensors(path, only=())[1], settings)
        if out.exists():
            refuse_other(out, read_about(out), settings)
        elif there:
            say(f"goes on: {len(there)} of {len(files)} batches are there")
    barrier()
    if not out.exists():
        mine = range(rank, len(files), world)
        missing = [k for k in mine if not files[k].exists()]
        for k in progress(missing, len(missing), "batches"):
            write_tensors(files[k], {"": make(batches[k])}, settings)
        barrier()
        if is_first():
            size = decoder.shape[1] * decoder.patch_size
            bundle(out, files, (count, size, size, 3), settings)
    if is_first():
        for path in files:
            path.unlink(missing_ok=True)
        with suppress(OSError):                   # files of the user's are in it
            parts.rmdir()
        say(f"{out}: {count:,} images")
        if args.grid:
            show(min(count, 64))


if __name__ == "__main__":
    command(main)
