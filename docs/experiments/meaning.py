"""Experiment i: does a semantic latent space make guidance unnecessary? Photographs, three encoders of one size.

    docs/experiments/photographs.sh cifar10_train.zip split             # runs/photographs/train.zip, held-out.zip
    python docs/experiments/meaning.py                                  # every arm; a second call goes on
    python docs/experiments/meaning.py --arms random labels             # these alone
    python docs/experiments/meaning.py --arms labels --print docs/experiments/numbers       # the page's table again

An arm: encoder, latents, decoder; a teacher from each of two seeds, sampled with guidance 1 (none), 1.5 and 2; of the
first, CMT and MFD, sampled in one step. Two commands at a time, one thread each. All is measured by the report's
classifier, which is a convolutional network fitted to the training images, against 2,000 images kept out; and against
these as the arm's encoder and decoder give them back, which leaves out what a decoder cannot draw.
"""
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

from encode_latents import Encoder, Images, Latents  # noqa: E402
from eval_fid import Moments, precision_recall  # noqa: E402
from model import ArgumentParser, InputError, command, load_decoder, provenance, read_json, read_log, write_json  # noqa: E402
from run import call  # noqa: E402
from sanity.report import decode, distance, draw_picture, fit_classifier, read_samples  # noqa: E402
from sanity.train_encoder import BANK, knn_accuracy  # noqa: E402

DATA, RUNS = "runs/photographs", "runs/experiments/i"
SIZES = "--width 128 --depth 6 --heads 4 --patch 8"
ENCODERS = {"random": f"sanity/random_encoder.py {SIZES}",
            "labels": f"sanity/train_encoder.py --data-path {DATA}/train.zip --flips {SIZES} --steps 6000",
            "self": f"sanity/train_encoder.py --data-path {DATA}/train.zip --flips {SIZES} --steps 6000 --objective self"}
RATES = ("2e-3", "1e-3")                          # of the teacher; the better one of the random arm is every arm's
GUIDANCE = (1, 1.5, 2)
STEPS = dict(decoder=2000, teacher=8000, cmt=250, mfd=1450)
SAMPLES = 2000
COMMON = "--precision fp32 --log-every 200 --save-every 1000 --keep 1"


def plan(arm, rate):
    """-> lists of chains of commands, the chains of a list at the same time, and {row: its samples}."""
    at = f"{RUNS}/{arm}"

    def teacher(seed, lr):
        name = f"{at}/teacher-{seed}-{lr}"
        train = (f"train_teacher.py --latents {at}/latents --out {name} --preset DiTDH-mini --time-shift 2.5 --batch-size 64 "
                 f"--steps {STEPS['teacher']} --lr {lr} --lr-final 2e-5 --decay-from 0.4 --ema 0.999 --seed {seed} {COMMON}")
        return [train, *(sample(name, f"{name}-w{w}", f"--nfe 50 --solver heun --guidance {w}", seed) for w in GUIDANCE)]

    def sample(network, out, flags, seed=0):
        return (f"sample.py {network} --decoder {at}/decoder {flags} --num-samples {SAMPLES} --batch-size 250 --seed {seed} "
                f"--out {out}.npz")

    first = [f"{ENCODERS[arm]} --out {at}/encoder",
             f"encode_latents.py --data-path {DATA}/train.zip --out {at}/latents --image-size 32 --encoder-size 32 --flips "
             f"--encoder {at}/encoder --batch-size 250 --workers 0",
             f"sanity/train_decoder.py --data-path {DATA}/train.zip --latents {at}/latents --out {at}/decoder --noise 0.5 "
             f"--steps {STEPS['decoder']}"]
    weight = "--loss-form mean --loss-power 0.5 --loss-eps 0.1 --derivative fd"
    base = f"{at}/teacher-0-{rate}"
    students = [f"train_cmt.py --teacher {base} --out {at}/cmt --steps {STEPS['cmt']} --batch-size 32 --pairs 16 "
                f"--lr 1e-3 --lr-final 5e-5 --ema 0.99 --seed 0 {COMMON}", sample(f"{at}/cmt", f"{at}/cmt", "--nfe 1"),
                f"train_meanflow.py --latents {at}/latents --teacher {base} --init {at}/cmt --out {at}/mfd --batch-size 64 "
                f"--steps {STEPS['mfd']} --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.995 {weight} --seed 0 {COMMON}",
                sample(f"{at}/mfd", f"{at}/mfd", "--nfe 1")]
    rows = {f"teacher {seed}, w = {w}": f"{at}/teacher-{seed}-{rate}-w{w}.npz" for seed in (0, 1) for w in GUIDANCE}
    rows |= {"CMT 1": f"{at}/cmt.npz", "MFD 1": f"{at}/mfd.npz"}
    rates = [[teacher(0, lr) for lr in RATES]] if arm == "random" else []
    return [[first], *rates, [teacher(0, rate), teacher(1, rate)], [students]], rows


