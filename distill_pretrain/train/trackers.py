"""Experiment trackers that follow a run: TensorBoard, Weights & Biases, Prometheus.

They get the records of metrics.jsonl, on rank 0. What one of them fails at is said once; it is then left out, and the
run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from distill_pretrain.errors import MissingDependency
from distill_pretrain.train.callbacks import Callback

_log = logging.getLogger(__name__)

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""Tracker -> package; prometheus needs none."""
PROMETHEUS_INTERVAL_S = 5.0
TENSORBOARD_FLUSH_S = 10

_GROUPS = {
    "optimizer": ("grad_norm", "lr", "applied"),
    "speed": (
        "tokens_per_second",
        "tflops_per_device",
        "mfu",
        "seconds",
        "data_wait",
        "cache_mb_per_s",
    ),
    "router": ("load_balancing_loss", "router_z_loss"),
    "memory": ("rss_peak_gb", "gpu_peak_gb"),
    "progress": ("tokens",),
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_NOT_PLOTTED = ("step", "time")


class Tracker(Protocol):
    """Something that a run's records go to."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the record of one step; see `train.metrics`."""

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take the records of steps done before this start, where an earlier one may have lost them."""

    def flush(self) -> None:
        """Write out what waits in memory: a checkpoint follows."""

    def close(self) -> None:
        """Take leave; everything written so far is kept."""


def require_trackers(names: Iterable[str]) -> None:
    """Raise MissingDependency where the package of a tracker is not installed."""
    for name in names:
        package = PACKAGES.get(name)
        if package is None:
            continue
        spec = importlib.util.find_spec(package)
        # A folder of that name in the working directory, which W&B itself leaves there, is no package.
        if spec is None or spec.origin is None:
            raise MissingDependency(package, extra="track", needed_for=f"train.track: {name}")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a record that can be plotted, as GROUP/NAME; loss terms are what no other group has."""
    return {
        f"{_GROUP_OF.get(name, 'loss')}/{name}": float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and name not in _NOT_PLOTTED
    }


class TensorBoardTracker:
    """Writes event files in FOLDER/tensorboard.

    Args:
        folder: of the run.
        done: steps done; what earlier starts of the run wrote beyond them is hidden.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder / "tensorboard"), purge_step=done + 1, flush_secs=TENSORBOARD_FLUSH_S
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the scalars of one step."""
        for tag, value in numbers(record).items():
            self._writer.add_scalar(tag, value, record["step"], walltime=record.get("time"))

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: no step of a checkpoint is lost, since every one is flushed first."""

    def flush(self) -> None:
        """Write out what waits in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbTracker:
    """Feeds a Weights & Biases run of the folder's name, the same for every start; W&B's environment has its settings.

    Args:
        folder: of the run; its W&B id is kept there.
        settings: shown as the run's configuration.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        # W&B writes in its own time, and keeps to itself how far it is: what a killed start gave it may be lost.
        self._mark = folder / "wandb_last_step"
        self._last: int | None = None
        id_file = folder / "wandb_run_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        self._run: Any = wandb.init(
            id=id_file.read_text(),
            name=folder.name,
            dir=str(folder),
            resume="allow",
            config=dict(settings),
        )
        # A run that goes on from a checkpoint repeats steps, which W&B's own counter would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Log the figures of one step."""
        self._run.log({"step": record["step"], **numbers(record)})
        self._last = record["step"]

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Give it every step again since the last start that ended in order; equal figures at equal steps."""
        try:
            kept = int(self._mark.read_text())
        except (OSError, ValueError):
            kept = 0
        last = records[-1]["step"] if records else 0
        if kept > last:  # a run that went back repeats steps
            kept = last
            self._mark.write_text(str(kept))
        for record in records:
            if record["step"] > kept:
                self.write(record)

    def flush(self) -> None:
        """Do nothing: W&B writes in its own time."""

    def close(self) -> None:
        """End the W&B run."""
        self._run.finish()
        if self._last is not None:
            self._mark.write_text(str(self._last))


class PrometheusTracker:
    """Writes FOLDER/metrics.prom for the textfile collector of node_exporter: the last record, replaced as a whole.

    Args:
        folder: of the run.
        clock: seconds.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = folder / "metrics.prom"
        name = folder.resolve().name
        for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("\n", "\\n")):
            name = name.replace(plain, escaped)
        self._label = f'{{run="{name}"}}'
        self._clock = clock
        self._written: float | None = None
        self._last: Mapping[str, Any] | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Publish a record, if the last one is some seconds old."""
        self._last = record
        if self._written is None or self._clock() - self._written >= PROMETHEUS_INTERVAL_S:
            self._publish()

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing: only the last record counts."""

    def flush(self) -> None:
        """Do nothing: the next record comes in seconds."""

    def close(self) -> None:
        """Publish the last record; it stays."""
        self._publish()

    def _publish(self) -> None:
        if self._last is None:
            return
        self._written = self._clock()
        lines = []
        for name, value in (("step", self._last["step"]), *numbers(self._last).items()):
            metric = f"distill_pretrain_{name.rpartition('/')[2]}"
            lines += [f"# TYPE {metric} gauge", f"{metric}{self._label} {float(value)!r}"]
        # Nothing is lost with a file that is replaced in seconds: no fsync.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)
        self._last = None


