"""Experiment i: does a semantic latent space make guidance unnecessary? Photographs, three encoders of one size.

    docs/experiments/photographs.sh cifar10_train.zip split       # runs/photographs/train.zip, held-out.zip
    python docs/experiments/meaning.py                            # every arm; a second call goes on
    python docs/experiments/meaning.py --arms labels              # this alone, at the rate that the random one chose

An arm: encoder, latents, decoder; a teacher from each of two seeds, sampled with guidance 1 (none), 1.5 and 2; of the
first, CMT and MFD, sampled in one step. Two commands at a time, one thread each. All is measured by the report's
classifier, which is a convolutional network fitted to the training images, against 2,000 images kept out; and against
these as the arm's encoder and decoder give them back, which leaves out what a decoder cannot draw.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from docs.experiments.run import CMT, MFD, ROOT, TEACHER, call, markdown, spaced  # noqa: E402
from encode_latents import Encoder, Images, Latents  # noqa: E402
from eval_fid import Moments, precision_recall  # noqa: E402
from model import ArgumentParser, command, load_decoder, provenance, read_json, read_log, write_json  # noqa: E402
from sanity.report import decode, distance, draw_picture, fit_classifier, read_samples  # noqa: E402
from sanity.train_encoder import BANK, knn_accuracy  # noqa: E402

DATA, RUNS, CPU = "runs/photographs", "runs/experiments/i", torch.device("cpu")
SIZES = "--width 128 --depth 6 --heads 4 --patch 8"
TRAINED = f"sanity/train_encoder.py --data-path {DATA}/train.zip --flips {SIZES} --steps 6000"
ENCODERS = {"random": f"sanity/random_encoder.py {SIZES}", "labels": TRAINED, "self": f"{TRAINED} --objective self"}
RATES = ("2e-3", "1e-3")                          # of the teacher; the better one of the random arm is every arm's
GUIDANCE = (1, 1.5, 2)
STEPS = dict(decoder=2000, teacher=8000, cmt=250, mfd=1450)
SAMPLES = 2000
COMMON = "--log-every 200 --save-every 1000"


# ---- The commands: the sanity run's settings, but for what is said here
class Arm:
    """The commands of one arm, whose runs are in the folder `at`, and the files of its samples, `rows`."""

    def __init__(self, at, common):
        self.at, self.common, self.rows = at, common, {}

    def decoder(self, steps, more=""):
        return (f"sanity/train_decoder.py --data-path {DATA}/train.zip --latents {self.at}/latents "
                f"--out {self.at}/decoder --noise 0.5 --steps {steps} {more}")

    def train(self, stage, name, steps, more, seed=0):
        return f"{stage} {self.common} --steps {steps} --out {self.at}/{name} {more}".format(run=self.at, seed=seed)

    def teacher(self, name, steps, lr, seed=0):
        return self.train(TEACHER, name, steps, f"--batch-size 64 --lr {lr} --lr-final 2e-5 --ema 0.999", seed)

    def cmt(self, teacher, steps):
        return self.train(CMT, "cmt", steps, f"--teacher {self.at}/{teacher}")

    def mfd(self, name, steps, teacher, init, more=""):
        return self.train(MFD, name, steps, f"--teacher {self.at}/{teacher} --init {self.at}/{init} {more}")

    def sample(self, network, row, file, flags="--nfe 1", seed=0):
        self.rows[row] = f"{self.at}/{file}.npz"
        return (f"sample.py {self.at}/{network} --decoder {self.at}/decoder {flags} --num-samples {SAMPLES} "
                f"--batch-size 250 --seed {seed} --out {self.rows[row]}")


def plan(name, rate):
    """-> lists of chains of commands, the chains of a list at the same time, and {row: its samples}."""
    arm = Arm(f"{RUNS}/{name}", COMMON)

    def teacher(seed, lr):
        run = f"teacher-{seed}-{lr}"
        guided = [arm.sample(run, f"teacher {seed}, w = {w}", f"{run}-w{w}", f"--nfe 50 --solver heun --guidance {w}", seed)
                  for w in GUIDANCE]
        return [arm.teacher(run, STEPS["teacher"], lr, seed), *guided]

    first = [f"{ENCODERS[name]} --out {arm.at}/encoder",
             f"encode_latents.py --data-path {DATA}/train.zip --out {arm.at}/latents --image-size 32 --encoder-size 32 "
             f"--flips --encoder {arm.at}/encoder --batch-size 250 --workers 0", arm.decoder(STEPS["decoder"])]
    rates = [[teacher(0, lr) for lr in RATES]] if name == "random" else []
    teachers, base = [teacher(0, rate), teacher(1, rate)], f"teacher-0-{rate}"
    students = [arm.cmt(base, STEPS["cmt"]), arm.sample("cmt", "CMT 1", "cmt"),
                arm.mfd("mfd", STEPS["mfd"], base, "cmt"), arm.sample("mfd", "MFD 1", "mfd")]
    return [[first], *rates, teachers, [students]], arm.rows


def run(chains):
    """Chains of commands, two at the same time."""
    def chain(lines):
        call(lines, f"{RUNS}/{lines[0].split(' --out ')[1].split()[0].replace('/', '_')}.txt")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chain, chains))


# ---- The numbers
class Judge:
    """The report's classifier, and what it makes of the images kept out."""

    def __init__(self):
        self.train, held_out = (Images(f"{DATA}/{part}.zip", 32) for part in ("train", "held-out"))
        self.real, self.labels = held_out.read(range(len(held_out)))
        self.other, self.other_labels = self.train.read(spaced(len(self.train), len(held_out)))
        self.net = fit_classifier(self.train, 1500, 0, CPU)
        self.features, self.accuracy = self.see(self.real, self.labels)

    @torch.no_grad()
    def see(self, images, labels):
        features, _, logits = map(torch.cat, zip(*map(self.net, images.split(250)), strict=True))
        return features, (logits.argmax(1) == labels).float().mean().item()

    def row(self, images, labels):
        features, accuracy = self.see(images, labels)
        precision, recall = precision_recall(self.features, features)
        return {"distance": distance(moments(features), moments(self.features)), "class accuracy": accuracy,
                "precision": precision, "recall": recall}


