"""The ablations: trains, samples and measures the arms of an experiment, and prints its table in Markdown.

    for seed in 0 1 2; do SEED=$seed ./sanity/run.sh; done     # where the arms start: latents, decoder, teacher, CMT
    python docs/experiments/run.py b --seeds 0 1 2             # -> runs/experiments/b; a second call goes on
    python docs/experiments/run.py b --list                    # the commands alone
    python docs/experiments/run.py h --plot docs/images/h.png  # a curve too (matplotlib): of b-length, c, f, h and k
    python docs/experiments/run.py b --seeds 0 1 2 --print docs/experiments/numbers    # the table of a page again

An arm is a chain of the stages' own commands, on one thread each, --jobs of them at a time (d, which compares
times, wants --jobs 1 --threads 2); then 5,000 samples for each number of evaluations, then sanity/report.py over
all arms of a seed, with one classifier for all seeds. The settings are the sanity run's but for what the arm
says: gradients are clipped at 1, and the learning rate is higher than the published 1e-4. Distances in the
encoder's space compare within an experiment only: other latents are another space.
"""
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from model import (  # noqa: E402
    ArgumentParser, InputError, command, provenance, read_json, read_log, whole, write_atomically, write_json)

NUMBERS = "runs/experiments"

# ---- The stages, as in the sanity run; a later flag overrules an earlier one
COMMON = "--seed {seed} --precision fp32 --log-every 50 --save-every 500 --keep 1"           # on a GPU too
TEACHER = ("train_teacher.py --preset DiTDH-mini --time-shift 2.5 --batch-size 32 --lr 2e-3 --lr-final 5e-5 "
           "--decay-from 0.4 --latents {run}/latents " + COMMON)
CMT = "train_cmt.py --steps 250 --batch-size 32 --pairs 16 --lr 1e-3 --lr-final 5e-5 --ema 0.99 " + COMMON
MFD = ("train_meanflow.py --steps 1450 --batch-size 64 --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.995 "
       "--derivative fd --loss-form mean --loss-power 0.5 --loss-eps 0.1 --latents {run}/latents " + COMMON)
MFT = MFD + " --eta 0"
PUBLISHED_WEIGHT = "--loss-form published --loss-power 1 --loss-eps 1e-3"
PUBLISHED_RATE = "--lr 1e-4 --lr-final 1e-4"


def published(ingredients, stage):
    return f"docs/experiments/published.py {ingredients} {stage}" if ingredients else stage


def distill(more="", teacher="{run}/teacher", init="{run}/cmt", ingredients=""):
    return [published(ingredients, f"{MFD} --teacher {teacher} --init {init} --out {{out}} {more}")]


def teacher_and_cmt(steps, folder, teacher="", cmt=""):
    """A teacher of so many steps, whose average forgets its start, and its CMT student, in `folder`."""
    ema = min(0.998, 1 - 5.2 / steps)
    return [f"{TEACHER} --ema {ema:.5g} --steps {steps} --out {folder}/teacher {teacher}",
            f"{CMT} --teacher {folder}/teacher --out {folder}/cmt {cmt}"]


# ---- The experiments: first: commands before the arms; arms: {name: chain of commands, of which the last one's
# --out is sampled}; nfe: evaluations; also: {row: (network, flags)} to sample besides
def slug(name):
    return re.sub(r"[^\w.-]", "_", name)


def states(name, steps):
    """Rows of an arm's states at these steps."""
    folder = f"{{exp}}/{slug(name)}"
    return {f"{name}, step {k}": (f"{folder}/state_{k:08d}.safetensors", "--nfe 1") for k in steps}


