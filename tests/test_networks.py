"""The networks: against figures of the published implementation, how they start, what they refuse."""
import re

import pytest
import torch
from conftest import fill, uniform
from runs import save_network

from model import DiTDH, ViTDecoder, load_network, long_jumps, ode_times, solve_ode


def same(tensor, figure, tolerance=1e-5):
    """A tensor against its summary: first 6 and last 4 entries, mean and root mean square, relative to the
    latter. The published RMSNorm rounds to float32: 1e-5."""
    flat, rms = tensor.detach().double().flatten(), figure["rms"]
    assert flat.numel() == figure["n"]
    for got, wanted in ((flat[:6], figure["first"]), (flat[-4:], figure["last"]),
                        (flat.mean(), figure["mean"]), (flat.square().mean().sqrt(), rms)):
        assert (got - torch.tensor(wanted, dtype=torch.double)).abs().max() < tolerance * rms


@torch.no_grad()
def test_published_figures(figures, published):
    teacher, student, z, eps, t, s, y = (published[name] for name in "teacher student z eps t s y".split())
    same(z, figures["inputs"]["z"], 1e-8)
    same(eps, figures["inputs"]["eps"], 1e-8)
    same(teacher(z, t, y), figures["teacher(z,t,y)"])
    same(student(z, t, y, s), figures["student(z,r,t,y)"])
    same(student(z, t, y, t), figures["student(z,t,t,y)"])
    same(solve_ode(teacher, eps, y, ode_times(8, 2.0))[-1], figures["teacher euler 8 steps shift 2 from eps"])
    same(long_jumps(student, eps, y, [1, 0]), figures["student 1 step from eps"])
    same(long_jumps(student, eps, y, [1, 0.5, 0]), figures["student 2 steps from eps"])
    decoder = ViTDecoder(4, 8, hidden_size=32, depth=2, num_heads=4, mlp_size=48, patch_size=4)
    same(fill(decoder, "decoder")(3 ** 0.5 * uniform("z", (3, 8, 4, 4))), figures["decoder"]["image"])


def test_initialization():
    """AdaLN-Zero, Xavier-uniform embeddings of patches, N(0, 0.02) for labels and the time's MLP (METHOD,
    section 3). Under autocast the residual streams stay in float32."""
    net = DiTDH(4, 64, (96, 160), (2, 1), (3, 5), 500, time_difference=True)
    begin_as_zero = r"adaLN|final_layer.linear|r_embedder.mlp.2|embedder.proj.bias"
    zero = [p for name, p in net.named_parameters() if re.search(begin_as_zero, name)]
    assert len(zero) == 14 and not any(p.any() for p in zero)
    for layer, std in ((net.s_embedder.proj, (2 / 160) ** 0.5), (net.x_embedder.proj, (2 / 224) ** 0.5),
                       (net.y_embedder.embedding_table, 0.02), (net.t_embedder.mlp[0], 0.02)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    seen, t = [], torch.rand(2)
    for block in net.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 64, 4, 4), t, torch.tensor([0, 1]), t)
    assert seen == 6 * [torch.float32]


def test_the_student_starts_as_the_teacher(published, tmp_path, capsys):
    """Away from the zero initialization, where all would agree."""
    save_network(tmp_path, published["teacher"], {}, None)
    teacher, student = (load_network(tmp_path, kind)[0] for kind in ("teacher", "student"))
    assert "r_embedder.W" in capsys.readouterr().out
    z, t, y = published["z"].float(), published["t"].float(), published["y"]
    for s in (t, t / 2, 0 * t):
        assert torch.equal(student(z, t, y, s), teacher(z, t, y))


def test_arguments_that_are_missing_or_in_another_order_are_refused(published):
    """Labels are whole numbers, times are not: what is swapped fails, in place of a wrong result."""
    z, t, y, s = (published[name] for name in ("z", "t", "y", "s"))
    for name, *swapped in (("student", t, y), ("teacher", t, y, s), ("teacher", y, t), ("student", t, s, y)):
        with pytest.raises(ValueError, match="times are floating, labels integers"):
            published[name](z, *swapped)
