#!/bin/sh
# Measure on a CUDA device, without a network, in under ten minutes: benchmarks/gpu.sh [SECTION ...] [--minutes 9]
#
#   PYTHON            which has torch and what kvpolicy's adapters need; python3 by default
#   FLASH_ATTN_WHEEL  is installed into it first; nothing else is installed
#
# Writes benchmarks/results/gpu.json and the tables of docs/benchmarks-gpu.md; --json and --page name other files.
#
# Where that Python has vLLM, its tests and its load follow, in about a quarter of an hour; VLLM=no leaves them out.
# They write benchmarks/results/gpu-vllm-tests.txt, gpu-vllm.json and the tables of docs/benchmarks-vllm.md.
set -eu
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

if [ -n "${FLASH_ATTN_WHEEL:-}" ]; then
    "$python" -m pip install --no-deps --no-index "$FLASH_ATTN_WHEEL"
fi
case " $* " in
    *" --quick "*) VLLM=no ;; # shows that everything runs, and is no result
    *) set -- --json "$root/benchmarks/results/gpu.json" --page "$root/docs/benchmarks-gpu.md" "$@" ;;
esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
status=0
"$python" -m benchmarks.gpu "$@" || status=$?

has_vllm='from importlib.util import find_spec; print(find_spec("vllm") is not None)'
if [ "${VLLM:-}" != no ] && [ "$("$python" -c "$has_vllm")" = True ]; then
    results=$root/benchmarks/results
    export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=WARNING
    cd "$root"
    echo "the tests of vLLM: $results/gpu-vllm-tests.txt"
    "$python" -m pytest -q -m vllm -p no:cacheprovider tests/vllm > "$results/gpu-vllm-tests.txt" 2>&1 || status=$?
    tail -n 1 "$results/gpu-vllm-tests.txt"
    "$python" -m benchmarks.vllm --json "$results/gpu-vllm.json" || status=$?
    "$python" -m benchmarks.vllm.page
fi
exit "$status"
