# Sourced by the other scripts: finds a Python, makes .venv in the checkout, installs Shoal into it once.
#
#   source scripts/venv.sh; ensure_venv dev      # extras, may be empty; sets $venv_python

# Prints the first Python >= 3.11 found; $PYTHON goes first. Fails with advice when there is none.
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if command -v "$name" >/dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
    done
    echo "shoal needs Python 3.11 or newer, and found $(python3 --version 2>/dev/null || echo none)." >&2
    echo "Install one (apt install python3.11 python3.11-venv, or https://docs.astral.sh/uv) or set PYTHON to its path." >&2
    return 1
}

# Makes .venv under the repository root ($1) and installs Shoal with the extras ($2, may be empty), unless a stamp says
# that this was done for this pyproject.toml and constraints.txt. Sets venv_python.
ensure_venv() {
    local root=$1 extras=$2 python stamp sum
    venv_python=$root/.venv/bin/python
    if [ ! -x "$venv_python" ]; then
        python=$(find_python) || return 1
        echo "Making $root/.venv with $("$python" --version)"
        if ! "$python" -m venv "$root/.venv"; then
            rm -rf "$root/.venv"
            echo "The venv module of $python does not work; on Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    if ! "$venv_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "$root/.venv has $("$venv_python" --version 2>&1), and shoal needs 3.11 or newer; delete it and run this again." >&2
        return 1
    fi
    sum=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    stamp=$root/.venv/.installed-${extras:-base}
    # The dev extras hold all that no extras need.
    if [ "$(cat "$stamp" 2>/dev/null)" = "$root $sum" ] || [ "$(cat "$root/.venv/.installed-dev" 2>/dev/null)" = "$root $sum" ]; then
        return 0
    fi
    echo "Installing shoal${extras:+[$extras]} into $root/.venv; torch is large, this can take minutes the first time"
    # On machines without a GPU, PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU builds: a far smaller download.
    PYTHONWARNINGS=ignore "$venv_python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$root${extras:+[$extras]}" || return 1
    echo "$root $sum" >"$stamp"
}
