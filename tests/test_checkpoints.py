"""Networks in files: published names, shapes and counts, loading, what is refused, what is handed on, to us and to diffusers."""
import hashlib
import os
from pathlib import Path

import pytest
import torch
from runs import TINY, let_go, save_network, train
from safetensors.torch import load_file, save_file

import encode_latents
import model
from sanity import export

XL = dict(in_channels=768, num_classes=1000, **model.DIT_PRESETS["DiTDH-XL"])
SIZES = dict(input_size=4, in_channels=12, num_classes=3, **TINY)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "PUBLISHED.md"


# ---- The published files ----
@pytest.mark.parametrize("kind, tensors, parameters, sha256", [
    ("teacher", 382, 838_675_796, "8daa612db238f1ecff0774453698fc9a5f3af5a59d1224f101b6e7d8cc0326d5"),
    ("student", 387, 840_595_284, "18059f2791e450ed44d2ef10080f2011e0b59abe4e232fd17a50db4a68027aff"),
    ("decoder", 456, 415_352_704, "9288cdc79af38c19d21a2f90872639fa1dbb6f23ef98e1531464579f95acab21")])
def test_published_names_and_shapes(kind, tensors, parameters, sha256):
    """The digest is of the published files' names and shapes, a line each ("NAME [1, 2]"), sorted."""
    with torch.device("meta"):
        net = (model.ViTDecoder(16, 768, **model.DECODER_PRESETS["ViT-XL"]) if kind == "decoder" else
               model.DiTDH(16, **XL, time_difference=kind == "student"))
    lines = sorted(f"{name} {list(x.shape)}" for name, x in net.state_dict().items())
    assert len(lines) == tensors and sum(p.numel() for p in net.parameters()) == parameters
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == sha256, lines


def test_sizes_are_read_off_a_file(tmp_path):
    """But for the head's depth where both towers have one width: a run's state says it."""
    for sizes, kind in ((TINY, "teacher"), (dict(hidden_size=(48, 48), depth=(3, 1), num_heads=(2, 3)), "student")):
        net = model.DiTDH(4, 12, **sizes, num_classes=7, time_difference=kind == "student")
        save_network(tmp_path, net, {"head_depth": net.depth[1]}, None)
        loaded, about = model.load_network(tmp_path)
        assert (loaded.depth, loaded.shape, loaded.num_classes, about["kind"]) == (sizes["depth"], (12, 4, 4), 7, kind)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    net = model.DiTDH(**SIZES)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def test_published_forms_of_a_file(teacher, tmp_path, capsys):
    """Of an average and weights the average; prefixes that all names share are taken off; trained position tables are taken, and said."""
    state, path = teacher.state_dict(), tmp_path / "net.pt"
    other = {name: x + 1 for name, x in state.items()}
    for content in (state, {"model": state, "step": 3}, {"ema": state, "model": other, "step": 3},
                    {"ema": {f"module._orig_mod.{name}": x for name, x in state.items()} | {"step": 7}}):
        torch.save(content, path)
        net, about = model.load_network(path, "teacher")
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
        assert [about[key] for key in ("kind", "time_shift", "stats", "classes", "sha256")] == ["teacher", 1, None, None, model.digest_of(state)]
    save_file(state, tmp_path / "net.safetensors")
    assert torch.equal(model.load_network(tmp_path / "net.safetensors")[0].t_embedder.W, teacher.t_embedder.W)
    assert "pos_embed differs" in capsys.readouterr().out and torch.equal(net.pos_embed, teacher.pos_embed)
    net, _ = model.load_network(path, "teacher", num_classes=7)
    assert net.num_classes == 7 and "y_embedder.embedding_table" in capsys.readouterr().out


def test_from_the_hub(teacher, tmp_path, monkeypatch):
    """Organization/repository/path/inside, from a cache in the Hub's layout, offline; and what is not there."""
    inside = tmp_path / "models--nyu-visionx--RAE-collections"
    model.write_atomically(inside / "refs" / "main", lambda file: file.write(b"0" * 40))
    model.write_atomically(inside / f"snapshots/{'0' * 40}/DiTs/net.pt", lambda file: torch.save(teacher.state_dict(), file))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net = model.load_network("nyu-visionx/RAE-collections/DiTs/net.pt")[0]
    assert torch.equal(net.t_embedder.W, teacher.t_embedder.W)
    with pytest.raises(model.InputError, match="neither here nor could it be had from the Hub"):
        model.load_network("run/teacher")


