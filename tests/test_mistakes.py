"""Mistakes are one line, exit status 2, no traceback, nothing half-written."""
import argparse
import subprocess
import sys

import pytest
import torch
from runs import ROOT, STAGES, TINY, complain, refused, save_network, train

import model


def test_mistakes(home, tmp_path, capsys):
    new = ["--out", tmp_path / "new"]
    latents, teacher, cmt = ["--latents", home / "latents"], ["--teacher", home / "teacher"], ["--teacher", home / "cmt"]
    expected = [
        ("train_teacher.py", ["--latents", tmp_path / "none", *new], "encode_latents.py"),
        ("train_teacher.py", [*latents, *new, "--log-every", 0], "at least 1"),
        ("train_cmt.py", ["--teacher", "runs/none", *new], "does not exist"),
        ("train_cmt.py", [*cmt, *new], "is a student, a teacher is needed"),
        ("train_meanflow.py", [*cmt, "--init", home / "cmt", *latents, *new], "a teacher is needed"),
        ("train_teacher.py", [*latents, "--batch-size", 18, *new], "multiple of 4"),
        ("train_cmt.py", [*teacher, "--batch-size", 32, "--pairs", 20, *new], "multiple of --pairs"),
        ("train_teacher.py", [*latents, "--out", home / "teacher"], "holds other work"),
        ("train_cmt.py", [*teacher, *new, "--pairs", 6], "--pairs"),
        ("train_meanflow.py", [*latents, *new, "--eta", 1, 0.5, 0], "--eta"),
        ("train_meanflow.py", [*latents, *new, "--eta", 1.5], "at most 1"), ("train_cmt.py", [*teacher, *new, "--clip", "nan"], "--clip"),
        ("train_teacher.py", [*latents, *new, "--seed", "9" * 40], "--seed"), ("train_cmt.py", [*teacher, "--out", ""], "--out: is empty"),
        ("sample.py", [home / "latents"], "model.safetensors")]
    for script, argv, words in expected:
        assert words in refused(script, argv, capsys)
    for script, argv, words in expected[:2]:                  # an InputError, a flag
        assert words in complain(script, *argv)
    assert not (tmp_path / "new").exists()
    for kind, text in ((model.fraction, "1.01"), (model.whole(), "1e3"), (model.number(int, 1, 5), "6"), (model.positive, "0")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_networks_that_do_not_fit(home, tmp_path):
    """Latents and student of different shapes, classes or statistics; the corrected command is free to go to the same --out."""
    for words, shift, changes in (("latents", 0, {"in_channels": 16}), ("4 classes", 0, {"num_classes": 4}), ("statistics", 0.1, {})):
        sizes = {**TINY, "input_size": 4, "in_channels": 12, "num_classes": 3, **changes}
        stats = model.load_network(home / "cmt")[1]["stats"]
        save_network(tmp_path / "other", model.DiTDH(**sizes, time_difference=True), {"time_shift": 3.0},
                     {**stats, "mean": stats["mean"] + shift})
        with pytest.raises(model.InputError, match=words):
            train(home, "meanflow", tmp_path / "out", "--init", tmp_path / "other")
    for name, var, words in (("shape", torch.ones(12, 8, 8), r"\(12, 8, 8\), needed are \(12, 4, 4\)"),
                             ("below", -torch.ones(12, 4, 4), "no variance below 0"), ("inf", torch.ones(12, 4, 4) / 0, "finite")):
        model.write_tensors(tmp_path / f"{name}.safetensors", {"": {"mean": torch.zeros_like(var), "var": var}})
        for stage in STAGES:
            with pytest.raises(model.InputError, match=words):
                train(home, stage, tmp_path / "out", "--stats", tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "out").exists()


def test_help_loads_nothing_heavy():
    """--help answers before what takes seconds to import is imported."""
    scripts = sorted(path.name for path in ROOT.glob("*.py") if path.name != "model.py")
    program = (f"import contextlib, runpy, sys\nfor name in {scripts}:\n    sys.argv = [name, '--help']\n"
               "    with contextlib.suppress(SystemExit):\n        runpy.run_path(name, run_name='__main__')\n"
               "    print('LOADED', [x for x in ('transformers', 'diffusers', 'scipy', 'huggingface_hub') if x in sys.modules])")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert said.count("usage: ") == said.count("LOADED []") == len(scripts) == 6
