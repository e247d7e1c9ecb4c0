"""What the stages train on and with: their shared text, draws, labels, times, flags, starts and pools."""
import functools

import pytest
import torch
from runs import STAGES, lively, save_decoder, train, watch, weights

import model
import sample
import train_cmt
import train_meanflow
import train_teacher


def test_the_student_starts_as_the_teacher(home, tmp_path, capsys):
    """Away from the zero initialization, where all would agree."""
    teacher, student = (model.load_network(lively(home, tmp_path), kind)[0] for kind in ("teacher", "student"))
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


def test_guided_training(home, tmp_path):
    """--guidance W changes what CMT and MFD learn; a weak teacher that is as good as the teacher does not."""
    teacher = lively(home, tmp_path / "teacher")
    for stage, weak in (("cmt", None), ("meanflow", None), ("meanflow", teacher)):
        runs = [tmp_path / f"{stage}-{bool(weak)}-{w}" for w in (1, 3)]
        train(home, stage, runs[0], "--steps", "2", "--teacher", teacher)
        train(home, stage, runs[1], "--steps", "2", "--teacher", teacher, "--guidance", "3", *(("--weak-teacher", weak) if weak else ()))
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
    _, about = model.load_network(tmp_path / "cmt", "student")
    assert not about["stats"]["mean"].any() and torch.equal(about["stats"]["var"].float(), torch.load(tmp_path / "stat.pt")["var"])
    assert about["kind"] == "student" and about["time_shift"] == model.default_time_shift((12, 4, 4))


def test_trajectory_pool(home):
    """Pairs are points of the teacher's own trajectories at their true times, and no older than the pool's age."""
    teacher, about = model.load_network(home / "teacher")
    times = model.ode_times(4, about["time_shift"])
    solved = []

    def solve(z, y):
        solved.append(len(z))
        return model.solve_ode(teacher, z, y, times)

    def begin(g):
        return torch.randn(teacher.shape, generator=g), torch.randint(4, (), generator=g)

    def new_pool(groups=range(2)):
        return train_cmt.TrajectoryPool(begin, solve, times, groups, 8, 0, torch.device("cpu"), 4)
    pool = new_pool()
    for step in range(20):
        z_t, z_s, t, y, s = pool.draw(step, (0, 16))
        assert (t > s).all()
        for row in range(16):                     # both points and the label are of one trajectory of the row's group, at these times
            group, i, j = row // 8, *((pool.times == x[row]).nonzero().item() for x in (t, s))
            assert any(torch.equal(pool.points[k, i], z_t[row]) and torch.equal(pool.points[k, j], z_s[row])
                       and pool.y[k] == y[row] for k in range(8 * group, 8 * group + 8))
    assert solved == 3 * 4 * [4]                  # three times all 16: a trajectory per group and step
    again = new_pool()
    again.draw(19, (0, 16))
    assert torch.equal(again.points, pool.points) and torch.equal(again.y, pool.y)            # what a run that goes on rebuilds
    assert torch.equal(new_pool(range(1, 2)).draw(19, (8, 16))[0], pool.draw(19, (0, 16))[0][8:])        # another process's part
    k, i = 11, 1                                  # one step of Euler by hand
    z, y = pool.points[k], pool.y[k]
    with torch.no_grad():
        step = z[i] - (times[i] - times[i + 1]) * teacher(z[i][None], torch.tensor([times[i]]), y[None])[0]
    assert torch.allclose(z[i + 1], step, atol=1e-6)


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
    calls = watch(monkeypatch, model, "guided")
    flags = ["--guidance", "1.5", "--weak-teacher", str(tmp_path / "weak")]
    if script is sample:
        sample.main([f"{home}/teacher", "--decoder", f"{tmp_path}/decoder", "--num-samples", "2", "--nfe", "2", "--out",
                     f"{tmp_path}/a.npz", *flags, "--guidance-interval", "0.2", "0.7"])
    else:
        train(home, "cmt" if script is train_cmt else "meanflow", tmp_path / "out", "--steps", "1", *flags)
    (teacher, scale, interval, weak, _), = calls
    assert scale == 1.5 and list(interval) == ([0.2, 0.7] if script is sample else [0, 1])
    for net, folder in ((teacher, home / "teacher"), (weak, tmp_path / "weak")):
        expected = model.load_network(folder)[0].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in net.state_dict().items())


