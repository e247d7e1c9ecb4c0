"""Splitting and resuming change nothing; what a run leaves behind, keeps and may change; signals."""
import functools
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT, STAGES, arguments, close, log, run_on, train, train_on, weights

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


def test_what_a_run_leaves_behind(home):
    run = json.loads((home / "cmt" / "run.json").read_text())
    assert run["settings"]["teacher"] == f"{home}/teacher" and {"command", "torch", "host", "device", "date"} <= run.keys()
    assert {"step", "loss", "mse", "grad_norm", "lr", "samples_per_second", "seconds"} <= log(home / "cmt")[0].keys()
    config = json.loads((home / "cmt" / "config.json").read_text())
    assert config["kind"] == "student" and config["time_shift"] == 3 and config["classes"] == ["class0", "class1", "class2"]


def test_what_a_resumed_run_may_change(home, tmp_path):
    train(home, "teacher", tmp_path / "out")
    train(home, "teacher", tmp_path / "out", "--resume", "--steps", "8", "--lr", "1e-4", "--lr-final", "1e-5", "--clip", "0.5")
    assert log(tmp_path / "out")[-1]["lr"] == pytest.approx(1e-5)                 # reached at the last step
    with pytest.raises(model.InputError, match="holds other work.*seed: 0 there, 1 now"):
        train(home, "teacher", tmp_path / "out", "--resume", "--seed", "1")


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
