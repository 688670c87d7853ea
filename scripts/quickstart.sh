#!/usr/bin/env bash
# Shoal on a fresh machine: makes .venv, installs, and lets the demo model write on four processes (tensor 2 x pipeline 2).
#
#   bash scripts/quickstart.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
ensure_venv "$root" ""

echo "== the demo model on 4 processes: tensor 2 x pipeline 2"
prompt="class Reader:"
echo "prompt: $prompt"
.venv/bin/shoal generate demo --config tp2_pp2 --max-tokens 96 --temperature 0.7 --seed 3 -p "$prompt"

cat <<'TEXT'

What to try next (after: source .venv/bin/activate)
  shoal chat demo                                        talk to it
  shoal explain demo --config tp2_pp2                    who holds what, and every byte, before anything runs
  shoal generate /path/to/checkpoint -tp 2 -p "Hello"    your own model: a folder or a Hugging Face id
  shoal doctor                                           is this machine ready, and how fast is it
  shoal bench throughput demo                            tokens per second, latencies, share of the machine's limits
TEXT
