# shellcheck shell=bash
# Sourced by call_1.sh and call_2.sh: runs stages one after another, each within its own time; one that fails stops none.
#
#   begin NAME SECONDS "$@"               reads FOLDER [STAGE ...], looks at the machine
#   stage NAME SECONDS COMMAND...         status 0 is success, 77 "came as far as the first CUDA call, and there is no GPU"
#   finish                                the tables, the stages, the verdict; the status of the script
#
# In FOLDER: CALL.log has all output, CALL.jsonl a line per figure, written as soon as it is known. What else is written
# lies in WORK. Variables: PYTHON (python3), WORK (a temporary folder, removed at the end unless it was given),
# GPU_DAY_SIZE (full; tiny where there is no GPU), GPU_DAY_SECONDS (for the whole call).

no_gpu="" failed=() untimely=() chosen=() own_work="" patience=1

begin() {
    call=$1 deadline=$((SECONDS + ${GPU_DAY_SECONDS:-$2}))
    [ $# -ge 3 ] || { echo "usage: ${0##*/} FOLDER [STAGE ...]" >&2; exit 2; }
    mkdir -p "$3" || exit 2
    folder=$(cd "$3" && pwd)
    shift 3
    chosen=("$@")
    cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
    export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false CUDA_DEVICE_MAX_CONNECTIONS=1
    export PYTHONPATH=$PWD:$PWD/tools${PYTHONPATH:+:$PYTHONPATH}
    [ -n "${WORK:-}" ] || { WORK=$(mktemp -d) && own_work=1; } || exit 2
    mkdir -p "$WORK"
    export WORK DISTILL_PRETRAIN_KERNEL_CACHE=$WORK/kernels GPU_DAY_FIGURES=$folder/$call.jsonl
    export GPU_DAY_LOG=$folder/$call.log
    log=$GPU_DAY_LOG
    : >"$log"
    : >"$GPU_DAY_FIGURES"
    _install_wheels
    # A rehearsal is about what runs, not about how long it takes on whatever machine there is.
    _has_gpu || { no_gpu=1 patience=20 deadline=$((deadline + 36000)); }
    _run environment 60 "$PYTHON" tools/gpu_day/machine.py environment
    [ "$outcome" != "no GPU" ] || no_gpu=1 # or one that torch cannot use
    export GPU_DAY_SIZE=${GPU_DAY_SIZE:-${no_gpu:+tiny}}
    export GPU_DAY_SIZE=${GPU_DAY_SIZE:-full}
}

stage() {
    [ ${#chosen[@]} -eq 0 ] || [[ " ${chosen[*]} " == *" $1 "* ]] || return 0
    _run "$@"
}

finish() {
    echo
    "$PYTHON" tools/gpu_day/collect.py >>"$log" 2>&1 || failed+=(collect)
    [ -n "$no_gpu" ] || "$PYTHON" tools/gpu_day/tables.py "$GPU_DAY_FIGURES" || failed+=(tables)
    [ -z "$own_work" ] || rm -rf "$WORK"
    local problems=""
    [ ${#failed[@]} -eq 0 ] || problems="failed: ${failed[*]}"
    [ ${#untimely[@]} -eq 0 ] || problems="${problems:+$problems; }out of time: ${untimely[*]}"
    echo "figures and output in $folder"
    if [ -n "$no_gpu" ]; then
        echo "no GPU; ${problems:-everything up to it ran}"
    else
        echo "${problems:-every stage ran}"
    fi
    [ -z "$problems" ]
}

# Whether the driver sees a device; without torch, which takes its time.
_has_gpu() {
    "$PYTHON" - 2>/dev/null <<'END'
import ctypes
import sys

driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
sys.exit(driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0)
END
}

# Packages that this Python lacks, where pack.sh has been here.
_install_wheels() {
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("pydantic") and u.find_spec("megatron")))' &&
        return
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$WORK/site" tools/gpu_day/wheels/*.whl \
        >>"$log" 2>&1 || failed+=(wheels)
    export PYTHONPATH=$PYTHONPATH:$WORK/site
}

_run() {
    local name=$1 limit=$(($2 * patience)) started=$SECONDS before left=$((deadline - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        outcome="no time left" untimely+=("$name")
    else
        [ "$limit" -le "$left" ] || limit=$left
        printf '\n== %s, at most %d s: %s\n' "$name" "$limit" "$*" >>"$log"
        before=$(wc -l <"$log")
        GPU_DAY_STAGE=$name timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
        case $? in
            0) outcome=ok ;;
            77) outcome="no GPU" ;;
            124 | 137) outcome="stopped after $limit s" untimely+=("$name") ;;
            *) outcome=failed failed+=("$name") ;;
        esac
    fi
    printf '%-14s %s, %d s\n' "$name" "$outcome" $((SECONDS - started))
    printf '{"stage": "%s", "figure": "stage", "outcome": "%s", "seconds": %d}\n' \
        "$name" "$outcome" $((SECONDS - started)) >>"$GPU_DAY_FIGURES"
    case $outcome in ok | "no GPU" | "no time left") ;; *) tail -n +$((before + 1)) "$log" | tail -n 8 | sed 's/^/    /' ;; esac
}
