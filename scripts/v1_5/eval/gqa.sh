#!/usr/bin/env bash
# GQA, balanced test-dev: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/gqa.sh [-R 64] [--baseline] [--limit N] … (--help lists all)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate run --task gqa "$@"
