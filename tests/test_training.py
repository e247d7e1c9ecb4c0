"""The training stages as programs: splitting and resuming change nothing, the student starts as the teacher, mistakes are one line."""
import functools
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import encode_latents
import model
import sample
import train_cmt
import train_meanflow
import train_teacher
from sanity import random_encoder

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"teacher": train_teacher, "cmt": train_cmt, "meanflow": train_meanflow}
TINY = dict(hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2))
model.DIT_PRESETS["tiny"] = TINY


def random_images(folder, classes=3, each=12):
    g = numpy.random.default_rng(0)
    for k in range(classes):
        (folder / f"class{k}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(g.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)).save(folder / f"class{k}" / f"{i:03d}.png")


def encode(home):
    """Latents of the images in a folder, by a random encoder."""
    random_encoder.main(["--out", f"{home}/encoder", *"--width 12 --depth 1 --heads 2 --patch 4".split()])
    encode_latents.main(["--data-path", f"{home}/images", "--out", f"{home}/latents", "--encoder", f"{home}/encoder",
                         *"--image-size 16 --encoder-size 16 --workers 0".split()])
    let_go()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Images, latents, a teacher and a CMT student, each made by its own script."""
    home = tmp_path_factory.mktemp("home")
    random_images(home / "images")
    encode(home)
    train(home, "teacher", f"{home}/teacher", "--steps", "8")
    train(home, "cmt", f"{home}/cmt")
    return home


def arguments(home, stage, out, *more):
    """A short run of a stage: 6 steps of 16 rows, with a save at step 3."""
    preset = [] if "--init" in more else ["--preset", "tiny"]
    inputs = {"teacher": ["--latents", f"{home}/latents", *preset, "--time-shift", "3"],
              "cmt": ["--teacher", f"{home}/teacher", "--teacher-steps", "4", "--pairs", "8", "--pool-age", "4"],
              "meanflow": ["--latents", f"{home}/latents", "--teacher", f"{home}/teacher", "--init", f"{home}/cmt",
                           "--loss-form", "mean", "--eta", "1", "0.5"]}[stage]
    return [*inputs, "--out", str(out), "--steps", "6", "--batch-size", "16", "--lr", "1e-3", "--save-every", "3", "--log-every", "1",
            "--keep", "9", "--precision", "fp32", *map(str, more)]


def train(home, stage, out, *more):
    try:
        STAGES[stage].main(arguments(home, stage, out, *more))
    finally:
        let_go()


def let_go():
    """Give the locks of this process back, as its end would."""
    while model.HELD:
        model.HELD.pop().close()


def weights(folder, name="model.safetensors"):
    return model.read_tensors(Path(folder) / name)[0]


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def process(rank, world, port, argv, main):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(argv)
    torch.distributed.destroy_process_group()
    if Path("/proc").exists():                    # a Gloo thread that is still there at the interpreter's end may abort the process
        threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        assert not any("gloo" in name for name in threads), threads


def run_on(world, main, argv):
    """`main(argv)` in `world` processes, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (world, port, argv, main), nprocs=world)


def train_on(world, home, stage, out, *more):
    run_on(world, STAGES[stage].main, arguments(home, stage, out, *more))


def close(a, b, tolerance):
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a) ** 0.5
    return difference <= tolerance * sum(float(v.double().square().sum()) for v in a.values()) ** 0.5


