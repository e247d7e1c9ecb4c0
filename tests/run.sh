#!/usr/bin/env bash
# Sets up everything and runs the tests; arguments go to pytest: ./tests/run.sh -k losses
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/setup.sh tests/requirements.txt pytest ruff
"$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -q "$@"
