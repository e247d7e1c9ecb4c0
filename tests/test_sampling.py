"""sample.py: times, noise, labels, what a sample file is known by, interruptions, mistakes."""
import fcntl
import re
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from runs import ROOT, TINY, complain, let_go, refused, run_on, save_network

import model
import sample

SIZES = dict(input_size=4, in_channels=12, num_classes=3, **TINY)
DECODER = dict(input_size=4, in_channels=12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
STATS = {"mean": torch.linspace(-1, 1, 192).view(12, 4, 4).double(), "var": torch.linspace(0.5, 2, 192).view(12, 4, 4).double()}


def save(folder, kind, seed, stats=STATS, encoder="E"):
    """A network with random numbers added to its weights, so that times and labels change what it says."""
    torch.manual_seed(seed)
    net = model.ViTDecoder(**DECODER) if kind == "decoder" else model.DiTDH(**SIZES, time_difference=kind == "student")
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    made = {"encoder": {"identity": {"sha256": encoder}}}
    save_network(folder, net, {"num_heads": 2, "time_shift": 3.0, "classes": ["cat", "dog", "2"], "latents": made, **made}, stats)
    return net.state_dict()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    home = tmp_path_factory.mktemp("networks")
    for seed, (name, kind) in enumerate([("teacher", "teacher"), ("weak", "teacher"), ("student", "student"), ("decoder", "decoder")]):
        save(home / name, kind, seed)
    return home


@pytest.fixture(autouse=True)
def there(networks, tmp_path, monkeypatch):
    """Each test is in a folder with these networks."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(networks, tmp_path, dirs_exist_ok=True)


def run(network, out, flags="", world=1):
    """Images and labels of a run of sample.py in this process, or in `world` others."""
    argv = f"{network} --decoder decoder --num-samples 20 --out {out} {flags}".split()
    try:
        run_on(world, sample.main, argv) if world > 1 else sample.main(argv)
    finally:
        let_go()
    with numpy.load(out) as file:
        return file["arr_0"], file["arr_1"]


def refuses(words, network, out, flags=""):
    with pytest.raises(model.InputError, match=words):
        run(network, out, flags)


# ---- what is sampled ----
def test_times_of_sampling(monkeypatch):
    """A student's jumps are even, whatever the shift; a teacher's steps are shifted, by a flag or its own, and end at 0."""
    forward, seen = model.DiTDH.forward, []

    def watching(self, z, t, y, s=None):
        times = [round(float(x[0]), 6) for x in (t, s) if x is not None]
        seen.append((*times, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return forward(self, z, t, y, s)
    monkeypatch.setattr(model.DiTDH, "forward", watching)
    for i, (network, flags, times) in enumerate((
            ("student", "--nfe 2 --time-shift 5", [(1.0, 0.5), (0.5, 0.0)]), ("teacher", "--nfe 2", [(1.0,), (0.75,)]),
            ("teacher", "--nfe 2 --time-shift 5 --precision bf16", [(1.0,), (0.833333,)]),
            ("teacher", "--nfe 4 --solver heun", [(1.0,), (0.75,), (0.75,), (0.0,)]))):
        seen.clear()
        run(network, f"{i}.npz", flags)
        assert seen == [(*at, "bf16" in flags, True) for at in times]


def test_each_image_has_its_own_noise():
    """By seed and number alone, of 128 bits: torch's generator, of 32, gave images 11953 and 41156 of seed 4 the same noise. The first
    numbers are pinned: RandomState(Philox(key)) is as numpy has it since 1.17."""
    z, y = sample.noise_and_labels([0, 7], 0, (3,), 1000, "random")
    pinned = [[0.7384266, -0.8476236, 0.6359275], [1.9901521, -0.626277, -0.9110656]]
    torch.testing.assert_close(z, torch.tensor(pinned), rtol=1e-6, atol=0)
    assert y.tolist() == [293, 233]
    z, y = sample.noise_and_labels(range(500), 0, (3,), 1000, "random")
    assert len(z.unique(dim=0)) == 500 and len(y.unique()) > 340 and abs(z.std() - 1) < 0.05    # 394 are expected
    assert sample.noise_and_labels(range(4), 0, (1,), 3, [2, 0])[1].tolist() == [2, 0, 2, 0]


def test_pixels_are_rounded_and_truncated_on_request():
    levels = torch.arange(256.0).repeat(3, 1).view(1, 3, 16, 16)
    for off, truncate in ((-0.45, False), (0.45, False), (0.9, True)):
        assert torch.equal(sample.to_uint8((levels + off) / 255, truncate), levels.permute(0, 2, 3, 1).to(torch.uint8))
    assert sample.to_uint8(torch.tensor([-1.0, 2.0, 0.5])[None, :, None, None]).tolist() == [[[[0, 255, 128]]]]


def test_a_sample_file():
    """Noise and labels follow from the seed and the image's number alone; flags change what they should."""
    images, labels = run("student", "a.npz", "--batch-size 8 --grid grid.png")
    assert images.shape == (20, 16, 16, 3) and images.dtype == numpy.uint8 and labels.dtype == numpy.int64
    assert labels.tolist() == [i % 3 for i in range(20)] and Image.open("grid.png").size == (3 * 96, 7 * 108)
    assert abs(images.astype(int) - run("student", "b.npz", "--batch-size 5")[0]).max() <= 1
    run("student", "two.npz", "--batch-size 8", world=2)
    assert Path("two.npz").read_bytes() == Path("a.npz").read_bytes()
    flags = ("", "--solver heun", "--guidance 5", "--guidance 5 --guidance-interval 0 0.9", "--guidance 5 --weak-teacher weak",
             "--seed 1", "--labels 1,0", "--truncate")
    assert len({run("teacher", f"{i}.npz", f"--nfe 4 {more}")[0].tobytes() for i, more in enumerate(flags)}) == len(flags)


def test_a_grid_alone_keeps_nothing():
    """Looking again is never refused; 64 images unless told."""
    before = {*Path().iterdir()}
    for more, rows in ("", 22), ("--seed 1 --num-samples 4", 2):
        sample.main(f"teacher --decoder decoder --nfe 2 --grid grid.png {more}".split())
        assert {*Path().iterdir()} == before | {Path("grid.png")} and Image.open("grid.png").size[1] == rows * 108


LINES_OF_README = re.search(r"```python\n(.*?noise_and_labels.*?)```", (ROOT / "README.md").read_text(), re.S)[1]


def test_the_lines_of_the_readme():
    """From a network's folder to a PIL image: image 0 is that of sample.py."""
    shutil.copytree("student", "runs/meanflow")
    exec(LINES_OF_README.replace("(DECODER)", "('decoder')"), {})
    assert numpy.array_equal(numpy.asarray(Image.open("image.png")), run("student", "a.npz", "--batch-size 4")[0][0])


# ---- what a sample file is known by, and what stays ----
def test_an_interrupted_run_goes_on(monkeypatch, capsys):
    run("student", "a.npz", "--batch-size 8")
    original, calls, parts = sample.to_uint8, [], Path("c.npz.parts")
    monkeypatch.setattr(sample, "to_uint8", lambda *given: calls.append(1) or original(*given) if len(calls) < 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("student", "c.npz", "--batch-size 8")
    monkeypatch.setattr(sample, "to_uint8", original)
    assert [path.name for path in parts.iterdir()] == ["000000.safetensors"] and not Path("c.npz").exists()
    (parts / ".000001.safetensors.tmp").write_bytes(b"half")
    refuses("c.npz.parts holds other work .seed: 0 there, 7 now", "student", "c.npz", "--batch-size 8 --seed 7")
    run("student", "c.npz", "--batch-size 8")
    assert "goes on: 1 of 3 batches are there" in capsys.readouterr().out
    assert Path("c.npz").read_bytes() == Path("a.npz").read_bytes() and not parts.exists()
    # A process of other settings:
    monkeypatch.setattr(sample, "write_tensors", lambda *x: model.write_tensors(*x[:2], {**x[2], "seed": 9}))
    refuses("d.npz.parts holds other work .seed: 9 there, 0 now", "student", "d.npz")


def test_nothing_of_the_users_is_touched():
    """Neither an .npz that is not ours, nor what lies in a folder of our name; nor while another process writes."""
    mine = [Path(name) for name in ("theirs.npz", "mine.npz.parts/000000.safetensors", "free.npz.parts/photo.png")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    refuses("is no whole sample file of ours", "student", "theirs.npz")
    refuses("cannot read mine.npz.parts", "student", "mine.npz")
    run("student", "free.npz")
    assert [path.read_bytes() for path in mine] == 3 * [b"mine"]
    with open(".b.npz.lock", "w") as held:
        fcntl.lockf(held, fcntl.LOCK_EX)
        student, decoder, out = (Path(name).resolve() for name in ("student", "decoder", "b.npz"))
        assert "is written by another process" in complain("sample.py", student, "--decoder", decoder, "--out", out)
    assert not [*Path().glob("b.npz*")]


def test_identity_is_by_content():
    """A network that was moved is the same; one that was trained on, another decoder, other statistics, times, teachers are not."""
    guided = "--nfe 2 --guidance 2 --weak-teacher"
    run("student", "student.npz")
    run("teacher", "teacher.npz", f"{guided} weak")
    made = Path("student.npz").read_bytes()
    shutil.copytree("student", "elsewhere")
    run("elsewhere", "student.npz")
    assert Path("student.npz").read_bytes() == made
    save("on", "student", 9)
    save("decoder2", "decoder", 9)
    save("stats", "student", 2, {**STATS, "var": 2 * STATS["var"]})
    for what, network, flags in (
            ("sha256 of network", "on", ""), ("seed", "student", "--seed 7"), ("sha256 of decoder", "student", "--decoder decoder2"),
            ("sha256 of stats", "student", "--stats stats"), ("sha256 of weak teacher", "teacher", f"{guided} teacher"),
            ("time_shift", "teacher", f"{guided} weak --time-shift 4")):
        out = "teacher.npz" if network == "teacher" else "student.npz"
        refuses(rf"holds other work \({what}: .* there, [^;]* now\)", network, out, flags)
    save("decoder3", "decoder", 3, encoder="F")
    refuses("decoder3 decodes another encoder's latents than student makes", "student", "a.npz", "--decoder decoder3")


def test_a_training_state():
    """A run's folder is its newest state, of which the average is taken; an older one is given by its path."""
    for step in (40, 50):
        ema = save(f"{step}", "student", step)
        parts = {"net": {name: x + 1 for name, x in ema.items()}, "ema": ema, "stats": STATS}
        model.write_tensors(f"run/state_000000{step}.safetensors", parts, {"time_shift": 3.0, "step": step, "latents": None})
    for source, step in (("run", 50), ("run/state_00000040.safetensors", 40)):
        assert numpy.array_equal(run(source, f"{step}-run.npz")[0], run(f"{step}", f"{step}.npz")[0])


# ---- mistakes: one line, nothing written ----
def test_mistakes(capsys):
    before = {*Path().iterdir()}
    for network, flags, words in (
            ("student", "--nfe 0", "--nfe: '0' is no whole number at least 1"), ("teacher", "--solver heun --nfe 3", "--nfe 3 with --solver heun"),
            ("student", "--grid picture", "a name that ends in .png"), ("student", "--out a.json", "--out one in .npz"),
            ("teacher", "--labels 1,x", "--labels: 'x' is no whole number"), ("teacher", "--labels 1,3", "--labels 3: "),
            ("decoder", "", "is no DiT-DH: it has no 's_embedder.proj.weight'"), ("teacher", "--decoder none", "none does not exist")):
        said = refused("sample.py", f"{network} --decoder decoder --out no.npz {flags}".split(), capsys)
        assert words in said and said.strip().count("\n") == 0
    assert {*Path().iterdir()} == before


def test_pictures_of_nothing():
    """What is not finite is no image."""
    save("nan", "student", 0, {**STATS, "mean": STATS["mean"] * 1e308})
    refuses("images 0 to 19 are not finite: damaged weights or statistics", "nan", "a.npz")
    assert not [*Path().glob("a.npz*")]
