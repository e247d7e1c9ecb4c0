"""Single changes of the seven files, each of which a test should notice: applied to a copy, tested, undone.

    python tests/benchmarks/mutations.py --jobs 2         # all; prints what no test noticed
    python tests/benchmarks/mutations.py --only train_cmt.py
    python tests/benchmarks/mutations.py --list           # only see that each old text is there exactly once

A test that hangs has noticed.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# file: [(old text, new text, "NAME: words", of the tests in tests/test_NAME.py whose names have them)]
MUTATIONS = {
    "model.py": [
        ("[-x1, x0], dim", "[x1, -x0], dim", "networks: published"),
        ("/ math.sqrt(q.shape[-1])", "", "losses: published"),
        ("x * inverse * self.weight", "x * inverse", "compile: exact"),
        ("zeros_(self.r_embedder.mlp[2].weight)", "normal_(self.r_embedder.mlp[2].weight)", "networks: starts_as or initialization"),
        ("self.x_embedder(z).to(self.pos_embed.dtype)", "self.x_embedder(z)", "networks: initialization"),
        ("(1 + (a - 1) * u)", "(1 + a * u)", "networks: published"),
        ("/ 2 * (v_t + v_s)", "/ 2 * (v_t + v_t)", "losses: cmt_target"),
        ("y, z.new_full((len(z),), s))", "y, z.new_full((len(z),), t))", "networks: published"),
        ("return v_weak + w.reshape", "return v + w.reshape", "losses: guid"),
        ("(interval[0] <= t) & (t", "(interval[0] <= t) | (t", "losses: guid"),
        ("repr(key)", "repr(key[:2])", "stages: trains_on"),
        ("in range(rows[0] // 4, rows[1] // 4)", "in range((rows[1] - rows[0]) // 4)", "resume: splitting"),
        ("range(rank * share, (rank + 1) * share", "range(0, share", "resume: splitting"),
        ("signal.getsignal(number) != signal.SIG_IGN", "True", "faults: nohup"),
        ('[settings["keep"]:]', '[settings["keep"] + 1:]', "faults: kept"),
        ("os.fsync(file.fileno())", "pass", "faults: on_the_disk"),
        ("fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "faults: second_process"),
        ("and before.get(name) != now.get(name)", "and False", "faults: other"),
        ("digest_of(parts[part]) != digests[part]", "False", "faults: cannot_be_read"),
        ("_norm([*net.parameters(), *average.parameters()", "_norm([*net.parameters()", "resume: not_finite"),
        ('for moment in ("exp_avg", "exp_avg_sq")', 'for moment in ("exp_avg",)', "resume: gone_on"),
        ("keep and save and keep % save", "False", "mistakes: mistakes"),
        ("in gather(work))", "in [work])", "faults: processes_of"),
        ("return step, seconds", "return step, 0.0", "resume: gone_on"),
        ("content[key], free)", "content[key], content[key])", "faults: folder"),
        ("math.sqrt(mean)", "mean", "stages: norm"),
        ('isfinite(line["loss"] + line["grad_norm"])', 'isfinite(line["loss"])', "stages: norm"),
        ('lines[line["step"]] = line', 'lines.setdefault(line["step"], line)', "faults: log"),
        ("{**state, **fresh})", "{**state, **fresh}, strict=False)", "checkpoints: refused"),
        ('content.get("ema", content.get("model", content))', 'content.get("model", content.get("ema", content))', "checkpoints: forms"),
        ("weights_only=True", "weights_only=False", "checkpoints: refused"),
        ('os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"', "False", "faults: srun"),
        ('weak), about_weak["sha256"]', "weak), None", "faults: other_inputs"),
        ("if self.checkpoint_activations and", "if False and", "stages: options and checkpoint and teacher"),
    ],
    "encode_latents.py": [
        ('seed, "flips", number', 'seed, "epoch", number', "stages: keys; encode_latents: flips"),
        ("range(first_step, last_step)", "range(last_step - first_step)", "encode_latents: rows; resume: gone_on"),
        ("(pixels / 257).round()", "(pixels / 256).round()", "encode_latents: odd"),
        ("if not squares.isfinite().all():", "if False:", "encoders: given"),
        ("check=k not in made", "check=False", "encode_latents: going_on"),
        ("if rank == 0 and missing:", "if False:", "encode_latents: made_again"),
        ("digest_of(self.stats), self.data.sha256", "digest_of(self.stats)", "faults: other_inputs; encode_latents: identity"),
    ],
    "train_teacher.py": [
        ("p < args.label_dropout", "p > args.label_dropout", "stages: teacher_trains_on"),
        ("weight_decay=0.0", "weight_decay=0.01", "stages: replayed and teacher"),
        ("1 - args.ema)", "args.ema)", "stages: replayed and teacher"),
        ("(loss / len(micro_batches)).backward", "loss.backward", "resume: splitting and teacher"),
        ("args.steps - 1 - begin", "args.steps - begin", "stages: replayed and teacher"),
        ("args.clip or math.inf", "args.clip", "stages: replayed and teacher"),
        ('seed, "teacher", step', 'seed, "teacher"', "stages: keys"),
        ("sys.exit(128 + stop)", "sys.exit(0)", "faults: signals_save"),
        (".requires_grad_(False)", "", "stages: replayed and teacher"),
        ("range(first_step, args.steps)", "range(0, args.steps)", "resume: gone_on and teacher"),
        ("manual_seed(args.seed)", "manual_seed(0)", "stages: seed"),
        ("rows == micro_batches[-1]", "rows == micro_batches[0]", "resume: splitting and teacher"),
    ],
    "train_cmt.py": [
        ('"trajectory", group, serial', '"trajectory", serial', "stages: cmt_trains_on or keys"),
        ("step // self.pairs != self.era", "self.era is None", "stages: cmt_trains_on"),
        ('self.seed, "pairs", step', 'self.seed, "trajectory", step', "stages: keys"),
        ("- self.groups[0])", "- 0)", "resume: splitting and cmt"),
        ("ode_times(args.teacher_steps, args.time_shift)", "ode_times(args.teacher_steps, 1.0)", "stages: cmt_trains_on"),
        ('weak teacher": weak', 'weak teacher": None', "faults: other_inputs"),
        ("if args.batch_size % (args.pairs * world):", "if False:", "mistakes: mistakes"),
    ],
    "train_meanflow.py": [
        ("(q.detach() + loss_eps)", "(q + loss_eps)", "losses: published"),
        ("eta * v(z_t, t, y)", "eta * v(z_t, s, y)", "losses: numbers"),
        ("((t + d <= 1) & (t - d >= s))", "(t + d <= 1)", "losses: second_order"),
        ("s, t = time_shift(", "t, s = time_shift(", "stages: meanflow_trains_on"),
        ("* step / max(1, args.steps - 1)", "* step / args.steps", "stages: meanflow_trains_on"),
        ("args.loss_power, args.loss_eps, jumps", "1.0, args.loss_eps, jumps", "stages: meanflow_trains_on"),
        ('seed, "meanflow", step', 'seed, "teacher", step', "stages: keys"),
        ("set_float32_matmul_precision(precision)", "get_float32_matmul_precision()", "losses: precision"),
        ("enabled=False)", "enabled=True)", "losses: precision"),
        ('of_teacher["sha256"], "sha256 of weak', 'None, "sha256 of weak', "faults: other_inputs"),
        ("or not (same or args.stats)", "or False", "mistakes: fit"),
    ],
    "sample.py": [
        ("digest[:16]", "digest[:4]", "sampling: noise"),
        ("nfe // 2", "nfe", "sampling: times"),
        ("images if truncate else images.round()", "images.round() if truncate else images", "sampling: pixels"),
        ("if not images.isfinite().all():", "if False:", "sampling: nothing"),
        ("refuse_other(out, read_about(out), settings)", "out", "sampling: content"),
        ("refuse_other(parts, read_tensors(path, only=())[1], settings)", "path", "sampling: interrupted"),
        ('"sha256 of network": about["sha256"], ', "", "sampling: content"),
        ("args.time_shift, v)", "args.time_shift)", "sampling: sample_file"),
        ('enabled=args.precision == "bf16"', "enabled=False", "sampling: times"),
        ("denormalize(z_0, stats)", "z_0", "sampling: readme"),
        ("about, args.guidance_interval)", "about)", "sampling: sample_file"),
    ],
    "eval_fid.py": [
        ("(nearest)[:, k]", "(nearest)[:, k - 1]", "eval_fid: brute"),
        ("distances - rounding <= radii", "distances + rounding < radii", "eval_fid: brute"),
        ("no_output_bias=True", "no_output_bias=False", "eval_fid: interface"),
        ("keep[torch.arange(kept) * count // max(kept, 1)]", "keep[torch.arange(kept)]", "eval_fid: stands"),
        ("rank * count // world, (rank + 1) * count // world", "count // world * rank, count // world * (rank + 1)",
         "eval_fid: processes"),
        ('if saved.get("features", about) != about:', "if False:", "eval_fid: stands"),
        ("kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps", "kept = values > 0", "eval_fid: closed_form"),
        ("INCEPTION_SHA256, progress", "None, progress", "eval_fid: fetched"),
        ("if not f.isfinite().all():", "if False:", "eval_fid: wrong"),
    ],
}


def noticed(folder, where):
    """The test that fails in a copy of the repository; None: none does; or why none could be run."""
    for group in where.split("; "):
        name, words = group.split(": ")
        argv = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", "-k", words]
        process = subprocess.Popen(argv, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            said = process.communicate(timeout=240)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return "one that hangs"
        if process.returncode == 1:
            return re.search(r"(?:FAILED|ERROR) tests/([^\n]*)", said)[1][:90]
        if process.returncode:
            return f"NOTHING RUNS: {said[-300:]}"


def survives(change):
    name, old, new, where = change
    with tempfile.TemporaryDirectory() as home:
        copy = Path(shutil.copytree(ROOT, f"{home}/copy", ignore=shutil.ignore_patterns(".git", "__pycache__", ".venv")))
        (copy / name).write_text((ROOT / name).read_text().replace(old, new))
        by = noticed(copy, where)
    print(f"{name}: {old} -> {new}: {by or 'SURVIVES'}", flush=True)
    return by is None or by.startswith("NOTHING RUNS")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="changes at a time (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], help="those whose file or old text begins so")
    parser.add_argument("--list", action="store_true", help="run nothing")
    args = parser.parse_args()
    changes = [(name, *change) for name, changes in MUTATIONS.items() for change in changes]
    for name, old, *_ in changes:
        if (n := (ROOT / name).read_text().count(old)) != 1:
            sys.exit(f"{name} has {n} times, and should have once: {old}")
    todo = [change for change in changes if any(text.startswith(word) for word in args.only for text in change[:2])]
    with ThreadPoolExecutor(args.jobs) as threads:
        survivors = [] if args.list else list(threads.map(survives, todo))
    print(f"{len(changes)} changes, {len(survivors)} tried, {sum(survivors)} survive")
    sys.exit(any(survivors))


if __name__ == "__main__":
    main()
