"""The exact derivative part by part, eager and compiled: exactness, graphs; the GPU script's dry run.

Graphs are traced as for a GPU and then run operation by operation ("aot_eager"): no compiler is needed."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
from train_meanflow import meanflow_loss, transport_derivative

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(input_size=2, in_channels=8, hidden_size=(32, 48), num_heads=(2, 2), num_classes=3)


def network(depth=(2, 2), time_difference=True, seed=0):
    """Nothing is zero."""
    torch.manual_seed(seed)
    net = model.DiTDH(**SIZES, depth=depth, time_difference=time_difference)
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net


def data(rows=4, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows)
    z, w = (torch.randn(rows, 8, 2, 2, generator=g, dtype=torch.double).to(dtype) for _ in range(2))
    t = torch.linspace(0.3, 0.9, rows, dtype=dtype)
    return z, t, torch.arange(rows) % 3, t / 3, w


@pytest.fixture(autouse=True)
def forget():
    """What other tests compiled, and the limit that compiling sets."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield
    torch._dynamo.reset()


def compiled(net):
    net.compile(dynamic=False, backend="aot_eager")
    return net


def graphs():
    """Distinct ones; an error if any was broken off."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


# ---- exactness ---------------------------------------------------------------------------------------------
def test_the_derivative_is_exact():
    """Relative errors against float64: by torch.func.jvp of the whole network, by parts, by compiled parts.
    No way is worse than the plainest by more than a half, in float32 or under autocast. Value and tangent may
    be views that lie differently in memory."""
    net = network()

    def errors(jvp):
        found = []
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                derivative = transport_derivative(net, *data(), jvp=jvp)
            found.append(float((derivative - exact).norm() / exact.norm()))
        return found
    exact = transport_derivative(net.double(), *data(dtype=torch.double))
    pairs = transport_derivative(net, *data(dtype=torch.double), jvp=model.jvp_by_parts)
    assert (pairs - exact).norm() < 1e-13 * exact.norm() > 0
    net.float()
    plain = errors(torch.func.jvp)
    assert plain[0] < 1e-6 and plain[1] < 2e-2, plain
    eager = errors(model.jvp_by_parts)
    compiled(net)
    for found in (eager, errors(model.jvp_by_parts)):
        assert found[0] < 1.5 * plain[0] + 1e-7 and found[1] < 1.5 * plain[1], (found, plain)

    z, t, y, s, w = data()
    both, before = torch.stack([w, z]), graphs()
    for z_view, w_view in ((both[1], both[0]), (z, both[0]), (both[1], w), (z, w.mT.contiguous().mT)):
        found = transport_derivative(net, z_view, t, y, s, w_view, jvp=model.jvp_by_parts)
        assert (found - exact).norm() < 1e-6 * exact.norm() and graphs() == before


# ---- graphs ------------------------------------------------------------------------------------------------
def test_graphs_do_not_grow_with_depth_or_steps():
    """Three (two kinds of block, the last layer) for values with gradient, without, and for pairs."""
    h, v = compiled(network((3, 2))), compiled(network((3, 2), False).requires_grad_(False))
    z_0, t, y, s, eps = data(8)
    s = torch.where(torch.arange(8) % 4 == 0, s, t)
    for eta in (1.0, 1.0, 0.5, 0.0):
        loss, _ = meanflow_loss(h, v, z_0, eps, t, y, s, eta, rows=slice(None, None, 4), jvp=model.jvp_by_parts)
        loss.backward()
        assert graphs() == 9, eta


@torch.no_grad()
def test_too_many_graphs_are_an_error():
    """Not a step that has become slow in silence."""
    net = compiled(network((1, 1)))
    with torch._dynamo.config.patch(recompile_limit=4):
        net(*data(2)[:4])
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            net(*data(3)[:4])


# ---- the GPU script ----------------------------------------------------------------------------------------
def test_the_gpu_script(tmp_path):
    """Its parts run, at tiny sizes and eager, but for test_gpu.py: no name or argument in it is stale."""
    run = subprocess.run([sys.executable, "tests/benchmarks/gpu.py", "--tiny", "--backend", "none", "--out", tmp_path],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line]
    assert [line["part"] for line in lines if "skipped" in line] == ["8 tests"]
    assert len({line["part"] for line in lines}) == 14
    assert all(line["ms"] > 0 for line in lines if "step" in line)
