#!/usr/bin/env bash
# Sets up and checks everything: ruff, mypy, the directions of imports, then all tests. Options go to pytest:
#
#   launch/test.sh                       everything that needs no GPU
#   launch/test.sh -m gpu                the tests that need a GPU
#   launch/test.sh tests/corpus -k split
#   launch/test.sh --matrix [--help]     other versions of Python, torch, megatron-core and transformers
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval dev

# Tests start processes of their own; one thread each keeps two cores busy without crowding them.
# Files of tests are divided among as many workers as there are cores, four at most; one GPU is not divided.
workers=$(nproc)
[ "$workers" -le 4 ] || workers=4
case " $* " in *gpu*) workers=0 ;; *) export CUDA_VISIBLE_DEVICES= ;; esac
# They start hundreds of processes: without bytecode on disk each would compile torch and megatron-core anew.
unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

if [ "${1:-}" = --matrix ]; then
    exec python tools/version_matrix.py "${@:2}"
fi
echo "== ruff check"
ruff check .
echo "== ruff format"
ruff format --check .
echo "== mypy"
mypy
echo "== lint-imports"
lint-imports
echo "== pytest (deselected unless asked for: tests that need a GPU, -m gpu)"
exec python -m pytest -n "$workers" --dist loadfile -rs -m "not gpu" "$@"
