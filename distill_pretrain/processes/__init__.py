"""Processes and process groups."""

from distill_pretrain.processes.env import (
    launch_local_rank,
    launch_local_world_size,
    launch_rank,
    launch_world_size,
)

__all__ = [
    "launch_local_rank",
    "launch_local_world_size",
    "launch_rank",
    "launch_world_size",
]
