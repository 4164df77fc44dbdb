#!/usr/bin/env bash
# Your own questions: [MODEL=… TWIG=…] bash scripts/v1_5/eval/vqa.sh --question-file FILE --image-folder DIR [-R 64] … (--help lists all)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
evaluate run --task vqa "$@"
