"""A profile of some steps: a trace per rank, and a table of what took longest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from distill_pretrain.train.callbacks import Callback

_log = logging.getLogger(__name__)

ROWS = 40


class StepProfile(Callback):
    """Watches steps with torch.profiler; the process's own threads and, on GPUs, its kernels.

    Writes FOLDER/rank-N.json.gz, which ui.perfetto.dev and chrome://tracing open, and FOLDER/rank-N.txt.

    Args:
        first: step that is watched first; a start that goes on behind it watches nothing.
        last: step that is watched last.
        folder: to be written.
        rank: of this process in the job.
    """

    def __init__(self, first: int, last: int, *, folder: Path, rank: int) -> None:
        self._first, self._last = first, last
        self._folder, self._rank = folder, rank
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """See `Callback`."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def after_step(self, step: int, doing: Callable[[str], None]) -> dict[str, Any]:
        """See `Callback`."""
        if self._profile is not None and step >= self._last:
            doing(f"step {step}: writing a profile")
            self._write(self._profile)
            self._profile = None
            _log.info(f"profile of steps {self._first} to {step}: {self._folder}")
        return {}

    def end(self) -> None:
        """See `Callback`; a profile that was cut short is dropped."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, watched: profile) -> None:
        watched.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = watched.key_averages().table(sort_by=by, row_limit=ROWS)
        (self._folder / f"rank-{self._rank}.txt").write_text(table)
        watched.export_chrome_trace(str(self._folder / f"rank-{self._rank}.json.gz"))
