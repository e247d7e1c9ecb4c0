"""Every script, killed at every point where it touches the disk, then repeated: docs/RELIABILITY.md's table.

    python tests/benchmarks/kill_points.py                              # all; two cases at a time; prints Markdown
    python tests/benchmarks/kill_points.py --scripts train_cmt.py --kinds before error
    python tests/benchmarks/kill_points.py --quick                      # what tests/test_kill_points.py runs

A point is a call that changes the disk, in order: a folder made, a file opened to be written, its first bytes, fsync, a
rename, a removal. An undisturbed run counts them. Then, for every point, in a new folder:

    before   SIGKILL instead of the call
    after    SIGKILL after it
    torn     SIGKILL when half of a file, or of what is written, is there
    error    the call fails, the disk being full: one line and status 2, unless nothing is lost
    full     so do all later calls that need space
    twice    SIGKILL before the point, and in the repeated run before its first point, its second, ... in turn

The same command must then end well, and leave the files of the undisturbed run: every tensor, every number of the log (its
last line of a step) but times and memory, run.json but command and date; no file more, none less.
A server imports everything once, with one thread, and forks a child for each run.
"""
import argparse
import builtins
import errno
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "sanity")]

KINDS = ("before", "after", "torn", "error", "full", "twice")
TINY = dict(hidden_size=(16, 24), depth=(1, 1), num_heads=(2, 2))
DECODER = dict(input_size=4, in_channels=12, hidden_size=16, depth=1, num_heads=2, mlp_size=32, patch_size=4)
STAGE = ["--out", "out", "--steps", "3", "--save-every", "1", "--log-every", "1", "--keep", "1", "--batch-size", "8",
         "--precision", "fp32"]
ENCODER = ["--width", "12", "--depth", "1", "--heads", "2", "--patch", "4"]
# HOME holds what the world's scripts made.
SCRIPTS = {
    "random_encoder.py": ["--out", "out", *ENCODER],
    "digits.py": ["--out", "out", "--train", "20", "--held-out", "10", "--image-size", "16"],
    "encode_latents.py": ["--data-path", "HOME/spoilt", "--out", "out", "--encoder", "HOME/encoder", "--image-size", "16",
                           "--encoder-size", "16", "--shard-size", "14", "--batch-size", "7", "--workers", "0",
                           "--skip-bad"],
    "train_teacher.py": ["--latents", "HOME/latents", "--preset", "tiny", "--time-shift", "3", *STAGE],
    "train_cmt.py": ["--teacher", "HOME/teacher", "--teacher-steps", "2", "--pairs", "4", *STAGE],
    "train_meanflow.py": ["--latents", "HOME/latents", "--teacher", "HOME/teacher", "--init", "HOME/cmt", *STAGE],
    "train_decoder.py": ["--data-path", "HOME/images", "--latents", "HOME/latents", "--out", "out", "--preset", "tiny",
                          "--steps", "3", "--save-every", "1", "--batch-size", "8"],
    "train_encoder.py": ["--data-path", "HOME/images", "--out", "out", "--image-size", "8", "--objective", "self", *ENCODER,
                          "--steps", "3", "--save-every", "1", "--batch-size", "8"],
    "export.py": ["HOME/teacher", "--out", "out"],
    "sample.py": ["HOME/teacher", "--decoder", "HOME/decoder", "--nfe", "2", "--num-samples", "8", "--batch-size", "3",
                   "--out", "out/samples.npz"],
    "eval_fid.py --save-statistics": ["--reference", "HOME/a.npz", "--features", "encoder:HOME/latents",
                                       "--save-statistics", "out/statistics.safetensors"],
    "eval_fid.py --out": ["HOME/a.npz", "--reference", "HOME/b.npz", "--features", "encoder:HOME/latents", "--pr-images",
                           "6", "--out", "out/metrics.json"],
}
WORLD = {"random_encoder.py": "encoder", "encode_latents.py": "latents", "train_teacher.py": "teacher", "train_cmt.py": "cmt"}


