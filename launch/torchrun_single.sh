#!/usr/bin/env bash
# One node: a verb of distill-pretrain on every GPU of this machine (or NPROC processes on its CPUs).
#
#   launch/torchrun_single.sh train student.yaml parallel.tensor=2
#   NPROC=2 launch/torchrun_single.sh capture capture.yaml
#
#   NPROC         processes (default: one per GPU, 1 without GPUs)
#   MAX_RESTARTS  how often a job that died is started again on its own; it goes on from its newest checkpoint, or from its
#                 unfinished shards (default 3; a mistake in the recipe fails as often, each time at once)
#   VENV          environment to use (launch/env.sh); set VENV=none to use the python on PATH, as in the container
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: ${0##*/} VERB RECIPE.yaml [section.key=value ...]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
if [ "${VENV:-}" != none ]; then
    # shellcheck source=launch/env.sh
    source "$here/env.sh" hf eval
fi
# shellcheck source=launch/cluster_env.sh
source "$here/cluster_env.sh"

NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec torchrun --standalone --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-3}" -m distill_pretrain "$@"
