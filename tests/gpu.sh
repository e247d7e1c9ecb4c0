#!/usr/bin/env bash
# What the steps cost on a GPU, at most seven minutes: ./tests/gpu.sh [--out FOLDER] [--budget SECONDS] [--tiny]
set -euo pipefail
cd "$(dirname "$0")/.."
# The parts share what is compiled with the processes that they start, and with nobody else.
TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
export TORCHINDUCTOR_CACHE_DIR PYTHONUNBUFFERED=1
"${PYTHON:-python3}" tests/benchmarks/gpu.py "$@"
