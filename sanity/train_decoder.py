"""A small ViT decoder, latents -> images, for an encoder that has no published one, as the sanity run's.

    E | D(z + sigma n) - x | + w E | E(D(z + sigma n)) - z | / spread,   n ~ N(0, I), sigma ~ U(0, tau spread)

z: raw latents, x: their images in [0, 1], E(.): the frozen encoder, spread: the latents' standard deviation;
one sigma per image. This is the L1 of RAE's loss (arXiv 2510.11690) with its noise on the tokens, and an
error in the encoder's features where RAE has LPIPS and a GAN: there is neither here, so fine texture comes
out soft. For DINOv2 there are published decoders: use these.

    python sanity/train_decoder.py --data-path data/digits/train --latents data/digits-latents

The same command, repeated, goes on; --out is then a --decoder of sample.py.
"""
import copy
import math
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images, Latents, batches_of, encoder_of, read_ahead  # noqa: E402
from model import (  # noqa: E402
    DECODER_PRESETS, IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, Log, ViTDecoder, begin_run, command,
    fraction, generator, launch, location, not_negative, positive, save_state, say, stop_signals, whole)

HELD_OUT = 512                                    # images kept out, to measure on; of few, a quarter


def decoder_loss(decode, encode, z, x, noise, spread, feature_weight):
    """z: (B, C, G, G) raw latents; x: (B, 3, S, S) in [0, 1]; noise: like z; decode, encode: z <-> images.

    Returns L1 of the images + feature_weight * L1 of their latents in units of `spread`, and both."""
    image = decode(z + noise)
    l1 = (image - x).abs().mean()
    features = (encode(image) - z).abs().mean() / spread if feature_weight else torch.zeros_like(l1)
    return l1 + feature_weight * features, {"l1": l1.detach(), "features": features.detach()}


@torch.no_grad()
def quality(decoder, z, x):
    """L1 and PSNR in decibels, means over images, of the decoded latents z, clipped, against the images x."""
    error = torch.cat([decoder(part).clamp(0, 1) for part in z.split(64)]) - x
    return {"held_out_l1": error.abs().mean().item(),
            "psnr": -10 * error.square().mean((1, 2, 3)).log10().mean().item()}


