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
    DIT_PRESETS, ArgumentParser, DiTDH, command, generator, load_stats, location, say, whole, write_tensors)
from sanity.random_encoder import lock_folder  # noqa: E402


def random_latents(count, shape):
    """float16 (count, C, H, W), N(0, 1)."""
    generators = (generator("cpu", "synthetic", i) for i in range(count))
    return torch.stack([torch.randn(shape, generator=g).half() for g in generators])


def write_teacher(out, latents, classes, preset):
    """A slim network, as sanity/export.py writes it, for these latents."""
    torch.manual_seed(0)
    stats = load_stats(latents)
    channels, grid, _ = stats["var"].shape
    net = DiTDH(grid, channels, **DIT_PRESETS[preset], num_classes=classes)
    torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)         # of 0, velocities would be 0
    about = {"kind": "teacher", "classes": [str(i) for i in range(classes)]}
    parts = {"": net.state_dict(), "stats": stats}
    lock_folder(out, parts)
    write_tensors(out / "model.safetensors", parts, about)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=location, default="runs/synthetic", help="folder for latents and teacher")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the teacher")
    add("--images", type=whole(), default=1000, help="latents, and classes")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, latents = Path(args.out), random_latents(args.images, (768, 16, 16))
    write_latents(out / "latents", latents, range(args.images), made_by="random")
    write_teacher(out / "teacher", out / "latents", args.images, args.preset)
    say(f"{out}: {args.images} random latents and a random {args.preset}")


if __name__ == "__main__":
    command(main)
