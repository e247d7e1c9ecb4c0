"""README and docs: links and names lead somewhere, commands parse, lines and pages are short."""
import argparse
import contextlib
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, DOCS = ROOT / "README.md", sorted(ROOT.glob("docs/**/*.md"))
CODE = [path for folder in ("*", "sanity/*", "docs/**/*", "tests/**/*") for path in ROOT.glob(folder)
        if path.suffix in (".py", ".sh")]
TEXT = "\n".join(path.read_text() for path in CODE)
pages = pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: str(page.relative_to(ROOT)))


def parts(page):
    """-> text outside of fences; [(language, text)] of the fences."""
    prose, *rest = re.split(r"^```", page.read_text(), flags=re.M)
    fences = [text.partition("\n")[::2] for text in rest[::2]]
    assert len(rest) % 2 == 0, "a fence that never closes"
    return prose + "".join(rest[1::2]), fences


def anchors(page):
    """What GitHub calls the headings."""
    titles = re.findall(r"^#+ (.*)", parts(page)[0], flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links(page):
    for path, anchor in re.findall(r"\]\((?!https://)([^)\s#]*)#?([^)\s]*)\)", parts(page)[0]):
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and (not anchor or anchor in anchors(there)), (path, anchor)


@pages
def test_names(page):
    """Scripts and pages named in a text exist; names and flags stand somewhere in our code."""
    for quoted in re.findall(r"`([^`]+)`", parts(page)[0]):
        for path in re.findall(r"(?<![\w/.:])[\w./-]+\.(?:py|sh|md)\b", quoted):
            assert (ROOT / path).exists() or (page.parent / path).exists(), path
        for flag in re.findall(r"--[a-z][\w-]+", quoted):
            assert f'"{flag}"' in TEXT or flag in ("--nproc_per_node", "--shutdown-timeout"), flag
        if re.fullmatch(r"[a-zA-Z]\w*_\w+", quoted):
            name = re.sub("^rms_", "ms_", quoted)    # model.Log logs the root of a loss's ms_NAME
            assert re.search(rf"\b{name}\b", TEXT), quoted


# ---- Commands
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


def parse(script, argv, monkeypatch):
    """Let a script read its flags, and nothing else."""
    def stop(self, *args):
        original(self, *args)
        raise KeyboardInterrupt
    original = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch, mock.patch.dict(os.environ), contextlib.suppress(KeyboardInterrupt):
        patch.setattr(sys, "argv", [str(script), *argv])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        runpy.run_path(str(script))["main"]()
        pytest.fail(f"{script} parses nothing")


@pages
def test_commands(page, monkeypatch):
    prose, fences = parts(page)
    text = "\n".join(text for language, text in fences if language != "python")
    quoted = re.findall(r"`((?:python|torchrun|\./)[^`]*)`", prose)
    for words in commands("\n".join([text, *(command for command in quoted if "..." not in command)])):
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if words[0].endswith(".sh"):
            assert os.access(ROOT / words[0], os.X_OK), words[0]
        elif words[0] in ("python", "torchrun") and scripts:
            script = ROOT / words[scripts[0]]
            if "ArgumentParser" in script.read_text():
                parse(script, words[scripts[0] + 1:], monkeypatch)


# ---- Length and order
def test_sizes():
    readme = README.read_text()
    assert len(readme) <= 8_500 and sum(len(page.read_text()) for page in DOCS) <= 75_000
    prose = [line for page in [README, *DOCS] for line in parts(page)[0].splitlines()]
    assert not [line for line in prose if len(line) > 160 and line[0] != "|"]


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/experiments/*.md")), ids=lambda page: page.stem)
def test_an_experiments_page(page):
    """Short, the finding in its first sentence, and the index leads here."""
    text, index = page.read_text(), (ROOT / "docs/EXPERIMENTS.md").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("**") and lines[2].endswith(".**")
    assert len(text) <= 3_000 and f"(experiments/{page.name})" in index
