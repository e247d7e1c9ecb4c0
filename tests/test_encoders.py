"""Every kind of encoder: against a forward pass from its own layers; a module of one's own; latents that were given."""
import json
import re

import numpy
import pytest
import runs
import torch
import torch.nn.functional as F
import transformers
from runs import let_go, random_images
from torch import nn

import encode_latents
import eval_fid
import model
import sample
import train_teacher
from encode_latents import Encoder, Images, Latents, TrainingData, encode, write_latents
from model import InputError
from sanity import report, train_decoder

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=16)
REGISTERS = dict(num_register_tokens=3)
TEXT = dict(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)
NORM = ([0.5, 0.4, 0.3], [0.6, 0.7, 0.8])


def make(name, config):
    return getattr(transformers, name)(getattr(transformers, config[0])(**config[1]))


# Kind -> the network as it is published, and how --encoder's part is found in it.
KINDS = {
    "dinov2": ("Dinov2Model", ("Dinov2Config", SIZES), lambda net: net),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", ("Dinov2WithRegistersConfig", SIZES | REGISTERS), lambda net: net),
    "dinov3_vit": ("DINOv3ViTModel", ("DINOv3ViTConfig", SIZES | REGISTERS), lambda net: net),
    "vit_mae": ("ViTMAEForPreTraining", ("ViTMAEConfig", SIZES | dict(decoder_hidden_size=8, decoder_num_hidden_layers=1,
                decoder_num_attention_heads=2, decoder_intermediate_size=8)), lambda net: net.vit),
    "siglip_vision_model": ("SiglipVisionModel", ("SiglipVisionConfig", SIZES), lambda net: net),
    "siglip": ("SiglipModel", ("SiglipConfig", dict(vision_config=SIZES, text_config=TEXT)), lambda net: net.vision_model)}


