#!/usr/bin/env bash
# MM-Vet, and the paper's measure of speed: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/mmvet.sh [-R 64] [--baseline] [--limit N] … (--help lists all)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate run --task mmvet "$@"
