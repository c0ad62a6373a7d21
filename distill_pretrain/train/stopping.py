"""Stopping on SIGTERM: what a scheduler sends before it takes the machine away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Tells whether this process was asked to stop.

    The trainer sends it with the step's all-reduce, so that all ranks save the same step.

    Attributes:
        asked: whether it was.
    """

    def __init__(self) -> None:
        self.asked = False

    def ask(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask this process to stop after the step it is working on."""
        self.asked = True


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Let SIGTERM, inside the block, ask to stop instead of ending the process.

    A process that was asked does nothing on SIGTERM behind the block either, unless it had a handler before, which
    comes back: a scheduler that asks twice would otherwise end it while it closes its groups, with another exit code
    than that of a training that saved and stopped. Outside a main thread, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = signal.signal(signal.SIGTERM, request.ask)
    try:
        yield request
    finally:
        # Not SIG_IGN: processes started later would inherit that.
        if not (request.asked and before is signal.SIG_DFL):
            signal.signal(signal.SIGTERM, before)
