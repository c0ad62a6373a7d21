"""The trainer on a small job, inside the process group of a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.errors import CheckpointError, TrainingStopped
from distill_pretrain.mcore.model.config import ParallelConfig
from distill_pretrain.train.config import TrainConfig
from tests.support.layouts import make_job
from tests.support.notices import noted


@dataclass(frozen=True)
class Fault:
    """At step `at`, once, the loss is multiplied by `factor`; on one rank, or on all.

    With `gradient` only its gradient is: the loss stays what it is.
    """

    at: int
    factor: float
    rank: int | None = None
    gradient: bool = False


class _ScaledGradient(torch.autograd.Function):
    """The same values; the gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class Faulty:
    """An objective with a fault."""

    def __init__(self, objective: Any, fault: Fault) -> None:
        self.objective, self.fault = objective, fault
        self.term_names = objective.term_names
        self.step, self.is_over = 0, False

    @property
    def moving(self) -> dict[str, float]:
        return self.objective.moving

    def begin_step(self, step: int) -> None:
        self.step = step
        self.objective.begin_step(step)

    def __call__(self, logits: torch.Tensor, batch: Any) -> torch.Tensor:
        terms = self.objective(logits, batch)
        here = self.fault.rank is None or self.fault.rank == dist.get_rank()
        if self.step == self.fault.at and here and not self.is_over:
            self.is_over = True
            if self.fault.gradient:
                return _ScaledGradient.apply(terms, self.fault.factor)
            return terms * self.fault.factor
        return terms


@dataclass(frozen=True)
class Run:
    """What became of a run.

    Attributes:
        model: this rank's part.
        checkpoints: of the run.
        said: every line.
        error: what ended it early.
        stopped: whether it was asked to stop.
    """

    model: torch.nn.Module
    checkpoints: CheckpointStore
    said: list[str]
    error: BaseException | None
    stopped: bool


def run_trainer(
    folder: Path,
    groups: Any,
    *,
    model: dict[str, Any],
    parallel: ParallelConfig,
    fault: Fault | None = None,
    on_line: Callable[[str], None] | None = None,
    optimizer: dict[str, Any] | None = None,
    on_student: Callable[[Any], None] | None = None,
    callbacks: Callable[[Any], list[Any]] | None = None,
    **train: Any,
) -> Run:
    """Train from where the folder is, logging every step, with the settings `train` of the section of that name."""
    from distill_pretrain.mcore.model.chunks import unwrap
    from distill_pretrain.train.metrics import EventLog
    from distill_pretrain.train.standard import standard_callbacks
    from distill_pretrain.train.trainer import Trainer

    first = dist.get_rank() == 0
    folder.mkdir(exist_ok=True)
    student, batches = make_job(
        model,
        parallel,
        groups,
        kd=True,
        steps=train["steps"],
        optimizer=optimizer,
        precision=train.get("precision", "fp32"),
    )
    if on_student is not None:
        on_student(student)
    part = unwrap(student.chunks[0])
    if fault is not None:
        part.loss_function = Faulty(part.loss_function, fault)
    store = CheckpointStore(folder / "checkpoints")
    config = TrainConfig(output_dir=folder, global_batch_size=8, log_interval=1, **train)
    events = EventLog(folder / "events.jsonl" if first else None)
    standard = standard_callbacks(
        student,
        store,
        identity={},
        config=config,
        events=events,
        device=batches.device,
        is_first=first,
    )
    error: BaseException | None = None
    stopped = False
    with noted(on_line) as said:
        trainer = Trainer(
            student=student,
            batches=batches,
            prefetch_steps=1,
            checkpoints=store,
            callbacks=[*(callbacks(student) if callbacks else ()), *standard],
            resume_from=store.find({}),
            identity={},
            config=config,
            events=events,
            objective=part.loss_function,
            has_targets=True,
        )
        try:
            stopped = trainer.fit().stopped
        except (TrainingStopped, CheckpointError) as end:
            error = end
    dist.barrier()
    return Run(part, store, said, error, stopped)
