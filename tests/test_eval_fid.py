"""eval_fid.py: closed forms, independent formulas, brute force, the files it reads, and what it says to wrong ones."""
import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import let_go, refused, run_on
from scipy.linalg import sqrtm

import encode_latents
import eval_fid
from eval_fid import frechet_distance, inception_score, main, precision_recall
from model import InputError, read_tensors, write_tensors
from sanity import random_encoder

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "error::ResourceWarning")


def published_formula(x, y):
    """pytorch-fid's and ADM's: numpy moments and scipy's matrix square root of the product."""
    m_1, m_2, c_1, c_2 = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((m_1 - m_2) ** 2).sum() + np.trace(c_1) + np.trace(c_2) - 2 * np.trace(sqrtm(c_1 @ c_2)).real


# ---- Metrics ----
def test_frechet_distance_of_gaussians_in_closed_form():
    turn, (m_1, m_2) = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0], (np.zeros(5), np.linspace(-1, 1, 5))
    s_1, s_2 = np.arange(1.0, 6), np.array([2.0, 0.5, 3, 4, 1])
    commuting = frechet_distance(m_1, turn * s_1**2 @ turn.T, m_2, turn * s_2**2 @ turn.T)
    assert commuting == pytest.approx(((m_1 - m_2) ** 2).sum() + ((s_1 - s_2) ** 2).sum(), rel=1e-12)
    # Fewer samples than dimensions: at right angles there is no cross term.
    apart = frechet_distance(np.zeros(4), np.diag([1.0, 4, 0, 0]), np.zeros(4), np.diag([0.0, 0, 9, 16]))
    assert apart == pytest.approx(30, rel=1e-12)


def test_eigenvalues_that_are_rounding():
    """Up to the largest one's last digits times the dimensions they count as 0; below 0 by 1e-4 of it they are an error."""
    for factor, counts in ((50, False), (200, True)):
        small = factor * np.finfo(float).eps
        c = np.diag([1.0] + 99 * [small])
        wanted = np.trace(c) + 98 - 198 * small ** 0.5 * counts
        assert frechet_distance(np.zeros(100), c, np.zeros(100), np.eye(100)) == pytest.approx(wanted, rel=1e-12)
    for c, words in ((np.diag([1.0, -1.1e-4]), "not symmetric with eigenvalues >= 0"), (np.array([[1.0, 0.5], [0, 1]]), "not symmetric"),
                     (np.full((2, 2), np.nan), "not finite"), (np.eye(3), "do not fit")):
        with pytest.raises(InputError, match=words):
            frechet_distance(np.zeros(2), np.eye(2), np.zeros(len(c)), c)


def brute_force(real, fake, k):
    def inside(points, manifold):
        radii = [sorted(((p - q) ** 2).sum() for j, q in enumerate(manifold) if j != i)[k - 1] for i, p in enumerate(manifold)]
        return np.mean([any(((x - p) ** 2).sum() <= r for p, r in zip(manifold, radii, strict=True)) for x in points])
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k, block", [(1, 7), (3, 2048)])
def test_precision_and_recall_by_brute_force(k, block):
    """On floats, and on a lattice, where distances tie and points coincide, which is where <= against < shows."""
    r = np.random.default_rng(0)
    floats = (r.normal(size=(150, 6)) * 1.2).astype(np.float32)
    lattice = r.integers(0, 4, (60, 3)).astype(np.float32), r.integers(1, 6, (80, 3)).astype(np.float32)
    for real, fake in (floats[:60], floats[60:] / 1.2), lattice, (lattice[0] + 4096, lattice[1] + 4096):
        wanted = brute_force(real.astype(np.float64), fake.astype(np.float64), k)
        assert precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k, block) == pytest.approx(wanted, abs=1e-15)
        assert 0.02 < min(wanted) and max(wanted) < 1                             # the case says something
    with pytest.raises(InputError, match="at least 4 images a side, here 3 and 80"):
        precision_recall(torch.ones(3, 2), torch.ones(80, 2))


