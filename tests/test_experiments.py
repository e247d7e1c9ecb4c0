"""The ablations of docs/experiments: their commands are valid, and the published code's ingredients do what they say."""
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
from docs.experiments import meaning, published, run, semantic
from sanity import synthetic

def parsed(lines):
    """Every command's flags are its script's. -> where they write."""
    for line in lines:
        argv = shlex.split(line)
        argv = argv[2:] if argv[0].endswith("published.py") else argv
        assert "{" not in line
        importlib.import_module(argv[0].removesuffix(".py").replace("/", ".")).parse_args(argv[1:])
    return [line.split(" --out ")[1].split()[0] for line in lines if " --out " in line]


@pytest.mark.parametrize("letter", run.EXPERIMENTS)
def test_the_commands_are_valid(letter):
    _, first, arms, samples, report = run.plan(letter, 1)
    lines = [*first, *(line for chain in arms.values() for line in chain), *(line for line, _ in samples.values())]
    outs = parsed([*lines, report + " ".join(shlex.quote(column) for _, column in samples.values())])
    assert len(set(outs)) == len(outs) == len(lines)                              # no two write to one place
    for name, (_, column) in samples.items():                                     # as report.py reads it
        assert column.rpartition(":")[0].rpartition("=")[0] == name


def test_the_commands_of_meaning_are_valid():
    for arm in meaning.ENCODERS:
        groups, rows = meaning.plan(arm, meaning.RATES[1])
        assert set(rows.values()) <= set(parsed([line for chains in groups for chain in chains for line in chain]))


def test_the_commands_of_semantic_are_valid():
    """Each row's samples are made by one command, after the network that it draws from."""
    for arm in semantic.ARMS:
        lines, rows = semantic.plan(arm, semantic.RATES[1])
        made = set()
        for line in lines:
            argv = shlex.split(line)
            importlib.import_module(argv[0].removesuffix(".py").replace("/", ".")).parse_args(argv[1:])
            if argv[0] == "sample.py":
                assert argv[1] in made
            out = line.partition(" --out ")[2].split()[:1]
            assert not made & {*out}
            made.update(out)
        assert set(rows.values()) <= made and lines[:4] == semantic.plan(arm, None)[0]


def test_the_table_of_semantic():
    """Two arms: in the second, w = 1.5 lowers every distance by a half, and MFD stands at 3."""
    def arm(guided):
        rows = {row: dict.fromkeys(("Lite2, to decoded", "Lite2, to real", "classifier, to decoded", "classifier, to real", "class accuracy",
                                    "class accuracy, Lite2", "spread"), 4.0 * guided if "w = 1.5" in row else 4.0)
                for row in ["real", "decoded real", *semantic.plan("random", "1e-3")[1]]}
        rows["MFD from cmt, mild"]["Lite2, to decoded"] = 3.0
        return {"encoder": {"curvature": 0.5}, "rows": rows, "largest gradient norm": {"MFD from cmt, mild": 7.0}}
    lines = semantic.table({"semantic": arm(1), "random": arm(0.5)}).splitlines()
    assert "| Lite2, to decoded: w = 1.5 | 4 ± 0 (+0.0% ± 0.0%) | 2 ± 0 (-50.0% ± 0.0%) |" in lines
    assert "| MFD from cmt, mild | 3 ± 4 | 4 | 4.000 | 7 | 3 ± 4 | 4 | 4.000 | 7 |" in lines
    assert lines[-1] == "| random | 0.5 |"


def test_the_tables_of_meaning():
    """Two arms: in the second guidance lowers the distance of teacher 0 by a quarter, and raises that of teacher 1."""
    def arm(*distances):
        rows = {f"teacher {seed}, w = {w}": distances[3 * seed + i] for seed in (0, 1) for i, w in enumerate(meaning.GUIDANCE)}
        return {"encoder": {"k-NN": 0.25}, "rows": {name: {
            "distance": d, "to decoded": d / 2, "class accuracy": 0.5, "precision": 0.1, "recall": 1} for name, d in rows.items()}}
    numbers = {"random": arm(1, 1, 1, 1, 1, 1), "labels": arm(4, 3, 5, 2, 4, 3)}
    assert [*meaning.gains(numbers["labels"]["rows"], "distance")] == [0.25, -0.5]
    lines = meaning.table(numbers).splitlines()
    assert lines[3] == "| teacher 0, w = 1.5 | 1 | 3 | 0.5 | 1.5 | 0.500 | 0.500 |"
    assert lines[12] == "| teacher 0, w = 1.5 | 0.10 | 0.10 | 1.00 | 1.00 |"
    assert lines[-1] == "| labels | 0.25 | 25.0%, -50.0% | 25.0%, -50.0% |"
    assert len({line.count("|") for line in lines[:8]}) == len({line.count("|") for line in lines[-4:]}) == 1


