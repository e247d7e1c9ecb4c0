"""A small ViT decoder, latents -> images, for an encoder that has no published one, as the sanity run's.

    E | D(z + sigma n) - x | + w E | E(D(z + sigma n)) - z | / spread,   n ~ N(0, I), sigma ~ U(0, tau spread)

z: raw latents, x: their images in [0, 1], E(.): the frozen encoder, spread: the latents' standard deviation;
one sigma per image. This is the L1 of RAE's loss (arXiv 2510.11690) with its noise on the tokens, and an
error in the encoder's features where RAE has LPIPS and a GAN: there is neither here, so fine texture comes
out soft. For DINOv2 there are published decoders: use these.

    python sanity/train_decoder.py --data-path data/digits/train --latents data/digits-latents
"""
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images, Latents, RowSampler, batches_of, encoder_of  # noqa: E402
from model import (  # noqa: E402
    DECODER_PRESETS, MOMENTS, ArgumentParser, InputError, ViTDecoder, command, digest_of_text, fraction,
    generator, hold, not_negative, positive, read_tensors, refuse_other, save_network, say, whole,
    write_tensors)

HELD_OUT = 512                                    # images kept out, to measure on; of few, a quarter


def decoder_loss(decode, encode, z, x, noise, spread, feature_weight):
    """z: (B, C, G, G) raw latents; x: (B, 3, S, S) in [0, 1]; noise: like z; decode, encode: z <-> images.

    Returns L1 of the images + feature_weight * L1 of their latents in units of `spread`, and both."""
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
            self.images, _ = images.__getitems__(everything)
            self.latents, _ = latents.__getitems__(everything)

    def __getitems__(self, indices):
        if self.small:
            return self.images[indices], self.latents[indices]
        return self.images.__getitems__(indices)[0], self.latents.__getitems__(indices)[0]


@torch.no_grad()
def quality(decoder, z, x):
    """L1 and PSNR in decibels, means over images, of the decoded latents z, clipped, against the images x."""
    error = torch.cat([decoder(part).clamp(0, 1) for part in z.split(64)]) - x
    return error.abs().mean().item(), -10 * error.square().mean((1, 2, 3)).log10().mean().item()


def open_pairs(data_path, folder, device):
    """Latents, the images they were made of, and their encoder. InputError: they do not belong together."""
    latents = Latents(folder)
    images = Images(data_path, latents.description["image_size"])
    encoder = encoder_of(latents.description).to(device)
    few = list(range(0, len(latents), math.ceil(len(latents) / 16)))
    if torch.equal(images.labels.repeat(2 if latents.description["flips"] else 1), latents.labels):
        with torch.no_grad():
            z = latents.__getitems__(few)[0].to(device)
            again = encoder(images.__getitems__(few)[0].to(device))
        if (again - z).abs().mean() < 0.1 * latents.stats[1].mean().sqrt():
            return latents, images, encoder
    raise InputError(f"{folder} does not hold the latents of the images in {data_path}, one for each and in "
                     "order: give the folder that they were made from")


