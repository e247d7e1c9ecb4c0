"""Nothing lost, nothing wrong in silence: a test for each kind of fault that an attack found, in the stages and model.py."""
import argparse
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import safetensors
import torch

import model
import train_meanflow
import train_teacher
from runs import ROOT, STAGES, arguments, encode, lively, log, run_on, save_network, state, train

CHILD = ("import model, train_teacher as stage\nmodel.DIT_PRESETS['tiny'] = dict(hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2))\n"
         "model.command(stage.main)")


def child(*argv, **more):
    return subprocess.run([sys.executable, "-c", CHILD, *argv], capture_output=True, text=True, cwd=ROOT, **more)


@pytest.fixture
def run(home, tmp_path):
    """A teacher's finished run of two steps, with a state of each."""
    train(home, "teacher", tmp_path / "run", *TWO)
    return tmp_path / "run"


TWO = ["--steps", "2", "--save-every", "1"]


def files(folder):
    """Without the lock: a process that reads it gives it away."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def refuses(words, home, stage, out, *more):
    """The run is refused with these words, and nothing has changed."""
    before = files(out) if out.is_dir() else out.read_bytes()
    with pytest.raises(model.InputError, match=words) as error:
        train(home, stage, out, *more)
    assert "\n" not in str(error.value) and before == (files(out) if out.is_dir() else out.read_bytes())


# ---- States ----------------------------------------------------------------------------------------------------------
def test_only_exact_names_are_states(home, run):
    """A copy under a name of one's own is neither taken nor removed, nor does it make others go."""
    for name in ("state_best.safetensors", "state_00000009.safetensors.bak"):
        shutil.copy(run / "state_00000001.safetensors", run / name)
    train(home, "teacher", run, "--steps", "4", "--save-every", "1", "--keep", "2")
    assert {path.name for path in run.glob("state_*")} == {
        "state_best.safetensors", "state_00000009.safetensors.bak", "state_00000003.safetensors", "state_00000004.safetensors"}


def test_states_that_are_kept(home, tmp_path):
    train(home, "teacher", tmp_path / "run", "--steps", "7", "--save-every", "1", "--keep", "2", "--keep-every", "3")
    assert list(model.states_of(tmp_path / "run")) == [7, 6, 3]
    train(home, "teacher", tmp_path / "run", "--steps", "7", "--keep", "1", "--keep-every", "3")      # killed before it pruned, say
    assert list(model.states_of(tmp_path / "run")) == [7, 6, 3]
    train(home, "teacher", tmp_path / "run", "--steps", "7", "--keep", "1")
    assert list(model.states_of(tmp_path / "run")) == [7]


def test_a_state_that_cannot_be_removed(home, run, monkeypatch, capsys):
    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    train(home, "teacher", run, "--keep", "1", "--steps", "3")
    assert "warning: an old state stays" in capsys.readouterr().out and 3 in model.states_of(run)


