"""A small ViT decoder, latents -> images, for an encoder that has no published one (the sanity run's is random).

    E | D(z + sigma n) - x |  +  w E | E(D(z + sigma n)) - z | / spread,        n ~ N(0, I),  sigma ~ U(0, tau spread)

z: raw latents, x: their images in [0, 1], E(.): the frozen encoder, spread: the latents' standard deviation; one sigma
per image. This is the L1 of RAE's loss (arXiv 2510.11690) with its noise on the tokens, and an error in the encoder's
features where RAE has LPIPS and a GAN: there is neither here, so fine texture comes out soft. For DINOv2 there are
published decoders: use these.

    python sanity/train_decoder.py --data-path data/digits/train --latents data/digits-latents
"""
import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images, Latents, RowSampler, batches_of, encoder_of  # noqa: E402
from model import DECODER_PRESETS, InputError, ViTDecoder, command, generator, read_tensors, save_network, write_tensors  # noqa: E402

HELD_OUT = 512                                     # images kept out of the training, to measure on


def decoder_loss(decode, encode, z, x, noise, spread, feature_weight):
    """z: (B, C, G, G) raw latents; x: (B, 3, S, S) in [0, 1]; noise: like z; decode, encode: latents <-> images.

    Returns L1 of the images + feature_weight * L1 of their latents in units of `spread`, and a dict of these two."""
    image = decode(z + noise)
    l1 = (image - x).abs().mean()
    features = (encode(image) - z).abs().mean() / spread if feature_weight else torch.zeros_like(l1)
    return l1 + feature_weight * features, {"l1": l1.detach(), "features": features.detach()}


class Pairs:
    """A data set of (images, latents), uint8 and float16, in memory when they take less than 2 GB."""

    def __init__(self, images, latents):
        self.images, self.latents = images, latents
        self.small = len(latents) * (3 * images.image_size ** 2 + 2 * math.prod(latents.shape)) < 2e9
        if self.small:
            everything = list(range(len(latents)))
            self.images, self.latents = images.__getitems__(everything)[0], latents.__getitems__(everything)[0]

    def __getitems__(self, indices):
        if self.small:
            return self.images[indices], self.latents[indices]
        return self.images.__getitems__(indices)[0], self.latents.__getitems__(indices)[0]


@torch.no_grad()
def quality(decoder, z, x):
    """L1 and PSNR in decibels, means over images, of the decoded latents z, clipped to [0, 1], against the images x."""
    error = torch.cat([decoder(part).clamp(0, 1) for part in z.split(64)]) - x
    return error.abs().mean().item(), -10 * error.square().mean((1, 2, 3)).log10().mean().item()


