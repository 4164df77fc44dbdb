#!/usr/bin/env bash
# SEED-Bench: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/seed.sh [-R 64] [--baseline] [--limit N] … (--help lists all)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate run --task seed "$@"
