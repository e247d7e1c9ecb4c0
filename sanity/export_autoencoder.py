"""Encoder, decoder and statistics as a folder that diffusers' AutoencoderRAE.from_pretrained loads.

    python sanity/export_autoencoder.py --latents data/latents --decoder runs/sanity/decoder --out my_rae

The way back is `load_decoder` of model.py, and --decoder of the scripts, which take such a folder.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encode_latents import encoder_of, read_description  # noqa: E402
from model import (  # noqa: E402
    DIFFUSERS_NAMES, IMAGE_MEAN, IMAGE_STD, ArgumentParser, InputError, command, hold, load_decoder,
    load_stats, say, write_json, write_tensors)


def export_autoencoder(folder, decoder, stats, encoder):
    """Write the folder of a ViTDecoder, (mean, var) and an encode_latents.Encoder.

    That class (diffusers 0.42) makes its encoder with heads of 64 channels and positions for 518 px:
    InputError for an encoder unlike that. It builds its table of positions for a 16 x 16 base, and adds 1e-5
    to the stored deviation, which holds it already."""
    folder, net = Path(folder), encoder.net.config
    heads_fit = net.hidden_size == 64 * net.num_attention_heads
    if not heads_fit or net.image_size != 518 or encoder.shape != decoder.shape:
        raise InputError(f"AutoencoderRAE cannot hold the encoder {encoder.source}: it wants DINOv2's heads "
                         f"of 64 channels, positions for 518 px, and the decoder's latents {decoder.shape}")
    grid = decoder.shape[1]
    if grid != 16:
        say(f"warning: at {grid} x {grid} tokens AutoencoderRAE of diffusers 0.42 uses other positions than "
            "RAE's (those of a 16 x 16 base): it will decode differently", sys.stderr)
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.net.state_dict().items()}
    for name, tensor in decoder.state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        tensors[f"decoder.{name}"] = tensor
    del tensors["decoder.decoder_pos_embed"]
    tensors["encoder_mean"] = torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1)
    tensors["encoder_std"] = torch.tensor(IMAGE_STD).view(1, 3, 1, 1)
    tensors["_latents_mean"] = stats[0].float()
    tensors["_latents_std"] = (stats[1] + 1e-5).sqrt().float()
    layer = decoder.decoder_layers[0]
    config = {
        "_class_name": "AutoencoderRAE", "encoder_type": "dinov2",
        "encoder_hidden_size": net.hidden_size, "encoder_patch_size": net.patch_size,
        "encoder_num_hidden_layers": net.num_hidden_layers, "encoder_input_size": encoder.encoder_size,
        "patch_size": decoder.patch_size, "decoder_hidden_size": decoder.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(decoder.decoder_layers), "decoder_num_attention_heads": layer.heads,
        "decoder_intermediate_size": layer.intermediate["dense"].out_features,
        "latents_mean": tensors["_latents_mean"].tolist(), "latents_std": tensors["_latents_std"].tolist()}
    write_json(folder / "config.json", config, digest=False)
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--latents", default="data/latents", help="latents of the encoder, for its settings")
    add("--decoder", required=True, help="folder, file or Hub path of a decoder")
    add("--stats", help="latent statistics (default: those of --latents)")
    add("--out", required=True, help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    encoder = encoder_of(read_description(args.latents))
    decoder, _ = load_decoder(args.decoder)
    stats = load_stats(args.stats or args.latents, decoder.shape)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is no folder: give another --out")
    hold(out / ".lock", "config.json", "diffusion_pytorch_model.safetensors")
    export_autoencoder(out, decoder, stats, encoder)
    say(f"{out}: diffusers.AutoencoderRAE.from_pretrained({str(out)!r}) loads it")


if __name__ == "__main__":
    command(main)
