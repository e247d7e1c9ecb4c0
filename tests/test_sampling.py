"""sample.py: times, noise, labels, what a sample file is known by, interruptions, mistakes."""
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from runs import let_go, run_on, save_network

import model
import sample

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(input_size=4, in_channels=12, num_classes=3, hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2))
DECODER = dict(input_size=4, in_channels=12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
# Of RandomState(Philox(key)) as numpy has it since 1.17.
PINNED = [[0.7384266, -0.8476236, 0.6359275], [1.9901521, -0.626277, -0.9110656]]
LABELS = [293, 233]
STATS = {"mean": torch.zeros(12, 4, 4).double(), "var": torch.ones(12, 4, 4).double()}


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
    argv = [str(place / network), "--decoder", f"{place}/decoder", "--num-samples", "20", "--out", str(out)]
    try:
        argv += map(str, more)
        run_on(world, sample.main, argv) if world > 1 else sample.main(argv)
    finally:
        let_go()
    with numpy.load(out) as file:
        return file["arr_0"], file["arr_1"]


# ---- what is sampled -----------------------------------------------------------------------------------------
def test_times_of_sampling(place, monkeypatch):
    """A student's jumps are even, whatever the shift; a teacher's steps are shifted and end at 0."""
    forward, seen = model.DiTDH.forward, []

    def watching(self, z, t, y, s=None):
        seen.append([round(float(x[0]), 6) for x in (t, s) if x is not None])
        return forward(self, z, t, y, s)
    monkeypatch.setattr(model.DiTDH, "forward", watching)
    z, y = torch.randn(2, 12, 4, 4), torch.zeros(2, dtype=torch.long)
    # Shift 3: 1/2 -> 3/4.
    for name, nfe, times in (("student", 2, [[1.0, 0.5], [0.5, 0.0]]), ("teacher", 2, [[1.0], [0.75]])):
        sample.generate(model.load_network(place / name)[0], z, y, nfe, shift=3.0)
        assert seen == times
        seen.clear()


def test_noise_and_random_labels():
    """128 bits of key: torch's generator, of 32, gave images 11953 and 41156 of seed 4 the same noise. The
    first numbers are pinned: numpy keeps this stream frozen."""
    z, y = sample.noise_and_labels([11953, 41156], 4, (2, 3, 3), 1000, "random")
    assert not torch.equal(z[0], z[1]) and y[0] != y[1] and z.dtype == torch.float32
    z, y = sample.noise_and_labels([0, 7], 0, (3,), 1000, "random")
    torch.testing.assert_close(z, torch.tensor(PINNED), rtol=1e-6, atol=0)
    assert y.tolist() == LABELS
    z, _ = sample.noise_and_labels(range(200), 1, (8, 4, 4), 3)
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    across = numpy.corrcoef(z.flatten(1).numpy()) - numpy.eye(200)
    assert abs(across).max() < 0.5


def test_a_sample_file(place, tmp_path):
    """Noise and labels follow from the seed and the image's number alone; an interrupted run goes on."""
    a = tmp_path / "a.npz"
    images, labels = run(place, "student", a, "--batch-size", 8, "--grid", tmp_path / "grid.png")
    assert images.shape == (20, 16, 16, 3) and images.dtype == numpy.uint8 and images.flags.c_contiguous
    assert labels.tolist() == [i % 3 for i in range(20)] and Image.open(tmp_path / "grid.png").size[0] > 100
    other, _ = run(place, "student", tmp_path / "b.npz", "--batch-size", 5)
    assert abs(images.astype(int) - other).max() <= 1
    assert numpy.array_equal(run(place, "student", tmp_path / "two.npz", "--batch-size", 8, world=2)[0], images)
    assert (tmp_path / "two.npz").read_bytes() == a.read_bytes()
    heun, _ = run(place, "teacher", tmp_path / "heun.npz", "--nfe", 4, "--solver", "heun")
    plain, _ = run(place, "teacher", tmp_path / "plain.npz", "--nfe", 4)
    guided, _ = run(place, "teacher", tmp_path / "guided.npz", "--nfe", 4, "--guidance", 5)
    assert len({x.tobytes() for x in (heun, plain, guided)}) == 3
    with numpy.load(a) as file:                   # for the ADM suite there is nothing more than it knows
        assert file["arr_0"].dtype == numpy.uint8 and file["arr_1"].dtype == numpy.int64


def test_a_grid_alone_keeps_nothing(place, tmp_path, monkeypatch):
    """Looking again, with other labels, guidance or seed, is never refused; 64 images unless told."""
    monkeypatch.chdir(tmp_path)
    pictures = []
    for more in ([], ["--seed", 1], ["--labels", "dog"], ["--guidance", 3], ["--num-samples", 4]):
        sample.main([str(place / "teacher"), "--decoder", f"{place}/decoder", "--nfe", "2", "--grid", "grid.png", *map(str, more)])
        pictures.append(numpy.asarray(Image.open("grid.png")))
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]
    assert len({picture.tobytes() for picture in pictures}) == 5 and pictures[0].shape[0] > 5 * pictures[4].shape[0]
    images, labels = run(place, "teacher", tmp_path / "a.npz", "--nfe", 2, "--num-samples", 64)
    sample.draw_grid("same.png", images, labels, ["cat", "dog", "2"])
    assert numpy.array_equal(numpy.asarray(Image.open("same.png")), pictures[0])


