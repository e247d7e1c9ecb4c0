"""Mistakes are one line, exit status 2, no traceback, before anything is loaded or made."""
import pytest
import torch
from runs import TINY, complain, refused, save_network, train

import model


def test_mistakes(home, tmp_path, capsys):
    new, latents = ["--out", tmp_path / "new"], ["--latents", home / "latents"]
    teacher, cmt = ["--teacher", home / "teacher"], ["--teacher", home / "cmt"]
    expected = [
        ("train_teacher.py", ["--latents", tmp_path / "none", *new], "encode_latents.py"),
        ("train_teacher.py", [*latents, *new, "--log-every", 0], "at least 1"),
        ("train_teacher.py", [*latents, *new, "--label-dropout", 1.5], "at most 1"),
        ("train_teacher.py", [*latents, *new, "--clip", "nan"], "--clip"),
        ("train_teacher.py", [*latents, "--out", ""], "--out: is empty"),
        ("train_teacher.py", [*latents, *new, "--batch-size", 18], "multiple of 4"),
        ("train_teacher.py", [*latents, *new, "--keep-every", 7], "--save-every"),
        ("train_cmt.py", ["--teacher", "runs/none", *new], "does not exist"),
        ("train_cmt.py", [*cmt, *new], "is a student, a teacher is needed"),
        ("train_cmt.py", [*teacher, *new, "--batch-size", 32, "--pairs", 20], "multiple of --pairs"),
        ("train_meanflow.py", [*latents, *new, "--eta", 1, 0.5, 0], "--eta")]
    for script, argv, words in expected:
        assert words in refused(script, argv, capsys)
    for script, argv, words in expected[:2]:    # as a command: an InputError, a flag
        assert words in complain(script, *argv)
    assert not (tmp_path / "new").exists()


def test_networks_that_do_not_fit(home, tmp_path):
    """Latents and networks of different shapes, classes or statistics; statistics of another shape."""
    stats = model.load_network(home / "cmt")[1]["stats"]
    for words, flag, shift, channels, names in (
            ("latents", "init", 0, 16, "abc"), ("4 classes", "init", 0, 12, "abcd"), ("the student", "init", 0.1, 12, "abc"),
            ("the student", "init", 0, 12, "acb"), ("the teacher", "teacher", 0.1, 12, "abc"), ("the teacher", "teacher", 0, 12, "bac")):
        net = model.DiTDH(4, channels, **TINY, num_classes=len(names), time_difference=flag == "init")
        about = {"time_shift": 3.0, "classes": [f"class{'abcd'.index(name)}" for name in names]}
        save_network(tmp_path / "other", net, about, {**stats, "mean": stats["mean"] + shift})
        with pytest.raises(model.InputError, match=words):
            train(home, "meanflow", tmp_path / "out", f"--{flag}", tmp_path / "other")
    model.write_tensors(tmp_path / "stats.safetensors", {"": {"var": torch.ones(12, 8, 8)}})
    with pytest.raises(model.InputError, match=r"\(12, 8, 8\), needed are \(12, 4, 4\)"):
        train(home, "teacher", tmp_path / "out", "--stats", tmp_path / "stats.safetensors")
    assert not (tmp_path / "out").exists()