def moments(features):
    return Moments().update(features)


@torch.no_grad()
def effective_rank(latents):
    """exp of the entropy of the eigenvalues of the tokens' covariance, as shares (Roy and Vetterli, 2007)."""
    z, _ = latents.read(list(range(0, len(latents), max(1, len(latents) // 4000))))
    share = torch.linalg.eigvalsh(z.float().transpose(0, 1).flatten(1).cov().double()).clamp(min=1e-12)
    share = share / share.sum()
    return (-(share * share.log()).sum()).exp().item()


def measure(name, judge, rows):
    at = Path(RUNS, name)
    encoder, decoder = Encoder(at / "encoder", 32, 32), load_decoder(at / "decoder")[0].eval()
    bank = judge.train.read(range(0, len(judge.train), max(1, len(judge.train) // BANK)))
    kept_out, other = (decode(images, encoder, decoder, CPU) for images in (judge.real, judge.other))
    images = {"real": (judge.other, judge.other_labels), "decoded real": (other, judge.other_labels)}
    images |= {row: read_samples(path, 32, 10) for row, path in rows.items()}
    decoded, accuracy = judge.see(kept_out, judge.labels)
    found = {}
    for row, pair in images.items():
        to_decoded = distance(moments(judge.see(*pair)[0]), moments(decoded))
        found[row] = {**judge.row(*pair), "to decoded": to_decoded}
    # The classifier was fitted to the others.
    found["real"]["class accuracy"], found["decoded real"]["class accuracy"] = judge.accuracy, accuracy
    first = [judge.labels.tolist().index(k) for k in range(10)]
    shown = {"real": judge.real[first], "decoded": kept_out[first]}
    shown |= {row: x[:10] for row, (x, _) in images.items() if row.startswith(("teacher 0", "CMT", "MFD"))}
    draw_picture(at / "picture.png", shown, judge.train.classes)
    about = {"k-NN": knn_accuracy(encoder.net, bank, (judge.real, judge.labels)),
             "effective rank": effective_rank(Latents(at / "latents")),
             "decoder, PSNR": read_log(at / "decoder")[-1]["psnr"]}
    return {"encoder": about, "rows": found}


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="which encoders")
    arms = parser.parse_args().arms
    os.chdir(ROOT)
    judge, choice = Judge(), Path(RUNS, "rate.json")
    if "random" in arms:
        for chains in plan("random", RATES[0])[0][:2]:
            run(chains)
        rates = {lr: judge.row(*read_samples(f"{RUNS}/random/teacher-0-{lr}-w1.npz", 32, 10)) for lr in RATES}
        write_json(choice, {"rate": min(RATES, key=lambda lr: rates[lr]["distance"]), "rates": rates})
    chosen = read_json(choice)
    for name in arms:
        groups, rows = plan(name, chosen["rate"])
        for chains in groups:
            run(chains)
        found = {**measure(name, judge, rows), "rates": chosen["rates"], **provenance()}
        write_json(Path(RUNS).parent / f"i-{name}.json", found)
        print(markdown({name: found["encoder"]}), markdown(found["rows"]), sep="\n\n", flush=True)


if __name__ == "__main__":
    command(main)
