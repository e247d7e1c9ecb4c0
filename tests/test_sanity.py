"""The sanity run's own parts: the digits, the small decoder, the report."""
import inspect
import json
import math
import os
import signal
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
from model import InputError, generator, load_decoder, read_json, write_json
from runs import let_go
from sanity import digits, plot_logs, random_encoder, report, synthetic, train_decoder, train_encoder

NAMES = {"teacher 50": 50, "teacher 1": 1, "CMT 1": 1, "MFD 1": 1}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Tiny digits, their latents from a random encoder, a decoder of six steps, four sample files."""
    folder = tmp_path_factory.mktemp("sanity")
    digits.main(["--out", f"{folder}/digits", "--train", "200", "--held-out", "60", "--image-size", "16"])
    random_encoder.main(["--out", f"{folder}/run/encoder", "--width", "16", "--depth", "1", "--heads", "2"])
    encode_latents.main(["--data-path", f"{folder}/digits/train", "--out", f"{folder}/run/latents", "--workers", "0",
                         "--image-size", "16", "--encoder-size", "16",
                         "--encoder", f"{folder}/run/encoder"])
    (folder / "run/samples").mkdir()
    real = np.stack([digits.draw(0, "train", i % 10, i // 10, 16) for i in range(120)])
    for name, part in zip(NAMES, (0.02, 0.9, 0.4, 0.03), strict=True):
        images = (1 - part) * real + part * np.random.default_rng(0).uniform(0, 255, real.shape)
        path = folder / "run/samples" / f"{name.lower().replace(' ', '_')}.npz"
        save_samples(path, images.astype(np.uint8), NAMES[name])
    write_lines(folder / "run/seconds.txt", "teacher 120", "sample teacher 50 12", "MFD 99")
    (folder / "run/teacher").mkdir()
    write_lines(folder / "run/teacher/log.jsonl", '{"step": 1, "seconds": 80.0}', '{"step": 2, "seconds": 200.0}')
    return folder


def save_samples(path, images, nfe):
    np.savez(path, arr_0=images, arr_1=np.arange(len(images)) % 10)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("about.json", json.dumps({"seed": 0, "nfe": nfe}))


def write_lines(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def decoder_arguments(folder, out="run/decoder"):
    return ["--data-path", f"{folder}/digits/train", "--latents", f"{folder}/run/latents", "--out", f"{folder}/{out}",
            "--steps", "6", "--save-every", "3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def decoder(chain):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_decoder, "HELD_OUT", 40)
        train_decoder.main(decoder_arguments(chain))
    return chain / "run/decoder"


# ---- digits ----------------------------------------------------------------------------------------------------------
def test_digits_follow_from_their_key():
    image = digits.draw(3, "train", 7, 11, 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image == digits.draw(3, "train", 7, 11, 32)).all()
    for key in ((4, "train", 7, 11), (3, "held-out", 7, 11), (3, "train", 1, 11), (3, "train", 7, 12)):
        assert (image != digits.draw(*key, 32)).any()


def test_digits_are_whole_and_readable():
    for k in range(200):
        image = digits.draw(0, "train", k % 10, k, 32).astype(float)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == border[0]).all()                    # nothing is cut off
        contrast = np.abs((image - border[0]) @ digits.LUMA)
        assert contrast.max() > 0.3 * 255                     # ink and paper differ
        assert 0.03 < (contrast > 0.2 * 255).mean() < 0.6


def test_digits_folder(chain, tmp_path, capsys):
    folder = chain / "digits"
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "digits.json", "held-out", "train"]
    for split, count in (("train", 20), ("held-out", 6)):
        assert sorted(path.name for path in (folder / split).iterdir()) == list("0123456789")
        assert all(len(list((folder / split / str(k)).iterdir())) == count for k in range(10))
    assert (np.asarray(Image.open(folder / "held-out/4/00005.png")) == digits.draw(0, "held-out", 4, 5, 16)).all()
    same = ["--out", str(folder), "--train", "200", "--held-out", "60", "--image-size", "16"]
    before = (folder / "train/0/00000.png").stat().st_mtime_ns
    digits.main(same)
    assert "complete" in capsys.readouterr().out and (folder / "train/0/00000.png").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds other work .seed"):
        digits.main([*same, "--seed", "1"])
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        digits.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        digits.main(["--out", str(tmp_path / "new"), "--train", "15"])
    assert "multiples of 10" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_digits_go_on(tmp_path):
    arguments = ["--out", str(tmp_path), "--train", "20", "--held-out", "10", "--image-size", "16"]
    digits.main(arguments)
    marker = read_json(tmp_path / "digits.json")
    write_json(tmp_path / "digits.json", {**marker, "complete": False})
    (tmp_path / "train/3/00001.png").unlink()
    digits.main(arguments)
    assert (tmp_path / "train/3/00001.png").exists() and json.loads((tmp_path / "digits.json").read_text())["complete"]


# ---- decoder ---------------------------------------------------------------------------------------------------------
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
    a, b = (model.read_tensors(next(iter(model.states_of(run).values())))[0] for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[part][k], b[part][k]) for part in a for k in a[part].keys() | b[part].keys())


def stop_at_the_first_state(monkeypatch, script):
    """SIGTERM while it is being saved."""
    save = script.save_state

    def save_and_stop(about, step, *rest):
        save(about, step, *rest)
        if step == 3 or step == 30:
            os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(script, "save_state", save_and_stop)


def test_decoder_goes_on_bit_for_bit(chain, decoder, monkeypatch, capsys):
    monkeypatch.setattr(train_decoder, "HELD_OUT", 40)
    arguments = decoder_arguments(chain, "stopped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at_the_first_state(patch, train_decoder)
        train_decoder.main(arguments)
    said = capsys.readouterr().out
    assert end.value.code == 143 and "stopped after step 4: the same command goes on" in said and '{"step": 1' in said
    with pytest.raises(InputError, match="other work .noise"):
        train_decoder.main([*arguments, "--noise", "1"])
    train_decoder.main(arguments)
    assert same_run(decoder, chain / "stopped")
    line = model.read_log(decoder)[-1]
    assert line["step"] == 6 and 0 < line["held_out_l1"] < 1 and line["psnr"] > 0
    net, about = load_decoder(str(decoder))
    assert net.shape == (16, 2, 2) and net.patch_size == 8 and about["stats"]["mean"].shape == (16, 2, 2)
    assert net.decoder_layers[0].heads == 4 and about["num_heads"] == 4
    train_decoder.main([*arguments, "--steps", "8"])
    assert model.read_log(chain / "stopped")[-1]["step"] == 8


def test_decoder_refuses_other_images(chain, tmp_path):
    digits.main(["--out", str(tmp_path / "digits"), "--train", "200", "--held-out", "60", "--image-size", "16",
                 "--seed", "1"])
    with pytest.raises(InputError, match="does not hold the latents of the images"):
        train_decoder.main([*decoder_arguments(chain, "other"), "--data-path", str(tmp_path / "digits/train")])
    few = ["--data-path", str(tmp_path / "digits few/train"), "--latents", str(tmp_path / "few")]
    digits.main(["--out", str(tmp_path / "digits few"), "--train", "60", "--held-out", "10", "--image-size", "16"])
    encode_latents.main(["--data-path", few[1], "--out", few[3], "--workers", "0", "--image-size", "16",
                         "--encoder-size", "16", "--encoder", f"{chain}/run/encoder"])
    with pytest.raises(InputError, match="too few"):
        train_decoder.main([*decoder_arguments(chain, "other"), *few])
    assert not (chain / "other").exists()


# ---- encoder ---------------------------------------------------------------------------------------------------------
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


def test_tint():
    """Light that differs between the colours, by up to 0.3."""
    x = torch.full((500, 3, 8, 8), 0.4)
    grey, tinted = (train_encoder.view(x, generator("cpu", 0), False, tint=tint) for tint in (0, 0.3))
    ratio = (tinted / grey)[:, :, 0, 0]
    assert 0.7 <= ratio.min() < 0.72 and 1.28 < ratio.max() <= 1.3 and grey.std(1).max() == 0


def test_views_find_each_other():
    """Of pairs of alike vectors each finds its own, whatever their length; and with itself left out."""
    a, b = (torch.randn(6, 4, generator=generator("cpu", key)) for key in (0, 1))
    z = torch.cat([a, 3 * a + 0.01 * b])
    logits = train_encoder.similarities(z)
    assert torch.equal(logits.argmax(1), torch.arange(12).roll(6)) and logits.diag().isneginf().all()
    assert torch.allclose(logits[0, 1], torch.cosine_similarity(z[:1], z[1:2])[0] / 0.2)


def test_accuracies(monkeypatch):
    """Three classes in three directions, one image in five labelled at random."""
    g = generator("cpu", 0)
    y = torch.arange(600) % 3
    z = torch.eye(3)[y] + 0.1 * torch.randn(600, 3, generator=g)
    monkeypatch.setattr(train_encoder, "features", lambda net, x: x[:, :, 0, 0] * 255)
    images, labels = z[:, :, None, None], torch.where(torch.rand(600, generator=g) < 0.2, (y + 1) % 3, y)
    net = torch.nn.Identity()
    net.device = "cpu"
    right = train_encoder.accuracies(net, (images[:500], labels[:500]), (images[500:], y[500:]))
    assert right == {"k-NN": 1, "linear probe": 1}
    shuffled = train_encoder.accuracies(net, (images[:500], labels[torch.randperm(500, generator=g)]), (images[500:], y[500:]))
    assert max(shuffled.values()) < 0.6


def test_views_are_two_of_each_image(chain, tmp_path, monkeypatch):
    """Rows i and i + B are of one image, and each is to find the other."""
    seen = []

    def stop(answers, target):
        seen.append(target)
        raise KeyboardInterrupt
    monkeypatch.setattr(train_encoder, "view", lambda x, *rest, **more: x)
    monkeypatch.setattr(train_encoder, "similarities", lambda z: seen.append(z))
    monkeypatch.setattr(train_encoder.F, "cross_entropy", stop)
    with pytest.raises(KeyboardInterrupt):
        train_encoder.main(["--data-path", f"{chain}/digits/train", "--image-size", "16", "--objective", "self", "--batch-size",
                            "5", "--out", f"{tmp_path}/out", *"--width 16 --depth 1 --heads 2 --patch 4".split()])
    z, target = seen
    assert torch.allclose(z[target], z, atol=1e-5) and target.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("objective", ["labels", "self"])
def test_encoder_learns_resumes_and_encodes(objective, chain, tmp_path, capsys, monkeypatch):
    arguments = ["--data-path", f"{chain}/digits/train", "--image-size", "16", "--objective", objective, "--batch-size", "16",
                 "--steps", "60", "--save-every", "30", *"--width 16 --depth 1 --heads 2 --patch 4".split()]
    train_encoder.main([*arguments, "--out", f"{tmp_path}/whole"])
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_at_the_first_state(patch, train_encoder)
        train_encoder.main([*arguments, "--out", f"{tmp_path}/stopped"])
    assert end.value.code == 143 and not (tmp_path / "stopped" / "config.json").exists()
    train_encoder.main([*arguments, "--out", f"{tmp_path}/stopped"])
    assert same_run(whole, tmp_path / "stopped")
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "stopped" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="other work .width"):
        train_encoder.main([*arguments, "--out", str(whole), "--width", "18", "--heads", "3"])
    config = read_json(whole / "config.json")
    net = encode_latents.Encoder(whole, 16, 16)
    assert not net.about["untrained"] and net.shape == (16, 4, 4) and config["training"]["objective"] == objective
    # What was trained is what is encoded: the mean of the latents.
    x, _ = encode_latents.Images(chain / "digits/train", 16).read([0, 50, 100])
    with torch.no_grad():
        expected = train_encoder.features(net.net, x / 255)
        assert torch.allclose(net(x).mean((2, 3)), expected, atol=1e-5)
    if objective == "labels":
        assert config["training"]["trained"]["linear probe"] > 0.2
    assert not {"unexpected", "newly initialized"} & set(capsys.readouterr().err.split())


def test_encoder_refuses(chain, tmp_path):
    with pytest.raises(InputError, match="two class folders or more"):
        train_encoder.main(["--data-path", f"{chain}/digits/train/3", "--out", f"{tmp_path}/out"])
    for flags, what in ((["--width", "18"], "heads"), (["--image-size", "20"], "patch")):
        with pytest.raises(InputError, match=f"multiple of the {what}"):
            train_encoder.main(["--data-path", f"{chain}/digits/train", "--out", f"{tmp_path}/out", *flags])
    assert not (tmp_path / "out").exists()


# ---- report ----------------------------------------------------------------------------------------------------------
def report_arguments(chain):
    files = [f"{name}={chain}/run/samples/{name.lower().replace(' ', '_')}.npz:{nfe}" for name, nfe in NAMES.items()]
    return ["--run", f"{chain}/run", "--data", f"{chain}/digits", "--classifier-steps", "8", "--samples", *files]


def test_report(chain, decoder, monkeypatch):
    fits, fit = [], report.fit
    monkeypatch.setattr(report, "fit", lambda *args: fits.append(args) or fit(*args))
    report.main(report_arguments(chain))
    text, numbers = (chain / "run/report.md").read_text(), json.loads((chain / "run/report.json").read_text())
    rows = numbers["rows"]
    assert list(rows) == ["real", "decoded real", *NAMES] and "**The encoder is RANDOM**" in text
    for space in ("encoder", "classifier"):
        assert rows["MFD 1"][space] < rows["CMT 1"][space] < rows["teacher 1"][space]
    assert rows["teacher 50"]["likeness"] == 0 < rows["MFD 1"]["likeness"] < rows["CMT 1"]["likeness"] < 1
    assert rows["teacher 50"]["training_seconds"] == 200 and rows["teacher 50"]["sampling_seconds"] == 12
    assert rows["real"]["accuracy"] == numbers["held_out"]["accuracy"] and rows["real"]["count"] == 60
    for name, row in rows.items():
        assert f"| {name} | {row['nfe'] or ''} | {row['encoder']:.3g} | {row['classifier']:.3g} |" in text
    for check in numbers["checks"]:
        assert f"| {check['statement']} | {check['figures']} | {'yes' if check['holds'] else 'no'} |" in text
    assert not numbers["checks"][0]["holds"] and "do not hold.**" in text                # 60 images are not 5,000
    assert Image.open(chain / "run/picture.png").width > 6 * 96 and (chain / "run/picture.png").stat().st_size < 1e6

    report.main(report_arguments(chain))                                                 # the classifier is kept,
    assert len(fits) == 1 and json.loads((chain / "run/report.json").read_text())["rows"] == rows
    held_out = encode_latents.Images(chain / "digits/held-out", 16)                      # and known by its images
    report.classifier(chain / "run/classifier.safetensors", held_out, report.read(held_out, range(10))[0], 8, 0, "cpu")
    assert len(fits) == 2


@pytest.mark.parametrize("change, message", [
    ({"arr_1": np.zeros(120, np.int64)}, "label i mod 10"),
    ({"arr_0": np.zeros((120, 8, 8, 3), np.uint8)}, "needed are uint8"),
    (None, "not a readable sample file"),
    ({}, "--nfe 50"),
])
def test_report_refuses_samples(chain, decoder, tmp_path, change, message):
    path = tmp_path / "samples.npz"
    if change is None:
        path.write_bytes(b"no zip")
    else:
        np.savez(path, **{**np.load(chain / "run/samples/teacher_50.npz"), **change})
    if change == {}:
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("about.json", json.dumps({"seed": 0, "nfe": 50}))
    with pytest.raises(InputError, match=message):
        report.main([*report_arguments(chain), "--samples", f"MFD 1={path}:1"])


def test_judge():
    def holds(**changes):
        rows = {"teacher 50": dict(encoder=1.0, classifier=1.0, accuracy=0.97, count=5000),
                "teacher 1": dict(encoder=9.0, classifier=9.0, accuracy=0.2, count=5000),
                "CMT 1": dict(encoder=3.0, classifier=3.0, accuracy=0.9, count=5000),
                "MFD 1": dict(encoder=1.1, classifier=1.2, accuracy=0.96, count=5000)}
        for name, change in changes.items():
            rows[name.replace("_", " ")] |= change
        return [holds for *_, holds in report.judge(rows, 0.99, 5000)]
    assert all(holds())
    for changes, failing in ((dict(MFD_1=dict(classifier=1.21)), 1), (dict(MFD_1=dict(accuracy=0.94)), 1),
                             (dict(MFD_1=dict(accuracy=0.89)), 2), (dict(teacher_1=dict(encoder=4.9)), 2),
                             (dict(CMT_1=dict(encoder=2.1)), 1), (dict(CMT_1=dict(encoder=10.0)), 1),
                             (dict(CMT_1=dict(count=4999)), 1), (dict(MFD_1=dict(encoder=math.nan)), 3)):
        assert holds(**changes).count(False) == failing, changes


# ---- logs ------------------------------------------------------------------------------------------------------------
def test_plot_logs(tmp_path):
    """Two logs, one with a line that a crash has cut, in one picture; a folder without a log is named."""
    pytest.importorskip("matplotlib")
    for run, lines in (("a", 3), ("b", 5)):
        (tmp_path / run).mkdir()
        text = "".join(json.dumps({"step": i, "loss": 1 / (i + 1), "lr": 1e-3}) + "\n" for i in range(lines))
        (tmp_path / run / "log.jsonl").write_text(text + '{"step": 9, "lo')
    assert [len(plot_logs.read_log(tmp_path / run)) for run in "ab"] == [3, 5]
    plot_logs.main([f"{tmp_path}/a", f"{tmp_path}/b", "--out", f"{tmp_path}/logs.png"])
    assert Image.open(tmp_path / "logs.png").width > 500
    for argv, message in (([f"{tmp_path}"], "no log in"), ([f"{tmp_path}/a", "--keys", "fid"], "none of fid")):
        with pytest.raises(InputError, match=message):
            plot_logs.main([*argv, "--out", f"{tmp_path}/other.png"])
    assert not (tmp_path / "other.png").exists()


# ---- random data of the real shapes ------------------------------------------------------------------------------------
def test_synthetic_data_train_every_stage(tmp_path):
    """And leave their logs alone, whose numbers are not all 0."""
    latents = synthetic.random_latents(40, (12, 4, 4))
    encode_latents.write_latents(tmp_path / "latents", latents, [i % 5 for i in range(40)], shard_size=16)
    latents = encode_latents.Latents(tmp_path / "latents")
    z, y = latents.read([0, 17, 39])
    assert len(latents) == 40 and y.tolist() == [0, 2, 4] and abs(z.float().std() - 1) < 0.1
    assert (latents.stats["var"].mean() - 1).abs() < 0.1
    synthetic.write_teacher(tmp_path / "teacher", tmp_path / "latents", 5, "DiTDH-mini")
    common = "--steps 2 --batch-size 8 --save-every 0 --log-every 1".split()
    teacher, latents = ["--teacher", f"{tmp_path}/teacher"], ["--latents", f"{tmp_path}/latents"]
    train_teacher.main([*latents, "--preset", "DiTDH-mini", "--out", f"{tmp_path}/a", *common])
    train_cmt.main([*teacher, "--pairs", "8", "--out", f"{tmp_path}/b", *common])
    train_meanflow.main([*latents, *teacher, "--init", f"{tmp_path}/teacher", "--out", f"{tmp_path}/c", *common])
    for run in "abc":
        assert not model.states_of(tmp_path / run)
        line = model.read_log(tmp_path / run)[-1]
        assert all(line[name] > 0 for name in line), line


def test_synthetic_says_what_it_takes(tmp_path, capsys):
    argv = ["--out", f"{tmp_path}/x", "--preset", "DiTDH-mini", "--images", "4"]
    synthetic.main(argv)
    assert "4 random latents and a random DiTDH-mini, 0.0" in capsys.readouterr().out
    assert encode_latents.Latents(tmp_path / "x/latents").shape == (768, 16, 16)
    let_go()
    (tmp_path / "x/latents/latent_stats.safetensors").unlink()                     # killed halfway
    synthetic.main(argv)
    let_go()
    assert encode_latents.Latents(tmp_path / "x/latents").shape == (768, 16, 16)
    with pytest.raises(InputError, match="images: 4 there, 5 now"):
        synthetic.main([*argv[:-1], "5"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("")
    with pytest.raises(InputError, match="holds something else"):
        synthetic.main(["--out", f"{tmp_path}/mine"])