def save(folder, kind, norm=NORM):
    """A folder as transformers saves it, with random numbers in every tensor: zeros would hide mistakes. Returns the network."""
    torch.manual_seed(0)
    name, config, tower = KINDS[kind]
    net = make(name, config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    net.save_pretrained(folder)
    if norm:
        text = json.dumps({"image_mean": norm[0], "image_std": norm[1]})
        (folder / "preprocessor_config.json").write_text(text)
    return tower(net)


def by_hand(kind, net, x, antialias):
    """(B, 3, S, S) normalized -> (B, C, G, G), from the network's layers: tokens, order, positions and norm are written out."""
    e, more = net.embeddings, {}
    project = {"dinov3_vit": lambda: e.patch_embeddings, "siglip": lambda: e.patch_embedding}.get(
        kind.removesuffix("_vision_model"), lambda: e.patch_embeddings.projection)()
    tokens = project(x).flatten(2).transpose(1, 2)    # row by row
    grid = x.shape[-1] // 4
    registers = e.register_tokens.expand(len(x), -1, -1) if "dinov3" in kind or "registers" in kind else tokens[:, :0]
    if "siglip" not in kind:
        first = e.cls_token.expand(len(x), -1, -1)
    if "dinov3" in kind:
        more = {"position_embeddings": net.rope_embeddings(x)}
        tokens = torch.cat([first, registers, tokens], 1)
    else:
        table = e.position_embedding.weight[None] if "siglip" in kind else e.position_embeddings
        place = table[:, -16:].transpose(1, 2).unflatten(2, (4, 4))
        if grid != 4:
            place = F.interpolate(place, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias)
        tokens = tokens + place.flatten(2).transpose(1, 2)
        if "siglip" not in kind:
            tokens = torch.cat([first + table[:, :1], registers, tokens], 1)
    layers = net.layers if kind == "vit_mae" else net.model.layer if "dinov3" in kind else (
        net.encoder.layers if "siglip" in kind else net.encoder.layer)
    for layer in layers:
        tokens = layer(tokens, **({"attention_mask": None} if "siglip" in kind else more))
    tokens = F.layer_norm(tokens, (16,), eps=net.config.layer_norm_eps)[:, -grid * grid:]
    return tokens.transpose(1, 2).reshape(len(x), 16, grid, grid)


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_kind_by_hand(tmp_path, kind, size):
    """At the trained size and at another; on disk as it is published; with its own mean and std."""
    net = save(tmp_path, kind)
    encoder = Encoder(tmp_path, 16, size)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = F.interpolate(images / 255, (size, size), mode="bicubic", align_corners=False)
    mean, std = torch.tensor(NORM)[:, :, None, None]
    wanted = by_hand(kind, net, (x - mean) / std, antialias=kind == "dinov2_with_registers")
    z = encoder(images)
    assert encoder.shape == (16, size // 4, size // 4) and z.dtype == torch.float32
    assert (z - wanted).abs().max() < 1e-4 and wanted.std() > 0.5
    assert torch.equal(z, encoder(images))    # MAE masks nothing, and shuffles nothing
    assert torch.equal(z, encoder(images / 255))
    identity = encoder.about["identity"]
    assert (identity["kind"], identity["image_norm"]) == (kind, [*map(list, NORM)])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_pixels_are_part_of_what_latents_are(tmp_path, capsys):
    save(tmp_path / "a", "siglip", ([0.5] * 3, [0.5] * 3))
    save(tmp_path / "b", "siglip", None)
    a, b = Encoder(tmp_path / "a", 16, 16), Encoder(tmp_path / "b", 16, 16)
    said = capsys.readouterr().out
    assert f"{tmp_path}/b has no preprocessor_config.json with image_mean: [[0.5" in said and f"{tmp_path}/a" not in said
    assert a.about["identity"] == b.about["identity"]    # SigLIP's, as published
    # As SiglipProcessor saves it, beside a tokenizer.
    (tmp_path / "b/processor_config.json").write_text(json.dumps({"image_processor": {"image_mean": NORM[0], "image_std": NORM[1]}}))
    b = Encoder(tmp_path / "b", 16, 16)
    assert {k for k, v in a.about["identity"].items() if v != b.about["identity"][k]} == {"image_norm"}


def test_sizes_are_raes(tmp_path):
    """Tokens of image_size / 16: 224 px for patches of 14, 256 px for patches of 16."""
    for patch, size in ((14, 224), (16, 256)):
        config = transformers.ViTMAEConfig(**SIZES | {"patch_size": patch, "image_size": 4 * patch})
        transformers.ViTMAEModel(config).save_pretrained(tmp_path)
        assert (Encoder(tmp_path).encoder_size, Encoder(tmp_path).shape) == (size, (16, 16, 16))


def test_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listed = ", ".join(encode_latents.TOWERS)
    for kind in ("siglip2", None):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(InputError, match=f"is of model_type {kind}: an encoder is one of {listed}"):
            Encoder(tmp_path)
    monkeypatch.setitem(SIZES, "num_channels", 1)
    save(tmp_path, "dinov2")
    with pytest.raises(InputError, match="is not for RGB"):
        Encoder(tmp_path, 16, 16)
    monkeypatch.undo()
    save(tmp_path, "dinov2")
    for source, size, complaint in ((tmp_path / "none", 16, "no encoder"), (tmp_path, 18, "--encoder-size 18 must be a multiple of 4")):
        with pytest.raises(InputError, match=complaint):
            Encoder(source, 16, size)
    for said in ('{"image_mean": [0.5', '{"image_mean": null, "image_std": 1}'):
        (tmp_path / "preprocessor_config.json").write_text(said)
        with pytest.raises(InputError, match="no encoder"):
            Encoder(tmp_path, 16, 16)
    (tmp_path / "preprocessor_config.json").unlink()
    state = model.read_tensors(tmp_path / "model.safetensors")[0][""]
    del state["encoder.layer.1.norm1.weight"]
    model.write_tensors(tmp_path / "model.safetensors", {"": state})
    with pytest.raises(InputError, match=f"lacks weights, or is not for RGB: an encoder is one of {listed}"):
        Encoder(tmp_path)


# ---- By command, to pictures ----
@pytest.mark.parametrize("kind", KINDS)
def test_encoded_and_decoded_by_command(tmp_path, kind):
    """Ten steps of a decoder, which gives pixels back with the encoder's mean and std."""
    save(tmp_path / "encoder", kind)
    random_images(tmp_path / "images", each=24)
    encode_latents.main([f"--data-path={tmp_path}/images", f"--out={tmp_path}/latents", f"--encoder={tmp_path}/encoder",
                         *"--image-size 16 --encoder-size 16 --workers 0".split()])
    train_decoder.main([f"--data-path={tmp_path}/images", f"--latents={tmp_path}/latents", f"--out={tmp_path}/decoder",
                        *"--steps 10 --workers 0 --save-every 10".split()])
    let_go()
    decoder, about = model.load_decoder(tmp_path / "decoder")
    assert decoder.image_norm == [*map(list, NORM)] and about["encoder"]["identity"]["kind"] == kind
    with torch.no_grad():
        z = torch.randn(2, *decoder.shape)
        image, (mean, std) = decoder(z), torch.tensor(NORM)[:, :, None, None]
        decoder.image_norm = [[0.0] * 3, [1.0] * 3]
        assert torch.equal(image, decoder(z) * std + mean)


def test_the_pixels_of_a_published_decoder(tmp_path):
    """A .pt cannot tell its mean and std: those of the network's encoder, or ImageNet's."""
    sizes, made = dict(input_size=4, in_channels=12, hidden_size=192, depth=1, num_heads=3, mlp_size=64, patch_size=4), []
    torch.save(model.ViTDecoder(**sizes).state_dict(), tmp_path / "decoder.pt")
    for identity in {}, {"image_norm": [model.IMAGE_MEAN, model.IMAGE_STD]}, {"image_norm": [[0.5] * 3] * 2}:
        runs.save_network(tmp_path / "teacher", runs.lively(), {"latents": {"encoder": {"identity": identity}}},
                          {"mean": torch.zeros(12, 4, 4), "var": torch.ones(12, 4, 4)})
        out = tmp_path / f"{len(made)}.npz"
        sample.main([f"{tmp_path}/teacher", f"--decoder={tmp_path}/decoder.pt", f"--out={out}", *"--num-samples 3 --nfe 1".split()])
        let_go()
        made.append(numpy.load(out)["arr_0"])
    assert (made[0] == made[1]).all() and (made[0] != made[2]).mean() > 0.5


# ---- A module of one's own ----
class Mine(nn.Module):
    """uint8 (B, 3, 16, 16) -> means of patches, (B, 3, 4, 4)."""
    shape, digest = (3, 4, 4), "means of 4 x 4 pixels"

    def forward(self, images):
        assert images.dtype == torch.uint8
        return F.avg_pool2d(images.float() / 64, 4)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    home = tmp_path_factory.mktemp("mine")
    random_images(home / "images", each=24)
    encode(Images(home / "images", 16), Mine(), home / "latents", flips=True, shard_size=50, batch_size=7)
    let_go()
    return home


def test_latents_of_ones_own_encoder(mine):
    latents, images = Latents(mine / "latents"), Images(mine / "images", 16)
    rows = [143, 3, 77]    # flipped from 72 on
    assert torch.equal(latents.read(rows)[0], Mine()(images.read(rows)[0]).half())
    assert latents.about["encoder"] == {"id": "Mine", "identity": {"sha256": Mine.digest, "image_size": 16}}
    other = Mine()
    other.digest = "another"
    with pytest.raises(InputError, match="other work .sha256: means of 4 x 4 pixels there, another now"):
        encode(images, other, mine / "latents", flips=True, shard_size=50)
    let_go()
    other.shape = 3, 2, 2
    with pytest.raises(InputError, match=r"the encoder makes \[64, 3, 4, 4\] of 64 images"):
        encode(images, other, mine / "other")
    let_go()


def test_every_stage_takes_them(mine, tmp_path):
    train_teacher.main(runs.arguments(mine, "teacher", mine / "teacher"))
    let_go()
    for stage in ("cmt", "meanflow"):
        runs.train(mine, stage, mine / stage)
    train_decoder.main([f"--data-path={mine}/images", f"--latents={mine}/latents", f"--out={mine}/decoder",
                        *"--steps 4 --feature-weight 0 --workers 0".split()])
    let_go()
    sample.main([f"{mine}/meanflow", f"--decoder={mine}/decoder", f"--grid={tmp_path}/grid.png", "--num-samples=3"])
    assert (tmp_path / "grid.png").exists()


def test_what_they_cannot_do_is_one_line(mine, tmp_path):
    line = f"{mine}/latents is by Mine, which is no --encoder"
    images = f"--data-path={mine}/images"
    for call in (lambda: TrainingData(mine / "latents", mine / "images"),
                 lambda: train_decoder.main([images, f"--latents={mine}/latents", f"--out={tmp_path}/decoder"]),
                 lambda: report.main([f"--run={mine}", f"--data={mine}/images", f"--held-out={mine}/images",
                                      f"--latents={mine}/latents", "--samples", "x=y.npz:1"]),
                 lambda: eval_fid.main([f"{mine}/images", f"--reference={mine}/images", f"--features=encoder:{mine}/latents"])):
        with pytest.raises(InputError, match=line):
            call()


# ---- Latents that exist ----
def test_given_latents_train_a_teacher(tmp_path):
    """As an autoencoder's, 4 x 32 x 32: an array on disk, a tensor, and once more."""
    g = numpy.random.default_rng(0)
    z, y = g.normal(size=(10, 4, 32, 32)).astype(numpy.float32), g.integers(3, size=10)
    y[:3] = 0, 1, 2
    numpy.save(tmp_path / "z.npy", z)
    more = ["x", "y", "z"], "an autoencoder", 4
    write_latents(tmp_path / "a", numpy.load(tmp_path / "z.npy", mmap_mode="c"), y, *more)
    write_latents(tmp_path / "b", torch.from_numpy(z).requires_grad_(), y.tolist(), *more)
    write_latents(tmp_path / "d", z, y.astype("uint16"))
    (tmp_path / "d").rename(tmp_path / "e")
    let_go()
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("[!.]*")} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").glob("[!.]*")}
    latents = Latents(tmp_path / "a")
    assert (latents.classes, latents.shape) == (["x", "y", "z"], (4, 32, 32))
    assert torch.equal(latents.read(range(10))[0], torch.from_numpy(z).half()) and latents.labels.tolist() == y.tolist()
    assert (latents.stats["mean"] - torch.from_numpy(z).half().double().mean(0)).abs().max() < 1e-12
    train_teacher.main([f"--latents={tmp_path}/a", f"--out={tmp_path}/teacher",
                        *"--preset tiny --steps 2 --batch-size 4 --log-every 1 --workers 0".split()])
    let_go()
    assert model.load_network(tmp_path / "teacher")[0].shape == (4, 32, 32)
    for complaint, call in {
            "other work": lambda: write_latents(tmp_path / "a", z + 1, y, *more),
            "not finite in float16": lambda: write_latents(tmp_path / "c", 1e6 * z, y),
            "latents .10, 4, 32, 31.": lambda: write_latents(tmp_path / "d", z[..., :31], y),
            "labels .9., 3 classes: give .N, C, G, G., and .N,. numbers": lambda: write_latents(tmp_path / "d", z, y[:9]),
            "is by an autoencoder, which is no --encoder": lambda: TrainingData(tmp_path / "a", tmp_path),
            "latents .0, ": lambda: write_latents(tmp_path / "d", z[:0], y[:0]),
            "holds latents that were given": lambda: train_decoder.open_pairs(tmp_path, tmp_path / "a", "cpu")}.items():
        with pytest.raises(InputError, match=complaint):
            call()
        let_go()
    assert not (tmp_path / "c/shard_00000.safetensors").exists()


def test_the_lines_of_the_page(tmp_path, monkeypatch, capsys):
    """docs/DATA.md's three programs, as they stand there."""
    page = (runs.ROOT / "docs/DATA.md").read_text()
    find, own, given = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    monkeypatch.chdir(tmp_path)
    random_images(tmp_path / "my_images", classes=2, each=3)
    (tmp_path / "my_images/class0/bad.png").write_bytes(b"")
    exec(find, {})
    assert "my_images/class0/bad.png is no readable image" in capsys.readouterr().out
    (tmp_path / "my_images/class0/bad.png").unlink()
    exec(own, {})
    let_go()
    assert Latents("data/latents").about["encoder"]["id"] == "Mine" and len(Latents("data/latents")) == 6
    (tmp_path / "data").rename("before")
    numpy.save("latents.npy", numpy.zeros((4, 4, 32, 32)))
    exec(given, {"labels": [0, 1, 1, 0]})
    let_go()
    assert Latents("data/latents").classes == ["cat", "dog"]
