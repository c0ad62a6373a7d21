"""What the package logs, as lines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from distill_pretrain.processes.logs import PACKAGE


class _Lines(logging.Handler):
    def __init__(self, on_line: Callable[[str], None]) -> None:
        super().__init__()
        self.on_line = on_line

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        self.on_line(f"{'WARNING: ' * is_warning}{record.getMessage()}")


@contextmanager
def noted(on_line: Callable[[str], None] | None = None) -> Iterator[list[str]]:
    """The notices of this process inside the block; a warning begins with "WARNING: ". `on_line` may raise."""
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        if on_line is not None:
            on_line(line)

    logger, handler = logging.getLogger(PACKAGE), _Lines(note)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