def test_the_shared_text_is_the_same():
    shared = r"# =+ The same text in.*?# =+ end of the same text =+\n"
    text, = {re.search(shared, (ROOT / f"train_{stage}.py").read_text(), re.S)[0] for stage in STAGES}
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("stage", STAGES)
def test_splitting_changes_nothing(home, tmp_path, stage):
    """Micro-batches, and two processes (Gloo), one of them with micro-batches: losses and weights of one process, to 1e-5."""
    train(home, stage, tmp_path / "one")
    train(home, stage, tmp_path / "micro", "--micro-batch", "4")
    train_on(2, home, stage, tmp_path / "two", "--micro-batch", "4")
    for other in ("micro", "two"):
        assert close(weights(tmp_path / "one"), weights(tmp_path / other), 1e-5)
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / other), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_is_bit_identical(home, tmp_path, stage):
    """Stopped at step 3, the newest state (of step 5, say) damaged, resumed: the weights, states and log of the undisturbed run."""
    train(home, stage, tmp_path / "whole")
    train(home, stage, tmp_path / "parts", "--save-every", "1", "--keep", "3")
    states = sorted((tmp_path / "parts").glob("state_*"))
    assert [p.name for p in states] == [f"state_{k:08d}.safetensors" for k in (4, 5, 6)]
    states[2].unlink()                            # killed before the last state was there,
    content = bytearray(states[1].read_bytes())   # and one bit of the one before it has turned since
    content[-5] ^= 1
    states[1].write_bytes(content)
    train(home, stage, tmp_path / "parts", "--save-every", "1", "--resume")
    a, b = (weights(tmp_path / run, "state_00000006.safetensors") for run in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (weights(tmp_path / run) for run in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in log(tmp_path / "parts")] == [line["loss"] for line in log(tmp_path / "whole")]


def test_two_processes_go_on_as_one_and_back(home, tmp_path):
    """Step 2 with two processes, 4 with one and micro-batches, 6 with two again: the undisturbed run of one, to 1e-5."""
    train(home, "meanflow", tmp_path / "whole")
    parts = tmp_path / "parts"
    train_on(2, home, "meanflow", parts, "--save-every", "2")
    for path in [*parts.glob("state_0000000[46]*")]:
        path.unlink()
    train(home, "meanflow", parts, "--save-every", "2", "--resume", "--micro-batch", "8")
    (parts / "state_00000006.safetensors").unlink()
    train_on(2, home, "meanflow", parts, "--save-every", "2", "--resume")
    assert [line["step"] for line in log(parts)] == [1, 2, 3, 4, 5, 6]
    assert close(weights(tmp_path / "whole"), weights(parts), 1e-5)


def compiled(argv):
    """Stage 3, its graphs captured and run as they are."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    train_meanflow.main(argv)


def test_two_compiled_processes(home, tmp_path):
    """DDP splits compiled graphs at its buckets: with checkpointing too, it is the run of one process without."""
    train(home, "meanflow", tmp_path / "one", "--steps", "2")
    run_on(2, compiled, arguments(home, "meanflow", tmp_path / "two", "--steps", "2", "--compile", "--checkpoint-activations"))
    assert close(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-5)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def test_the_student_starts_as_the_teacher(home, capsys):
    teacher = model.load_network(home / "teacher")[0]
    for p in teacher.parameters():                # away from the zero initialization, where all would agree
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    student = model.DiTDH(**TINY, input_size=4, in_channels=12, num_classes=3, time_difference=True)
    model.load_strictly(student, teacher.state_dict(), new="r_embedder.")
    assert "r_embedder.W" in capsys.readouterr().out
    z, t, y = torch.randn(4, 12, 4, 4), torch.tensor([1, 0.8, 0.5, 0.1]), torch.arange(4)
    for s in (t, t / 2, 0 * t):
        assert torch.equal(student(z, t, y, s), teacher(z, t, y))


def test_fine_tuning(home, tmp_path):
    """From a teacher's weights, with its label table or a new one; the learning rate is 0, so that the weights stay visible."""
    still = ["--lr", "0", "--lr-final", "0", "--steps", "1", "--init", home / "teacher"]
    train(home, "teacher", tmp_path / "same", *still)
    train(home, "teacher", tmp_path / "new", *still, "--new-classes")
    before = weights(home / "teacher")
    changed = [{k for k, v in weights(tmp_path / run).items() if not torch.equal(v, before[k])} for run in ("same", "new")]
    assert changed == [set(), {"y_embedder.embedding_table.weight"}]


def lively(home, folder, seed=0):
    """The teacher with random numbers added to its weights: after a few steps from zero, labels hardly change what it says."""
    teacher, config, stats = model.load_network(home / "teacher")
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + seed))
    model.save_network(folder, teacher.state_dict(), config, stats)
    return folder


