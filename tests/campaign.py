"""Killed, cut, turned bits, full disks: what docs/RELIABILITY.md promises, tried. About half an hour on one core; prints Markdown.

    python tests/campaign.py                       # all of it, in a temporary folder
    python tests/campaign.py --parts kill --kills 3 --commands sample.py

kill: each command is killed (SIGKILL) at random times, resumed each time, and must end with the very files of an undisturbed run.
damage: a bit turned, or the end cut, in a copy of each kind of file we write: the next command must name it, or do without it.
disk: each command on a disk that is too small, and on one that fills while it runs (a tmpfs: Linux, root); then again with space made.
"""
import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import digest_of  # noqa: E402

ENCODER = "random:width=32,depth=1,heads=2,patch=8,seed=0"
SMALL = "--batch-size 16 --save-every 4 --log-every 4 --keep 2"
STAGES = {   # name: (script, arguments; {home} holds what the stages before made, {out} is written, what must be the same in the end)
    "encode_latents.py": ("--data-path {home}/images --out {out} --image-size 32 --encoder-size 32 --batch-size 16 --shard-size 100 "
                          f"--workers 2 --encoder {ENCODER}", "*"),
    "train_teacher.py": (f"--latents {{home}}/latents --out {{out}} --preset DiTDH-mini --steps 160 --time-shift 3 {SMALL} --resume", "*s"),
    "train_cmt.py": (f"--teacher {{home}}/teacher --out {{out}} --pairs 4 --pool-age 8 --steps 160 {SMALL} --resume", "*s"),
    "train_meanflow.py": (f"--latents {{home}}/latents --teacher {{home}}/teacher --init {{home}}/cmt --out {{out}} --steps 120 {SMALL} "
                          "--resume", "*s"),
    "sample.py": ("{home}/teacher --decoder {home}/decoder --nfe 50 --num-samples 600 --batch-size 20 --out {out}/samples.npz", "*.npz"),
}


def command(script, home, out, *more):
    return [sys.executable, str(ROOT / script), *STAGES[script][0].format(home=home, out=out).split(), *more]


def run(*argv, cwd=ROOT):
    """-> (exit status, the last line of what it said, all lines)"""
    result = subprocess.run(argv, capture_output=True, text=True, cwd=cwd)
    if "Traceback" in result.stderr:
        sys.exit(f"a traceback from {' '.join(map(str, argv))}:\n{result.stderr}")
    lines = ["", *result.stdout.splitlines(), *result.stderr.splitlines()]
    return result.returncode, lines[-1][:240], lines


def prepare(home):
    """A small world: images, latents, decoder, teacher, CMT."""
    rng = np.random.default_rng(0)
    for label in "abc":
        (home / "images" / label).mkdir(parents=True)
        for i in range(400):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(home / "images" / label / f"{i:03d}.png")
    for name, script in (("latents", "encode_latents.py"), ("teacher", "train_teacher.py"), ("cmt", "train_cmt.py")):
        assert run(*command(script, home, home / name))[0] == 0
    code, said, _ = run(sys.executable, "sanity/train_decoder.py", "--data-path", home / "images", "--latents", home / "latents", "--out",
                     home / "decoder", "--steps", "4", "--batch-size", "16")
    assert code == 0, said


def files(folder, pattern):
    """{name: sha256} of the files that must be the same: all but *.json, which hold dates and commands; of .safetensors the tensors, as
    the header of a state holds the seconds of training."""
    return {path.name: digest_of(load_file(path)) if path.suffix == ".safetensors" else hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.glob(pattern)) if path.suffix not in (".json", ".jsonl")}


def kill(home, commands, kills, rng):
    print("| command | undisturbed, s | killed | while | files | bit-identical |\n|---|---|---|---|---|---|", flush=True)
    for script in commands:
        pattern, calm, wild = STAGES[script][1], home / "calm", home / "wild"
        start = time.monotonic()
        assert run(*command(script, home, calm))[0] == 0
        seconds, killed, writing = time.monotonic() - start, 0, 0
        while killed < kills:
            process = subprocess.Popen(command(script, home, wild), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
            try:
                process.wait(rng.uniform(0.3, 1) * seconds)
                if process.returncode:
                    sys.exit(f"{script} failed after {killed} kills: {run(*command(script, home, wild))[1]}")
                shutil.rmtree(wild)                                 # it came to its end: once more from the beginning
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)              # its workers too
                process.wait()
                killed += 1
                writing += any(wild.rglob(".*tmp*"))
        code, said, _ = run(*command(script, home, wild))
        same = code == 0 and files(calm, pattern) == files(wild, pattern)
        print(f"| `{script}` | {seconds:.0f} | {killed} times | {writing} writing a file | {len(files(calm, pattern))} | "
              f"{'yes' if same else 'NO: ' + said} |", flush=True)
        for folder in (calm, wild):
            shutil.rmtree(folder)