def test_published_statistics(tmp_path):
    """Their mean may be None and stands for 0."""
    var, z = torch.rand(8, 4, 4), torch.randn(2, 8, 4, 4)
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    stats = model.load_stats(tmp_path / "stat.pt")
    assert stats["var"].dtype == torch.float64 and torch.equal(stats["var"].float(), var) and not stats["mean"].any()
    stats["mean"] += 0.5
    assert torch.allclose(model.normalize(z, stats), (z - 0.5) / (var + 1e-5).sqrt())
    assert torch.allclose(model.denormalize(model.normalize(z, stats), stats), z, atol=1e-6)


# ---- Refusals ----
def test_what_does_not_fit_is_refused(teacher, tmp_path):
    """In one line; no pickle is executed."""
    state, path, ran = teacher.state_dict(), tmp_path / "net.pt", tmp_path / "ran"
    w3, bias = "blocks.0.mlp.w3.weight", "blocks.0.attn.proj.bias"

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(ran),)
    for words, content in ((f"Missing key.*{bias}", {k: v for k, v in state.items() if k != bias}),
                           ("Unexpected key.*extra", {**state, "extra": state[w3]}),
                           (f"size mismatch for {w3}", {**state, w3: state[w3].T.contiguous()}), ("is no network", {"weights": [1, 2]}),
                           ("is no DiT-DH", {**state, "pos_embed": torch.zeros(())}),
                           ("run code: save its tensors alone", {**state, "x": Runs()}),
                           ("is a student, a teacher is needed", model.DiTDH(**SIZES, time_difference=True).state_dict()),
                           ("first names are conv1.weight", {"conv1.weight": torch.zeros(2), "conv2.bias": torch.zeros(2)})):
        torch.save(content, path)
        with pytest.raises(model.InputError, match=words) as error:
            model.load_network(path, "teacher")
        assert "\n" not in str(error.value) and not ran.exists()
    save_file(state, tmp_path / "net.safetensors")
    for cut in (path, tmp_path / "net.safetensors"):
        os.truncate(cut, 500)
        with pytest.raises(model.InputError, match="cut short"):
            model.load_network(cut)


