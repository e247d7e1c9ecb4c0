"""Published files: names, shapes and counts; loading, strictly; what is handed on, to us and to diffusers; what must be refused."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import encode_latents
import model
import sample
from runs import let_go, save_decoder, save_network, train
from sanity import export

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


@pytest.mark.parametrize("name", ["DiTDH-mini", "one width"])
@pytest.mark.parametrize("student", [False, True])
def test_sizes_are_read_off_a_file(tmp_path, name, student):
    """But for the head's depth where both towers have one width: a run's state says it."""
    sizes = model.DIT_PRESETS.get(name, dict(hidden_size=(48, 48), depth=(3, 1), num_heads=(2, 3)))
    net = model.DiTDH(4, 12, **sizes, num_classes=7, time_difference=student)
    save_network(tmp_path, net, {"head_depth": net.depth[1]}, None)
    loaded, about = model.load_network(tmp_path)
    assert (loaded.depth, loaded.shape, loaded.num_classes) == (sizes["depth"], (12, 4, 4), 7)
    assert about["kind"] == ("student" if student else "teacher")
    z, t, y = torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 6])
    s = (t / 2,) if student else ()
    assert torch.equal(net(z, t, y, *s), loaded(z, t, y, *s))


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
    net, about = model.load_network(path)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))
    assert (about["kind"], about["time_shift"], about["stats"], about["classes"]) == ("teacher", 1, None, None)
    assert about["sha256"] == model.digest_of(state)


def test_trained_position_tables_are_used(teacher, tmp_path, capsys):
    """A later RAE release trains its tables: the file's are taken, and it is said."""
    teacher.pos_embed.data += 0.1
    torch.save(teacher.state_dict(), tmp_path / "net.pt")
    assert torch.equal(model.load_network(tmp_path / "net.pt")[0].pos_embed, teacher.pos_embed)
    assert "pos_embed differs" in capsys.readouterr().out


