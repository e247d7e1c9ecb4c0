"""Every script, killed at every call that changes the disk, then repeated: docs/RELIABILITY.md.

    python tests/benchmarks/kill_points.py                      # all
    python tests/benchmarks/kill_points.py --scripts train_cmt.py --quick 20        # one in 20

Such a call makes a folder, opens a file to write, flushes, renames or removes. For each:

    before   SIGKILL instead of the call, which is after the one before it
    torn     SIGKILL with half of the file there
    error    the call fails, and all later ones that need space: one line and status 2, unless nothing is lost
    twice    SIGKILL before the call, and in the repeated run before an early one

The same command must then leave the files of an undisturbed run: all but times, command and date.
"""
import argparse
import errno
import importlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "sanity"), str(ROOT / "tests")]
import numpy  # noqa: E402
import PIL.Image  # noqa: E402
import runs  # noqa: E402
import torch._decomp.decompositions_for_jvp  # noqa: E402
import transformers  # noqa: E402

import model  # noqa: E402

KINDS = ("before", "torn", "error", "twice")
ENCODER = "--out out --width 12 --depth 1 --heads 2 --patch 4"
STEPS = "--steps 3 --save-every 1 --batch-size 8"
STAGE = f"--out out {STEPS} --log-every 1 --keep 1 --precision fp32"
SCRIPTS = {
    "random_encoder.py": ENCODER,
    "digits.py": "--out out --train 20 --held-out 10 --image-size 16",
    "encode_latents.py": "--data-path @/pictures --out out --encoder @/encoder --image-size 16 --encoder-size 16 --shard-size 14 "
                         "--batch-size 7 --workers 0",
    "train_teacher.py": f"--latents @/latents --preset tiny --time-shift 3 {STAGE}",
    "train_cmt.py": f"--teacher @/teacher --teacher-steps 2 --pairs 4 {STAGE}",
    "train_meanflow.py": f"--latents @/latents --teacher @/teacher --init @/cmt {STAGE}",
    "train_decoder.py": f"--data-path @/pictures --latents @/latents --out out --preset tiny {STEPS}",
    "train_encoder.py": f"--data-path @/pictures --image-size 8 --objective self {ENCODER} {STEPS}",
    "export.py": "@/teacher --out out",
    "sample.py": "@/teacher --decoder @/decoder --nfe 2 --num-samples 8 --batch-size 3 --out out/samples.npz",
    "eval_fid.py --save-statistics": "--reference @/a.npz --features encoder:@/latents --save-statistics out/a.safetensors",
    "eval_fid.py --out": "@/a.npz --reference @/b.npz --features encoder:@/latents --pr-images 6 --out out/metrics.json"}
TIMES = rb'(seconds|samples_per_second|date)\\?": ("[^"]*"|[\d.e+-]+)|(?<=}) +'
# What these leave in @
WORLD = {"random_encoder.py": "encoder", "encode_latents.py": "latents", "train_teacher.py": "teacher", "train_cmt.py": "cmt"}


