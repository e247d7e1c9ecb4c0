"""The losses: alone with nothing but torch, against the published figures, and against closed forms."""
import ast
import copy
import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from baselines import meanflow_all_rows, meanflow_as_published, meanflow_exact
from test_networks import same

import train_cmt
import train_meanflow
import train_teacher
from model import apply_part, guided, jvp_by_parts, ode_times, solve_ode, time_shift


def alone(stage):
    """What the text of a stage between its imports and its `def draw` defines, with `import torch` alone."""
    source, imports = inspect.getsource(stage), (ast.Import, ast.ImportFrom)
    end = max(node.end_lineno for node in ast.parse(source).body if isinstance(node, imports))
    text = "\n".join(source.splitlines()[end:]).split("def draw(")[0]
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, imports)]
    namespace = {}
    exec("import torch\n" + text, namespace)
    return SimpleNamespace(**namespace)


flow_matching_loss = alone(train_teacher).flow_matching_loss
consistency_loss = alone(train_cmt).consistency_loss
meanflow = alone(train_meanflow)
meanflow_loss, transport_derivative = meanflow.meanflow_loss, meanflow.transport_derivative
plain = dict(loss_form="mean", loss_power=0.0)   # the squared error itself, whose gradient theory speaks of


# ---- the published figures ----
@pytest.mark.parametrize("eta, name", [(1, "mfd"), (0, "mft")])
@pytest.mark.parametrize("derivative, delta_t", [("fd-central", 0.005), ("fd-central", 0.001), ("jvp", None)])
def test_published_meanflow(figures, published, eta, name, derivative, delta_t):
    p, net = published, published["student"]
    net.zero_grad()
    loss, numbers = meanflow_loss(net, p["teacher"], p["z"], p["eps"], p["t"], p["y"], p["s"], eta, derivative, delta_t)
    loss.backward()
    figure = figures[f"{name} jvp" if derivative == "jvp" else f"{name} dt={delta_t}"]
    assert float(numbers["mse"]) == pytest.approx(figure["mse"], rel=1e-5)
    if derivative != "jvp":
        assert loss.item() == pytest.approx(figure["adaptive_loss"], rel=1e-5)
        for weight, key in ((net.final_layer.linear.weight, "grad_rms_final_linear_weight"),
                            (net.r_embedder.mlp[0].weight, "grad_rms_r_embedder_mlp_0_weight")):
            assert float(weight.grad.square().mean().sqrt()) == pytest.approx(figure[key], rel=1e-5)


@pytest.mark.parametrize("jvp", [torch.func.jvp, jvp_by_parts])
@pytest.mark.parametrize("eta, name", [(1, "mfd"), (0, "mft")])
def test_published_exact_derivative(figures, published, eta, name, jvp):
    """dh/dt itself, as the loss takes it, element by element."""
    p, dh_dt = published, []
    meanflow_loss(p["student"], p["teacher"], p["z"], p["eps"], p["t"], p["y"], p["s"], eta, "jvp",
                  jvp=lambda *a: dh_dt.append(jvp(*a)) or dh_dt[-1])
    same(dh_dt[0][1], figures[f"{name} jvp"]["dudt"])


def test_compiled_derivative_can_be_traced_on_a_gpu(published):
    """The fused normalizations have no forward derivative that torch.compile could trace there, and rms_norm is one there alone."""
    p, net, called = published, published["student"].float(), []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward
    z, t, s = (p[name].float() for name in ("z", "t", "s"))
    try:
        eager = transport_derivative(net, z, t, p["y"], s, z)
        net.compile(backend=backend)
        dh_dt = transport_derivative(net, z, t, p["y"], s, z, jvp=jvp_by_parts)
    finally:
        net.apply_part = apply_part
        net.double()
    assert len(called) > 100 and not [name for name in called if "norm" in name]
    assert (dh_dt - eager).norm() < 1e-5 * eager.norm()


# ---- closed forms: Gaussian data N(m, sigma^2) per element ----
M, SIGMA, SHAPE = 0.7, 0.4, (2, 2, 2)


def per_row(t, z):
    return t.reshape(-1, *[1] * (z.ndim - 1))


def spread(t):
    """Variance of z_t: S(t) = (1 - t)^2 sigma^2 + t^2."""
    return (1 - t) ** 2 * SIGMA ** 2 + t ** 2


