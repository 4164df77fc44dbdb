#!/usr/bin/env bash
# All benchmarks, then the table: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/all.sh [-R 192,128,64] [--tasks gqa,pope] …
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate suite "$@"
