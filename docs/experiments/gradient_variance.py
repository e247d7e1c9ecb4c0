"""How noisy is a student's gradient, by target and by the derivative's direction? No training.

    python docs/experiments/gradient_variance.py --run runs/sanity \\
        CMT=runs/sanity/cmt middle=runs/experiments/k/0/MFD/state_00000580.safetensors end=runs/experiments/k/0/MFD

For each student, kind of rows (s = t, s < t) and target, over batches of 64 rows: the variance of the whole
gradient, E |g - E g|^2, |E g|^2 without the bias that this variance leaves in it, and their ratio, the signal
to noise of one batch. Every target sees the same batches.

    MFD, eta 0.5, MFT    u = w - (t - s) D_w h,            w of eta
    MFT, direction v     u = (eps - z_0) - (t - s) D_v h,  v the teacher's velocity
    MFT, direction h     the same along the student's own velocity h(z_t, t, y, t)
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from encode_latents import TrainingData  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser, command, load_network, normalize, not_negative, provenance, time_shift, whole, write_json)
from train_meanflow import meanflow_loss, per_row, transport_derivative  # noqa: E402

TARGETS = {"MFD": 1.0, "eta 0.5": 0.5, "MFT": 0.0, "MFT, direction v": 0.0, "MFT, direction h": 0.0}


def loss_of(target, h, v, z_0, eps, t, y, s, loss_power):
    """The stage's own loss; where only the direction differs, the same with another derivative."""
    more = dict(eta=TARGETS[target], loss_form="mean", loss_power=loss_power, loss_eps=0.1)
    if "direction" not in target:
        return meanflow_loss(h, v, z_0, eps, t, y, s, derivative="fd", **more)[0]
    z_t = per_row(1 - t, eps) * z_0 + per_row(t, eps) * eps
    with torch.no_grad():
        direction = v(z_t, t, y) if target.endswith("v") else h(z_t, t, y, t)
        u = eps - z_0 - per_row(t - s, eps) * transport_derivative(h, z_t, t, y, s, direction, "fd")
    mse = (h(z_t, t, y, s) - u).square().flatten(1).mean(1)
    return (mse / (mse.detach() + 0.1) ** loss_power).mean()


def gradient(loss, net):
    grads = torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def main(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("students", nargs="+", metavar="NAME=STUDENT", help="networks")
    parser.add_argument("--run", default="runs/sanity", help="folder with latents and teacher in it")
    parser.add_argument("--batches", type=whole(2), default=64, help="of 64 rows")
    parser.add_argument("--loss-power", type=not_negative, default=0.5, help="of the weight (q + 0.1)^-p; 0: none")
    parser.add_argument("--out", metavar="JSON", help="the numbers (default: the table alone)")
    args = parser.parse_args(argv)
    data, (v, about) = TrainingData(f"{args.run}/latents"), load_network(f"{args.run}/teacher")
    v.requires_grad_(False)
    how, found = argparse.Namespace(seed=0, batch_size=64, steps=args.batches, workers=0), []
    print("| student | rows | target | variance | signal | signal / variance |\n" + "|---" * 6 + "|")
    for pair in args.students:
        name, _, path = pair.partition("=")
        h = load_network(path)[0]
        sums = {}
        for k, (z_0, y) in enumerate(data.batches(how, [(0, 64)], 0, torch.device("cpu"))):
            g = torch.Generator().manual_seed(k)
            z_0, eps = normalize(z_0, data.stats), torch.randn(z_0.shape, generator=g)
            s, t = time_shift(torch.rand(64, 2, generator=g), about["time_shift"]).sort(dim=1).values.unbind(1)
            y = torch.where(torch.rand(64, generator=g) < 0.1, h.num_classes, y)
            for kind, s_ in (("s = t", t), ("s < t", s)):
                for target in TARGETS if kind == "s < t" else ("MFD", "eta 0.5", "MFT"):
                    x = gradient(loss_of(target, h, v, z_0, eps, t, y, s_, args.loss_power), h).double()
                    total, squares = sums.get((kind, target), (0, 0))
                    sums[kind, target] = total + x, squares + x.square().sum()
        for (kind, target), (total, squares) in sums.items():
            n = args.batches
            variance = ((squares - total.square().sum() / n) / (n - 1)).item()
            signal = (total.square().sum() / n ** 2).item() - variance / n
            found.append({"student": name, "rows": kind, "target": target, "variance": variance, "signal": signal})
            print(f"| {name} | {kind} | {target} | {variance:.3g} | {signal:.3g} | {signal / variance:.3g} |", flush=True)
    if args.out:
        write_json(args.out, {**provenance(), "rows": found})


if __name__ == "__main__":
    command(main)
