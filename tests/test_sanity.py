"""The sanity run's own parts: digits, small encoder and decoder, report; and plans for a GPU, at tiny size."""
import importlib
import inspect
import json
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
    """One of our scripts in `home`, with a Python that only notes what it is to run: -> status, commands."""
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
def test_digits_follow_from_their_key_and_can_be_read():
    for key in (("held-out", 7, 11), ("train", 1, 11), ("train", 7, 12)):
        assert (digits.draw(*key, 32) != digits.draw("train", 7, 11, 32)).any()
    for k in range(100):
        image = digits.draw("train", k % 10, k, 32).astype(float)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()                    # nothing is cut off
        contrast = np.abs((image - border[0]) @ digits.LUMA)
        assert contrast.max() > 0.3 * 255 and 0.03 < (contrast > 0.2 * 255).mean() < 0.6


def test_digits_folder(tmp_path):
    out, argv = tmp_path / "digits", ["--out", f"{tmp_path}/digits", *"--train 20 --held-out 10".split()]
    stale = tmp_path / ".digits.tmp/train/0/00009.png"        # of a call for more that was killed
    stale.parent.mkdir(parents=True)
    stale.touch()
    digits.main(argv)
    images = {split: encode_latents.Images(out / split, 32) for split in digits.SPLITS}
    assert [len(x) for x in images.values()] == [20, 10] and not stale.exists()
    assert (images["train"].pixels(9) == digits.draw("train", 4, 1, 32)).all()
    before = (out / "train/0/00000.png").stat().st_mtime_ns
    digits.main(argv)
    assert (out / "train/0/00000.png").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds other work .train"):
        digits.main([*argv, "--train", "30"])
    with pytest.raises(InputError, match="digits.json"):
        digits.main(["--out", f"{out}/train"])


# ---- decoder
def decoder_arguments(home, out, *more):
    return [f"--data-path={home}/data/digits-tiny/train", f"--latents={home}/runs/sanity-tiny/latents",
            f"--out={out}", *"--steps 6 --save-every 3 --batch-size 8".split(), *more]


