#!/usr/bin/env bash
# Every check of the project, on a fresh machine too: format, lint, types, import layers, tests.
#
#   bash scripts/test.sh                        # fast tests
#   bash scripts/test.sh --slow                 # the full grids as well; --soak: long drills
#   bash scripts/test.sh tests/configs -k yaml  # further arguments go to pytest
#
# Makes .venv when there is none and installs the dev extras into it. All checks run even when one fails; the exit status
# is non-zero then, and the last line names what failed.
set -uo pipefail
exec </dev/null
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P) || exit 1
cd "$root" || exit 1
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
ensure_venv "$root" dev || exit 1

failed=()
check() {
    local name=$1 started=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "   $((SECONDS - started)) s"
}

check format "$venv_python" -m ruff format --check --quiet .
check lint "$venv_python" -m ruff check --quiet .
check types "$venv_python" -m mypy
check layers "$venv_python" -m pytest tests/test_layers.py
check tests "$venv_python" -m pytest --deselect tests/test_layers.py "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All checks passed."
