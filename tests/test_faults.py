"""Nothing lost, nothing wrong in silence: a test for each kind of fault that an attack found, in the stages and model.py."""
import argparse
import contextlib
import errno
import io
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import encode_latents
import model
import train_cmt
import train_meanflow
import train_teacher
from runs import let_go

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "sanity"))
import random_encoder  # noqa: E402

STAGES = {"teacher": train_teacher, "cmt": train_cmt, "meanflow": train_meanflow}
model.DIT_PRESETS["tiniest"] = dict(hidden_size=(16, 24), depth=(1, 1), num_heads=(2, 2))


def arguments(home, stage, out, *more):
    """Two steps of 8 rows, saved at both; later flags count."""
    inputs = {"teacher": ["--latents", home / "latents", *(() if "--init" in more else ("--preset", "tiniest"))],
              "cmt": ["--teacher", home / "teacher", "--teacher-steps", 2, "--pairs", 4, "--pool-age", 4],
              "meanflow": ["--latents", home / "latents", "--teacher", home / "teacher", "--init", home / "cmt"]}
    flags = ["--out", out, "--steps", 2, "--batch-size", 8, "--save-every", 1, "--log-every", 1, "--keep", 9, "--precision", "fp32"]
    return [str(x) for x in [*inputs[stage], *flags, *more]]


def train(home, stage, out, *more):
    try:
        STAGES[stage].main(arguments(home, stage, out, *more))
    finally:
        let_go()


def encode(home, out, seed):
    random_encoder.main(["--out", f"{home}/encoder{seed}", "--width", "12", "--depth", "1", "--heads", "2", "--patch", "4",
                         "--seed", str(seed)])
    encode_latents.main(["--data-path", f"{home}/images", "--out", str(out), "--image-size", "16", "--encoder-size", "16",
                         "--workers", "0", "--encoder", f"{home}/encoder{seed}"])
    let_go()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, latents, a teacher and a CMT student, each made by its own script."""
    home, g = tmp_path_factory.mktemp("faults"), numpy.random.default_rng(0)
    for k in range(2):
        (home / "images" / f"class{k}").mkdir(parents=True)
        for i in range(10):
            picture = g.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
            Image.fromarray(picture).save(home / "images" / f"class{k}" / f"{i}.png")
    encode(home, home / "latents", 0)
    train(home, "teacher", home / "teacher")
    train(home, "cmt", home / "cmt")
    return home


@pytest.fixture
def run(home, tmp_path):
    """A copy of the teacher's finished run."""
    return Path(shutil.copytree(home / "teacher", tmp_path / "run"))


