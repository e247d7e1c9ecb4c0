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
DOCS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("docs/experiments/*.md")])
PAGES = [ROOT / "README.md", *DOCS]
LONGEST = 160                                     # characters of a line of prose
CODE = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("sanity/*"), *ROOT.glob("docs/**/*.py"), *ROOT.glob("docs/**/*.sh"),
                          *ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/*.sh")] if path.suffix in (".py", ".sh")]
OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--shutdown-timeout", "--max-restarts",
          "--signals-to-handle"}                  # torchrun's


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
    assert inside is None, f"{page.name}: a fence that never closes"
    return prose, fences


def anchors(page):
    """What GitHub calls the headings."""
    titles = [re.sub(r"^#+ ", "", line) for line in parts(page)[0] if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    text = "\n".join(parts(page)[0])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)}: {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names(page):
    """Scripts and pages named in a text exist; names and flags stand somewhere in our code."""
    text, code = "\n".join(parts(page)[0]), "\n".join(path.read_text() for path in CODE)
    for quoted in re.findall(r"`([^`]+)`", text):
        for path in re.findall(r"(?<![\w/.:])[\w./-]+\.(?:py|sh|md)\b", quoted):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{name(page)}: {path}"
        for flag in re.findall(r"--[a-z][\w-]+", quoted):
            assert f'"{flag}"' in code or flag in OTHERS, f"{name(page)}: {flag}"
        if re.fullmatch(r"[a-zA-Z]\w*_\w+", quoted):
            assert re.search(rf"\b{quoted}\b", code), f"{name(page)}: {quoted}"


# ---- Commands --------------------------------------------------------------------------------------------------------
def commands(lines):
    """Argument lists of the shell commands in some lines, variables filled in; what Python is given in a heredoc."""
    text, programs, variables = re.sub(r"\\\n\s*", "", "\n".join(lines)), [], {}
    text = re.sub(r"<<'END'\n(.*?)\nEND\b", lambda found: programs.append(found[1]) or "", text, flags=re.S)
    found = []
    for line in text.splitlines():
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
                variables[key] = fill(value, variables)
            if command:
                found.append([fill(word, variables) for word in command])
            command = []
    return found, programs


def fill(word, variables):
    return re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), word)


def of_page(page):
    prose, fences = parts(page)
    for language, lines in fences:
        yield from [] if language == "python" else commands(lines)[0]
    for quoted in re.findall(r"`((?:python|torchrun|\./)[^`]*)`", "\n".join(prose)):
        if "..." not in quoted:
            yield from commands([quoted])[0]


class Parsed(Exception):
    pass


def parse(script, argv, monkeypatch):
    """Give a script's parser its flags, and run nothing else of it."""
    def stop(self, *args):
        original(self, *args)
        raise Parsed
    original = argparse.ArgumentParser.parse_args
    if "argparse" not in script.read_text() and "ArgumentParser" not in script.read_text():
        return
    module = MODULES.get(script)
    if module is None:
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
        if hasattr(module, "parse_args"):
            module.parse_args()
            return
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with contextlib.suppress(Parsed):
            module.main()
            pytest.fail(f"{script} parses nothing")


MODULES = {}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands(page, monkeypatch):
    for words in of_page(page):
        if words[0].endswith(".sh"):
            assert os.access(ROOT / words[0], os.X_OK), f"{name(page)}: {words[0]}"
            continue
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[0] not in ("python", "torchrun") or not scripts:
            continue
        # From another folder too, where a page goes into one.
        script = ROOT / re.sub(r"^(\.\./)+", "", words[scripts[0]])
        assert script.exists(), f"{name(page)}: {words[scripts[0]]}"
        words = words[scripts[0] + 1:]
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                parse(script, words, monkeypatch)
        except SystemExit:
            pytest.fail(f"{name(page)}: {shlex.join([script.name, *words])}: {errors.getvalue()}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_programs(page):
    """Python in a page is Python, and takes from our modules what they have."""
    for language, lines in parts(page)[1]:
        for program in ["\n".join(lines)] if language == "python" else commands(lines)[1]:
            for node in ast.walk(ast.parse(program)):
                file = ROOT / f"{node.module}.py" if isinstance(node, ast.ImportFrom) else ROOT / "none"
                if file.exists():
                    tree = ast.parse(file.read_text())
                    own = {item.name for item in tree.body if isinstance(item, (ast.FunctionDef, ast.ClassDef))}
                    own |= {target.id for item in tree.body if isinstance(item, ast.Assign)
                            for target in item.targets if isinstance(target, ast.Name)}
                    assert {alias.name for alias in node.names} <= own, f"{name(page)}: {node.module}"


# ---- Length and order ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", [path for path in CODE if path.suffix == ".py"], ids=name)
def test_docstrings(script):
    """What --help prints of it is whole sentences; no line begins with a space where a blank line got lost."""
    source = script.read_text()
    text = ast.get_docstring(ast.parse(source), clean=False) or "."
    description = text.split("\n" if r'__doc__.split("\n")' in source else "\n\n")[0].rstrip()
    assert description.endswith((".", ":", "?")) and not re.search(r"^ \S", text, flags=re.M)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page):
    for line in parts(page)[0]:
        assert len(line) <= LONGEST or line.startswith("|"), f"{name(page)}: {line}"


def test_sizes():
    readme = PAGES[0].read_text()
    assert len(readme) <= 9_000 and len(readme.splitlines()) <= 130
    # 90 of what was there when it was set, 12 for what has been measured since: b-length, b-constants, i, why nearer (h).
    assert sum(len(page.read_bytes()) for page in DOCS) <= 102 * 1024


def test_the_lines_to_copy():
    from test_sampling import LINES_OF_README
    assert LINES_OF_README.strip() in PAGES[0].read_text()


@pytest.mark.parametrize("page", [page for page in DOCS if page.parent.name == "experiments"], ids=name)
def test_an_experiments_page(page):
    """The finding in a sentence, then the table, then the commands; the index leads here."""
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("**") and lines[2].endswith(".**") and lines[4].startswith("| ")
    after = next(i for i, line in enumerate(lines[4:], 4) if not line.startswith("|"))
    assert lines[after + 1] == "```"
    assert f"(experiments/{page.name})" in (ROOT / "docs/EXPERIMENTS.md").read_text()
