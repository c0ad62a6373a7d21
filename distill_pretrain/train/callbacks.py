"""What hangs on to a training: told of every step, on every rank, without an edit of the loop.

Whatever a training does beside its steps is a callback: exports, held-out figures and the profile of a recipe, those of
a user (`distill_pretrain.train_student(..., callbacks=[...])`), the guard against bad steps, metrics.jsonl, trackers,
console and checkpoints. The trainer calls them in this order, at these moments:

    load_state_dict   once, where training goes on from a checkpoint, and after every rollback
    begin             training goes on after these steps: at the start, and after every rollback
    before_step         before the data of the step is waited for
    figures             forward and backward passes are under way: what this rank adds to the step's one all-reduce
    judge               losses and gradient norm are known, the weights are still the old ones
    after_step          the weights are new; the fields that are returned go into the step's record
    end_step            the record is complete: it is written and shown, and what is due is saved
      before_save         a checkpoint is about to be made
      state_dict          what it keeps
    settle            before a rollback, and before training ends in order: what is under way is finished
    end               once, in any case, also where training fails

The order matters in three places. A callback of the recipe or of the user judges before the guard, so that the guard's
statistics hold applied steps alone. metrics.jsonl is made durable before the checkpoint of the same step is begun: no
checkpoint outlives the records of its steps. And checkpoints come last: what fails at a step leaves it unsaved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_pretrain.mcore.student.base import StepResult
    from distill_pretrain.train.trainer import Trainer


class Verdict(Enum):
    """What to do with a step."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "rollback"


@dataclass(frozen=True)
class Judgement:
    """What a callback makes of a step.

    Attributes:
        verdict: whether the update is made.
        reason: what is wrong with the step; None for a good one.
    """

    verdict: Verdict = Verdict.APPLY
    reason: str | None = None


class Callback:
    """Base of what hangs on to a training; every method does nothing here.

    All ranks have the same callbacks and call them at the same moments in the same order, so that a callback may
    communicate, but for `figures` and `end`. Steps count from 1. An exception ends the training.

    Attributes:
        trainer: whose callback it is, with `student`, `config`, `most` and more; set before the first call.
    """

    trainer: Trainer

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave to a checkpoint.

        Args:
            state: of all callbacks together; an older checkpoint may lack the keys of this one. A KeyError, TypeError
                or ValueError says that the checkpoint is damaged.
        """

    def begin(self, step: int) -> None:
        """Hear that training goes on: called at the start, and after every rollback.

        Args:
            step: steps done.
        """

    def before_step(self, step: int) -> None:
        """Hear that a step comes: called before its data is waited for."""

    def figures(self) -> Mapping[str, float]:
        """Return what this rank adds to the one all-reduce of a step; `trainer.most` then has the most of any rank.

        Called while the device computes: nothing here may wait for it. Keys are the same on every rank and at every
        step.
        """
        return {}

    def judge(self, step: int, seen: StepResult) -> Judgement:
        """Judge a step: called before its update, while the callbacks before have nothing against it.

        Args:
            step: being done.
            seen: its global losses and gradient norm, equal on every rank; so must be the judgement.
        """
        return Judgement()

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """Do what a step calls for: called after its update, before it is logged and saved.

        Args:
            step: steps done.
            doing: tells the watchdog what this rank does, where it takes long.

        Returns:
            More fields of the step's record in metrics.jsonl: JSON values, equal on every rank.
        """
        return {}

    def end_step(self, step: int, record: Mapping[str, Any], doing: Callable[[str], None]) -> None:
        """Take the record of a step: called once it is complete.

        Args:
            step: steps done.
            record: see `train.metrics`; equal on every rank.
            doing: see `after_step`.
        """

    def before_save(self, step: int) -> None:
        """Prepare for a checkpoint: called before one is made of these steps."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback: JSON values, equal on every rank, under keys of its own."""
        return {}

    def settle(self, doing: Callable[[str], None]) -> None:
        """Finish what is under way: called before training goes back to a checkpoint, and before it ends in order."""

    def end(self) -> None:
        """End: called once, also where the training fails or is stopped; no communication here."""
