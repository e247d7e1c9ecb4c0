"""The straightforward MeanFlow step: the tests' oracle, and what tests/benchmarks/steps.py compares with."""
import torch


def meanflow_as_published(h, v, z_0, eps, t, y, s, eta=1.0, delta_t=0.005):
    """All evaluations of all rows in one batch, under autograd; the target is detached afterwards.

    Arguments as of train_meanflow.meanflow_loss; delta_t: of central differences, or None, the exact
    derivative, as the MeanFlow paper writes it. Returns the plain mean squared error."""
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    w = eps - z_0
    if eta > 0:
        with torch.no_grad():
            w = (1 - eta) * w + eta * v(z_t, t, y)
    if delta_t:
        z = torch.cat([z_t, z_t + delta_t * w, z_t - delta_t * w])
        h_t, h_plus, h_minus = h(z, torch.cat([t, t + delta_t, t - delta_t]), y.repeat(3), s.repeat(3)).chunk(3)
        dh_dt = (h_plus - h_minus) / (2 * delta_t)
    else:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            h_t, dh_dt = torch.func.jvp(lambda z, t: h(z, t, y, s), (z_t, t), (w, torch.ones_like(t)))
    return (h_t - (w - (t_ - s_) * dh_dt).detach()).square().mean()
