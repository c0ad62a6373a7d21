"""Checkpoints saved while the caller waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distill_pretrain.checkpoint.store import CheckpointStore


def save_student(student: Any, folder: Path) -> None:
    """A student's state in an existing empty folder, written as `train` does where it waits for a save."""
    from distill_pretrain.mcore.student.background_save import BackgroundSave

    BackgroundSave(student, folder, behind=False).finish()


@dataclass(frozen=True)
class Written:
    """Files of a checkpoint that are there already."""

    writing: bool = False
    moves: int = 0

    def wait(self, seconds: float) -> None:
        pass

    def cancel(self) -> None:
        pass

    def finish(self) -> dict[str, str]:
        dist.barrier()
        return {}


def save(
    store: CheckpointStore,
    step: int,
    identity: dict[str, Any],
    write: Callable[[Path], None],
    *,
    keep: int,
) -> None:
    """Publish a checkpoint of the files that `write` puts into the given folder."""

    def start(folder: Path) -> Written:
        write(folder)
        return Written()

    store.begin_save(step, identity, start, keep=keep).publish()
