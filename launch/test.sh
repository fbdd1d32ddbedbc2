#!/usr/bin/env bash
# Install into .venv with the test extra; lint, types, tests: launch/test.sh [PYTEST ARGUMENTS...]
# Without arguments everything but the tests marked slow; `launch/test.sh -m slow` runs those.
extras=test source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
exec .venv/bin/python -m pytest "$@"
