"""Splitting and going on change nothing; what a run leaves behind and may change."""
import functools
import json

import pytest
import torch
from runs import STAGES, about, arguments, close, log, run_on, state, train, train_on, weights

import model
import train_meanflow

TIMES = {"seconds", "samples_per_second"}


def same_log(a, b):
    """To the log's six digits."""
    for one, other in zip(model.read_log(a), model.read_log(b), strict=True):
        names = one.keys() - TIMES
        assert {name: other[name] for name in names} == {name: pytest.approx(one[name], rel=5e-5, abs=1e-9) for name in names}


@pytest.mark.parametrize("stage", STAGES)
def test_splitting_changes_nothing(home, tmp_path, stage):
    """Micro-batches, and two processes (Gloo) with micro-batches: the log of one process, weights to 1e-5."""
    train(home, stage, tmp_path / "one")
    train(home, stage, tmp_path / "micro", "--micro-batch", "4")
    train_on(2, home, stage, tmp_path / "two", "--micro-batch", "4")
    for other in ("micro", "two"):
        assert close(weights(tmp_path / "one"), weights(tmp_path / other), 1e-5)
        same_log(tmp_path / "one", tmp_path / other)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_gone_on_is_bit_identical(home, tmp_path, stage):
    """The states of steps 5 and 6 are gone, say, when the same command is repeated: it ends as the undisturbed run."""
    train(home, stage, tmp_path / "whole")
    train(home, stage, tmp_path / "parts", "--save-every", "1", "--keep", "3")
    for step in (5, 6):
        (tmp_path / f"parts/state_0000000{step}.safetensors").unlink()
    train(home, stage, tmp_path / "parts", "--save-every", "1")
    a, b = (state(tmp_path / run, 6) for run in ("whole", "parts"))
    assert a.keys() == b.keys() == {"ema", "net", "optimizer/exp_avg", "optimizer/exp_avg_sq", "stats"}
    assert all(a[part].keys() == b[part].keys() and torch.equal(a[part][k], b[part][k]) for part in a for k in a[part])
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 5, 6]        # it only grows
    a, b = ([(line["step"], line["loss"]) for line in model.read_log(tmp_path / run)] for run in ("whole", "parts"))
    assert a == b


def compiled(argv):
    """Stage 3, its graphs captured and run as they are."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    train_meanflow.main(argv)


def test_two_processes_go_on_as_one_and_back(home, tmp_path):
    """Step 2 with two processes, 4 with one, 6 with two compiled ones, which DDP splits at its buckets: the run of one, to 1e-5."""
    train(home, "meanflow", tmp_path / "whole")
    parts = tmp_path / "parts"
    train_on(2, home, "meanflow", parts, "--save-every", "2")
    for path in parts.glob("state_0000000[46]*"):
        path.unlink()
    train(home, "meanflow", parts, "--save-every", "2", "--micro-batch", "8")
    (parts / "state_00000006.safetensors").unlink()
    run_on(2, compiled, arguments(home, "meanflow", parts, "--save-every", "2", "--compile", "--checkpoint-activations"))
    same_log(tmp_path / "whole", parts)
    assert close(weights(tmp_path / "whole"), weights(parts), 1e-5)


def test_what_a_run_leaves_behind(home, tmp_path, capsys):
    run, said = json.loads((home / "cmt" / "run.json").read_text()), about(home / "cmt")
    assert run["settings"]["teacher"] == f"{home}/teacher" and {"command", "torch", "host", "device", "date"} <= run.keys()
    assert {"step", "loss", "mse", "grad_norm", "lr", "samples_per_second", "seconds"} <= log(home / "cmt")[0].keys()
    assert (said["kind"], said["time_shift"], said["classes"]) == ("student", 3, ["class0", "class1", "class2"])
    train(home, "teacher", tmp_path / "out")
    train(home, "teacher", tmp_path / "out", "--steps", "8", "--lr", "1e-4", "--lr-final", "1e-5", "--clip", "0.5")
    assert "--steps was 6: the learning rate now falls over 8" in capsys.readouterr().out
    assert log(tmp_path / "out")[-1]["lr"] == pytest.approx(1e-5)                 # reached at the last step


def test_what_is_not_finite_is_not_saved(home, tmp_path):
    """Neither a run's, nor the average alone, in which one overflow of the weights stays."""
    with pytest.raises(model.InputError, match="not finite.*--lr"):
        train(home, "teacher", tmp_path / "out", "--lr", "1e30", "--lr-final", "1e30", "--save-every", "100")
    for which in (0, 1):
        nets = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
        nets[which].weight.data[0, 0] = float("inf")
        with pytest.raises(model.InputError, match="weights are not finite at step 7; not saved"):
            model.save_state({"settings": {"out": tmp_path}, "stats": {}}, 7, 0.0, *nets, torch.optim.AdamW(nets[0].parameters()))
    assert not list(tmp_path.rglob("state_*"))
