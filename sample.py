"""Images from a network: a student in a few long jumps, a teacher along its probability-flow ODE.

    student    z_s = z_t - (t - s) h(z_t, t, s, y),   times evenly spaced: 1 -> 0, or 1 -> 0.5 -> 0, ...      (MF-RAE, arXiv 2511.13019)
    teacher    dz/dt = v(z, t, y) from t = 1 to 0 on the grid t_i = shift(1 - i / N), Euler or Heun            (RAE, arXiv 2510.11690)

    python sample.py runs/meanflow --nfe 1                                  # 50,000 images, 50 of each class -> samples/meanflow_1.npz
    torchrun --nproc_per_node=8 sample.py runs/meanflow --nfe 2             # the same numbers from eight GPUs
    python sample.py runs/teacher --nfe 50 --num-samples 64 --grid grid.png # a picture

Noise and label of image i follow from the seed and i alone, whatever the batch size or the number of processes. The file is what
the ADM evaluation suite reads: .npz, arr_0 uint8 (N, H, W, 3), and arr_1 the labels. An interrupted run goes on when repeated.
"""
import argparse
import math
import shutil
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import (InputError, command, denormalize, digest_of, generator, guided, load_decoder, load_network, load_stats, long_jumps,
                   ode_times, processes, provenance, read_json, read_tensors, solve_ode, write_atomically, write_json, write_tensors)


def noise_and_labels(indices, seed, shape, num_classes, labels="equal"):
    """z_1 (B, C, H, W) and y (B,) of the images `indices`, on the CPU. labels: "equal", i mod num_classes; "random"; or a list."""
    z, y = [], []
    for i in indices:
        g = generator("cpu", seed, "sample", i)
        z.append(torch.randn(shape, generator=g))
        drawn = int(torch.randint(num_classes, (), generator=g))
        y.append({"equal": i % num_classes, "random": drawn}[labels] if isinstance(labels, str) else labels[i % len(labels)])
    return torch.stack(z), torch.tensor(y)


def generate(net, z, y, nfe, solver="euler", shift=1.0, v=None):
    """Latents from noise z (B, C, H, W) and labels y (B,) in `nfe` evaluations of `net`, a student or a teacher, for each image.

    v: a teacher's guided velocity, of model.guided, in its place; an evaluation of it counts as one."""
    if net.r_embedder is not None:
        return long_jumps(lambda z, t, s: net(z, t, y, s).float(), z, [1 - i / nfe for i in range(nfe + 1)])
    steps = nfe if solver == "euler" else nfe // 2
    v = v or net
    return solve_ode(lambda z, t: v(z, t, y).float(), z, ode_times(steps, shift), solver)[-1]


