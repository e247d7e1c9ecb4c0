"""The whole method in two dimensions: teacher, CMT, MFD and MFT on a spiral, with the stages' own losses.

    python docs/two_dimensions.py [picture.png]            # under a minute on one CPU core

Networks are small MLPs, latents are points (B, 2). Prints the energy distance of each stage's samples to
the data and draws the samples: a panel for each stage, with its number of network evaluations.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import ArgumentParser, long_jumps, ode_times, solve_ode
from train_cmt import consistency_loss
from train_meanflow import meanflow_loss
from train_teacher import flow_matching_loss

BATCH, CLASSES = 256, 2


class MLP(nn.Module):
    """v(z, t, y), or with s the mean velocity h, which starts as v: the layer that sees t - s is zero."""

    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 9) * torch.pi / 2)
        self.z, self.t, self.y = nn.Linear(2, width), nn.Linear(16, width), nn.Embedding(CLASSES, width)
        self.difference = nn.Linear(16, width)
        nn.init.zeros_(self.difference.weight)
        nn.init.zeros_(self.difference.bias)
        self.layers = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width),
                                    nn.SiLU(), nn.Linear(width, 2))

    def waves(self, t):
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(self, z, t, y, s=None):
        x = self.z(z) + self.t(self.waves(t)) + self.y(y)
        if s is not None:
            x = x + self.difference(self.waves(t - s))
        return self.layers(x)


def spiral(n):
    """Two interleaved arms, a class each: points (n, 2), labels (n,)."""
    y = torch.randint(CLASSES, (n,))
    radius = 0.5 + 1.3 * torch.rand(n).sqrt()
    angle = 1.1 * torch.pi * radius + torch.pi * y
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1) + 0.05 * torch.randn(n, 2)
    return points, y


def train(net, steps, lr, loss_of_step):
    """Adam, learning rate to zero along a cosine."""
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = loss_of_step()[0]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'| of two point sets (n, 2): 0 for equal distributions."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def main(out):
    torch.manual_seed(0)
    start, panels = time.time(), {}
    teacher, student = MLP(), MLP()

    def flow_matching():
        z_0, y = spiral(BATCH)
        return flow_matching_loss(teacher, z_0, torch.randn_like(z_0), torch.rand(BATCH), y)

    def cmt():                                    # 32 trajectories of 16 Euler steps, 8 pairs from each
        y, times = torch.randint(CLASSES, (BATCH // 8,)), torch.tensor(ode_times(16, 1.0))
        with torch.no_grad():
            points = torch.stack(solve_ode(teacher, torch.randn(len(y), 2), y, times.tolist()), dim=1)
        row = torch.arange(BATCH) // 8
        i, j = torch.triu_indices(17, 17, offset=1)[:, torch.randint(136, (BATCH,))]
        return consistency_loss(student, points[row, i], points[row, j], times[i], y[row], times[j])

    def meanflow(eta):                            # three rows in four: s = t, as in the stage itself
        z_0, y = spiral(BATCH)
        s, t = torch.rand(BATCH, 2).sort(dim=1).values.unbind(1)
        s = torch.where(torch.arange(BATCH) % 4 == 0, s, t)
        return meanflow_loss(student, teacher, z_0, torch.randn_like(z_0), t, y, s, eta, loss_form="mean",
                             loss_power=0.0, jumps=slice(None, None, 4))

    noise, labels = torch.randn(4000, 2), torch.arange(4000) % CLASSES
    real, floor = spiral(4000)[0], spiral(4000)[0]

    @torch.no_grad()
    def show(name, points):
        panels[name], energy = points, energy_distance(points, real)
        print(f"{name:12} energy distance to the data {energy:.5f} {time.time() - start:6.0f} s", flush=True)

    @torch.no_grad()
    def jumps(name, nfe):
        show(f"{name} {nfe}", long_jumps(student, noise, labels, [1 - i / nfe for i in range(nfe + 1)]))

    show("data", floor)
    train(teacher, 2000, 2e-3, flow_matching)
    for steps in (50, 1):
        with torch.no_grad():
            show(f"teacher {steps}", solve_ode(teacher, noise, labels, ode_times(steps, 1.0))[-1])
    student.load_state_dict(teacher.state_dict())
    train(student, 400, 1e-3, cmt)
    jumps("CMT", 1)
    train(student, 2500, 1e-3, lambda: meanflow(1))
    jumps("MFD", 1)
    jumps("MFD", 2)
    train(student, 200, 1e-4, lambda: meanflow(0))
    jumps("MFT", 1)

    cell, picture = 220, Image.new("L", (220 * len(panels), 250), 255)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for k, (name, points) in enumerate(panels.items()):
        x, y = points.numpy().T
        density = np.histogram2d(-y, x, bins=cell - 10, range=[[-2.3, 2.3]] * 2)[0]
        picture.paste(Image.fromarray((255 * np.exp(-1.2 * density)).astype(np.uint8)), (k * cell + 5, 30))
        pen.text((k * cell + cell / 2, 15), name, fill=0, font=font, anchor="mm")
    picture.save(out)
    print(out)


if __name__ == "__main__":
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("picture", nargs="?", default="two_dimensions.png", help="PNG of the samples")
    main(parser.parse_args().picture)
