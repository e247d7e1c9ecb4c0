"""eval_fid.py: closed forms, independent formulas, brute force, the files it reads, and what it says to wrong ones."""
import hashlib
import io
import json
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.linalg import sqrtm

import encode_latents
import eval_fid
import model
from eval_fid import Moments, NpzImages, frechet_distance, inception_score, main, precision_recall
from model import InputError, read_tensors, write_tensors

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "sanity"))
import random_encoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "error::ResourceWarning")


def features(n, d, seed, scale=1.0, shift=0.0):
    """Correlated Gaussian features with a mean, float32."""
    r = np.random.default_rng(seed)
    x = r.normal(size=(n, d)) @ r.normal(size=(d, d)) * scale / d**0.5
    return (x + r.normal(size=d) + shift).astype(np.float32)


def of(x):
    moments = Moments().update(torch.as_tensor(x))
    return moments.mean, moments.covariance


def published_formula(x, y):
    """pytorch-fid's and ADM's: numpy moments and scipy's matrix square root of the product."""
    m_1, m_2, c_1, c_2 = x.mean(0), y.mean(0), np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return ((m_1 - m_2) ** 2).sum() + np.trace(c_1) + np.trace(c_2) - 2 * np.trace(sqrtm(c_1 @ c_2)).real


# ----------------------------------------------------------------------------------------------------------------------
# The Frechet distance and its moments
# ----------------------------------------------------------------------------------------------------------------------
def test_frechet_distance_of_gaussians_in_closed_form():
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    s_1, s_2, m_1, m_2 = np.arange(1.0, 6), np.array([2.0, 0.5, 3, 4, 1]), np.zeros(5), np.linspace(-1, 1, 5)
    commuting = frechet_distance(m_1, turn * s_1**2 @ turn.T, m_2, turn * s_2**2 @ turn.T)
    assert commuting == pytest.approx(((m_1 - m_2) ** 2).sum() + ((s_1 - s_2) ** 2).sum(), rel=1e-12)
    # Two dimensions, not commuting: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = C_1 C_2
    c_1, c_2 = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -0.5], [-0.5, 2]])
    wanted = np.trace(c_1 + c_2) - 2 * np.sqrt(np.trace(c_1 @ c_2) + 2 * np.sqrt(np.linalg.det(c_1 @ c_2)))
    assert frechet_distance(np.zeros(2), c_1, np.zeros(2), c_2) == pytest.approx(wanted, rel=1e-12)


def test_equal_sets_and_shifted_sets():
    x = features(500, 32, 0)
    assert frechet_distance(*of(x), *of(x)) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(*of(x), *of(x.astype(np.float64) + 0.25)) == pytest.approx(32 * 0.25**2, rel=1e-9)


def test_fewer_samples_than_dimensions():
    """Sets in a subspace have the distance they have within it, whatever the dimensions around."""
    x, y = features(40, 8, 0).astype(np.float64), features(60, 8, 1).astype(np.float64)
    inside = frechet_distance(*of(x), *of(y))
    basis = np.linalg.qr(np.random.default_rng(2).normal(size=(64, 8)))[0].T
    assert frechet_distance(*of(x @ basis), *of(y @ basis)) == pytest.approx(inside, rel=1e-9)
    z = features(20, 64, 3)
    assert frechet_distance(*of(z), *of(z)) == pytest.approx(0, abs=1e-9)
    apart = frechet_distance(np.zeros(4), np.diag([1.0, 4, 0, 0]), np.zeros(4), np.diag([0.0, 0, 9, 16]))
    assert apart == pytest.approx(30, rel=1e-12)                                # at right angles: no cross term
    assert frechet_distance(np.ones(3), np.zeros((3, 3)), np.zeros(3), np.eye(3)) == pytest.approx(6, rel=1e-12)


