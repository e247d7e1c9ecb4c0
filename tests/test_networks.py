"""The networks against figures computed with the published implementation (its RMSNorm rounds to float32: 1e-5 relative)."""
import pytest
import torch
from conftest import fill, uniform

from model import ViTDecoder, long_jumps, ode_times, solve_ode


def same(tensor, figure, tolerance=1e-5):
    """A tensor against its summary: first 6 and last 4 entries, mean and root mean square, relative to the latter."""
    flat, rms = tensor.detach().double().flatten(), figure["rms"]
    assert flat.numel() == figure["n"]
    for got, wanted in ((flat[:6], figure["first"]), (flat[-4:], figure["last"]),
                        (flat.mean(), figure["mean"]), (flat.square().mean().sqrt(), rms)):
        assert (got - torch.tensor(wanted, dtype=torch.double)).abs().max() < tolerance * rms


@torch.no_grad()
def test_published_networks(figures, published):
    p = published
    for name in ("z", "eps"):
        same(p[name], figures["inputs"][name], 1e-8)
    same(p["teacher"](p["z"], p["t"], p["y"]), figures["teacher(z,t,y)"])
    same(p["student"](p["z"], p["t"], p["y"], p["s"]), figures["student(z,r,t,y)"])
    same(p["student"](p["z"], p["t"], p["y"], p["t"]), figures["student(z,t,t,y)"])


@torch.no_grad()
def test_published_sampling_and_decoder(figures, published):
    p, y = published, published["y"]
    same(solve_ode(p["teacher"], p["eps"], y, ode_times(8, 2.0))[-1], figures["teacher euler 8 steps shift 2 from eps"])
    same(long_jumps(p["student"], p["eps"], y, [1, 0]), figures["student 1 step from eps"])
    same(long_jumps(p["student"], p["eps"], y, [1, 0.5, 0]), figures["student 2 steps from eps"])
    decoder = fill(ViTDecoder(4, 8, hidden_size=32, depth=2, num_heads=4, mlp_size=48, patch_size=4), "decoder")
    same(decoder(3 ** 0.5 * uniform("z", (3, 8, 4, 4))), figures["decoder"]["image"])


def test_arguments_that_are_missing_or_in_another_order_are_refused(published):
    """Labels are whole numbers, times are not: what is swapped fails, in place of a wrong result."""
    z, t, y, s = (published[name] for name in ("z", "t", "y", "s"))
    for name, *swapped in (("student", t, y), ("teacher", t, y, s), ("teacher", y, t), ("student", y, t, s), ("student", t, s, y),
                           ("student", t, s, s), ("student", t, y, y)):
        with pytest.raises(ValueError, match="a teacher takes .*times are floating, labels integers"):
            published[name](z, *swapped)
    with torch.no_grad():
        published["student"](z, t, y.int(), s)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4)])
def test_sampling_stays_in_the_precision_of_its_start(shape):
    """Whatever the network returns: under autocast that is bf16. Latents may have any shape."""
    z, y, seen = torch.randn(shape), torch.tensor([3, 1]), []

    def bf16(z, *rest):
        seen.extend(x.dtype for x in (z, *rest))
        return z.bfloat16()
    for points in (*(solve_ode(bf16, z, y, [1, 0.5, 0], solver) for solver in ("euler", "heun")),
                   [long_jumps(bf16, z, y, [1, 0.5, 0])]):
        assert all(x.dtype == torch.float32 and x.shape == z.shape for x in points)
    assert set(seen) == {torch.float32, torch.int64}