def test_guided_training(home, tmp_path):
    """--guidance W changes what CMT and MFD learn; a weak teacher that is as good as the teacher does not."""
    teacher = lively(home, tmp_path / "teacher")
    for stage, weak in (("cmt", None), ("meanflow", None), ("meanflow", teacher)):
        runs = [tmp_path / f"{stage}-{bool(weak)}-{w}" for w in (1, 3)]
        train(home, stage, runs[0], "--steps", "2", "--teacher", teacher)
        train(home, stage, runs[1], "--steps", "2", "--teacher", teacher, "--guidance", "3", "--guidance-interval", "0.1", "0.9",
              *(("--weak-teacher", weak) if weak else ()))
        a, b = (weights(run) for run in runs)
        assert all(torch.equal(a[k], b[k]) for k in a) == bool(weak)


def test_cmt_from_a_published_teacher(home, tmp_path):
    """No images and no folder of ours: a .pt file of weights and one of statistics, whose mean is None."""
    torch.save({"ema": weights(home / "teacher"), "step": 7}, tmp_path / "stage2_model.pt")
    torch.save({"mean": None, "var": torch.rand(12, 4, 4)}, tmp_path / "stat.pt")
    published = ["--teacher", tmp_path / "stage2_model.pt"]
    with pytest.raises(model.InputError, match="--stats"):
        train(home, "cmt", tmp_path / "cmt", *published)
    train(home, "cmt", tmp_path / "cmt", *published, "--stats", tmp_path / "stat.pt")
    net, config, (mean, var) = model.load_network(tmp_path / "cmt", "student")
    assert not mean.any() and torch.equal(var.float(), torch.load(tmp_path / "stat.pt")["var"])
    assert config["time_shift"] == model.default_time_shift((12, 4, 4))


def test_what_a_run_leaves_behind(home):
    run = json.loads((home / "cmt" / "run.json").read_text())
    assert run["settings"]["teacher"] == f"{home}/teacher" and {"command", "torch", "host", "device", "date"} <= run.keys()
    assert {"step", "loss", "mse", "grad_norm", "lr", "samples_per_second", "seconds"} <= log(home / "cmt")[0].keys()
    config = json.loads((home / "cmt" / "config.json").read_text())
    assert config["kind"] == "student" and config["time_shift"] == 3 and config["classes"] == ["class0", "class1", "class2"]


def test_trajectory_pool(home):
    """Pairs are points of the teacher's own trajectories at their true times, and no older than the pool's age."""
    teacher, config, _ = model.load_network(home / "teacher")
    times = model.ode_times(4, config["time_shift"])
    solved = []

    def solve(z, y):
        solved.append(len(z))
        return model.solve_ode(teacher, z, y, times)

    def new_pool():
        return train_cmt.TrajectoryPool(solve, teacher.shape, times, range(2), 8, 8, 0, 3, 0.1, torch.device("cpu"))
    pool = new_pool()
    for step in range(20):
        z_t, z_s, t, y, s, age = pool.draw(step, (0, 16))
        assert (age >= 0).all() and (age < 8).all() and (t > s).all()
        for row in range(16):                     # both points and the label are of one trajectory of the row's group, at these times
            group, i, j = row // 8, *((pool.times == x[row]).nonzero().item() for x in (t, s))
            assert any(torch.equal(pool.points[group, slot, i], z_t[row]) and torch.equal(pool.points[group, slot, j], z_s[row])
                       and pool.y[group, slot] == y[row] for slot in range(8))
    assert sum(solved) == 2 * (8 + 9 * 2)         # a trajectory per group and step on average: 9 renewals of a quarter
    again = new_pool()
    again.draw(19, (0, 16))
    assert torch.equal(again.points, pool.points) and torch.equal(again.born, pool.born)      # what a resumed run rebuilds
    group, slot, i = 1, 3, 1                      # one step of Euler by hand
    z, y = pool.points[group, slot], pool.y[group, slot]
    with torch.no_grad():
        step = z[i] - (times[i] - times[i + 1]) * teacher(z[i][None], torch.tensor([times[i]]), y[None])[0]
    assert torch.allclose(z[i + 1], step, atol=1e-6)


def watch(monkeypatch, module, name):
    """The arguments that a script gives to a function that it uses, call by call."""
    loss, calls = getattr(module, name), []

    def watching(*args, **more):
        calls.append([*args, more])
        return loss(*args, **more)
    monkeypatch.setattr(module, name, watching)
    return calls