def open_pairs(data_path, folder, device):
    """Latents, the images they were made of, and their encoder; InputError where they do not belong together."""
    latents = Latents(folder)
    images, encoder = Images(data_path, latents.description["image_size"]), encoder_of(latents.description).to(device)
    few = list(range(0, len(latents), math.ceil(len(latents) / 16)))
    if torch.equal(images.labels.repeat(2 if latents.description["flips"] else 1), latents.labels):
        with torch.no_grad():
            z, again = latents.__getitems__(few)[0].to(device), encoder(images.__getitems__(few)[0].to(device))
        if (again - z).abs().mean() < 0.1 * latents.stats[1].mean().sqrt():
            return latents, images, encoder
    raise InputError(f"{folder} does not hold the latents of the images in {data_path}, one for each and in order")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-path", default="data/digits/train", help="images that --latents was made from (default %(default)s)")
    add("--latents", default="data/digits-latents", help="their latents (default %(default)s)")
    add("--out", default="runs/sanity/decoder", help="folder for the network (default %(default)s)")
    add("--preset", choices=DECODER_PRESETS, default="ViT-mini", help="size of the network (default %(default)s)")
    add("--steps", type=int, default=1300, help="of the optimizer (default %(default)s)")
    add("--batch-size", type=int, default=32, help="images (default %(default)s: on a CPU many small steps learn most)")
    add("--lr", type=float, default=3e-3, help="of AdamW at its highest; cosine to a tenth (default %(default)s)")
    add("--noise", type=float, default=0.8, metavar="TAU", help="largest noise on the latents, in units of their "
        "spread: the decoder then forgives what is generated its small faults (default %(default)s: RAE)")
    add("--feature-weight", type=float, default=0.3, help="w, of the encoder's features (default %(default)s)")
    add("--ema", type=float, default=0.998, help="decay of the weights' average per step (default %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    add("--save-every", type=int, default=1000, metavar="STEPS", help="steps between states (default %(default)s)")
    add("--resume", action="store_true", help="go on from the state in --out, if there is one")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes that read ahead where the data do not "
        "fit into memory (default here %(default)s)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, state = Path(args.out), {}
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "save_every", "resume", "workers")}
    if min(args.steps, args.batch_size, args.save_every) < 1:
        raise InputError("--steps, --batch-size and --save-every are at least 1")
    if (out / "state.safetensors").exists() or (out / "config.json").exists():
        if not args.resume:
            raise InputError(f"{out} holds another run: give another --out, or --resume to go on with it")
        state, about = read_tensors(out / "state.safetensors")
        if about["settings"] != repr(settings):
            raise InputError(f"{out} holds another run ({about['settings']}): give another --out")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents, images, encoder = open_pairs(args.data_path, args.latents, device)
    if len(latents) < 2 * HELD_OUT:
        raise InputError(f"{len(latents)} images are too few: {HELD_OUT} are kept out, give at least {2 * HELD_OUT}")
    pairs, spread = Pairs(images, latents), latents.stats[1].mean().sqrt().item()
    order = torch.randperm(len(latents), generator=generator("cpu", args.seed, "decoder", "held out"))
    x, z = pairs.__getitems__(order[:HELD_OUT].tolist())
    held_out, rest = (z.to(device).float(), x.to(device).float() / 255), order[HELD_OUT:]

    torch.manual_seed(args.seed)
    channels, grid, _ = latents.shape
    network = dict(input_size=grid, in_channels=channels, patch_size=images.image_size // grid,
                   **DECODER_PRESETS[args.preset])
    decoder, first = ViTDecoder(**network).to(device), int(state.get("step", 0))
    names, weights = zip(*((name, p) for name, p in decoder.named_parameters() if p.requires_grad), strict=True)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if state:
        for name, p in zip(names, weights, strict=True):
            p.data.copy_(state[f"net/{name}"])
            optimizer.state[p] = {"step": torch.tensor(float(first), device=device),
                                  **{k: state[f"{k}/{name}"].to(device) for k in ("exp_avg", "exp_avg_sq")}}
    average = [state.get(f"average/{k}", p).detach().clone().to(device) for k, p in zip(names, weights, strict=True)]
    print(f"{len(rest):,} latents of {channels}x{grid}x{grid} and their images, {HELD_OUT} more to measure on; "
          f"{sum(p.numel() for p in weights) / 1e6:.2f} M parameters on {device}", flush=True)

    start = time.time()
    rows = RowSampler(len(rest), args.seed, args.batch_size, [(0, args.batch_size)], first, args.steps)
    batches = batches_of(pairs, [rest[batch].tolist() for batch in rows], 0 if pairs.small else args.workers)
    for step, (x, z) in enumerate(batches, first + 1):
        x, z = x.to(device).float() / 255, z.to(device).float()
        g = generator(device, args.seed, "decoder", step)
        sigma = args.noise * spread * torch.rand(len(z), 1, 1, 1, generator=g, device=device)
        noise = sigma * torch.randn(z.shape, generator=g, device=device)
        loss, numbers = decoder_loss(decoder, encoder, z, x, noise, spread, args.feature_weight)
        loss.backward()
        part = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 50) * part
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(args.ema, step / (10 + step)))     # soon forgets the random start
        report = step % max(1, args.steps // 10) == 0 or step == args.steps
        save = step % args.save_every == 0 or step == args.steps
        if (report or save) and not torch.stack(torch._foreach_norm([*weights, *average])).isfinite().all():
            raise InputError(f"weights are not finite at step {step}; not saved: try a lower --lr")
        if report:
            l1, psnr = quality(decoder, *held_out)
            print(f"step {step} of {args.steps}: L1 {numbers['l1']:.4f}, features {numbers['features']:.3f}; "
                  f"held-out L1 {l1:.4f}, PSNR {psnr:.2f} dB; {time.time() - start:.0f} s", flush=True)
        if save:
            tensors = {"step": torch.tensor(step)}
            for name, p, mean in zip(names, weights, average, strict=True):
                tensors |= {f"net/{name}": p, f"average/{name}": mean,
                            **{f"{k}/{name}": optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}}
            write_tensors(out / "state.safetensors", tensors, {"settings": repr(settings)})

    for p, mean in zip(weights, average, strict=True):
        p.data.copy_(mean)
    l1, psnr = quality(decoder, *held_out)
    config = {"kind": "decoder", "network": network, "encoder": latents.description["encoder"], "settings": settings,
              "held_out": {"images": HELD_OUT, "l1": l1, "psnr": psnr}}
    save_network(out, decoder.state_dict(), config, latents.stats)
    print(f"{out}: averaged weights, held-out L1 {l1:.4f}, PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    command(main)
