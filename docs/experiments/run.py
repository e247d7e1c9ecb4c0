"""The ablations: trains, samples and measures the arms of an experiment, and prints its table in Markdown.

    for seed in 0 1 2; do SEED=$seed ./sanity/run.sh; done     # where the arms start
    python docs/experiments/run.py b --seeds 0 1 2             # -> runs/experiments/b; a second call goes on
    python docs/experiments/run.py b --list                    # the commands alone
    python docs/experiments/run.py h --plot h.png              # a picture too, with matplotlib
    python docs/experiments/run.py b --seeds 0 1 2 --print docs/experiments/numbers    # a page's table again

An arm is a chain of the stages' own commands, on one thread each, --jobs of them at a time (d, which compares
times, wants --jobs 1 --threads 2); then 5,000 samples for each number of evaluations, then sanity/report.py,
with one classifier for all seeds. The settings are the sanity run's but for what the arm says.
"""
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import (
    ArgumentParser, InputError, command, provenance, read_json, read_log, whole, write_atomically, write_json)

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = "runs/experiments"

# ---- The stages, as in the sanity run; a later flag overrules an earlier one
COMMON = "--seed {seed} --precision fp32 --log-every 50 --save-every 500 --keep 1"
TEACHER = ("train_teacher.py --preset DiTDH-mini --time-shift 2.5 --batch-size 32 --lr 2e-3 --lr-final 5e-5 "
           "--decay-from 0.4 --latents {run}/latents " + COMMON)
CMT = "train_cmt.py --steps 250 --batch-size 32 --pairs 16 --lr 1e-3 --lr-final 5e-5 --ema 0.99 " + COMMON
MFD = ("train_meanflow.py --steps 1450 --batch-size 64 --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 "
       "--ema 0.995 --derivative fd --loss-form mean --loss-power 0.5 --loss-eps 0.1 "
       "--latents {run}/latents " + COMMON)
STUDENT = f"{MFD} --teacher {{run}}/teacher --init {{run}}/cmt --out {{out}}"
CMT_FIRST = f"{CMT} --teacher {{run}}/teacher --out {{out}}-cmt"
RANDOM = f"{TEACHER} --steps 1 --lr 1e-12 --lr-final 1e-12 --out {{exp}}/random"
PUBLISHED = "docs/experiments/published.py"
PUBLISHED_WEIGHT = "--loss-form published --loss-power 1 --loss-eps 1e-3"
PUBLISHED_RATE = "--lr 1e-4 --lr-final 1e-4"


def teacher_and_cmt(steps, folder, teacher="", cmt=""):
    """A teacher of so many steps, whose average forgets its start, and its CMT student, in `folder`."""
    ema = min(0.998, 1 - 5.2 / steps)
    return [f"{TEACHER} --ema {ema:.5g} --steps {steps} --out {folder}/teacher {teacher}",
            f"{CMT} --teacher {folder}/teacher --out {folder}/cmt {cmt}"]


# ---- The experiments
EXPERIMENTS = {}


def experiment(letter, arms, nfe=(1,), also=None, first=(), run=None):
    """arms: {name: a command, or a chain, of which the last one's --out is sampled in `nfe` evaluations};
    also: {row: "NETWORK FLAGS"} to sample besides; first: commands before the arms; run: where they start."""
    arms = {name: [chain] if isinstance(chain, str) else chain for name, chain in arms.items()}
    EXPERIMENTS[letter] = dict(arms=arms, nfe=nfe, also=also or {}, first=first, run=run)


def slug(name):
    return re.sub(r"[^\w.-]", "_", name)


def states(name, steps):
    """Rows of an arm's states at these steps."""
    return {f"{name}, step {k}": f"{{exp}}/{slug(name)}/state_{k:08d}.safetensors --nfe 1" for k in steps}


