"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from distill_pretrain.checkpoint.store import Checkpoint, CheckpointStore
from distill_pretrain.data.batches import StudentBatches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.losses.terms import Objective
from distill_pretrain.mcore.schedule import StepResult, Student
from distill_pretrain.mcore.state import load_student, save_student
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.metrics import MetricsLog


class Trainer:
    """Steps a student over its batches; saves, resumes, reports.

    Args:
        student: model, optimizer and schedule of this rank.
        batches: this rank's data.
        prefetch_steps: steps read and decoded ahead, in a background thread.
        checkpoints: where to save.
        resume_from: checkpoint to go on from, of this run; None starts at step 0.
        identity: what a checkpoint must share with this run.
        config: length and intervals.
        open_metrics: opens metrics.jsonl from a step on; returns None on ranks that do not write.
        objective: the student's loss; told the step before each, since its weights may depend on it.
        has_targets: whether there is a divergence to report.
        say: prints one line, on rank 0.
    """

    def __init__(
        self,
        *,
        student: Student,
        batches: StudentBatches,
        prefetch_steps: int,
        checkpoints: CheckpointStore,
        resume_from: Checkpoint | None,
        identity: dict[str, Any],
        config: TrainConfig,
        open_metrics: Callable[[int], MetricsLog | None],
        objective: Objective,
        has_targets: bool,
        say: Callable[[str], None],
    ) -> None:
        self.student = student
        self.batches = batches
        self.prefetch_steps = prefetch_steps
        self.checkpoints = checkpoints
        self.resume_from = resume_from
        self.identity = identity
        self.config = config
        self.open_metrics = open_metrics
        self.objective = objective
        self.has_targets = has_targets
        self.say = say

    def fit(self) -> None:
        """Train to the last step."""
        done = self._resume()
        metrics = self.open_metrics(done)
        with PrefetchedBatches(
            self.batches,
            steps=range(done, self.config.steps),
            depth=self.prefetch_steps,
            with_targets=self.student.is_last_stage,
        ) as prefetched:
            while done < self.config.steps:
                started = time.perf_counter()
                micro_batches = prefetched.step_batches(done)
                waited = time.perf_counter() - started
                self.objective.begin_step(done + 1)
                result = self.student.step([iter(micro_batches) for _ in self.student.chunks])
                done += 1
                record = self._record(done, result, time.perf_counter() - started, waited)
                if metrics is not None:
                    metrics.write(record)
                if done % self.config.log_interval == 0 or done == self.config.steps:
                    self._print(record)
                if done % self.config.checkpoint_interval == 0 or done == self.config.steps:
                    if metrics is not None:
                        metrics.sync()
                    self._save(done)
        if metrics is not None:
            metrics.close()

    def _record(
        self, step: int, result: StepResult, seconds: float, waited: float
    ) -> dict[str, Any]:
        tokens_per_step = self.batches.global_batch_size * self.batches.seq_len
        terms = dict(zip(self.objective.term_names, result.terms.tolist(), strict=True))
        if not self.has_targets:
            terms["kl"] = None
        return {
            "step": step,
            **terms,
            "grad_norm": result.grad_norm,
            "lr": result.learning_rate,
            "tokens": step * tokens_per_step,
            "tokens_per_second": round(tokens_per_step / seconds, 1),
            "seconds": round(seconds, 4),
            "data_wait": round(waited, 4),
            "applied": result.applied,
        }

    def _print(self, record: dict[str, Any]) -> None:
        kl = "" if record["kl"] is None else f"  kl {record['kl']:.4f}"
        self.say(
            f"step {record['step']}/{self.config.steps}  loss {record['loss']:.4f}  "
            f"ce {record['ce']:.4f}{kl}  grad norm {record['grad_norm']:.3f}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        )

    def _resume(self) -> int:
        if self.resume_from is None:
            return 0
        self.resume_from.verify()
        if not load_student(self.student, self.resume_from.folder):
            self.say("the layout has changed: dropout streams start anew")
        self.say(f"resumed at step {self.resume_from.step}")
        return self.resume_from.step

    def _save(self, step: int) -> None:
        self.checkpoints.save(
            step,
            self.identity,
            lambda folder: save_student(self.student, folder),
            keep=self.config.keep_checkpoints,
        )