def test_inception_score_in_closed_form_and_by_splits():
    assert inception_score(torch.full((100, 7), 1 / 7)) == pytest.approx(1)
    sorted_classes = torch.eye(10).repeat_interleave(1000, 0)                     # splits of 5,000 see five classes each
    assert inception_score(sorted_classes) == pytest.approx(5)
    assert inception_score(sorted_classes[:6000]) == pytest.approx((5 + 1) / 2)   # the rest is a split: as in ADM


# ---- The whole way, through a small TorchScript network with Inception's interface ----
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randn(24, 3, 5, 5, generator=g))
        self.register_buffer("weight", torch.randn(6, 24, generator=g))
        self.register_buffer("bias", torch.tensor([9.0, 0, 0, 0, 0, 0]))

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False) -> torch.Tensor:
        x = torch.nn.functional.conv2d(img.to(torch.float32) / 128 - 1, self.kernel, stride=2)
        f = (x.abs() / 5).mean([2, 3])
        if return_features:
            return f
        y = f @ self.weight.t()
        return (y if no_output_bias else y + self.bias).softmax(1)


class Wrong(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3])


class NotFinite(Small):
    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = img.to(torch.float32).mean([2, 3])
        return torch.where(x > 0, x / 0, x) if return_features else x.softmax(1)


def draw(n, seed, size=32):
    """Coloured discs on a slope, uint8 (n, size, size, 3)."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    low, high, centre = (r.uniform(0, top, (n, 1, 1, 3)) for top in (100, 255, 1))
    disc = (x[..., None] - centre[..., :1]) ** 2 + (y[..., None] - centre[..., 1:2]) ** 2 < 0.06
    return np.where(disc, high, low * (x + y)[..., None]).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A scripted network, samples, a reference of images, and ADM-like ones; latents of an encoder."""
    place = tmp_path_factory.mktemp("eval")
    torch.jit.script(Small()).save(place / "net.pt")
    samples, reference = draw(203, 0) // 2, draw(150, 1)
    np.savez(place / "samples.npz", arr_0=samples, arr_1=np.arange(203) % 10)
    np.savez_compressed(place / "reference.npz", reference)
    with torch.no_grad():
        f, g = (Small()(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True).double().numpy() for x in (samples, reference))
    np.savez(place / "adm.npz", arr_0=reference, mu=g.mean(0) + 1, sigma=np.cov(g, rowvar=False), mu_s=0, sigma_s=0)
    np.savez(place / "moments.npz", mu=g.mean(0) + 1, sigma=np.cov(g, rowvar=False))
    random_encoder.main(["--out", f"{place}/encoder", *"--width 48 --depth 1 --heads 4 --patch 4".split()])
    (place / "few" / "all").mkdir(parents=True)
    for i, image in enumerate(samples[:8]):
        Image.fromarray(image).save(place / "few" / "all" / f"{i}.png")
    encode_latents.main(["--data-path", f"{place}/few", "--out", f"{place}/latents", "--encoder", f"{place}/encoder",
                         *"--workers 0 --image-size 32 --encoder-size 64 --precision bf16".split()])
    return place, samples, reference, f, g


def run(place, *arguments, samples="samples.npz", net="net.pt"):
    """The metrics JSON of a run in this process."""
    out = place / "out.json"
    out.unlink(missing_ok=True)
    inputs = [str(place / samples), "--out", str(out)] if samples else []
    network = [] if "--features" in arguments else ["--inception", str(place / net)]
    try:
        main([*inputs, *network, *map(str, arguments)])
    finally:
        let_go()
    return json.loads(out.read_text()) if out.exists() else None


