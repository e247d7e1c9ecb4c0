"""Experiment i: does a semantic latent space make guidance unnecessary? Three encoders of photographs.

    docs/experiments/photographs.sh cifar10_train.zip split       # runs/photographs/train.zip, held-out.zip
    python docs/experiments/meaning.py                            # a second call goes on

An arm: encoder, latents, decoder; a teacher from each of two seeds, sampled with guidance 1 (none), 1.5 and
2; of the first, CMT and MFD, sampled in one step. The report's classifier, fitted to the training images,
measures it against 2,000 images kept out; and against these as the arm's encoder and decoder give them back,
which leaves out what a decoder cannot draw.
"""
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from docs.experiments.run import CMT, MFD, ROOT, TEACHER, call, markdown, spaced
from encode_latents import Encoder, Images, Latents
from eval_fid import Moments, precision_recall
from model import command, load_decoder, provenance, read_log, write_json
from sanity.report import decode, distance, draw_picture, fit_classifier, read_samples
from sanity.train_encoder import BANK, knn_accuracy

DATA, RUNS, CPU = "runs/photographs", "runs/experiments/i", torch.device("cpu")
TRAINED = f"sanity/train_encoder.py --data-path {DATA}/train.zip --flips --steps 6000"
ENCODERS = {"random": "sanity/random_encoder.py", "labels": TRAINED, "self": f"{TRAINED} --objective self"}
RATES = ("2e-3", "1e-3")                          # of the teacher; the random arm's better one is every arm's
GUIDANCE = (1, 1.5, 2)
STEPS = dict(decoder=2000, teacher=8000, cmt=250, mfd=1450)
SAMPLES = 2000
COMMON = "--log-every 200 --save-every 1000"


# ---- The commands
class Arm:
    """Commands whose outputs are in the folder `at`, at the sanity run's settings but for what is said here;
    rows: {row: its samples}."""

    def __init__(self, at, common):
        self.at, self.common, self.rows = at, common, {}

    def decoder(self, steps, more=""):
        return (f"sanity/train_decoder.py --data-path {DATA}/train.zip --latents {self.at}/latents "
                f"--out {self.at}/decoder --noise 0.5 --steps {steps} {more}")

    def train(self, stage, name, steps, more, seed=0):
        stage = stage.format(run=self.at, seed=seed)
        return f"{stage} {self.common} --steps {steps} --out {self.at}/{name} {more}"

    def teacher(self, name, steps, lr, seed=0):
        flags = f"--batch-size 64 --lr {lr} --lr-final 2e-5 --ema 0.999"
        return self.train(TEACHER, name, steps, flags, seed)

    def cmt(self, teacher, steps):
        return self.train(CMT, "cmt", steps, f"--teacher {self.at}/{teacher}")

    def mfd(self, name, steps, teacher, init="cmt", more=""):
        return self.train(MFD, name, steps, f"--teacher {self.at}/{teacher} --init {self.at}/{init} {more}")

    def sample(self, network, row, file, flags="--nfe 1", seed=0):
        self.rows[row] = f"{self.at}/{file}.npz"
        return (f"sample.py {self.at}/{network} --decoder {self.at}/decoder {flags} --num-samples {SAMPLES} "
                f"--batch-size 250 --seed {seed} --out {self.rows[row]}")


def plan(name, rate):
    """-> lists of chains of commands, the chains of a list at the same time, and {row: its samples}."""
    arm = Arm(f"{RUNS}/{name}", COMMON)

    def teacher(seed, lr):
        run, flags = f"teacher-{seed}-{lr}", "--nfe 50 --solver heun --guidance"
        samples = [arm.sample(run, f"teacher {seed}, w = {w}", f"{run}-w{w}", f"{flags} {w}", seed)
                   for w in GUIDANCE]
        return [arm.teacher(run, STEPS["teacher"], lr, seed), *samples]

    encoder = f"{ENCODERS[name]} --out {arm.at}/encoder --width 128 --depth 6 --heads 4 --patch 8"
    encode = (f"encode_latents.py --data-path {DATA}/train.zip --out {arm.at}/latents --image-size 32 "
              f"--encoder-size 32 --flips --encoder {arm.at}/encoder --batch-size 250 --workers 0")
    first = [encoder, encode, arm.decoder(STEPS["decoder"])]
    rates = [[teacher(0, lr) for lr in RATES]] if name == "random" else []
    teachers, base = [teacher(0, rate), teacher(1, rate)], f"teacher-0-{rate}"
    students = [arm.cmt(base, STEPS["cmt"]), arm.sample("cmt", "CMT 1", "cmt"),
                arm.mfd("mfd", STEPS["mfd"], base), arm.sample("mfd", "MFD 1", "mfd")]
    return [[first], *rates, teachers, [students]], arm.rows


