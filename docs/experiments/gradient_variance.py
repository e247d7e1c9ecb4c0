"""How noisy is a student's gradient, by target and by the derivative's direction? No training.

    python docs/experiments/gradient_variance.py --run runs/sanity \\
        CMT=runs/sanity/cmt middle=runs/experiments/k/0/MFD/state_00000580.safetensors end=runs/experiments/k/0/MFD

For each student, kind of rows and target, over 64 batches of 64 rows, the same for all: the variance of the
whole gradient, E |g - E g|^2, and |E g|^2 without the bias that this variance leaves in it, the signal.

    MFD, eta 0.5, MFT    u = w - (t - s) D_w h,            w of eta
    MFT, direction v     u = (eps - z_0) - (t - s) D_v h,  v the teacher's velocity
    MFT, direction h     the same along the student's own velocity h(z_t, t, y, t)
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from docs.experiments.run import markdown
from encode_latents import TrainingData
from model import ArgumentParser, command, load_network, normalize, provenance, time_shift, write_json
from train_meanflow import meanflow_loss, per_row, transport_derivative

BATCHES, ROWS = 64, 64
ETAS = {"MFD": 1.0, "eta 0.5": 0.5, "MFT": 0.0}
DIRECTIONS = ("MFT, direction v", "MFT, direction h")       # no other than MFT where s = t


def batches(data, shift, rows, generators):
    """The training's batches, one for each generator (None: torch's own): z_0, eps, t, s, y."""
    how = argparse.Namespace(seed=0, batch_size=rows, steps=len(generators), workers=0)
    latents = data.batches(how, [(0, rows)], 0, torch.device("cpu"))
    for g, (z_0, y) in zip(generators, latents, strict=True):
        eps = torch.randn(z_0.shape, generator=g)
        s, t = time_shift(torch.rand(rows, 2, generator=g), shift).sort(dim=1).values.unbind(1)
        yield normalize(z_0, data.stats), eps, t, s, y


def loss_of(target, h, v, z_0, eps, t, y, s):
    """The stage's own loss, of the mild weight; where only the direction differs, with another derivative."""
    if target in ETAS:
        how = dict(loss_form="mean", loss_power=0.5, loss_eps=0.1)
        return meanflow_loss(h, v, z_0, eps, t, y, s, ETAS[target], "fd", **how)[0]
    z_t = per_row(1 - t, eps) * z_0 + per_row(t, eps) * eps
    with torch.no_grad():
        direction = v(z_t, t, y) if target.endswith("v") else h(z_t, t, y, t)
        u = eps - z_0 - per_row(t - s, eps) * transport_derivative(h, z_t, t, y, s, direction, "fd")
    mse = (h(z_t, t, y, s) - u).square().flatten(1).mean(1)
    return (mse / (mse.detach() + 0.1) ** 0.5).mean()


def gradient(loss, net):
    grads = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]).double()


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("students", nargs="+", metavar="NAME=STUDENT", help="networks")
    parser.add_argument("--run", default="runs/sanity", help="folder with latents and teacher in it")
    parser.add_argument("--out", metavar="JSON", help="the numbers (default: the table alone)")
    args = parser.parse_args()
    data, (v, about) = TrainingData(f"{args.run}/latents"), load_network(f"{args.run}/teacher")
    v.requires_grad_(False)
    n, found, table = BATCHES, [], {}
    for pair in args.students:
        name, _, path = pair.partition("=")
        h, sums = load_network(path)[0], {}
        generators = [torch.Generator().manual_seed(k) for k in range(n)]
        several = batches(data, about["time_shift"], ROWS, generators)
        for g, (z_0, eps, t, s, y) in zip(generators, several, strict=True):
            y = torch.where(torch.rand(ROWS, generator=g) < 0.1, h.num_classes, y)
            for kind, s_, targets in (("s = t", t, ETAS), ("s < t", s, (*ETAS, *DIRECTIONS))):
                for target in targets:
                    x = gradient(loss_of(target, h, v, z_0, eps, t, y, s_), h)
                    total, squares = sums.get((kind, target), (0, 0))
                    sums[kind, target] = total + x, squares + x.square().sum()
        for (kind, target), (total, squares) in sums.items():
            variance = ((squares - total.square().sum() / n) / (n - 1)).item()
            signal = (total.square().sum() / n ** 2).item() - variance / n
            numbers = dict(variance=variance, signal=signal)
            found.append(dict(student=name, rows=kind, target=target, **numbers))
            table[f"{name}, {kind}, {target}"] = {**numbers, "signal / variance": signal / variance}
    print(markdown(table))
    if args.out:
        write_json(args.out, {**provenance(), "rows": found})


if __name__ == "__main__":
    command(main)
