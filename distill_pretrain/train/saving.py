"""The checkpoints of a run: written before training goes on, or while it does (`train.async_save`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from distill_pretrain.checkpoint.store import CheckpointStore, PendingSave
from distill_pretrain.mcore.student.background_save import BackgroundSave
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.processes.host_copy import MostAnywhere
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.metrics import EventLog

LOOK_INTERVAL_S = 1.0


class Saver(Callback):
    """Saves the student of a run every `train.checkpoint_interval` steps, one checkpoint at a time.

    A checkpoint written in the background is published by all ranks at the end of the first step at which none is
    writing, or by the next `save` or `flush`. Until then nothing else sees it.

    Args:
        student: what is saved.
        checkpoints: where.
        identity: what a checkpoint must share with the run.
        config: whether in the background, and how many are kept.
        events: told of every checkpoint once it is published.
        device: where a flag of the default process group lives.
    """

    def __init__(
        self,
        student: Student,
        checkpoints: CheckpointStore,
        identity: dict[str, Any],
        config: TrainConfig,
        events: EventLog,
        device: torch.device,
    ) -> None:
        self._student = student
        self._checkpoints = checkpoints
        self._identity = identity
        self._config = config
        self._events = events
        self._device = device
        self._pending: PendingSave | None = None
        self._begun = 0.0
        self._stalled = 0.0

    @property
    def writing(self) -> bool:
        """Whether this rank is writing a checkpoint in the background."""
        return self._pending is not None and self._pending.files.writing

    def figures(self) -> dict[str, float]:
        """See `Callback`."""
        return {"writing": self.writing}

    def end_step(self, step: int, record: Mapping[str, Any], doing: Callable[[str], None]) -> None:
        """See `Callback`: publish what every rank has finished writing, and save what is due."""
        doing(f"step {step}: saving")
        if self._pending is not None and not self.trainer.most["writing"]:
            self._publish(time.perf_counter())
        config = self._config
        if self.trainer.stopping or step % config.checkpoint_interval == 0 or step == config.steps:
            self.save(step, self.trainer.progress(step), doing)

    def settle(self, doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        self.flush(doing)

    def end(self) -> None:
        """See `Callback`: a save that is still in flight is left unfinished, as where one rank alone fails."""
        if self._pending is not None:
            self._pending.files.cancel()

    def save(self, step: int, progress: dict[str, Any], doing: Callable[[str], None]) -> None:
        """Save; or begin to, once the save before is published. Every rank calls it.

        Args:
            step: optimizer steps done.
            progress: see `Checkpoint`.
            doing: told what this rank waits for.
        """
        self.flush(doing)
        started = time.perf_counter()
        behind = self._config.async_save
        self._pending = self._checkpoints.begin_save(
            step,
            self._identity,
            partial(BackgroundSave, self._student, behind=behind),
            keep=self._config.keep_checkpoints,
            progress=progress,
        )
        self._begun, self._stalled = started, time.perf_counter() - started
        if not behind:
            self.flush(doing)

    def flush(self, doing: Callable[[str], None]) -> None:
        """Wait for the save that is in flight, if there is one, and publish it. Every rank calls it.

        As long as some rank's files grow, `doing` hears of it on every rank.

        Raises:
            CheckpointError: its files could not be written.
        """
        if self._pending is None:
            return
        started = time.perf_counter()
        files, step = self._pending.files, self._pending.step
        moves = -1
        writing = moving = 1.0
        while writing:
            if moving:
                what = "writing the" if files.writing else "waiting for the other ranks'"
                doing(f"step {step}: {what} checkpoint")
            files.wait(LOOK_INTERVAL_S)
            before, moves = moves, files.moves
            looked = {"writing": float(files.writing), "moving": float(moves != before)}
            writing, moving = MostAnywhere(looked, self._device).read().values()
        self._publish(started)

    def _publish(self, waiting_since: float) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None
        pending.publish()
        now = time.perf_counter()
        facts = {"seconds": round(self._stalled + now - waiting_since, 3)}
        if self._config.async_save:
            facts["published_after"] = round(now - self._begun, 3)
        self._events.add("saved", pending.step, **facts)
