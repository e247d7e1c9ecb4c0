# Sourced by tests/run.sh and sanity/run.sh, from the repository's root: sets PYTHON to one that has what is needed.
#   setup.sh FILE MODULES...     FILE: the exact pins to install; MODULES: what must be importable
# Where the active Python already has everything (a GPU machine without network, say), it is used as it is; otherwise a virtual
# environment .venv is made once, with the exact pins, and used again.
set -euo pipefail
pins=$1
shift
ready() {
    "$1" - "${@:2}" <<'PYTHON' 2>/dev/null
import importlib.util, re, sys
from importlib.metadata import version
assert sys.version_info >= (3, 10)
for line in open("requirements.txt"):          # lower bounds
    name, least = line.strip().split(">=")
    number = lambda v: [int(x) for x in re.findall(r"\d+", v)[:3]]
    assert number(version(name)) >= number(least), name
assert all(importlib.util.find_spec(module) for module in sys.argv[1:])
PYTHON
}
PYTHON=${PYTHON:-python3}
if ! ready "$PYTHON" "$@"; then
    stamp=.venv/$(basename "$pins").installed
    if ! cmp -s "$pins" "$stamp"; then
        echo "setting up .venv (once; torch is a large download) ..."
        [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
        # torch first and alone: another package's open range would fetch a build of its own choice
        .venv/bin/python -m pip install --quiet "$(grep '^torch==' "$pins")"
        .venv/bin/python -m pip install --quiet -r "$pins"
        cp "$pins" "$stamp"
    fi
    PYTHON=.venv/bin/python
    ready "$PYTHON" "$@" || { echo "the environment in .venv is not usable: remove it and try again" >&2; exit 2; }
fi
export PYTHON
