"""sample.py: times, noise, labels, what a sample file is known by, interruptions, mistakes."""
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image
from runs import TINY, let_go, refused, run_on, save_network

import model
import sample

SIZES = dict(input_size=4, in_channels=12, num_classes=3, **TINY)
DECODER = dict(input_size=4, in_channels=12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
# Of RandomState(Philox(key)) as numpy has it since 1.17.
PINNED, LABELS = [[0.7384266, -0.8476236, 0.6359275], [1.9901521, -0.626277, -0.9110656]], [293, 233]
STATS = {"mean": torch.linspace(-1, 1, 192).view(12, 4, 4).double(), "var": torch.linspace(0.5, 2, 192).view(12, 4, 4).double()}


def shaken(net, seed):
    """`net` with random numbers added to its weights, so that times and labels change what it says."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return net


def save(folder, kind, seed=0, **more):
    torch.manual_seed(seed)
    net = shaken(model.DiTDH(**SIZES, time_difference=kind == "student"), seed)
    save_network(folder, net, {"time_shift": 3.0, "classes": ["cat", "dog", "2"], **more}, STATS)
    return net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher, a weaker one, a student and a decoder, with random weights."""
    place = tmp_path_factory.mktemp("sampling")
    for name, kind, seed in (("teacher", "teacher", 0), ("weak", "teacher", 1), ("student", "student", 2)):
        save(place / name, kind, seed)
    torch.manual_seed(3)
    save_network(place / "decoder", shaken(model.ViTDecoder(**DECODER), 3), {"num_heads": 2}, STATS)
    return place


def run(place, network, out, *more, world=1):
    """Images and labels of a run of sample.py in this process, or in `world` others."""
    argv = [str(place / network), "--decoder", f"{place}/decoder", "--num-samples", "20", "--out", str(out), *map(str, more)]
    try:
        run_on(world, sample.main, argv) if world > 1 else sample.main(argv)
    finally:
        let_go()
    with numpy.load(out) as file:
        return file["arr_0"], file["arr_1"]


def refuses(words, place, network, out, *more):
    with pytest.raises(model.InputError, match=words):
        run(place, network, out, *more)


# ---- what is sampled ----
def test_times_of_sampling(place, tmp_path, monkeypatch):
    """A student's jumps are even, whatever the shift; a teacher's steps are shifted, by a flag or its own, and end at 0.
    In bf16 where asked for, and always in inference mode."""
    forward, seen = model.DiTDH.forward, []

    def watching(self, z, t, y, s=None):
        times = [round(float(x[0]), 6) for x in (t, s) if x is not None]
        seen.append((*times, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))
        return forward(self, z, t, y, s)
    monkeypatch.setattr(model.DiTDH, "forward", watching)
    for name, more, times in (("student", ["--time-shift", 5], [(1.0, 0.5), (0.5, 0.0)]), ("teacher", [], [(1.0,), (0.75,)]),
                              ("teacher", ["--time-shift", 5, "--precision", "bf16"], [(1.0,), (0.833333,)])):
        seen.clear()
        run(place, name, tmp_path / f"{name}{len(more)}.npz", "--nfe", 2, "--num-samples", 2, *more)
        assert seen == [(*at, "bf16" in more, True) for at in times]


def test_heun_takes_half_as_many_steps(place):
    """--nfe counts evaluations: four are two steps of Heun's method, here by hand on the grid 1, 3/4, 0. A shift that is not given is RAE's."""
    net, z, y = model.load_network(place / "teacher")[0], torch.randn(2, 12, 4, 4), torch.tensor([0, 2])
    with torch.no_grad():
        by_hand = z
        for t, s in ((1.0, 0.75), (0.75, 0.0)):
            v_t = net(by_hand, torch.full((2,), t), y)
            v_s = net(by_hand + (s - t) * v_t, torch.full((2,), s), y)
            by_hand = by_hand + (s - t) * (v_t + v_s) / 2
        for solver, nfe, shift in (("heun", 2, 3), ("heun", 4, 3), ("heun", 8, 3), ("euler", 4, 3), ("heun", 4, None)):
            out = sample.generate(net, z, y, nfe, solver=solver, shift=shift)
            assert torch.allclose(out, by_hand, rtol=1e-4, atol=1e-4) == ((solver, nfe, shift) == ("heun", 4, 3))
    assert model.default_time_shift((768, 16, 16)) == pytest.approx(6.928, abs=1e-3)


def test_each_image_has_its_own_noise():
    """By seed and number alone, of 128 bits: torch's generator, of 32, gave images 11953 and 41156 of seed 4 the same noise. The first
    numbers are pinned: numpy keeps this stream frozen."""
    z, y = sample.noise_and_labels([0, 7], 0, (3,), 1000, "random")
    torch.testing.assert_close(z, torch.tensor(PINNED), rtol=1e-6, atol=0)
    assert y.tolist() == LABELS
    z, y = sample.noise_and_labels([*range(520), 4096, 50_000, 65_536, 2**20], 0, (2, 3, 3), 1000, "random")
    assert len(z.flatten(1).unique(dim=0)) == 524 and len(y.unique()) > 350       # 405 are expected
    assert torch.equal(sample.noise_and_labels([7, 64], 0, (2, 3, 3), 1000)[0], z[[7, 64]])
    assert not torch.equal(sample.noise_and_labels([0], 1, (2, 3, 3), 1000)[0], z[:1]) and abs(z.std() - 1) < 0.05
    assert sample.noise_and_labels(range(4), 0, (1,), 3, [2, 0])[1].tolist() == [2, 0, 2, 0]


def test_pixels_are_rounded_and_truncated_on_request(place, tmp_path):
    levels = torch.arange(256.0).repeat(3, 1).view(1, 3, 16, 16)
    wanted = levels.permute(0, 2, 3, 1).to(torch.uint8)
    for off in (-0.45, 0.0, 0.45):
        assert torch.equal(sample.to_uint8((levels + off) / 255), wanted)
    assert torch.equal(sample.to_uint8((levels + 0.9) / 255, truncate=True), wanted)
    assert sample.to_uint8(torch.tensor([-1.0, 2.0, 0.5])[None, :, None, None]).tolist() == [[[[0, 255, 128]]]]
    rounded, truncated = (run(place, "student", tmp_path / f"{len(more)}.npz", *more)[0].astype(int) for more in ([], ["--truncate"]))
    assert set(numpy.unique(rounded - truncated)) == {0, 1}


def test_a_sample_file(place, tmp_path):
    """Noise and labels follow from the seed and the image's number alone; flags change what they should."""
    a = tmp_path / "a.npz"
    images, labels = run(place, "student", a, "--batch-size", 8, "--grid", tmp_path / "grid.png")
    assert images.shape == (20, 16, 16, 3) and images.dtype == numpy.uint8 and labels.dtype == numpy.int64
    assert labels.tolist() == [i % 3 for i in range(20)] and Image.open(tmp_path / "grid.png").size[0] > 100
    assert abs(images.astype(int) - run(place, "student", tmp_path / "b.npz", "--batch-size", 5)[0]).max() <= 1
    run(place, "student", tmp_path / "two.npz", "--batch-size", 8, world=2)
    assert (tmp_path / "two.npz").read_bytes() == a.read_bytes()
    flags = ([], ["--solver", "heun"], ["--guidance", 5], ["--guidance", 5, "--guidance-interval", 0, 0.9],
             ["--guidance", 5, "--weak-teacher", place / "weak"], ["--seed", 1], ["--labels", "dog,0"])
    assert len({run(place, "teacher", tmp_path / f"{i}.npz", "--nfe", 4, *more)[0].tobytes() for i, more in enumerate(flags)}) == 7


def test_a_grid_alone_keeps_nothing(place, tmp_path, monkeypatch):
    """Looking again is never refused; 64 images unless told."""
    monkeypatch.chdir(tmp_path)
    for more, height in ([], 900), (["--seed", "1", "--num-samples", "4"], 100):
        sample.main([str(place / "teacher"), "--decoder", f"{place}/decoder", "--nfe", "2", "--grid", "grid.png", *more])
        assert [path.name for path in tmp_path.iterdir()] == ["grid.png"] and Image.open("grid.png").size[1] > height


LINES_OF_README = """
net, about = load_network("runs/meanflow")
decoder, _ = load_decoder("runs/decoder")
z, y = noise_and_labels(range(4), seed=0, shape=net.shape, num_classes=net.num_classes)
with torch.no_grad():
    z_0 = generate(net, z, y, nfe=1, shift=about["time_shift"])
    images = to_uint8(decoder(denormalize(z_0, about["stats"])))
Image.fromarray(images[0].numpy()).save("image.png")
"""


def test_the_lines_of_the_readme(place, tmp_path, monkeypatch):
    """From a network's folder to a PIL image: image 0 is that of sample.py."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "student", tmp_path / "runs" / "meanflow")
    shutil.copytree(place / "decoder", tmp_path / "runs" / "decoder")
    imports = ("import torch\nfrom PIL import Image\nfrom model import denormalize, load_decoder, load_network\n"
               "from sample import generate, noise_and_labels, to_uint8\n")
    exec(imports + LINES_OF_README, {})
    images, _ = run(place, "student", tmp_path / "a.npz", "--batch-size", 4)
    assert numpy.array_equal(numpy.asarray(Image.open("image.png")), images[0])


# ---- what a sample file is known by, and what stays ----
def test_an_interrupted_run_goes_on(place, tmp_path, monkeypatch, capsys):
    images, _ = run(place, "student", tmp_path / "a.npz", "--batch-size", 8)
    original, calls, out, parts = sample.to_uint8, [], tmp_path / "c.npz", tmp_path / "c.npz.parts"
    monkeypatch.setattr(sample, "to_uint8", lambda *a: calls.append(1) or original(*a) if len(calls) < 1 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(place, "student", out, "--batch-size", 8)
    monkeypatch.undo()
    assert {path.name for path in parts.iterdir()} == {"about.json", "000000.safetensors"} and not out.exists()
    for path in (parts / ".000001.safetensors.tmp", tmp_path / ".c.npz.tmp", tmp_path / ".important_tmp_backup"):
        path.write_bytes(b"half")
    refuses("c.npz.parts holds other work .seed: 0 there, 7 now", place, "student", out, "--batch-size", 8, "--seed", 7)
    run(place, "student", out, "--batch-size", 8)
    assert "goes on: 1 of 3 batches are there" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "a.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", ".a.npz.lock", "c.npz", ".c.npz.lock", ".important_tmp_backup"}


def test_nothing_of_the_users_is_touched(place, tmp_path):
    """Neither an .npz that is not ours, or is damaged, nor what lies in a folder of our name; nor while another process writes."""
    for name in ("mine.npz.parts/photo.png", "dataset.npz.parts/.hidden", "cut.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    numpy.savez(tmp_path / "theirs.npz", arr_0=numpy.zeros(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("theirs", "cut", "mine"):
        refuses("is no whole sample file of ours|mine.npz.parts holds something else", place, "student", tmp_path / f"{name}.npz")
    run(place, "student", tmp_path / "dataset.npz")
    code = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / ".b.npz.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    refuses("is written by another process", place, "student", tmp_path / "b.npz")
    other.communicate()
    assert before == {path: path.read_bytes() for path in before} and not list(tmp_path.glob("b.npz*"))


def test_identity_is_by_content(place, tmp_path):
    """A network that was moved is the same; one that was trained on, another decoder, other statistics, times, teachers are not."""
    out, guided = tmp_path / "a.npz", ["--nfe", 2, "--guidance", 2, "--weak-teacher"]
    run(place, "student", out)
    made = out.read_bytes()
    shutil.copytree(place / "student", tmp_path / "elsewhere")
    run(place, tmp_path / "elsewhere", out, "--stats", tmp_path / "elsewhere")
    run(place, "teacher", tmp_path / "b.npz", *guided, place / "weak")
    assert out.read_bytes() == made
    save(tmp_path / "on", "student", seed=9)
    save_network(tmp_path / "decoder", shaken(model.ViTDecoder(**DECODER), 4), {"num_heads": 2}, STATS)
    model.write_tensors(tmp_path / "stats.safetensors", {"": {**STATS, "var": 2 * STATS["var"]}})
    for what, network, more in (("sha256 of network", tmp_path / "on", []), ("seed", "student", ["--seed", 7]),
                                ("sha256 of decoder", "student", ["--decoder", tmp_path / "decoder"]),
                                ("sha256 of stats", "student", ["--stats", tmp_path / "stats.safetensors"]),
                                ("sha256 of weak teacher", "teacher", [*guided, place / "teacher"]),
                                ("time_shift", "teacher", [*guided, place / "weak", "--time-shift", 4])):
        refuses(rf"holds other work \({what}: .* there, [^;]* now\)", place, network, tmp_path / f"{'ab'[network == 'teacher']}.npz", *more)


def test_a_training_state(place, tmp_path):
    """A run's folder is its newest state, of which the average is taken; an older one is given by its path. Names with dots stay whole."""
    folder = tmp_path / "run1.5"
    for step in (40, 50):
        net = shaken(model.DiTDH(**SIZES, time_difference=True), step)
        parts = {"net": {name: x + 1 for name, x in net.state_dict().items()}, "ema": net.state_dict(), "stats": STATS}
        model.write_tensors(folder / f"state_000000{step}.safetensors", parts, {"time_shift": 3.0, "step": step})
        save_network(tmp_path / f"{step}", net, {"time_shift": 3.0}, STATS)
    for source, step, name in ((folder, 50, "run1.5_2"), (folder / "state_00000040.safetensors", 40, "run1.5_40_2")):
        wanted, _ = run(place, tmp_path / f"{step}", tmp_path / f"{step}.npz")
        assert numpy.array_equal(run(place, source, tmp_path / f"{source.name}.npz")[0], wanted)
        assert sample.default_out(sample.parse_args([str(source), "--nfe", "2"])) == f"samples/{name}.npz"


# ---- mistakes: one line, nothing written ----
def test_mistakes(place, tmp_path, capsys):
    for network, flags, words in (
            ("student", ["--nfe", "0"], "--nfe: '0' is no whole number at least 1"),
            ("teacher", ["--guidance", "2", "--guidance-interval", "0.9", "0.1"], "the lower time comes first"),
            ("teacher", ["--solver", "heun", "--nfe", "3"], "--nfe 3 with --solver heun"),
            ("student", ["--grid", "picture"], "a name that ends in .png"), ("student", ["--out", "a.json"], "--out one in .npz"),
            ("student", ["--guidance", "2"], "is a student: --guidance is for teachers"),
            ("teacher", ["--labels", "1,x"], "--labels 1,x: no class 'x'"), ("teacher", ["--labels", "3"], "no class '3'"),
            ("decoder", [], "is no DiT-DH: it has no 's_embedder.proj.weight'"), ("teacher", ["--decoder", "none"], "none does not exist")):
        argv = [place / network, "--decoder", place / "decoder", "--num-samples", "2", "--out", tmp_path / "no.npz", *flags]
        said = refused("sample.py", argv, capsys)
        assert words in said and said.strip().count("\n") == 0
    assert not list(tmp_path.iterdir())


def test_pictures_of_nothing(place, tmp_path):
    """Weights that are not finite make no images."""
    net, _ = model.load_network(place / "student")
    net.final_layer.linear.bias.data[0] = float("nan")
    save_network(tmp_path / "student", net, {}, STATS)
    refuses("images 0 to 19 are not finite: weights or statistics are damaged", place, tmp_path / "student", tmp_path / "a.npz")
    assert [path.name for path in (tmp_path / "a.npz.parts").iterdir()] == ["about.json"]
