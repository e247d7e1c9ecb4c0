"""The sanity run's parts: digits, small encoder and decoder, report; and plans for a GPU, at tiny size."""
import importlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import encode_latents
import model
from model import InputError, generator, read_json
from runs import ROOT, let_go, random_images, state
from sanity import digits, random_encoder, report, train_decoder, train_encoder


def planned(home, script, *argv, **variables):
    """A script in `home`, with a Python that only notes what it is to run: -> status, commands."""
    for name in ("docs", "sanity", "tests", "requirements.txt"):
        if not (home / name).exists():
            (home / name).symlink_to(ROOT / name)
    python, commands = home / "python", home / "commands"
    python.write_text(f'#!/usr/bin/env bash\ncase $1 in -) exec {sys.executable} "$@";; esac\n'
                      f'echo "${{*@Q}}" >> {commands}\n')
    python.chmod(0o755)
    commands.write_text("")
    variables = {**os.environ, "PYTHON": str(python), "TINY": "2", **variables}
    done = subprocess.run([script, *argv], cwd=home, env=variables, capture_output=True)
    return done.returncode, [shlex.split(line) for line in commands.read_text().splitlines()]


def do(home, commands):
    """Here, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for script, *argv in commands:
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(argv)
            let_go()


@pytest.fixture(scope="module")
def sanity(tmp_path_factory):
    """What sanity/run.sh leaves by the GPU's plan, in two steps a stage."""
    home = tmp_path_factory.mktemp("sanity")
    status, commands = planned(home, "sanity/run.sh", PLAN="gpu")
    assert status == 0 and len(commands) == 15
    do(home, commands)
    return home


# ---- digits
def test_digits_follow_from_their_key():
    for key in (("held-out", 7, 11), ("train", 1, 11), ("train", 7, 12)):
        assert (digits.draw(*key, 32) != digits.draw("train", 7, 11, 32)).any()
    for k in range(100):
        image = digits.draw("train", k % 10, k, 32)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()    # nothing is cut off


def test_digits_folder(tmp_path):
    argv = [f"--out={tmp_path}/digits", *"--train 20 --held-out 10".split()]
    stale = tmp_path / ".digits.1.tmp/train/0/00009.png"    # of a call for more that was killed
    stale.parent.mkdir(parents=True)
    stale.touch()
    digits.main(argv)
    train, held_out = (encode_latents.Images(tmp_path / "digits" / split, 32) for split in digits.SPLITS)
    assert (len(train), len(held_out)) == (20, 10) and not stale.exists()
    assert (train.pixels(9) == digits.draw("train", 4, 1, 32)).all()
    digits.main(argv)
    with pytest.raises(InputError, match="holds other work .train"):
        digits.main([*argv, "--train", "30"])


# ---- decoder
def test_decoder_goes_on_bit_for_bit_and_refuses_others_images(sanity, tmp_path, monkeypatch):
    def save_and_stop(about, step, *rest):
        model.save_state(about, step, *rest)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def train(out, images="train", *more):
        train_decoder.main([f"--data-path={sanity}/data/digits-tiny/{images}", f"--out={tmp_path}/{out}",
                            f"--latents={sanity}/runs/sanity-tiny/latents",
                            *"--steps 6 --save-every 3 --batch-size 8".split(), *more])
    train("whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(random_encoder, "save_state", save_and_stop)
        train("stopped")
    assert model.read_log(tmp_path / "stopped")[-1]["step"] == 4
    train("stopped")
    a, b = state(tmp_path / "whole"), state(tmp_path / "stopped")
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())
    with pytest.raises(InputError, match="other work .noise"):
        train("whole", "train", "--noise=1")
    with pytest.raises(InputError, match="does not hold the latents of the images"):
        train("other", "held-out")


# ---- encoder
def test_views():
    """Grey images that brighten to the right stay so, unless they may be mirrored: then about half do."""
    ramp = (0.3 + 0.2 * torch.linspace(0, 1, 16)).expand(64, 3, 16, 16)
    for flips, least, most in ((False, 64, 64), (True, 20, 44)):
        row = train_encoder.view(ramp, generator("cpu", 3), flips)[:, 0, 8]
        assert least <= (row[:, -1] > row[:, 0]).sum() <= most
        assert row.diff(dim=1).abs().min() > 0    # no crop reaches beyond the image


def train_small_encoder(home, out, objective):
    sizes = "--width 16 --depth 1 --heads 2 --batch-size 16 --steps 200 --lr 5e-3".split()
    data = f"{home}/data/digits-tiny/train"
    train_encoder.main(["--data-path", data, "--out", str(out), "--objective", objective, *sizes])


def test_neighbours(monkeypatch):
    """Three classes in three directions; then all labels kept out are wrong."""
    y = torch.arange(600) % 3
    x = (torch.eye(3)[y] + 0.1 * torch.randn(600, 3, generator=generator("cpu", 0)))[:, :, None, None]
    monkeypatch.setattr(train_encoder, "features", lambda net, x: x[:, :, 0, 0])
    net, bank = SimpleNamespace(device="cpu"), (x[:500], y[:500])
    assert train_encoder.knn_accuracy(net, bank, (x[500:], y[500:])) == 1
    assert train_encoder.knn_accuracy(net, bank, (x[500:], (y[500:] + 1) % 3)) == 0


