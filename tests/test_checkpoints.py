"""Networks in files: published names and shapes; loading; what is refused; what is handed on."""
import hashlib
import os

import pytest
import torch
from runs import TINY, let_go, lively
from safetensors.torch import load_file, save_file

import model
from sanity import export


@pytest.mark.parametrize("kind, sha256", [
    ("teacher", "8daa612db238f1ecff0774453698fc9a5f3af5a59d1224f101b6e7d8cc0326d5"),
    ("student", "18059f2791e450ed44d2ef10080f2011e0b59abe4e232fd17a50db4a68027aff"),
    ("decoder", "9288cdc79af38c19d21a2f90872639fa1dbb6f23ef98e1531464579f95acab21")])
def test_published_names_and_shapes(kind, sha256):
    """The digest is of the published files' names and shapes, a line each ("NAME [1, 2]"), sorted."""
    with torch.device("meta"):
        if kind == "decoder":
            net = model.ViTDecoder(16, 768, **model.DECODER_PRESETS["ViT-XL"])
        else:
            sizes = model.DIT_PRESETS["DiTDH-XL"]
            net = model.DiTDH(16, 768, **sizes, num_classes=1000, time_difference=kind == "student")
    lines = sorted(f"{name} {list(x.shape)}" for name, x in net.state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == sha256, lines


# ---- Loading ----
@pytest.fixture
def teacher():
    return lively()


def test_published_forms_of_a_file(teacher, tmp_path, capsys):
    """Of an average and weights the average; prefixes that all names share are taken off; trained position
    tables are taken. The table of labels may be a new one."""
    state, path = teacher.state_dict(), tmp_path / "net.pt"
    other = {name: x + 1 for name, x in state.items()}
    for content in (state, {"model": state, "step": 3}, {"ema": state, "model": other, "step": 3},
                    {"ema": {f"module._orig_mod.{name}": x for name, x in state.items()} | {"step": 7}}):
        torch.save(content, path)
        net, about = model.load_network(path, "teacher")
        assert all(torch.equal(x, state[name]) for name, x in net.state_dict().items())
        assert (about["kind"], about["time_shift"], about["stats"]) == ("teacher", 1, None)
    save_file(state, tmp_path / "net.safetensors")
    net, _ = model.load_network(tmp_path / "net.safetensors", num_classes=7)
    assert torch.equal(net.t_embedder.W, teacher.t_embedder.W) and net.num_classes == 7
    assert "y_embedder.embedding_table" in capsys.readouterr().out


def test_from_the_hub(teacher, tmp_path, monkeypatch):
    """Organization/repository/path/inside, from a cache in the Hub's layout, offline."""
    inside = tmp_path / "models--nyu-visionx--RAE-collections"
    file = inside / "snapshots" / ("0" * 40) / "DiTs" / "net.pt"
    model.write_atomically(inside / "refs" / "main", lambda file: file.write(b"0" * 40))
    model.write_atomically(file, lambda file: torch.save(teacher.state_dict(), file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net, _ = model.load_network("nyu-visionx/RAE-collections/DiTs/net.pt")
    assert torch.equal(net.t_embedder.W, teacher.t_embedder.W)


def test_published_statistics(tmp_path):
    """Their mean may be None and stands for 0."""
    var, z = torch.rand(8, 4, 4), torch.randn(2, 8, 4, 4)
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    stats = model.load_stats(tmp_path / "stat.pt")
    assert stats["var"].dtype == torch.float64 and not stats["mean"].any()
    stats["mean"] += 0.5
    assert torch.allclose(model.normalize(z, stats), (z - 0.5) / (var + 1e-5).sqrt())
    assert torch.allclose(model.denormalize(model.normalize(z, stats), stats), z, atol=1e-6)


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    """In one line; no pickle is executed."""
    state, w3 = teacher.state_dict(), "blocks.0.mlp.w3.weight"
    path, ran = tmp_path / "net.pt", tmp_path / "ran"
    student = model.DiTDH(4, 12, **TINY, num_classes=3, time_difference=True)

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(ran),)
    for words, content in ((f"Missing key.*{w3}", {k: v for k, v in state.items() if k != w3}),
                           (f"size mismatch for {w3}", {**state, w3: state[w3].T.contiguous()}),
                           ("is no DiT-DH", {"conv1.weight": torch.zeros(2)}),
                           ("run code: save its tensors alone", {**state, "x": Runs()}),
                           ("is a student", student.state_dict())):
        torch.save(content, path)
        with pytest.raises(model.InputError, match=words) as error:
            model.load_network(path, "teacher")
        assert "\n" not in str(error.value) and not ran.exists()
    os.truncate(path, 500)
    with pytest.raises(model.InputError, match="cut short"):
        model.load_network(path)


def test_our_tensor_files_are_safetensors(tmp_path):
    """Of our types and any shapes, read by the library as they were; aligned, so that maps can be used."""
    path, half = tmp_path / "x.safetensors", torch.rand(5).half()
    parts = {"a/b": {"half": half, "empty": torch.empty(0, 4), "bytes": half.view(torch.uint8)},
             "": {"double": torch.rand(2, 3).double().T}}
    digests = model.write_tensors(path, parts, {"step": 3})
    (again, *rest), found = model.read_tensors(path), load_file(path)
    assert rest == [{"step": 3}, digests]
    for part, tensors in parts.items():
        for name, x in tensors.items():
            assert torch.equal(again[part][name], x) and torch.equal(found[f"{part}/{name}".lstrip("/")], x)
            assert again[part][name].data_ptr() % x.itemsize == 0


# ---- What is handed on ----
def test_a_slim_network(home, tmp_path):
    """Of a run: the average alone; the same network, by its digest, to whatever comes after."""
    export.main([f"{home}/cmt", f"--out={tmp_path}/slim"])
    let_go()
    about, said = (model.load_network(source)[1] for source in (home / "cmt", tmp_path / "slim"))
    assert all(said[name] == about[name] for name in ("sha256", "time_shift", "step", "classes"))