def is_normalized(z):
    """Data of 36 images, seen some 57 times each: mean 0 and variance 1 for each channel and position."""
    return z.mean(0).abs().max() < 0.1 and (z.var(0) - 1).abs().max() < 0.15


def test_what_meanflow_trains_on(home, tmp_path, monkeypatch):
    """Every fourth row has s < t, the others s = t, t being the larger of two shifted draws; labels dropped once; eta's schedule; z_0."""
    calls = watch(monkeypatch, train_meanflow, "meanflow_loss")
    train(home, "meanflow", tmp_path / "out", "--steps", "3", "--batch-size", "2048", "--micro-batch", "1024", "--time-shift", "6.93")
    assert len(calls) == 6
    for i, (_, _, _, eps, t, y, s, eta, *_, more) in enumerate(calls):
        assert more["rows"] == slice(None, None, 4)
        assert (s[::4] < t[::4]).all() and all(torch.equal(s[k::4], t[k::4]) for k in (1, 2, 3))
        assert t.mean() == pytest.approx(0.90, abs=0.02) and s[::4].mean() < 0.8                  # METHOD: mean t 0.90
        assert 0.06 < (y == 3).float().mean() < 0.14
        assert eta == pytest.approx(1 - 0.25 * (i // 2))                                          # 1 to 0.5 over three steps
        assert eps.mean().abs() < 0.02 and abs(eps.std() - 1) < 0.02
    assert is_normalized(torch.cat([calls[0][2], calls[1][2]]))
    assert not torch.equal(calls[0][3], calls[1][3]) and not torch.equal(calls[0][3], calls[2][3])


def test_flags_reach_the_loss(home, tmp_path, monkeypatch):
    """Derivative, step, weight: as given, not as by default; and the network is given the labels of the loss, dropped once."""
    forward, seen = model.DiTDH.forward, []

    def watching(self, z, t, y, s=None):
        seen.extend([y] if s is not None else [])
        return forward(self, z, t, y, s)
    monkeypatch.setattr(model.DiTDH, "forward", watching)
    calls = watch(monkeypatch, train_meanflow, "meanflow_loss")
    train(home, "meanflow", tmp_path / "out", "--steps", "1", "--batch-size", "256", "--micro-batch", "256",
          "--label-dropout", "0.5", "--derivative", "fd-central", "--delta-t", "0.02", "--loss-form",
          "published", "--loss-power", "0.25", "--loss-eps", "7")
    (*_, y, _, _, derivative, delta_t, form, power, loss_eps, _), = calls
    assert (derivative, delta_t, form, power, loss_eps) == ("fd-central", 0.02, "published", 0.25, 7.0)
    assert [labels.tolist() for labels in seen] == [y.tolist(), y[::4].repeat(2).tolist()]


@pytest.mark.parametrize("script", [train_cmt, train_meanflow, sample])
def test_flags_reach_the_guidance(home, tmp_path, monkeypatch, script):
    save_decoder(home, tmp_path / "decoder")
    lively(home, tmp_path / "weak")
    calls = watch(monkeypatch, script, "guided")
    flags = ["--guidance", "1.5", "--guidance-interval", "0.2", "0.7", "--weak-teacher", str(tmp_path / "weak")]
    if script is sample:
        sample.main([f"{home}/teacher", "--decoder", f"{tmp_path}/decoder", "--num-samples", "2", "--nfe", "2", "--out",
                     f"{tmp_path}/a.npz", *flags])
    else:
        train(home, "cmt" if script is train_cmt else "meanflow", tmp_path / "out", "--steps", "1", *flags)
    (teacher, scale, interval, weak, _), = calls
    assert scale == 1.5 and list(interval) == [0.2, 0.7]
    for net, folder in ((teacher, home / "teacher"), (weak, tmp_path / "weak")):
        assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in weights(folder).items())


def test_what_cmt_trains_on(home, tmp_path, monkeypatch):
    """All pairs of points of the teacher's trajectories for their labels, at the true, shifted times; labels dropped; the age logged."""
    teacher = model.load_network(lively(home, tmp_path / "teacher"))[0]
    make, pools, first = train_cmt.TrajectoryPool, [], []

    def watched(*args, **more):
        pools.append(make(*args, **more))
        draw = pools[0].draw

        def drawing(*at):
            drawn = draw(*at)
            first.append(pools[0].points[:, :, 0].clone())
            return drawn
        pools[0].draw = drawing
        return pools[0]
    monkeypatch.setattr(train_cmt, "TrajectoryPool", watched)
    calls = watch(monkeypatch, train_cmt, "consistency_loss")
    train(home, "cmt", tmp_path / "out", "--steps", "8", "--teacher", tmp_path / "teacher", "--teacher-steps", "5", "--time-shift", "2.5",
          "--batch-size", "256", "--micro-batch", "256", "--pool-age", "8", "--label-dropout", "0.4")
    pool, = pools
    times = torch.tensor(model.ode_times(5, 2.5))
    assert torch.equal(pool.times, times) and len(times) == 6 and times[-1] == 0
    for i in range(5):                            # Euler's steps by hand, with the pool's labels
        with torch.no_grad():
            z, y = pool.points[0], pool.y[0]
            step = z[:, i] - (times[i] - times[i + 1]) * teacher(z[:, i], times[i].repeat(len(z)), y)
        assert torch.allclose(step, z[:, i + 1], atol=1e-5)
    t, y, s = (torch.cat([call[k] for call in calls]) for k in (3, 4, 5))
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == {(a, b) for a in times.tolist() for b in times.tolist() if a > b}
    assert len(pool.points[:, :, 0].flatten(2).flatten(0, 1).unique(dim=0)) == 32 * 8         # each trajectory another noise
    assert [torch.equal(pool.points[:, k, 0], first[0][:, k]) for k in range(8)] == 6 * [False] + 2 * [True]   # 3 quarters renewed
    assert 0.3 < (y == 3).float().mean() < 0.5                                    # 3 is 'no label'; a few hundred trajectories
    assert sum(len(group.unique()) > 1 for group in calls[0][4].split(8)) > 16    # a group's pairs are of several trajectories
    ages = [line["pair_age"] for line in log(tmp_path / "out")]
    assert ages[0] == 0 and ages[1] == 1 and 1 < ages[-1] < 8


def test_defaults_are_the_papers():
    """What a run without flags does: METHOD's numbers at 256 px."""
    same = dict(lr=1e-4, clip=1.0, label_dropout=0.1, guidance=1.0, guidance_interval=[0.0, 1.0], weak_teacher=None)
    for script, numbers in ((train_cmt, dict(steps=27_000, batch_size=512, pairs=64, pool_age=64, teacher_steps=16, solver="euler",
                                             ema=0.999)),
                            (train_meanflow, dict(steps=180_000, batch_size=256, eta=[1.0], derivative="jvp", delta_t=0.005, ema=0.9999,
                                                  loss_form="published", loss_power=1.0, loss_eps=1e-3))):
        args = vars(script.parse_args([]))
        assert {key: args[key] for key in {**same, **numbers}} == {**same, **numbers}


@pytest.mark.parametrize("law, mean", [("uniform", 0.676), ("logit-normal", 0.7145)])
def test_what_the_teacher_trains_on(home, tmp_path, monkeypatch, law, mean):
    """t: one shifted draw, whose mean at a = 3 is 3/2 - 3/4 ln 3 = 0.676 for a uniform u (logit-normal: by simulation)."""
    calls = watch(monkeypatch, train_teacher, "flow_matching_loss")
    train(home, "teacher", tmp_path / "out", "--steps", "1", "--batch-size", "2048", "--micro-batch", "2048", "--time-draw", law)
    (_, z_0, eps, t, y, _), = calls
    assert t.mean() == pytest.approx(mean, abs=0.02) and 0 <= t.min() and t.max() <= 1
    assert 0.07 < (y == 3).float().mean() < 0.13 and is_normalized(z_0)


OPTIONS = [("teacher", ["--checkpoint-activations"], "same"), ("meanflow", ["--checkpoint-activations"], "same"),
           ("cmt", ["--solver", "heun"], "other"), ("meanflow", ["--derivative", "fd"], "near"),
           ("meanflow", ["--eta", "0"], "other"), ("teacher", ["--precision", "bf16"], "near"), ("cmt", ["--precision", "bf16"], "near"),
           ("meanflow", ["--precision", "bf16"], "near"), ("meanflow", ["--precision", "bf16", "--derivative", "fd"], "near"),
           ("teacher", ["--compile"], "same"), ("cmt", ["--compile"], "same"), ("meanflow", ["--compile"], "same"),
           ("meanflow", ["--compile", "--derivative", "fd"], "near"), ("meanflow", ["--compile", "--precision", "bf16"], "near")]


@pytest.mark.parametrize("stage, flags, effect", OPTIONS, ids=[" ".join([stage, *flags]) for stage, flags, _ in OPTIONS])
def test_options(home, tmp_path, monkeypatch, stage, flags, effect):
    """What a flag does to the weights after two steps: nothing but rounding, a little, or more. Compiled: graphs captured and run as
    they are, so that no compiler is needed."""
    if "--compile" in flags:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        torch._dynamo.reset()
    lively(home, tmp_path / "start")
    start = ["--steps", "2", "--init", tmp_path / "start"] + (["--teacher", tmp_path / "start"] if stage != "teacher" else [])
    train(home, stage, tmp_path / "default", *start)
    train(home, stage, tmp_path / "option", *start, *flags)
    a, b = weights(tmp_path / "default"), weights(tmp_path / "option")
    before = weights(tmp_path / "start")
    moved = sum(float((a[k] - before[k]).square().sum()) for k in before) ** 0.5
    apart = sum(float((a[k] - b[k]).square().sum()) for k in before) ** 0.5 / moved
    assert {"same": apart < 1e-3, "near": 1e-6 < apart < 0.5, "other": apart > 1e-3}[effect], apart


# ---- mistakes: one line, exit status 2, no traceback, nothing half-written -------------------------------------------------------
def complain(script, *argv, status=2):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: "), done.stderr
    return last


def refused(script, argv, capsys):
    """What a script's main says to these arguments before it ends, here and not in another process."""
    try:
        importlib.import_module(Path(script).stem).main([str(x) for x in argv])
    except model.InputError as error:
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    finally:
        let_go()
    raise AssertionError(f"{script} {argv} was taken")


def test_mistakes(home, tmp_path, capsys):
    new = tmp_path / "new"
    expected = [
        ("train_teacher.py", ["--latents", tmp_path / "none", "--out", new], "encode_latents.py"),
        ("train_cmt.py", ["--teacher", "runs/none", "--out", new], "does not exist"),
        ("train_cmt.py", ["--teacher", home / "cmt", "--out", new], "is a student, a teacher is needed"),
        ("train_meanflow.py", ["--teacher", home / "cmt", "--init", home / "cmt", "--latents", home / "latents", "--out", new],
         "a teacher is needed"),
        ("train_teacher.py", ["--latents", home / "latents", "--batch-size", 18, "--out", new], "multiple of 4"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--batch-size", 32, "--pairs", 20, "--out", new], "--pairs"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", home / "teacher"], "holds other work"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", home / "cmt", "--resume"], "holds other work"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", new, "--log-every", 0], "at least 1"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", new, "--time-shift", 0], "number above 0"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--out", new, "--pairs", 0], "--pairs"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--eta", 1, 0.5, 0], "--eta"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--eta", 1.5], "at most 1"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--eta", 0, "--guidance", 2], "--eta 0 has none"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--out", new, "--guidance", 2, "--guidance-interval", 0.9, 0.1], "comes first"),
        ("sample.py", [home / "latents"], "config.json"),
    ]
    for script, argv, words in expected:
        assert words in refused(script, argv, capsys)
    for script, argv, words in (expected[0], expected[8]):                        # an InputError, a flag
        assert words in complain(script, *argv)
    assert not new.exists()