def test_new_classes(teacher, tmp_path, capsys):
    torch.save(teacher.state_dict(), tmp_path / "net.pt")
    net, _ = model.load_network(tmp_path / "net.pt", "teacher", num_classes=7)
    assert net.num_classes == 7 and "y_embedder.embedding_table" in capsys.readouterr().out
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
    stats = model.load_stats(tmp_path / "stat.pt")
    assert stats["var"].dtype == torch.float64 and torch.equal(stats["var"].float(), var) and not stats["mean"].any()
    z = torch.randn(2, 8, 4, 4)
    assert torch.allclose(model.normalize(z, stats), z / (var + 1e-5).sqrt())
    assert torch.allclose(model.denormalize(model.normalize(z, stats), stats), z, atol=1e-6)


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
    refused(f"Missing key.*{bias}", {k: v for k, v in state.items() if k != bias})
    refused("Unexpected key.*extra", {**state, "extra": torch.zeros(3)})
    w3 = "blocks.0.mlp.w3.weight"
    refused(rf"size mismatch for {w3}.*\[85, 32\].*\[32, 85\]", {**state, w3: state[w3].T.contiguous()})
    refused("run code", {**state, "x": Runs()})
    refused("is no network", {"weights": [1, 2]})
    refused("cannot read", [1, 2])
    torch.save(state, path)
    for cut in (path.stat().st_size // 2, 100, 0):
        os.truncate(path, cut)
        with pytest.raises(model.InputError, match="cut short"):
            model.load_network(path)
    save_file(state, tmp_path / "net.safetensors")
    os.truncate(tmp_path / "net.safetensors", 5000)
    with pytest.raises(model.InputError, match="cut short"):
        model.load_network(tmp_path / "net.safetensors")
    torch.save(model.DiTDH(**TINY, time_difference=True).state_dict(), path)
    with pytest.raises(model.InputError, match="is a student, a teacher is needed"):
        model.load_network(path, "teacher")


# ---- what is handed on -----------------------------------------------------------------------------------------------------------
def test_export_of_files_and_over_files(home, tmp_path):
    """The same command goes on, also of a published file; what is no network is refused; nothing of others is replaced."""
    net = model.load_network(home / "teacher")[0]
    torch.save({"ema": {f"module.{name}": x.bfloat16() for name, x in net.state_dict().items()}}, tmp_path / "published.pt")
    for _ in range(2):
        export.main([f"{tmp_path}/published.pt", "--out", f"{tmp_path}/slim"])
        let_go()
        (tmp_path / "slim/config.json").unlink()                                    # killed before it was written
    assert (model.load_network(tmp_path / "slim")[0].pos_embed - net.pos_embed).abs().max() < 0.01
    with pytest.raises(model.InputError, match="is no DiT-DH"):
        export.main([f"{home}/latents/latent_stats.safetensors", "--out", f"{tmp_path}/none"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text("{}")
    with pytest.raises(model.InputError, match="holds something else"):
        export.main([f"{home}/teacher", "--out", f"{tmp_path}/mine"])
    model.write_tensors(tmp_path / "mine/model.safetensors", {"": {"x": torch.ones(3)}})
    with pytest.raises(model.InputError, match="holds something else"):
        export.main([f"{home}/teacher", "--out", f"{tmp_path}/mine"])
    assert not (tmp_path / "none").exists()


def test_a_slim_network(home, tmp_path):
    """Of a run: the average under published names, in one file of bare tensors; the same network to whatever comes after."""
    export.main([f"{home}/cmt", "--out", f"{tmp_path}/slim"])
    let_go()
    names = {path.name for path in (tmp_path / "slim").iterdir()} - {".lock"}
    assert names == {"model.safetensors", "config.json"}
    whole, about = model.load_network(home / "cmt")
    for source in (tmp_path / "slim", tmp_path / "slim" / "model.safetensors"):
        net, said = model.load_network(source)
        assert all(torch.equal(x, net.state_dict()[name]) for name, x in whole.state_dict().items())
        assert said["sha256"] == about["sha256"] and said["time_shift"] == 3 and said["step"] == 6
        assert all(torch.equal(said["stats"][name], x) for name, x in about["stats"].items())
    content = load_file(tmp_path / "slim" / "model.safetensors")
    assert content.keys() == whole.state_dict().keys() | {"stats/mean", "stats/var"}
    assert "out" not in json.loads((tmp_path / "slim" / "config.json").read_text())["settings"]
    export.main([f"{home}/cmt", "--out", f"{tmp_path}/slim"])                         # again: the same
    let_go()
    with pytest.raises(model.InputError, match="holds something else"):
        export.main([f"{home}/teacher", "--out", f"{tmp_path}/slim"])
    let_go()
    with pytest.raises(model.InputError, match="holds something else"):
        export.main([f"{home}/teacher", "--out", f"{home}/cmt"])
    train(home, "meanflow", tmp_path / "run", "--steps", "2")
    train(home, "meanflow", tmp_path / "run", "--steps", "3", "--init", tmp_path / "slim")
    save_decoder(home, tmp_path / "decoder")
    for name, source in (("a", home / "cmt"), ("b", tmp_path / "slim")):
        sample.main([str(source), "--decoder", f"{tmp_path}/decoder", "--num-samples", "3", "--out", f"{tmp_path}/{name}.npz"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_turned_bit_is_noticed(teacher, tmp_path):
    stats = {"mean": torch.zeros(8, 4, 4), "var": torch.ones(8, 4, 4)}
    save_network(tmp_path, teacher, {}, stats)
    path = tmp_path / "model.safetensors"
    model.load_network(tmp_path)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    for place in (header, header + 5000, -7):
        content = bytearray(path.read_bytes())
        content[place] ^= 16
        (tmp_path / "damaged.safetensors").write_bytes(content)
        with pytest.raises(model.InputError, match="damaged.safetensors is damaged"):
            model.load_network(tmp_path / "damaged.safetensors")


# ---- diffusers' AutoencoderRAE -------------------------------------------------------------------------------------------------
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
    stats = {"mean": torch.randn(64, 16, 16).double(), "var": 0.5 + torch.rand(64, 16, 16).double()}
    parts, config = export.autoencoder(decoder, stats, encoder)
    model.write_tensors(home / "rae" / "diffusion_pytorch_model.safetensors", parts)
    model.write_json(home / "rae" / "config.json", config)
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


def test_one_mean_and_std_for_both(autoencoder, monkeypatch):
    """That class has one for encoder and decoder: others than the encoder's are refused."""
    _, encoder, decoder, stats = autoencoder
    monkeypatch.setattr(decoder, "image_norm", [[0.5] * 3, [0.5] * 3])
    with pytest.raises(model.InputError, match="AutoencoderRAE has one mean and std of pixels"):
        export.autoencoder(decoder, stats, encoder)


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