def stops_and_goes_on(main, arguments, step, tmp_path, monkeypatch):
    """SIGTERM while a state is being saved, and the same command again: an undisturbed run, bit for bit."""
    def save_and_stop(about, at, *rest):
        model.save_state(about, at, *rest)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    main([*arguments, f"--out={whole}"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(random_encoder, "save_state", save_and_stop)
        main([*arguments, f"--out={stopped}"])
    assert model.read_log(stopped)[-1]["step"] == step + 1
    main([*arguments, f"--out={stopped}"])
    a, b = state(whole), state(stopped)
    assert all(torch.equal(x, b[part][name]) for part in a for name, x in a[part].items())
    return whole


def test_decoder_loss_alone():
    space = {"torch": torch}
    exec(inspect.getsource(train_decoder.decoder_loss), space)
    z, x, noise = torch.full((2, 1), 2.0), torch.zeros(2, 1), torch.ones(2, 1)
    loss, numbers = space["decoder_loss"](lambda z: z / 3, lambda x: x, z, x, noise, 0.5, 0.1)
    assert numbers["l1"] == 1 and numbers["features"] == 2 and math.isclose(loss, 1.2, rel_tol=1e-6)
    assert space["decoder_loss"](lambda z: z / 3, None, z, x, noise, 0.5, 0.0)[0] == 1


def test_decoder_goes_on_and_refuses_other_images(sanity, tmp_path, monkeypatch):
    arguments = decoder_arguments(sanity, "none")
    whole = stops_and_goes_on(train_decoder.main, arguments, 3, tmp_path, monkeypatch)
    assert model.read_log(whole)[-1]["psnr"] > 0
    with pytest.raises(InputError, match="other work .noise"):
        train_decoder.main(decoder_arguments(sanity, whole, "--noise", "1"))
    with pytest.raises(InputError, match="does not hold the latents of the images"):
        train_decoder.main(decoder_arguments(sanity, "none", f"--data-path={sanity}/data/digits-tiny/held-out"))


# ---- encoder
def test_views():
    x = torch.rand(64, 3, 16, 16, generator=generator("cpu", 0))
    a, b = (train_encoder.view(x, generator("cpu", key), True) for key in (1, 2))
    assert (a != b).flatten(1).any(1).all() and a.min() >= 0 and a.max() <= 1
    # Grey images that brighten to the right stay so, unless they may be mirrored: then about half do.
    ramp = (0.3 + 0.2 * torch.linspace(0, 1, 16)).expand(64, 3, 16, 16)
    for flips, least, most in ((False, 64, 64), (True, 20, 44)):
        row = train_encoder.view(ramp, generator("cpu", 3), flips)[:, 0, 8]
        assert least <= (row[:, -1] > row[:, 0]).sum() <= most
        assert row.diff(dim=1).abs().min() > 0                # no crop reaches beyond the image


def encoder_arguments(home, *more):
    return [f"--data-path={home}/data/digits-tiny/train", *"--width 16 --depth 1 --heads 2 --patch 4".split(),
            *"--image-size 16 --batch-size 16 --steps 60 --save-every 30".split(), *more]


def test_views_find_each_other(sanity, tmp_path, monkeypatch):
    """Two views that are the same: each one's nearest is the other, and that is what is learned."""
    def see(answers, target):
        assert len(target) == 32 and torch.equal(answers.argmax(1), target)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_encoder, "view", lambda x, *rest, **more: x)
    monkeypatch.setattr(train_encoder.F, "cross_entropy", see)
    with pytest.raises(KeyboardInterrupt):
        train_encoder.main(encoder_arguments(sanity, "--objective=self", f"--out={tmp_path}"))


def test_neighbours(monkeypatch):
    """Three classes in three directions; then labels at random."""
    y, g = torch.arange(600) % 3, generator("cpu", 0)
    images = (torch.eye(3)[y] + 0.1 * torch.randn(600, 3, generator=g))[:, :, None, None]
    monkeypatch.setattr(train_encoder, "features", lambda net, x: x[:, :, 0, 0])
    for labels, least, most in ((y, 1, 1), (y[torch.randperm(600, generator=g)], 0, 0.6)):
        bank, kept = (images[:500], labels[:500]), (images[500:], y[500:])
        assert least <= train_encoder.knn_accuracy(SimpleNamespace(device="cpu"), bank, kept) <= most


@pytest.mark.parametrize("objective", ["labels", "self"])
def test_encoder_learns_goes_on_and_encodes(objective, sanity, tmp_path, monkeypatch):
    arguments = encoder_arguments(sanity, f"--objective={objective}")
    folder = stops_and_goes_on(train_encoder.main, arguments, 30, tmp_path, monkeypatch)
    encoder, training = encode_latents.Encoder(folder, 16, 16), read_json(folder / "config.json")["training"]
    assert not encoder.about["untrained"] and encoder.shape == (16, 4, 4)
    lines = model.read_log(folder)
    assert lines[-1]["loss"] < 0.97 * lines[0]["loss"] and training["k-NN"] == lines[-1]["k-NN"]
    x, _ = encode_latents.Images(sanity / "data/digits-tiny/train", 16).read([0, 50, 100])
    features = train_encoder.features(encoder.net, x / 255)   # what was trained is what is encoded
    assert torch.allclose(encoder(x).mean((2, 3)), features, atol=1e-5)


# ---- report
def save_samples(path, images, labels=None):
    np.savez(path, arr_0=images, arr_1=np.arange(len(images)) % 10 if labels is None else labels)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("about.json", json.dumps({"nfe": 7}))


def test_report(sanity, tmp_path):
    """Of images with more and more noise: farther, less like the teacher's."""
    run, files = sanity / "runs/sanity-tiny", []
    real = np.stack([digits.draw("train", i % 10, i // 10, 32) for i in range(120)])
    for name, part in (("teacher 50", 0.02), ("MFD 1", 0.03), ("CMT 1", 0.4), ("teacher 1", 0.9)):
        images = (1 - part) * real + part * np.random.default_rng(0).uniform(0, 255, real.shape)
        files.append(f"{name}={tmp_path}/{name}.npz")
        save_samples(f"{tmp_path}/{name}.npz", images.astype(np.uint8))
    arguments = [f"--run={tmp_path}", f"--data={sanity}/data/digits-tiny", f"--latents={run}/latents",
                 f"--decoder={run}/decoder", "--classifier-steps=8", "--samples", *files]
    report.main(arguments)
    text, found = (tmp_path / "report.md").read_text(), read_json(tmp_path / "report.json")
    rows = found["rows"]
    near = [rows[name] for name in ("MFD 1", "CMT 1", "teacher 1")]
    for column in ("encoder", "classifier", "likeness"):
        assert 0 < near[0][column] < near[1][column] < near[2][column]
    assert rows["teacher 50"]["likeness"] == 0 and near[0]["nfe"] == 7 and rows["real"]["count"] == 50
    for name, row in rows.items():
        assert f"| {name} | {row['nfe'] or ''} | {row['encoder']:.4g} | {row['classifier']:.4g} |" in text
    for check in found["checks"]:
        assert f"| {check['statement']} | {check['figures']} | {check['holds']} |" in text
    assert f"{sum(not check['holds'] for check in found['checks'])} do not hold" in text and "RANDOM" in text
    for size, labels, message in ((32, np.zeros(120), "of class i mod 10"), (8, None, "8 px")):
        save_samples(f"{tmp_path}/MFD 1.npz", np.zeros((120, size, size, 3), np.uint8), labels)
        with pytest.raises(InputError, match=message):
            report.main(arguments)


def test_judge():
    def failing(**changes):
        rows = {"real": [0, 0, 0.99, 5000], "teacher 50": [1, 1, 0.97, 5000], "teacher 1": [9, 9, 0.2, 5000],
                "CMT 1": [3, 3, 0.9, 5000], "MFD 1": [1.1, 1.2, 0.96, 5000]}
        columns = ("encoder", "classifier", "accuracy", "count")
        rows = {name: dict(zip(columns, row, strict=True)) for name, row in rows.items()}
        for name, change in changes.items():
            rows[name.replace("_", " ")] |= change
        checks = [check["holds"] for check in report.judge(rows)]
        assert len(checks) == 14
        return checks.count(False)
    assert failing() == 0
    assert failing(MFD_1=dict(classifier=1.21)) == failing(CMT_1=dict(encoder=2.1)) == 1
    assert failing(CMT_1=dict(encoder=10)) == failing(CMT_1=dict(count=4999)) == 1
    assert failing(MFD_1=dict(accuracy=0.89)) == failing(teacher_1=dict(encoder=4.9)) == 2
    assert failing(MFD_1=dict(encoder=math.nan)) == 3


# ---- random data of the real shapes
def test_synthetic(tmp_path):
    """The README's two lines, at a small size, and once more; never over something else."""
    make = "sanity/synthetic.py --out x --preset DiTDH-mini --images 4"
    train = ("train_meanflow.py --latents x/latents --teacher x/teacher --init x/teacher --out x/try --steps 2 "
             "--batch-size 4 --log-every 1 --save-every 0")
    do(tmp_path, map(str.split, (make, train, make)))
    line = model.read_log(tmp_path / "x/try")[-1]
    assert not model.states_of(tmp_path / "x/try") and all(line[name] > 0 for name in line), line
    with pytest.raises(InputError, match="holds something else"):
        do(tmp_path, [f"{make} --preset DiTDH-S".split()])


# ---- the plans
def test_the_sanity_run_on_a_gpu(sanity):
    found = read_json(sanity / "runs/sanity-tiny/report.json")
    assert list(found["rows"]) == ["real", "decoded real", *report.COLUMNS] and len(found["checks"]) == 14
    assert found["rows"]["MFD 2"]["nfe"] == 2 and found["rows"]["MFD 2"]["training_seconds"] > 0
    assert planned(sanity, "sanity/run.sh", PLAN="tpu")[0] == 2


def test_photographs_on_a_gpu(tmp_path):
    random_images(tmp_path / "photographs", classes=2, each=240)
    shutil.make_archive(tmp_path / "photographs", "zip", tmp_path / "photographs")
    script = "docs/experiments/gpu_photographs.sh", "photographs.zip"
    assert planned(tmp_path, *script, MINUTES="0") == (75, [])                   # over before it begins
    assert len(planned(tmp_path, *script)[1]) == 15
    assert planned(tmp_path, *script) == (0, [])                                 # all is done
    status, commands = planned(tmp_path, *script, ARM="labels")
    assert status == 0 and len(commands) == 15
    do(tmp_path, commands)
    rows = read_json(tmp_path / "runs/photographs-gpu-labels-tiny/report.json")["rows"]
    assert list(rows) == ["real", "decoded real", *report.COLUMNS, "teacher 100 heun"]
    assert rows["real"]["count"] == 80