def to_uint8(images, truncate=False):
    """(B, 3, H, W) in [0, 1], clipped -> (B, H, W, 3) uint8. The published code truncates where others round."""
    images = images.clamp(0, 1) * 255
    return (images if truncate else images.round()).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw_grid(path, images, labels, classes, columns):
    """A PNG of images (N, H, W, 3), each under its class name."""
    from PIL import Image, ImageDraw
    size, caption = images.shape[1], 12
    scale = max(1, 96 // size)
    cell = size * scale
    grid = Image.new("RGB", (columns * (cell + 2), -(-len(images) // columns) * (cell + caption + 2)), "white")
    pen = ImageDraw.Draw(grid)
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        x, y = k % columns * (cell + 2), k // columns * (cell + caption + 2)
        pen.text((x + 1, y), str(classes[label])[:cell // 6], fill="black")
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST), (x, y + caption))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def sample_all(part, settings, batches, make, need, rank, world):
    """Write a file for each batch into the folder `part`; those that an earlier, interrupted call finished stay.

    batches: the ranges of image numbers; make: range -> {"images": uint8 (B, H, W, 3), "labels": (B,)}; need: bytes of all images."""
    if rank == 0 and not (part / "settings.json").exists():
        free = shutil.disk_usage(next(p for p in part.absolute().parents if p.exists())).free
        if 2 * need > free:
            raise InputError(f"{part} and the .npz made of it need {2 * need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
        write_json(part / "settings.json", settings)
    if world > 1:
        dist.barrier()
    if read_json(part / "settings.json") != settings:
        raise InputError(f"{part} holds an interrupted run of other settings or weights: remove it, or give another --out")
    mine = [k for k in range(rank, len(batches), world) if not (part / f"{k:06d}.safetensors").exists()]
    start = said = time.monotonic()
    bar = tqdm(mine, unit="batch", disable=rank > 0 or not sys.stderr.isatty())
    for n, k in enumerate(bar, 1):
        write_tensors(part / f"{k:06d}.safetensors", make(batches[k]))
        if rank == 0 and bar.disable and (time.monotonic() - said > 30 or n == len(mine)):
            said = time.monotonic()
            print(f"batch {n} of {len(mine)} of this process, {(said - start) / n * (len(mine) - n):.0f} s left", flush=True)
    if world > 1:
        dist.barrier()


def bundle(part, shape, out):
    """The batches as an uncompressed .npz, one after another; shape: (N, H, W, 3)."""
    def write(path):
        labels = []
        with zipfile.ZipFile(path, "w") as file:
            with file.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:      # without dates: the same samples are the
                numpy.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})    # same file
                for batch in sorted(part.glob("*.safetensors")):
                    tensors = read_tensors(batch)[0]
                    stream.write(tensors["images"].numpy())
                    labels.append(tensors["labels"].numpy())
            with file.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as stream:
                numpy.lib.format.write_array(stream, numpy.concatenate(labels))
    write_atomically(out, write)


def read_images(path, count):
    """The first `count` images of an .npz, one at a time, without reading the rest."""
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as stream:
        numpy.lib.format.read_magic(stream)
        shape = numpy.lib.format.read_array_header_1_0(stream)[0]
        for _ in range(min(count, shape[0])):
            yield numpy.frombuffer(stream.read(int(numpy.prod(shape[1:]))), numpy.uint8).reshape(shape[1:])


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("network", help="a student or a teacher: folder, published .pt or .safetensors file, or Hub path")
    add("--decoder", default="nyu-visionx/RAE-collections/decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        help="likewise, or an AutoencoderRAE folder (default %(default)s: RAE)")
    add("--stats", help="latent statistics in place of the network's: a latent_stats.safetensors or a published stat.pt")
    add("--nfe", type=int, help="evaluations of the network for each image (default: student 1, teacher 50; MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of a teacher's PF-ODE; heun: nfe / 2 steps (default %(default)s)")
    add("--guidance", type=float, default=1.0, metavar="W", help="a teacher's guidance, v_weak + W (v - v_weak), v_weak without label or "
        "of --weak-teacher (default %(default)s: none, MF-RAE)")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times t with guidance "
        "(default: all)")
    add("--weak-teacher", help="a weaker teacher for --guidance: autoguidance (default: the teacher without label, CFG)")
    add("--time-shift", type=float, help="a of a teacher's grid (default: the network's)")
    add("--num-samples", type=int, default=50_000, help="images (default %(default)s: ADM)")
    add("--labels", default="equal", help="'equal' (image i has class i mod K), 'random', or a list such as 207,360,387 to repeat "
        "(default %(default)s)")
    add("--seed", type=int, default=0, help="of noise and random labels (default %(default)s)")
    add("--batch-size", type=int, default=64, help="images at a time and per process (default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (default %(default)s)")
    add("--truncate", action="store_true", help="truncate to uint8 as the published code does, instead of rounding")
    add("--compile", action="store_true", help="torch.compile network and decoder")
    add("--out", help="the .npz file (default: samples/NETWORK_NFE.npz)")
    add("--grid", metavar="PNG", help="also a picture of the first images, under their class names")
    add("--png", metavar="FOLDER", help="also every image as a PNG file")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    world, rank, device = processes(args.precision)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(days=7))                # for barriers alone, which others may reach much later

    net, config, stats = load_network(args.network)
    student = config["kind"] == "student"
    decoder, decoder_stats = load_decoder(args.decoder)
    stats = load_stats(args.stats, net.shape) if args.stats else stats or decoder_stats
    nfe = args.nfe or (1 if student else 50)
    labels = args.labels
    if labels not in ("equal", "random"):
        labels = [int(x) if x.strip().isdecimal() else -1 for x in labels.split(",")]
    if stats is None:
        raise InputError(f"{args.network} brings no latent statistics: give them with --stats")
    if net.shape != decoder.shape:
        raise InputError(f"the network makes latents {net.shape}, the decoder takes {decoder.shape}: another encoder or size")
    if nfe < 1 or args.num_samples < 1 or args.batch_size < 1 or (not student and args.solver == "heun" and nfe % 2):
        raise InputError("--nfe, --num-samples and --batch-size must be at least 1, and --nfe even with --solver heun")
    if not isinstance(labels, str) and not all(0 <= y < net.num_classes for y in labels):
        raise InputError(f"--labels {args.labels}: 'equal', 'random', or a list of numbers below {net.num_classes}")
    if student and args.guidance != 1:
        raise InputError("--guidance is for a teacher; a student has it from its training (--guidance of train_cmt.py, train_meanflow.py)")
    weak = load_network(args.weak_teacher, "teacher")[0].to(device).eval() if args.weak_teacher else None
    net, decoder, stats = net.to(device).eval(), decoder.to(device).eval(), [x.to(device) for x in stats]
    v = None if student else guided(net, args.guidance, args.guidance_interval, weak)
    if args.compile:
        net.compile(dynamic=False)
        decoder.compile(dynamic=False)

    out = Path(args.out or f"samples/{Path(args.network).stem}_{nfe}.npz")
    shift = args.time_shift or config["time_shift"]
    parts = {"network": net, "decoder": decoder, **({"weak": weak} if weak else {})}
    weights = {f"{part}/{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("grid", "png", "out", "compile")} | {
        "nfe": nfe, "time_shift": shift, "weights": digest_of(weights | {"mean": stats[0], "var": stats[1]})}
    if out.exists() and not (out.with_suffix(".json").exists() and read_json(out.with_suffix(".json"))["settings"] == settings):
        raise InputError(f"{out} exists, made with other settings or weights: give another --out or remove it")

    @torch.inference_mode()
    def make(indices):
        z, y = noise_and_labels(indices, args.seed, net.shape, net.num_classes, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            z_0 = generate(net, z.to(device), y.to(device), nfe, args.solver, shift, v)
            return {"images": to_uint8(decoder(denormalize(z_0, stats)), args.truncate), "labels": y}

    if not out.exists():
        batches = [range(i, min(i + args.batch_size, args.num_samples)) for i in range(0, args.num_samples, args.batch_size)]
        shape = (args.num_samples, *[decoder.shape[1] * decoder.patch_size] * 2, 3)
        sample_all(out.with_suffix(".part"), settings, batches, make, math.prod(shape), rank, world)
        if rank == 0:
            write_json(out.with_suffix(".json"), {"settings": settings, **provenance()})
            bundle(out.with_suffix(".part"), shape, out)                          # last: the samples are there when all is
    if rank == 0:
        shutil.rmtree(out.with_suffix(".part"), ignore_errors=True)
        for path in out.parent.glob(f".{out.stem}.*.tmp"):                        # of a process that was killed while it wrote
            path.unlink()
        print(f"{out}: {args.num_samples} images")
        classes, y = config.get("classes") or range(net.num_classes), numpy.load(out)["arr_1"]
        if args.grid:
            columns = net.num_classes if net.num_classes <= 16 else 8
            images = list(read_images(out, 8 * columns))
            draw_grid(args.grid, numpy.stack(images), y[:len(images)], classes, columns)
        if args.png:
            from PIL import Image
            Path(args.png).mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(read_images(out, args.num_samples)):
                Image.fromarray(image).save(Path(args.png) / f"{i:06d}_{y[i]}.png")


if __name__ == "__main__":
    command(main)
