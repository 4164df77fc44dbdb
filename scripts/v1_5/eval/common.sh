# Shared by the scripts beside it: finds python, turns the environment into flags, runs one module.
# MODEL, TWIG  base and twig: hub id or folder      twig_K, twig_T  where the twig's file does not say
# DATA         folder with one folder a benchmark   CUDA_VISIBLE_DEVICES  one shard per device
set -euo pipefail

evaluate() { # module, then its flags
  local root python module=$1
  shift
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
  for python in "$root/.venv/bin/python" python3 python; do
    if command -v "$python" >/dev/null; then break; fi
  done
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
  export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}" TOKENIZERS_PARALLELISM=false
  exec "$python" -m "twigvlm.evaluation.$module" \
    ${MODEL:+--base-model "$MODEL"} ${TWIG:+--twig-block "$TWIG"} ${DATA:+--data "$DATA"} \
    ${twig_K:+--twig-K "$twig_K"} ${twig_T:+--twig-T "$twig_T"} "$@"
}