def open_pairs(data_path, folder, device, needs_encoder=True):
    """Latents, the images that they were made of, and their encoder (None: a module of one's own).

    InputError: they do not belong together, or no encoder where one is needed."""
    latents = Latents(folder)
    made = latents.about["identity"]
    if "image_size" not in made:
        raise InputError(f"{folder} holds latents that were given: without the images that they are of")
    images = Images(data_path, made["image_size"])
    encoder = encoder_of(folder).to(device) if needs_encoder or "kind" in made else None
    if len(latents) < 64:
        raise InputError(f"{len(latents)} images are too few to learn and to measure: give at least 64")
    if images.image_size % latents.shape[1]:
        raise InputError(f"images of {images.image_size} px do not divide into {latents.shape[1]} tokens")
    fit = torch.equal(images.labels.repeat(1 + made["flips"]), latents.labels)
    if not encoder:                               # then names must do
        fit = fit and images.sha256 == made["images"]
    elif fit:
        few = list(range(0, len(latents), math.ceil(len(latents) / 16)))
        with torch.no_grad():
            z = latents.read(few)[0].to(device)
            again = encoder(images.read(few)[0].to(device))
        fit = (again - z).abs().mean() < 0.1 * latents.stats["var"].mean().sqrt()
    if not fit:
        raise InputError(f"{folder} does not hold the latents of the images in {data_path}, one for each and "
                         "in order: give the folder that they were made from")
    return latents, images, encoder


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", type=location, default="data/digits/train", help="images that --latents was made from")
    add("--latents", type=location, default="data/digits-latents", help="their latents")
    add("--out", type=location, default="runs/sanity/decoder", help="folder for states and log")
    add("--preset", choices=DECODER_PRESETS, default="ViT-mini", help="size of the network")
    add("--steps", type=whole(), default=1300, help="of the optimizer")
    add("--batch-size", type=whole(), default=32, help="images; on a CPU many small steps learn most")
    add("--lr", type=positive, default=3e-3, help="of AdamW at its highest; cosine to a tenth")
    add("--noise", type=not_negative, default=0.8, metavar="TAU", help="largest noise on the latents, in "
        "units of their spread: the decoder then forgives what is generated its small faults (RAE)")
    add("--feature-weight", type=not_negative, default=0.3, help="w, of the encoder's features; 0: L1 alone")
    add("--ema", type=fraction, default=0.998, help="decay of the weights' average per step")
    add("--seed", type=whole(0), default=0, help="of everything random")
    add("--log-every", type=whole(), default=100, metavar="STEPS", help="steps between lines of log.jsonl")
    add("--save-every", type=whole(), default=1000, metavar="STEPS", help="steps between states")
    add("--workers", type=whole(0), default=1, help="threads that read ahead")
    parser.set_defaults(keep=1, keep_every=None)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, *_ = launch()
    latents, images, encoder = open_pairs(args.data_path, args.latents, device, args.feature_weight > 0)
    kept_out = HELD_OUT if len(latents) >= 2 * HELD_OUT else len(latents) // 4
    spread = latents.stats["var"].mean().sqrt().item()
    g = generator("cpu", args.seed, "decoder", "held out")
    order = torch.randperm(len(latents), generator=g).tolist()

    def read(rows):
        """Of `order`: z, x in [0, 1]."""
        rows = [order[row] for row in rows]
        return latents.read(rows)[0].to(device).float(), images.read(rows)[0].to(device).float() / 255
    held_out = read(range(kept_out))

    torch.manual_seed(args.seed)
    channels, grid, _ = latents.shape
    encoded_by = latents.about["encoder"]
    image_norm = encoded_by["identity"].get("image_norm", (IMAGE_MEAN, IMAGE_STD))
    decoder = ViTDecoder(grid, channels, **DECODER_PRESETS[args.preset],
                         patch_size=images.image_size // grid, image_norm=image_norm)
    average = copy.deepcopy(decoder.to(device)).requires_grad_(False)
    weights = [p for p in decoder.parameters() if p.requires_grad]
    averages = [average.get_parameter(name) for name, p in decoder.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    about = {"kind": "decoder", "num_heads": DECODER_PRESETS[args.preset]["num_heads"],
             "encoder": encoded_by, "stats": latents.stats, "image_norm": image_norm,
             "settings": {**vars(args), "sha256 of latents": latents.sha256}}
    first_step, seconds = begin_run(about, decoder, average, optimizer)

    rows = [(0, args.batch_size)]
    rows = batches_of(len(order) - kept_out, args.seed, args.batch_size, rows, first_step, args.steps)
    batches = read_ahead(read, ([kept_out + row for row in batch] for batch in rows), args.workers)
    log = Log(args, first_step, seconds)
    with stop_signals() as stopped:
        for step, (z, x) in enumerate(batches, first_step + 1):
            g = generator(device, args.seed, "decoder", step)
            sigma = args.noise * spread * torch.rand(len(z), 1, 1, 1, generator=g, device=device)
            noise = sigma * torch.randn(z.shape, generator=g, device=device)
            loss, numbers = decoder_loss(decoder, encoder, z, x, noise, spread, args.feature_weight)
            loss.backward()
            log.add(loss, numbers)
            log.end_step(nn.utils.clip_grad_norm_(weights, math.inf))
            part = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
            lr = optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 50) * part
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():                 # it soon forgets the random start
                torch._foreach_lerp_(averages, weights, 1 - min(args.ema, step / (10 + step)))

            stop = stopped()
            saves = stop or step == args.steps or step % args.save_every == 0
            if saves or step == 1 or step % args.log_every == 0:
                log.write(step, lr, **quality(average, *held_out) if saves else {})
            if saves:
                save_state(about, step, log.seconds, decoder, average, optimizer)
                log.since = time.perf_counter()
            if stop:
                say(f"stopped after step {step}: the same command goes on")
                sys.exit(128 + stop)


if __name__ == "__main__":
    command(main)