def test_networks_that_do_not_fit(home, tmp_path):
    """Latents and student of different shapes, classes or statistics."""
    def fails(words, **changes):
        state, config = weights(home / "cmt"), model.read_json(home / "cmt" / "config.json")
        stats = tuple(weights(home / "cmt", "latent_stats.safetensors")[k] for k in ("mean", "var"))
        sizes = {**config["network"], **changes.get("network", {})}
        model.save_network(tmp_path / "other", model.DiTDH(**sizes).state_dict() if "network" in changes else state,
                           {**config, "network": sizes}, (stats[0] + changes.get("shift", 0), stats[1]))
        with pytest.raises(model.InputError, match=words):
            train(home, "meanflow", tmp_path / "out", "--init", tmp_path / "other")
        assert not (tmp_path / "out").exists()
    fails("latents", network={"in_channels": 16})
    fails("4 classes", network={"num_classes": 4})
    fails("statistics", shift=0.1)
    model.write_tensors(tmp_path / "stats.safetensors", {"mean": torch.zeros(12, 8, 8), "var": torch.ones(12, 8, 8)})
    model.write_tensors(tmp_path / "uneven.safetensors", {"mean": torch.zeros(12), "var": torch.ones(12, 4, 4)})
    for stage in STAGES:
        for name in ("stats", "uneven"):
            with pytest.raises(model.InputError, match=r"holds statistics \(12.*needed are \(12, 4, 4\)"):
                train(home, stage, tmp_path / "out", "--stats", tmp_path / f"{name}.safetensors")
    with pytest.raises(model.InputError, match="weak"):
        train(home, "cmt", tmp_path / "out", "--guidance", "2", "--weak-teacher", tmp_path / "weak")
    assert not (tmp_path / "out").exists()                                        # the corrected command is free to go there


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_has_no_graph(home, tmp_path, monkeypatch, stage):
    """It would grow with every step, and never be freed."""
    save, seen = STAGES[stage].save_state, []

    def looking(out, run, step, seconds, net, average, *rest):
        seen.extend(mean.requires_grad for mean in average.parameters())
        save(out, run, step, seconds, net, average, *rest)
    monkeypatch.setattr(STAGES[stage], "save_state", looking)
    train(home, stage, tmp_path / "out")
    assert len(seen) > 6 and not any(seen)