def test_effective_rank():
    class Tokens(list):
        def read(self, rows):
            return torch.stack([self[i] for i in rows]), None
    z = torch.randn(500, 8, 2, 2, generator=model.generator("cpu", 0))
    assert 7.9 < meaning.effective_rank(Tokens(z)) <= 8                           # as many directions, of one length
    z[:, 2:] *= 1e-4
    assert 1.9 < meaning.effective_rank(Tokens(z)) < 2.01


def test_published_ingredients(monkeypatch):
    monkeypatch.setattr(model.DiTDH, "__init__", model.DiTDH.__init__)            # both are put back
    monkeypatch.setattr(model.DiTDH, "forward", model.DiTDH.forward)
    monkeypatch.setattr(train_cmt.TrajectoryPool, "__init__", train_cmt.TrajectoryPool.__init__)
    sizes = dict(input_size=2, in_channels=4, num_classes=3, time_difference=True, **model.DIT_PRESETS["DiTDH-mini"])
    published.random_embedding()
    net = model.DiTDH(**sizes)
    assert net.r_embedder.mlp[2].weight.std() > 0
    published.drop_labels()
    seen = []
    net.y_embedder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for t in (0.7, 0.71):
        net(torch.zeros(2000, 4, 2, 2), torch.full((2000,), t), torch.ones(2000, dtype=torch.long), torch.zeros(2000))
    dropped = [(y == 3) for y in seen]
    assert all(0.07 < part.float().mean() < 0.13 for part in dropped) and not torch.equal(*dropped)
    published.even_times(train_cmt.TrajectoryPool)
    pool = train_cmt.TrajectoryPool(None, None, model.ode_times(4, 3.0), range(1), 4, 0, "cpu", 4)
    assert pool.times.tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_published_runs(tmp_path):
    encode_latents.write_latents(tmp_path / "latents", synthetic.random_latents(16, (12, 4, 4)), [i % 3 for i in range(16)])
    synthetic.write_teacher(tmp_path / "teacher", tmp_path / "latents", 3, "DiTDH-mini")
    stage = "train_cmt.py --teacher teacher --out out --batch-size 4 --steps 1 --save-every 0 --pairs 4 --teacher-steps 2"
    argv = [sys.executable, run.ROOT / "docs/experiments/published.py", "labels,embedding,times", *stage.split()]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and '"step": 1' in result.stdout, result.stderr


def test_table_and_plot(tmp_path, monkeypatch):
    """Means and deviations over seeds; an arm that was lost in one of them says so."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for seed, names in ((0, ("exact", "D = 1e-4")), (1, ("exact",))):
        exp, _, arms, samples, _ = run.plan("d", seed)
        row = dict(encoder=1.0 + 2 * seed, classifier=2.0, accuracy=0.5, nfe=1)
        rows = {name: row for name in samples if name.split(",")[0] in names}
        for name in arms:
            folder = tmp_path / exp / run.slug(name)
            folder.mkdir(parents=True)
            (folder / "log.jsonl").write_text('{"step": 10, "grad_norm_max": 3.0, "mse": 0.5, "seconds": 2.0}\n')
        (tmp_path / exp / "report.json").write_text(run.json.dumps({"rows": rows}))
        model.write_json(tmp_path / f"d-{seed}.json", {"device": "CPU", "rows": run.measured("d", seed)})
    rows = run.numbers("d", (0, 1), tmp_path)
    run.plot("d", rows, tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 5000
    lines = run.table(rows).splitlines()
    assert lines[0] == "2 seeds"
    assert lines[4] == "| exact, 1 step | 1 | 2 ± 1.4 | 1 ± 0 | 2 ± 0 | 0.5000 ± 0 | 10 | 3 ± 0 | 0.5 ± 0 | 200 ± 0 |"
    assert "1 of 2 runs not finite" in lines[6] and "| not finite |" in lines[8]


NUMBERS = run.ROOT / "docs/experiments/numbers"


def page(letter):
    return next(run.ROOT.glob(f"docs/experiments/{letter}-*.md")).read_text()


@pytest.mark.parametrize("letter, seeds", [("b", 3), ("c", 3), ("e", 1), ("f", 1), ("g", 1), ("k", 3)])
def test_the_tables_of_pages(letter, seeds):
    """A page's table has the numbers that run.py --print prints; rows with brackets have others."""
    rows = [line.split("|", 2)[2] for line in page(letter).splitlines() if line.startswith("| ") and "(" not in line.split("|", 2)[2]]
    printed = run.table(run.numbers(letter, range(seeds), NUMBERS))
    found = re.findall(r"\d+\.\d+", "".join(rows))
    assert len(found) > 10 and not set(found) - set(re.findall(r"\d+\.\d+", printed))


