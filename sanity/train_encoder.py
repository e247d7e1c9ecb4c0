"""A small encoder for images that DINOv2 does not know: a folder for `--encoder` of encode_latents.py.

    python sanity/train_encoder.py --data-path photos.zip --flips --out runs/encoder

A Dinov2WithRegistersModel. What is trained is what becomes latents: patch tokens; z, their mean, stands for
the image. --objective labels: cross entropy of a linear layer on z; self: two views of an image find each
other among the batch's (SimCLR, arXiv 2002.05709). The weights' average is saved; each state logs its k-NN
accuracy on a tenth of the images, kept out.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images  # noqa: E402
from model import (  # noqa: E402
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, command, generator, launch, location, say, whole)
from sanity.random_encoder import (  # noqa: E402
    add_sizes, add_training, dinov2, remember, save_dinov2, train)

BANK, KEPT_OUT = 5000, 2000                       # images to judge by and on, at most


def view(x, g, flips, smallest=0.3, tint=0.0):
    """x: (B, 3, S, S) in [0, 1] -> crops of `smallest` to 1 of the area, perhaps mirrored, in other contrast,
    saturation and light, which differs by up to `tint` between the colours."""
    area, left, top, turn, colour, contrast, light = torch.rand(7, len(x), 1, 1, 1, generator=g).to(x.device)
    size, none = (smallest + (1 - smallest) * area).sqrt(), torch.zeros_like(area)
    width = torch.where(turn < 0.5, -size, size) if flips else size
    left, top = (2 * left - 1) * (1 - size), (2 * top - 1) * (1 - size)
    crop = torch.cat([width, none, left, none, size, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(crop, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = torch.lerp(x.mean(1, keepdim=True), x, 1.5 * colour)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, 0.6 + 0.8 * contrast)
    colours = 1 + tint * (2 * torch.rand(len(x), 3, 1, 1, generator=g) - 1).to(x.device)
    return (x * (0.6 + 0.8 * light) * colours).clamp(0, 1)


def features(net, x):
    """x: (B, 3, S, S) in [0, 1] -> z, the patch tokens' mean (B, C)."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    tokens = net(pixel_values=(x - mean) / std).last_hidden_state
    return tokens[:, 1 + net.config.num_register_tokens:].mean(1)


def similarities(z):
    """(2 B, C), one view of B images and then another -> (2 B, 2 B): cosines / 0.2, a view's own left out."""
    z = F.normalize(z)
    return (z @ z.T / 0.2).fill_diagonal_(-math.inf)


@torch.no_grad()
def knn_accuracy(net, bank, kept):
    """On `kept`, by 20 neighbours (cosine, DINO's weights) in `bank`: (uint8 images, labels)."""
    z, z_kept = (F.normalize(torch.cat(
        [features(net, x.to(net.device).float() / 255).cpu() for x in images.split(250)]))
        for images, _ in (bank, kept))
    near, which = (z_kept @ z.T).topk(min(20, len(z)))
    votes = (F.one_hot(bank[1])[which] * (near / 0.07).exp()[:, :, None]).sum(1)
    return (votes.argmax(1) == kept[1]).float().mean().item()


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", type=location, required=True, help="class folders, or a .zip of them")
    add("--out", type=location, default="runs/encoder", help="for states, log and the encoder")
    add("--objective", choices=("labels", "self"), default="labels", help="what the encoder learns from")
    add("--image-size", type=whole(), default=32, help="pixels, a multiple of --patch")
    add("--flips", action="store_true", help="mirror images")
    add_sizes(parser, width=128, depth=6)
    add_training(parser, steps=6000, batch_size=64, lr=1e-3, ema=0.996, save_every=500)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, *_ = launch()
    images = remember(Images(args.data_path, args.image_size))
    kept = min(KEPT_OUT, len(images) // 10)
    if len(images.classes) < 2 or kept < 1:
        raise InputError(f"{args.data_path}: needed are two class folders or more, of 10 images")
    torch.manual_seed(args.seed)
    net = dinov2(args.width, args.depth, args.heads, args.patch, args.image_size)
    for unused in (net.layernorm, net.embeddings.mask_token):              # not in the latents
        unused.requires_grad_(False)
    order = torch.randperm(len(images), generator=generator("cpu", args.seed, "encoder", "kept")).tolist()
    judges = images.read(order[kept:kept + BANK]), images.read(order[:kept])
    width, by_labels = args.width, args.objective == "labels"
    head = nn.Linear(width, len(images.classes)) if by_labels else nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    student = nn.ModuleList([net, head]).to(device)

    def loss_of(step, x, target):
        g = generator("cpu", args.seed, "encoder", step)
        x, target = x.to(device).float() / 255, target.to(device)
        if by_labels:
            answers = head(features(net, view(x, g, args.flips)))
        else:
            x = torch.cat([view(x, g, args.flips, smallest=0.2, tint=0.3) for _ in range(2)])
            answers = similarities(head(features(net, x)))
            target = torch.arange(len(x), device=device).roll(len(x) // 2)        # the other view
        return F.cross_entropy(answers, target), {}

    def rate(step):
        return args.lr * min(1, 20 * step / args.steps) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    def judge(average):
        return {"k-NN": round(knn_accuracy(average[0], *judges), 4)}

    about = {"kind": "encoder", "stats": {}, "settings": {**vars(args), "sha256 of images": images.sha256}}
    average = train(
        args, about, student, images.read, order[kept:], loss_of, rate, judge, clip=1, weight_decay=0.05)
    found = judge(average)
    save_dinov2(Path(args.out), average[0], {"training": {**about["settings"], **found}})
    say(f"{args.out}: averaged weights, {found}")


if __name__ == "__main__":
    command(main)