def test_states_of_others_are_refused(home, run, tmp_path):
    shutil.copy(run / "state_00000001.safetensors", run / "state_00000007.safetensors")               # renamed
    refuses("00000007.* holds other work .step: 1 there, 7 now", home, "teacher", run, "--steps", "9")
    (run / "state_00000007.safetensors").unlink()
    train(home, "teacher", tmp_path / "other", *TWO, "--seed", "1")
    shutil.copy(tmp_path / "other" / "state_00000002.safetensors", run)
    refuses("00000002.* holds other work .seed: 1 there, 0 now", home, "teacher", run, "--steps", "9")
    model.write_tensors(run / "state_00000002.safetensors", {"": {"x": torch.ones(3)}})
    refuses("holds other work|no DiT-DH: it has no .s_embedder", home, "teacher", run, "--steps", "9")


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "turned":
        content[-5] ^= 1
    path.write_bytes(content if how == "turned" else content[:len(content) // 2])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["turned", "cut", errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_state_that_cannot_be_read_stops_the_run(home, tmp_path, monkeypatch, stage, how):
    """For whatever reason: it is named, nothing is renamed or removed, and no older one is taken in its place."""
    train(home, stage, tmp_path / "run", *TWO)
    newest = tmp_path / "run" / "state_00000002.safetensors"
    if isinstance(how, int):
        opened = safetensors.safe_open

        def refuse(path, *more, **how_so):
            if Path(path) == newest:
                raise OSError(how, os.strerror(how), str(path))
            return opened(path, *more, **how_so)
        monkeypatch.setattr(safetensors, "safe_open", refuse)
    else:
        spoil(newest, how)
    refuses("00000002.*" + ("is damaged" if how == "turned" else "cannot read|incomplete|cut short"), home, stage, tmp_path / "run",
            "--steps", "3")


def test_damage_is_noticed_where_it_is_read(home, run):
    """The header's digests are of parts: who reads the average alone does not read the optimizer, which lies elsewhere."""
    newest = run / "state_00000002.safetensors"
    with safetensors.safe_open(newest, "pt") as file:
        names = list(file.keys())
    header = int.from_bytes(newest.read_bytes()[:8], "little")
    offsets = json.loads(newest.read_bytes()[8:8 + header])
    for part, noticed in (("ema", True), ("net", False), ("optimizer/exp_avg", False), ("stats", True)):
        name = next(name for name in names if name.rpartition("/")[0] == part)
        content = bytearray(newest.read_bytes())
        content[8 + header + offsets[name]["data_offsets"][0]] ^= 16
        (run / "state_00000008.safetensors").write_bytes(content)
        if noticed:
            with pytest.raises(model.InputError, match="00000008.* is damaged"):
                model.load_network(run)
        else:
            model.load_network(run)
        with pytest.raises(model.InputError, match="is damaged"):
            model.read_tensors(run / "state_00000008.safetensors")


def test_what_a_killed_writer_left_goes(home, run):
    (run / ".state_00000002.safetensors.tmp").write_bytes(b"half")
    (run / ".important.tmp").write_bytes(b"mine")
    train(home, "teacher", run, "--steps", "3")
    assert {path.name for path in run.glob(".*tmp")} == {".important.tmp"}


def test_contents_are_hashed_once(home, monkeypatch):
    def never(*_):
        raise AssertionError("a process other than the first hashes tensors")
    monkeypatch.setattr(model, "is_first", lambda: False)
    monkeypatch.setattr(model, "digest_of", never)
    model.load_network(home / "teacher")


# ---- Folders in which a run begins -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["log.jsonl", "model.safetensors", "notes.txt", "config.json"])
def test_a_folder_of_others_is_refused(home, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"step": 1}\n')
    refuses("holds something else .*give an --out that is empty or new", home, "teacher", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name}


def test_a_file_in_its_place(home, tmp_path):
    (tmp_path / "out").write_text("mine")
    refuses("holds something else", home, "teacher", tmp_path / "out")


def test_a_run_json_of_others_is_refused(home, run, tmp_path):
    for text, words in (('{"settings": {"seed": 3}}', "holds other work"), ("[1]", "cannot read"), ("{", "cannot read")):
        out = tmp_path / str(len(text))
        out.mkdir()
        (out / "run.json").write_text(text)
        refuses(words, home, "teacher", out)


def test_states_that_were_removed(home, run):
    """To free space, say: the log tells, and the run does not begin anew over what it was."""
    for path in run.glob("state_*"):
        path.unlink()
    refuses("has a log of 2 and no state", home, "teacher", run, *TWO)


def test_a_start_that_was_killed_begins_again(home, tmp_path):
    """After its first lines of the log, before its first state; hidden files are nobody's."""
    for name in (".DS_Store", ".lock"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("")
    train(home, "teacher", tmp_path / "run", "--steps", "2", "--save-every", "2")
    (tmp_path / "run" / "state_00000002.safetensors").unlink()
    refuses("holds other work .seed", home, "teacher", tmp_path / "run", "--steps", "2", "--save-every", "2", "--seed", "1")
    train(home, "teacher", tmp_path / "run", "--steps", "2", "--save-every", "2")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2] and 2 in model.states_of(tmp_path / "run")


def test_a_killed_start_with_other_saving(home, tmp_path, monkeypatch):
    """Killed before its first save, twice, the second time under a smaller --save-every: no state was ever there, so it begins."""
    flags = ["--steps", "6", "--log-every", "1", "--save-every"]
    train(home, "teacher", tmp_path / "run", *flags, "0")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_teacher, "flow_matching_loss", lambda *_: 1 / 0)
        train(home, "teacher", tmp_path / "run", *flags, "2")
    train(home, "teacher", tmp_path / "run", *flags, "2")
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_where_a_run_began_is_kept(home, tmp_path, capsys):
    """--init is not read again where there is a state; another one is not taken in silence."""
    train(home, "cmt", tmp_path / "run", "--steps", "1", "--init", home / "cmt")
    capsys.readouterr()
    train(home, "cmt", tmp_path / "run", "--steps", "2")
    assert f"--init is not read any more: the run began from {home}/cmt" in capsys.readouterr().out
    assert model.load_network(tmp_path / "run")[1]["settings"]["init"] == f"{home}/cmt"


def test_nothing_is_saved_with_save_every_0(home, tmp_path):
    for _ in range(2):
        train(home, "teacher", tmp_path / "run", "--save-every", "0")
    assert not model.states_of(tmp_path / "run") and log(tmp_path / "run")[-1]["step"] == 6


# ---- Identity: what the inputs hold, not where they lie ----------------------------------------------------------------
def test_other_inputs_are_refused(home, tmp_path):
    world = Path(shutil.copytree(home, tmp_path / "world"))
    for stage in STAGES:
        train(world, stage, world / "runs" / stage, *TWO)
    shutil.rmtree(world / "latents")
    encode(world, seed=1)                                     # the same images, another encoder
    for stage in ("teacher", "meanflow"):
        with pytest.raises(model.InputError, match="latents"):
            train(world, stage, world / "runs" / stage, "--steps", "3")
    shutil.rmtree(world / "latents")
    shutil.copytree(home / "latents", world / "latents")
    train(world, "teacher", world / "newer", "--seed", "1")
    shutil.rmtree(world / "teacher")
    (world / "newer").rename(world / "teacher")               # another teacher in the place of the first
    for stage in ("cmt", "meanflow"):
        refuses("holds other work.*sha256 of teacher", world, stage, world / "runs" / stage, "--steps", "3")
    stats = model.load_stats(home / "latents")
    model.write_tensors(tmp_path / "stats.safetensors", {"": {**stats, "var": 2 * stats["var"]}})
    refuses("holds other work.*sha256 of stats", world, "teacher", world / "runs" / "teacher", "--steps", "3", "--stats",
            tmp_path / "stats.safetensors")


@pytest.mark.parametrize("stage", ["cmt", "meanflow"])
def test_another_weak_teacher_or_time_shift_is_other_work(home, tmp_path, stage):
    guided = ["--guidance", "2", "--weak-teacher", lively(home, tmp_path / "weak")]
    train(home, stage, tmp_path / "run", *TWO, *guided)
    refuses("sha256 of weak teacher", home, stage, tmp_path / "run", *TWO, *guided[:3], lively(home, tmp_path / "other", seed=1))
    refuses("time_shift: 3.0 there, 4.0 now", home, stage, tmp_path / "run", *TWO, *guided, "--time-shift", "4")
    if stage == "cmt":                            # the teacher's own, of which its weights say nothing
        net, about = model.load_network(home / "teacher")
        save_network(tmp_path / "teacher", net, {"time_shift": 5.0}, about["stats"])
        assert model.load_network(tmp_path / "teacher")[1]["sha256"] == about["sha256"]
        refuses("time_shift: 3.0 there, 5.0 now", home, stage, tmp_path / "run", *TWO, *guided, "--teacher", tmp_path / "teacher")


def test_the_same_inputs_elsewhere_are_accepted(home, tmp_path, monkeypatch):
    """Run, latents and networks moved; relative paths for absolute ones; --init gone after the first state; the teacher a slim copy."""
    world = Path(shutil.copytree(home, tmp_path / "world"))
    train(world, "cmt", world / "runs" / "cmt", "--init", world / "cmt")
    train(world, "meanflow", world / "runs" / "meanflow")
    world.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "cmt")
    monkeypatch.chdir(tmp_path / "moved")
    net, about = model.load_network("teacher")
    shutil.rmtree("teacher")
    save_network("teacher", net, {name: about[name] for name in ("time_shift", "classes")}, about["stats"])
    train(Path("."), "cmt", "runs/cmt", "--init", "gone", "--steps", "7")
    train(Path("."), "meanflow", "runs/meanflow", "--steps", "7")
    assert [log(f"runs/{stage}")[-1]["step"] for stage in ("cmt", "meanflow")] == [7, 7]


