"""The exact derivative part by part, eager and compiled: errors, graphs; the dry run of benchmarks/steps.py.

Graphs are traced as for a GPU and then run operation by operation ("aot_eager"): no compiler is needed."""
import json
import subprocess
import sys

import pytest
import torch
from runs import ROOT

from model import DiTDH, jvp_by_parts
from train_meanflow import meanflow_loss, transport_derivative

OPERATIONS = []


def backend(graph, inputs):
    OPERATIONS.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def network(depth=(2, 2), time_difference=True):
    """Nothing is zero or one."""
    torch.manual_seed(0)
    net = DiTDH(2, 8, (32, 48), depth, (2, 2), 3, time_difference)
    for p in net.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return net


def data(rows=4):
    z, w = torch.randn(2, rows, 8, 2, 2, generator=torch.Generator().manual_seed(rows))
    t = torch.linspace(0.3, 0.9, rows)
    return z, t, torch.arange(rows) % 3, t / 3, w


@pytest.fixture(autouse=True)
def forget():
    """What other tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs():
    """Distinct ones; an error if any was broken off."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_the_derivative_is_exact():
    """Relative errors against float64, by torch.func.jvp of the network, by parts, by compiled parts: no
    way is worse than the plainest by more than a half, in float32 or under autocast. Compiled, no fused
    normalization is left, whose forward derivative cannot be traced on a GPU."""
    def errors(net, jvp):
        found = []
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found.append(float((transport_derivative(net, *data(), jvp=jvp) - exact).norm()))
        return [error / float(exact.norm()) for error in found]
    net = network().double()
    z, t, y, s, w = (x.double() if x.is_floating_point() else x for x in data())
    exact = transport_derivative(net, z, t, y, s, w)
    parts = transport_derivative(net, z, t, y, s, w, jvp=jvp_by_parts)
    assert (parts - exact).norm() < 1e-13 * exact.norm() > 0
    plain = errors(net.float(), torch.func.jvp)
    assert plain[0] < 1e-6 and plain[1] < 2e-2
    eager = errors(net, jvp_by_parts)
    net.compile(dynamic=False, backend=backend)
    for found in (eager, errors(net, jvp_by_parts)):
        assert found[0] < 1.5 * plain[0] + 1e-7 and found[1] < 1.5 * plain[1], (found, plain)
    assert len(OPERATIONS) > 100 and not [name for name in OPERATIONS if "norm" in name]


def test_graphs_do_not_grow_with_depth_or_steps():
    """Three (two kinds of block, the last layer) for values with gradient, without, and for Duals."""
    h, v = network((3, 2)), network((3, 2), False).requires_grad_(False)
    for net in (h, v):
        net.compile(dynamic=False, backend="aot_eager")
    z_0, t, y, s, eps = data(8)
    s = torch.where(torch.arange(8) % 4 == 0, s, t)
    for eta in (1.0, 0.5, 0.0):
        loss, _ = meanflow_loss(h, v, z_0, eps, t, y, s, eta, jumps=slice(None, None, 4), jvp=jvp_by_parts)
        loss.backward()
        assert graphs() == 9, eta


def test_the_steps_script(tmp_path):
    """Its parts run, at tiny sizes and eager: no name or argument in it is stale."""
    script = [sys.executable, "tests/benchmarks/steps.py", "--tiny", "--backend", "none", "--out", tmp_path]
    run = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line or "skipped" in line]
    assert all(line["ms"] > 0 for line in lines if "step" in line)
    assert len({line["part"] for line in lines}) == 8
