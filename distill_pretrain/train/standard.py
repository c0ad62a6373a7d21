"""The callbacks that every training has, and the lines on the console."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.mcore.student.base import Student
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.guard import BadSteps
from distill_pretrain.train.metrics import EventLog, Metrics
from distill_pretrain.train.saving import Saver
from distill_pretrain.train.trackers import Tracking

_log = logging.getLogger(__name__)


def standard_callbacks(
    student: Student,
    checkpoints: CheckpointStore,
    *,
    identity: dict[str, Any],
    config: TrainConfig,
    events: EventLog,
    device: torch.device,
    is_first: bool,
) -> list[Callback]:
    """Make what every training has, in the order that `train.callbacks` explains; other callbacks come before.

    Args:
        student: being trained.
        checkpoints: where it is saved.
        identity: what a checkpoint must share with the run; shown by trackers.
        config: of the run.
        events: of the run.
        device: where tensors of the default process group live.
        is_first: whether this rank writes metrics.jsonl and feeds the trackers.
    """
    folder = config.output_dir
    return [
        BadSteps(config.bad_steps),
        Metrics(folder / "metrics.jsonl" if is_first else None, events),
        Tracking(config.track if is_first else (), folder, identity),
        Console(config),
        Saver(student, checkpoints, identity, config, events, device),
    ]


class Console(Callback):
    """Logs a line every `train.log_interval` steps and after the last.

    Args:
        config: of the run.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config

    def end_step(self, step: int, record: Mapping[str, Any], doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        if step % self._config.log_interval and step != self._config.steps:
            return
        names = {"loss": "loss", "ce": "ce", "kl": "kl", "grad_norm": "grad norm"}
        figures = [
            f"{name} {record[key]:.4f}" for key, name in names.items() if record[key] is not None
        ]
        _log.info(
            f"step {step}/{self._config.steps}  {'  '.join(figures)}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        )
