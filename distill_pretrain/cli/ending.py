"""How a command ends early: Ctrl-C, and an output that nobody reads any more (`| head`)."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, TextIO, cast

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as a shell reports it."""
NOT_READ = 141
"""Exit code when nobody reads the output any more: 128 + SIGPIPE, as a shell reports it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first Ctrl-C inside the block be a KeyboardInterrupt; a second one ends the process where it stands.

    What is written under its own name is complete at any moment, so the second one spoils nothing, and no clean-up
    of the first can hang. Outside a main thread, or where Ctrl-C is ignored, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield
        return

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        # After a first one the end of the interpreter is interruptible, too.
        if signal.getsignal(signal.SIGINT) is first:
            signal.signal(signal.SIGINT, before)


def nobody_reads() -> bool:
    """Tell whether what reads standard output or standard error has gone; then both lead nowhere from now on."""
    poll = select.poll()
    numbers = []
    for stream in (sys.stdout, sys.stderr):
        try:
            numbers.append(stream.fileno())
        except (OSError, ValueError, AttributeError):
            continue
    for number in numbers:
        poll.register(number, 0)
    gone = [number for number, events in poll.poll(0) if events & select.POLLERR]
    for number in gone:
        _lead_nowhere(number)
    return bool(gone)


@contextmanager
def output_may_end() -> Iterator[None]:
    """Let prints inside the block not fail where nobody reads them any more: a job outlives who watches it."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(cast(TextIO, _Patient(sys.stdout))))
        stack.enter_context(redirect_stderr(cast(TextIO, _Patient(sys.stderr))))
        yield


class _Patient:
    """A stream whose reader may go."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            _lead_nowhere(self._stream.fileno())
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            _lead_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lead_nowhere(number: int) -> None:
    """What is still buffered, and all that follows, is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
