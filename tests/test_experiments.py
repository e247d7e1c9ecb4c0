"""docs/experiments: commands are valid, the published code's ingredients do what they say, and pages say what
their numbers say."""
import importlib
import re
import shlex
import subprocess
import sys

import pytest
import torch

import encode_latents
import model
import train_cmt
from docs.experiments import meaning, objects, published, run, semantic
from sanity import synthetic

NUMBERS = run.ROOT / "docs/experiments/numbers"


# ---- Commands
def parsed(lines):
    """Every command's flags are its script's, and no two write to one place. -> where they write."""
    outs = []
    for line in lines:
        argv = shlex.split(line)
        argv = argv[2:] if argv[0].endswith("published.py") else argv
        script = importlib.import_module(argv[0].removesuffix(".py").replace("/", "."))
        args = script.parse_args(argv[1:])
        outs += [str(args.out)] if "--out" in argv else []
    assert len(set(outs)) == len(outs)
    return outs


@pytest.mark.parametrize("letter", run.EXPERIMENTS)
def test_commands(letter):
    _, first, arms, samples, report = run.plan(letter, 1)
    parsed([*first, *(line for chain in arms.values() for line in chain), *samples.values(), report])
    columns = shlex.split(report.partition(" --samples ")[2])
    for column, (name, line) in zip(columns, samples.items(), strict=True):    # as report.py reads it
        assert column.rpartition("=")[::2] == (name, line.split(" --out ")[1])


def test_commands_of_photographs():
    assert set(objects.FILES.values()) < set(parsed(objects.TRAINING + objects.SAMPLING))
    for arm in meaning.ENCODERS:
        groups, rows = meaning.plan(arm, meaning.RATES[1])
        lines = dict.fromkeys(line for chains in groups for chain in chains for line in chain)
        assert set(rows.values()) <= set(parsed(lines))
    for arm in semantic.ARMS:
        before, lines, rows = semantic.plan(arm, "lite", semantic.RATES[1])
        assert set(rows.values()) <= set(parsed(before + lines)) and before == semantic.plan(arm, "lite", None)[0]


# ---- The published code's ingredients
def test_published_ingredients(monkeypatch):
    pools = train_cmt.TrajectoryPool
    for kind, name in ((model.DiTDH, "__init__"), (model.DiTDH, "forward"), (pools, "__init__")):
        monkeypatch.setattr(kind, name, getattr(kind, name))    # all are put back
    published.random_embedding()
    net = model.DiTDH(2, 4, num_classes=3, time_difference=True, **model.DIT_PRESETS["DiTDH-mini"])
    assert net.r_embedder.mlp[2].weight.std() > 0
    published.drop_labels()
    seen = []
    net.y_embedder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0] == 3))
    for t in (0.7, 0.71):
        y = torch.ones(2000, dtype=torch.long)
        net(torch.zeros(2000, 4, 2, 2), torch.full((2000,), t), y, torch.zeros(2000))
    assert all(0.07 < part.float().mean() < 0.13 for part in seen) and not torch.equal(*seen)
    published.even_times(pools)
    pool = pools(None, None, model.ode_times(4, 3.0), range(1), 4, 0, "cpu", 4)
    assert pool.times.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_published_runs(tmp_path):
    latents = synthetic.random_latents(16, (12, 4, 4))
    encode_latents.write_latents(tmp_path / "latents", latents, [i % 3 for i in range(16)])
    synthetic.write_teacher(tmp_path / "teacher", tmp_path / "latents", 3, "DiTDH-mini")
    stage = "train_cmt.py --teacher teacher --out out --batch-size 4 --steps 1 --pairs 4 --teacher-steps 2"
    script = run.ROOT / "docs/experiments/published.py"
    argv = [sys.executable, script, "labels,embedding,times", *stage.split()]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and '"step": 1' in result.stdout, result.stderr


# ---- Pages and their numbers
def page(letter):
    return next(run.ROOT.glob(f"docs/experiments/{letter}-*.md")).read_text()


def rows(name):
    return model.read_json(NUMBERS / f"{name}.json")["rows"]


def test_table_of_two_seeds():
    """Means, deviations, ratios within seeds."""
    first, other = ({seed: dict(nfe=1, encoder=x, classifier=2.0, accuracy=0.5) for seed, x in enumerate(distances)}
                    for distances in ((1.0, 3.0), (2.0, 3.0)))
    lines = run.table({"exact": first, "D = 1e-4": other}).splitlines()
    assert lines[2].startswith("| exact | 1 | 2 ± 1.4 | 1 | 2 | 0.5000 |")
    assert lines[3].startswith("| D = 1e-4 | 1 | 2.5 ± 0.71 | 1.5 ± 0.71 | 2 | 0.5000 |")


@pytest.mark.parametrize("letter, seeds", [("b", 3), ("c", 3), ("e", 1), ("f", 1), ("g", 1), ("k", 3)])
def test_tables_of_pages(letter, seeds):
    """A page's table has the numbers that run.py --print prints; rows with brackets have others."""
    cells = [line.split("|", 2)[2] for line in page(letter).splitlines() if line.startswith("| ")]
    found = re.findall(r"\d+\.\d+", "".join(cell for cell in cells if "(" not in cell))
    printed = run.table(run.numbers(letter, range(seeds), NUMBERS))
    assert len(found) > 10 and not set(found) - set(re.findall(r"\d+\.\d+", printed))


def test_page_j():
    found = {arm: model.read_json(NUMBERS / f"j-{arm}.json")["in latents"] for arm in ("semantic", "random")}

    def change(arm, seed, w):
        distance, before = (found[arm][f"teacher {seed}, w = {x}"]["distance"] for x in (w, 1))
        return distance / before - 1
    for w in (1.5, 2):
        cells = [", ".join(f"{change(arm, seed, w):.0%}" for seed in (0, 1)) for arm in found]
        assert all(f"{cell} (" in page("j") for cell in cells), cells
    gains = [change(arm, 0, 1.5) + change(arm, 1, 1.5) for arm in found]
    assert round(gains[0] / gains[1]) == 3 and "three times" in page("j").splitlines()[2]


def test_headlines_of_c_h_and_k():
    c, h, k = rows("c-0"), rows("h-0"), [rows(f"k-{seed}") for seed in range(3)]
    ratios = [c[f"{solver}, {n} steps, 1 step"][space] / h[f"teacher, {solver}, NFE {n * cost}"][space]
              for solver, cost in (("euler", 1), ("heun", 2)) for n in (2, 4, 8, 16, 32) if n * cost <= 32
              for space in ("encoder", "classifier")]
    assert f"{min(ratios):.1f} to {max(ratios):.1f} times" in page("c").splitlines()[2]
    draws = [re.findall(r"(0\.\d+) ±", line) for line in page("h").splitlines()]
    teacher, student, *_ = (list(map(float, draw)) for draw in draws if draw)
    encoder, classifier = (b / a for a, b in zip(teacher, student, strict=True))
    assert f"{encoder - 1:.0%} farther" in page("h") and f"{1 - classifier:.0%} nearer" in page("h")
    for space in ("encoder", "classifier"):
        one, two, three = (row["MeanFlow"][space] / row["MFD"][space] for row in k)
        assert f"{one:.2f}, {two:.2f} and {three:.2f} times" in page("k")
    assert sum(row["MeanFlow"]["norm"] > 1e5 for row in k) == 1
    assert "one seed of three it explodes" in page("k")