# ---- Two processes, one folder -----------------------------------------------------------------------------------------
def test_a_second_process_is_refused(home, run):
    model.lock(run / ".lock")
    before = files(run)
    done = child(*arguments(home, "teacher", run, *TWO))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"process {os.getpid()} on {os.uname().nodename}" in done.stderr and before == files(run)


def test_locks_on_odd_disks(tmp_path, monkeypatch, capsys):
    """On a full disk the lock counts, its text does not; where a disk has no locks there is a warning."""
    monkeypatch.setattr(model, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    model.lock(tmp_path / "full")
    monkeypatch.undo()
    model.LOCKS.clear()

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr(fcntl, "lockf", refuse)
    model.lock(tmp_path / ".lock")
    assert "warning: no locks on this disk" in capsys.readouterr().out


# ---- Processes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("given, words", [
    ({"RANK": "1"}, "unset these"), ({"RANK": "2", "WORLD_SIZE": "2"}, "unset these"), ({"RANK": "x"}, "unset these"),
    ({"RANK": "-1", "WORLD_SIZE": "2"}, "unset these"), ({"WORLD_SIZE": ""}, "unset these"), ({"LOCAL_RANK": "1.5"}, "unset these"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "torchrun --nnodes"), ({"OMPI_COMM_WORLD_SIZE": "4"}, "torchrun --nnodes"),
    ({"PMI_SIZE": "2"}, "torchrun --nnodes")])
