"""What the user sees: plain lines, and progress that suits a terminal or a log file."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from distill_pretrain.processes.env import launch_rank

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 5.0


def say(*parts: object) -> None:
    """Prints one line, from the first process only."""
    if launch_rank() == 0:
        print(*parts, flush=True)


class Progress:
    """Counts work done; a context manager.

    On a terminal one line is rewritten in place; elsewhere a plain line comes every few seconds and at the end.
    Only the first process prints, unless told otherwise.

    Args:
        total: amount of work; None where it is unknown.
        desc: what is being done, such as "tokenising".
        unit: what is counted, such as "documents".
        stream: where to write; None means standard error.
        quiet: print nothing; None means on all but the first process.
    """

    def __init__(
        self,
        total: int | None,
        desc: str,
        *,
        unit: str = "",
        stream: TextIO | None = None,
        quiet: bool | None = None,
    ) -> None:
        self.total = total
        self.desc = desc
        self.unit = unit
        self.done = 0
        self._facts: dict[str, object] = {}
        self._left_s: float | None = None
        self._said: int | None = None
        self._stream = sys.stderr if stream is None else stream
        self._on_terminal = self._stream.isatty()
        self._quiet = launch_rank() != 0 if quiet is None else quiet
        self._started = time.monotonic()
        self._printed = self._started
        self._width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.done and (self._on_terminal or self._said != self.done):
            self._print()
        if self._on_terminal and self._width and not self._quiet:
            print(file=self._stream, flush=True)

    def advance(self, amount: int = 1, *, left_s: float | None = None, **facts: object) -> None:
        """Adds to the work done; `facts` are shown behind it (`loss="2.31"`).

        The line has one estimate of the time left: `left_s`, where the caller knows better than the pace until now.
        """
        self.done += amount
        self._left_s = left_s
        self._facts.update(facts)
        interval = TERMINAL_INTERVAL_S if self._on_terminal else LOG_INTERVAL_S
        if time.monotonic() - self._printed >= interval:
            self._print()

    def reach(self, done: int, total: int | None = None, **facts: Any) -> None:
        """Sets the work done (and the total, once known); `facts` as in `advance`."""
        self.total = self.total if total is None else total
        self.advance(done - self.done, **facts)

    def line(self) -> str:
        """Return the current state in words."""
        seconds = time.monotonic() - self._started
        unit = f" {self.unit}" if self.unit else ""
        if self.total:
            share = f"{self.done:,}/{self.total:,}{unit} ({100 * self.done / self.total:.0f}%)"
        else:
            share = f"{self.done:,}{unit}"
        parts = [f"{self.desc}: {share}", *(f"{k} {v}" for k, v in self._facts.items())]
        parts.append(duration(seconds))
        if self.total and 0 < self.done < self.total:
            at_this_pace = seconds * (self.total - self.done) / self.done
            parts.append(f"{duration(at_this_pace if self._left_s is None else self._left_s)} left")
        return ", ".join(parts)

    def _print(self) -> None:
        self._printed = time.monotonic()
        self._said = self.done
        if self._quiet:
            return
        line = self.line()
        if self._on_terminal:
            print(f"\r{line:<{self._width}}", end="", file=self._stream, flush=True)
            self._width = len(line)
        else:
            print(line, file=self._stream, flush=True)


def progress(
    total: int | None, desc: str, *, unit: str = "", quiet: bool | None = None
) -> Progress:
    """Show progress on standard error; use it in a `with` and call `advance`."""
    return Progress(total, desc, unit=unit, quiet=quiet)


def duration(seconds: float) -> str:
    """Write seconds as people read them, such as 2h05m, 3m07s or 9s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