@pytest.mark.parametrize("objective", ["labels", "self"])
def test_encoder_learns_and_encodes(objective, sanity, tmp_path):
    train_small_encoder(sanity, tmp_path, objective)
    encoder, lines = encode_latents.Encoder(tmp_path, 32, 32), model.read_log(tmp_path)
    assert not encoder.about["untrained"] and encoder.shape == (16, 4, 4)
    assert lines[-1]["loss"] < 0.96 * lines[0]["loss"] and 0 <= lines[-1]["k-NN"] <= 1
    x, _ = encode_latents.Images(sanity / "data/digits-tiny/train", 32).read([0, 50, 100])
    features = train_encoder.features(encoder.net, x / 255)   # what was trained is what is encoded
    assert torch.allclose(encoder(x).mean((2, 3)), features, atol=1e-5)


# ---- report
def test_report(sanity, tmp_path):
    """Of images with more and more noise: farther, less like the teacher's."""
    def save(name, images, y):
        path = tmp_path / f"{name}.npz"
        np.savez(path, arr_0=images.astype(np.uint8), arr_1=y)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("about.json", '{"nfe": 7}')
        return f"{name}={path}"
    run, y = sanity / "runs/sanity-tiny", np.arange(120) % 10
    real = np.stack([digits.draw("train", i % 10, i // 10, 32) for i in range(120)])
    noise = np.random.default_rng(0).uniform(0, 255, real.shape)
    parts = {"teacher 50": 0.02, "MFD 1": 0.03, "CMT 1": 0.4, "teacher 1": 0.9}
    arguments = [f"--run={tmp_path}", f"--data={sanity}/data/digits-tiny", f"--latents={run}/latents",
                 f"--decoder={run}/decoder", "--classifier-steps=8", "--samples",
                 *(save(name, real + part * (noise - real), y) for name, part in parts.items())]
    report.main(arguments)
    text, found = (tmp_path / "report.md").read_text(), read_json(tmp_path / "report.json")
    rows = found["rows"]
    for column in ("encoder", "classifier", "likeness"):
        assert 0 < rows["MFD 1"][column] < rows["CMT 1"][column] < rows["teacher 1"][column]
    assert rows["teacher 50"]["likeness"] == 0 and rows["MFD 1"]["nfe"] == 7 and rows["real"]["count"] == 50
    for name, row in rows.items():
        assert f"| {name} | {row['nfe'] or ''} | {row['encoder']:.4g} | {row['classifier']:.4g} |" in text
    assert f"{sum(not check['holds'] for check in found['checks'])} do not hold" in text
    for images, labels, message in ((real, 0 * y, "of class i mod 10"), (real[:, ::2, ::2], y, "16 px")):
        save("MFD 1", images, labels)
        with pytest.raises(InputError, match=message):
            report.main(arguments)


def test_judge():
    def failing(**changes):
        rows = {"real": [0, 0, 0.99, 5000], "teacher 50": [1, 1, 0.97, 5000], "teacher 1": [9, 9, 0.2, 5000],
                "CMT 1": [3, 3, 0.9, 5000], "MFD 1": [1.1, 1.2, 0.96, 5000]}
        rows = {name: dict(zip(("encoder", "classifier", "accuracy", "count"), row, strict=True))
                for name, row in rows.items()}
        for name, change in changes.items():
            rows[name.replace("_", " ")] |= change
        return sum(not check["holds"] for check in report.judge(rows))
    assert failing() == 0
    assert failing(MFD_1=dict(classifier=1.21)) == failing(CMT_1=dict(encoder=2.1)) == 1
    assert failing(CMT_1=dict(encoder=10)) == failing(CMT_1=dict(count=4999)) == 1
    assert failing(MFD_1=dict(accuracy=0.89)) == failing(teacher_1=dict(encoder=4.9)) == 2
    assert failing(MFD_1=dict(encoder=math.nan)) == 3


# ---- random data of the real shapes
def test_synthetic(tmp_path):
    """The README's two lines, at a small size, and once more; never over something else."""
    make = "sanity/synthetic.py --out x --preset DiTDH-mini --images 4"
    train = ("train_meanflow.py --latents x/latents --teacher x/teacher --init x/teacher --out x/try "
             "--steps 2 --batch-size 4 --log-every 1 --save-every 0")
    do(tmp_path, map(str.split, (make, train, make)))
    line = model.read_log(tmp_path / "x/try")[-1]
    assert not model.states_of(tmp_path / "x/try") and all(line[name] > 0 for name in line), line
    with pytest.raises(InputError, match="holds something else"):
        do(tmp_path, [f"{make} --preset DiTDH-S".split()])


# ---- the plans
def test_sanity_run_on_a_gpu(sanity):
    found = read_json(sanity / "runs/sanity-tiny/report.json")
    assert list(found["rows"]) == ["real", "decoded real", *report.COLUMNS] and len(found["checks"]) == 14
    assert found["rows"]["MFD 2"]["nfe"] == 2 and found["rows"]["MFD 2"]["training_seconds"] > 0
    assert planned(sanity, "sanity/run.sh", PLAN="tpu")[0] == 2


def test_photographs_on_a_gpu(tmp_path):
    random_images(tmp_path / "photographs", classes=2, each=240)
    shutil.make_archive(tmp_path / "photographs", "zip", tmp_path / "photographs")
    script = "docs/experiments/gpu_photographs.sh", "photographs.zip"
    assert planned(tmp_path, *script, MINUTES="0") == (75, [])    # over before it begins
    assert len(planned(tmp_path, *script)[1]) == 15
    assert planned(tmp_path, *script) == (0, [])    # all is done
    status, commands = planned(tmp_path, *script, ARM="labels")
    assert status == 0 and len(commands) == 15
    do(tmp_path, commands)
    rows = read_json(tmp_path / "runs/photographs-gpu-labels-tiny/report.json")["rows"]
    assert list(rows) == ["real", "decoded real", *report.COLUMNS, "teacher 100 heun"]
    assert rows["real"]["count"] == 80
