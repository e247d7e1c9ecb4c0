"""Published files: names, shapes and counts; loading, strictly; the AutoencoderRAE layout of diffusers; what must be refused."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import encode_latents
import model
from sanity.export_autoencoder import export_autoencoder

HERE = Path(__file__).resolve().parent
XL = dict(in_channels=768, num_classes=1000, **model.DIT_PRESETS["DiTDH-XL"])
TINY = dict(input_size=4, in_channels=8, hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2), num_classes=3)


# ---- names, shapes, counts ---------------------------------------------------------------------------------------------------
def expand(names):
    """The checkpoint list is kept short: of blocks that are alike, one stands for all ("blocks.0-27.")."""
    full = {}
    for name, shape in names.items():
        if "-" in name:
            prefix, rest = name.split(".", 1)
            span, rest = rest.split(".", 1)
            first, last = map(int, span.split("-"))
            full |= {f"{prefix}.{i}.{rest}": shape for i in range(first, last + 1)}
        else:
            full[name] = shape
    return full


@pytest.mark.parametrize("kind, parameters, trainable", [("teacher", 838_675_796, 838_380_628), ("student", 840_595_284, 840_299_860),
                                                         ("decoder", 415_352_704, None)])
def test_published_names_and_shapes(kind, parameters, trainable):
    wanted = expand(json.loads((HERE / "checkpoints.json").read_text())[kind])
    with torch.device("meta"):
        net = (model.ViTDecoder(16, 768, **model.DECODER_PRESETS["ViT-XL"]) if kind == "decoder" else
               model.DiTDH(16, **XL, time_difference=kind == "student"))
    assert {name: list(tensor.shape) for name, tensor in net.state_dict().items()} == wanted
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert trainable is None or sum(p.numel() for p in net.parameters() if p.requires_grad) == trainable


def test_512_px():
    """Four times the tokens: the same weights but for the tables of positions."""
    with torch.device("meta"):
        small, large = model.DiTDH(16, **XL), model.DiTDH(32, **XL)
        z, t, y = torch.empty(2, 768, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.long)
        decoder = model.ViTDecoder(32, 768, **model.DECODER_PRESETS["ViT-XL"])
    assert large.to("meta")(z, t, y).shape == z.shape and decoder.to("meta")(z).shape == (2, 3, 512, 512)
    other = {n for n, p in large.state_dict().items() if p.shape != small.state_dict()[n].shape}
    assert other == {"pos_embed", *(f"{tower}_feat_rope.freqs_{f}" for tower in ("enc", "dec") for f in ("cos", "sin"))}


@pytest.mark.parametrize("name", model.DIT_PRESETS)
def test_sizes_are_read_off_a_file(name):
    with torch.device("meta"):
        sizes = dict(input_size=16, in_channels=768, num_classes=1000, **model.DIT_PRESETS[name])
        assert model.dit_arguments(model.DiTDH(**sizes).state_dict()) == sizes


# ---- loading -----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def teacher():
    torch.manual_seed(0)
    net = model.DiTDH(**TINY)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


@pytest.mark.parametrize("form", ["bare", "ema", "model", "safetensors"])
def test_published_forms_of_a_file(teacher, tmp_path, form):
    state, path = teacher.state_dict(), tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt")
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if form == "bare" else {form: state, "step": 3, **({"model": {}} if form == "ema" else {})}, path)
    net, config, stats = model.load_network(path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    assert config["kind"] == "teacher" and config["time_shift"] == 1 and stats is None


def test_trained_position_tables_are_used(teacher, tmp_path, capsys):
    """A later RAE release trains its tables: the file's are taken, and it is said."""
    teacher.pos_embed.data += 0.1
    torch.save(teacher.state_dict(), tmp_path / "net.pt")
    assert torch.equal(model.load_network(tmp_path / "net.pt")[0].pos_embed, teacher.pos_embed)
    assert "pos_embed differs" in capsys.readouterr().out


