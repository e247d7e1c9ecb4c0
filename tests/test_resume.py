"""Splitting and resuming change nothing; what a run leaves behind, keeps and may change; signals."""
import functools
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT, STAGES, about, arguments, close, log, run_on, state, train, train_on, weights

import model
import train_meanflow


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
def test_stopped_and_gone_on_is_bit_identical(home, tmp_path, stage):
    """The states of steps 5 and 6 are gone, say, when the same command is repeated: it ends as the undisturbed run."""
    train(home, stage, tmp_path / "whole")
    train(home, stage, tmp_path / "parts", "--save-every", "1", "--keep", "3")
    states = sorted((tmp_path / "parts").glob("state_*"))
    assert [p.name for p in states] == [f"state_{k:08d}.safetensors" for k in (4, 5, 6)]
    states[2].unlink()
    states[1].unlink()
    train(home, stage, tmp_path / "parts", "--save-every", "1")
    a, b = (state(tmp_path / run, 6) for run in ("whole", "parts"))
    assert a.keys() == b.keys() == {"ema", "net", "optimizer/exp_avg", "optimizer/exp_avg_sq", "stats"}
    assert all(a[part].keys() == b[part].keys() and torch.equal(a[part][k], b[part][k]) for part in a for k in a[part])
    assert [line["step"] for line in log(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6, 5, 6]        # it only grows
    a, b = ([(line["step"], line["loss"]) for line in model.read_log(tmp_path / run)] for run in ("whole", "parts"))
    assert a == b


def test_two_processes_go_on_as_one_and_back(home, tmp_path):
    """Step 2 with two processes, 4 with one and micro-batches, 6 with two again: the undisturbed run of one, to 1e-5."""
    train(home, "meanflow", tmp_path / "whole")
    parts = tmp_path / "parts"
    train_on(2, home, "meanflow", parts, "--save-every", "2")
    for path in [*parts.glob("state_0000000[46]*")]:
        path.unlink()
    train(home, "meanflow", parts, "--save-every", "2", "--micro-batch", "8")
    (parts / "state_00000006.safetensors").unlink()
    train_on(2, home, "meanflow", parts, "--save-every", "2")
    assert [line["step"] for line in model.read_log(parts)] == [1, 2, 3, 4, 5, 6]
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


def test_what_a_run_leaves_behind(home):
    run = json.loads((home / "cmt" / "run.json").read_text())
    assert run["settings"]["teacher"] == f"{home}/teacher" and {"command", "torch", "host", "device", "date"} <= run.keys()
    assert {"step", "loss", "mse", "grad_norm", "lr", "samples_per_second", "seconds"} <= log(home / "cmt")[0].keys()
    said = about(home / "cmt")
    assert said["kind"] == "student" and said["time_shift"] == 3 and said["classes"] == ["class0", "class1", "class2"]


def test_what_a_run_that_goes_on_may_change(home, tmp_path, capsys):
    train(home, "teacher", tmp_path / "out")
    train(home, "teacher", tmp_path / "out", "--steps", "8", "--lr", "1e-4", "--lr-final", "1e-5", "--clip", "0.5")
    assert "--steps was 6: the learning rate now falls over 8" in capsys.readouterr().out
    assert log(tmp_path / "out")[-1]["lr"] == pytest.approx(1e-5)                 # reached at the last step
    with pytest.raises(model.InputError, match="holds other work.*seed: 0 there, 1 now"):
        train(home, "teacher", tmp_path / "out", "--seed", "1")


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
    assert child.returncode == 128 + 15 and "the same command goes on" in rest, rest
    states = list((tmp_path / "out").glob("state_*"))
    assert len(states) == 1 and about(tmp_path / "out")["step"] == log(tmp_path / "out")[-1]["step"]
