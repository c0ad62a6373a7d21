#!/usr/bin/env bash
# Several nodes: start the same line on every node; the nodes find each other at RDZV_ENDPOINT.
#
#   NNODES=4 RDZV_ENDPOINT=node001:29500 JOB_ID=student-1b launch/torchrun_multi.sh train student.yaml
#
#   NNODES         nodes, or LEAST:MOST (training needs the number its layout was checked for; capture takes any)
#   RDZV_ENDPOINT  host:port of one of the nodes, reachable from all; that node hosts the rendezvous
#   JOB_ID         the same on all nodes, another for every job
#   NPROC          processes per node (default: one per GPU, 1 without GPUs)
#   MAX_RESTARTS   how often torchrun starts the group again when a process dies and all nodes live (default 3)
#   NODE_RETRIES   how often this script starts torchrun again when that was not enough, as when a node was lost (default 5)
#   RETRY_WAIT_S   seconds before it does (default 5)
#   RDZV_CONF      settings of the rendezvous, such as join_timeout=3600,keep_alive_interval=5
#   VENV           as in torchrun_single.sh
#
# When a process or a whole node dies, the other nodes' processes end, and all wait at the rendezvous until NNODES are there
# again: start this line again on the node that was lost. Training then goes on from its newest checkpoint. torchrun alone
# does not survive a lost node whose heartbeats have not run out: it counts the dead node in, waits a minute and gives up.
# That is what NODE_RETRIES is for, on every node alike, the one that hosts the rendezvous included.
# train.output_dir must be on a file system that all nodes share.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: ${0##*/} VERB RECIPE.yaml [section.key=value ...]" >&2; exit 2; }
for name in NNODES RDZV_ENDPOINT JOB_ID; do
    [ -n "${!name:-}" ] || { echo "${0##*/}: error: $name is not set; see the head of this file" >&2; exit 2; }
done
here=$(cd "$(dirname "$0")" && pwd)
if [ "${VENV:-}" != none ]; then
    # shellcheck source=launch/env.sh
    source "$here/env.sh" hf eval
fi
# shellcheck source=launch/cluster_env.sh
source "$here/cluster_env.sh"
# The store that ranks meet at begins anew with every start. torchrun would keep its own one over restarts, and ranks would
# find in it the addresses of those that died (pytorch issue 135712; met with torch 2.13 and gloo). On one node the package
# sees to that itself.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
retries=${NODE_RETRIES:-5} told_to_end="" job=""
trap 'told_to_end=1; [ -z "$job" ] || kill -TERM "$job"' TERM INT
while true; do
    torchrun --nnodes="$NNODES" --nproc-per-node="$NPROC" --max-restarts="${MAX_RESTARTS:-3}" \
        --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="$JOB_ID" --rdzv-conf="${RDZV_CONF:-}" \
        -m distill_pretrain "$@" &
    job=$! status=0
    wait "$job" || status=$?
    # The signal ended the first wait early.
    [ -z "$told_to_end" ] || { wait "$job" || status=$?; exit "$status"; }
    [ "$status" -ne 0 ] && [ "$retries" -gt 0 ] || exit "$status"
    retries=$((retries - 1))
    echo "${0##*/}: torchrun ended with $status; starting it again ($retries retries left)" >&2
    sleep "${RETRY_WAIT_S:-5}"
done
