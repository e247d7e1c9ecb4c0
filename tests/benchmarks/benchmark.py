"""Numbers of docs/ that are no steps.

    python tests/benchmarks/benchmark.py --fit          # the largest micro-batch for cards, presets and stages, computed
    python tests/benchmarks/benchmark.py --xl           # DiTDH-XL through sample.py, random weights: 6 GB of disk
    python tests/benchmarks/benchmark.py --degradations data/cifar10_train.zip encoder:runs/latents48
"""
import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from encode_latents import Images  # noqa: E402
from eval_fid import Moments, frechet_distance, load_features, precision_recall  # noqa: E402
from model import DECODER_PRESETS, DIT_PRESETS, DiTDH, ViTDecoder, launch  # noqa: E402


def rows(heads, lines):
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |", flush=True)


def student(preset, px):
    return DiTDH(px // 16, 768, num_classes=1000, time_difference=True, **DIT_PRESETS[preset])


# ---- What fits, computed ----
def activations(preset, px, checkpointed):
    """Bytes that one row keeps for the backward pass in bf16, counted on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def saved(n):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[id(storage)] = (storage.nbytes(), storage)  # itself, so that its id is not used again
            return tensor
        z, t = torch.randn(n, *net.shape), torch.rand(n)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(z, t, torch.zeros(n, dtype=torch.long), t).float().square().mean()
        return sum(size for size, _ in sizes.values()), loss
    with FakeTensorMode():
        net = student(preset, px)
        net.checkpoint_activations = checkpointed
        return (saved(8)[0] - saved(4)[0]) / 4


def fit():
    """With 8% of a card and 1.5 GB left. A trained parameter takes 22 bytes (one is autocast's), the teacher's 4."""
    cards, lines = (24, 48, 80, 141), []
    for px, preset in ((px, preset) for px in (256, 512) for preset in ("DiTDH-S", "DiTDH-B", "DiTDH-XL")):
        with torch.device("meta"):
            net = student(preset, px)
        both = sum(p.numel() for p in net.parameters())
        teacher = both - sum(p.numel() for p in net.r_embedder.parameters())
        kept, inputs = (activations(preset, px, checkpointed) for checkpointed in (False, True))
        latent = 4 * 768 * (px // 16) ** 2
        for checkpointed, row in (("no", kept), ("yes", inputs + kept / len(net.blocks))):        # and a block's own
            for stage, base, each in (
                    ("teacher", 22 * teacher, row),
                    # one group of trajectories: 512 pairs on 8 GPUs
                    ("CMT", 22 * both + 4 * teacher + 64 * 17 * latent, row + 4 * latent),
                    ("MFD", 22 * both + 4 * teacher, row + 8 * latent)):
                room = [max(0, int((0.92 * card - 1.5) * 1e9 - base) // int(4 * each) * 4) for card in cards]
                lines.append((px, preset, stage, checkpointed, f"{base / 1e9:.1f}", f"{each / 1e9:.3f}", *room))
    rows(("px", "preset", "stage", "checkpointed", "GB without rows", "GB a row", *(f"{card} GB" for card in cards)), lines)


# ---- Sampling, XL ----
def xl():
    with tempfile.TemporaryDirectory() as folder:
        home, net = Path(folder), student("DiTDH-XL", 256)
        torch.nn.init.normal_(net.final_layer.linear.weight, std=0.02)            # away from zero
        torch.save({"ema": net.state_dict()}, home / "student.pt")
        torch.save(ViTDecoder(16, 768, **DECODER_PRESETS["ViT-XL"]).state_dict(), home / "decoder.pt")
        torch.save({"mean": None, "var": torch.ones(768, 16, 16)}, home / "stat.pt")
        del net
        for n in (1, 9):                          # the difference is the cost of eight images
            start, flags = time.perf_counter(), f"--nfe 1 --num-samples {n} --batch-size 8 --out {n}.npz"
            subprocess.run([sys.executable, ROOT / "sample.py", "./student.pt", "--decoder", "./decoder.pt",
                            "--stats", "./stat.pt", *flags.split()], check=True, cwd=home)
            print(f"{n} images in one step, loading and decoding included: {time.perf_counter() - start:.1f} s", flush=True)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")


# ---- What metrics say of degraded images ----
def moments(x):
    m = Moments()
    for part in x.split(64):
        m.update(part)
    return m.mean, m.covariance


def jpeg(image, quality):
    """With the grid of blocks shifted by 4 pixels, since CIFAR-10's photographs here are JPEGs already (docs/EVALUATION.md)."""
    file = io.BytesIO()
    Image.fromarray(np.pad(image, ((4, 4), (4, 4), (0, 0)), "reflect")).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))[4:-4, 4:-4]


def degradations(data, kind, px=32):
    """One half of the images is the reference, with which the other is compared: as it is, in thousands, degraded."""
    device, *_ = launch()
    images = Images(data, px)
    _, embed, _ = load_features(SimpleNamespace(features=kind, inception=None), device)
    halves = np.array_split(np.random.default_rng(0).permutation(len(images)), 2)
    first, second = (images.read(list(half))[0].permute(0, 2, 3, 1).numpy() for half in halves)

    @torch.no_grad()
    def features(x):
        batches = torch.from_numpy(x).permute(0, 3, 1, 2).split(250)
        return torch.cat([embed(batch.to(device)).cpu() for batch in batches])
    reference, noise = features(first), np.random.default_rng(1).standard_normal(second.shape, np.float32)
    target = moments(reference)
    series = [("none (the other half)", [""], lambda s: second),
              ("Gaussian blur, radius in pixels", (0.4, 0.6, 1, 2),
               lambda s: np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(s))) for x in second])),
              ("white noise, standard deviation in levels", (4, 8, 16, 32, 64),
               lambda s: (second + s * noise).round().clip(0, 255).astype(np.uint8)),
              ("JPEG, quality", (90, 70, 50, 30, 10), lambda s: np.stack([jpeg(x, s) for x in second]))]

    def lines():
        for part in features(second).split(1000)[:10]:
            yield "none", f"{len(part)} images", f"{frechet_distance(*moments(part), *target):.5f}"
        for name, strengths, degrade in series:
            for strength in strengths:
                x = features(degrade(strength))
                precision, recall = precision_recall(reference[:5000], x[:5000])
                yield name, strength, f"{frechet_distance(*moments(x), *target):.5f}", f"{precision:.3f}", f"{recall:.3f}"
    rows(("degradation", "strength", "Frechet distance", "precision", "recall"), lines())


COMMANDS = {"--fit": fit, "--xl": xl, "--degradations": degradations}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    COMMANDS[sys.argv[1]](*sys.argv[2:])
