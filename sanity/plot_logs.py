"""Draws the logs of one or several runs as a picture; needs matplotlib.

    python sanity/plot_logs.py runs/cmt runs/meanflow --keys mse grad_norm --out logs.png
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import ArgumentParser, InputError, command, read_log, say, write_atomically  # noqa: E402

KEYS = ["loss", "mse_flow", "mse_jump", "grad_norm", "grad_norm_max", "rms_w", "rms_correction", "lr",
        "samples_per_second"]


def main(argv=None):
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of training runs")
    parser.add_argument("--keys", nargs="+", default=KEYS, help="what to draw, a panel each")
    parser.add_argument("--out", default="logs.png", help="the picture")
    args = parser.parse_args(argv)
    logs = {run: read_log(run) for run in args.runs}
    if empty := [run for run, log in logs.items() if not log]:
        raise InputError(f"no log in {empty[0]}: give folders that a training stage has written")
    keys = [key for key in args.keys if any(key in line for log in logs.values() for line in log)]
    if not keys:
        raise InputError(f"none of {', '.join(args.keys)} is in these logs")
    try:
        import matplotlib
    except ImportError:
        raise InputError("this script needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3 * rows), squeeze=False,
                                layout="constrained")
    for ax in axes.flat[len(keys):]:
        ax.remove()
    for ax, key in zip(axes.flat, keys, strict=False):
        low, high = float("inf"), 0
        for k, (run, log) in enumerate(logs.items()):
            steps, values = [[line[x] for line in log if line.get(key) is not None] for x in ("step", key)]
            # A colour for each run, whether or not it has this entry.
            ax.plot(steps, values, color=f"C{k % 10}", label=run, linewidth=1)
            low, high = min([low, *values]), max([high, *values])
        if low > 0 and high > 20 * low:
            ax.set_yscale("log")
        ax.set_title(key, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    write_atomically(args.out, lambda file: figure.savefig(file, format="png", dpi=110))
    say(f"{args.out}: {len(keys)} panels, {len(logs)} runs")


if __name__ == "__main__":
    command(main)
