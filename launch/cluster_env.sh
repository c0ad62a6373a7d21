# shellcheck shell=bash
# Sourced by the launchers: settings that PyTorch, NCCL and Python read. Each can be set beforehand; what is said of GPUs
# and networks is their documentation's word, not measured here.

# Tensor parallelism overlaps communication with compute only if kernels are queued in one order.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Threads of one process; train.threads and capture.threads win over it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Fewer out-of-memory errors from a fragmented GPU heap.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# A collective that another rank left must end the process, so that torchrun starts the group anew.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# The NCCL watchdog writes its last collectives to a file when one times out: the first thing to read after a hang.
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# INFO says which network NCCL chose: worth it once per cluster.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Training that is told to end saves a checkpoint first; torchrun kills what has not ended by then (seconds; before it read
# this variable, 30).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-200}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# Left to the cluster, because no value is right everywhere:
#   NCCL_SOCKET_IFNAME  network interface of the bootstrap (such as eth0), where several exist or a bridge is found first
#   GLOO_SOCKET_IFNAME  the same for gloo, which carries checkpoints' and loaders' small messages
#   NCCL_IB_HCA         InfiniBand adapters to use (such as mlx5)