class Judge:
    """The report's classifier, and what it makes of the images kept out."""

    def __init__(self):
        self.train, held_out = (Images(f"{DATA}/{part}.zip", 32) for part in ("train", "held-out"))
        self.real, self.labels = held_out.read(range(len(held_out)))
        spaced = torch.linspace(0, len(self.train) - 1, len(held_out), dtype=torch.float64).round().long().tolist()
        self.other, self.other_labels = self.train.read(spaced)
        self.net = fit_classifier(self.train, 1500, 0, torch.device("cpu"))
        self.features, self.accuracy = self.see(self.real, self.labels)

    @torch.no_grad()
    def see(self, images, labels):
        parts = [self.net(x) for x in images.split(250)]
        hits = torch.cat([logits for *_, logits in parts]).argmax(1) == labels
        return torch.cat([features for features, *_ in parts]), hits.float().mean().item()

    def row(self, images, labels, decoded=None):
        """decoded: the features of the images kept out after encoder and decoder."""
        features, accuracy = self.see(images, labels)
        seen = Moments().update(features)
        precision, recall = precision_recall(self.features, features)[:2]
        found = {"distance": distance(seen, Moments().update(self.features)), "class accuracy": accuracy,
                 "precision": float(precision), "recall": float(recall)}
        if decoded is not None:
            found["to decoded"] = distance(seen, Moments().update(decoded))
        return found


