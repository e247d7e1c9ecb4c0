"""A small ViT decoder, latents -> images, for an encoder that has none, as the sanity run's.

    E | D(z + sigma n) - x | + w E | E(D(z + sigma n)) - z | / spread,   n ~ N(0, I), sigma ~ U(0, tau spread)

z: latents, x: images in [0, 1], E(.): the encoder, spread: the latents' deviation. This is RAE's loss (arXiv
2510.11690) with the encoder's features in place of LPIPS and GAN: fine texture comes out soft.

    python sanity/train_decoder.py --data-path my_images --latents data/latents --out runs/decoder
"""
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import Images, Latents, encoder_of  # noqa: E402
from model import (  # noqa: E402
    DECODER_PRESETS, IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, ViTDecoder, command, generator,
    launch, location, not_negative)
from sanity.random_encoder import add_training, remember, train  # noqa: E402

HELD_OUT = 512                                    # images to measure on, kept out; of few, a quarter


def decoder_loss(decode, encode, z, x, noise, spread, feature_weight):
    """z, noise: (B, C, G, G) raw latents; x: (B, 3, S, S) in [0, 1]; decode, encode: z <-> images.

    Returns L1 of the images + feature_weight * L1 of their latents in units of `spread`, and both."""
    image = decode(z + noise)
    l1 = (image - x).abs().mean()
    features = (encode(image) - z).abs().mean() / spread if feature_weight else torch.zeros_like(l1)
    return l1 + feature_weight * features, {"l1": l1.detach(), "features": features.detach()}


@torch.no_grad()
def quality(decoder, z, x):
    """PSNR in decibels, mean over images."""
    error = torch.cat([decoder(part).clamp(0, 1) for part in z.split(64)]) - x
    return {"psnr": -10 * error.square().mean((1, 2, 3)).log10().mean().item()}


def open_pairs(data_path, folder, device, needs_encoder=True):
    """Latents, their images, their encoder. InputError: they do not belong together."""
    latents = Latents(folder)
    made = latents.about["identity"]
    if "image_size" not in made:
        raise InputError(f"{folder} holds latents that were given, without images")
    images = remember(Images(data_path, made["image_size"]))
    if images.sha256 != made["images"]:
        raise InputError(f"{folder} does not hold the latents of the images in {data_path}: "
                         "give the folder that they were made from")
    if images.image_size % latents.shape[1]:
        raise InputError(f"{images.image_size} px do not divide into {latents.shape[1:]} tokens: "
                         "encode with another --image-size")
    return latents, images, encoder_of(folder).to(device) if needs_encoder else None


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-path", type=location, required=True, help="images that --latents are of")
    add("--latents", type=location, default="data/latents")
    add("--out", type=location, default="runs/decoder", help="folder for states and log")
    add("--preset", choices=DECODER_PRESETS, default="ViT-mini", help="size of the network")
    add("--noise", type=not_negative, default=0.8, metavar="TAU",
        help="on the latents, so that small faults of what is generated are forgiven (RAE)")
    add("--feature-weight", type=not_negative, default=0.3, help="w, of the encoder's features; 0: L1 alone")
    add_training(parser, steps=1300, batch_size=32, lr=3e-3, ema=0.998, save_every=1000)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, *_ = launch()
    latents, images, encoder = open_pairs(args.data_path, args.latents, device, args.feature_weight > 0)
    spread = latents.stats["var"].mean().sqrt().item()
    made_by = latents.about["encoder"]
    kept_out = min(HELD_OUT, max(1, len(latents) // 4))
    g = generator("cpu", args.seed, "decoder", "held out")
    order = torch.randperm(len(latents), generator=g).tolist()

    def read(rows):
        z, x = (data.read(rows)[0].to(device).float() for data in (latents, images))
        return z, x / 255

    def loss_of(step, z, x):
        g = generator(device, args.seed, "decoder", step)
        sigma = args.noise * spread * torch.rand(len(z), 1, 1, 1, generator=g, device=device)
        noise = sigma * torch.randn(z.shape, generator=g, device=device)
        return decoder_loss(decoder, encoder, z, x, noise, spread, args.feature_weight)

    def rate(step):
        return args.lr * min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))

    torch.manual_seed(args.seed)
    channels, grid, _ = latents.shape
    sizes = DECODER_PRESETS[args.preset]
    norm = made_by["identity"].get("image_norm", (IMAGE_MEAN, IMAGE_STD))
    patch = images.image_size // grid
    decoder = ViTDecoder(grid, channels, **sizes, patch_size=patch, image_norm=norm)
    about = {
        "kind": "decoder", "num_heads": sizes["num_heads"], "encoder": made_by, "image_norm": norm,
        "stats": latents.stats,
        "settings": {**vars(args), "sha256 of latents": latents.sha256}}
    held_out = read(order[:kept_out])
    train(args, about, decoder.to(device), read, order[kept_out:], loss_of, rate,
          lambda average: quality(average, *held_out), weight_decay=0.0, fused=True)


if __name__ == "__main__":
    command(main)