def test_new_classes(teacher, tmp_path, capsys):
    torch.save(teacher.state_dict(), tmp_path / "net.pt")
    net, config, _ = model.load_network(tmp_path / "net.pt", "teacher", new="y_embedder.", num_classes=7)
    assert net.num_classes == config["network"]["num_classes"] == 7 and "y_embedder.embedding_table" in capsys.readouterr().out
    assert torch.equal(net.t_embedder.W, teacher.t_embedder.W)


def test_from_the_hub(teacher, tmp_path, monkeypatch):
    """Organization/repository/path/inside, through huggingface_hub, from a cache in its layout, offline; and what is not there."""
    commit = "0" * 40
    inside = tmp_path / "models--nyu-visionx--RAE-collections"
    (inside / "refs").mkdir(parents=True)
    (inside / "refs" / "main").write_text(commit)
    (inside / "snapshots" / commit / "DiTs").mkdir(parents=True)
    torch.save(teacher.state_dict(), inside / "snapshots" / commit / "DiTs" / "stage2_model.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    net = model.load_network("nyu-visionx/RAE-collections/DiTs/stage2_model.pt")[0]
    assert torch.equal(net.t_embedder.W, teacher.t_embedder.W)
    with pytest.raises(model.InputError, match="Hub"):
        model.load_network("nobody/nothing/net.pt")


def test_published_statistics(tmp_path):
    """Their mean may be None and stands for 0."""
    var = torch.rand(8, 4, 4)
    torch.save({"mean": None, "var": var}, tmp_path / "stat.pt")
    mean, got = model.load_stats(tmp_path / "stat.pt")
    assert got.dtype == torch.float64 and torch.equal(got.float(), var) and not mean.any()
    z = torch.randn(2, 8, 4, 4)
    assert torch.allclose(model.normalize(z, (mean, got)), z / (var + 1e-5).sqrt())
    assert torch.allclose(model.denormalize(model.normalize(z, (mean, got)), (mean, got)), z, atol=1e-6)


# ---- refusals ------------------------------------------------------------------------------------------------------------------
class Runs:
    def __reduce__(self):
        return os.system, ("touch /dev/null",)


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    state, path = teacher.state_dict(), tmp_path / "net.pt"

    def refused(words, content):
        torch.save(content, path)
        with pytest.raises(model.InputError, match=words) as error:
            model.load_network(path, "teacher")
        assert "\n" not in str(error.value)
    bias = "blocks.0.attn.proj.bias"
    refused(rf"1 tensors: {bias} is missing \(32,\)", {k: v for k, v in state.items() if k != bias})
    refused(r"extra is unexpected \(3,\)", {**state, "extra": torch.zeros(3)})
    w3 = "blocks.0.mlp.w3.weight"
    refused(rf"{w3} is \(85, 32\), wanted \(32, 85\)", {**state, w3: state[w3].T.contiguous()})
    refused("run code", {**state, "x": Runs()})
    refused("no state dict", {"weights": [1, 2]})
    torch.save(state, path)
    for cut in (path.stat().st_size // 2, 100, 0):
        os.truncate(path, cut)
        with pytest.raises(model.InputError, match="cut short"):
            model.load_network(path)
    save_file(state, tmp_path / "net.safetensors")
    os.truncate(tmp_path / "net.safetensors", 5000)
    with pytest.raises(model.InputError, match="cut short"):
        model.load_network(tmp_path / "net.safetensors")
    with pytest.raises(model.InputError, match="a teacher, a student is needed"):
        torch.save(state, path)
        model.load_network(path, "student")


def test_a_turned_bit_is_noticed(teacher, tmp_path):
    stats = torch.zeros(8, 4, 4), torch.ones(8, 4, 4)
    model.save_network(tmp_path / "net", teacher.state_dict(), {"kind": "teacher", "network": TINY}, stats)
    model.load_network(tmp_path / "net")
    for name in ("model.safetensors", "latent_stats.safetensors"):
        content = bytearray((tmp_path / "net" / name).read_bytes())
        content[-7] ^= 16
        (tmp_path / "net" / name).write_bytes(content)
        with pytest.raises(model.InputError, match=f"{name} is damaged"):
            model.load_network(tmp_path / "net")
        content[-7] ^= 16
        (tmp_path / "net" / name).write_bytes(content)


def test_a_changed_description_is_noticed(teacher, tmp_path):
    """What only programs write, JSON and the headers of tensor files, has a digest; config.json may be edited by hand."""
    stats = torch.zeros(8, 4, 4), torch.ones(8, 4, 4)
    model.save_network(tmp_path, teacher.state_dict(), {"kind": "teacher", "network": TINY, "time_shift": 4.0}, stats)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("4.0", "5.0"))
    assert model.load_network(tmp_path)[1]["time_shift"] == 5
    model.write_json(tmp_path / "about.json", {"count": 4})
    text = (tmp_path / "about.json").read_text()
    (tmp_path / "about.json").write_text(text.replace("4", "5", 1))
    with pytest.raises(model.InputError, match="about.json has changed since it was written"):
        model.read_json(tmp_path / "about.json")
    (tmp_path / "about.json").write_text(json.dumps({**json.loads(text), "sha256": None}))
    assert model.read_json(tmp_path / "about.json") == {"count": 4}
    path = tmp_path / "state.safetensors"
    model.write_tensors(path, {"x": torch.ones(3)}, {"step": "31"})
    assert model.read_tensors(path)[1]["step"] == "31"
    path.write_bytes(path.read_bytes().replace(b'"31"', b'"37"'))
    with pytest.raises(model.InputError, match="is damaged"):
        model.read_tensors(path)


# ---- the AutoencoderRAE layout -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A DINOv2 with random weights in a folder, our encoder over it, a decoder at 16 x 16 tokens, statistics; and their export."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    home = tmp_path_factory.mktemp("rae")
    torch.manual_seed(0)
    net = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, patch_size=14,
                                                             image_size=518))
    for p in net.parameters():
        p.data += 0.05 * torch.randn_like(p)
    net.save_pretrained(home / "dinov2")
    encoder = encode_latents.Encoder(home / "dinov2", 256)
    decoder = model.ViTDecoder(16, 64, hidden_size=48, depth=2, num_heads=4, mlp_size=96, patch_size=16)
    for p in decoder.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    stats = (torch.randn(64, 16, 16).double(), 0.5 + torch.rand(64, 16, 16).double())
    export_autoencoder(home / "rae", decoder, stats, encoder)
    return home, encoder, decoder, stats