def test_the_table_of_page_j():
    """From its numbers: changes by guidance, MFD by start and weight, and three times in its first line."""
    found = {arm: model.read_json(NUMBERS / f"j-{arm}.json")["in latents"] for arm in ("semantic", "random")}

    def change(arm, seed, w):
        return found[arm][f"teacher {seed}, w = {w}"]["distance"] / found[arm][f"teacher {seed}, w = 1"]["distance"] - 1
    for w in (1.5, 2):
        cells = [", ".join(f"{change(arm, seed, w):.0%}" for seed in (0, 1)) for arm in found]
        assert all(f"{cell} (" in page("j") for cell in cells), cells
    semantic_gain, random_gain = (change(arm, 0, 1.5) + change(arm, 1, 1.5) for arm in found)
    assert round(semantic_gain / random_gain) == 3 and "three times" in page("j").splitlines()[2]
    for start, name in (("cmt", "CMT"), ("teacher-0", "the teacher")):
        cells = [", ".join(f"{found[arm][f'MFD from {start}, {weight}']['distance']:.3f}" for weight in ("mild", "published"))
                 for arm in found]
        assert f"MFD from {name}" in page("j") and " | ".join(cells) in page("j")


def test_headlines():
    """What the first lines of pages c, h, k and l say, from the numbers that they stand on."""
    def rows(name):
        return model.read_json(NUMBERS / f"{name}.json")["rows"]

    def finding(letter):
        return page(letter).splitlines()[2]
    c, h = rows("c-0"), rows("h-0")
    ratios = {(solver, n, space): c[f"{solver}, {n} steps, 1 step"][space] / h[f"teacher, {solver}, NFE {n * cost}"][space]
              for solver, cost in (("euler", 1), ("heun", 2)) for n in (2, 4, 8, 16, 32) if n * cost <= 32
              for space in ("encoder", "classifier")}
    assert (round(min(ratios.values()), 1), round(max(ratios.values()), 1)) == (1.0, 1.5) and "1.0 to 1.5 times" in finding("c")
    encoder = [ratio for (solver, _, space), ratio in ratios.items() if (solver, space) == ("euler", "encoder")]
    assert encoder == sorted(encoder)                         # the more, the better the solver
    for solver in ("euler", "heun"):
        cells = [f"{ratios[solver, n, 'encoder']:.2f} ({ratios[solver, n, 'classifier']:.2f})" for n in (2, 4, 8, 16, 32)
                 if (solver, n, "encoder") in ratios]
        assert " | ".join(cells) in page("c")
    encoder, classifier = (h["MFD, NFE 1"][space] / h["teacher, heun, NFE 50"][space] for space in ("encoder", "classifier"))
    assert f"{100 * (encoder - 1):.0f}% farther" in finding("h")
    assert f"{100 * (1 - classifier):.0f}% nearer" in finding("h")
    k = [rows(f"k-{seed}") for seed in range(3)]
    for space in ("encoder", "classifier"):
        one, two, three = (row["MeanFlow"][space] / row["MFD"][space] for row in k)
        assert f"{one:.2f}, {two:.2f} and {three:.2f} times" in page("k")
    assert all(row["MeanFlow"]["accuracy"] < row["MFD"]["accuracy"] for row in k)
    assert [row["MeanFlow"]["norm"] > 1e5 for row in k].count(True) == 1 and "one seed of three it explodes" in finding("k")
    found = {(row["student"], row["rows"], row["target"]): row["variance"] for row in rows("l-0")}

    def whole(student, target, jumps=None):       # of 48 and 16 rows, by the variances of 64
        return 0.75 ** 2 * found[student, "s = t", target] * 64 / 48 + 0.25 ** 2 * found[student, "s < t", jumps or target] * 64 / 16
    shares = [(whole(x, "MFT") - whole(x, "MFT", "MFT, direction v")) / (whole(x, "MFT") - whole(x, "MFD")) for x in ("CMT", "middle", "end")]
    ratios = [whole(x, "MFT") / whole(x, "MFD") for x in ("CMT", "middle", "end")]
    assert f"{100 * min(shares):.0f} to {100 * max(shares):.0f}% of the excess" in finding("l")
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times MFD's variance" in finding("l")
