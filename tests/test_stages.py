"""What stages train on: draws, labels, times, trajectories; what flags do; the step, the average, the log."""
import functools

import pytest
import torch
from runs import STAGES, encode, log, state, train, watch

import encode_latents
import model
import train_cmt
import train_meanflow
import train_teacher


# ---- What they train on ----
def is_normalized(z):
    """Data of 36 images, seen some 57 times each: mean 0 and variance 1 for each channel and position."""
    return z.mean(0).abs().max() < 0.1 and (z.var(0) - 1).abs().max() < 0.15


def test_what_the_teacher_trains_on(home, tmp_path, monkeypatch):
    """t: one shifted draw, whose mean at a = 3 is 3/2 - 3/4 ln 3 = 0.676."""
    calls = watch(monkeypatch, train_teacher, "flow_matching_loss")
    train(home, "teacher", tmp_path, "--steps 1 --batch-size 2048 --micro-batch 2048")
    (_, z_0, eps, t, y, _), = calls
    assert t.mean() == pytest.approx(0.676, abs=0.02)
    assert 0 <= t.min() and t.max() <= 1
    assert abs(eps.std() - 1) < 0.02
    assert is_normalized(z_0)
    assert 0.07 < (y == 3).float().mean() < 0.13
    assert y.unique().tolist() == [0, 1, 2, 3]


