"""How exact is dh/dt? train_meanflow.py's on a trained student, against the exact one in double precision.

    python docs/experiments/derivative_errors.py --run runs/sanity       # a minute on a CPU

Rows are the training's: real latents, shifted times s < t, the teacher's velocity as tangent. Prints
Markdown: the norm of the error over the norm of dh/dt, all rows together, and in brackets the median over
rows. The student is evaluated in the precision named; the rest is float32 (float64 in the first column).
Training never takes finite differences in bf16 or TF32: `--derivative fd` is float32, whatever the autocast.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from encode_latents import Latents  # noqa: E402
from model import (  # noqa: E402
    ArgumentParser, command, generator, load_network, normalize, time_shift, whole)
from train_meanflow import transport_derivative  # noqa: E402


def derivative(net, v, z_0, eps, t, y, s, precision, **how):
    """dh/dt along the teacher's velocity, the student evaluated in `precision`."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    z_0, eps, t, s = (x.to(dtype) for x in (z_0, eps, t, s))
    net, v = net.to(dtype), v.to(dtype)

    def h(z, t, y, s):
        # Within the finite differences too, which set it to "highest", and set it back in the end.
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return net(z, t, y, s).to(dtype)
    t_ = t[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    with torch.no_grad():
        dh_dt = transport_derivative(h, z_t, t, y, s, v(z_t, t, y), **how)
    torch.set_float32_matmul_precision("highest")
    return dh_dt.double()


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/sanity", help="folder with latents, teacher and mfd in it")
    parser.add_argument("--rows", type=whole(), default=256, help="of the batch")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, run = Latents(f"{args.run}/latents"), Path(args.run)
    net, about = load_network(run / "mfd", "student")
    v = load_network(run / "teacher", "teacher")[0]
    net, v = net.to(device).requires_grad_(False), v.to(device).requires_grad_(False)
    g = generator("cpu", 0, "derivative errors")
    z_0, y = data.read(torch.randint(len(data), (args.rows,), generator=g).tolist())
    u = torch.rand(args.rows, 2, generator=g)
    s, t = time_shift(u, about["time_shift"]).sort(dim=1).values.unbind(1)
    eps = torch.randn(z_0.shape, generator=g)
    batch = [x.to(device) for x in (normalize(z_0, about["stats"]), eps, t, y, s)]

    truth = derivative(net, v, *batch, "float64", derivative="jvp")
    precisions = ["float64", "float32", *(["TF32"] if device.type == "cuda" else []), "bf16"]
    print("| derivative | " + " | ".join(precisions) + " |\n|" + "---|" * (1 + len(precisions)))
    differences = (1e-1, 3e-2, 1e-2, 5e-3, 1e-3, 3e-4, 1e-4, 1e-5)
    for name, how in [("exact", dict(derivative="jvp")),
                      *((f"D = {d:g}", dict(derivative="fd", delta_t=d)) for d in differences)]:
        cells = []
        for precision in precisions:
            error = (derivative(net, v, *batch, precision, **how) - truth).flatten(1).norm(dim=1)
            size = truth.flatten(1).norm(dim=1)
            cells.append(f"{error.norm() / size.norm():.1e} ({(error / size).median():.1e})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    command(main)
