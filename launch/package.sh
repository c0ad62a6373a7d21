#!/usr/bin/env bash
# Builds the source distribution and the wheel, checks both, and uses the wheel in an empty environment.
#
#   launch/package.sh              builds, checks, installs; `doctor` and the plain example (what .ci/run runs)
#   launch/package.sh --full       besides: every example, and the quickstart's short form, without this repository
#   OUTPUT=dist_wheels launch/package.sh   leaves the two files there once they are sound
#   PYTHON=3.12 launch/package.sh          with another Python
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh hf eval dev
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
built=$work/built
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONPATH

echo "== build"
# From a copy of the files that git has: what an earlier build left in the folder must not get into a package.
mkdir "$work/source"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source"
python -m build --no-isolation --outdir "$built" "$work/source" >"$work/log" 2>&1 || { tail -n 30 "$work/log"; exit 1; }
wheels=("$built"/*-py3-none-*_*.whl)
[ -f "${wheels[0]}" ] || { echo "the wheel is not tagged for a platform and for every Python 3"; ls "$built"; exit 1; }
wheel=${wheels[0]}

echo "== check"
twine check --strict "$built"/*
check-wheel-contents "$wheel"
python -m zipfile -l "$wheel" >"$work/names"
for name in py.typed cache/FORMAT.md cache/codec/hc/_hc.so kernels/sparse_kd/sparse_kd.cuh; do
    grep -q "^distill_pretrain/$name " "$work/names" || { echo "the wheel lacks $name"; exit 1; }
done

echo "== without a compiler"
cd "$work/source"
if CC=/nowhere/cc python setup.py -q build_ext --build-lib "$work/no" --build-temp "$work/no" >"$work/log" 2>&1; then
    echo "the fast coder was left out in silence"; exit 1
fi
grep -q DISTILL_PRETRAIN_SLOW_CODER=1 "$work/log" || { cat "$work/log"; exit 1; }
DISTILL_PRETRAIN_SLOW_CODER=1 CC=/nowhere/cc python setup.py -q build_ext --build-lib "$work/no" --build-temp "$work/no"

echo "== install into an empty environment"
torch=$(python -c 'import torch; print(torch.__version__.partition("+")[0])')
extras=
[ "${1:-}" != --full ] || extras="[hf,eval]"
python -m venv "$work/empty"
_env_pip "$work/empty" "$work/log" "torch==$torch" "$wheel$extras" || { tail -n 30 "$work/log"; exit 1; }
PATH=$work/empty/bin:$PATH
unset VIRTUAL_ENV PYTHONDONTWRITEBYTECODE
cd "$work"
distill-pretrain doctor
python - "$work" <<'PROGRAM'
import sys, distill_pretrain
from distill_pretrain.cache.codec.hc.native import find_library, load
assert distill_pretrain.__file__.startswith(sys.argv[1]), distill_pretrain.__file__
load()
print(f"distill_pretrain {distill_pretrain.__version__} of {sys.prefix}, with {find_library().name}")
PROGRAM
python "$root/examples/own_teacher.py" example
python "$root/examples/plain_pytorch.py" example
if [ "${1:-}" = --full ]; then
    python "$root/examples/hf_trainer.py" example
    torchrun --nproc-per-node=1 "$root/examples/megatron_loop.py" example
    cp -r "$root/launch" .
    VENV=none launch/quickstart.sh --short
fi
if [ -n "${OUTPUT:-}" ]; then
    cd "$root"
    mkdir -p "$OUTPUT"
    cp "$built"/* "$OUTPUT"
fi
echo "== packages are sound: $(basename "$wheel")"
