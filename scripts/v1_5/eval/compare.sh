#!/usr/bin/env bash
# All pruning methods on all benchmarks, then one table: [MODEL=… TWIG=… DATA=…] bash scripts/v1_5/eval/compare.sh [--methods M,M] [-R 192,128,64] [--benchmarks T,T] [--limit N] …
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate compare "$@"
