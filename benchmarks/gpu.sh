#!/bin/sh
# Measure on a CUDA device, without a network, in under ten minutes: benchmarks/gpu.sh [SECTION ...] [--minutes 9]
#
#   PYTHON            which has torch and what kvpolicy's adapters need; python3 by default
#   FLASH_ATTN_WHEEL  is installed into it first; nothing else is installed
#
# Writes benchmarks/results/gpu.json and the tables of docs/benchmarks-gpu.md; --json and --page name other files.
set -eu
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

if [ -n "${FLASH_ATTN_WHEEL:-}" ]; then
    "$python" -m pip install --no-deps --no-index "$FLASH_ATTN_WHEEL"
fi
case " $* " in
    *" --quick "*) ;; # shows that everything runs, and is no result
    *) set -- --json "$root/benchmarks/results/gpu.json" --page "$root/docs/benchmarks-gpu.md" "$@" ;;
esac
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m benchmarks.gpu "$@"
