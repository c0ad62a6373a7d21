"""Where the notices of a command go: standard error, with time, level and rank, from the first process alone.

Modules log to `logging.getLogger(__name__)`. Importing the package sets up nothing; a command does, with `shown`, and a
program that uses the package decides for itself. Results are printed to standard output, and are no notices.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from distill_pretrain.errors import ConfigError
from distill_pretrain.processes.env import launch_rank

LEVELS = ("debug", "info", "warning", "error")
LEVEL_VARIABLE = "DISTILL_PRETRAIN_LOG"
PACKAGE = "distill_pretrain"

ANY_RANK: dict[str, Any] = {"any_rank": True}
"""`extra` of a notice that concerns its own process, such as a read that failed: it is shown on every rank. Most
notices are the same on all ranks, and only rank 0 shows them."""


def chosen_level(option: str | None) -> int:
    """Return the level of a command: its option, else DISTILL_PRETRAIN_LOG, else info.

    Raises:
        ConfigError: the variable holds no level.
    """
    name = option or os.environ.get(LEVEL_VARIABLE) or "info"
    if name.lower() not in LEVELS:
        raise ConfigError(
            "there is no such level of notices",
            where=LEVEL_VARIABLE,
            found=name,
            expected=f"one of: {', '.join(LEVELS)}",
            remedy="set one of these, or unset the variable",
        )
    level: int = getattr(logging, name.upper())
    return level


@contextmanager
def shown(level: int) -> Iterator[None]:
    """Write the notices of this package, inside the block and from `level` on, as lines of standard error.

    The loggers of other packages are left alone, and so is the root logger: nothing is shown twice.
    """
    logger = logging.getLogger(PACKAGE)
    handler = _StandardError()
    handler.setFormatter(_Formatter(with_name=level <= logging.DEBUG))
    handler.addFilter(_is_shown_here)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _is_shown_here(record: logging.LogRecord) -> bool:
    return launch_rank() == 0 or getattr(record, "any_rank", False)


class _Formatter(logging.Formatter):
    """Writes lines such as `2026-11-30 13:20:01 WARNING rank 0: the text`."""

    def __init__(self, *, with_name: bool) -> None:
        name = " %(name)s" if with_name else ""
        super().__init__(
            f"%(asctime)s %(levelname)s rank %(rank)d{name}: %(message)s", "%Y-%m-%d %H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        record.rank = launch_rank()
        return super().format(record)


if TYPE_CHECKING:
    _TextHandler = logging.StreamHandler[TextIO]
else:  # Python 3.10's takes no type as it runs
    _TextHandler = logging.StreamHandler


class _StandardError(_TextHandler):
    """Writes to what `sys.stderr` is at that moment: a command may exchange it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr
