#!/usr/bin/env bash
# Install into .venv with the test extra, then run lint, types and tests: launch/test.sh [PYTEST ARGUMENTS...]
# Without arguments all tests run but those marked slow; `launch/test.sh -m slow` runs the slow ones.
extras=test source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -eq 0 ]; then set -- -m "not slow"; fi
exec .venv/bin/python -m pytest "$@"
