"""What becomes of a step whose loss or gradient is not finite, or whose loss jumps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from distill_pretrain.errors import TrainingStopped
from distill_pretrain.train.callbacks import Callback, Judgement, Verdict
from distill_pretrain.train.config import BadStepsConfig

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import StepResult


class StepGuard:
    """Judges every step before its update; every rank judges alike, since all see the same global figures.

    Only losses of applied steps enter the rolling statistics: one NaN, or one spike, does not move them.

    Args:
        config: the policy.
        recent: losses of the last applied steps, of a run that goes on.
    """

    def __init__(self, config: BadStepsConfig, recent: Iterable[float] = ()) -> None:
        self._config = config
        self._recent = deque(recent, maxlen=config.window)
        self._bad_in_a_row = 0
        self._rollbacks = 0
        self.reason: str | None = None
        """Why the last step judged was bad; None for a good one."""

    @property
    def recent(self) -> list[float]:
        """The losses of the last applied steps, oldest first."""
        return list(self._recent)

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judge a step by its global mean loss and gradient norm (before clipping).

        Raises:
            TrainingStopped: the policy says stop, or too many steps were bad.
        """
        self.reason, policy = self._complaint(loss, grad_norm)
        if self.reason is None:
            self._recent.append(loss)
            self._bad_in_a_row = 0
            return Verdict.APPLY
        self._bad_in_a_row += 1
        if policy == "stop" or self._bad_in_a_row > self._config.most_in_a_row:
            raise self._stopped(step, f"{self._bad_in_a_row} in a row")
        if policy == "skip":
            return Verdict.SKIP
        self._rollbacks += 1
        if self._rollbacks > self._config.most_rollbacks:
            raise self._stopped(step, f"after {self._config.most_rollbacks} rollbacks")
        return Verdict.ROLL_BACK

    def go_back(self, recent: Iterable[float]) -> None:
        """Take the rolling statistics of the checkpoint that training went back to."""
        self._recent = deque(recent, maxlen=self._config.window)

    def _complaint(self, loss: float, grad_norm: float) -> tuple[str | None, str]:
        """(what is wrong with a step, or None; the policy that it falls under)."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}", self._config.nonfinite
        if self._config.spike == "off" or len(self._recent) < self._config.window:
            return None, ""
        mean, deviation = fmean(self._recent), pstdev(self._recent)
        limit = mean + self._config.spike_deviations * deviation
        if loss <= limit:
            return None, ""
        text = f"the loss is {loss:.4f}; the last {len(self._recent)} had mean {mean:.4f}, limit {limit:.4f}"
        return text, self._config.spike

    def _stopped(self, step: int, count: str) -> TrainingStopped:
        return TrainingStopped(
            "training stopped at a bad step",
            where=f"step {step} ({count})",
            found=self.reason,
            remedy="start it again to go on from the last checkpoint; lower optimizer.lr, or change train.bad_steps",
        )


class BadSteps(Callback):
    """The guard of a training.

    Args:
        config: the policy.
    """

    def __init__(self, config: BadStepsConfig) -> None:
        self.guard = StepGuard(config)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Callback`: the losses of the last applied steps."""
        self.guard.go_back([float(loss) for loss in state["recent_losses"]])

    def state_dict(self) -> dict[str, Any]:
        """See `Callback`."""
        return {"recent_losses": self.guard.recent}

    def judge(self, step: int, seen: StepResult) -> Judgement:
        """See `Callback`."""
        verdict = self.guard.judge(step, seen.terms[0].item(), seen.grad_norm)
        return Judgement(verdict, self.guard.reason)