def watch(root, k, kind):
    """Count the calls that change what lies under `root`; do to the k-th what `kind` says."""
    seen, fsync, process = [], os.fsync, os.getpid()

    def at(name, path, tears=False, needs_space=False):
        path = os.path.abspath(path)
        if not path.startswith(f"{root}/") or os.getpid() != process:
            return
        seen.append((name, path, tears))
        if len(seen) - 1 == k and kind in ("before", "torn"):
            if kind == "torn" and path.endswith(".tmp") and os.path.exists(path):
                os.truncate(path, os.path.getsize(path) // 2)
            elif kind == "torn":
                Path(path).open("ab").write(b'{"step": 3, "lo')
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "error" and (len(seen) - 1 == k or needs_space and len(seen) > k):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def hook(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
            at("open", args[0], True, True)
        elif event == "os.mkdir" and not os.path.isdir(args[0]):
            at("mkdir", args[0], False, True)
        elif event in ("os.rename", "os.remove", "os.rmdir") and os.path.lexists(args[0]):
            at(event, args[0])

    def watched_fsync(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        at("fsync", path, not os.path.isdir(path), True)
        fsync(file)
    sys.addaudithook(hook)
    os.fsync = watched_fsync
    return seen


def in_child(function):
    """-> the exit status of a child that calls it."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function()
        sys.stdout.flush()
        os._exit(0)
    except BaseException as error:
        os._exit(error.code if isinstance(error, SystemExit) else 1)


def run(name, home, folder, k=None, kind=None):
    """A script's main in a child, in `folder`. -> its exit status, the lines that it said, points last"""
    folder.mkdir(exist_ok=True)
    said = folder.with_suffix(".said")

    def child():
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC * (stream == 1) | os.O_APPEND), stream)
        script, *_ = sys.argv = [name.split()[0], *SCRIPTS[name].replace("@", str(home)).split()]
        seen = watch(folder, k, kind)
        model.command(sys.modules[script[:-3]].main)
        print(json.dumps(seen))
    status = in_child(child)
    lines = said.read_text().splitlines()
    if status and folder.name == "calm":
        sys.exit(f"{name} fails undisturbed: {lines}")
    return status, lines


def prepare(home):
    """What the scripts read, in `home`."""
    def make():
        runs.random_images(home / "pictures", each=24)
        for k, name in enumerate("ab"):
            pixels = numpy.random.default_rng(k).integers(0, 256, (8, 16, 16, 3), dtype=numpy.uint8)
            numpy.savez(home / f"{name}.npz", pixels)
    assert in_child(make) == 0
    for name, out in WORLD.items():
        run(name, home, home / "calm")
        (home / "calm" / "out").rename(home / out)
        shutil.rmtree(home / "calm")
    assert in_child(lambda: runs.save_decoder(home, home / "decoder")) == 0


def contents(folder):
    """{path: bytes} of what is to be the same: times aside, and of a log each step's last line."""
    found = {}
    for path in folder.rglob("*"):
        data = b"" if path.is_dir() else path.read_bytes()[8:]                    # a safetensors header's length
        if path.suffix == ".jsonl":
            data = json.dumps(model.read_log(path.parent)).encode()
        if not path.name.endswith(".lock"):
            found[str(path.relative_to(folder))] = re.sub(TIMES, b"", data)
    return found


def case(name, home, folder, k, kind, point, want):
    def differ():
        found = contents(folder)
        return [f"{path} is not the same" for path in want.keys() | found.keys() if want.get(path) != found.get(path)]
    status, said = run(name, home, folder, k, "before" if kind == "twice" else kind)
    wrong = []
    if kind == "error":
        lines = [line for line in said if "error" in line and not line.startswith(("warning", "["))]
        if status not in (0, 2) or len(lines) != (status == 2):
            wrong.append(f"status {status} and {len(lines)} lines of errors")
        if status == 0 and not any("warning" in line for line in said) and point[0] not in ("os.remove", "os.rmdir"):
            wrong += differ()                     # nothing is said where nothing is lost: a lock's text
        if list(folder.rglob(".*.tmp")) and point[0] != "os.remove":
            wrong.append("a half is left behind")
    elif status != -signal.SIGKILL:
        wrong.append(f"was to be killed, ended with {status}")
    if kind == "twice":
        run(name, home, folder, k % 7, "before")
    status, again = run(name, home, folder)
    wrong += [f"repeated, status {status}"] if status else differ()
    shutil.rmtree(folder)
    return wrong and f"{name}, {kind} {k} ({point[0]} {point[1]}): {'; '.join(wrong)} {said[-2:]} {again[-2:]}"[:999]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--quick", type=int, default=1)
    args = parser.parse_args()
    # All is imported, also what transformers imports when asked, and no thread started: a process can be forked.
    torch.set_num_threads(1)
    PIL.Image.init()
    assert transformers.Dinov2WithRegistersModel and transformers.AutoModel
    for name in SCRIPTS:
        importlib.import_module(name.split(".")[0])
    model.DECODER_PRESETS["tiny"] = dict(hidden_size=32, depth=1, num_heads=2, mlp_size=64)
    sys.modules["train_decoder"].HELD_OUT = 8
    failed, begun = [], time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        prepare(home)
        print(f"| script | points | {' | '.join(KINDS)} |\n{'|---' * (len(KINDS) + 2)}|", flush=True)
        for name in args.scripts:
            points, want = json.loads(run(name, home, home / "calm")[1][-1]), contents(home / "calm")
            shutil.rmtree(home / "calm")
            held = {kind: [] for kind in KINDS}
            for k, kind in itertools.product(range(len(points)), KINDS):
                if (points[k][2] or kind != "torn") and (k + 5 * KINDS.index(kind)) % args.quick == 0:
                    wrong = case(name, home, home / "case", k, kind, points[k], want)
                    failed += [wrong] if wrong else []
                    held[kind].append(not wrong)
            print(f"| `{name}` | {len(points)} | {' | '.join(f'{sum(x)} of {len(x)}' for x in held.values())} |", flush=True)
    print(*failed, f"{len(failed)} failed; {time.monotonic() - begun:.0f} s", sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
