"""A stage as the published code has it where ours departs from it and has no flag: for the ablations alone.

    python docs/experiments/published.py labels,embedding train_meanflow.py ...
    python docs/experiments/published.py times train_cmt.py ...               the stage's own flags follow

labels     the student drops labels once more, in one row in ten and anew in each of its evaluations, so
           that the ends of a finite difference can see different labels
embedding  the new embedding of t - s starts with torch's random weights: at first, the student is another
times      CMT calls the points of a trajectory by evenly spaced times, though the solver's were shifted
direction  not published: the derivative goes along the student's own velocity h(z_t, t, y, t), whatever w is
           (as a direction the one-point velocity is noisy, arXiv 2605.09235)
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from model import DiTDH, Dual, command, generator


def drop_labels():
    forward = DiTDH.forward

    def dropping(self, z, t, y, s=None):
        if s is not None:
            # The times tell steps and evaluations apart: going on draws the same.
            times = t.value if isinstance(t, Dual) else t
            g = generator(y.device, "dropped again", float(times[0]), float(times[-1]))
            y = torch.where(torch.rand(len(y), generator=g, device=y.device) < 0.1, self.num_classes, y)
        return forward(self, z, t, y, s)
    DiTDH.forward = dropping


def after_init(kind, change):
    init = kind.__init__

    def changed(self, *args, **kwargs):
        init(self, *args, **kwargs)
        change(self)
    kind.__init__ = changed


def random_embedding():
    after_init(DiTDH, lambda net: net.r_embedder and net.r_embedder.mlp[2].reset_parameters())


def even_times(pools):
    def relabel(pool):
        pool.times = torch.linspace(1, 0, len(pool.times), device=pool.times.device)
    after_init(pools, relabel)


def along_the_student(stage):
    derivative = stage.transport_derivative

    def along(h, z, t, y, s, w, *args):
        with torch.no_grad():
            w = h(z, t, y, t).to(w)
        return derivative(h, z, t, y, s, w, *args)
    stage.transport_derivative = along


if __name__ == "__main__":
    stage = importlib.import_module(Path(sys.argv[2]).stem)
    for name in sys.argv[1].split(","):
        {"labels": drop_labels, "embedding": random_embedding,
         "times": lambda: even_times(stage.TrajectoryPool),
         "direction": lambda: along_the_student(stage)}[name]()
    sys.argv = [" ".join(sys.argv[:3]), *sys.argv[3:]]        # for run.json's record of the command
    command(stage.main)