@torch.no_grad()
def test_equal_to_diffusers(autoencoder):
    diffusers = pytest.importorskip("diffusers")
    home, encoder, decoder, stats = autoencoder
    theirs = diffusers.AutoencoderRAE.from_pretrained(home / "rae").eval()
    images = torch.rand(2, 3, 256, 256)
    z = encoder(images)
    assert z.shape == (2, 64, 16, 16)
    # that class normalizes with another 1e-5 added to the deviation: compare raw latents
    assert (theirs._denormalize_latents(theirs.encode(images).latent) - z).norm() < 1e-5 * z.norm()
    pixels = decoder(z)
    other = theirs._denormalize_image(theirs.decoder.unpatchify(theirs.decoder(z.flatten(2).transpose(1, 2)).logits))
    assert (other - pixels).norm() < 1e-5 * pixels.norm()


DECODE = """
from diffusers import AutoencoderRAE

rae = AutoencoderRAE.from_pretrained("my_rae")
with torch.no_grad():
    images = rae.decode(generate(net, z, y, nfe=1)).sample
"""


def test_diffusers_decodes_what_a_student_makes(autoencoder, monkeypatch):
    """docs/PUBLISHED.md shows these lines; that class adds 1e-5 to the deviation, which holds it already."""
    pytest.importorskip("diffusers")
    home, _, decoder, stats = autoencoder
    (home / "my_rae").symlink_to(home / "rae")
    monkeypatch.chdir(home)
    z_0 = torch.randn(2, 64, 16, 16)
    names = {"torch": torch, "generate": lambda net, z, y, nfe: z_0, "net": None, "z": None, "y": None}
    exec(DECODE, names)
    with torch.no_grad():
        pixels = decoder(model.denormalize(z_0, stats))
    assert (names["images"] - pixels).norm() < 1e-3 * pixels.norm()
    assert DECODE.strip() in (HERE.parent / "docs" / "PUBLISHED.md").read_text()