def tensors(path):
    """Not as maps of the file, which a test may overwrite."""
    return {name: tensor.clone() for name, tensor in model.read_tensors(path)[0].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(run, step):
    return run / f"state_{step:08d}.safetensors"


def steps_logged(run):
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


# ---- 1, 2: states and the network made of them -------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_a_stale_or_missing_network_is_mended(home, tmp_path, capsys, stage):
    """Killed between the last state's rename and the network's; config.json alone may be there, too."""
    run = tmp_path / "run"
    train(home, stage, run, "--steps", "1")
    older = (run / "model.safetensors").read_bytes()
    train(home, stage, run, "--resume")
    right = tensors(run / "model.safetensors")
    for damage in ("stale", "missing", "config alone"):
        if damage == "stale":
            (run / "model.safetensors").write_bytes(older)
            assert not same(tensors(run / "model.safetensors"), right)
        else:
            (run / "model.safetensors").unlink()
        if damage == "config alone":
            (run / "latent_stats.safetensors").unlink()
        capsys.readouterr()
        train(home, stage, run, "--resume")
        assert "is at step 2 already: nothing to do" in capsys.readouterr().out
        assert same(tensors(run / "model.safetensors"), right)
        model.load_network(run)
    train(home, stage, run, "--resume", "--steps", "1")
    assert "is at step 2 already" in capsys.readouterr().out and steps_logged(run) == [1, 2]


def test_pruning_is_made_up_for(home, run):
    """Killed before the last state's predecessors were removed."""
    train(home, "teacher", run, "--resume", "--keep", "1")
    assert [path.name for path in sorted(run.glob("state_*"))] == ["state_00000002.safetensors"]


def test_a_state_that_cannot_be_removed(home, run, monkeypatch, capsys):
    def refuse(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    train(home, "teacher", run, "--resume", "--keep", "1", "--steps", "3")
    assert "warning" in capsys.readouterr().err and state(run, 3).exists()


def test_only_exact_names_are_states(home, run):
    """A copy under a name of one's own is neither taken nor removed, nor does it make others go."""
    shutil.copy(state(run, 1), run / "state_best.safetensors")
    shutil.copy(state(run, 1), run / "state_00000009.safetensors.bak")
    train(home, "teacher", run, "--resume", "--steps", "4", "--keep", "2")
    names = {path.name for path in run.glob("state_*")}
    assert names == {"state_best.safetensors", "state_00000009.safetensors.bak", state(run, 3).name, state(run, 4).name}


def test_damaged_states_do_not_count(home, run):
    """Of two kept states the newer is damaged: the whole one stays, beside the new one."""
    content = bytearray(state(run, 2).read_bytes())
    content[-3] ^= 1
    state(run, 2).write_bytes(content)
    train(home, "teacher", run, "--resume", "--steps", "3", "--save-every", "9", "--keep", "2")
    names = sorted(path.name for path in run.glob("state_*"))
    assert names == [state(run, 1).name, state(run, 2).name + ".damaged", state(run, 3).name]


def test_states_of_others_are_refused(home, run, tmp_path):
    train(home, "teacher", tmp_path / "other", "--seed", "1")
    shutil.copy(state(run, 1), state(run, 7))                 # renamed
    with pytest.raises(model.InputError, match="00007.*not a state of this run"):
        train(home, "teacher", run, "--resume", "--steps", "9")
    state(run, 7).unlink()
    shutil.copy(state(tmp_path / "other", 2), state(run, 2))  # of another seed
    with pytest.raises(model.InputError, match="00002.*not a state of this run"):
        train(home, "teacher", run, "--resume", "--steps", "9")


# ---- 3: identity is what the inputs hold, not where they lie --------------------------------------------------
def test_other_inputs_are_refused(home, tmp_path):
    world = Path(shutil.copytree(home, tmp_path / "world"))
    for stage in STAGES:
        train(world, stage, world / "runs" / stage)
    shutil.rmtree(world / "latents")
    encode(world, world / "latents", 1)                       # the same images, another encoder
    for stage in ("teacher", "meanflow"):
        with pytest.raises(model.InputError, match="latents"):
            train(world, stage, world / "runs" / stage, "--resume", "--steps", "3")
    shutil.rmtree(world / "latents")
    shutil.copytree(home / "latents", world / "latents")
    train(world, "teacher", world / "newer", "--seed", "1")
    shutil.rmtree(world / "teacher")
    (world / "newer").rename(world / "teacher")               # another teacher in the place of the first
    for stage in ("cmt", "meanflow"):
        with pytest.raises(model.InputError, match="holds other work.*sha256 of teacher"):
            train(world, stage, world / "runs" / stage, "--resume", "--steps", "3")
    mean, var = model.load_stats(home / "latents")
    model.write_tensors(tmp_path / "stats.safetensors", {"mean": mean, "var": 2 * var})
    with pytest.raises(model.InputError, match="holds other work.*sha256 of stats"):
        train(world, "teacher", world / "runs" / "teacher", "--resume", "--steps", "3", "--stats", tmp_path / "stats.safetensors")
    for stage in STAGES:
        assert steps_logged(world / "runs" / stage) == [1, 2]


def test_the_same_inputs_elsewhere_are_accepted(home, tmp_path, monkeypatch):
    """Run, latents and networks moved; relative paths for absolute ones; --init gone after the first state."""
    world = Path(shutil.copytree(home, tmp_path / "world"))
    train(world, "cmt", world / "runs" / "cmt", "--init", world / "cmt")
    train(world, "meanflow", world / "runs" / "meanflow")
    world.rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "cmt")
    monkeypatch.chdir(tmp_path / "moved")
    train(Path("."), "cmt", "runs/cmt", "--init", "gone", "--resume", "--steps", "3")
    train(Path("."), "meanflow", "runs/meanflow", "--resume", "--steps", "3")
    assert steps_logged(Path("runs/cmt")) == steps_logged(Path("runs/meanflow")) == [1, 2, 3]


def test_a_setting_of_a_later_version(home, run):
    """A run.json that lacks it: its default."""
    about = model.read_json(run / "run.json")
    del about["settings"]["time_draw"]
    model.write_json(run / "run.json", about)
    with pytest.raises(model.InputError, match="time_draw: uniform there, logit-normal now"):
        train(home, "teacher", run, "--resume", "--time-draw", "logit-normal")
    train(home, "teacher", run, "--resume", "--steps", "3")
    assert steps_logged(run) == [1, 2, 3]


def test_contents_are_hashed_once(home, monkeypatch):
    def never(*_):
        raise AssertionError("a process other than the first hashes tensors")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(model, "digest_of", never)
    model.load_network(home / "teacher")


# ---- 4: two processes, one folder ----------------------------------------------------------------------------
def test_a_second_process_is_refused(home, run):
    def files():
        # Not the lock itself: a process that closes it has given it away.
        return {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}

    model.hold(run / ".lock")
    before = files()
    argv = [sys.executable, "-c", "import model, sys, train_teacher as stage\n"
            f"model.DIT_PRESETS['tiniest'] = {model.DIT_PRESETS['tiniest']}\nmodel.command(stage.main)", *arguments(home, "teacher", run, "--resume")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    let_go()
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"process {os.getpid()} on {os.uname().nodename}" in done.stderr
    assert before == files()


def test_what_a_killed_process_left(home, tmp_path):
    """Only our own names, with a process number, are removed."""
    ours = [".run.json.12.tmp", ".state_00000001.safetensors.99999.tmp", ".model.safetensors.7.tmp", ".log.jsonl.3.tmp"]
    others = [".important_tmp_backup", ".foo.tmp", ".notes.txt.12.tmp", ".run.json.tmp", "run.json.12.tmp", ".run.json.12.tmp~"]
    run = tmp_path / "run"
    run.mkdir()
    for name in ours + others:
        (run / name).write_text(name)
    train(home, "teacher", run)
    assert not any((run / name).exists() for name in ours) and all((run / name).read_text() == name for name in others)


def test_a_lock_on_a_full_disk(tmp_path, monkeypatch):
    """The lock counts, its text does not."""
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode, buffering=-1):
        file = Full(path, "a+")
        return file if buffering == 0 else io.TextIOWrapper(io.BufferedRandom(file))
    monkeypatch.setattr(model, "open", opened, raising=False)
    model.hold(tmp_path / ".lock")
    with contextlib.suppress(OSError):
        let_go()


def test_srun_alone_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for stage in STAGES:
        with pytest.raises(model.InputError, match="srun --ntasks-per-node=1 torchrun"):
            train(home, stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    model.launch()


# ---- 5: signals ----------------------------------------------------------------------------------------------
def signalled(monkeypatch, number):
    loss = train_teacher.flow_matching_loss

    def signals(*args):
        os.kill(os.getpid(), number)
        return loss(*args)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", signals)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_save_and_stop(home, tmp_path, monkeypatch, capsys, name):
    signalled(monkeypatch, number := getattr(signal, name))
    with pytest.raises(SystemExit) as end:
        train(home, "teacher", tmp_path / "run", "--steps", "9", "--save-every", "9")
    assert end.value.code == 128 + number and state(tmp_path / "run", 1).exists()
    assert "--resume goes on" in capsys.readouterr().out


def test_nohup_stays_nohup(home, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signalled(monkeypatch, signal.SIGHUP)
    train(home, "teacher", tmp_path / "run")
    assert state(tmp_path / "run", 2).exists()


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    def leave(status):
        raise SystemExit(status)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as end:
        model.command(interrupted)
    said = capsys.readouterr().err
    assert end.value.code == 130 and len(said.splitlines()) == 1 and "the same command goes on" in said


# ---- 7, 8: what cannot be written ----------------------------------------------------------------------------
def test_no_terminal_any_more(home, tmp_path):
    """`| head -1`, and stderr closed: the run comes to its end, with status 0."""
    script = ("import model, train_teacher as stage\nmodel.DIT_PRESETS['tiniest'] = "
              f"{model.DIT_PRESETS['tiniest']}\nmodel.command(stage.main)")
    command = '"$@" 2>&- | head -1; exit ${PIPESTATUS[0]}'
    argv = [sys.executable, "-c", script, *arguments(home, "teacher", tmp_path / "run", "--steps", "20", "--save-every", "99")]
    done = subprocess.run(["bash", "-c", command, "bash", *argv], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "M parameters" in done.stdout and state(tmp_path / "run", 20).exists(), done


def test_a_pipe_that_breaks(monkeypatch):
    for name in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        monkeypatch.setattr(sys, name, os.fdopen(write, "w"))
    for stream in (None, sys.stderr):
        model.say("into nothing", stream)
        model.say("again", stream)


def test_a_full_disk_costs_a_line_of_the_log(home, tmp_path, monkeypatch, capsys):
    def full(path, mode="r", *more, **about):
        lines = Path(path).read_text().count("\n") if mode == "a" and Path(path).exists() else 0
        return open("/dev/full" if lines == 1 else path, mode, *more, **about)
    monkeypatch.setattr(model, "open", full, raising=False)
    train(home, "teacher", tmp_path / "run", "--steps", "3", "--save-every", "9")
    assert steps_logged(tmp_path / "run") == [1] and state(tmp_path / "run", 3).exists()
    assert capsys.readouterr().err.count("warning: a line of") == 2


def test_errors_do_not_hide_errors(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(model.InputError, match="cannot write .*file/x.json.*look at the folder"):
        model.write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(model.InputError, match="file"):
        model.hold(tmp_path / "file" / ".lock")

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(path))
    monkeypatch.setattr(pathlib.Path, "unlink", read_only)

    def full(beside):
        raise OSError(errno.ENOSPC, "No space left on device", str(beside))
    with pytest.raises(model.InputError, match="No space left.*make space, then go on"):
        model.write_atomically(tmp_path / "x", full)


# ---- 9: numbers out of range ---------------------------------------------------------------------------------
OUT_OF_RANGE = [
    *((stage, flag, value) for stage in STAGES for flag, value in (
        ("--clip", "-1"), ("--clip", "nan"), ("--clip", "inf"), ("--ema", "1.5"), ("--ema", "-0.1"), ("--label-dropout", "2"),
        ("--label-dropout", "nan"), ("--lr-final", "-0.1"), ("--keep-every", "-3"), ("--keep", "0"), ("--lr", "-1"), ("--lr", "nan"),
        ("--lr", "inf"), ("--seed", "-1"), ("--seed", "9" * 40), ("--seed", "1.5"), ("--steps", "0"), ("--steps", "1e3"),
        ("--batch-size", "0"), ("--batch-size", "-16"), ("--micro-batch", "0"), ("--log-every", "0"), ("--save-every", "0"),
        ("--time-shift", "-1"), ("--time-shift", "nan"), ("--steps", "9" * 5000))),
    ("teacher", "--decay-from", "3"), ("teacher", "--workers", "-1"), ("meanflow", "--workers", "-1"),
    ("cmt", "--teacher-steps", "0"), ("cmt", "--pairs", "6"), ("cmt", "--pool-age", "5"), ("cmt", "--guidance", "nan"),
    ("cmt", "--guidance", "inf"), ("meanflow", "--guidance", "-1"), ("meanflow", "--loss-power", "-3"), ("meanflow", "--loss-eps", "0"),
    ("meanflow", "--loss-eps", "nan"), ("meanflow", "--eta", "2"), ("meanflow", "--eta", "nan"), ("meanflow", "--derivative=fd", "--delta-t=2"),
    ("meanflow", "--derivative=fd", "--delta-t=0"), ("meanflow", "--delta-t", "0.01"), ("cmt", "--decay-from", "0.5"),
    ("meanflow", "--guidance=2", "--guidance-interval=0.5"), ("teacher", "--new-classes", "--ema=0.9")]


def test_numbers_out_of_range(tmp_path, capsys):
    """One line, status 2, before anything is loaded: the inputs are not even there."""
    accepted = []
    for stage, flag, value in OUT_OF_RANGE:
        try:
            STAGES[stage].main(arguments(tmp_path, stage, tmp_path / "out", flag, value))
        except SystemExit as end:
            said = capsys.readouterr().err
            if end.code == 2 and len(said.splitlines()) == 1 and any(name.split("=")[0] in said for name in (flag, value) if name[:2] == "--"):
                continue
        except model.InputError:
            pass
        accepted.append((stage, flag, value[:9]))
    assert not accepted and not (tmp_path / "out").exists()


def test_clip_0_is_no_clipping(home, tmp_path):
    for clip in ("0", "1e30", "1e-3"):
        train(home, "teacher", tmp_path / clip, "--clip", clip)
    none, huge, little = (tensors(state(tmp_path / clip, 2)) for clip in ("0", "1e30", "1e-3"))
    assert same(none, huge) and not same(none, little)


# ---- 10, 11: files that say nothing, or too much ---------------------------------------------------------------
@pytest.mark.parametrize("name, value", [("var", -1.0), ("var", math.nan), ("var", math.inf), ("mean", math.nan), ("mean", -math.inf)])
def test_statistics_of_nothing(home, tmp_path, name, value):
    mean, var = model.load_stats(home / "latents")
    {"mean": mean, "var": var}[name].flatten()[3] = value
    model.write_tensors(tmp_path / "stats.safetensors", {"mean": mean, "var": var})
    with pytest.raises(model.InputError, match="not finite, or a variance below 0"):
        model.load_stats(tmp_path / "stats.safetensors")


DEEP = "[" * 100_000
NO_OBJECT = ["[]", "7", "null", '"text"', DEEP, '{"a": ' * 100_000, "", "{", "\udcff", '{"kind": NaN, }']


def complaint(call, *args, **more):
    """One short line, within a second."""
    start = time.perf_counter()
    with pytest.raises(model.InputError) as caught:
        call(*args, **more)
    assert time.perf_counter() - start < 1 and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("text", NO_OBJECT, ids=range(len(NO_OBJECT)))
def test_json_that_is_no_object(home, run, text):
    for name in ("config.json", "run.json"):
        (run / name).write_bytes(text.encode(errors="surrogateescape"))
        complaint(model.load_network, run) if name == "config.json" else complaint(train, home, "teacher", run, "--resume")
        shutil.copy(home / "teacher" / name, run / name)


HOSTILE = [{"network": network} for network in ([1], 7, "tiny", {"depth": 1})]
HOSTILE += [{"network": {name: value}} for name in ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
            for value in (10 ** 12, -1, 0, "x", None, [10 ** 9, 10 ** 9], [10 ** 400, 2], [], {}, 1e300, True)]
HOSTILE += [{"kind": kind} for kind in ([1], {"a": 1}, 7, "decoder")]
HOSTILE += [{"time_shift": shift} for shift in (0, -1, "3", None, [], math.nan, math.inf, 10 ** 400)]


@pytest.mark.parametrize("change", HOSTILE, ids=[json.dumps(change)[:60] for change in HOSTILE])
def test_hostile_config(run, change):
    """Neither a traceback nor an allocation: sizes are those of the tensors, or refused; of the state, where it is resumed."""
    config = model.read_json(run / "config.json", digest=False)
    if isinstance(network := change.get("network"), dict):
        change = {"network": {**config["network"], **network}} if network != {"depth": 1} else change
    (run / "config.json").write_text(json.dumps({**config, **change}))
    complaint(model.load_network, run)


OTHER_SIZES = [("hidden_size", [2048, 2048]), ("hidden_size", [16, 48]), ("depth", [2, 1]), ("num_classes", 5), ("in_channels", 2 ** 18)]


@pytest.mark.parametrize("name, value", OTHER_SIZES, ids=str)
def test_hostile_config_of_a_resumed_run(home, tmp_path, name, value):
    run = Path(shutil.copytree(home / "cmt", tmp_path / "run"))
    config = model.read_json(run / "config.json", digest=False)
    config["network"][name] = value
    (run / "config.json").write_text(json.dumps(config))
    complaint(train, home, "cmt", run, "--resume", "--steps", "3")


@pytest.mark.parametrize("settings", [[], 7, None, "missing"])
def test_hostile_run_json(home, run, settings):
    model.write_json(run / "run.json", {} if settings == "missing" else {"settings": settings})
    complaint(train, home, "teacher", run, "--resume", "--steps", "3")


def test_hostile_log(home, run):
    """Lines that cannot be read are dropped."""
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": ' + "9" * 5000 + ', "loss": 1}\n{"step": -1}\nnull\n')
    train(home, "teacher", run, "--resume", "--steps", "3")
    assert steps_logged(run) == [1, 2, 3]


HEADERS = [{"seconds": None}, {"seconds": "long"}, {"step": None}, {"step": "2.0"}, {"model": "0" * 64}]


@pytest.mark.parametrize("change", HEADERS, ids=map(str, HEADERS))
def test_hostile_state_header(home, run, change):
    content, header = model.read_tensors(state(run, 2))
    header = {key: value for key, value in (header | change).items() if value is not None and key != "sha256"}
    model.write_tensors(state(run, 2), content, header)
    if "model" in change:                                     # of a network that is not there: it is written
        return train(home, "teacher", run, "--resume", "--steps", "3")
    complaint(train, home, "teacher", run, "--resume", "--steps", "3")


@pytest.mark.parametrize("part", ["net/", "average/", "exp_avg/"])
def test_states_that_lack_tensors(home, run, part):
    content, header = model.read_tensors(state(run, 2))
    name = next(name for name in content if name.startswith(part + "blocks"))
    for change in ({}, {name: torch.zeros(3)}):
        kept = {other: tensor for other, tensor in content.items() if other != name} | change
        model.write_tensors(state(run, 2), kept, {key: value for key, value in header.items() if key != "sha256"})
        complaint(train, home, "teacher", run, "--resume", "--steps", "3")


WEIGHTS = ["pos_embed", "s_embedder.proj.weight", "x_embedder.proj.weight", "y_embedder.embedding_table.weight",
           "enc_feat_rope.freqs_cos", "blocks.0.norm1.weight", "blocks.1.attn.qkv.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")    # torch's word on sizes of 0, which are hostile
@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights(home, run, name):
    """Tensors missing or of another shape, with a config.json and without, as in a published file."""
    content = tensors(run / "model.safetensors")
    for tensor in (None, torch.zeros(()), torch.zeros(0), torch.zeros(1, 0, 1, 1), torch.zeros(5, 3)):
        kept = {other: value for other, value in content.items() if other != name}
        model.write_tensors(run / "model.safetensors", kept if tensor is None else kept | {name: tensor})
        complaint(model.load_network, run)
        complaint(model.load_network, run / "model.safetensors")


@pytest.mark.parametrize("change", [
    {"network": [1]}, {"network": 7}, {"network": {"hidden_size": 10 ** 9}}, {"network": {"num_heads": 0}}, {"kind": []},
    {"_class_name": "AutoencoderRAE"}, *({"_class_name": "AutoencoderRAE", key: value}
                                          for key in ("decoder_hidden_size", "encoder_input_size", "encoder_patch_size", "patch_size")
                                          for value in ("x", -1, 0, 10 ** 12, None))], ids=str)
def test_hostile_decoder(home, tmp_path, change):
    sizes = dict(input_size=4, in_channels=12, hidden_size=16, depth=1, num_heads=2, mlp_size=32, patch_size=4)
    content, folder = model.ViTDecoder(**sizes).state_dict(), tmp_path / "decoder"
    model.save_network(folder, content, {"kind": "decoder", "network": sizes}, model.load_stats(home / "latents"))
    theirs = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "encoder_input_size": 16, "encoder_patch_size": 4,
              "encoder_hidden_size": 12, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32, "patch_size": 4}
    if "_class_name" in change:
        model.write_tensors(folder / "diffusion_pytorch_model.safetensors", {f"decoder.{name}": value for name, value in content.items()}
                            | {"_latents_mean": torch.zeros(()), "_latents_std": torch.ones(())} if len(change) > 1 else {})
        change = theirs | change
    (folder / "config.json").write_text(json.dumps({"kind": "decoder", "network": sizes} | change))
    complaint(model.load_decoder, folder)


def test_hostile_headers(run):
    """Of safetensors: lengths and shapes that are not there."""
    path, big = run / "model.safetensors", 2 ** 62
    for length, header in ((big, b"{}"), (2, b"[]"), (None, b'{"x": {"dtype": "F32", "shape": [%d], "data_offsets": [0, %d]}}' % (big, 4 * big)),
                           (None, b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), (None, b'{"__metadata__": [1]}')):
        path.write_bytes((length or len(header)).to_bytes(8, "little") + header + bytes(4))
        complaint(model.load_network, path)


def test_parsers_refuse_text():
    for kind, text in ((model.positive, "0"), (model.fraction, "1.01"), (model.whole(), "one"), (model.number(int, 1, 5), "6"),
                       (model.not_negative, "-0.0001"), (model.positive, "1e999")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)
