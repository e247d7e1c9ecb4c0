"""Nothing lost, nothing wrong in silence: what stages and model.py do when something is damaged, in the way, or ends them."""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from runs import ROOT, STAGES, arguments, encode, lively, log, run_on, state, train

import model
import train_teacher

CHILD = "import runs, model, train_teacher as stage\nmodel.command(stage.main)"
TWO = ["--steps", "2", "--save-every", "1"]


def child(*argv, **more):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    return subprocess.run([sys.executable, "-c", CHILD, *argv], **{"capture_output": True, "text": True, "env": env} | more)


@pytest.fixture
def run(home, tmp_path):
    """A teacher's finished run of two steps, with a state of each."""
    train(home, "teacher", tmp_path / "run", *TWO)
    return tmp_path / "run"


def files(out):
    """Without the lock: a process that reads it gives it away."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} if out.is_dir() else out.read_bytes()


def refuses(words, home, stage, out, *more):
    """The run is refused with these words in one line, and nothing has changed."""
    before = files(out)
    with pytest.raises(model.InputError, match=words) as error:
        train(home, stage, out, *more)
    assert "\n" not in str(error.value) and before == files(out)


# ---- States ----
def test_states_that_are_kept(home, run):
    """Of exact names: a copy under one of one's own is neither taken nor removed, nor does it make others go."""
    mine = {"state_best.safetensors", "state_00000009.safetensors.bak", ".important.tmp"}
    for name in (*mine, ".state_00000002.safetensors.tmp"):                       # the last one a killed writer's
        shutil.copy(run / "state_00000001.safetensors", run / name)
    train(home, "teacher", run, "--steps", "7", "--save-every", "1", "--keep", "2", "--keep-every", "3")
    assert list(model.states_of(run)) == [7, 6, 3]
    train(home, "teacher", run, "--steps", "7", "--keep", "1")                    # killed before it pruned, say
    assert list(model.states_of(run)) == [7]
    assert {path.name for path in run.iterdir()} == mine | {"state_00000007.safetensors", "log.jsonl", "run.json", ".lock"}


def test_states_of_others_are_refused(home, run, tmp_path):
    shutil.copy(run / "state_00000001.safetensors", run / "state_00000007.safetensors")               # renamed
    refuses("00000007.* holds other work .step: 1 there, 7 now", home, "teacher", run, "--steps", "9")
    (run / "state_00000007.safetensors").unlink()
    train(home, "teacher", tmp_path / "other", *TWO, "--seed", "1")
    shutil.copy(tmp_path / "other" / "state_00000002.safetensors", run)
    refuses("00000002.* holds other work .seed: 1 there, 0 now", home, "teacher", run, "--steps", "9")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["turned", "cut", errno.EIO])
def test_a_state_that_cannot_be_read_stops_the_run(home, tmp_path, monkeypatch, stage, how):
    """For whatever reason: it is named, nothing is renamed or removed, and no older one is taken in its place."""
    train(home, stage, tmp_path / "run", *TWO)
    newest = tmp_path / "run" / "state_00000002.safetensors"
    content, opened = bytearray(newest.read_bytes()), safetensors.safe_open
    content[-5] ^= 1
    if how == errno.EIO:
        def refuse(path, *more, **how_so):
            if Path(path) == newest:
                raise OSError(how, os.strerror(how), str(path))
            return opened(path, *more, **how_so)
        monkeypatch.setattr(safetensors, "safe_open", refuse)
    else:
        newest.write_bytes(content if how == "turned" else content[:5000])
    words = "is damaged" if how == "turned" else "cannot read|incomplete|cut short"
    refuses(f"00000002.*({words})", home, stage, tmp_path / "run", "--steps", "3")


def test_damage_is_noticed_where_it_is_read(home, run):
    """The digests are of parts: who reads the average alone does not read the optimizer."""
    newest = run / "state_00000002.safetensors"
    content = newest.read_bytes()
    offset = 8 + int.from_bytes(content[:8], "little")
    for part in ("ema", "net", "stats"):
        turned = bytearray(content)
        name, place = next(x for x in json.loads(content[8:offset]).items() if x[0].rpartition("/")[0] == part)
        turned[offset + place["data_offsets"][0]] ^= 16
        newest.write_bytes(turned)
        for read in [lambda: model.read_tensors(newest), lambda: model.load_network(run)][:1 + (part != "net")]:
            with pytest.raises(model.InputError, match="00000002.* is damaged"):
                read()
        assert part != "net" or model.load_network(run)


