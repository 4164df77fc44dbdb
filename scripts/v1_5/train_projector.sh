#!/usr/bin/env bash
# Tune the projector behind a pruning method (VisionZip*).  Usage: [VARIABLE=…] bash scripts/v1_5/train_projector.sh [-R 64] [flags]
#
# The variables are those of train_twig.sh (MODEL, DATA_PATH, IMAGE_FOLDER, OUTPUT_DIR, …). On LLaVA's mix665k: --epochs 0.1
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/train_twig.sh" --learn projector "$@"
