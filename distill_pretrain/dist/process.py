"""One process of a job: its device, its threads, its default process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from distill_pretrain.dist.env import (
    launch_local_rank,
    launch_local_world_size,
    launch_rank,
    launch_world_size,
)


def local_device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
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
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """The job's default process group (NCCL on GPUs, gloo on CPUs), closed at the end.

    Without a launcher this is a group of one process. A group that exists already is used and left open.
    """
    if dist.is_initialized():
        yield
        return
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
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
    finally:
        dist.destroy_process_group()
