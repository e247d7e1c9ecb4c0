"""The losses, alone with torch: against published figures, closed forms, the straightforward step."""
import ast
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from baselines import meanflow_as_published
from conftest import fill
from test_networks import same

import train_cmt
import train_meanflow
import train_teacher
from model import DiTDH, guided, jvp_by_parts, ode_times, solve_ode, time_shift


def alone(stage):
    """What the text of a stage between its imports and its `def draw` defines, with `import torch` alone."""
    source = inspect.getsource(stage)
    imports = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    text = "\n".join(source.splitlines()[imports[-1].end_lineno:]).split("def draw(")[0]
    namespace = {"torch": torch}
    exec(text, namespace)
    return SimpleNamespace(**namespace)


flow_matching_loss = alone(train_teacher).flow_matching_loss
consistency_loss = alone(train_cmt).consistency_loss
meanflow = alone(train_meanflow)
meanflow_loss, per_row = meanflow.meanflow_loss, meanflow.per_row
plain = dict(loss_form="mean", loss_power=0.0)    # the squared error itself, whose gradient theory speaks of


@pytest.mark.parametrize("eta, name", [(1, "mfd"), (0, "mft")])
@pytest.mark.parametrize("delta_t, jvp", [(0.005, None), (0.001, None),
                                          (None, torch.func.jvp), (None, jvp_by_parts)])
def test_published_figures(figures, published, eta, name, delta_t, jvp):
    """By finite differences of step delta_t, or exactly."""
    x, net, derivatives = [published[name] for name in ("z", "eps", "t", "y", "s")], published["student"], []
    net.zero_grad()
    loss, numbers = meanflow_loss(net, published["teacher"], *x, eta, "jvp" if jvp else "fd-central", delta_t,
                                  jvp=lambda *a: derivatives.append(jvp(*a)) or derivatives[-1])
    figure = figures[f"{name} jvp" if jvp else f"{name} dt={delta_t}"]
    assert numbers["mse_flow"] == 0 and float(numbers["mse"]) == pytest.approx(figure["mse"], rel=1e-5)
    if jvp:
        same(derivatives[0][1], figure["dudt"])
        return
    loss.backward()
    assert loss.item() == pytest.approx(figure["adaptive_loss"], rel=1e-5)
    for weight, key in ((net.final_layer.linear.weight, "grad_rms_final_linear_weight"),
                        (net.r_embedder.mlp[0].weight, "grad_rms_r_embedder_mlp_0_weight")):
        assert float(weight.grad.square().mean().sqrt()) == pytest.approx(figure[key], rel=1e-5)


# ---- Closed forms: Gaussian data N(m, sigma^2) per element ----
M, SIGMA, SHAPE = 0.7, 0.4, (2, 2, 2)


def spread(t):
    """Variance of z_t: S(t) = (1 - t)^2 sigma^2 + t^2."""
    return (1 - t) ** 2 * SIGMA ** 2 + t ** 2


def v_exact(z, t, y=None):
    """E[eps - z_0 | z_t = z] = -m + S'(t) / (2 S(t)) (z - (1 - t) m)."""
    t = per_row(t, z)
    return -M + (t - (1 - t) * SIGMA ** 2) / spread(t) * (z - (1 - t) * M)


def h_exact(z, t, y, s):
    """The mean velocity (z_t - z_s) / (t - s), its limit v at s = t.

    The PF-ODE's flow map from t to s scales deviations from the mean by sqrt(S(s) / S(t))."""
    v, t, s = v_exact(z, t), per_row(t, z), per_row(s, z)
    z_s = (1 - s) * M + (spread(s) / spread(t)).sqrt() * (z - (1 - t) * M)
    return torch.where(t == s, v, (z - z_s) / torch.where(t == s, 1, t - s))


