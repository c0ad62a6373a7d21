"""Where a capture samples: on the host with numpy, or on the teacher's GPU with kernels. The caches are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

from distill_pretrain.contracts import Replica
from distill_pretrain.errors import ConfigError
from distill_pretrain.kernels.cuda.backend import KernelsUnavailable, launcher_for
from distill_pretrain.kernels.cuda.launcher import Launcher
from distill_pretrain.kernels.teacher_sampling import SOURCE, DeviceColumns
from distill_pretrain.sampling.columns import Columns
from distill_pretrain.sampling.host import host_columns

SamplingImplementation = Literal["auto", "numpy", "cuda"]

ReadColumns = Callable[[torch.Tensor], Columns]
"""Makes a chunk of logits readable to the samplers."""


def columns_reader(
    implementation: SamplingImplementation, device: torch.device, replica: Replica
) -> ReadColumns:
    """Return what reads the logits of a teacher on `device`, the same on all ranks that hold it.

    Every rank of the replica calls it. "auto" takes the kernels where all of the ranks can run them; where a GPU is
    there but the kernels are not, the leader warns.

    Raises:
        ConfigError: "cuda" is asked for and some rank cannot run the kernels; on every rank.
    """
    if implementation == "numpy" or (implementation == "auto" and device.type != "cuda"):
        return host_columns
    launcher, reason = _launcher(device)
    reason = _first_of_all(reason, replica)
    if reason is None:
        assert launcher is not None
        return device_reader(launcher)
    if implementation == "cuda":
        raise ConfigError(
            "the teacher's distributions cannot be sampled by CUDA kernels",
            where="capture.sampling_impl",
            found=f"cuda; {reason}",
            remedy="set capture.sampling_impl=auto: numpy samples where the kernels cannot, the same bytes",
        )
    if replica.is_leader:
        warnings.warn(
            f"the teacher's distributions are sampled by numpy on the host, slower: {reason}",
            stacklevel=2,
        )
    return host_columns


def device_reader(launcher: Launcher) -> ReadColumns:
    """Return what reads logits where they are, by kernels of the launcher."""
    return lambda logits: DeviceColumns(logits, launcher)


def _launcher(device: torch.device) -> tuple[Launcher | None, str | None]:
    """A launcher, or why there is none."""
    try:
        return launcher_for(SOURCE, device), None
    except KernelsUnavailable as error:
        return None, str(error)


def _first_of_all(reason: str | None, replica: Replica) -> str | None:
    """Why a rank of the replica has no kernels; None if all have. They must agree, as their collectives do."""
    if replica.group is None:
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size(replica.group)
    dist.all_gather_object(reasons, reason, group=replica.group)
    return next((found for found in reasons if found is not None), None)