def test_files_are_on_the_disk_before_they_have_their_name(home, tmp_path, monkeypatch):
    """Written, fsync, renamed, fsync of the folder."""
    calls, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(number):
        calls.append((os.readlink(f"/proc/self/fd/{number}"), os.fstat(number).st_size))
        fsync(number)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append((str(a), str(b))) or replace(a, b))
    train(home, "teacher", tmp_path / "run", "--steps", "1")
    saved, = (tmp_path / "run").glob("state_*")
    at = next(i for i, call in enumerate(calls) if call[1] == str(saved))
    assert calls[at - 1] == (calls[at][0], saved.stat().st_size) and calls[at + 1][0] == str(tmp_path / "run")


# ---- Folders in which a run begins ----
@pytest.mark.parametrize("name, text, words", [
    ("log.jsonl", "{}", "something else .*empty or new"), ("notes.txt", "", "something else"), ("run.json", "[1]", "cannot read"),
    ("run.json", '{"settings": {"seed": 3}}', "other work"), (None, "mine", "something else")])
def test_a_folder_of_others_is_refused(home, tmp_path, name, text, words):
    if name:
        (tmp_path / "out").mkdir()
    (tmp_path / "out" / (name or "")).write_text(text)
    refuses(words, home, "teacher", tmp_path / "out")


def test_a_start_that_was_killed_begins_again(home, run):
    """After its first lines of the log, before its first state; where states were removed, it does not. Hidden files are nobody's."""
    for path in run.glob("state_*"):
        path.unlink()
    refuses("has a log of 2 and no state", home, "teacher", run, *TWO)
    shutil.rmtree(run)
    model.write_atomically(run / ".DS_Store", lambda file: None)
    once = ["--steps", "2", "--save-every", "2"]
    train(home, "teacher", run, *once)
    (run / "state_00000002.safetensors").unlink()
    refuses("holds other work .seed", home, "teacher", run, *once, "--seed", "1")
    train(home, "teacher", run, *once)
    assert [line["step"] for line in log(run)] == [1, 2] and 2 in model.states_of(run)


# ---- Identity: what the inputs hold, not where they lie ----
def test_other_inputs_are_refused(home, tmp_path):
    world = Path(shutil.copytree(home, tmp_path / "world"))
    for stage in STAGES:
        train(world, stage, world / "runs" / stage, *TWO)
    shard = world / "latents" / "shard_00000.safetensors"     # of the same statistics
    parts, about, _ = model.read_tensors(shard)
    model.write_tensors(shard, {"": {**parts[""], "latents": parts[""]["latents"].flip(0)}}, about)
    refuses("sha256 of latents", world, "teacher", world / "runs/teacher", "--steps", "3")
    shutil.rmtree(world / "latents")
    encode(world, seed=1)                                     # the same images, another encoder
    for stage in ("teacher", "meanflow"):
        with pytest.raises(model.InputError, match="latents"):
            train(world, stage, world / "runs" / stage, "--steps", "3")
    shutil.rmtree(world / "latents")
    shutil.copytree(home / "latents", world / "latents")
    shutil.rmtree(world / "teacher")
    lively(home, world / "teacher")                           # another teacher in the place of the first
    for stage in ("cmt", "meanflow"):
        refuses("holds other work.*sha256 of teacher", world, stage, world / "runs" / stage, "--steps", "3")


@pytest.mark.parametrize("stage", ["cmt", "meanflow"])
def test_another_weak_teacher_or_time_shift_is_other_work(home, tmp_path, stage):
    guided = ["--guidance", "2", "--weak-teacher", lively(home, tmp_path / "weak")]
    train(home, stage, tmp_path / "run", *TWO, *guided)
    refuses("sha256 of weak teacher", home, stage, tmp_path / "run", *TWO, *guided[:3], lively(home, tmp_path / "other", seed=1))
    refuses("time_shift: 3.0 there, 4.0 now", home, stage, tmp_path / "run", *TWO, *guided, "--time-shift", "4")


# ---- Processes and signals ----
def test_a_second_process_is_refused(home, run, monkeypatch, capsys):
    model.lock(run / ".lock")
    before, done = files(run), child(*arguments(home, "teacher", run, *TWO))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"process {os.getpid()} on {os.uname().nodename}" in done.stderr and before == files(run)

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", refuse)
    model.lock(run / "other")
    assert "warning: no locks on this disk" in capsys.readouterr().out


@pytest.mark.parametrize("given, words", [({"RANK": "1"}, "unset these"), ({"RANK": "2", "WORLD_SIZE": "2"}, "unset these"),
                                          ({"RANK": "x"}, "unset these"), ({"SLURM_STEP_NUM_TASKS": "2"}, "torchrun --nnodes")])