def damage(home, rng):
    """For each kind of file: what the next command that reads it does when a bit has turned, or the end is cut."""
    sample = [sys.executable, str(ROOT / "sample.py"), "teacher", "--decoder", "decoder", "--num-samples", "4", "--nfe", "2",
              "--out", "s.npz"]
    verify = [sys.executable, str(ROOT / "encode_latents.py"), "--out", "latents", "--verify"]
    resume = command("train_meanflow.py", ".", "mfd")
    score = [sys.executable, str(ROOT / "eval_fid.py"), "s.npz", "--reference", "s.npz", "--features", f"encoder:{ENCODER}",
             "--pr-images", "0"]
    statistics = [*score[:2], "--reference", "s.npz", "--save-statistics", "statistics.safetensors", *score[5:7]]
    compare = [*score[:4], "statistics.safetensors", *score[5:]]
    encode = [sys.executable, str(ROOT / "encode_latents.py"), *STAGES["encode_latents.py"][0].format(home=home, out="latents").split()]
    for first in (sample, resume, statistics):
        assert run(*first, cwd=home)[0] == 0
    state = max(path.name for path in (home / "mfd").glob("state_*"))
    cases = [("latents/shard_00001.safetensors", verify), ("latents/latent_stats.safetensors", verify), ("latents/latents.json", verify),
             ("latents/encoding.json", encode), ("statistics.safetensors", compare),
             ("teacher/config.json", sample), ("teacher/model.safetensors", sample), ("teacher/latent_stats.safetensors", sample),
             ("decoder/model.safetensors", sample), ("decoder/config.json", sample), (f"mfd/{state}", resume), ("mfd/run.json", resume),
             ("mfd/log.jsonl", resume), ("s.npz", score), ("s.json", sample)]
    print("| file | a bit turned: 10 places | cut in 3 places | it says |\n|---|---|---|---|", flush=True)
    for name, after in cases:
        content, seen, said = (home / name).read_bytes(), {"turned": [], "cut": []}, ""
        places = [rng.randrange(len(content)) for _ in range(10)]
        broken = [("turned", content[:i] + bytes([content[i] ^ 1 << rng.randrange(8)]) + content[i + 1:]) for i in places]
        broken += [("cut", content[:int(part * len(content))]) for part in (0, 0.5, 0.999)]
        for kind, bad in broken:
            copy = home / "copy"
            shutil.copytree(home, copy, ignore=shutil.ignore_patterns("copy", "images"), copy_function=os.link)
            (copy / name).unlink()
            (copy / name).write_bytes(bad)
            if "teacher/" in name or "decoder/" in name:
                (copy / "s.npz").unlink()                           # so that it is made again
            code, line, heard = run(*after, cwd=copy)
            named = [part for part in heard if Path(name).name in part
                     and any(word in part for word in ("damage", "cannot read", "not a readable", "changed"))]
            seen[kind].append(bool(named))
            said = f"{named[0][:200]} (status {code})" if named else said or f"nothing (status {code})"
            shutil.rmtree(copy)
        print(f"| `{name}` | {sum(seen['turned'])} noticed | {sum(seen['cut'])} noticed | {said} |", flush=True)


def fill(disk, process, out):
    """Take all that is left of a disk once the first file of tensors is there."""
    while process.poll() is None and not any(out.rglob("[!.]*.safetensors")):
        time.sleep(0.002)
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass


def disk(home, commands):
    print("| command | disk | it says | status | with space made | the same files |\n|---|---|---|---|---|---|", flush=True)
    for script in commands:
        pattern, calm, small = STAGES[script][1], home / "calm", home / "small"
        assert run(*command(script, home, calm))[0] == 0
        room = sum(path.stat().st_size for path in calm.rglob("*") if path.is_file()) / 1e6
        for fills in (False, True):
            out, size = small / "out", max(8, round(4 * room)) if fills else max(1, round(room / 1.5))
            small.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", small]).returncode:
                sys.exit("a small disk needs root on Linux (mount -t tmpfs)")
            try:
                process = subprocess.Popen(command(script, home, out), cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                           stderr=subprocess.STDOUT)
                if fills:
                    fill(small, process, out)
                said = process.communicate()[0]
                half = [path.name for path in small.rglob(".*tmp*")] + ["a traceback"] * ("Traceback" in said)
                (small / "filler").unlink(missing_ok=True)
                subprocess.run(["mount", "-o", f"remount,size={size * 10}m", small], check=True)
                after, *_ = run(*command(script, home, out))
                same = after == 0 and files(calm, pattern) == files(out, pattern)
                print(f"| `{script}` | {'filled while it ran' if fills else f'{size} MB'} | "
                      f"{said.splitlines()[-1][:240].replace(str(home), '...')} | {process.returncode} | status {after} | "
                      f"{'yes' if same and not half else f'NO {half}'} |", flush=True)
            finally:
                subprocess.run(["umount", small], check=True)
                shutil.rmtree(small)
        shutil.rmtree(calm)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("kill", "damage", "disk"), default=["kill", "damage", "disk"], help="(default: all)")
    parser.add_argument("--commands", nargs="+", choices=STAGES, default=list(STAGES),
                        help="that are killed and given small disks (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="of each command (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of times and places (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        home, rng = Path(home), random.Random(args.seed)
        prepare(home)
        for part in args.parts:
            print(f"\n{part}\n", flush=True)
            {"kill": lambda: kill(home, args.commands, args.kills, rng), "damage": lambda: damage(home, rng),
             "disk": lambda: disk(home, args.commands)}[part]()


if __name__ == "__main__":
    main()
