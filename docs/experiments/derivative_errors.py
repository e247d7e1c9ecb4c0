"""How exact is dh/dt? train_meanflow.py's on a trained student, against the exact one in double precision.

    python docs/experiments/derivative_errors.py --run runs/sanity       # a minute on a CPU

Of the training's rows: real latents, shifted times s < t, the teacher's velocity as tangent. Prints the norm
of the error over the norm of dh/dt, all rows together, and in brackets the median over rows. The student is
evaluated in the precision named; the rest is float32 (float64 in the first column). Training never takes
finite differences in bf16 or TF32.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from docs.experiments.run import markdown
from encode_latents import Latents
from model import ArgumentParser, command, generator, load_network, normalize, time_shift
from train_meanflow import per_row, transport_derivative

ROWS = 256


def derivative(net, v, batch, precision, **how):
    """dh/dt along the teacher's velocity, the student evaluated in `precision`."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    net, v, z_0, eps, t, s = (x.to(dtype) for x in (net, v, *batch[:4]))
    y = batch[4]

    def h(z, t, y, s):
        # Within the finite differences too, which set it to "highest", and set it back in the end.
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        with torch.autocast(z.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return net(z, t, y, s).to(dtype)
    z_t = per_row(1 - t, eps) * z_0 + per_row(t, eps) * eps
    with torch.no_grad():
        dh_dt = transport_derivative(h, z_t, t, y, s, v(z_t, t, y), **how)
    torch.set_float32_matmul_precision("highest")
    return dh_dt.double()


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("--run", default="runs/sanity", help="folder with latents, teacher and mfd in it")
    run = Path(parser.parse_args().run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, (net, about) = Latents(run / "latents"), load_network(run / "mfd", "student")
    net, v = (x.to(device).requires_grad_(False) for x in (net, load_network(run / "teacher", "teacher")[0]))
    g = generator("cpu", 0, "derivative errors")
    z_0, y = data.read(torch.randint(len(data), (ROWS,), generator=g).tolist())
    s, t = time_shift(torch.rand(ROWS, 2, generator=g), about["time_shift"]).sort(dim=1).values.unbind(1)
    eps = torch.randn(z_0.shape, generator=g)
    batch = [x.to(device) for x in (normalize(z_0, about["stats"]), eps, t, s, y)]

    truth = derivative(net, v, batch, "float64", derivative="jvp")
    size = truth.flatten(1).norm(dim=1)
    kinds = {"exact": dict(derivative="jvp")}
    for d in (1e-1, 3e-2, 1e-2, 5e-3, 1e-3, 3e-4, 1e-4, 1e-5):
        kinds[f"D = {d:g}"] = dict(derivative="fd", delta_t=d)
    found = {name: {} for name in kinds}
    for name, how in kinds.items():
        for precision in ("float64", "float32", *["TF32"] * (device.type == "cuda"), "bf16"):
            error = (derivative(net, v, batch, precision, **how) - truth).flatten(1).norm(dim=1)
            found[name][precision] = f"{error.norm() / size.norm():.1e} ({(error / size).median():.1e})"
    print(markdown(found))


if __name__ == "__main__":
    command(main)
