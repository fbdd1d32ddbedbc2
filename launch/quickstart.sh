#!/usr/bin/env bash
# Install into .venv and grow a small FLM on real text in three stages: launch/quickstart.sh [WORKDIR] [FLAGS...]
# Run the same command again to resume. Only Python is needed beforehand.
extras= source "$(dirname "$0")/environment.sh"
workdir=runs/quickstart
case ${1:-} in
  -*) ;;
  ?*) workdir=$1 && shift ;;
esac
exec .venv/bin/flmjax train --config=configs/quickstart.py --workdir="$workdir" "$@"
