"""README and docs: links, anchors and names lead somewhere, commands parse, code is of our names, lines and pages are short."""
import argparse
import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", sorted(ROOT.glob("docs/**/*.md"))
CODE = [path for pattern in ("*", "sanity/*", "docs/**/*", "tests/**/*") for path in ROOT.glob(pattern) if path.suffix in (".py", ".sh")]
TEXT = "\n".join(path.read_text() for path in CODE)
TORCHRUNS = {"--nproc_per_node", "--shutdown-timeout"}
LONGEST = 160                                     # characters of a line of prose
pages = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))


def parts(page):
    """-> lines outside of fences; [(language, lines)] of the fences."""
    prose, fences, inside = [], [], None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = (line[3:], [])
            else:
                fences.append(inside)
                inside = None
        else:
            (prose if inside is None else inside[1]).append(line)
    assert inside is None, "a fence that never closes"
    return prose, fences


def anchors(page):
    """What GitHub calls the headings."""
    titles = [re.sub(r"^#+ ", "", line) for line in parts(page)[0] if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(parts(page)[0])):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            assert there.exists() and (not anchor or anchor in anchors(there)), target


@pages
def test_names(page):
    """Scripts and pages named in a text exist; names and flags stand somewhere in our code."""
    for quoted in re.findall(r"`([^`]+)`", "\n".join(parts(page)[0])):
        for path in re.findall(r"(?<![\w/.:])[\w./-]+\.(?:py|sh|md)\b", quoted):
            assert (ROOT / path).exists() or (page.parent / path).exists(), path
        for flag in re.findall(r"--[a-z][\w-]+", quoted):
            assert f'"{flag}"' in TEXT or flag in TORCHRUNS, flag
        if re.fullmatch(r"[a-zA-Z]\w*_\w+", quoted):
            assert re.search(rf"\b{quoted}\b", TEXT), quoted


@pages
def test_lines_are_short(page):
    assert [line for line in parts(page)[0] if len(line) > LONGEST and not line.startswith("|")] == []


# ---- Commands --------------------------------------------------------------------------------------------------------
def commands(text):
    """Argument lists of the shell commands in a text, variables filled in."""
    def fill(word):
        return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), word)
    variables = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        words = shlex.split(re.sub(r"([;&|]+)", r" \1 ", line), comments=True)
        if words[:1] == ["for"]:
            variables[words[1]] = words[3]
            words = words[words.index("do") + 1:]
        command = []
        for word in [*words, ";"]:
            if not set(word) <= set(";&|"):
                command.append(word)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):
                key, _, value = command.pop(0).partition("=")
                variables[key] = fill(value)
            if command:
                yield [fill(word) for word in command]
            command = []


def commands_of(page):
    """Variables of one fence stand in the later ones too."""
    prose, fences = parts(page)
    yield from commands("\n".join("\n".join(lines) for language, lines in fences if language != "python"))
    for quoted in re.findall(r"`((?:python|torchrun|\./)[^`]*)`", "\n".join(prose)):
        if "..." not in quoted:
            yield from commands(quoted)


class Parsed(Exception):
    pass


MODULES = {}


def parse(script, argv, monkeypatch):
    """Give a script's parser its flags, and run nothing else of it."""
    def stop(self, *args):
        original(self, *args)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    if "ArgumentParser" not in script.read_text():
        return
    if script not in MODULES:
        spec = importlib.util.spec_from_file_location(f"page_{script.stem}", script)
        module = MODULES[script] = importlib.util.module_from_spec(spec)
        environment, path = dict(os.environ), list(sys.path)
        sys.path.insert(0, str(script.parent))
        spec.loader.exec_module(module)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *argv])
        if hasattr(MODULES[script], "parse_args"):
            MODULES[script].parse_args()
            return
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with contextlib.suppress(Parsed):
            MODULES[script].main()
            pytest.fail(f"{script} parses nothing")


@pages
def test_commands(page, monkeypatch):
    for words in commands_of(page):
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[0].endswith(".sh"):
            assert os.access(ROOT / words[0], os.X_OK), words[0]
        elif words[0] in ("python", "torchrun") and scripts:
            script, argv = ROOT / words[scripts[0]], words[scripts[0] + 1:]
            assert script.exists(), script
            errors = io.StringIO()
            try:
                with contextlib.redirect_stderr(errors):
                    parse(script, argv, monkeypatch)
            except SystemExit:
                pytest.fail(f"{shlex.join([script.name, *argv])}: {errors.getvalue()}")


@pages
def test_programs(page):
    """Python in a page is Python, and takes from our modules what they have."""
    for _, lines in (fence for fence in parts(page)[1] if fence[0] == "python"):
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.ImportFrom) and (file := ROOT / f"{node.module}.py").exists():
                own = {item.name for item in ast.parse(file.read_text()).body if isinstance(item, (ast.FunctionDef, ast.ClassDef))}
                assert {alias.name for alias in node.names} <= own, node.module


# ---- Length and order ------------------------------------------------------------------------------------------------
def test_docstrings():
    """What --help prints of it is whole sentences; no line begins with a space where a blank line got lost."""
    for script in (path for path in CODE if path.suffix == ".py"):
        source = script.read_text()
        text = ast.get_docstring(ast.parse(source), clean=False) or "."
        description = text.split("\n" if r'__doc__.split("\n")' in source else "\n\n")[0].rstrip()
        assert description.endswith((".", ":", "?")) and not re.search(r"^ \S", text, flags=re.M), script


def test_sizes():
    readme = README.read_text()
    assert len(readme) <= 8_500 and len(readme.splitlines()) <= 120
    assert sum(len(page.read_text()) for page in DOCS) <= 75_000


def test_the_lines_to_copy():
    from test_sampling import LINES_OF_README
    assert LINES_OF_README.strip() in README.read_text()


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/experiments/*.md")), ids=lambda page: page.stem)
def test_an_experiments_page(page):
    """At most 2.5 KB, a page whose claims were fixed beforehand 3: the finding in a sentence, the commands, one table of at most eight
    rows; the index leads here."""
    text = page.read_text()
    lines, index = text.splitlines(), (ROOT / "docs/EXPERIMENTS.md").read_text()
    assert lines[0].startswith("# ") and lines[2].startswith("**") and lines[2].endswith(".**")
    assert len(text) <= (3_000 if "## Fixed beforehand" in text else 2_560) and f"(experiments/{page.name})" in index
    table = [i for i, line in enumerate(lines) if line.startswith("|")]
    assert len(table) <= 10 and (not table or len(table) == 1 + table[-1] - table[0] and lines.index("```") < table[0])
