"""The networks against figures computed with the published implementation (its RMSNorm rounds to float32: 1e-5 relative)."""
import pytest
import torch
from conftest import fill, uniform

from model import IMAGE_MEAN, IMAGE_STD, ViTDecoder, long_jumps, ode_times, solve_ode


def same(tensor, figure, tolerance=1e-5):
    """A tensor against its summary: first 16 and last 8 entries, mean and root mean square, relative to the latter."""
    flat, rms = tensor.detach().double().flatten(), figure["rms"]
    assert flat.numel() == figure["n"]
    for got, wanted in ((flat[:16], figure["first"]), (flat[-8:], figure["last"]), (flat.mean(), figure["mean"]),
                        (flat.square().mean().sqrt(), rms)):
        assert (got - torch.tensor(wanted, dtype=torch.double)).abs().max() < tolerance * rms


@torch.no_grad()
def test_published_networks(figures, published):
    p = published
    z_t = p["z"]
    same(p["z"], figures["inputs"]["z"], 1e-8)
    same(p["eps"], figures["inputs"]["eps"], 1e-8)
    same(p["teacher"](z_t, p["t"], p["y"]), figures["teacher(z,t,y)"])
    same(p["student"](z_t, p["t"], p["y"], p["s"]), figures["student(z,r,t,y)"])
    same(p["student"](z_t, p["t"], p["y"], p["t"]), figures["student(z,t,t,y)"])


def test_a_student_needs_s_and_a_teacher_refuses_it(published):
    p = published
    with pytest.raises(ValueError, match="a student"):
        p["student"](p["z"], p["t"], p["y"])
    with pytest.raises(ValueError, match="a teacher"):
        p["teacher"](p["z"], p["t"], p["y"], p["s"])


@torch.no_grad()
def test_published_sampling(figures, published):
    p, y = published, published["y"]
    sample = solve_ode(lambda z, t: p["teacher"](z, t, y), p["eps"], ode_times(8, 2.0))[-1]
    same(sample, figures["teacher euler 8 steps shift 2 from eps"])
    for times in ([1, 0], [1, 0.5, 0]):
        sample = long_jumps(lambda z, t, s: p["student"](z, t, y, s), p["eps"], times)
        same(sample, figures[f"student {len(times) - 1} step{'s' * (len(times) > 2)} from eps"])


@torch.no_grad()
def test_published_decoder(figures):
    decoder = fill(ViTDecoder(4, 8, hidden_size=32, depth=2, num_heads=4, mlp_size=48, patch_size=4), "decoder")
    image = decoder(3 ** 0.5 * uniform("z", (3, 8, 4, 4)))
    same(image, figures["decoder"]["image(z) = pixels * std + mean"])
    std, mean = (torch.tensor(x, dtype=torch.double)[:, None, None] for x in (IMAGE_STD, IMAGE_MEAN))
    same((image.double() - mean) / std, figures["decoder"]["pixels(z), before the image de-normalisation"])
