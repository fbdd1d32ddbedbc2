#!/usr/bin/env bash
# Install into .venv with the test extra, then run lint, types and tests: launch/test.sh [PYTEST ARGUMENTS...]
# Without arguments all tests run but those marked slow or nightly; `launch/test.sh -m slow` runs the slow ones, which
# every change must pass too, and `launch/test.sh -m nightly`, by hand or in the night, what takes too long for that.
extras=test source "$(dirname "$0")/environment.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -eq 0 ]; then set -- -m "not slow and not nightly"; fi
exec .venv/bin/python -m pytest "$@"