# ---- The points ----------------------------------------------------------------------------------------------
class Points:
    """Counts the calls that change what lies under `root`, and does to the k-th what `kind` says."""

    def __init__(self, root, k=None, kind=None):
        self.root, self.k, self.kind, self.seen = os.path.realpath(root), k, kind, []
        self.process = os.getpid()

    def at(self, name, path, call, tear=None, needs_space=True):
        """`call()`, one point. tear: what a death, or a full disk, in the middle of it leaves."""
        path = os.path.abspath(path)
        is_here = path == self.root or path.startswith(self.root + "/")
        if not is_here or name == "mkdir" and os.path.isdir(path) or os.getpid() != self.process:
            return call()
        k = len(self.seen)
        self.seen.append((name, os.path.relpath(path, self.root), tear is not None, needs_space))
        if self.kind == "full" and needs_space and self.k is not None and k >= self.k or (k, self.kind) == (self.k, "error"):
            if tear:
                tear()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if k == self.k and self.kind in ("before", "torn"):
            if self.kind == "torn":
                tear()
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if (k, self.kind) == (self.k, "after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def watch(self):
        """Put this in the place of the calls, for the rest of the process."""
        def one(name, place=0, needs_space=True):
            original = getattr(os, name)

            def call(*args, **more):
                if name in ("unlink", "remove") and not os.path.lexists(args[0]):
                    return original(*args, **more)            # fails, and changes nothing
                return self.at(name, args[place], lambda: original(*args, **more), needs_space=needs_space)
            setattr(os, name, call)

        for name, place, needs_space in (
                ("replace", 1, False), ("rename", 1, False), ("unlink", 0, False), ("remove", 0, False),
                ("rmdir", 0, False), ("mkdir", 0, True), ("truncate", 0, False)):
            one(name, place, needs_space)
        fsync, truncate, opened = os.fsync, os.truncate, builtins.open

        def watched_fsync(file):
            path = os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}")
            halve = None if os.path.isdir(path) else lambda: truncate(path, os.path.getsize(path) // 2)
            self.at("fsync", path, lambda: fsync(file), halve)

        def watched_open(file, mode="r", *args, **more):
            if isinstance(file, int) or not set(mode) & set("wax"):
                return opened(file, mode, *args, **more)
            return Written(self, file, self.at("open", file, lambda: opened(file, mode, *args, **more)))

        os.fsync, builtins.open, io.open = watched_fsync, watched_open, watched_open


class Written:
    """A file opened to be written; what it writes first is a point."""

    def __init__(self, points, path, file):
        self.points, self.path, self.file, self.first = points, path, file, True

    def write(self, data):
        def half():
            self.file.write(data[:len(data) // 2])
            self.file.flush()
        if not self.first:
            return self.file.write(data)
        self.first = False
        return self.points.at("write", self.path, lambda: self.file.write(data), half)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# ---- Children ------------------------------------------------------------------------------------------------
def load(scripts):
    """Import everything once, without starting a thread."""
    import importlib

    import torch
    torch.set_num_threads(1)
    import PIL.Image
    import transformers
    PIL.Image.init()
    import torch._decomp.decompositions_for_jvp  # noqa: F401
    assert transformers.Dinov2WithRegistersModel and transformers.AutoConfig and transformers.AutoModel
    import model
    model.DIT_PRESETS["tiny"] = TINY
    model.DECODER_PRESETS["tiny"] = {name: DECODER[name] for name in ("hidden_size", "depth", "num_heads", "mlp_size")}
    modules = {name: importlib.import_module(name.removesuffix(".py")) for name in
               sorted({name.split()[0] for name in [*WORLD, *scripts]})}
    assert len(os.listdir("/proc/self/task")) == 1
    return modules


def run(modules, name, home, folder, k=None, kind=None):
    """A script's main in a child, in `folder`. -> (exit status, minus the signal that killed it; what it said; points)"""
    folder.mkdir(exist_ok=True)
    said, trace = folder.with_suffix(".said"), folder.with_suffix(".trace")
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        points = [tuple(point) for point in json.loads(trace.read_text())] if status == 0 else []
        return status, said.read_text(), points
    status = 1
    try:
        os.chdir(folder)
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        script = name.split()[0]
        arguments = [argument.replace("HOME", str(home)) for argument in SCRIPTS[name]]
        sys.argv = [script, *arguments]
        if hasattr(modules[script], "HELD_OUT"):
            modules[script].HELD_OUT = 8
        points = Points(folder, k, kind)
        points.watch()
        import model
        try:
            model.command(lambda: modules[script].main(arguments))
            status = 0
        except SystemExit as end:
            status = end.code or 0
        points.root = "/nowhere"
        trace.write_text(json.dumps(points.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare(modules, home):
    """The world: images, an encoder, latents, a teacher, a CMT student, a decoder, samples, images of which one is broken."""
    def make(name, out):
        status, said, _ = run(modules, name, home, home / "making")
        if status:
            sys.exit(f"{name} fails undisturbed: {said}")
        (home / "making" / "out").rename(home / out)
        shutil.rmtree(home / "making")

    child = os.fork()
    if not child:
        try:
            import numpy
            import torch
            from model import ViTDecoder, write_tensors
            from PIL import Image
            g = numpy.random.default_rng(0)
            for k in range(3):
                (home / "images" / f"class{k}").mkdir(parents=True)
                for i in range(24):
                    picture = g.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
                    Image.fromarray(picture).save(home / "images" / f"class{k}" / f"{i}.png")
            (home / "spoilt").symlink_to("images")
            for name in "ab":
                numpy.savez(home / f"{name}.npz", g.integers(0, 256, (8, 16, 16, 3), dtype=numpy.uint8))
            parts = {"": ViTDecoder(**DECODER).state_dict(), "stats": {"mean": torch.zeros(12, 4, 4), "var": torch.ones(12, 4, 4)}}
            write_tensors(home / "decoder" / "model.safetensors", parts, {"num_heads": DECODER["num_heads"]})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    for name, out in WORLD.items():
        make(name, out)
    (home / "spoilt").unlink()
    shutil.copytree(home / "images", home / "spoilt")
    (home / "spoilt" / "class1" / "5.png").write_bytes(b"no picture")


# ---- The same files ------------------------------------------------------------------------------------------
def contents(folder):
    """{name: what must be the same} of all files. Not compared: times, memory, dates, commands; locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir():
            found[f"{name}/"] = "a folder"
        elif not path.name.endswith(".lock"):
            found[name] = content(path)
    return found


def content(path):
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + length])
        about = {key: json.loads(text) if key != "format" else text for key, text in header.pop("__metadata__", {}).items()}
        return {**header, "about": without_times(about), "data": data[8 + length:]}
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}
    if path.suffix == ".jsonl":
        from model import read_log
        return [without_times(line) for line in read_log(path.parent)]
    if path.suffix == ".json":
        return without_times(json.loads(data))
    return data


def without_times(content):
    if isinstance(content, dict):
        dropped = {"seconds", "samples_per_second", "memory_gb", "command", "date"}
        return {key: without_times(value) for key, value in content.items() if key not in dropped}
    return [without_times(item) for item in content] if isinstance(content, list) else content


def differences(want, found):
    """What is not the same, in words."""
    said = [f"{name} is missing" for name in want.keys() - found.keys()]
    said += [f"{name} is there too" for name in found.keys() - want.keys()]
    for name in want.keys() & found.keys():
        if want[name] != found[name]:
            said.append(f"{name} differs" + (f" ({found[name]})" if name.endswith((".json", ".jsonl")) else ""))
    return said


def case(modules, name, home, folder, k, kind, point, want, places):
    """One case; returns what is wrong, in words. places: of the repeated run, for the second kill."""
    wrong, first = [], "before" if kind == "twice" else kind
    status, said, _ = run(modules, name, home, folder, k, first)
    if kind in ("error", "full"):
        lines = [line for line in said.splitlines() if "error" in line and not line.startswith("warning")]
        if "Traceback" in said:
            wrong.append("a traceback: " + said.strip().splitlines()[-1])
        elif status not in (0, 2) or status == 2 and len(lines) != 1 or status == 0 and lines:
            wrong.append(f"status {status} and {len(lines)} lines of errors: {said[-300:]}")
        elif status == 0 and "warning" not in said and point[0] not in ("unlink", "rmdir"):
            # Nothing to say where nothing is lost: a lock's text, a file that was opened once more.
            wrong += [f"status 0, but {words}" for words in differences(want, contents(folder))]
        halves = [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]
        if halves and not (kind == "error" and point[0] in ("unlink", "remove")):
            wrong.append(f"left behind: {halves}")
    elif status != -signal.SIGKILL:
        wrong.append(f"was to be killed, ended with {status}: {said[-300:]}")
    if kind == "twice":
        status, said, _ = run(modules, name, home, folder, next(places), "before")
        if status not in (0, -signal.SIGKILL):
            wrong.append(f"repeated, status {status}: {said[-300:]}")
    status, said, _ = run(modules, name, home, folder)
    if status or "Traceback" in said:
        wrong.append(f"repeated, status {status}: {said[-300:]}")
    else:
        wrong += differences(want, contents(folder))
    return wrong


# ---- All of them ---------------------------------------------------------------------------------------------
def in_children(jobs, tasks):
    """Do tasks, {key: function}, `jobs` at a time, each in a child; yields (key, result, as JSON)."""
    running, waiting = {}, iter(tasks.items())
    while True:
        while len(running) < jobs and (task := next(waiting, None)):
            read, write = os.pipe()
            child = os.fork()
            if not child:
                try:
                    os.close(read)
                    result = json.dumps(task[1]())
                except BaseException:
                    result = json.dumps([traceback.format_exc()])
                with os.fdopen(write, "w") as file:
                    file.write(result[:60_000] if len(result) <= 60_000 else json.dumps([result[:50_000]]))
                os._exit(0)
            os.close(write)
            running[child] = task[0], read
        if not running:
            return
        child, _ = os.wait()
        if child in running:
            key, read = running.pop(child)
            with os.fdopen(read) as file:
                yield key, json.load(file)


def chosen(points, kinds, quick, teacher):
    """The (point, kind) that are tried. quick N: of the teacher's last save all, of the rest one in N."""
    cases = []
    saves = [k for k, (name, path, *_) in enumerate(points) if name == "open" and "state_00000003" in path]
    for k, (_, _, tears, needs_space) in enumerate(points):
        for kind in kinds:
            if kind == "torn" and not tears or kind == "full" and not needs_space:
                continue
            is_last = saves and k >= saves[0] and kind == "before"
            if not quick or is_last and teacher or (k + 5 * KINDS.index(kind)) % quick == 0:
                cases.append((k, kind))
    return cases


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="(default: all)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    add("--jobs", type=int, default=2, help="cases at a time (default %(default)s)")
    add("--quick", type=int, nargs="?", const=24, metavar="N", help="the teacher's last save, and one point in N (24)")
    add("--points", action="store_true", help="only list each script's points")
    add("--folder", type=Path, help="where what failed is kept (default: a temporary folder)")
    args = parser.parse_args()
    begin, failed = time.monotonic(), []
    modules = load(args.scripts)
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        prepare(modules, home)
        width = len(args.kinds)
        print("| script | points |" + "".join(f" {kind} |" for kind in args.kinds) + " seconds |")
        print("|---|" + "---|" * (width + 2), flush=True)
        for name in args.scripts:
            start = time.monotonic()
            status, said, points = run(modules, name, home, home / "calm")
            if status:
                sys.exit(f"{name} fails undisturbed: {said}")
            if args.points:
                print(*(f"{k:4} {' '.join(map(str, point))}" for k, point in enumerate(points)), sep="\n")
            want = contents(home / "calm")
            cases = [] if args.points else chosen(points, args.kinds, args.quick, name == "train_teacher.py")
            places = itertools.cycle(range(40))
            tasks = {}
            for k, kind in cases:
                folder, place = home / f"{k}-{kind}", itertools.repeat(next(places))
                tasks[k, kind] = (lambda k=k, kind=kind, folder=folder, place=place, name=name, points=points, want=want:
                                  case(modules, name, home, folder, k, kind, points[k], want, place))
            count, survived = dict.fromkeys(args.kinds, 0), dict.fromkeys(args.kinds, 0)
            for (k, kind), wrong in in_children(args.jobs, tasks):
                folder = home / f"{k}-{kind}"
                count[kind] += 1
                survived[kind] += not wrong
                if wrong:
                    failed.append(f"{name}, {kind} {k} ({' '.join(map(str, points[k][:2]))}): {'; '.join(wrong)}")
                    if args.folder:
                        label = re.sub(r"\W+", "-", name)
                        shutil.copytree(folder, args.folder / f"{label}-{k}-{kind}", dirs_exist_ok=True)
                for path in folder.parent.glob(f"{folder.name}.*"):
                    path.unlink()
                shutil.rmtree(folder)
            shutil.rmtree(home / "calm")
            print(f"| `{name}` | {len(points)} |" + "".join(f" {survived[k]} of {count[k]} |" for k in args.kinds)
                  + f" {time.monotonic() - start:.0f} |", flush=True)
    for line in failed:
        print(f"FAILED {line}")
    print(f"{len(failed)} failed; {time.monotonic() - begin:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
