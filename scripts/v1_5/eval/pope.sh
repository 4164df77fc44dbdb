#!/usr/bin/env bash
# POPE: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/pope.sh [-R 64] [--baseline] [--limit N] … (--help lists all)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate run --task pope "$@"
