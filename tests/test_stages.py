"""What the stages train on and with: draws, labels, times, flags, starts, pools; the optimizer's step, the average, the log."""
import contextlib
import functools
import re
import time

import pytest
import torch
from runs import STAGES, let_go, lively, log, state, train, watch, weights

import encode_latents
import model
import train_cmt
import train_meanflow
import train_teacher


# ---- Networks ----
def test_the_student_starts_as_the_teacher(home, tmp_path, capsys):
    """Away from the zero initialization, where all would agree."""
    teacher, student = (model.load_network(lively(home, tmp_path), kind)[0] for kind in ("teacher", "student"))
    assert "r_embedder.W" in capsys.readouterr().out
    z, t, y = torch.randn(4, 12, 4, 4), torch.tensor([1, 0.8, 0.5, 0.1]), torch.arange(4)
    for s in (t, t / 2, 0 * t):
        assert torch.equal(student(z, t, y, s), teacher(z, t, y))


def test_initialization():
    """AdaLN-Zero, Xavier-uniform embeddings of patches, N(0, 0.02) for labels and the time's MLP (METHOD, section 3). Under autocast the
    residual streams stay in float32."""
    torch.manual_seed(0)
    net = model.DiTDH(4, 64, (96, 160), (2, 1), (3, 5), 500, time_difference=True)
    zero = [p for name, p in net.named_parameters() if re.search(r"adaLN|final_layer.linear|r_embedder.mlp.2|embedder.proj.bias", name)]
    assert len(zero) == 14 and not any(p.any() for p in zero)
    for p, std in ((net.s_embedder.proj.weight, (2 / 160) ** 0.5), (net.x_embedder.proj.weight, (2 / 224) ** 0.5),
                   (net.y_embedder.embedding_table.weight, 0.02), (net.t_embedder.mlp[0].weight, 0.02), (net.t_embedder.mlp[2].weight, 0.02)):
        assert p.std().item() == pytest.approx(std, rel=0.03)
    assert net.t_embedder.W.std().item() == pytest.approx(1, rel=0.1) and not net.t_embedder.W.requires_grad
    assert not torch.equal(net.t_embedder.W, net.r_embedder.W) and net.r_embedder.mlp[0].weight.any()
    seen, t = [], torch.rand(2)
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 64, 4, 4), t, torch.tensor([0, 1]), t)
    assert seen == 6 * [torch.float32]


# ---- What they train on ----
def is_normalized(z):
    """Data of 36 images, seen some 57 times each: mean 0 and variance 1 for each channel and position."""
    return z.mean(0).abs().max() < 0.1 and (z.var(0) - 1).abs().max() < 0.15


def test_what_the_teacher_trains_on(home, tmp_path, monkeypatch):
    """t: one shifted draw, whose mean at a = 3 is 3/2 - 3/4 ln 3 = 0.676."""
    calls = watch(monkeypatch, train_teacher, "flow_matching_loss")
    train(home, "teacher", tmp_path / "out", "--steps", "1", "--batch-size", "2048", "--micro-batch", "2048")
    (_, z_0, eps, t, y, _), = calls
    assert t.mean() == pytest.approx(0.676, abs=0.02) and 0 <= t.min() and t.max() <= 1 and abs(eps.std() - 1) < 0.02
    assert 0.07 < (y == 3).float().mean() < 0.13 and y.unique().tolist() == [0, 1, 2, 3] and is_normalized(z_0)


