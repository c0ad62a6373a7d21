"""Stopping on SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


def most_anywhere(figures: Sequence[float], device: torch.device) -> list[float]:
    """The most that any rank has of each figure, in one collective of the default process group.

    Args:
        figures: as many on every rank.
        device: where tensors of that group live.
    """
    most = torch.tensor(figures, dtype=torch.float64).to(device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    found: list[float] = most.tolist()
    return found


class StopRequest:
    """Whether some process of the job was asked to stop.

    Args:
        device: where a flag of the default process group lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked = False

    def ask(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask this process to stop after the step it is working on."""
        self._asked = True

    def anywhere(self, figures: Sequence[float] = ()) -> tuple[bool, list[float]]:
        """Whether any rank was asked, and the most that any rank has of each figure, in one collective.

        Every rank calls it and gets the same, so that all save the same step.
        """
        asked, *found = most_anywhere((self._asked, *figures), self._device)
        return bool(asked), found


@contextmanager
def stop_on_sigterm(device: torch.device) -> Iterator[StopRequest]:
    """Inside the block SIGTERM asks to stop instead of ending the process; outside a main thread, nothing changes."""
    request = StopRequest(device)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request.ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
