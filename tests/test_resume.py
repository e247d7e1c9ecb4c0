"""Splitting, going on and kills change nothing; what is not finite is not saved."""
import functools
import subprocess
import sys

import pytest
import torch
from runs import ROOT, STAGES, arguments, log, run_on, state, train

import model
import train_meanflow


def compiled(argv):
    """Stage 3, its graphs captured and run as they are: no compiler is needed."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    train_meanflow.main([*argv, "--compile", "--checkpoint-activations"])


@pytest.mark.parametrize("stage", STAGES)
def test_splitting_changes_nothing(home, tmp_path, stage):
    """Micro-batches, and two processes (Gloo) with micro-batches, from one's state and compiled in stage 3,
    which DDP splits at its buckets: weights to 1e-5, log to 3e-4 (compiled sums round otherwise, and AdamW's
    first steps divide by small gradients: 7e-5 was seen)."""
    train(home, stage, tmp_path / "one")
    train(home, stage, tmp_path / "micro", "--micro-batch 4")
    train(home, stage, tmp_path / "two")
    (tmp_path / "two" / "state_00000006.safetensors").unlink()
    run_on(2, compiled if stage == "meanflow" else STAGES[stage].main,
           arguments(home, stage, tmp_path / "two", "--micro-batch", "4"))
    one = state(tmp_path / "one")["ema"]
    size = sum(float(x.square().sum()) for x in one.values())
    for name in ("micro", "two"):
        other = state(tmp_path / name)["ema"]
        assert sum(float((one[k] - other[k]).square().sum()) for k in one) < 1e-10 * size
        for a, b in zip(model.read_log(tmp_path / "one"), model.read_log(tmp_path / name), strict=True):
            numbers = {k: x for k, x in a.items() if k not in ("seconds", "samples_per_second")}
            assert {k: b[k] for k in numbers} == pytest.approx(numbers, rel=3e-4, abs=1e-9)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_gone_on_is_bit_identical(home, tmp_path, stage):
    """The states of steps 5 and 6 are gone when the command is repeated: it ends as the undisturbed run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(home, stage, whole)
    train(home, stage, parts, "--save-every 1")
    for step in (5, 6):
        (parts / f"state_0000000{step}.safetensors").unlink()
    train(home, stage, parts, "--save-every 1")
    a, b = state(whole), state(parts)
    assert a.keys() == b.keys() == {"ema", "net", "optimizer/exp_avg", "optimizer/exp_avg_sq", "stats"}
    assert all(a[part].keys() == b[part].keys() for part in a)
    assert all(torch.equal(a[part][name], b[part][name]) for part in a for name in a[part])
    assert [line["step"] for line in log(parts)] == [1, 2, 3, 4, 5, 6, 5, 6]    # it only grows
    a, b = (model.read_log(out) for out in (whole, parts))
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    assert sorted(line["seconds"] for line in b) == [line["seconds"] for line in b]     # of all training
    about = model.load_network(whole)[1]
    kind = "teacher" if stage == "teacher" else "student"
    assert (about["kind"], about["time_shift"], about["classes"]) == (kind, 3, ["class0", "class1", "class2"])


def test_killed_and_repeated():
    """A selection of kill points, in a process of its own, which has one thread and can be forked."""
    scripts = [f"train_{stage}.py" for stage in STAGES]
    scripts += ["encode_latents.py", "sample.py", "eval_fid.py --out"]
    argv = [sys.executable, ROOT / "tests/benchmarks/kill_points.py", "--quick", "19", "--scripts", *scripts]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("`") == 2 * len(scripts), done.stdout + done.stderr


def test_what_is_not_finite_is_not_saved(home, tmp_path):
    """Neither a run's, nor the average alone, in which one overflow of the weights stays."""
    with pytest.raises(model.InputError, match="not finite.*--lr"):
        train(home, "teacher", tmp_path / "out", "--lr 1e30 --lr-final 1e30 --save-every 100")
    for which in (0, 1):
        nets = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        nets[which].weight.data[0, 0] = float("inf")
        about = {"settings": {"out": tmp_path}, "stats": {}}
        with pytest.raises(model.InputError, match="weights are not finite at step 7; not saved"):
            model.save_state(about, 7, 0.0, *nets, torch.optim.AdamW(nets[0].parameters()))
    assert not list(tmp_path.rglob("state_*"))
