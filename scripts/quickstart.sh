#!/usr/bin/env bash
# Shoal on a fresh machine: makes .venv, installs, and lets the demo model write on four processes (tensor 2 x pipeline 2).
#   bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=""
for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "Shoal needs Python 3.11 or newer; none was found. Install one, or name it: PYTHON=/path/to/python bash scripts/quickstart.sh" >&2
    exit 1
fi

if [ ! -x .venv/bin/python ]; then
    echo "== making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi
if ! .venv/bin/python -c 'import shoal, torch, tokenizers, msgspec' 2>/dev/null; then
    echo "== installing Shoal (torch is the large part; this takes a minute or more)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
fi

echo "== the demo model on 4 processes: tensor 2 x pipeline 2"
.venv/bin/shoal generate demo --config tp2_pp2 --max-tokens 64 --temperature 0 \
    -p "def read_config(path):"

cat <<'TEXT'

What to try next (source .venv/bin/activate):
  shoal chat demo                                        talk to it
  shoal explain demo --config tp2_pp2                    who holds what, and every byte, before anything runs
  shoal generate /path/to/checkpoint -tp 2 -p "Hello"    your own model, a folder or a Hugging Face id
  shoal doctor                                           is this machine ready, and how fast is it
  shoal bench throughput demo                            tokens per second, latencies, share of the machine's limits
TEXT
