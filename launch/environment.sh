# The scripts beside this file source it: it makes $venv (.venv), an environment with this package and the extras in
# $extras, in the versions of $constraints (launch/constraints.txt), from $PYTHON (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} venv=${venv:-.venv}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flmjax needs Python 3.11 or newer, this is " + sys.version.split()[0])'
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "${constraints:-launch/constraints.txt}" -e ".${extras:+[$extras]}"
