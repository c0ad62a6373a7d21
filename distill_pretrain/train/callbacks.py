"""What may hang on to a training: told of every step, on every rank, without an edit of the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Callback:
    """Base of what hangs on to a training; every method does nothing here.

    All ranks have the same callbacks and call them at the same moments in the same order, so that a callback may
    communicate. An exception ends the training.
    """

    def before_step(self, step: int) -> None:
        """Called before the data of a step is waited for; steps count from 1."""

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """Called after a step's update, before it is logged and saved.

        Args:
            step: steps done.
            doing: tells the watchdog what this rank does, where it takes long.

        Returns:
            More fields of the step's record in metrics.jsonl: JSON values, equal on every rank.
        """
        return {}

    def end(self) -> None:
        """Called once after the last step, also where the training fails or is stopped; no communication here."""
