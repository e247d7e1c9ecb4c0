"""An encoder with random weights, for runs without downloads: a folder for `--encoder` of encode_latents.py.

    python sanity/random_encoder.py --out runs/sanity/encoder

A Dinov2WithRegistersModel whose tokens keep what their patches show. The patch projection turns the lowest
frequencies (a DCT, luminance finer than colour) by a random rotation. The final LayerNorm removes a token's
mean and length, so these hold little: the rotation leaves out the direction (1, ..., 1) and that of a bias
longer than the signal. Blocks add random features times 0.2. Reports call it RANDOM ("untrained": true).
"""
import copy
import functools
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import batches_of, read_ahead  # noqa: E402
from model import (  # noqa: E402
    IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, Log, begin_run, command, digest_of, generator,
    location, lock, positive, read_json, read_tensors, refuse_other, save_state, say, stop_signals, whole,
    write_json, write_tensors)


def dinov2(width, depth, heads, patch, image_size, **more):
    """A Dinov2WithRegistersModel of these sizes, initialized by torch's global generator."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    if width % heads:
        raise InputError(f"--width {width} --heads {heads}: give a width that is a multiple of the heads")
    if image_size % patch:
        raise InputError(f"--image-size {image_size} --patch {patch}: give a multiple of the patch")
    return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=patch,
        image_size=image_size, **more))


def random_dinov2(width, depth, heads, patch, seed):
    """A Dinov2WithRegistersModel whose weights follow from `seed` alone."""
    # Its own initialization is replaced below, all of it.
    with torch.random.fork_rng(devices=[]):
        net = dinov2(width, depth, heads, patch, 8 * patch, layerscale_value=0.2)
    g = generator("cpu", seed, "random encoder")

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    for name, parameter in net.named_parameters():
        if name.startswith("embeddings."):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2:
            parameter.data = (normal(*parameter.shape) / parameter.shape[1] ** 0.5).float()

    # The waves that a patch is made of, as many of the lowest as there is room for.
    k = torch.arange(patch, dtype=torch.float64)
    line = torch.cos(math.pi / patch * k[:, None] * (k + 0.5))
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    waves = torch.einsum("ac,iy,jx->aijcyx", colour, line, line).flatten(0, 2).flatten(1)
    frequency = torch.tensor([1, 3, 3])[:, None, None] * (1 + k[:, None] ** 2 + k ** 2).sqrt()
    lowest = frequency.flatten().argsort(stable=True)[:width - 2]
    waves = F.normalize(waves)[lowest]

    # The first column of the rotation is the direction (1, ..., 1), the second the bias.
    columns = torch.cat([torch.ones_like(normal(width, 1)), normal(width, width - 1)], dim=1)
    rotation = torch.linalg.qr(columns)[0]
    projection = net.embeddings.patch_embeddings.projection
    weight = rotation[:, 2:2 + len(waves)] @ waves / patch
    projection.weight.data = weight.view(width, 3, patch, patch).float()
    projection.bias.data = (4 * rotation[:, 1]).float()
    return net


def lock_folder(out, parts):
    """Lock `out`. InputError: it holds anything but these very tensors, and their JSON perhaps."""
    model, there = out / "model.safetensors", {path.name for path in out.glob("[!.]*")}
    other = out.is_file() or there - {model.name, "config.json", "preprocessor_config.json"}
    if other or there and read_tensors(model)[2] != {part: digest_of(x) for part, x in parts.items()}:
        raise InputError(f"{out} holds something else: give an --out that is empty or new")
    lock(out / ".lock")


def save_dinov2(out, net, more):
    """The folder that --encoder takes; more: entries of its config.json, which is written last."""
    write_tensors(out / "model.safetensors", {"": net.state_dict()})
    write_json(out / "preprocessor_config.json", {"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD})
    config = json.loads(net.config.to_json_string())
    config |= {"architectures": ["Dinov2WithRegistersModel"], **more}
    write_json(out / "config.json", config)


def add_sizes(parser, width=64, depth=2, heads=4, patch=8):
    add = parser.add_argument
    add("--width", type=whole(3), default=width, help="channels of a token, a multiple of --heads")
    add("--depth", type=whole(), default=depth, help="blocks")
    add("--heads", type=whole(), default=heads, help="of the attention")
    add("--patch", type=whole(), default=patch, help="side of a patch in pixels")


# ---- What train_encoder.py and train_decoder.py share ----------------------------------------------------
def remember(images):
    """Up to 2 GB of decoded images: of a small set, each is decoded once."""
    images.pixels = functools.lru_cache(2 ** 31 // (3 * images.image_size ** 2))(images.pixels)
    return images


def add_training(parser, **defaults):
    """The flags of `train`."""
    add = parser.add_argument
    add("--steps", type=whole(), help="of the optimizer")
    add("--batch-size", type=whole(), help="images")
    add("--lr", type=positive, help="of AdamW at its highest")
    add("--seed", type=whole(0), default=0, help="of everything random")
    add("--save-every", type=whole(), metavar="STEPS", help="steps between states")
    add("--workers", type=whole(0), default=1, help="threads that read ahead; 0: read in place")
    parser.set_defaults(**defaults, log_every=100, keep=1, keep_every=None)


def train(args, about, net, read, order, loss_of, rate, judge, clip=math.inf, **adamw):
    """Train `net`, or go on; returns its average.

    read: some of `order` -> a batch; loss_of: (step, *batch) -> loss, numbers; rate: step -> learning rate;
    judge: average -> numbers for the log, at each state."""
    average = copy.deepcopy(net).requires_grad_(False)
    weights, averages = [*net.parameters()], [*average.parameters()]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), **adamw)
    first_step, seconds = begin_run(about, net, average, optimizer)
    size, log = args.batch_size, Log(args, first_step, seconds)
    rows = batches_of(len(order), args.seed, size, [(0, size)], first_step, args.steps)
    batches = read_ahead(read, ([order[i] for i in batch] for batch in rows), args.workers)
    with stop_signals() as stopped:
        for step, batch in enumerate(batches, first_step + 1):
            loss, numbers = loss_of(step, *batch)
            loss.backward()
            log.add(loss, numbers)
            log.end_step(nn.utils.clip_grad_norm_(weights, clip))
            lr = optimizer.param_groups[0]["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():                 # it soon forgets the random start
                torch._foreach_lerp_(averages, weights, 1 - min(args.ema, step / (10 + step)))
            stop = stopped()
            saves = stop or step == args.steps or step % args.save_every == 0
            if saves or step == 1 or step % args.log_every == 0:
                log.write(step, lr, **judge(average) if saves else {})
            if saves:
                save_state(about, step, log.seconds, net, average, optimizer)
            if stop:
                say(f"stopped after step {step}: the same command goes on")
                sys.exit(128 + stop)
    return average


# ---- By command ------------------------------------------------------------------------------------------
def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=location, default="runs/sanity/encoder", help="folder for the encoder")
    add_sizes(parser)
    add("--seed", type=whole(0), default=0, help="of the weights")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    settings = {"untrained": True, "hidden_size": args.width, "num_hidden_layers": args.depth,
                "num_attention_heads": args.heads, "patch_size": args.patch, "seed": args.seed}
    net = random_dinov2(args.width, args.depth, args.heads, args.patch, args.seed)
    if there := (out / "config.json").exists():
        found = read_json(out / "config.json")
        refuse_other(out, {name: found.get(name) for name in settings}, settings)
    lock_folder(out, {"": net.state_dict()})
    if there:
        return say(f"{out} is there: an encoder with random weights")
    save_dinov2(out, net, settings)
    say(f"{out}: an encoder with random weights, {args.width} channels, patches of {args.patch} px")


if __name__ == "__main__":
    command(main)