def test_metrics_through_the_torchscript_interface(place, capsys):
    place, _, _, f, g = place
    result = run(place, "--reference", place / "reference.npz", "--micro-batch", "17")
    metrics = result["metrics"]
    assert metrics["frechet_distance"] == pytest.approx(published_formula(f, g), rel=1e-6)
    assert (metrics["precision"], metrics["recall"]) == brute_force(g, f, 3)
    p = torch.softmax(torch.from_numpy(f).float() @ Small().weight.T, 1).double()         # without the bias: as ADM
    assert metrics["inception_score"] == pytest.approx((p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item(), rel=1e-5)
    assert result["samples"]["sha256"] == hashlib.sha256((place / "samples.npz").read_bytes()).hexdigest()
    assert any("under 10,000" in note for note in result["notes"]) and {"command", "torch", "date"} <= result.keys()
    assert f"FID               {metrics['frechet_distance']:.4f}" in capsys.readouterr().out


def test_adm_reference_gives_its_moments_to_fid_and_its_images_to_precision(place, tmp_path):
    place, _, _, f, g = place
    run(place, "--reference", place / "moments.npz", "--save-statistics", tmp_path / "m.safetensors", samples=None)
    adm, *moments = (run(place, "--reference", path)["metrics"]
                     for path in (place / "adm.npz", place / "moments.npz", tmp_path / "m.safetensors"))
    wanted = frechet_distance(f.mean(0), np.cov(f, rowvar=False), g.mean(0) + 1, np.cov(g, rowvar=False))
    assert adm["frechet_distance"] == pytest.approx(wanted, rel=1e-6) and (adm["precision"], adm["recall"]) == brute_force(g, f, 3)
    assert moments[0] == moments[1] and "precision" not in moments[0]


def test_statistics_file_stands_for_its_images(place):
    """And has features of evenly spread images, all there are at most: a reference is sorted by class."""
    place, _, _, _, g = place
    for count in (4, 13, 100, 1000):
        statistics = place / f"{count}.safetensors"
        assert run(place, "--reference", place / "reference.npz", "--pr-images", count, "--micro-batch", 7,
                   "--save-statistics", statistics, samples=None) is None
        found = read_tensors(statistics)[0][""]["features"].numpy()
        places = [int(abs(g - x).sum(1).argmin()) for x in found]
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 150], strict=True)]
        assert len(places) == min(count, 150) and max(gaps) - min(gaps) <= 1 and min(gaps) > 0
    direct = run(place, "--reference", place / "reference.npz", "--pr-images", "100")
    assert run(place, "--reference", place / "100.safetensors")["metrics"] == pytest.approx(direct["metrics"], rel=1e-9)
    with pytest.raises(InputError, match="is of other features"):
        run(place, "--reference", place / "100.safetensors", "--features", f"encoder:{place}/latents")


def test_several_processes_give_the_numbers_of_one(place, tmp_path):
    """203 and 150 images do not divide evenly; each keeps its own part of those that are evenly spread."""
    place, figures = place[0], []
    for world in (1, 2):
        argv = [f"{place}/samples.npz", "--reference", f"{place}/reference.npz", "--inception", f"{place}/net.pt", "--pr-images", "13",
                "--micro-batch", "20", "--out", f"{tmp_path}/{world}.json", "--save-statistics", f"{tmp_path}/{world}.safetensors"]
        run_on(world, main, argv) if world > 1 else main(argv)
        figures.append(json.loads((tmp_path / f"{world}.json").read_text())["metrics"])
    let_go()
    one, two = (read_tensors(tmp_path / f"{world}.safetensors")[0][""] for world in (1, 2))
    assert torch.equal(one["features"], two["features"]) and torch.allclose(one["covariance"], two["covariance"], rtol=1e-6)
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_inception_file_is_fetched_once(place, tmp_path, monkeypatch, capsys):
    """By torch.hub, with its sha256, which is seen to be wrong; what is broken off or another file is not kept."""
    place, *_ = place
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(eval_fid, "INCEPTION_URL", (place / "net.pt").as_uri())
    argv = [f"{place}/samples.npz", "--reference", f"{place}/reference.npz", "--pr-images", 0, "--out", f"{place}/fetched.json"]
    said = refused("eval_fid.py", argv, capsys)
    assert "cannot fetch" in said and "invalid hash value" in said and not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(eval_fid, "INCEPTION_SHA256", hashlib.sha256((place / "net.pt").read_bytes()).hexdigest())
    for times in 1, 0:
        capsys.readouterr()
        main([str(x) for x in argv])
        let_go()
        assert capsys.readouterr().out.count("fetching file:") == times


