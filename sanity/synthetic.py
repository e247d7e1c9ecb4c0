"""Random latents and a random teacher at the real shapes: does a size fit, how fast is it?

    python sanity/synthetic.py --out runs/synthetic      # 256 px, XL: 0.4 GB of latents, a teacher of 3.4 GB
    python train_meanflow.py --latents runs/synthetic/latents --teacher runs/synthetic/teacher \\
        --init runs/synthetic/teacher --out runs/synthetic/try --steps 20 --log-every 5 --save-every 0

Any stage takes them; with --save-every 0 it leaves its log alone. The last layer of the teacher is random
too: with the zeros that it begins with, all velocities and most gradients would be 0.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import finish, sha256, write_shard  # noqa: E402
from model import (  # noqa: E402
    DIT_PRESETS, ArgumentParser, DiTDH, InputError, command, generator, load_stats, location, lock,
    read_json, refuse_other, say, whole, write_json, write_tensors)


def write_latents(out, shape, classes, count, image_size, shard_size=4096):
    """A folder of N(0, 1) latents, as encode_latents.py writes them; image i has class i mod classes."""
    identity = {"images": "random", "flips": False, "shard_size": shard_size, "image_size": image_size}
    encoder = {"id": "none", "untrained": True, "from_here": "none", "identity": identity}
    about = {"data": "random", "shape": shape, "shards": -(-count // shard_size), "encoder": encoder,
             "classes": [str(i) for i in range(classes)], "identity": identity}
    write_json(out / "latents.json", about)
    for k in range(about["shards"]):
        y = torch.arange(k * shard_size, min((k + 1) * shard_size, count)) % classes
        z = torch.randn(len(y), *shape, generator=generator("cpu", "synthetic", k)).half()
        write_shard(out, k, z, y, sha256(identity))
    finish(out, about)


def write_teacher(out, latents, classes, preset, seed=0):
    """A slim network, as sanity/export.py writes it, for these latents."""
    torch.manual_seed(seed)
    stats = load_stats(latents)
    channels, grid, _ = stats["var"].shape
    net = DiTDH(grid, channels, **DIT_PRESETS[preset], num_classes=classes)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)
    about = {"kind": "teacher", "classes": [str(i) for i in range(classes)]}
    write_tensors(out / "model.safetensors", {"": net.state_dict(), "stats": stats}, about)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=location, default="runs/synthetic", help="folder for latents and teacher")
    add("--image-size", type=int, choices=(256, 512), default=256, help="pixels")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the teacher")
    add("--images", type=whole(), default=1000, help="latents, and classes")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, grid = Path(args.out), args.image_size // 16
    marker, settings = out / "synthetic.json", {name: x for name, x in vars(args).items() if name != "out"}
    if marker.exists():
        refuse_other(out, read_json(marker), settings)
    elif any(out.glob("[!.]*")) or out.is_file():
        raise InputError(f"{out} holds something else: give an --out that is empty or new")
    lock(out / ".lock")
    write_json(marker, settings)
    shape = (768, grid, grid)
    write_latents(out / "latents", shape, args.images, args.images, args.image_size)
    write_teacher(out / "teacher", out / "latents", args.images, args.preset)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e9
    say(f"{out}: {args.images} random latents and a random {args.preset}, {size:.2f} GB")


if __name__ == "__main__":
    command(main)
