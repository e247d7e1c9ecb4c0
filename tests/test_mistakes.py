"""Mistakes are one line, exit status 2, no traceback, nothing half-written."""
import subprocess
import sys

import pytest
import torch
from runs import ROOT, STAGES, TINY, complain, refused, save_network, train

import model


def test_mistakes(home, tmp_path, capsys):
    new = tmp_path / "new"
    expected = [
        ("train_teacher.py", ["--latents", tmp_path / "none", "--out", new], "encode_latents.py"),
        ("train_cmt.py", ["--teacher", "runs/none", "--out", new], "does not exist"),
        ("train_cmt.py", ["--teacher", home / "cmt", "--out", new], "is a student, a teacher is needed"),
        ("train_meanflow.py", ["--teacher", home / "cmt", "--init", home / "cmt", "--latents", home / "latents", "--out", new],
         "a teacher is needed"),
        ("train_teacher.py", ["--latents", home / "latents", "--batch-size", 18, "--out", new], "multiple of 4"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--batch-size", 32, "--pairs", 20, "--out", new], "--pairs"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", home / "teacher"], "holds other work"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", home / "cmt"], "is a student, a teacher is needed"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", new, "--log-every", 0], "at least 1"),
        ("train_teacher.py", ["--latents", home / "latents", "--out", new, "--time-shift", 0], "number above 0"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--out", new, "--pairs", 0], "--pairs"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--eta", 1, 0.5, 0], "--eta"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--eta", 1.5], "at most 1"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--out", ""], "--out: is empty"),
        ("train_meanflow.py", ["--latents", home / "latents", "--out", new, "--init", " "], "--init: is empty"),
        ("train_cmt.py", ["--teacher", home / "teacher", "--out", home / "teacher"], "holds other work"),
        ("sample.py", [home / "latents"], "model.safetensors"),
    ]
    for script, argv, words in expected:
        assert words in refused(script, argv, capsys)
    for script, argv, words in (expected[0], expected[8]):                        # an InputError, a flag
        assert words in complain(script, *argv)
    assert not new.exists()


def test_networks_that_do_not_fit(home, tmp_path):
    """Latents and student of different shapes, classes or statistics."""
    def fails(words, shift=0, **changes):
        net, about = model.load_network(home / "cmt")
        if changes:
            net = model.DiTDH(**{**TINY, "input_size": 4, "in_channels": 12, "num_classes": 3, **changes}, time_difference=True)
        stats = {"mean": about["stats"]["mean"] + shift, "var": about["stats"]["var"]}
        save_network(tmp_path / "other", net, {"time_shift": 3.0}, stats)
        with pytest.raises(model.InputError, match=words):
            train(home, "meanflow", tmp_path / "out", "--init", tmp_path / "other")
        assert not (tmp_path / "out").exists()
    fails("latents", in_channels=16)
    fails("4 classes", num_classes=4)
    fails("statistics", shift=0.1)
    model.write_tensors(tmp_path / "stats.safetensors", {"": {"mean": torch.zeros(12, 8, 8), "var": torch.ones(12, 8, 8)}})
    model.write_tensors(tmp_path / "uneven.safetensors", {"": {"mean": torch.zeros(12), "var": torch.ones(12, 4, 4)}})
    for stage in STAGES:
        for name in ("stats", "uneven"):
            with pytest.raises(model.InputError, match=r"holds statistics \(12.*needed are \(12, 4, 4\)"):
                train(home, stage, tmp_path / "out", "--stats", tmp_path / f"{name}.safetensors")
    with pytest.raises(model.InputError, match="weak"):
        train(home, "cmt", tmp_path / "out", "--guidance", "2", "--weak-teacher", tmp_path / "weak")
    assert not (tmp_path / "out").exists()                                        # the corrected command is free to go there


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert model.provenance()["commit"] == ""


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "model.py"))
def test_help_loads_nothing_heavy(script):
    """--help answers before what takes seconds to import is imported."""
    program = f"""
import runpy, sys
sys.argv = [{script!r}, "--help"]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit:
    print("LOADED", [name for name in ("transformers", "diffusers", "scipy", "huggingface_hub") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage") and done.stdout.strip().endswith("LOADED []"), done.stdout[-200:]