def test_eigenvalues_that_are_rounding():
    """Up to the largest one's last digits times the dimensions they count as 0; below 0 by 1e-4 of it they are an error."""
    small = 100 * np.finfo(float).eps                                           # the square roots' product would be 1e-14
    for factor, counts in ((0.5, False), (2, True)):
        c = np.diag([1.0] + 99 * [small * factor])
        distance = frechet_distance(np.zeros(100), c, np.zeros(100), np.eye(100))
        cross = 2 + 2 * 99 * (small * factor) ** 0.5 * counts
        assert distance == pytest.approx(np.trace(c) + 100 - cross, rel=1e-12)
    for below, taken in ((-0.9e-4, True), (-1.1e-4, False)):
        c = np.diag([1.0, below])
        if taken:
            assert frechet_distance(np.zeros(2), c, np.zeros(2), np.eye(2)) == pytest.approx(1 + below + 2 - 2)
        else:
            with pytest.raises(InputError, match="covariance 1 is not symmetric with eigenvalues >= 0"):
                frechet_distance(np.zeros(2), c, np.zeros(2), np.eye(2))


@pytest.mark.parametrize(("n", "d", "scale", "shift"), [(300, 16, 1, 0), (1000, 64, 5, 3), (2000, 200, 0.01, 1)])
def test_frechet_distance_is_that_of_the_public_tools(n, d, scale, shift):
    x, y = (features(n + i, d, i, scale * (1 + i / 100), shift).astype(np.float64) for i in (0, 20))
    assert frechet_distance(*of(x), *of(y)) == pytest.approx(published_formula(x, y), rel=1e-6)


def test_moments_in_parts():
    x = features(1001, 24, 0) + 100
    whole = Moments()
    for batch in torch.from_numpy(x).split(97):
        whole.update(batch)
    assert whole.count == 1001
    np.testing.assert_allclose(whole.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("moments", "message"), [
    ((np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "do not fit"),
    ((np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan)), "not finite"),
    ((np.zeros(2), np.eye(2), np.zeros(2), np.diag([1.0, -1])), "covariance 2 is not symmetric"),
    ((np.zeros(2), np.array([[1.0, 0.5], [0, 1]]), np.zeros(2), np.eye(2)), "covariance 1 is not symmetric")])
def test_what_is_no_pair_of_gaussians(moments, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(*moments)


# ----------------------------------------------------------------------------------------------------------------------
# Precision, recall, Inception Score
# ----------------------------------------------------------------------------------------------------------------------
def brute_force(real, fake, k):
    def inside(points, manifold):
        radii = [sorted(((p - q) ** 2).sum() for j, q in enumerate(manifold) if j != i)[k - 1]
                 for i, p in enumerate(manifold)]
        return np.mean([any(((x - p) ** 2).sum() <= r for p, r in zip(manifold, radii, strict=True)) for x in points])
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("block", [7, 2048])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k, block):
    """On floats, and on a lattice, where distances tie and points coincide, which is where <= against < shows."""
    r = np.random.default_rng(0)
    floats = features(150, 6, 0) * 1.2
    floats = floats[:60], floats[60:] / 1.2
    lattice = r.integers(0, 4, (60, 3)).astype(np.float32), r.integers(1, 6, (80, 3)).astype(np.float32)
    for real, fake in floats, lattice, (lattice[0] + 4096, lattice[1] + 4096):
        got = precision_recall(torch.from_numpy(real), torch.from_numpy(fake), k, block)
        wanted = brute_force(real.astype(np.float64), fake.astype(np.float64), k)
        assert got == pytest.approx(wanted, abs=1e-15)
        assert 0.02 < min(wanted) and max(wanted) < 1                           # the case says something


def test_precision_is_of_the_samples_and_recall_of_the_reference():
    real, fake = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(50, 4)
    fake += 1e-3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1))         # one mode, in the middle
    precision, recall = precision_recall(real, fake)
    assert precision == 1 and recall < 0.05
    with pytest.raises(InputError, match="at least 4 images a side, here 3 and 50"):
        precision_recall(real[:3], fake)