def test_environments_that_are_not_torchruns(monkeypatch, given, words):
    """Among them RANK alone, left over from another shell: that process would save nothing, and say that all is well."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(model.InputError, match=words):
        model.launch()


def lose_a_peer(argv):
    """The second process dies in the middle of its third step; what does the first one say?"""
    if os.environ["RANK"] == "1":
        loss, calls = train_teacher.flow_matching_loss, []
        train_teacher.flow_matching_loss = lambda *args: calls.append(1) or len(calls) == 3 and os._exit(0) or loss(*args)
    else:
        sys.stderr = open(argv[argv.index("--out") + 1] + ".said", "w")
    model.command(lambda: train_teacher.main(argv))


def test_a_lost_process_is_one_line(home, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_on(2, lose_a_peer, arguments(home, "teacher", tmp_path / "run"))
    said = (tmp_path / "run.said").read_text()
    assert len(said.splitlines()) == 1 and "another process is lost" in said, said


def signalled_second(argv):
    """One of two processes gets a signal: both save and stop."""
    loss, calls, code = train_teacher.flow_matching_loss, [], None
    if os.environ["RANK"] == "1":
        train_teacher.flow_matching_loss = lambda *x: calls.append(1) or len(calls) == 2 and os.kill(os.getpid(), 15) or loss(*x)
    try:
        train_teacher.main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "of a peer", "nohup"])
def test_signals_save_and_stop(home, tmp_path, monkeypatch, capsys, name):
    """Twice, as torchrun and a scheduler may both send one; nohup stays nohup; a notebook's Ctrl-C is its own again."""
    number, loss, argv = getattr(signal, name, signal.SIGHUP), train_teacher.flow_matching_loss, ["--steps", "5", "--save-every", "5"]
    if name == "of a peer":
        run_on(2, signalled_second, arguments(home, "teacher", tmp_path, *argv))
        return
    if name == "nohup":
        signal.signal(number, signal.SIG_IGN)
    before = signal.getsignal(number)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", lambda *x: [os.kill(os.getpid(), number) for _ in "12"] and loss(*x))
    with contextlib.nullcontext() if name == "nohup" else pytest.raises(SystemExit) as end:
        train(home, "teacher", tmp_path, *argv)
    assert (5 if name == "nohup" else 1) in model.states_of(tmp_path) and signal.getsignal(number) is before
    assert name == "nohup" or end.value.code == 128 + number and "stopped after step 1: the same command goes on" in capsys.readouterr().out


# ---- One line for what is no bug ----
@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "the same command goes on"), (OSError(errno.EIO, "Input/output error", "x"), 2, "Input/output error: 'x'"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "--checkpoint-activations"),
    (RuntimeError("InvalidCxxCompiler: No working C++ compiler found in x\n\nSet X=1"), 2, "leave --compile out"),
    (model.InputError("a\nb"), 2, "error: a b"), (RuntimeError("shapes cannot be multiplied"), None, "")], ids=range(6))
def test_errors_are_one_line(monkeypatch, capsys, error, status, words):
    def fail():
        raise error
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda errors: None, raising=False)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit if status else RuntimeError) as end:            # a bug keeps its traceback
        model.command(fail)
    said = capsys.readouterr().err
    assert not status or end.value.code == status and len(said.splitlines()) == 1 and words in said, said


def test_no_terminal_any_more(home, tmp_path):
    """`| head -1`: the run comes to its end."""
    read, write = os.pipe()
    os.close(read)
    done = child(*arguments(home, "teacher", tmp_path / "run", *TWO), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    assert "Traceback" not in done.stderr and 2 in model.states_of(tmp_path / "run")


def test_what_cannot_be_written(home, run, tmp_path, monkeypatch, capsys):
    """A full disk is one line and leaves nothing; that a folder takes no fsync, or an old state stays, ends nothing."""
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(model.InputError, match="No space left.*make space"):
        model.write_atomically(tmp_path / "x", full)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    fsync = os.fsync

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    monkeypatch.setattr(os, "fsync", lambda number: refuse() if os.path.isdir(f"/proc/self/fd/{number}") else fsync(number))
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    train(home, "teacher", run, "--keep", "1", "--steps", "3")
    assert "warning: an old state stays" in capsys.readouterr().out and 3 in model.states_of(run)


# ---- The log ----


def test_reading_a_log(tmp_path):
    """Of a step that was made again the last line; a line that was cut is passed over, and what follows it at once is not."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo{"step": 2, "loss": 4}\n'
                                        'null\n\n{"step": 3, "loss": 5}\n{"step": 4, "l')
    assert [(line["step"], line["loss"]) for line in model.read_log(tmp_path)] == [(1, 3), (2, 4), (3, 5)]
    assert model.read_log(tmp_path / "none") == []


def test_clip_0_is_no_clipping(home, tmp_path):
    for clip in ("0", "1e30", "1e-3"):
        train(home, "teacher", tmp_path / clip, "--clip", clip)
    none, huge, little = (state(tmp_path / clip)["net"] for clip in ("0", "1e30", "1e-3"))
    assert all(torch.equal(none[name], huge[name]) for name in none) and any(not torch.equal(none[name], little[name]) for name in none)
