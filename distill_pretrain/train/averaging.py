"""The moving average of a student's weights, kept while it trains (optimizer.ema_decay)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distill_pretrain.mcore.student.average import WeightAverage
from distill_pretrain.train.callbacks import Callback


class Averaging(Callback):
    """Takes every step's weights into the average; comes before what evaluates or exports it.

    Args:
        average: of the student, saved and restored with it.
    """

    def __init__(self, average: WeightAverage) -> None:
        self._average = average

    def begin(self, step: int) -> None:
        """See `Callback`: a run's average starts from the weights that the run starts from."""
        if step == 0:
            self._average.restart()

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """See `Callback`."""
        self._average.update(step)
        return {}
