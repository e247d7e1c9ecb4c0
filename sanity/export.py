"""A network to hand on: the average of a run, or of one of its states, under its published names.

    python sanity/export.py runs/meanflow --out my_student              # 3.4 GB of an XL's 13.4

Writes model.safetensors, with the latent statistics and what a state says of itself, and config.json, the
same for people to read: scripts and `load_network` take folder or file.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import (  # noqa: E402
    FREE, ArgumentParser, command, load_decoder, load_network, location, read_state, say, write_json,
    write_tensors)
from sanity.random_encoder import lock_folder  # noqa: E402


def slim(source):
    """-> its average and statistics, {part: {name: tensor}}; what it says of itself, but for FREE flags."""
    is_decoder = "decoder_embed.weight" in read_state(source)[0]
    net, about = (load_decoder if is_decoder else load_network)(source)
    about["settings"] = {name: x for name, x in about.get("settings", {}).items() if name not in FREE}
    stats, _ = about.pop("stats"), about.pop("sha256")
    return {"": net.state_dict(), **({"stats": stats} if stats else {})}, about


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("network", type=location, help="a run, one of its states, a published file, or a Hub path")
    add("--out", type=location, required=True, help="folder to write")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out, (parts, about) = Path(args.out), slim(args.network)
    lock_folder(out, parts)
    write_tensors(out / "model.safetensors", parts, about)
    write_json(out / "config.json", about)
    say(f"{out}: {sum(x.numel() for x in parts[''].values()) / 1e6:,.1f} M numbers")


if __name__ == "__main__":
    command(main)
