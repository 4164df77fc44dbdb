# Shared by the scripts beside it: finds python, turns the environment into flags, runs one module.
# MODEL, TWIG  base and twig: hub id or folder      twig_K, twig_T  where the twig's file does not say
# DATA         folder with one folder a benchmark   CUDA_VISIBLE_DEVICES  one shard per device
# PYTHON       the interpreter (default: .venv/bin/python, python3 or python, the first that has torch)
set -euo pipefail

able() { command -v "$1" >/dev/null && "$1" -c "import importlib.util as u; assert all(map(u.find_spec, ('torch', 'transformers')))" 2>/dev/null; }

evaluate() { # module, then its flags
  local root candidate python="${PYTHON:-}" module=$1
  shift
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
  for candidate in "$root/.venv/bin/python" python3 python; do
    if [[ -z "$python" ]] && able "$candidate"; then python="$candidate"; fi
  done
  if [[ -z "$python" ]] || ! able "$python"; then
    echo "error: ${python:-no python here} has no torch and transformers; make -C '$root' .venv/.ready sets up .venv with both" >&2
    exit 2
  fi
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
  exec "$python" -m "twigvlm.evaluation.$module" \
    ${MODEL:+--base-model "$MODEL"} ${TWIG:+--twig-block "$TWIG"} ${DATA:+--data "$DATA"} \
    ${twig_K:+--twig-K "$twig_K"} ${twig_T:+--twig-T "$twig_T"} "$@"
}
