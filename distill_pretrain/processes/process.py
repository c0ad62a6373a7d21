"""One process of a job: its device, its threads, its default process group."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distill_pretrain.errors import DistillPretrainError, LaunchError, LayoutError
from distill_pretrain.processes.env import (
    launch_local_rank,
    launch_local_world_size,
    launch_rank,
    launch_world_size,
)

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


def local_device() -> torch.device:
    """Return this process's GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", launch_local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def set_cpu_threads(threads: int) -> None:
    """Fix the CPU threads of this process; 0 divides the node's cores among the job's processes."""
    if threads == 0:
        threads = max(1, (os.cpu_count() or 1) // launch_local_world_size())
    torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def process_group(timeout: timedelta = timedelta(hours=2)) -> Iterator[None]:
    """Open the job's default process group (NCCL on GPUs, gloo on CPUs), which is closed when the block succeeds.

    Without a launcher this is a group of one process. A group that exists already is used and left open. After an
    error in a job of several processes it is left to the end of the process: taking it down while other ranks wait
    in a collective can block, and would hide the error.
    """
    if dist.is_initialized():
        yield
        return
    device = local_device()
    if device.type == "cuda":
        _require_a_gpu_per_process()
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Tensor parallelism overlaps communication with compute only under this setting; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if "MASTER_ADDR" in os.environ:
        _meet(backend, timeout)
    else:
        dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{_free_port()}",
            rank=launch_rank(),
            world_size=launch_world_size(),
            timeout=timeout,
        )
    try:
        yield
    except BaseException:
        if launch_world_size() == 1:
            _close()
        raise
    _close()
    # As in `released_groups`: of a process that goes on, each group that is still referred to would keep its threads.
    gc.collect()


def _meet(backend: str, timeout: timedelta) -> None:
    """Make the default process group where the launcher says."""
    try:
        store = _store_of_this_start(timeout)
        rank, size = (launch_rank(), launch_world_size()) if store is not None else (-1, -1)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    except RuntimeError as error:
        # Of torch 2.6 this one is no DistNetworkError.
        if not isinstance(error, dist.DistNetworkError) and "EADDRINUSE" not in str(error):
            raise
        # torchrun names a port that was free; where it does not keep it, another program may have taken it since.
        raise LaunchError(
            "the processes of the job cannot meet",
            where=f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}",
            found=error,
            remedy="start the job again; with the same port, only once nothing listens there",
        ) from error


def _store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """Where the ranks meet, if torchrun's own store is it: in a room of its own for every start.

    torchrun keeps that store over restarts, and new ranks would find in it the addresses of those that died (pytorch
    issue 135712). Its count of restarts is the same on all ranks of one node alone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        if launch_rank() == 0 and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            _log.warning(
                "torchrun will not be able to start this job again (--max-restarts) on several nodes; "
                "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before it, as launch/torchrun_multi.sh does"
            )
        return None
    server = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        launch_world_size(),
        is_master=False,
        timeout=timeout,
    )
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", server)


@contextmanager
def released_groups() -> Iterator[None]:
    """Closes the process groups that were made inside the block; for a process that does one job after another.

    Every rank enters and leaves it. After an error they are left, as in `process_group`.
    """
    known = dist.distributed_c10d._world.pg_map
    before = set(known)
    yield
    # No rank may close a group that another is still using.
    dist.barrier()
    for group in [group for group in known if group not in before]:
        _close(group)
    # A model is full of reference cycles, and what still refers to a group keeps its threads and sockets.
    gc.collect()


def _close(group: dist.ProcessGroup | None = None) -> None:
    """Close a process group, by default all of them.

    A thread of gloo's may still have to drop the tensors of the last collective, for which it needs the interpreter's
    lock. Closing waits for that thread and holds the lock meanwhile (seen with torch 2.6: neither went on). So the lock
    is given up first.
    """
    for _ in range(5):
        time.sleep(0.002)
    dist.destroy_process_group(group)


def on_first_rank(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 alone; its result, or the user's mistake it found, reaches every rank.

    Every rank calls it. Without a process group it just runs the action.
    """
    if not dist.is_initialized():
        return action()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except (DistillPretrainError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


def on_every_rank(action: Callable[[], Result]) -> Result:
    """Run `action`; a user's mistake that some rank found is raised on every rank, so that none waits for it.

    Every rank calls it, and gets its own result.
    """
    if not dist.is_initialized():
        return action()
    mine: Result | None = None
    error: DistillPretrainError | None = None
    try:
        mine = action()
    except DistillPretrainError as found:
        error = found
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((found for found in errors if found is not None), None)
    if first is not None:
        raise first
    return mine  # type: ignore[return-value]


def _require_a_gpu_per_process() -> None:
    processes, gpus = launch_local_world_size(), torch.cuda.device_count()
    if processes > gpus:
        raise LayoutError(
            "more processes than GPUs on this node",
            found=f"{processes} processes, {gpus} GPUs",
            remedy=f"start {gpus} per node, or set CUDA_VISIBLE_DEVICES= to run on the CPU",
        )
