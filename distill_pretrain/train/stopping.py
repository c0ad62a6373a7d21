"""Stopping on SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


class StopRequest:
    """Whether some process of the job was asked to stop.

    Args:
        device: where a flag of the default process group lives.
    """

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._asked = False

    def ask(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask this process to stop after the step it is working on."""
        self._asked = True

    def anywhere(self) -> bool:
        """Whether any rank was asked. Every rank calls it and gets the same, so that all save the same step."""
        self._flag.fill_(int(self._asked))
        dist.all_reduce(self._flag, dist.ReduceOp.MAX)
        return bool(self._flag.item())


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
