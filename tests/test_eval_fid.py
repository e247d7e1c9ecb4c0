"""eval_fid.py: closed forms, independent formulas, brute force, the files it reads, and what it says to wrong ones."""
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import let_go, run_on
from scipy.linalg import sqrtm

import encode_latents
import eval_fid
from eval_fid import frechet_distance, inception_score, main, precision_recall
from model import InputError, read_json, read_tensors, write_tensors
from sanity import random_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "error::ResourceWarning")


# ---- Metrics ----
def published_formula(x, y):
    """pytorch-fid's and ADM's: numpy moments and scipy's matrix square root of the product."""
    m_1, m_2, c_1, c_2 = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((m_1 - m_2) ** 2).sum() + np.trace(c_1) + np.trace(c_2) - 2 * np.trace(sqrtm(c_1 @ c_2)).real


def test_frechet_distance_of_gaussians_in_closed_form():
    """Eigenvalues up to the largest one's last digits times the dimensions are rounding, and count as 0."""
    turn, m = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0], np.linspace(-1, 1, 5)
    s_1, s_2 = np.arange(1.0, 6), np.array([2.0, 0.5, 3, 4, 1])
    commuting = frechet_distance(0 * m, turn * s_1**2 @ turn.T, m, turn * s_2**2 @ turn.T)
    assert commuting == pytest.approx((m**2).sum() + ((s_1 - s_2) ** 2).sum(), rel=1e-12)
    for factor, counts in ((50, False), (200, True)):
        small = factor * np.finfo(float).eps
        c = np.diag([1.0] + 99 * [small])
        wanted = np.trace(c) + 98 - 198 * small ** 0.5 * counts
        assert frechet_distance(np.zeros(100), c, np.zeros(100), np.eye(100)) == pytest.approx(wanted, rel=1e-12)


def brute_force(real, fake, k):
    def inside(points, manifold):
        radii = [sorted(((p - q) ** 2).sum() for q in manifold)[k] for p in manifold]    # 0 is p itself
        return np.mean([any(((x - p) ** 2).sum() <= r for p, r in zip(manifold, radii, strict=True)) for x in points])
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k, block", [(1, 7), (3, 2048)])
def test_precision_and_recall_by_brute_force(k, block):
    """On floats, and on a lattice, where distances tie and points coincide, which is where <= against < shows."""
    r = np.random.default_rng(0)
    lattice = r.integers(0, 4, (60, 3)), r.integers(1, 6, (80, 3))
    for real, fake in (r.normal(size=(60, 6)) * 1.2, r.normal(size=(90, 6))), lattice, (lattice[0] + 4096, lattice[1] + 4096):
        wanted = brute_force(real, fake, k)
        assert precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k, block) == pytest.approx(wanted, abs=1e-15)
        assert 0.02 < min(wanted) and max(wanted) < 1    # the case says something


def test_inception_score_in_closed_form_and_by_splits():
    assert inception_score(torch.full((100, 7), 1 / 7)) == pytest.approx(1)
    sorted_classes = torch.eye(10).repeat_interleave(1000, 0)    # splits of 5,000 see five classes each
    assert inception_score(sorted_classes) == pytest.approx(5)
    assert inception_score(sorted_classes[:6000]) == pytest.approx((5 + 1) / 2)   # the rest is a split: as in ADM


# ---- The whole way, through a small TorchScript network with Inception's interface ----
class Small(torch.nn.Module):
    def __init__(self, scale: float = 1.0):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randn(24, 3, 5, 5, generator=g) * scale)
        self.register_buffer("weight", torch.randn(24, 6, generator=g))
        self.register_buffer("bias", torch.tensor([9.0, 0, 0, 0, 0, 0]))

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = torch.nn.functional.conv2d(img.to(torch.float32) / 128 - 1, self.kernel, stride=2)
        f = (x.abs() / 5).mean([2, 3])
        y = f @ self.weight
        return f if return_features else (y if no_output_bias else y + self.bias).softmax(1)


def draw(n, seed, levels=256):
    """Coloured squares, uint8 (n, 32, 32, 3)."""
    squares = np.random.default_rng(seed).integers(0, levels, (n, 4, 4, 3), np.uint8)
    return squares.repeat(8, axis=1).repeat(8, axis=2)