def test_what_meanflow_trains_on(home, tmp_path, monkeypatch):
    """In every fourth row s < t, in the others s = t; t is the larger of two shifted draws; labels dropped;
    eta's schedule; the flags of the loss as given."""
    calls = watch(monkeypatch, train_meanflow, "meanflow_loss")
    train(home, "meanflow", tmp_path, "--steps 3 --batch-size 2048 --micro-batch 1024 --time-shift 6.93",
          "--derivative fd --delta-t 0.02 --loss-form published --loss-power 0.25 --loss-eps 7")
    assert len(calls) == 6
    for i, (_, _, _, eps, t, y, s, eta, *flags, more) in enumerate(calls):
        assert flags == ["fd", 0.02, "published", 0.25, 7]
        assert more["jumps"] == slice(None, None, 4)
        assert eta == pytest.approx(1 - 0.25 * (i // 2))    # 1 to 0.5 over three steps
        assert (s[::4] < t[::4]).all()
        assert all(torch.equal(s[k::4], t[k::4]) for k in (1, 2, 3))
        assert t.mean() == pytest.approx(0.90, abs=0.02)    # METHOD: mean t 0.90
        assert s[::4].mean() < 0.8
        assert 0.06 < (y == 3).float().mean() < 0.14
        assert eps.mean().abs() < 0.02 and abs(eps.std() - 1) < 0.02
    assert is_normalized(torch.cat([calls[0][2], calls[1][2]]))
    assert not torch.equal(calls[0][3], calls[2][3])


def test_what_cmt_trains_on(home, tmp_path, monkeypatch):
    """All pairs of points of the teacher's trajectories, each pair of one that is its group's, at the true,
    shifted times; none older than the pool's age; labels dropped."""
    teacher, pools = model.load_network(home / "teacher")[0], []
    make, calls = train_cmt.TrajectoryPool, watch(monkeypatch, train_cmt, "consistency_loss")
    monkeypatch.setattr(train_cmt, "TrajectoryPool", lambda *args: pools.append(make(*args)) or pools[0])
    train(home, "cmt", tmp_path, "--steps 9 --batch-size 256 --micro-batch 256 --teacher-steps 5",
          "--time-shift 2.5 --label-dropout 0.4")
    points, labels, times = pools[0].points, pools[0].y, torch.tensor(model.ode_times(5, 2.5))
    assert torch.equal(pools[0].times, times)
    assert len(times) == 6 and times[-1] == 0
    with torch.no_grad():    # Euler's step by hand, with the pool's labels
        step = points[:, 3] - (times[3] - times[4]) * teacher(points[:, 3], times[3].repeat(256), labels)
    assert torch.allclose(step, points[:, 4], atol=1e-5)
    assert len(points[:, 0].unique(dim=0)) == 256    # each trajectory another noise
    assert pools[0].era == 1
    t, y, s = (torch.cat([call[k] for call in calls]) for k in (3, 4, 5))
    every = {(a, b) for a in times.tolist() for b in times.tolist() if a > b}
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == every
    assert 0.3 < (y == 3).float().mean() < 0.5    # 3 is 'no label'; 512 trajectories
    assert len(y.unique()) == 4
    drawn = set()
    for row, (z_t, z_s, t, y, s) in enumerate(zip(*calls[-1][1:6], strict=True)):
        found = (points[:, times == t] == z_t) & (points[:, times == s] == z_s)
        k, = (found.flatten(1).all(1) & (labels == y)).nonzero().flatten().tolist()
        assert k // 8 == row // 8
        drawn.add(k)
    assert len(drawn) > 100   # of a group several


def test_keys_of_random_numbers_are_used_once(home, tmp_path, monkeypatch):
    """Within a run, and by different stages of one seed, but for the order of the data."""
    encode(home, "--out", f"{tmp_path}/latents", "--flips")
    flips, every = ["--latents", tmp_path / "latents", "--data-path", home / "images"], []
    for stage in STAGES:
        calls = [watch(monkeypatch, module, "generator") for module in (model, encode_latents, train_cmt)]
        train(home, stage, tmp_path / stage, "--steps 4", *(flips if stage == "teacher" else []))
        monkeypatch.undo()
        keys = [tuple(call[1:-1]) for module in calls for call in module]
        assert len(keys) == len(set(keys)) > 10
        assert (stage == "teacher") == any("flips" in key for key in keys)
        every += [key for key in keys if "epoch" not in key]
    assert len(every) == len(set(every))


# ---- What flags do ----
@pytest.mark.parametrize("stage, flags, effect", [
    ("teacher", "--checkpoint-activations", "same"), ("teacher", "--compile", "same"),
    ("teacher", "--new-classes", "other"), ("cmt", "--solver heun", "other"),
    ("cmt", "--guidance 3", "other"), ("cmt", "--precision bf16", "near"),
    ("meanflow", "--compile --precision bf16", "near"), ("meanflow", "--derivative fd", "near"),
    ("meanflow", "--guidance 3", "other"), ("meanflow", "--eta 0", "other")])
def test_options(home, tmp_path, monkeypatch, stage, flags, effect):
    """To the weights after two steps: nothing but rounding, a little, or more. Compiled graphs are run as
    captured: no compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    start = ["--steps 2 --init", home / "teacher"]
    train(home, stage, tmp_path / "default", *start)
    checkpoints = watch(monkeypatch, model, "checkpoint")
    train(home, stage, tmp_path / "option", *start, flags)
    assert len(checkpoints) == 6 * (flags == "--checkpoint-activations")   # two steps, three blocks
    before = model.load_network(home / "teacher")[0].state_dict()
    a, b = (state(tmp_path / out)["ema"] for out in ("default", "option"))
    moved, apart = (sum(float((a[k] - x[k]).square().sum()) for k in before) ** 0.5 for x in (before, b))
    low, high = {"same": (0, 1e-3), "near": (1e-6, 0.5), "other": (1e-3, 1e9)}[effect]
    assert low * moved <= apart <= high * moved


def test_a_seed_gives_the_first_weights(home, tmp_path):
    for seed in "01":
        train(home, "teacher", tmp_path / seed, "--lr 0 --lr-final 0 --steps 1 --seed", seed)
    one, other = (state(tmp_path / seed)["ema"]["s_embedder.proj.weight"] for seed in "01")
    assert not torch.equal(one, other)


# ---- The step, the average, the log ----
@pytest.mark.parametrize("clip", [0, 0.01])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_replayed(home, tmp_path, monkeypatch, stage, clip):
    """From a state to the next: AdamW with betas (0.9, 0.95) and no weight decay, on the gradient clipped to
    --clip (0: not at all), at a rate that is constant until --decay-from; average <- ema average + (1 - ema)
    net, without a graph, which would grow step by step. The states give the gradient: m' = 0.9 m + 0.1 g."""
    saves = watch(monkeypatch, STAGES[stage], "save_state")
    train(home, stage, tmp_path / "out", f"--steps 5 --save-every 1 --ema 0.8 --clip {clip} --decay-from 0.5",
          "--lr-final 5e-4")
    lines, states = log(tmp_path / "out"), [state(tmp_path / "out", step) for step in range(1, 6)]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 1e-3, 1e-3, 8.33333e-4, 5e-4])
    assert not any(p.requires_grad for call in saves for p in call[4].parameters())
    trained = states[0]["optimizer/exp_avg"].keys()
    assert states[0]["net"].keys() == states[0]["ema"].keys() > trained

    def flat(state):
        return [torch.cat([state[part][name].double().flatten() for name in trained])
                for part in ("net", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq")]
    for step in range(1, 5):
        (net, ema, m, v), (net_after, ema_after, m_after, _) = flat(states[step - 1]), flat(states[step])
        p, norm = net.clone().requires_grad_(), lines[step]["grad_norm"]
        p.grad = (m_after - 0.9 * m) / 0.1
        assert p.grad.norm().item() == pytest.approx(min(clip or norm, norm), rel=1e-4)
        assert norm > 0.02
        optimizer = torch.optim.AdamW([p], lr=lines[step]["lr"], betas=(0.9, 0.95), weight_decay=0.0)
        optimizer.state[p] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        # Weight decay of 0.01 would take 1e-5 of a weight at this learning rate.
        torch.testing.assert_close(net_after, p.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ema_after, 0.8 * ema + 0.2 * net_after, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("last, mean, kept", [(2.0, 3, 1), (float("nan"), None, 0)])
def test_the_gradients_norm_in_the_log(home, tmp_path, monkeypatch, last, mean, kept):
    """grad_norm is the mean, grad_norm_max the largest finite one; one that is not finite ends the run,
    unsaved. Of mean squares the log has roots of means."""
    norms = [9.0, 1.0, 6.0, last]

    def loss(v, z, eps, t, y):
        return v(z, t, y).mean(), {"ms_x": torch.tensor(len(norms) + 5.0)}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(norms.pop(0)))
    monkeypatch.setattr(train_teacher, "flow_matching_loss", loss)
    try:
        train(home, "teacher", tmp_path, "--steps 4 --log-every 4 --save-every 4")
    except model.InputError as error:
        assert "not finite" in str(error)
    line = log(tmp_path)[-1]
    assert (line["grad_norm"], line["grad_norm_max"], len(model.states_of(tmp_path))) == (mean, 6, kept)
    assert line["rms_x"] == pytest.approx(7 ** 0.5, rel=1e-5)     # of 8, 7 and 6
