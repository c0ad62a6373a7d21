"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.data.batches import StudentBatches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.errors import CheckpointError, TrainingStopped
from distill_pretrain.losses.terms import Objective
from distill_pretrain.mcore.student.base import StepResult, Student
from distill_pretrain.mcore.student.state import load_student
from distill_pretrain.processes.env import launch_world_size
from distill_pretrain.processes.memory import peak_gpu_bytes, peak_rss_bytes
from distill_pretrain.processes.watchdog import watchdog
from distill_pretrain.train.callbacks import Callback
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.guard import StepGuard, Verdict
from distill_pretrain.train.metrics import EventLog, MetricsLog
from distill_pretrain.train.saving import Saver
from distill_pretrain.train.stopping import StopRequest, stop_on_sigterm
from distill_pretrain.train.throughput import Throughput

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a training ended that did not fail.

    Attributes:
        steps: done, and saved.
        stopped: whether it was asked to stop before its last step.
    """

    steps: int
    stopped: bool


class Trainer:
    """Steps a student over its batches; saves, resumes, reports.

    Args:
        student: model, optimizer and schedule of this rank.
        batches: this rank's data.
        prefetch_steps: steps read and decoded ahead, in a background thread.
        checkpoints: where to save.
        callbacks: told of every step, in this order; their fields go into its record.
        resume_from: checkpoint to go on from, of this run; None starts at step 0.
        identity: what a checkpoint must share with this run.
        config: length and intervals.
        open_metrics: opens metrics.jsonl from a step on; returns None on ranks that do not write.
        events: of the run.
        throughput: tells TFLOP/s; None leaves them out.
        objective: the student's loss; told the step before each, since its weights may depend on it.
        has_targets: whether there is a divergence to report.
    """

    def __init__(
        self,
        *,
        student: Student,
        batches: StudentBatches,
        prefetch_steps: int,
        checkpoints: CheckpointStore,
        callbacks: Sequence[Callback],
        resume_from: Checkpoint | None,
        identity: dict[str, Any],
        config: TrainConfig,
        open_metrics: Callable[[int], MetricsLog | None],
        objective: Objective,
        has_targets: bool,
        events: EventLog | None = None,
        throughput: Throughput | None = None,
    ) -> None:
        self.student = student
        self.batches = batches
        self.prefetch_steps = prefetch_steps
        self.checkpoints = checkpoints
        self.callbacks = tuple(callbacks)
        self.resume_from = resume_from
        self.identity = identity
        self.config = config
        self.open_metrics = open_metrics
        self.objective = objective
        self.has_targets = has_targets
        self.events = events or EventLog(None)
        self.throughput = throughput
        self.saver = Saver(student, checkpoints, identity, config, self.events, batches.device)
        self._bytes_read = 0
        self.guard = StepGuard(config.bad_steps)
        self._verdict = Verdict.APPLY
        # Batches that rollbacks left out: step n trains on batch n + passed_over.
        self._passed_over = 0
        self._stopped = False

    def fit(self) -> FitResult:
        """Train to the last step, or to the step at which the job is asked to stop.

        Raises:
            TrainingStopped: a bad step, and the recipe says stop.
        """
        done = self._resume()
        device = self.batches.device
        self.events.add("started", done, num_processes=launch_world_size())
        with (
            stop_on_sigterm(device) as stop,
            watchdog(self.config.stuck_after_s) as doing,
            self.saver.flushed(doing),
            self._callbacks_ended(),
        ):
            while done < self.config.steps and not self._stopped:
                done = self._train_from(done, stop, doing)
        if not self._stopped:
            self.events.add("finished", done)
        return FitResult(steps=done, stopped=self._stopped)

    def _train_from(self, done: int, stop: StopRequest, doing: Callable[[str], None]) -> int:
        """Train until the last step, a rollback or a stop; the steps done."""
        metrics = self.open_metrics(done)
        if metrics is not None and metrics.dropped:
            self.events.add("repeating", done, steps=metrics.dropped)
        batches = range(done + self._passed_over, self.config.steps + self._passed_over)
        with (
            metrics or nullcontext(),
            PrefetchedBatches(
                self.batches,
                steps=batches,
                depth=self.prefetch_steps,
                with_targets=self.student.is_last_stage,
            ) as prefetched,
        ):
            for batch in batches:
                started = time.perf_counter()
                self._before_step(done + 1, doing)
                micro_batches = prefetched.step_batches(batch)
                waited = time.perf_counter() - started
                doing(f"step {done + 1}: computing")
                self.objective.begin_step(done + 1)
                iterators = [iter(micro_batches) for _ in self.student.chunks]
                result = self.student.step(iterators, partial(self._accepts, done + 1))
                if self._verdict is Verdict.ROLL_BACK:
                    self.saver.flush(doing)
                    return self._roll_back(done + 1)
                done += 1
                seconds = time.perf_counter() - started
                figures = (self.saver.writing, *self._own_figures(waited))
                asked, (writing, *most) = stop.anywhere(figures)
                added = self._after_step(done, doing)
                self._report(done, result, metrics, seconds, most, added)
                doing(f"step {done}: saving")
                self.saver.end_step(bool(writing))
                stopping = asked and done < self.config.steps
                if stopping or done % self.config.checkpoint_interval == 0 or batch == batches[-1]:
                    if metrics is not None:
                        metrics.sync()
                    self.saver.save(done, self._progress(), doing)
                if stopping:
                    self.saver.flush(doing)
                    _log.info(f"asked to stop: saved step {done}; start it again to go on")
                    self.events.add("stopped", done)
                    self._stopped = True
                    break
        return done

    @contextmanager
    def _callbacks_ended(self) -> Iterator[None]:
        try:
            yield
        finally:
            for callback in self.callbacks:
                callback.end()

    def _before_step(self, step: int, doing: Callable[[str], None]) -> None:
        for callback in self.callbacks:
            callback.before_step(step)
        doing(f"step {step}: reading")

    def _after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """What the callbacks add to a step's record."""
        added: dict[str, Any] = {}
        for callback in self.callbacks:
            added |= callback.after_step(step, doing)
        return added

    def _accepts(self, step: int, seen: StepResult) -> bool:
        """Whether a step may change the weights. Every rank comes to the same verdict."""
        self._verdict = self.guard.judge(step, seen.terms[0].item(), seen.grad_norm)
        if self.guard.reason is not None:
            _log.warning(f"bad step {step}: {self.guard.reason} ({self._verdict.value})")
            self.events.add("bad_step", step, reason=self.guard.reason, verdict=self._verdict.value)
        return self._verdict is Verdict.APPLY

    def _roll_back(self, bad_step: int) -> int:
        """Restore the newest checkpoint, to go on with the batches after that of the bad step; the steps done."""
        checkpoint = self.checkpoints.find(self.identity)
        if checkpoint is None:
            raise TrainingStopped(
                "there is no checkpoint to go back to",
                where=f"step {bad_step}, train.bad_steps",
                found=self.guard.reason,
                remedy="lower train.checkpoint_interval, or set the policy to skip",
            )
        self._passed_over += bad_step - checkpoint.step
        load_student(self.student, checkpoint.folder)
        self.guard.go_back(_progress_of(checkpoint)[1])
        _log.info(f"back at step {checkpoint.step}; {self._passed_over} batches are passed over")
        self.events.add("rolled_back", checkpoint.step, passed_over=self._passed_over)
        return checkpoint.step

    def _own_figures(self, waited: float) -> tuple[float, float, int, int]:
        """What this rank adds to a step's record: seconds waited, bytes of cache read, peaks of memory."""
        before, self._bytes_read = self._bytes_read, self.batches.bytes_read
        device = self.batches.device
        return waited, self._bytes_read - before, peak_rss_bytes(), peak_gpu_bytes(device)

    def _report(
        self,
        step: int,
        result: StepResult,
        metrics: MetricsLog | None,
        seconds: float,
        most: list[float],
        added: dict[str, Any],
    ) -> None:
        record = self._record(step, result, seconds, most) | added
        if metrics is not None:
            metrics.write(record)
        if step % self.config.log_interval == 0 or step == self.config.steps:
            self._print(record)

    def _record(
        self, step: int, result: StepResult, seconds: float, most: list[float]
    ) -> dict[str, Any]:
        """See `train.metrics`; `most` is what `_own_figures` gives, the most of all ranks."""
        waited, bytes_read, rss, gpu = most
        tokens_per_step = self.batches.global_batch_size * self.batches.seq_len
        values = [value if math.isfinite(value) else None for value in result.terms.tolist()]
        terms = dict(zip(self.objective.term_names, values, strict=True))
        if not self.has_targets:
            terms["kl"] = None
        speed = tokens_per_step / seconds
        return {
            "step": step,
            **terms,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": result.learning_rate,
            "tokens": step * tokens_per_step,
            "tokens_per_second": round(speed, 1),
            **(self.throughput.figures(speed) if self.throughput else {}),
            "seconds": round(seconds, 4),
            "data_wait": round(waited, 4),
            "cache_mb_per_s": round(bytes_read / seconds / 1e6, 4) if bytes_read else None,
            "rss_peak_gb": round(rss / 1e9, 4),
            "gpu_peak_gb": round(gpu / 1e9, 4) if gpu else None,
            "applied": result.applied,
            "time": round(time.time(), 3),
        }

    def _print(self, record: dict[str, Any]) -> None:
        names = {"loss": "loss", "ce": "ce", "kl": "kl", "grad_norm": "grad norm"}
        figures = [
            f"{name} {record[key]:.4f}" for key, name in names.items() if record[key] is not None
        ]
        _log.info(
            f"step {record['step']}/{self.config.steps}  {'  '.join(figures)}  "
            f"lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tokens/s"
        )

    def _resume(self) -> int:
        if self.resume_from is None:
            return 0
        self._passed_over, recent = _progress_of(self.resume_from)
        self.guard.go_back(recent)
        if not load_student(self.student, self.resume_from.folder):
            _log.info("the layout has changed: dropout streams start anew")
        _log.info(f"resumed at step {self.resume_from.step}")
        return self.resume_from.step

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of a run besides its student."""
        return {"passed_over": self._passed_over, "recent_losses": self.guard.recent}


def _progress_of(checkpoint: Checkpoint) -> tuple[int, list[float]]:
    """What `Trainer._progress` recorded: batches passed over, recent losses.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        passed_over, recent = (checkpoint.progress[k] for k in ("passed_over", "recent_losses"))
        return int(passed_over), [float(loss) for loss in recent]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the checkpoint's record is damaged",
            where=checkpoint.folder,
            found=f"progress: {type(error).__name__}: {error}",
        ) from None
