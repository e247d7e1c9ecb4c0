"""The ablations: trains, samples and measures the arms of an experiment, and prints its table in Markdown.

    for seed in 0 1 2; do SEED=$seed ./sanity/run.sh; done             # where the arms start: latents, decoder, teacher, CMT student
    python docs/experiments/run.py b --seeds 0 1 2                     # -> runs/experiments/b; a second call goes on or prints again
    python docs/experiments/run.py b --list                            # the commands alone
    python docs/experiments/run.py h --plot docs/images/h.png          # a curve too (matplotlib)
    python docs/experiments/run.py b --seeds 0 1 2 --print docs/experiments/numbers    # the table of a page again, from its numbers

An arm is a chain of the stages' own commands, on one thread each, --jobs of them at a time (d, which compares times, wants --jobs 1
--threads 2); then 5,000 samples for each number of evaluations, then sanity/report.py over all arms of a seed, with one classifier for
all seeds. The settings are the sanity run's but for what the arm says: gradients are clipped at 1, and the learning rate is higher than
the published 1e-4. Distances in the encoder's space compare within an experiment only: other latents are another space.
"""
import argparse
import json
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
from model import InputError, command, provenance, read_json, read_log, write_atomically, write_json  # noqa: E402

NUMBERS = "runs/experiments"


def slug(name):
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in name)


COMMON = "--seed {seed} --precision fp32 --log-every 50 --save-every 500 --keep 1"            # on a GPU too
ENCODE = "encode_latents.py --data-path data/digits/train --image-size 32 --encoder-size 32 --batch-size 256 --workers 0"
TEACHER = ("train_teacher.py --preset DiTDH-mini --time-shift 2.5 --batch-size 32 --lr 2e-3 --lr-final 5e-5 --decay-from 0.4 "
           "--latents {run}/latents " + COMMON)
CMT = "train_cmt.py --batch-size 32 --pairs 16 --lr 1e-3 --lr-final 5e-5 --ema 0.99 " + COMMON
MFD = ("train_meanflow.py --steps 1450 --batch-size 64 --lr 4e-4 --lr-final 1e-5 --decay-from 0.3 --ema 0.995 --derivative fd "
       "--loss-form mean --loss-power 0.5 --loss-eps 0.1 --latents {run}/latents " + COMMON)      # a later flag overrules an earlier one
MFT = MFD + " --eta 0"
PUBLISHED_WEIGHT = "--loss-form published --loss-power 1 --loss-eps 1e-3"
PUBLISHED_RATE = "--lr 1e-4 --lr-final 1e-4"


def with_published(ingredients, stage):
    return f"docs/experiments/published.py {ingredients} {stage}" if ingredients else stage


def distill(more="", teacher="{run}/teacher", init="{run}/cmt", stage=MFD, ingredients=""):
    return [with_published(ingredients, f"{stage} --teacher {teacher} --init {init} --out {{out}} {more}")]


def teacher_and_cmt(steps, folder, teacher="", cmt=""):
    """A teacher of so many steps and its CMT student, in `folder`/teacher and `folder`/cmt. The average forgets its start."""
    ema = min(0.998, 1 - 5.2 / steps)
    return [f"{TEACHER} --ema {ema:.5g} --steps {steps} --out {folder}/teacher {teacher}",
            f"{CMT} --steps 250 --teacher {folder}/teacher --out {folder}/cmt {cmt}"]


