"""The training loop; everything beside it is a callback."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from distill_pretrain.checkpoint.record import Checkpoint
from distill_pretrain.checkpoint.store import CheckpointStore
from distill_pretrain.data.batches import StudentBatches, micro_batches
from distill_pretrain.data.prefetch import PrefetchedBatches
from distill_pretrain.errors import CheckpointError, ConfigError, TrainingStopped
from distill_pretrain.losses.terms import Objective
from distill_pretrain.mcore.student.base import StepResult, Student
from distill_pretrain.mcore.student.state import load_student
from distill_pretrain.processes.env import launch_world_size
from distill_pretrain.processes.host_copy import MostAnywhere
from distill_pretrain.processes.memory import peak_gpu_bytes, peak_rss_bytes
from distill_pretrain.processes.watchdog import watchdog
from distill_pretrain.train.callbacks import Callback, Judgement, Verdict
from distill_pretrain.train.config import TrainConfig
from distill_pretrain.train.metrics import EventLog
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
    """Steps a student over its batches.

    Attributes:
        most: the most that any rank has of each figure of the last step, `Callback.figures` among them.
        stopping: whether training ends after this step, since some process was asked to stop.

    Args:
        student: model, optimizer and schedule of this rank.
        batches: this rank's data.
        prefetch_steps: steps read and decoded ahead, in a background thread.
        checkpoints: where rollbacks find what to go back to.
        callbacks: told of every step, in this order; see `train.callbacks`.
        resume_from: checkpoint to go on from, of this run; None starts at step 0.
        identity: what a checkpoint must share with this run.
        config: length and policies.
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
        self.objective = objective
        self.has_targets = has_targets
        self.events = events or EventLog(None)
        self.throughput = throughput
        self.most: dict[str, float] = {}
        self.stopping = False
        self._bytes_read = 0
        self._figures: MostAnywhere
        self._judged = Judgement()
        # Batches that rollbacks left out: step n trains on batch n + passed_over.
        self._passed_over = 0
        for callback in self.callbacks:
            callback.trainer = self

    def fit(self) -> FitResult:
        """Train to the last step, or to the step at which the job is asked to stop.

        A job is asked by a SIGTERM to any of its processes; `stop_on_sigterm` says what a second one does.

        Raises:
            TrainingStopped: a bad step, and the recipe says stop.
        """
        done = self._resume()
        self.events.add("started", done, num_processes=launch_world_size())
        with (
            stop_on_sigterm() as stop,
            watchdog(self.config.stuck_after_s) as doing,
            self._callbacks_ended(doing),
        ):
            while done < self.config.steps and not self.stopping:
                done = self._train_from(done, stop, doing)
        if not self.stopping:
            self.events.add("finished", done)
        return FitResult(steps=done, stopped=self.stopping)

    def _train_from(self, done: int, stop: StopRequest, doing: Callable[[str], None]) -> int:
        """Train until the last step, a rollback or a stop; the steps done."""
        for callback in self.callbacks:
            callback.begin(done)
        batches = range(done + self._passed_over, self.config.steps + self._passed_over)
        with PrefetchedBatches(
            self.batches,
            steps=batches,
            depth=self.prefetch_steps,
            with_targets=self.student.is_last_stage,
        ) as prefetched:
            for batch in batches:
                started = time.perf_counter()
                for callback in self.callbacks:
                    callback.before_step(done + 1)
                doing(f"step {done + 1}: reading")
                read = prefetched.host_batches(batch)
                waited = time.perf_counter() - started
                doing(f"step {done + 1}: computing")
                self.objective.begin_step(done + 1)
                result = self.student.step(
                    micro_batches(read, self.batches.device, readers=len(self.student.chunks)),
                    partial(self._accepts, done + 1),
                    partial(self._share_figures, stop, waited),
                )
                if self._judged.verdict is Verdict.ROLL_BACK:
                    self._settle(doing)
                    return self._roll_back(done + 1)
                done += 1
                self.stopping = bool(self.most["asked"]) and done < self.config.steps
                record = self._record(done, result, time.perf_counter() - started)
                for callback in self.callbacks:
                    record |= callback.after_step(done, doing)
                for callback in self.callbacks:
                    callback.end_step(done, record, doing)
                if self.stopping:
                    break
        self._settle(doing)
        if self.stopping:
            stop.ask()  # whichever rank was: all of them end now
            _log.info(f"asked to stop: saved step {done}; start it again to go on")
            self.events.add("stopped", done)
        return done

    @contextmanager
    def _callbacks_ended(self, doing: Callable[[str], None]) -> Iterator[None]:
        """Ends every callback behind the block, in order, whatever happened there."""
        with ExitStack() as ends:
            for callback in reversed(self.callbacks):
                ends.callback(callback.end)
            try:
                yield
            except TrainingStopped:  # which every rank raises
                self._settle(doing)
                raise

    def _settle(self, doing: Callable[[str], None]) -> None:
        for callback in self.callbacks:
            callback.settle(doing)

    def _accepts(self, step: int, seen: StepResult) -> bool:
        """Whether a step may change the weights. Every rank comes to the same verdict."""
        self.most = self._figures.read()
        self._judged = Judgement()
        for callback in self.callbacks:
            self._judged = callback.judge(step, seen)
            if self._judged.verdict is not Verdict.APPLY:
                break
        verdict, reason = self._judged.verdict, self._judged.reason
        if reason is not None:
            _log.warning(f"bad step {step}: {reason} ({verdict.value})")
            self.events.add("bad_step", step, reason=reason, verdict=verdict.value)
        return verdict is Verdict.APPLY

    def _roll_back(self, bad_step: int) -> int:
        """Restore the newest checkpoint, to go on with the batches after that of the bad step; the steps done."""
        checkpoint = self.checkpoints.find(self.identity)
        if checkpoint is None:
            raise TrainingStopped(
                "there is no checkpoint to go back to",
                where=f"step {bad_step}, train.bad_steps",
                found=self._judged.reason,
                remedy="lower train.checkpoint_interval, or set the policy to skip",
            )
        self._passed_over += bad_step - checkpoint.step
        load_student(self.student, checkpoint.folder)
        self._load_progress(checkpoint)
        _log.info(f"back at step {checkpoint.step}; {self._passed_over} batches are passed over")
        self.events.add("rolled_back", checkpoint.step, passed_over=self._passed_over)
        return checkpoint.step

    def _share_figures(self, stop: StopRequest, waited: float) -> None:
        """Send what this rank adds to a step's record, and whether it was asked to stop, to all ranks."""
        before, self._bytes_read = self._bytes_read, self.batches.bytes_read
        device = self.batches.device
        figures: dict[str, float] = {}
        for callback in self.callbacks:
            figures |= callback.figures()
        figures |= {
            "asked": stop.asked,
            "waited": waited,
            "bytes_read": self._bytes_read - before,
            "rss": peak_rss_bytes(),
            "gpu": peak_gpu_bytes(device),
        }
        self._figures = MostAnywhere(figures, device)

    def _record(self, step: int, result: StepResult, seconds: float) -> dict[str, Any]:
        """See `train.metrics`."""
        waited, bytes_read, rss, gpu = (
            self.most[name] for name in ("waited", "bytes_read", "rss", "gpu")
        )
        tokens_per_step = self.batches.global_batch_size * self.batches.seq_len
        values = [value if math.isfinite(value) else None for value in result.terms.tolist()]
        terms = dict(zip(self.objective.term_names, values, strict=True))
        if not self.has_targets:
            terms["kl"] = None
        terms |= {k: v if math.isfinite(v) else None for k, v in result.router.items()}
        speed = tokens_per_step / seconds
        return {
            "step": step,
            **terms,
            "grad_norm": result.grad_norm if math.isfinite(result.grad_norm) else None,
            "lr": result.learning_rate,
            **self.objective.moving,
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

    def _resume(self) -> int:
        if self.resume_from is None:
            return 0
        self._passed_over = self._load_progress(self.resume_from)
        if not load_student(self.student, self.resume_from.folder):
            _log.info("the layout has changed: dropout streams start anew")
        _log.info(f"resumed at step {self.resume_from.step}")
        return self.resume_from.step

    def progress(self, step: int) -> dict[str, Any]:
        """Return what a checkpoint of these steps keeps of a run besides its student.

        The callbacks are told that the checkpoint is made.

        Raises:
            ConfigError: two callbacks keep something under one key.
        """
        progress: dict[str, Any] = {"passed_over": self._passed_over}
        for callback in self.callbacks:
            callback.before_save(step)
        for callback in self.callbacks:
            state = callback.state_dict()
            if taken := progress.keys() & state.keys():
                raise ConfigError(
                    "two callbacks keep something under one key",
                    where=f"{type(callback).__name__}.state_dict",
                    found=", ".join(sorted(taken)),
                    remedy="name the key after the callback",
                )
            progress |= state
        return progress

    def _load_progress(self, checkpoint: Checkpoint) -> int:
        """Give the callbacks what a checkpoint keeps of them; the batches that its run had passed over.

        Raises:
            CheckpointError: the record is damaged.
        """
        try:
            passed_over = int(checkpoint.progress["passed_over"])
            for callback in self.callbacks:
                callback.load_state_dict(checkpoint.progress)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the checkpoint's record is damaged",
                where=checkpoint.folder,
                found=f"progress: {type(error).__name__}: {error}",
            ) from None
        return passed_over
