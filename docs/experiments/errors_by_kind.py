"""The errors of MFD's two kinds of rows, s = t and s < t, for students of seed 0 of experiment b.

    python docs/experiments/errors_by_kind.py         # a minute on one thread

Prints for each student and kind: the lowest tenth, the median, the highest tenth and the mean of the squared
errors per element, and the mean of the published weight times the summed error S, S / (S^2 + 1e-3).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from docs.experiments.gradient_variance import batches
from docs.experiments.run import markdown
from encode_latents import TrainingData
from model import command, load_network
from train_meanflow import meanflow_loss

RUN, ROWS = "runs/sanity", 512
B = "runs/experiments/b/0"
STUDENTS = (f"{RUN}/cmt", f"{B}/MFD__published", f"{B}/MFD__p___0.5__c___0.1")


def main():
    torch.manual_seed(0)
    data, (v, about) = TrainingData(f"{RUN}/latents"), load_network(f"{RUN}/teacher")
    ((z_0, eps, t, s, y),) = batches(data, about["time_shift"], ROWS, [None])
    found = {}
    for name in STUDENTS:
        h = load_network(name)[0].requires_grad_(False)
        for kind, s_ in (("s = t", t), ("s < t", s)):
            rows = zip(*(x.split(1) for x in (z_0, eps, t, y, s_)), strict=True)
            mse = torch.stack([meanflow_loss(h, v, *row, derivative="fd")[1]["mse"] for row in rows])
            summed = mse * z_0[0].numel()
            tenths = mse.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            weighted = (summed / (summed ** 2 + 1e-3)).mean().item()
            names = ("lowest tenth", "median", "highest tenth", "mean", "S / (S^2 + 1e-3)")
            found[f"{name}, {kind}"] = dict(zip(names, [*tenths, mse.mean().item(), weighted], strict=True))
    print(markdown(found))


if __name__ == "__main__":
    command(main)
