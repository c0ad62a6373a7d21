#!/usr/bin/env bash
# The second call on a machine with a GPU: what the first leaves. Five minutes; it needs nothing of the first.
#
#   tools/gpu_day/call_2.sh FOLDER [STAGE ...]
#
# Without a GPU the same commands run, on tiny sizes, up to the first CUDA call. README.md beside this has the rest.
set -u
# shellcheck source=tools/gpu_day/stages.sh
source "$(dirname "$0")/stages.sh"
begin call_2 300 "$@"

few="equals_the_dense_definition and bfloat16 and 2.5 and (ghost or drop)"
sanitized() {
    stage "$1" 60 "${sanitizer[@]}" "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_on_gpu.py -k "$few"
}

stage curves 60 "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider tests/train/test_gpu.py
stage quickstart 100 tools/gpu_day/quickstart.sh
stage inputs 60 "$PYTHON" tools/gpu_day/inputs.py
stage plan 20 "$PYTHON" tools/gpu_day/plan_memory.py
stage capture 60 "$PYTHON" -m distill_pretrain capture "$WORK/capture.yaml" capture.sampling_impl=cuda capture.sampler=multinomial
stage profile 60 "$PYTHON" tools/gpu_day/profile_step.py
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        sanitizer=(compute-sanitizer --tool "$tool" --error-exitcode 9)
        sanitized "$tool"
    done
else
    echo "no compute-sanitizer on PATH: memory and races are not checked"
fi
stage others 100 "$PYTHON" tools/bench_kernels.py --figures "$GPU_DAY_FIGURES"
finish