@torch.no_grad()
def effective_rank(latents):
    """exp of the entropy of the eigenvalues of the tokens' covariance, as shares (Roy and Vetterli, 2007)."""
    z, _ = latents.read(list(range(0, len(latents), max(1, len(latents) // 4000))))
    share = torch.linalg.eigvalsh(z.float().transpose(0, 1).flatten(1).cov().double()).clamp(min=1e-12)
    share = share / share.sum()
    return (-(share * share.log()).sum()).exp().item()


def measure(arm, judge, rows):
    at = ROOT / RUNS / arm
    encoder, decoder = Encoder(at / "encoder", 32, 32), load_decoder(at / "decoder")[0].eval()
    bank = judge.train.read(range(0, len(judge.train), max(1, len(judge.train) // BANK)))
    knn = knn_accuracy(encoder.net, bank, (judge.real, judge.labels))
    kept_out, other = (decode(images, encoder, decoder, torch.device("cpu")) for images in (judge.real, judge.other))
    images = {"real": (judge.other, judge.other_labels), "decoded real": (other, judge.other_labels)}
    images |= {name: read_samples(ROOT / path, 32, 10) for name, path in rows.items()}
    reference, accuracy = judge.see(kept_out, judge.labels)
    found = {name: judge.row(*pair, reference) for name, pair in images.items()}
    # The classifier was fitted to the others.
    found["real"]["class accuracy"], found["decoded real"]["class accuracy"] = judge.accuracy, accuracy
    first = [judge.labels.tolist().index(k) for k in range(10)]
    shown = {name: x[:10] for name, (x, _) in images.items() if not name.startswith(("real", "decoded", "teacher 1"))}
    draw_picture(at / "picture.png", {"real": judge.real[first], "decoded": kept_out[first], **shown}, judge.train.classes)
    about = {"k-NN": knn, "effective rank": effective_rank(Latents(at / "latents")),
             "decoder, PSNR": read_log(at / "decoder")[-1]["psnr"]}
    return {"encoder": about, "rows": found}


def gains(rows, column):
    """By how much, as a share of it, the better of the two guidances lowers a distance: of each teacher."""
    for seed in (0, 1):
        none, *guided = (rows[f"teacher {seed}, w = {w}"][column] for w in GUIDANCE)
        yield 1 - min(guided) / none


def table(numbers):
    """The page's tables, of the arms {name: numbers}: distances and accuracy, precision and recall, the encoders."""
    names, first = list(numbers), next(iter(numbers.values()))

    def line(*cells):
        return "| " + " | ".join(cells) + " |"
    lines = []
    for columns in ([("distance", ".3g"), ("to decoded", ".3g"), ("class accuracy", ".3f")], [("precision", ".2f"), ("recall", ".2f")]):
        head = [f"{column}: {name}" if name == names[0] else name for column, _ in columns for name in names]
        lines += [line("", *head), "|---" * (1 + len(head)) + "|"]
        for row in first["rows"]:
            cells = (format(numbers[name]["rows"][row][column], how) for column, how in columns for name in names)
            lines.append(line(row, *cells))
        lines.append("")
    head = ["encoder", *first["encoder"], "guidance lowers the distance by", "to decoded"]
    lines += [line(*head), "|---" * len(head) + "|"]
    for name, found in numbers.items():
        shares = (", ".join(f"{share:.1%}" for share in gains(found["rows"], column)) for column in ("distance", "to decoded"))
        lines.append(line(name, *(f"{x:.3g}" for x in found["encoder"].values()), *shares))
    return "\n".join(lines)


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=ENCODERS, default=list(ENCODERS), help="which encoders")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--print", metavar="FOLDER", help="run nothing, print the numbers kept in this folder")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    os.chdir(ROOT)
    if args.print:
        return print(table({arm: read_json(f"{args.print}/i-{arm}.json") for arm in args.arms}))
    if args.list:
        lines = [line for arm in args.arms for chains in plan(arm, RATES[0])[0] for chain in chains for line in chain]
        return print("\n".join(f"python {line}" for line in dict.fromkeys(lines)))
    judge, numbers, choice = None, {}, Path(RUNS, "rate.json")

    def chain(lines):
        log = Path(RUNS, lines[0].split(" --out ")[1].split()[0].replace("/", "_") + ".txt")
        for line in lines:
            encoded = line.startswith("encode") and Path(line.split(" --out ")[1].split()[0], "latents.json").exists()
            if not encoded and call(line, log, 1):
                raise InputError(f"a command failed, see {log}")

    Path(RUNS).mkdir(parents=True, exist_ok=True)
    for arm in args.arms:
        with ThreadPoolExecutor(2) as pool:
            for chains in plan(arm, RATES[0])[0][:2] if arm == "random" else []:
                list(pool.map(chain, chains))
            judge = judge or Judge()
            if arm == "random" and not choice.exists():
                found = {lr: judge.row(*read_samples(f"{RUNS}/random/teacher-0-{lr}-w1.npz", 32, 10)) for lr in RATES}
                write_json(choice, {"rate": min(RATES, key=lambda lr: found[lr]["distance"]), "rates": found})
            if not choice.exists():
                raise InputError("the random arm chooses the learning rate: begin with it")
            groups, rows = plan(arm, read_json(choice)["rate"])
            for chains in groups:
                list(pool.map(chain, chains))
        found = {**measure(arm, judge, rows), "rates": read_json(choice)["rates"], **provenance()}
        write_json(Path(RUNS).parent / f"i-{arm}.json", found)
        numbers[arm] = found
        print(table({arm: found}), flush=True)
        print(json.dumps(found["rates"]), flush=True)


if __name__ == "__main__":
    command(main)