def test_environments_that_are_not_torchruns(home, tmp_path, monkeypatch, given, words):
    """Among them RANK alone, left over from another shell: every stage trained to the end, saved nothing, and said it was well."""
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    for stage in STAGES:
        with pytest.raises(model.InputError, match=words):
            train(home, stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_srun_with_torchrun(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert model.launch()[1:] == (0, 1)


def lose_a_peer(argv):
    """The second process dies in the middle of its third step; what does the first one say?"""
    if os.environ["RANK"] == "1":
        loss, calls = train_teacher.flow_matching_loss, []

        def die(*args):
            calls.append(1)
            if len(calls) == 3:
                os._exit(0)
            return loss(*args)
        train_teacher.flow_matching_loss = die
        train_teacher.main(argv)
    sys.stderr = open(argv[argv.index("--out") + 1] + ".said", "w")
    model.command(lambda: train_teacher.main(argv))


def test_a_lost_process_is_one_line(home, tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        run_on(2, lose_a_peer, arguments(home, "teacher", tmp_path / "run"))
    said = (tmp_path / "run.said").read_text()
    assert len(said.splitlines()) == 1 and "another process is lost" in said, said


# ---- Signals -----------------------------------------------------------------------------------------------------------
def signalled(monkeypatch, number):
    loss = train_teacher.flow_matching_loss

    def signals(*args):
        os.kill(os.getpid(), number)
        return loss(*args)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", signals)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_stop(home, tmp_path, monkeypatch, capsys, name):
    signalled(monkeypatch, number := getattr(signal, name))
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train(home, "teacher", tmp_path / "run", "--steps", "9", "--save-every", "9")
    assert end.value.code == 128 + number and 1 in model.states_of(tmp_path / "run")
    assert "stopped after step 1: the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(number) is before     # a notebook's Ctrl-C is its own again


def test_nohup_stays_nohup(home, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled(monkeypatch, signal.SIGHUP)
    train(home, "teacher", tmp_path / "run", *TWO)
    assert 2 in model.states_of(tmp_path / "run")


def test_a_stage_runs_in_a_thread(home, tmp_path):
    """Which may not catch signals."""
    errors = []

    def run():
        try:
            train(home, "teacher", tmp_path / "run", *TWO)
        except BaseException as error:
            errors.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors and 2 in model.states_of(tmp_path / "run")


# ---- One line for what is no bug ---------------------------------------------------------------------------------------
class Compiler(RuntimeError):
    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize("error, status, words", [
    (KeyboardInterrupt(), 130, "the same command goes on"), (OSError(errno.EIO, "Input/output error", "x"), 2, "Input/output error: 'x'"),
    (MemoryError(), 2, "out of memory"), (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "--checkpoint-activations"),
    (torch.distributed.DistNetworkError("no\nanswer"), 2, "another process is lost"),
    (Compiler("InvalidCxxCompiler: No working C++ compiler found in x\n\nSet TORCHDYNAMO_VERBOSE=1"), 2, "leave --compile out"),
    (model.InputError("a\nb"), 2, "error: a b")], ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else None)
def test_errors_are_one_line(monkeypatch, capsys, error, status, words):
    def fail():
        raise error

    def leave(status):
        raise SystemExit(status)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda errors: None, raising=False)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        model.command(fail)
    said = capsys.readouterr().err
    assert end.value.code == status and len(said.splitlines()) == 1 and words in said, said


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail():
        raise RuntimeError("shapes cannot be multiplied")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda errors: None, raising=False)
    with pytest.raises(RuntimeError, match="shapes"):
        model.command(fail)


def test_no_terminal_any_more(home, tmp_path):
    """`| head -1`: the run comes to its end."""
    command = [sys.executable, "-c", CHILD, *arguments(home, "teacher", tmp_path / "run", "--steps", "20", "--save-every", "99")]
    done = subprocess.run(["bash", "-c", '"$@" | head -1', "bash", *command], capture_output=True, text=True, cwd=ROOT)
    assert "M parameters" in done.stdout and "Traceback" not in done.stderr and 20 in model.states_of(tmp_path / "run"), done


# ---- What cannot be written --------------------------------------------------------------------------------------------
def test_disks_that_refuse_what_is_not_needed(home, tmp_path, monkeypatch):
    """chmod, and fsync of a folder, as on mounts of another owner, FUSE and CIFS."""
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    fsync = os.fsync
    monkeypatch.setattr(os, "chmod", refuse)
    monkeypatch.setattr(os, "fsync", lambda number: refuse() if os.path.isdir(f"/proc/self/fd/{number}") else fsync(number))
    train(home, "teacher", tmp_path / "run", *TWO)
    assert 2 in model.states_of(tmp_path / "run")


def test_errors_do_not_hide_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(model.InputError, match="cannot write .*file/x.json"):
        model.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(model.InputError, match="file"):
        model.lock(tmp_path / "file" / ".lock")

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr(pathlib.Path, "unlink", read_only)

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(model.InputError, match="No space left.*make space"):
        model.write_atomically(tmp_path / "x", full)
    assert not (tmp_path / "x").exists()


# ---- What a run says of itself -----------------------------------------------------------------------------------------
def test_an_average_that_forgets_too_slowly(home, tmp_path, capsys):
    train(home, "teacher", tmp_path / "slow", "--steps", "100", "--ema", "0.9999", "--save-every", "0")
    assert "warning: by --ema 0.9999 the average of 100 steps" in (said := capsys.readouterr().out) and "0.95 fits" in said
    train(home, "teacher", tmp_path / "fit", "--steps", "100", "--ema", "0.95", "--save-every", "0")
    assert "warning" not in capsys.readouterr().out


def test_the_log_is_the_same_for_any_split(home, tmp_path):
    """rms_ numbers are roots of means, not means of roots, which depend on the micro-batch and the number of processes."""
    train(home, "meanflow", tmp_path / "one")
    train(home, "meanflow", tmp_path / "micro", "--micro-batch", "4")
    run_on(2, train_meanflow.main, arguments(home, "meanflow", tmp_path / "two"))
    for other in ("micro", "two"):
        for a, b in zip(log(tmp_path / "one"), log(tmp_path / other), strict=True):
            names = a.keys() - {"seconds", "samples_per_second"}
            assert {name: b[name] for name in names} == {name: pytest.approx(a[name], rel=2e-5) for name in names}


def test_it_is_seen_to_live(home, tmp_path):
    """The first step has a line, whatever --log-every says; in a terminal there is a bar in place of lines."""
    argv = arguments(home, "teacher", tmp_path / "lines", "--steps", "3", "--log-every", "1000")
    assert [line[:10] for line in child(*argv).stdout.splitlines() if line[0] == "{"] == ['{"step": 1', '{"step": 3']
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    argv = arguments(home, "teacher", tmp_path / "bar", "--steps", "3")
    done = subprocess.run([sys.executable, "-c", CHILD, *argv], stdout=subprocess.PIPE, stderr=theirs, text=True, cwd=ROOT)
    os.close(theirs)
    bar = ""
    with contextlib.suppress(OSError):            # its end
        while True:
            bar += os.read(ours, 4096).decode()
    os.close(ours)
    assert done.returncode == 0 and "3/3" in bar and "loss=" in bar and '{"step"' not in done.stdout
    assert [line["step"] for line in log(tmp_path / "bar")] == [1, 2, 3]


def test_reading_a_log(tmp_path):
    """Of a step that was made again the last line; a line that was cut is passed over, and what follows it at once is not."""
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo{"step": 2, "loss": 4}\n'
                                        'null\n\n{"step": 3, "loss": 5}\n{"step": 4, "l')
    assert [(line["step"], line["loss"]) for line in model.read_log(tmp_path)] == [(1, 3), (2, 4), (3, 5)]
    assert model.read_log(tmp_path / "none") == []


# ---- Numbers out of range ----------------------------------------------------------------------------------------------
OUT_OF_RANGE = [
    ("teacher", "--clip", "-1"), ("teacher", "--clip", "nan"), ("cmt", "--clip", "inf"), ("cmt", "--ema", "1.5"), ("teacher", "--label-dropout", "2"),
    ("meanflow", "--lr-final", "-0.1"), ("teacher", "--keep-every", "-3"), ("teacher", "--keep", "0"), ("meanflow", "--lr", "nan"),
    ("teacher", "--seed", "-1"), ("cmt", "--seed", "9" * 40), ("teacher", "--steps", "0"), ("teacher", "--steps", "1e3"),
    ("teacher", "--batch-size", "0"), ("cmt", "--micro-batch", "0"), ("teacher", "--log-every", "0"), ("teacher", "--save-every", "-1"),
    ("meanflow", "--time-shift", "0"), ("teacher", "--steps", "9" * 5000), ("teacher", "--decay-from", "3"), ("meanflow", "--workers", "-1"),
    ("cmt", "--teacher-steps", "0"), ("cmt", "--pairs", "6"), ("cmt", "--guidance", "nan"), ("meanflow", "--guidance", "-1"),
    ("meanflow", "--loss-power", "-3"), ("meanflow", "--loss-eps", "0"), ("meanflow", "--eta", "2"), ("meanflow", "--delta-t", "0"),
    ("meanflow", "--delta-t", "2")]


def test_numbers_out_of_range(tmp_path, capsys):
    """One line, status 2, before anything is loaded: the inputs are not even there."""
    for stage, flag, value in OUT_OF_RANGE:
        with pytest.raises(SystemExit) as end:
            STAGES[stage].main(arguments(tmp_path, stage, tmp_path / "out", flag, value))
        said = capsys.readouterr().err
        assert end.value.code == 2 and len(said.splitlines()) == 1 and flag in said, (stage, flag, value)
    assert not (tmp_path / "out").exists()


def test_parsers_refuse_text():
    for kind, text in ((model.positive, "0"), (model.fraction, "1.01"), (model.whole(), "one"), (model.number(int, 1, 5), "6"),
                       (model.not_negative, "-0.0001"), (model.positive, "1e999"), (model.location, ""), (model.location, "  ")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)
    assert model.location("~/x") == os.path.expanduser("~/x")


def test_clip_0_is_no_clipping(home, tmp_path):
    for clip in ("0", "1e30", "1e-3"):
        train(home, "teacher", tmp_path / clip, "--clip", clip)
    none, huge, little = (state(tmp_path / clip)["net"] for clip in ("0", "1e30", "1e-3"))
    assert all(torch.equal(none[name], huge[name]) for name in none) and any(not torch.equal(none[name], little[name]) for name in none)


# ---- Files that say too little, or too much ----------------------------------------------------------------------------
@pytest.mark.parametrize("name, value", [("var", -1.0), ("var", float("nan")), ("mean", float("inf"))])
def test_statistics_of_nothing(home, tmp_path, name, value):
    stats = model.load_stats(home / "latents")
    stats[name].flatten()[3] = value
    model.write_tensors(tmp_path / "stats.safetensors", {"": stats})
    with pytest.raises(model.InputError, match="finite and no variance below 0"):
        model.load_stats(tmp_path / "stats.safetensors")


@pytest.mark.filterwarnings("ignore:Initializing zero-element")    # torch's word on sizes of 0, which are hostile
@pytest.mark.parametrize("name", ["pos_embed", "s_embedder.proj.weight", "y_embedder.embedding_table.weight", "enc_feat_rope.freqs_cos",
                                  "blocks.0.norm1.weight", "blocks.1.attn.qkv.weight"])
def test_hostile_weights(home, tmp_path, name):
    """Tensors missing or of another shape: one line, no traceback, nothing allocated."""
    content = dict(state(home / "teacher")["ema"])
    for tensor in (None, torch.zeros(()), torch.zeros(0), torch.zeros(5, 3)):
        kept = {other: value for other, value in content.items() if other != name} | ({} if tensor is None else {name: tensor})
        model.write_tensors(tmp_path / "net.safetensors", {"": kept})
        with pytest.raises(model.InputError) as error:
            model.load_network(tmp_path / "net.safetensors")
        assert "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_hostile_headers(tmp_path):
    """Of safetensors: lengths and shapes that are not there."""
    path, big = tmp_path / "net.safetensors", 2 ** 62
    for length, header in ((big, b"{}"), (2, b"[]"), (None, b'{"__metadata__": [1]}'), (None, b'{"__metadata__": {"about": "{"}}'),
                           (None, b'{"x": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}' % (big, 4 * big))):
        path.write_bytes((length or len(header)).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(model.InputError, match="cannot read"):
            model.load_network(path)


def test_our_tensor_files_are_safetensors(tmp_path):
    """Of any of our types and shapes, read by the library as they were; aligned, so that maps of them can be used."""
    from safetensors.torch import load_file
    parts = {"a": {"x": torch.rand(3), "half": torch.rand(5).half(), "empty": torch.empty(0, 4)},
             "b/c": {"x": torch.arange(7), "bytes": torch.arange(3, dtype=torch.uint8)}, "": {"double": torch.rand(2, 3).double().T}}
    digests = model.write_tensors(tmp_path / "x.safetensors", parts, {"step": 3})
    found = load_file(tmp_path / "x.safetensors")
    assert {name: x.tolist() for name, x in found.items()} == {
        f"{part}/{name}".lstrip("/"): x.tolist() for part in parts for name, x in parts[part].items()}
    again, about, ours = model.read_tensors(tmp_path / "x.safetensors")
    assert about == {"step": 3} and ours == digests == {part: model.digest_of(tensors) for part, tensors in parts.items()}
    assert all(torch.equal(again[part][name], x) for part in parts for name, x in parts[part].items())
    offset = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") + 8
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8:offset])
    assert all((offset + header[name]["data_offsets"][0]) % found[name].itemsize == 0 for name in found)