def test_what_a_resumed_run_may_change(home, tmp_path):
    train(home, "teacher", tmp_path / "out")
    train(home, "teacher", tmp_path / "out", "--resume", "--steps", "8", "--lr", "1e-4", "--lr-final", "1e-5", "--clip", "0.5")
    assert log(tmp_path / "out")[-1]["lr"] == pytest.approx(1e-5)                 # reached at the last step
    with pytest.raises(model.InputError, match="holds other work.*seed: 0 there, 1 now"):
        train(home, "teacher", tmp_path / "out", "--resume", "--seed", "1")


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert model.provenance()["commit"] is None


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "model.py"))
def test_help_is_quick(script):
    best = 99
    for _ in range(3):                            # a busy machine is not the script's fault
        start = time.perf_counter()
        assert "usage" in subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True).stdout
        best = min(best, time.perf_counter() - start)
        if best < 5:
            break
    assert best < 5


def test_a_broken_state_is_never_saved(home, tmp_path):
    with pytest.raises(model.InputError, match="not finite.*--lr"):
        train(home, "teacher", tmp_path / "out", "--lr", "1e30", "--lr-final", "1e30", "--save-every", "100")
    assert not list((tmp_path / "out").glob("state_*"))


def test_a_signal_saves_and_stops(home, tmp_path):
    argv = arguments(home, "teacher", tmp_path / "out", "--steps", "100000", "--save-every", "100000")
    argv[argv.index("tiny")] = "DiTDH-mini"
    child = subprocess.Popen([sys.executable, ROOT / "train_teacher.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             text=True, cwd=ROOT)
    assert "parameters" in child.stdout.readline()
    assert '"step": 1' in child.stdout.readline()
    child.terminate()
    rest = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + 15 and "--resume goes on" in rest, rest
    states = list((tmp_path / "out").glob("state_*"))
    assert len(states) == 1 and int(model.read_tensors(states[0])[1]["step"]) == log(tmp_path / "out")[-1]["step"]


def save_decoder(home, out):
    sizes = dict(input_size=4, in_channels=12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
    config = {"kind": "decoder", "network": sizes}
    model.save_network(out, model.ViTDecoder(**sizes).state_dict(), config, model.load_stats(home / "latents"))
