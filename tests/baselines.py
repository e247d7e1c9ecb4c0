"""The straightforward MeanFlow step: the tests' oracle, and what tests/benchmarks/steps.py compares with."""
import torch


def meanflow_as_published(h, v, z_0, eps, t, y, s, eta=1.0, delta_t=0.005):
    """All three evaluations of all rows in one batch, under autograd; the target is detached afterwards.

    Arguments as of train_meanflow.meanflow_loss. Returns the plain mean squared error."""
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    w = eps - z_0
    if eta > 0:
        with torch.no_grad():
            w = (1 - eta) * w + eta * v(z_t, t, y)
    z = torch.cat([z_t, z_t + delta_t * w, z_t - delta_t * w])
    times = torch.cat([t, t + delta_t, t - delta_t])
    h_t, h_plus, h_minus = h(z, times, y.repeat(3), s.repeat(3)).chunk(3)
    u = w - (t_ - s_) * (h_plus - h_minus) / (2 * delta_t)
    return (h_t - u.detach()).square().mean()
