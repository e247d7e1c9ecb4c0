#!/usr/bin/env bash
# On a GPU, at most nine minutes: what the steps cost, and tests/test_gpu.py: ./tests/gpu.sh [--out FOLDER] [--budget SECONDS] [--tiny]
set -euo pipefail
cd "$(dirname "$0")/.."
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)              # what is compiled now counts, and not what was before
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
export TORCHINDUCTOR_CACHE_DIR PYTHONUNBUFFERED=1
"${PYTHON:-python3}" tests/benchmarks/steps.py "$@"
timeout 120 "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider --durations=8 tests/test_gpu.py