def test_our_tensor_files_are_safetensors(tmp_path):
    """Of any of our types and shapes, read by the library as they were; aligned, so that maps of them can be used."""
    path, parts = tmp_path / "x.safetensors", {
        "a": {"x": torch.rand(3), "half": torch.rand(5).half(), "empty": torch.empty(0, 4)},
        "b/c": {"x": torch.arange(7), "bytes": torch.arange(3, dtype=torch.uint8)}, "": {"double": torch.rand(2, 3).double().T}}
    digests, found, (again, *rest) = model.write_tensors(path, parts, {"step": 3}), load_file(path), model.read_tensors(path)
    assert rest == [{"step": 3}, digests] and digests == {part: model.digest_of(tensors) for part, tensors in parts.items()}
    assert all(torch.equal(again[part][name], x) and torch.equal(found[f"{part}/{name}".lstrip("/")], x)
               for part in parts for name, x in parts[part].items())
    assert all(x.data_ptr() % x.itemsize == 0 for part in again.values() for x in part.values())
    path.write_bytes((2 ** 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(model.InputError, match="cannot read"):
        model.load_network(path)


# ---- What is handed on ----
def test_a_slim_network(home, tmp_path):
    """Of a run: the average under published names, in one file of bare tensors; the same network to whatever comes after."""
    slim = tmp_path / "slim"
    export.main([f"{home}/cmt", "--out", str(slim)])
    let_go()
    (slim / "config.json").unlink()               # killed before it was written: the same command goes on
    export.main([f"{home}/cmt", "--out", str(slim)])
    let_go()
    (whole, about), (net, said) = model.load_network(home / "cmt"), model.load_network(slim)
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in whole.state_dict().items())
    assert said["sha256"] == about["sha256"] and said["time_shift"] == 3 and said["step"] == 6
    assert load_file(slim / "model.safetensors").keys() == whole.state_dict().keys() | {"stats/mean", "stats/var"}
    for source, out, words in ((home / "teacher", slim, "something else"), (home / "teacher", home / "cmt", "something else"),
                               (home / "latents/latent_stats.safetensors", tmp_path / "none", "is no DiT-DH")):
        with pytest.raises(model.InputError, match=words):
            export.main([str(source), "--out", str(out)])
        let_go()
    train(home, "meanflow", tmp_path / "run", "--steps", "1", "--init", slim)


DECODE = """
from diffusers import AutoencoderRAE

rae = AutoencoderRAE.from_pretrained("my_rae")
with torch.no_grad():
    images = rae.decode(generate(net, z, y, nfe=1)).sample
"""
SCHEDULER = """
from diffusers import FlowMapEulerDiscreteScheduler

scheduler = FlowMapEulerDiscreteScheduler()
scheduler.set_timesteps(2)
for k, step in enumerate(scheduler.timesteps):
    t, s = (scheduler.sigmas[i].float().repeat(len(z)) for i in (k, k + 1))
    z = scheduler.step(net(z, t, y, s), step, z).prev_sample
"""


@torch.no_grad()
def test_diffusers_reads_the_autoencoder(tmp_path, monkeypatch):
    """Of a DINOv2 with random weights, a decoder at 16 x 16 tokens and statistics; docs/PUBLISHED.md shows these lines."""
    from diffusers import AutoencoderRAE
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14,
                                                             image_size=518))
    decoder = model.ViTDecoder(16, 64, hidden_size=48, depth=2, num_heads=4, mlp_size=96, patch_size=16)
    for p in (*net.parameters(), *decoder.parameters()):
        p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    net.save_pretrained("dinov2")
    encoder = encode_latents.Encoder("dinov2", 256)
    stats = {"mean": torch.randn(64, 16, 16).double(), "var": 0.5 + torch.rand(64, 16, 16).double()}
    parts, config = export.autoencoder(decoder, stats, encoder)
    model.write_tensors("my_rae/diffusion_pytorch_model.safetensors", parts)
    model.write_json("my_rae/config.json", config)
    theirs, images, z_0 = AutoencoderRAE.from_pretrained("my_rae").eval(), torch.rand(2, 3, 256, 256), torch.randn(2, 64, 16, 16)
    z = encoder(images)
    # That class adds another 1e-5 to the deviation: compare raw latents.
    assert (theirs._denormalize_latents(theirs.encode(images).latent) - z).norm() < 1e-5 * z.norm()
    names = {"torch": torch, "generate": lambda net, z, y, nfe: z_0, "net": None, "z": None, "y": None}
    exec(DECODE, names)
    pixels = decoder(model.denormalize(z_0, stats))
    assert (names["images"] - pixels).norm() < 1e-3 * pixels.norm() and DECODE.strip() in PAGE.read_text()
    decoder.image_norm = [[0.5] * 3, [0.5] * 3]
    with pytest.raises(model.InputError, match="AutoencoderRAE has one mean and std of pixels"):
        export.autoencoder(decoder, stats, encoder)


@torch.no_grad()
def test_the_scheduler_of_diffusers_takes_our_jumps(home):
    """Its sigma is our t, its timestep 1,000 t; docs/PUBLISHED.md shows these lines."""
    import diffusers
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("an older diffusers")
    net, z, y = model.load_network(home / "cmt")[0], torch.randn(3, 12, 4, 4), torch.arange(3)
    names = {"net": net, "z": z, "y": y}
    exec(SCHEDULER, names)
    torch.testing.assert_close(names["z"], model.long_jumps(net, z, y, [1, 0.5, 0]))
    assert SCHEDULER.strip() in PAGE.read_text()


def test_multiply_adds():
    """GMAC as the paper counts, to 0.5%: of the student, the decoder, and of one image at 512 px."""
    from benchmarks import benchmark
    (net, decoder), large = ([benchmark.backbone("DiTDH-XL", px)[2], benchmark.decoder("ViT-XL", px)[2]] for px in (256, 512))
    assert [net, decoder, sum(large)] == pytest.approx([157, 106.5, 1051], rel=0.005)