def explosion(steps=1450, mfd="", only=None, c=None):
    """a: with and without CMT; then each ingredient of the published code alone and together, at our learning rate and at theirs. mfd:
    more flags of every arm; only: recipes, not all; c: another constant of their weight, too."""
    starts = {"CMT": "{run}/cmt", "teacher's weights": "{run}/teacher", "random weights": "{exp}/random"}
    recipes = {"ours": ("", ""), "labels": ("labels", ""), "embedding": ("embedding", ""), "stencil": ("", "--derivative fd-central"),
               "weight": ("", PUBLISHED_WEIGHT), "weight, lr 1e-4": ("", f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}"),
               "all": ("labels,embedding", f"{PUBLISHED_WEIGHT} --derivative fd-central"),
               "all, lr 1e-4": ("labels,embedding", f"{PUBLISHED_WEIGHT} --derivative fd-central {PUBLISHED_RATE}")}
    if c:
        recipes[f"weight, c = {c}"] = ("", f"{PUBLISHED_WEIGHT} --loss-eps {c}")
    arms = {f"{start}, {recipe}": distill(f"{mfd} {more} --steps {steps}", init=init, ingredients=ingredients)
            for start, init in starts.items() for recipe, (ingredients, more) in recipes.items()
            if start == "teacher's weights" or recipe in ("ours", "weight", f"weight, c = {c}", "all", "all, lr 1e-4")}
    cmt = with_published("labels,embedding,times", f"{CMT} --steps 250 --teacher {{run}}/teacher --out {{out}}-cmt")
    for recipe in ("all", "all, lr 1e-4"):        # a published start is CMT as it was published, too
        arms[f"CMT, {recipe}"] = [cmt, *distill(f"{mfd} {recipes[recipe][1]} --steps {steps}", init="{out}-cmt", ingredients="labels")]
    return dict(arms={name: chain for name, chain in arms.items() if not only or name.split(", ", 1)[1] in only}, also=TEACHER_50)


def elsewhere(encoder, teacher=2600, more=("", "", ""), **arms):
    """a, at another latent dimension or with another network: everything from the latents on anew, in {exp}/base. The dimension grows by
    the number of tokens, as a token of more channels than the head is wide (160) could not be told from noise; where a step takes long,
    the arms are fewer and have fewer. teacher: its steps; more: flags of the teacher, CMT and MFD."""
    first = [f"sanity/random_encoder.py --out {{run}}/encoder {encoder}",
             f"{ENCODE} --out {{run}}/latents --encoder {{run}}/encoder",
             "sanity/train_decoder.py --data-path data/digits/train --latents {run}/latents --out {run}/decoder --seed {seed}",
             *teacher_and_cmt(teacher, "{run}", *more[:2])]
    experiment = explosion(mfd=more[2], **arms)
    experiment["arms"] = {name: chain for name, chain in experiment["arms"].items() if not name.startswith("random")}
    return dict(run="{exp}/base", first=first, **experiment)


TEACHER_50 = {"teacher": ("{run}/teacher", "--nfe 50")}
PLAIN = "--loss-power 0"                                                                           # takes no --loss-eps
WEIGHTS = {"p = 0": PLAIN, "p = 0.5, c = 0.1": "", "p = 0.5, c = 1e-3": "--loss-eps 1e-3", "p = 1, c = 0.1": "--loss-power 1",
           "p = 1, c = 1e-2": "--loss-power 1 --loss-eps 1e-2",
           "published, c = 1e4": f"{PUBLISHED_WEIGHT} --loss-eps 1e4", "published": PUBLISHED_WEIGHT,
           "published, lr 1e-4": f"{PUBLISHED_WEIGHT} {PUBLISHED_RATE}"}
# Sums, as other public codes have them: S / (S + c) is m / (m + c / 1024), with m the mean over the 1,024 numbers of a latent.
CONSTANTS = {"p = 0.5, c = 0.1": "", "p = 0.5, c = 1e-2": "--loss-eps 1e-2",
             **{f"p = 1, c = {c}, summed": f"--loss-power 1 --loss-eps {c / 1024:.3g}" for c in (1, 0.01)},
             "published": PUBLISHED_WEIGHT}
# Constant rates, and a state every 2,000 steps: (flags, steps).
LENGTH = "--log-every 500 --save-every 2000 --keep-every 2000 --decay-from 0 --compile"
LONG = {"published, lr 1e-3": (f"{PUBLISHED_WEIGHT} --lr 1e-3 --lr-final 1e-3", 30_000),
        "published, lr 1e-4": (f"{PUBLISHED_WEIGHT} --lr 1e-4 --lr-final 1e-4", 30_000),
        "p = 0.5, c = 0.1, lr 1e-3": ("--lr 1e-3 --lr-final 1e-3", 6000)}