@torch.no_grad()
def test_from_diffusers(autoencoder, tmp_path):
    """The other direction: a folder that diffusers itself wrote."""
    diffusers = pytest.importorskip("diffusers")
    home, encoder, decoder, stats = autoencoder
    diffusers.AutoencoderRAE.from_pretrained(home / "rae").save_pretrained(tmp_path / "theirs")
    again, got = model.load_decoder(tmp_path / "theirs")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), decoder.state_dict().values(), strict=True))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, stats, strict=True))


def test_autoencoder_round_trip_is_bit_identical(autoencoder, tmp_path):
    home, encoder, decoder, stats = autoencoder
    again, got = model.load_decoder(home / "rae")
    export_autoencoder(tmp_path / "again", again, got, encoder)
    a, b = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (home / "rae", tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((home / "rae/config.json").read_text()) == json.loads((tmp_path / "again/config.json").read_text())


# ---- what they cost ------------------------------------------------------------------------------------------------------------
def test_multiply_adds():
    """GMAC in both conventions, to 0.5%, and the paper's for one image at 512 px."""
    from benchmarks import benchmark
    for got, full, linear in ((benchmark.backbone("DiTDH-XL", 256), 161.58, 157), (benchmark.decoder("ViT-XL", 256), 110.82, 106.5)):
        assert got[1:] == (pytest.approx(full, rel=0.005), pytest.approx(linear, rel=0.005))
    linear = benchmark.backbone("DiTDH-XL", 512)[2] + benchmark.decoder("ViT-XL", 512)[2]
    assert linear == pytest.approx(1051, rel=0.005)


def test_benchmark_runs(tmp_path, capsys):
    """Every step is timed and has its row; the reader, which would write a gigabyte, is left out."""
    from benchmarks import benchmark
    benchmark.main(["--preset", "DiTDH-mini", "--decoder", "ViT-mini", "--batch-size", "4", "--repeats", "1", "--sampling-batch", "1",
                    "--parts", "steps", "sampling", "--json", str(tmp_path / "b.json")])
    results = model.read_json(tmp_path / "b.json")
    rows = {row["step"]: row for row in results["steps"]["rows"]}
    assert 2 < rows["flow matching"]["F"] < 6 and rows["MFD, exact"]["memory"] > 0 and rows["MFD, exact"]["times (i)"] > 1
    assert len(results["sampling"]) == 3 and "| MFD, exact | times (i) |" in capsys.readouterr().out


SCHEDULER = """
from diffusers import FlowMapEulerDiscreteScheduler

scheduler = FlowMapEulerDiscreteScheduler()
scheduler.set_timesteps(2)
for k, step in enumerate(scheduler.timesteps):
    t, s = (scheduler.sigmas[i].float().repeat(len(z)) for i in (k, k + 1))
    z = scheduler.step(net(z, t, y, s), step, z).prev_sample
"""


@torch.no_grad()
def test_the_scheduler_of_diffusers_takes_our_jumps():
    """Its sigma is our t, its timestep 1,000 t; docs/PUBLISHED.md shows these lines."""
    import diffusers
    if not hasattr(diffusers, "FlowMapEulerDiscreteScheduler"):
        pytest.skip("an older diffusers")
    torch.manual_seed(0)
    net = model.DiTDH(4, 12, (32, 48), (2, 1), (2, 2), 3, time_difference=True)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z, y = torch.randn(3, 12, 4, 4), torch.arange(3)
    names = {"net": net, "z": z, "y": y}
    exec(SCHEDULER, names)
    torch.testing.assert_close(names["z"], model.long_jumps(net, z, y, [1, 0.5, 0]))
    assert SCHEDULER.strip() in (HERE.parent / "docs" / "PUBLISHED.md").read_text()