class Trackers:
    """All trackers of a run; the first failure of one is a warning, and its end.

    Args:
        names: of `train.track`.
        folder: of the run.
        done: steps done.
        settings: see `WandbTracker`.
    """

    def __init__(
        self,
        names: Iterable[str],
        folder: Path,
        *,
        done: int,
        settings: Mapping[str, Any],
    ) -> None:
        opens: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoardTracker(folder, done),
            "wandb": lambda: WandbTracker(folder, settings),
            "prometheus": lambda: PrometheusTracker(folder),
        }
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            tracker = self._guarded(name, opens[name])
            if tracker is not None:
                self._trackers[name] = tracker

    def write(self, record: Mapping[str, Any]) -> None:
        """Hand a record to all of them."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.write, record))

    def catch_up(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell all of them of the steps done before this start."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.catch_up, records))

    def flush(self) -> None:
        """Let all of them write out what waits in memory."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.flush)

    def close(self) -> None:
        """Close all of them."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)
        self._trackers.clear()

    def _guarded(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            return action()
        # A tracker may fail in any way: network, disk, quota, a version of its package.
        except Exception as error:
            self._trackers.pop(name, None)
            _log.warning(
                f"train.track: {name} failed and is left out from here on: "
                f"{type(error).__name__}: {error}"
            )
            return None


class Tracking(Callback):
    """Hands the records of a training to its trackers; after `Metrics`, whose file tells of the steps before.

    Args:
        names: of `train.track`; none on ranks that do not write.
        folder: of the run.
        settings: see `WandbTracker`.
    """

    def __init__(self, names: Iterable[str], folder: Path, settings: Mapping[str, Any]) -> None:
        self._names = tuple(names)
        self._folder = folder
        self._settings = settings
        self._trackers: Trackers | None = None

    def begin(self, step: int) -> None:
        """See `Callback`."""
        if not self._names:
            return
        self._trackers = Trackers(self._names, self._folder, done=step, settings=self._settings)
        lines = (self._folder / "metrics.jsonl").read_bytes().splitlines()
        self._trackers.catch_up([json.loads(line) for line in lines])

    def end_step(self, step: int, record: Mapping[str, Any], doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        if self._trackers is not None:
            self._trackers.write(record)

    def before_save(self, step: int) -> None:
        """See `Callback`."""
        if self._trackers is not None:
            self._trackers.flush()

    def settle(self, doing: Callable[[str], None]) -> None:
        """See `Callback`."""
        self.end()

    def end(self) -> None:
        """See `Callback`."""
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