# k: MeanFlow from random weights. In forward passes (F) of a row a backward pass is 2, so flow matching is 3, CMT 3 + 1 (16 solver
# steps, 16 pairs), MFD 3 + 1 + 2 / 4 (two ends of a difference in one row of four), MeanFlow 3 + 2 / 4. 3,120 steps cost what all of
# teacher, CMT and MFD do.
BEFORE_MFD, EACH_MFD, EACH_MEANFLOW = 2600 * 32 * 3 + 250 * 32 * 4, 64 * 4.5, 64 * 3.5
RANDOM = f"{TEACHER} --steps 1 --lr 1e-12 --lr-final 1e-12 --out {{exp}}/random"
MEANFLOW = (f"{MFT} --init {{exp}}/random --out {{out}} --steps 3120 --lr-final 5e-5 --decay-from 0.4 --ema 0.998 "
            "--save-every 520 --keep-every 520")
MEANFLOW_RATE, MFD_RATE = "2e-3", "8e-4"                                                          # the better ones in k-rates
TEACHERS = (300, 800, 2600, 6000)                                                                 # f: steps of their training
SOLVERS = [(solver, steps) for solver in ("euler", "heun") for steps in (2, 4, 8, 16, 32)]
EXPERIMENTS = {   # first: commands before the arms; arms: {name: commands, the last one's --out is sampled}; nfe: evaluations
    "a": dict(first=[RANDOM], **explosion()),
    "a-768": elsewhere("--width 48 --patch 8"),
    "a-3072": elsewhere("--width 48 --patch 4", steps=1000, c="9.4e4"),         # (0.1 C H W)^2
    "a-12288": elsewhere("--width 48 --patch 2", steps=1000, only=("ours", "labels", "embedding", "weight", "all")),
    "a-49152": elsewhere("--width 48 --patch 1", teacher=1300, steps=300, only=("ours", "weight")),
    "a-S": elsewhere("--width 64 --patch 8", steps=1000, only=("ours", "weight"),
                     more=("--preset DiTDH-S --lr 3e-4 --lr-final 1e-5", "--lr 1.5e-4 --lr-final 1e-5", "--lr 1e-4 --lr-final 1e-5")),
    "b": dict(arms={f"{name}, {weight}": distill(flags, stage=stage.replace("--loss-eps 0.1 ", "") if flags == PLAIN else stage)
                    for name, stage in (("MFD", MFD), ("MFT", MFT))
                    for weight, flags in WEIGHTS.items()}),
    "b-constants": dict(arms={name: distill(flags) for name, flags in CONSTANTS.items()}),
    "b-length": dict(arms={name: distill(f"{flags} {LENGTH} --steps {steps}") for name, (flags, steps) in LONG.items()},
                     also={"CMT, step 0": ("{run}/cmt", "--nfe 1")}
                     | {f"{name}, step {k}": (f"{{exp}}/{slug(name)}/state_{k:08d}.safetensors", "--nfe 1")
                        for name, (_, steps) in LONG.items() for k in range(2000, steps + 1, 2000)}),
    "c": dict(arms={f"{solver}, {n} steps": [f"{CMT} --steps 1700 --teacher {{run}}/teacher --out {{out}} --solver {solver} "
                                             f"--teacher-steps {n}"] for solver, n in SOLVERS}
              | {"euler, 16 steps, even times": [with_published("times", f"{CMT} --steps 1700 --teacher {{run}}/teacher --out {{out}}")]},
              nfe=(1, 2, 4)),
    "d": dict(arms={"exact": distill("--derivative jvp")}
              | {f"D = {d}": distill(f"--delta-t {d}") for d in ("1e-4", "1e-3", "5e-3", "1e-2")}, nfe=(1, 2)),
    "e": dict(first=teacher_and_cmt(500, "{exp}/weak"),
              arms={f"{kind} teacher, {name}": chain for kind, folder in (("good", "{run}"), ("weak", "{exp}/weak")) for name, chain in {
                  "MFD": distill(teacher=f"{folder}/teacher", init=f"{folder}/cmt"),
                  "eta 0.5": distill("--eta 0.5", teacher=f"{folder}/teacher", init=f"{folder}/cmt"),
                  "eta 1 to 0": distill("--eta 1 0", teacher=f"{folder}/teacher", init=f"{folder}/cmt"),
                  "MFT": distill(stage=MFT, teacher=f"{folder}/teacher", init=f"{folder}/cmt"),
                  "MFD then MFT": [f"{MFD} --steps 1000 --teacher {folder}/teacher --init {folder}/cmt --out {{out}}-first",
                                   f"{MFT} --steps 450 --lr 1e-4 --init {{out}}-first --out {{out}}"]}.items()}, nfe=(1, 2),
              also={f"{kind} teacher": (f"{folder}/teacher", "--nfe 50") for kind, folder in (("good", "{run}"), ("weak", "{exp}/weak"))}),
    "f": dict(first=[line for n in TEACHERS for line in teacher_and_cmt(n, f"{{exp}}/{n}")],
              arms={f"student, {n} steps": distill(teacher=f"{{exp}}/{n}/teacher", init=f"{{exp}}/{n}/cmt") for n in TEACHERS},
              also={f"teacher, {n} steps": (f"{{exp}}/{n}/teacher", "--nfe 50") for n in TEACHERS}),
    "g": dict(arms={f"w = {w}": [f"{CMT} --steps 250 --guidance {w} --teacher {{run}}/teacher --out {{out}}-cmt",
                                 *distill(f"--guidance {w}", init="{out}-cmt")] for w in (1, 1.5, 2, 3)},
              also={f"teacher, w = {w}": ("{run}/teacher", f"--nfe 50 --guidance {w}") for w in (1, 1.5, 2, 3)}),
    "h": dict(arms={}, also={f"teacher, {solver}, NFE {n}": ("{run}/teacher", f"--nfe {n} --solver {solver}")
                             for solver in ("euler", "heun") for n in (2, 4, 8, 16, 32, 50, 100)}
              | {f"{name.upper()}, NFE {n}": (f"{{run}}/{name}", f"--nfe {n}") for name in ("cmt", "mfd", "mft") for n in (1, 2, 4)}),
    "k-rates": dict(first=[RANDOM], arms={
        "MeanFlow, lr 2e-3": [f"{MEANFLOW} --lr 2e-3"], "MeanFlow, lr 7e-4": [f"{MEANFLOW} --lr 7e-4"],
        "MeanFlow, published weight, lr 7e-4": [f"{MEANFLOW} --lr 7e-4 {PUBLISHED_WEIGHT}"],
        "MFD, lr 4e-4": distill(), "MFD, lr 8e-4": distill("--lr 8e-4")}),
    "k": dict(first=[RANDOM], arms={"MeanFlow": [f"{MEANFLOW} --lr {MEANFLOW_RATE}"],
                                    "MFD": distill(f"--lr {MFD_RATE} --save-every 290 --keep-every 290")},
              also={"MFD, step 0": ("{run}/cmt", "--nfe 1")}
              | {f"{name}, step {k}": (f"{{exp}}/{name}/state_{k:08d}.safetensors", "--nfe 1")
                 for name, each, steps in (("MFD", 290, 1450), ("MeanFlow", 520, 3120)) for k in range(each, steps, each)}),
    "k-direction": dict(arms={name: distill("--eta 0", ingredients=ingredients)
                              for name, ingredients in (("MFT", ""), ("MFT, direction h", "direction"))}),
    "k-long": dict(first=[RANDOM], arms={"MeanFlow, twice": [f"{MEANFLOW} --lr {MEANFLOW_RATE} --steps 6240"]}),
}


