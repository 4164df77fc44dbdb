#!/usr/bin/env bash
# Train a twig.  Usage: [twig_K=2] [twig_T=3] [VARIABLE=…] bash scripts/v1_5/train_twig.sh [flags of the training]
#
# With nothing else it trains a twig for the embedded base on drawn data, on the CPU or GPU that is here.
#   STAGE         1: the twig with a pruning head, the base as teacher; 2: that head alone, by rewards (TwigVLM++)
#   MODEL         hub id or folder of a LLaVA-1.5 model      (liuhaotian/llava-v1.5-7b)
#   DATA_PATH     LLaVA's instruction JSON                   (…/llava_v1_5_mix665k.json)
#   IMAGE_FOLDER  folder that its image names start from
#   OUTPUT_DIR    folder of the run                          (default runs/twig-BASE-K2-T3, with STAGE runs/…-stage1, …-stage2)
#   NPROC_PER_NODE  processes here (default: one per GPU); HOSTFILE  DeepSpeed's, for several machines;
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT  several machines with torchrun; under Slurm: srun bash THIS
# All flags: bash scripts/v1_5/train_twig.sh --help.  What would happen: --dry-run.  The same command continues a stopped run.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
flags=(--K "${twig_K:-2}" --T "${twig_T:-3}")
[[ -z "${twig_F:-}" ]] || { echo "error: twig_F is not read any more; give --F $twig_F" >&2; exit 2; }
[[ -n "${STAGE:-}" ]] && flags+=(--stage "$STAGE")
[[ -n "${MODEL:-}" ]] && flags+=(--base "$MODEL")
[[ -n "${DATA_PATH:-}" ]] && flags+=(--data "$DATA_PATH")
[[ -n "${IMAGE_FOLDER:-}" ]] && flags+=(--images "$IMAGE_FOLDER")
[[ -n "${OUTPUT_DIR:-}" ]] && flags+=(--out "$OUTPUT_DIR")

able() { command -v "$1" >/dev/null && "$1" -c "import importlib.util as u; assert all(map(u.find_spec, ('torch', 'transformers', 'accelerate')))" 2>/dev/null; }
python="${PYTHON:-}"
for candidate in "$here/.venv/bin/python" python3 python; do
    if [[ -z "$python" ]] && able "$candidate"; then python="$candidate"; fi
done
if [[ -z "$python" ]]; then # a fresh clone
    echo "setting up $here/.venv with the pinned requirements" >&2
    make --no-print-directory -C "$here" .venv/.ready >&2
    python="$here/.venv/bin/python"
fi
if ! able "$python"; then
    echo "error: $python lacks torch, transformers or accelerate: pip install -e '$here[train]'" >&2
    exit 2
fi

export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m twigvlm.training.launch "${flags[@]}" "$@"
