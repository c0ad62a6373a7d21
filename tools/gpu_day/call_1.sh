#!/usr/bin/env bash
# The first call on a machine with a GPU: are the kernels right, how fast are they, does a student train. Seven minutes.
#
#   tools/gpu_day/call_1.sh FOLDER [STAGE ...]
#
# Without a GPU the same commands run, on tiny sizes, up to the first CUDA call. README.md beside this has the rest.
set -u
# shellcheck source=tools/gpu_day/stages.sh
source "$(dirname "$0")/stages.sh"
begin call_1 420 "$@"
rounds=12
[ "$GPU_DAY_SIZE" = full ] || rounds=1

stage compile 60 "$PYTHON" tools/gpu_day/machine.py compile
stage kernels 90 "$PYTHON" tools/gpu_day/kernel_times.py
stage inputs 60 "$PYTHON" tools/gpu_day/inputs.py
stage capture 90 "$PYTHON" -m distill_pretrain capture "$WORK/capture.yaml"
stage train 90 "$PYTHON" -m distill_pretrain train "$WORK/student.yaml"
stage step 100 "$PYTHON" tools/bench_step.py "$WORK/student.yaml" --rounds "$rounds" --figures "$GPU_DAY_FIGURES"
stage tests 120 "$PYTHON" -m pytest -v -m gpu -p no:cacheprovider tests/kernels/test_on_gpu.py
finish