def plan(letter, seed):
    """-> folder, commands to run first, {arm: (commands, network)}, {sample's name: (command, file, nfe)}, the report's command"""
    experiment, exp = EXPERIMENTS[letter], f"runs/experiments/{letter}/{seed}"
    run = experiment.get("run", "runs/sanity" + (f"-{seed}" if seed else "")).format(exp=exp)

    def fill(text, out=""):
        return text.replace("{run}", run).replace("{exp}", exp).replace("{out}", out).replace("{seed}", str(seed))

    arms = {name: [fill(line, f"{exp}/{slug(name)}") for line in chain] for name, chain in experiment["arms"].items()}
    wanted = {f"{name}, {n} step{'s' * (n > 1)}" if len(experiment.get("nfe", (1,))) > 1 else name: (f"{exp}/{slug(name)}", f"--nfe {n}")
              for name in arms for n in experiment.get("nfe", (1,))}
    wanted |= {name: (fill(network), flags) for name, (network, flags) in experiment.get("also", {}).items()}
    samples = {name: (f"sample.py {network} --decoder {run}/decoder {flags} --num-samples 5000 --batch-size 250 --seed {seed} --out "
                      f"{exp}/samples/{slug(name)}.npz", f"{name}={exp}/samples/{slug(name)}.npz")
               for name, (network, flags) in wanted.items()}
    report = f"sanity/report.py --run {exp} --data data/digits --latents {run}/latents --decoder {run}/decoder --seed 0 --samples "
    return exp, [fill(line) for line in experiment.get("first", [])], arms, samples, report


