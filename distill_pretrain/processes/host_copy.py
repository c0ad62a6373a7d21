"""Figures of a step on their way from the device to the host, and back to all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist


class HostCopy:
    """A copy of a tensor in host memory; making it does not wait for the device.

    Args:
        tensor: on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._values = tensor
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> torch.Tensor:
        """Return the copy once it is there.

        The host waits for the device, unless it has since waited for something that was started later.
        """
        if self._copied is not None:
            self._copied.synchronize()
        return self._values


class MostAnywhere:
    """The most that any rank has of each figure, in one collective of the default process group.

    Args:
        figures: the same keys in the same order on every rank.
        device: where tensors of that group live.
    """

    def __init__(self, figures: Mapping[str, float], device: torch.device) -> None:
        self._names = tuple(figures)
        most = torch.tensor(list(figures.values()), dtype=torch.float64)
        if device.type == "cuda":
            most = most.pin_memory().to(device, non_blocking=True)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        self._most = HostCopy(most)

    def read(self) -> dict[str, float]:
        """Return the figures by name; see `HostCopy.read`."""
        return dict(zip(self._names, self._most.read().tolist(), strict=True))