def explosion(steps=1450, more="", only=None, c=None, random=True):
    """a: with and without CMT; then each ingredient of the published code alone and together, at our learning
    rate and at theirs. more: flags of every arm; only: recipes, not all; c: another constant of their weight."""
    both = f"{PUBLISHED_WEIGHT} --derivative fd-central"
    alone = {"labels": ("labels", ""), "embedding": ("embedding", ""), "stencil": ("", "--derivative fd-central"),
             "weight, lr 1e-4": ("", f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}")}
    recipes = {"ours": ("", ""), **alone, "weight": ("", PUBLISHED_WEIGHT), "all": ("labels,embedding", both),
               "all, lr 1e-4": ("labels,embedding", f"{both} {PUBLISHED_RATE}")}
    if c:
        recipes[f"weight, c = {c}"] = "", f"{PUBLISHED_WEIGHT} --loss-eps {c}"
    starts = {"CMT": "{run}/cmt", "teacher's weights": "{run}/teacher"}
    if random:
        starts["random weights"] = "{exp}/random"
    arms = {}
    for start, init in starts.items():
        for recipe in only or recipes:
            ingredients, flags = recipes[recipe]
            flags = f"{more} {flags} --steps {steps}"
            if start == "CMT" and recipe.startswith("all"):      # there CMT is as it was published, too
                cmt = published("labels,embedding,times", f"{CMT} --teacher {{run}}/teacher --out {{out}}-cmt")
                arms[f"CMT, {recipe}"] = [cmt, *distill(flags, init="{out}-cmt", ingredients="labels")]
            elif start == "teacher's weights" or recipe not in alone:
                arms[f"{start}, {recipe}"] = distill(flags, init=init, ingredients=ingredients)
    return dict(arms=arms, also={"teacher": ("{run}/teacher", "--nfe 50")})


def elsewhere(encoder, teacher=2600, flags=("", "", ""), **more):
    """a, at another latent dimension or with another network: all from the latents on anew, in {exp}/base.

    The dimension grows by the number of tokens, as a token of more channels than the head is wide (160) could
    not be told from noise; where a step takes long, the arms are fewer and have fewer.
    teacher: its steps; flags: of teacher, CMT and MFD; more: of `explosion`."""
    data = "--data-path data/digits/train"
    first = [f"sanity/random_encoder.py --out {{run}}/encoder {encoder}",
             f"encode_latents.py {data} --image-size 32 --encoder-size 32 --batch-size 256 --workers 0 "
             "--out {run}/latents --encoder {run}/encoder",
             f"sanity/train_decoder.py {data} --latents {{run}}/latents --out {{run}}/decoder --seed {{seed}}",
             *teacher_and_cmt(teacher, "{run}", *flags[:2])]
    return dict(run="{exp}/base", first=first, **explosion(more=flags[2], random=False, **more))


WEIGHTS = {"p = 0": "--loss-power 0 --loss-eps 1e-3", "p = 0.5, c = 0.1": "", "p = 0.5, c = 1e-3": "--loss-eps 1e-3",
           "p = 1, c = 0.1": "--loss-power 1", "p = 1, c = 1e-2": "--loss-power 1 --loss-eps 1e-2",
           "published, c = 1e4": f"{PUBLISHED_WEIGHT} --loss-eps 1e4", "published": PUBLISHED_WEIGHT,
           "published, lr 1e-4": f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}"}
# Of sums, as other public codes have them: S / (S + c) is m / (m + c / 1024), m the mean over a latent's 1,024.
CONSTANTS = {"p = 0.5, c = 0.1": "", "p = 0.5, c = 1e-2": "--loss-eps 1e-2",
             "p = 1, c = 1, summed": f"--loss-power 1 --loss-eps {1 / 1024:.3g}",
             "p = 1, c = 0.01, summed": f"--loss-power 1 --loss-eps {0.01 / 1024:.3g}",
             "published": PUBLISHED_WEIGHT}
LONG = {   # flags, steps; at constant rates
    "published, lr 1e-3": (f"{PUBLISHED_WEIGHT} --lr 1e-3 --lr-final 1e-3", 30_000),
    "published, lr 1e-4": (f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}", 30_000),
    "p = 0.5, c = 0.1, lr 1e-3": ("--lr 1e-3 --lr-final 1e-3", 6000)}
LENGTH = "--log-every 500 --save-every 2000 --keep-every 2000 --decay-from 0 --compile"
SOLVERS = [(solver, steps) for solver in ("euler", "heun") for steps in (2, 4, 8, 16, 32)]
LONG_CMT = f"{CMT} --steps 1700 --teacher {{run}}/teacher --out {{out}}"
TEACHERS = (300, 800, 2600, 6000)                                                # f: steps of their training
SCALES = (1, 1.5, 2, 3)                                                          # g: of guidance
# k: MeanFlow from random weights. In forward passes (F) of a row a backward pass is 2, so flow matching is 3,
# CMT 3 + 1 (16 solver steps, 16 pairs), MFD 3 + 1 + 2 / 4 (two ends of a difference in one row of four), MeanFlow
# 3 + 2 / 4. 3,120 steps cost what all of teacher, CMT and MFD do.
BEFORE_MFD, EACH_MFD, EACH_MEANFLOW = 2600 * 32 * 3 + 250 * 32 * 4, 64 * 4.5, 64 * 3.5
RANDOM = f"{TEACHER} --steps 1 --lr 1e-12 --lr-final 1e-12 --out {{exp}}/random"
MEANFLOW = (f"{MFT} --init {{exp}}/random --out {{out}} --steps 3120 --lr-final 5e-5 --decay-from 0.4 --ema 0.998 "
            "--save-every 520 --keep-every 520")


def by_eta(kind, folder):
    """e: the arms of one teacher."""
    good = dict(teacher=f"{folder}/teacher", init=f"{folder}/cmt")
    first = f"{MFD} --steps 1000 --teacher {folder}/teacher --init {folder}/cmt --out {{out}}-first"
    arms = {"MFD": distill(**good), "eta 0.5": distill("--eta 0.5", **good), "eta 1 to 0": distill("--eta 1 0", **good),
            "MFT": distill("--eta 0", **good),
            "MFD then MFT": [first, f"{MFT} --steps 450 --lr 1e-4 --init {{out}}-first --out {{out}}"]}
    return {f"{kind} teacher, {name}": chain for name, chain in arms.items()}


EXPERIMENTS = {
    "a": dict(first=[RANDOM], **explosion()),
    "a-768": elsewhere("--width 48 --patch 8"),
    "a-3072": elsewhere("--width 48 --patch 4", steps=1000, c="9.4e4"),          # (0.1 C H W)^2
    "a-12288": elsewhere("--width 48 --patch 2", steps=1000, only=("ours", "labels", "embedding", "weight", "all")),
    "a-49152": elsewhere("--width 48 --patch 1", teacher=1300, steps=300, only=("ours", "weight")),
    "a-S": elsewhere("--width 64 --patch 8", steps=1000, only=("ours", "weight"),
                     flags=("--preset DiTDH-S --lr 3e-4 --lr-final 1e-5", "--lr 1.5e-4 --lr-final 1e-5",
                            "--lr 1e-4 --lr-final 1e-5")),
    "b": dict(arms={f"{name}, {weight}": distill(f"{flags} {eta}") for name, eta in (("MFD", ""), ("MFT", "--eta 0"))
                    for weight, flags in WEIGHTS.items()}),
    "b-constants": dict(arms={name: distill(flags) for name, flags in CONSTANTS.items()}),
    "b-length": dict(
        arms={name: distill(f"{flags} {LENGTH} --steps {steps}") for name, (flags, steps) in LONG.items()},
        also={"CMT, step 0": ("{run}/cmt", "--nfe 1")} | {row: of for name, (_, steps) in LONG.items()
                                                          for row, of in states(name, range(2000, steps + 1, 2000)).items()}),
    "c": dict(arms={f"{solver}, {n} steps": [f"{LONG_CMT} --solver {solver} --teacher-steps {n}"] for solver, n in SOLVERS}
              | {"euler, 16 steps, even times": [published("times", LONG_CMT)]}, nfe=(1, 2, 4)),
    "d": dict(arms={"exact": distill("--derivative jvp")}
              | {f"D = {d}": distill(f"--delta-t {d}") for d in ("1e-4", "1e-3", "5e-3", "1e-2")}, nfe=(1, 2)),
    "e": dict(first=teacher_and_cmt(500, "{exp}/weak"), nfe=(1, 2),
              arms={**by_eta("good", "{run}"), **by_eta("weak", "{exp}/weak")},
              also={"good teacher": ("{run}/teacher", "--nfe 50"), "weak teacher": ("{exp}/weak/teacher", "--nfe 50")}),
    "f": dict(first=[line for n in TEACHERS for line in teacher_and_cmt(n, f"{{exp}}/{n}")],
              arms={f"student, {n} steps": distill(teacher=f"{{exp}}/{n}/teacher", init=f"{{exp}}/{n}/cmt") for n in TEACHERS},
              also={f"teacher, {n} steps": (f"{{exp}}/{n}/teacher", "--nfe 50") for n in TEACHERS}),
    "g": dict(arms={f"w = {w}": [f"{CMT} --guidance {w} --teacher {{run}}/teacher --out {{out}}-cmt",
                                 *distill(f"--guidance {w}", init="{out}-cmt")] for w in SCALES},
              also={f"teacher, w = {w}": ("{run}/teacher", f"--nfe 50 --guidance {w}") for w in SCALES}),
    "h": dict(arms={}, also={f"teacher, {solver}, NFE {n}": ("{run}/teacher", f"--nfe {n} --solver {solver}")
                             for solver in ("euler", "heun") for n in (2, 4, 8, 16, 32, 50, 100)}
              | {f"{name.upper()}, NFE {n}": (f"{{run}}/{name}", f"--nfe {n}")
                 for name in ("cmt", "mfd", "mft") for n in (1, 2, 4)}),
    "k-rates": dict(first=[RANDOM], arms={
        "MeanFlow, lr 2e-3": [f"{MEANFLOW} --lr 2e-3"], "MeanFlow, lr 7e-4": [f"{MEANFLOW} --lr 7e-4"],
        "MeanFlow, published weight, lr 7e-4": [f"{MEANFLOW} --lr 7e-4 {PUBLISHED_WEIGHT}"],
        "MFD, lr 4e-4": distill(), "MFD, lr 8e-4": distill("--lr 8e-4")}),
    "k": dict(first=[RANDOM], arms={                                             # at the better rates of k-rates
        "MeanFlow": [f"{MEANFLOW} --lr 2e-3"], "MFD": distill("--lr 8e-4 --save-every 290 --keep-every 290")},
        also={"MFD, step 0": ("{run}/cmt", "--nfe 1"), **states("MFD", range(290, 1450, 290)),
              **states("MeanFlow", range(520, 3120, 520))}),
    "k-direction": dict(arms={"MFT": distill("--eta 0"),
                              "MFT, direction h": distill("--eta 0", ingredients="direction")}),
}


# ---- Running one
def plan(letter, seed):
    """-> folder, commands to run first, {arm: its commands}, {row: its sample.py}, the report's command."""
    experiment, exp = EXPERIMENTS[letter], f"{NUMBERS}/{letter}/{seed}"
    run = experiment.get("run", f"runs/sanity-{seed}" if seed else "runs/sanity").format(exp=exp)
    nfe = experiment.get("nfe", (1,))

    def fill(text, out=""):
        return text.format(run=run, exp=exp, out=out, seed=seed)

    arms = {name: [fill(line, f"{exp}/{slug(name)}") for line in chain] for name, chain in experiment["arms"].items()}
    rows = {f"{name}, {n} step{'s' * (n > 1)}" if len(nfe) > 1 else name: (f"{exp}/{slug(name)}", f"--nfe {n}")
            for name in arms for n in nfe}
    rows |= {name: (fill(network), flags) for name, (network, flags) in experiment.get("also", {}).items()}
    files = {name: f"{exp}/samples/{slug(name)}.npz" for name in rows}
    samples = {name: f"sample.py {network} --decoder {run}/decoder {flags} --num-samples 5000 --batch-size 250 "
                     f"--seed {seed} --out {files[name]}" for name, (network, flags) in rows.items()}
    report = (f"sanity/report.py --run {exp} --data data/digits --latents {run}/latents --decoder {run}/decoder "
              "--seed 0 --samples " + shlex.join(f"{name}={path}" for name, path in files.items()))
    return exp, [fill(line) for line in experiment.get("first", [])], arms, samples, report


def call(lines, log, threads=1):
    """Run commands, their output at the end of a file. Run before, they go on or do nothing. InputError: one fails."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        for line in lines:
            print(f"$ python {line}", file=file, flush=True)
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if subprocess.run([sys.executable, *shlex.split(line)], stdout=file, stderr=file, env=environment).returncode:
                raise InputError(f"a command failed: see {log}")


def do(letter, seed, jobs, threads):
    """Every command of a seed, and its numbers."""
    exp, first, arms, samples, report = plan(letter, seed)

    def chain(name, lines):
        call(lines, f"{exp}/{slug(name)}.txt", threads)

    chain("first", first)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(chain, arms, arms.values()))
        list(pool.map(chain, samples, ([line] for line in samples.values())))
    chain("report", [report])
    found = {**provenance(), "threads": threads, "rows": measured(exp, samples)}
    write_json(f"{NUMBERS}/{letter}-{seed}.json", found)


def measured(exp, samples):
    """{row: its distances, and its training, if this experiment trained it}."""
    rows, found = {}, read_json(f"{exp}/report.json")["rows"]
    for name, line in samples.items():
        row, run = {key: found[name][key] for key in ("nfe", "encoder", "classifier", "accuracy")}, Path(line.split()[1])
        state = re.fullmatch(r"state_0*(\d+)\.safetensors", run.name)
        lines = read_log(run.parent if state else run)
        if state:                                                                # what the log says there
            lines = [x for x in lines if x["step"] <= int(state[1])]
            row |= {key: lines[-1][key] for key in ("mse_flow", "mse_jump", "grad_norm")}
        if run.is_relative_to(exp):
            late = lines[-max(1, len(lines) // 5):]
            row |= dict(norm=max(x["grad_norm_max"] for x in lines), mse=statistics.mean(x["mse"] for x in late),
                        seconds=lines[-1]["seconds"] / lines[-1]["step"], steps=lines[-1]["step"])
        rows[name] = row
    return rows


def spaced(count, n):
    """n of the indices below count, evenly: of images in the order of their classes, some of each."""
    return [round(i * (count - 1) / (n - 1)) for i in range(n)]


# ---- What it shows
COLUMNS = {   # ratio: as the arms of a seed share its teacher and noise, it compares within seeds
    "nfe": ("NFE", "g"), "encoder": ("Frechet distance, encoder", ".3g"), "ratio": ("of the first row's", ".3g"),
    "classifier": ("Frechet distance, classifier", ".3g"), "accuracy": ("class accuracy", ".4f"),
    "steps": ("steps", "g"), "norm": ("largest gradient norm", ".3g"), "mse": ("mse, last fifth", ".3g"),
    "seconds": ("seconds a step", ".3g")}


def numbers(letter, seeds, folder):
    """{row: {seed: its numbers}}, from the files LETTER-SEED.json of a folder."""
    found = {seed: read_json(f"{folder}/{letter}-{seed}.json")["rows"] for seed in seeds}
    return {name: {seed: rows[name] for seed, rows in found.items()} for name in plan(letter, 0)[3]}


def markdown(rows):
    """The table of {row: {column: text or number}}."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        lines.append([name, *(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(rows):
    """Markdown: means over seeds, and standard deviations where these differ."""
    first, shown = next(iter(rows.values())), {}
    for name, found in rows.items():
        seeds, shown[name] = [{**row, "ratio": row["encoder"] / first[k]["encoder"]} for k, row in found.items()], {}
        for key, (title, form) in COLUMNS.items():
            if values := [row[key] for row in seeds if key in row]:
                deviation = f" ± {statistics.stdev(values):.2g}" if len(set(values)) > 1 else ""
                shown[name][title] = format(statistics.mean(values), form) + deviation
    return markdown(shown)


DISTANCE = {"encoder": "Frechet distance, encoder"}
PLOTS = {   # what finds curve, x and the curve's other words in the name of a row; what x is; a panel for each number
    "b-length": (r"(.*), step (\d+)()", "step", {
        **DISTANCE, "mse_jump": "mse of rows with s < t", "mse_flow": "mse of rows with s = t",
        "grad_norm": "gradient norm, mean"}),
    "c": (r"(.*), (\d+) steps(, .*)", "steps of the teacher's solver", DISTANCE),
    "f": (r"(.*), (\d+) steps()", "steps of the teacher", DISTANCE),
    "h": (r"(.*), NFE (\d+)()", "NFE", DISTANCE),
    "k": (r"(MFD|MeanFlow)(?:, step (\d+))?()", "cost, thousand forward passes of a row", {
        **DISTANCE, "classifier": "Frechet distance, classifier", "accuracy": "class accuracy"})}


def plot(letter, rows, path):
    """A PNG: mean and range over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    pattern, what, panels = PLOTS[letter]
    curves = {}
    for name, found in rows.items():
        if match := re.fullmatch(pattern, name):
            curve, x, rest = match.groups()
            seeds = list(found.values())
            x = int(x or seeds[0]["steps"])
            if letter == "k":
                x = (BEFORE_MFD + EACH_MFD * x if curve == "MFD" else EACH_MEANFLOW * x) / 1000
            curves.setdefault(curve + rest, {})[x] = seeds
    figure, axes = plt.subplots(1, len(panels), figsize=(3 + 3.4 * len(panels), 4), layout="constrained", squeeze=False)
    for ax, (key, title) in zip(axes.flat, panels.items(), strict=True):
        for label, points in curves.items():
            x = sorted(k for k, seeds in points.items() if all(key in row for row in seeds))
            mean, low, high = ([f(row[key] for row in points[k]) for k in x] for f in (statistics.mean, min, max))
            line, = ax.plot(x, mean, marker="o", markersize=3, linewidth=1, label=label)
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        ax.set(title=title, xlabel=what, yscale="linear" if key == "accuracy" else "log")
        ax.grid(alpha=0.3)
    if len(panels) == 1:                                                         # x doubles from point to point
        ticks = sorted({x for points in curves.values() for x in points})
        axes[0, 0].set_xscale("log")
        axes[0, 0].set_xticks(ticks, ticks)
        axes[0, 0].set_xticks([], minor=True)
    axes[0, 0].legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS, help="its letter")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0], help="of the runs to start from")
    parser.add_argument("--jobs", type=whole(), default=2, help="arms at a time")
    parser.add_argument("--threads", type=whole(), default=1, help="of a job")
    parser.add_argument("--plot", metavar="PNG", help=f"draw a curve too: of {', '.join(PLOTS)}")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--print", metavar="FOLDER", help="run nothing: of the numbers kept there, LETTER-SEED.json")
    args = parser.parse_args()
    letter = args.experiment
    if args.plot and letter not in PLOTS:
        parser.error(f"there is no picture of {letter}: leave out --plot")
    os.chdir(ROOT)
    for seed in args.seeds:
        if args.list:
            _, first, arms, samples, report = plan(letter, seed)
            lines = [*first, *(line for chain in arms.values() for line in chain), *samples.values(), report]
            print("\n".join(f"python {line}" for line in lines))
        elif not args.print:
            do(letter, seed, args.jobs, args.threads)
    if not args.list:
        rows = numbers(letter, args.seeds, args.print or NUMBERS)
        print(table(rows))
        if args.plot:
            plot(letter, rows, args.plot)


if __name__ == "__main__":
    command(main)
