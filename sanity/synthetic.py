"""Random latents and a random teacher at the real shapes: does a size fit, how fast is it?

    python sanity/synthetic.py --out runs/synthetic      # 256 px, XL: 0.4 GB of latents, a teacher of 3.4 GB
    python train_teacher.py --latents runs/synthetic/latents --out runs/try --steps 20 --save-every 0
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import write_latents  # noqa: E402
from model import (  # noqa: E402
    DIT_PRESETS, ArgumentParser, DiTDH, InputError, command, generator, load_stats, location, lock,
    read_json, refuse_other, say, whole, write_json, write_tensors)


def random_latents(count, shape):
    """float16 (count, C, H, W), N(0, 1)."""
    keys = (("synthetic", i) for i in range(count))
    return torch.stack([torch.randn(shape, generator=generator("cpu", *key)).half() for key in keys])


def write_teacher(out, latents, classes, preset, seed=0):
    """A slim network, as sanity/export.py writes it, for these latents."""
    torch.manual_seed(seed)
    stats = load_stats(latents)
    channels, grid, _ = stats["var"].shape
    net = DiTDH(grid, channels, **DIT_PRESETS[preset], num_classes=classes)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)         # of 0, velocities would be 0
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
    latents = random_latents(args.images, (768, grid, grid))
    write_latents(out / "latents", latents, range(args.images), made_by="random")
    write_teacher(out / "teacher", out / "latents", args.images, args.preset)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e9
    say(f"{out}: {args.images} random latents and a random {args.preset}, {size:.2f} GB")


if __name__ == "__main__":
    command(main)
