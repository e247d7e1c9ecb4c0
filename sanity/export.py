"""A network to hand on: the average of a run, or of one of its states, under its published names.

    python sanity/export.py runs/meanflow --out my_student              # 3.4 GB of an XL's 13.4
    python sanity/export.py runs/decoder --autoencoder data/latents --out my_rae

The first writes model.safetensors, with the latent statistics and what a state says of itself, and
config.json, the same for people to read: scripts and `load_network` take folder or file. The second writes
what diffusers' AutoencoderRAE.from_pretrained loads: decoder, encoder, the statistics of latents.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import encoder_of  # noqa: E402
from model import (  # noqa: E402
    FREE, ArgumentParser, InputError, command, load_decoder, load_network, load_stats,
    location, lock, read_state, say, write_json, write_tensors)
from sanity.random_encoder import check_folder  # noqa: E402

DIFFUSERS_NAMES = (
    ("attention.attention.query", "attention.to_q"),
    ("attention.attention.key", "attention.to_k"),
    ("attention.attention.value", "attention.to_v"),
    ("attention.output.dense", "attention.to_out.0"))


def network(source):
    """-> its average and statistics, {part: {name: tensor}}; what it says of itself, but for FREE flags."""
    is_decoder = "decoder_embed.weight" in read_state(source)[0]
    net, about = (load_decoder if is_decoder else load_network)(source)
    about["settings"] = {name: x for name, x in about.get("settings", {}).items() if name not in FREE}
    stats, _ = about.pop("stats"), about.pop("sha256")
    return {"": net.state_dict(), **({"stats": stats} if stats else {})}, about


def autoencoder(decoder, stats, encoder):
    """-> tensors and config.json, by diffusers 0.42, of a ViTDecoder, {"mean", "var"} and an Encoder.

    InputError: an encoder that it cannot hold. It adds 1e-5 to the deviation, which holds it already."""
    net = encoder.net.config
    kind = net.model_type, net.hidden_size // net.num_attention_heads, net.image_size, encoder.shape
    if kind != ("dinov2_with_registers", 64, 518, decoder.shape):
        raise InputError(f"AutoencoderRAE cannot hold the encoder {encoder.about['id']}: it wants DINOv2 "
                         f"with registers, heads of 64, positions for 518 px, latents {decoder.shape}")
    if [list(x) for x in decoder.image_norm] != encoder.about["identity"]["image_norm"]:
        raise InputError("AutoencoderRAE has one mean and std of pixels: the encoder's are "
                         f"{encoder.about['identity']['image_norm']}, the decoder's {decoder.image_norm}")
    grid = decoder.shape[1]
    if grid != 16:
        say(f"warning: at {grid} x {grid} tokens AutoencoderRAE of diffusers 0.42 uses other positions than "
            "RAE's (those of a 16 x 16 base): it will decode differently")
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.net.state_dict().items()}
    for name, tensor in decoder.state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        tensors[f"decoder.{name}"] = tensor
    del tensors["decoder.decoder_pos_embed"]
    for name, x in zip(("encoder_mean", "encoder_std"), decoder.image_norm, strict=True):
        tensors[name] = torch.tensor(x).view(1, 3, 1, 1)
    tensors["_latents_mean"] = stats["mean"].float()
    tensors["_latents_std"] = (stats["var"] + 1e-5).sqrt().float()
    layer = decoder.decoder_layers[0]
    config = {
        "_class_name": "AutoencoderRAE", "encoder_type": "dinov2",
        "encoder_hidden_size": net.hidden_size, "encoder_patch_size": net.patch_size,
        "encoder_num_hidden_layers": net.num_hidden_layers, "encoder_input_size": encoder.encoder_size,
        "patch_size": decoder.patch_size, "decoder_hidden_size": decoder.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(decoder.decoder_layers), "decoder_num_attention_heads": layer.heads,
        "decoder_intermediate_size": layer.intermediate["dense"].out_features,
        "latents_mean": tensors["_latents_mean"].tolist(), "latents_std": tensors["_latents_std"].tolist()}
    return {"": tensors}, config


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("network", type=location, help="a run, one of its states, a published file, or a Hub path")
    add("--autoencoder", type=location, metavar="LATENTS", help="for diffusers: with these latents' encoder")
    add("--out", type=location, required=True, help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, name = Path(args.out), "model.safetensors"
    if args.autoencoder:
        name, encoder = "diffusion_pytorch_model.safetensors", encoder_of(args.autoencoder)
        decoder, _ = load_decoder(args.network)
        parts, about = autoencoder(decoder, load_stats(args.autoencoder, decoder.shape), encoder)
    else:
        parts, about = network(args.network)
    check_folder(out, name, parts)
    lock(out / ".lock")
    write_tensors(out / name, parts, {} if args.autoencoder else about)
    write_json(out / "config.json", about)
    say(f"{out}: {sum(x.numel() for x in parts[''].values()) / 1e6:,.1f} M numbers")


if __name__ == "__main__":
    command(main)