def test_what_cmt_trains_on(home, tmp_path, monkeypatch):
    """All pairs of points of the teacher's trajectories for their labels, at the true, shifted times; labels dropped."""
    teacher = model.load_network(lively(home, tmp_path / "teacher"))[0]
    make, pools, first = train_cmt.TrajectoryPool, [], []

    def watched(*args, **more):
        pools.append(make(*args, **more))
        draw = pools[0].draw

        def drawing(*at):
            drawn = draw(*at)
            first.append(pools[0].points[:, 0].clone())
            return drawn
        pools[0].draw = drawing
        return pools[0]
    monkeypatch.setattr(train_cmt, "TrajectoryPool", watched)
    calls = watch(monkeypatch, train_cmt, "consistency_loss")
    train(home, "cmt", tmp_path / "out", "--steps", "9", "--teacher", tmp_path / "teacher", "--teacher-steps", "5", "--time-shift", "2.5",
          "--batch-size", "256", "--micro-batch", "256", "--label-dropout", "0.4")
    pool, = pools
    times = torch.tensor(model.ode_times(5, 2.5))
    assert torch.equal(pool.times, times) and len(times) == 6 and times[-1] == 0
    for i in range(5):                            # Euler's steps by hand, with the pool's labels
        with torch.no_grad():
            z, y = pool.points, pool.y
            step = z[:, i] - (times[i] - times[i + 1]) * teacher(z[:, i], times[i].repeat(len(z)), y)
        assert torch.allclose(step, z[:, i + 1], atol=1e-5)
    t, y, s = (torch.cat([call[k] for call in calls]) for k in (3, 4, 5))
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == {(a, b) for a in times.tolist() for b in times.tolist() if a > b}
    assert len(pool.points[:, 0].flatten(1).unique(dim=0)) == 32 * 8                          # each trajectory another noise
    assert all(torch.equal(first[0], points) for points in first[:8])                         # for as many steps as pairs are drawn
    assert not (first[8] == first[0]).flatten(1).any(1).any()                                 # then all are new
    assert 0.3 < (y == 3).float().mean() < 0.5                                    # 3 is 'no label'; a few hundred trajectories
    assert sum(len(group.unique()) > 1 for group in calls[0][4].split(8)) > 16    # a group's pairs are of several trajectories


def test_defaults_are_the_papers():
    """What a run without flags does: METHOD's numbers at 256 px."""
    same = dict(lr=1e-4, clip=1.0, label_dropout=0.1, guidance=1.0, weak_teacher=None, decay_from=0.0)
    for script, numbers in ((train_cmt, dict(steps=27_000, batch_size=512, pairs=64, teacher_steps=16, solver="euler",
                                             ema=0.999)),
                            (train_meanflow, dict(steps=180_000, batch_size=256, eta=[1.0], derivative="jvp", delta_t=0.005, ema=0.9999,
                                                  loss_form="published", loss_power=1.0, loss_eps=1e-3))):
        args = vars(script.parse_args([]))
        assert {key: args[key] for key in {**same, **numbers}} == {**same, **numbers}


def test_what_the_teacher_trains_on(home, tmp_path, monkeypatch):
    """t: one shifted draw, whose mean at a = 3 is 3/2 - 3/4 ln 3 = 0.676."""
    calls = watch(monkeypatch, train_teacher, "flow_matching_loss")
    train(home, "teacher", tmp_path / "out", "--steps", "1", "--batch-size", "2048", "--micro-batch", "2048")
    (_, z_0, eps, t, y, _), = calls
    assert t.mean() == pytest.approx(0.676, abs=0.02) and 0 <= t.min() and t.max() <= 1
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
    before = model.load_network(tmp_path / "start")[0].state_dict()
    moved = sum(float((a[k] - before[k]).square().sum()) for k in before) ** 0.5
    apart = sum(float((a[k] - b[k]).square().sum()) for k in before) ** 0.5 / moved
    assert {"same": apart < 1e-3, "near": 1e-6 < apart < 0.5, "other": apart > 1e-3}[effect], apart


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_has_no_graph(home, tmp_path, monkeypatch, stage):
    """It would grow with every step, and never be freed."""
    save, seen = STAGES[stage].save_state, []

    def looking(about, step, seconds, net, average, optimizer):
        seen.extend(mean.requires_grad for mean in average.parameters())
        save(about, step, seconds, net, average, optimizer)
    monkeypatch.setattr(STAGES[stage], "save_state", looking)
    train(home, stage, tmp_path / "out")
    assert len(seen) > 6 and not any(seen)
