"""What the launcher (torchrun, Slurm through torchrun, or nothing) says about this process.

The only reader of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Does not import torch.
"""

from __future__ import annotations

import os


def launch_rank() -> int:
    """Return the rank of this process in the job, 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launch_world_size() -> int:
    """Return the number of processes of the job, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch_local_rank() -> int:
    """Return the rank of this process within its node, 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def launch_local_world_size() -> int:
    """Return the number of processes of this job on this node, 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(launch_world_size())))


def publish_local_rank() -> None:
    """Set LOCAL_RANK where no launcher did, for packages that read it themselves."""
    os.environ.setdefault("LOCAL_RANK", str(launch_local_rank()))