def call(line, log, threads):
    """Run a command, its output at the end of a file: its exit status. Run before, it goes on or does nothing."""
    with open(log, "a") as file:
        file.write(f"$ python {line}\n")
        file.flush()
        return subprocess.run([sys.executable, *shlex.split(line)], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode


def do(letter, seed, pool, threads):
    """Every command of a seed, as far as it has not been done. An arm that diverges is left out and says so; any other failure is one."""
    exp, first, arms, samples, report = plan(letter, seed)
    Path(ROOT / exp).mkdir(parents=True, exist_ok=True)

    def chain(name, lines):
        log = ROOT / exp / f"{slug(name)}.txt"
        for line in lines:
            done = line.startswith("encode") and (ROOT / line.split(" --out ")[1].split()[0] / "latents.json").exists()
            if not done and call(line, log, threads):
                if "not finite" not in log.read_text().splitlines()[-1]:
                    raise InputError(f"experiment {letter}, seed {seed}, {name}: a command failed, see {log}")
                print(f"{letter}, seed {seed}: {name} DIVERGED, see {log}", flush=True)
                return False
        print(f"{letter}, seed {seed}: {name}", flush=True)
        return True

    if not chain("first", first):
        raise InputError(f"experiment {letter}, seed {seed} cannot begin")
    ended = dict(zip(arms, pool.map(chain, arms, arms.values()), strict=True))
    lost = {f"{exp}/{slug(name)}" for name in arms if not ended[name]}
    whole = {name: sample for name, sample in samples.items() if sample[0].split()[1] not in lost}
    report += " ".join(shlex.quote(column) for _, column in whole.values())
    if not all(pool.map(chain, whole, ([line] for line, _ in whole.values()))) or not chain("report", [report]):
        raise InputError(f"experiment {letter}, seed {seed}: its samples could not be measured")
    write_json(ROOT / NUMBERS / f"{letter}-{seed}.json", {**provenance(), "threads": threads, "rows": measured(letter, seed)})


def measured(letter, seed):
    """{row: its distances, if it could be sampled, and its training, if this experiment trained it}."""
    exp, _, _, samples, _ = plan(letter, seed)
    rows, found = {}, json.loads((ROOT / exp / "report.json").read_text())["rows"]
    for name, (line, _) in samples.items():
        rows[name] = {key: found[name][key] for key in ("nfe", "encoder", "classifier", "accuracy")} if name in found else {}
        run = ROOT / line.split()[1]
        state = re.fullmatch(r"state_0*(\d+)\.safetensors", run.name)
        run = run.parent if state else run
        lines = read_log(run)
        if state:                                                                   # what the log says there
            lines = [x for x in lines if x["step"] <= int(state[1])]
            rows[name] |= {key: lines[-1][key] for key in ("mse_flow", "mse_jump", "grad_norm")}
        if lines and run.is_relative_to(ROOT / exp):
            late = [x["mse"] for x in lines[-max(1, len(lines) // 5):] if x["mse"] is not None]
            rows[name] |= dict(norm=max(x["grad_norm_max"] for x in lines), mse=statistics.mean(late) if late else None,
                               seconds=lines[-1]["seconds"] / lines[-1]["step"], steps=lines[-1]["step"])
    return rows


def numbers(letter, seeds, folder):
    """{row: {seed: its numbers}} from the files LETTER-SEED.json of a folder."""
    rows = {name: {} for name in plan(letter, 0)[3]}                                 # in the experiment's order
    for seed in seeds:
        found = read_json(Path(folder) / f"{letter}-{seed}.json")
        for name, row in found["rows"].items():
            rows.setdefault(name, {})[seed] = {**row, "device": found["device"]}
    return {name: found for name, found in rows.items() if found}


def table(rows):
    """Markdown: means over seeds, with the standard deviation over seeds where there are several. As the arms of a seed share its teacher
    and noise, one column compares within seeds: an arm's distance in units of the first one's."""
    def cell(values, form=".3g"):
        values = [x for x in values if x is not None]
        spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        return format(statistics.mean(values), form) + spread if values else ""

    count, first = max(map(len, rows.values())), next(iter(rows.values()))
    out = [f"{count} seed{'s' * (count > 1)}", "",
           "| | NFE | Frechet distance, encoder | of the first row's | Frechet distance, classifier | class accuracy | steps | "
           "largest gradient norm | mse, last fifth | ms a step |", "|---|---|---|---|---|---|---|---|---|---|"]
    for name, found in rows.items():
        whole = {seed: row for seed, row in found.items() if "encoder" in row}
        trained = [row for row in found.values() if "norm" in row]
        cells = ["", "not finite", "", "", ""]
        if whole:
            ratios = [row["encoder"] / first[seed]["encoder"] for seed, row in whole.items() if "encoder" in first.get(seed, {})]
            x = list(whole.values())
            cells = [str(x[0]["nfe"]), cell([row["encoder"] for row in x]), cell(ratios),
                     cell([row["classifier"] for row in x]), cell([row["accuracy"] for row in x], ".4f")]
            cells[1] += f" ({len(found) - len(whole)} of {len(found)} runs not finite)" if len(whole) < len(found) else ""
        if trained:
            cells += [", ".join(sorted({str(row["steps"]) for row in trained})), cell([row["norm"] for row in trained]),
                      cell([row["mse"] for row in trained])]
            if len({row["device"] for row in trained}) == 1:                      # seconds of one machine compare
                cells.append(cell([1000 * row["seconds"] for row in trained], ".0f"))
        out.append(f"| {name} | " + " | ".join(cells + [""] * (9 - len(cells))) + " |")
    return "\n".join(out)


def plot(letter, rows, path):
    """A PNG: distance in the encoder's space against the first number in an arm's name, a curve for each of the names without it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves, what = {}, ""
    jumps = len(EXPERIMENTS[letter].get("nfe", (1,))) > 1                            # then they end a name, and are no arm's number
    for name, found in rows.items():
        point = re.search(r"(, )?(NFE |D = |w = )?(\d[\d.]*(e-?\d+)?)( steps?)?", name)
        distances = [row["encoder"] for row in found.values() if "encoder" in row]
        if point and distances and not (jumps and point.end() == len(name)):
            family = name.replace(point[0], "", 1).strip(", ") or "student"
            curves.setdefault(family, {}).setdefault(float(point[3]), []).extend(distances)
            what = (point[2] or point[5] or what).strip(" =")
    figure, ax = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for family, points in curves.items():
        x = sorted(points)
        y, low, high = ([f(points[k]) for k in x] for f in (statistics.mean, min, max))
        line, = ax.plot(x, y, marker="o", markersize=3, linewidth=1, label=family)
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
    seeds = sorted({seed for found in rows.values() for seed in found})
    title = f"experiment {letter}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}{': mean and range' * (len(seeds) > 1)}"
    ax.set(xscale="log", yscale="log", xlabel=what, ylabel="Frechet distance, encoder", title=title)
    ticks = sorted({x for points in curves.values() for x in points})
    ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def plot_length(rows, path):
    """A PNG: four numbers against the step, a curve for each of the names before ", step K"."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharex=True)
    names = {"encoder": "Frechet distance, encoder, one step", "mse_jump": "mse of rows with s < t", "mse_flow": "mse of rows with s = t",
             "grad_norm": "gradient norm, mean"}
    (start,) = rows.pop("CMT, step 0").values()
    for ax, (key, title) in zip(axes.flat, names.items(), strict=True):
        for arm in LONG:
            points = {int(name.split(", step ")[1]): found[0] for name, found in rows.items() if name.startswith(f"{arm}, step ")}
            points = {0: start, **points} if key == "encoder" else points
            ax.plot(list(points), [row[key] for row in points.values()], marker="o", markersize=3, linewidth=1, label=arm)
        ax.set(yscale="log", title=title)
        ax.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for ax in axes[1]:
        ax.set_xlabel("step")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def plot_cost(rows, path):
    """A PNG: distance and class accuracy of both roads against their cost, mean and range over seeds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    roads, ends = {"MFD": {}, "MeanFlow": {}}, {"MFD": 1450, "MeanFlow": 3120}
    for name, found in rows.items():
        road, _, step = name.partition(", step ")
        step = int(step or ends[road])
        cost = BEFORE_MFD + EACH_MFD * step if road == "MFD" else EACH_MEANFLOW * step
        roads[road][cost / 1000] = list(found.values())
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    titles = {"encoder": "Frechet distance, encoder", "classifier": "Frechet distance, classifier", "accuracy": "class accuracy"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for road, points in roads.items():
            x = sorted(points)
            y, low, high = ([f(row[key] for row in points[k]) for k in x] for f in (statistics.mean, min, max))
            label = {"MFD": "teacher, CMT, MFD", "MeanFlow": "MeanFlow alone"}[road]
            line, = ax.plot(x, y, marker="o", markersize=3, linewidth=1, label=label)
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2)
        ax.set(title=title, xlabel="cost, thousand forward passes of a row", yscale="linear" if key == "accuracy" else "log")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a job (default %(default)s)")
    parser.add_argument("--plot", metavar="PNG", help="draw the distances too (default: the table alone)")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--print", metavar="FOLDER", help="run nothing, print and plot the numbers kept in this folder, LETTER-SEED.json")
    args = parser.parse_args()
    for seed in args.seeds:
        if args.list:
            _, first, arms, samples, report = plan(args.experiment, seed)
            report += " ".join(shlex.quote(column) for _, column in samples.values())
            lines = [*first, *(line for chain in arms.values() for line in chain), *(line for line, _ in samples.values()), report]
            print("\n".join(f"python {line}" for line in lines))
        elif not args.print:
            with ThreadPoolExecutor(args.jobs) as pool:
                do(args.experiment, seed, pool, args.threads)
    if not args.list:
        rows = numbers(args.experiment, args.seeds, args.print or ROOT / NUMBERS)
        print(table(rows))
        if args.plot and args.experiment == "b-length":
            plot_length(rows, args.plot)
        elif args.plot and args.experiment == "k":
            plot_cost(rows, args.plot)
        elif args.plot:
            plot(args.experiment, rows, args.plot)


if __name__ == "__main__":
    command(main)
