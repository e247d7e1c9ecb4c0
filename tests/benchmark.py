"""What the networks cost.

    python tests/benchmark.py --table          # parameters and multiply-adds of every preset, counted on the meta device
    python tests/benchmark.py --metrics        # eval_fid.py's metrics of 50,000 x 2048 features: seconds and peak memory (minutes on a CPU)

GMAC: billions of multiply-adds of one image (half of the floating-point operations), once with the attention's two products of
scores and values, once, as the paper counts, without.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import DECODER_PRESETS, DIT_PRESETS, DiTDH, ViTDecoder  # noqa: E402

PAPER = {("DiTDH-XL", 256): 157, ("ViT-XL", 256): 106, ("SD-VAE decoder", 256): 310}      # GMAC, arXiv 2511.13019
PAPER_ONE_STEP = {256: 263, 512: 1051}                                           # DiTDH-XL once, with the ViT-XL decoder


def count(net, *inputs):
    """(parameters, GMAC with attention scores, GMAC of the linear and convolutional layers alone) of one image, on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.to("meta")(*(x.to("meta") for x in inputs))
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in flops.items() if "bmm" in op or "attention" in op)
    total = sum(flops.values())
    return sum(p.numel() for p in net.parameters()), total / 2e9, (total - attention) / 2e9


def backbone(name, px, time_difference=True):
    with torch.device("meta"):
        net = DiTDH(px // 16, 768, num_classes=1000, time_difference=time_difference, **DIT_PRESETS[name])
    t = torch.ones(1)
    return count(net, torch.zeros(1, *net.shape), t, torch.zeros(1, dtype=torch.long), *([t] if time_difference else []))


def decoder(name, px):
    with torch.device("meta"):
        net = ViTDecoder(px // 16, 768, **DECODER_PRESETS[name])
    return count(net, torch.zeros(1, *net.shape))


def sd_vae_decoder(px):
    """The decoder that RAE replaces: Stable Diffusion's, 4 x px/8 x px/8 latents. Architecture from diffusers, weights not needed."""
    from diffusers import AutoencoderKL
    with torch.device("meta"):
        vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    return count(torch.nn.Sequential(vae.post_quant_conv, vae.decoder), torch.zeros(1, 4, px // 8, px // 8))


def table():
    """Markdown: every preset, and one image of a DiTDH-XL student with its decoder."""
    print("| network | px | parameters | GMAC with attention scores | GMAC without (paper's) | paper |\n|---|---|---|---|---|---|")
    sums = {}
    for px in (256, 512):
        rows = [(name, backbone(name, px)) for name in DIT_PRESETS if "mini" not in name]
        rows += [(name, decoder(name, px)) for name in DECODER_PRESETS if "mini" not in name]
        rows += [("SD-VAE decoder", sd_vae_decoder(px))]
        for name, (parameters, full, linear) in rows:
            sums[name, px] = (full, linear)
            print(f"| {name} | {px} | {parameters:,} | {full:.2f} | {linear:.2f} | {PAPER.get((name, px), '')} |")
    for px in (256, 512):
        for steps in (1, 2):
            full, linear = (steps * a + b for a, b in zip(sums["DiTDH-XL", px], sums["ViT-XL", px], strict=True))
            share = sums["ViT-XL", px][1] / linear
            print(f"| one image, {steps} step{'s' * (steps > 1)}, XL (decoder {share:.0%}) | {px} | | {full:.1f} | {linear:.1f} "
                  f"| {PAPER_ONE_STEP[px] if steps == 1 else ''} |")


def metrics(count=50_000, reference=10_000, width=2048):
    """Seconds of Frechet distance, and of precision and recall, once the features are there; random features."""
    from eval_fid import Moments, frechet_distance, precision_recall
    g = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(n, width, generator=g) for n in (count, reference))

    def distance():
        moments = Moments(), Moments()
        for m, x in zip(moments, (fake, real), strict=True):
            for part in x.split(64):
                m.update(part)
        return frechet_distance(*(y for m in moments for y in (m.mean, m.covariance)))
    for name, measure in (("Frechet distance", distance), ("precision and recall", lambda: precision_recall(real, fake))):
        start = time.perf_counter()
        measure()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory of the process so far {peak:.2f} GiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--table", action="store_true", help="parameters and multiply-adds of every preset")
    group.add_argument("--metrics", action="store_true", help="seconds and memory of the metrics")
    table() if parser.parse_args().table else metrics()


if __name__ == "__main__":
    main()