def test_what_meanflow_trains_on(home, tmp_path, monkeypatch):
    """Every fourth row has s < t, the others s = t, t being the larger of two shifted draws; labels dropped once; eta's schedule; z_0."""
    calls, shifts = watch(monkeypatch, train_meanflow, "meanflow_loss"), watch(monkeypatch, train_meanflow, "time_shift")
    train(home, "meanflow", tmp_path / "out", "--steps", "3", "--batch-size", "2048", "--micro-batch", "1024", "--time-shift", "6.93")
    assert len(calls) == 6
    for i, (_, _, _, eps, t, y, s, eta, *_, more) in enumerate(calls):
        assert more["rows"] == slice(None, None, 4)
        assert (s[::4] < t[::4]).all() and all(torch.equal(s[k::4], t[k::4]) for k in (1, 2, 3))
        assert t.mean() == pytest.approx(0.90, abs=0.02) and s[::4].mean() < 0.8                  # METHOD: mean t 0.90
        assert 0.06 < (y == 3).float().mean() < 0.14 and y.unique().tolist() == [0, 1, 2, 3]
        assert eta == pytest.approx(1 - 0.25 * (i // 2))                                          # 1 to 0.5 over three steps
        assert eps.mean().abs() < 0.02 and abs(eps.std() - 1) < 0.02
    assert is_normalized(torch.cat([calls[0][2], calls[1][2]]))
    assert not torch.equal(calls[0][3], calls[1][3]) and not torch.equal(calls[0][3], calls[2][3])
    train(home, "meanflow", tmp_path / "own", "--steps", "1")
    assert shifts[-1][1] == 3.0                   # without --time-shift: the student's, and not what its latents' shape says, 1


def test_trajectory_pool(home):
    """Pairs are points of the teacher's own trajectories at their true times, and no older than the pool's age."""
    teacher, about = model.load_network(home / "teacher")
    times, solved = model.ode_times(4, about["time_shift"]), []

    def solve(z, y):
        solved.append((len(z), torch.is_grad_enabled()))
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
    assert solved == 3 * 4 * [(4, False)]         # three times all 16: a trajectory per group and step
    again = new_pool()
    again.draw(19, (0, 16))
    assert torch.equal(again.points, pool.points) and torch.equal(again.y, pool.y)                # what a run that goes on rebuilds
    assert torch.equal(new_pool(range(1, 2)).draw(19, (8, 16))[0], pool.draw(19, (0, 16))[0][8:])         # another process's part


def test_what_cmt_trains_on(home, tmp_path, monkeypatch):
    """All pairs of points of the teacher's trajectories for their labels, at the true, shifted times; labels dropped."""
    teacher, pools = model.load_network(lively(home, tmp_path / "teacher"))[0], []
    make = train_cmt.TrajectoryPool
    monkeypatch.setattr(train_cmt, "TrajectoryPool", lambda *args, **more: pools.append(make(*args, **more)) or pools[0])
    calls = watch(monkeypatch, train_cmt, "consistency_loss")
    train(home, "cmt", tmp_path / "out", *f"--steps 9 --teacher {tmp_path}/teacher --teacher-steps 5 --time-shift 2.5 --batch-size 256 "
          "--micro-batch 256 --label-dropout 0.4".split())
    pool, times = pools[0], torch.tensor(model.ode_times(5, 2.5))
    assert torch.equal(pool.times, times) and len(times) == 6 and times[-1] == 0
    with torch.no_grad():                         # Euler's step by hand, with the pool's labels
        step = pool.points[:, 3] - (times[3] - times[4]) * teacher(pool.points[:, 3], times[3].repeat(256), pool.y)
    assert torch.allclose(step, pool.points[:, 4], atol=1e-5)
    t, y, s = (torch.cat([call[k] for call in calls]) for k in (3, 4, 5))
    assert set(zip(t.tolist(), s.tolist(), strict=True)) == {(a, b) for a in times.tolist() for b in times.tolist() if a > b}
    assert len(pool.points[:, 0].flatten(1).unique(dim=0)) == 32 * 8 and pool.era == 1            # each trajectory another noise
    assert 0.3 < (y == 3).float().mean() < 0.5 and len(y.unique()) == 4           # 3 is 'no label'; a few hundred trajectories
    assert sum(len(group.unique()) > 1 for group in calls[0][4].split(8)) > 16    # a group's pairs are of several trajectories


def test_keys_of_random_numbers_are_used_once(home, tmp_path, monkeypatch):
    """Within a run, and by different stages of one seed; the order of the data alone is that of both that see it."""
    latents, keys_of, original = tmp_path / "latents", {}, model.generator
    encode_latents.main(["--data-path", f"{home}/images", "--out", str(latents), "--encoder", f"{home}/encoder", "--flips",
                         *"--image-size 16 --encoder-size 16 --workers 0".split()])
    let_go()
    for stage, more in (("teacher", ["--latents", latents, "--data-path", home / "images"]), ("cmt", []), ("meanflow", [])):
        keys = []
        for module in (model, encode_latents, train_cmt):
            monkeypatch.setattr(module, "generator", lambda device, *key, keys=keys: keys.append(key) or original(device, *key))
        train(home, stage, tmp_path / stage, "--steps", "4", *more)
        assert len(keys) == len(set(keys)) > 10 and ({"epoch", "flips"} < {x for key in keys for x in key}) == (stage == "teacher")
        keys_of[stage] = {key for key in keys if "epoch" not in key and "flips" not in key}
    assert len(set.union(*keys_of.values())) == sum(map(len, keys_of.values()))
    assert {len([x for x in key if isinstance(x, str)]) for key in set.union(*keys_of.values())} == {1}


# ---- Flags ----
def test_flags_reach_the_loss(home, tmp_path, monkeypatch):
    """Derivative, step, weight: as given, not as by default; and the network is given the labels of the loss, dropped once."""
    forward, seen = model.DiTDH.forward, []
    monkeypatch.setattr(model.DiTDH, "forward", lambda self, z, t, y, s=None: seen.append((y, s)) or forward(self, z, t, y, s))
    calls = watch(monkeypatch, train_meanflow, "meanflow_loss")
    train(home, "meanflow", tmp_path / "out", *"--steps 1 --batch-size 256 --micro-batch 256 --label-dropout 0.5 --derivative fd-central "
          "--delta-t 0.02 --loss-form published --loss-power 0.25 --loss-eps 7".split())
    (*_, y, _, _, derivative, delta_t, form, power, loss_eps, _), = calls
    assert (derivative, delta_t, form, power, loss_eps) == ("fd-central", 0.02, "published", 0.25, 7.0)
    assert [labels.tolist() for labels, s in seen if s is not None] == [y.tolist(), y[::4].repeat(2).tolist()]


def test_defaults_are_the_papers():
    """What a run without flags does: METHOD's numbers at 256 px."""
    same = dict(lr=1e-4, clip=1.0, label_dropout=0.1, guidance=1.0, weak_teacher=None, decay_from=0.0)
    cmt, meanflow = (vars(script.parse_args([])).items() for script in (train_cmt, train_meanflow))
    assert cmt >= (same | dict(steps=27_000, batch_size=512, pairs=64, teacher_steps=16, solver="euler", ema=0.999)).items()
    assert dict(meanflow)["eta"] == [1.0] and (same | dict(steps=180_000, batch_size=256, delta_t=0.005, ema=0.9999)).items() <= {
        x for x in meanflow if x[0] != "eta"}


OPTIONS = [("cmt", "--solver heun", "other"), ("meanflow", "--eta 0", "other"), ("cmt", "--guidance 3", "other"),
           ("meanflow", "--guidance 3", "other"), ("meanflow", "--derivative fd", "near"), ("meanflow", "--precision bf16 --derivative fd", "near"),
           ("teacher", "--compile", "same"), ("cmt", "--compile", "same"), ("meanflow", "--compile --precision bf16", "near"),
           *((stage, "--checkpoint-activations", "same") for stage in STAGES), *((stage, "--precision bf16", "near") for stage in STAGES)]


@pytest.mark.parametrize("stage, flags, effect", OPTIONS, ids=[f"{stage} {flags}" for stage, flags, _ in OPTIONS])
def test_options(home, tmp_path, monkeypatch, stage, flags, effect):
    """What a flag does to the weights after two steps: nothing but rounding, a little, or more. Compiled: graphs captured and run as
    they are, so that no compiler is needed. Autocast reaches every evaluation, the teacher's, too; blocks are checkpointed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    lively(home, tmp_path / "start")
    start = ["--steps", "2", "--init", tmp_path / "start"] + (["--teacher", tmp_path / "start"] if stage != "teacher" else [])
    train(home, stage, tmp_path / "default", *start)
    checkpoints, forward, casts = watch(monkeypatch, model, "checkpoint"), model.DiTDH.forward, set()
    if "--compile" not in flags:
        monkeypatch.setattr(model.DiTDH, "forward", lambda *x: casts.add((len(x) > 4 and x[4] is not None, torch.is_autocast_enabled("cpu"))) or forward(*x))
    train(home, stage, tmp_path / "option", *start, *flags.split())
    if "fd" not in flags and casts:
        assert {cast for _, cast in casts} == {"bf16" in flags} and len(casts) == 1 + (stage != "teacher" and "--eta" not in flags)
    assert len(checkpoints) == 6 * ("--checkpoint-activations" in flags)          # two steps, three blocks
    a, b, before = weights(tmp_path / "default"), weights(tmp_path / "option"), weights_of(tmp_path / "start")
    moved, apart = (sum(float((a[k] - x[k]).square().sum()) for k in before) ** 0.5 for x in (before, b))
    assert {"same": apart < 1e-3 * moved, "near": 1e-6 < apart / moved < 0.5, "other": apart > 1e-3 * moved}[effect], apart / moved


def weights_of(source):
    return model.load_network(source)[0].state_dict()


def test_fine_tuning_and_seeds(home, tmp_path):
    """From a teacher's weights, with its label table or a new one, without a step that moves them; anew by --seed."""
    still, new = ["--lr", "0", "--lr-final", "0", "--steps", "1"], ["--init", home / "teacher", "--new-classes"]
    for name, more in (("same", new[:2]), ("new", new), ("anew", []), ("again", []), ("seed", ["--seed", "1"])):
        train(home, "teacher", tmp_path / name, *still, *more)
    before, same, new, anew, again, seed = (weights(out) for out in (home / "teacher", *(tmp_path / x for x in "same new anew again seed".split())))
    assert [{k for k in before if not torch.equal(x[k], before[k])} for x in (same, new)] == [set(), {"y_embedder.embedding_table.weight"}]
    assert all(torch.equal(anew[k], again[k]) for k in anew) and not torch.equal(anew["s_embedder.proj.weight"], seed["s_embedder.proj.weight"])


# ---- The step, the average, the log ----


@pytest.mark.parametrize("clip", [0.01, 100])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_replayed(home, tmp_path, stage, clip):
    """From a state to the next: AdamW with betas (0.9, 0.95) and no weight decay, on the gradient clipped to --clip; then average <- ema
    average + (1 - ema) net, which is what is read. The states give the gradient: m' = 0.9 m + 0.1 g."""
    start, out = [] if stage == "teacher" else ["--teacher", lively(home, tmp_path / "teacher")], tmp_path / "out"
    train(home, stage, out, "--steps", "4", "--save-every", "1", "--ema", "0.8", "--clip", clip, "--decay-from", "0", "--lr-final", "5e-4",
          *start)
    lines, trained = log(out), state(out)["optimizer/exp_avg"].keys()
    assert all(0.02 < line["grad_norm"] < 50 for line in lines)                   # all are clipped, or none
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 8.33333e-4, 6.66667e-4, 5e-4])

    def flat(step):
        parts = state(out, step)
        assert parts["net"].keys() == parts["ema"].keys() > trained == parts["optimizer/exp_avg_sq"].keys()
        return [torch.cat([parts[part][name].double().flatten() for name in trained])
                for part in ("net", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq")]
    for step in (2, 3, 4):
        (net, ema, m, v), (net_after, ema_after, m_after, v_after), line = flat(step - 1), flat(step), lines[step - 1]
        p = net.clone().requires_grad_()
        p.grad = (m_after - 0.9 * m) / 0.1
        assert p.grad.norm().item() == pytest.approx(min(clip, line["grad_norm"]), rel=1e-4)
        optimizer = torch.optim.AdamW([p], lr=line["lr"], betas=(0.9, 0.95), weight_decay=0.0)
        optimizer.state[p] = {"step": torch.tensor(step - 1.0), "exp_avg": m, "exp_avg_sq": v}
        optimizer.step()
        torch.testing.assert_close(v_after, optimizer.state[p]["exp_avg_sq"], rtol=1e-4, atol=1e-6 * v_after.max().item())
        # Weight decay of 0.01 would take 1e-5 of a weight at this learning rate.
        torch.testing.assert_close(net_after, p.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ema_after, 0.8 * ema + 0.2 * net_after, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(x, weights(out)[name]) for name, x in weights_of(out).items())


@pytest.mark.parametrize("stage", STAGES)
def test_the_rate_and_the_average(home, tmp_path, monkeypatch, stage):
    """The rate is constant until --decay-from; the average has no graph, which would grow with every step and never be freed."""
    save, seen = STAGES[stage].save_state, []
    monkeypatch.setattr(STAGES[stage], "save_state", lambda *x: seen.extend(p.requires_grad for p in x[4].parameters()) or save(*x))
    train(home, stage, tmp_path, "--steps", "8", "--decay-from", "0.5", "--lr-final", "1e-4")
    assert [line["lr"] for line in log(tmp_path)] == pytest.approx(5 * [1e-3] + [7e-4, 4e-4, 1e-4])
    assert len(seen) > 6 and not any(seen)


def test_the_gradients_norm_in_the_log(home, tmp_path, monkeypatch):
    """grad_norm is the mean, grad_norm_max the largest finite one; one that is not finite ends the run, unsaved, whatever the loss is.
    Of mean squares the log has roots of means."""
    norms, flags = [], ["--steps", "4", "--log-every", "4", "--save-every", "4"]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(norms.pop(0)))
    monkeypatch.setattr(train_teacher, "flow_matching_loss", lambda v, z, eps, t, y: (v(z, t, y).mean(), {"ms_x": t.new_tensor(len(norms) + 5.)}))
    for last, wanted in ((2.0, (3, 6)), (float("nan"), (None, 6))):
        norms[:] = [9.0, 1.0, 6.0, last]
        with contextlib.nullcontext() if wanted[0] else pytest.raises(model.InputError, match="not finite"):
            train(home, "teacher", tmp_path / str(last), *flags)
        line = log(tmp_path / str(last))[-1]
        assert (line["grad_norm"], line["grad_norm_max"]) == wanted and line["rms_x"] == pytest.approx(7 ** 0.5, rel=1e-5)    # of 8, 7 and 6
        assert len(model.states_of(tmp_path / str(last))) == bool(wanted[0])


def test_seconds_are_of_all_training_and_not_of_saving(home, tmp_path, monkeypatch):
    loss, save, now = train_teacher.flow_matching_loss, train_teacher.save_state, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def later(function, seconds):
        return lambda *x: now.append(now.pop() + seconds) or function(*x)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", later(loss, 2))
    monkeypatch.setattr(train_teacher, "save_state", later(save, 100))
    train(home, "teacher", tmp_path, "--steps", "3", "--save-every", "1")
    train(home, "teacher", tmp_path, "--steps", "4")
    assert [line["seconds"] for line in log(tmp_path)] == [2, 4, 6, 8]
