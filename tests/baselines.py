"""The straightforward MeanFlow steps: oracles for the tests, the first two baselines for tests/benchmarks/benchmark.py.

All: (h, v, z_0, eps, t, y, s, eta, delta_t) as in train_meanflow.meanflow_loss, the plain mean squared error;
the first two with central differences. They return the loss, whose gradient must be the same.
"""
import torch


def meanflow_as_published(h, v, z_0, eps, t, y, s, eta=1.0, delta_t=0.005):
    """All three evaluations of all rows in one batch, under autograd; the target is detached afterwards."""
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    w = eps - z_0
    if eta > 0:
        with torch.no_grad():
            w = (1 - eta) * w + eta * v(z_t, t, y)
    z = torch.cat([z_t, z_t + delta_t * w, z_t - delta_t * w])
    h_t, h_plus, h_minus = h(z, torch.cat([t, t + delta_t, t - delta_t]), y.repeat(3), s.repeat(3)).chunk(3)
    u = w - (t_ - s_) * (h_plus - h_minus) / (2 * delta_t)
    return (h_t - u.detach()).square().mean()


def meanflow_all_rows(h, v, z_0, eps, t, y, s, eta=1.0, delta_t=0.005):
    """The derivative without gradient, but for all rows."""
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    h_t = h(z_t, t, y, s)
    with torch.no_grad():
        w = eps - z_0
        if eta > 0:
            w = (1 - eta) * w + eta * v(z_t, t, y)
        z = torch.cat([z_t + delta_t * w, z_t - delta_t * w])
        h_plus, h_minus = h(z, torch.cat([t + delta_t, t - delta_t]), y.repeat(2), s.repeat(2)).chunk(2)
        u = w - (t_ - s_) * (h_plus - h_minus) / (2 * delta_t)
    return (h_t - u).square().mean()


def meanflow_exact(h, v, z_0, eps, t, y, s, eta=1.0, delta_t=None):
    """As the MeanFlow paper writes it: h and its derivative of all rows from one JVP, under autograd; the
    target is detached afterwards."""
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    w = eps - z_0
    if eta > 0:
        with torch.no_grad():
            w = (1 - eta) * w + eta * v(z_t, t, y)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        h_t, dh_dt = torch.func.jvp(lambda z, t: h(z, t, y, s), (z_t, t), (w, torch.ones_like(t)))
    return (h_t - (w - (t_ - s_) * dh_dt).detach()).square().mean()
