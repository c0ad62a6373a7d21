#!/usr/bin/env bash
# Checks and measures the CUDA kernels on this machine's GPU, in under ten minutes.
#
#   tools/gpu_check.sh FOLDER [MEGATRON_CORE.whl]
#
# Needs torch, numpy, pytest, scipy, pydantic, pyyaml and this tree; Transformer Engine and Liger are compared with
# where they can be imported. Writes into FOLDER: tests.log, sanitizer.log, kernels.json and kernels.md. Exit status 0 if
# all is well or there is no GPU, 1 if a check failed.
#
# Written without a GPU at hand: the kernels' logic is tested by emulation, this script's GPU half has yet to run.
set -u

folder=${1:?usage: tools/gpu_check.sh FOLDER [MEGATRON_CORE.whl]}
wheel=${2:-}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
failed=0

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no GPU that torch can use; nothing was checked or measured"
    exit 0
fi
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
cd "$root" || exit 1
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheel" ]; then
    "$python" -m pip install --quiet --no-deps --target "$folder/site" "$wheel" || exit 1
    PYTHONPATH="$PYTHONPATH:$folder/site"
fi
nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv || true

step() {
    # step SECONDS LOG COMMAND...: fails the check, and goes on, where the command fails.
    local seconds=$1 log=$2
    shift 2
    echo "gpu_check: $*"
    timeout "$seconds" "$@" >"$folder/$log" 2>&1
    local status=$?
    tail -n 4 "$folder/$log"
    if [ "$status" -ne 0 ]; then
        echo "gpu_check: FAILED with $status, see $folder/$log"
        failed=1
    fi
}

step 200 tests.log "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_on_gpu.py

if command -v compute-sanitizer >/dev/null; then
    few="equals_the_dense_definition and bfloat16 and 2.5 and (ghost or drop)"
    for tool in memcheck racecheck; do
        step 90 "sanitizer-$tool.log" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_on_gpu.py -k "$few"
    done
else
    echo "gpu_check: no compute-sanitizer on PATH; memory and races were not checked"
fi

step 200 bench.log "$python" tools/bench_kernels.py \
    --output "$folder/kernels.json" --markdown "$folder/kernels.md"

echo "gpu_check: $([ "$failed" -eq 0 ] && echo 'all is well' || echo 'something failed'), results in $folder"
exit "$failed"