SAMPLES, REFERENCE = draw(203, 0, levels=200), draw(150, 1)
F, G = (Small()(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True).double().numpy() for x in (SAMPLES, REFERENCE))
MOMENTS = dict(mu=G.mean(0) + 1, sigma=np.cov(G, rowvar=False))


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A folder to be in: the network, samples, references of images, of moments, of both; latents of an encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("eval"))
        torch.jit.script(Small()).save("net.pt")
        np.savez("samples.npz", arr_0=SAMPLES, arr_1=np.arange(203) % 10)
        np.savez_compressed("reference.npz", REFERENCE)
        np.savez("adm.npz", arr_0=REFERENCE, **MOMENTS)
        np.savez("moments.npz", **MOMENTS)
        Path("few").mkdir()
        for i, image in enumerate(SAMPLES[:8]):
            Image.fromarray(image).save(f"few/{i}.png")
        random_encoder.main("--out encoder --width 48 --depth 1 --heads 4 --patch 4".split())
        encode_latents.main("--data-path few --out latents --encoder encoder --workers 0 --image-size 32 --encoder-size 64 "
                            "--precision bf16".split())
        yield


def run(flags, samples="samples.npz", net="net.pt", out="out.json"):
    """The results of a run in this process."""
    try:
        Path("out.json").unlink(missing_ok=True)
        main([*f"{samples} --out {out} --reference {flags}".split(), *["--inception", net][:2 * bool(net)]])
        return read_json(out) if samples else None
    finally:
        let_go()


def test_metrics_through_the_torchscript_interface(capsys):
    result = run("reference.npz --micro-batch 17")
    metrics = result["metrics"]
    assert metrics["frechet_distance"] == pytest.approx(published_formula(F, G), rel=1e-6)
    assert (metrics["precision"], metrics["recall"]) == brute_force(G, F, 3)
    p = torch.softmax(torch.from_numpy(F).float() @ Small().weight, 1)    # without the bias: as ADM
    assert metrics["inception_score"] == pytest.approx(inception_score(p), rel=1e-5)
    assert {"command", "torch", "date"} <= result.keys() and result["counts"] == {"samples": 203, "reference": 150}
    said = capsys.readouterr().out
    assert f"frechet distance  {metrics['frechet_distance']:.4f}" in said and "under 10,000 the distance is biased" in said


def test_adm_reference_gives_its_moments_to_fid_and_its_images_to_precision():
    run("moments.npz --save-statistics moments.safetensors", samples="")
    adm, *moments = (run(path)["metrics"] for path in ("adm.npz", "moments.npz", "moments.safetensors"))
    wanted = frechet_distance(F.mean(0), np.cov(F, rowvar=False), *MOMENTS.values())
    assert adm["frechet_distance"] == pytest.approx(wanted, rel=1e-6) and (adm["precision"], adm["recall"]) == brute_force(G, F, 3)
    assert moments[0] == moments[1] and "precision" not in moments[0]


def test_statistics_file_stands_for_its_images():
    """And has features of evenly spread images, all there are at most: a reference is sorted by class."""
    for count in (4, 100, 1000):
        run(f"reference.npz --pr-images {count} --micro-batch 7 --save-statistics {count}.safetensors", samples="")
        found = read_tensors(f"{count}.safetensors")[0][""]["features"].numpy()
        gaps = np.diff([abs(G - x).sum(1).argmin() for x in found], append=150)
        assert len(found) == min(count, 150) and max(gaps) - min(gaps) <= 1 and min(gaps) > 0
    direct = run("reference.npz --pr-images 100")
    assert run("100.safetensors")["metrics"] == pytest.approx(direct["metrics"], rel=1e-9)
    with pytest.raises(InputError, match="has statistics of .*Inception.* not of .*RANDOM"):
        run("100.safetensors --features encoder:latents")


def test_several_processes_give_the_numbers_of_one():
    """203 and 150 images do not divide evenly; each keeps its own part of those that are evenly spread."""
    flags = "reference.npz --pr-images 13 --micro-batch 20 --save-statistics"
    alone = run(f"{flags} one.safetensors")["metrics"]
    run_on(2, main, f"samples.npz --out two.json --inception net.pt --reference {flags} two.safetensors".split())
    one, two = (read_tensors(f"{name}.safetensors")[0][""] for name in ("one", "two"))
    assert torch.equal(one["features"], two["features"]) and torch.allclose(one["covariance"], two["covariance"], rtol=1e-6)
    assert read_json("two.json")["metrics"] == pytest.approx(alone, rel=1e-6)


