"""The exact derivative part by part, eager and compiled: exactness, graphs; the dry run of benchmarks/steps.py.

Graphs are traced as for a GPU and then run operation by operation ("aot_eager"): no compiler is needed."""
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT

import model
from train_meanflow import meanflow_loss, transport_derivative


def network(depth=(2, 2), time_difference=True):
    """Nothing is zero."""
    torch.manual_seed(0)
    net = model.DiTDH(2, 8, (32, 48), depth, (2, 2), 3, time_difference)
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net


def data(rows=4, dtype=torch.float32):
    z, w = torch.randn(2, rows, 8, 2, 2, generator=torch.Generator().manual_seed(rows), dtype=torch.double).to(dtype)
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


def graphs():
    """Distinct ones; an error if any was broken off."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_the_derivative_is_exact():
    """Relative errors against float64: by torch.func.jvp of the whole network, by parts, by compiled parts. No way is worse than the
    plainest by more than a half, in float32 or under autocast. Value and tangent may be views that lie differently in memory."""
    def errors(net, jvp):
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                yield float((transport_derivative(net, *data(), jvp=jvp) - exact).norm() / exact.norm())
    net = network().double()
    exact, parts = (transport_derivative(net, *data(dtype=torch.double), jvp=jvp) for jvp in (torch.func.jvp, model.jvp_by_parts))
    assert (parts - exact).norm() < 1e-13 * exact.norm() > 0
    plain = list(errors(net.float(), torch.func.jvp))
    assert plain[0] < 1e-6 and plain[1] < 2e-2, plain
    eager = list(errors(net, model.jvp_by_parts))
    net.compile(dynamic=False, backend="aot_eager")
    for found in (eager, list(errors(net, model.jvp_by_parts))):
        assert found[0] < 1.5 * plain[0] + 1e-7 and found[1] < 1.5 * plain[1], (found, plain)
    (z, t, y, s, w), before = data(), graphs()
    for views in ((torch.stack([z, w])[0], w), (z, w.mT.contiguous().mT)):
        found = transport_derivative(net, views[0], t, y, s, views[1], jvp=model.jvp_by_parts)
        assert (found - exact).norm() < 1e-6 * exact.norm() and graphs() == before


def test_graphs_do_not_grow_with_depth_or_steps():
    """Three (two kinds of block, the last layer) for values with gradient, without, and for Duals; too many are an error."""
    h, v = network((3, 2)), network((3, 2), False).requires_grad_(False)
    for net in (h, v):
        net.compile(dynamic=False, backend="aot_eager")
    z_0, t, y, s, eps = data(8)
    s = torch.where(torch.arange(8) % 4 == 0, s, t)
    for eta in (1.0, 0.5, 0.0):
        loss, _ = meanflow_loss(h, v, z_0, eps, t, y, s, eta, rows=slice(None, None, 4), jvp=model.jvp_by_parts)
        loss.backward()
        assert graphs() == 9, eta
    with torch._dynamo.config.patch(recompile_limit=4), torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for rows in (2, 3, 5):
            h(*data(rows)[:4])


def test_the_steps_script(tmp_path):
    """Its parts run, at tiny sizes and eager: no name or argument in it is stale."""
    run = subprocess.run([sys.executable, "tests/benchmarks/steps.py", "--tiny", "--backend", "none", "--out", tmp_path],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line or "skipped" in line] and len({line["part"] for line in lines}) == 10
    assert all(line["ms"] > 0 for line in lines if "step" in line)