def gaussian(n, seed=0):
    """z_0, eps"""
    x, eps = torch.randn(2, n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return M + SIGMA * x, eps


def pairs_of_times(n, seed=1):
    """t, s: s < t in every fourth row, s = t in the others."""
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    s, t = time_shift(u, 3.0).sort(dim=1).values.unbind(1)
    return t, torch.where(torch.arange(n) % 4 == 0, s, t)


@pytest.mark.parametrize("t, s, steps", [(0.6, 0.2, (-1, 0, 1)), (0.5, 0.4999, (0, 1, 2)),
                                         (1.0, 0.3, (-2, -1, 0))])
def test_finite_differences_are_second_order_everywhere(t, s, steps):
    """By the stencil, in steps of delta_t, that stays within [s, 1]."""
    t, s, y = (torch.tensor([x], dtype=torch.double) for x in (t, s, 0))
    z, seen, errors = gaussian(1)[0], [], []
    w = v_exact(z, t)

    def h(z, t, y, s):
        seen.extend(t.tolist())
        return h_exact(z, t, y, s)
    exact = meanflow.transport_derivative(h_exact, z, t, y, s, w)
    for delta_t in (0.02, 0.01, 0.005):
        seen.clear()
        found = meanflow.transport_derivative(h, z, t, y, s, w, "fd", delta_t)
        errors.append(float((found - exact).norm()))
        assert sorted(seen) == pytest.approx([float(t) + k * delta_t for k in steps])
    assert all(1.8 < math.log2(a / b) < 2.25 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_cmt_target_tends_to_the_mean_velocity(solver, order):
    """With N teacher steps the error of the target is O(N^-order): measured at the pair (1, 0) and inside."""
    z_1, errors = gaussian(16)[1], []
    for steps in (256, 512, 1024):    # fewer are not yet in the asymptotic regime for Heun
        times = ode_times(steps, 3.0)
        points = solve_ode(v_exact, z_1, None, times, solver)
        for i, j in ((0, steps), (steps // 4, steps // 2)):
            t, s = (torch.full((16,), times[k], dtype=torch.double) for k in (i, j))
            errors.append(float(consistency_loss(h_exact, points[i], points[j], t, None, s)[0]) ** 0.5)
    orders = [math.log2(a / b) for a, b in zip(errors, errors[2:], strict=False)]
    assert orders == pytest.approx([order] * 4, abs=0.25)


def test_flow_matching_minimum_is_the_velocity():
    """The loss that is left is the one-point velocity's own variance."""
    z_0, eps = gaussian(200_000)
    for time in (0.1, 0.5, 0.9):
        loss, _ = flow_matching_loss(v_exact, z_0, eps, torch.full((len(z_0),), time), None)
        assert loss == pytest.approx(SIGMA ** 2 / spread(time), rel=0.01)


@pytest.mark.parametrize("eta", [1.0, 0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("theta, bias", [(0.2, 0.3), (0.0, 0.3), (0.0, 0.0)])
def test_proposition_3_1(eta, theta, bias):
    """E || h - u_eta ||^2 = || h - u_v - eta M (v_phi - v) ||^2 + (1 - eta)^2 E || M (v_hat - v) ||^2,
    M = 1 - (t - s) dh/dz.

    The one-point velocity's variance given z_t is sigma^2 / S(t) per element; the teacher is off by a
    constant, the student by another (u_v is h_exact). `-s -k proposition` prints docs/METHOD.md's rows."""
    t, s = (torch.full((2000,), time, dtype=torch.double) for time in (0.8, 0.3))
    losses = torch.stack([
        meanflow_loss(lambda *x: h_exact(*x) + theta, lambda *x: v_exact(*x) + bias, *part, t,
                      torch.zeros(2000), s, eta, **plain)[0]
        for part in zip(*(x.chunk(20) for x in gaussian(40_000)), strict=True)])
    m = (spread(0.3) / spread(0.8)) ** 0.5
    parts = (theta - eta * m * bias) ** 2, (1 - eta) ** 2 * m ** 2 * SIGMA ** 2 / spread(0.8)
    measured, error = float(losses.mean()), float(losses.std()) / 20 ** 0.5
    computed = f"{parts[0]:.5f} | {parts[1]:.5f} | {sum(parts):.5f}"
    print(f"| {eta} | {theta} | {bias} | {computed} | {measured:.5f} ± {error:.5f} |")
    assert abs(measured - sum(parts)) < 4 * error + 1e-12


@pytest.mark.parametrize("eta, power", [(1.0, 0.0), (0.4, 0.5)])
def test_numbers_and_weights(eta, power):
    """h is linear in z, so that along any w, not v alone, (t - s) dh/dt = v - h + (t - s) dh/dz (w - v). A
    sample's weight is (mse + c)^-p in the mean form; the published one is checked above."""
    n, bias = 16, 0.3
    (z_0, eps), (t, s) = gaussian(n), pairs_of_times(n)
    theta = per_row(torch.linspace(0.1, 1, n).double(), z_0)
    loss, numbers = meanflow_loss(lambda z, *x: h_exact(z, *x) + theta[::n // len(z)],
                                  lambda z, t, y: v_exact(z, t) + bias, z_0, eps, t, torch.zeros(n), s, eta,
                                  loss_form="mean", loss_power=power, loss_eps=0.1, jumps=slice(None, None, 4))
    z_t = (1 - per_row(t, eps)) * z_0 + per_row(t, eps) * eps
    v, h = v_exact(z_t, t), h_exact(z_t, t, None, s)
    w = (1 - eta) * (eps - z_0) + eta * (v + bias)
    derivative = v - h + per_row(1 - (spread(s) / spread(t)).sqrt(), z_t) * (w - v)
    mse = (h + theta - (w - derivative)).square().mean((1, 2, 3))
    assert loss == pytest.approx(float((mse / (mse + 0.1) ** power).mean()), rel=1e-9)
    wanted = {"mse": mse.mean(), "mse_flow": mse[torch.arange(n) % 4 > 0].mean(), "mse_jump": mse[::4].mean(),
              "ms_w": w.square().mean(), "ms_correction": derivative[::4].square().mean()}
    torch.testing.assert_close(numbers, wanted, rtol=1e-9, atol=0)


# ---- What the losses are given ----
def test_defaults_are_those_of_the_flags():
    args = vars(train_meanflow.parse_args([]))
    args["eta"], = args["eta"]
    for function in (meanflow_loss, meanflow.transport_derivative):
        parameters = inspect.signature(function).parameters.items()
        defaults = {name: p.default for name, p in parameters if name in args}
        assert len(defaults) >= 2 and defaults == {name: args[name] for name in defaults}


@pytest.mark.parametrize("derivative", ["fd", "jvp"])
def test_precision_of_the_derivative(derivative):
    """Finite differences run in true float32 whatever is set around them, the exact derivative in what is."""
    seen, z, t = [], torch.randn(4, *SHAPE), torch.full((4,), 0.8)

    def h(z, t, y, s):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()))
        return z * per_row(t, z)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            meanflow.transport_derivative(h, z, t, torch.zeros(4), t / 2, z, derivative, h_t=z)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    # Both ends, and the centre anew: h_t was computed in less.
    assert seen == (2 * [(False, "highest")] if derivative == "fd" else [(True, "high")])


@pytest.mark.parametrize("derivative, eta", [("fd-central", 0.3), ("fd", 1)])
def test_the_cheap_step_has_the_gradient_of_the_straightforward_one(published, derivative, eta):
    """Derivative under autograd for all rows, or without gradient for one row in four: the same gradient.

    (The times leave room for the central stencil, which "fd" then takes too.)"""
    net, v, gradients = published["student"], published["teacher"], []
    z, eps = torch.randn(2, 8, *net.shape).double()
    t = torch.rand(8).double() * 0.6 + 0.3
    x = z, eps, t, torch.arange(8) % net.num_classes, torch.where(torch.arange(8) % 4 == 0, t - 0.2, t), eta
    weights = [p for p in net.parameters() if p.requires_grad]
    for loss in (meanflow_as_published(net, v, *x),
                 meanflow_loss(net, v, *x, derivative, jumps=slice(0, None, 4), **plain)[0]):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


@torch.no_grad()
def test_guidance(published):
    """v_weak + w (v - v_weak), with a weaker teacher or none, within the interval; none without label."""
    teacher, z, t, y = (published[name] for name in ("teacher", "z", "t", "y"))
    weak = fill(DiTDH(4, 8, (48, 64), (2, 1), (4, 4), 10), "weak")
    none = torch.full_like(y, teacher.num_classes)
    v, free, poor = teacher(z, t, y), teacher(z, t, none), weak(z, t, y)
    inside = per_row((t >= 0.2) & (t <= 0.5), z)
    assert inside.any() and not inside.all()
    strong = free + 2.5 * (v - free)
    for found, wanted in ((guided(teacher, 2.5)(z, t, y), strong), (guided(teacher, 2.5)(z, t, none), free),
                          (guided(teacher, 2.5, weak=weak)(z, t, y), poor + 2.5 * (v - poor)),
                          (guided(teacher, 2.5, (0.2, 0.5))(z, t, y), torch.where(inside, strong, v))):
        torch.testing.assert_close(found, wanted)
