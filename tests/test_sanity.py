"""The sanity run's own parts: digits, small encoder and decoder, report; and the plans of its scripts for a GPU, in two steps a stage."""
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

import numpy as np
import pytest
import torch
from PIL import Image

import encode_latents
import model
import train_cmt
import train_meanflow
import train_teacher
from model import InputError, generator, read_json, write_json
from runs import ROOT, let_go, random_images, state
from sanity import digits, plot_logs, random_encoder, report, synthetic, train_decoder, train_encoder

NAMES = {"teacher 50": 50, "teacher 1": 1, "CMT 1": 1, "MFD 1": 1}
DIGITS = "--train 200 --held-out 60 --image-size 16".split()
ENCODER = "--width 16 --depth 1 --heads 2".split()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Tiny digits, their latents from a random encoder, a decoder of six steps, four sample files."""
    folder = tmp_path_factory.mktemp("sanity")
    run = folder / "run"
    digits.main(["--out", f"{folder}/digits", *DIGITS])
    random_encoder.main(["--out", f"{run}/encoder", *ENCODER])
    encode(folder / "digits", run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_decoder, "HELD_OUT", 40)
        train_decoder.main(decoder_arguments(folder))
    (run / "samples").mkdir()
    real = np.stack([digits.draw(0, "train", i % 10, i // 10, 16) for i in range(120)])
    for (name, nfe), part in zip(NAMES.items(), (0.02, 0.9, 0.4, 0.03), strict=True):
        images = (1 - part) * real + part * np.random.default_rng(0).uniform(0, 255, real.shape)
        save_samples(run / "samples" / f"{name.lower().replace(' ', '_')}.npz", images.astype(np.uint8), nfe)
    (run / "seconds.txt").write_text("teacher 120\nsample teacher 50 12\nMFD 99\n")
    (run / "teacher").mkdir()
    (run / "teacher/log.jsonl").write_text('{"step": 1, "seconds": 80.0}\n{"step": 2, "seconds": 200.0}\n')
    return folder


def encode(images, run, encoder=None):
    encode_latents.main(["--data-path", f"{images}/train", "--out", f"{run}/latents", "--encoder", encoder or f"{run}/encoder",
                         *"--workers 0 --image-size 16 --encoder-size 16".split()])


def save_samples(path, images, nfe=50, labels=None, seed=0):
    np.savez(path, arr_0=images, arr_1=np.arange(len(images)) % 10 if labels is None else labels)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("about.json", json.dumps({"seed": seed, "nfe": nfe}))


def decoder_arguments(folder, out="run/decoder"):
    return ["--data-path", f"{folder}/digits/train", "--latents", f"{folder}/run/latents", "--out", f"{folder}/{out}",
            *"--steps 6 --save-every 3 --batch-size 8".split()]


# ---- digits
def test_digits_follow_from_their_key_and_can_be_read():
    image = digits.draw(3, "train", 7, 11, 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and (image == digits.draw(3, "train", 7, 11, 32)).all()
    for key in ((4, "train", 7, 11), (3, "held-out", 7, 11), (3, "train", 1, 11), (3, "train", 7, 12)):
        assert (image != digits.draw(*key, 32)).any()
    for k in range(100):
        image = digits.draw(0, "train", k % 10, k, 32).astype(float)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()                    # nothing is cut off
        contrast = np.abs((image - border[0]) @ digits.LUMA)
        assert contrast.max() > 0.3 * 255 and 0.03 < (contrast > 0.2 * 255).mean() < 0.6


def test_digits_folder(chain, tmp_path, capsys):
    folder, first = chain / "digits", chain / "digits/train/0/00000.png"
    assert [len(list(folder.glob(f"{split}/{k}/*"))) for split in ("train", "held-out") for k in range(10)] == [20] * 10 + [6] * 10
    assert (np.asarray(Image.open(folder / "held-out/4/00005.png")) == digits.draw(0, "held-out", 4, 5, 16)).all()
    before = first.stat().st_mtime_ns
    digits.main(["--out", str(folder), *DIGITS])
    assert "complete" in capsys.readouterr().out and first.stat().st_mtime_ns == before
    write_json(folder / "digits.json", {**read_json(folder / "digits.json"), "complete": False})          # killed
    first.unlink()
    digits.main(["--out", str(folder), *DIGITS])
    assert first.exists() and read_json(folder / "digits.json")["complete"]
    with pytest.raises(InputError, match="holds other work .seed"):
        digits.main(["--out", str(folder), *DIGITS, "--seed", "1"])
    with pytest.raises(InputError, match="something else"):
        digits.main(["--out", f"{folder}/train"])
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--out", str(tmp_path / "new"), "--train", "15"])
    assert "multiple" in capsys.readouterr().err and not (tmp_path / "new").exists()


# ---- decoder
def test_decoder_loss_alone():
    space = {"torch": torch}
    exec(inspect.getsource(train_decoder.decoder_loss), space)
    z, x, noise = torch.full((2, 1), 2.0), torch.zeros(2, 1), torch.ones(2, 1)
    loss, numbers = space["decoder_loss"](lambda z: z / 3, lambda x: x, z, x, noise, 0.5, 0.1)
    assert numbers["l1"] == 1 and numbers["features"] == 2 and math.isclose(loss, 1.2, rel_tol=1e-6)
    loss, numbers = space["decoder_loss"](lambda z: z / 3, None, z, x, noise, 0.5, 0.0)
    assert loss == 1 and numbers["features"] == 0


def same_run(a, b):
    """Two runs' newest states, bit for bit."""
    a, b = ({f"{part}/{name}": x for part, tensors in state(run).items() for name, x in tensors.items()} for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stopped_at_its_first_state(main, arguments, step, monkeypatch):
    """SIGTERM while it is being saved."""
    save = random_encoder.save_state

    def save_and_stop(about, at, *rest):
        save(about, at, *rest)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(random_encoder, "save_state", save_and_stop)
        main(arguments)
    assert end.value.code == 143


def test_decoder_goes_on_bit_for_bit(chain, monkeypatch, capsys):
    monkeypatch.setattr(train_decoder, "HELD_OUT", 40)
    arguments = decoder_arguments(chain, "stopped")
    stopped_at_its_first_state(train_decoder.main, arguments, 3, monkeypatch)
    said = capsys.readouterr().out
    assert "stopped after step 4: the same command goes on" in said and '{"step": 1' in said
    with pytest.raises(InputError, match="other work .noise"):
        train_decoder.main([*arguments, "--noise", "1"])
    train_decoder.main(arguments)
    assert same_run(chain / "run/decoder", chain / "stopped")
    line = model.read_log(chain / "stopped")[-1]
    assert line["step"] == 6 and 0 < line["held_out_l1"] < 1 and line["psnr"] > 0


def test_decoder_refuses_other_images(chain, tmp_path):
    digits.main(["--out", f"{tmp_path}/digits", *DIGITS, "--seed", "1"])
    with pytest.raises(InputError, match="does not hold the latents of the images"):
        train_decoder.main([*decoder_arguments(chain, "other"), "--data-path", f"{tmp_path}/digits/train"])
    digits.main(["--out", f"{tmp_path}/few", *DIGITS, "--train", "60"])
    encode(tmp_path / "few", tmp_path, f"{chain}/run/encoder")
    with pytest.raises(InputError, match="60 images of 16 px, 2 x 2 tokens: needed are 64"):
        train_decoder.main([*decoder_arguments(chain, "other"), "--data-path", f"{tmp_path}/few/train", "--latents", f"{tmp_path}/latents"])
    assert not (chain / "other").exists()


# ---- encoder
def test_views():
    x = torch.rand(64, 3, 16, 16, generator=generator("cpu", 0))
    a, b, other = (train_encoder.view(x, generator("cpu", key), True) for key in (1, 1, 2))
    assert torch.equal(a, b) and (a != other).flatten(1).any(1).all() and a.min() >= 0 and a.max() <= 1
    # Grey images that brighten to the right keep their direction, unless they may be mirrored: then about half do.
    ramp = (0.3 + 0.2 * torch.linspace(0, 1, 16)).expand(64, 3, 16, 16)
    for flips, least, most in ((False, 64, 64), (True, 20, 44)):
        row = train_encoder.view(ramp, generator("cpu", 3), flips)[:, 0, 8]
        assert least <= (row[:, -1] > row[:, 0]).sum() <= most
        assert row.diff(dim=1).abs().min() > 0                # no crop reaches beyond the image, where nothing changes
    # A crop is of 0.3 to 1 of the area: of so much of the ramp, where contrast and brightness (0.6 to 1.4 each) leave it.
    part = (row[:, -1] - row[:, 0]).abs() / 0.2
    assert part.max() < 1.4 ** 2 and part.min() > 0.3 ** 0.5 * 0.6 ** 2 * 0.9
    # Light differs between the colours by up to the tint.
    grey, tinted = (train_encoder.view(torch.full((500, 3, 8, 8), 0.4), generator("cpu", 0), False, tint=tint) for tint in (0, 0.3))
    ratio = (tinted / grey)[:, :, 0, 0]
    assert 0.7 <= ratio.min() < 0.72 and 1.28 < ratio.max() <= 1.3 and grey.std(1).max() == 0


def test_views_find_each_other(chain, tmp_path, monkeypatch):
    """Of pairs of alike vectors each finds its own, whatever their length; in training, rows i and i + B are of one image."""
    a, b = (torch.randn(6, 4, generator=generator("cpu", key)) for key in (0, 1))
    z = torch.cat([a, 3 * a + 0.01 * b])
    logits = train_encoder.similarities(z)
    assert torch.equal(logits.argmax(1), torch.arange(12).roll(6)) and logits.diag().isneginf().all()
    assert torch.allclose(logits[0, 1], torch.cosine_similarity(z[:1], z[1:2])[0] / 0.2)
    seen = []

    def stop(answers, target):
        seen.append(target)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_encoder, "view", lambda x, *rest, **more: x)
    monkeypatch.setattr(train_encoder, "similarities", seen.append)
    monkeypatch.setattr(train_encoder.F, "cross_entropy", stop)
    with pytest.raises(KeyboardInterrupt):
        train_encoder.main(["--data-path", f"{chain}/digits/train", "--out", f"{tmp_path}/out", *ENCODER,
                            *"--image-size 16 --objective self --batch-size 5".split()])
    z, target = seen
    assert torch.allclose(z[target], z, atol=1e-5) and target.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_accuracies(monkeypatch):
    """Three classes in three directions, one image in five labelled at random."""
    g = generator("cpu", 0)
    y = torch.arange(600) % 3
    z = torch.eye(3)[y] + 0.1 * torch.randn(600, 3, generator=g)
    monkeypatch.setattr(train_encoder, "features", lambda net, x: x[:, :, 0, 0] * 255)
    images, labels = z[:, :, None, None], torch.where(torch.rand(600, generator=g) < 0.2, (y + 1) % 3, y)
    net = torch.nn.Identity()
    net.device = "cpu"
    kept = images[500:], y[500:]
    assert train_encoder.accuracies(net, (images[:500], labels[:500]), kept) == {"k-NN": 1, "linear probe": 1}
    shuffled = labels[torch.randperm(500, generator=g)]
    assert max(train_encoder.accuracies(net, (images[:500], shuffled), kept).values()) < 0.6


