"""A selection of tests/benchmarks/kill_points.py: killed at a point, repeated, the same files."""
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parent / "benchmarks" / "kill_points.py"
SCRIPTS = ["train_teacher.py", "train_cmt.py", "train_meanflow.py", "encode_latents.py", "sample.py", "eval_fid.py --out"]


def test_killed_and_repeated():
    """In a process of its own, which has one thread and can be forked."""
    argv = [sys.executable, HARNESS, "--quick", "19", "--scripts", *SCRIPTS]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("`") == 2 * len(SCRIPTS), done.stdout + done.stderr