def v_exact(z, t, y=None):
    """E[eps - z_0 | z_t = z] = -m + S'(t) / (2 S(t)) (z - (1 - t) m)."""
    t = per_row(t, z)
    return -M + (t - (1 - t) * SIGMA ** 2) / spread(t) * (z - (1 - t) * M)


def flow(z, t, s):
    """The PF-ODE's flow map from t to s: deviations from the mean scale by sqrt(S(s) / S(t))."""
    t, s = per_row(t, z), per_row(s, z)
    return (1 - s) * M + (spread(s) / spread(t)).sqrt() * (z - (1 - t) * M)


def h_exact(z, t, y, s):
    """The mean velocity (z_t - z_s) / (t - s), its limit v at s = t."""
    gap = per_row(t - s, z)
    return torch.where(gap == 0, v_exact(z, t), (z - flow(z, t, s)) / torch.where(gap == 0, 1, gap))


def gaussian(n, seed=0, shape=SHAPE):
    """z_0, eps"""
    x, eps = torch.randn(2, n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return M + SIGMA * x, eps


def pairs_of_times(n, seed=1):
    u = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    s, t = time_shift(u, 3.0).sort(dim=1).values.unbind(1)
    s[1::4] = t[1::4]
    return t, s


def test_exact_mean_velocity_has_no_error_with_the_exact_derivative():
    (z_0, eps), (t, s) = gaussian(64), pairs_of_times(64)
    assert meanflow_loss(h_exact, v_exact, z_0, eps, t, torch.zeros(64), s)[1]["mse"] < 1e-24


@pytest.mark.parametrize("t, s, steps", [(0.6, 0.2, (-1, 0, 1)), (0.5, 0.4999, (0, 1, 2)), (1.0, 0.3, (-2, -1, 0))])
def test_finite_differences_are_second_order_everywhere(t, s, steps):
    """By the stencil, in steps of D, that stays within [s, 1]."""
    t, s, y, z, seen, errors = torch.tensor([t]).double(), torch.tensor([s]).double(), torch.zeros(1), gaussian(1)[0], [], []

    def h(z, t, y, s):
        seen.extend(t.tolist())
        return h_exact(z, t, y, s)
    exact = transport_derivative(h_exact, z, t, y, s, v_exact(z, t))
    for delta_t in (0.02, 0.01, 0.005):
        seen.clear()
        errors.append(float((transport_derivative(h, z, t, y, s, v_exact(z, t), "fd", delta_t) - exact).norm()))
        assert sorted(seen) == pytest.approx([float(t) + k * delta_t for k in steps]) and all(s <= x <= 1 for x in seen)
    assert all(1.8 < math.log2(a / b) < 2.25 for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_cmt_target_tends_to_the_mean_velocity(solver, order):
    """With N teacher steps the error of the target is O(N^-order): measured at the pair (1, 0) and inside."""
    z_1, errors = gaussian(16)[1], []
    for steps in (256, 512, 1024):                # fewer are not yet in the asymptotic regime for Heun
        times = ode_times(steps, 3.0)
        points = solve_ode(v_exact, z_1, None, times, solver)
        for i, j in ((0, steps), (steps // 4, steps // 2)):
            t, s = (torch.full((16,), times[k], dtype=torch.double) for k in (i, j))
            errors.append(float(consistency_loss(h_exact, points[i], points[j], t, None, s)[1]["mse"]) ** 0.5)
    assert all(order - 0.25 < math.log2(a / b) < order + 0.25 for a, b in zip(errors, errors[2:], strict=False)), errors


def test_flow_matching_minimum_is_the_velocity():
    """Least squares over affine velocities a z + b at a fixed t: no gradient of the loss at the exact one."""
    z_0, eps = gaussian(200_000)
    for time in (0.1, 0.5, 0.9):
        t = torch.full((len(z_0),), time, dtype=torch.double)
        a, b = (torch.zeros((), dtype=torch.double, requires_grad=True) for _ in range(2))
        loss = flow_matching_loss(lambda z, t, y, a=a, b=b: v_exact(z, t) + a * z + b, z_0, eps, t, None)[0]
        assert max(abs(float(g)) for g in torch.autograd.grad(loss, (a, b))) < 6e-3       # 4 standard errors of 1.6 million elements
        assert loss.detach() == pytest.approx(SIGMA ** 2 / spread(time), rel=0.01)        # the one-point velocity's own variance


@pytest.mark.parametrize("eta", [1.0, 0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("theta, bias", [(0.2, 0.3), (0.0, 0.3), (0.0, 0.0)])
def test_proposition_3_1(eta, theta, bias):
    """E || h - u_eta ||^2 = || h - u_v - eta M (v_phi - v) ||^2 + (1 - eta)^2 E || M (v_hat - v) ||^2, M = 1 - (t - s) dh/dz.

    The one-point velocity's variance given z_t is sigma^2 / S(t) per element; the teacher is off by a constant, the student by
    another (u_v is h_exact's). `pytest -s -k proposition` prints the rows of docs/METHOD.md."""
    t, s = (torch.full((2000,), time, dtype=torch.double) for time in (0.8, 0.3))
    losses = torch.stack([
        meanflow_loss(lambda *x: h_exact(*x) + theta, lambda *x: v_exact(*x) + bias, *part, t, torch.zeros(2000), s, eta, **plain)[0]
        for part in zip(*(x.chunk(20) for x in gaussian(40_000)), strict=True)])
    m = (spread(0.3) / spread(0.8)) ** 0.5
    parts = (theta - eta * m * bias) ** 2, (1 - eta) ** 2 * m ** 2 * SIGMA ** 2 / spread(0.8)
    measured, error = float(losses.mean()), float(losses.std()) / 20 ** 0.5
    print(f"| {eta} | {theta} | {bias} | {parts[0]:.5f} | {parts[1]:.5f} | {sum(parts):.5f} | {measured:.5f} ± {error:.5f} |")
    assert abs(measured - sum(parts)) < 4 * error + 1e-12


# ---- precision ----
@pytest.mark.parametrize("derivative", ["fd", "jvp"])
def test_precision_of_the_derivative(derivative):
    """Finite differences run in true float32 whatever is set around them, the exact derivative in what is; afterwards all is as
    before, also when h raises."""
    seen, before, (z_0, eps) = [], torch.get_float32_matmul_precision(), torch.randn(2, 4, *SHAPE)

    def state():
        return torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision(), torch.is_grad_enabled()

    def h_fixed(z, t, y, s):
        seen.append(state())
        if len(seen) == 3:
            raise MemoryError
        return z * t[:, None, None, None]

    def loss():
        meanflow_loss(lambda z, *_: z, lambda z, *_: z, z_0, eps, torch.full((4,), 0.8), torch.zeros(4), torch.full((4,), 0.3),
                      derivative=derivative, h_fixed=h_fixed)
    try:
        torch.set_float32_matmul_precision("high")
        with torch.autocast("cpu", torch.bfloat16):
            loss()
            assert len(seen) == (2 if derivative == "fd" else 1)      # both ends, and the centre anew: h_t is in bf16 or TF32
            seen += [seen[-1]] * (2 - len(seen))
            with pytest.raises(MemoryError):
                loss()
            assert state() == (True, "high", True)
        assert set(seen) == {(False, "highest", False) if derivative == "fd" else (True, "high", False)}
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the weight of a sample, numbers for the log, defaults ----
def test_weights():
    """Gradient by a sample's mse: (mse + c)^-p in the mean form; 2 E / (E^2 + c) with E = D mse in the published one."""
    (z_0, eps), (t, s), offset = gaussian(8), pairs_of_times(8), torch.linspace(0.1, 2, 8, dtype=torch.double)
    scale, mse, d = torch.ones(8, dtype=torch.double, requires_grad=True), offset ** 2, math.prod(SHAPE)
    for form, p, c, weight in (("mean", 0.0, 1e-3, mse ** 0), ("mean", 0.5, 0.1, (mse + 0.1) ** -0.5), ("mean", 1.0, 0.01, 1 / (mse + 0.01)),
                               ("published", 1.0, 1e-3, 2 * d ** 2 * mse / ((d * mse) ** 2 + 1e-3))):
        loss, numbers = meanflow_loss(lambda z, *x: h_exact(z, *x) + per_row(offset * scale, z), v_exact, z_0, eps, t, torch.zeros(8), s,
                                      loss_form=form, loss_power=p, loss_eps=c)
        assert torch.allclose(torch.autograd.grad(loss, scale)[0], weight * 2 * mse / 8, rtol=1e-6)
        assert numbers["mse"] == pytest.approx(float(mse.mean()), rel=1e-6)


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_numbers_for_the_log(eta):
    """h is linear in z, so that along any w, and not v alone, (t - s) dh/dt = v - h + (t - s) dh/dz (w - v)."""
    n, bias = 16, 0.3
    (z_0, eps), (t, s), theta = gaussian(n), pairs_of_times(n), torch.linspace(0.1, 1, n).double()[:, None, None, None]
    s = torch.where(torch.arange(n) % 4 == 0, s, t)
    _, numbers = meanflow_loss(lambda z, *x: h_exact(z, *x) + theta[::n // len(z)], lambda z, t, y: v_exact(z, t) + bias, z_0, eps, t,
                               torch.zeros(n), s, eta, rows=slice(None, None, 4), **plain)
    z_t = (1 - per_row(t, eps)) * z_0 + per_row(t, eps) * eps
    v, h = v_exact(z_t, t), h_exact(z_t, t, None, s)
    w = (1 - eta) * (eps - z_0) + eta * (v + bias)
    derivative = v - h + per_row(1 - (spread(s) / spread(t)).sqrt(), z_t) * (w - v)
    mse = (h + theta - (w - derivative)).square().mean((1, 2, 3))
    wanted = {"mse": mse.mean(), "mse_flow": mse[torch.arange(n) % 4 > 0].mean(), "mse_jump": mse[::4].mean(),
              "ms_w": w.square().mean(), "ms_correction": derivative[::4].square().mean()}
    torch.testing.assert_close(numbers, wanted, rtol=1e-9, atol=0)
    assert not any(x.requires_grad for x in numbers.values())


def test_defaults_are_those_of_the_flags():
    args = vars(train_meanflow.parse_args([]))
    args["eta"], = args["eta"]
    for function in (meanflow_loss, transport_derivative):
        defaults = {name: p.default for name, p in inspect.signature(function).parameters.items() if name in args}
        assert len(defaults) >= 2 and defaults == {name: args[name] for name in defaults}


# ---- the cheap step against the straightforward ones ----
@pytest.mark.parametrize("oracle, derivative, eta", [(meanflow_as_published, "fd-central", 0.3), (meanflow_all_rows, "fd", 1),
                                                     (meanflow_exact, "jvp", 0.3), (meanflow_exact, "jvp", 0)])
def test_the_cheap_step_has_the_gradient_of_the_straightforward_ones(published, oracle, derivative, eta):
    """Derivative under autograd or for all rows, or without gradient and for one row in four: the same gradient, to 1e-6. (The times
    leave room for the central stencil, which "fd" then takes too.)"""
    torch.manual_seed(0)
    net, v, gradients = published["student"], published["teacher"], []
    z, eps = torch.randn(2, 8, *net.shape).double()
    t = torch.rand(8).double() * 0.6 + 0.3
    x = z, eps, t, torch.arange(8) % net.num_classes, torch.where(torch.arange(8) % 4 == 0, t - 0.2, t), eta
    weights = [p for p in net.parameters() if p.requires_grad]
    for loss in (oracle(net, v, *x), meanflow_loss(net, v, *x, derivative, rows=slice(0, None, 4), **plain)[0]):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


def test_guidance(published):
    """v_weak + w (v - v_weak), with and without a weaker teacher, within the interval alone; none for rows without label."""
    teacher, z, t, y = (published[name] for name in ("teacher", "z", "t", "y"))
    weak, none = copy.deepcopy(teacher), torch.full_like(y, teacher.num_classes)
    inside = ((t >= 0.3) & (t <= 0.8))[:, None, None, None]
    assert inside.any() and not inside.all()
    with torch.no_grad():
        weak.final_layer.linear.weight.mul_(0.7)
        v, free, poor = teacher(z, t, y), teacher(z, t, none), weak(z, t, y)
        for found, wanted in ((guided(teacher, 2.5)(z, t, y), free + 2.5 * (v - free)), (guided(teacher, 2.5)(z, t, none), free),
                              (guided(teacher, 2.5, weak=weak)(z, t, y), poor + 2.5 * (v - poor)),
                              (guided(teacher, 2.5, (0.3, 0.8))(z, t, y), torch.where(inside, free + 2.5 * (v - free), v))):
            torch.testing.assert_close(found, wanted)