def test_an_interrupted_run_goes_on(place, tmp_path, monkeypatch, capsys):
    images, _ = run(place, "student", tmp_path / "a.npz", "--batch-size", 8)
    original, calls, parts = sample.to_uint8, [], tmp_path / "c.npz.parts"

    def interrupted(*a):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("interrupted")
        return original(*a)
    monkeypatch.setattr(sample, "to_uint8", interrupted)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(place, "student", tmp_path / "c.npz", "--batch-size", 8)
    assert {path.name for path in parts.iterdir()} == {"about.json", "000000.safetensors"} and not (tmp_path / "c.npz").exists()
    (parts / ".000001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / ".c.npz.tmp").write_bytes(b"half")
    (tmp_path / ".important_tmp_backup").write_bytes(b"mine")
    with pytest.raises(model.InputError, match="c.npz.parts holds other work .seed: 0 there, 7 now"):
        run(place, "student", tmp_path / "c.npz", "--batch-size", 8, "--seed", 7)
    capsys.readouterr()
    assert numpy.array_equal(run(place, "student", tmp_path / "c.npz", "--batch-size", 8)[0], images)
    assert "goes on: 1 of 3 batches are there" in capsys.readouterr().out
    assert (tmp_path / "c.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.npz", ".a.npz.lock", "c.npz", ".c.npz.lock", ".important_tmp_backup"}


def test_nothing_of_the_users_is_touched(place, tmp_path):
    """Neither an .npz that is not ours, nor what lies in a folder of our name, nor files of the names that older versions used."""
    for name in ("dataset.json", "dataset.part/photo.png", "mine.npz.parts/photo.png", "dataset.npz.parts/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    numpy.savez(tmp_path / "theirs.npz", arr_0=numpy.zeros(3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name, words in (("theirs", "is no whole sample file of ours"), ("mine", "mine.npz.parts holds something else")):
        with pytest.raises(model.InputError, match=words):
            run(place, "student", tmp_path / f"{name}.npz")
    run(place, "student", tmp_path / "dataset.npz")
    assert before == {path: path.read_bytes() for path in before}


def test_first_lines_say_what_it_is(place, tmp_path, capsys):
    run(place, "teacher", tmp_path / "a.npz", "--nfe", 2, "--labels", "dog,0,2")
    first, *_ = (line for line in capsys.readouterr().out.splitlines() if not line.startswith("note"))
    assert "teacher, 2 evaluations an image, 20 images, seed 0" in first and first.endswith("labels [1, 0, 2]")


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
    (tmp_path / "runs").mkdir()
    shutil.copytree(place / "student", tmp_path / "runs" / "meanflow")
    shutil.copytree(place / "decoder", tmp_path / "runs" / "decoder")
    imports = ("import torch\nfrom PIL import Image\nfrom model import denormalize, load_decoder, load_network\n"
               "from sample import generate, noise_and_labels, to_uint8\n")
    exec(imports + LINES_OF_README, {})
    images, _ = run(place, "student", tmp_path / "a.npz", "--batch-size", 4)
    assert numpy.array_equal(numpy.asarray(Image.open("image.png")), images[0])


@pytest.mark.parametrize(("argv", "name"), [
    (["runs/w1.0"], "w1.0_2"), (["a/student.pt"], "student_2"), (["runs/mf/"], "mf_2"), (["org/x/model.safetensors"], "model_2"),
    (["runs/mf/state_00000050.safetensors"], "mf_50_2"), (["runs/t", "--guidance", "1.50"], "t_2_w1.5")])
def test_default_names(argv, name):
    assert sample.default_out(sample.parse_args([*argv, "--nfe", "2"])) == f"samples/{name}.npz"


# ---- what a sample file is known by --------------------------------------------------------------------------
def test_identity_is_by_content(place, tmp_path):
    """A network that was moved is the same; one that was trained on, another decoder, other statistics are not."""
    for name in ("student", "decoder"):
        shutil.copytree(place / name, tmp_path / name)
    out = tmp_path / "a.npz"
    run(place, "student", out)
    made = out.read_bytes()
    note = sample.read_about(tmp_path / "a.npz")
    assert not any(str(place) in str(value) for value in note.values()) and (note["nfe"], note["seed"]) == (1, 0)
    moved = tmp_path / "elsewhere"
    (tmp_path / "student").rename(moved)
    run(place, moved, out, "--decoder", tmp_path / "decoder", "--stats", moved)
    assert out.read_bytes() == made
    save(tmp_path / "on", "student", seed=9)
    save_network(tmp_path / "decoder", shaken(model.ViTDecoder(**DECODER), 4), {"num_heads": 2}, STATS)
    model.write_tensors(tmp_path / "stats.safetensors", {"": {**STATS, "var": 2 * STATS["var"]}})
    for what, more in (("sha256 of network", []), ("sha256 of decoder", ["--decoder", tmp_path / "decoder"]),
                       ("sha256 of stats", ["--stats", tmp_path / "stats.safetensors"]), ("seed", ["--seed", 7])):
        with pytest.raises(model.InputError, match=rf"a.npz holds other work \({what}: .* there, [^;]* now\)"):
            run(place, tmp_path / "on" if "network" in what else "student", out, *more)


def test_names_with_dots(place, tmp_path, monkeypatch):
    """w1.0 and w1.5 share no file, given by name or made of the network's."""
    monkeypatch.chdir(tmp_path)
    for name in ("w1.0", "w1.5"):
        shutil.copytree(place / "student", tmp_path / name)
        run(place, tmp_path / name, tmp_path / f"{name}.npz")
        sample.main([name, "--decoder", f"{place}/decoder", "--num-samples", "2"])
    let_go()
    for folder, names in ((tmp_path, {"w1.0.npz", "w1.5.npz"}), (tmp_path / "samples", {"w1.0_1.npz", "w1.5_1.npz"})):
        assert {path.name for path in folder.iterdir() if path.is_file() and path.name[0] != "."} == names


def test_two_processes_one_file(place, tmp_path):
    """The second is told; nothing of the first one's is touched."""
    lock = tmp_path / ".a.npz.lock"
    code = ("import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True);"
            "sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(model.InputError, match="is written by another process"):
        sample.main([f"{place}/student", "--decoder", f"{place}/decoder", "--num-samples", "2", "--out",
                     f"{tmp_path}/a.npz"])
    other.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [lock.name]


# ---- states of a training, guidance --------------------------------------------------------------------------
def test_a_training_state(place, tmp_path):
    """A run's folder is its newest state; an older one is given by its path, also as the weak teacher."""
    folder = tmp_path / "run"
    for step in (40, 50):
        net = model.DiTDH(**SIZES, time_difference=True)
        parts = {"net": net.state_dict(), "ema": shaken(net, step).state_dict(), "stats": STATS}
        parts["net"] = {name: x + 1 for name, x in parts["net"].items()}
        model.write_tensors(folder / f"state_000000{step}.safetensors", parts, {"time_shift": 3.0, "step": step})
        save_network(tmp_path / f"{step}", net, {"time_shift": 3.0}, STATS)
    for source, step in ((folder, 50), (folder / "state_00000040.safetensors", 40), (folder / "state_00000050.safetensors", 50)):
        wanted, _ = run(place, tmp_path / f"{step}", tmp_path / f"{step}.npz")
        found, _ = run(place, source, tmp_path / "found" / f"{source.name}.npz")
        assert numpy.array_equal(found, wanted)
    with pytest.raises(model.InputError, match="is a student, a teacher is needed"):
        run(place, "teacher", tmp_path / "no.npz", "--guidance", 2, "--weak-teacher",
            folder / "state_00000040.safetensors")


def test_other_times_or_weak_teachers_are_other_work(place, tmp_path):
    save(tmp_path / "teacher", "teacher", 0)
    guided = ["--nfe", 2, "--guidance", 2, "--weak-teacher", place / "weak"]
    run(place, tmp_path / "teacher", tmp_path / "a.npz", *guided)
    run(place, tmp_path / "teacher", tmp_path / "a.npz", *guided)
    with pytest.raises(model.InputError, match="sha256 of weak teacher"):
        run(place, tmp_path / "teacher", tmp_path / "a.npz", *guided[:4], "--weak-teacher", place / "teacher")
    net, about = model.load_network(tmp_path / "teacher")
    save_network(tmp_path / "teacher", net, {"time_shift": 4.0}, STATS)
    with pytest.raises(model.InputError, match="time_shift: 3.0 there, 4.0 now"):
        run(place, tmp_path / "teacher", tmp_path / "a.npz", *guided)


def test_guidance_of_a_teacher_without_dropout(place, tmp_path, capsys):
    for i, (dropout, more, warned) in enumerate(
            ((0.0, [], True), (0.1, [], False), (0.0, ["--weak-teacher", place / "weak"], False))):
        save(tmp_path / "teacher", "teacher", settings={"label_dropout": dropout})
        run(place, tmp_path / "teacher", tmp_path / f"{i}.npz", "--nfe", 2, "--guidance", 2, *more)
        assert ("--label-dropout 0" in capsys.readouterr().out) == warned
    run(place, tmp_path / "teacher", tmp_path / "plain.npz", "--nfe", 2)
    assert "--label-dropout 0" not in capsys.readouterr().out


def test_a_teachers_default_times(place, monkeypatch):
    """Without a shift, as from Python: the one of its latents' shape, and not none at all."""
    seen = []
    monkeypatch.setattr(sample, "ode_times", lambda steps, a: seen.append(a) or model.ode_times(steps, a))
    z = torch.zeros(1, 768, 16, 16)
    net = model.DiTDH(16, 768, **model.DIT_PRESETS["DiTDH-mini"], num_classes=3)
    for shift in (None, 2.5):
        sample.generate(net, z, torch.tensor([0]), 2, shift=shift)
    assert seen == [pytest.approx(6.928, abs=1e-3), 2.5]


def test_names_that_are_numbers():
    """A name comes before an index; an index serves where no class has its name."""
    assert sample.read_labels("1,3", ["1", "2", "3"]) == [0, 2] and sample.read_labels("0", ["1", "2", "3"]) == [0]
    assert sample.read_labels("2", [str(name) for name in sorted(map(str, range(11)))]) == [3]


# ---- mistakes: one line, nothing written ---------------------------------------------------------------------
@pytest.mark.parametrize(("network", "flags", "words"), [
    ("student", ["--nfe", "0"], "--nfe: '0' is no whole number at least 1"),
    ("teacher", ["--time-shift", "-1"], "--time-shift: '-1' is no number above 0"),
    ("student", ["--seed", "9" * 30], "--seed"), ("student", ["--seed", "-1"], "--seed"),
    ("student", ["--num-samples", "0"], "--num-samples"), ("student", ["--batch-size", "-4"], "--batch-size"),
    ("teacher", ["--guidance", "nan"], "--guidance"), ("teacher", ["--guidance", "2", "--guidance-interval", "0", "2"],
                                                       "--guidance-interval"),
    ("teacher", ["--guidance", "2", "--guidance-interval", "0.9", "0.1"], "the lower time comes first"),
    ("teacher", ["--solver", "heun", "--nfe", "3"], "--nfe 3 with --solver heun"),
    ("student", ["--grid", "picture"], "a name that ends in .png"), ("student", ["--out", "a.json"], "--out one in .npz")])
def test_flags_out_of_range(place, tmp_path, capsys, network, flags, words):
    with pytest.raises(SystemExit) as end:
        run(place, network, tmp_path / "no.npz", *flags)
    error = capsys.readouterr().err
    assert end.value.code == 2 and words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("network", "flags", "words"), [
    ("student", ["--guidance", "2"], "is a student: --guidance is for teachers"),
    ("teacher", ["--labels", "1,x"], "--labels 1,x: no class 'x'; .* below 3 or of names such as cat"),
    ("teacher", ["--labels", "3"], "no class '3'"), ("teacher", ["--labels=-1"], "--labels"),
    ("decoder", [], "is no DiT-DH: it has no .s_embedder.proj.weight"),
    ("teacher", ["--decoder", "none"], "none does not exist$")])
def test_what_does_not_fit(place, tmp_path, network, flags, words):
    with pytest.raises(model.InputError, match=words):
        run(place, network, tmp_path / "no.npz", *flags)
    assert not list(tmp_path.iterdir())


def test_no_decoder_to_be_had(place, tmp_path, monkeypatch):
    """The default one is absent or of other latents: how to train one is said."""
    def offline(source):
        raise model.InputError(f"{source} is neither here nor could it be had from the Hub (offline)")

    def other(source):
        return model.ViTDecoder(**{**DECODER, "in_channels": 8}), {"stats": None}
    for stand_in in (offline, other):
        monkeypatch.setattr(sample, "load_decoder", stand_in)
        with pytest.raises(model.InputError, match="or python sanity/train_decoder.py makes one"):
            sample.main([f"{place}/student", "--out", f"{tmp_path}/no.npz"])
    with pytest.raises(model.InputError) as error:
        sample.main([f"{place}/student", "--decoder", "x/y", "--out", f"{tmp_path}/no.npz"])
    assert "train_decoder" not in str(error.value) and not list(tmp_path.iterdir())


def test_pictures_of_nothing(place, tmp_path):
    """Weights that are not finite make no images, and stand in nobody's way afterwards."""
    net, _ = model.load_network(place / "student")
    net.final_layer.linear.bias.data[0] = float("nan")
    save_network(tmp_path / "student", net, {}, STATS)
    out = tmp_path / "a.npz"
    with pytest.raises(model.InputError, match="images 0 to 19 are not finite: weights or statistics are damaged"):
        run(place, tmp_path / "student", out)
    assert not out.exists() and [path.name for path in (tmp_path / "a.npz.parts").iterdir()] == ["about.json"]
    run(place, "student", tmp_path / "b.npz")


def test_a_damaged_sample_file(place, tmp_path):
    """And descriptions that are none."""
    out, parts = tmp_path / "a.npz", tmp_path / "b.npz.parts"
    run(place, "student", out)
    out.write_bytes(out.read_bytes()[:5000])
    with pytest.raises(model.InputError, match="a.npz is no whole sample file of ours .*: give another --out, or remove it"):
        run(place, "student", out)
    parts.mkdir()
    for text in ("[]", "{", "[" * 100_000):
        (parts / "about.json").write_text(text)
        with pytest.raises(model.InputError, match="about.json"):
            run(place, "student", tmp_path / "b.npz")


def test_ctrl_c_is_one_line(place, tmp_path):
    code = ("import sys, sample, model\n"
            "def stop(*a): raise KeyboardInterrupt\n"
            "sample.to_uint8 = stop\n"
            "model.command(sample.main)")
    argv = [sys.executable, "-c", code, place / "student", "--decoder", place / "decoder", "--num-samples", "4",
            "--out", tmp_path / "a.npz"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and done.stderr.count("\n") == 1 and "interrupted" in done.stderr