@pytest.mark.parametrize("objective", ["labels", "self"])
def test_encoder_learns_goes_on_and_encodes(objective, chain, tmp_path, monkeypatch):
    arguments = ["--data-path", f"{chain}/digits/train", "--objective", objective, *ENCODER,
                 *"--image-size 16 --patch 4 --batch-size 16 --steps 60 --save-every 30".split(), "--out"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_encoder.main([*arguments, str(whole)])
    stopped_at_its_first_state(train_encoder.main, [*arguments, str(stopped)], 30, monkeypatch)
    assert not (stopped / "config.json").exists()
    train_encoder.main([*arguments, str(stopped)])
    assert same_run(whole, stopped) and (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    config, net = read_json(whole / "config.json"), encode_latents.Encoder(whole, 16, 16)
    assert not net.about["untrained"] and net.shape == (16, 4, 4) and config["training"]["objective"] == objective
    x, _ = encode_latents.Images(chain / "digits/train", 16).read([0, 50, 100])            # what was trained is what is encoded
    assert torch.allclose(net(x).mean((2, 3)), train_encoder.features(net.net, x / 255), atol=1e-5)
    assert objective == "self" or config["training"]["trained"]["linear probe"] > 0.2


def test_encoder_refuses(chain, tmp_path):
    for data, flags, what in (("train/3", [], "two class folders or more"), ("train", ["--width", "18"], "multiple of the heads"),
                              ("train", ["--image-size", "20"], "multiple of the patch")):
        with pytest.raises(InputError, match=what):
            train_encoder.main(["--data-path", f"{chain}/digits/{data}", "--out", f"{tmp_path}/out", *flags])
    assert not (tmp_path / "out").exists()


# ---- report
def report_arguments(chain, *more):
    files = [f"{name}={chain}/run/samples/{name.lower().replace(' ', '_')}.npz:{nfe}" for name, nfe in NAMES.items()]
    return ["--run", f"{chain}/run", "--data", f"{chain}/digits", "--classifier-steps", "8", "--samples", *files, *more]


def test_report(chain, monkeypatch):
    fits, fit = [], report.fit
    monkeypatch.setattr(report, "fit", lambda *args: fits.append(args) or fit(*args))
    report.main(report_arguments(chain))
    text, numbers = (chain / "run/report.md").read_text(), read_json(chain / "run/report.json")
    rows = numbers["rows"]
    assert list(rows) == ["real", "decoded real", *NAMES] and "RANDOM" in text
    for space in ("encoder", "classifier"):
        assert rows["MFD 1"][space] < rows["CMT 1"][space] < rows["teacher 1"][space]
    assert rows["teacher 50"]["likeness"] == 0 < rows["MFD 1"]["likeness"] < rows["CMT 1"]["likeness"] < 1
    assert rows["teacher 50"]["training_seconds"] == 200 and rows["teacher 50"]["sampling_seconds"] == 12
    assert rows["real"]["accuracy"] == numbers["held_out"]["accuracy"] and rows["real"]["count"] == 60
    for name, row in rows.items():
        assert f"| {name} | {row['nfe'] or ''} | {row['encoder']:.4g} | {row['classifier']:.4g} |" in text
    for check in numbers["checks"]:
        assert f"| {check['statement']} | {check['figures']} | {check['holds']} |" in text
    assert not numbers["checks"][0]["holds"] and "do not hold.**" in text                # 60 images are not 5,000
    assert Image.open(chain / "run/picture.png").width > 6 * 96
    report.main(report_arguments(chain))                                                 # the classifier is kept,
    assert len(fits) == 1 and read_json(chain / "run/report.json")["rows"] == rows
    held_out = encode_latents.Images(chain / "digits/held-out", 16)                      # and known by its images
    report.classifier(chain / "run/classifier.safetensors", held_out, report.read(held_out, range(10))[0], 8, 0, "cpu")
    assert len(fits) == 2


@pytest.mark.parametrize("size, nfe, labels, seed, message", [
    (16, 1, np.zeros(120, np.int64), 0, "of class i mod 10"), (8, 1, None, 0, "8 px"), (16, 50, None, 0, "--nfe 50"),
    (16, 1, None, 1, "seeds"), (None, 1, None, 0, "not a readable .npz")])
def test_report_refuses_samples(chain, tmp_path, size, nfe, labels, seed, message):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"no zip")
    if size:
        save_samples(path, np.zeros((120, size, size, 3), np.uint8), nfe, labels, seed)
    with pytest.raises(InputError, match=message):
        report.main(report_arguments(chain, f"MFT 1={path}:1"))


def test_judge():
    def holds(**changes):
        rows = {"real": dict(accuracy=0.99, count=5000), "teacher 50": dict(encoder=1.0, classifier=1.0, accuracy=0.97, count=5000),
                "teacher 1": dict(encoder=9.0, classifier=9.0, accuracy=0.2, count=5000),
                "CMT 1": dict(encoder=3.0, classifier=3.0, accuracy=0.9, count=5000),
                "MFD 1": dict(encoder=1.1, classifier=1.2, accuracy=0.96, count=5000)}
        for name, change in changes.items():
            rows[name.replace("_", " ")] |= change
        return [check["holds"] for check in report.judge(rows, 5000)]
    assert holds() == [True] * 14
    for changes, failing in ((dict(MFD_1=dict(classifier=1.21)), 1), (dict(MFD_1=dict(accuracy=0.94)), 1),
                             (dict(MFD_1=dict(accuracy=0.89)), 2), (dict(teacher_1=dict(encoder=4.9)), 2),
                             (dict(CMT_1=dict(encoder=2.1)), 1), (dict(CMT_1=dict(encoder=10.0)), 1), (dict(real=dict(accuracy=0.97)), 1),
                             (dict(CMT_1=dict(count=4999)), 1), (dict(MFD_1=dict(encoder=math.nan)), 3)):
        assert holds(**changes).count(False) == failing, changes


# ---- logs
def test_plot_logs(tmp_path):
    """Two logs, one with a line that a crash has cut, in one picture; a folder without a log is named."""
    pytest.importorskip("matplotlib")
    for run, lines in (("a", 3), ("b", 5)):
        (tmp_path / run).mkdir()
        text = "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 1e-3}) + "\n" for i in range(lines))
        (tmp_path / run / "log.jsonl").write_text(text + '{"step": 9, "lo')
    plot_logs.main([f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/logs.png"])
    assert Image.open(tmp_path / "logs.png").width > 500
    for argv, message in (([f"{tmp_path}"], "no log in"), ([f"{tmp_path}/a", "--keys", "fid"], "none of fid")):
        with pytest.raises(InputError, match=message):
            plot_logs.main(argv)


# ---- random data of the real shapes
def test_synthetic_data_train_every_stage(tmp_path):
    """And leave their logs alone, whose numbers are not all 0."""
    z = synthetic.random_latents(40, (12, 4, 4))
    assert abs(z.float().std() - 1) < 0.1
    encode_latents.write_latents(tmp_path / "latents", z, [i % 5 for i in range(40)], shard_size=16)
    synthetic.write_teacher(tmp_path / "teacher", tmp_path / "latents", 5, "DiTDH-mini")
    common = "--steps 2 --batch-size 8 --save-every 0 --log-every 1".split()
    teacher, latents = ["--teacher", f"{tmp_path}/teacher"], ["--latents", f"{tmp_path}/latents"]
    train_teacher.main([*latents, "--preset", "DiTDH-mini", "--out", f"{tmp_path}/a", *common])
    train_cmt.main([*teacher, "--pairs", "8", "--out", f"{tmp_path}/b", *common])
    train_meanflow.main([*latents, *teacher, "--init", f"{tmp_path}/teacher", "--out", f"{tmp_path}/c", *common])
    for run in "abc":
        line = model.read_log(tmp_path / run)[-1]
        assert not model.states_of(tmp_path / run) and all(line[name] > 0 for name in line), line


def test_synthetic_says_what_it_takes(tmp_path, capsys):
    argv = ["--out", f"{tmp_path}/x", "--preset", "DiTDH-mini", "--images", "4"]
    synthetic.main(argv)
    assert "4 random latents and a random DiTDH-mini, 0.0" in capsys.readouterr().out
    let_go()
    (tmp_path / "x/latents/latent_stats.safetensors").unlink()                     # killed halfway
    synthetic.main(argv)
    let_go()
    assert encode_latents.Latents(tmp_path / "x/latents").shape == (768, 16, 16)
    with pytest.raises(InputError, match="images: 4 there, 5 now"):
        synthetic.main([*argv[:-1], "5"])
    with pytest.raises(InputError, match="holds something else"):
        synthetic.main(["--out", f"{tmp_path}/x/latents"])


# ---- A GPU's plans
@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A copy of the scripts, and a Python that only writes down what it is to run: `plan(SCRIPT, ...)` -> status, commands."""
    for pattern in ("*.py", "sanity/*", "requirements.txt", "tests/setup.sh", "tests/requirements.txt", "docs/experiments/*.sh"):
        for path in ROOT.glob(pattern):
            (tmp_path / path.relative_to(ROOT).parent).mkdir(parents=True, exist_ok=True)
            if path.is_file():
                shutil.copy(path, tmp_path / path.relative_to(ROOT))
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\ncase $1 in -) exec {sys.executable} "$@";; esac\n'
                      f'echo "${{*@Q}}" >> {tmp_path}/commands; sleep ${{SLEEP:-0}}\n')
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)

    def call(script, *argv, **variables):
        (tmp_path / "commands").write_text("")
        done = subprocess.run([script, *argv], env={**os.environ, "PYTHON": str(python), "TINY": "2", **variables}, capture_output=True)
        return done.returncode, [shlex.split(line) for line in (tmp_path / "commands").read_text().splitlines()]
    return call


def do(commands):
    """Here, one after the other."""
    for script, *argv in commands:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(argv)
        let_go()


def test_the_sanity_run_on_a_gpu(plan, tmp_path):
    status, commands = plan("sanity/run.sh", PLAN="gpu")
    assert status == 0 and len(commands) == 15
    do(commands)
    found = read_json(tmp_path / "runs/sanity-tiny/report.json")
    assert list(found["rows"]) == ["real", "decoded real", *report.COLUMNS] and len(found["checks"]) == 14
    assert plan("sanity/run.sh", PLAN="tpu")[0] == 2


def test_photographs_on_a_gpu(plan, tmp_path):
    random_images(tmp_path / "photographs", classes=2, each=240)
    with zipfile.ZipFile(tmp_path / "photographs.zip", "w") as file:
        for path in tmp_path.glob("photographs/*/*"):
            file.write(path, path.relative_to(tmp_path / "photographs"))
    script = "docs/experiments/gpu_photographs.sh", "photographs.zip"
    assert plan(*script, MINUTES="0") == (75, [])                                # the piece is over before it begins
    assert [command[0] for command in plan(*script)[1]][:3] == ["sanity/random_encoder.py", "encode_latents.py", "sanity/train_decoder.py"]
    assert plan(*script) == (0, [])                                              # all is done, and is not started again
    status, commands = plan(*script, ARM="labels")
    assert status == 0 and len(commands) == 15
    do(commands)
    rows = read_json(tmp_path / "runs/photographs-gpu-labels-tiny/report.json")["rows"]
    assert list(rows) == ["real", "decoded real", *report.COLUMNS, "teacher 100 heun"] and rows["real"]["count"] == 80