def open_run(out, settings, resume):
    """Lock the folder of a run of one process -> its state's tensors, {} where there is none yet.

    InputError: it holds a run of other settings; or of these, and `resume` is not set."""
    hold(out / ".lock", "*.json", "*.safetensors")
    path = out / "state.safetensors"
    if not path.exists() and not (out / "config.json").exists():
        return {}
    state, about = read_tensors(path)
    try:
        before = json.loads(about["settings"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{out} holds another run, of an older version: give another --out") from error
    refuse_other(out, before, settings)
    if not resume:
        raise InputError(f"{out} holds this very run: --resume goes on with it; or give another --out")
    return state


def trained(net, average, optimizer):
    """{name: tensor} of what is trained: weights, their averages, AdamW's moments; the tensors themselves."""
    tensors = {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            tensors |= {f"net/{name}": p.data, f"average/{name}": average.get_parameter(name).data,
                        **{f"{k}/{name}": optimizer.state[p][k] for k in MOMENTS}}
    return tensors


def restore(state, net, average, optimizer):
    """Copy the tensors of open_run, if any, to where they belong. Returns the step they are of."""
    step = state.get("step", torch.tensor(0.0))
    for p in optimizer.param_groups[0]["params"] if state else ():
        moments = {k: torch.zeros_like(p) for k in MOMENTS}
        optimizer.state[p] = {"step": step.float().to(p.device), **moments}
    for name, tensor in trained(net, average, optimizer).items() if state else ():
        tensor.copy_(state[name])
    return int(step)


def save_run(out, settings, step, net, average, optimizer):
    """What open_run and restore go on from. InputError: weights are not finite."""
    tensors = trained(net, average, optimizer)
    if not torch.stack(torch._foreach_norm(list(tensors.values()))).isfinite().all():
        raise InputError(f"weights are not finite at step {step}; not saved: try a lower --lr")
    tensors["step"] = torch.tensor(step)
    write_tensors(out / "state.safetensors", tensors, {"settings": json.dumps(settings)})


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", default="data/digits/train", help="images that --latents was made from")
    add("--latents", default="data/digits-latents", help="their latents")
    add("--out", default="runs/sanity/decoder", help="folder for the network")
    add("--preset", choices=DECODER_PRESETS, default="ViT-mini", help="size of the network")
    add("--steps", type=whole(), default=1300, help="of the optimizer")
    add("--batch-size", type=whole(), default=32, help="images; on a CPU many small steps learn most")
    add("--lr", type=positive, default=3e-3, help="of AdamW at its highest; cosine to a tenth")
    add("--noise", type=not_negative, default=0.8, metavar="TAU", help="largest noise on the latents, in "
        "units of their spread: the decoder then forgives what is generated its small faults (RAE)")
    add("--feature-weight", type=not_negative, default=0.3, help="w, of the encoder's features")
    add("--ema", type=fraction, default=0.998, help="decay of the weights' average per step")
    add("--seed", type=whole(0), default=0, help="of everything random")
    add("--save-every", type=whole(), default=1000, metavar="STEPS", help="steps between states")
    add("--resume", action="store_true", help="go on from the state in --out, if there is one")
    add("--workers", type=whole(0), default=min(8, os.cpu_count()), help="processes that read ahead where "
        "the data do not fit into memory")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    free = "out", "save_every", "resume", "workers", "data_path", "latents"
    settings = {k: v for k, v in vars(args).items() if k not in free}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents, images, encoder = open_pairs(args.data_path, args.latents, device)
    made = latents.description
    settings["data"] = digest_of_text(images.digest, made["statistics_sha256"], made["encoder"]["sha256"])
    if len(latents) < 64:
        raise InputError(f"{len(latents)} images are too few to learn and to measure: give at least 64")
    kept_out = HELD_OUT if len(latents) >= 2 * HELD_OUT else len(latents) // 4

    state = open_run(out, settings, args.resume)
    pairs, spread = Pairs(images, latents), latents.stats[1].mean().sqrt().item()
    order = torch.randperm(len(latents), generator=generator("cpu", args.seed, "decoder", "held out"))
    x, z = pairs.__getitems__(order[:kept_out].tolist())
    held_out, rest = (z.to(device).float(), x.to(device).float() / 255), order[kept_out:]

    torch.manual_seed(args.seed)
    channels, grid, _ = latents.shape
    network = dict(input_size=grid, in_channels=channels, patch_size=images.image_size // grid,
                   **DECODER_PRESETS[args.preset])
    decoder = ViTDecoder(**network).to(device)
    average = copy.deepcopy(decoder).requires_grad_(False)
    weights, averages = list(decoder.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = restore(state, decoder, average, optimizer)
    say(f"{len(rest):,} latents of {channels}x{grid}x{grid} and their images, {kept_out} more to measure on; "
        f"{sum(p.numel() for p in weights if p.requires_grad) / 1e6:.2f} M weights on {device}, "
        f"steps {first} to {args.steps}")

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
            # It soon forgets the random start.
            torch._foreach_lerp_(averages, weights, 1 - min(args.ema, step / (10 + step)))
        if step % max(1, args.steps // 10) == 0 or step == args.steps:
            l1, psnr = quality(decoder, *held_out)
            say(f"step {step} of {args.steps}: L1 {numbers['l1']:.4f}, features {numbers['features']:.3f}; "
                f"held-out L1 {l1:.4f}, PSNR {psnr:.2f} dB; {time.time() - start:.0f} s")
        if step % args.save_every == 0 or step == args.steps:
            save_run(out, settings, step, decoder, average, optimizer)

    l1, psnr = quality(average, *held_out)
    config = {"kind": "decoder", "network": network, "encoder": made["encoder"], "settings": settings,
              "held_out": {"images": kept_out, "l1": l1, "psnr": psnr}}
    save_network(out, average.state_dict(), config, latents.stats)
    say(f"{out}: averaged weights, held-out L1 {l1:.4f}, PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    command(main)