def test_inception_score_in_closed_form_and_by_splits():
    assert inception_score(torch.full((100, 7), 1 / 7)) == pytest.approx(1)
    assert inception_score(torch.eye(10).repeat(20, 1)) == pytest.approx(10)
    sorted_classes = torch.eye(10).repeat_interleave(1000, 0)                   # splits of 5,000 see five classes each
    assert inception_score(sorted_classes) == pytest.approx(5)
    assert inception_score(sorted_classes[:6000]) == pytest.approx((5 + 1) / 2)       # the rest is a split: as in ADM
    p = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(12), 300))
    kl = (p * (p.log() - p.mean(0).log())).sum(1)
    assert inception_score(p) == pytest.approx(kl.mean().exp().item(), rel=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The whole way, through a small TorchScript network with Inception's interface
# ----------------------------------------------------------------------------------------------------------------------
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


def draw(n, seed, size=32):
    """Images with something to lose: coloured discs and bars on a slope, edges sharp. uint8 (n, size, size, 3)."""
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    images = []
    for _ in range(n):
        image = np.outer(r.uniform(0, 1, 3), x + y).reshape(3, size, size).transpose(1, 2, 0) * 100
        for _ in range(3):
            cx, cy, radius = r.uniform(0, 1), r.uniform(0, 1), r.uniform(0.1, 0.3)
            disc, bar = (x - cx) ** 2 + (y - cy) ** 2 < radius**2, np.abs(x - cx + y - cy) < radius / 3
            image[disc if r.random() < 0.5 else bar] = r.uniform(0, 255, 3)
        images.append(image)
    return np.stack(images).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a scripted network, samples, a reference of images, and an ADM-like one."""
    place = tmp_path_factory.mktemp("eval")
    torch.jit.script(Small()).save(place / "net.pt")
    samples, reference = draw(203, 0) // 2, draw(150, 1)
    np.savez(place / "samples.npz", arr_0=samples, arr_1=np.arange(203) % 10)
    np.savez_compressed(place / "reference.npz", reference)
    with torch.no_grad():
        f, g = (Small()(torch.from_numpy(x).permute(0, 3, 1, 2), return_features=True).double().numpy()
                for x in (samples, reference))
    np.savez(place / "adm.npz", arr_0=reference, mu=g.mean(0) + 1, sigma=np.cov(g, rowvar=False), mu_s=0, sigma_s=0)
    np.savez(place / "moments.npz", mu=g.mean(0) + 1, sigma=np.cov(g, rowvar=False))
    random_encoder.main(["--out", f"{place}/encoder", *"--width 48 --depth 1 --heads 4 --patch 4".split()])
    (place / "few" / "all").mkdir(parents=True)
    for i, image in enumerate(samples[:8]):
        Image.fromarray(image).save(place / "few" / "all" / f"{i}.png")
    for name, size, precision in (("latents", 32, "fp32"), ("large", 64, "fp32"), ("bf16", 64, "bf16")):
        encode_latents.main(["--data-path", f"{place}/few", "--out", f"{place}/{name}", "--workers", "0", "--image-size", "32",
                             "--encoder-size", str(size), "--encoder", f"{place}/encoder", "--precision", precision])
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
        while model.LOCKS:                         # locks, as the end of the process would give them back
            model.LOCKS.pop().close()
    return json.loads(out.read_text()) if out.exists() else None


def test_metrics_through_the_torchscript_interface(place, capsys):
    place, samples, reference, f, g = place
    result = run(place, "--reference", place / "reference.npz", "--micro-batch", "17")
    metrics = result["metrics"]
    assert metrics["frechet_distance"] == pytest.approx(published_formula(f, g), rel=1e-6)
    assert (metrics["precision"], metrics["recall"]) == brute_force(g, f, 3)
    p = torch.softmax(torch.from_numpy(f).float() @ Small().weight.T, 1).double()         # without the bias: as ADM
    assert metrics["inception_score"] == pytest.approx(inception_score(p), rel=1e-5)
    assert result["samples"]["sha256"] == hashlib.sha256((place / "samples.npz").read_bytes()).hexdigest()
    assert result["features"]["sha256"] == hashlib.sha256((place / "net.pt").read_bytes()).hexdigest()
    assert (result["samples"]["count"], result["reference"]["count"]) == (203, 150)
    assert any("under 10,000" in note for note in result["notes"]) and {"command", "torch", "date"} <= result.keys()
    printed = capsys.readouterr().out
    assert f"FID               {metrics['frechet_distance']:.4f}" in printed


def test_adm_reference_gives_its_moments_to_fid_and_its_images_to_precision(place):
    place, _, _, f, g = place
    adm, moments = (run(place, "--reference", place / name) for name in ("adm.npz", "moments.npz"))
    wanted = frechet_distance(f.mean(0), np.cov(f, rowvar=False), g.mean(0) + 1, np.cov(g, rowvar=False))
    assert adm["metrics"]["frechet_distance"] == pytest.approx(wanted, rel=1e-6)
    assert (adm["metrics"]["precision"], adm["metrics"]["recall"]) == brute_force(g, f, 3)
    assert moments["metrics"]["frechet_distance"] == pytest.approx(wanted, rel=1e-6)
    assert "precision" not in moments["metrics"] and any("no precision" in note for note in moments["notes"])
    other = run(place, "--reference", place / "adm.npz", "--features", f"encoder:{place}/latents")
    assert other["features"]["name"].startswith("RANDOM") and other["metrics"]["frechet_distance"] != wanted
    with pytest.raises(InputError, match="mu, sigma serve --features inception only"):
        run(place, "--reference", place / "moments.npz", "--features", f"encoder:{place}/latents")


def test_statistics_file_stands_for_its_images(place):
    place, *_ = place
    statistics = place / "reference.safetensors"
    direct = run(place, "--reference", place / "reference.npz", "--pr-images", "100")
    save = "--reference", place / "reference.npz", "--pr-images", "100", "--save-statistics", statistics
    assert run(place, *save, samples=None) is None
    assert direct["reference"]["pr_images"] == 100 == len(read_tensors(statistics)[0][""]["features"])
    assert run(place, "--reference", statistics)["metrics"] == direct["metrics"]
    with pytest.raises(InputError, match="is of other features"):
        run(place, "--reference", statistics, "--features", f"encoder:{place}/latents")


def test_folder_zip_and_npz_of_the_same_pixels(place, tmp_path):
    place, samples, reference, *_ = place
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(tmp_path / "reference.zip", "w") as archive:
        for i, image in enumerate(reference):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            archive.writestr(f"all/{i:05}.png", file.getvalue())
    for i, image in enumerate(samples):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:05}.png")
    one = run(place, "--reference", place / "reference.npz")
    other = run(place, "--reference", tmp_path / "reference.zip", samples=tmp_path / "folder")
    assert one["metrics"] == other["metrics"]
    Image.fromarray(samples[0][:20, :20]).save(tmp_path / "folder" / "small.png")
    with pytest.raises(InputError, match=r"has sides of \[20, 32\] pixels"):
        run(place, "--reference", place / "reference.npz", samples=tmp_path / "folder")


def test_two_processes_give_the_numbers_of_one(place):
    """203 and 150 images do not divide evenly; the Inception Score sees the same order."""
    place, *_ = place
    one = run(place, "--reference", place / "reference.npz")
    command = [str(place / "samples.npz"), "--inception", str(place / "net.pt"), "--micro-batch", "20"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [ROOT / "eval_fid.py", *command, "--reference"]
    two = subprocess.run([*torchrun, *command, place / "reference.npz"], text=True, capture_output=True)
    assert two.returncode == 0 and two.stdout.count("FID") == 1, two.stderr
    two = json.loads((place / "samples.inception.json").read_text())
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
    without = subprocess.run([*torchrun, *command, place / "reference.npz", "--pr-images", "0"], text=True, capture_output=True)
    assert without.returncode == 0, without.stderr
    assert "precision" not in json.loads((place / "samples.inception.json").read_text())["metrics"]
    wrong = subprocess.run([sys.executable, *command, place / "none.npz"], text=True, capture_output=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "none.npz does not exist" in wrong.stderr


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (500, 100, 100, 3), dtype=np.uint8)      # 15 MB
    save(tmp_path / "images.npz", arr_0=images)
    tracemalloc.start()
    npz = NpzImages(tmp_path / "images.npz")
    for i in range(0, 500, 10):
        assert np.array_equal(npz.read(range(i, i + 10))[0].permute(0, 2, 3, 1), images[i:i + 10])
    peak = tracemalloc.get_traced_memory()[1]
    for i in 480, 7, 250:                                                       # out of order, as ranks begin
        assert np.array_equal(npz.read([i, i + 1])[0].permute(0, 2, 3, 1), images[i:i + 2])
    tracemalloc.stop()
    assert peak < 3e6                                                           # a batch, 0.3 MB, and copies of it


def test_degradations_raise_the_distance(place, tmp_path):
    """Blur, noise and JPEG of growing strength, against other images of the same kind."""
    place, *_ = place
    base, noise = draw(400, 2), np.random.default_rng(3).normal(size=(400, 32, 32, 3))

    def jpeg(image, quality):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))

    def blur(image, radius):
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    series = {"blur": [np.stack([blur(x, radius) for x in base]) for radius in (0.5, 1, 2)],
              "noise": [(base + s * noise).clip(0, 255).astype(np.uint8) for s in (20, 40, 80)],
              "jpeg": [np.stack([jpeg(x, quality) for x in base]) for quality in (40, 15, 4)]}
    np.savez(tmp_path / "reference.npz", arr_0=draw(400, 4))

    def distance(images):
        np.savez(tmp_path / "samples.npz", arr_0=images)
        return run(place, "--reference", tmp_path / "reference.npz", "--pr-images", 0,
                   samples=tmp_path / "samples.npz")["metrics"]["frechet_distance"]
    floor = distance(base)
    for name, degraded in series.items():
        distances = [floor, *map(distance, degraded)]
        assert distances == sorted(set(distances)), (name, distances)


def test_inception_file_is_fetched_once(place, tmp_path, monkeypatch, capsys):
    """By torch.hub, with its sha256, which is seen to be wrong; what is broken off or another file is not kept."""
    place, *_ = place
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(eval_fid, "INCEPTION_URL", (place / "net.pt").as_uri())
    with pytest.raises(InputError, match="cannot fetch .*invalid hash value.*--inception PATH") as error:
        eval_fid.inception(None, torch.device("cpu"))
    assert "\n" not in str(error.value) and not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(eval_fid, "INCEPTION_SHA256", hashlib.sha256((place / "net.pt").read_bytes()).hexdigest())
    capsys.readouterr()
    for times in 1, 0:
        about, embed, _ = eval_fid.inception(None, torch.device("cpu"))
        assert capsys.readouterr().out.count("fetching file:") == times
        assert embed(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, 24)
        assert about["sha256"] == eval_fid.INCEPTION_SHA256
    monkeypatch.setattr(eval_fid, "INCEPTION_URL", (tmp_path / "nothing.pt").as_uri())
    with pytest.raises(InputError, match="cannot fetch .*--inception PATH"):
        eval_fid.inception(None, torch.device("cpu"))


def test_the_encoder_of_latents(place):
    """encoder:LATENTS takes encoder, sizes and precision from the description; untrained ones are called RANDOM."""
    place, *_ = place
    reference = "--reference", place / "reference.npz", "--pr-images", "0", "--features"
    of_latents = run(place, *reference, f"encoder:{place}/bf16")
    about = of_latents["features"]
    assert (about["encoder_size"], about["precision"], about["name"]) == (64, "bf16", "RANDOM encoder (untrained)")
    bf16, fp32 = (run(place, *reference, f"encoder:{place}/{name}")["metrics"]["frechet_distance"] for name in ("bf16", "large"))
    assert bf16 != fp32 and bf16 == pytest.approx(fp32, rel=0.2)


def test_names_with_dots(place):
    """w1.0.npz and w1.5.npz share no file; nor do folders of such names."""
    place, samples, *_ = place
    for name in ("w1.0", "w1.5"):
        np.savez(place / f"{name}.npz", arr_0=samples[:20])
        (place / name).mkdir()
        for i, image in enumerate(samples[:5]):
            Image.fromarray(image).save(place / name / f"{i}.png")
        for path in (f"{name}.npz", name):
            args = eval_fid.parse_args([str(place / path), "--reference", "x"])
            assert args.out == f"{place}/{name}.inception.json"
    for features, name in (("dinov2", "dinov2"), ("encoder:runs/x", "encoder-runs-x")):       # each kind a file of its own
        assert eval_fid.parse_args(["a.npz", "--reference", "x", "--features", features]).out == f"a.{name}.json"


def test_results_of_others_stay(place, tmp_path):
    """No file that is not this program's is replaced, and none of another reference or features."""
    place, samples, *_ = place
    out = place / "out.json"
    flags = [str(place / "samples.npz"), "--inception", str(place / "net.pt"), "--out", str(out), "--reference"]

    def refused(words, *argv):
        with pytest.raises(InputError, match=words):
            main([*flags, *map(str, argv)])
        while model.LOCKS:
            model.LOCKS.pop().close()
    run(place, "--reference", place / "reference.npz")
    text = out.read_text()
    refused("reference: .*reference.npz there, .*adm.npz now", place / "adm.npz")
    refused("features: ", place / "reference.npz", "--features", f"encoder:{place}/latents")
    assert out.read_text() == text
    out.write_text('{"mine": 1}')
    refused("out.json holds other work", place / "reference.npz")
    assert json.loads(out.read_text()) == {"mine": 1}
    out.unlink()
    state = tmp_path / "state.safetensors"
    model.write_tensors(state, {"net": {"x": torch.ones(2)}}, {"step": 3})
    refused("state.safetensors holds other work", place / "reference.npz", "--save-statistics", state)
    assert model.read_tensors(state)[1] == {"step": 3}


def test_statistics_of_moments_alone(place, tmp_path):
    place, *_ = place
    run(place, "--reference", place / "moments.npz", "--save-statistics", tmp_path / "m.safetensors", samples=None)
    a, b = (run(place, "--reference", path)["metrics"] for path in (place / "moments.npz", tmp_path / "m.safetensors"))
    assert a == b and "precision" not in a


def test_two_processes_one_result(place):
    """The second is told, and writes nothing."""
    place, *_ = place
    code = ("import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True);"
            "sys.stdin.read()")
    argv = [sys.executable, "-c", code, place / ".out.json.lock"]
    other = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(InputError, match="is written by another process"):
        run(place, "--reference", place / "reference.npz")
    other.communicate()
    assert not (place / "out.json").exists()


def test_dinov2_sees_what_dgm_eval_shows_it(place, tmp_path):
    place, samples, *_ = place
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    net = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=224)).eval()
    net.save_pretrained(tmp_path / "vit")
    about, embed, probabilities = eval_fid.dinov2(str(tmp_path / "vit"), torch.device("cpu"))
    images = [Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC) for x in samples[:3]]
    x = (np.stack(images) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        wanted = net(pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2).float()).pooler_output
        torch.testing.assert_close(embed(torch.from_numpy(samples[:3]).permute(0, 3, 1, 2)), wanted)
    assert about["name"] == "DINOv2" and len(about["sha256"]) == 64 and probabilities is None
    result = run(place, "--reference", place / "reference.npz", "--features", tmp_path / "vit", "--pr-images", 0)
    assert result["features"]["width"] == 32


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input: one line each
# ----------------------------------------------------------------------------------------------------------------------
class Wrong(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean([2, 3])


class NotANetwork(Small):
    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        return img.to(torch.float32)


def truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


IMAGES = np.zeros((8, 32, 32, 3), np.uint8)


def header(shape, data=b""):
    """An .npz whose arr_0 says it has this shape."""
    def save(path):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", file.getvalue() + data)
    return save


BAD = {
    "negative.npz": (header((-1, 32, 32, 3)), "arr_0 is uint8"),
    "both negative.npz": (header((-4, -4, -4, 3), bytes(192)), "arr_0 is uint8"),
    "overflow.npz": (header((2**62, 4, 4, 3)), "of the length that its header says"),
    "cut.npz": (lambda path: (np.savez(path, arr_0=IMAGES), truncated(path)), "is not a readable .npz"),
    "flipped.npz": (lambda path: (np.savez(path, arr_0=draw(20, 0)), flipped(path)), "is damaged .*CRC"),
    "text.npz": (lambda path: path.write_text("hello"), "is not a readable .npz"),
    "nothing.npz": (saved(images=IMAGES), "with arr_0"),
    "pickle.npz": (saved(arr_0=np.array([{}, {}], dtype=object)), "not a readable .npz with arr_0"),
    "float.npz": (saved(arr_0=IMAGES / 255), "arr_0 is float64"),
    "chw.npz": (saved(arr_0=IMAGES.transpose(0, 3, 1, 2)), r"must be uint8 \(N, S, S, 3\)"),
    "fortran.npz": (saved(arr_0=np.asfortranarray(IMAGES)), "in Fortran order"),
    "size.npz": (saved(arr_0=np.zeros((8, 16, 16, 3), np.uint8)), r"of \[16, 32\] pixels"),
    "few.npz": (saved(arr_0=IMAGES[:3]), "3 images are too few"),
    "none.npz": (saved(arr_0=IMAGES[:0]), "0 images are too few"),
    "short": (lambda path: path.mkdir(), "holds no images"),
    "missing.npz": (lambda path: None, "does not exist"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_samples(place, tmp_path, name):
    make, message = BAD[name]
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        run(place[0], "--reference", place[0] / "reference.npz", samples=tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value) + name * ("few" in message or "pixels" in message)


@pytest.mark.parametrize(("name", "make", "message"), [
    ("mu.npz", saved(mu=np.zeros(5), sigma=np.eye(5)), "is of other features"),
    ("sigma.npz", saved(mu=np.zeros(24)), "is not a readable .npz"),
    ("indefinite.npz", saved(mu=np.zeros(24), sigma=-np.eye(24)), "not symmetric with eigenvalues >= 0"),
    ("pickled.npz", saved(mu=np.array([{}], dtype=object), sigma=np.eye(2)), "allow_pickle=False"),
    ("other.safetensors", lambda path: write_tensors(path, {"": {"x": torch.zeros(1)}}), "has no statistics"),
    ("nothing.npz", saved(x=np.zeros(3)), "has no arr_0"),
    ("text.safetensors", lambda path: path.write_text("hello"), "cannot read"),
    ("text.zip", lambda path: path.write_text("hello"), "no whole .zip")])
def test_wrong_reference(place, tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(InputError, match=message) as error:
        run(place[0], "--reference", tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("make", "message"), [
    (lambda path: torch.jit.script(Wrong()).save(path), "does not answer as it should"),
    (lambda path: torch.jit.script(NotANetwork()).save(path), "does not answer as it should"),
    (lambda path: torch.save({"a": 1}, path), "is no TorchScript file"),
    (lambda path: path.write_text("hello"), "is no TorchScript file"),
    (lambda path: None, "is no TorchScript file")])
def test_wrong_network(place, tmp_path, make, message):
    make(tmp_path / "net.pt")
    with pytest.raises(InputError, match=message) as error:
        run(place[0], "--reference", place[0] / "reference.npz", net=tmp_path / "net.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("flags", "words"), [
    (["--micro-batch", "0"], "--micro-batch: '0' is no whole number at least 1"),
    (["--pr-images", "3"], "--pr-images 3: 0, or more than 3"), (["--pr-images", "-1"], "--pr-images"),
    (["--image-size", "0"], "--image-size"), (["--out", "samples.npz"], "--out samples.npz: a name that ends in .json"),
    (["--save-statistics", "x.npz"], "--save-statistics x.npz: a name that ends in .safetensors")])
def test_wrong_arguments(place, capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        main([f"{place[0]}/samples.npz", "--reference", f"{place[0]}/reference.npz", *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2 and re.search(words, error) and error.count("\n") == 1


def test_more_wrong_arguments(place, capsys):
    with pytest.raises(SystemExit):
        main(["--reference", f"{place[0]}/reference.npz"])
    assert "no samples: give an .npz" in capsys.readouterr().err
    with pytest.raises(InputError, match="incepton is not inception, dinov2.*neither a folder nor"):
        run(place[0], "--reference", place[0] / "reference.npz", "--features", "incepton")


def test_help_needs_no_heavy_imports():
    code = "import sys, eval_fid; assert not {'transformers', 'PIL', 'scipy', 'encode_latents'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