def test_inception_file_is_fetched_once(tmp_path, monkeypatch, capsys):
    """With its sha256; what is broken off or another file is not kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(eval_fid, "INCEPTION_URL", Path("net.pt").resolve().as_uri())
    with pytest.raises(InputError, match="invalid hash value"):
        run("reference.npz", net="")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(eval_fid, "INCEPTION_SHA256", hashlib.sha256(Path("net.pt").read_bytes()).hexdigest())
    for times in 2, 0:    # the refused one and this one, then none
        run("reference.npz", net="")
        assert capsys.readouterr().out.count("fetching file:") == times


def test_the_encoder_of_latents_and_a_dinov2():
    """encoder:LATENTS takes encoder, sizes and precision from the description. DINOv2 sees what dgm-eval shows it."""
    about = run("reference.npz --pr-images 0 --features encoder:latents")["features"]
    assert (about["encoder_size"], about["precision"], about["name"]) == (64, "bf16", "RANDOM encoder (untrained)")
    from transformers import Dinov2Config, Dinov2Model
    net = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)).eval()
    net.save_pretrained("vit")
    images = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in SAMPLES[:8]]
    x = (np.stack(images) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = net(pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2).float()).pooler_output
    run("few --image-size 32 --features vit --save-statistics vit.safetensors", samples="")
    torch.testing.assert_close(read_tensors("vit.safetensors")[0][""]["features"], wanted)
    assert run("vit.safetensors --features vit", samples="few")["metrics"]["frechet_distance"] < 1e-6    # at their own size


def test_results_of_others_stay():
    """None that is not this program's, or is of another reference or features, is replaced."""
    assert eval_fid.parse_args(["a.1.5.npz", "--reference", "x", "--features", "encoder:y"]).out == "a.1.5.encoder-y.json"
    result = json.dumps(run("reference.npz"))
    for words, before, flags in (("reference: reference.npz there, adm.npz now", result, "adm.npz"),
                                 ("features: ", result, "reference.npz --features encoder:latents"),
                                 ("kept.json holds other work", '{"mine": 1}', "reference.npz")):
        Path("kept.json").write_text(before)
        with pytest.raises(InputError, match=words):
            run(flags, out="kept.json")
        assert Path("kept.json").read_text() == before


def test_wrong_samples_references_and_networks():
    """One line each."""
    images = np.zeros((8, 32, 32, 3), np.uint8)
    for name, array in {"fortran": np.asfortranarray(images), "few": images[:3], "size": images[:, :16, :16], "objects": [{}, {}]}.items():
        np.savez(f"{name}.npz", arr_0=array)
    np.savez("mu.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez("nan.npz", mu=np.nan * MOMENTS["mu"], sigma=MOMENTS["sigma"])
    torch.jit.script(torch.nn.Identity()).save("foreign.pt")
    for flag in "--save-statistics", "--out":
        with pytest.raises(SystemExit):
            eval_fid.parse_args(["a.npz", "--reference", "x", flag, "val.npz"])
    data = bytearray(Path("samples.npz").read_bytes())
    data[len(data) // 2] ^= 255
    Path("turned.npz").write_bytes(data)
    Path("text").write_text("hello")
    write_tensors("other.safetensors", {"": {"x": torch.zeros(1)}})
    torch.jit.script(Small(np.nan)).save("nan.pt")
    for message, given in {
            "turned.npz is not a readable .npz .* CRC": dict(samples="turned.npz"), "no whole .zip": dict(samples="text"),
            "it is object": dict(samples="objects.npz"), "Fortran order": dict(samples="fortran.npz"),
            "3 images are too few": dict(samples="few.npz"), "of 16 pixels a side, the reference of 32": dict(samples="size.npz"),
            "not of one kind of features": dict(flags="mu.npz"), "covariance is not finite": dict(flags="nan.npz"), "has statistics of None, not of": dict(flags="other.safetensors"),
            "cannot load foreign.pt": dict(net="foreign.pt"),
            "are not finite": dict(net="nan.pt"), "cannot load text": dict(net="text")}.items():
        with pytest.raises(InputError, match=message):
            run(**{"flags": "reference.npz", **given})
