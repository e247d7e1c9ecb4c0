"""The errors of MFD's two kinds of rows, s = t and s < t, for students of any run; a minute on one thread.

    python docs/experiments/errors_by_kind.py                                        # seed 0 of experiment b
    python docs/experiments/errors_by_kind.py --run runs/other runs/other/mfd        # of another run

Prints for each student and kind: the lowest tenth, the median, the highest tenth and the mean of the squared
errors per element, and the mean of the published weight times the summed error S, S / (S^2 + 1e-3).
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from encode_latents import TrainingData  # noqa: E402
from model import ArgumentParser, command, load_network, normalize, time_shift, whole  # noqa: E402
from train_meanflow import meanflow_loss  # noqa: E402


def main(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("students", nargs="*", metavar="STUDENT", help="their folders", default=[
        "runs/sanity/cmt", "runs/experiments/b/0/MFD__published", "runs/experiments/b/0/MFD__p___0.5__c___0.1"])
    parser.add_argument("--run", default="runs/sanity", help="folder with latents and teacher in it")
    parser.add_argument("--rows", type=whole(), default=512, help="of the batch")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data, (v, about) = TrainingData(f"{args.run}/latents"), load_network(f"{args.run}/teacher")
    how = argparse.Namespace(seed=0, batch_size=args.rows, steps=1, workers=0)
    z_0, y = next(data.batches(how, [(0, args.rows)], 0, torch.device("cpu")))
    z_0, eps = normalize(z_0, data.stats), torch.randn_like(z_0)
    s, t = time_shift(torch.rand(args.rows, 2), about["time_shift"]).sort(dim=1).values.unbind(1)
    print("| student | rows | lowest tenth | median | highest tenth | mean | S / (S^2 + 1e-3) |\n" + "|---" * 7 + "|")
    for name in args.students:
        h = load_network(name)[0].requires_grad_(False)
        for kind, s_ in (("s = t", t), ("s < t", s)):
            rows = zip(*(x.split(1) for x in (z_0, eps, t, y, s_)), strict=True)
            mse = torch.stack([meanflow_loss(h, v, *row, derivative="fd")[1]["mse"] for row in rows])
            summed = mse * z_0[0].numel()
            tenths = mse.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            numbers = [*tenths, mse.mean().item(), (summed / (summed ** 2 + 1e-3)).mean().item()]
            print(f"| {name} | {kind} | " + " | ".join(f"{x:.2g}" for x in numbers) + " |", flush=True)


if __name__ == "__main__":
    command(main)