def test_the_encoder_of_latents_and_a_dinov2(place, tmp_path):
    """encoder:LATENTS takes encoder, sizes and precision from the description. DINOv2 sees what dgm-eval shows it."""
    place, samples, *_ = place
    about = run(place, "--reference", place / "reference.npz", "--pr-images", 0, "--features", f"encoder:{place}/latents")["features"]
    assert (about["encoder_size"], about["precision"], about["name"]) == (64, "bf16", "RANDOM encoder (untrained)")
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    net = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)).eval()
    net.save_pretrained(tmp_path / "vit")
    images = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in samples[:5]]
    x = (np.stack(images) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = net(pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2).float()).pooler_output
    np.savez(tmp_path / "few.npz", arr_0=samples[:5])
    run(place, "--reference", tmp_path / "few.npz", "--features", tmp_path / "vit", "--save-statistics", tmp_path / "s.safetensors",
        samples=None)
    torch.testing.assert_close(read_tensors(tmp_path / "s.safetensors")[0][""]["features"], wanted)


def test_results_of_others_stay(place, tmp_path):
    """None that is not this program's, or is of another reference or features, is replaced."""
    assert eval_fid.parse_args(["a.1.5.npz", "--reference", "x", "--features", "encoder:y"]).out == "a.1.5.encoder-y.json"
    place, out = place[0], tmp_path / "out.json"
    flags = [str(place / "samples.npz"), "--inception", str(place / "net.pt"), "--out", str(out), "--reference"]
    main([*flags, f"{place}/reference.npz"])
    let_go()
    for words, content, *argv in (("reference: .*reference.npz there, .*adm.npz now", None, place / "adm.npz"),
                                  ("features: ", None, place / "reference.npz", "--features", f"encoder:{place}/latents"),
                                  ("out.json holds other work", '{"mine": 1}', place / "reference.npz")):
        before = content or out.read_text()
        out.write_text(before)
        with pytest.raises(InputError, match=words):
            main([*flags, *map(str, argv)])
        let_go()
        assert out.read_text() == before


# ---- Wrong input: one line each ----


IMAGES = np.zeros((8, 32, 32, 3), np.uint8)


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


def test_wrong_samples_references_and_networks(place, tmp_path):
    """One line each."""
    def turned(path):
        np.savez(path, arr_0=draw(20, 0))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 255
        path.write_bytes(data)
    for kind, name, make, message in (
            ("samples", "turned.npz", turned, "is damaged .*CRC"),
            ("samples", "text.npz", lambda path: path.write_text("hello"), "is not a readable .npz"),
            ("samples", "pickle.npz", saved(arr_0=np.array([{}, {}], dtype=object)), "not a readable .npz with arr_0"),
            ("samples", "fortran.npz", saved(arr_0=np.asfortranarray(IMAGES)), "uint8 .* in Fortran order"),
            ("samples", "size.npz", saved(arr_0=IMAGES[:, :16, :16]), r"of \[16, 32\] pixels"),
            ("samples", "few.npz", saved(arr_0=IMAGES[:3]), "3 images are too few"),
            ("reference", "mu.npz", saved(mu=np.zeros(5), sigma=np.eye(5)), "is of other features"),
            ("reference", "pickled.npz", saved(mu=np.array([{}], dtype=object), sigma=np.eye(2)), "allow_pickle=False"),
            ("reference", "other.safetensors", lambda path: write_tensors(path, {"": {"x": torch.zeros(1)}}), "has no statistics"),
            ("net", "wrong.pt", lambda path: torch.jit.script(Wrong()).save(path), "does not answer as it should"),
            ("net", "finite.pt", lambda path: torch.jit.script(NotFinite()).save(path), "are not finite: the network is damaged"),
            ("net", "text.pt", lambda path: path.write_text("hello"), "is no TorchScript file")):
        make(tmp_path / name)
        reference = tmp_path / name if kind == "reference" else place[0] / "reference.npz"
        with pytest.raises(InputError, match=message) as error:
            run(place[0], "--reference", reference, **({kind: tmp_path / name} if kind != "reference" else {}))
        assert "\n" not in str(error.value)