def run(chains):
    """Chains of commands, two at the same time, one thread each."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, chains, (f"{RUNS}/{k}.txt" for k in range(len(chains)))))


# ---- The numbers
class Judge:
    """The report's classifier, and what it makes of the images kept out, `real`."""

    def __init__(self):
        self.train, held_out = (Images(f"{DATA}/{part}.zip", 32) for part in ("train", "held-out"))
        self.real, self.labels = held_out.read(range(len(held_out)))
        self.other, self.other_labels = self.train.read(spaced(len(self.train), len(held_out)))
        self.net = fit_classifier(self.train, 1500, 0, CPU)
        self.features, self.accuracy = self.see(self.real, self.labels)
        self.first = self.real[[self.labels.tolist().index(k) for k in range(10)]]         # of each class

    @torch.no_grad()
    def see(self, images, labels):
        """-> features, class accuracy."""
        features, _, logits = map(torch.cat, zip(*map(self.net, images.split(250)), strict=True))
        return features, (logits.argmax(1) == labels).float().mean().item()

    def sets(self, rows, encoder, decoder):
        """-> {row: images, labels}, of training images and samples; and the images kept out, decoded."""
        other, kept_out = (decode(images, encoder, decoder, CPU) for images in (self.other, self.real))
        sets = {"real": (self.other, self.other_labels), "decoded real": (other, self.other_labels)}
        return sets | {row: read_samples(path, 32, 10) for row, path in rows.items()}, kept_out

    def row(self, images, labels, **others):
        """others: {column: features}, to measure a distance to besides."""
        features, accuracy = self.see(images, labels)
        precision, recall = precision_recall(self.features, features)
        to = {"distance": self.features, **others}
        return {**{column: distance(moments(features), moments(x)) for column, x in to.items()},
                "class accuracy": accuracy, "precision": precision, "recall": recall}


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
    sets, kept_out = judge.sets(rows, encoder, decoder)
    decoded, accuracy = judge.see(kept_out, judge.labels)
    found = {row: judge.row(x, y, **{"to decoded": decoded}) for row, (x, y) in sets.items()}
    # The classifier was fitted to the others.
    found["real"]["class accuracy"], found["decoded real"]["class accuracy"] = judge.accuracy, accuracy
    shown = {"real": judge.first, "decoded": decode(judge.first, encoder, decoder, CPU)}
    shown |= {row: sets[row][0][:10] for row in rows if not row.startswith("teacher 1")}
    draw_picture(at / "picture.png", shown, judge.train.classes)
    bank = judge.train.read(range(0, len(judge.train), max(1, len(judge.train) // BANK)))
    about = {"k-NN": knn_accuracy(encoder.net, bank, (judge.real, judge.labels)),
             "effective rank": effective_rank(Latents(at / "latents")),
             "decoder, PSNR": read_log(at / "decoder")[-1]["psnr"]}
    return {"encoder": about, "rows": found}


def main():
    os.chdir(ROOT)
    judge = Judge()
    for chains in plan("random", RATES[0])[0][:2]:
        run(chains)
    rates = {lr: judge.row(*read_samples(f"{RUNS}/random/teacher-0-{lr}-w1.npz", 32, 10)) for lr in RATES}
    for name in ENCODERS:
        groups, rows = plan(name, min(RATES, key=lambda lr: rates[lr]["distance"]))
        for chains in groups:
            run(chains)
        found = {**measure(name, judge, rows), "rates": rates, **provenance()}
        write_json(f"runs/experiments/i-{name}.json", found)
        print(name, markdown(found["rows"]), sep="\n\n", flush=True)


if __name__ == "__main__":
    command(main)