# a: with and without CMT; then the published code's ingredients, alone and together, at our rate and theirs.
ALL = f"{PUBLISHED_WEIGHT} --derivative fd-central"
ALONE = {   # ingredients, flags; from the teacher's weights only
    "labels": ("labels", ""), "embedding": ("embedding", ""), "stencil": ("", "--derivative fd-central"),
    "weight, lr 1e-4": ("", f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}")}
RECIPES = {
    "ours": ("", ""), **ALONE, "weight": ("", PUBLISHED_WEIGHT), "all": ("labels,embedding", ALL),
    "all, lr 1e-4": ("labels,embedding", f"{ALL} {PUBLISHED_RATE}")}
CONSTANT = {"weight, c = 9.4e4": ("", f"{PUBLISHED_WEIGHT} --loss-eps 9.4e4")}   # (0.1 C H W)^2 of a-3072
STARTS = {"CMT": "{run}/cmt", "teacher's weights": "{run}/teacher"}


def explosion(letter, recipes, starts=STARTS, more="", **how):
    """a, with `more` flags for every arm."""
    arms = {}
    for start, network in starts.items():
        for recipe, (ingredients, flags) in recipes.items():
            chain, init = [], network
            if recipe in ALONE and start != "teacher's weights":
                continue
            if start == "CMT" and recipe.startswith("all"):      # there CMT is as it was published, too
                chain = [f"{PUBLISHED} labels,embedding,times {CMT_FIRST}"]
                init, ingredients = "{out}-cmt", "labels"
            stage = f"{PUBLISHED} {ingredients} {STUDENT}" if ingredients else STUDENT
            arms[f"{start}, {recipe}"] = [*chain, f"{stage} --init {init} {flags} {more}"]
    experiment(letter, arms, also={"teacher": "{run}/teacher --nfe 50"}, **how)


def elsewhere(letter, encoder, recipes, more="", teacher=2600, of_teacher="", of_cmt=""):
    """a, at another latent dimension or with another network: all from the latents on anew, in {exp}/base.

    teacher: its steps; of_teacher, of_cmt, more: flags of teacher, CMT and MFD. The dimension grows by the
    number of tokens: one of more channels than the head is wide (160) could not be told from noise."""
    data = "--data-path data/digits/train"
    first = [f"sanity/random_encoder.py --out {{run}}/encoder {encoder}",
             f"encode_latents.py {data} --image-size 32 --encoder-size 32 --batch-size 256 --workers 0 "
             "--out {run}/latents --encoder {run}/encoder",
             f"sanity/train_decoder.py {data} --seed {{seed}} "
             "--latents {run}/latents --out {run}/decoder",
             *teacher_and_cmt(teacher, "{run}", of_teacher, of_cmt)]
    recipes = {name: (RECIPES | CONSTANT)[name] for name in recipes}
    explosion(letter, recipes, more=more, first=first, run="{exp}/base")


explosion("a", RECIPES, STARTS | {"random weights": "{exp}/random"}, first=[RANDOM])
elsewhere("a-768", "--width 48 --patch 8", RECIPES)
elsewhere("a-3072", "--width 48 --patch 4", RECIPES | CONSTANT, "--steps 1000")
elsewhere("a-12288", "--width 48 --patch 2", ("ours", "labels", "embedding", "weight", "all"), "--steps 1000")
elsewhere("a-49152", "--width 48 --patch 1", ("ours", "weight"), "--steps 300", teacher=1300)
elsewhere("a-S", "--width 64 --patch 8", ("ours", "weight"), "--steps 1000 --lr 1e-4 --lr-final 1e-5",
          of_teacher="--preset DiTDH-S --lr 3e-4 --lr-final 1e-5", of_cmt="--lr 1.5e-4 --lr-final 1e-5")

# b: the weight of the loss.
WEIGHTS = {
    "p = 0": "--loss-power 0 --loss-eps 1e-3", "p = 0.5, c = 0.1": "", "p = 0.5, c = 1e-3": "--loss-eps 1e-3",
    "p = 1, c = 0.1": "--loss-power 1", "p = 1, c = 1e-2": "--loss-power 1 --loss-eps 1e-2",
    "published, c = 1e4": f"{PUBLISHED_WEIGHT} --loss-eps 1e4", "published": PUBLISHED_WEIGHT,
    "published, lr 1e-4": f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}"}
experiment("b", {f"{name}, {weight}": f"{STUDENT} {flags} {eta}"
                 for name, eta in (("MFD", ""), ("MFT", "--eta 0")) for weight, flags in WEIGHTS.items()})
# Of sums, as other codes have them: S / (S + c) is m / (m + c / 1024), m a latent's mean over 1,024.
experiment("b-constants", {
    "p = 0.5, c = 0.1": STUDENT, "p = 0.5, c = 1e-2": f"{STUDENT} --loss-eps 1e-2",
    "p = 1, c = 1, summed": f"{STUDENT} --loss-power 1 --loss-eps {1 / 1024:.3g}",
    "p = 1, c = 0.01, summed": f"{STUDENT} --loss-power 1 --loss-eps {0.01 / 1024:.3g}",
    "published": f"{STUDENT} {PUBLISHED_WEIGHT}"})
LONG = f"{STUDENT} --log-every 500 --save-every 2000 --keep-every 2000 --decay-from 0 --compile"
LENGTHS = {   # flags, steps
    "published, lr 1e-3": (f"{PUBLISHED_WEIGHT} --lr 1e-3 --lr-final 1e-3", 30_000),
    "published, lr 1e-4": (f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}", 30_000),
    "p = 0.5, c = 0.1, lr 1e-3": ("--lr 1e-3 --lr-final 1e-3", 6000)}
also = {"CMT, step 0": "{run}/cmt --nfe 1"}
for name, (_, steps) in LENGTHS.items():
    also |= states(name, range(2000, steps + 1, 2000))
arms = {name: f"{LONG} {flags} --steps {steps}" for name, (flags, steps) in LENGTHS.items()}
experiment("b-length", arms, also=also)

# c: CMT alone.
ALONE_CMT = f"{CMT} --steps 1700 --teacher {{run}}/teacher --out {{out}}"
arms = {f"{solver}, {n} steps": f"{ALONE_CMT} --solver {solver} --teacher-steps {n}"
        for solver in ("euler", "heun") for n in (2, 4, 8, 16, 32)}
experiment("c", arms | {"euler, 16 steps, even times": f"{PUBLISHED} times {ALONE_CMT}"}, nfe=(1, 2, 4))

# d: the derivative.
arms = {f"D = {d}": f"{STUDENT} --delta-t {d}" for d in ("1e-4", "1e-3", "5e-3", "1e-2")}
experiment("d", {"exact": f"{STUDENT} --derivative jvp", **arms}, nfe=(1, 2))

# e: MFD, MFT and between, from two teachers.
arms, also = {}, {}
for kind, folder in (("good", "{run}"), ("weak", "{exp}/weak")):
    start = f"{MFD} --teacher {folder}/teacher --init {folder}/cmt"
    for name, eta in (("MFD", "1"), ("eta 0.5", "0.5"), ("eta 1 to 0", "1 0"), ("MFT", "0")):
        arms[f"{kind} teacher, {name}"] = f"{start} --out {{out}} --eta {eta}"
    arms[f"{kind} teacher, MFD then MFT"] = [
        f"{start} --steps 1000 --out {{out}}-first",
        f"{MFD} --steps 450 --lr 1e-4 --eta 0 --init {{out}}-first --out {{out}}"]
    also[f"{kind} teacher"] = f"{folder}/teacher --nfe 50"
experiment("e", arms, nfe=(1, 2), first=teacher_and_cmt(500, "{exp}/weak"), also=also)

# f: the teacher's training.
first, arms, also = [], {}, {}
for n in (300, 800, 2600, 6000):
    first += teacher_and_cmt(n, f"{{exp}}/{n}")
    arms[f"student, {n} steps"] = f"{STUDENT} --teacher {{exp}}/{n}/teacher --init {{exp}}/{n}/cmt"
    also[f"teacher, {n} steps"] = f"{{exp}}/{n}/teacher --nfe 50"
experiment("f", arms, first=first, also=also)

# g: guidance.
arms, also = {}, {}
for w in (1, 1.5, 2, 3):
    arms[f"w = {w}"] = [f"{CMT_FIRST} --guidance {w}", f"{STUDENT} --init {{out}}-cmt --guidance {w}"]
    also[f"teacher, w = {w}"] = f"{{run}}/teacher --nfe 50 --guidance {w}"
experiment("g", arms, also=also)

# h: the number of evaluations.
also = {f"teacher, {solver}, NFE {n}": f"{{run}}/teacher --nfe {n} --solver {solver}"
        for solver in ("euler", "heun") for n in (2, 4, 8, 16, 32, 50, 100)}
also |= {f"{name.upper()}, NFE {n}": f"{{run}}/{name} --nfe {n}"
         for name in ("cmt", "mfd", "mft") for n in (1, 2, 4)}
experiment("h", {}, also=also)

# k: MeanFlow from random weights. In forward passes (F) of a row a backward pass is 2, so flow matching is 3,
# CMT 3 + 1 (16 solver steps, 16 pairs), MFD 3 + 1 + 2 / 4 (two ends of a difference in one row of four),
# MeanFlow 3 + 2 / 4. 3,120 steps cost what all of teacher, CMT and MFD do.
BEFORE_MFD, EACH_MFD, EACH_MEANFLOW = 2600 * 32 * 3 + 250 * 32 * 4, 64 * 4.5, 64 * 3.5
MEANFLOW = (f"{MFD} --eta 0 --init {{exp}}/random --out {{out}} --steps 3120 --lr-final 5e-5 "
            "--decay-from 0.4 --ema 0.998 --save-every 520 --keep-every 520")
experiment("k-rates", first=[RANDOM], arms={
    "MeanFlow, lr 2e-3": f"{MEANFLOW} --lr 2e-3", "MeanFlow, lr 7e-4": f"{MEANFLOW} --lr 7e-4",
    "MeanFlow, published weight, lr 7e-4": f"{MEANFLOW} --lr 7e-4 {PUBLISHED_WEIGHT}",
    "MFD, lr 4e-4": STUDENT, "MFD, lr 8e-4": f"{STUDENT} --lr 8e-4"})
also = {"MFD, step 0": "{run}/cmt --nfe 1"} | states("MFD", range(290, 1450, 290))
experiment("k", first=[RANDOM], also=also | states("MeanFlow", range(520, 3120, 520)), arms={
    "MeanFlow": f"{MEANFLOW} --lr 2e-3", "MFD": f"{STUDENT} --lr 8e-4 --save-every 290 --keep-every 290"})
experiment("k-direction", {
    "MFT": f"{STUDENT} --eta 0", "MFT, direction h": f"{PUBLISHED} direction {STUDENT} --eta 0"})


# ---- Running one
def plan(letter, seed):
    """-> folder, commands to run first, {arm: its commands}, {row: its sample.py}, the report's command."""
    how, exp = EXPERIMENTS[letter], f"{NUMBERS}/{letter}/{seed}"
    run = (how["run"] or (f"runs/sanity-{seed}" if seed else "runs/sanity")).format(exp=exp)

    def fill(text, out=""):
        return text.format(run=run, exp=exp, out=out, seed=seed)

    arms, rows = {}, {}
    for name, chain in how["arms"].items():
        out = f"{exp}/{slug(name)}"
        arms[name] = [fill(line, out) for line in chain]
        for n in how["nfe"]:
            row = name if how["nfe"] == (1,) else f"{name}, {n} step{'s' * (n > 1)}"
            rows[row] = f"{out} --nfe {n}"
    rows |= {row: fill(network) for row, network in how["also"].items()}
    files = {row: f"{exp}/samples/{slug(row)}.npz" for row in rows}
    columns = shlex.join(f"{row}={path}" for row, path in files.items())
    samples = {row: f"sample.py {network} --decoder {run}/decoder --num-samples 5000 --batch-size 250 "
                    f"--seed {seed} --out {files[row]}" for row, network in rows.items()}
    report = (f"sanity/report.py --run {exp} --data data/digits --latents {run}/latents "
              f"--decoder {run}/decoder --seed 0 --samples {columns}")
    return exp, [fill(line) for line in how["first"]], arms, samples, report


def call(lines, log, threads=1):
    """Run commands, their output at the end of a file; run before, they go on or do nothing."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        for line in lines:
            print(f"$ python {line}", file=file, flush=True)
            argv, env = [sys.executable, *shlex.split(line)], {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if subprocess.run(argv, env=env, stdout=file, stderr=file).returncode:
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
        row = {key: found[name][key] for key in ("nfe", "encoder", "classifier", "accuracy")}
        run = Path(line.split()[1])
        state = re.fullmatch(r"state_0*(\d+)\.safetensors", run.name)
        lines = read_log(run.parent if state else run)
        if state:                                 # what the log says there
            lines = [x for x in lines if x["step"] <= int(state[1])]
            row |= {key: lines[-1][key] for key in ("mse_flow", "mse_jump", "grad_norm")}
        if run.is_relative_to(exp):
            late = lines[-max(1, len(lines) // 5):]
            row |= {"norm": max(x["grad_norm_max"] for x in lines),
                    "mse": statistics.mean(x["mse"] for x in late),
                    "seconds": lines[-1]["seconds"] / lines[-1]["step"], "steps": lines[-1]["step"]}
        rows[name] = row
    return rows


def spaced(count, n):
    """n of the indices below count, evenly: of images in the order of their classes, some of each."""
    return [round(i * (count - 1) / (n - 1)) for i in range(n)]


# ---- What it shows
COLUMNS = {   # ratio: as the arms of a seed share its teacher and noise, it compares within seeds
    "nfe": ("NFE", "g"), "encoder": ("Frechet distance, encoder", ".3g"),
    "ratio": ("of the first row's", ".3g"), "classifier": ("Frechet distance, classifier", ".3g"),
    "accuracy": ("class accuracy", ".4f"),
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
        seeds = [{**row, "ratio": row["encoder"] / first[seed]["encoder"]} for seed, row in found.items()]
        shown[name] = {}
        for key, (title, form) in COLUMNS.items():
            if values := [row[key] for row in seeds if key in row]:
                deviation = f" ± {statistics.stdev(values):.2g}" if len(set(values)) > 1 else ""
                shown[name][title] = format(statistics.mean(values), form) + deviation
    return markdown(shown)


PLOTS = {   # what finds a curve, x and the curve's other words in a row's name; what x is; a panel's number
    "b-length": (r"(.*), step (\d+)()", "step", ("encoder", "mse_jump", "mse_flow", "grad_norm")),
    "c": (r"(.*), (\d+) steps(, .*)", "steps of the teacher's solver", ("encoder",)),
    "f": (r"(.*), (\d+) steps()", "steps of the teacher", ("encoder",)),
    "h": (r"(.*), NFE (\d+)()", "NFE", ("encoder",)),
    "k": (r"(MFD|MeanFlow)(?:, step (\d+))?()", "cost, thousand F", ("encoder", "classifier", "accuracy"))}


def plot(letter, rows, path):
    """A PNG: mean and range over seeds."""
    from matplotlib.figure import Figure
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
    figure = Figure(figsize=(3 + 3.4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, key in zip(axes, panels, strict=True):
        for label, points in curves.items():
            x = sorted(k for k, seeds in points.items() if key in seeds[0])
            mean, low, high = ([f(row[key] for row in points[k]) for k in x]
                               for f in (statistics.mean, min, max))
            line, = ax.plot(x, mean, marker="o", markersize=3, linewidth=1, label=label)
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        title = COLUMNS[key][0] if key in COLUMNS else key
        ax.set(title=title, xlabel=what, yscale="linear" if key == "accuracy" else "log")
        ax.grid(alpha=0.3)
        if letter in "cfh":                       # where x doubles from point to point
            ticks = sorted({x for points in curves.values() for x in points})
            ax.set_xscale("log")
            ax.set_xticks(ticks, ticks)
            ax.set_xticks([], minor=True)
    axes[0].legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=EXPERIMENTS, help="its letter")
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0], help="of the runs to start from")
    parser.add_argument("--jobs", type=whole(), default=2, help="at a time")
    parser.add_argument("--threads", type=whole(), default=1, help="of a job")
    parser.add_argument("--plot", metavar="PNG", help=f"draw a curve too: of {', '.join(PLOTS)}")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--print", metavar="FOLDER", help="run nothing: of the numbers kept there")
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
