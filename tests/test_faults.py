"""Nothing lost, nothing wrong in silence: when something is damaged, in the way, or ends a stage."""
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from runs import STAGES, arguments, complain, lively, run_on, save_network, train

import model
import train_teacher

TWO = "--steps 2 --save-every 1"


@pytest.fixture
def run(home, tmp_path):
    """A teacher's finished run of two steps, with a state of each."""
    train(home, "teacher", tmp_path / "run", TWO)
    return tmp_path / "run"


def refuses(words, home, stage, out, *more):
    """The run is refused with these words in one line, and nothing has changed."""
    def files():
        return {path: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}
    before = files()
    with pytest.raises(model.InputError, match=words) as error:
        train(home, stage, out, *more)
    assert "\n" not in str(error.value) and before == files()


# ---- States ----
def test_states_that_are_kept(home, run):
    """Of exact names: a copy under one's own is neither taken nor removed, nor does it make others go."""
    mine = {"state_best.safetensors", "state_00000009.safetensors.bak", ".important.tmp"}
    for name in mine:
        shutil.copy(run / "state_00000001.safetensors", run / name)
    train(home, "teacher", run, "--steps 7 --save-every 1 --keep 2 --keep-every 3")
    assert list(model.states_of(run)) == [7, 6, 3]
    train(home, "teacher", run, "--steps 7 --keep 1")    # killed before it pruned, say
    others = {"state_00000007.safetensors", "log.jsonl", "run.json", ".lock"}
    assert {path.name for path in run.iterdir()} == mine | others


@pytest.mark.parametrize("how", ["ema", "net", "cut"])
def test_a_state_that_cannot_be_read_stops_the_run(home, run, how):
    """It is named, nothing is changed, no older one is taken. Who reads the average alone checks it alone."""
    newest = run / "state_00000002.safetensors"
    content = bytearray(newest.read_bytes())
    if how == "cut":
        newest.write_bytes(content[:5000])
    else:
        end = 8 + int.from_bytes(content[:8], "little")
        places = {name.split("/")[0]: place for name, place in json.loads(content[8:end]).items()}
        content[end + places[how]["data_offsets"][0]] ^= 1
        newest.write_bytes(content)
        assert how == "ema" or model.load_network(run)
    words = "cannot read .*00000002" if how == "cut" else "00000002.* is damaged"
    refuses(words, home, "teacher", run, "--steps 3")


def test_files_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """Written, fsync, renamed. A full disk is one line, and leaves nothing."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(f"{a} -> {b}"))
    model.write_atomically(tmp_path / "x", lambda file: file.write(b"content"))
    half = tmp_path / ".x.tmp"
    assert calls == [f"{half}", f"{half} -> {tmp_path}/x"] and half.read_bytes() == b"content"

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(model.InputError, match="No space left.*make space"):
        model.write_atomically(tmp_path / "y", full)
    assert list(tmp_path.iterdir()) == [half]


def test_reading_a_log(tmp_path):
    """Of a step that was made again the last line; one that was cut is passed over, the next is not."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n'
                                        '{"step": 3, "lo{"step": 2, "loss": 4}\n{"step": 3, "l')
    assert model.read_log(tmp_path) == [{"step": 1, "loss": 3}, {"step": 2, "loss": 4}]


# ---- Other work ----
def test_a_folder_of_others_is_refused(home, run, tmp_path):
    """With anything in it, or with a run of other settings. One without states, of these settings, begins anew."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    for out in ("file", "notes"):
        refuses("something else.*empty or new", home, "teacher", tmp_path / out)
    refuses("00000002.* holds other work .seed: 0 there, 1 now", home, "teacher", run, TWO, "--seed 1")
    for path in run.glob("state_*"):
        path.unlink()
    refuses("holds other work .seed", home, "teacher", run, TWO, "--seed 1")
    train(home, "teacher", run, TWO)
    assert [line["step"] for line in model.read_log(run)] == [1, 2]


@pytest.mark.parametrize("stage", STAGES)
def test_other_inputs_are_refused(home, tmp_path, stage):
    """They are known by what they hold, not by where they lie."""
    world, guided = Path(shutil.copytree(home, tmp_path / "world")), []
    if stage != "teacher":
        guided = ["--guidance 2 --weak-teacher", world / "start"]
    train(world, stage, world / "run", TWO, *guided)

    def refused(words, *more):
        refuses(words, world, stage, world / "run", TWO, *guided, *more)
    refused("time_shift: 3.0 there, 4.0 now", "--time-shift 4")
    if stage != "teacher":
        save_network(world / "start", lively(seed=1), {}, None)
        refused("sha256 of weak teacher")
        train(world, "teacher", world / "teacher", "--steps 9 --init", world / "start")
        refused("sha256 of teacher")
    if stage != "cmt":    # other latents of the same statistics
        shard = world / "latents" / "shard_00000.safetensors"
        parts, about, _ = model.read_tensors(shard)
        parts[""]["latents"] = parts[""]["latents"].flip(0)
        model.write_tensors(shard, parts, about)
        refused("sha256 of latents")


def test_a_second_process_is_refused(home, tmp_path):
    model.lock(tmp_path / ".lock")
    argv = arguments(home, "teacher", tmp_path, "--init", home / "teacher")
    assert f"process {os.getpid()} on {os.uname().nodename}" in complain("train_teacher.py", *argv)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# ---- Environments, signals, errors ----
def test_tasks_of_srun_are_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(model.InputError, match="let each node run torchrun"):
        model.launch()
    monkeypatch.setenv("RANK", "0")    # as other launchers than torchrun
    assert model.launch()[1:] == (0, 1)


def disagreeing(argv):
    with pytest.raises(model.InputError, match="not all processes have the same state, flags"):
        train_teacher.main([*argv, "--seed", os.environ["RANK"]])


def test_processes_of_other_work_are_refused(home, tmp_path):
    run_on(2, disagreeing, arguments(home, "teacher", tmp_path))


def signalled(argv):
    """One of two processes gets a signal in its second step: both save and stop, with the signal's status."""
    loss, calls = train_teacher.flow_matching_loss, []
    if os.environ["RANK"] == "1":
        train_teacher.flow_matching_loss = lambda *x: (
            calls.append(x) or len(calls) == 2 and os.kill(os.getpid(), signal.SIGTERM) or loss(*x))
    with pytest.raises(SystemExit) as end:
        train_teacher.main(argv)
    assert end.value.code == 128 + signal.SIGTERM


def test_signals_save_and_stop(home, tmp_path):
    run_on(2, signalled, arguments(home, "teacher", tmp_path))
    assert list(model.states_of(tmp_path)) == [2]


def test_signals_of_nohup_are_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with model.stop_signals() as stopped:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopped() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("error, status, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "--checkpoint-activations"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed"), 2, "another process is lost"),
    (RuntimeError("shapes cannot be multiplied"), None, "")], ids=range(3))
def test_errors_are_one_line(monkeypatch, capsys, error, status, words):
    def fail():
        raise error
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda errors: None, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit if status else RuntimeError) as end:    # a bug keeps its traceback
        model.command(fail)
    said = capsys.readouterr().err
    assert not status or end.value.code == status and len(said.splitlines()) == 1 and words in said
